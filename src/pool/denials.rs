//! Which KEKs' owners have said no, and since when: heard here and told to the other processes, or told by them.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio_util::task::TaskTracker;

use crate::clock::Clock;
use crate::store::{KekDenial, Store};
use crate::tenant::KekId;

/// A KEK's denials are written into the registry no more often than this: a dead KEK is denied again and again.
const TELL_EVERY: Duration = Duration::from_secs(5);
/// How much longer than what is in memory lives a denial is kept, since clocks differ.
const CLOCKS_APART_MAX: Duration = Duration::from_hours(1);

/// The denials that matter to what is in memory.
pub(super) struct Denials {
    store: Arc<dyn Store>,
    clock: Clock,
    tracker: TaskTracker,
    /// Nothing that was in memory at a denial lives longer than this.
    kept: Duration,
    heard: Mutex<HashMap<KekId, Heard>>,
}

struct Heard {
    /// When this process last heard of a denial; monotonic.
    at: Duration,
    /// When it last told the others; monotonic.
    told_at: Option<Duration>,
    /// The number under which it did.
    told_as: u64,
    /// Whether the others have still to be told.
    untold: bool,
}

impl Heard {
    fn is_due(&self, now: Duration) -> bool {
        self.untold && self.told_at.is_none_or(|told_at| now.saturating_sub(told_at) >= TELL_EVERY)
    }
}

impl Denials {
    /// None are known yet. `lives_max` is how long what is in memory lives at most. Writing runs on `tracker`.
    pub(super) fn new(
        store: Arc<dyn Store>,
        clock: Clock,
        lives_max: Duration,
        tracker: TaskTracker,
    ) -> Arc<Self> {
        let kept = lives_max.saturating_add(CLOCKS_APART_MAX);
        Arc::new(Self { store, clock, tracker, kept, heard: Mutex::default() })
    }

    /// The KMS has said no to this process, which tells the others.
    pub(super) fn hear(self: &Arc<Self>, kek: &KekId) {
        let now = self.clock.monotonic();
        let mut heard = self.heard();
        let known =
            heard.entry(kek.clone()).or_insert(Heard { at: now, told_at: None, told_as: 0, untold: true });
        known.at = now;
        known.untold = true;
        drop(heard);
        self.tell_due();
    }

    /// Another process has heard it. False for what this one has told itself.
    pub(super) fn learn(&self, denial: &KekDenial) -> bool {
        let now = self.clock.monotonic();
        let mut heard = self.heard();
        let known = heard.entry(denial.kek.clone()).or_insert(Heard {
            at: now,
            told_at: None,
            told_as: 0,
            untold: false,
        });
        let news = known.told_as != denial.seq;
        if news {
            known.at = now;
        }
        news
    }

    /// Whether this KEK, or a replica of it, has been denied since `asked_at`: what the KMS was asked at that moment is
    /// overtaken then, whatever it answers.
    pub(super) fn came_since(&self, kek: &KekId, asked_at: Duration) -> bool {
        self.heard().iter().any(|(denied, heard)| heard.at > asked_at && denied.same_material(kek))
    }

    /// Tells the others what they have not been told yet, as far as it is time, and forgets what is of no use any more.
    pub(super) fn tell_due(self: &Arc<Self>) {
        let now = self.clock.monotonic();
        let mut heard = self.heard();
        heard.retain(|_, known| known.untold || now.saturating_sub(known.at) < self.kept);
        for (kek, known) in heard.iter_mut().filter(|(_, known)| known.is_due(now)) {
            known.told_at = Some(now);
            known.untold = false;
            let (own, kek) = (Arc::clone(self), kek.clone());
            self.tracker.spawn(async move { own.tell(&kek).await });
        }
    }

    async fn tell(&self, kek: &KekId) {
        let now = self.clock.now();
        let noted = self.store.note_denial(kek, now, now.minus(self.kept)).await;
        let mut heard = self.heard();
        let known = heard.get_mut(kek);
        match (noted, known) {
            (Ok(seq), Some(known)) => known.told_as = seq,
            (Ok(_), None) => {}
            (Err(error), known) => {
                if let Some(known) = known {
                    known.untold = true;
                }
                drop(heard);
                tracing::warn!(%kek, %error, "other processes are not told yet that a KEK is denied");
            }
        }
    }

    fn heard(&self) -> MutexGuard<'_, HashMap<KekId, Heard>> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
