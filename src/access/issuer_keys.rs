//! The keys of a token issuer: fetched ahead, kept through its outages for a stated time, and asked for again when
//! a token names one that is not known, but only so often.

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use jsonwebtoken::jwk::{AlgorithmParameters, Jwk, KeyOperations, PublicKeyUse};
use jsonwebtoken::{Algorithm, AlgorithmFamily, DecodingKey};
use reqwest::Url;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use serde::Deserialize;
use sha2::{Digest, Sha256};
use tokio::sync::{Mutex, Semaphore};
use tokio_util::sync::CancellationToken;

use super::AuthenticationError;
use super::jwt::{IssuerError, IssuerRule};
use crate::clock::Clock;

/// The largest answer of an issuer that is read.
const ANSWER_BYTES_MAX: usize = 512 * 1024;
/// The first pause after a failed fetch; it doubles up to the usual interval.
const RETRY: Duration = Duration::from_secs(2);

pub(super) struct IssuerKeys {
    rule: Arc<IssuerRule>,
    client: reqwest::Client,
    clock: Clock,
    set: ArcSwap<KeySet>,
    /// When a token's unknown key last had the issuer asked. Held while it is being asked: one at a time.
    asked_at: Mutex<Option<Duration>>,
    /// The places of tokens that wait for the issuer. Whoever knows its name and an audience can forge one, and each
    /// holds a request's place: while the issuer hangs they must not hold them all.
    waiting: Semaphore,
}

#[derive(Default)]
struct KeySet {
    keys: Vec<Arc<IssuerKey>>,
    fetched_at: Option<Duration>,
    /// Grows when a key is gone: what was verified with it is to be verified again.
    epoch: u64,
}

pub(super) struct IssuerKey {
    id: Option<String>,
    algorithm: Option<Algorithm>,
    family: AlgorithmFamily,
    pub(super) key: DecodingKey,
    digest: [u8; 32],
}

/// What a JWKS endpoint answers.
#[derive(Deserialize)]
struct Keys {
    keys: Vec<serde_json::Value>,
}

/// What is wanted of a discovery document.
#[derive(Deserialize)]
struct Document {
    issuer: String,
    jwks_uri: String,
}

impl IssuerKey {
    /// None where it is no public key for signatures that this service knows.
    fn parse(value: &serde_json::Value) -> Option<Self> {
        let jwk: Jwk = serde_json::from_value(value.clone()).ok()?;
        let family = match jwk.algorithm {
            AlgorithmParameters::RSA(_) => AlgorithmFamily::Rsa,
            AlgorithmParameters::EllipticCurve(_) => AlgorithmFamily::Ec,
            AlgorithmParameters::OctetKeyPair(_) => AlgorithmFamily::Ed,
            // A symmetric key that is published is no secret, and a token "signed" with it proves nothing.
            _ => return None,
        };
        let signs = jwk.common.public_key_use.as_ref().is_none_or(|usage| *usage == PublicKeyUse::Signature);
        let operations = jwk.common.key_operations.as_ref();
        let verifies = operations.is_none_or(|allowed| allowed.contains(&KeyOperations::Verify));
        let algorithm = match value.get("alg") {
            None => None,
            Some(named) => Some(named.as_str()?.parse().ok()?),
        };
        let key = DecodingKey::from_jwk(&jwk).ok()?;
        let digest = Sha256::digest(value.to_string()).into();
        (signs && verifies).then_some(Self { id: jwk.common.key_id, algorithm, family, key, digest })
    }

    fn serves(&self, algorithm: Algorithm) -> bool {
        self.family == algorithm.family() && self.algorithm.is_none_or(|own| own == algorithm)
    }
}

impl KeySet {
    /// The key that a token's header means. Without a key id there must be no choice.
    fn find(&self, id: Option<&str>, algorithm: Algorithm) -> Option<Arc<IssuerKey>> {
        let mut serving = self.keys.iter().filter(|key| key.serves(algorithm));
        if let Some(id) = id {
            return serving.find(|key| key.id.as_deref() == Some(id)).cloned();
        }
        let only = serving.next()?;
        serving.next().is_none().then(|| Arc::clone(only))
    }
}

