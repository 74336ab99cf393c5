//! Tokens: what is let in, what is not, and what an issuer's troubles do.

use std::net::TcpListener;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::get;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use keyfold::config::{IssuerSettings, RoleSettings, Settings, Variables};
use keyfold::http::server::{self, ServerHandle};
use keyfold::http::tls::{Identity, Options, Tls};
use keyfold::tenant::Verb;
use rcgen::{KeyPair, PublicKeyData as _};
use serde_json::{Value, json};

use crate::caller::{Answer, Caller};
use crate::pki::Authority;
use crate::service::{START, Service, World};

/// A signing key of an issuer.
pub(crate) struct Signer {
    id: &'static str,
    key: KeyPair,
}

impl Signer {
    pub(crate) fn new(id: &'static str) -> Self {
        Self { id, key: KeyPair::generate().unwrap() }
    }

    fn jwk(&self) -> Value {
        let point = self.key.der_bytes();
        let part = |range: std::ops::Range<usize>| URL_SAFE_NO_PAD.encode(&point[range]);
        json!({"kty": "EC", "crv": "P-256", "alg": "ES256", "use": "sig", "kid": self.id,
               "x": part(1..33), "y": part(33..65)})
    }

    pub(crate) fn sign(&self, claims: &Value) -> String {
        self.sign_with(&self.header(), claims)
    }

    fn header(&self) -> Header {
        Header { kid: Some(self.id.to_owned()), ..Header::new(Algorithm::ES256) }
    }

    fn sign_with(&self, header: &Header, claims: &Value) -> String {
        jsonwebtoken::encode(header, claims, &EncodingKey::from_ec_der(&self.key.serialize_der())).unwrap()
    }
}

/// An issuer that can be made to publish other keys, or to fail.
pub(crate) struct Idp {
    pub(crate) url: String,
    published: Arc<Published>,
}

#[derive(Default)]
struct Published {
    url: Mutex<String>,
    keys: Mutex<Vec<Value>>,
    down: AtomicBool,
    hanging: AtomicBool,
    fetches: AtomicU64,
}

impl Idp {
    fn router(published: &Arc<Published>) -> Router {
        let discovery = |State(published): State<Arc<Published>>| async move {
            let url = published.url.lock().unwrap().clone();
            json!({"issuer": url, "jwks_uri": format!("{url}/keys")}).to_string()
        };
        let keys = |State(published): State<Arc<Published>>| async move {
            published.fetches.fetch_add(1, Ordering::SeqCst);
            if published.hanging.load(Ordering::SeqCst) {
                std::future::pending::<()>().await;
            }
            if published.down.load(Ordering::SeqCst) {
                return (StatusCode::SERVICE_UNAVAILABLE, String::new());
            }
            (StatusCode::OK, json!({"keys": *published.keys.lock().unwrap()}).to_string())
        };
        Router::new()
            .route("/.well-known/openid-configuration", get(discovery))
            .route("/keys", get(keys))
            .with_state(Arc::clone(published))
    }

    pub(crate) fn start(signers: &[&Signer]) -> Self {
        let published = Arc::new(Published::default());
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        published.url.lock().unwrap().clone_from(&url);
        let router = Self::router(&published);
        #[expect(clippy::disallowed_methods, reason = "ends with the test's runtime")]
        tokio::spawn(async move {
            server::serve(listener, router, &server::Options::default(), ServerHandle::default()).await
        });
        let idp = Self { url, published };
        idp.publish(signers);
        idp
    }

    fn publish(&self, signers: &[&Signer]) {
        *self.published.keys.lock().unwrap() = signers.iter().map(|signer| signer.jwk()).collect();
    }

    fn down(&self, down: bool) {
        self.published.down.store(down, Ordering::SeqCst);
    }

    fn hang(&self) {
        self.published.hanging.store(true, Ordering::SeqCst);
    }

    fn fetches(&self) -> u64 {
        self.published.fetches.load(Ordering::SeqCst)
    }

