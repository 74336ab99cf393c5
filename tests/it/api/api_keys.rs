//! `/v1/tenants/{tenant}/api-keys`

use keyfold::tenant::Verb;
use serde_json::{Value, json};

use crate::caller::text;
use crate::service::World;

#[tokio::test(flavor = "multi_thread")]
async fn an_api_key_is_shown_once_and_works_at_once() {
    let world = World::new().await;
    let service = world.start().await;
    let admin = service.tenant_and_caller("acme").await;
    let body = json!({"name": "billing service", "verbs": ["decrypt", "encrypt", "encrypt"]});
    let made = admin.post("/v1/tenants/acme/api-keys", &body).await.ok(201);
    let (id, token) = (text(&made["id"]), text(&made["token"]));
    assert!(token.starts_with(&format!("kf_{id}_")), "{id}");
    assert_eq!(made["verbs"], json!(["encrypt", "decrypt"]));
    assert_eq!(made["tenants"], json!(["acme"]));
    let caller = admin.with_token(token.clone());
    let ciphertext = caller.encrypt(b"hello", &json!({})).await;
    assert_eq!(caller.decrypt(&ciphertext, &json!({})).await, b"hello");
    caller.get("/v1/tenants/acme").await.problem("forbidden");
    let list = admin.get("/v1/tenants/acme/api-keys").await;
    let secret = token.rsplit_once(&format!("{id}_")).unwrap().1;
    assert!(!list.raw.contains(secret));
    let listed = list.ok(200);
    assert!(listed["items"].as_array().unwrap().iter().any(|key| key["id"] == id.as_str()));
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_key_is_refused_by_the_very_next_request() {
    let world = World::new().await;
    let service = world.start().await;
    let admin = service.tenant_and_caller("acme").await;
    let body = json!({"name": "ci", "verbs": ["encrypt"]});
    let made = admin.post("/v1/tenants/acme/api-keys", &body).await.ok(201);
    let caller = admin.with_token(text(&made["token"]));
    caller.encrypt(b"hello", &json!({})).await;
    let path = format!("/v1/tenants/acme/api-keys/{}/revoke", text(&made["id"]));
    let revoked = admin.post(&path, &json!({})).await.ok(200);
    assert_eq!(revoked["revoked_at"], "2026-11-23T12:00:00Z");
    caller.try_encrypt(b"hello", &json!({})).await.problem("unauthenticated");
    world.pass(60);
    let again = admin.post(&path, &json!({})).await.ok(200);
    assert_eq!(again["revoked_at"], revoked["revoked_at"], "an earlier revocation stands");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_expires_exactly_when_it_says() {
    let world = World::new().await;
    let service = world.start().await;
    let admin = service.tenant_and_caller("acme").await;
    let body = json!({"name": "ci", "verbs": ["encrypt"], "expires_at": "2026-11-23T13:00:00+00:30"});
    let made = admin.post("/v1/tenants/acme/api-keys", &body).await.ok(201);
    assert_eq!(made["expires_at"], "2026-11-23T12:30:00Z");
    let caller = admin.with_token(text(&made["token"]));
    world.pass(30 * 60 - 1);
    caller.encrypt(b"hello", &json!({})).await;
    world.pass(1);
    caller.try_encrypt(b"hello", &json!({})).await.problem("unauthenticated");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_grant_that_makes_no_sense_is_refused() {
    let world = World::new().await;
    let service = world.start().await;
    let admin = service.tenant_and_caller("acme").await;
    let long = "n".repeat(101);
    for (body, says) in [
        (json!({"name": "", "verbs": ["encrypt"]}), "1 to 100"),
        (json!({"name": long, "verbs": ["encrypt"]}), "1 to 100"),
        (json!({"name": "a\nb", "verbs": ["encrypt"]}), "control"),
        (json!({"name": "ci", "verbs": []}), "verbs"),
        (json!({"name": "ci", "verbs": ["sign"]}), "unknown variant"),
        (json!({"name": "ci"}), "missing field `verbs`"),
        (json!({"name": "ci", "verbs": ["encrypt"], "expires_at": "tomorrow"}), "RFC 3339"),
        (json!({"name": "ci", "verbs": ["encrypt"], "expires_at": "2026-11-23T12:00:00Z"}), "past"),
        (json!({"name": "ci", "verbs": ["encrypt"], "tenants": ["UPPER"]}), "tenant"),
        (json!({"name": "ci", "verbs": ["encrypt"], "tenants": vec!["acme"; 101]}), "100"),
    ] {
        let detail = admin.post("/v1/tenants/acme/api-keys", &body).await.problem("malformed_request");
        assert!(detail.contains(says), "{body}: {detail}");
    }
    let body = json!({"name": "n".repeat(100), "verbs": ["encrypt"]});
    admin.post("/v1/tenants/acme/api-keys", &body).await.ok(201);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_raises_himself_by_making_a_key() {
    let world = World::new().await;
    let service = world.start().await;
    let operator = service.tenant_and_caller("acme").await;
    service.tenant("emil").await;
    let admin = service.caller(&["acme"], &[Verb::Admin]).await;
    let make = |verbs: Value, tenants: Value| json!({"name": "x", "verbs": verbs, "tenants": tenants});
    let path = "/v1/tenants/acme/api-keys";
    admin.post(path, &make(json!(["operate"]), json!([]))).await.problem("forbidden");
    admin.post(path, &make(json!(["encrypt"]), json!(["emil"]))).await.problem("forbidden");
    admin.post(path, &make(json!(["encrypt"]), json!(["nobody"]))).await.problem("forbidden");
    admin.post("/v1/tenants/emil/api-keys", &make(json!(["encrypt"]), json!([]))).await.problem("forbidden");
    let both = operator.post(path, &make(json!(["encrypt"]), json!(["emil"]))).await.ok(201);
    assert_eq!(both["tenants"], json!(["acme", "emil"]));
    operator.post(path, &make(json!(["encrypt"]), json!(["nobody"]))).await.problem("not_found");
    // A key of two tenants is visible to, and can be revoked by, the administrator of either.
    let listed = admin.get(path).await.ok(200);
    assert!(listed["items"].as_array().unwrap().iter().any(|key| key["id"] == both["id"]));
    let emils = service.caller(&["emil"], &[Verb::Admin]).await;
    let own = text(&admin.post(path, &make(json!(["encrypt"]), json!([]))).await.ok(201)["id"]);
    emils.post(&format!("/v1/tenants/emil/api-keys/{own}/revoke"), &json!({})).await.problem("not_found");
    let shared = text(&both["id"]);
    emils.post(&format!("/v1/tenants/emil/api-keys/{shared}/revoke"), &json!({})).await.ok(200);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn api_keys_are_listed_in_pages_and_a_tenant_that_is_not_there_has_none() {
    let world = World::new().await;
    let service = world.start().await;
    let operator = service.tenant_and_caller("acme").await;
    for _ in 0..4 {
        service.token(&["acme"], &[Verb::Encrypt]).await;
    }
    let first = operator.get("/v1/tenants/acme/api-keys?limit=3").await.ok(200);
    let path = format!("/v1/tenants/acme/api-keys?limit=3&after={}", text(&first["next"]));
    let second = operator.get(&path).await.ok(200);
    let ids = |page: &Value| {
        page["items"].as_array().unwrap().iter().map(|key| text(&key["id"])).collect::<Vec<_>>()
    };
    let mut all = ids(&first);
    all.extend(ids(&second));
    let mut sorted = all.clone();
    sorted.sort();
    sorted.dedup();
    assert_eq!((all.len(), all), (5, sorted));
    operator.get("/v1/tenants/nobody/api-keys").await.problem("not_found");
    operator.post("/v1/tenants/acme/api-keys/AAAAAAAAAAAAAAAA/revoke", &json!({})).await.problem("not_found");
    service.stop().await;
}

/// It is easily done: the whole token pasted where its id belongs. The answer must not carry it on, nor the log.
#[tokio::test(flavor = "multi_thread")]
async fn a_token_in_place_of_its_id_is_refused_without_being_quoted() {
    let world = World::new().await;
    let service = world.start().await;
    let operator = service.tenant_and_caller("acme").await;
    let token = service.token(&["acme"], &[Verb::Encrypt]).await;
    let answer = operator.post(&format!("/v1/tenants/acme/api-keys/{token}/revoke"), &json!({})).await;
    assert!(answer.problem("malformed_request").contains("id"));
    assert!(!answer.raw.contains(&token[20..]), "{}", answer.raw);
    service.stop().await;
}
