//! Tokens (JWT) of OpenID Connect issuers and the like.
//!
//! The issuer is found by the token's own `iss`, and from there on nothing in the token chooses how it is verified:
//! the issuer's rule names the algorithms, and the issuer's published keys say which of them each is for. A token
//! that verified is remembered by its hash for a while, so that the next request costs a look-up and no signature.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jsonwebtoken::{Algorithm, AlgorithmFamily};
use reqwest::Url;
use serde::Deserialize;
use serde_json::Value;
use sha2::{Digest, Sha256};
use tokio_util::sync::CancellationToken;

use super::claims::{ClaimPath, ClaimWords, Claims, RequiredClaim};
use super::granted::Book;
use super::issuer_keys::{IssuerKeys, check_url};
use super::rules::{Grant, Holding, Role, Rules};
use super::{Attributes, AuthenticationError, Principal};
use crate::clock::Clock;
use crate::spread::{Near, Spread};
use crate::tenant::{TenantId, Verb};

/// Who issues tokens, which of them are taken, and what they say.
#[derive(Clone, Debug)]
pub struct IssuerRule {
    /// A short name: principals are `jwt:NAME:SUBJECT`.
    pub name: String,
    /// The `iss` of its tokens, and where its discovery document is looked for.
    pub issuer: String,
    /// One of these is in a token's `aud`.
    pub audiences: Vec<String>,
    /// The signature algorithms that are taken.
    pub algorithms: Vec<Algorithm>,
    /// The `typ` that are taken, in lower case and without `application/`.
    pub types: Vec<String>,
    /// Whether a token must have a `typ`.
    pub type_required: bool,
    /// How far clocks may be apart, in seconds.
    pub leeway_secs: u64,
    /// Where its keys are; by its discovery document where there is nothing.
    pub jwks_url: Option<Url>,
    /// The authorities that its server's certificate is believed from; the system's where there is nothing.
    pub ca_file: Option<PathBuf>,
    /// A file with a bearer token to fetch the keys with, read each time.
    pub bearer_token_file: Option<PathBuf>,
    /// Whether keys may be fetched by plain HTTP from elsewhere than this host.
    pub allow_http: bool,
    /// How often its keys are fetched, in seconds.
    pub keys_refresh_secs: u64,
    /// How long its keys are believed after they were last fetched, in seconds.
    pub keys_stale_secs_max: u64,
    /// How often at most tokens with an unknown key may have it asked, in seconds between.
    pub unknown_key_secs_min: u64,
    /// How many tokens with an unknown key may wait for it at once.
    pub unknown_key_waiting_max: usize,
    /// How long a fetch may take, in seconds.
    pub fetch_secs_max: u64,
    /// The claim that names the subject.
    pub principal_claim: ClaimPath,
    /// The claim that names tenants.
    pub tenants_claim: Option<ClaimWords>,
    /// The claim that names verbs.
    pub verbs_claim: Option<ClaimWords>,
    /// The verbs that `verbs_claim` can give.
    pub claimable_verbs: Vec<Verb>,
    /// The claim that names roles.
    pub roles_claim: Option<ClaimWords>,
    /// What a token must claim.
    pub required_claims: Vec<RequiredClaim>,
    /// What every token of this issuer holds.
    pub holding: Holding,
}

impl IssuerRule {
    /// Whose a token with these claims is: what would be decided if its signature and times are right.
    pub fn principal(&self, rules: &Rules, book: &Book, claims: Claims) -> Result<Principal, &'static str> {
        if let Some(lacking) = self.required_claims.iter().find(|required| !required.met(&claims)) {
            tracing::debug!(issuer = self.name, claim = %lacking.path, "a token lacks a required claim");
            return Err("the token lacks a claim that its issuer's rule requires");
        }
        let subject = self.principal_claim.text(&claims).filter(|subject| !subject.is_empty());
        let subject = subject.ok_or("the token names no subject")?.to_owned();
        let id = format!("jwt:{}:{subject}", self.name).parse();
        let id = id.map_err(|_| "the token's subject is too long, or has control characters")?;
        let own = self.grants(rules, &claims);
        let attributes = Attributes {
            method: "jwt",
            subject: Some(subject.into()),
            issuer: Some(self.issuer.as_str().into()),
            san: None,
            claims: Arc::new(Value::Object(claims)),
        };
        Ok(rules.principal(book, id, own, attributes))
    }

    fn grants(&self, rules: &Rules, claims: &Claims) -> Vec<Grant> {
        let tenants: Vec<TenantId> =
            self.tenants_claim.as_ref().map_or_else(Vec::new, |words| words.parsed(claims));
        let mut grants = self.holding.grants(&tenants);
        let tenants: Vec<TenantId> = self.holding.tenants.iter().cloned().chain(tenants).collect();
        if let Some(words) = &self.verbs_claim {
            let mut verbs: Vec<Verb> = words.parsed(claims);
            verbs.retain(|verb| self.claimable_verbs.contains(verb));
            let role = Role::unlimited(format!("the token's claim {}", words.path), verbs);
            grants.push(Grant { tenants: tenants.clone(), role });
        }
        if let Some(words) = &self.roles_claim {
            let words: Vec<String> = words.parsed(claims);
            let named = words.iter().filter_map(|name| rules.roles.get(name));
            grants.extend(named.map(|role| Grant { tenants: tenants.clone(), role: Arc::clone(role) }));
        }
        grants
    }
}