    /// Claims of a token that is good for five minutes.
    pub(crate) fn claims(&self) -> Value {
        json!({"iss": self.url, "aud": "keyfold", "sub": "alice", "exp": secs(300), "iat": secs(0),
               "tenants": ["acme"], "scope": "openid keyfold:encrypt keyfold:decrypt"})
    }

    /// The claims with these changes; null takes one away.
    fn with(&self, changes: &Value) -> Value {
        let mut claims = self.claims();
        for (name, value) in changes.as_object().unwrap() {
            claims[name] = value.clone();
        }
        claims.as_object_mut().unwrap().retain(|_, value| !value.is_null());
        claims
    }
}

/// So many seconds after the tests' start.
fn secs(after: i64) -> i64 {
    START.unix_ms() / 1_000 + after
}

pub(crate) fn issuer(url: &str) -> IssuerSettings {
    serde_json::from_value(json!({
        "name": "corp", "issuer": url, "audiences": ["keyfold"], "algorithms": ["ES256", "RS256"],
        "tenants_claim": "tenants", "verbs_claim": "scope", "verbs_prefix": "keyfold:",
    }))
    .unwrap()
}

/// A token that waits for an issuer holds a request's place, and whoever knows the issuer's name can forge it.
#[tokio::test]
async fn forged_tokens_do_not_fill_the_service_while_their_issuer_hangs() {
    let scene = Scene::with(
        |settings| settings.http.in_flight_max = 8,
        |issuer| {
            issuer.unknown_key_waiting_max = 5;
            issuer.fetch_secs_max = 600;
        },
    )
    .await;
    scene.let_in(&scene.idp.claims()).await;
    scene.idp.hang();
    scene.world.pass(10);
    let mut forged = tokio::task::JoinSet::new();
    for _ in 0..8 {
        let token = Signer::new("forged").sign(&scene.idp.claims());
        let caller = Caller::new(scene.service.address, Some(token));
        forged.spawn(async move { caller.try_encrypt(b"x", &json!({})).await });
    }
    for _ in 5..8 {
        let answer = tokio::time::timeout(Duration::from_secs(20), forged.join_next()).await;
        let answer = answer.expect("one too many does not wait").unwrap().unwrap();
        answer.problem("issuer_unavailable");
        assert!(answer.headers.contains_key("retry-after"));
    }
    // Those who are known come in, while the others wait.
    scene.let_in(&scene.idp.claims()).await;
    scene.let_in(&scene.idp.with(&json!({"jti": "not remembered"}))).await;
    let own = scene.service.caller(&["acme"], &[Verb::Encrypt]).await;
    own.encrypt(b"x", &json!({})).await;
    assert!(forged.try_join_next().is_none(), "five wait");
    forged.shutdown().await;
    scene.service.stop().await;
}

struct Scene {
    world: World,
    service: Service,
    signer: Signer,
    idp: Idp,
}

impl Scene {
    async fn new(change: impl FnOnce(&mut IssuerSettings)) -> Self {
        Self::with(|_| {}, change).await
    }

    async fn with(settings: impl FnOnce(&mut Settings), change: impl FnOnce(&mut IssuerSettings)) -> Self {
        let signer = Signer::new("one");
        let idp = Idp::start(&[&signer]);
        let mut world = World::new().await;
        settings(&mut world.settings);
        let mut issuer = issuer(&idp.url);
        change(&mut issuer);
        world.settings.access.issuers.push(issuer);
        world.settings.access.roles.insert(
            "reader".to_owned(),
            RoleSettings { verbs: vec!["decrypt".to_owned()], keys: None, context: vec![] },
        );
        let service = world.start_without_keeper().await;
        service.tenant("acme").await;
        service.tenant("evil").await;
        Self { world, service, signer, idp }
    }

    async fn answer(&self, token: &str) -> Answer {
        Caller::new(self.service.address, Some(token.to_owned())).try_encrypt(b"x", &json!({})).await
    }

    async fn let_in(&self, claims: &Value) {
        self.answer(&self.signer.sign(claims)).await.ok(200);
    }

    async fn refused(&self, token: &str) {
        self.answer(token).await.problem("unauthenticated");
    }
}

