//! Every call of AES-GCM, HMAC and SHA-256 in this crate, each with the reason why it is safe.
//!
//! Nothing here returns a secret by value: outputs go into buffers that the caller wipes, because a value
//! that is moved can leave a copy of itself on the stack.

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

/// More stack than preparing a key takes in an optimised build, where half of this is enough.
const SCRUBBED_BYTES: usize = 2048;

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
/// Written on `Sha256` and not on the `hmac` crate, because that leaves the padded key on the stack, and
/// `hkdf` leaves the first output block there, which is our message key. A test holds this to both crates.
pub(crate) struct PreparedHmac {
    inner: Sha256,
    outer: Sha256,
}

impl PreparedHmac {
    /// Prepares `key` straight in its final place on the heap. The key is shorter than a hash block, so
    /// FIPS 198-1 step 3 applies: it is padded with zeros and not hashed.
    pub(crate) fn boxed(key: &[u8; KEY_BYTES]) -> Box<Self> {
        on_scrubbed_stack(|| {
            let mut prepared = Box::new(Self { inner: Sha256::new(), outer: Sha256::new() });
            let mut pad = Zeroizing::new([0x36; HASH_BLOCK_BYTES]);
            pad.iter_mut().zip(key).for_each(|(pad, key)| *pad ^= key);
            prepared.inner.update(pad.as_slice());
            pad.iter_mut().for_each(|pad| *pad ^= 0x36 ^ 0x5c);
            prepared.outer.update(pad.as_slice());
            prepared
        })
    }

    /// Derives a message's key and its commitment: HKDF-Expand (RFC 5869 section 2.3) to two blocks.
    ///
    /// Safe without an extract step because the data key is 256 uniformly random bits (RFC 5869 section 3.3).
    /// `info` has one fixed length, so two different (header, context) pairs never give the same `info`; the
    /// salt inside the header makes it unique for each message. The commitment is the second block of a PRF
    /// whose first block is the key: it reveals nothing of the key, and a second (key, context) that gives
    /// the same commitment is a collision in HMAC-SHA-256.
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
    /// Expands the key into a place on the heap, where it stays: moved around on the stack it would leave
    /// copies.
    pub(crate) fn boxed(message_key: &[u8; KEY_BYTES]) -> Box<Self> {
        on_scrubbed_stack(|| Box::new(Self(AesGcm::new(message_key.into()))))
    }

    /// Encrypts one segment where it lies and returns its tag.
    ///
    /// Safe because a nonce never repeats under a key: the key belongs to one message (a fresh salt of 192
    /// random bits), and within it the nonce is the segment's number. At most 2^32 segments, so at most 2^32
    /// calls for a key and 2^44 blocks (section 8.3). The `last` byte makes a final segment and an inner one
    /// two different nonces, so neither opens as the other.
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

/// Does `work`, and then writes zeros over the stack that it ran on.
///
/// Hashes and ciphers wipe themselves where they are dropped, but not what their making left behind: they go
/// by value from one function to the next, with a copy in each frame. What `work` returns must not itself be
/// a secret by value.
fn on_scrubbed_stack<R>(work: impl FnOnce() -> R) -> R {
    // Neither is inlined, so both get their frames at the same height.
    #[inline(never)]
    fn run<R>(work: impl FnOnce() -> R) -> R {
        work()
    }
    #[inline(never)]
    fn scrub() {
        std::hint::black_box(&mut [0_u8; SCRUBBED_BYTES]);
    }
    let result = run(work);
    scrub();
    result
}

/// The segment's number in 11 big-endian bytes, then 1 for the last segment and 0 for any other.
fn nonce(index: u32, last: bool) -> Nonce<U12> {
    let mut nonce = [0; 12];
    nonce[7..11].copy_from_slice(&index.to_be_bytes());
    nonce[11] = u8::from(last);
    nonce.into()
}

#[cfg(test)]
mod tests {
    use hkdf::Hkdf;
    use hmac::{Hmac, Mac};
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn rfc_4231_test_case_1() {
        // The key has 20 bytes; HMAC pads with zeros, so 32 bytes that end in zeros are the same key.
        let mut key = [0; KEY_BYTES];
        key[..20].fill(0x0b);
        let mut out = [0; KEY_BYTES];
        PreparedHmac::boxed(&key).mac(&[b"Hi ", b"There"], &mut out);
        assert_eq!(out[..], hex("b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7"));
    }

    #[test]
    fn rfc_5869_test_case_1() {
        let prk = hex("077709362c2e32df0ddc3f0dc47bba6390b6c73bb50f9c3122ec844ad7c2b3e5");
        let info = hex("f0f1f2f3f4f5f6f7f8f9");
        let okm = hex("3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865");
        let prepared = PreparedHmac::boxed(&prk.try_into().unwrap());
        let (mut first, mut second) = ([0; KEY_BYTES], [0; KEY_BYTES]);
        prepared.mac(&[&info, &[1]], &mut first);
        prepared.mac(&[&first, &info, &[2]], &mut second);
        assert_eq!([first, second].concat()[..42], okm);
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(64) })]

        #[test]
        fn the_hkdf_and_hmac_crates_agree(
            key: [u8; 32],
            header in prop::array::uniform::<_, 43>(any::<u8>()),
            digest: [u8; 32],
        ) {
            let (mut message_key, mut commitment) = ([0; KEY_BYTES], [0; KEY_BYTES]);
            PreparedHmac::boxed(&key).derive_message(&header, &digest, &mut message_key, &mut commitment);

            let info = [b"keyfold/v1/message", &header[..], &digest].concat();
            let mut okm = [0; 64];
            Hkdf::<Sha256>::from_prk(&key).unwrap().expand(&info, &mut okm).unwrap();
            prop_assert_eq!([message_key, commitment].concat(), okm);

            let hmac = <Hmac<Sha256> as KeyInit>::new_from_slice(&key).unwrap();
            let hmac = hmac.chain_update(&info).chain_update([1]);
            prop_assert_eq!(message_key, <[u8; 32]>::from(hmac.finalize().into_bytes()));
        }
    }

    #[test]
    fn a_nonce_is_the_number_and_the_last_mark() {
        assert_eq!(nonce(0, false)[..], [0; 12]);
        assert_eq!(nonce(0x0102_0304, true)[..], [0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4, 1]);
    }

    fn hex(text: &str) -> Vec<u8> {
        (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
    }
}
