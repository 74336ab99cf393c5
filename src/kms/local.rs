//! The embedded key ring: a KMS in one file, for those who have no other.
//!
//! It has a KMS's semantics (named KEKs that never leave it, versions, states, a waiting time before a
//! deletion) and not its protection: whoever has the file and its passphrase, or reads this process's memory,
//! has the KEKs. `docs/keyring.md` tells operators so.
//!
//! Administration and service may be different processes on one file. Each change is made under a lock on the
//! file as it then is, and replaces it in one step; each call of the [`Kms`] looks whether the file is still
//! the one that was read, and reads it again otherwise.
//!
//! A file that has changed and cannot be read makes every call an [`KmsError::Outage`]: the KEKs of the old
//! file are not used for longer. The change may have been that a KEK was disabled or deleted, and a service
//! that goes on with what it remembers would ignore that; data keys already in memory go on for as long as an
//! outage allows.

mod disk;
mod error;
mod format;
mod keys;
mod records;
mod ring_file;

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use envelope::{EncryptionContext, KeyMaterial};
use secrecy::{ExposeSecret, SecretString};

use self::disk::Lock;
use self::keys::Keys;
use self::records::{RecordState, Records};
use self::ring_file::{RingFile, new_material, new_version, random};
use super::{Generated, KekDescription, Kms, KmsError, Urgency, Wrapped};
use crate::clock::{Clock, Timestamp};
use crate::tenant::{InvalidName, Kek, KekId};

pub use self::error::KeyRingError;
pub use self::records::{KekInfo, KekVersionInfo};

/// How long a change waits for another one: a change takes well below a second.
const LOCK_TRIES: u32 = 200;
const LOCK_PAUSE: Duration = Duration::from_millis(50);

/// What protects a key ring's file beside its permissions.
#[derive(Clone)]
pub enum Protection {
    /// It is encrypted under this passphrase.
    Passphrase(SecretString),
    /// It is not encrypted: for development only.
    Dev,
}

/// A key ring file in use. Clones share it.
#[derive(Clone)]
pub struct LocalKeyRing(Arc<RingFile>);

impl fmt::Debug for LocalKeyRing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LocalKeyRing").field("path", &self.0.path).finish_non_exhaustive()
    }
}

impl LocalKeyRing {
    /// Makes an empty key ring: a file for its owner only (0600), in a folder that is made (0700) if it is
    /// missing. Never touches a file that is there.
    pub async fn create(
        path: impl Into<PathBuf>,
        protection: Protection,
        clock: Clock,
    ) -> Result<Self, KeyRingError> {
        if let Protection::Passphrase(passphrase) = &protection {
            long_enough(passphrase)?;
        }
        let ring = Self::at(path, protection, clock);
        let file = ring.0.clone();
        blocking(move || {
            if file.path.symlink_metadata().is_ok() {
                return Err(KeyRingError::Exists { path: file.path.clone() });
            }
            disk::make_folder(&file.path)
        })
        .await?;
        let lock = ring.lock(LOCK_TRIES).await?;
        let file = ring.0.clone();
        blocking(move || file.create(&lock)).await?;
        Ok(ring)
    }

    /// Opens a key ring, and reads it in order to know that it can be read.
    pub async fn open(
        path: impl Into<PathBuf>,
        protection: Protection,
        clock: Clock,
    ) -> Result<Self, KeyRingError> {
        let ring = Self::at(path, protection, clock);
        ring.keys().await?;
        Ok(ring)
    }

    /// Whether the file says of itself that it is a key ring without encryption, made for development. False where
    /// it cannot be read: opening it tells why.
    pub fn is_unencrypted(path: &Path) -> bool {
        disk::read_head(path, format::HEADER_BYTES_MAX).is_some_and(|head| format::says_clear(&head))
    }

    /// The key ring's file.
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// All KEKs, by name.
    pub async fn list(&self) -> Result<Vec<KekInfo>, KeyRingError> {
        let file = self.0.clone();
        blocking(move || file.list()).await
    }

    /// Adds a KEK. `name` is `NAME` or `local:NAME`, here and below.
    pub async fn add(&self, name: &str) -> Result<KekInfo, KeyRingError> {
        self.change(name, |records, id, now| records.add(id, new_version(now)?)).await
    }

    /// Gives a KEK new material, which wraps from now on; what older material wrapped still opens.
    pub async fn rotate(&self, name: &str) -> Result<KekInfo, KeyRingError> {
        self.change(name, |records, id, now| records.rotate(id, new_version(now)?)).await
    }

    /// Lets a KEK not be used until it is enabled again.
    pub async fn disable(&self, name: &str) -> Result<KekInfo, KeyRingError> {
        self.change(name, |records, id, _| records.switch(id, RecordState::Disabled)).await
    }

    /// Lets a disabled KEK be used again.
    pub async fn enable(&self, name: &str) -> Result<KekInfo, KeyRingError> {
        self.change(name, |records, id, _| records.switch(id, RecordState::Enabled)).await
    }

    /// Deletes a KEK for good `after` a waiting time of 7 to 30 days, in which it cannot be used and the
    /// deletion can be cancelled. Then everything that only this KEK opens is lost.
    pub async fn schedule_deletion(&self, name: &str, after: Duration) -> Result<KekInfo, KeyRingError> {
        self.change(name, move |records, id, now| records.schedule_deletion(id, after, now)).await
    }

    /// Takes a scheduled deletion back. The KEK is then disabled.
    pub async fn cancel_deletion(&self, name: &str) -> Result<KekInfo, KeyRingError> {
        self.change(name, |records, id, _| records.cancel_deletion(id)).await
    }

