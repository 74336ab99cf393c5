//! What is particular to the registry in a SQLite file: the file itself.

#![allow(clippy::unwrap_used, reason = "a test helper that fails is a failed test")]

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use async_trait::async_trait;
use keyfold::store::sqlite::{SqliteOptions, SqliteStore};
use keyfold::store::{Activation, DekState, Registry, Store, StoreError};
use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{ConnectOptions, Connection, Executor, Row, SqlSafeStr, SqliteConnection};
use tempfile::TempDir;
use tokio::task::JoinSet;

use crate::rotation_contract::{RotationFixture, rotation_contract};
use crate::store_contract::{
    Fixture, active, api_key, at, dek_id, form, key, key_name, next, scope, store_contract, tenant, tenant_id,
};

struct SqliteFile {
    folder: TempDir,
}

impl SqliteFile {
    fn path(&self) -> PathBuf {
        self.folder.path().join("registry.db")
    }
}

#[async_trait]
impl Fixture for SqliteFile {
    async fn fresh() -> Self {
        Self { folder: tempfile::tempdir().unwrap() }
    }

    async fn open(&self) -> Arc<dyn Store> {
        Arc::new(open(&self.path()).await.unwrap())
    }
}

#[async_trait]
impl RotationFixture for SqliteFile {
    async fn registry(&self) -> Arc<dyn Registry> {
        Arc::new(open(&self.path()).await.unwrap())
    }
}

mod contract {
    super::store_contract!(super::SqliteFile);
    super::rotation_contract!(super::SqliteFile);
}

async fn open(path: &Path) -> Result<SqliteStore, StoreError> {
    SqliteStore::open(path, SqliteOptions::default()).await
}

/// The database as any program sees it, past the store.
async fn raw(path: &Path) -> SqliteConnection {
    SqliteConnectOptions::new().filename(path).connect().await.unwrap()
}

async fn alter(path: &Path, sql: &'static str) {
    let mut connection = raw(path).await;
    connection.execute(sql).await.unwrap();
    connection.close().await.unwrap();
}

/// A registry with content, closed.
async fn registry() -> SqliteFile {
    let file = SqliteFile::fresh().await;
    let store = file.open().await;
    store.insert_tenant(&tenant("acme")).await.unwrap();
    store.insert_key(&key("acme", "default")).await.unwrap();
    for n in 1..60 {
        let scope = scope("acme", "default", &[("n", &n.to_string())]);
        store.activate_dek(None, &active(n, &scope), &[form("main", &[7; 200])]).await.unwrap();
    }
    store.insert_api_key(&api_key("k1", &["acme"])).await.unwrap();
    store.close().await;
    file
}

