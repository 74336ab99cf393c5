//! The whole service in this process, behind its edge: whatever is sent, it answers, and never with an error of its
//! own; and what it opens is what it has sealed.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::{Arc, LazyLock};
use std::task::{Context, Poll};

use axum::body::Body;
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use bytes::Bytes;
use http::{HeaderValue, Request, StatusCode, header};
use http_body::Frame;
use http_body_util::BodyExt as _;
use keyfold::access::{Pepper, Principal};
use keyfold::app::{App, Parts};
use keyfold::audit::{Audit, FileOptions, Keys, OnFull, Options};
use keyfold::clock::{Clock, Timestamp};
use keyfold::config::Settings;
use keyfold::http::Front;
use keyfold::kms::local::{LocalKeyRing, Protection};
use keyfold::operations::{ApiKeyGrant, Operations};
use keyfold::store::sqlite::{SqliteOptions, SqliteStore};
use keyfold::tenant::{Kek, KekRing, Verb};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::runtime::{Builder, Runtime};
use tower::ServiceExt as _;

pub const START: Timestamp = Timestamp::from_unix_ms(1_795_435_200_000);
pub const KEK: &str = "local:one";
/// Nobody listens there: tokens are read as far as their keys.
const ISSUER: &str = "http://127.0.0.1:9";
const OCTETS: &str = "application/octet-stream";
const NDJSON: &str = "application/x-ndjson";
/// All that is ever sealed for somebody who then decrypts.
const MESSAGES: [&[u8]; 3] = [b"", b"hello", b"another message"];

pub struct Started {
    pub runtime: Runtime,
    pub operations: Arc<Operations>,
    pub audit: Audit,
    pub folder: TempDir,
    front: Front,
    token: String,
    _app: App,
}

static STARTED: LazyLock<Started> = LazyLock::new(|| {
    let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let folder = TempDir::new().unwrap();
    let (app, audit, token) = runtime.block_on(start(&folder));
    let (front, operations) = (app.front.clone(), Arc::clone(&app.operations));
    Started { runtime, operations, audit, folder, front, token, _app: app }
});

pub fn started() -> &'static Started {
    &STARTED
}

pub fn audit_keys() -> Keys {
    Keys::new(&[9; 32], Vec::new()).unwrap()
}

async fn start(folder: &TempDir) -> (App, Audit, String) {
    let clock = Clock::manual(START);
    let mut settings = Settings { data_dir: folder.path().to_owned(), ..Settings::default() };
    let issuer = json!({
        "name": "corp", "issuer": ISSUER, "audiences": ["keyfold"], "algorithms": ["ES256", "RS256"],
        "tenants_claim": "tenants", "verbs_claim": "scope", "verbs_prefix": "keyfold:",
    });
    settings.access.issuers.push(serde_json::from_value(issuer).unwrap());
    let keyring = LocalKeyRing::create(folder.path().join("keyring"), Protection::Dev, clock.clone()).await;
    let keyring = keyring.unwrap();
    keyring.add(KEK).await.unwrap();
    let file = FileOptions { path: folder.path().join("audit.jsonl"), rotate_bytes: 1 << 40, files_max: 0 };
    let options = Options { file: Some((file, OnFull::Refuse)), ..Options::default() };
    let audit = Audit::open(clock.clone(), &options, &audit_keys()).unwrap();
    let store = SqliteStore::open(&settings.registry_file(), SqliteOptions::default()).await.unwrap();
    let parts = Parts {
        clock,
        store: Arc::new(store),
        kms: Arc::new(keyring.clone()),
        guard: None,
        keyring: Some(keyring),
        pepper: Pepper::new(&[7; 32]).unwrap(),
        audit: audit.clone(),
    };
    let app = App::assemble(&settings, parts).unwrap();
    let operator = Principal::local_operator();
    let ring = KekRing::new(vec![Kek::direct(KEK.parse().unwrap())]).unwrap();
    let tenant: keyfold::tenant::TenantId = "acme".parse().unwrap();
    let operate = operator.permit_operate().unwrap();
    app.operations.create_tenant(&operate, tenant.clone(), ring).await.unwrap();
    let grant = ApiKeyGrant {
        name: "a fuzzer's".to_owned(),
        tenants: vec![tenant.clone()],
        verbs: vec![Verb::Encrypt, Verb::Decrypt, Verb::Rewrap],
        expires_at: None,
    };
    let permit = operator.permit_admin(&tenant).unwrap();
    let new = app.operations.create_api_key(&permit, &operator, grant).await.unwrap();
    (app, audit, new.token.to_string())
}

