//! `/v1/tenants/{tenant}/keys`

use keyfold::tenant::Verb;
use serde_json::{Value, json};

use crate::caller::text;
use crate::service::World;

#[tokio::test(flavor = "multi_thread")]
async fn a_key_has_the_policy_that_it_was_given_and_defaults_for_the_rest() {
    let world = World::new().await;
    let service = world.start().await;
    let admin = service.tenant_and_caller("acme").await;
    let defaults = json!({
        "dek_age_secs_max": 86_400, "dek_messages_max": 4_294_967_296_u64,
        "dek_bytes_max": 1_099_511_627_776_u64, "envelope": "embedded",
    });
    assert_eq!(admin.get("/v1/tenants/acme/keys/default").await.ok(200)["policy"], defaults);
    let body = json!({"key": "billing", "policy": {"dek_messages_max": 3, "envelope": "compact"}});
    let made = admin.post("/v1/tenants/acme/keys", &body).await.ok(201);
    let mut policy = defaults.clone();
    policy["dek_messages_max"] = 3.into();
    policy["envelope"] = "compact".into();
    assert_eq!(made["policy"], policy);
    assert_eq!(
        (&made["tenant"], &made["key"], &made["version"]),
        (&json!("acme"), &json!("billing"), &json!(1))
    );
    assert_eq!(admin.get("/v1/tenants/acme/keys/billing").await.ok(200), made);
    admin.post("/v1/tenants/acme/keys", &body).await.problem("conflict");

    let changed =
        admin.put("/v1/tenants/acme/keys/billing", &json!({"policy": {}, "version": 1})).await.ok(200);
    assert_eq!((&changed["policy"], &changed["version"]), (&defaults, &json!(2)));
    let stale = json!({"status": "disabled", "version": 1});
    admin.put("/v1/tenants/acme/keys/billing", &stale).await.problem("conflict");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_is_taken_at_the_edges_of_its_ranges_and_refused_beyond() {
    let world = World::new().await;
    let service = world.start().await;
    let admin = service.tenant_and_caller("acme").await;
    for (limit, min, max) in [
        ("dek_age_secs_max", 60_u64, 315_360_000),
        ("dek_messages_max", 1, 1 << 48),
        ("dek_bytes_max", 1, 1 << 60),
    ] {
        for good in [min, max] {
            let body = json!({"policy": {limit: good}});
            let changed = admin.put("/v1/tenants/acme/keys/default", &body).await.ok(200);
            assert_eq!(changed["policy"][limit], good);
        }
        for bad in [min - 1, max + 1, u64::MAX] {
            let body = json!({"policy": {limit: bad}});
            let detail = admin.put("/v1/tenants/acme/keys/default", &body).await.problem("malformed_request");
            assert!(detail.contains(limit) && detail.contains(&max.to_string()), "{detail}");
            let body = json!({"key": "k", "policy": {limit: bad}});
            admin.post("/v1/tenants/acme/keys", &body).await.problem("malformed_request");
        }
        for bad in [json!(-1), json!("60"), json!(1.5), Value::Null] {
            let body = json!({"policy": {limit: bad}});
            admin.put("/v1/tenants/acme/keys/default", &body).await.problem("malformed_request");
        }
    }
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disabled_key_is_cut_off_at_once_and_others_are_not() {
    let world = World::new().await;
    let service = world.start().await;
    let admin = service.tenant_and_caller("acme").await;
    admin.post("/v1/tenants/acme/keys", &json!({"key": "billing"})).await.ok(201);
    let seal = json!({"plaintext": "aGVsbG8=", "key": "billing"});
    let ciphertext = text(&admin.post("/v1/encrypt", &seal).await.ok(200)["ciphertext"]);
    admin.put("/v1/tenants/acme/keys/billing", &json!({"status": "disabled"})).await.ok(200);
    assert!(admin.post("/v1/encrypt", &seal).await.problem("key_revoked").contains("billing"));
    admin.try_decrypt(&ciphertext, &json!({})).await.problem("key_revoked");
    admin.post("/v1/rewrap", &json!({"ciphertext": ciphertext})).await.problem("key_revoked");
    admin.encrypt(b"under the default key", &json!({})).await;
    admin.put("/v1/tenants/acme/keys/billing", &json!({"status": "enabled"})).await.ok(200);
    admin.post("/v1/encrypt", &seal).await.ok(200);
    assert_eq!(admin.decrypt(&ciphertext, &json!({})).await, b"hello");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_is_made_after_it_was_missed_is_found_at_once() {
    let world = World::new().await;
    let service = world.start().await;
    let admin = service.tenant_and_caller("acme").await;
    let seal = json!({"plaintext": "aGVsbG8=", "key": "billing"});
    assert!(admin.post("/v1/encrypt", &seal).await.problem("not_found").contains("billing"));
    admin.post("/v1/tenants/acme/keys", &json!({"key": "billing"})).await.ok(201);
    admin.post("/v1/encrypt", &seal).await.ok(200);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_are_listed_by_name_within_their_tenant() {
    let world = World::new().await;
    let service = world.start().await;
    let operator = service.tenant_and_caller("acme").await;
    service.tenant("emil").await;
    for key in ["b", "a", "c"] {
        operator.post("/v1/tenants/acme/keys", &json!({"key": key})).await.ok(201);
    }
    let names = |page: &Value| {
        page["items"].as_array().unwrap().iter().map(|key| text(&key["key"])).collect::<Vec<_>>()
    };
    let first = operator.get("/v1/tenants/acme/keys?limit=3").await.ok(200);
    assert_eq!(names(&first), ["a", "b", "c"]);
    let rest = operator.get(&format!("/v1/tenants/acme/keys?after={}", text(&first["next"]))).await.ok(200);
    assert_eq!((names(&rest), &rest["next"]), (vec!["default".to_owned()], &Value::Null));
    assert_eq!(names(&operator.get("/v1/tenants/emil/keys").await.ok(200)), ["default"]);
    operator.get("/v1/tenants/nobody/keys").await.problem("not_found");
    operator.get("/v1/tenants/acme/keys/nothing").await.problem("not_found");
    operator.put("/v1/tenants/acme/keys/nothing", &json!({})).await.problem("not_found");
    operator.post("/v1/tenants/nobody/keys", &json!({"key": "a"})).await.problem("not_found");
    let admin = service.caller(&["emil"], &[Verb::Admin]).await;
    admin.get("/v1/tenants/acme/keys").await.problem("forbidden");
    admin.get("/v1/tenants/emil/keys").await.ok(200);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_has_so_many_keys_and_no_more() {
    let mut world = World::new().await;
    world.settings.registry.tenant_keys_max = 3;
    let service = world.start().await;
    let admin = service.tenant_and_caller("acme").await;
    service.tenant("emil").await;
    // With the one that a tenant begins with.
    for key in ["second", "third"] {
        admin.post("/v1/tenants/acme/keys", &json!({"key": key})).await.ok(201);
    }
    let said = admin.post("/v1/tenants/acme/keys", &json!({"key": "fourth"})).await.problem("conflict");
    assert!(said.contains("registry.tenant_keys_max") && said.contains("3 keys"), "{said}");
    admin.post("/v1/tenants/emil/keys", &json!({"key": "second"})).await.ok(201);
    service.stop().await;
}
