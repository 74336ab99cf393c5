//! How a process learns that somebody changed the registry: this process, another replica, or the command line.
//!
//! What is kept in memory of a tenant (its policy, its data keys' states, its API keys) carries the [`Mark`] that
//! it was read at. A poll of [`Store::changes`] moves the marks of the tenants that changed, so that the hot path
//! asks nothing but "is my mark still the same?", and only what changed is read again. While the registry cannot be
//! asked, what is in memory stays good for a stated time.
//!
//! The same poll brings what other processes have heard of a KMS: that a KEK's owner has said no.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use super::{KekDenial, Store, StoreError};
use crate::clock::Clock;
use crate::tenant::TenantId;

/// Follows the registry's changes. One for each process.
// On cache lines of its own (two, which processors fetch together): every request reads it, and a neighbour that is
// written to would take it out of the other processors' caches each time.
#[repr(align(128))]
pub struct ChangeWatch {
    store: Arc<dyn Store>,
    clock: Clock,
    stale_max: Duration,
    marks: papaya::HashMap<Option<TenantId>, Arc<Mark>>,
    answers: Arc<Mark>,
    seen: tokio::sync::Mutex<Seen>,
    on_denial: OnceLock<Box<OnDenial>>,
    good_until_ms: AtomicU64,
    moved: tokio::sync::Notify,
}

/// The numbers of the last change and the last denial that a poll has found.
#[derive(Default)]
struct Seen {
    change: u64,
    denial: u64,
}

/// What is to be done when a denial is heard of.
type OnDenial = dyn Fn(&KekDenial) + Send + Sync;

/// Counts the changes of one tenant, or of what belongs to none; or how often the registry has answered.
// On cache lines of its own: see `ChangeWatch`.
#[derive(Default)]
#[repr(align(128))]
pub struct Mark(AtomicU64);

impl Mark {
    /// The count now. Read it *before* reading the record that it is to vouch for.
    pub fn now(&self) -> u64 {
        self.0.load(Ordering::Acquire)
    }
}

impl ChangeWatch {
    /// A watch over this store. What is in memory stays good for `stale_max` after the last answer of the registry.
    pub fn new(store: Arc<dyn Store>, clock: Clock, stale_max: Duration) -> Self {
        let watch = Self {
            store,
            clock,
            stale_max,
            marks: papaya::HashMap::new(),
            answers: Arc::default(),
            seen: tokio::sync::Mutex::default(),
            on_denial: OnceLock::new(),
            good_until_ms: AtomicU64::new(0),
            moved: tokio::sync::Notify::new(),
        };
        watch.extend();
        watch
    }

    /// The mark of a tenant; `None` is the mark of what belongs to no single tenant.
    pub fn mark(&self, tenant: Option<&TenantId>) -> Arc<Mark> {
        Arc::clone(self.marks.pin().get_or_insert_with(tenant.cloned(), Arc::default))
    }

    /// Counts the polls that the registry has answered. What could not be asked of it can be, once this has moved.
    pub fn answers(&self) -> Arc<Mark> {
        Arc::clone(&self.answers)
    }

    /// Whether the registry has answered recently enough for what is in memory to be used.
    pub fn is_current(&self, monotonic: Duration) -> bool {
        as_ms(monotonic) < self.good_until_ms.load(Ordering::Acquire)
    }

    /// Has every denial that a poll finds given to `heed`, those of this process too. For one who heeds them.
    pub fn heed_denials(&self, heed: impl Fn(&KekDenial) + Send + Sync + 'static) {
        let _ = self.on_denial.set(Box::new(heed));
    }

    /// Asks the registry what has changed and who has been denied since the last time, moves the marks, and has the
    /// denials heeded.
    pub async fn poll(&self) -> Result<(), StoreError> {
        let mut seen = self.seen.lock().await;
        let denials = self.store.denials(seen.denial).await?;
        for denial in denials {
            if let Some(heed) = self.on_denial.get() {
                heed(&denial);
            }
            seen.denial = seen.denial.max(denial.seq);
        }
        let changes = self.store.changes(seen.change).await?;
        if !changes.is_empty() {
            self.moved.notify_one();
        }
        for change in changes {
            // A tenant without a mark has nothing in memory that could be out of date.
            if let Some(mark) = self.marks.pin().get(&change.tenant) {
                mark.0.fetch_add(1, Ordering::AcqRel);
            }
            seen.change = seen.change.max(change.seq);
        }
        self.extend();
        self.answers.0.fetch_add(1, Ordering::AcqRel);
        Ok(())
    }

    /// Polls, if the last answer of the registry is too old for what is in memory to be used.
    pub async fn ensure_current(&self) -> Result<(), StoreError> {
        if self.is_current(self.clock.monotonic()) { Ok(()) } else { self.poll().await }
    }

    /// Wakes whoever waits for [`ChangeWatch::moved`].
    pub fn wake(&self) {
        self.moved.notify_one();
    }

    /// Waits until a poll finds that something has changed. For one who waits.
    pub async fn moved(&self) {
        self.moved.notified().await;
    }

    fn extend(&self) {
        self.good_until_ms
            .store(as_ms(self.clock.monotonic().saturating_add(self.stale_max)), Ordering::Release);
    }
}

fn as_ms(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
