//! `GET /live`, `GET /ready`, and what every answer has in common.

use serde_json::json;

use crate::caller::receive;
use crate::contract;
use crate::probes::KmsFault;
use crate::service::World;

#[tokio::test(flavor = "multi_thread")]
async fn a_process_is_alive_whatever_it_relies_on_and_ready_needs_no_credential() {
    let world = World::new().await;
    let service = world.start().await;
    let anonymous = service.anonymous();
    assert_eq!(anonymous.get("/live").await.ok(200), json!({"status": "live"}));
    assert_eq!(anonymous.get("/ready").await.ok(200), json!({"status": "ready", "reasons": []}));
    service.store.down(true);
    world.kms.fail(KmsFault::Outage);
    assert_eq!(anonymous.get("/live").await.ok(200), json!({"status": "live"}));
    world.pass(2);
    let degraded = anonymous.get("/ready").await.ok(200);
    assert_eq!(degraded["status"], "degraded");
    assert!(degraded["reasons"][0].as_str().unwrap().contains("registry"));
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_id_is_taken_over_where_it_is_harmless_and_made_where_it_is_not() {
    let world = World::new().await;
    let service = world.start().await;
    let id_of = async |given: &str| {
        let caller = service.anonymous().with_header("x-request-id", given);
        let answer = caller.get("/v1/tenants").await;
        answer.problem("unauthenticated");
        answer.headers["x-request-id"].to_str().unwrap().to_owned()
    };
    assert_eq!(id_of("order-42:a/b+c=.d_e").await, "order-42:a/b+c=.d_e");
    assert_eq!(id_of(&"a".repeat(64)).await, "a".repeat(64));
    for bad in ["", "a b", "a\"b", "<a>", &"a".repeat(65)] {
        assert_ne!(id_of(bad).await, bad);
    }
    assert_ne!(id_of("").await, id_of("").await);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_there_and_what_is_not_allowed_are_problems_too() {
    let world = World::new().await;
    let service = world.start().await;
    let caller = service.tenant_and_caller("acme").await;
    for path in
        ["/", "/v1", "/v2/encrypt", "/v1/encrypt/", "/v1//encrypt", "/v1/tenants/acme/keys/a/b", "/metrics"]
    {
        let answer = receive(caller.request(reqwest::Method::POST, path)).await;
        answer.problem("not_found");
    }
    for (method, path, allow) in [
        ("GET", "/v1/encrypt", "POST"),
        ("DELETE", "/v1/decrypt", "POST"),
        ("POST", "/live", "GET"),
        ("PATCH", "/v1/tenants/acme", "PUT"),
    ] {
        let answer = receive(caller.request(method.parse().unwrap(), path)).await;
        answer.problem("method_not_allowed");
        assert!(answer.headers["allow"].to_str().unwrap().contains(allow), "{method} {path}");
        contract::check_problem(&answer);
    }
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn http_2_serves_as_http_1_does() {
    let world = World::new().await;
    let service = world.start().await;
    let caller = service.tenant_and_caller("acme").await.over_http2();
    let ciphertext = caller.encrypt(b"hello", &json!({"record": "42"})).await;
    assert_eq!(caller.decrypt(&ciphertext, &json!({"record": "42"})).await, b"hello");
    caller.with_token("kf_").get("/v1/tenants").await.problem("unauthenticated");
    service.stop().await;
}
