//! The schema: WAL mode and migrations.

use std::time::Duration;

use sqlx::migrate::{MigrateError, Migration, MigrationType, Migrator};
use sqlx::{Connection, Row, SqlSafeStr, SqliteConnection};

use super::failure;
use crate::store::StoreError;

/// Every migration, oldest first: number, name, text.
const MIGRATIONS: [(i64, &str, &str); 4] = [
    (1, "registry", include_str!("../../../migrations/sqlite/0001_registry.sql")),
    (2, "rotation", include_str!("../../../migrations/sqlite/0002_rotation.sql")),
    (3, "grants", include_str!("../../../migrations/sqlite/0003_grants.sql")),
    (4, "kek_denials", include_str!("../../../migrations/sqlite/0004_kek_denials.sql")),
];

/// A name of our own, so that a database of another program that uses sqlx is not taken for a registry.
const MIGRATIONS_TABLE: &str = "keyfold_migrations";

const USER_TABLES: &str =
    "SELECT name FROM sqlite_schema WHERE type = 'table' AND name NOT LIKE 'sqlite\\_%' ESCAPE '\\'";
const NEWEST_MIGRATION: &str = "SELECT max(version) AS newest FROM keyfold_migrations";

const WAL_RETRY: Duration = Duration::from_millis(10);

/// Puts the database into WAL mode, where it stays. A registry that this program made is in it from the start; one
/// restored by `VACUUM INTO` is not.
pub(super) async fn use_wal(connection: &mut SqliteConnection, wait_max: Duration) -> Result<(), StoreError> {
    let switched = async {
        loop {
            // SQLite does not wait for other connections here as it does elsewhere.
            match sqlx::query("PRAGMA journal_mode = WAL").fetch_one(&mut *connection).await {
                Err(error) if failure::is_busy(&error) => tokio::time::sleep(WAL_RETRY).await,
                result => return result,
            }
        }
    };
    let row = tokio::time::timeout(wait_max, switched)
        .await
        .map_err(|_| StoreError::Unavailable("another process keeps the database locked".into()))?
        .map_err(failure::of)?;
    let mode: String = row.try_get(0).map_err(failure::of)?;
    if mode != "wal" {
        let why = "its file system cannot share memory between processes, which WAL mode needs: put the registry on \
                   a local disk";
        return Err(StoreError::Unusable(why.into()));
    }
    Ok(())
}

/// Brings the schema up to date, or refuses: all in one transaction that holds the write lock, so that of two
/// processes that start at once the second finds the work done.
pub(super) async fn migrate(connection: &mut SqliteConnection) -> Result<(), StoreError> {
    let mut change = connection.begin_with("BEGIN IMMEDIATE").await.map_err(failure::of)?;
    // Again, now that nobody else can migrate in between.
    refuse_what_is_not_ours(&mut change).await?;
    let mut migrator = Migrator::with_migrations(
        MIGRATIONS
            .into_iter()
            .map(|(number, name, text)| {
                Migration::new(number, name.into(), MigrationType::Simple, text.into_sql_str(), false)
            })
            .collect(),
    );
    migrator.dangerous_set_table_name(MIGRATIONS_TABLE);
    migrator.run_direct(None, &mut *change, false).await.map_err(not_migrated)?;
    change.commit().await.map_err(failure::of)
}

/// Refuses a database of another program, or of a newer keyfold. One without tables is a registry to be.
pub(super) async fn refuse_what_is_not_ours(connection: &mut SqliteConnection) -> Result<(), StoreError> {
    let tables = sqlx::query(USER_TABLES).fetch_all(&mut *connection).await.map_err(failure::of)?;
    if tables.is_empty() {
        return Ok(());
    }
    let ours = tables.iter().any(|row| row.try_get(0).is_ok_and(|name: String| name == MIGRATIONS_TABLE));
    if !ours {
        let why = "it is a SQLite database of another program: name another file for the registry";
        return Err(StoreError::Unusable(why.into()));
    }
    let row = sqlx::query(NEWEST_MIGRATION).fetch_one(connection).await.map_err(failure::of)?;
    let found = row.try_get::<Option<i64>, _>("newest").map_err(failure::of)?.unwrap_or(0);
    let known = MIGRATIONS.iter().map(|(number, ..)| *number).max().unwrap_or(0);
    if found > known {
        return Err(StoreError::NewerSchema { found, known });
    }
    Ok(())
}

fn not_migrated(error: MigrateError) -> StoreError {
    match error {
        MigrateError::Execute(error) | MigrateError::ExecuteMigration(error, _) => failure::of(error),
        MigrateError::VersionMismatch(number) => StoreError::Unusable(
            format!(
                "its schema was made by another build of keyfold (step {number} differs): run that build, or restore \
                 a backup"
            )
            .into(),
        ),
        other => StoreError::Unusable(format!("its schema cannot be brought up to date: {other}").into()),
    }
}
