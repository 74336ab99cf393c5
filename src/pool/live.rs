//! A data key in memory.

use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use arc_swap::{ArcSwap, ArcSwapOption};
use envelope::{DataKey, DataKeyId, WrappedKeys};

use super::pages;
use super::usage::{Counts, note};
use crate::spread::{Near, Places, Spread};
use crate::store::watch::Mark;
use crate::store::{DekScope, DekState, KeyPolicy};
use crate::tenant::KekId;

/// A data key that the KMS has vouched for, and what the registry says of it. Shared by all requests that use it;
/// the plaintext inside can be taken away at any moment, while the rest stays to remember the counts.
pub(super) struct LiveDek {
    pub(super) id: DataKeyId,
    pub(super) scope: DekScope,
    /// The canonical form of the KMS context that this data key calls for.
    pub(super) kms_context: Box<[u8]>,
    pub(super) counts: Counts,
    key: ArcSwapOption<Spread<DataKey>>,
    facts: ArcSwap<Facts>,
    vouched_by: ArcSwap<KekId>,
    /// When the KMS last vouched for it; monotonic.
    vouched_ms: AtomicU64,
    /// Until when the plaintext may be used; monotonic.
    usable_until_ms: AtomicU64,
    /// Whether it is used past its time because the KMS cannot be asked.
    stale: AtomicBool,
    /// When it was last used; monotonic.
    used_ms: AtomicU64,
    /// When a renewal was last tried; monotonic.
    pub(super) tried_ms: AtomicU64,
    /// When its successor was last seen to; monotonic.
    pub(super) prepared_ms: AtomicU64,
    /// When the cache was last told that it is in use; monotonic.
    pub(super) touched_ms: AtomicU64,
    mark: Arc<Mark>,
    answers: Arc<Mark>,
}

/// A data key as all requests share it.
pub(super) type SharedDek = Arc<Spread<LiveDek>>;

/// The wrapped forms of a data key, which most requests put into an envelope or find in one.
pub(super) struct Section {
    all: WrappedKeys,
    near: Places<WrappedKeys>,
}

impl Section {
    /// For one request.
    pub(super) fn near(&self) -> WrappedKeys {
        self.near.near(|| self.all.apart()).clone()
    }
}

impl From<WrappedKeys> for Section {
    fn from(all: WrappedKeys) -> Self {
        Self { all, near: Places::default() }
    }
}

impl Deref for Section {
    type Target = WrappedKeys;

    fn deref(&self) -> &WrappedKeys {
        &self.all
    }
}

/// What the registry said of a data key when it was last read.
#[derive(Clone)]
pub(super) struct Facts {
    pub(super) state: DekState,
    pub(super) policy: KeyPolicy,
    /// The wrapped forms as an embedded envelope carries them.
    pub(super) section: Arc<Section>,
    /// When its age reaches the policy's limit; monotonic. Never, where it is not active.
    pub(super) retires_at: Duration,
    /// The mark at which all this was read.
    pub(super) seen_mark: u64,
    /// Whether the registry knows it at all: an embedded envelope can bring a data key that was lost there.
    pub(super) registered: bool,
    /// Where the registry could not be asked about it: how often it had answered until then. All this holds until it
    /// answers again.
    pub(super) unasked_since: Option<u64>,
}

/// How long plaintext lives.
#[derive(Clone, Copy)]
pub(super) struct Lifetimes {
    pub(super) plaintext_max: Duration,
    pub(super) stale_max: Duration,
    /// How long the KMS takes at most to answer or to be given up.
    pub(super) kms_answer: Duration,
}

impl LiveDek {
    pub(super) fn shared(
        id: DataKeyId,
        scope: DekScope,
        kms_context: &[u8],
        counts: Counts,
        facts: Facts,
        mark: Arc<Mark>,
        answers: Arc<Mark>,
    ) -> SharedDek {
        let nobody = facts.section.keys().first().and_then(|form| form.kek.parse::<KekId>().ok());
        Arc::new(Spread::new(Self {
            id,
            scope,
            kms_context: kms_context.into(),
            counts,
            key: ArcSwapOption::empty(),
            facts: ArcSwap::from_pointee(facts),
            vouched_by: ArcSwap::from_pointee(nobody.unwrap_or_else(unknown_kek)),
            vouched_ms: AtomicU64::new(0),
            usable_until_ms: AtomicU64::new(0),
            stale: AtomicBool::new(false),
            used_ms: AtomicU64::new(0),
            tried_ms: AtomicU64::new(0),
            prepared_ms: AtomicU64::new(0),
            touched_ms: AtomicU64::new(0),
            mark,
            answers,
        }))
    }

    /// The key, if it may be used now and what is known of it is up to date.
    pub(super) fn usable(&self, now: Duration) -> Option<(Near<DataKey>, arc_swap::Guard<Arc<Facts>>)> {
        let facts = self.facts.load();
        if !self.holds(&facts) {
            return None;
        }
        let key = self.plaintext(now)?;
        Some((key, facts))
    }

    /// The wrapped forms as an embedded envelope carries them, as far as is known.
    pub(super) fn section(&self) -> WrappedKeys {
        self.facts.load().section.near()
    }

    /// Whether what is known of it is up to date.
    pub(super) fn is_current(&self) -> bool {
        self.holds(&self.facts.load())
    }

    fn holds(&self, facts: &Facts) -> bool {
        facts.seen_mark == self.mark.now()
            && facts.unasked_since.is_none_or(|answers| answers == self.answers.now())
    }

