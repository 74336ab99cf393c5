//! Who may do what, all at once: every kind of credential x tenant x verb x key x context, against a table that says it
//! again in plain words; and what a caller tries who wants to be taken for another.

use keyfold::access::Principal;
use keyfold::config::{
    CertificateSettings, ClientCertificateDemand, ConditionSettings, GrantSettings, RestrictionSettings,
    RoleSettings,
};
use keyfold::operations::ApiKeyGrant;
use keyfold::tenant::Verb;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::caller::Caller;
use crate::pki::Authority;
use crate::service::{START, Service, World};
use crate::tokens::{Idp, Signer, issuer};

const DAY: i64 = 86_400;
const TENANTS: [&str; 2] = ["acme", "evil"];
const KEYS: [&str; 2] = ["billing", "default"];
const VERBS: [&str; 3] = ["encrypt", "decrypt", "rewrap"];
const PURPOSES: [Option<&str>; 3] = [None, Some("billing"), Some("shop")];

/// What the table says that somebody holds: a tenant, verbs, and with which keys and purposes (all where none is named).
type Held = (&'static str, &'static [&'static str], &'static [&'static str], &'static [&'static str]);

struct Kind {
    name: &'static str,
    caller: Caller,
    /// The tenant that a call without the header means.
    meant: Option<&'static str>,
    /// Nothing where the credential is no good.
    held: Option<Vec<Held>>,
}

impl Kind {
    fn expected(
        &self,
        named: Option<&str>,
        verb: &str,
        key: &str,
        purpose: Option<&str>,
    ) -> (u16, &'static str) {
        let Some(held) = &self.held else { return (401, "unauthenticated") };
        let Some(tenant) = named.or(self.meant) else { return (403, "forbidden") };
        let allowed = held.iter().any(|(of, verbs, keys, purposes)| {
            *of == tenant
                && verbs.contains(&verb)
                && (keys.is_empty() || keys.contains(&key))
                && (purposes.is_empty() || purpose.is_some_and(|purpose| purposes.contains(&purpose)))
        });
        if allowed { (200, "") } else { (403, "forbidden") }
    }
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

fn purposes(values: &[&str]) -> Vec<ConditionSettings> {
    vec![ConditionSettings { name: "purpose".to_owned(), values: words(values) }]
}

fn context(purpose: Option<&str>) -> Value {
    purpose.map_or_else(|| json!({}), |purpose| json!({"purpose": purpose}))
}

struct Scene {
    world: World,
    service: Service,
    servers: Authority,
    clients: Authority,
    signer: Signer,
    idp: Idp,
}

impl Scene {
    async fn new() -> Self {
        let (servers, clients, signer) =
            (Authority::new("servers"), Authority::new("clients"), Signer::new("one"));
        let idp = Idp::start(&[&signer]);
        let mut world = World::new().await;
        let (certificate, key) = servers.server(1).write(&world.path(""), "server");
        let ca = world.path("clients.pem");
        std::fs::write(&ca, &clients.pem).unwrap();
        world.settings.tls.certificate_file = Some(certificate);
        world.settings.tls.key_file = Some(key);
        world.settings.tls.client_certificates = ClientCertificateDemand::Optional;
        world.settings.tls.client_ca_file = Some(ca);
        let access = &mut world.settings.access;
        access.issuers.push(issuer(&idp.url));
        access.certificates = vec![CertificateSettings {
            uri: None,
            dns: Some("worker.example.org".to_owned()),
            sha256: None,
            principal: Some("worker".to_owned()),
            tenants: words(&["acme"]),
            roles: vec![],
            verbs: words(&["encrypt"]),
        }];
        access.roles.insert(
            "reader".to_owned(),
            RoleSettings {
                verbs: words(&["decrypt", "rewrap"]),
                keys: Some(words(&["billing"])),
                context: purposes(&["bill*"]),
            },
        );
        access.grants = vec![GrantSettings {
            principal: "jwt:corp:reader".to_owned(),
            tenants: words(&["acme"]),
            roles: words(&["reader"]),
            verbs: vec![],
        }];
        access.restrictions = vec![RestrictionSettings {
            principal: "jwt:corp:narrowed".to_owned(),
            verbs: words(&["decrypt"]),
            keys: Some(words(&["default"])),
            context: purposes(&["shop"]),
        }];
        let service = world.start_without_keeper().await;
        for tenant in TENANTS {
            service.tenant(tenant).await;
        }
        Self { world, service, servers, clients, signer, idp }
    }

    fn over_tls(&self, token: Option<String>) -> Caller {
        Caller::over_tls(self.service.address, &self.servers.pem, None, token)
    }

    fn with_certificate(&self, serial: u64, name: &str, token: Option<String>) -> Caller {
        let own = self.clients.client(serial, &[name], DAY);
        Caller::over_tls(self.service.address, &self.servers.pem, Some(&own), token)
    }

    fn jwt(&self, changes: &Value) -> Caller {
        let mut claims = self.idp.claims();
        for (name, value) in changes.as_object().unwrap() {
            claims[name] = value.clone();
        }
        self.over_tls(Some(self.signer.sign(&claims)))
    }

    async fn expiring_api_key(&self) -> String {
        let operator = Principal::local_operator();
        let permit = operator.permit_admin(&"acme".parse().unwrap()).unwrap();
        let grant = ApiKeyGrant {
            name: "a test's".to_owned(),
            tenants: vec!["acme".parse().unwrap()],
            verbs: Verb::ALL.to_vec(),
            expires_at: Some(START.plus(std::time::Duration::from_secs(10))),
        };
        let made = self.service.app.operations.create_api_key(&permit, &operator, grant).await.unwrap();
        self.world.pass(10);
        made.token.to_string()
    }

    async fn revoked_api_key(&self, admin: &Caller) -> String {
        let token = self.service.token(&["acme"], &Verb::ALL).await;
        let path = format!("/v1/tenants/acme/api-keys/{}/revoke", &token[3..19]);
        admin.post(&path, &json!({})).await.ok(200);
        token
    }

    async fn kinds(&self, admin: &Caller) -> Vec<Kind> {
        let all: &[&str] = &VERBS;
        let data = [Verb::Encrypt, Verb::Decrypt, Verb::Rewrap];
        let token = self.service.token(&["acme"], &data).await;
        let grant = json!({"principal": "jwt:corp:granted", "verbs": ["encrypt", "rewrap"], "keys": ["bill*"],
                           "context": [{"name": "purpose", "values": ["shop"]}]});
        admin.post("/v1/tenants/evil/grants", &grant).await.ok(201);
        let nothing = json!({"tenants": []});
        let of = |subject: &str| {
            let mut claims = nothing.clone();
            claims["sub"] = subject.into();
            self.jwt(&claims)
        };
        let good = |name, caller, meant, held| Kind { name, caller, meant, held: Some(held) };
        let bad = |name, caller| Kind { name, caller, meant: None, held: None };
        let wrong_secret = format!("{}{}", &token[..token.len() - 4], "AAAA");
        vec![
            good(
                "an API key",
                self.over_tls(Some(token.clone())),
                Some("acme"),
                vec![("acme", all, &[], &[])],
            ),
            good(
                "an API key of two tenants",
                self.over_tls(Some(self.service.token(&TENANTS, &[Verb::Encrypt]).await)),
                None,
                vec![("acme", &["encrypt"], &[], &[]), ("evil", &["encrypt"], &[], &[])],
            ),
            good(
                "an administrator's API key",
                self.over_tls(Some(self.service.token(&["acme"], &[Verb::Admin]).await)),
                Some("acme"),
                vec![],
            ),
            bad("an API key with a wrong secret", self.over_tls(Some(wrong_secret))),
            bad("an expired API key", self.over_tls(Some(self.expiring_api_key().await))),
            bad("a revoked API key", self.over_tls(Some(self.revoked_api_key(admin).await))),
            good(
                "a token's claims",
                self.jwt(&json!({})),
                Some("acme"),
                vec![("acme", &["encrypt", "decrypt"], &[], &[])],
            ),
            good(
                "a role of the configuration",
                of("reader"),
                Some("acme"),
                vec![("acme", &["decrypt", "rewrap"], &["billing"], &["billing"])],
            ),
            good(
                "a grant of the registry",
                of("granted"),
                None,
                vec![("evil", &["encrypt", "rewrap"], &["billing"], &["shop"])],
            ),
            good(
                "a restriction",
                self.jwt(&json!({"sub": "narrowed"})),
                Some("acme"),
                vec![("acme", &["encrypt"], &[], &[]), ("acme", &["decrypt"], &["default"], &["shop"])],
            ),
            good("a token that holds nothing", of("nobody"), None, vec![]),
            bad("an expired token", self.jwt(&json!({"exp": 1_000}))),
            bad("a token for others", self.jwt(&json!({"aud": "others"}))),
            bad("a token of others", self.jwt(&json!({"iss": "https://idp.example"}))),
            good(
                "a client certificate",
                self.with_certificate(2, "worker.example.org", None),
                Some("acme"),
                vec![("acme", &["encrypt"], &[], &[])],
            ),
            bad("a client certificate without a rule", self.with_certificate(3, "other.example.org", None)),
            bad(
                "a client certificate beside a bad token",
                self.with_certificate(4, "worker.example.org", Some("x.y.z".to_owned())),
            ),
            good(
                "a client certificate beside a good token",
                self.with_certificate(5, "worker.example.org", Some(token)),
                Some("acme"),
                vec![("acme", all, &[], &[])],
            ),
            bad("no credential", self.over_tls(None)),
        ]
    }
}

/// Ciphertexts of each tenant, key and purpose, in the order of the constants.
async fn sealed_by(admin: &Caller) -> Vec<String> {
    let mut sealed = Vec::new();
    for tenant in TENANTS {
        let path = format!("/v1/tenants/{tenant}/keys");
        admin.post(&path, &json!({"key": "billing"})).await.ok(201);
        for key in KEYS {
            for purpose in PURPOSES {
                let body = json!({"plaintext": "eA==", "key": key, "context": context(purpose)});
                let answer = admin.as_tenant(tenant).post("/v1/encrypt", &body).await.ok(200);
                sealed.push(answer["ciphertext"].as_str().unwrap().to_owned());
            }
        }
    }
    sealed
}

#[tokio::test(flavor = "multi_thread")]
async fn every_credential_may_do_in_each_tenant_what_it_holds_and_nothing_else() {
    let scene = Scene::new().await;
    let admin = scene.over_tls(Some(scene.service.token(&TENANTS, &Verb::ALL).await));
    let sealed = sealed_by(&admin).await;
    let (mut allowed, mut refused) = (0, 0);
    for kind in scene.kinds(&admin).await {
        for named in [None, Some("acme"), Some("evil"), Some("nobody")] {
            let caller = named.map_or_else(|| kind.caller.clone(), |named| kind.caller.as_tenant(named));
            let tenant = usize::from(named.or(kind.meant) == Some("evil"));
            for (verb, (key_at, key), (purpose_at, purpose)) in VERBS.iter().flat_map(|verb| {
                KEYS.iter().enumerate().flat_map(move |key| {
                    PURPOSES.iter().copied().enumerate().map(move |purpose| (*verb, key, purpose))
                })
            }) {
                let body = if verb == "encrypt" {
                    json!({"plaintext": "eA==", "key": key, "context": context(purpose)})
                } else {
                    let at = (tenant * KEYS.len() + key_at) * PURPOSES.len() + purpose_at;
                    json!({"ciphertext": sealed[at], "context": context(purpose)})
                };
                let answer = caller.post(&format!("/v1/{verb}"), &body).await;
                let code = answer.json["code"].as_str().unwrap_or_default();
                let expected = kind.expected(named, verb, key, purpose);
                let call = format!("{}: {verb} in {named:?} with {key} for {purpose:?}", kind.name);
                assert_eq!((answer.status, code), expected, "{call}: {}", answer.raw);
                if expected.0 == 200 { allowed += 1 } else { refused += 1 }
            }
        }
    }
    assert!(allowed > 100 && refused > 500, "{allowed} allowed, {refused} refused");
    scene.service.stop().await;
}

/// Sends a request's head as it is, and gives the whole answer.
async fn raw(service: &Service, target: &str, token: &str, more: &str) -> String {
    let mut stream = TcpStream::connect(service.address).await.unwrap();
    let head = format!(
        "GET {target} HTTP/1.1\r\nhost: x\r\nconnection: close\r\nauthorization: Bearer {token}\r\n{more}\r\n"
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer).await;
    String::from_utf8_lossy(&answer).into_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn no_spelling_of_a_path_leads_an_administrator_into_another_tenant() {
    let world = World::new().await;
    let service = world.start_without_keeper().await;
    service.tenant("acme").await;
    let evil = service.tenant_and_caller("evil").await;
    evil.post("/v1/tenants/evil/keys", &json!({"key": "canary"})).await.ok(201);
    let token = service.token(&["acme"], &[Verb::Admin]).await;
    let own = raw(&service, "/v1/tenants/acme/keys", &token, "").await;
    assert!(own.starts_with("HTTP/1.1 200"), "{own}");
    for target in [
        "/v1/tenants/evil/keys",
        "/v1/tenants/acme/../evil/keys",
        "/v1/tenants/acme/%2e%2e/evil/keys",
        "/v1/tenants/acme%2f..%2fevil/keys",
        "/v1/tenants/acme%252f..%252fevil/keys",
        "/v1/tenants/acme\\..\\evil/keys",
        "/v1/tenants/evil%00acme/keys",
        "/v1/tenants/acme;evil/keys",
        "/v1/tenants/EVIL/keys",
        "/v1/tenants/%65vil/keys",
        "/v1/tenants/e%76il/keys",
        "//v1/tenants/evil/keys",
        "/v1//tenants/evil/keys",
        "/v1/tenants//evil/keys",
        "/v1/./tenants/evil/keys",
        "/v1/tenants/evil/keys/",
        "/v1/tenants/evil/keys?tenant=acme",
        "/v1/tenants/evil/keys#/v1/tenants/acme/keys",
        "/v1/tenants/%D0%B5vil/keys",
        "/v1/tenants/%EF%BD%85vil/keys",
        "http://x/v1/tenants/evil/keys",
        "/v1/jobs?tenant=evil",
        "/v1/jobs?tenant=acme&tenant=evil",
        "/v1/jobs?tenant=evil&tenant=acme",
    ] {
        for more in ["", "keyfold-tenant: acme\r\n", "x-original-url: /v1/tenants/acme/keys\r\n"] {
            let answer = raw(&service, target, &token, more).await;
            assert!(answer.starts_with("HTTP/1.1 4"), "{target}: {answer}");
            assert!(!answer.contains("canary"), "{target}: {answer}");
        }
    }
    service.stop().await;
}

#[tokio::test]
async fn texts_that_only_look_alike_are_different_contexts_and_said_twice_they_are_none() {
    let world = World::new().await;
    let service = world.start_without_keeper().await;
    let caller = service.tenant_and_caller("acme").await;
    let sealed = caller.encrypt(b"x", &json!({"caf\u{e9}": "\u{212b}"})).await;
    for other in [
        json!({"cafe\u{301}": "\u{212b}"}),
        json!({"caf\u{e9}": "\u{c5}"}),
        json!({"caf\u{e9}": "A\u{30a}"}),
        json!({"Caf\u{e9}": "\u{212b}"}),
        json!({"caf\u{e9}": "\u{212b}\u{200b}"}),
        json!({"caf\u{e9} ": "\u{212b}"}),
    ] {
        caller.try_decrypt(&sealed, &other).await.problem("context_mismatch");
    }
    assert_eq!(caller.decrypt(&sealed, &json!({"caf\u{e9}": "\u{212b}"})).await, b"x");
    for twice in [
        r#"{"plaintext": "eA==", "context": {"a": "1", "a": "2"}}"#,
        r#"{"plaintext": "eA==", "context": {"a": "1", "\u0061": "1"}}"#,
        r#"{"plaintext": "eA==", "context": {}, "context": {"a": "1"}}"#,
        r#"{"plaintext": "eA==", "key": "default", "k\u0065y": "other"}"#,
        r#"{"plaintext": "eA==", "keyfold-tenant": "evil"}"#,
        r#"{"plaintext": "eA==", "tenant": "evil"}"#,
    ] {
        caller.post_text("/v1/encrypt", twice).await.problem("malformed_request");
    }
    let reserved = json!({"plaintext": "eA==", "context": {"keyfold:tenant": "evil"}});
    caller.post("/v1/encrypt", &reserved).await.problem("reserved_context");
    let two = caller.as_tenant("acme").as_tenant("acme");
    two.try_encrypt(b"x", &json!({})).await.problem("malformed_request");
    // What belongs to a raw body is not read beside JSON, and so not taken.
    for header in ["keyfold-context", "keyfold-key", "keyfold-envelope", "keyfold-rewrap-mode"] {
        let stray = caller.with_header(header, "default");
        stray.try_encrypt(b"x", &json!({})).await.problem("malformed_request");
    }
    service.stop().await;
}
