//! The registry in one SQLite file: the embedded default.
//!
//! SQLite has one writer at a time, so there is one connection that writes and a few that read; in WAL mode neither
//! waits for the other. Every change is one `IMMEDIATE` transaction: it takes the write lock before it looks, so
//! what it decides on cannot change under it, in this process or another. `synchronous=FULL` makes each commit
//! survive a power cut.

mod api_keys;
mod deks;
mod denials;
mod failure;
mod file;
mod grants;
mod rotation;
mod schema;
mod tenants;

use std::path::Path;
use std::time::Duration;

use async_trait::async_trait;
use envelope::DataKeyId;
use sqlx::sqlite::{SqliteConnectOptions, SqlitePool, SqlitePoolOptions, SqliteSynchronous};
use sqlx::{ConnectOptions, Sqlite, Transaction};

use super::{
    Activation, ApiKeyRecord, Change, DekRecord, DekScope, DekState, KekDenial, KeyRecord, Store, StoreError,
    StoredDek, TenantRecord, Usage, WrappedRecord, sql,
};
use crate::clock::Timestamp;
use crate::tenant::{KekId, KeyName, TenantId};

/// How the SQLite registry is opened.
#[derive(Clone, Debug)]
pub struct SqliteOptions {
    /// The most connections that read. They open when they are needed and close when they are idle; each is a
    /// thread and up to a megabyte of pages.
    pub readers_max: u32,
    /// How long a call waits for its turn, and for another process to finish writing, before it is
    /// [`StoreError::Unavailable`].
    pub wait_max: Duration,
}

impl Default for SqliteOptions {
    /// Two readers, five seconds.
    fn default() -> Self {
        Self { readers_max: 2, wait_max: Duration::from_secs(5) }
    }
}

/// How long a reader lives without work.
const READER_IDLE_MAX: Duration = Duration::from_mins(1);

/// The most that a connection caches of the file: the hot data keys are in the pool, not here.
const CACHE_KIB_MAX: u32 = 1024;

/// What the log beside the database may keep of its size once its content is in the database.
const WAL_KEPT_BYTES_MAX: u32 = 4 << 20;

/// A registry in a SQLite file.
pub struct SqliteStore {
    /// One connection, opened once: writes queue here rather than in SQLite, where they would poll.
    writer: SqlitePool,
    readers: SqlitePool,
}

impl SqliteStore {
    /// Opens the registry in this file, and makes it first (0600, empty) where there is none. Its folder has to
    /// exist. Brings an older schema up to date; several processes may do so at once.
    ///
    /// What is there is never overwritten: a file that is not a registry, is damaged, or can be reached by other
    /// users of the machine is [`StoreError::Unusable`], one of a newer program [`StoreError::NewerSchema`].
    pub async fn open(path: &Path, options: SqliteOptions) -> Result<Self, StoreError> {
        file::prepare(path, &options).await?;
        let connect = connect_options(&options).filename(path);
        let pool = |connections_max| {
            SqlitePoolOptions::new()
                .max_connections(connections_max)
                .acquire_timeout(options.wait_max)
                .max_lifetime(None)
                .test_before_acquire(false)
        };
        let writer = pool(1).idle_timeout(None).connect_lazy_with(connect.clone());
        let readers = pool(options.readers_max.max(1))
            .idle_timeout(READER_IDLE_MAX)
            // A reader that tried to write is a fault in this program: SQLite refuses it.
            .connect_lazy_with(connect.pragma("query_only", "ON"));
        let store = Self { writer, readers };
        match store.make_ready(&options).await {
            Ok(()) => Ok(store),
            Err(error) => {
                store.close().await;
                Err(failure::at(path, error))
            }
        }
    }

