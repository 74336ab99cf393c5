//! The key ring's file: three lines that a person can read, then the payload.
//!
//! ```text
//! keyfold key ring, format 1
//! protection: argon2id memory_kib=65536 passes=3 lanes=1 salt=00112233445566778899aabbccddeeff
//! payload: 1234 bytes, sha-256 (64 hexadecimal digits)
//! ```
//!
//! The payload is an envelope: the records, sealed under the key that Argon2id makes of passphrase and salt,
//! with the first two lines as its context. In a clear key ring the second line says so and the payload is
//! the records. The digest covers the first two lines and the payload. It is no protection, the envelope is:
//! it tells a damaged file from a wrong passphrase, which look the same to the cipher.

use std::path::Path;

use argon2::{Algorithm, Argon2, Block, Params, Version};
use envelope::{DataKey, DataKeyId, EncryptionContext, KeyMaterial, OpenError, Salt, WrappedKeys};
use secrecy::{ExposeSecret, SecretString};
use sha2::{Digest, Sha256};
use zeroize::{Zeroize, Zeroizing};

use super::error::KeyRingError;
use super::records::Records;

const TITLE: &str = "keyfold key ring, format ";
const FORMAT: u32 = 1;
const CLEAR: &str = "NONE - for development only: whoever reads this file has the keys";

/// The longest header that any parameters give is well below.
pub(super) const HEADER_BYTES_MAX: usize = 512;

/// Bounds on what a header may demand, so that a file put in the key ring's place can neither fill the memory
/// nor keep the processor busy for minutes.
const MEMORY_KIB: std::ops::RangeInclusive<u32> = 8 * 1024..=1024 * 1024;
const PASSES: std::ops::RangeInclusive<u32> = 1..=10;
const LANES: std::ops::RangeInclusive<u32> = 1..=16;

/// What stands between the file and its keys.
#[derive(Clone, PartialEq, Eq)]
pub(super) enum Guard {
    /// A passphrase, through Argon2id.
    Argon2id { memory_kib: u32, passes: u32, lanes: u32, salt: [u8; 16] },
    /// Nothing.
    Clear,
}

impl Guard {
    /// The guard of a new key ring. The memory and passes of RFC 9106's second choice; one lane, as one
    /// thread computes them.
    pub(super) fn argon2id(salt: [u8; 16]) -> Self {
        Self::Argon2id { memory_kib: 64 * 1024, passes: 3, lanes: 1, salt }
    }

    /// The first two lines of a file with this guard: what its envelope and its digest bind.
    fn lines(&self) -> String {
        let protection = match self {
            Self::Argon2id { memory_kib, passes, lanes, salt } => {
                let salt = hex(salt);
                format!("argon2id memory_kib={memory_kib} passes={passes} lanes={lanes} salt={salt}")
            }
            Self::Clear => CLEAR.to_owned(),
        };
        format!("{TITLE}{FORMAT}\nprotection: {protection}\n")
    }

    fn parse(text: &str) -> Option<Self> {
        if text == CLEAR {
            return Some(Self::Clear);
        }
        let mut words = text.strip_prefix("argon2id ")?.split(' ');
        let mut number = |name: &str| words.next()?.strip_prefix(name)?.strip_prefix('=')?.parse().ok();
        let (memory_kib, passes, lanes) = (number("memory_kib")?, number("passes")?, number("lanes")?);
        let salt = unhex(words.next()?.strip_prefix("salt=")?)?;
        Some(Self::Argon2id { memory_kib, passes, lanes, salt })
    }
}

/// The key of an encrypted file. Argon2id is slow on purpose, so it is kept as long as the guard is the same.
pub(super) struct FileKey {
    guard: Guard,
    key: DataKey,
}