struct Answer {
    status: StatusCode,
    /// None where the answer was broken off.
    body: Option<Vec<u8>>,
}

impl Answer {
    fn json(&self) -> Value {
        serde_json::from_slice(self.body.as_deref().expect("a whole answer")).expect("an answer in JSON")
    }

    /// Every answer that is no success is a problem with a code, and no fault of the service.
    fn checked(self) -> Self {
        if self.status != StatusCode::OK {
            assert!(!self.status.is_server_error(), "{} {}", self.status, self.json());
            assert!(self.json()["code"].is_string(), "{} {}", self.status, self.json());
        }
        self
    }
}

/// A body in pieces, of unknown length.
struct Pieces(VecDeque<Bytes>);

impl http_body::Body for Pieces {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        Poll::Ready(self.0.pop_front().map(|piece| Ok(Frame::data(piece))))
    }
}

fn in_pieces(bytes: &[u8], piece_bytes: usize) -> Body {
    Body::new(Pieces(bytes.chunks(piece_bytes).map(Bytes::copy_from_slice).collect()))
}

fn call(path: &str, media_type: &str, context: Option<&HeaderValue>, body: Body) -> Answer {
    let mut request = Request::post(path)
        .header(header::CONTENT_TYPE, media_type)
        .header(header::AUTHORIZATION, format!("Bearer {}", started().token));
    if let Some(context) = context {
        request = request.header("keyfold-context", context);
    }
    send(request.body(body).unwrap())
}

fn send(request: Request<Body>) -> Answer {
    let started = started();
    started.runtime.block_on(async {
        let response = started.front.clone().oneshot(request).await.unwrap();
        let status = response.status();
        let body = response.into_body().collect().await;
        Answer { status, body: body.ok().map(|body| body.to_bytes().to_vec()) }
    })
}

fn post(path: &str, body: impl Into<Body>) -> Answer {
    call(path, "application/json", None, body.into()).checked()
}

/// `POST /v1/encrypt`: what is taken comes back.
pub fn encrypt_json(bytes: &[u8]) {
    let answer = post("/v1/encrypt", bytes.to_vec());
    if answer.status == StatusCode::OK {
        let asked: Value = serde_json::from_slice(bytes).unwrap();
        let context = asked.get("context").cloned().unwrap_or_else(|| json!({}));
        let body = json!({"ciphertext": answer.json()["ciphertext"], "context": context});
        let opened = post("/v1/decrypt", body.to_string());
        assert_eq!(opened.json()["plaintext"], asked["plaintext"], "{asked}");
    }
}

/// `POST /v1/decrypt`: nothing opens but to what was sealed.
pub fn decrypt_json(bytes: &[u8]) {
    let answer = post("/v1/decrypt", bytes.to_vec());
    if answer.status == StatusCode::OK {
        let plaintext = STANDARD.decode(answer.json()["plaintext"].as_str().unwrap()).unwrap();
        assert!(MESSAGES.contains(&&*plaintext), "{}", answer.json());
    }
}

