//! How much a data key may do, and how much it has done. Pure: the time is an argument.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::clock::Timestamp;
use crate::store::KeyPolicy;

/// What a data key has sealed, counted by every request that uses it.
// On cache lines of its own: what stands beside it every request reads.
#[derive(Default)]
#[repr(align(128))]
pub(super) struct Counts {
    messages: AtomicU64,
    bytes: AtomicU64,
    flushed_messages: AtomicU64,
    flushed_bytes: AtomicU64,
    sealed_at_ms: AtomicU64,
    opened_at_ms: AtomicU64,
    flushed_at_ms: AtomicU64,
}

/// What has been counted since the last flush.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Unflushed {
    pub(super) messages: u64,
    pub(super) bytes: u64,
    pub(super) sealed_at: Option<Timestamp>,
    pub(super) opened_at: Option<Timestamp>,
}

/// Notes a time for all requests of the same millisecond once: what is written to leaves the other processors' caches.
pub(super) fn note(at_ms: &AtomicU64, now_ms: u64) {
    if at_ms.load(Ordering::Relaxed) != now_ms {
        at_ms.store(now_ms, Ordering::Relaxed);
    }
}

impl Counts {
    /// Counts on from what the registry knows.
    pub(super) fn from_registry(messages: u64, bytes: u64) -> Self {
        Self {
            messages: messages.into(),
            bytes: bytes.into(),
            flushed_messages: messages.into(),
            flushed_bytes: bytes.into(),
            ..Self::default()
        }
    }

    /// Counts one message, if the limits allow one more of this size.
    pub(super) fn admit(&self, bytes: u64, policy: &KeyPolicy) -> bool {
        // Two requests at the very limit may both pass: a limit is a policy, and each message has its own key.
        if !self.has_room(bytes, policy) {
            return false;
        }
        self.messages.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        true
    }

    /// Whether the limits allow one more message of this size.
    pub(super) fn has_room(&self, bytes: u64, policy: &KeyPolicy) -> bool {
        self.messages.load(Ordering::Relaxed) < policy.dek_messages_max
            && self.bytes.load(Ordering::Relaxed).saturating_add(bytes) <= policy.dek_bytes_max
    }

    /// Adds bytes to a message that was admitted before its length was known.
    pub(super) fn add_bytes(&self, bytes: u64) {
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn sealed(&self, now: Timestamp) {
        note(&self.sealed_at_ms, ms(now));
    }

    pub(super) fn opened(&self, now: Timestamp) {
        note(&self.opened_at_ms, ms(now));
    }

    /// Whether any count has reached `percent` of its limit.
    pub(super) fn reached(&self, percent: u64, policy: &KeyPolicy) -> bool {
        let reached = |used: u64, max: u64| u128::from(used) * 100 >= u128::from(max) * u128::from(percent);
        reached(self.messages.load(Ordering::Relaxed), policy.dek_messages_max)
            || reached(self.bytes.load(Ordering::Relaxed), policy.dek_bytes_max)
    }

    /// Takes what was counted since the last time; `None` where nothing was.
    pub(super) fn take_unflushed(&self) -> Option<Unflushed> {
        let (messages, bytes) = (self.messages.load(Ordering::Relaxed), self.bytes.load(Ordering::Relaxed));
        let (sealed, opened) =
            (self.sealed_at_ms.load(Ordering::Relaxed), self.opened_at_ms.load(Ordering::Relaxed));
        let latest = sealed.max(opened);
        let before = (
            self.flushed_messages.swap(messages, Ordering::Relaxed),
            self.flushed_bytes.swap(bytes, Ordering::Relaxed),
            self.flushed_at_ms.swap(latest, Ordering::Relaxed),
        );
        if before == (messages, bytes, latest) {
            return None;
        }
        Some(Unflushed {
            messages: messages.saturating_sub(before.0),
            bytes: bytes.saturating_sub(before.1),
            sealed_at: minute(sealed),
            opened_at: minute(opened),
        })
    }

    /// Puts back what could not be flushed.
    pub(super) fn give_back(&self, unflushed: &Unflushed) {
        self.flushed_messages.fetch_sub(unflushed.messages, Ordering::Relaxed);
        self.flushed_bytes.fetch_sub(unflushed.bytes, Ordering::Relaxed);
        self.flushed_at_ms.store(0, Ordering::Relaxed);
    }
}

fn ms(at: Timestamp) -> u64 {
    u64::try_from(at.unix_ms()).unwrap_or(0)
}

/// To the minute: enough to tell what is still in use, and no trace of single requests.
fn minute(at_ms: u64) -> Option<Timestamp> {
    (at_ms > 0).then(|| Timestamp::from_unix_ms(i64::try_from(at_ms - at_ms % 60_000).unwrap_or(i64::MAX)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const POLICY: KeyPolicy = KeyPolicy {
        dek_age_secs_max: 60,
        dek_messages_max: 10,
        dek_bytes_max: 100,
        envelope: crate::store::EnvelopeWeight::Embedded,
    };

    #[test]
    fn the_last_message_within_the_limit_is_admitted_and_the_next_is_not() {
        let counts = Counts::default();
        for _ in 0..10 {
            assert!(counts.admit(1, &POLICY));
        }
        assert!(!counts.admit(1, &POLICY));
        let counts = Counts::from_registry(3, 60);
        assert!(counts.admit(40, &POLICY));
        assert!(!counts.admit(1, &POLICY));
        assert!(counts.admit(0, &POLICY));
    }

    #[test]
    fn eighty_percent_is_reached_at_eighty_and_not_before() {
        let counts = Counts::from_registry(7, 79);
        assert!(!counts.reached(80, &POLICY));
        assert!(counts.admit(0, &POLICY));
        assert!(counts.reached(80, &POLICY));
        assert!(Counts::from_registry(0, 80).reached(80, &POLICY));
    }

    #[test]
    fn what_is_counted_is_flushed_once_and_comes_back_when_it_could_not_be() {
        let counts = Counts::from_registry(5, 5);
        assert_eq!(counts.take_unflushed(), None);
        assert!(counts.admit(7, &POLICY));
        counts.sealed(Timestamp::from_unix_ms(61_001));
        let taken = counts.take_unflushed().unwrap();
        assert_eq!((taken.messages, taken.bytes), (1, 7));
        assert_eq!(taken.sealed_at, Some(Timestamp::from_unix_ms(60_000)));
        assert_eq!(counts.take_unflushed(), None);
        counts.give_back(&taken);
        assert_eq!(counts.take_unflushed(), Some(taken));
    }
}
