//! The time, as an argument: the system's in production, a hand-moved one in tests.
//!
//! Nothing else in keyfold asks the time (`clippy.toml` bans the calls). Wall-clock time ([`Timestamp`]) is for
//! what is stored and shown; monotonic time ([`Clock::monotonic`]) is for ages in memory, so that a clock set
//! back cannot keep a plaintext data key alive.

use std::cell::Cell;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tokio::sync::watch;

/// A point in wall-clock time: milliseconds since 1970-01-01T00:00:00Z.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Timestamp(i64);

impl Timestamp {
    /// From milliseconds since the Unix epoch.
    pub const fn from_unix_ms(ms: i64) -> Self {
        Self(ms)
    }

    /// Milliseconds since the Unix epoch.
    pub const fn unix_ms(self) -> i64 {
        self.0
    }

    /// This time moved forward; saturates at the end of time.
    pub fn plus(self, by: Duration) -> Self {
        Self(self.0.saturating_add(i64::try_from(by.as_millis()).unwrap_or(i64::MAX)))
    }

    /// This time moved back; saturates at the beginning of time.
    pub fn minus(self, by: Duration) -> Self {
        Self(self.0.saturating_sub(i64::try_from(by.as_millis()).unwrap_or(i64::MAX)))
    }

    /// How long ago `earlier` was; zero where it is later than this time.
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_millis(u64::try_from(self.0.saturating_sub(earlier.0)).unwrap_or(0))
    }

    /// Parses RFC 3339 text, such as `2026-11-23T12:00:00Z`.
    pub fn parse_rfc3339(text: &str) -> Option<Self> {
        let parsed =
            time::OffsetDateTime::parse(text, &time::format_description::well_known::Rfc3339).ok()?;
        i64::try_from(parsed.unix_timestamp_nanos() / 1_000_000).ok().map(Self)
    }
}

/// The longest that [`Timestamp::spell`] writes.
const RFC3339_BYTES_MAX: usize = "0000-00-00T00:00:00.000Z".len();
/// As far as the second.
const SECOND_BYTES: usize = "0000-00-00T00:00:00".len();

thread_local! {
    /// The last second that was spelled, and how: most records of the audit are of the same as the one before.
    static SPELLED: Cell<(i64, [u8; SECOND_BYTES])> = const { Cell::new((i64::MAX, [0; SECOND_BYTES])) };
}

impl Timestamp {
    /// Appends what `Display` prints, without going through a formatter: every record of the audit has one.
    pub fn write_to(self, out: &mut Vec<u8>) {
        match self.spell(&mut [0; RFC3339_BYTES_MAX]) {
            Some(text) => out.extend_from_slice(text.as_bytes()),
            None => out.extend_from_slice(self.to_string().as_bytes()),
        }
    }

    /// RFC 3339 in UTC, to the millisecond; none for years that it has no digits for.
    fn spell(self, text: &mut [u8; RFC3339_BYTES_MAX]) -> Option<&str> {
        let (second, ms) = (self.0.div_euclid(1_000), self.0.rem_euclid(1_000));
        let spelled = match SPELLED.get() {
            (last, spelled) if last == second => spelled,
            _ => {
                let spelled = spell_second(second)?;
                SPELLED.set((second, spelled));
                spelled
            }
        };
        *text = *b"0000-00-00T00:00:00.000Z";
        text[..SECOND_BYTES].copy_from_slice(&spelled);
        write_digits(u16::try_from(ms).ok()?, &mut text[20..23]);
        // A fraction's last zeros say nothing.
        let mut end = 23;
        while text[end - 1] == b'0' && end > 20 {
            end -= 1;
        }
        let end = if end == 20 { 19 } else { end };
        text[end] = b'Z';
        std::str::from_utf8(&text[..=end]).ok()
    }
}

/// RFC 3339 in UTC, to the millisecond.
impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.spell(&mut [0; RFC3339_BYTES_MAX]) {
            Some(text) => f.write_str(text),
            None => write!(f, "{} ms after 1970", self.0),
        }
    }
}

fn spell_second(second: i64) -> Option<[u8; SECOND_BYTES]> {
    let at = time::OffsetDateTime::from_unix_timestamp(second).ok()?;
    let mut text = *b"0000-00-00T00:00:00";
    write_digits(u16::try_from(at.year()).ok()?, &mut text[..4]);
    for (from, two) in
        [(5, at.month().into()), (8, at.day()), (11, at.hour()), (14, at.minute()), (17, at.second())]
    {
        write_digits(u16::from(two), &mut text[from..from + 2]);
    }
    Some(text)
}

fn write_digits(mut number: u16, digits: &mut [u8]) {
    for digit in digits.iter_mut().rev() {
        // One digit fits.
        *digit = b'0' + u8::try_from(number % 10).unwrap_or_default();
        number /= 10;
    }
}

/// Where the time comes from. Cloning is cheap, and clones tell the same time.
#[derive(Clone)]
pub struct Clock(Source);

#[derive(Clone)]
enum Source {
    System { started: Instant },
    Manual(Arc<Manual>),
}

