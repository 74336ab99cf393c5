//! Two processes on one data folder: who was overtaken while he was stopped changes nothing any more.

use std::path::Path;
use std::time::Duration;

use envelope::DataKeyId;
use keyfold::clock::Clock;
use keyfold::rotation::LEASE;
use keyfold::store::{Store, WrappedRecord};
use kms_emulator::CreateKey;
use rustix::process::Signal;
use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{Connection, Row, SqliteConnection};

use crate::killed::{Site, seed, still_needing};
use crate::kms_aws::IRELAND;
use crate::service::open_registry;

const DEKS: usize = 200;

async fn open(registry: &Path) -> SqliteConnection {
    let options = SqliteConnectOptions::new().filename(registry).busy_timeout(Duration::from_secs(2));
    SqliteConnection::connect_with(&options).await.unwrap()
}

/// Who holds the lease, and by which token.
async fn holder(registry: &Path) -> (String, i64) {
    let mut connection = open(registry).await;
    let statement = "SELECT holder, token FROM leases WHERE name = ?1";
    let row = sqlx::query(statement).bind(LEASE).fetch_one(&mut connection).await.unwrap();
    (row.get(0), row.get(1))
}

/// The lease's end comes, though its holder has not been away for so long. False where the registry is locked.
async fn run_out(registry: &Path) -> bool {
    let now = Clock::system().now().unix_ms();
    let end = sqlx::query("UPDATE leases SET expires_at = ?2 WHERE name = ?1").bind(LEASE).bind(now - 1);
    end.execute(&mut open(registry).await).await.is_ok()
}

/// Every wrapped form there is.
async fn forms(registry: &Path) -> Vec<(DataKeyId, WrappedRecord)> {
    let store = open_registry(registry).await;
    let (tenant, key) = ("acme".parse().unwrap(), "default".parse().unwrap());
    let deks = store.deks(&tenant, &key, None, 1_000).await.unwrap();
    store.close().await;
    deks.into_iter()
        .flat_map(|stored| stored.wrapped.into_iter().map(move |form| (stored.dek.id, form)))
        .collect()
}

/// A stops in mid-work, sure of a lease of an hour. The lease passes to B, who does the work. When A goes on he still
/// believes in his lease: it is the fence that refuses what he writes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_that_was_stopped_and_overtaken_writes_nothing_late() {
    let site = Site::new().await;
    let (old, new) = (
        site.emulator.create_key(IRELAND, CreateKey::new()).unwrap(),
        site.emulator.create_key(IRELAND, CreateKey::new()).unwrap(),
    );
    site.run(&["tenant", "create", "acme", &old]);
    let store = open_registry(&site.registry()).await;
    seed(&site, &store, &old, DEKS).await;
    store.close().await;
    site.run(&["tenant", "set-keks", "acme", &new]);
    // So slow that what is left after its first page is work for a quarter of a minute.
    let slow = [("KEYFOLD_ROTATION__KMS_CALLS_PER_SEC_MAX", "10"), ("KEYFOLD_ROTATION__LEASE_SECS", "3600")];
    let a = site.serve(&slow);
    while still_needing(&site.registry(), &old).await == DEKS as u64 {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    a.signal(Signal::STOP);
    // Stopped in the middle of writing, it would hold up everybody.
    while !run_out(&site.registry()).await {
        a.signal(Signal::CONT);
        tokio::time::sleep(Duration::from_millis(50)).await;
        a.signal(Signal::STOP);
    }
    let left = still_needing(&site.registry(), &old).await;
    assert!(left > 0, "A was done before it was stopped");
    let (holder_a, token_a) = holder(&site.registry()).await;
    let b = site.serve(&[]);
    let watched = site.run(&["jobs", "acme", "--watch"]);
    assert_eq!(still_needing(&site.registry(), &old).await, 0, "{watched}");
    let (holder_b, token_b) = holder(&site.registry()).await;
    assert!(holder_b != holder_a && token_b > token_a, "B did it under A's lease");
    let by_b = forms(&site.registry()).await;
    assert_eq!(by_b.len(), DEKS + 1, "one form of each, and of the one that follows the active one");
    a.signal(Signal::CONT);
    let said = a.says("a round of rotation ended early");
    assert!(said.contains("the lease rotation has passed to somebody else"), "{said}");
    // A had wrapped some of them anew by itself: none of that arrived, nor did what it knew of the job.
    assert!(forms(&site.registry()).await == by_b, "A has changed what B had done");
    let jobs = site.run(&["jobs", "acme"]);
    assert!(jobs.contains(&format!("done  {DEKS} of {DEKS}  0 error(s)")), "{jobs}");
    drop((a, b));
}
