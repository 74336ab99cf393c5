//! What is kept for one region: its circuit, its pace and its calls in flight.

use std::collections::HashSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::Options;
use super::breaker::{Breaker, Change, Circuit, Limits};
use super::pace::Pace;
use crate::clock::Clock;
use crate::kms::{KmsError, OutageCause, Urgency};
use crate::tenant::KekId;

/// How many KEKs that did not answer are remembered, so that others may be asked.
const SILENT_MAX: usize = 64;
/// How often the background looks whether the foreground has passed.
const BACKGROUND_LOOKS: Duration = Duration::from_millis(20);

/// What was seen no longer ago than this is how it is now.
const LATELY: Duration = Duration::from_mins(1);

/// What is known of a region.
pub(super) struct Health {
    pub(super) circuit: Circuit,
    pub(super) circuit_since: Option<Duration>,
    pub(super) credentials_since: Option<Duration>,
    pub(super) throttles: bool,
    pub(super) out_lately: bool,
}

pub(super) struct Region {
    name: Box<str>,
    clock: Clock,
    in_flight: Arc<Semaphore>,
    background: Arc<Semaphore>,
    /// Calls in the foreground that wait for their turn.
    waiting: AtomicUsize,
    state: Mutex<State>,
}

struct State {
    breaker: Breaker,
    pace: Pace,
    /// KEKs that could not be asked since the KMS last answered.
    silent: HashSet<KekId>,
    /// Since when the service's own credentials do not do, and when that was last seen. Until the KMS answers anything
    /// else.
    credentials: Option<(Duration, Duration)>,
}

impl State {
    /// A KEK that has not been tried itself is worth a probe of its own: it may be only another one's key store that
    /// hangs, and its tenant should not pay for that.
    fn untried(&self, kek: &KekId) -> bool {
        self.silent.len() < SILENT_MAX && !self.silent.contains(kek)
    }
}

/// A call's place among those in flight.
pub(super) struct Slot {
    _places: [Option<OwnedSemaphorePermit>; 2],
}

impl Region {
    pub(super) fn new(name: &str, options: &Options, clock: Clock) -> Self {
        let limits = Limits {
            failures: options.breaker_failures.max(1),
            open: Duration::from_millis(options.breaker_open_ms),
            open_max: Duration::from_millis(options.breaker_open_ms_max.max(options.breaker_open_ms)),
            probe: Duration::from_millis(options.try_ms_max),
        };
        let in_flight = options.in_flight_max.clamp(1, Semaphore::MAX_PERMITS);
        let state = State {
            breaker: Breaker::new(limits),
            pace: Pace::new(options.calls_per_sec_max, clock.monotonic()),
            silent: HashSet::new(),
            credentials: None,
        };
        Self {
            name: name.into(),
            clock,
            in_flight: Arc::new(Semaphore::new(in_flight)),
            background: Arc::new(Semaphore::new((in_flight / 2).max(1))),
            waiting: AtomicUsize::new(0),
            state: Mutex::new(state),
        }
    }

    /// Waits for this call's turn, but not past `deadline`, and not for a region that is known to be out.
    pub(super) async fn enter(
        &self,
        kek: &KekId,
        urgency: Urgency,
        deadline: Duration,
    ) -> Result<Slot, KmsError> {
        // Looked at before the queue, and again after it: a crowd that waits for a dead region helps nobody.
        self.look_at_breaker(kek)?;
        let left = deadline.saturating_sub(self.clock.monotonic());
        let turn = async {
            match urgency {
                Urgency::Foreground => self.turn(deadline).await,
                Urgency::Background => self.turn_after_others(deadline).await,
            }
        };
        let slot = tokio::select! {
            biased;
            slot = turn => slot,
            () = self.clock.sleep(left) => None,
        };
        let slot = slot.ok_or_else(|| {
            let detail = format!("the limits of calls to {} left no room in time", self.name);
            KmsError::outage_by(kek, OutageCause::OwnLimit, detail)
        })?;
        self.pass_breaker(kek)?;
        Ok(slot)
    }

    fn look_at_breaker(&self, kek: &KekId) -> Result<(), KmsError> {
        let now = self.clock.monotonic();
        let mut state = self.state();
        if state.untried(kek) {
            state.breaker.probe_early(now);
        }
        state.breaker.blocked_until(now).map_or(Ok(()), |until| Err(self.left_alone(kek, now, until)))
    }

    fn pass_breaker(&self, kek: &KekId) -> Result<(), KmsError> {
        let now = self.clock.monotonic();
        self.state().breaker.admit(now).map_err(|until| self.left_alone(kek, now, until))
    }

