//! The head of an envelope: everything in front of the body. Header to bytes and back.

use crate::aead::KEY_BYTES;
use crate::context::{CONTEXT_BYTES_MAX, ContextError};
use crate::data_key::{self, DataKeyId, WRAPPED_KEYS_MAX, WrappedKeys};
use crate::error::FormatError;

/// The random part of a message's header: 24 bytes, fresh for every message.
///
/// 192 bits, so that salts drawn at random never meet: after 2^64 messages under one data key the chance of a
/// repeat is 2^-65.
pub type Salt = [u8; 24];

/// Magic, data key id and salt: what the message key is derived from.
pub const FIXED_HEADER_BYTES: usize = 43;

/// The longest head that the format can express. [`HeadReader`](crate::HeadReader) never holds more.
pub const HEAD_BYTES_MAX: usize =
    SECTION_OFFSET + 1 + 2 + CONTEXT_BYTES_MAX + WRAPPED_KEYS_MAX * 2 * (2 + 0xffff);

const MAGIC: [u8; 2] = *b"KF";
const VERSION: u8 = 1;
const ID_OFFSET: usize = 3;
const SALT_OFFSET: usize = 19;

/// The wrapped-key section follows the fixed header and the commitment.
pub(crate) const SECTION_OFFSET: usize = FIXED_HEADER_BYTES + KEY_BYTES;

/// An envelope's head, parsed. Only the format was checked: everything in it is a claim of whoever sent it,
/// until an open has checked the commitment. The wrapped keys stay a claim even then.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Head {
    fixed: [u8; FIXED_HEADER_BYTES],
    commitment: [u8; KEY_BYTES],
    wrapped: WrappedKeys,
}

impl Head {
    /// The id of the data key.
    pub fn dek_id(&self) -> DataKeyId {
        DataKeyId::from_bytes(part(&self.fixed, ID_OFFSET))
    }

    /// The message's salt.
    pub fn salt(&self) -> Salt {
        part(&self.fixed, SALT_OFFSET)
    }

    /// The commitment to key and context.
    pub fn commitment(&self) -> &[u8; KEY_BYTES] {
        &self.commitment
    }

    /// The wrapped-key section.
    pub fn wrapped(&self) -> &WrappedKeys {
        &self.wrapped
    }

    /// Where the body starts: how many bytes the head has.
    pub fn body_offset(&self) -> usize {
        head_bytes(&self.wrapped)
    }

    /// The head as it stands in the envelope.
    pub fn to_bytes(&self) -> Vec<u8> {
        [self.fixed.as_slice(), &self.commitment, self.wrapped.as_bytes()].concat()
    }

    pub(crate) fn fixed(&self) -> &[u8; FIXED_HEADER_BYTES] {
        &self.fixed
    }
}

/// How many bytes stand in front of the body of an envelope with this section.
pub fn head_bytes(section: &WrappedKeys) -> usize {
    SECTION_OFFSET + section.as_bytes().len()
}

/// Reads the head of an envelope. Works on any prefix that holds the whole head; looks at nothing behind it.
pub fn inspect(envelope: &[u8]) -> Result<Head, FormatError> {
    inspect_known(envelope, |_| None)
}

/// The same. Where the section is, byte for byte, the one that `known` gives for the data key, that one is taken and
/// the envelope's is not read again: most envelopes of a data key carry the same.
pub fn inspect_known(
    envelope: &[u8],
    known: impl FnOnce(DataKeyId) -> Option<WrappedKeys>,
) -> Result<Head, FormatError> {
    let head = whole_head(envelope)?;
    let section = &head[SECTION_OFFSET..];
    let known = known(DataKeyId::from_bytes(part(head, ID_OFFSET)));
    let wrapped = match known.filter(|known| known.as_bytes() == section) {
        Some(known) => known,
        None => WrappedKeys::parse(section)?,
    };
    Ok(Head { fixed: part(head, 0), commitment: part(head, FIXED_HEADER_BYTES), wrapped })
}

/// The same message with another wrapped-key section. Needs no key: the section is not bound to the message.
pub fn with_wrapped_keys(envelope: &[u8], section: &WrappedKeys) -> Result<Vec<u8>, FormatError> {
    let (mut rewrapped, replaced) = replace_head(envelope, section)?;
    rewrapped.extend_from_slice(&envelope[replaced..]);
    Ok(rewrapped)
}

