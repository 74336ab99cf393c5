//! No key outlives its owner in the process's memory. Looked for in the memory itself, through `/proc/self/mem`.
//!
//! One test in a binary of its own, because the search covers every thread. What it looks for is kept masked, so that
//! the search finds the keys and not itself. It looks for the second half of each secret: freed memory may be written
//! over by the allocator in its first 16 bytes, and that must not pass for wiping.
#![cfg(target_os = "linux")]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

mod sample;

use std::fs::{self, File};
use std::hint::black_box;
use std::io::Read;
use std::os::unix::fs::FileExt;

use envelope::{DataKey, DataKeyId, KeyMaterial, Opener, Sealer, WrappedKeys};
use hkdf::Hkdf;
use sha2::Sha256;
use sha2::block_api::compress256;
use zeroize::Zeroize;

const MASK: u8 = 0xa5;
const PIECE_BYTES: usize = 1 << 20;

/// A secret that this test knows without having it in memory.
struct Masked([u8; 32]);

impl Masked {
    /// Masks a secret and wipes it.
    fn take(secret: &mut [u8; 32]) -> Self {
        let mut masked = Self([MASK; 32]);
        masked.0.iter_mut().zip(secret.iter()).for_each(|(masked, secret)| *masked ^= secret);
        secret.zeroize();
        masked
    }

    fn unmask_into(&self, secret: &mut [u8; 32]) {
        secret.iter_mut().zip(&self.0).for_each(|(secret, masked)| *secret = masked ^ MASK);
    }
}

#[test]
fn keys_are_gone_when_their_owner_is() {
    let mut search = Search { piece: vec![0; PIECE_BYTES] };
    let mut raw = [0; 32];
    File::open("/dev/urandom").unwrap().read_exact(&mut raw).unwrap();
    let raw = Masked::take(&mut raw);

    // The search finds a key that is there, and moving it leaves no second copy.
    assert_eq!(search.count(&raw), 0, "the masked key is not the key");
    let material = black_box(vec![Some(material(&raw))]).pop().flatten().unwrap();
    assert_eq!(search.count(&raw), 1);
    drop(material);
    assert_eq!(search.count(&raw), 0, "KeyMaterial, dropped");

    // A prepared key holds the two hash states in place of the raw bytes, and neither padded key.
    let [inner_pad, outer_pad, inner_state, outer_state] = hmac_secrets(&raw);
    let key = DataKey::new(DataKeyId::from_bytes([1; 16]), self::material(&raw));
    assert_eq!([&raw, &inner_pad, &outer_pad].map(|secret| search.count(secret)), [0; 3], "DataKey, made");
    let key = black_box(vec![Some(key)]).pop().flatten().unwrap();
    assert_eq!([&inner_state, &outer_state].map(|secret| search.count(secret)), [1; 2], "DataKey, alive");

    let message_key = message_key(&raw);
    message_keys_are_gone(&mut search, &key, &message_key);

    drop(key);
    for secret in [raw, inner_pad, outer_pad, inner_state, outer_state] {
        assert_eq!(search.count(&secret), 0, "DataKey, dropped");
    }
}

/// A stream holds the message key while it lasts, once: the first two round keys of AES-256 are the key itself.
///
/// In an unoptimised build AES spills its round keys all over the stack, so there only the calls are made. Run this with
/// `--release` for the checks.
fn message_keys_are_gone(search: &mut Search, key: &DataKey, message_key: &Masked) {
    let mut assert_count = |expected: usize, when: &str| {
        let found = search.count(message_key);
        assert!(found == expected || cfg!(debug_assertions), "{when}: {found}");
    };
    // Other implementations of AES keep the round keys in another form.
    #[cfg(target_arch = "x86_64")]
    let alive = usize::from(std::arch::is_x86_feature_detected!("aes"));
    #[cfg(not(target_arch = "x86_64"))]
    let alive = 0;
    let (context, section) = (sample::context(), WrappedKeys::compact());

    assert_count(0, "before");
    let sealer = Sealer::new(key, sample::SALT, &section, &context);
    assert_count(alive, "Sealer, alive");
    let mut envelope = sealer.head().to_vec();
    sealer.finish(&mut envelope).unwrap();
    assert_count(0, "Sealer, finished");
    let opener = Opener::new(key, &context, &envelope::inspect(&envelope).unwrap()).unwrap();
    assert_count(alive, "Opener, alive");
    drop(opener);
    assert_count(0, "Opener, dropped");
    envelope::open(key, &context, &envelope).unwrap();
    assert_count(0, "opened");
    envelope::open_in_place(key, &context, &mut envelope).unwrap();
    assert_count(0, "opened in place");
    envelope::seal(key, sample::SALT, &section, &context, b"message").unwrap();
    assert_count(0, "sealed");
}