impl FileKey {
    /// Derives the file's key from the passphrase: a tenth of a second or more.
    pub(super) fn derive(guard: &Guard, passphrase: &SecretString) -> Result<Self, KeyRingError> {
        let invalid = || KeyRingError::System("the parameters of its key derivation are not valid");
        let Guard::Argon2id { memory_kib, passes, lanes, salt } = guard else { return Err(invalid()) };
        let params = Params::new(*memory_kib, *passes, *lanes, Some(32)).map_err(|_| invalid())?;
        let blocks = params.block_count();
        let mut memory: Vec<Block> = Vec::new();
        memory
            .try_reserve_exact(blocks)
            .map_err(|_| KeyRingError::System("there is no memory for the key derivation"))?;
        memory.resize(blocks, Block::new());
        let mut raw = Zeroizing::new([0; 32]);
        let passphrase = passphrase.expose_secret().as_bytes();
        let hashed = Argon2::new(Algorithm::Argon2id, Version::V0x13, params).hash_password_into_with_memory(
            passphrase,
            salt,
            &mut *raw,
            &mut memory[..],
        );
        // The last block is all that the key is computed from.
        memory.zeroize();
        hashed.map_err(|_| invalid())?;
        let material = KeyMaterial::from_mut(&mut *raw).map_err(|_| invalid())?;
        // The salt is random and as long as an id, and a key is known by it.
        Ok(Self { guard: guard.clone(), key: DataKey::new(DataKeyId::from_bytes(*salt), material) })
    }

    /// The guard of the files that this key opens.
    pub(super) fn guard(&self) -> &Guard {
        &self.guard
    }

    /// Whether this is the key of files with `guard`.
    pub(super) fn fits(&self, guard: &Guard) -> bool {
        self.guard == *guard
    }
}

/// A whole and undamaged file. Whether its payload opens is not known yet.
pub(super) struct Parsed<'a> {
    pub(super) guard: Guard,
    payload: &'a [u8],
}

/// Reads the header and checks the digest. `path` is for the error's text.
pub(super) fn parse<'a>(path: &Path, bytes: &'a [u8]) -> Result<Parsed<'a>, KeyRingError> {
    let owned = || path.to_owned();
    let damaged = |detail| KeyRingError::damaged(path, detail);
    if bytes.is_empty() {
        return Err(KeyRingError::Empty { path: owned() });
    }
    if !bytes.starts_with(&TITLE.as_bytes()[..TITLE.len().min(bytes.len())]) {
        return Err(KeyRingError::Foreign { path: owned() });
    }
    let mut rest = bytes;
    let mut line = || {
        let end = rest.iter().take(HEADER_BYTES_MAX).position(|byte| *byte == b'\n');
        let Some(end) = end else {
            let whole = rest.len() >= HEADER_BYTES_MAX;
            return Err(if whole {
                damaged("a header line does not end")
            } else {
                KeyRingError::Truncated { path: owned() }
            });
        };
        let line = std::str::from_utf8(&rest[..end]).map_err(|_| damaged("its header is not text"))?;
        rest = &rest[end + 1..];
        Ok(line)
    };
    let format = line()?.strip_prefix(TITLE).and_then(|format| format.parse().ok());
    match format.ok_or_else(|| damaged("its first line"))? {
        FORMAT => {}
        format if format > FORMAT => return Err(KeyRingError::NewerFormat { path: owned(), format }),
        _ => return Err(damaged("its first line")),
    }
    let guard = line()?.strip_prefix("protection: ").and_then(Guard::parse);
    let guard = guard.ok_or_else(|| damaged("its line about the protection"))?;
    let size = line()?.strip_prefix("payload: ").and_then(|size| size.split_once(' '));
    let payload_bytes: usize = size
        .and_then(|(bytes, _)| bytes.parse().ok())
        .ok_or_else(|| damaged("its line about the payload"))?;
    let payload = rest;
    if payload.len() < payload_bytes {
        return Err(KeyRingError::Truncated { path: owned() });
    }
    // Lengths, digest and spelling of the header in one: only what `assemble` writes is taken.
    if header(&guard, payload).as_bytes() != &bytes[..bytes.len() - payload.len()] {
        return Err(damaged("its digest does not fit"));
    }
    check_demands(&guard).map_err(damaged)?;
    Ok(Parsed { guard, payload })
}

