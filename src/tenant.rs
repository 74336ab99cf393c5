//! The words of the house: who owns data, which key, under which master key, doing what.
//!
//! Every type here is parsed once and valid ever after: a function that takes a [`TenantId`] checks nothing.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use smol_str::SmolStr;

/// Why a name was refused. Its text is meant for whoever typed the name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what} {given:?} is not valid: {rule}")]
pub struct InvalidName {
    what: &'static str,
    given: String,
    rule: &'static str,
}

impl InvalidName {
    fn new(what: &'static str, given: &str, rule: &'static str) -> Self {
        // A name comes from outside: what is quoted back is bounded.
        Self { what, given: given.chars().take(80).collect(), rule }
    }
}

const SLUG_BYTES_MAX: usize = 63;
const SLUG_RULE: &str = "use 1 to 63 characters of a-z, 0-9 and '-', beginning with a letter or a digit";

fn is_slug(text: &str) -> bool {
    let alphanumeric = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    text.len() <= SLUG_BYTES_MAX
        && text.bytes().next().is_some_and(alphanumeric)
        && text.bytes().all(|byte| alphanumeric(byte) || byte == b'-')
}

macro_rules! slug {
    ($(#[$doc:meta])* $name:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(SmolStr);

        impl $name {
            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = InvalidName;

            fn from_str(text: &str) -> Result<Self, InvalidName> {
                if is_slug(text) { Ok(Self(text.into())) } else { Err(InvalidName::new($what, text, SLUG_RULE)) }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

slug! {
    /// The unit of isolation: a slug of 1 to 63 characters, `[a-z0-9][a-z0-9-]{0,62}`.
    TenantId, "tenant"
}

slug! {
    /// A named key of a tenant: a policy under which data keys are made. A slug, as a tenant's id is.
    KeyName, "key"
}

impl KeyName {
    /// The name of the key that is used where a caller names none.
    pub const DEFAULT: &'static str = "default";
}

impl Default for KeyName {
    fn default() -> Self {
        Self(SmolStr::new_static(Self::DEFAULT))
    }
}

/// Who is calling: an API key's id, a token's subject, a certificate's name. Printable, at most 256 bytes.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PrincipalId(Arc<str>);

impl PrincipalId {
    /// The identity as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for PrincipalId {
    type Err = InvalidName;

    fn from_str(text: &str) -> Result<Self, InvalidName> {
        if (1..=256).contains(&text.len()) && !text.chars().any(char::is_control) {
            Ok(Self(text.into()))
        } else {
            Err(InvalidName::new("principal", text, "use 1 to 256 bytes without control characters"))
        }
    }
}

impl fmt::Display for PrincipalId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A master key: the ARN of an AWS KMS key, or `local:NAME` in the embedded key ring.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KekId(Arc<str>);

/// Where a master key lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KekHome<'a> {
    /// In the embedded key ring, under this name.
    Local {
        /// The KEK's name in the ring: a slug.
        name: &'a str,
    },
    /// In AWS KMS.
    Aws {
        /// Such as `aws`, `aws-us-gov`, `aws-cn`.
        partition: &'a str,
        /// Such as `eu-west-1`.
        region: &'a str,
        /// Twelve digits.
        account: &'a str,
        /// The key's id; `mrk-...` for a multi-Region key.
        key: &'a str,
    },
}

const KEK_RULE: &str = "use the ARN of an AWS KMS key (arn:aws:kms:REGION:ACCOUNT:key/ID; an alias can be moved \
                        to another key, so it is not taken) or local:NAME, with NAME as 1 to 63 characters of a-z, \
                        0-9 and '-'";

impl KekId {
    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Which KMS holds this KEK, and its name there.
    pub fn home(&self) -> KekHome<'_> {
        // The constructor has parsed this very text.
        parse_kek(&self.0).unwrap_or(KekHome::Local { name: "" })
    }

    /// The AWS region; none for a KEK of the embedded key ring.
    pub fn region(&self) -> Option<&str> {
        match self.home() {
            KekHome::Aws { region, .. } => Some(region),
            KekHome::Local { .. } => None,
        }
    }

    /// Whether both are replicas of one multi-Region key (`mrk-`), so that one wrapped data key serves both and
    /// a denial by the one counts for the other. A KEK is a replica of itself.
    pub fn same_material(&self, other: &Self) -> bool {
        if self == other {
            return true;
        }
        match (self.home(), other.home()) {
            (
                KekHome::Aws { partition, account, key, .. },
                KekHome::Aws { partition: partition2, account: account2, key: key2, .. },
            ) => key.starts_with("mrk-") && (partition, account, key) == (partition2, account2, key2),
            _ => false,
        }
    }
}

fn parse_kek(text: &str) -> Option<KekHome<'_>> {
    if let Some(name) = text.strip_prefix("local:") {
        return is_slug(name).then_some(KekHome::Local { name });
    }
    let mut parts = text.strip_prefix("arn:")?.splitn(5, ':');
    let (partition, service, region) = (parts.next()?, parts.next()?, parts.next()?);
    let (account, resource) = (parts.next()?, parts.next()?);
    let key = resource.strip_prefix("key/")?;
    let word = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
    let valid = service == "kms"
        && text.len() <= 256
        && word(partition)
        && word(region)
        && account.len() == 12
        && account.bytes().all(|b| b.is_ascii_digit())
        && word(key);
    valid.then_some(KekHome::Aws { partition, region, account, key })
}

impl FromStr for KekId {
    type Err = InvalidName;

    fn from_str(text: &str) -> Result<Self, InvalidName> {
        match parse_kek(text) {
            Some(_) => Ok(Self(text.into())),
            None => Err(InvalidName::new("KEK", text, KEK_RULE)),
        }
    }
}

impl fmt::Display for KekId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A member of a tenant's ring: a master key and how to reach it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Kek {
    /// Which key.
    pub id: KekId,
    /// The role to assume for it, where it lives in somebody else's account.
    pub role: Option<AssumedRole>,
}

impl Kek {
    /// A KEK that the service's own credentials reach.
    pub fn direct(id: KekId) -> Self {
        Self { id, role: None }
    }
}

/// An AWS IAM role that is assumed before a KEK is used.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct AssumedRole {
    /// `arn:aws:iam::ACCOUNT:role/NAME`.
    pub arn: Arc<str>,
    /// The external id that the role's trust policy asks for.
    pub external_id: Option<Arc<str>>,
}

