//! One miss, one KMS call: requests that need the same thing at the same time share its making, errors included.

use std::future::Future;
use std::hash::Hash;
use std::sync::Arc;
use std::time::Duration;

use moka::policy::EvictionPolicy;
use tokio::runtime::Handle;
use tokio::task::JoinHandle;
use tokio_util::task::TaskTracker;

use super::PoolError;
use super::live::SharedDek;
use crate::clock::Clock;
use crate::store::watch::Mark;

/// How much memory landings may take, in bytes. One that is forgotten early only costs a call.
const REMEMBERED_BYTES_MAX: u64 = 16 << 20;
/// About what a landing takes beside what its destination brings.
const LANDING_BYTES: u32 = 512;

/// What a flight is for.
pub(super) trait Destination: Hash + Eq + Clone + Send + Sync + 'static {
    /// How many bytes of a caller's it holds: he may bring much, often.
    fn brought_bytes(&self) -> usize;
}

/// What is being fetched, or was fetched a moment ago.
pub(super) struct Flights<K> {
    landings: moka::future::Cache<K, Landing>,
    clock: Clock,
    error_memory: Duration,
    tasks: Tasks,
}

#[derive(Clone)]
struct Landing {
    outcome: Result<SharedDek, PoolError>,
    at: Duration,
    /// The tenant's mark when the flight began.
    seen_mark: u64,
}

/// Where flights run: on the service's own threads. One that bulk work begins on its threads, which come last, serves
/// single calls too.
#[derive(Clone)]
struct Tasks {
    tracker: TaskTracker,
    runtime: Option<Handle>,
}

impl Tasks {
    fn spawn<F>(&self, task: F) -> JoinHandle<F::Output>
    where
        F: Future<Output: Send> + Send + 'static,
    {
        match &self.runtime {
            Some(runtime) => self.tracker.spawn_on(task, runtime),
            None => self.tracker.spawn(task),
        }
    }
}

impl<K: Destination> Flights<K> {
    /// Errors are remembered for `error_memory`, so that a dead key cannot storm the KMS.
    pub(super) fn new(clock: Clock, error_memory: Duration, tracker: TaskTracker) -> Self {
        let landings = moka::future::Cache::builder()
            .weigher(|key: &K, _| {
                u32::try_from(key.brought_bytes()).unwrap_or(u32::MAX).saturating_add(LANDING_BYTES)
            })
            .max_capacity(REMEMBERED_BYTES_MAX)
            // The default policy may turn a new landing away, and an error must be remembered.
            .eviction_policy(EvictionPolicy::lru())
            // Only frees memory: what a landing is worth is decided by the injected clock.
            .time_to_live(Duration::from_mins(1))
            .build();
        let runtime = Handle::try_current().ok();
        Self { landings, clock, error_memory, tasks: Tasks { tracker, runtime } }
    }

    /// Joins the flight for `key`, or starts it with `fetch`. `good` says whether an earlier landing still serves; an
    /// error serves for a moment, unless something of the tenant has changed since (`mark`).
    ///
    /// Flight and wait run as tasks of their own: a client that goes away takes the flight from nobody who waits with
    /// him, and a panic is an error for all of them.
    pub(super) async fn join<F>(
        &self,
        key: K,
        mark: Arc<Mark>,
        good: impl Fn(&SharedDek) -> bool + Send + Sync + 'static,
        fetch: F,
    ) -> Result<SharedDek, PoolError>
    where
        F: Future<Output = Result<SharedDek, PoolError>> + Send + 'static,
    {
        let lost = || PoolError::Internal("the task that fetched a data key did not end well");
        let (clock, tasks, began_at) = (self.clock.clone(), self.tasks.clone(), Arc::clone(&mark));
        let init = async move {
            let seen_mark = began_at.now();
            let outcome = tasks.spawn(fetch).await.unwrap_or_else(|_| Err(lost()));
            Landing { outcome, at: clock.monotonic(), seen_mark }
        };
        let (clock, error_memory) = (self.clock.clone(), self.error_memory);
        let over = move |landing: &Landing| match &landing.outcome {
            Ok(live) => !good(live),
            Err(_) => {
                landing.seen_mark != mark.now()
                    || clock.monotonic().saturating_sub(landing.at) >= error_memory
            }
        };
        let landings = self.landings.clone();
        let wait =
            async move { landings.entry(key).or_insert_with_if(init, over).await.into_value().outcome };
        self.tasks.spawn(wait).await.unwrap_or_else(|_| Err(lost()))
    }

    /// Forgets everything.
    pub(super) fn clear(&self) {
        self.landings.invalidate_all();
    }
}
