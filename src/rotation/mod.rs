//! Keys change by themselves: the reconciler.
//!
//! A background task that takes no input, may run twice and may die at any line. In every round it asks the registry
//! which tenants are due, takes the lease (one process at a time applies anything), and for each tenant: load, decide
//! ([`sweep`], pure), apply. Every change it makes carries the lease's token, so that one who was overtaken while he
//! slept changes nothing. What is left undone is found again in the next round, because the state tells it.
//!
//! One tenant's error or panic is written down for that tenant, which is tried again later and later; the others go
//! on. KMS calls keep to a budget, so that requests keep their share.

mod budget;
mod lease;
mod shred;
pub mod sweep;
mod tenant;

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::audit::Audit;
use crate::clock::Clock;
use crate::kms::Kms;
use crate::pool::DekPool;
use crate::store::watch::ChangeWatch;
use crate::store::{FencedChange, Registry, StoreError, SweepRecord, Swept};
use crate::tenant::KekId;

use budget::Budget;
use lease::Lease;

/// The lease that the reconciler holds while it applies anything.
pub const LEASE: &str = "rotation";

/// How many tenants are asked for at a time: a hundred thousand do not load at once.
const TENANTS_PAGE: u32 = 64;

/// Rotation's limits.
#[derive(Clone, Debug)]
pub struct Options {
    /// How often the registry is asked which tenants are due, in seconds, give or take a fifth. Default 5. Changes
    /// that this process sees are acted on at once.
    pub poll_secs: u64,
    /// How long the lease lasts without being renewed, in seconds. Default 30.
    pub lease_secs: u64,
    /// How often each tenant is looked at without a reason, in seconds, on average. Default 3,600.
    pub sweep_secs: u64,
    /// How often all data keys of a tenant are looked at, and not only those made since, in seconds. Default 86,400.
    pub full_sweep_secs: u64,
    /// For how long a KEK's answer about its material counts, in seconds. Default 300.
    pub kek_check_secs: u64,
    /// How many KMS calls rotation may make in a second. Default 50.
    pub kms_calls_per_sec_max: u32,
    /// How many tenants are worked on at once. Default 4.
    pub tenants_at_once_max: usize,
    /// How many data keys of one tenant are changed before others have their turn. Default 1,000.
    pub deks_per_turn_max: usize,
    /// How many data keys are loaded at a time. Default 100.
    pub page_deks: u32,
    /// The longest wait before a tenant that failed is tried again, in seconds. Default 3,600; the first is 5.
    pub backoff_secs_max: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            poll_secs: 5,
            lease_secs: 30,
            sweep_secs: 3_600,
            full_sweep_secs: 86_400,
            kek_check_secs: 300,
            kms_calls_per_sec_max: 50,
            tenants_at_once_max: 4,
            deks_per_turn_max: 1_000,
            page_deks: 100,
            backoff_secs_max: 3_600,
        }
    }
}

/// Why a round ended early.
#[derive(Clone, Debug, thiserror::Error)]
pub enum RotationError {
    /// The registry.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The operating system gives no randomness.
    #[error("the operating system gives no randomness")]
    NoRandomness,
}

/// What a round has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Round {
    /// Tenants that were looked at.
    pub tenants: usize,
    /// Tenants of which something failed, which is tried again.
    pub failed: usize,
    /// Somebody else holds the lease, so nothing was done here.
    pub held_elsewhere: bool,
}

/// What the reconciler works with.
pub struct Parts {
    /// The registry.
    pub store: Arc<dyn Registry>,
    /// The KMS.
    pub kms: Arc<dyn Kms>,
    /// Makes data keys.
    pub pool: DekPool,
    /// Tells of changes.
    pub watch: Arc<ChangeWatch>,
    /// The time.
    pub clock: Clock,
    /// The record of what is destroyed.
    pub audit: Audit,
}

