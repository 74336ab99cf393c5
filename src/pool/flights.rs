//! One miss, one KMS call: requests that need the same thing at the same time share its making, errors included.

use std::future::Future;
use std::hash::Hash;
use std::sync::Arc;
use std::time::Duration;

use tokio_util::task::TaskTracker;

use super::PoolError;
use super::live::LiveDek;
use crate::clock::Clock;

/// How many landings are remembered. One that is forgotten early only costs a call.
const REMEMBERED_MAX: u64 = 10_000;

/// What is being fetched, or was fetched a moment ago.
pub(super) struct Flights<K> {
    landings: moka::future::Cache<K, Landing>,
    clock: Clock,
    error_memory: Duration,
    tracker: TaskTracker,
}

#[derive(Clone)]
struct Landing {
    outcome: Result<Arc<LiveDek>, PoolError>,
    at: Duration,
}

impl<K: Hash + Eq + Clone + Send + Sync + 'static> Flights<K> {
    /// Errors are remembered for `error_memory`, so that a dead key cannot storm the KMS.
    pub(super) fn new(clock: Clock, error_memory: Duration, tracker: TaskTracker) -> Self {
        let landings = moka::future::Cache::builder()
            .max_capacity(REMEMBERED_MAX)
            // Only frees memory: what a landing is worth is decided by the injected clock.
            .time_to_live(Duration::from_mins(1))
            .build();
        Self { landings, clock, error_memory, tracker }
    }

    /// Joins the flight for `key`, or starts it with `fetch`. `good` says whether an earlier landing still serves.
    ///
    /// The work runs as a task of its own: a client that goes away does not take it from those who wait with him.
    pub(super) async fn join<F>(
        &self,
        key: K,
        good: impl Fn(&Arc<LiveDek>) -> bool + Send + Sync,
        fetch: F,
    ) -> Result<Arc<LiveDek>, PoolError>
    where
        F: Future<Output = Result<Arc<LiveDek>, PoolError>> + Send + 'static,
    {
        let (clock, tracker) = (self.clock.clone(), self.tracker.clone());
        let init = async move {
            let outcome = match tracker.spawn(fetch).await {
                Ok(outcome) => outcome,
                Err(_) => Err(PoolError::Internal("the task that fetched a data key did not end well")),
            };
            Landing { outcome, at: clock.monotonic() }
        };
        let over = |landing: &Landing| match &landing.outcome {
            Ok(live) => !good(live),
            Err(_) => self.clock.monotonic().saturating_sub(landing.at) >= self.error_memory,
        };
        self.landings.entry(key).or_insert_with_if(init, over).await.into_value().outcome
    }

    /// Forgets everything.
    pub(super) fn clear(&self) {
        self.landings.invalidate_all();
    }
}
