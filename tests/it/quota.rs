//! Quotas: exact at the edge, and nobody pays for another.

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use keyfold::tenant::Verb;
use reqwest::Method;
use serde_json::json;

use crate::caller::{Answer, Caller};
use crate::service::World;

async fn call(caller: &Caller) -> Answer {
    caller.try_encrypt(b"hello", &json!({})).await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_burst_passes_the_next_is_told_when_and_then_passes() {
    let mut world = World::new().await;
    world.settings.quotas.tenant.requests_per_sec = 2;
    world.settings.quotas.tenant.requests_burst = 3;
    let service = world.start_without_keeper().await;
    let caller = service.tenant_and_caller("acme").await;
    for standing in ["r=2;t=1", "r=1;t=1", "r=0;t=2"] {
        let answer = call(&caller).await;
        assert_eq!(answer.status, 200);
        assert_eq!(answer.headers["ratelimit-policy"], "\"tenant-requests\";q=3;w=2");
        assert_eq!(answer.headers["ratelimit"], format!("\"tenant-requests\";{standing}"));
    }
    let answer = call(&caller).await;
    assert!(answer.problem("rate_limited").contains("tenant-requests"));
    assert_eq!((answer.status, &answer.headers["retry-after"]), (429, &"1".parse().unwrap()));
    assert_eq!(answer.headers["ratelimit"], "\"tenant-requests\";r=0;t=2");
    world.clock.advance(std::time::Duration::from_millis(499));
    call(&caller).await.problem("rate_limited");
    world.clock.advance(std::time::Duration::from_millis(1));
    assert_eq!(call(&caller).await.status, 200);
    call(&caller).await.problem("rate_limited");
    // Administration and health have no quota.
    for _ in 0..10 {
        assert_eq!(caller.get("/v1/tenants/acme").await.status, 200);
        assert_eq!(caller.get("/live").await.status, 200);
    }
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_past_his_quota_takes_nothing_from_another() {
    let mut world = World::new().await;
    world.settings.quotas.tenant.requests_per_sec = 10;
    let service = world.start_without_keeper().await;
    let (loud, quiet) = (service.tenant_and_caller("loud").await, service.tenant_and_caller("quiet").await);
    let (mut loud_passed, mut quiet_passed) = (0, 0);
    for _ in 0..5 {
        for _ in 0..40 {
            loud_passed += u32::from(call(&loud).await.status == 200);
        }
        for _ in 0..10 {
            quiet_passed += u32::from(call(&quiet).await.status == 200);
        }
        world.pass(1);
    }
    assert_eq!((loud_passed, quiet_passed), (50, 50));
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_principal_past_his_quota_takes_nothing_from_others_of_his_tenant() {
    let mut world = World::new().await;
    world.settings.quotas.principal.requests_per_sec = 3;
    world.settings.quotas.tenant.requests_per_sec = 5;
    let service = world.start_without_keeper().await;
    let one = service.tenant_and_caller("acme").await;
    let two = service.caller(&["acme"], &Verb::ALL).await;
    for _ in 0..3 {
        assert_eq!(call(&one).await.status, 200);
    }
    for _ in 0..10 {
        assert!(call(&one).await.problem("rate_limited").contains("principal-requests"));
    }
    for _ in 0..2 {
        assert_eq!(call(&two).await.status, 200);
    }
    assert!(call(&two).await.problem("rate_limited").contains("tenant-requests"));
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_count_whether_they_are_announced_or_not() {
    let mut world = World::new().await;
    world.settings.quotas.tenant.kib_per_sec = 4;
    let service = world.start_without_keeper().await;
    let caller = service.tenant_and_caller("acme").await;
    // 3 KiB, begun ones as whole.
    let body = format!("{{\"plaintext\": \"{}\"}}", "aGVs".repeat(600));
    assert_eq!(body.len().div_ceil(1_024), 3);
    assert_eq!(caller.post_text("/v1/encrypt", body.clone()).await.status, 200);
    caller.post_text("/v1/encrypt", body.clone()).await.problem("rate_limited");
    world.pass(1);
    // A body that does not tell its length.
    let chunked =
        |body: &str| reqwest::Body::wrap(Full::new(Bytes::from(body.to_owned())).map_frame(|frame| frame));
    assert_eq!(caller.post_text("/v1/encrypt", chunked(&body)).await.status, 200);
    caller.post_text("/v1/encrypt", chunked(&body)).await.problem("rate_limited");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_larger_than_the_burst_is_paid_in_full_announced_or_not() {
    let mut world = World::new().await;
    world.settings.quotas.tenant.kib_per_sec = 4;
    let service = world.start_without_keeper().await;
    let caller = service.tenant_and_caller("acme").await;
    let octets = ("content-type", "application/octet-stream");
    let body = Bytes::from(vec![7; 20 << 10]);
    for announced in [true, false] {
        let body = if announced {
            reqwest::Body::from(body.clone())
        } else {
            reqwest::Body::wrap(Full::new(body.clone()).map_frame(|frame| frame))
        };
        let request = caller.request(Method::POST, "/v1/encrypt").header(octets.0, octets.1).body(body);
        let answer = request.send().await.unwrap();
        assert_eq!(answer.status(), 200);
        let headers = answer.headers().clone();
        answer.bytes().await.unwrap();
        if announced {
            let (policy, limit) = (&headers["ratelimit-policy"], &headers["ratelimit"]);
            assert_eq!(policy, "\"tenant-bytes\";q=4096;w=1;qu=\"content-bytes\"");
            assert_eq!(limit, "\"tenant-bytes\";r=0;t=5");
        }
        // 16 KiB are owed, and one more is wanted.
        let refused = call(&caller).await;
        assert!(refused.problem("rate_limited").contains("tenant-bytes"));
        assert_eq!(refused.headers["retry-after"], "5");
        world.clock.advance(std::time::Duration::from_millis(4_249));
        call(&caller).await.problem("rate_limited");
        world.clock.advance(std::time::Duration::from_millis(1));
        assert_eq!(call(&caller).await.status, 200);
        world.pass(10);
    }
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_that_the_tenants_quota_refuses_costs_the_caller_nothing() {
    let mut world = World::new().await;
    world.settings.quotas.tenant.requests_per_sec = 2;
    world.settings.quotas.principal.requests_per_sec = 4;
    world.settings.quotas.principal.requests_burst = 6;
    let service = world.start_without_keeper().await;
    let caller = service.tenant_and_caller("acme").await;
    for _ in 0..2 {
        assert_eq!(call(&caller).await.status, 200);
    }
    for _ in 0..10 {
        assert!(call(&caller).await.problem("rate_limited").contains("tenant-requests"));
    }
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn cold_keys_cost_a_tenant_no_more_kms_calls_than_he_may_cause() {
    let mut world = World::new().await;
    world.settings.pool.tenant_kms_calls_per_min = 2;
    let service = world.start_without_keeper().await;
    let caller = service.tenant_and_caller("acme").await;
    let other = service.tenant_and_caller("other").await;
    for key in ["one", "two", "three"] {
        caller.post("/v1/tenants/acme/keys", &json!({"key": key})).await.ok(201);
    }
    let of = |key: &str| json!({"plaintext": "aGVsbG8=", "key": key});
    assert_eq!(caller.post("/v1/encrypt", &of("one")).await.status, 200);
    assert_eq!(caller.post("/v1/encrypt", &of("two")).await.status, 200);
    let refused = caller.post("/v1/encrypt", &of("three")).await;
    assert!(refused.problem("rate_limited").contains("tenant_kms_calls_per_min"));
    assert_eq!(refused.headers["retry-after"], "30");
    // What is in memory goes on, and so do others.
    assert_eq!(caller.post("/v1/encrypt", &of("one")).await.status, 200);
    assert_eq!(call(&other).await.status, 200);
    let calls = world.kms.generates_of("acme");
    world.pass(29);
    caller.post("/v1/encrypt", &of("three")).await.problem("rate_limited");
    assert_eq!(world.kms.generates_of("acme"), calls);
    world.pass(1);
    assert_eq!(caller.post("/v1/encrypt", &of("three")).await.status, 200);
    service.stop().await;
}
