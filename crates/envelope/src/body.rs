//! The body: a message cut into segments, each sealed by itself.

use zeroize::Zeroize;

use crate::aead::{MessageCipher, TAG_BYTES};
use crate::error::{OpenError, SealError};
use crate::format::part;

/// Plaintext bytes of every segment but the last, which holds 1 to this many (none in an empty message).
pub const SEGMENT_BYTES: usize = 65_536;

/// A full segment with its tag.
pub(crate) const SEALED_SEGMENT_BYTES: usize = SEGMENT_BYTES + TAG_BYTES;

/// How many bytes the body of a message has.
pub(crate) fn sealed_bytes(plaintext_bytes: usize) -> usize {
    let segments = plaintext_bytes.div_ceil(SEGMENT_BYTES).max(1);
    plaintext_bytes.saturating_add(segments.saturating_mul(TAG_BYTES))
}

/// How long the message in a body of this length is, if any body has this length: the last segment is never
/// empty unless it is the only one.
pub(crate) fn plaintext_bytes(body_bytes: usize) -> Result<usize, OpenError> {
    let segments = body_bytes.div_ceil(SEALED_SEGMENT_BYTES);
    let plaintext = body_bytes.checked_sub(segments * TAG_BYTES).ok_or(OpenError::Damaged)?;
    if body_bytes > 0 && sealed_bytes(plaintext) == body_bytes {
        Ok(plaintext)
    } else {
        Err(OpenError::Damaged)
    }
}

/// Appends one sealed segment. On failure `out` is as it was.
pub(crate) fn append_sealed(
    cipher: &MessageCipher,
    index: u64,
    last: bool,
    plaintext: &[u8],
    out: &mut Vec<u8>,
) -> Result<(), SealError> {
    let start = out.len();
    // Before any plaintext is in it: a vector that grows leaves what it held in freed memory.
    out.reserve(plaintext.len() + TAG_BYTES);
    out.extend_from_slice(plaintext);
    match seal_segment(cipher, index, last, &mut out[start..]) {
        Ok(tag) => out.extend_from_slice(&tag),
        Err(error) => {
            out[start..].zeroize();
            out.truncate(start);
            return Err(error);
        }
    }
    Ok(())
}

/// Appends the plaintext of one sealed segment, after its tag was checked. On failure `out` is as it was.
pub(crate) fn append_opened(
    cipher: &MessageCipher,
    index: u64,
    last: bool,
    sealed: &[u8],
    out: &mut Vec<u8>,
) -> Result<(), OpenError> {
    let (ciphertext, tag) = sealed.split_last_chunk().ok_or(OpenError::Damaged)?;
    let start = out.len();
    out.extend_from_slice(ciphertext);
    let opened = open_segment(cipher, index, last, &mut out[start..], tag);
    if opened.is_err() {
        out.truncate(start);
    }
    opened
}

/// Seals the message at the front of `body`, whose length is the sealed length, so that it fills `body`.
///
/// From the last segment to the first: each moves to the right by the tags of those before it, onto bytes
/// that are spare or were sealed already. In the end ciphertext and tags cover every byte that held
/// plaintext.
pub(crate) fn seal_spreading(cipher: &MessageCipher, body: &mut [u8]) -> Result<(), SealError> {
    let segments = body.len().div_ceil(SEALED_SEGMENT_BYTES);
    let plaintext_bytes = body.len() - segments * TAG_BYTES;
    for index in (0..segments).rev() {
        let from = index * SEGMENT_BYTES;
        let bytes = SEGMENT_BYTES.min(plaintext_bytes - from);
        let to = index * SEALED_SEGMENT_BYTES;
        if index > 0 {
            body.copy_within(from..from + bytes, to);
        }
        let tag = seal_segment(cipher, index as u64, index + 1 == segments, &mut body[to..to + bytes])?;
        body[to + bytes..to + bytes + TAG_BYTES].copy_from_slice(&tag);
    }
    Ok(())
}