    /// Encrypts the file under another passphrase. Processes that have it open with the former one can read it until
    /// they next look at it, and then not any more: restart them with the new one.
    pub async fn change_passphrase(&self, new: &str) -> Result<(), KeyRingError> {
        let new = SecretString::from(new);
        long_enough(&new)?;
        let file = self.0.clone();
        blocking(move || disk::read(&file.path).map(drop)).await?;
        let lock = self.lock(LOCK_TRIES).await?;
        let file = self.0.clone();
        blocking(move || file.change_passphrase(&lock, &new)).await
    }

    fn at(path: impl Into<PathBuf>, protection: Protection, clock: Clock) -> Self {
        Self(Arc::new(RingFile::new(path.into(), protection, clock)))
    }

    async fn change<C>(&self, name: &str, change: C) -> Result<KekInfo, KeyRingError>
    where
        C: FnOnce(&mut Records, &KekId, Timestamp) -> Result<KekInfo, KeyRingError> + Send + 'static,
    {
        let id = kek_id(name)?;
        self.update(LOCK_TRIES, move |records, now| change(records, &id, now)).await
    }

    /// Changes the file under the lock. Runs to its end once it has begun, even if nobody waits for it any
    /// more.
    async fn update<T: Send + 'static>(
        &self,
        lock_tries: u32,
        change: impl FnOnce(&mut Records, Timestamp) -> Result<T, KeyRingError> + Send + 'static,
    ) -> Result<T, KeyRingError> {
        let file = self.0.clone();
        // A key ring that cannot be read is refused before a lock file is left beside it.
        blocking(move || disk::read(&file.path).map(drop)).await?;
        let lock = self.lock(lock_tries).await?;
        let file = self.0.clone();
        blocking(move || file.update(&lock, change)).await
    }

    async fn lock(&self, tries: u32) -> Result<Lock, KeyRingError> {
        for _ in 1..tries {
            let file = self.0.clone();
            if let Some(lock) = blocking(move || disk::try_lock(&file.path)).await? {
                return Ok(lock);
            }
            tokio::time::sleep(LOCK_PAUSE).await;
        }
        let file = self.0.clone();
        let busy = || KeyRingError::Busy { path: disk::lock_path(&self.0.path) };
        blocking(move || disk::try_lock(&file.path)).await?.ok_or_else(busy)
    }

    /// The KEKs as the file has them now.
    async fn keys(&self) -> Result<Arc<Keys>, KeyRingError> {
        let file = self.0.clone();
        let (keys, deleted) = blocking(move || file.keys()).await?;
        if deleted > 0 {
            // Gone from memory already; a file that cannot be written now loses them with its next change.
            match self.update(1, |_, _| Ok(())).await {
                Ok(()) => tracing::info!(keks = deleted, "KEKs deleted: their waiting time is over"),
                Err(error) => tracing::warn!(%error, "KEKs whose waiting time is over are still in the file"),
            }
        }
        Ok(keys)
    }

    async fn keys_for(&self, kek: &Kek) -> Result<Arc<Keys>, KmsError> {
        self.keys().await.map_err(|error| KmsError::outage(&kek.id, error.to_string()))
    }
}

#[async_trait]
impl Kms for LocalKeyRing {
    async fn generate(
        &self,
        kek: &Kek,
        context: &EncryptionContext,
        urgency: Urgency,
    ) -> Result<Generated, KmsError> {
        let plaintext = new_material().map_err(|error| KmsError::outage(&kek.id, error.to_string()))?;
        let wrapped = self.wrap(kek, context, &plaintext, urgency).await?;
        Ok(Generated { plaintext, wrapped })
    }

    async fn wrap(
        &self,
        kek: &Kek,
        context: &EncryptionContext,
        plaintext: &KeyMaterial,
        _urgency: Urgency,
    ) -> Result<Wrapped, KmsError> {
        let salt = random().map_err(|error| KmsError::outage(&kek.id, error.to_string()))?;
        self.keys_for(kek).await?.enabled(&kek.id)?.wrap(context, plaintext, salt)
    }

    async fn unwrap(
        &self,
        kek: &Kek,
        context: &EncryptionContext,
        blob: &[u8],
        _urgency: Urgency,
    ) -> Result<KeyMaterial, KmsError> {
        self.keys_for(kek).await?.enabled(&kek.id)?.unwrap(context, blob)
    }

    async fn rewrap(
        &self,
        from: &Kek,
        to: &Kek,
        context: &EncryptionContext,
        blob: &[u8],
        _urgency: Urgency,
    ) -> Result<Wrapped, KmsError> {
        let salt = random().map_err(|error| KmsError::outage(&to.id, error.to_string()))?;
        let keys = self.keys_for(from).await?;
        let (from, to) = (keys.enabled(&from.id)?, keys.enabled(&to.id)?);
        to.wrap(context, &from.unwrap(context, blob)?, salt)
    }

    async fn describe(&self, kek: &Kek, _urgency: Urgency) -> Result<KekDescription, KmsError> {
        self.keys_for(kek).await?.describe(&kek.id)
    }
}

fn long_enough(passphrase: &SecretString) -> Result<(), KeyRingError> {
    let chars = passphrase.expose_secret().chars().count();
    if chars < error::PASSPHRASE_CHARS_MIN { Err(KeyRingError::ShortPassphrase) } else { Ok(()) }
}

fn kek_id(name: &str) -> Result<KekId, InvalidName> {
    format!("local:{}", name.strip_prefix("local:").unwrap_or(name)).parse()
}

/// Files and key derivation block: not on the threads that serve requests.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, KeyRingError> + Send + 'static,
) -> Result<T, KeyRingError> {
    tokio::task::spawn_blocking(work).await.unwrap_or(Err(KeyRingError::System(
        "its work was interrupted: the service is stopping, or see the log",
    )))
}
