//! No key outlives its owner in the process's memory. Looked for in the memory itself, through
//! `/proc/self/mem`.
//!
//! One test in a binary of its own, because the search covers every thread. What it looks for is kept masked,
//! so that the search finds the keys and not itself. It looks for the second half of each secret: freed
//! memory may be written over by the allocator in its first 16 bytes, and that must not pass for wiping.
#![cfg(target_os = "linux")]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

mod sample;

use std::fs::File;
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
    let mut search = Search::new();
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
    let key = deep(|| DataKey::new(DataKeyId::from_bytes([1; 16]), self::material(&raw)));
    assert_eq!([&raw, &inner_pad, &outer_pad].map(|secret| search.count(secret)), [0; 3], "DataKey, made");
    let key = black_box(vec![Some(key)]).pop().flatten().unwrap();
    assert_eq!([&inner_state, &outer_state].map(|secret| search.count(secret)), [1; 2], "DataKey, alive");

    let message_key = message_key(&raw);
    message_keys_are_gone(&mut search, &key, &message_key);
    messages_are_gone(&mut search, &key, &raw);

    drop(key);
    for secret in [raw, inner_pad, outer_pad, inner_state, outer_state] {
        assert_optimised(search.count(&secret), 0, "DataKey, dropped");
    }
}

/// Checks in an optimised build only. In any other, AES spills round keys and blocks all over the stack,
/// where no source code reaches them. So run this with `--release`, too.
fn assert_optimised(found: usize, expected: usize, when: &str) {
    assert!(found == expected || cfg!(debug_assertions), "{when}: found {found}, expected {expected}");
}

/// A stream holds the message key while it lasts, once: the first two round keys of AES-256 are the key
/// itself.
fn message_keys_are_gone(search: &mut Search, key: &DataKey, message_key: &Masked) {
    let mut assert_count = |expected, when| assert_optimised(search.count(message_key), expected, when);
    // Other implementations of AES keep the round keys in another form.
    #[cfg(target_arch = "x86_64")]
    let alive = usize::from(std::arch::is_x86_feature_detected!("aes"));
    #[cfg(not(target_arch = "x86_64"))]
    let alive = 0;
    let (context, section) = (sample::context(), WrappedKeys::compact());

    assert_count(0, "before");
    let sealer = deep(|| Sealer::new(key, sample::SALT, &section, &context));
    assert_count(alive, "Sealer, alive");
    let mut envelope = sealer.head().to_vec();
    deep(|| sealer.finish(&mut envelope)).unwrap();
    assert_count(0, "Sealer, finished");
    let opener = deep(|| Opener::new(key, &context, &envelope::inspect(&envelope).unwrap())).unwrap();
    assert_count(alive, "Opener, alive");
    drop(opener);
    assert_count(0, "Opener, dropped");
    deep(|| drop(envelope::open(key, &context, &envelope).unwrap()));
    assert_count(0, "opened");
    deep(|| envelope::open_in_place(key, &context, &mut envelope).map(|_| ())).unwrap();
    assert_count(0, "opened in place");
    deep(|| envelope::seal(key, sample::SALT, &section, &context, b"message")).unwrap();
    assert_count(0, "sealed");
}

/// No copy of a message stays behind that the caller cannot wipe. The message is 32 secret bytes.
fn messages_are_gone(search: &mut Search, key: &DataKey, message: &Masked) {
    let (context, section) = (sample::context(), WrappedKeys::compact());
    let mut plaintext = Box::new([0; 32]);
    message.unmask_into(&mut plaintext);
    assert_eq!(search.count(message), 1, "the caller's");

    let mut sealer = Sealer::new(key, sample::SALT, &section, &context);
    sealer.update(&plaintext[..], &mut Vec::new()).unwrap();
    assert_eq!(search.count(message), 2, "held back by the sealer");
    drop(sealer);
    assert_eq!(search.count(message), 1, "Sealer, dropped");

    let mut buffer = vec![0; envelope::head_bytes(&section)];
    buffer.reserve_exact(plaintext.len());
    buffer.extend_from_slice(&plaintext[..]);
    assert!(buffer.capacity() < envelope::sealed_bytes(&section, plaintext.len()), "has to move");
    deep(|| envelope::seal_in_place(key, sample::SALT, &section, &context, &mut buffer)).unwrap();
    assert_optimised(search.count(message), 1, "sealed in place");
    let opened = deep(|| envelope::open(key, &context, &buffer)).unwrap();
    assert_optimised(search.count(message), 2, "opened");
    drop(opened);
    assert_optimised(search.count(message), 1, "opened, dropped");
    let at_end = buffer.len() - 1;
    buffer[at_end] ^= 1;
    deep(|| envelope::open(key, &context, &buffer).unwrap_err());
    plaintext.zeroize();
    assert_optimised(search.count(message), 0, "not opened");
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

/// Makes `work` run far below the frames of the search, which would write over what it leaves on the stack.
#[inline(never)]
fn deep<R>(work: impl FnOnce() -> R) -> R {
    let above = black_box([0_u8; 16 * 1024]);
    let result = work();
    black_box(&above);
    result
}

/// Allocates nothing while it searches: an allocation could write over the freed memory that it is to look
/// at.
struct Search {
    memory: File,
    maps: Vec<u8>,
    piece: Vec<u8>,
}

impl Search {
    fn new() -> Self {
        let memory = File::open("/proc/self/mem").unwrap();
        Self { memory, maps: vec![0; PIECE_BYTES], piece: vec![0; PIECE_BYTES] }
    }

    /// How often the second half of `secret` is in writable memory, this search's own buffer left out.
    #[inline(never)]
    fn count(&mut self, secret: &Masked) -> usize {
        let own = self.piece.as_ptr().addr()..self.piece.as_ptr().addr() + self.piece.len();
        let mut found = 0;
        let maps_bytes = read_maps(&mut self.maps);
        let maps = str::from_utf8(&self.maps[..maps_bytes]).unwrap();
        for (mut start, end) in maps.lines().filter_map(writable_region) {
            while start < end {
                let length = PIECE_BYTES.min(end - start);
                let piece = &mut self.piece[..length];
                if self.memory.read_exact_at(piece, start as u64).is_err() {
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

/// The file of the process's memory map comes in pieces of its own choosing.
fn read_maps(into: &mut [u8]) -> usize {
    let mut maps = File::open("/proc/self/maps").unwrap();
    let mut read = 0;
    loop {
        match maps.read(&mut into[read..]).unwrap() {
            0 => return read,
            more => read += more,
        }
        assert!(read < into.len(), "the map is longer than expected");
    }
}

fn writable_region(line: &str) -> Option<(usize, usize)> {
    let mut fields = line.split_ascii_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    let writable = fields.next()?.starts_with("rw");
    let address = |text| usize::from_str_radix(text, 16).ok();
    writable.then_some((address(start)?, address(end)?))
}