#[tokio::test]
async fn a_token_is_let_in_within_its_times_for_its_audience_and_its_tenants() {
    let scene = Scene::new(|_| {}).await;
    let idp = &scene.idp;
    scene.let_in(&idp.claims()).await;
    for good in [
        json!({"aud": ["other", "keyfold"]}),
        json!({"exp": secs(-59)}),
        json!({"exp": 1_795_435_300.5}),
        json!({"nbf": secs(60), "iat": secs(60)}),
        json!({"iat": null}),
        json!({"tenants": "acme"}),
    ] {
        scene.let_in(&idp.with(&good)).await;
    }
    for bad in [
        json!({"exp": secs(-60)}),
        json!({"exp": null}),
        json!({"exp": "soon"}),
        json!({"exp": -1}),
        json!({"nbf": secs(61)}),
        json!({"iat": secs(61)}),
        json!({"aud": "other"}),
        json!({"aud": null}),
        json!({"aud": "keyfold2"}),
        json!({"aud": {"keyfold": true}}),
        json!({"iss": "http://127.0.0.1:1"}),
        json!({"iss": format!("{}/", idp.url)}),
        json!({"iss": [idp.url]}),
        json!({"iss": null}),
        json!({"sub": null}),
        json!({"sub": ""}),
        json!({"sub": 7}),
        json!({"sub": "a\nb"}),
        json!({"sub": "a".repeat(300)}),
        json!({"cnf": {"jkt": "x"}}),
        json!({"cnf": {"x5t#S256": "x"}}),
    ] {
        scene.refused(&scene.signer.sign(&idp.with(&bad))).await;
    }
    for forbidden in [
        json!({"tenants": []}),
        json!({"tenants": ["evil"], "scope": "openid"}),
        json!({"tenants": ["ACME"]}),
        json!({"tenants": ["аcme"]}),
        json!({"tenants": ["acme "]}),
        json!({"tenants": {"acme": true}}),
        json!({"scope": "encrypt"}),
        json!({"scope": "keyfold:operate keyfold:admin"}),
        json!({"scope": null}),
    ] {
        scene.answer(&scene.signer.sign(&idp.with(&forbidden))).await.problem("forbidden");
    }
    // A header names another tenant than the token.
    let caller = Caller::new(scene.service.address, Some(scene.signer.sign(&idp.claims())));
    caller.as_tenant("evil").try_encrypt(b"x", &json!({})).await.problem("forbidden");
    scene.service.stop().await;
}

