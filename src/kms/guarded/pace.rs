//! How many calls a second: a token bucket whose rate gives way when the KMS throttles. Pure: the time is an argument.
//!
//! A fixed limit (governor) would not do here: the quota of a region is shared with whatever else runs in the
//! account, and AWS tells it only by throttling.

use std::time::Duration;

/// After a throttled answer the rate falls to this share of what was served in a second.
const GIVE_WAY: f64 = 0.7;
/// The rate never falls below this many calls a second.
const RATE_MIN: f64 = 1.0;
/// Throttled answers that come this soon after one that was heeded belong to the same crowd of calls.
const SAME_CROWD: Duration = Duration::from_millis(500);
/// Without throttled answers the rate grows by this share, and by one call, each second.
const GROWTH: f64 = 0.1;

/// The pace of the calls to one region.
#[derive(Debug)]
pub(super) struct Pace {
    /// The configured limit, in calls a second.
    max: f64,
    /// The rate as the last throttled answer has left it, and when that was. None: never throttled.
    throttled: Option<(f64, Duration)>,
    tokens: f64,
    filled: Duration,
    /// Calls that were served in the second that began then, and in the one before.
    window: Duration,
    served: f64,
    served_before: f64,
}

impl Pace {
    pub(super) fn new(calls_per_sec_max: u32, now: Duration) -> Self {
        let max = f64::from(calls_per_sec_max.max(1));
        Self { max, throttled: None, tokens: max, filled: now, window: now, served: 0.0, served_before: 0.0 }
    }

    /// Whether a call may pass now; if not, how long until one may.
    pub(super) fn take(&mut self, now: Duration) -> Result<(), Duration> {
        let rate = self.rate(now);
        let since = now.saturating_sub(self.filled).as_secs_f64();
        // No more than a second's worth is saved up: what a region allows is counted by the second.
        self.tokens = (self.tokens + since * rate).min(rate.max(1.0));
        self.filled = self.filled.max(now);
        if self.tokens < 1.0 {
            return Err(Duration::from_secs_f64((1.0 - self.tokens) / rate));
        }
        self.tokens -= 1.0;
        Ok(())
    }

    /// The KMS has served a call.
    pub(super) fn served(&mut self, now: Duration) {
        self.roll(now);
        self.served += 1.0;
    }

    /// The KMS has throttled a call.
    pub(super) fn throttled(&mut self, now: Duration) {
        if self.throttled.is_some_and(|(_, at)| now < at + SAME_CROWD) {
            return;
        }
        self.roll(now);
        let served = self.served.max(self.served_before);
        let rate = (self.rate(now).min(served) * GIVE_WAY).clamp(RATE_MIN, self.max);
        self.throttled = Some((rate, now));
        self.tokens = 0.0;
        self.filled = now;
    }

    /// When the KMS last throttled.
    pub(super) fn throttled_at(&self) -> Option<Duration> {
        self.throttled.map(|(_, at)| at)
    }

    /// Calls a second that pass now.
    pub(super) fn rate(&self, now: Duration) -> f64 {
        let Some((rate, at)) = self.throttled else { return self.max };
        let secs = now.saturating_sub(at).as_secs_f64();
        (rate * (1.0 + GROWTH).powf(secs) + secs).min(self.max)
    }

    fn roll(&mut self, now: Duration) {
        let since = now.saturating_sub(self.window);
        if since >= Duration::from_secs(1) {
            self.served_before = if since < Duration::from_secs(2) { self.served } else { 0.0 };
            self.served = 0.0;
            self.window = now;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    /// Calls that pass when one is tried every millisecond from `from` to `to`.
    fn passed(pace: &mut Pace, from: u64, to: u64) -> usize {
        (from..to).filter(|at| pace.take(ms(*at)).is_ok()).count()
    }

    #[test]
    fn the_limit_is_the_limit() {
        let mut pace = Pace::new(10, ms(0));
        assert_eq!((0..100).filter(|_| pace.take(ms(0)).is_ok()).count(), 10);
        assert_eq!(pace.take(ms(0)), Err(ms(100)));
        assert_eq!(passed(&mut pace, 1, 1_001), 10);
        assert_eq!((0..100).filter(|_| pace.take(ms(60_000)).is_ok()).count(), 10, "no more is saved up");
    }

    #[test]
    fn a_throttled_answer_lowers_the_rate_to_below_what_was_served() {
        let mut pace = Pace::new(1_000, ms(0));
        for _ in 0..20 {
            pace.take(ms(0)).unwrap();
            pace.served(ms(5));
        }
        for _ in 0..80 {
            pace.take(ms(5)).unwrap();
        }
        pace.throttled(ms(10));
        assert!((pace.rate(ms(10)) - 14.0).abs() < 0.1, "{}", pace.rate(ms(10)));
        // The rest of the same crowd changes nothing.
        pace.throttled(ms(400));
        assert!(pace.rate(ms(10)) > 13.0);
        assert!(pace.take(ms(10)).is_err());
    }

    #[test]
    fn it_settles_near_what_the_kms_allows_and_recovers_when_that_is_over() {
        // A KMS that allows 5 a second, by a bucket of its own.
        let (mut pace, mut theirs) = (Pace::new(1_000, ms(0)), Pace::new(5, ms(0)));
        let (mut served, mut refused) = (0, 0);
        for at in 0..30_000 {
            if pace.take(ms(at)).is_ok() {
                if theirs.take(ms(at)).is_ok() {
                    served += 1;
                    pace.served(ms(at));
                } else {
                    refused += 1;
                    pace.throttled(ms(at));
                }
            }
        }
        assert!((100..=155).contains(&served), "{served} of 150 served");
        assert!(refused < 60, "{refused} calls were for nothing");
        assert!(pace.rate(ms(90_000)) > 900.0);
    }
}
