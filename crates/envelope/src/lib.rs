//! The keyfold ciphertext format, version 1: seal, open, stream and rewrap.
//!
//! # An envelope, from left to right
//!
//! | field | bytes | |
//! |---|---|---|
//! | magic | 3 | `KF` and the version, 1 |
//! | data key id | 16 | which data key sealed this |
//! | salt | 24 | random for each message: gives the message a key of its own |
//! | commitment | 32 | ties the envelope to one data key and one context |
//! | wrapped keys | 1.. | none (*compact*), or the data key as one to eight KMS keys wrapped it (*embedded*) |
//! | body | 16.. | the message in segments of 64 KiB, each under AES-256-GCM |
//!
//! HKDF-Expand turns the data key, the first three fields and the context's digest into a message key and the
//! commitment ([`DataKey`]). So one data key seals any number of messages, no caller sees a nonce, and a
//! wrong context is told apart from damage before anything is decrypted. The wrapped keys are bound to
//! nothing: rewrapping under another KMS key replaces them ([`replace_head`]) and touches no other byte.
//!
//! `docs/envelope-format.md` is the specification.
//!
//! # This crate
//!
//! does no I/O, knows no clock and draws no random bytes: the salt is an argument. Small messages go through
//! [`seal`] and [`open`], or their in-place forms; messages of any size through [`Sealer`], [`HeadReader`]
//! and [`Opener`].
//!
//! ```
//! use envelope::{DataKey, DataKeyId, EncryptionContext, KeyMaterial, WrappedKeys};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let (mut raw, salt) = ([7; 32], [9; 24]); // in earnest both come from the system's random generator
//! let key = DataKey::new(DataKeyId::from_bytes([1; 16]), KeyMaterial::from_mut(&mut raw)?);
//! let mut context = EncryptionContext::new();
//! context.insert("record", "42")?;
//!
//! let envelope = envelope::seal(&key, salt, &WrappedKeys::compact(), &context, b"hello")?;
//! assert_eq!(*envelope::open(&key, &context, &envelope)?, b"hello");
//! # Ok(())
//! # }
//! ```

mod aead;
mod body;
mod context;
mod data_key;
mod error;
mod format;
mod stream;
pub mod text;

pub use body::SEGMENT_BYTES;
pub use context::{CONTEXT_BYTES_MAX, CONTEXT_PAIRS_MAX, ContextError, EncryptionContext};
pub use data_key::{
    DataKey, DataKeyId, InvalidDataKeyId, KeyMaterial, WRAPPED_KEYS_MAX, WrappedDataKey, WrappedKeys,
    WrongLength,
};
pub use error::{FormatError, OpenError, SealError};
pub use format::{
    FIXED_HEADER_BYTES, HEAD_BYTES_MAX, Head, Salt, head_bytes, inspect, inspect_known, replace_head,
    with_wrapped_keys,
};
pub use stream::{HeadReader, Opener, Sealer};

use aead::{KEY_BYTES, MessageCipher};
use format::SECTION_OFFSET;
use zeroize::{Zeroize, Zeroizing};

/// Whether this processor's AES instructions are used. Without them sealing and opening are slower by an
/// order of magnitude, and no less safe.
pub fn hardware_accelerated() -> bool {
    aes_gcm::aes::hardware_accelerated()
}

/// How many bytes the envelope of a message has.
pub fn sealed_bytes(section: &WrappedKeys, plaintext_bytes: usize) -> usize {
    head_bytes(section).saturating_add(body::sealed_bytes(plaintext_bytes))
}

/// Seals a message into an envelope.
///
/// `salt` must be fresh random bytes: two messages under one key with one salt and one context share their
/// key and their nonces, and AES-GCM then protects neither. Fails on a message of more than 2^48 bytes.
pub fn seal(
    key: &DataKey,
    salt: Salt,
    section: &WrappedKeys,
    context: &EncryptionContext,
    plaintext: &[u8],
) -> Result<Vec<u8>, SealError> {
    let head = head_bytes(section);
    let mut envelope = Vec::with_capacity(sealed_bytes(section, plaintext.len()));
    envelope.resize(head, 0);
    let cipher = start_message(key, &salt, section, context, &mut envelope);
    let mut index = 0;
    let mut rest = plaintext;
    while rest.len() > SEGMENT_BYTES {
        let (segment, after) = rest.split_at(SEGMENT_BYTES);
        body::append_sealed(&cipher, index, false, segment, &mut envelope)?;
        index += 1;
        rest = after;
    }
    body::append_sealed(&cipher, index, true, rest, &mut envelope)?;
    Ok(envelope)
}

/// Seals a message in the buffer that holds it.
///
/// On entry `buffer` holds [`head_bytes`] bytes of any content and then the message; on success it holds the
/// envelope and no plaintext. It is not reallocated if its capacity is at least [`sealed_bytes`]; otherwise
/// the old memory is wiped. On failure the buffer is wiped and empty. `salt` as in [`seal`].
pub fn seal_in_place(
    key: &DataKey,
    salt: Salt,
    section: &WrappedKeys,
    context: &EncryptionContext,
    buffer: &mut Vec<u8>,
) -> Result<(), SealError> {
    let head = head_bytes(section);
    let Some(plaintext_bytes) = buffer.len().checked_sub(head) else {
        buffer.zeroize();
        return Err(SealError::NoRoom);
    };
    let sealed_bytes = sealed_bytes(section, plaintext_bytes);
    if buffer.capacity() < sealed_bytes {
        let mut larger = Vec::with_capacity(sealed_bytes);
        larger.extend_from_slice(buffer);
        std::mem::replace(buffer, larger).zeroize();
    }
    buffer.resize(sealed_bytes, 0);
    let (front, body) = buffer.split_at_mut(head);
    let cipher = start_message(key, &salt, section, context, front);
    let sealed = body::seal_spreading(&cipher, body);
    if sealed.is_err() {
        buffer.zeroize();
    }
    sealed
}