struct Manual {
    start: Timestamp,
    elapsed_ms: AtomicU64,
    moved: watch::Sender<u64>,
}

impl Clock {
    /// The machine's clock.
    #[expect(clippy::disallowed_methods, reason = "the one place that asks the time")]
    pub fn system() -> Self {
        Self(Source::System { started: Instant::now() })
    }

    /// A clock that stands still until [`Clock::advance`] moves it.
    pub fn manual(start: Timestamp) -> Self {
        let (moved, _) = watch::channel(0);
        Self(Source::Manual(Arc::new(Manual { start, elapsed_ms: AtomicU64::new(0), moved })))
    }

    /// The wall-clock time now.
    #[expect(clippy::disallowed_methods, reason = "the one place that asks the time")]
    pub fn now(&self) -> Timestamp {
        match &self.0 {
            Source::System { .. } => {
                // A clock before 1970 is read as 1970: ages are then too large, which only retires keys early.
                let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
                Timestamp(i64::try_from(since_epoch.as_millis()).unwrap_or(i64::MAX))
            }
            Source::Manual(manual) => {
                manual.start.plus(Duration::from_millis(manual.elapsed_ms.load(Ordering::SeqCst)))
            }
        }
    }

    /// Time since this clock was made; never goes back.
    pub fn monotonic(&self) -> Duration {
        match &self.0 {
            Source::System { started } => started.elapsed(),
            Source::Manual(manual) => Duration::from_millis(manual.elapsed_ms.load(Ordering::SeqCst)),
        }
    }

    /// Moves a manual clock forward and wakes whoever sleeps on it. The system's clock cannot be moved: there it
    /// does nothing.
    pub fn advance(&self, by: Duration) {
        if let Source::Manual(manual) = &self.0 {
            let by_ms = u64::try_from(by.as_millis()).unwrap_or(u64::MAX);
            let elapsed = manual.elapsed_ms.fetch_add(by_ms, Ordering::SeqCst) + by_ms;
            manual.moved.send_replace(elapsed);
        }
    }

    /// Waits for `duration` of this clock's time, counted from this call and not from the first poll.
    pub fn sleep(&self, duration: Duration) -> impl Future<Output = ()> + Send + 'static {
        let until = self.monotonic().saturating_add(duration);
        let source = self.clone();
        async move {
            match &source.0 {
                Source::System { .. } => tokio::time::sleep(until.saturating_sub(source.monotonic())).await,
                Source::Manual(manual) => {
                    let mut moved = manual.moved.subscribe();
                    while source.monotonic() < until {
                        if moved.changed().await.is_err() {
                            return;
                        }
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timestamp_reads_as_rfc_3339_and_back() {
        let at = Timestamp::from_unix_ms(1_764_000_000_123);
        assert_eq!(at.to_string(), "2025-11-24T16:00:00.123Z");
        assert_eq!(Timestamp::parse_rfc3339(&at.to_string()), Some(at));
        assert_eq!(Timestamp::parse_rfc3339("tomorrow"), None);
        for (ms, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (-1, "1969-12-31T23:59:59.999Z"),
            (951_782_400_010, "2000-02-29T00:00:00.01Z"),
            (4_102_444_799_100, "2099-12-31T23:59:59.1Z"),
            (253_402_300_799_999, "9999-12-31T23:59:59.999Z"),
            (253_402_300_800_000, "253402300800000 ms after 1970"),
        ] {
            assert_eq!(Timestamp::from_unix_ms(ms).to_string(), text);
        }
    }

    proptest::proptest! {
        #[test]
        fn a_timestamp_reads_as_the_time_crate_writes_it(ms in -62_135_596_800_000_i64..253_402_300_799_000) {
            // Others of the same second too, and of the next.
            for ms in [ms, ms.div_euclid(1_000) * 1_000, ms.div_euclid(1_000) * 1_000 + 1_000 - 1, ms + 1_000] {
                let at = time::OffsetDateTime::from_unix_timestamp_nanos(i128::from(ms) * 1_000_000).unwrap();
                let written = at.format(&time::format_description::well_known::Rfc3339).unwrap();
                let mut line = Vec::new();
                Timestamp::from_unix_ms(ms).write_to(&mut line);
                proptest::prop_assert_eq!(&line, written.as_bytes());
                proptest::prop_assert_eq!(Timestamp::from_unix_ms(ms).to_string(), written);
            }
        }
    }

    #[tokio::test]
    async fn a_sleeper_on_a_manual_clock_wakes_when_its_time_has_come_and_not_before() {
        let clock = Clock::manual(Timestamp::from_unix_ms(0));
        let sleeper = clock.sleep(Duration::from_secs(10));
        tokio::pin!(sleeper);
        clock.advance(Duration::from_millis(9_999));
        tokio::select! {
            biased;
            () = &mut sleeper => panic!("woke too early"),
            () = std::future::ready(()) => {}
        }
        clock.advance(Duration::from_millis(1));
        sleeper.await;
        assert_eq!(clock.now(), Timestamp::from_unix_ms(10_000));
    }
}