impl Parsed<'_> {
    /// Opens the payload. `key` is the file's key where its guard has one.
    pub(super) fn records(&self, path: &Path, key: Option<&FileKey>) -> Result<Records, KeyRingError> {
        let damaged = |detail| KeyRingError::damaged(path, detail);
        match key {
            None => Records::decode(self.payload).map_err(damaged),
            Some(key) => match envelope::open(&key.key, &binding(&self.guard)?, self.payload) {
                Ok(payload) => Records::decode(&payload).map_err(damaged),
                Err(OpenError::ContextMismatch) => {
                    Err(KeyRingError::WrongPassphrase { path: path.to_owned() })
                }
                Err(_) => Err(damaged("its payload does not open")),
            },
        }
    }
}

/// The bytes of a file with these records. `key` belongs to `guard`; `salt` is fresh random bytes.
pub(super) fn assemble(
    guard: &Guard,
    key: Option<&FileKey>,
    salt: Salt,
    records: &Records,
) -> Result<Zeroizing<Vec<u8>>, KeyRingError> {
    let mut payload = records.encode()?;
    if let Some(FileKey { key, .. }) = key {
        let sealed = envelope::seal(key, salt, &WrappedKeys::compact(), &binding(guard)?, &payload);
        payload = Zeroizing::new(sealed.map_err(|_| KeyRingError::Full)?);
    }
    let header = header(guard, &payload);
    let mut file = Zeroizing::new(Vec::with_capacity(header.len() + payload.len()));
    file.extend_from_slice(header.as_bytes());
    file.extend_from_slice(&payload);
    Ok(file)
}

fn header(guard: &Guard, payload: &[u8]) -> String {
    let lines = guard.lines();
    let digest = Sha256::new().chain_update(&lines).chain_update(payload).finalize();
    format!("{lines}payload: {} bytes, sha-256 {}\n", payload.len(), hex(&digest))
}

/// The context that binds the header to the payload: nobody can swap in another protection unnoticed.
fn binding(guard: &Guard) -> Result<EncryptionContext, KeyRingError> {
    let mut context = EncryptionContext::new();
    context
        .insert("keyfold:keyring", guard.lines())
        .map_err(|_| KeyRingError::System("its header is too long"))?;
    Ok(context)
}

fn check_demands(guard: &Guard) -> Result<(), &'static str> {
    let Guard::Argon2id { memory_kib, passes, lanes, .. } = guard else { return Ok(()) };
    if MEMORY_KIB.contains(memory_kib) && PASSES.contains(passes) && LANES.contains(lanes) {
        Ok(())
    } else {
        Err("its key derivation asks for more than 1 GiB, 10 passes or 16 lanes, or for less than 8 MiB")
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |text, byte| text + &format!("{byte:02x}"))
}

/// Lenient about spelling: the header is compared with its one spelling afterwards.
fn unhex(text: &str) -> Option<[u8; 16]> {
    let number = u128::from_str_radix(text, 16).ok()?;
    Some(number.to_be_bytes())
}

