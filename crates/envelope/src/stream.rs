//! Messages of any size in constant memory.
//!
//! A segment is the last one or it is not, and its nonce says which. Neither side knows while bytes still
//! come, so both hold one segment back until a byte arrives behind it or the end is announced.

use zeroize::{Zeroize, Zeroizing};

use crate::aead::MessageCipher;
use crate::body::{self, SEALED_SEGMENT_BYTES, SEGMENT_BYTES};
use crate::context::EncryptionContext;
use crate::data_key::{DataKey, WrappedKeys};
use crate::error::{FormatError, OpenError, SealError};
use crate::format::{self, Extent, Head, Salt};

/// Seals a message that comes in pieces.
///
/// Send [`Sealer::head`], then whatever [`Sealer::update`] and [`Sealer::finish`] append. How the message is
/// cut into pieces does not change the envelope. Holds at most one segment of plaintext, wiped when dropped.
///
/// A sealer that is dropped without `finish` leaves an envelope that no opener accepts as complete.
pub struct Sealer {
    cipher: Box<MessageCipher>,
    head: Vec<u8>,
    pending: Zeroizing<Vec<u8>>,
    index: u64,
}

impl Sealer {
    /// Starts a message. `salt` must be fresh random bytes: under one key no two messages may share a salt.
    pub fn new(key: &DataKey, salt: Salt, section: &WrappedKeys, context: &EncryptionContext) -> Self {
        let mut head = vec![0; format::head_bytes(section)];
        let cipher = crate::start_message(key, &salt, section, context, &mut head);
        Self { cipher, head, pending: Zeroizing::new(Vec::new()), index: 0 }
    }

    /// The envelope's head, which goes in front of the body.
    pub fn head(&self) -> &[u8] {
        &self.head
    }

    /// Takes a piece of the message and appends the segments that are complete to `out`.
    ///
    /// Fails on a message of more than 2^48 bytes, and then `finish` fails too.
    pub fn update(&mut self, mut chunk: &[u8], out: &mut Vec<u8>) -> Result<(), SealError> {
        if !self.pending.is_empty() {
            let (fill, rest) = chunk.split_at(chunk.len().min(SEGMENT_BYTES - self.pending.len()));
            self.pending.extend_from_slice(fill);
            chunk = rest;
            if !chunk.is_empty() {
                self.flush(out)?;
            }
        }
        while let Some((segment, rest)) = chunk.split_at_checked(SEGMENT_BYTES)
            && !rest.is_empty()
        {
            body::append_sealed(&self.cipher, self.index, false, segment, out)?;
            self.index += 1;
            chunk = rest;
        }
        if !chunk.is_empty() {
            // All at once and before the first byte: a vector that grows leaves what it held in freed memory.
            self.pending.reserve_exact(SEGMENT_BYTES);
            self.pending.extend_from_slice(chunk);
        }
        Ok(())
    }

    /// Ends the message: appends the last segment to `out`.
    pub fn finish(self, out: &mut Vec<u8>) -> Result<(), SealError> {
        body::append_sealed(&self.cipher, self.index, true, &self.pending, out)
    }

    /// Seals the full segment that was held back, now that something comes after it.
    fn flush(&mut self, out: &mut Vec<u8>) -> Result<(), SealError> {
        body::append_sealed(&self.cipher, self.index, false, &self.pending, out)?;
        self.index += 1;
        self.pending.as_mut_slice().zeroize();
        self.pending.clear();
        Ok(())
    }
}

/// Collects an envelope's head from pieces. Holds at most [`HEAD_BYTES_MAX`](crate::HEAD_BYTES_MAX) bytes,
/// and never more than the head's own length fields call for.
#[derive(Default)]
pub struct HeadReader {
    held: Vec<u8>,
}

impl HeadReader {
    /// A reader that has seen nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes a piece. Once the head is whole, returns it with the bytes of this piece that belong to the
    /// body, and is ready for another envelope; until then returns `None`.
    ///
    /// Fails as soon as the bytes cannot become a head any more.
    pub fn push<'a>(&mut self, mut bytes: &'a [u8]) -> Result<Option<(Head, &'a [u8])>, FormatError> {
        loop {
            match format::extent(&self.held)? {
                Extent::Whole(_) => {
                    let head = format::inspect(&self.held)?;
                    self.held.clear();
                    return Ok(Some((head, bytes)));
                }
                Extent::AtLeast(_) if bytes.is_empty() => return Ok(None),
                Extent::AtLeast(end) => {
                    let (wanted, rest) = bytes.split_at(bytes.len().min(end - self.held.len()));
                    self.held.extend_from_slice(wanted);
                    bytes = rest;
                }
            }
        }
    }

    /// What to report when the input ends before the head is whole.
    pub fn unfinished(self) -> FormatError {
        FormatError::Truncated
    }
}

/// Opens a message that comes in pieces.
///
/// What [`Opener::update`] has appended is verified and is the message's beginning, but only an `Ok` from
/// [`Opener::finish`] says that it is the whole message: a caller must end his own output with an error when
/// either fails. After a failure every call fails.
///
/// Plaintext is appended to the caller's `out`, which he wipes if it has to be. Holds at most one sealed
/// segment.
pub struct Opener {
    cipher: Box<MessageCipher>,
    pending: Vec<u8>,
    index: u64,
    failed: bool,
}

