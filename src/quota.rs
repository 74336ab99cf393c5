//! How much of something in a time: token buckets on the service's clock, one for each who has a limit of his own.
//!
//! A bucket is one number, the moment at which it will be full again (the generic cell rate algorithm, ITU-T I.371).
//! That moment may lie further ahead than an empty bucket's: what is larger than the bucket is a debt, which is paid
//! off at the bucket's rate before anything else passes. Without it, large bodies would go past the rate.

use std::hash::Hash;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::clock::Clock;

/// How many buckets of a kind are remembered. Tenants and principals are known by then: a stranger makes none.
const REMEMBERED_MAX: u64 = 100_000;
/// For how long the debt of one who does not come back is remembered.
const DEBT_SECS: u64 = 3_600;

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

    /// How long an empty bucket takes to fill, in whole seconds, a begun one as whole.
    pub fn window_secs(&self) -> u64 {
        secs(self.cost(self.burst.get()))
    }

    /// How long a bucket takes to fill by so many, in nanoseconds.
    fn cost(&self, amount: u32) -> u64 {
        let nanos = self.period.as_nanos() * u128::from(amount) / u128::from(self.amount.get());
        u64::try_from(nanos).unwrap_or(u64::MAX)
    }

    /// How many a bucket holds that will be full after so many nanoseconds.
    fn left(&self, until_full: u64) -> u32 {
        let missing = u128::from(until_full) * u128::from(self.amount.get());
        let missing = missing.div_ceil(self.period.as_nanos().max(1));
        self.burst.get().saturating_sub(u32::try_from(missing).unwrap_or(u32::MAX))
    }
}

fn secs(nanos: u64) -> u64 {
    nanos.div_ceil(1_000_000_000)
}

/// Buckets of one size, one for each key.
pub struct Buckets<K> {
    rate: Rate,
    clock: Clock,
    /// When each is full, in nanoseconds of the clock.
    full_at: moka::sync::Cache<K, Arc<AtomicU64>>,
}

/// How a bucket stands after something was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Standing {
    /// How much is left.
    pub left: u32,
    /// After how long it is full, in whole seconds, a begun one as whole.
    pub full_after_secs: u64,
}

/// The bucket is too empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exceeded {
    /// After how long it holds enough, in whole seconds, at least 1.
    pub retry_after_secs: u64,
    /// How it stands.
    pub standing: Standing,
}

