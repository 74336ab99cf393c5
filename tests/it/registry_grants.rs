//! Grants that administrators make while the service runs.

use keyfold::config::GrantSettings;
use keyfold::tenant::Verb;
use reqwest::Method;
use serde_json::{Value, json};

use crate::caller::{Answer, Caller};
use crate::program::{Program, keyfold};
use crate::service::{Service, World};
use crate::tokens::{Idp, Signer, issuer};

struct Scene {
    world: World,
    service: Service,
    admin: Caller,
    signer: Signer,
    idp: Idp,
}

impl Scene {
    async fn new() -> Self {
        let signer = Signer::new("one");
        let idp = Idp::start(&[&signer]);
        let mut world = World::new().await;
        let mut settings = issuer(&idp.url);
        (settings.tenants_claim, settings.verbs_claim) = (None, None);
        world.settings.access.issuers.push(settings);
        world.settings.access.tenant_grants_max = 3;
        // Bob holds acme by the configuration.
        world.settings.access.grants = vec![GrantSettings {
            principal: "jwt:corp:bob".to_owned(),
            tenants: vec!["acme".to_owned()],
            roles: vec![],
            verbs: vec!["encrypt".to_owned(), "decrypt".to_owned()],
        }];
        let service = world.start_without_keeper().await;
        service.tenant("acme").await;
        service.tenant("evil").await;
        let admin = service.caller(&["acme"], &[Verb::Admin]).await;
        Self { world, service, admin, signer, idp }
    }

    fn caller(&self, subject: &str) -> Caller {
        let mut claims = self.idp.claims();
        claims["sub"] = subject.into();
        claims["exp"] = 4_000_000_000_i64.into();
        Caller::new(self.service.address, Some(self.signer.sign(&claims)))
    }

    async fn grant(&self, grant: Value) -> String {
        let made = self.admin.post("/v1/tenants/acme/grants", &grant).await.ok(201);
        made["grant"].as_str().unwrap().to_owned()
    }
}

async fn delete(caller: &Caller, path: &str) -> (u16, String) {
    let answer = caller.request(Method::DELETE, path).send().await.unwrap();
    (answer.status().as_u16(), answer.text().await.unwrap())
}

async fn seal(caller: &Caller, context: &Value) -> Answer {
    caller.try_encrypt(b"x", context).await
}

#[tokio::test]
async fn a_grant_counts_at_once_within_its_bounds_and_until_it_is_taken_back() {
    let scene = Scene::new().await;
    let alice = scene.caller("alice");
    let in_acme = alice.as_tenant("acme");
    seal(&in_acme, &json!({})).await.problem("forbidden");
    let id = scene
        .grant(json!({"principal": "jwt:corp:alice", "verbs": ["encrypt"], "keys": ["def*"],
                      "context": [{"name": "purpose", "values": ["billing", "tax-*"]}]}))
        .await;
    for (context, allowed) in [
        (json!({"purpose": "billing"}), true),
        (json!({"purpose": "tax-2026"}), true),
        (json!({"purpose": "shop"}), false),
        (json!({"purpose": "Billing"}), false),
        (json!({}), false),
    ] {
        let answer = seal(&in_acme, &context).await;
        if allowed { drop(answer.ok(200)) } else { drop(answer.problem("forbidden")) }
    }
    let good = json!({"purpose": "billing"});
    scene.admin.post("/v1/tenants/acme/keys", &json!({"key": "other"})).await.ok(201);
    let other = json!({"plaintext": "eA==", "key": "other", "context": good});
    in_acme.post("/v1/encrypt", &other).await.problem("forbidden");
    seal(&alice.as_tenant("evil"), &good).await.problem("forbidden");
    seal(&scene.caller("alice2").as_tenant("acme"), &good).await.problem("forbidden");
    seal(&scene.caller("Alice").as_tenant("acme"), &good).await.problem("forbidden");
    let sealed = seal(&in_acme, &good).await.ok(200)["ciphertext"].as_str().unwrap().to_owned();
    in_acme.try_decrypt(&sealed, &good).await.problem("forbidden");
    let path = format!("/v1/tenants/acme/grants/{id}");
    assert_eq!(delete(&scene.admin, &path).await.0, 204);
    seal(&in_acme, &good).await.problem("forbidden");
    assert_eq!(delete(&scene.admin, &path).await.0, 404);
    scene.service.stop().await;
}