impl Opener {
    /// Checks the commitment; on a mismatch fails with [`OpenError::ContextMismatch`].
    pub fn new(key: &DataKey, context: &EncryptionContext, head: &Head) -> Result<Self, OpenError> {
        let cipher = crate::resume_message(key, head.fixed(), head.commitment(), context)?;
        Ok(Self { cipher, pending: Vec::new(), index: 0, failed: false })
    }

    /// Takes a piece of the body, and appends the plaintext of the segments that are complete, verified and
    /// known not to be the last.
    pub fn update(&mut self, chunk: &[u8], out: &mut Vec<u8>) -> Result<(), OpenError> {
        if self.failed {
            return Err(OpenError::Damaged);
        }
        let opened = self.open_all_but_last(chunk, out);
        self.failed = opened.is_err();
        opened
    }

    /// Ends the body: appends the plaintext of the last segment. Fails if what was held back is not the last
    /// segment, which covers a body that was cut short and one that goes on after its end.
    pub fn finish(self, out: &mut Vec<u8>) -> Result<(), OpenError> {
        if self.failed {
            return Err(OpenError::Damaged);
        }
        // A last segment without plaintext is legal only in an empty message; the length alone says so.
        let length =
            if self.index == 0 { self.pending.len() } else { SEALED_SEGMENT_BYTES + self.pending.len() };
        body::plaintext_bytes(length)?;
        body::append_opened(&self.cipher, self.index, true, &self.pending, out)
    }

    fn open_all_but_last(&mut self, mut chunk: &[u8], out: &mut Vec<u8>) -> Result<(), OpenError> {
        if !self.pending.is_empty() {
            let (fill, rest) = chunk.split_at(chunk.len().min(SEALED_SEGMENT_BYTES - self.pending.len()));
            self.pending.extend_from_slice(fill);
            chunk = rest;
            if !chunk.is_empty() {
                body::append_opened(&self.cipher, self.index, false, &self.pending, out)?;
                self.index += 1;
                self.pending.clear();
            }
        }
        while let Some((segment, rest)) = chunk.split_at_checked(SEALED_SEGMENT_BYTES)
            && !rest.is_empty()
        {
            body::append_opened(&self.cipher, self.index, false, segment, out)?;
            self.index += 1;
            chunk = rest;
        }
        self.pending.extend_from_slice(chunk);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DataKeyId, KeyMaterial};

    fn key() -> DataKey {
        DataKey::new(DataKeyId::from_bytes([1; 16]), KeyMaterial::from_slice(&[2; 32]).unwrap())
    }

    fn sealer() -> Sealer {
        Sealer::new(&key(), [3; 24], &WrappedKeys::compact(), &EncryptionContext::new())
    }

    #[test]
    fn a_message_that_is_too_long_never_gets_an_end() {
        let mut sealer = sealer();
        sealer.index = u64::from(u32::MAX);
        let mut out = Vec::new();
        sealer.update(&vec![0; SEGMENT_BYTES], &mut out).unwrap();
        sealer.update(&[0], &mut out).unwrap();
        assert_eq!(out.len(), SEALED_SEGMENT_BYTES, "the last number, and not the last segment");
        assert_eq!(sealer.update(&vec![0; SEGMENT_BYTES], &mut out), Err(SealError::TooLong));
        assert_eq!(sealer.finish(&mut out), Err(SealError::TooLong));
        assert_eq!(out.len(), SEALED_SEGMENT_BYTES);
    }

    #[test]
    fn an_empty_last_segment_after_a_full_one_is_refused() {
        let sealer = sealer();
        let head = format::inspect(sealer.head()).unwrap();
        let mut body = Vec::new();
        body::append_sealed(&sealer.cipher, 0, false, &vec![1; SEGMENT_BYTES], &mut body).unwrap();
        body::append_sealed(&sealer.cipher, 1, true, &[], &mut body).unwrap();
        let mut opener = Opener::new(&key(), &EncryptionContext::new(), &head).unwrap();
        let mut out = Vec::new();
        opener.update(&body, &mut out).unwrap();
        assert_eq!(opener.finish(&mut out), Err(OpenError::Damaged));
    }

    #[test]
    fn memory_stays_constant() {
        let mut sealer = sealer();
        let head = format::inspect(sealer.head()).unwrap();
        let mut opener = Opener::new(&key(), &EncryptionContext::new(), &head).unwrap();
        let (mut body, mut message) = (Vec::new(), Vec::new());
        for piece_bytes in [1000, SEGMENT_BYTES, 5 * SEGMENT_BYTES + 1, 7].repeat(3) {
            sealer.update(&vec![0; piece_bytes], &mut body).unwrap();
            opener.update(&body, &mut message).unwrap();
            body.clear();
            assert!(sealer.pending.len() <= SEGMENT_BYTES && sealer.pending.capacity() == SEGMENT_BYTES);
            assert!(opener.pending.len() <= SEALED_SEGMENT_BYTES);
            assert!(opener.pending.capacity() <= 2 * SEALED_SEGMENT_BYTES);
        }
    }

    #[test]
    fn a_head_reader_holds_no_more_than_the_head() {
        let mut reader = HeadReader::new();
        let sealer = sealer();
        let (head, rest) = sealer.head().split_at(70);
        assert_eq!(reader.push(head), Ok(None));
        let piece = [rest, &[0; 1000]].concat();
        assert!(reader.push(&piece).is_ok_and(|read| read.is_some_and(|(_, body)| body.len() == 1000)));
        assert!(reader.held.is_empty() && reader.held.capacity() < 1000);
    }
}