/// The background task. Cloning is cheap; clones are the same reconciler.
#[derive(Clone)]
pub struct Reconciler(Arc<Inner>);

struct Inner {
    parts: Parts,
    options: Options,
    budget: Budget,
    /// Names this process as a holder of the lease.
    holder: String,
    /// What KEKs answered, and when (monotonic).
    asked: Mutex<HashMap<KekId, (Duration, Option<String>)>>,
}

impl Reconciler {
    /// A reconciler over these parts. Does nothing until it is run.
    pub fn new(parts: Parts, options: Options) -> Self {
        let budget = Budget::new(parts.clock.clone(), options.kms_calls_per_sec_max);
        let mut random = [0; 16];
        // Without randomness two processes could take each other for themselves; then neither gets the lease.
        let holder = match getrandom::fill(&mut random) {
            Ok(()) => uuid::Builder::from_random_bytes(random).into_uuid().to_string(),
            Err(_) => String::new(),
        };
        Self(Arc::new(Inner { parts, options, budget, holder, asked: Mutex::default() }))
    }

    /// Runs rounds until `stop`. Nothing has to be tidied up afterwards.
    pub async fn run(self, stop: CancellationToken) {
        loop {
            let round = async {
                self.wait().await;
                if let Err(error) = self.reconcile().await {
                    tracing::warn!(%error, "a round of rotation ended early; the next one goes on");
                }
            };
            tokio::select! {
                () = round => {}
                () = stop.cancelled() => return,
            }
        }
    }

    async fn wait(&self) {
        let inner = &self.0;
        let poll = Duration::from_secs(inner.options.poll_secs);
        let poll = jittered(poll, 20, &(&inner.holder, inner.parts.clock.monotonic()));
        tokio::select! {
            () = inner.parts.clock.sleep(poll) => {}
            () = inner.parts.watch.moved() => {}
        }
    }

    /// One round: everything that is due now, if nobody else is at it.
    pub async fn reconcile(&self) -> Result<Round, RotationError> {
        let inner = &self.0;
        let mut round = Round::default();
        let mut lease = None;
        loop {
            let now = inner.parts.clock.now();
            let due = inner.parts.store.due_sweeps(now, TENANTS_PAGE).await?;
            let shreds = match &lease {
                None => inner.parts.store.due_shreds(now, TENANTS_PAGE).await?,
                // What failed in this round is not tried again before the next.
                Some(_) => vec![],
            };
            if due.is_empty() && shreds.is_empty() {
                break;
            }
            let held = match lease.take() {
                Some(held) => held,
                None => match self.take_lease().await? {
                    Some(held) => held,
                    None => return Ok(Round { held_elsewhere: true, ..round }),
                },
            };
            for due in &shreds {
                shred::destroy(inner, &held, due).await?;
            }
            let ended = self.sweep_all(&held, due, &mut round).await;
            lease = Some(held);
            ended?;
        }
        if let Some(lease) = lease {
            lease.release().await;
        }
        Ok(round)
    }

    async fn take_lease(&self) -> Result<Option<Arc<Lease>>, RotationError> {
        let inner = &self.0;
        if inner.holder.is_empty() {
            return Err(RotationError::NoRandomness);
        }
        let ttl = Duration::from_secs(inner.options.lease_secs);
        let (store, clock) = (Arc::clone(&inner.parts.store), inner.parts.clock.clone());
        Ok(Lease::take(store, clock, LEASE, &inner.holder, ttl).await?.map(Arc::new))
    }

