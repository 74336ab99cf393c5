//! One key ring's file and what is remembered of it.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use envelope::{DataKeyId, KeyMaterial};
use secrecy::{ExposeSecret, SecretString};
use zeroize::Zeroizing;

use super::Protection;
use super::disk::{self, Held, Lock};
use super::error::KeyRingError;
use super::format::{self, FileKey, Guard, Parsed};
use super::keys::Keys;
use super::records::{KekInfo, Records, VersionRecord};
use crate::clock::{Clock, Timestamp};

/// A key ring's file. Every call blocks.
pub(super) struct RingFile {
    pub(super) path: PathBuf,
    protection: Protection,
    clock: Clock,
    memory: Mutex<Memory>,
}

/// What is remembered of the file.
#[derive(Default)]
struct Memory {
    reading: Option<(Held, Arc<Keys>)>,
    file_key: Option<FileKey>,
}

impl RingFile {
    pub(super) fn new(path: PathBuf, protection: Protection, clock: Clock) -> Self {
        Self { path, protection, clock, memory: Mutex::default() }
    }

    /// All KEKs, by name.
    pub(super) fn list(&self) -> Result<Vec<KekInfo>, KeyRingError> {
        let (_, _, mut records) = self.read(&mut self.memory())?;
        records.delete_due(self.clock.now());
        Ok(records.0.iter().map(|(id, kek)| kek.info(id)).collect())
    }

    fn memory(&self) -> MutexGuard<'_, Memory> {
        // What is remembered is put in place whole, so a panic elsewhere cannot leave half of it.
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The KEKs as the file has them now, and how many of them the file has for the last time. One thread
    /// reads, and those who come meanwhile wait for it.
    pub(super) fn keys(&self) -> Result<(Arc<Keys>, usize), KeyRingError> {
        let mut memory = self.memory();
        let now = self.clock.now();
        if let Some((held, keys)) = &memory.reading
            && held.is_current(&self.path)
            && !keys.deletion_is_due(now)
        {
            return Ok((keys.clone(), 0));
        }
        memory.reading = None;
        let (held, _, mut records) = self.read(&mut memory)?;
        let deleted = records.delete_due(now);
        let keys = Arc::new(Keys::new(records));
        memory.reading = Some((held, keys.clone()));
        Ok((keys, deleted))
    }

    fn read(&self, memory: &mut Memory) -> Result<(Held, Guard, Records), KeyRingError> {
        let reading = disk::read(&self.path)?;
        let parsed = format::parse(&self.path, &reading.bytes)?;
        let key = self.file_key(&parsed, memory)?;
        let records = parsed.records(&self.path, key)?;
        Ok((reading.held, parsed.guard, records))
    }

