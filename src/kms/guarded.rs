//! A KMS that is slow, throttles or is down must not take the service with it.
//!
//! [`GuardedKms`] wraps another [`Kms`]. Each call gets a deadline; an outage is tried again within it, after a
//! random wait that grows; the calls to one region have a limit in flight and a limit a second, and whoever has a
//! client waiting goes first; a region that does not answer is left alone by a circuit breaker. Denials and damage
//! are answers, and pass through untouched.

mod breaker;
mod pace;
mod region;

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use envelope::{EncryptionContext, KeyMaterial};

use self::region::Region;
use super::{Generated, KekDescription, Kms, KmsError, OutageCause, Urgency, Wrapped};
use crate::clock::{Clock, Timestamp};
use crate::tenant::{Kek, KekId};

pub use self::breaker::Circuit;

/// The guard's limits.
#[derive(Clone, Debug)]
pub struct Options {
    /// How long one call may take, tries and waits included, in milliseconds. Default 5,000.
    pub call_ms_max: u64,
    /// How long one try may take, in milliseconds. Default 2,000.
    pub try_ms_max: u64,
    /// How many tries a call has at most. Default 4.
    pub tries_max: u32,
    /// The wait before the second try is random, between nothing and this, in milliseconds. Default 50. It doubles
    /// with each further try.
    pub backoff_ms: u64,
    /// The longest wait between two tries, in milliseconds. Default 1,000.
    pub backoff_ms_max: u64,
    /// How many calls to one region are in flight at most. Default 64. At most half of them are in the background.
    pub in_flight_max: usize,
    /// How many calls to one region are sent a second at most. Default 1,000; where the KMS throttles, fewer.
    pub calls_per_sec_max: u32,
    /// How many outages in a row open a region's circuit. Default 5.
    pub breaker_failures: u32,
    /// How long an open circuit stays open before a call is let through to see whether the region is back, in
    /// milliseconds. Default 5,000. It doubles with each such call that fails.
    pub breaker_open_ms: u64,
    /// The longest that a circuit stays open between two such calls, in milliseconds. Default 30,000.
    pub breaker_open_ms_max: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            call_ms_max: 5_000,
            try_ms_max: 2_000,
            tries_max: 4,
            backoff_ms: 50,
            backoff_ms_max: 1_000,
            in_flight_max: 64,
            calls_per_sec_max: 1_000,
            breaker_failures: 5,
            breaker_open_ms: 5_000,
            breaker_open_ms_max: 30_000,
        }
    }
}

/// Gives random numbers for the waits between tries.
pub type Random = Arc<dyn Fn() -> u64 + Send + Sync>;

/// How the KMS of one region is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegionHealth {
    /// The AWS region; `local` for a KMS without regions.
    pub region: Arc<str>,
    /// Whether calls pass.
    pub circuit: Circuit,
    /// Since when they do not.
    pub since: Option<Timestamp>,
    /// Since when the service's own credentials do not do there, if the KMS has not answered anything else since.
    pub credentials_since: Option<Timestamp>,
    /// Whether it has throttled within the last minute.
    pub throttles: bool,
    /// Whether no call is served, as far as was seen within the last minute. Where nobody has called for longer, a call
    /// may find it well again.
    pub out_lately: bool,
}

/// A [`Kms`] behind a guard. Cloning is cheap; clones share everything.
#[derive(Clone)]
pub struct GuardedKms {
    inner: Arc<dyn Kms>,
    clock: Clock,
    options: Arc<Options>,
    random: Random,
    regions: Arc<papaya::HashMap<Arc<str>, Arc<Region>>>,
}

/// What a try of a call is: it can be made as often as need be.
type Try<'a, T> = Pin<Box<dyn Future<Output = Result<T, KmsError>> + Send + 'a>>;

impl GuardedKms {
    /// Guards `inner`. The random numbers are the operating system's.
    pub fn new(inner: Arc<dyn Kms>, clock: Clock, options: Options) -> Self {
        Self::with_random(inner, clock, options, Arc::new(system_random))
    }

    /// Guards `inner`, with these random numbers.
    pub fn with_random(inner: Arc<dyn Kms>, clock: Clock, options: Options, random: Random) -> Self {
        Self { inner, clock, options: Arc::new(options), random, regions: Arc::default() }
    }

    /// How the regions are that have been called so far, by name.
    pub fn health(&self) -> Vec<RegionHealth> {
        let (now, monotonic) = (self.clock.now(), self.clock.monotonic());
        let mut health: Vec<RegionHealth> = self
            .regions
            .pin()
            .iter()
            .map(|(name, region)| {
                let health = region.health();
                let at = |since: Duration| now.minus(monotonic.saturating_sub(since));
                RegionHealth {
                    region: Arc::clone(name),
                    circuit: health.circuit,
                    since: health.circuit_since.map(at),
                    credentials_since: health.credentials_since.map(at),
                    throttles: health.throttles,
                    out_lately: health.out_lately,
                }
            })
            .collect();
        health.sort_by(|a, b| a.region.cmp(&b.region));
        health
    }

