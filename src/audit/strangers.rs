//! Calls of somebody who did not show who he is: recorded up to a limit, so that strangers cannot fill a disk or keep
//! others from their work, and counted past it.

use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Who did not show who he is.
#[derive(Clone, Copy)]
pub struct Stranger<'a> {
    /// The request's id.
    pub request_id: &'a str,
    /// The address that the request came from.
    pub source: Option<IpAddr>,
    /// Why he was not let in, which he is not told.
    pub reason: &'a str,
}

/// How many strangers are recorded, so that they cannot fill a disk.
#[derive(Default)]
pub(super) struct Strangers {
    per_sec_max: u64,
    /// The second that is counted, in its upper half, and how many it had.
    counted: AtomicU64,
    unrecorded: AtomicU64,
}

impl Strangers {
    pub(super) fn new(per_sec_max: u64) -> Self {
        Self { per_sec_max, ..Self::default() }
    }

    pub(super) fn may_be_recorded(&self, now: Duration) -> bool {
        let second = (now.as_secs() & u64::from(u32::MAX)) << 32;
        let counted = self.counted.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |counted| {
            let so_far =
                if counted & !u64::from(u32::MAX) == second { counted & u64::from(u32::MAX) } else { 0 };
            (so_far < self.per_sec_max).then_some(second | (so_far + 1))
        });
        if counted.is_err() {
            self.unrecorded();
        }
        counted.is_ok()
    }

    pub(super) fn unrecorded(&self) {
        self.unrecorded.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn take_unrecorded(&self) -> u64 {
        self.unrecorded.swap(0, Ordering::Relaxed)
    }
}