    /// The key, if the KMS's word for it still counts.
    pub(super) fn plaintext(&self, now: Duration) -> Option<Near<DataKey>> {
        let now_ms = as_ms(now);
        if now_ms >= self.usable_until_ms.load(Ordering::Acquire) {
            return None;
        }
        let key = self.key.load().as_ref()?.near();
        note(&self.used_ms, now_ms);
        Some(key)
    }

    /// The KMS has just given this key.
    pub(super) fn vouch(&self, key: DataKey, by: KekId, now: Duration, lifetimes: Lifetimes) {
        pages::keep(&key);
        self.key.store(Some(Arc::new(Spread::new(key))));
        self.vouched_by.store(Arc::new(by));
        self.vouched_ms.store(as_ms(now), Ordering::Release);
        // Whoever has it fetched is about to use it.
        let _ = self.used_ms.compare_exchange(0, as_ms(now), Ordering::Relaxed, Ordering::Relaxed);
        self.stale.store(false, Ordering::Release);
        self.usable_until_ms.store(as_ms(now.saturating_add(lifetimes.plaintext_max)), Ordering::Release);
    }

    /// The KMS was asked and did not answer, up to `silent_at`: go on with what is here for one more lifetime from
    /// then on, and up to the stated limit in all. False where that has passed or nothing is here.
    ///
    /// Not up to the limit at once: where the KMS is well again and nobody gets to ask it, a KEK's owner's no would
    /// take that long.
    pub(super) fn outlast(&self, silent_at: Duration, now: Duration, lifetimes: Lifetimes) -> bool {
        let until = silent_at.saturating_add(lifetimes.plaintext_max).min(self.outlasts_until(lifetimes));
        if now >= until || self.key.load().is_none() {
            return false;
        }
        self.stale.store(true, Ordering::Release);
        self.usable_until_ms.fetch_max(as_ms(until), Ordering::AcqRel);
        true
    }

    /// Whether not even an outage of the KMS excuses the plaintext any longer.
    pub(super) fn is_beyond_outage(&self, now: Duration, lifetimes: Lifetimes) -> bool {
        now >= self.outlasts_until(lifetimes)
    }

    fn outlasts_until(&self, lifetimes: Lifetimes) -> Duration {
        self.vouched_at().saturating_add(lifetimes.plaintext_max).saturating_add(lifetimes.stale_max)
    }

    /// Takes the plaintext away. It is wiped when the last request that holds it is done.
    pub(super) fn wipe(&self) {
        self.usable_until_ms.store(0, Ordering::Release);
        self.key.store(None);
    }

    pub(super) fn holds_plaintext(&self) -> bool {
        self.key.load().is_some()
    }

    pub(super) fn is_past(&self, now: Duration) -> bool {
        as_ms(now) >= self.usable_until_ms.load(Ordering::Acquire)
    }

    pub(super) fn is_stale(&self) -> bool {
        self.stale.load(Ordering::Acquire)
    }

    pub(super) fn vouched_by(&self) -> Arc<KekId> {
        self.vouched_by.load_full()
    }

    pub(super) fn vouched_at(&self) -> Duration {
        Duration::from_millis(self.vouched_ms.load(Ordering::Acquire))
    }

    pub(super) fn used_at(&self) -> Duration {
        Duration::from_millis(self.used_ms.load(Ordering::Relaxed))
    }

    pub(super) fn facts(&self) -> arc_swap::Guard<Arc<Facts>> {
        self.facts.load()
    }

    pub(super) fn learn(&self, facts: Facts) {
        self.facts.store(Arc::new(facts));
    }
}

fn unknown_kek() -> KekId {
    #[expect(clippy::expect_used, reason = "a constant that parses")]
    "local:unknown".parse().expect("a valid KEK id")
}

pub(super) fn as_ms(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use envelope::KeyMaterial;

    use super::*;
    use crate::store::EnvelopeWeight;

    fn live() -> SharedDek {
        let facts = Facts {
            state: DekState::Active,
            policy: KeyPolicy {
                dek_age_secs_max: 60,
                dek_messages_max: 10,
                dek_bytes_max: 100,
                envelope: EnvelopeWeight::Compact,
            },
            section: Arc::new(WrappedKeys::compact().into()),
            retires_at: Duration::MAX,
            seen_mark: 0,
            registered: true,
            unasked_since: None,
        };
        let scope = DekScope {
            tenant: "acme".parse().unwrap(),
            key: "default".parse().unwrap(),
            bound: envelope::EncryptionContext::new(),
        };
        let id = DataKeyId::from_bytes([1; 16]);
        LiveDek::shared(id, scope, b"", Counts::default(), facts, Arc::default(), Arc::default())
    }

    #[test]
    fn a_key_that_is_taken_away_is_gone_with_the_last_request_that_holds_it_whichever_threads_they_are_on() {
        let live = live();
        let lifetimes = Lifetimes {
            plaintext_max: Duration::from_mins(5),
            stale_max: Duration::ZERO,
            kms_answer: Duration::ZERO,
        };
        let key = DataKey::new(live.id, KeyMaterial::from_slice(&[7; 32]).unwrap());
        live.vouch(key, "local:test".parse().unwrap(), Duration::ZERO, lifetimes);
        let mut held: Vec<Near<DataKey>> = std::thread::scope(|scope| {
            let requests: Vec<_> =
                (0..20).map(|_| scope.spawn(|| live.plaintext(Duration::ZERO).unwrap())).collect();
            requests.into_iter().map(|request| request.join().unwrap()).collect()
        });
        let key = Arc::downgrade(&held[0]);
        live.wipe();
        assert!(live.plaintext(Duration::ZERO).is_none());
        while let Some(last) = held.pop() {
            assert!(key.upgrade().is_some(), "{} hold it", held.len() + 1);
            drop(last);
        }
        assert!(key.upgrade().is_none());
    }
}