impl IssuerKeys {
    pub(super) fn new(rule: Arc<IssuerRule>, clock: Clock) -> Result<Self, IssuerError> {
        let client = client(&rule)?;
        let waiting = Semaphore::new(rule.unknown_key_waiting_max.min(Semaphore::MAX_PERMITS));
        Ok(Self { rule, client, clock, set: ArcSwap::default(), asked_at: Mutex::new(None), waiting })
    }

    pub(super) fn rule(&self) -> &Arc<IssuerRule> {
        &self.rule
    }

    /// What has to stay the same for a verified token to count on; none where the keys are no longer believed.
    pub(super) fn epoch(&self) -> Option<u64> {
        let set = self.set.load();
        self.believed(&set).then_some(set.epoch)
    }

    fn believed(&self, set: &KeySet) -> bool {
        let stale_max = Duration::from_secs(self.rule.keys_stale_secs_max);
        set.fetched_at.is_some_and(|at| self.clock.monotonic().saturating_sub(at) < stale_max)
    }

    /// The key with this id for this algorithm, and the epoch that it was found in. One that is not known is asked for
    /// at once, if not so lately; where too many wait for that, it is as if the issuer had not answered.
    pub(super) async fn find(
        &self,
        id: Option<&str>,
        algorithm: Algorithm,
    ) -> Result<(Arc<IssuerKey>, u64), AuthenticationError> {
        let set = self.set.load_full();
        let known = if self.believed(&set) { set.find(id, algorithm) } else { None };
        if let Some(key) = known {
            return Ok((key, set.epoch));
        }
        let unavailable = || AuthenticationError::IssuerUnavailable(self.rule.name.clone());
        let waiting = self.waiting.try_acquire().map_err(|_| unavailable())?;
        self.ask(&set).await;
        drop(waiting);
        let set = self.set.load_full();
        if !self.believed(&set) {
            return Err(unavailable());
        }
        let key = set.find(id, algorithm);
        let key = key.ok_or(AuthenticationError::Refused("the token's key is not one of its issuer's"))?;
        Ok((key, set.epoch))
    }

    async fn ask(&self, seen: &Arc<KeySet>) {
        let mut asked_at = self.asked_at.lock().await;
        let now = self.clock.monotonic();
        let pause = Duration::from_secs(self.rule.unknown_key_secs_min);
        // Whoever waited for the lock may find that another has brought what he wants.
        if !Arc::ptr_eq(seen, &self.set.load()) || asked_at.is_some_and(|at| now.saturating_sub(at) < pause) {
            return;
        }
        *asked_at = Some(now);
        self.refresh().await;
    }

    /// Keeps the keys fresh, until told to stop.
    pub(super) async fn keep(self: Arc<Self>, stop: CancellationToken) {
        let usual = Duration::from_secs(self.rule.keys_refresh_secs.max(1));
        let mut pause = RETRY;
        loop {
            let wait = if self.refresh().await {
                pause = RETRY;
                usual
            } else {
                let wait = pause.min(usual);
                pause = pause.saturating_mul(2);
                wait
            };
            tokio::select! {
                () = self.clock.sleep(wait) => {}
                () = stop.cancelled() => return,
            }
        }
    }

    /// Fetches the keys; tells whether that has worked.
    async fn refresh(&self) -> bool {
        let time_max = Duration::from_secs(self.rule.fetch_secs_max);
        let fetched = tokio::time::timeout(time_max, self.fetch()).await;
        match fetched.unwrap_or_else(|_| Err("it does not answer in time".to_owned())) {
            Ok(keys) => {
                self.take(keys);
                true
            }
            Err(error) => {
                let issuer = &self.rule.name;
                tracing::warn!(issuer, error, "the keys of a token issuer cannot be fetched");
                false
            }
        }
    }

    fn take(&self, keys: Vec<Arc<IssuerKey>>) {
        let before = self.set.load();
        let gone = before.keys.iter().any(|old| keys.iter().all(|new| new.digest != old.digest));
        let epoch = before.epoch + u64::from(gone);
        self.set.store(Arc::new(KeySet { keys, fetched_at: Some(self.clock.monotonic()), epoch }));
    }