/// The algorithms of these names. Symmetric ones are refused: with them, whoever can check a token can make one, and
/// an issuer's keys are public.
pub fn algorithms(names: &[String]) -> Result<Vec<Algorithm>, String> {
    let symmetric = |algorithm: &Algorithm| algorithm.family() == AlgorithmFamily::Hmac;
    let parsed: Option<Vec<Algorithm>> = names.iter().map(|name| name.parse().ok()).collect();
    match parsed {
        Some(algorithms) if !algorithms.is_empty() && !algorithms.iter().any(symmetric) => Ok(algorithms),
        _ => Err("algorithms are of RS256, RS384, RS512, PS256, PS384, PS512, ES256, ES384 and EdDSA: one or more, \
                  and none of the symmetric ones, with which everybody could make tokens"
            .to_owned()),
    }
}

/// A URL that keys may be fetched from.
pub fn key_url(text: &str, allow_http: bool) -> Result<Url, String> {
    let url = Url::parse(text).map_err(|error| format!("{text}: {error}"))?;
    check_url(&url, allow_http)?;
    Ok(url)
}

/// An issuer cannot be spoken to as its rule says.
#[derive(Debug, thiserror::Error)]
#[error("the token issuer '{issuer}' cannot be used: {error}")]
pub struct IssuerError {
    /// Its name.
    pub issuer: String,
    /// Why.
    pub error: String,
}

/// Checks tokens.
pub(super) struct Tokens {
    rules: Arc<Rules>,
    clock: Clock,
    issuers: Vec<Arc<IssuerKeys>>,
    remembered: moka::sync::Cache<[u8; 32], Arc<Verified>>,
}

struct Verified {
    principal: Spread<Principal>,
    issuer: Arc<IssuerKeys>,
    epoch: u64,
    expires_at_ms: i64,
    forget_at: Duration,
    /// The grants that the principal was made with.
    book: Arc<Book>,
    /// The certificate that the token is bound to (RFC 8705).
    bound_to: Option<String>,
}

#[derive(Deserialize)]
struct Header {
    alg: String,
    kid: Option<String>,
    typ: Option<String>,
    crit: Option<Value>,
}

const MALFORMED: AuthenticationError = AuthenticationError::Malformed;

impl Tokens {
    pub(super) fn new(clock: &Clock, rules: Arc<Rules>) -> Result<Self, IssuerError> {
        let issuers = rules.issuers.iter();
        let issuers = issuers
            .map(|rule| Ok(Arc::new(IssuerKeys::new(Arc::clone(rule), clock.clone())?)))
            .collect::<Result<_, IssuerError>>()?;
        let remembered = moka::sync::Cache::new(rules.tokens.tokens_remembered_max);
        Ok(Self { rules, clock: clock.clone(), issuers, remembered })
    }

    pub(super) async fn keep(&self, stop: CancellationToken) {
        let mut keeping = tokio::task::JoinSet::new();
        for issuer in &self.issuers {
            keeping.spawn(Arc::clone(issuer).keep(stop.clone()));
        }
        while keeping.join_next().await.is_some() {}
    }

    pub(super) async fn authenticate(
        &self,
        token: &str,
        certificates: &[Vec<u8>],
        book: &Arc<Book>,
    ) -> Result<Near<Principal>, AuthenticationError> {
        if self.issuers.is_empty() || token.len() > self.rules.tokens.token_bytes_max {
            return Err(MALFORMED);
        }
        let digest: [u8; 32] = Sha256::digest(token).into();
        let remembered = self.remembered.get(&digest).filter(|verified| self.still_good(verified, book));
        let verified = if let Some(verified) = remembered {
            verified
        } else {
            // Boxed, because it is rare and large: every call would carry its room.
            let verified = Arc::new(Box::pin(self.verify(token, book)).await?);
            self.remembered.insert(digest, Arc::clone(&verified));
            verified
        };
        if let Some(bound_to) = &verified.bound_to {
            let own = certificates.first().map(|own| URL_SAFE_NO_PAD.encode(Sha256::digest(own)));
            if own.as_ref() != Some(bound_to) {
                return Err(AuthenticationError::Refused("the token is bound to another client certificate"));
            }
        }
        Ok(verified.principal.near())
    }

    fn still_good(&self, verified: &Verified, book: &Arc<Book>) -> bool {
        self.clock.now().unix_ms() < verified.expires_at_ms
            && self.clock.monotonic() < verified.forget_at
            && verified.issuer.epoch() == Some(verified.epoch)
            && Arc::ptr_eq(&verified.book, book)
    }

