//! Client certificates: which are believed, and whose they are.
//!
//! The handshake verifies a certificate once, and a connection may live for days. So it is verified again here, now
//! and then and whenever the authorities or their revocation lists have changed: a certificate that expires or is
//! revoked loses its connections too.

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwapOption;
use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;
use sha2::{Digest, Sha256};

use super::granted::Book;
use super::rules::{CertificateRule, Rules, SanRule};
use super::{Attributes, AuthenticationError, Principal};
use crate::clock::Clock;
use crate::spread::{Near, Spread};

/// How many certificates are remembered.
const REMEMBERED_MAX: u64 = 10_000;

/// Why authorities cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TrustError {
    /// Their file is not in order.
    #[error("the client CA file (tls.client_ca_file) {0}")]
    Authorities(String),
    /// The revocation lists are not in order.
    #[error("the revocation list file (tls.client_crl_file) {0}")]
    Revocations(String),
    /// They do not go together.
    #[error("the client CA and revocation list files cannot be used: {0}")]
    Unusable(String),
}

/// A client certificate's SHA-256, as `openssl x509 -fingerprint -sha256` shows it.
pub type Fingerprint = [u8; 32];

/// Who presents a client certificate. One for each process.
pub struct ClientCertificates {
    clock: Clock,
    rules: Arc<Rules>,
    trusted: ArcSwapOption<Trusted>,
    remembered: moka::sync::Cache<Fingerprint, Arc<Remembered>>,
}

/// Authorities, and the lists of what they have revoked. Nothing is believed of them before
/// [`ClientCertificates::trust`].
pub struct Trusted(Arc<dyn ClientCertVerifier>);

impl Trusted {
    /// These authorities (PEM), but for what they have revoked. With `required`, the handshake refuses clients
    /// without a certificate.
    pub fn parse(authorities: &[u8], revocations: Option<&[u8]>, required: bool) -> Result<Self, TrustError> {
        let mut roots = RootCertStore::empty();
        for certificate in CertificateDer::pem_slice_iter(authorities) {
            let certificate =
                certificate.map_err(|error| TrustError::Authorities(format!("is not valid PEM: {error}")))?;
            roots.add(certificate).map_err(|error| {
                TrustError::Authorities(format!(
                    "holds something that is no authority's certificate: {error}"
                ))
            })?;
        }
        if roots.is_empty() {
            return Err(TrustError::Authorities("holds no certificate in PEM".to_owned()));
        }
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut builder = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
        if let Some(revocations) = revocations {
            let lists: Vec<_> = CertificateRevocationListDer::pem_slice_iter(revocations)
                .collect::<Result<_, _>>()
                .map_err(|error| TrustError::Revocations(format!("is not valid PEM: {error}")))?;
            if lists.is_empty() {
                return Err(TrustError::Revocations("holds no X509 CRL in PEM".to_owned()));
            }
            // A list that is out of date no longer says what is revoked.
            builder = builder.with_crls(lists).enforce_revocation_expiration();
        }
        if !required {
            builder = builder.allow_unauthenticated();
        }
        let verifier = builder.build().map_err(|error| TrustError::Unusable(error.to_string()))?;
        Ok(Self(verifier))
    }

    /// The verifier for the handshake.
    pub fn verifier(&self) -> Arc<dyn ClientCertVerifier> {
        Arc::clone(&self.0)
    }
}

struct Remembered {
    outcome: Result<Spread<Principal>, &'static str>,
    trusted: Arc<Trusted>,
    /// The grants that the principal was made with.
    book: Arc<Book>,
    verified_at: Duration,
}

impl ClientCertificates {
    pub(super) fn new(clock: Clock, rules: Arc<Rules>) -> Self {
        let remembered = moka::sync::Cache::new(REMEMBERED_MAX);
        Self { clock, rules, trusted: ArcSwapOption::empty(), remembered }
    }

    /// Believes these authorities, and no others, from now on.
    pub fn trust(&self, trusted: Trusted) {
        self.trusted.store(Some(Arc::new(trusted)));
    }

