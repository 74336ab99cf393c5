//! The emulator's time: the machine's, plus what a test has added, or standing still altogether.

use std::sync::Mutex;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

/// A moment in milliseconds since the Unix epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub(crate) struct Timestamp(pub(crate) i64);

pub(crate) const DAY: Duration = Duration::from_hours(24);

impl Timestamp {
    pub(crate) fn plus(self, by: Duration) -> Self {
        Self(self.0.saturating_add(i64::try_from(by.as_millis()).unwrap_or(i64::MAX)))
    }

    /// Seconds since the epoch with a fraction: how JSON 1.1 writes a time.
    #[expect(clippy::cast_precision_loss, reason = "milliseconds of any date in use fit 53 bits")]
    pub(crate) fn seconds(self) -> f64 {
        self.0 as f64 / 1000.0
    }

    pub(crate) fn rfc3339(self) -> String {
        let nanos = i128::from(self.0) * 1_000_000;
        time::OffsetDateTime::from_unix_timestamp_nanos(nanos)
            .ok()
            .and_then(|t| t.format(&time::format_description::well_known::Rfc3339).ok())
            .unwrap_or_default()
    }
}

/// Wall and monotonic time move together, so that a step of the machine's clock changes nothing here.
#[derive(Debug)]
pub(crate) struct Clock {
    started: Instant,
    wall_at_start: Duration,
    frozen: bool,
    advanced: Mutex<Duration>,
}

impl Clock {
    #[expect(clippy::disallowed_methods, reason = "the one place where the emulator asks the time")]
    pub(crate) fn new(frozen: bool) -> Self {
        Self {
            started: Instant::now(),
            wall_at_start: SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default(),
            frozen,
            advanced: Mutex::new(Duration::ZERO),
        }
    }

    /// Time since the start: real time unless frozen, and everything that was added by hand.
    pub(crate) fn elapsed(&self) -> Duration {
        let real = if self.frozen { Duration::ZERO } else { self.started.elapsed() };
        real.saturating_add(self.advanced())
    }

    pub(crate) fn now(&self) -> Timestamp {
        Timestamp(0).plus(self.wall_at_start.saturating_add(self.elapsed()))
    }

    pub(crate) fn advance(&self, by: Duration) {
        let mut advanced = self.advanced.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        *advanced = advanced.saturating_add(by);
    }

    pub(crate) fn advanced(&self) -> Duration {
        *self.advanced.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    pub(crate) fn is_frozen(&self) -> bool {
        self.frozen
    }
}
