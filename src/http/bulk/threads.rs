//! Threads of their own for the work of batches and lines.
//!
//! On the service's own threads a small request would stand behind the stretches that are already queued there. These
//! threads have a lower priority, and offer their core to others all the time, so that the system's scheduler gives it to
//! a small request at once, and gives bulk work whatever is left.

use std::cell::Cell;
use std::sync::OnceLock;

use rustix::process::setpriority_process;
use tokio::runtime::{Builder, Handle, Runtime};
use tokio_util::task::{AbortOnDropHandle, TaskTracker};

/// As many threads as the service has; they are started with the first work for them.
pub(in crate::http) struct BulkThreads {
    count: usize,
    runtime: OnceLock<Option<Runtime>>,
}

impl BulkThreads {
    /// For the runtime that this is called on.
    pub(in crate::http) fn new() -> Self {
        let count = Handle::try_current().map_or(1, |runtime| runtime.metrics().num_workers());
        Self { count, runtime: OnceLock::new() }
    }

    /// How many there are.
    pub(in crate::http) fn count(&self) -> usize {
        self.count
    }

    /// Starts work that ends when its handle is dropped: a client that goes away takes its work with it.
    pub(in crate::http) fn spawn<F>(&self, tracker: &TaskTracker, work: F) -> AbortOnDropHandle<F::Output>
    where
        F: Future<Output: Send> + Send + 'static,
    {
        let runtime = self.runtime.get_or_init(|| start(self.count));
        AbortOnDropHandle::new(match runtime {
            Some(runtime) => tracker.spawn_on(work, runtime.handle()),
            None => tracker.spawn(work),
        })
    }
}

thread_local! {
    static IS_BULK: Cell<bool> = const { Cell::new(false) };
}

/// Lets other threads have the core if they wait for it; does nothing on the service's own. A lower priority alone is not
/// enough: Linux lets a thread run on to the end of its slice, some milliseconds, before one that was just woken gets
/// its turn.
pub(super) fn give_way() {
    if IS_BULK.get() {
        std::thread::yield_now();
    }
}

/// What is told where work on these threads came to no end. What its panic said may hold anything.
pub(super) const BULK_FAILED: &str = "bulk work panicked or was stopped";

/// How much less a core's time is theirs than the service's own threads', as `nice` counts it.
const NICE: i32 = 10;

/// None where the system has no threads left: then the service's own do the work, more slowly for the others.
fn start(count: usize) -> Option<Runtime> {
    let built = Builder::new_multi_thread()
        .worker_threads(count)
        .thread_name("keyfold-bulk")
        .on_thread_start(|| {
            // Of this thread alone, on Linux. Without it they are as important as the others, and no more.
            let _ = setpriority_process(None, NICE);
            IS_BULK.set(true);
        })
        .enable_all()
        .build();
    built.inspect_err(|error| tracing::warn!(%error, "batches have no threads of their own")).ok()
}

impl Drop for BulkThreads {
    fn drop(&mut self) {
        // A runtime that is dropped waits for its threads, which is not allowed on those of another one.
        if let Some(runtime) = self.runtime.take().flatten() {
            runtime.shutdown_background();
        }
    }
}