/// `POST /v1/rewrap`: what comes back opens to nothing but what was sealed.
pub fn rewrap_json(bytes: &[u8]) {
    let answer = post("/v1/rewrap", bytes.to_vec());
    if answer.status == StatusCode::OK {
        let asked: Value = serde_json::from_slice(bytes).unwrap();
        let context = asked.get("context").cloned().unwrap_or_else(|| json!({}));
        decrypt_json(
            json!({"ciphertext": answer.json()["ciphertext"], "context": context}).to_string().as_bytes(),
        );
    }
}

/// `POST /v1/decrypt/batch`: an answer for each item, and each is one of the two kinds.
pub fn batch_json(bytes: &[u8]) {
    let answer = post("/v1/decrypt/batch", bytes.to_vec());
    if answer.status == StatusCode::OK {
        let asked: Value = serde_json::from_slice(bytes).unwrap();
        let answer = answer.json();
        let items = answer["items"].as_array().unwrap();
        assert_eq!(items.len(), asked["items"].as_array().unwrap().len());
        items.iter().for_each(check_item);
    }
}

fn check_item(item: &Value) {
    match item["plaintext"].as_str() {
        Some(plaintext) => assert!(MESSAGES.contains(&&*STANDARD.decode(plaintext).unwrap()), "{item}"),
        None => assert!(item["error"]["code"].is_string(), "{item}"),
    }
}

/// Lines of JSON in pieces of as many bytes as the first byte says: an answer a line, however they are cut.
pub fn lines(bytes: &[u8]) {
    let Some((&size, bytes)) = bytes.split_first() else { return };
    let answers = |body: Body| {
        let answer = call("/v1/decrypt/batch", NDJSON, None, body);
        assert_eq!(answer.status, StatusCode::OK);
        String::from_utf8(answer.body.expect("a whole answer")).unwrap()
    };
    let whole = answers(Body::from(bytes.to_vec()));
    assert_eq!(whole, answers(in_pieces(bytes, usize::from(size) + 1)));
    let asked = bytes.split(|byte| *byte == b'\n').filter(|line| !line.iter().all(u8::is_ascii_whitespace));
    let answered: Vec<Value> = whole.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(answered.len(), asked.count());
    answered.iter().for_each(check_item);
}

/// A raw envelope in pieces: what arrives whole is what was sealed.
pub fn raw_body(bytes: &[u8]) {
    let Some((&size, bytes)) = bytes.split_first() else { return };
    let context = HeaderValue::from_static("record=\"42\"");
    let body = in_pieces(bytes, usize::from(size) + 1);
    let answer = call("/v1/decrypt", OCTETS, Some(&context), body).checked();
    if let (StatusCode::OK, Some(plaintext)) = (answer.status, &answer.body) {
        assert!(MESSAGES.contains(&&**plaintext), "{plaintext:?}");
    }
}

/// `Keyfold-Context`: what sealing takes, opening takes, and it means the same.
pub fn context_header(bytes: &[u8]) {
    let Ok(context) = HeaderValue::from_bytes(bytes) else { return };
    let sealed = call("/v1/encrypt", OCTETS, Some(&context), Body::from("hello")).checked();
    if sealed.status == StatusCode::OK {
        let opened = call("/v1/decrypt", OCTETS, Some(&context), Body::from(sealed.body.unwrap())).checked();
        assert_eq!(opened.body.as_deref(), Some(&b"hello"[..]), "{context:?}");
    }
}

/// API keys and tokens: nobody is let in but with the one key that there is.
pub fn credential(bytes: &[u8]) {
    let Ok(value) = HeaderValue::from_bytes(&[b"Bearer ", bytes].concat()) else { return };
    let request = Request::post("/v1/encrypt")
        .header(header::CONTENT_TYPE, "application/json")
        .header(header::AUTHORIZATION, value)
        .body(Body::from("{\"plaintext\": \"\"}"))
        .unwrap();
    let answer = send(request);
    match answer.status {
        StatusCode::OK => assert_eq!(bytes.trim_ascii(), started().token.as_bytes()),
        // A token is good so far, and its issuer does not answer.
        StatusCode::SERVICE_UNAVAILABLE => assert!(bytes.contains(&b'.'), "{}", answer.json()),
        StatusCode::UNAUTHORIZED => {}
        status => panic!("{status} {}", answer.json()),
    }
}

