//! API keys: `kf_<id>_<secret>`.
//!
//! The id finds the record; the secret is 256 random bits, kept as HMAC-SHA-256 under a server-wide pepper. A slow
//! password hash would add nothing to 256 random bits (there is no dictionary to slow down), and would cost every
//! request. The pepper makes a stolen database alone useless for checking guesses or forging entries.

use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;
use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

use super::granted::Book;
use super::rules::Rules;
use super::{AuthenticationError, Principal};
use crate::clock::{Clock, Timestamp};
use crate::spread::{Near, Spread};
use crate::store::watch::{ChangeWatch, Mark};
use crate::store::{ApiKeyRecord, Store};
use crate::tenant::{TenantId, Verb};

/// What every API key begins with.
pub(super) const PREFIX: &str = "kf_";
/// Bytes of the id: 96 random bits do not collide.
const ID_BYTES: usize = 12;
const ID_CHARS: usize = 16;
const SECRET_BYTES: usize = 32;
const SECRET_CHARS: usize = 43;

/// The longest token that is looked at.
pub const TOKEN_BYTES_MAX: usize = PREFIX.len() + ID_CHARS + 1 + SECRET_CHARS;

/// How many ids that do not exist are remembered, so that guessing cannot fill the memory.
const UNKNOWN_IDS_MAX: u64 = 10_000;

/// The server's secret that goes into every API key's hash. It is not in the registry.
pub struct Pepper(Hmac<Sha256>);

/// Why bytes are not a pepper.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a pepper has 32 bytes or more, and this one has {0}")]
pub struct PepperTooShort(usize);

impl Pepper {
    /// From at least 32 secret bytes.
    pub fn new(secret: &[u8]) -> Result<Self, PepperTooShort> {
        if secret.len() < 32 {
            return Err(PepperTooShort(secret.len()));
        }
        Hmac::new_from_slice(secret).map(Self).map_err(|_| PepperTooShort(secret.len()))
    }

    fn hash(&self, secret: &[u8]) -> [u8; 32] {
        let mut mac = self.0.clone();
        mac.update(secret);
        mac.finalize().into_bytes().into()
    }

    /// Makes an API key from fresh randomness of the operating system.
    pub fn new_api_key(
        &self,
        name: &str,
        mut tenants: Vec<TenantId>,
        mut verbs: Vec<Verb>,
        expires_at: Option<Timestamp>,
        now: Timestamp,
    ) -> NewApiKey {
        let mut id = [0; ID_BYTES];
        let mut secret = Zeroizing::new([0; SECRET_BYTES]);
        fill_random(&mut id);
        fill_random(secret.as_mut_slice());
        let id = URL_SAFE_NO_PAD.encode(id);
        let token = Zeroizing::new(format!("{PREFIX}{id}_{}", URL_SAFE_NO_PAD.encode(secret.as_slice())));
        tenants.sort();
        tenants.dedup();
        verbs.sort();
        verbs.dedup();
        let secret_hash = self.hash(secret.as_slice());
        let record = ApiKeyRecord {
            id,
            name: name.to_owned(),
            secret_hash,
            tenants,
            verbs,
            created_at: now,
            expires_at,
            revoked_at: None,
        };
        NewApiKey { record, token }
    }
}

#[expect(
    clippy::expect_used,
    reason = "without the system's randomness no key can be made, and nothing may go on"
)]
fn fill_random(bytes: &mut [u8]) {
    getrandom::fill(bytes).expect("the operating system gives randomness");
}

/// A key that has just been made: the only moment at which its token is known.
pub struct NewApiKey {
    /// What is stored.
    pub record: ApiKeyRecord,
    /// What the caller will present. It is shown once.
    pub token: Zeroizing<String>,
}

/// Whether `text` has the form of an API key's id. A whole token has not: it is easily pasted where an id belongs, and
/// must then not be quoted in an answer or a log.
pub fn is_api_key_id(text: &str) -> bool {
    text.len() == ID_CHARS && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte))
}

struct Token<'a> {
    id: &'a str,
    secret: Zeroizing<[u8; SECRET_BYTES]>,
}

impl<'a> Token<'a> {
    fn parse(text: &'a str) -> Option<Self> {
        let rest = text.strip_prefix(PREFIX)?;
        // By length and not by the separator: '_' is in the alphabet of base64url.
        let (id, secret) = (rest.get(..ID_CHARS)?, rest.get(ID_CHARS + 1..)?);
        if rest.as_bytes()[ID_CHARS] != b'_' || secret.len() != SECRET_CHARS {
            return None;
        }
        let mut bytes = Zeroizing::new([0; SECRET_BYTES]);
        let written = URL_SAFE_NO_PAD.decode_slice(secret, bytes.as_mut_slice()).ok()?;
        (written == SECRET_BYTES).then_some(Self { id, secret: bytes })
    }
}

/// Checks API keys against the registry, by way of memory.
pub(super) struct ApiKeys {
    store: Arc<dyn Store>,
    watch: Arc<ChangeWatch>,
    clock: Clock,
    pepper: Pepper,
    rules: Arc<Rules>,
    mark: Arc<Mark>,
    known: papaya::HashMap<Box<str>, Arc<Known>>,
    unknown: moka::sync::Cache<String, u64>,
}

struct Known {
    secret_hash: [u8; 32],
    expires_at: Option<Timestamp>,
    revoked: bool,
    principal: Spread<Principal>,
    seen_mark: u64,
    /// The grants that the principal was made with.
    book: Arc<Book>,
}

impl ApiKeys {
    pub(super) fn new(
        store: Arc<dyn Store>,
        watch: Arc<ChangeWatch>,
        clock: Clock,
        pepper: Pepper,
        rules: Arc<Rules>,
    ) -> Self {
        let mark = watch.mark(None);
        let unknown = moka::sync::Cache::new(UNKNOWN_IDS_MAX);
        Self { store, watch, clock, pepper, rules, mark, known: papaya::HashMap::new(), unknown }
    }

