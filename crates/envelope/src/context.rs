//! The encryption context: what a message is about, bound to it and never stored in it.

use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::OnceLock;

use thiserror::Error;

use crate::aead::{self, KEY_BYTES};
use crate::format::Cursor;

/// The most pairs in a context.
pub const CONTEXT_PAIRS_MAX: usize = 64;

/// The most bytes of a context's canonical form.
pub const CONTEXT_BYTES_MAX: usize = 8192;

/// For how much there is room from the first pair on: more is made where it is not enough.
const USUAL_PAIRS: usize = 8;
const USUAL_TEXT_BYTES: usize = 192;

const PAIR_COUNT_BYTES: usize = 2;
const LENGTH_BYTES: usize = 2;

/// Name and value pairs that an envelope is bound to: it opens with exactly the same pairs, or not at all.
///
/// At most [`CONTEXT_PAIRS_MAX`] pairs and [`CONTEXT_BYTES_MAX`] bytes in canonical form. No name is empty
/// and none is there twice; a value may be empty. The order of insertion means nothing.
///
/// Values may identify people (a record's number, a user's id), so `Debug` prints the names only.
#[derive(Clone, Default)]
pub struct EncryptionContext {
    /// All names and values, in one piece of memory: most calls have some.
    text: String,
    /// Where they stand there, sorted by the name's bytes, which is how `str` compares.
    pairs: Vec<Pair>,
    /// Of the canonical form; computed at the first use and dropped by a change.
    digest: OnceLock<[u8; KEY_BYTES]>,
}

/// A name in a context's text, and behind it its value. Two bytes suffice: nothing in a context is longer than
/// [`CONTEXT_BYTES_MAX`].
#[derive(Clone, Copy)]
struct Pair {
    name: u16,
    value: u16,
    end: u16,
}

/// Why a context is refused.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum ContextError {
    /// A name is empty.
    #[error("a name is empty")]
    EmptyName,
    /// A name is there already.
    #[error("a name is there twice")]
    DuplicateName,
    /// More than [`CONTEXT_PAIRS_MAX`] pairs.
    #[error("more than 64 pairs")]
    TooManyPairs,
    /// More than [`CONTEXT_BYTES_MAX`] bytes in canonical form.
    #[error("more than 8,192 bytes")]
    TooLong,
    /// A canonical form whose names are not in ascending order of their bytes.
    #[error("the names are not sorted")]
    Unsorted,
    /// A canonical form with a name or a value that is not UTF-8.
    #[error("a name or a value is not UTF-8")]
    NotUtf8,
    /// A canonical form that ends inside a pair.
    #[error("the last pair is incomplete")]
    Truncated,
    /// A canonical form with bytes after the last pair.
    #[error("bytes follow the last pair")]
    TrailingBytes,
}

impl EncryptionContext {
    /// The empty context.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a pair. Refuses an empty name, a name that is there already, and anything over the limits; the
    /// context is then as it was.
    pub fn insert(&mut self, name: impl AsRef<str>, value: impl AsRef<str>) -> Result<(), ContextError> {
        let (name, value) = (name.as_ref(), value.as_ref());
        if name.is_empty() {
            return Err(ContextError::EmptyName);
        }
        let Err(place) = self.place_of(name) else { return Err(ContextError::DuplicateName) };
        if self.pairs.len() >= CONTEXT_PAIRS_MAX {
            return Err(ContextError::TooManyPairs);
        }
        if self.canonical_bytes().saturating_add(pair_bytes(name, value)) > CONTEXT_BYTES_MAX {
            return Err(ContextError::TooLong);
        }
        self.put(place, name, value);
        Ok(())
    }

    /// Adds a pair that was found to fit.
    fn put(&mut self, place: usize, name: &str, value: &str) {
        if self.pairs.capacity() == 0 {
            self.pairs.reserve(USUAL_PAIRS);
            self.text.reserve(USUAL_TEXT_BYTES);
        }
        let start = self.text.len();
        self.text.push_str(name);
        let middle = self.text.len();
        self.text.push_str(value);
        let [name, value, end] = [start, middle, self.text.len()].map(short);
        self.pairs.insert(place, Pair { name, value, end });
        self.digest = OnceLock::new();
    }