impl<K: Hash + Eq + Clone + Send + Sync + 'static> Buckets<K> {
    /// Full ones.
    pub fn new(rate: Rate, clock: Clock) -> Self {
        let full_at = moka::sync::Cache::builder()
            .max_capacity(REMEMBERED_MAX)
            // Longer than it takes to fill: what is forgotten was full, or has waited long enough.
            .time_to_idle(Duration::from_secs(rate.window_secs().saturating_add(DEBT_SECS)))
            .build();
        Self { rate, clock, full_at }
    }

    /// Their size.
    pub fn rate(&self) -> Rate {
        self.rate
    }

    /// Takes `amount` out of this one's bucket. What is larger than the bucket waits until it is full, and leaves a
    /// debt: it is a matter of size limits whether it may be at all.
    ///
    /// # Errors
    /// [`Exceeded`] where the bucket does not hold so much; then nothing is taken.
    pub fn take(&self, key: &K, amount: u32) -> Result<Standing, Exceeded> {
        let now = self.now();
        let wanted = self.rate.cost(amount.min(self.rate.burst.get()));
        let most = self.rate.cost(self.rate.burst.get()) - wanted;
        let cost = self.rate.cost(amount);
        let taken = self.bucket(key).try_update(Ordering::Relaxed, Ordering::Relaxed, |full_at| {
            let until_full = full_at.saturating_sub(now);
            (amount == 0 || until_full <= most).then(|| full_at.max(now).saturating_add(cost))
        });
        match taken {
            Ok(before) => Ok(self.standing(before.max(now).saturating_add(cost) - now)),
            Err(full_at) => {
                let until_full = full_at.saturating_sub(now);
                let standing = self.standing(until_full);
                Err(Exceeded { retry_after_secs: secs(until_full - most).max(1), standing })
            }
        }
    }

    /// Takes `amount` even where the bucket does not hold it: what has been used already is owed.
    pub fn owe(&self, key: &K, amount: u32) {
        let (now, cost) = (self.now(), self.rate.cost(amount));
        self.bucket(key)
            .update(Ordering::Relaxed, Ordering::Relaxed, |full_at| full_at.max(now).saturating_add(cost));
    }

    /// Puts back what was taken for something that did not come to pass.
    pub fn give_back(&self, key: &K, amount: u32) {
        let cost = self.rate.cost(amount);
        self.bucket(key).update(Ordering::Relaxed, Ordering::Relaxed, |full_at| full_at.saturating_sub(cost));
    }

    fn bucket(&self, key: &K) -> Arc<AtomicU64> {
        // The common case needs no key of its own.
        self.full_at.get(key).unwrap_or_else(|| self.full_at.get_with(key.clone(), Arc::default))
    }

    fn now(&self) -> u64 {
        u64::try_from(self.clock.monotonic().as_nanos()).unwrap_or(u64::MAX)
    }

    fn standing(&self, until_full: u64) -> Standing {
        Standing { left: self.rate.left(until_full), full_after_secs: secs(until_full) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Timestamp;

    fn buckets(amount: u32, burst: u32) -> (Clock, Buckets<&'static str>) {
        let clock = Clock::manual(Timestamp::from_unix_ms(0));
        (clock.clone(), Buckets::new(Rate::new(amount, Duration::from_secs(1), burst).unwrap(), clock))
    }

    fn left(taken: Result<Standing, Exceeded>) -> Option<u32> {
        taken.ok().map(|standing| standing.left)
    }

    fn wait(taken: Result<Standing, Exceeded>) -> Option<u64> {
        taken.err().map(|exceeded| exceeded.retry_after_secs)
    }

    #[test]
    fn the_last_within_the_burst_passes_and_the_next_when_its_time_has_come_and_not_before() {
        let (clock, buckets) = buckets(2, 5);
        for remaining in (0..5).rev() {
            assert_eq!(left(buckets.take(&"a", 1)), Some(remaining));
        }
        assert_eq!(wait(buckets.take(&"a", 1)), Some(1));
        assert_eq!(wait(buckets.take(&"a", 4)), Some(2));
        clock.advance(Duration::from_millis(499));
        assert!(buckets.take(&"a", 1).is_err());
        clock.advance(Duration::from_millis(1));
        assert_eq!(left(buckets.take(&"a", 1)), Some(0));
        assert!(buckets.take(&"a", 1).is_err());
        // Nobody pays for another.
        assert_eq!(left(buckets.take(&"b", 5)), Some(0));
        assert_eq!(Rate::new(0, Duration::from_secs(1), 5), None);
        let rate = buckets.rate();
        assert_eq!((rate.burst(), rate.window_secs()), (5, 3));
    }

    #[test]
    fn what_is_larger_than_the_bucket_waits_for_all_of_it_and_is_paid_in_full() {
        let (clock, buckets) = buckets(2, 5);
        assert_eq!(left(buckets.take(&"a", 1)), Some(4));
        assert_eq!(wait(buckets.take(&"a", 20)), Some(1));
        clock.advance(Duration::from_millis(500));
        assert_eq!(buckets.take(&"a", 20), Ok(Standing { left: 0, full_after_secs: 10 }));
        // 15 are owed, and one more is wanted.
        assert_eq!(wait(buckets.take(&"a", 1)), Some(8));
        clock.advance(Duration::from_millis(7_999));
        assert_eq!(wait(buckets.take(&"a", 1)), Some(1));
        clock.advance(Duration::from_millis(1));
        assert_eq!(left(buckets.take(&"a", 1)), Some(0));
    }

    #[test]
    fn what_is_owed_is_paid_and_what_is_given_back_is_there_again() {
        let (clock, buckets) = buckets(2, 5);
        buckets.owe(&"a", 7);
        assert_eq!(wait(buckets.take(&"a", 1)), Some(2));
        clock.advance(Duration::from_millis(1_500));
        assert_eq!(left(buckets.take(&"a", 1)), Some(0));
        buckets.give_back(&"a", 1);
        assert_eq!(left(buckets.take(&"a", 1)), Some(0));
        // Nothing costs nothing, even of one who is in debt.
        assert_eq!(left(buckets.take(&"a", 0)), Some(0));
        // Never more than full.
        buckets.give_back(&"b", 3);
        assert_eq!(left(buckets.take(&"b", 5)), Some(0));
        assert!(buckets.take(&"b", 1).is_err());
    }
}