    /// Looks at these tenants, some at once. What one of them does to itself is its own.
    async fn sweep_all(
        &self,
        lease: &Arc<Lease>,
        due: Vec<SweepRecord>,
        round: &mut Round,
    ) -> Result<(), RotationError> {
        let mut waiting = due.into_iter();
        // Dropped with this future, and all that runs in it: a round that is stopped leaves nothing behind.
        let mut running = JoinSet::new();
        let mut records: HashMap<tokio::task::Id, SweepRecord> = HashMap::new();
        loop {
            while running.len() < self.0.options.tenants_at_once_max {
                let Some(record) = waiting.next() else { break };
                let (inner, lease, swept) = (Arc::clone(&self.0), Arc::clone(lease), record.clone());
                let task = running.spawn(async move { tenant::sweep_tenant(&inner, &lease, &swept).await });
                records.insert(task.id(), record);
            }
            let Some(ended) = running.join_next_with_id().await else { return Ok(()) };
            let (id, outcome) = match ended {
                Ok((id, outcome)) => (id, outcome),
                Err(error) => (error.id(), Ok(tenant::Turn::failed("its rotation panicked: see the log"))),
            };
            let Some(record) = records.remove(&id) else { continue };
            let turn = match outcome {
                Ok(turn) => turn,
                Err(lost @ StoreError::LostLease(_)) => return Err(lost.into()),
                Err(error) => tenant::Turn::failed(&error.to_string()),
            };
            round.tenants += 1;
            round.failed += usize::from(turn.error.is_some());
            self.write_down(lease, record, turn).await?;
        }
    }

    /// Says in the registry how it went, and when to look again.
    async fn write_down(
        &self,
        lease: &Lease,
        before: SweepRecord,
        turn: tenant::Turn,
    ) -> Result<(), RotationError> {
        let (options, now) = (&self.0.options, self.0.parts.clock.now());
        let nudges_seen = before.nudges;
        let failures = if turn.error.is_some() { before.failures.saturating_add(1) } else { 0 };
        let seed = (before.tenant.as_str(), now.unix_ms());
        let wait = if let Some(error) = &turn.error {
            tracing::warn!(tenant = %before.tenant, error, failures, "rotation of a tenant failed; it is tried again");
            let doubled = 5_u64.saturating_mul(1 << (failures - 1).min(32));
            jittered(Duration::from_secs(doubled.min(options.backoff_secs_max)), 20, &seed)
        } else if turn.unfinished {
            Duration::ZERO
        } else {
            // So far apart that tenants who came due together drift apart.
            jittered(Duration::from_secs(options.sweep_secs), 50, &seed)
        };
        let mut record = SweepRecord {
            due_at: now.plus(wait),
            failures,
            last_error: turn.error,
            swept_at: Some(now),
            ..before
        };
        if let Some(checked) = turn.checked {
            record.basis = Some(checked.basis);
            record.full_at = if checked.full { Some(now) } else { record.full_at };
            record.checked_through = checked.through.max(record.checked_through);
        }
        lease.keep().await?;
        let swept = FencedChange::Swept(Swept { record, nudges_seen });
        Ok(self.0.parts.store.apply_fenced(&lease.fence(), &[swept], now).await?)
    }
}

impl Inner {
    fn asked(&self) -> std::sync::MutexGuard<'_, HashMap<KekId, (Duration, Option<String>)>> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// `of`, give or take up to `percent`; the same for the same seed.
fn jittered(of: Duration, percent: u32, seed: &impl Hash) -> Duration {
    let mut hasher = DefaultHasher::new();
    seed.hash(&mut hasher);
    let span = u64::from(percent) * 2 + 1;
    let share = 100 - percent + u32::try_from(hasher.finish() % span).unwrap_or(percent);
    of * share / 100
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jitter_stays_within_its_share_and_spreads() {
        let hour = Duration::from_hours(1);
        let all: Vec<Duration> = (0..1_000).map(|seed: u32| jittered(hour, 50, &seed)).collect();
        assert!(all.iter().all(|at| (hour / 2..=hour * 3 / 2).contains(at)));
        let first_minute = all.iter().filter(|at| **at < hour / 2 + Duration::from_mins(1)).count();
        assert!(first_minute < 60, "{first_minute} of 1,000 come due in one minute of sixty");
    }
}