/// The new head for a message whose wrapped-key section is replaced, and how many bytes of the old envelope
/// it stands for. The input needs to hold the old head only, so the body of a large object need not travel.
pub fn replace_head(head_or_more: &[u8], section: &WrappedKeys) -> Result<(Vec<u8>, usize), FormatError> {
    let replaced = body_offset(head_or_more)?;
    let mut head = Vec::with_capacity(head_bytes(section));
    head.extend_from_slice(&head_or_more[..SECTION_OFFSET]);
    head.extend_from_slice(section.as_bytes());
    Ok((head, replaced))
}

/// Checks the whole head of an envelope without keeping anything of it, and says where the body starts.
pub(crate) fn body_offset(envelope: &[u8]) -> Result<usize, FormatError> {
    let head = whole_head(envelope)?;
    WrappedKeys::check(&head[SECTION_OFFSET..])?;
    Ok(head.len())
}

/// The fixed header of a message.
pub(crate) fn fixed_header(id: DataKeyId, salt: &Salt) -> [u8; FIXED_HEADER_BYTES] {
    let mut fixed = [0; FIXED_HEADER_BYTES];
    fixed[..2].copy_from_slice(&MAGIC);
    fixed[2] = VERSION;
    fixed[ID_OFFSET..SALT_OFFSET].copy_from_slice(id.as_bytes());
    fixed[SALT_OFFSET..].copy_from_slice(salt);
    fixed
}

/// How far a head reaches, as far as its first bytes tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Extent {
    /// The head has this many bytes, and they are all there.
    Whole(usize),
    /// The head has at least this many bytes, which is more than are there.
    AtLeast(usize),
}

/// Finds the end of a head by its length fields. Refuses at once what no further byte can mend.
pub(crate) fn extent(bytes: &[u8]) -> Result<Extent, FormatError> {
    let magic = &bytes[..bytes.len().min(MAGIC.len())];
    if !MAGIC.starts_with(magic) {
        return Err(FormatError::NotAnEnvelope);
    }
    if let Some(&version) = bytes.get(MAGIC.len())
        && version != VERSION
    {
        return Err(FormatError::UnknownVersion(version));
    }
    let Some(&count) = bytes.get(SECTION_OFFSET) else { return Ok(Extent::AtLeast(SECTION_OFFSET + 1)) };
    let count = usize::from(data_key::count(usize::from(count))?);
    let fields = if count == 0 { 0 } else { 1 + 2 * count };
    let mut end = SECTION_OFFSET + 1;
    for field in 0..fields {
        let Some(length) = bytes.get(end..end + 2) else { return Ok(Extent::AtLeast(end + 2)) };
        let length = usize::from(u16::from_be_bytes([length[0], length[1]]));
        if field == 0 && length > CONTEXT_BYTES_MAX {
            return Err(ContextError::TooLong.into());
        }
        end += 2 + length;
    }
    Ok(if bytes.len() < end { Extent::AtLeast(end) } else { Extent::Whole(end) })
}

fn whole_head(envelope: &[u8]) -> Result<&[u8], FormatError> {
    match extent(envelope)? {
        Extent::Whole(end) => Ok(&envelope[..end]),
        Extent::AtLeast(_) => Err(FormatError::Truncated),
    }
}

/// The `N` bytes at `offset`, which the caller knows to be there.
pub(crate) fn part<const N: usize>(bytes: &[u8], offset: usize) -> [u8; N] {
    let mut part = [0; N];
    part.copy_from_slice(&bytes[offset..offset + N]);
    part
}

/// Reads big-endian fields from the front of a slice; `None` where the slice ends too early.
pub(crate) struct Cursor<'a>(&'a [u8]);

impl<'a> Cursor<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    pub(crate) fn u8(&mut self) -> Option<u8> {
        self.take(1).map(|bytes| bytes[0])
    }

    pub(crate) fn u16(&mut self) -> Option<usize> {
        self.take(2).map(|bytes| usize::from(u16::from_be_bytes([bytes[0], bytes[1]])))
    }

    /// A 2-byte length and that many bytes.
    pub(crate) fn field(&mut self) -> Option<&'a [u8]> {
        let length = self.u16()?;
        self.take(length)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(taken)
    }
}