/// A tenant's master keys, the primary first: 1 to 8, none twice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KekRing(Arc<[Kek]>);

/// The most KEKs that a ring may hold: as many wrapped forms as an envelope has room for.
pub const KEK_RING_MAX: usize = 8;

/// Why a list of KEKs is not a ring.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidRing {
    /// Empty, or more than [`KEK_RING_MAX`].
    #[error("a KEK ring holds 1 to {KEK_RING_MAX} KEKs, and this one {0}")]
    Size(usize),
    /// One KEK stands twice.
    #[error("the KEK {0} stands twice in the ring: name each once")]
    Twice(KekId),
}

impl KekRing {
    /// A ring of these members, the primary first.
    pub fn new(members: Vec<Kek>) -> Result<Self, InvalidRing> {
        if members.is_empty() || members.len() > KEK_RING_MAX {
            return Err(InvalidRing::Size(members.len()));
        }
        for (at, member) in members.iter().enumerate() {
            if members[..at].iter().any(|earlier| earlier.id == member.id) {
                return Err(InvalidRing::Twice(member.id.clone()));
            }
        }
        Ok(Self(members.into()))
    }

    /// The members, the primary first; never empty.
    pub fn members(&self) -> &[Kek] {
        &self.0
    }

    /// Whether what this KEK wrapped can be opened by a member: it is one, or a replica of one.
    pub fn serves(&self, kek: &KekId) -> bool {
        self.0.iter().any(|member| member.id.same_material(kek))
    }

