//! Who may do what: principal x tenant x key x verb x context, deny by default.

use assert_cmd::Command;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use keyfold::config::{ConditionSettings, GrantSettings, RestrictionSettings, RoleSettings};
use keyfold::tenant::Verb;
use serde_json::{Value, json};

use crate::caller::{Answer, Caller};
use crate::pki::Authority;
use crate::program::keyfold;
use crate::service::{Service, World};
use crate::tokens::{Idp, Signer, issuer};

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

fn pair(name: &str, values: &[&str]) -> Vec<ConditionSettings> {
    vec![ConditionSettings { name: name.to_owned(), values: words(values) }]
}

async fn encrypt(caller: &Caller, key: &str, context: &Value) -> Answer {
    let body = json!({"plaintext": STANDARD.encode("x"), "key": key, "context": context});
    caller.post("/v1/encrypt", &body).await
}

async fn rewrap(caller: &Caller, ciphertext: &str, context: &Value, mode: &str) -> Answer {
    caller.post("/v1/rewrap", &json!({"ciphertext": ciphertext, "context": context, "mode": mode})).await
}

struct Scene {
    _world: World,
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
        let role = |verbs: &[&str], keys: Option<&[&str]>, context| RoleSettings {
            verbs: words(verbs),
            keys: keys.map(words),
            context,
        };
        let roles = &mut world.settings.access.roles;
        roles.insert("writer".to_owned(), role(&["encrypt"], None, vec![]));
        roles.insert(
            "billing".to_owned(),
            role(
                &["decrypt", "rewrap"],
                Some(&["billing", "invoices-*"]),
                pair("purpose", &["billing", "tax-*"]),
            ),
        );
        let grant = |principal: &str, tenant: &str, role: &str| GrantSettings {
            principal: principal.to_owned(),
            tenants: words(&[tenant]),
            roles: words(&[role]),
            verbs: vec![],
        };
        world.settings.access.grants = vec![
            grant("jwt:corp:alice", "acme", "writer"),
            grant("jwt:corp:alice", "acme", "billing"),
            grant("jwt:corp:job:*", "acme", "writer"),
        ];
        let service = world.start_without_keeper().await;
        service.tenant("evil").await;
        let admin = service.tenant_and_caller("acme").await;
        for key in ["billing", "invoices-2026", "shop"] {
            admin.post("/v1/tenants/acme/keys", &json!({"key": key})).await.ok(201);
        }
        Self { _world: world, service, admin, signer, idp }
    }

    fn token(&self, subject: &str) -> String {
        let mut claims = self.idp.claims();
        claims["sub"] = subject.into();
        self.signer.sign(&claims)
    }

    fn caller(&self, subject: &str) -> Caller {
        Caller::new(self.service.address, Some(self.token(subject)))
    }
}

#[tokio::test]
async fn a_role_reaches_its_keys_and_contexts_and_nothing_else() {
    let scene = Scene::new().await;
    let alice = scene.caller("alice");
    for key in ["billing", "invoices-2026", "shop", "default"] {
        for (context, covered) in [
            (json!({"purpose": "billing"}), true),
            (json!({"purpose": "tax-2026", "more": "x"}), true),
            (json!({"purpose": "shop"}), false),
            (json!({"purpose": "Billing"}), false),
            (json!({"purpose": "bіlling"}), false),
            (json!({"purpose": "billing "}), false),
            (json!({"Purpose": "billing"}), false),
            (json!({}), false),
        ] {
            // Whoever may encrypt with anything may.
            let sealed =
                encrypt(&alice, key, &context).await.ok(200)["ciphertext"].as_str().unwrap().to_owned();
            let right_key = key == "billing" || key.starts_with("invoices-");
            let opened = alice.try_decrypt(&sealed, &context).await;
            if right_key && covered {
                opened.ok(200);
                rewrap(&alice, &sealed, &context, "auto").await.ok(200);
                rewrap(&alice, &sealed, &context, "wrapped_key").await.ok(200);
                // What is not the message's context is no way around the condition.
                let other = json!({"purpose": "tax-other"});
                alice.try_decrypt(&sealed, &other).await.problem("context_mismatch");
                rewrap(&alice, &sealed, &other, "wrapped_key").await.problem("context_mismatch");
            } else {
                opened.problem("forbidden");
                for mode in ["auto", "wrapped_key"] {
                    rewrap(&alice, &sealed, &context, mode).await.problem("forbidden");
                }
                // Claiming a context that is covered does not help: the message has another.
                let claimed = alice.try_decrypt(&sealed, &json!({"purpose": "billing"})).await;
                claimed.problem(if right_key { "context_mismatch" } else { "forbidden" });
            }
        }
    }
    for (subject, code) in [
        ("job:7", None),
        ("job:", None),
        ("job", Some("forbidden")),
        ("Alice", Some("forbidden")),
        ("аlice", Some("forbidden")),
        ("alice2", Some("forbidden")),
    ] {
        let answer = encrypt(&scene.caller(subject), "default", &json!({})).await;
        match code {
            None => drop(answer.ok(200)),
            Some(code) => drop(answer.problem(code)),
        }
    }
    for named in ["evil", "ACME", "acme,evil", "acme/../evil", "%61cme", ""] {
        let alice = alice.as_tenant(named);
        encrypt(&alice, "default", &json!({})).await.problem("forbidden");
    }
    scene.service.stop().await;
}