    /// The value that goes with `name`.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.place_of(name).ok().map(|place| self.value(self.pairs[place]))
    }

    /// The pairs, in ascending order of the names' bytes.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.pairs.iter().map(|pair| (self.name(*pair), self.value(*pair)))
    }

    fn name(&self, pair: Pair) -> &str {
        &self.text[pair.name.into()..pair.value.into()]
    }

    fn value(&self, pair: Pair) -> &str {
        &self.text[pair.value.into()..pair.end.into()]
    }

    /// How many pairs there are.
    pub fn len(&self) -> usize {
        self.pairs.len()
    }

    /// Whether there is no pair.
    pub fn is_empty(&self) -> bool {
        self.pairs.is_empty()
    }

    /// The one encoding of this context: a 2-byte number of pairs, then for each pair, sorted by name, a
    /// 2-byte length and the name, a 2-byte length and the value. Lengths are big-endian. Two contexts are
    /// equal if and only if their canonical forms are.
    pub fn canonical(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.canonical_bytes());
        bytes.extend_from_slice(&length(self.pairs.len()));
        for field in self.iter().flat_map(|(name, value)| [name, value]) {
            bytes.extend_from_slice(&length(field.len()));
            bytes.extend_from_slice(field.as_bytes());
        }
        bytes
    }

    /// Reads a canonical form, and refuses every other encoding of the same pairs: unsorted or repeated
    /// names, bytes that follow, anything over the limits.
    pub fn from_canonical(bytes: &[u8]) -> Result<Self, ContextError> {
        let mut context = Self::new();
        read_canonical(bytes, |name, value| context.put(context.len(), name, value))?;
        Ok(context)
    }

    /// Whether `name` belongs to the service or to AWS, so that callers may not set it: it starts with
    /// `keyfold:` or `aws`.
    pub fn is_reserved(name: &str) -> bool {
        name.starts_with("keyfold:") || name.starts_with("aws")
    }

    /// SHA-256 of the canonical form.
    pub(crate) fn digest(&self) -> &[u8; KEY_BYTES] {
        self.digest.get_or_init(|| aead::sha256(std::iter::once(self.canonical().as_slice())))
    }

    fn place_of(&self, name: &str) -> Result<usize, usize> {
        self.pairs.binary_search_by(|known| self.name(*known).cmp(name))
    }

    fn canonical_bytes(&self) -> usize {
        PAIR_COUNT_BYTES + self.pairs.len() * 2 * LENGTH_BYTES + self.text.len()
    }
}

impl PartialEq for EncryptionContext {
    fn eq(&self, other: &Self) -> bool {
        self.iter().eq(other.iter())
    }
}

impl Eq for EncryptionContext {}

impl Hash for EncryptionContext {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_usize(self.len());
        self.iter().for_each(|pair| pair.hash(state));
    }
}

impl fmt::Debug for EncryptionContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.iter().map(|(name, _)| name)).finish()
    }
}

/// Checks that `bytes` are a canonical form, without keeping anything.
pub(crate) fn check_canonical(bytes: &[u8]) -> Result<(), ContextError> {
    read_canonical(bytes, |_, _| ())
}

fn read_canonical<'a>(bytes: &'a [u8], mut pair: impl FnMut(&'a str, &'a str)) -> Result<(), ContextError> {
    if bytes.len() > CONTEXT_BYTES_MAX {
        return Err(ContextError::TooLong);
    }
    let mut cursor = Cursor::new(bytes);
    let count = cursor.u16().ok_or(ContextError::Truncated)?;
    if count > CONTEXT_PAIRS_MAX {
        return Err(ContextError::TooManyPairs);
    }
    let mut field = || {
        let bytes = cursor.field().ok_or(ContextError::Truncated)?;
        std::str::from_utf8(bytes).map_err(|_| ContextError::NotUtf8)
    };
    let mut before = "";
    for _ in 0..count {
        let (name, value) = (field()?, field()?);
        if name.is_empty() {
            return Err(ContextError::EmptyName);
        }
        match name.cmp(before) {
            std::cmp::Ordering::Greater => pair(name, value),
            std::cmp::Ordering::Equal => return Err(ContextError::DuplicateName),
            std::cmp::Ordering::Less => return Err(ContextError::Unsorted),
        }
        before = name;
    }
    if cursor.is_empty() { Ok(()) } else { Err(ContextError::TrailingBytes) }
}

fn pair_bytes(name: &str, value: &str) -> usize {
    (2 * LENGTH_BYTES).saturating_add(name.len()).saturating_add(value.len())
}

/// A length in two bytes. Never cut: nothing in a context is longer than [`CONTEXT_BYTES_MAX`].
fn length(length: usize) -> [u8; LENGTH_BYTES] {
    short(length).to_be_bytes()
}

fn short(length: usize) -> u16 {
    u16::try_from(length).unwrap_or(u16::MAX)
}