pub fn encrypt_seeds() -> Vec<Vec<u8>> {
    [
        r#"{"plaintext":"aGVsbG8=","context":{"record":"42"}}"#,
        r#"{"plaintext":"","key":"default","envelope":"compact"}"#,
        r#"{"plaintext":"aGVs\/G8=","context":{"a":"\u00e9\ud83d\ude00","b":""},"key":null}"#,
        r#"{"plaintext":"aGVsbG8","contex":{"keyfold:tenant":"acme"}}"#,
    ]
    .map(|seed| seed.as_bytes().to_vec())
    .into()
}

/// Ciphertexts of the messages, embedded and compact.
fn sealed() -> Vec<String> {
    let mut sealed = Vec::new();
    for form in ["embedded", "compact"] {
        for message in MESSAGES {
            let plaintext = STANDARD.encode(message);
            let body = json!({"plaintext": plaintext, "context": {"record": "42"}, "envelope": form});
            let answer = post("/v1/encrypt", body.to_string()).json();
            sealed.push(answer["ciphertext"].as_str().unwrap_or_else(|| panic!("{answer}")).to_owned());
        }
    }
    sealed
}

fn items() -> Vec<Value> {
    let item = |ciphertext| json!({"ciphertext": ciphertext, "context": {"record": "42"}});
    sealed().into_iter().map(item).collect()
}

pub fn decrypt_seeds() -> Vec<Vec<u8>> {
    items().iter().map(|item| item.to_string().into_bytes()).collect()
}

pub fn batch_seeds() -> Vec<Vec<u8>> {
    let items = items();
    vec![
        json!({"items": items[..2]}).to_string().into_bytes(),
        json!({"items": items}).to_string().into_bytes(),
    ]
}

pub fn line_seeds() -> Vec<Vec<u8>> {
    let lines = |items: &[Value]| items.iter().fold(String::new(), |lines, item| format!("{lines}{item}\n"));
    let items = items();
    vec![
        format!("\u{7}{}", lines(&items)).into_bytes(),
        format!("\u{40}\n\n{} \r\n{{", lines(&items[3..5])).into_bytes(),
    ]
}

pub fn raw_seeds() -> Vec<Vec<u8>> {
    let envelopes = sealed();
    let envelopes = envelopes.iter().map(|text| envelope::text::decode(text).unwrap());
    envelopes
        .zip([0, 15, 63, 91, 127, 255])
        .map(|(envelope, size)| [&[size][..], &envelope].concat())
        .collect()
}

pub fn header_seeds() -> Vec<Vec<u8>> {
    let object = STANDARD.encode(r#"{"Record":"42","a:b":"é"}"#);
    let object = format!(":{object}:");
    ["record=\"42\"", "a=\"1\", b=\"\\\"\\\\\", *c=%\"caf%c3%a9\"", "a=\"1\", a=\"2\"", "", &object]
        .map(|seed| seed.as_bytes().to_vec())
        .into()
}

pub fn credential_seeds() -> Vec<Vec<u8>> {
    let part = |value: Value| URL_SAFE_NO_PAD.encode(value.to_string());
    let claims = json!({"iss": ISSUER, "aud": ["keyfold"], "sub": "alice", "exp": 1_795_435_500, "nbf": 1.5,
        "tenants": ["acme"], "scope": "keyfold:encrypt"});
    let token = |header| format!("{}.{}.{}", part(header), part(claims.clone()), "A".repeat(86));
    vec![
        started().token.clone().into_bytes(),
        token(json!({"alg": "ES256", "kid": "one", "typ": "JWT"})).into_bytes(),
        token(json!({"alg": "none", "crit": []})).into_bytes(),
    ]
}
