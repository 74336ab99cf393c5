//! How much of something in a time: token buckets on the service's clock, one for each who has a limit of his own.

use std::hash::Hash;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use governor::clock::Clock as _;
use governor::middleware::StateInformationMiddleware;
use governor::state::{InMemoryState, NotKeyed};

use crate::clock::Clock;

/// How many buckets of a kind are remembered. Tenants and principals are known by then: a stranger makes none.
const REMEMBERED_MAX: u64 = 100_000;

/// A bucket's size and how fast it fills.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    amount: NonZeroU32,
    period: Duration,
    burst: NonZeroU32,
}

impl Rate {
    /// So many in each period, and so many at once after a rest (as many as in a period where `burst` is 0). None
    /// where `amount` is 0: no limit.
    pub fn new(amount: u32, period: Duration, burst: u32) -> Option<Self> {
        let amount = NonZeroU32::new(amount)?;
        Some(Self { amount, period, burst: NonZeroU32::new(burst).unwrap_or(amount) })
    }

    /// How many at once after a rest.
    pub fn burst(&self) -> u32 {
        self.burst.get()
    }

    /// How long an empty bucket takes to fill, in whole seconds, at least 1.
    pub fn window_secs(&self) -> u64 {
        let secs = self.period.as_secs_f64() * f64::from(self.burst.get()) / f64::from(self.amount.get());
        Duration::from_secs_f64(secs.max(1.0)).as_secs()
    }

    fn quota(self) -> governor::Quota {
        let one = (self.period / self.amount.get()).max(Duration::from_nanos(1));
        let quota = governor::Quota::with_period(one);
        quota.unwrap_or_else(|| governor::Quota::per_second(self.amount)).allow_burst(self.burst)
    }
}

#[derive(Clone)]
struct Time(Clock);

impl governor::clock::Clock for Time {
    type Instant = Duration;

    fn now(&self) -> Duration {
        self.0.monotonic()
    }
}

type Limiter = governor::RateLimiter<NotKeyed, InMemoryState, Time, StateInformationMiddleware>;

/// Buckets of one size, one for each key.
pub struct Buckets<K> {
    rate: Rate,
    time: Time,
    limiters: moka::sync::Cache<K, Arc<Limiter>>,
}

/// The bucket is too empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exceeded {
    /// After how long it holds enough, in whole seconds, at least 1.
    pub retry_after_secs: u64,
}

impl<K: Hash + Eq + Clone + Send + Sync + 'static> Buckets<K> {
    /// Full ones.
    pub fn new(rate: Rate, clock: Clock) -> Self {
        let limiters = moka::sync::Cache::builder()
            .max_capacity(REMEMBERED_MAX)
            // Longer than it takes to fill: what is forgotten was full anyway.
            .time_to_idle(Duration::from_secs(rate.window_secs().saturating_add(60)))
            .build();
        Self { rate, time: Time(clock), limiters }
    }

    /// Their size.
    pub fn rate(&self) -> Rate {
        self.rate
    }

    /// Takes `amount` out of this one's bucket, and says how much is left. What is larger than the bucket takes all
    /// of it: it is a matter of size limits whether it may be at all.
    pub fn take(&self, key: &K, amount: u32) -> Result<u32, Exceeded> {
        let Some(amount) = NonZeroU32::new(amount.min(self.rate.burst.get())) else {
            return Ok(self.rate.burst.get());
        };
        let limiter = self.limiters.get(key).unwrap_or_else(|| {
            self.limiters.get_with(key.clone(), || {
                let limiter = governor::RateLimiter::direct_with_clock(self.rate.quota(), self.time.clone());
                Arc::new(limiter.with_middleware())
            })
        });
        match limiter.check_n(amount) {
            Ok(Ok(snapshot)) => Ok(snapshot.remaining_burst_capacity()),
            Ok(Err(not_until)) => {
                let wait = not_until.wait_time_from(self.time.now());
                let secs = wait.as_secs() + u64::from(wait.subsec_nanos() > 0);
                Err(Exceeded { retry_after_secs: secs.max(1) })
            }
            // Not reached: no more than the bucket's size is asked for.
            Err(_) => Err(Exceeded { retry_after_secs: self.rate.window_secs() }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Timestamp;

    #[test]
    fn the_last_within_the_burst_passes_and_the_next_when_its_time_has_come_and_not_before() {
        let clock = Clock::manual(Timestamp::from_unix_ms(0));
        let rate = Rate::new(2, Duration::from_secs(1), 5).unwrap();
        let buckets = Buckets::new(rate, clock.clone());
        for left in (0..5).rev() {
            assert_eq!(buckets.take(&"a", 1), Ok(left));
        }
        assert_eq!(buckets.take(&"a", 1), Err(Exceeded { retry_after_secs: 1 }));
        assert_eq!(buckets.take(&"a", 4), Err(Exceeded { retry_after_secs: 2 }));
        clock.advance(Duration::from_millis(499));
        assert!(buckets.take(&"a", 1).is_err());
        clock.advance(Duration::from_millis(1));
        assert_eq!(buckets.take(&"a", 1), Ok(0));
        assert!(buckets.take(&"a", 1).is_err());
        // Nobody pays for another.
        assert_eq!(buckets.take(&"b", 5), Ok(0));
        clock.advance(Duration::from_secs(3));
        // Larger than the bucket: all of it, and only when it is full.
        assert_eq!(buckets.take(&"a", 1_000), Ok(0));
        clock.advance(Duration::from_millis(2_499));
        assert!(buckets.take(&"a", 1_000).is_err());
        clock.advance(Duration::from_millis(1));
        assert_eq!(buckets.take(&"a", 1_000), Ok(0));
        assert_eq!(Rate::new(0, Duration::from_secs(1), 5), None);
        assert_eq!((rate.burst(), rate.window_secs()), (5, 2));
    }
}