    /// Finds out whose this chain is, the client's own certificate first.
    pub(super) fn authenticate(
        &self,
        chain: &[Vec<u8>],
        book: &Arc<Book>,
    ) -> Result<Near<Principal>, AuthenticationError> {
        let (Some(own), Some(trusted)) = (chain.first(), self.trusted.load_full()) else {
            return Err(AuthenticationError::Missing);
        };
        let fingerprint = fingerprint(own);
        let now = self.clock.monotonic();
        let recheck = Duration::from_secs(self.rules.certificate_recheck_secs);
        let remembered = self.remembered.get(&fingerprint).filter(|known| {
            Arc::ptr_eq(&known.trusted, &trusted)
                && Arc::ptr_eq(&known.book, book)
                && now.saturating_sub(known.verified_at) < recheck
        });
        let remembered = remembered.unwrap_or_else(|| {
            let outcome = self.verify(&trusted, chain, fingerprint, book);
            let fresh = Arc::new(Remembered { outcome, trusted, book: Arc::clone(book), verified_at: now });
            self.remembered.insert(fingerprint, Arc::clone(&fresh));
            fresh
        });
        remembered.outcome.as_ref().map(Spread::near).map_err(|why| AuthenticationError::Refused(why))
    }

    fn verify(
        &self,
        trusted: &Trusted,
        chain: &[Vec<u8>],
        fingerprint: Fingerprint,
        book: &Book,
    ) -> Result<Spread<Principal>, &'static str> {
        let chain: Vec<CertificateDer<'_>> =
            chain.iter().map(|certificate| CertificateDer::from(certificate.as_slice())).collect();
        let (own, intermediates) = chain.split_first().ok_or("no certificate")?;
        trusted
            .0
            .verify_client_cert(own, intermediates, unix_time(&self.clock))
            .map_err(|_| "the client certificate is expired, revoked or of an unknown authority")?;
        let names = CertificateNames::of(own, fingerprint).ok_or("the client certificate is not readable")?;
        let principal =
            principal(&self.rules, book, &names).ok_or("no rule is for this client certificate")?;
        Ok(Spread::new(principal))
    }
}

/// What a certificate says about whose it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CertificateNames {
    /// The URIs among its subject's alternative names, such as a SPIFFE id.
    pub uris: Vec<String>,
    /// The DNS names.
    pub dns: Vec<String>,
    /// Its SHA-256.
    pub fingerprint: Fingerprint,
}

impl CertificateNames {
    /// The names in the first certificate of a PEM file; none where there is none that can be parsed.
    pub fn of_pem(pem: &[u8]) -> Option<Self> {
        let certificate = CertificateDer::from_pem_slice(pem).ok()?;
        Self::of(&certificate, fingerprint(&certificate))
    }

    /// The fingerprint in hexadecimal.
    pub fn fingerprint_text(&self) -> String {
        hex(&self.fingerprint)
    }

    fn of(certificate: &CertificateDer<'_>, fingerprint: Fingerprint) -> Option<Self> {
        let parsed = webpki::EndEntityCert::try_from(certificate).ok()?;
        let uris = parsed.valid_uri_names().map(str::to_owned).collect();
        let dns = parsed.valid_dns_names().map(str::to_owned).collect();
        Some(Self { uris, dns, fingerprint })
    }
}

/// Whose certificate with these names is: what the first rule that fits says.
pub fn principal(rules: &Rules, book: &Book, names: &CertificateNames) -> Option<Principal> {
    let (rule, name) = rules.certificates.iter().find_map(|rule| Some((rule, matched(rule, names)?)))?;
    let id = format!("cert:{}", rule.principal.as_deref().unwrap_or(&name)).parse().ok()?;
    let own = rule.holding.grants(&[]);
    let san = (!matches!(rule.san, SanRule::Fingerprint(_))).then(|| name.as_str().into());
    let attributes = Attributes { method: "client-certificate", san, ..Attributes::default() };
    Some(rules.principal(book, id, own, attributes))
}

fn matched(rule: &CertificateRule, names: &CertificateNames) -> Option<String> {
    match &rule.san {
        // SPIFFE: a certificate has one identity. Of two, an attacker would choose.
        SanRule::Uri(pattern) => match names.uris.as_slice() {
            [only] => pattern.matches(only).then(|| only.clone()),
            _ => None,
        },
        SanRule::Dns(pattern) => names.dns.iter().find(|name| pattern.matches(name)).cloned(),
        SanRule::Fingerprint(fingerprint) => (*fingerprint == names.fingerprint).then(|| hex(fingerprint)),
    }
}

fn fingerprint(certificate: &[u8]) -> Fingerprint {
    Sha256::digest(certificate).into()
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// The time as certificates count it.
pub fn unix_time(clock: &Clock) -> UnixTime {
    let secs = u64::try_from(clock.now().unix_ms() / 1_000).unwrap_or(0);
    UnixTime::since_unix_epoch(Duration::from_secs(secs))
}