#[tokio::test]
async fn batches_and_streams_are_held_to_the_same_grants() {
    let scene = Scene::new().await;
    let alice = scene.caller("alice");
    let (yes, no) = (json!({"purpose": "billing"}), json!({"purpose": "shop"}));
    let seal = async |context: &Value| {
        let answer = encrypt(&scene.admin, "billing", context).await.ok(200);
        answer["ciphertext"].as_str().unwrap().to_owned()
    };
    let (mine, other) = (seal(&yes).await, seal(&no).await);
    for verb in ["decrypt", "rewrap"] {
        let items = json!({"items": [
            {"ciphertext": mine, "context": yes}, {"ciphertext": other, "context": no},
            {"ciphertext": other, "context": yes},
        ]});
        let answer = alice.post(&format!("/v1/{verb}/batch"), &items).await.ok(200);
        assert_eq!(answer["failed"], 2, "{answer}");
        assert_eq!(answer["items"][1]["error"]["code"], "forbidden");
        assert_eq!(answer["items"][2]["error"]["code"], "context_mismatch");
    }
    let raw = async |verb: &str, ciphertext: &str, context: &str| {
        let request = alice.request(reqwest::Method::POST, &format!("/v1/{verb}"));
        let request = request.header("content-type", "application/octet-stream");
        let bytes = envelope::text::decode(ciphertext).unwrap();
        request.header("keyfold-context", context).body(bytes).send().await.unwrap().status().as_u16()
    };
    for verb in ["decrypt", "rewrap"] {
        assert_eq!(raw(verb, &mine, "purpose=\"billing\"").await, 200, "{verb}");
        assert_eq!(raw(verb, &other, "purpose=\"shop\"").await, 403, "{verb}");
        assert_eq!(raw(verb, &other, "purpose=\"billing\"").await, 422, "{verb}");
    }
    scene.service.stop().await;
}

#[tokio::test]
async fn a_restriction_narrows_an_api_key_whatever_its_record_says() {
    let world = World::new().await;
    let service = world.start_without_keeper().await;
    let admin = service.tenant_and_caller("acme").await;
    let token = service.token(&["acme"], &[Verb::Encrypt, Verb::Decrypt, Verb::Rewrap]).await;
    let sealed = admin.encrypt(b"x", &json!({"purpose": "shop"})).await;
    let caller = Caller::new(service.address, Some(token.clone()));
    caller.decrypt(&sealed, &json!({"purpose": "shop"})).await;
    service.stop().await;
    let mut world = world;
    world.settings.access.restrictions = vec![RestrictionSettings {
        principal: format!("api-key:{}", &token[3..19]),
        verbs: words(&["decrypt", "rewrap"]),
        keys: None,
        context: pair("purpose", &["billing"]),
    }];
    let service = world.start_without_keeper().await;
    let caller = Caller::new(service.address, Some(token));
    caller.try_decrypt(&sealed, &json!({"purpose": "shop"})).await.problem("forbidden");
    rewrap(&caller, &sealed, &json!({}), "wrapped_key").await.problem("forbidden");
    let own = caller.encrypt(b"x", &json!({"purpose": "billing"})).await;
    assert_eq!(caller.decrypt(&own, &json!({"purpose": "billing"})).await, b"x");
    // Others are not narrowed.
    let admin = Caller::new(service.address, Some(admin.token().to_owned()));
    admin.decrypt(&sealed, &json!({"purpose": "shop"})).await;
    service.stop().await;
}