    async fn verify(&self, token: &str, book: &Arc<Book>) -> Result<Verified, AuthenticationError> {
        let mut parts = token.split('.');
        let (Some(header), Some(payload), Some(signature), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(MALFORMED);
        };
        let signed = &token[..header.len() + 1 + payload.len()];
        let header: Header = decode(header)?;
        let claims: Claims = decode(payload)?;
        let issuer = claims.get("iss").and_then(Value::as_str);
        let issuer = self.issuers.iter().find(|known| Some(known.rule().issuer.as_str()) == issuer);
        let issuer = issuer.ok_or(AuthenticationError::Refused("the token's issuer is not known"))?;
        let rule = issuer.rule();
        let algorithm = check_header(rule, &header).map_err(AuthenticationError::Refused)?;
        // What a look at the token can refuse is refused before its issuer or its signature costs anything.
        let now_ms = self.clock.now().unix_ms();
        let expires_at_ms = check_claims(rule, &claims, now_ms).map_err(AuthenticationError::Refused)?;
        let (key, epoch) = issuer.find(header.kid.as_deref(), algorithm).await?;
        let right = jsonwebtoken::crypto::verify(signature, signed.as_bytes(), &key.key, algorithm);
        if !right.unwrap_or(false) {
            return Err(AuthenticationError::Refused("the token's signature is wrong"));
        }
        let bound_to = binding(&claims).map_err(AuthenticationError::Refused)?;
        let principal = rule.principal(&self.rules, book, claims).map_err(AuthenticationError::Refused)?;
        let remember = Duration::from_secs(self.rules.tokens.token_remembered_secs_max);
        Ok(Verified {
            principal: Spread::new(principal),
            issuer: Arc::clone(issuer),
            epoch,
            expires_at_ms,
            book: Arc::clone(book),
            forget_at: self.clock.monotonic().saturating_add(remember),
            bound_to,
        })
    }
}

fn decode<T: serde::de::DeserializeOwned>(part: &str) -> Result<T, AuthenticationError> {
    let bytes = URL_SAFE_NO_PAD.decode(part).map_err(|_| MALFORMED)?;
    serde_json::from_slice(&bytes).map_err(|_| MALFORMED)
}

fn check_header(rule: &IssuerRule, header: &Header) -> Result<Algorithm, &'static str> {
    let algorithm = header.alg.parse().ok().filter(|algorithm| rule.algorithms.contains(algorithm));
    let algorithm = algorithm.ok_or("the token's algorithm is not one that its issuer's rule takes")?;
    if header.crit.is_some() {
        return Err("the token has critical extensions, and keyfold knows none");
    }
    let wrong = Err("the token's type is not one that its issuer's rule takes");
    match &header.typ {
        None if rule.type_required => return wrong,
        None => {}
        Some(named) => {
            let named = named.to_ascii_lowercase();
            let named = named.strip_prefix("application/").unwrap_or(&named);
            if !rule.types.iter().any(|taken| taken == named) {
                return wrong;
            }
        }
    }
    Ok(algorithm)
}

/// Gives when the token expires, the leeway included, in Unix milliseconds.
fn check_claims(rule: &IssuerRule, claims: &Claims, now_ms: i64) -> Result<i64, &'static str> {
    let meant =
        |audience: &Value| audience.as_str().is_some_and(|a| rule.audiences.iter().any(|own| own == a));
    let for_us = match claims.get("aud") {
        Some(Value::Array(list)) => list.iter().any(meant),
        Some(one) => meant(one),
        None => false,
    };
    if !for_us {
        return Err("the token is for another audience");
    }
    let leeway_ms = i64::try_from(rule.leeway_secs.saturating_mul(1_000)).unwrap_or(i64::MAX);
    let expires_at_ms = time_ms(claims, "exp")?.ok_or("the token has no expiry")?.saturating_add(leeway_ms);
    if expires_at_ms <= now_ms {
        return Err("the token is expired");
    }
    for name in ["nbf", "iat"] {
        if time_ms(claims, name)?.is_some_and(|at| at > now_ms.saturating_add(leeway_ms)) {
            return Err("the token is not valid yet");
        }
    }
    Ok(expires_at_ms)
}

/// A NumericDate in milliseconds.
fn time_ms(claims: &Claims, name: &str) -> Result<Option<i64>, &'static str> {
    let Some(value) = claims.get(name) else { return Ok(None) };
    let secs = value.as_f64().filter(|secs| (0.0..1e12).contains(secs));
    #[expect(clippy::cast_possible_truncation, reason = "below 1e15, where every integer is exact")]
    let ms = secs.map(|secs| (secs * 1_000.0) as i64);
    ms.map(Some).ok_or("a time in the token is no time")
}

/// The client certificate that a token is bound to (RFC 8705, `cnf` with `x5t#S256`). A binding of another kind
/// cannot be checked here, so such a token is refused.
fn binding(claims: &Claims) -> Result<Option<String>, &'static str> {
    let Some(confirmation) = claims.get("cnf") else { return Ok(None) };
    let certificate = confirmation.get("x5t#S256").and_then(Value::as_str);
    let only = confirmation.as_object().is_some_and(|methods| methods.len() == 1);
    match certificate {
        Some(thumbprint) if only => Ok(Some(thumbprint.to_owned())),
        _ => Err("the token is bound to something that keyfold cannot check"),
    }
}
