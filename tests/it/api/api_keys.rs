//! `/v1/tenants/{tenant}/api-keys`

use keyfold::tenant::Verb;
use serde_json::{Value, json};

use crate::caller::{Caller, text};
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
    let emils = service.caller(&["emil"], &[Verb::Admin]).await;
    let own = text(&admin.post(path, &make(json!(["encrypt"]), json!([]))).await.ok(201)["id"]);
    emils.post(&format!("/v1/tenants/emil/api-keys/{own}/revoke"), &json!({})).await.problem("not_found");
    service.stop().await;
}

/// Which other tenants a key holds is not an administrator's business, nor is their service his to stop.
#[tokio::test(flavor = "multi_thread")]
async fn an_administrator_sees_and_revokes_a_shared_key_for_his_own_tenants_only() {
    let world = World::new().await;
    let service = world.start().await;
    let operator = service.tenant_and_caller("acme").await;
    service.tenant("emil").await;
    service.tenant("third").await;
    let body = json!({"name": "x", "verbs": ["encrypt"], "tenants": ["emil", "third"]});
    let made = operator.post("/v1/tenants/acme/api-keys", &body).await.ok(201);
    let shared = operator.with_token(text(&made["token"]));
    let shown = async |admin: &Caller, tenant: &str| {
        let listed = admin.get(&format!("/v1/tenants/{tenant}/api-keys")).await.ok(200);
        let items = listed["items"].as_array().unwrap();
        items.iter().find(|key| key["id"] == made["id"]).map(|key| key["tenants"].clone())
    };
    let emils = service.caller(&["emil"], &[Verb::Admin]).await;
    let of_two = service.caller(&["acme", "third"], &[Verb::Admin]).await;
    assert_eq!(shown(&emils, "emil").await, Some(json!(["emil"])));
    assert_eq!(shown(&of_two, "acme").await, Some(json!(["acme", "third"])));
    assert_eq!(shown(&operator, "acme").await, Some(json!(["acme", "emil", "third"])));
    let revoke = |tenant: &str| format!("/v1/tenants/{tenant}/api-keys/{}/revoke", text(&made["id"]));
    let revoked = emils.post(&revoke("emil"), &json!({})).await.ok(200);
    assert_eq!(revoked["tenants"], json!(["emil"]));
    assert_eq!(revoked["revoked_at"], "2026-11-23T12:00:00Z");
    // At once, and to the others nothing has happened.
    shared.as_tenant("emil").try_encrypt(b"x", &json!({})).await.problem("forbidden");
    for tenant in ["acme", "third"] {
        shared.as_tenant(tenant).encrypt(b"x", &json!({})).await;
    }
    assert_eq!(shown(&emils, "emil").await, None);
    emils.post(&revoke("emil"), &json!({})).await.problem("not_found");
    assert_eq!(shown(&operator, "acme").await, Some(json!(["acme", "third"])));
    // Who administers all that is left revokes the key.
    of_two.post(&revoke("acme"), &json!({})).await.ok(200);
    for tenant in ["acme", "third"] {
        shared.as_tenant(tenant).try_encrypt(b"x", &json!({})).await.problem("unauthenticated");
    }
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_holds_a_hundred_tenants_and_no_more() {
    let world = World::new().await;
    let service = world.start().await;
    let operator = service.tenant_and_caller("acme").await;
    let others: Vec<String> = (0..100).map(|number| format!("tenant-{number}")).collect();
    for other in &others {
        service.tenant(other).await;
    }
    let path = "/v1/tenants/acme/api-keys";
    let body = |others: &[String]| json!({"name": "x", "verbs": ["encrypt"], "tenants": others});
    let made = operator.post(path, &body(&others[..99])).await.ok(201);
    assert_eq!(made["tenants"].as_array().unwrap().len(), 100);
    operator.with_token(text(&made["token"])).as_tenant("tenant-98").encrypt(b"x", &json!({})).await;
    let said = operator.post(path, &body(&others)).await.problem("malformed_request");
    assert!(said.contains("at most 100 tenants"), "{said}");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_has_so_many_api_keys_that_are_neither_revoked_nor_expired() {
    let mut world = World::new().await;
    world.settings.access.tenant_api_keys_max = 3;
    let service = world.start().await;
    let admin = service.tenant_and_caller("acme").await;
    service.tenant("emil").await;
    let path = "/v1/tenants/acme/api-keys";
    let body = json!({"name": "x", "verbs": ["encrypt"]});
    let short = json!({"name": "x", "verbs": ["encrypt"], "expires_at": "2026-11-23T12:01:00Z"});
    admin.post(path, &short).await.ok(201);
    let third = admin.post(path, &body).await.ok(201);
    let said = admin.post(path, &body).await.problem("conflict");
    assert!(said.contains("access.tenant_api_keys_max") && said.contains("'acme' has 3"), "{said}");
    let shared = json!({"name": "x", "verbs": ["encrypt"], "tenants": ["acme"]});
    admin.post("/v1/tenants/emil/api-keys", &shared).await.problem("conflict");
    admin.post("/v1/tenants/emil/api-keys", &body).await.ok(201);
    admin.post(&format!("{path}/{}/revoke", text(&third["id"])), &json!({})).await.ok(200);
    admin.post(path, &body).await.ok(201);
    admin.post(path, &body).await.problem("conflict");
    world.pass(60);
    admin.post(path, &body).await.ok(201);
    admin.post(path, &body).await.problem("conflict");
    service.stop().await;
}

/// What is remembered is bounded, and what is forgotten is read again.
#[tokio::test(flavor = "multi_thread")]
async fn no_more_api_keys_are_remembered_than_the_configuration_says() {
    let mut world = World::new().await;
    world.settings.access.api_keys_remembered_max = 5;
    let service = world.start().await;
    service.tenant("acme").await;
    let mut callers = Vec::new();
    for _ in 0..20 {
        callers.push(service.caller(&["acme"], &[Verb::Encrypt]).await);
    }
    let served = async || {
        let mut served = 0;
        for caller in &callers {
            let answer = caller.try_encrypt(b"x", &json!({})).await;
            assert!([200, 503].contains(&answer.status), "{}", answer.raw);
            served += usize::from(answer.status == 200);
        }
        served
    };
    assert_eq!(served().await, 20);
    service.store.down(true);
    // The memory tidies up behind its calls.
    let bounded = async { while served().await > 5 {} };
    assert!(tokio::time::timeout(std::time::Duration::from_secs(60), bounded).await.is_ok());
    service.store.down(false);
    assert_eq!(served().await, 20);
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