/// Opens an envelope. Gives out nothing at all unless everything verified. The plaintext is wiped when
/// dropped.
///
/// The caller has found `key` by the envelope's data key id, or has had it unwrapped from a wrapped key that
/// he has reason to trust: the section is a claim of whoever sent the envelope.
pub fn open(
    key: &DataKey,
    context: &EncryptionContext,
    envelope: &[u8],
) -> Result<Zeroizing<Vec<u8>>, OpenError> {
    let (head, body) = envelope.split_at(format::body_offset(envelope)?);
    let cipher = resume_envelope(key, context, head)?;
    let mut plaintext = Zeroizing::new(Vec::with_capacity(body::plaintext_bytes(body.len())?));
    let segments = body.len().div_ceil(body::SEALED_SEGMENT_BYTES) as u64;
    for (index, segment) in (1..=segments).zip(body.chunks(body::SEALED_SEGMENT_BYTES)) {
        body::append_opened(&cipher, index - 1, index == segments, segment, &mut plaintext)?;
    }
    Ok(plaintext)
}

/// Opens an envelope in the buffer that holds it, and returns the plaintext, which lies in one piece inside
/// the buffer.
///
/// On success no other byte of the buffer holds plaintext. On failure everything that was decrypted is wiped.
pub fn open_in_place<'a>(
    key: &DataKey,
    context: &EncryptionContext,
    envelope: &'a mut [u8],
) -> Result<&'a mut [u8], OpenError> {
    let (head, body) = envelope.split_at_mut(format::body_offset(envelope)?);
    let cipher = resume_envelope(key, context, head)?;
    let plaintext_bytes = body::open_gathering(&cipher, body)?;
    Ok(&mut body[..plaintext_bytes])
}

/// The same as [`open_in_place`] for an envelope whose head was read before, which is not read again. With another
/// envelope's head nothing opens.
pub fn open_body_in_place<'a>(
    key: &DataKey,
    context: &EncryptionContext,
    head: &Head,
    envelope: &'a mut [u8],
) -> Result<&'a mut [u8], OpenError> {
    let body = envelope.get_mut(head.body_offset()..).ok_or(FormatError::Truncated)?;
    let cipher = resume_message(key, head.fixed(), head.commitment(), context)?;
    let plaintext_bytes = body::open_gathering(&cipher, body)?;
    Ok(&mut body[..plaintext_bytes])
}

/// Whether `key` and `context` are those that the envelope was sealed with, so far as its head tells.
/// Decrypts nothing, and takes the same time for every head.
pub fn matches_commitment(key: &DataKey, context: &EncryptionContext, head: &Head) -> bool {
    let mut message_key = Zeroizing::new([0; KEY_BYTES]);
    derive_again(key, head.fixed(), head.commitment(), context, &mut message_key).is_ok()
}

/// Writes a message's head to `head`, which is as long as that, and returns the cipher for its body.
fn start_message(
    key: &DataKey,
    salt: &Salt,
    section: &WrappedKeys,
    context: &EncryptionContext,
    head: &mut [u8],
) -> Box<MessageCipher> {
    let fixed = format::fixed_header(key.id(), salt);
    let mut message_key = Zeroizing::new([0; KEY_BYTES]);
    let mut commitment = [0; KEY_BYTES];
    key.hmac().derive_message(&fixed, context.digest(), &mut message_key, &mut commitment);
    head[..FIXED_HEADER_BYTES].copy_from_slice(&fixed);
    head[FIXED_HEADER_BYTES..SECTION_OFFSET].copy_from_slice(&commitment);
    head[SECTION_OFFSET..].copy_from_slice(section.as_bytes());
    MessageCipher::boxed(&message_key)
}

/// The cipher for the body behind `head`, a whole head.
fn resume_envelope(
    key: &DataKey,
    context: &EncryptionContext,
    head: &[u8],
) -> Result<Box<MessageCipher>, OpenError> {
    resume_message(key, &format::part(head, 0), &format::part(head, FIXED_HEADER_BYTES), context)
}

/// The cipher of a message, made only after the commitment was found right.
fn resume_message(
    key: &DataKey,
    fixed: &[u8; FIXED_HEADER_BYTES],
    commitment: &[u8; KEY_BYTES],
    context: &EncryptionContext,
) -> Result<Box<MessageCipher>, OpenError> {
    let mut message_key = Zeroizing::new([0; KEY_BYTES]);
    derive_again(key, fixed, commitment, context, &mut message_key)?;
    Ok(MessageCipher::boxed(&message_key))
}

/// Derives what the sealer derived, and compares the commitment.
fn derive_again(
    key: &DataKey,
    fixed: &[u8; FIXED_HEADER_BYTES],
    commitment: &[u8; KEY_BYTES],
    context: &EncryptionContext,
    message_key: &mut [u8; KEY_BYTES],
) -> Result<(), OpenError> {
    let mut derived = [0; KEY_BYTES];
    key.hmac().derive_message(fixed, context.digest(), message_key, &mut derived);
    if aead::same(&derived, commitment) { Ok(()) } else { Err(OpenError::ContextMismatch) }
}