    /// The member with this id.
    pub fn member(&self, id: &KekId) -> Option<&Kek> {
        self.0.iter().find(|member| member.id == *id)
    }
}

/// What a caller may be allowed to do. Verbs are granted one by one; none implies another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Verb {
    /// Seal data.
    Encrypt,
    /// Open data.
    Decrypt,
    /// Bring an envelope up to date without seeing its plaintext.
    Rewrap,
    /// Administer one tenant: its keys, API keys and data keys.
    Admin,
    /// Administer the service: make and change tenants, look at all of them.
    Operate,
}

impl Verb {
    /// All verbs, in the order in which they are shown.
    pub const ALL: [Self; 5] = [Self::Encrypt, Self::Decrypt, Self::Rewrap, Self::Admin, Self::Operate];

    /// The verb's name, the same in grants, audit records, routes and the OpenAPI document.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Encrypt => "encrypt",
            Self::Decrypt => "decrypt",
            Self::Rewrap => "rewrap",
            Self::Admin => "admin",
            Self::Operate => "operate",
        }
    }
}

impl FromStr for Verb {
    type Err = InvalidName;

    fn from_str(text: &str) -> Result<Self, InvalidName> {
        let rule = "use encrypt, decrypt, rewrap, admin or operate";
        Self::ALL
            .into_iter()
            .find(|verb| verb.name() == text)
            .ok_or_else(|| InvalidName::new("verb", text, rule))
    }
}

impl fmt::Display for Verb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "arn:aws:kms:eu-west-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab";

    fn kek(text: &str) -> KekId {
        text.parse().unwrap()
    }

    #[test]
    fn a_tenant_is_a_slug_of_1_to_63_characters() {
        for good in ["a", "0", "acme", "a-b-", &"a".repeat(63)] {
            assert_eq!(good.parse::<TenantId>().unwrap().as_str(), good);
        }
        for bad in ["", "-a", "A", "acme.com", "a b", "acmé", "a\n", "../a", &"a".repeat(64)] {
            assert!(bad.parse::<TenantId>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_kek_is_a_key_arn_or_a_local_name() {
        assert_eq!(kek("local:dev").home(), KekHome::Local { name: "dev" });
        assert_eq!(kek(KEY).region(), Some("eu-west-1"));
        for bad in [
            "dev",
            "local:",
            "local:A",
            "arn:aws:kms:eu-west-1:111122223333:alias/a",
            "arn:aws:s3:eu-west-1:111122223333:key/a",
            "arn:aws:kms:eu-west-1:11112222333:key/a",
            "arn:aws:kms:eu-west-1:111122223333:key/a/b",
            "arn:aws:kms::111122223333:key/a",
        ] {
            assert!(bad.parse::<KekId>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn only_replicas_of_one_multi_region_key_share_material() {
        let (a, b) =
            ("arn:aws:kms:eu-west-1:111122223333:key/mrk-1", "arn:aws:kms:us-east-1:111122223333:key/mrk-1");
        assert!(kek(a).same_material(&kek(b)));
        assert!(kek(KEY).same_material(&kek(KEY)));
        assert!(!kek(KEY).same_material(&kek(&KEY.replace("eu-west-1", "us-east-1"))));
        assert!(!kek(a).same_material(&kek(&b.replace("1111222", "9999222"))));
        assert!(!kek("local:a").same_material(&kek("local:b")));
    }

    #[test]
    fn a_ring_holds_1_to_8_different_keks() {
        let member = |n: usize| Kek::direct(kek(&format!("local:k{n}")));
        assert_eq!(KekRing::new(vec![]), Err(InvalidRing::Size(0)));
        assert!(KekRing::new((0..8).map(member).collect()).is_ok());
        assert_eq!(KekRing::new((0..9).map(member).collect()), Err(InvalidRing::Size(9)));
        assert_eq!(KekRing::new(vec![member(1), member(1)]), Err(InvalidRing::Twice(kek("local:k1"))));
    }
}
