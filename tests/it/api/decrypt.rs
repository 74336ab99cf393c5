//! `POST /v1/decrypt`

use serde_json::{Value, json};

use crate::caller::{plaintext, text};
use crate::service::World;

#[tokio::test(flavor = "multi_thread")]
async fn the_context_must_be_the_same_in_every_pair() {
    let world = World::new().await;
    let service = world.start().await;
    let caller = service.tenant_and_caller("acme").await;
    let ciphertext = caller.encrypt(b"hello", &json!({"record": "42", "column": "name"})).await;
    assert_eq!(caller.decrypt(&ciphertext, &json!({"column": "name", "record": "42"})).await, b"hello");
    for other in [
        json!({}),
        json!({"record": "42"}),
        json!({"record": "42", "column": "nam"}),
        json!({"record": "42", "column": "name", "more": ""}),
        json!({"record": "name", "column": "42"}),
        json!({"Record": "42", "column": "name"}),
        json!({"record": "4", "2column": "name"}),
    ] {
        caller.try_decrypt(&ciphertext, &other).await.problem("context_mismatch");
    }
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_answer_names_the_key_and_the_data_key_that_sealed_it() {
    let world = World::new().await;
    let service = world.start().await;
    let caller = service.tenant_and_caller("acme").await;
    caller.post("/v1/tenants/acme/keys", &json!({"key": "billing"})).await.ok(201);
    let sealed =
        caller.post("/v1/encrypt", &json!({"plaintext": "aGVsbG8=", "key": "billing"})).await.ok(200);
    let opened = caller.try_decrypt(&text(&sealed["ciphertext"]), &json!({})).await.ok(200);
    assert_eq!(opened["key"], "billing");
    assert_eq!(opened["dek_id"], sealed["dek_id"]);
    assert_eq!(opened["rewrap_advised"], false);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_older_envelope_opens_and_is_advised_to_be_rewrapped() {
    let world = World::new().await;
    let service = world.start_without_keeper().await;
    let caller = service.tenant_and_caller("acme").await;
    let before = caller.encrypt(b"hello", &json!({})).await;
    world.pass(24 * 60 * 60);
    let after = caller.try_encrypt(b"hello", &json!({})).await.ok(200);
    let opened = caller.try_decrypt(&before, &json!({})).await.ok(200);
    assert_eq!(plaintext(&opened), b"hello");
    assert_ne!(opened["dek_id"], after["dek_id"]);
    assert_eq!(opened["rewrap_advised"], true);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_one_service_sealed_the_next_one_opens_embedded_or_compact() {
    let world = World::new().await;
    let service = world.start().await;
    let caller = service.tenant_and_caller("acme").await;
    let embedded = caller.encrypt(b"hello", &json!({})).await;
    let body = json!({"plaintext": "aGVsbG8=", "envelope": "compact"});
    let compact = text(&caller.post("/v1/encrypt", &body).await.ok(200)["ciphertext"]);
    let token = caller.token().to_owned();
    service.stop().await;

    let service = world.start().await;
    let caller = service.anonymous().with_token(token);
    assert_eq!(caller.decrypt(&embedded, &json!({})).await, b"hello");
    assert_eq!(caller.decrypt(&compact, &json!({})).await, b"hello");
    service.stop().await;
}

/// The registry is gone; key ring and envelopes are all there is.
#[tokio::test(flavor = "multi_thread")]
async fn an_embedded_envelope_opens_without_the_registry_that_made_it_and_a_compact_one_is_not_found() {
    let world = World::new().await;
    let service = world.start().await;
    let caller = service.tenant_and_caller("acme").await;
    let embedded = caller.encrypt(b"hello", &json!({"record": "42"})).await;
    let body = json!({"plaintext": "aGVsbG8=", "envelope": "compact"});
    let compact = text(&caller.post("/v1/encrypt", &body).await.ok(200)["ciphertext"]);
    service.stop().await;
    std::fs::remove_file(world.path("registry.sqlite")).unwrap();

    let service = world.start().await;
    let caller = service.tenant_and_caller("acme").await;
    caller.try_decrypt(&compact, &json!({})).await.problem("not_found");
    let opened = caller.try_decrypt(&embedded, &json!({"record": "42"})).await.ok(200);
    assert_eq!((plaintext(&opened), &opened["rewrap_advised"]), (b"hello".to_vec(), &Value::Bool(true)));
    caller.try_decrypt(&embedded, &json!({"record": "43"})).await.problem("context_mismatch");
    // Rewrapped, it is at home in the new registry.
    let body = json!({"ciphertext": embedded, "context": {"record": "42"}});
    let rewrapped = text(&caller.post("/v1/rewrap", &body).await.ok(200)["ciphertext"]);
    let opened = caller.try_decrypt(&rewrapped, &json!({"record": "42"})).await.ok(200);
    assert_eq!((plaintext(&opened), &opened["rewrap_advised"]), (b"hello".to_vec(), &Value::Bool(false)));
    service.stop().await;
}
