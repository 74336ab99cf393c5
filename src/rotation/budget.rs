//! How many KMS calls rotation may make: the foreground has the rest.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crate::clock::Clock;

/// Calls may come this much early, so that a few at once need not be spread by timers.
const TOLERANCE: Duration = Duration::from_millis(100);

/// Calls evenly spread over time.
pub(super) struct Budget {
    clock: Clock,
    interval: Duration,
    /// When the next call is due; monotonic.
    slot: Mutex<Duration>,
}

impl Budget {
    pub(super) fn new(clock: Clock, per_sec: u32) -> Self {
        Self { clock, interval: Duration::from_secs(1) / per_sec.max(1), slot: Mutex::default() }
    }

    /// Waits until one more call may be made.
    pub(super) async fn take(&self) {
        let wait = {
            let mut slot = self.slot.lock().unwrap_or_else(PoisonError::into_inner);
            let now = self.clock.monotonic();
            let due = (*slot).max(now);
            *slot = due + self.interval;
            due.saturating_sub(now)
        };
        if wait > TOLERANCE {
            self.clock.sleep(wait).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::Future;
    use std::pin::pin;
    use std::task::{Context, Poll, Waker};

    use super::*;
    use crate::clock::Timestamp;

    #[test]
    fn no_more_calls_are_let_through_than_a_second_holds() {
        let clock = Clock::manual(Timestamp::from_unix_ms(0));
        let budget = Budget::new(clock.clone(), 50);
        let mut waiting = Context::from_waker(Waker::noop());
        let mut made = 0;
        for _ in 0..10 {
            for _ in 0..1_000 {
                if pin!(budget.take()).poll(&mut waiting) == Poll::Ready(()) {
                    made += 1;
                } else {
                    break;
                }
            }
            clock.advance(Duration::from_millis(100));
        }
        // A second's worth, and what the tolerance lets through early.
        assert!((40..=56).contains(&made), "{made}");
    }
}