#[test]
fn explain_says_what_the_service_would_do_and_why() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    let config = file(
        "keyfold.toml",
        r#"
        [access.roles.Billing]
        verbs = ["decrypt"]
        keys = ["billing"]
        context = [{ name = "purpose", values = ["billing"] }]

        [[access.grants]]
        principal = "jwt:corp:alice"
        tenants = ["acme"]
        roles = ["Billing"]

        [[access.issuers]]
        name = "corp"
        issuer = "https://idp.example"
        audiences = ["keyfold"]
        "#,
    );
    let claims = file("claims.json", r#"{"iss": "https://idp.example", "sub": "alice"}"#);
    let explain = |arguments: &[&str]| {
        let mut command = Command::cargo_bin("keyfold").unwrap();
        command.arg("--config").arg(&config).args(["access", "explain", "--claims"]).arg(&claims);
        let output =
            command.args(["--verb", "decrypt", "--tenant", "acme"]).args(arguments).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        (output.status.success(), text + &String::from_utf8_lossy(&output.stderr))
    };
    let (allowed, text) = explain(&["--key", "billing", "--context", "purpose=billing"]);
    assert!(
        allowed && text.contains("jwt:corp:alice") && text.contains("'Billing' covers this call"),
        "{text}"
    );
    let (allowed, text) = explain(&["--key", "shop", "--context", "purpose=billing"]);
    assert!(!allowed && text.contains("is for the keys billing and not for 'shop'"), "{text}");
    let (allowed, text) = explain(&["--key", "billing", "--context", "purpose=shop"]);
    assert!(!allowed && text.contains("asks for the context pair \"purpose\""), "{text}");
    let (allowed, text) = explain(&["--key", "billing", "--tenant", "evil"]);
    assert!(!allowed, "{text}");
}

#[test]
fn explain_reads_a_client_certificate_and_says_whose_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let clients = Authority::new("clients");
    let issue = |serial: u64, names: &[&str], file: &str| {
        let issued = clients.client(serial, names, 86_400);
        issued.write(folder.path(), file);
        issued.fingerprint
    };
    issue(2, &["spiffe://example.org/ns/billing/sa/api"], "by-uri");
    issue(3, &["other.example.org", "worker.example.org"], "by-dns");
    let fingerprint = issue(4, &[], "by-fingerprint");
    issue(5, &["stranger.example.org"], "stranger");
    let rule =
        |who: &str| format!("[[access.certificates]]\n{who}\ntenants = [\"acme\"]\nverbs = [\"encrypt\"]\n");
    let rules = [
        rule("uri = \"spiffe://example.org/ns/billing/*\""),
        rule("dns = \"worker.example.org\"\nprincipal = \"worker\""),
        rule(&format!("sha256 = \"{fingerprint}\"\nprincipal = \"pinned\"")),
    ];
    std::fs::write(folder.path().join("keyfold.toml"), rules.concat()).unwrap();
    let explain = |file: &str, verb: &str, tenant: &str| {
        let arguments = ["--config", "keyfold.toml", "access", "explain", "--certificate", file];
        let asked = ["--verb", verb, "--tenant", tenant];
        keyfold(folder.path(), &[&arguments[..], &asked].concat(), &[])
    };
    for (file, principal) in [
        ("by-uri.pem", "cert:spiffe://example.org/ns/billing/sa/api\n"),
        ("by-dns.pem", "cert:worker\n"),
        ("by-fingerprint.pem", "cert:pinned\n"),
    ] {
        let said = explain(file, "encrypt", "acme").ok();
        assert!(said.contains(principal) && said.ends_with("allowed\n"), "{said}");
        for (verb, tenant) in [("decrypt", "acme"), ("encrypt", "evil")] {
            let ran = explain(file, verb, tenant);
            assert_eq!(ran.0.status.code(), Some(1));
            assert!(ran.err().contains("refused"), "{}", ran.err());
        }
    }
    let said = explain("stranger.pem", "encrypt", "acme").refused();
    assert!(said.contains("no rule") && said.contains("stranger.example.org"), "{said}");
    assert!(explain("by-uri-key.pem", "encrypt", "acme").refused().contains("no certificate in PEM"));
    assert!(explain("nothing.pem", "encrypt", "acme").refused().contains("cannot be read"));
}