#[tokio::test]
async fn a_grant_of_another_tenant_changes_nothing_of_what_a_call_without_a_tenant_means() {
    let scene = Scene::new().await;
    let bob = scene.caller("bob");
    let evil = scene.service.caller(&["evil"], &[Verb::Admin, Verb::Decrypt]).await;
    let grant = json!({"principal": "jwt:corp:*", "verbs": ["encrypt", "decrypt", "rewrap", "admin"]});
    evil.post("/v1/tenants/evil/grants", &grant).await.ok(201);
    let sealed = seal(&bob, &json!({})).await.ok(200)["ciphertext"].as_str().unwrap().to_owned();
    evil.try_decrypt(&sealed, &json!({})).await.problem("context_mismatch");
    // Alice holds nothing but this grant: she has to say that she means it.
    let alice = scene.caller("alice");
    let refused = seal(&alice, &json!({})).await;
    assert!(refused.problem("forbidden").contains("Keyfold-Tenant"), "{}", refused.raw);
    seal(&alice.as_tenant("evil"), &json!({})).await.ok(200);
    alice.post("/v1/tenants/acme/grants", &grant).await.problem("forbidden");
    scene.service.stop().await;
}

#[tokio::test]
async fn only_who_administers_the_tenant_grants_and_only_what_makes_sense() {
    let scene = Scene::new().await;
    let path = "/v1/tenants/acme/grants";
    let good = json!({"principal": "jwt:corp:alice", "verbs": ["encrypt"]});
    for other in [
        scene.service.caller(&["evil"], &[Verb::Admin]).await,
        scene.service.caller(&["acme"], &[Verb::Encrypt, Verb::Decrypt, Verb::Rewrap]).await,
        scene.caller("bob"),
    ] {
        other.post(path, &good).await.problem("forbidden");
        other.get(path).await.problem("forbidden");
    }
    scene.service.anonymous().post(path, &good).await.problem("unauthenticated");
    for bad in [
        json!({"principal": "alice", "verbs": ["encrypt"]}),
        json!({"principal": "*", "verbs": ["encrypt"]}),
        json!({"principal": "jwt:*:alice", "verbs": ["encrypt"]}),
        json!({"principal": "cli:local-operator", "verbs": ["encrypt"]}),
        json!({"principal": "jwt:corp:a\nb", "verbs": ["encrypt"]}),
        json!({"principal": "jwt:corp:alice", "verbs": []}),
        json!({"principal": "jwt:corp:alice", "verbs": ["operate"]}),
        json!({"principal": "jwt:corp:alice", "verbs": ["encrypt", "operate"]}),
        json!({"principal": "jwt:corp:alice", "verbs": ["admin"], "keys": ["a"]}),
        json!({"principal": "jwt:corp:alice", "verbs": ["encrypt"], "keys": []}),
        json!({"principal": "jwt:corp:alice", "verbs": ["encrypt"], "keys": ["a*b"]}),
        json!({"principal": "jwt:corp:alice", "verbs": ["encrypt"], "context": [{"name": "a", "values": []}]}),
        json!({"principal": "jwt:corp:alice", "verbs": ["encrypt"], "context": [["a", ["b"]]]}),
        json!({"principal": "jwt:corp:alice", "verbs": ["encrypt"], "tenant": "evil"}),
    ] {
        scene.admin.post(path, &bad).await.problem("malformed_request");
    }
    // At the limit one more is refused, and after one is taken back there is room again.
    let mut ids = Vec::new();
    for subject in ["a", "b", "c"] {
        ids.push(
            scene.grant(json!({"principal": format!("jwt:corp:{subject}"), "verbs": ["encrypt"]})).await,
        );
    }
    scene.admin.post(path, &good).await.problem("conflict");
    let page = scene.admin.get(&format!("{path}?limit=2")).await.ok(200);
    let rest =
        scene.admin.get(&format!("{path}?limit=2&after={}", page["next"].as_str().unwrap())).await.ok(200);
    let listed = [&page, &rest].map(|page| page["items"].as_array().unwrap().len());
    assert_eq!((listed, rest["next"].is_null()), ([2, 1], true));
    let elsewhere = scene.service.caller(&["evil"], &[Verb::Admin]).await;
    assert_eq!(delete(&elsewhere, &format!("/v1/tenants/evil/grants/{}", ids[0])).await.0, 404);
    assert_eq!(delete(&elsewhere, &format!("{path}/{}", ids[0])).await.0, 403);
    assert_eq!(delete(&scene.admin, &format!("{path}/{}", ids[0])).await.0, 204);
    scene.admin.post(path, &good).await.ok(201);
    scene.service.stop().await;
}