    fn region(&self, kek: &KekId) -> Arc<Region> {
        let name = kek.region().unwrap_or("local");
        let regions = self.regions.pin();
        if let Some(region) = regions.get(name) {
            return Arc::clone(region);
        }
        let new = Arc::new(Region::new(name, &self.options, self.clock.clone()));
        Arc::clone(regions.get_or_insert(name.into(), new))
    }

    async fn call<'a, T>(
        &self,
        kek: &KekId,
        urgency: Urgency,
        attempt: impl Fn() -> Try<'a, T> + Send + Sync,
    ) -> Result<T, KmsError> {
        let region = self.region(kek);
        let deadline = self.clock.monotonic() + Duration::from_millis(self.options.call_ms_max);
        for tries in 1.. {
            let slot = region.enter(kek, urgency, deadline).await?;
            let failure = match self.try_once(kek, deadline, attempt()).await {
                Ok(given) => {
                    region.served();
                    return Ok(given);
                }
                Err(failure) => failure,
            };
            drop(slot);
            region.heed(&failure);
            let wait = self.backoff(tries);
            if !worth_another_try(&failure)
                || tries >= self.options.tries_max
                || self.clock.monotonic() + wait >= deadline
            {
                return Err(failure);
            }
            self.clock.sleep(wait).await;
        }
        Err(KmsError::outage(kek, "no try was made"))
    }

    async fn try_once<T>(&self, kek: &KekId, deadline: Duration, attempt: Try<'_, T>) -> Result<T, KmsError> {
        let left = deadline.saturating_sub(self.clock.monotonic());
        let time = left.min(Duration::from_millis(self.options.try_ms_max));
        tokio::select! {
            biased;
            outcome = attempt => outcome,
            () = self.clock.sleep(time) => {
                Err(KmsError::outage(kek, format!("no answer within {} ms", time.as_millis())))
            }
        }
    }

    /// Full jitter: whoever failed together does not come back together.
    fn backoff(&self, tries: u32) -> Duration {
        let doubled = self.options.backoff_ms.saturating_mul(1 << (tries - 1).min(20));
        let most = doubled.min(self.options.backoff_ms_max);
        Duration::from_millis((self.random)() % (most + 1))
    }
}

fn worth_another_try(failure: &KmsError) -> bool {
    match failure {
        KmsError::Outage { cause, .. } => !matches!(cause, OutageCause::Credentials | OutageCause::OwnLimit),
        KmsError::Denied { .. } | KmsError::Damaged { .. } => false,
    }
}

/// Without the system's randomness the wait is the longest: late, but not in step.
fn system_random() -> u64 {
    getrandom::u64().unwrap_or(u64::MAX)
}

#[async_trait]
impl Kms for GuardedKms {
    async fn generate(
        &self,
        kek: &Kek,
        context: &EncryptionContext,
        urgency: Urgency,
    ) -> Result<Generated, KmsError> {
        self.call(&kek.id, urgency, || self.inner.generate(kek, context, urgency)).await
    }

    async fn wrap(
        &self,
        kek: &Kek,
        context: &EncryptionContext,
        plaintext: &KeyMaterial,
        urgency: Urgency,
    ) -> Result<Wrapped, KmsError> {
        self.call(&kek.id, urgency, || self.inner.wrap(kek, context, plaintext, urgency)).await
    }

    async fn unwrap(
        &self,
        kek: &Kek,
        context: &EncryptionContext,
        blob: &[u8],
        urgency: Urgency,
    ) -> Result<KeyMaterial, KmsError> {
        self.call(&kek.id, urgency, || self.inner.unwrap(kek, context, blob, urgency)).await
    }

    /// From one region to another it is a call to each, so that each is guarded for itself.
    async fn rewrap(
        &self,
        from: &Kek,
        to: &Kek,
        context: &EncryptionContext,
        blob: &[u8],
        urgency: Urgency,
    ) -> Result<Wrapped, KmsError> {
        if from.id.region() == to.id.region() {
            return self
                .call(&from.id, urgency, || self.inner.rewrap(from, to, context, blob, urgency))
                .await;
        }
        let plaintext = self.unwrap(from, context, blob, urgency).await?;
        self.wrap(to, context, &plaintext, urgency).await
    }

    async fn describe(&self, kek: &Kek, urgency: Urgency) -> Result<KekDescription, KmsError> {
        self.call(&kek.id, urgency, || self.inner.describe(kek, urgency)).await
    }
}
