//! `/v1/tenants`

use keyfold::tenant::Verb;
use serde_json::{Value, json};

use crate::caller::text;
use crate::probes::KmsFault;
use crate::service::World;

#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_is_made_with_its_default_key_and_serves_at_once() {
    let world = World::new().await;
    let service = world.start().await;
    let operator = service.tenant_and_caller("acme").await;
    let body = json!({"tenant": "emil", "keks": [{"kek": "local:one"}]});
    let made = operator.post("/v1/tenants", &body).await.ok(201);
    assert_eq!(made["tenant"], "emil");
    assert_eq!(made["status"], "enabled");
    assert_eq!(made["keks"], json!([{"kek": "local:one"}]));
    assert_eq!(made["version"], 1);
    assert_eq!(made["created_at"], "2026-11-23T12:00:00Z");
    assert_eq!(operator.get("/v1/tenants/emil").await.ok(200), made);
    let body = json!({"name": "emil's", "verbs": ["encrypt", "decrypt"]});
    let token = text(&operator.post("/v1/tenants/emil/api-keys", &body).await.ok(201)["token"]);
    let emil = service.anonymous().with_token(token);
    let ciphertext = emil.encrypt(b"hello", &json!({})).await;
    assert_eq!(emil.decrypt(&ciphertext, &json!({})).await, b"hello");
    operator
        .post("/v1/tenants", &json!({"tenant": "emil", "keks": [{"kek": "local:one"}]}))
        .await
        .problem("conflict");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ring_takes_only_keks_that_the_kms_says_can_be_used() {
    let world = World::new().await;
    world.keyring.add("off").await.unwrap();
    world.keyring.disable("off").await.unwrap();
    let service = world.start().await;
    let operator = service.tenant_and_caller("acme").await;
    let make = |keks: Value| json!({"tenant": "emil", "keks": keks});
    let aws = "arn:aws:kms:eu-west-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab";
    for (keks, says) in [
        (json!([]), "1 to 8"),
        (json!([{"kek": "local:one"}, {"kek": "local:one"}]), "twice"),
        (json!([{"kek": "local:none"}]), "local:none"),
        (json!([{"kek": "local:off"}]), "enable"),
        (json!([{"kek": "one"}]), "local:NAME"),
        (json!([{"kek": "arn:aws:kms:eu-west-1:111122223333:alias/a"}]), "alias"),
        (json!([{"kek": aws, "role": "me"}]), "arn:aws:iam"),
        (json!([{"kek": aws, "external_id": "x"}]), "role"),
        (json!([{"kek": "local:one", "more": 1}]), "unknown field `more`"),
        (json!((0..9).map(|n| json!({"kek": format!("local:k{n}")})).collect::<Vec<_>>()), "1 to 8"),
    ] {
        let detail = operator.post("/v1/tenants", &make(keks.clone())).await.problem("malformed_request");
        assert!(detail.contains(says), "{keks}: {detail}");
    }
    world.kms.fail(KmsFault::Outage);
    operator.post("/v1/tenants", &make(json!([{"kek": "local:one"}]))).await.problem("kms_unavailable");
    world.kms.fail(None);
    operator.get("/v1/tenants/emil").await.problem("not_found");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disabled_tenant_is_cut_off_at_once_and_comes_back_at_once() {
    let world = World::new().await;
    let service = world.start().await;
    let operator = service.tenant_and_caller("acme").await;
    let ciphertext = operator.encrypt(b"hello", &json!({})).await;
    for _ in 0..2 {
        operator.put("/v1/tenants/acme", &json!({"status": "disabled"})).await.ok(200);
        operator.try_encrypt(b"hello", &json!({})).await.problem("key_revoked");
        operator.try_decrypt(&ciphertext, &json!({})).await.problem("key_revoked");
        for mode in ["auto", "wrapped_key"] {
            let body = json!({"ciphertext": ciphertext, "mode": mode});
            operator.post("/v1/rewrap", &body).await.problem("key_revoked");
        }
        operator.put("/v1/tenants/acme", &json!({"status": "enabled"})).await.ok(200);
        operator.encrypt(b"hello", &json!({})).await;
        assert_eq!(operator.decrypt(&ciphertext, &json!({})).await, b"hello");
    }
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_based_on_an_older_version_is_refused() {
    let world = World::new().await;
    let service = world.start().await;
    let operator = service.tenant_and_caller("acme").await;
    let changed =
        operator.put("/v1/tenants/acme", &json!({"status": "disabled", "version": 1})).await.ok(200);
    assert_eq!(changed["version"], 2);
    let stale = json!({"status": "enabled", "version": 1});
    assert!(operator.put("/v1/tenants/acme", &stale).await.problem("conflict").contains("version 2"));
    assert_eq!(operator.get("/v1/tenants/acme").await.ok(200)["status"], "disabled");
    operator.put("/v1/tenants/nobody", &json!({"status": "enabled"})).await.problem("not_found");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn former_keks_are_remembered_once_each() {
    let world = World::new().await;
    world.keyring.add("two").await.unwrap();
    let service = world.start().await;
    let operator = service.tenant_and_caller("acme").await;
    let set = |kek: &'static str| json!({"keks": [{"kek": kek}]});
    for kek in ["local:two", "local:one", "local:two"] {
        operator.put("/v1/tenants/acme", &set(kek)).await.ok(200);
    }
    let tenant = operator.get("/v1/tenants/acme").await.ok(200);
    assert_eq!(tenant["keks"], json!([{"kek": "local:two"}]));
    assert_eq!(tenant["former_keks"], json!([{"kek": "local:one"}]));
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tenants_are_listed_in_pages_by_id_for_operators_only() {
    let world = World::new().await;
    let service = world.start().await;
    let operator = service.tenant_and_caller("t0").await;
    for n in 1..5 {
        service.tenant(&format!("t{n}")).await;
    }
    let (mut seen, mut after) = (Vec::new(), String::new());
    for pages in 1.. {
        let page = operator.get(&format!("/v1/tenants?limit=2{after}")).await.ok(200);
        seen.extend(page["items"].as_array().unwrap().iter().map(|tenant| text(&tenant["tenant"])));
        if page["next"].is_null() {
            assert_eq!(pages, 3);
            break;
        }
        after = format!("&after={}", text(&page["next"]));
    }
    assert_eq!(seen, ["t0", "t1", "t2", "t3", "t4"]);
    assert_eq!(operator.get("/v1/tenants").await.ok(200)["items"].as_array().unwrap().len(), 5);
    operator.get("/v1/tenants?limit=1").await.ok(200);
    operator.get("/v1/tenants?limit=1000").await.ok(200);
    for bad in ["limit=0", "limit=1001", "limit=-1", "limit=x", "limit=1&limit=2", "page=1", "after=UPPER"] {
        operator.get(&format!("/v1/tenants?{bad}")).await.problem("malformed_request");
    }
    let admin = service.caller(&["t1"], &[Verb::Admin]).await;
    admin.get("/v1/tenants").await.problem("forbidden");
    admin.get("/v1/tenants/t1").await.ok(200);
    admin.get("/v1/tenants/t2").await.problem("forbidden");
    admin.get("/v1/tenants/nobody").await.problem("forbidden");
    admin.put("/v1/tenants/t1", &json!({"status": "disabled"})).await.problem("forbidden");
    let body = json!({"tenant": "mine", "keks": [{"kek": "local:one"}]});
    admin.post("/v1/tenants", &body).await.problem("forbidden");
    service.stop().await;
}
