//! `POST /v1/rewrap`

use envelope::{inspect, text as envelope_text};
use serde_json::{Value, json};

use crate::caller::{Caller, plaintext, text};
use crate::service::World;

const A_DAY: u64 = 24 * 60 * 60;

async fn rewrap(caller: &Caller, ciphertext: &str, more: Value) -> Value {
    let mut body = json!({"ciphertext": ciphertext});
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    caller.post("/v1/rewrap", &body).await.ok(200)
}

fn body_of(ciphertext: &str) -> Vec<u8> {
    let envelope = envelope_text::decode(ciphertext).unwrap();
    let offset = inspect(&envelope).unwrap().body_offset();
    envelope[offset..].to_vec()
}

fn is_compact(ciphertext: &str) -> bool {
    inspect(&envelope_text::decode(ciphertext).unwrap()).unwrap().wrapped().is_compact()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_current_comes_back_byte_for_byte() {
    let world = World::new().await;
    let service = world.start().await;
    let caller = service.tenant_and_caller("acme").await;
    let ciphertext = caller.encrypt(b"hello", &json!({"record": "42"})).await;
    for more in [
        json!({"context": {"record": "42"}}),
        json!({"mode": "wrapped_key"}),
        json!({"mode": "wrapped_key", "context": {"not": "looked at"}}),
    ] {
        let rewrapped = rewrap(&caller, &ciphertext, more).await;
        assert_eq!(rewrapped["ciphertext"], ciphertext.as_str());
        assert_eq!(rewrapped["changed"], false);
        assert_eq!(rewrapped["from_dek_id"], rewrapped["to_dek_id"]);
    }
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_context_is_refused_where_the_message_is_looked_at() {
    let world = World::new().await;
    let service = world.start_without_keeper().await;
    let caller = service.tenant_and_caller("acme").await;
    let ciphertext = caller.encrypt(b"hello", &json!({"record": "42"})).await;
    for _ in ["active", "retired"] {
        for wrong in [json!({}), json!({"record": "43"})] {
            let body = json!({"ciphertext": ciphertext, "context": wrong});
            caller.post("/v1/rewrap", &body).await.problem("context_mismatch");
        }
        let reserved = json!({"ciphertext": ciphertext, "context": {"keyfold:tenant": "acme"}});
        caller.post("/v1/rewrap", &reserved).await.problem("reserved_context");
        world.pass(A_DAY);
        caller.encrypt(b"the data key before is now retired", &json!({})).await;
    }
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_of_a_retired_data_key_is_sealed_again_under_the_active_one() {
    let world = World::new().await;
    let service = world.start_without_keeper().await;
    let caller = service.tenant_and_caller("acme").await;
    let before = caller.try_encrypt(b"hello", &json!({"record": "42"})).await.ok(200);
    world.pass(A_DAY);
    let active = caller.try_encrypt(b"another", &json!({})).await.ok(200);
    let context = json!({"context": {"record": "42"}});
    let rewrapped = rewrap(&caller, &text(&before["ciphertext"]), context.clone()).await;
    assert_eq!(rewrapped["changed"], true);
    assert_eq!(rewrapped["from_dek_id"], before["dek_id"]);
    assert_eq!(rewrapped["to_dek_id"], active["dek_id"]);
    let opened = caller.try_decrypt(&text(&rewrapped["ciphertext"]), &json!({"record": "42"})).await.ok(200);
    assert_eq!((plaintext(&opened), &opened["rewrap_advised"]), (b"hello".to_vec(), &Value::Bool(false)));
    assert_eq!(opened["dek_id"], active["dek_id"]);
    // It is current now.
    let again = rewrap(&caller, &text(&rewrapped["ciphertext"]), context).await;
    assert_eq!((&again["ciphertext"], &again["changed"]), (&rewrapped["ciphertext"], &Value::Bool(false)));
    // `wrapped_key` never touches the message.
    let section = rewrap(&caller, &text(&before["ciphertext"]), json!({"mode": "wrapped_key"})).await;
    assert_eq!((&section["ciphertext"], &section["changed"]), (&before["ciphertext"], &Value::Bool(false)));
    assert_eq!(section["to_dek_id"], before["dek_id"]);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn compact_becomes_embedded_and_back_without_touching_the_message() {
    let world = World::new().await;
    let service = world.start().await;
    let caller = service.tenant_and_caller("acme").await;
    let embedded = caller.encrypt(b"hello", &json!({"record": "42"})).await;
    for mode in ["auto", "wrapped_key"] {
        let more = json!({"mode": mode, "envelope": "compact", "context": {"record": "42"}});
        let compact = rewrap(&caller, &embedded, more).await;
        assert_eq!(compact["changed"], true);
        let compact = text(&compact["ciphertext"]);
        assert!(is_compact(&compact));
        assert_eq!(body_of(&compact), body_of(&embedded));
        let opened = caller.try_decrypt(&compact, &json!({"record": "42"})).await.ok(200);
        assert_eq!((plaintext(&opened), &opened["rewrap_advised"]), (b"hello".to_vec(), &Value::Bool(true)));
        let more = json!({"mode": mode, "envelope": "embedded", "context": {"record": "42"}});
        assert_eq!(rewrap(&caller, &compact, more).await["ciphertext"], embedded.as_str());
        // Where nothing is said, it is as the key's policy says.
        let more = json!({"mode": mode, "context": {"record": "42"}});
        assert_eq!(rewrap(&caller, &compact, more).await["ciphertext"], embedded.as_str());
    }
    service.stop().await;
}

/// A change of the master key: the tenant's ring changes, and new envelopes are wrapped under the new KEK. What the old
/// KEK wrapped goes on opening, and rewrapping brings it under the new one.
#[tokio::test(flavor = "multi_thread")]
async fn after_a_change_of_the_ring_messages_move_to_a_data_key_under_the_new_kek() {
    let world = World::new().await;
    world.keyring.add("two").await.unwrap();
    let service = world.start_without_keeper().await;
    let caller = service.tenant_and_caller("acme").await;
    let before = caller.encrypt(b"hello", &json!({})).await;
    caller.put("/v1/tenants/acme", &json!({"keks": [{"kek": "local:two"}]})).await.ok(200);
    let opened = caller.try_decrypt(&before, &json!({})).await.ok(200);
    assert_eq!(plaintext(&opened), b"hello");
    let fresh = caller.encrypt(b"fresh", &json!({})).await;
    let keks = |ciphertext: &str| {
        let head = inspect(&envelope_text::decode(ciphertext).unwrap()).unwrap();
        head.wrapped().keys().iter().map(|key| key.kek.clone()).collect::<Vec<_>>()
    };
    assert_eq!(keks(&fresh), ["local:two"]);
    let rewrapped = text(&rewrap(&caller, &before, json!({})).await["ciphertext"]);
    assert_eq!(keks(&rewrapped), ["local:two"]);
    // The old KEK can go now.
    world.keyring.disable("one").await.unwrap();
    let token = caller.token().to_owned();
    service.stop().await;
    let service = world.start_without_keeper().await;
    let caller = service.anonymous().with_token(token);
    assert_eq!(caller.decrypt(&rewrapped, &json!({})).await, b"hello");
    caller.try_decrypt(&before, &json!({})).await.problem("kek_denied");
    service.stop().await;
}