/// Whether the second line of a file's head is that of a key ring without encryption.
pub(super) fn says_clear(head: &[u8]) -> bool {
    let mut lines = head.split(|byte| *byte == b'\n');
    lines.next().is_some_and(|line| line.starts_with(TITLE.as_bytes()))
        && lines.next().is_some_and(|line| line.ends_with(CLEAR.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse_error(bytes: &[u8]) -> KeyRingError {
        match parse(Path::new("ring"), bytes) {
            Ok(_) => panic!("taken"),
            Err(error) => error,
        }
    }

    fn clear_file() -> Zeroizing<Vec<u8>> {
        assemble(&Guard::Clear, None, [0; 24], &Records::default()).unwrap()
    }

    #[test]
    fn a_header_that_demands_too_much_is_refused_before_any_key_is_derived() {
        for (memory_kib, passes, lanes) in [
            (100 << 20, 3, 1),
            (u32::MAX, 3, 1),
            (64 << 10, 11, 1),
            (64 << 10, u32::MAX, 1),
            (64 << 10, 3, 17),
            (64 << 10, 3, 0),
            (64 << 10, 0, 1),
            (8, 3, 1),
        ] {
            let guard = Guard::Argon2id { memory_kib, passes, lanes, salt: [1; 16] };
            let file = header(&guard, b"payload") + "payload";
            let error = parse_error(file.as_bytes()).to_string();
            assert!(error.contains("its key derivation asks for"), "{error}");
        }
    }

    #[test]
    fn a_clear_file_says_so_in_words() {
        let file = clear_file();
        let text = String::from_utf8_lossy(&file);
        assert!(
            text.starts_with("keyfold key ring, format 1\nprotection: NONE - for development only"),
            "{text}"
        );
    }

    #[test]
    fn a_header_has_one_spelling() {
        let guard = Guard::argon2id([0x0a; 16]);
        let file = header(&guard, b"payload") + "payload";
        assert!(parse(Path::new("ring"), file.as_bytes()).is_ok());
        for (from, to) in [
            ("=3 ", "=+3 "),
            ("=3 ", "=03 "),
            ("salt=0a", "salt=0A"),
            ("salt=0a", "salt=a"),
            (" 7 b", " 07 b"),
        ] {
            let other = file.replacen(from, to, 1);
            assert_ne!(other, file);
            assert!(matches!(parse_error(other.as_bytes()), KeyRingError::Damaged { .. }), "{other}");
        }
    }

    #[test]
    fn a_later_format_asks_for_a_newer_keyfold() {
        let file = String::from_utf8_lossy(&clear_file()).replacen("format 1", "format 2", 1);
        assert!(matches!(parse_error(file.as_bytes()), KeyRingError::NewerFormat { format: 2, .. }));
    }

    #[test]
    fn the_payload_is_bound_to_the_protection_that_the_header_names() {
        let passphrase = SecretString::from("correct horse battery");
        let small = |passes| Guard::Argon2id { memory_kib: 8 << 10, passes, lanes: 1, salt: [1; 16] };
        let key = FileKey::derive(&small(1), &passphrase).unwrap();
        let file = assemble(&small(1), Some(&key), [0; 24], &Records::default()).unwrap();
        let path = Path::new("ring");
        let parsed = parse(path, &file).unwrap();
        assert!(parsed.records(path, Some(&key)).is_ok());
        let other = Parsed { guard: small(2), payload: parsed.payload };
        assert!(matches!(other.records(path, Some(&key)), Err(KeyRingError::WrongPassphrase { .. })));
    }
    /// Whoever changes the file can make its digest fit; what holds then is the envelope.
    #[test]
    fn a_changed_payload_with_a_fitting_digest_does_not_open() {
        let guard = Guard::Argon2id { memory_kib: 8 << 10, passes: 1, lanes: 1, salt: [1; 16] };
        let key = FileKey::derive(&guard, &SecretString::from("correct horse battery")).unwrap();
        let path = Path::new("ring");
        let file = assemble(&guard, Some(&key), [0; 24], &Records::default()).unwrap();
        let payload = parse(path, &file).unwrap().payload;
        for at in 0..payload.len() {
            let mut changed = payload.to_vec();
            changed[at] ^= 1;
            let file = [header(&guard, &changed).as_bytes(), &changed].concat();
            let opened = parse(path, &file).unwrap().records(path, Some(&key));
            assert!(
                matches!(opened, Err(KeyRingError::WrongPassphrase { .. } | KeyRingError::Damaged { .. })),
                "byte {at}"
            );
        }
    }
}
