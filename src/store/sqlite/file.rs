//! The file: made whole or not at all, never overwritten, and not for others to read.

use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use sqlx::{ConnectOptions, Connection};

use super::{SqliteOptions, connect_options, failure, schema};
use crate::store::StoreError;

const MAGIC: &[u8; 16] = b"SQLite format 3\0";

const OTHERS: u32 = 0o007;
const OTHERS_WRITE: u32 = 0o002;

/// Sees to it that there is a registry at this path and that it is safe to open.
///
/// The calls on files here block; they are few and happen once, before the service answers anybody.
pub(super) async fn prepare(path: &Path, options: &SqliteOptions) -> Result<(), StoreError> {
    check_folder(folder_of(path))?;
    // In this order: another process that makes the registry right now makes the file first, the log later.
    let log = beside(path, "-wal");
    let log_holds_changes = fs::metadata(&log).is_ok_and(|log| log.len() > 0);
    match fs::metadata(path) {
        Ok(found) => check_file(path, &found, log_holds_changes),
        Err(error) if error.kind() == io::ErrorKind::NotFound && log_holds_changes => {
            // SQLite would replay this log into a new database: the wrong pages in the wrong file.
            let why = format!(
                "it is gone, but its log {} is there: put the database back beside it, or move the log away as well",
                log.display()
            );
            Err(unusable(path, why))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => create(path, options).await,
        Err(error) => Err(unusable(path, error)),
    }
}

/// Whoever can write into the folder can put a forged log beside the database, which SQLite then replays.
fn check_folder(folder: &Path) -> Result<(), StoreError> {
    let found = fs::metadata(folder).map_err(|error| {
        unusable(
            folder,
            format!("the folder of the registry cannot be used ({error}): make it, with mode 0700"),
        )
    })?;
    if found.mode() & OTHERS_WRITE != 0 {
        let why = "every user of this machine can write into the folder of the registry: use a folder of its own, \
                   with mode 0700";
        return Err(unusable(folder, why));
    }
    Ok(())
}

/// No secret stands in the registry in plain, and yet others are kept out: who reads it sees which tenants there
/// are, their encryption contexts and all wrapped keys, a treasure for the day on which a KEK leaks; who writes to
/// it can copy an API key's hash into a row with more tenants and verbs. So access by others is refused and not
/// warned about: a warning in a log is read after the harm. The group may have access, because that is how
/// container platforms hand a volume to a service (`fsGroup` makes files 0660).
fn check_file(path: &Path, found: &Metadata, log_holds_changes: bool) -> Result<(), StoreError> {
    if !found.is_file() {
        return Err(unusable(path, "it is not a file"));
    }
    if found.mode() & OTHERS != 0 {
        let why = format!(
            "every user of this machine has access to it (mode {:04o}): run chmod 600 {}, and if others may have \
             read it, see docs/registry.md",
            found.mode() & 0o7777,
            path.display()
        );
        return Err(unusable(path, why));
    }
    if found.len() == 0 {
        // A new registry is never empty: see `create`.
        let why = "it is empty, so its content was lost: restore a backup, or remove the file to start anew";
        return Err(unusable(path, why));
    }
    // https://sqlite.org/fileformat.html: the magic, then the size of a page in two bytes, where 1 means 65,536.
    let mut start = [0; MAGIC.len() + 2];
    match File::open(path).and_then(|mut file| file.read_exact(&mut start)) {
        Err(error) if error.kind() != io::ErrorKind::UnexpectedEof => return Err(unusable(path, error)),
        Ok(()) if start.starts_with(MAGIC) => {}
        _ => {
            return Err(unusable(
                path,
                "it is not a SQLite database: restore a backup, or name another file",
            ));
        }
    }
    let page_bytes = match u16::from_be_bytes([start[16], start[17]]) {
        0 => 1,
        1 => 1 << 16,
        bytes => u64::from(bytes),
    };
    // SQLite notices missing pages itself, but fills up a last page that is incomplete. Where there is a log, a
    // copying that was interrupted may have left one, and the log has it whole.
    if !log_holds_changes && !found.len().is_multiple_of(page_bytes) {
        return Err(unusable(path, "it was cut off in the middle of a page: restore a backup"));
    }
    Ok(())
}

/// Makes an empty registry under another name and gives it its own when it is complete and on disk. So nobody
/// meets half a registry, a crash leaves none, and of two processes that start at once one wins and the other uses
/// what that one made.
async fn create(path: &Path, options: &SqliteOptions) -> Result<(), StoreError> {
    let draft =
        beside(path, &format!(".{:016x}.new", getrandom::u64().map_err(|error| unusable(path, error))?));
    // SQLite makes the log and the shared memory with the mode that the database has.
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&draft)
        .map_err(|error| unusable(path, format!("it cannot be made ({error})")))?;
    let made = fill(&draft, options).await.map_err(|error| failure::at(path, error)).and_then(|()| {
        match fs::hard_link(&draft, path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            other => other.map_err(|error| unusable(path, format!("it cannot be made ({error})"))),
        }
    });
    // Where this fails too, an empty registry of that name stays behind and does no harm.
    let removed = fs::remove_file(&draft);
    made?;
    removed
        .and_then(|()| File::open(folder_of(path))?.sync_all())
        .map_err(|error| unusable(path, format!("it cannot be made to last ({error})")))
}

async fn fill(draft: &Path, options: &SqliteOptions) -> Result<(), StoreError> {
    let mut connection = connect_options(options).filename(draft).connect().await.map_err(failure::of)?;
    let made = match schema::use_wal(&mut connection, options.wait_max).await {
        Ok(()) => schema::migrate(&mut connection).await,
        Err(error) => Err(error),
    };
    // Moves the log into the file and removes it.
    connection.close().await.map_err(failure::of)?;
    made?;
    File::open(draft)
        .and_then(|file| file.sync_all())
        .map_err(|error| StoreError::Unavailable(error.to_string().into()))
}

fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

fn unusable(path: &Path, why: impl std::fmt::Display) -> StoreError {
    StoreError::Unusable(format!("{}: {why}", path.display()).into())
}