    /// A registry that lives in memory and is gone with this value: for tests.
    pub async fn in_memory() -> Result<Self, StoreError> {
        let options = SqliteOptions::default();
        let connect = connect_options(&options).in_memory(true);
        // Each connection would have a database of its own, so one does all.
        let only = SqlitePoolOptions::new()
            .max_connections(1)
            .idle_timeout(None)
            .max_lifetime(None)
            .connect_lazy_with(connect);
        let store = Self { writer: only.clone(), readers: only };
        let mut connection = store.writer.acquire().await.map_err(failure::of)?;
        schema::migrate(&mut connection).await?;
        drop(connection);
        Ok(store)
    }

    async fn make_ready(&self, options: &SqliteOptions) -> Result<(), StoreError> {
        let mut connection = self.writer.acquire().await.map_err(failure::of)?;
        // Before the first change, which is the one to WAL mode: another program's database stays as it is.
        schema::refuse_what_is_not_ours(&mut connection).await?;
        schema::use_wal(&mut connection, options.wait_max).await?;
        schema::migrate(&mut connection).await
    }

    /// Begins a change: takes SQLite's write lock at once.
    async fn change(&self) -> Result<Transaction<'static, Sqlite>, StoreError> {
        self.writer.begin_with("BEGIN IMMEDIATE").await.map_err(failure::of)
    }
}

/// What every connection has in common.
fn connect_options(options: &SqliteOptions) -> SqliteConnectOptions {
    SqliteConnectOptions::new()
        .create_if_missing(false)
        .busy_timeout(options.wait_max)
        .foreign_keys(true)
        .synchronous(SqliteSynchronous::Full)
        // What is destroyed is overwritten in the file, and not only unlinked.
        .pragma("secure_delete", "ON")
        .pragma("cache_size", format!("-{CACHE_KIB_MAX}"))
        .pragma("journal_size_limit", WAL_KEPT_BYTES_MAX.to_string())
        // A file that somebody else has written to must not run functions through its schema, nor lead SQLite
        // beyond the end of a damaged page.
        .pragma("trusted_schema", "OFF")
        .pragma("cell_size_check", "ON")
        // Our own errors tell what happened; a line for each statement would cost more than it.
        .disable_statement_logging()
}

/// Each method in its file: `tenants` has keys too, `deks` the wrapped forms and the usage.
#[async_trait]
impl Store for SqliteStore {
    async fn insert_tenant(&self, tenant: &TenantRecord) -> Result<(), StoreError> {
        tenants::insert_tenant(self, tenant).await
    }

    async fn insert_tenant_with_key(&self, tenant: &TenantRecord, key: &KeyRecord) -> Result<(), StoreError> {
        tenants::insert_tenant_with_key(self, tenant, key).await
    }

    async fn tenant(&self, id: &TenantId) -> Result<Option<TenantRecord>, StoreError> {
        tenants::tenant(self, id).await
    }

    async fn tenants(&self, after: Option<&TenantId>, limit: u32) -> Result<Vec<TenantRecord>, StoreError> {
        tenants::tenants(self, after, limit).await
    }

    async fn update_tenant(&self, record: &TenantRecord) -> Result<(), StoreError> {
        tenants::update_tenant(self, record).await
    }

    async fn insert_key(&self, key: &KeyRecord) -> Result<(), StoreError> {
        tenants::insert_key(self, key).await
    }

    async fn key(&self, tenant: &TenantId, name: &KeyName) -> Result<Option<KeyRecord>, StoreError> {
        tenants::key(self, tenant, name).await
    }

    async fn keys(
        &self,
        tenant: &TenantId,
        after: Option<&KeyName>,
        limit: u32,
    ) -> Result<Vec<KeyRecord>, StoreError> {
        tenants::keys(self, tenant, after, limit).await
    }

    async fn count_keys(&self, tenant: &TenantId) -> Result<u64, StoreError> {
        tenants::count_keys(self, tenant).await
    }

    async fn update_key(&self, record: &KeyRecord) -> Result<(), StoreError> {
        tenants::update_key(self, record).await
    }