    /// The key for this file, if the protection is of the file's kind.
    fn file_key<'a>(
        &self,
        parsed: &Parsed<'_>,
        memory: &'a mut Memory,
    ) -> Result<Option<&'a FileKey>, KeyRingError> {
        let path = || self.path.clone();
        match (&parsed.guard, &self.protection) {
            (Guard::Clear, Protection::Dev) => Ok(None),
            // Otherwise whoever can replace the file could have data keys wrapped under KEKs of his own.
            (Guard::Clear, Protection::Passphrase(_)) => Err(KeyRingError::NotEncrypted { path: path() }),
            (Guard::Argon2id { .. }, Protection::Passphrase(passphrase))
                if !passphrase.expose_secret().is_empty() =>
            {
                if !memory.file_key.as_ref().is_some_and(|key| key.fits(&parsed.guard)) {
                    memory.file_key = Some(FileKey::derive(&parsed.guard, passphrase)?);
                }
                Ok(memory.file_key.as_ref())
            }
            (Guard::Argon2id { .. }, _) => Err(KeyRingError::PassphraseMissing { path: path() }),
        }
    }

    /// Makes the file, with no KEK in it.
    pub(super) fn create(&self, _lock: &Lock) -> Result<(), KeyRingError> {
        let key = match &self.protection {
            Protection::Dev => None,
            Protection::Passphrase(passphrase) => {
                Some(FileKey::derive(&Guard::argon2id(random()?), passphrase)?)
            }
        };
        let guard = key.as_ref().map_or(Guard::Clear, |key| key.guard().clone());
        let bytes = format::assemble(&guard, key.as_ref(), random()?, &Records::default())?;
        disk::create(&self.path, &bytes)?;
        self.memory().file_key = key;
        Ok(())
    }

    /// Encrypts the file as it is now under another passphrase, with a fresh salt, in one step.
    pub(super) fn change_passphrase(&self, _lock: &Lock, new: &SecretString) -> Result<(), KeyRingError> {
        let mut memory = self.memory();
        let (held, guard, records) = self.read(&mut memory)?;
        if matches!(guard, Guard::Clear) {
            // Its KEKs have lain there for everybody: a passphrase now would only look like protection.
            return Err(KeyRingError::NotEncrypted { path: self.path.clone() });
        }
        let key = FileKey::derive(&Guard::argon2id(random()?), new)?;
        let bytes = format::assemble(key.guard(), Some(&key), random()?, &records)?;
        disk::replace(&self.path, &bytes, &held)?;
        // This process goes on: the key that it holds is the new one.
        memory.file_key = Some(key);
        Ok(())
    }

    /// Changes the file as it is now, in one step.
    pub(super) fn update<T>(
        &self,
        _lock: &Lock,
        change: impl FnOnce(&mut Records, Timestamp) -> Result<T, KeyRingError>,
    ) -> Result<T, KeyRingError> {
        let mut memory = self.memory();
        let (held, guard, mut records) = self.read(&mut memory)?;
        let now = self.clock.now();
        records.delete_due(now);
        let outcome = change(&mut records, now)?;
        let key = memory.file_key.as_ref().filter(|key| key.fits(&guard));
        let bytes = format::assemble(&guard, key, random()?, &records)?;
        disk::replace(&self.path, &bytes, &held)?;
        Ok(outcome)
    }
}

/// Fresh random bytes.
pub(super) fn random<const N: usize>() -> Result<[u8; N], KeyRingError> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(|_| KeyRingError::System("the system gives no random bytes"))?;
    Ok(bytes)
}

/// A new random key.
pub(super) fn new_material() -> Result<KeyMaterial, KeyRingError> {
    let mut raw = Zeroizing::new([0; 32]);
    let filled = getrandom::fill(&mut *raw).ok().and_then(|()| KeyMaterial::from_mut(&mut *raw).ok());
    filled.ok_or(KeyRingError::System("the system gives no random bytes"))
}

/// A new version of a KEK.
pub(super) fn new_version(now: Timestamp) -> Result<VersionRecord, KeyRingError> {
    let unix_ms = u64::try_from(now.unix_ms()).unwrap_or(0);
    let id = uuid::Builder::from_unix_timestamp_millis(unix_ms, &random()?).into_uuid();
    Ok(VersionRecord {
        id: DataKeyId::from_bytes(id.into_bytes()),
        created_at: now,
        material: new_material()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A derivation takes a tenth of a second and 64 MiB: not at each change of the file.
    #[test]
    fn the_key_is_derived_once_for_a_salt() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("keyring");
        let clock = Clock::manual(Timestamp::from_unix_ms(0));
        let with = |passphrase: &str| {
            RingFile::new(path.clone(), Protection::Passphrase(SecretString::from(passphrase)), clock.clone())
        };
        let (mut server, admin) = (with("correct horse battery"), with("correct horse battery"));
        let lock = disk::try_lock(&path).unwrap().unwrap();
        admin.create(&lock).unwrap();
        server.keys().unwrap();
        // Deriving again would now give another key.
        server.protection = Protection::Passphrase(SecretString::from("forgotten"));
        admin.update(&lock, |_, _| Ok(())).unwrap();
        assert!(server.keys().is_ok());
        server.memory().file_key = None;
        admin.update(&lock, |_, _| Ok(())).unwrap();
        assert!(matches!(server.keys(), Err(KeyRingError::WrongPassphrase { .. })));
    }
}
