//! The key ring's file on disk: read with its permissions checked, replaced in one step, changed by one at a
//! time.
//!
//! Every call here blocks.

use std::ffi::OsString;
use std::fs::{DirBuilder, File, Metadata};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use zeroize::Zeroizing;

use super::error::{KeyRingError, PAYLOAD_MIB_MAX};

const FILE_BYTES_MAX: u64 = (PAYLOAD_MIB_MAX as u64 + 1) << 20;
const OWNER_ONLY: Mode = Mode::RUSR.union(Mode::WUSR);
/// No link is followed: replacing would put a file in the link's place and leave its target as it was.
/// NONBLOCK, as opening a pipe would wait for ever.
const OPEN_FLAGS: OFlags = OFlags::CLOEXEC.union(OFlags::NOFOLLOW).union(OFlags::NONBLOCK);

/// What tells one state of the file from another. Replacing it gives another inode (as long as somebody has
/// the old one open, its number is not used again); writing into it moves its times or its size; a `chmod`
/// moves `changed`.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Stamp {
    device_inode: (u64, u64),
    written: (i64, i64),
    changed: (i64, i64),
    bytes: u64,
}

impl Stamp {
    fn of(metadata: &Metadata) -> Self {
        Self {
            device_inode: (metadata.dev(), metadata.ino()),
            written: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
            bytes: metadata.size(),
        }
    }
}

/// What was read of the file.
pub(super) struct Reading {
    pub(super) bytes: Zeroizing<Vec<u8>>,
    pub(super) held: Held,
}

/// A file that was read, held open: while this lives, no other file has its inode number.
pub(super) struct Held {
    _file: File,
    owner: u32,
    stamp: Stamp,
}

impl Held {
    /// Whether the file at `path` is still this one, unchanged.
    pub(super) fn is_current(&self, path: &Path) -> bool {
        std::fs::symlink_metadata(path).is_ok_and(|metadata| Stamp::of(&metadata) == self.stamp)
    }
}

/// Reads the file, if it is a file that only its owner can touch.
pub(super) fn read(path: &Path) -> Result<Reading, KeyRingError> {
    let owned = || path.to_owned();
    let file =
        rustix::fs::open(path, OFlags::RDONLY | OPEN_FLAGS, Mode::empty()).map_err(|errno| match errno {
            Errno::NOENT => KeyRingError::Missing { path: owned() },
            Errno::LOOP | Errno::NXIO => KeyRingError::NotAFile { path: owned() },
            errno => KeyRingError::io(path, "open", errno),
        })?;
    let file = File::from(file);
    let metadata = file.metadata().map_err(|error| KeyRingError::io(path, "look at", error))?;
    if !metadata.is_file() {
        return Err(KeyRingError::NotAFile { path: owned() });
    }
    if metadata.mode() & 0o077 != 0 {
        return Err(KeyRingError::Loose { path: owned(), mode: metadata.mode() & 0o7777 });
    }
    // With room for one byte more, reading to the end never moves what it has read.
    let room = usize::try_from(metadata.size().min(FILE_BYTES_MAX)).unwrap_or(0) + 1;
    let mut bytes = Zeroizing::new(Vec::with_capacity(room));
    let read = (&file).take(FILE_BYTES_MAX).read_to_end(&mut bytes);
    read.map_err(|error| KeyRingError::io(path, "read", error))?;
    if bytes.len() as u64 >= FILE_BYTES_MAX {
        return Err(KeyRingError::damaged(path, "it is larger than any key ring"));
    }
    Ok(Reading { bytes, held: Held { _file: file, owner: metadata.uid(), stamp: Stamp::of(&metadata) } })
}

/// The first bytes of a file, whatever its permissions; none where it is not a file or cannot be read.
pub(super) fn read_head(path: &Path, bytes_max: usize) -> Option<Zeroizing<Vec<u8>>> {
    let file = File::from(rustix::fs::open(path, OFlags::RDONLY | OPEN_FLAGS, Mode::empty()).ok()?);
    if !file.metadata().ok()?.is_file() {
        return None;
    }
    // In a clear key ring its first keys are among them.
    let mut head = Zeroizing::new(Vec::with_capacity(bytes_max));
    file.take(bytes_max as u64).read_to_end(&mut head).ok()?;
    Some(head)
}