    async fn fetch(&self) -> Result<Vec<Arc<IssuerKey>>, String> {
        let url = match &self.rule.jwks_url {
            Some(url) => url.clone(),
            None => self.discover().await?,
        };
        let answer = self.get(&url).await?;
        let parsed: Keys = serde_json::from_slice(&answer).map_err(|error| format!("{url}: {error}"))?;
        let keys: Vec<_> = parsed.keys.iter().filter_map(IssuerKey::parse).map(Arc::new).collect();
        if keys.is_empty() { Err(format!("{url} holds no public key for signatures")) } else { Ok(keys) }
    }

    async fn discover(&self) -> Result<Url, String> {
        let url = format!("{}/.well-known/openid-configuration", self.rule.issuer.trim_end_matches('/'));
        let url = Url::parse(&url).map_err(|error| format!("{url}: {error}"))?;
        let answer = self.get(&url).await?;
        let document: Document =
            serde_json::from_slice(&answer).map_err(|error| format!("{url}: {error}"))?;
        if document.issuer != self.rule.issuer {
            return Err(format!("{url} is of another issuer: {:?}", document.issuer));
        }
        let jwks = Url::parse(&document.jwks_uri).map_err(|error| format!("jwks_uri of {url}: {error}"))?;
        check_url(&jwks, self.rule.allow_http)?;
        Ok(jwks)
    }

    async fn get(&self, url: &Url) -> Result<Vec<u8>, String> {
        let failed = |error: reqwest::Error| {
            let mut text = error.to_string();
            let mut source = std::error::Error::source(&error);
            while let Some(inner) = source {
                text = format!("{text}: {inner}");
                source = inner.source();
            }
            text
        };
        let mut request = self.client.get(url.clone()).header("accept", "application/json");
        if let Some(file) = &self.rule.bearer_token_file {
            let token =
                std::fs::read_to_string(file).map_err(|error| format!("{}: {error}", file.display()))?;
            request = request.bearer_auth(token.trim());
        }
        let mut response = request.send().await.map_err(failed)?;
        if response.status() != 200 {
            return Err(format!("{url} answers {}", response.status()));
        }
        let mut answer = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(failed)? {
            if answer.len() + chunk.len() > ANSWER_BYTES_MAX {
                return Err(format!("{url} answers with more than {ANSWER_BYTES_MAX} bytes"));
            }
            answer.extend_from_slice(&chunk);
        }
        Ok(answer)
    }
}

/// Keys that cross a network in the clear can be exchanged on the way, and with them everybody's tokens made.
pub(super) fn check_url(url: &Url, allow_http: bool) -> Result<(), String> {
    let host = url.host_str().unwrap_or_default().trim_matches(['[', ']']);
    let loopback =
        host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback());
    match url.scheme() {
        "https" => Ok(()),
        "http" if allow_http || loopback => Ok(()),
        _ => Err(format!(
            "{url}: use https, or, where the way there is protected by other means, allow_http = true"
        )),
    }
}

fn client(rule: &IssuerRule) -> Result<reqwest::Client, IssuerError> {
    let failed = |error: String| IssuerError { issuer: rule.name.clone(), error };
    let mut roots = rustls::RootCertStore::empty();
    if let Some(file) = &rule.ca_file {
        let unusable = |error: String| failed(format!("ca_file {}: {error}", file.display()));
        let bytes = std::fs::read(file).map_err(|error| unusable(error.to_string()))?;
        for certificate in CertificateDer::pem_slice_iter(&bytes) {
            let certificate = certificate.map_err(|error| unusable(error.to_string()))?;
            roots.add(certificate).map_err(|error| unusable(error.to_string()))?;
        }
        if roots.is_empty() {
            return Err(unusable("it holds no certificate in PEM".to_owned()));
        }
    } else {
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        if roots.is_empty() && rule.issuer.starts_with("https:") {
            return Err(failed(
                "this system has no CA certificates: install ca-certificates, or name a ca_file".to_owned(),
            ));
        }
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let tls = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| failed(error.to_string()))?
        .with_root_certificates(roots)
        .with_no_client_auth();
    reqwest::Client::builder()
        .tls_backend_preconfigured(tls)
        .redirect(reqwest::redirect::Policy::none())
        .build()
        .map_err(|error| failed(error.to_string()))
}
