//! `POST /v1/encrypt`

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use envelope::{inspect, text as envelope_text};
use keyfold::tenant::Verb;
use serde_json::json;

use crate::caller::text;
use crate::service::{KEK, World};

#[tokio::test(flavor = "multi_thread")]
async fn what_is_encrypted_is_decrypted_byte_for_byte_and_the_default_key_is_used() {
    let world = World::new().await;
    let service = world.start().await;
    let caller = service.tenant_and_caller("acme").await;
    let all_bytes: Vec<u8> = (0..=255).collect();
    for plaintext in [&b""[..], b"a", &all_bytes, &vec![7; 65_536], &vec![8; 65_537], &vec![9; 200_000]] {
        let answer = caller.try_encrypt(plaintext, &json!({"record": "42"})).await.ok(200);
        assert_eq!(answer["key"], "default");
        assert_eq!(caller.decrypt(&text(&answer["ciphertext"]), &json!({"record": "42"})).await, plaintext);
    }
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_envelope_shows_its_data_key_and_kek_and_nothing_of_the_message() {
    let world = World::new().await;
    let service = world.start().await;
    let caller = service.tenant_and_caller("acme").await;
    let answer = caller.try_encrypt(b"plaintext-canary", &json!({"record": "context-canary"})).await.ok(200);
    let envelope = envelope_text::decode(text(&answer["ciphertext"])).unwrap();
    let head = inspect(&envelope).unwrap();
    assert_eq!(head.dek_id().to_string(), text(&answer["dek_id"]));
    let context = head.wrapped().kms_context().unwrap();
    let pairs: Vec<_> = context.iter().collect();
    let dek = head.dek_id().to_string();
    assert_eq!(
        pairs,
        [("keyfold:dek", dek.as_str()), ("keyfold:key", "default"), ("keyfold:tenant", "acme")]
    );
    assert_eq!(head.wrapped().keys().iter().map(|key| key.kek.as_str()).collect::<Vec<_>>(), [KEK]);
    for secret in [&b"plaintext-canary"[..], b"context-canary", b"record"] {
        assert!(!envelope.windows(secret.len()).any(|window| window == secret));
    }
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_message_twice_gives_two_envelopes_under_one_data_key() {
    let world = World::new().await;
    let service = world.start().await;
    let caller = service.tenant_and_caller("acme").await;
    let first = caller.try_encrypt(b"hello", &json!({})).await.ok(200);
    let second = caller.try_encrypt(b"hello", &json!({})).await.ok(200);
    assert_ne!(first["ciphertext"], second["ciphertext"]);
    assert_eq!(first["dek_id"], second["dek_id"]);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_compact_envelope_has_92_bytes_of_overhead_and_a_key_can_make_it_the_default() {
    let world = World::new().await;
    let service = world.start().await;
    let caller = service.tenant_and_caller("acme").await;
    let compact = json!({"plaintext": STANDARD.encode(b"hello"), "envelope": "compact"});
    let answer = caller.post("/v1/encrypt", &compact).await.ok(200);
    let envelope = envelope_text::decode(text(&answer["ciphertext"])).unwrap();
    assert_eq!(envelope.len(), 5 + 92);
    assert_eq!(caller.decrypt(&text(&answer["ciphertext"]), &json!({})).await, b"hello");

    let policy = json!({"key": "small", "policy": {"envelope": "compact"}});
    caller.post("/v1/tenants/acme/keys", &policy).await.ok(201);
    for (weight, is_compact) in [(json!(null), true), (json!("compact"), true), (json!("embedded"), false)] {
        let body = json!({"plaintext": "aGVsbG8=", "key": "small", "envelope": weight});
        let answer = caller.post("/v1/encrypt", &body).await.ok(200);
        assert_eq!(answer["key"], "small");
        let envelope = envelope_text::decode(text(&answer["ciphertext"])).unwrap();
        assert_eq!(inspect(&envelope).unwrap().wrapped().is_compact(), is_compact);
        assert_eq!(caller.decrypt(&text(&answer["ciphertext"]), &json!({})).await, b"hello");
    }
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_client_leaves_out_it_may_also_send_as_null() {
    let world = World::new().await;
    let service = world.start().await;
    let caller = service.tenant_and_caller("acme").await;
    let nulls = json!({"plaintext": "aGVsbG8=", "context": null, "key": null, "envelope": null});
    let ciphertext = text(&caller.post("/v1/encrypt", &nulls).await.ok(200)["ciphertext"]);
    let nulls = json!({"ciphertext": ciphertext, "context": null});
    assert_eq!(caller.post("/v1/decrypt", &nulls).await.ok(200)["plaintext"], "aGVsbG8=");
    let nulls = json!({"ciphertext": ciphertext, "context": null, "envelope": null});
    assert_eq!(caller.post("/v1/rewrap", &nulls).await.ok(200)["changed"], false);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_escaped_slash_in_base64_is_read_as_php_writes_it() {
    let world = World::new().await;
    let service = world.start().await;
    let caller = service.tenant_and_caller("acme").await;
    let body = r#"{"plaintext": "\/\/\/\/", "context": {"\u0061": "\u00e9"}}"#;
    let ciphertext = text(&caller.post_text("/v1/encrypt", body).await.ok(200)["ciphertext"]);
    assert_eq!(caller.decrypt(&ciphertext, &json!({"a": "é"})).await, [255; 3]);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_credential_of_several_tenants_says_which_and_gets_no_other() {
    let world = World::new().await;
    let service = world.start().await;
    for tenant in ["acme", "emil", "evil"] {
        service.tenant(tenant).await;
    }
    let caller = service.caller(&["acme", "emil"], &[Verb::Encrypt, Verb::Decrypt]).await;
    let detail = caller.try_encrypt(b"hello", &json!({})).await.problem("forbidden");
    assert!(detail.contains("Keyfold-Tenant"), "{detail}");
    let ciphertext = caller.as_tenant("emil").encrypt(b"hello", &json!({})).await;
    assert_eq!(caller.as_tenant("emil").decrypt(&ciphertext, &json!({})).await, b"hello");
    caller.as_tenant("acme").try_decrypt(&ciphertext, &json!({})).await.problem("context_mismatch");
    for named in ["evil", "nobody", "ACME", "", "acme,emil"] {
        caller.as_tenant(named).try_encrypt(b"hello", &json!({})).await.problem("forbidden");
    }
    let twice = caller.as_tenant("acme").as_tenant("emil");
    twice.try_encrypt(b"hello", &json!({})).await.problem("malformed_request");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn each_verb_is_granted_for_itself() {
    let world = World::new().await;
    let service = world.start().await;
    let all = service.tenant_and_caller("acme").await;
    let ciphertext = all.encrypt(b"hello", &json!({})).await;
    for held in Verb::ALL {
        let caller = service.caller(&["acme"], &[held]).await;
        for (verb, path, body) in [
            (Verb::Encrypt, "/v1/encrypt", json!({"plaintext": ""})),
            (Verb::Decrypt, "/v1/decrypt", json!({"ciphertext": ciphertext})),
            (Verb::Rewrap, "/v1/rewrap", json!({"ciphertext": ciphertext})),
        ] {
            let answer = caller.post(path, &body).await;
            if verb == held {
                answer.ok(200);
            } else {
                assert!(answer.problem("forbidden").contains(verb.name()));
            }
        }
        let answer = caller.get("/v1/tenants/acme").await;
        match held {
            Verb::Admin | Verb::Operate => drop(answer.ok(200)),
            _ => drop(answer.problem("forbidden")),
        }
        let answer = caller.get("/v1/tenants").await;
        match held {
            Verb::Operate => drop(answer.ok(200)),
            _ => drop(answer.problem("forbidden")),
        }
    }
    service.stop().await;
}
