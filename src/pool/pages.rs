//! Data keys out of the swap, where the system lets a process lock a part of its memory only.

use std::sync::atomic::{AtomicBool, Ordering};

use envelope::DataKey;

/// Whether the pages of data keys are locked. The operating system's limit is one for the whole process too.
static LOCK: AtomicBool = AtomicBool::new(false);

/// From now on the pages of new data keys are locked.
pub(super) fn start() {
    LOCK.store(true, Ordering::Release);
}

/// Locks the page that this data key lies on. It stays locked for good: the allocator puts the next data key on the
/// same pages, and to unlock one would unlock its neighbours. Where the limit is reached that is said, once.
pub(super) fn keep(key: &DataKey) {
    if !LOCK.load(Ordering::Acquire) {
        return;
    }
    let (address, bytes) = key.place();
    match region::lock(address, bytes) {
        Ok(guard) => std::mem::forget(guard),
        Err(refused) => {
            LOCK.store(false, Ordering::Release);
            tracing::warn!(%refused, "the system locks no more pages with data keys: raise the limit of locked memory (LimitMEMLOCK, ulimit -l), or further keys may reach the swap");
        }
    }
}
