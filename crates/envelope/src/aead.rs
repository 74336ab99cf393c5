//! Every call of AES-GCM, HMAC and SHA-256 in this crate, each with the reason why it is safe.
//!
//! Nothing here returns a secret by value: outputs go into buffers that the caller wipes, because a value that
//! is moved can leave a copy of itself on the stack.

use aes_gcm::aead::consts::U12;
use aes_gcm::aead::inout::InOutBuf;
use aes_gcm::aes::Aes256Enc;
use aes_gcm::{AeadInOut, AesGcm, KeyInit, Nonce, Tag};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

use crate::error::{OpenError, SealError};
use crate::format::FIXED_HEADER_BYTES;

/// Bytes of an AES-256 key, of a SHA-256 digest and of a commitment.
pub(crate) const KEY_BYTES: usize = 32;

/// Bytes of an AES-GCM tag. Never shortened: NIST SP 800-38D appendix C limits shorter tags.
pub(crate) const TAG_BYTES: usize = 16;

const MESSAGE_LABEL: &[u8; 18] = b"keyfold/v1/message";
const HASH_BLOCK_BYTES: usize = 64;

/// SHA-256 of a context's canonical bytes, in constant memory.
pub(crate) fn sha256<'a>(parts: impl Iterator<Item = &'a [u8]>) -> [u8; KEY_BYTES] {
    let mut hash = Sha256::new();
    parts.for_each(|part| hash.update(part));
    hash.finalize().into()
}

/// Whether two commitments are equal, in a time that does not depend on where they differ: a caller who could
/// measure that would learn the commitment of a key that he does not have, byte by byte.
pub(crate) fn same(a: &[u8; KEY_BYTES], b: &[u8; KEY_BYTES]) -> bool {
    a.ct_eq(b).into()
}

/// HMAC-SHA-256 (FIPS 198-1) with the key already absorbed: the two hash states after the inner and the outer
/// padded key. A message starts from clones of them and pays no key schedule.
///
/// Written on `Sha256` and not on the `hmac` crate, because that leaves the padded key on the stack, and `hkdf`
/// leaves the first output block there, which is our message key. A test holds this to both crates.
pub(crate) struct PreparedHmac {
    inner: Sha256,
    outer: Sha256,
}

impl PreparedHmac {
    /// Prepares `key` straight in its final place on the heap. The key is shorter than a hash block, so
    /// FIPS 198-1 step 3 applies: it is padded with zeros and not hashed.
    pub(crate) fn boxed(key: &[u8; KEY_BYTES]) -> Box<Self> {
        let mut prepared = Box::new(Self { inner: Sha256::new(), outer: Sha256::new() });
        let mut pad = Zeroizing::new([0x36; HASH_BLOCK_BYTES]);
        pad.iter_mut().zip(key).for_each(|(pad, key)| *pad ^= key);
        prepared.inner.update(pad.as_slice());
        pad.iter_mut().for_each(|pad| *pad ^= 0x36 ^ 0x5c);
        prepared.outer.update(pad.as_slice());
        prepared
    }

    /// Derives a message's key and its commitment: HKDF-Expand (RFC 5869 section 2.3) to two blocks.
    ///
    /// Safe without an extract step because the data key is 256 uniformly random bits (RFC 5869 section 3.3).
    /// `info` has one fixed length, so two different (header, context) pairs never give the same `info`; the
    /// salt inside the header makes it unique for each message. The commitment is the second block of a PRF whose
    /// first block is the key: it reveals nothing of the key, and a second (key, context) that gives the same
    /// commitment is a collision in HMAC-SHA-256.
    pub(crate) fn derive_message(
        &self,
        fixed_header: &[u8; FIXED_HEADER_BYTES],
        context_digest: &[u8; KEY_BYTES],
        message_key: &mut [u8; KEY_BYTES],
        commitment: &mut [u8; KEY_BYTES],
    ) {
        let info: [&[u8]; 3] = [MESSAGE_LABEL, fixed_header, context_digest];
        self.mac(&[info[0], info[1], info[2], &[1]], message_key);
        self.mac(&[message_key, info[0], info[1], info[2], &[2]], commitment);
    }

    fn mac(&self, parts: &[&[u8]], out: &mut [u8; KEY_BYTES]) {
        // The clones wipe themselves when they are dropped (sha2's `zeroize`), and are finished in place.
        let mut hash = self.inner.clone();
        for part in parts {
            hash.update(part);
        }
        hash.finalize_into_reset(out.into());
        let mut hash = self.outer.clone();
        hash.update(out.as_slice());
        hash.finalize_into_reset(out.into());
    }
}

/// AES-256-GCM (NIST SP 800-38D) under one message's key. Wiped when dropped.
///
/// Encrypt-only AES: GCM never runs the block cipher backwards, and half of the key schedule is saved.
pub(crate) struct MessageCipher(AesGcm<Aes256Enc, U12>);

impl MessageCipher {
    pub(crate) fn new(message_key: &[u8; KEY_BYTES]) -> Self {
        Self(AesGcm::new(message_key.into()))
    }

    /// Encrypts one segment where it lies and returns its tag.
    ///
    /// Safe because a nonce never repeats under a key: the key belongs to one message (a fresh salt of 192
    /// random bits), and within it the nonce is the segment's number. At most 2^32 segments, so at most 2^32
    /// calls for a key and 2^44 blocks (section 8.3). The `last` byte makes a final segment and an inner one two
    /// different nonces, so neither opens as the other.
    pub(crate) fn seal_segment(
        &self,
        index: u32,
        last: bool,
        segment: &mut [u8],
    ) -> Result<[u8; TAG_BYTES], SealError> {
        self.0
            .encrypt_inout_detached(&nonce(index, last), &[], InOutBuf::from(segment))
            .map(Into::into)
            .map_err(|_| SealError::TooLong)
    }

    /// Checks one segment's tag, in constant time, and only then decrypts it where it lies. On failure the
    /// segment still holds the ciphertext.
    pub(crate) fn open_segment(
        &self,
        index: u32,
        last: bool,
        segment: &mut [u8],
        tag: &[u8; TAG_BYTES],
    ) -> Result<(), OpenError> {
        let tag: &Tag = tag.into();
        self.0
            .decrypt_inout_detached(&nonce(index, last), &[], InOutBuf::from(segment), tag)
            .map_err(|_| OpenError::Damaged)
    }
}

/// The segment's number in 11 big-endian bytes, then 1 for the last segment and 0 for any other.
fn nonce(index: u32, last: bool) -> Nonce<U12> {
    let mut nonce = [0; 12];
    nonce[7..11].copy_from_slice(&index.to_be_bytes());
    nonce[11] = u8::from(last);
    nonce.into()
}