/// Writes a new file, and its folder (for the owner only) if that is missing. An existing file is left as it
/// is. The caller holds the lock.
pub(super) fn create(path: &Path, bytes: &[u8]) -> Result<(), KeyRingError> {
    let temporary = write_temporary(path, bytes, None)?;
    // Unlike a rename, a link never takes an existing file's place.
    let linked = std::fs::hard_link(&temporary, path);
    let removed = std::fs::remove_file(&temporary);
    linked.map_err(|error| match error.kind() {
        io::ErrorKind::AlreadyExists => KeyRingError::Exists { path: path.to_owned() },
        _ => KeyRingError::io(path, "create", error),
    })?;
    removed.map_err(|error| KeyRingError::io(&temporary, "remove", error))?;
    sync_folder(folder(path))?;
    // The folder may be new itself.
    sync_folder(folder(folder(path)))
}

/// Puts a new file in the place of the one that was read, in one step: whoever looks, also after a crash,
/// finds the old one or the new one, whole. The caller holds the lock.
pub(super) fn replace(path: &Path, bytes: &[u8], old: &Held) -> Result<(), KeyRingError> {
    let temporary = write_temporary(path, bytes, Some(old.owner))?;
    if let Err(error) = std::fs::rename(&temporary, path) {
        discard(&temporary);
        return Err(KeyRingError::io(path, "replace", error));
    }
    sync_folder(folder(path))
}

/// The folder that a key ring's file is in.
pub(super) fn folder(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        Some(_) => Path::new("."),
        None => Path::new("/"),
    }
}

/// Makes the key ring's folder, for its owner only. One that is there is left as it is.
pub(super) fn make_folder(path: &Path) -> Result<(), KeyRingError> {
    let folder = folder(path);
    let made = DirBuilder::new().recursive(true).mode(0o700).create(folder);
    made.map_err(|error| KeyRingError::io(folder, "make the folder", error))
}

/// The right to change the key ring, among all processes of this machine; given back when dropped, also by a
/// crash.
pub(super) struct Lock(#[expect(dead_code, reason = "held open")] File);

/// Takes the lock; none where somebody else has it.
pub(super) fn try_lock(path: &Path) -> Result<Option<Lock>, KeyRingError> {
    let path = lock_path(path);
    let flags = OFlags::RDWR | OFlags::CREATE | OPEN_FLAGS;
    let file = rustix::fs::open(&path, flags, OWNER_ONLY)
        .map_err(|errno| KeyRingError::io(&path, "open the lock file", errno))?;
    // The lock is on a file of its own: the key ring's file is another one after each change.
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(Lock(file.into()))),
        Err(Errno::WOULDBLOCK) => Ok(None),
        Err(errno) => Err(KeyRingError::io(&path, "lock", errno)),
    }
}

/// The lock file of a key ring.
pub(super) fn lock_path(path: &Path) -> PathBuf {
    beside(path, "", ".lock")
}

fn beside(path: &Path, before: &str, after: &str) -> PathBuf {
    let mut name = OsString::from(before);
    name.push(path.file_name().unwrap_or_default());
    name.push(after);
    path.with_file_name(name)
}

/// Writes the bytes durably to a file in the same folder, so that a rename can move it.
fn write_temporary(path: &Path, bytes: &[u8], owner: Option<u32>) -> Result<PathBuf, KeyRingError> {
    let temporary = beside(path, ".", ".new");
    // Its writer has died: the lock says that nobody else is at work.
    discard(&temporary);
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OPEN_FLAGS;
    let file = rustix::fs::open(&temporary, flags, OWNER_ONLY)
        .map_err(|errno| KeyRingError::io(&temporary, "create", errno))?;
    let mut file = File::from(file);
    let written = match owner {
        // The administrator's root shell would lock the server out, which runs as somebody else.
        Some(owner) if file.metadata().is_ok_and(|metadata| metadata.uid() != owner) => {
            Err(KeyRingError::OtherOwner { path: path.to_owned(), owner })
        }
        _ => file
            .write_all(bytes)
            .and_then(|()| file.sync_all())
            .map_err(|error| KeyRingError::io(&temporary, "write", error)),
    };
    if written.is_err() {
        discard(&temporary);
    }
    written.map(|()| temporary)
}

fn discard(temporary: &Path) {
    // Where it cannot be removed, creating it says so.
    let _ = std::fs::remove_file(temporary);
}

/// Without it, a power cut could bring the old file back after the caller was told that the change is made.
fn sync_folder(folder: &Path) -> Result<(), KeyRingError> {
    let synced = File::open(folder).and_then(|folder| folder.sync_all());
    synced.map_err(|error| KeyRingError::io(folder, "write to the disk the folder", error))
}