#[inline(never)]
fn material(raw: &Masked) -> KeyMaterial {
    let mut bytes = [0; 32];
    raw.unmask_into(&mut bytes);
    KeyMaterial::from_mut(&mut bytes).unwrap()
}

/// The two padded keys of HMAC (those bytes of them that depend on the key) and the hash states after them.
fn hmac_secrets(raw: &Masked) -> [Masked; 4] {
    let secrets = [0x36, 0x5c].map(|pad| {
        let mut key = [0; 32];
        raw.unmask_into(&mut key);
        let mut block = [pad; 64];
        block.iter_mut().zip(&key).for_each(|(block, key)| *block ^= key);
        key.zeroize();
        // The initial hash value of SHA-256 (FIPS 180-4, 5.3.3).
        let mut state = [
            0x6a09_e667,
            0xbb67_ae85,
            0x3c6e_f372,
            0xa54f_f53a,
            0x510e_527f,
            0x9b05_688c,
            0x1f83_d9ab,
            0x5be0_cd19,
        ];
        compress256(&mut state, &[block]);
        let mut padded = [0; 32];
        padded.copy_from_slice(&block[..32]);
        block.zeroize();
        let mut state_bytes = [0; 32];
        state_bytes
            .chunks_exact_mut(4)
            .zip(state)
            .for_each(|(to, word): (_, u32)| to.copy_from_slice(&word.to_ne_bytes()));
        state.zeroize();
        (Masked::take(&mut padded), Masked::take(&mut state_bytes))
    });
    scrub_stack();
    let [(inner_pad, inner_state), (outer_pad, outer_state)] = secrets;
    [inner_pad, outer_pad, inner_state, outer_state]
}

/// The key of the message with the sample's salt and context, by the specification.
fn message_key(raw: &Masked) -> Masked {
    let mut key = [0; 32];
    raw.unmask_into(&mut key);
    let mut message_key = [0; 32];
    let mut fixed_header = b"KF\x01".to_vec();
    fixed_header.extend_from_slice(&[1; 16]);
    fixed_header.extend_from_slice(&sample::SALT);
    let digest = <Sha256 as sha2::Digest>::digest(sample::context().canonical());
    let hkdf = Hkdf::<Sha256>::from_prk(&key).unwrap();
    key.zeroize();
    hkdf.expand_multi_info(&[b"keyfold/v1/message", &fixed_header, &digest], &mut message_key).unwrap();
    drop(hkdf);
    scrub_stack();
    Masked::take(&mut message_key)
}

/// Writes over what the calls of the test's own arithmetic left on the stack.
#[inline(never)]
fn scrub_stack() {
    black_box(&mut [0_u8; 16 * 1024]);
}

struct Search {
    piece: Vec<u8>,
}

impl Search {
    /// How often the second half of `secret` is in writable memory, this search's own buffer left out.
    #[inline(never)]
    fn count(&mut self, secret: &Masked) -> usize {
        let own = self.piece.as_ptr().addr()..self.piece.as_ptr().addr() + self.piece.len();
        let memory = File::open("/proc/self/mem").unwrap();
        let maps = fs::read_to_string("/proc/self/maps").unwrap();
        let regions = maps.lines().filter_map(|line| {
            let mut fields = line.split_ascii_whitespace();
            let (start, end) = fields.next()?.split_once('-')?;
            let writable = fields.next()?.starts_with("rw");
            let address = |text| usize::from_str_radix(text, 16).ok();
            writable.then_some((address(start)?, address(end)?))
        });
        let mut found = 0;
        for (mut start, end) in regions {
            while start < end {
                let length = PIECE_BYTES.min(end - start);
                let piece = &mut self.piece[..length];
                if memory.read_exact_at(piece, start as u64).is_err() {
                    break;
                }
                let hits = piece.windows(16).enumerate().filter(|(_, window)| {
                    window.iter().zip(&secret.0[16..]).all(|(byte, masked)| byte ^ MASK == *masked)
                });
                found += hits.filter(|(at, _)| !own.contains(&(start + at))).count();
                // Pieces overlap by less than a window, so nothing between two is missed or counted twice.
                start += if length == PIECE_BYTES { length - 15 } else { length };
            }
        }
        self.piece.zeroize();
        self.piece.resize(PIECE_BYTES, 0);
        found
    }
}
