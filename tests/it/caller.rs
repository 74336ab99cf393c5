//! A client of the service. Every answer is held against the OpenAPI document: see `contract`.

use std::net::SocketAddr;
use std::sync::{Arc, Once};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use reqwest::header::HeaderMap;
use reqwest::{Client, ClientBuilder, Method};
use serde_json::{Value, json};

use crate::contract;
use crate::pki::Issued;

/// A client with, or without, a credential.
#[derive(Clone)]
pub(crate) struct Caller {
    client: Client,
    url: String,
    headers: Arc<Vec<(String, String)>>,
    token: Option<String>,
}

/// Longer than anything takes: a test that hangs is to fail, and not to wait for ever.
const TIME_MAX: Duration = Duration::from_secs(60);

fn builder() -> ClientBuilder {
    static PROVIDER: Once = Once::new();
    PROVIDER.call_once(|| {
        // The client's own default would be none.
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    });
    Client::builder().no_proxy().timeout(TIME_MAX)
}

impl Caller {
    pub(crate) fn new(address: SocketAddr, token: Option<String>) -> Self {
        let client = builder().build().unwrap();
        Self { client, url: format!("http://{address}"), headers: Arc::default(), token }
    }

    /// A caller over TLS, who trusts this authority and has this certificate, if any.
    pub(crate) fn over_tls(
        address: SocketAddr,
        authority: &str,
        own: Option<&Issued>,
        token: Option<String>,
    ) -> Self {
        let authority = reqwest::Certificate::from_pem(authority.as_bytes()).unwrap();
        let mut builder = builder().tls_certs_only([authority]);
        if let Some(own) = own {
            let pem = format!("{}{}", own.certificate, own.key);
            builder = builder.identity(reqwest::Identity::from_pem(pem.as_bytes()).unwrap());
        }
        Self {
            client: builder.build().unwrap(),
            url: format!("https://{address}"),
            headers: Arc::default(),
            token,
        }
    }

    /// The same caller over HTTP/2.
    pub(crate) fn over_http2(mut self) -> Self {
        self.client = builder().http2_prior_knowledge().build().unwrap();
        self
    }

    /// The same caller with another token.
    pub(crate) fn with_token(&self, token: impl Into<String>) -> Self {
        Self { token: Some(token.into()), ..self.clone() }
    }

    /// The same caller with one more header in every request.
    pub(crate) fn with_header(&self, name: &str, value: &str) -> Self {
        let mut headers = self.headers.to_vec();
        headers.push((name.to_owned(), value.to_owned()));
        Self { headers: Arc::new(headers), ..self.clone() }
    }

    /// The same caller, naming this tenant in every request.
    pub(crate) fn as_tenant(&self, tenant: &str) -> Self {
        self.with_header("keyfold-tenant", tenant)
    }

    pub(crate) fn token(&self) -> &str {
        self.token.as_deref().unwrap()
    }

    /// The request before its body.
    pub(crate) fn request(&self, method: Method, path: &str) -> reqwest::RequestBuilder {
        let mut request = self.client.request(method, format!("{}{path}", self.url));
        if let Some(token) = &self.token {
            request = request.bearer_auth(token);
        }
        for (name, value) in self.headers.iter() {
            request = request.header(name, value);
        }
        request
    }

    pub(crate) async fn get(&self, path: &str) -> Answer {
        answer("get", path, self.request(Method::GET, path)).await
    }

    pub(crate) async fn post(&self, path: &str, body: &Value) -> Answer {
        self.post_text(path, body.to_string()).await
    }

    pub(crate) async fn put(&self, path: &str, body: &Value) -> Answer {
        let request = self.request(Method::PUT, path).header("content-type", "application/json");
        answer("put", path, request.body(body.to_string())).await
    }

    /// Posts a body that may be anything, as JSON.
    pub(crate) async fn post_text(&self, path: &str, body: impl Into<reqwest::Body>) -> Answer {
        let request = self.request(Method::POST, path).header("content-type", "application/json");
        answer("post", path, request.body(body)).await
    }

    /// Encrypts under the key `default`, and returns the whole answer.
    pub(crate) async fn try_encrypt(&self, plaintext: &[u8], context: &Value) -> Answer {
        let body = json!({"plaintext": STANDARD.encode(plaintext), "context": context});
        self.post("/v1/encrypt", &body).await
    }

    /// Encrypts under the key `default`, and returns the ciphertext.
    pub(crate) async fn encrypt(&self, plaintext: &[u8], context: &Value) -> String {
        text(&self.try_encrypt(plaintext, context).await.ok(200)["ciphertext"])
    }

    pub(crate) async fn try_decrypt(&self, ciphertext: &str, context: &Value) -> Answer {
        self.post("/v1/decrypt", &json!({"ciphertext": ciphertext, "context": context})).await
    }

    pub(crate) async fn decrypt(&self, ciphertext: &str, context: &Value) -> Vec<u8> {
        plaintext(&self.try_decrypt(ciphertext, context).await.ok(200))
    }
}

/// The text in a JSON value.
#[track_caller]
pub(crate) fn text(value: &Value) -> String {
    value.as_str().unwrap_or_else(|| panic!("not a string: {value}")).to_owned()
}

/// The plaintext in an answer to decrypt.
#[track_caller]
pub(crate) fn plaintext(answer: &Value) -> Vec<u8> {
    STANDARD.decode(text(&answer["plaintext"])).unwrap()
}

/// What came back.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: HeaderMap,
    pub(crate) json: Value,
    pub(crate) raw: String,
}

async fn answer(method: &str, path: &str, request: reqwest::RequestBuilder) -> Answer {
    let answer = receive(request).await;
    contract::check(method, path, &answer);
    answer
}

/// Sends a request whose answer is not held against the document.
pub(crate) async fn receive(request: reqwest::RequestBuilder) -> Answer {
    let response = request.send().await.unwrap();
    let (status, headers) = (response.status().as_u16(), response.headers().clone());
    let raw = response.text().await.unwrap();
    let json = serde_json::from_str(&raw).unwrap_or(Value::Null);
    Answer { status, headers, json, raw }
}

impl Answer {
    /// The body of an answer that must have this status.
    #[track_caller]
    pub(crate) fn ok(self, status: u16) -> Value {
        assert_eq!(self.status, status, "{}", self.raw);
        self.json
    }

    /// The detail of a problem that must have this code, with the status that goes with it.
    #[track_caller]
    pub(crate) fn problem(&self, code: &str) -> String {
        assert_eq!(self.json["code"], code, "{} {}", self.status, self.raw);
        contract::check_problem(self);
        text(&self.json["detail"])
    }
}
