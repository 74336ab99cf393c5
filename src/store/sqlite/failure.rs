//! What a failure of SQLite means to a caller of the store.

use std::path::Path;

use crate::store::StoreError;

// Primary result codes of SQLite, which are the lower byte of the extended ones (https://sqlite.org/rescode.html).
const SQLITE_BUSY: i32 = 5;
const SQLITE_READONLY: i32 = 8;
const SQLITE_CORRUPT: i32 = 11;
const SQLITE_FULL: i32 = 13;
const SQLITE_NOTADB: i32 = 26;

/// Sorts a failure: collision, missing reference, damage; all else may pass, and is [`StoreError::Unavailable`].
pub(super) fn of(error: sqlx::Error) -> StoreError {
    let sqlx::Error::Database(database) = &error else {
        return match error {
            // What a column holds is not of the column's type.
            sqlx::Error::ColumnDecode { .. } | sqlx::Error::Decode(_) | sqlx::Error::ColumnNotFound(_) => {
                StoreError::Unreadable(error.to_string().into())
            }
            sqlx::Error::PoolTimedOut => {
                StoreError::Unavailable("every connection to the database is busy".into())
            }
            sqlx::Error::PoolClosed => StoreError::Unavailable("the service is stopping".into()),
            other => StoreError::Unavailable(other.to_string().into()),
        };
    };
    let message = database.message();
    if database.is_unique_violation() || database.is_check_violation() {
        return StoreError::Conflict(message.into());
    }
    if database.is_foreign_key_violation() {
        return StoreError::Missing("record that the new one refers to".into());
    }
    match primary_code(&error) {
        Some(SQLITE_CORRUPT) => StoreError::Unusable(
            format!("the database is damaged ({message}): stop the service and restore a backup").into(),
        ),
        Some(SQLITE_NOTADB) => StoreError::Unusable(
            format!("the file is not a SQLite database ({message}): restore a backup, or name another file")
                .into(),
        ),
        Some(SQLITE_BUSY) => {
            StoreError::Unavailable(format!("another process holds the write lock ({message})").into())
        }
        Some(SQLITE_FULL) => StoreError::Unavailable(format!("the disk is full ({message})").into()),
        Some(SQLITE_READONLY) => {
            StoreError::Unavailable(format!("the file or its folder cannot be written ({message})").into())
        }
        _ => StoreError::Unavailable(error.to_string().into()),
    }
}

/// Whether somebody else holds a lock that this call needs.
pub(super) fn is_busy(error: &sqlx::Error) -> bool {
    primary_code(error) == Some(SQLITE_BUSY)
}

fn primary_code(error: &sqlx::Error) -> Option<i32> {
    let code: i32 = error.as_database_error()?.code()?.parse().ok()?;
    Some(code & 0xff)
}

/// The same failure, telling which file it is about: for errors at start, which an operator reads.
pub(super) fn at(path: &Path, error: StoreError) -> StoreError {
    let with_path = |text: &str| format!("{}: {text}", path.display()).into();
    match error {
        StoreError::Unusable(text) => StoreError::Unusable(with_path(&text)),
        StoreError::Unavailable(text) => StoreError::Unavailable(with_path(&text)),
        other => other,
    }
}

/// Where the database says that something is there already: names it.
pub(super) fn naming(
    taken: impl FnOnce() -> String,
    missing: impl FnOnce() -> String,
) -> impl FnOnce(sqlx::Error) -> StoreError {
    move |error| match error.as_database_error() {
        Some(database) if database.is_unique_violation() => StoreError::Conflict(taken().into()),
        Some(database) if database.is_foreign_key_violation() => StoreError::Missing(missing().into()),
        _ => of(error),
    }
}