#[tokio::test]
async fn a_token_cannot_choose_how_it_is_verified() {
    let scene = Scene::new(|_| {}).await;
    let (idp, signer) = (&scene.idp, &scene.signer);
    let claims = idp.claims();
    let good = signer.sign(&claims);
    let (head, rest) = good.split_once('.').unwrap();
    let (payload, signature) = rest.split_once('.').unwrap();
    let part = |value: Value| URL_SAFE_NO_PAD.encode(value.to_string());
    for alg in ["none", "None", "NONE", "nOnE"] {
        let none = part(json!({"alg": alg, "kid": "one"}));
        scene.refused(&format!("{none}.{payload}.")).await;
        scene.refused(&format!("{none}.{payload}.{signature}")).await;
    }
    // HS256 with what everybody knows: the public key, in each of the forms that it is published in.
    let jwk = signer.jwk();
    for secret in
        [signer.key.public_key_pem().into_bytes(), signer.key.der_bytes().to_vec(), jwk.to_string().into()]
    {
        let header = Header { kid: Some("one".to_owned()), ..Header::new(Algorithm::HS256) };
        let forged = jsonwebtoken::encode(&header, &claims, &EncodingKey::from_secret(&secret)).unwrap();
        scene.refused(&forged).await;
    }
    let stranger = Signer::new("one");
    scene.refused(&stranger.sign(&claims)).await;
    // A key of the attacker's own, brought along.
    let mut own = stranger.header();
    own.jwk = serde_json::from_value(stranger.jwk()).ok();
    own.jku = Some("http://127.0.0.1:1/keys".to_owned());
    scene.refused(&stranger.sign_with(&own, &claims)).await;
    let typ = |typ: Option<&str>| Header { typ: typ.map(str::to_owned), ..signer.header() };
    scene.refused(&signer.sign_with(&typ(Some("dpop+jwt")), &claims)).await;
    for taken in [None, Some("at+jwt"), Some("application/AT+JWT")] {
        scene.answer(&signer.sign_with(&typ(taken), &claims)).await.ok(200);
    }
    let critical = part(json!({"alg": "ES256", "kid": "one", "crit": ["exp"], "exp": 1}));
    scene.refused(&format!("{critical}.{payload}.{signature}")).await;
    // Every character counts.
    scene.answer(&good).await.ok(200);
    for at in (0..good.len()).step_by(7) {
        let mut bytes = good.clone().into_bytes();
        bytes[at] = if bytes[at] == b'A' { b'B' } else { b'A' };
        scene.refused(&String::from_utf8(bytes).unwrap()).await;
    }
    for shape in [
        format!("{good}."),
        format!("{good}.{signature}"),
        format!("{head}.{payload}"),
        format!("{good}="),
        format!(" {good}"),
        "..".to_owned(),
        "a.b.c".to_owned(),
        format!("{good}{}", "A".repeat(8_192)),
    ] {
        scene.refused(&shape).await;
    }
    // Two Authorization headers: which of them counts is not for the sender to choose.
    let twice = Caller::new(scene.service.address, Some(good.clone()));
    let twice = twice.with_header("authorization", &format!("Bearer {good}"));
    twice.try_encrypt(b"x", &json!({})).await.problem("unauthenticated");
    scene.service.stop().await;
}

#[tokio::test]
async fn a_token_at_its_longest_is_looked_at_and_one_byte_more_is_not() {
    let scene = Scene::new(|_| {}).await;
    let token = |pad: usize| scene.signer.sign(&scene.idp.with(&json!({"pad": "a".repeat(pad)})));
    let within = (5_000..7_000).rev().map(token).find(|token| token.len() <= 8_192).unwrap();
    assert!(within.len() >= 8_190, "{}", within.len());
    scene.answer(&within).await.ok(200);
    let beyond = (5_000..7_000).map(token).find(|token| token.len() > 8_192).unwrap();
    scene.refused(&beyond).await;
    scene.service.stop().await;
}

#[tokio::test]
async fn a_new_key_is_noticed_at_once_and_unknown_ones_do_not_hammer_the_issuer() {
    let scene = Scene::new(|_| {}).await;
    let idp = &scene.idp;
    scene.let_in(&idp.claims()).await;
    assert_eq!(idp.fetches(), 1);
    scene.let_in(&idp.with(&json!({"jti": "2"}))).await;
    assert_eq!(idp.fetches(), 1, "a known key asks nobody");
    scene.world.pass(10);
    // Rotated: the new key is there beside the old one.
    let new = Signer::new("two");
    idp.publish(&[&scene.signer, &new]);
    scene.answer(&new.sign(&idp.claims())).await.ok(200);
    assert_eq!(idp.fetches(), 2);
    for _ in 0..50 {
        scene.refused(&Signer::new("three").sign(&idp.claims())).await;
    }
    assert_eq!(idp.fetches(), 2, "asked ten seconds ago and not since");
    scene.world.pass(10);
    let storm = (0..20).map(|_| Signer::new("four").sign(&idp.claims()));
    let mut answers = tokio::task::JoinSet::new();
    for token in storm {
        let caller = Caller::new(scene.service.address, Some(token));
        answers.spawn(async move { caller.try_encrypt(b"x", &json!({})).await.problem("unauthenticated") });
    }
    while let Some(answer) = answers.join_next().await {
        answer.unwrap();
    }
    assert_eq!(idp.fetches(), 3, "twenty at once are one question");
    // The old key is withdrawn: what it has signed counts no more, remembered or not.
    let old = scene.signer.sign(&idp.claims());
    scene.answer(&old).await.ok(200);
    idp.publish(&[&new]);
    scene.world.pass(10);
    scene.refused(&Signer::new("five").sign(&idp.claims())).await;
    scene.refused(&old).await;
    scene.service.stop().await;
}

