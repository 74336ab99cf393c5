//! Data encryption keys: raw, ready for use, and wrapped.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use thiserror::Error;
use uuid::Uuid;
use zeroize::Zeroize;

use crate::aead::{KEY_BYTES, PreparedHmac};
use crate::context::{self, EncryptionContext};
use crate::error::FormatError;
use crate::format::Cursor;

/// The most wrapped keys in one envelope.
pub const WRAPPED_KEYS_MAX: usize = 8;

/// A data key's id: a UUID (version 7 for keys that the service makes), shown as hyphenated lower-case text.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DataKeyId([u8; 16]);

impl DataKeyId {
    /// The id with these 16 bytes.
    pub fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// The id's 16 bytes, as they stand in an envelope.
    pub fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }

    /// Appends what `Display` prints, without going through a formatter.
    pub fn write_to(&self, out: &mut Vec<u8>) {
        let mut spelled = Uuid::encode_buffer();
        out.extend_from_slice(Uuid::from_bytes(self.0).hyphenated().encode_lower(&mut spelled).as_bytes());
    }
}

impl fmt::Display for DataKeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Uuid::from_bytes(self.0).hyphenated().fmt(f)
    }
}

impl fmt::Debug for DataKeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A text is not the hyphenated lower-case form of a UUID.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("a data key's id is a hyphenated lower-case UUID")]
pub struct InvalidDataKeyId;

impl FromStr for DataKeyId {
    type Err = InvalidDataKeyId;

    /// Accepts what `Display` prints and nothing else: the text is part of the KMS context, where another
    /// spelling of the same id would be another context.
    fn from_str(text: &str) -> Result<Self, InvalidDataKeyId> {
        let id = Uuid::try_parse(text).map_err(|_| InvalidDataKeyId)?;
        let mut spelled = Uuid::encode_buffer();
        if id.hyphenated().encode_lower(&mut spelled) != text {
            return Err(InvalidDataKeyId);
        }
        Ok(Self(id.into_bytes()))
    }
}

/// The 32 raw bytes of a data key, wiped when dropped.
///
/// They live in one place on the heap, so moving the value leaves no copy behind. It has no `Debug`, `Clone`,
/// `Serialize` or `Default`, and so nothing that holds it can have one by derive.
pub struct KeyMaterial(Box<[u8; KEY_BYTES]>);

/// Key material is 32 bytes, and these were not.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("a data key is 32 bytes long, not {0}")]
pub struct WrongLength(pub usize);

impl KeyMaterial {
    /// Copies a key. The caller wipes the source; [`KeyMaterial::from_mut`] does it for him.
    pub fn from_slice(bytes: &[u8]) -> Result<Self, WrongLength> {
        if bytes.len() != KEY_BYTES {
            return Err(WrongLength(bytes.len()));
        }
        let mut key = Box::new([0; KEY_BYTES]);
        key.copy_from_slice(bytes);
        Ok(Self(key))
    }

    /// Takes a key out of a buffer, and wipes the buffer whether it had the right length or not.
    pub fn from_mut(bytes: &mut [u8]) -> Result<Self, WrongLength> {
        let key = Self::from_slice(bytes);
        bytes.zeroize();
        key
    }

    /// A second copy, for whoever wraps the key while the first is in use. It is wiped for itself.
    pub fn duplicate(&self) -> Self {
        Self(self.0.clone())
    }

    /// The raw key, for whoever wraps it. Copy it nowhere.
    pub fn expose(&self) -> &[u8; KEY_BYTES] {
        &self.0
    }
}

impl Drop for KeyMaterial {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

/// A data key ready to seal and open: its id and the HMAC-SHA-256 state that the key leads to, wiped when
/// dropped.
///
/// The raw key is gone once this is made. The state is as secret as the key: it derives every message key. It
/// has no `Debug`, `Clone`, `Serialize` or `Default`.
pub struct DataKey {
    id: DataKeyId,
    hmac: Box<PreparedHmac>,
}

impl DataKey {
    /// Prepares a key, and wipes the raw bytes.
    #[expect(clippy::needless_pass_by_value, reason = "takes the raw key in order to wipe it")]
    pub fn new(id: DataKeyId, material: KeyMaterial) -> Self {
        Self { id, hmac: PreparedHmac::boxed(material.expose()) }
    }

    /// The id that this key's envelopes carry.
    pub fn id(&self) -> DataKeyId {
        self.id
    }

    /// Where the secret lies, and how many bytes it has: for whoever keeps those pages out of the swap. It stays
    /// there for as long as this value lives.
    pub fn place(&self) -> (*const u8, usize) {
        (std::ptr::from_ref(&*self.hmac).cast(), size_of::<PreparedHmac>())
    }

    pub(crate) fn hmac(&self) -> &PreparedHmac {
        &self.hmac
    }
}

/// A data key as a KMS wrapped it.
#[derive(Clone, PartialEq, Eq)]
pub struct WrappedDataKey {
    /// The key encryption key's id: an AWS KMS key ARN, or `local:NAME`. At most 65,535 bytes.
    pub kek: String,
    /// What the KMS returned, byte for byte. At most 65,535 bytes.
    pub blob: Vec<u8>,
}

impl fmt::Debug for WrappedDataKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WrappedDataKey")
            .field("kek", &self.kek)
            .field("blob_bytes", &self.blob.len())
            .finish()
    }
}

/// The wrapped-key section of an envelope, encoded once and used for every message under the same data key.
///
/// A clone shares the bytes.
#[derive(Clone)]
#[expect(clippy::redundant_allocation, reason = "the outer count is a thread's, see `apart`")]
pub struct WrappedKeys(Option<Arc<Arc<Embedded>>>);