    pub(super) fn pepper(&self) -> &Pepper {
        &self.pepper
    }

    /// Whose API key it is, where that is remembered. `book` was asked for just now: that it was to be had says that the
    /// registry has answered recently enough.
    pub(super) fn recognise(
        &self,
        bearer: &str,
        book: &Arc<Book>,
    ) -> Result<Option<Near<Principal>>, AuthenticationError> {
        let token = Token::parse(bearer).ok_or(AuthenticationError::Malformed)?;
        let remembered = self.known.pin();
        let known = remembered.get(token.id);
        let known =
            known.filter(|known| known.seen_mark == self.mark.now() && Arc::ptr_eq(&known.book, book));
        known.map(|known| self.check(known, &token)).transpose()
    }

    /// The same by the registry, for one who is not recognised.
    pub(super) async fn look_up(
        &self,
        bearer: &str,
        book: &Arc<Book>,
    ) -> Result<Near<Principal>, AuthenticationError> {
        let token = Token::parse(bearer).ok_or(AuthenticationError::Malformed)?;
        // Boxed, because it is rare and large: every call would carry its room.
        let known = Box::pin(self.looked_up(token.id, book)).await?;
        self.check(&known, &token)
    }

    async fn looked_up(&self, id: &str, book: &Arc<Book>) -> Result<Arc<Known>, AuthenticationError> {
        self.watch.ensure_current().await?;
        let seen_mark = self.mark.now();
        let unknown = AuthenticationError::Refused("no such API key");
        if self.unknown.get(id) == Some(seen_mark) && self.watch.is_current(self.clock.monotonic()) {
            return Err(unknown);
        }
        let Some(record) = self.store.api_key(id).await? else {
            self.known.pin().remove(id);
            self.unknown.insert(id.to_owned(), seen_mark);
            return Err(unknown);
        };
        let principal = self.rules.of_api_key(book, &record).ok_or(AuthenticationError::Malformed)?;
        let known = Arc::new(Known {
            secret_hash: record.secret_hash,
            expires_at: record.expires_at,
            revoked: record.revoked_at.is_some(),
            principal: Spread::new(principal),
            seen_mark,
            book: Arc::clone(book),
        });
        self.remember(id, &known);
        Ok(known)
    }

    /// Where there is no room, first what has to be read again anyway makes some, and then everything: which of them is
    /// in use only a count at each call would tell, and what is forgotten is one look-up in the registry.
    fn remember(&self, id: &str, known: &Arc<Known>) {
        let all = self.known.pin();
        let has_room = || all.contains_key(id) || (all.len() as u64) < self.rules.api_keys_remembered_max;
        if !has_room() {
            let mark = self.mark.now();
            all.retain(|_, known| known.seen_mark == mark);
        }
        if !has_room() {
            all.clear();
        }
        if has_room() {
            all.insert(id.into(), Arc::clone(known));
        }
    }

    fn check(&self, known: &Known, token: &Token<'_>) -> Result<Near<Principal>, AuthenticationError> {
        // The secret first: whether a key is expired or revoked is told (to the audit) only for a right one.
        if !bool::from(self.pepper.hash(token.secret.as_slice()).ct_eq(&known.secret_hash)) {
            return Err(AuthenticationError::Refused("wrong secret"));
        }
        let lapsed = |why| Err(AuthenticationError::Lapsed(known.principal.id().clone(), why));
        if known.revoked {
            return lapsed("revoked");
        }
        if known.expires_at.is_some_and(|at| at <= self.clock.now()) {
            return lapsed("expired");
        }
        Ok(known.principal.near())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pepper() -> Pepper {
        Pepper::new(&[7; 32]).unwrap()
    }

    #[test]
    fn a_new_keys_token_parses_to_its_id_and_hashes_to_its_record() {
        let new = pepper().new_api_key(
            "ci",
            vec![],
            vec![Verb::Encrypt, Verb::Encrypt],
            None,
            Timestamp::default(),
        );
        assert_eq!(new.token.len(), TOKEN_BYTES_MAX);
        let token = Token::parse(&new.token).unwrap();
        assert_eq!(token.id, new.record.id);
        assert_eq!(pepper().hash(token.secret.as_slice()), new.record.secret_hash);
        assert_eq!(new.record.verbs, [Verb::Encrypt]);
    }

    #[test]
    fn two_keys_share_neither_id_nor_secret_and_another_pepper_gives_another_hash() {
        let make = || pepper().new_api_key("ci", vec![], vec![], None, Timestamp::default());
        let (a, b) = (make(), make());
        assert_ne!(a.record.id, b.record.id);
        assert_ne!(a.record.secret_hash, b.record.secret_hash);
        let token = Token::parse(&a.token).unwrap();
        let other = Pepper::new(&[8; 32]).unwrap();
        assert_ne!(other.hash(token.secret.as_slice()), a.record.secret_hash);
        assert!(Pepper::new(&[7; 31]).is_err());
    }

    #[test]
    fn what_is_not_a_token_is_refused() {
        let good = pepper().new_api_key("ci", vec![], vec![], None, Timestamp::default()).token;
        assert!(Token::parse(&good).is_some());
        for at in 0..good.len() {
            assert!(Token::parse(&good[..at]).is_none(), "cut at {at}");
        }
        for bad in [
            format!("{}a", *good),
            good.replace("kf_", "KF_"),
            format!(" {}", *good),
            good.replacen("kf_", "kf_é", 1),
        ] {
            assert!(Token::parse(&bad).is_none(), "{bad}");
        }
    }
}