#[tokio::test]
async fn keys_are_fetched_ahead_and_an_outage_is_survived_for_the_stated_time() {
    let mut scene = Scene::new(|issuer| issuer.keys_stale_secs_max = 3_600).await;
    let long = scene.idp.with(&json!({"exp": secs(100_000)}));
    scene.let_in(&long).await;
    scene.idp.down(true);
    scene.world.pass(3_599);
    scene.let_in(&long).await;
    scene.let_in(&scene.idp.with(&json!({"exp": secs(100_000), "jti": "not remembered"}))).await;
    scene.world.pass(1);
    let answer = scene.answer(&scene.signer.sign(&long)).await;
    answer.problem("issuer_unavailable");
    assert_eq!(answer.status, 503);
    scene.idp.down(false);
    scene.world.pass(10);
    scene.let_in(&long).await;
    // With its background task the service asks before anybody has to wait, and again soon after a failure.
    scene.service.stop().await;
    let fetches = scene.idp.fetches();
    scene.service = scene.world.start().await;
    wait_for(|| scene.idp.fetches() == fetches + 1).await;
    // The service may be about to look at the clock: it is moved until it has.
    wait_for(|| {
        scene.world.pass(60);
        scene.idp.fetches() >= fetches + 3
    })
    .await;
    scene.service.stop().await;
}

async fn wait_for(condition: impl Fn() -> bool) {
    for _ in 0..1_000_000 {
        if condition() {
            return;
        }
        tokio::task::yield_now().await;
    }
    panic!("it did not come about");
}

#[tokio::test]
async fn a_verified_token_is_remembered_and_not_beyond_its_expiry() {
    let scene = Scene::new(|_| {}).await;
    let token = scene.signer.sign(&scene.idp.claims());
    scene.answer(&token).await.ok(200);
    scene.world.pass(299);
    scene.answer(&token).await.ok(200);
    scene.world.pass(60);
    scene.answer(&token).await.ok(200);
    scene.world.pass(1);
    scene.refused(&token).await;
    scene.service.stop().await;
}

#[tokio::test]
async fn kubernetes_and_cognito_claims_mean_tenants_and_roles() {
    let scene = Scene::new(|issuer| {
        issuer.tenants_claim = Some("/kubernetes.io/namespace".to_owned());
        issuer.verbs_claim = None;
        issuer.verbs = vec!["encrypt".to_owned()];
        issuer.roles_claim = Some("cognito:groups".to_owned());
        issuer.roles_prefix = "keyfold-".to_owned();
        issuer.required_claims =
            serde_json::from_value(json!([{"claim": "/kubernetes.io/pod", "values": ["api-*"]}])).unwrap();
    })
    .await;
    let claims = |namespace: &str, pod: &str, groups: Value| {
        scene.idp.with(&json!({
            "sub": "system:serviceaccount:acme:api", "tenants": null, "cognito:groups": groups,
            "kubernetes.io": {"namespace": namespace, "pod": pod},
        }))
    };
    let caller = |claims: Value| Caller::new(scene.service.address, Some(scene.signer.sign(&claims)));
    let api = caller(claims("acme", "api-1", json!(["keyfold-reader", "keyfold-nobody", "reader"])));
    let sealed = api.encrypt(b"hello", &json!({})).await;
    assert_eq!(api.decrypt(&sealed, &json!({})).await, b"hello");
    let without = caller(claims("acme", "api-1", json!(["reader"])));
    without.try_decrypt(&sealed, &json!({})).await.problem("forbidden");
    let elsewhere = caller(claims("evil", "api-1", json!(["keyfold-reader"])));
    elsewhere.try_decrypt(&sealed, &json!({})).await.problem("context_mismatch");
    caller(claims("acme", "job", json!([]))).try_encrypt(b"x", &json!({})).await.problem("unauthenticated");
    scene.service.stop().await;
}