    async fn activate_dek(
        &self,
        predecessor: Option<DataKeyId>,
        new: &DekRecord,
        wrapped: &[WrappedRecord],
    ) -> Result<Activation, StoreError> {
        deks::activate(self, predecessor, new, wrapped).await
    }

    async fn insert_next_dek(
        &self,
        next: &DekRecord,
        wrapped: &[WrappedRecord],
    ) -> Result<Activation, StoreError> {
        deks::insert_next(self, next, wrapped).await
    }

    async fn promote_next_dek(
        &self,
        scope: &DekScope,
        predecessor: DataKeyId,
        now: Timestamp,
    ) -> Result<Option<StoredDek>, StoreError> {
        deks::promote_next(self, scope, predecessor, now).await
    }

    async fn active_dek(&self, scope: &DekScope) -> Result<Option<StoredDek>, StoreError> {
        deks::active(self, scope).await
    }

    async fn next_dek(&self, scope: &DekScope) -> Result<Option<StoredDek>, StoreError> {
        deks::next(self, scope).await
    }

    async fn dek(&self, id: DataKeyId) -> Result<Option<StoredDek>, StoreError> {
        deks::dek(self, id).await
    }

    async fn deks(
        &self,
        tenant: &TenantId,
        key: &KeyName,
        after: Option<DataKeyId>,
        limit: u32,
    ) -> Result<Vec<StoredDek>, StoreError> {
        deks::deks(self, tenant, key, after, limit).await
    }

    async fn bound_scopes(&self, tenant: &TenantId) -> Result<u64, StoreError> {
        deks::bound_scopes(self, tenant).await
    }

    async fn set_dek_state(
        &self,
        id: DataKeyId,
        from: DekState,
        to: DekState,
        now: Timestamp,
    ) -> Result<(), StoreError> {
        deks::set_state(self, id, from, to, now).await
    }

    async fn put_wrapped(&self, id: DataKeyId, wrapped: &WrappedRecord) -> Result<(), StoreError> {
        deks::put_wrapped(self, id, wrapped).await
    }

    async fn remove_wrapped(&self, id: DataKeyId, kek: &KekId) -> Result<(), StoreError> {
        deks::remove_wrapped(self, id, kek).await
    }

    async fn add_usage(&self, usage: &[Usage]) -> Result<(), StoreError> {
        deks::add_usage(self, usage).await
    }

    async fn insert_api_key(&self, key: &ApiKeyRecord) -> Result<(), StoreError> {
        api_keys::insert(self, key).await
    }

    async fn api_key(&self, id: &str) -> Result<Option<ApiKeyRecord>, StoreError> {
        api_keys::api_key(self, id).await
    }

    async fn api_keys(
        &self,
        tenant: Option<&TenantId>,
        after: Option<&str>,
        limit: u32,
    ) -> Result<Vec<ApiKeyRecord>, StoreError> {
        api_keys::api_keys(self, tenant, after, limit).await
    }

    async fn revoke_api_key(&self, id: &str, now: Timestamp) -> Result<(), StoreError> {
        api_keys::revoke(self, id, now).await
    }

    async fn release_api_key(&self, id: &str, tenant: &TenantId) -> Result<(), StoreError> {
        api_keys::release(self, id, tenant).await
    }

    async fn count_api_keys(&self, tenant: &TenantId, now: Timestamp) -> Result<u64, StoreError> {
        api_keys::count(self, tenant, now).await
    }

    async fn changes(&self, after: u64) -> Result<Vec<Change>, StoreError> {
        tenants::changes(self, after).await
    }

    async fn note_denial(
        &self,
        kek: &KekId,
        now: Timestamp,
        forget_before: Timestamp,
    ) -> Result<u64, StoreError> {
        denials::note(self, kek, now, forget_before).await
    }

    async fn denials(&self, after: u64) -> Result<Vec<KekDenial>, StoreError> {
        denials::after(self, after).await
    }

