//! What can be wrong with a key ring, said to the operator.

use std::io;
use std::path::{Path, PathBuf};

use crate::clock::Timestamp;
use crate::tenant::{InvalidName, KekId};

/// Why the key ring did not do what it was asked. Each text says what is wrong, where, and what to do; none
/// holds key material. Whatever the error, the file is whole: the old one or, where only making a change durable
/// failed, the new one.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KeyRingError {
    /// A new key ring was asked for where there is a file already.
    #[error(
        "there is a file at {path} already, and it was left as it is: use it as the key ring, or name \
         another place"
    )]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// There is no file.
    #[error(
        "there is no key ring at {path}: make one with `keyfold keyring init`, or put the backup back in \
         place"
    )]
    Missing {
        /// Where it was looked for.
        path: PathBuf,
    },
    /// The name is a folder's, a link's or a device's.
    #[error("{path} is not a regular file: name the key ring's file itself, not a link or a folder")]
    NotAFile {
        /// What was named.
        path: PathBuf,
    },
    /// Others than the owner have rights on the file.
    #[error(
        "the key ring {path} is open to others than its owner (mode {mode:03o}): find out who may have read \
         it, then run `chmod 600 {path}`"
    )]
    Loose {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// The file has no byte in it.
    #[error("the key ring {path} is empty: put the backup back in place")]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// The file is something else.
    #[error("{path} is not a keyfold key ring: name the right file")]
    Foreign {
        /// The file.
        path: PathBuf,
    },
    /// A later keyfold wrote the file.
    #[error(
        "the key ring {path} has format {format}, and this keyfold reads format 1 only: use a newer keyfold"
    )]
    NewerFormat {
        /// The file.
        path: PathBuf,
        /// The format that it says it has.
        format: u32,
    },
    /// The end of the file is missing.
    #[error("the key ring {path} is cut short: put the backup back in place")]
    Truncated {
        /// The file.
        path: PathBuf,
    },
    /// The file is not what keyfold wrote.
    #[error("the key ring {path} is damaged or was tampered with ({detail}): put the backup back in place")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Where it is wrong.
        detail: &'static str,
    },
    /// The file is whole, and its payload does not open.
    #[error(
        "the passphrase does not open the key ring {path}: give the one that it was made with (or that was \
         right before somebody replaced the file)"
    )]
    WrongPassphrase {
        /// The file.
        path: PathBuf,
    },
    /// The file is encrypted and no passphrase was given.
    #[error(
        "the key ring {path} is encrypted and no passphrase was given: set KEYFOLD_KEYRING_PASSPHRASE or \
         name a passphrase file (--dev opens key rings without a passphrase only)"
    )]
    PassphraseMissing {
        /// The file.
        path: PathBuf,
    },
    /// The file is not encrypted, and a passphrase was given.
    #[error(
        "the key ring {path} is NOT encrypted (it was made with --dev), so it is not taken in earnest: make \
         a new one with `keyfold keyring init`, or use this one with --dev, without a passphrase"
    )]
    NotEncrypted {
        /// The file.
        path: PathBuf,
    },
    /// The passphrase for a new key ring is too easy to guess.
    #[error(
        "the passphrase is too short: give at least {PASSPHRASE_CHARS_MIN} characters, such as the output \
         of `openssl rand -base64 24`"
    )]
    ShortPassphrase,
    /// Another process holds the key ring's lock.
    #[error("another process is changing the key ring: try again when it is done (lock file {path})")]
    Busy {
        /// The lock file.
        path: PathBuf,
    },
    /// The process does not run as the file's owner, so that its new version would belong to somebody else.
    #[error(
        "the key ring {path} belongs to user {owner}: run this command as that user, or the server cannot \
         read it"
    )]
    OtherOwner {
        /// The file.
        path: PathBuf,
        /// The owner's user id.
        owner: u32,
    },
    /// The payload would be larger than what is read back.
    #[error(
        "the key ring is full: it holds at most {PAYLOAD_MIB_MAX} MiB; start another one for further KEKs"
    )]
    Full,
    /// The system failed.
    #[error("cannot {action} {path}: {source}")]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// The system gave no random bytes, or no memory for the key derivation, or is shutting down.
    #[error("the key ring cannot work now: {0}")]
    System(&'static str),
    /// A KEK's name is not valid.
    #[error(transparent)]
    Name(#[from] InvalidName),
    /// There is no such KEK.
    #[error(
        "there is no KEK {0} in the key ring: see `keyfold keyring list`, or add it with `keyfold keyring \
         add`"
    )]
    UnknownKek(KekId),
    /// The name is taken.
    #[error("there is a KEK {0} in the key ring already: choose another name, or rotate it for new material")]
    KekExists(KekId),
    /// The KEK must be enabled for that.
    #[error("the KEK {0} is disabled: enable it first")]
    KekDisabled(KekId),
    /// The KEK waits for its deletion.
    #[error("the KEK {0} is to be deleted at {1}: cancel the deletion first")]
    KekPendingDeletion(KekId, Timestamp),
    /// There is no deletion to cancel.
    #[error("the KEK {0} is not to be deleted: there is nothing to cancel")]
    KekNotPending(KekId),
    /// The waiting time is out of range.
    #[error("a deletion waits 7 to 30 days: give a time in that range")]
    WaitingTime,
}

/// The fewest characters of a new key ring's passphrase.
pub(super) const PASSPHRASE_CHARS_MIN: usize = 12;

/// The most mebibytes that a key ring's payload may have, so that a file put in its place cannot fill the
/// memory.
pub(super) const PAYLOAD_MIB_MAX: usize = 16;

impl KeyRingError {
    /// A call to the system that failed at `path`.
    pub(super) fn io(path: &Path, action: &'static str, source: impl Into<io::Error>) -> Self {
        Self::Io { path: path.to_owned(), action, source: source.into() }
    }

    /// A file that keyfold did not write as it is.
    pub(super) fn damaged(path: &Path, detail: &'static str) -> Self {
        Self::Damaged { path: path.to_owned(), detail }
    }
}