#[tokio::test]
async fn keys_come_over_tls_from_an_authority_that_is_named_and_from_no_other() {
    let (authority, signer) = (Authority::new("idp"), Signer::new("one"));
    let mut world = World::new().await;
    let (certificate, key) = authority.server(1).write(&world.path(""), "idp");
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("https://localhost:{}", listener.local_addr().unwrap().port());
    let published = Arc::new(Published::default());
    published.url.lock().unwrap().clone_from(&url);
    let idp = Idp { url: url.clone(), published: Arc::clone(&published) };
    idp.publish(&[&signer]);
    let ca = world.path("ca.pem");
    std::fs::write(&ca, &authority.pem).unwrap();
    world.settings.access.issuers.push(IssuerSettings { ca_file: Some(ca.clone()), ..issuer(&url) });
    let service = world.start_without_keeper().await;
    service.tenant("acme").await;
    let options = Options {
        identity: Identity::Files { certificate, key },
        clients: None,
        tls12: true,
        handshake_secs_max: 10,
        reload_secs: 10,
    };
    let tls = Tls::open(options, world.clock.clone(), service.app.access.certificates().clone()).unwrap();
    let router = Idp::router(&published);
    #[expect(clippy::disallowed_methods, reason = "ends with the test's runtime")]
    tokio::spawn(async move {
        let handle = ServerHandle::default();
        server::serve_tls(listener, router, &tls, &server::Options::default(), handle).await
    });
    let caller = Caller::new(service.address, Some(signer.sign(&idp.claims())));
    caller.encrypt(b"x", &json!({})).await;
    service.stop().await;
    std::fs::write(&ca, Authority::new("another").pem).unwrap();
    let service = world.start_without_keeper().await;
    let caller = Caller::new(service.address, Some(signer.sign(&idp.claims())));
    caller.try_encrypt(b"x", &json!({})).await.problem("issuer_unavailable");
    service.stop().await;
}

#[test]
fn a_configuration_that_would_let_strangers_in_is_refused() {
    let refused = |changes: Value, says: &str| {
        let mut issuer = json!({"name": "corp", "issuer": "https://idp.example", "audiences": ["keyfold"]});
        for (name, value) in changes.as_object().unwrap() {
            issuer[name] = value.clone();
        }
        let settings = keyfold::config::AccessSettings {
            issuers: vec![serde_json::from_value(issuer).unwrap()],
            ..keyfold::config::AccessSettings::default()
        };
        let error = settings.rules().unwrap_err().to_string();
        assert!(error.contains(says), "{changes}: {error}");
    };
    refused(json!({"algorithms": ["HS256"]}), "symmetric");
    refused(json!({"algorithms": ["none"]}), "algorithms are");
    refused(json!({"algorithms": []}), "algorithms are");
    refused(json!({"audiences": []}), "audiences");
    refused(json!({"issuer": "http://idp.example"}), "use https");
    refused(json!({"jwks_url": "http://idp.example/keys"}), "use https");
    refused(json!({"roles": ["nobody"]}), "there is no role");
    refused(json!({"verbs": ["everything"]}), "verb");
    refused(json!({"keys_stale_secs_max": 0}), "keys_stale_secs_max");
    refused(json!({"unknown_key_waiting_max": 0}), "unknown_key_waiting_max");
}

#[test]
fn tokens_that_wait_for_an_issuer_may_take_all_places_but_one() {
    let load = |in_flight_max: usize| {
        let file = tempfile::NamedTempFile::new().unwrap();
        let issuer =
            "[[access.issuers]]\nname = \"i\"\nissuer = \"https://i.example\"\naudiences = [\"a\"]\n";
        std::fs::write(file.path(), format!("[http]\nin_flight_max = {in_flight_max}\n{issuer}")).unwrap();
        Settings::load(Some(file.path()), &Variables::default())
    };
    assert!(load(33).is_ok());
    let said = load(32).unwrap_err().to_string();
    assert!(said.contains("unknown_key_waiting_max") && said.contains("http.in_flight_max"), "{said}");
}