/// Opening says that the registry cannot be used, names the file, tells what to do, and changes nothing.
async fn assert_refused(path: &Path, tells: &[&str]) {
    let before = fs::read(path).ok();
    let refused = open(path).await.err().expect("it opened");
    let StoreError::Unusable(text) = &refused else { panic!("{refused:?}") };
    for part in tells.iter().chain(&[path.parent().unwrap().to_str().unwrap()]) {
        assert!(text.contains(part), "{part:?} is not in {text:?}");
    }
    assert_eq!(fs::read(path).ok(), before);
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

#[tokio::test]
async fn the_file_and_its_companions_are_for_the_owner_only() {
    let file = SqliteFile::fresh().await;
    let store = file.open().await;
    store.insert_tenant(&tenant("acme")).await.unwrap();
    let mut names = vec![];
    for entry in fs::read_dir(file.folder.path()).unwrap() {
        let entry = entry.unwrap();
        assert_eq!(mode(&entry.path()), 0o600, "{:?}", entry.path());
        names.push(entry.file_name().into_string().unwrap());
    }
    names.sort();
    assert_eq!(names, ["registry.db", "registry.db-shm", "registry.db-wal"]);
    store.close().await;
    assert_eq!(fs::read_dir(file.folder.path()).unwrap().count(), 1, "a clean end leaves the database alone");
}

#[tokio::test]
async fn access_by_others_is_refused_and_by_the_group_is_not() {
    let file = registry().await;
    let path = file.path();
    for loose in [0o604, 0o602, 0o601, 0o644, 0o666] {
        fs::set_permissions(&path, Permissions::from_mode(loose)).unwrap();
        assert_refused(&path, &["every user", "chmod 600", &format!("{loose:o}")]).await;
    }
    for fine in [0o600, 0o640, 0o660] {
        fs::set_permissions(&path, Permissions::from_mode(fine)).unwrap();
        open(&path).await.unwrap().close().await;
        assert_eq!(mode(&path), fine);
    }
    for loose in [0o777, 0o1777, 0o702] {
        fs::set_permissions(file.folder.path(), Permissions::from_mode(loose)).unwrap();
        assert_refused(&path, &["every user", "0700"]).await;
    }
    fs::set_permissions(file.folder.path(), Permissions::from_mode(0o755)).unwrap();
    open(&path).await.unwrap().close().await;
}

#[tokio::test]
async fn a_folder_that_is_not_there_is_not_made() {
    let file = SqliteFile::fresh().await;
    assert_refused(&file.folder.path().join("data/registry.db"), &["make it", "0700"]).await;
    assert_eq!(fs::read_dir(file.folder.path()).unwrap().count(), 0);
    fs::create_dir(file.path()).unwrap();
    assert_refused(&file.path(), &["not a file"]).await;
}

#[tokio::test]
async fn what_is_not_a_registry_is_refused_and_left_alone() {
    let file = SqliteFile::fresh().await;
    let path = file.path();
    for not_a_database in
        [&b"hello"[..], &[0; 5000], b"SQLite format 4\0 and then some more bytes that follow"]
    {
        fs::write(&path, not_a_database).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        assert_refused(&path, &["not a SQLite database", "restore a backup"]).await;
    }
    fs::write(&path, b"").unwrap();
    assert_refused(&path, &["empty", "restore a backup"]).await;

    // Another program's database, also one that uses the same migration library.
    fs::remove_file(&path).unwrap();
    let make = SqliteConnectOptions::new().filename(&path).create_if_missing(true);
    let mut connection = make.connect().await.unwrap();
    connection.execute("CREATE TABLE _sqlx_migrations (version INTEGER)").await.unwrap();
    connection.close().await.unwrap();
    fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
    assert_refused(&path, &["another program"]).await;
}

#[tokio::test]
async fn a_registry_of_a_newer_keyfold_is_refused() {
    let file = registry().await;
    let path = file.path();
    alter(
        &path,
        "INSERT INTO keyfold_migrations (version, description, success, checksum, execution_time) \
         VALUES (7, 'later', TRUE, x'00', 0)",
    )
    .await;
    let before = fs::read(&path).unwrap();
    let refused = open(&path).await.err().expect("it opened");
    assert!(matches!(refused, StoreError::NewerSchema { found: 7, known: 4 }), "{refused:?}");
    assert_eq!(fs::read(&path).unwrap(), before);
}

#[tokio::test]
async fn a_schema_of_another_build_is_refused() {
    let file = registry().await;
    alter(&file.path(), "UPDATE keyfold_migrations SET checksum = x'00'").await;
    assert_refused(&file.path(), &["another build", "step 1"]).await;
}

#[tokio::test]
async fn a_file_cut_anywhere_is_refused() {
    let file = registry().await;
    let whole = fs::read(file.path()).unwrap();
    assert!(whole.len() > 10 * 4096, "{}", whole.len());
    for length in [1, 15, 16, 100, 2000, 4096, 6000, 8192, whole.len() - 4096, whole.len() - 1] {
        fs::write(file.path(), &whole[..length]).unwrap();
        assert_refused(&file.path(), &["restore a backup"]).await;
    }
}

#[tokio::test]
async fn a_page_of_noise_is_an_error_and_not_a_wrong_answer() {
    let file = registry().await;
    let whole = fs::read(file.path()).unwrap();
    let intact = {
        let store = file.open().await;
        let all = store.deks(&tenant_id("acme"), &key_name("default"), None, 100).await.unwrap();
        store.close().await;
        all
    };
    let mut noticed = 0;
    for page in 1..whole.len() / 4096 {
        let mut damaged = whole.clone();
        damaged[page * 4096..][..4096].fill(0xa5);
        fs::write(file.path(), &damaged).unwrap();
        let found = match open(&file.path()).await {
            Ok(store) => {
                let found = store.deks(&tenant_id("acme"), &key_name("default"), None, 100).await;
                store.close().await;
                found
            }
            Err(error) => Err(error),
        };
        match found {
            Ok(found) => assert_eq!(found, intact, "page {page}"),
            Err(StoreError::Unusable(text)) => {
                assert!(text.contains("damaged") && text.contains("restore a backup"), "{text}");
                noticed += 1;
            }
            Err(other) => panic!("page {page}: {other:?}"),
        }
    }
    assert!(noticed >= 3, "{noticed}");
}

#[tokio::test]
async fn a_log_without_its_database_is_not_replayed_into_a_new_one() {
    let file = SqliteFile::fresh().await;
    let store = file.open().await;
    store.insert_tenant(&tenant("acme")).await.unwrap();
    let (path, log) = (file.path(), file.folder.path().join("registry.db-wal"));
    let saved = file.folder.path().join("saved");
    fs::copy(&log, &saved).unwrap();
    store.close().await;
    fs::remove_file(&path).unwrap();
    fs::rename(&saved, &log).unwrap();
    assert_refused(&path, &["registry.db-wal", "put the database back", "move the log away"]).await;
    assert!(!path.exists());
}

#[tokio::test]
async fn a_record_that_does_not_parse_is_named() {
    let cases = [
        ("UPDATE tenants SET id = 'ACME'", "tenants ACME"),
        ("DELETE FROM tenant_keks", "tenants acme"),
        ("UPDATE tenant_keks SET kek = 'dev'", "tenants acme"),
        ("UPDATE keys SET name = 'No'", "keys acme/No"),
        (
            "UPDATE deks SET bound_context = x'000100' WHERE id = x'01920000000000000000000000000005'",
            "deks 01920000-",
        ),
        (
            "UPDATE wrapped_forms SET kek = 'x' WHERE dek = x'01920000000000000000000000000005'",
            "-000000000005",
        ),
        ("UPDATE api_keys SET verbs = 'encrypt,everything'", "api_keys k1"),
        ("UPDATE api_keys SET verbs = 'decrypt,encrypt'", "api_keys k1"),
        ("UPDATE api_key_tenants SET tenant = '../acme'", "api_keys k1"),
    ];
    for (sql, named) in cases {
        let file = registry().await;
        let mut connection =
            SqliteConnectOptions::new().filename(file.path()).foreign_keys(false).connect().await.unwrap();
        assert!(connection.execute(sql).await.unwrap().rows_affected() > 0, "{sql}");
        connection.close().await.unwrap();
        let store = file.open().await;
        let (acme, default) = (tenant_id("acme"), key_name("default"));
        let errors: Vec<_> = [
            store.tenants(None, 9).await.err(),
            store.keys(&acme, None, 9).await.err(),
            store.deks(&acme, &default, None, 99).await.err(),
            store.api_keys(None, None, 9).await.err(),
        ]
        .into_iter()
        .flatten()
        .collect();
        let [StoreError::Unreadable(text)] = &errors[..] else { panic!("{sql}: {errors:?}") };
        assert!(text.contains(named), "{sql}: {text}");
        store.close().await;
    }
}

#[tokio::test]
async fn the_schema_holds_the_states_whoever_writes() {
    let file = registry().await;
    let mut connection = raw(&file.path()).await;
    let refused = [
        "UPDATE deks SET state = 'lost'",
        "UPDATE deks SET state = 'retired'",
        "UPDATE deks SET state = 'destroyed'",
        "UPDATE deks SET revoked_at = 1",
        "UPDATE deks SET messages = -1",
        "UPDATE deks SET bound_context = x'0000'",
        "UPDATE deks SET id = zeroblob(16) WHERE id = x'01920000000000000000000000000005'",
        "UPDATE wrapped_forms SET blob = x''",
        "UPDATE tenants SET status = 'Enabled'",
        "UPDATE tenants SET version = 'one'",
        "UPDATE api_keys SET secret_hash = x'00'",
        "DELETE FROM deks",
        "DELETE FROM keys",
        "DELETE FROM tenants",
        "INSERT INTO tenant_keks VALUES ('acme', 'ring', 1, 'local:main', NULL, NULL)",
        "INSERT INTO tenant_keks VALUES ('acme', 'ring', 8, 'local:other', NULL, NULL)",
        "INSERT INTO tenant_keks VALUES ('acme', 'ring', 1, 'local:other', NULL, 'external')",
    ];
    for sql in refused {
        let error = connection.execute(sql).await.expect_err(sql);
        assert!(
            error.to_string().contains("constraint") || error.to_string().contains("cannot store"),
            "{error}"
        );
    }
}

#[tokio::test]
async fn what_is_destroyed_is_overwritten_in_the_file() {
    let file = registry().await;
    let secret = b"a wrapped key that is to be shredded";
    let here = scope("acme", "default", &[]);
    let store = file.open().await;
    store.activate_dek(None, &active(100, &here), &[form("main", secret)]).await.unwrap();
    store.close().await;
    let holds =
        |secret: &[u8]| fs::read(file.path()).unwrap().windows(secret.len()).any(|found| found == secret);
    assert!(holds(secret));
    let store = file.open().await;
    store.set_dek_state(dek_id(100), DekState::Active, DekState::Destroyed, at(1)).await.unwrap();
    store.close().await;
    assert!(!holds(secret));
    assert_eq!(fs::read_dir(file.folder.path()).unwrap().count(), 1, "nor is there a log that holds it");
}

#[tokio::test]
async fn a_backup_by_vacuum_into_opens_as_a_registry() {
    let file = registry().await;
    let store = file.open().await;
    let copy = file.folder.path().join("backup.db");
    let statement = sqlx::AssertSqlSafe(format!("VACUUM INTO '{}'", copy.display())).into_sql_str();
    raw(&file.path()).await.execute(statement).await.unwrap();
    fs::set_permissions(&copy, Permissions::from_mode(0o600)).unwrap();
    let restored = open(&copy).await.unwrap();
    assert_eq!(restored.tenants(None, 9).await.unwrap(), store.tenants(None, 9).await.unwrap());
    restored.insert_tenant(&tenant("beta")).await.unwrap();
    restored.close().await;
    store.close().await;
}

#[tokio::test]
async fn a_writer_that_does_not_end_is_waited_for_and_then_unavailable() {
    let file = registry().await;
    let wait_max = std::time::Duration::from_millis(100);
    let store = SqliteStore::open(&file.path(), SqliteOptions { wait_max, ..SqliteOptions::default() })
        .await
        .unwrap();
    let mut other = raw(&file.path()).await;
    other.execute("BEGIN IMMEDIATE").await.unwrap();
    let refused = store.insert_tenant(&tenant("beta")).await;
    assert!(matches!(&refused, Err(StoreError::Unavailable(text)) if text.contains("lock")), "{refused:?}");
    assert!(store.tenant(&tenant_id("acme")).await.unwrap().is_some(), "readers do not wait for a writer");
    other.execute("ROLLBACK").await.unwrap();
    store.insert_tenant(&tenant("beta")).await.unwrap();
    store.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_that_make_the_registry_at_once_all_succeed() {
    for _ in 0..5 {
        let file = SqliteFile::fresh().await;
        let mut tasks = JoinSet::new();
        for n in 0..8 {
            let path = file.path();
            tasks.spawn(async move {
                let store = open(&path).await.unwrap();
                store.insert_tenant(&tenant(&format!("t{n}"))).await.unwrap();
                store.close().await;
            });
        }
        tasks.join_all().await;
        let store = file.open().await;
        assert_eq!(store.tenants(None, 99).await.unwrap().len(), 8);
        store.close().await;
        assert_eq!(fs::read_dir(file.folder.path()).unwrap().count(), 1, "no draft stays behind");
    }
}

#[tokio::test]
async fn a_registry_in_memory_keeps_the_contract_too() {
    let store = SqliteStore::in_memory().await.unwrap();
    store.insert_tenant(&tenant("acme")).await.unwrap();
    store.insert_key(&key("acme", "default")).await.unwrap();
    let here = scope("acme", "default", &[]);
    store.activate_dek(None, &active(1, &here), &[form("main", b"1")]).await.unwrap();
    store.insert_next_dek(&next(2, &here), &[form("main", b"1")]).await.unwrap();
    let promoted = store.promote_next_dek(&here, dek_id(1), at(3)).await.unwrap();
    assert_eq!(promoted.unwrap().dek.id, dek_id(2));
}

// ---- several processes ----

const PROCESSES: usize = 3;
const SCOPES: u64 = 40;
const CHILD_PATH: &str = "KEYFOLD_TEST_REGISTRY";
const CHILD_NUMBER: &str = "KEYFOLD_TEST_NUMBER";

#[expect(clippy::disallowed_methods, reason = "how a test tells a child process what to do")]
fn child_argument(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

/// Started by the test below in processes of their own; in a run of the tests themselves it does nothing.
#[tokio::test]
async fn child_that_activates() {
    let (Some(path), Some(number)) = (child_argument(CHILD_PATH), child_argument(CHILD_NUMBER)) else {
        return;
    };
    let number: u64 = number.parse().unwrap();
    let store = open(Path::new(&path)).await.unwrap();
    // Each child tries both; one child of all succeeds.
    let _ = store.insert_tenant(&tenant("acme")).await;
    let _ = store.insert_key(&key("acme", "default")).await;
    let mut won = 0;
    for n in 0..SCOPES {
        let scope = scope("acme", "default", &[("n", &n.to_string())]);
        let dek = active(1 + number * 1000 + n, &scope);
        match store.activate_dek(None, &dek, &[form("main", b"1")]).await.unwrap() {
            Activation::Done => won += 1,
            Activation::Taken(other) => assert_ne!(other.dek.id, dek.id),
        }
    }
    store.close().await;
    assert!(fs::write(format!("{path}.won-{number}"), won.to_string()).is_ok());
}

#[tokio::test]
async fn processes_that_start_at_once_share_one_registry_and_one_active_data_key_a_scope() {
    let file = SqliteFile::fresh().await;
    let children: Vec<_> = (0..PROCESSES)
        .map(|number| {
            Command::new(std::env::current_exe().unwrap())
                .args(["store_sqlite::child_that_activates", "--exact"])
                .env(CHILD_PATH, file.path())
                .env(CHILD_NUMBER, number.to_string())
                .stdout(std::process::Stdio::piped())
                .stderr(std::process::Stdio::piped())
                .spawn()
                .unwrap()
        })
        .collect();
    let mut won = 0;
    for (number, child) in children.into_iter().enumerate() {
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
        let path = format!("{}.won-{number}", file.path().display());
        won += fs::read_to_string(path).unwrap().parse::<u64>().unwrap();
    }
    assert_eq!(won, SCOPES);
    let store = file.open().await;
    let deks = store.deks(&tenant_id("acme"), &key_name("default"), None, 1000).await.unwrap();
    assert_eq!(deks.len() as u64, SCOPES);
    assert!(deks.iter().all(|stored| stored.dek.state == DekState::Active && stored.wrapped.len() == 1));
    store.close().await;
    let mut connection = raw(&file.path()).await;
    let check = connection.fetch_one("PRAGMA integrity_check").await.unwrap();
    assert_eq!(check.get::<String, _>(0), "ok");
}