#[tokio::test]
async fn grants_outlive_a_restart_and_are_believed_no_longer_than_the_registry_answers() {
    let mut scene = Scene::new().await;
    scene.grant(json!({"principal": "jwt:corp:alice", "verbs": ["encrypt"]})).await;
    seal(&scene.caller("alice").as_tenant("acme"), &json!({})).await.ok(200);
    scene.service.stop().await;
    scene.service = scene.world.start_without_keeper().await;
    let alice = scene.caller("alice").as_tenant("acme");
    seal(&alice, &json!({})).await.ok(200);
    scene.service.store.down(true);
    seal(&alice, &json!({})).await.ok(200);
    scene.world.pass(scene.world.settings.registry.stale_secs_max);
    seal(&alice, &json!({})).await.problem("store_unavailable");
    scene.service.store.down(false);
    seal(&alice, &json!({})).await.ok(200);
    scene.service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_grant_made_on_the_command_line_reaches_the_running_service_and_is_explained() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    let data_dir = data.to_str().unwrap();
    let program = Program::serve(folder.path(), &["--dev", "--data-dir", data_dir], &[]).await;
    let dev = program.dev_caller(&data);
    dev.post("/v1/tenants", &json!({"tenant": "acme", "keks": [{"kek": "local:dev"}]})).await.ok(201);
    let body = json!({"name": "a test's", "verbs": ["encrypt"]});
    let made = dev.post("/v1/tenants/dev/api-keys", &body).await.ok(201);
    let caller = dev.with_token(made["token"].as_str().unwrap()).as_tenant("acme");
    let principal = format!("api-key:{}", made["id"].as_str().unwrap());
    let run = |arguments: &[&str]| {
        let arguments: Vec<&str> = arguments.iter().copied().chain(["--data-dir", data_dir]).collect();
        keyfold(folder.path(), &arguments, &[])
    };
    seal(&caller, &json!({})).await.problem("forbidden");
    let grant = ["grant", "create", "acme", "--principal", &principal, "--verbs", "encrypt"];
    let shown =
        run(&[&grant[..], &["--context", "purpose=billing", "--context", "purpose=tax-*"]].concat()).ok();
    assert!(shown.contains("verbs encrypt  keys all  context purpose=billing|tax-*"), "{shown}");
    let good = json!({"purpose": "tax-1"});
    // The service asks the registry now and then what has changed.
    let known = async { while seal(&caller, &good).await.status != 200 {} };
    tokio::time::timeout(std::time::Duration::from_secs(60), known).await.unwrap();
    seal(&caller, &json!({})).await.problem("forbidden");
    let explain =
        ["access", "explain", "--api-key", &principal[8..], "--verb", "encrypt", "--tenant", "acme"];
    let said = run(&[&explain[..], &["--context", "purpose=billing"]].concat()).ok();
    assert!(said.contains("of the registry covers this call") && said.contains("allowed"), "{said}");
    assert!(run(&explain).err().contains("refused"));
    let id = shown.split_whitespace().next().unwrap();
    assert!(run(&["grant", "list", "acme"]).ok().contains(id));
    run(&["grant", "delete", "acme", id]).ok();
    assert_eq!(run(&["grant", "list", "acme"]).ok(), "");
    program.stop().await;
}