/// Opens `body` where it lies and moves the plaintext together at its front. Returns the plaintext's length.
/// What lies behind it is zeros; on failure, so is everything that was decrypted.
pub(crate) fn open_gathering(cipher: &MessageCipher, body: &mut [u8]) -> Result<usize, OpenError> {
    let plaintext_bytes = plaintext_bytes(body.len())?;
    let mut gathered = 0;
    let mut from = 0;
    for index in 0.. {
        let end = body.len().min(from + SEALED_SEGMENT_BYTES);
        let last = end == body.len();
        let tag_at = end - TAG_BYTES;
        let tag = part(body, tag_at);
        if let Err(error) = open_segment(cipher, index, last, &mut body[from..tag_at], &tag) {
            body[..from].zeroize();
            return Err(error);
        }
        if index > 0 {
            body.copy_within(from..tag_at, gathered);
        }
        gathered += tag_at - from;
        from = end;
        if last {
            break;
        }
    }
    body[plaintext_bytes..].zeroize();
    Ok(gathered)
}

fn seal_segment(
    cipher: &MessageCipher,
    index: u64,
    last: bool,
    segment: &mut [u8],
) -> Result<[u8; TAG_BYTES], SealError> {
    let index = u32::try_from(index).map_err(|_| SealError::TooLong)?;
    cipher.seal_segment(index, last, segment)
}

/// No sealer makes a segment beyond number 2^32 - 1, so one that is there was put there by someone else.
fn open_segment(
    cipher: &MessageCipher,
    index: u64,
    last: bool,
    segment: &mut [u8],
    tag: &[u8; TAG_BYTES],
) -> Result<(), OpenError> {
    let index = u32::try_from(index).map_err(|_| OpenError::Damaged)?;
    cipher.open_segment(index, last, segment, tag)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LAST_INDEX: u64 = u32::MAX as u64;

    #[test]
    fn every_length_of_a_body_is_the_length_of_one_message() {
        let lengths =
            [0, 1, 2, SEGMENT_BYTES - 1, SEGMENT_BYTES, SEGMENT_BYTES + 1, 2 * SEGMENT_BYTES, 1 << 30];
        for bytes in lengths {
            assert_eq!(plaintext_bytes(sealed_bytes(bytes)), Ok(bytes));
        }
        let none = (0..TAG_BYTES).chain(SEALED_SEGMENT_BYTES + 1..=SEALED_SEGMENT_BYTES + TAG_BYTES);
        for body_bytes in none {
            assert_eq!(plaintext_bytes(body_bytes), Err(OpenError::Damaged), "{body_bytes}");
        }
    }

    /// Only someone with the key can make this one, and even so a message has one encoding only.
    #[test]
    fn an_empty_last_segment_after_a_full_one_is_refused() {
        let cipher = MessageCipher::boxed(&[7; 32]);
        let mut body = Vec::new();
        append_sealed(&cipher, 0, false, &vec![1; SEGMENT_BYTES], &mut body).unwrap();
        append_sealed(&cipher, 1, true, &[], &mut body).unwrap();
        assert_eq!(open_gathering(&cipher, &mut body), Err(OpenError::Damaged));
    }

    #[test]
    fn there_is_no_segment_after_number_2_to_the_32_less_1() {
        let cipher = MessageCipher::boxed(&[7; 32]);
        let mut sealed = Vec::new();
        append_sealed(&cipher, LAST_INDEX, true, b"last", &mut sealed).unwrap();
        let before = sealed.clone();
        assert_eq!(
            append_sealed(&cipher, LAST_INDEX + 1, true, b"more", &mut sealed),
            Err(SealError::TooLong)
        );
        assert_eq!(sealed, before, "as it was");
        let mut opened = Vec::new();
        append_opened(&cipher, LAST_INDEX, true, &sealed, &mut opened).unwrap();
        assert_eq!(opened, b"last");
        assert_eq!(
            append_opened(&cipher, LAST_INDEX + 1, true, &sealed, &mut opened),
            Err(OpenError::Damaged)
        );

        let mut first = Vec::new();
        append_sealed(&cipher, 0, true, b"first", &mut first).unwrap();
        let wrapped_around = append_opened(&cipher, LAST_INDEX + 1, true, &first, &mut opened);
        assert_eq!(wrapped_around, Err(OpenError::Damaged));
        assert_eq!(opened, b"last");
    }
}