    async fn ping(&self) -> Result<(), StoreError> {
        // Reads a page of the file: `SELECT 1` would not notice that it is gone.
        sqlx::query(sql::PING).fetch_optional(&self.readers).await.map(drop).map_err(failure::of)
    }

    async fn close(&self) {
        // The writer last: the last connection moves the log into the database and removes it.
        self.readers.close().await;
        self.writer.close().await;
    }
}

#[cfg(test)]
mod tests {
    use sqlx::{Executor, Row, SqlSafeStr};

    use super::*;

    #[tokio::test]
    async fn every_statement_prepares() {
        let store = SqliteStore::in_memory().await.unwrap();
        for (name, statement) in sql::ALL {
            let prepared = store.writer.prepare(statement.into_sql_str()).await;
            assert!(prepared.is_ok(), "{name}: {:?}", prepared.err());
        }
    }

    /// A statement that reads a whole table is fast in every test and stops the service that has grown.
    #[tokio::test]
    async fn no_statement_reads_a_whole_table() {
        let store = SqliteStore::in_memory().await.unwrap();
        let mut plans = std::collections::BTreeMap::new();
        for (name, statement) in sql::ALL.iter().filter(|(name, _)| *name != "PING") {
            let explain = sqlx::AssertSqlSafe(format!("EXPLAIN QUERY PLAN {statement}"));
            for row in store.writer.fetch_all(sqlx::query(explain)).await.unwrap() {
                let step: String = row.get("detail");
                // These are subqueries: one page of records, whose number the limit bounds.
                let one_page = ["SCAN t", "SCAN d", "SCAN a"].contains(&step.as_str());
                assert!(!step.starts_with("SCAN") || one_page, "{name}: {step}");
                plans.entry(*name).or_insert_with(Vec::new).push(step);
            }
        }
        // The ones where the primary key serves as well, and would make the statement read everybody's rows.
        for (name, expected) in [
            ("ACTIVE_DEK", "USING INDEX deks_one_active (tenant=? AND key_name=? AND bound_context=?)"),
            (
                "ACTIVE_DEK_ID",
                "USING COVERING INDEX deks_one_active (tenant=? AND key_name=? AND bound_context=?)",
            ),
            (
                "NEXT_DEK_ID",
                "USING COVERING INDEX deks_one_next (tenant=? AND key_name=? AND bound_context=?)",
            ),
            ("DEKS", "USING INDEX deks_by_key (tenant=? AND key_name=? AND id>?)"),
            ("GRANTS_OF_TENANT", "USING INDEX grants_by_tenant (tenant=? AND id>?)"),
            ("API_KEYS_OF_TENANT", "USING COVERING INDEX api_key_tenants_by_tenant (tenant=? AND api_key>?)"),
        ] {
            assert!(plans[name].iter().any(|step| step.contains(expected)), "{name}: {:?}", plans[name]);
        }
    }

    #[tokio::test]
    async fn the_settings_that_durability_rests_on_are_really_on() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("registry.db");
        let store = SqliteStore::open(&path, SqliteOptions::default()).await.unwrap();
        for (pool, query_only) in [(&store.writer, 0), (&store.readers, 1)] {
            let mode: String = pool.fetch_one("PRAGMA journal_mode").await.unwrap().get(0);
            assert_eq!(mode, "wal");
            for (pragma, value) in [
                ("PRAGMA synchronous", 2),
                ("PRAGMA foreign_keys", 1),
                ("PRAGMA busy_timeout", 5_000),
                ("PRAGMA secure_delete", 1),
                ("PRAGMA trusted_schema", 0),
                ("PRAGMA cell_size_check", 1),
                ("PRAGMA cache_size", -1_024),
                ("PRAGMA journal_size_limit", 4 << 20),
                ("PRAGMA query_only", query_only),
            ] {
                let found: i64 = pool.fetch_one(pragma).await.unwrap().get(0);
                assert_eq!(found, value, "{pragma}");
            }
        }
        store.close().await;
    }
}