/// The bytes say everything: they are read in one way only.
impl PartialEq for WrappedKeys {
    fn eq(&self, other: &Self) -> bool {
        self.as_bytes() == other.as_bytes()
    }
}

impl Eq for WrappedKeys {}

struct Embedded {
    bytes: Vec<u8>,
    kms_context: EncryptionContext,
    keys: Vec<WrappedDataKey>,
}

impl WrappedKeys {
    /// The section of a compact envelope: no wrapped key, one byte.
    pub fn compact() -> Self {
        Self(None)
    }

    /// The section that carries `keys`, all of them wrappings of one data key under `kms_context`.
    ///
    /// Refuses no key at all, more than [`WRAPPED_KEYS_MAX`], and fields over 65,535 bytes.
    pub fn new(kms_context: &EncryptionContext, keys: &[WrappedDataKey]) -> Result<Self, FormatError> {
        if keys.is_empty() {
            return Err(FormatError::NoWrappedKeys);
        }
        let count = count(keys.len())?;
        let mut bytes = vec![count];
        push_field(&mut bytes, &kms_context.canonical())?;
        for key in keys {
            push_field(&mut bytes, key.kek.as_bytes())?;
            push_field(&mut bytes, &key.blob)?;
        }
        let (kms_context, keys) = (kms_context.clone(), keys.to_vec());
        Ok(Self::embedded(Embedded { bytes, kms_context, keys }))
    }

    fn embedded(embedded: Embedded) -> Self {
        Self(Some(Arc::new(Arc::new(embedded))))
    }

    /// The same section, whose clones are counted apart from this one's. For one thread's use: where all threads clone
    /// one, their processors wait for each other at its count.
    #[must_use]
    pub fn apart(&self) -> Self {
        Self(self.0.as_ref().map(|embedded| Arc::new(Arc::clone(&**embedded))))
    }

    /// The section as it stands in an envelope.
    pub fn as_bytes(&self) -> &[u8] {
        self.0.as_ref().map_or(&[0], |embedded| &embedded.bytes)
    }

    /// The context that the KMS was given when it wrapped the keys; none in a compact envelope.
    ///
    /// In a parsed envelope this is a claim of whoever sent it, and so are the keys: nothing binds them to
    /// the message.
    pub fn kms_context(&self) -> Option<&EncryptionContext> {
        self.0.as_ref().map(|embedded| &embedded.kms_context)
    }

    /// The wrapped keys, in the envelope's order; none in a compact envelope.
    pub fn keys(&self) -> &[WrappedDataKey] {
        self.0.as_ref().map_or(&[], |embedded| &embedded.keys)
    }

    /// Whether the envelope carries no wrapped key, so that its data key must be looked up by id.
    pub fn is_compact(&self) -> bool {
        self.0.is_none()
    }

    /// Reads a section that ends where `section` ends.
    pub(crate) fn parse(section: &[u8]) -> Result<Self, FormatError> {
        let mut keys = Vec::new();
        let kms_context = read_section(section, |kek, blob| {
            keys.push(WrappedDataKey { kek: kek.to_owned(), blob: blob.to_owned() });
        })?;
        let Some(kms_context) = kms_context else { return Ok(Self::compact()) };
        let kms_context = EncryptionContext::from_canonical(kms_context)?;
        Ok(Self::embedded(Embedded { bytes: section.to_owned(), kms_context, keys }))
    }

    /// Refuses what [`WrappedKeys::parse`] refuses, without keeping anything.
    pub(crate) fn check(section: &[u8]) -> Result<(), FormatError> {
        match read_section(section, |_, _| ())? {
            Some(kms_context) => Ok(context::check_canonical(kms_context)?),
            None => Ok(()),
        }
    }
}

impl fmt::Debug for WrappedKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WrappedKeys")
            .field("kms_context", &self.kms_context())
            .field("keys", &self.keys())
            .finish()
    }
}

/// Walks a section: yields the wrapped keys and returns the KMS context's bytes, unchecked.
fn read_section<'a>(
    section: &'a [u8],
    mut key: impl FnMut(&'a str, &'a [u8]),
) -> Result<Option<&'a [u8]>, FormatError> {
    let mut cursor = Cursor::new(section);
    let count = count(usize::from(cursor.u8().ok_or(FormatError::Truncated)?))?;
    let mut kms_context = None;
    if count > 0 {
        kms_context = Some(cursor.field().ok_or(FormatError::Truncated)?);
    }
    for _ in 0..count {
        let kek = cursor.field().ok_or(FormatError::Truncated)?;
        let kek = std::str::from_utf8(kek).map_err(|_| FormatError::KekNotUtf8)?;
        key(kek, cursor.field().ok_or(FormatError::Truncated)?);
    }
    if cursor.is_empty() { Ok(kms_context) } else { Err(FormatError::TrailingBytes) }
}

/// How many wrapped keys there are, within the limit.
pub(crate) fn count(keys: usize) -> Result<u8, FormatError> {
    u8::try_from(keys)
        .ok()
        .filter(|count| usize::from(*count) <= WRAPPED_KEYS_MAX)
        .ok_or(FormatError::TooManyWrappedKeys(keys))
}

fn push_field(bytes: &mut Vec<u8>, field: &[u8]) -> Result<(), FormatError> {
    let length = u16::try_from(field.len()).map_err(|_| FormatError::FieldTooLong)?;
    bytes.extend_from_slice(&length.to_be_bytes());
    bytes.extend_from_slice(field);
    Ok(())
}