    fn left_alone(&self, kek: &KekId, now: Duration, until: Duration) -> KmsError {
        let wait = until.saturating_sub(now);
        let detail = format!("{} does not answer; it is asked again in {} ms", self.name, wait.as_millis());
        KmsError::left_alone(kek, wait, detail)
    }

    /// The turn of a call that a client waits for. None where it would come too late.
    async fn turn(&self, deadline: Duration) -> Option<Slot> {
        let _waiting = Waiting::new(&self.waiting);
        let place = Arc::clone(&self.in_flight).acquire_owned().await.ok();
        loop {
            let wait = match self.pace_allows() {
                Ok(()) => return Some(Slot { _places: [None, place] }),
                Err(wait) => wait,
            };
            self.sleep_before(deadline, wait).await?;
        }
    }

    /// The turn of a call in the background, when no client waits. It holds no place while it waits itself: clients
    /// may need that very one.
    async fn turn_after_others(&self, deadline: Duration) -> Option<Slot> {
        loop {
            let wait = if self.clients_wait() {
                BACKGROUND_LOOKS
            } else {
                let behind = Arc::clone(&self.background).acquire_owned().await.ok();
                let place = Arc::clone(&self.in_flight).acquire_owned().await.ok();
                if self.clients_wait() {
                    BACKGROUND_LOOKS
                } else {
                    match self.pace_allows() {
                        Ok(()) => return Some(Slot { _places: [behind, place] }),
                        Err(wait) => wait,
                    }
                }
            };
            self.sleep_before(deadline, wait).await?;
        }
    }

    fn clients_wait(&self) -> bool {
        self.waiting.load(Ordering::Acquire) > 0
    }

    /// Whether a call may be sent now, or how long until one may.
    fn pace_allows(&self) -> Result<(), Duration> {
        let now = self.clock.monotonic();
        self.state().pace.take(now).map_err(|wait| wait.max(Duration::from_millis(1)))
    }

    /// None where the deadline would be over by then.
    async fn sleep_before(&self, deadline: Duration, wait: Duration) -> Option<()> {
        if self.clock.monotonic() + wait >= deadline {
            return None;
        }
        self.clock.sleep(wait).await;
        Some(())
    }

    /// The KMS has done what it was asked, or has said why not.
    pub(super) fn served(&self) {
        let now = self.clock.monotonic();
        self.state().pace.served(now);
        self.answered();
    }

    fn answered(&self) {
        let mut state = self.state();
        state.silent.clear();
        if state.credentials.take().is_some() {
            tracing::info!(region = &*self.name, "the credentials for the KMS are taken again");
        }
        if state.breaker.answered() == Change::Closed {
            tracing::info!(region = &*self.name, "the KMS answers again");
        }
    }

    /// Learns from a failed call.
    pub(super) fn heed(&self, failure: &KmsError) {
        let now = self.clock.monotonic();
        let KmsError::Outage { cause, kek, .. } = failure else { return self.served() };
        match cause {
            OutageCause::Unreachable => {
                let mut state = self.state();
                if state.silent.len() < SILENT_MAX {
                    state.silent.insert(kek.clone());
                }
                if state.breaker.failed(now) == Change::Opened {
                    tracing::warn!(region = &*self.name, error = %failure, "the KMS does not answer; it is left alone for a while");
                }
            }
            OutageCause::Throttled => {
                self.state().pace.throttled(now);
                self.answered();
            }
            // One key or one credential: no word about the region, but it has answered.
            OutageCause::KeyUnavailable => self.answered(),
            OutageCause::Credentials => {
                let since = &mut self.state().credentials;
                if since.is_none() {
                    tracing::warn!(region = &*self.name, error = %failure, "the credentials for the KMS do not do");
                }
                *since = Some((since.map_or(now, |(since, _)| since), now));
            }
            OutageCause::OwnLimit => {}
        }
    }

    /// How it is at this moment; the times are monotonic.
    pub(super) fn health(&self) -> Health {
        let now = self.clock.monotonic();
        let state = self.state();
        let (circuit, circuit_since) = state.breaker.state();
        let refused_lately = state.credentials.is_some_and(|(_, last)| now < last + LATELY);
        Health {
            circuit,
            circuit_since,
            credentials_since: state.credentials.map(|(since, _)| since),
            throttles: state.pace.throttled_at().is_some_and(|at| now < at + LATELY),
            out_lately: state.breaker.was_out_lately(now, LATELY) || refused_lately,
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Counts one that waits, for as long as it lives.
struct Waiting<'a>(&'a AtomicUsize);

impl<'a> Waiting<'a> {
    fn new(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::AcqRel);
        Self(count)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}
