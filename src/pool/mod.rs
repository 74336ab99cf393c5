//! The data keys (DEKs) in memory: found at once when they are hot, fetched once when they are not.
//!
//! A data key comes in through a KMS and in no other way, is durable in the registry before its first use, and is
//! wiped when its time is over, when it has not been used for a while, when others need the room, and at shutdown.
//! Requests find it without waiting for a lock, a database or a KMS; only a miss goes through [`flights`](self), one
//! for all who ask. `keeper` does ahead of time what a request would otherwise have to wait for.

mod cache;
mod denials;
mod directory;
mod fetch;
mod flights;
mod keeper;
mod live;
mod pages;
mod turns;
mod usage;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use envelope::{DataKey, DataKeyId, EncryptionContext, FormatError, Head, WrappedKeys, inspect_known};
use tokio_util::task::TaskTracker;

use crate::clock::Clock;
use crate::kms::KmsError;
use crate::kms::ring::KekRings;
use crate::quota::{Buckets, Exceeded, Rate};
use crate::spread::Near;
use crate::store::watch::ChangeWatch;
use crate::store::{DekScope, DekState, EnvelopeWeight, Store, StoreError};
use crate::tenant::{KekId, KeyName, TenantId};

use cache::Cache;
use denials::Denials;
use directory::Directory;
use fetch::{Asker, Brought, Fetch, Wanted};
use flights::Flights;
use live::{Facts, Lifetimes, LiveDek, SharedDek, as_ms};
use turns::Turns;

/// The pool's limits.
#[derive(Clone, Debug)]
pub struct Options {
    /// How many data keys are kept in memory in all. Default 10,000.
    pub deks_max: u64,
    /// How many data keys of one tenant are kept in memory, so that no tenant pushes out the others. Default 1,000.
    pub tenant_deks_max: usize,
    /// How many KMS calls a minute a tenant's requests may cause: those for data keys that are not in memory. What the
    /// background does ahead of time is not counted. Default 0: no limit.
    pub tenant_kms_calls_per_min: u32,
    /// For how many values of its key-bound context a tenant has active data keys: each is a data key of its own,
    /// with KMS calls of its own. Default 100.
    pub tenant_bound_scopes_max: u64,
    /// How long a plaintext data key lives after the KMS last vouched for it, in seconds. Default 300. Within this
    /// time an owner's decision at the KMS takes effect everywhere.
    pub dek_plaintext_secs_max: u64,
    /// How long after that a data key still in memory is used while the KMS is asked and does not answer, in seconds.
    /// Default 3,600; 0 for not at all.
    pub dek_stale_secs_max: u64,
    /// After how long without use a data key is let go, in seconds. Default 900.
    pub dek_idle_secs_max: u64,
    /// How long an error is remembered for those who ask for the same data key, in milliseconds. Default 1,000.
    pub error_memory_ms: u64,
    /// How many data keys of one tenant are fetched from the KMS at the same time, so that a tenant whose KMS hangs, or
    /// who opens thousands of old envelopes, leaves room for the others. Default 16.
    pub tenant_kms_calls_max: usize,
    /// How long a request waits for its turn among its tenant's calls, in milliseconds. Default 5,000.
    pub tenant_kms_wait_ms_max: u64,
    /// How often usage counts are flushed to the registry, in seconds. Default 5.
    pub usage_flush_secs: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            deks_max: 10_000,
            tenant_deks_max: 1_000,
            tenant_kms_calls_per_min: 0,
            tenant_bound_scopes_max: 100,
            dek_plaintext_secs_max: 300,
            dek_stale_secs_max: 3_600,
            dek_idle_secs_max: 900,
            error_memory_ms: 1_000,
            tenant_kms_calls_max: 16,
            tenant_kms_wait_ms_max: 5_000,
            usage_flush_secs: 5,
        }
    }
}

/// Why there is no data key. Shared by all who waited for the same one.
#[derive(Clone, Debug, thiserror::Error)]
pub enum PoolError {
    /// The KMS did not give it.
    #[error(transparent)]
    Kms(#[from] KmsError),
    /// The registry did not give it, or could not take it.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// There is no such tenant.
    #[error("the tenant does not exist")]
    NoTenant,
    /// The tenant has no such key.
    #[error("the tenant has no key named '{0}'")]
    NoKey(KeyName),
    /// The tenant is switched off.
    #[error("the tenant is disabled")]
    TenantDisabled,
    /// The key is switched off.
    #[error("the key '{0}' is disabled")]
    KeyDisabled(KeyName),
    /// Neither the registry nor the envelope brings a data key of this tenant.
    #[error("no data key of this tenant opens this envelope")]
    UnknownDek,
    /// The data key is revoked; it can be taken back.
    #[error("the data key is revoked")]
    Revoked,
    /// The data key is destroyed for good.
    #[error("the data key is destroyed")]
    Destroyed,
    /// The envelope's wrapped-key section does not agree with its tenant, key, data key or KEKs.
    #[error("the envelope's wrapped-key section is not believed: {0}")]
    Disbelieved(&'static str),
    /// What was fetched was used up, changed or crowded out before it could be used, several times over.
    #[error("the data key was used up, changed or crowded out while it was handed over")]
    Busy,
    /// The tenant's requests have caused as many KMS calls as they may.
    #[error(
        "this tenant's requests have caused as many KMS calls as they may in a minute \
         (pool.tenant_kms_calls_per_min): try again in {} s",
        .0.retry_after_secs
    )]
    KmsQuota(Exceeded),
    /// The context bound to the data key has more values in this tenant than are allowed.
    #[error(
        "this tenant has data keys for {0} values of its key-bound context already, which is the limit \
         (pool.tenant_bound_scopes_max): bind what has many values to the message instead"
    )]
    TooManyBoundScopes(u64),
    /// A fault of keyfold's own.
    #[error("{0}")]
    Internal(&'static str),
    /// One message is larger than all that the key's policy lets a data key seal.
    #[error("the message is larger than the {0} bytes that the key's policy allows one data key in all")]
    TooLargeForKey(u64),
}

/// What sealing needs.
pub struct Sealing {
    /// The data key.
    pub key: Near<DataKey>,
    /// What an embedded envelope carries.
    pub embedded: WrappedKeys,
    /// What the key's policy says an envelope carries.
    pub weight: EnvelopeWeight,
    live: Near<LiveDek>,
}

impl Sealing {
    /// Counts bytes whose number was not known when the data key was asked for.
    pub fn count_bytes(&self, bytes: u64) {
        self.live.counts.add_bytes(bytes);
    }

    /// Counts one more message of this size under the same data key. `false` where its limits or its state do not
    /// allow that: the pool is then asked again. For batches, which hold this for moments.
    pub fn admit(&self, bytes: u64) -> bool {
        let facts = self.live.facts();
        facts.state == DekState::Active && self.live.counts.admit(bytes, &facts.policy)
    }
}

/// What opening needs, and what is known of the envelope's data key.
pub struct Opening {
    /// The data key.
    pub key: Near<DataKey>,
    /// What it serves: the tenant, the key's name, and the context bound to the data key.
    pub scope: DekScope,
    /// Whether it still encrypts: its time is not over, and its KEKs are those of the tenant's ring.
    pub active: bool,
    /// What an embedded envelope would carry today.
    pub embedded: WrappedKeys,
    /// What the key's policy says an envelope carries.
    pub weight: EnvelopeWeight,
    live: Near<LiveDek>,
}

impl Opening {
    /// Whether rewrapping would change the envelope with this head.
    pub fn outdated(&self, head: &Head) -> bool {
        !self.active || self.section(None) != *head.wrapped()
    }

    /// Whether another envelope of the same data key may be opened with this: its section is a claim of its own.
    pub fn agrees(&self, head: &Head) -> Result<(), PoolError> {
        agrees(&self.live, self, head)
    }

    /// The wrapped-key section that an envelope of this data key has today; `weight` overrides the key's policy.
    pub fn section(&self, weight: Option<EnvelopeWeight>) -> WrappedKeys {
        section(&self.embedded, weight.unwrap_or(self.weight))
    }
}

impl Sealing {
    /// The wrapped-key section of a new envelope; `weight` overrides the key's policy.
    pub fn section(&self, weight: Option<EnvelopeWeight>) -> WrappedKeys {
        section(&self.embedded, weight.unwrap_or(self.weight))
    }
}

fn section(embedded: &WrappedKeys, weight: EnvelopeWeight) -> WrappedKeys {
    match weight {
        EnvelopeWeight::Embedded => embedded.clone(),
        EnvelopeWeight::Compact => WrappedKeys::compact(),
    }
}

/// The cached data keys of all tenants. Cloning is cheap; clones share everything.
#[derive(Clone)]
pub struct DekPool {
    fetch: Arc<Fetch>,
    active_flights: Arc<Flights<DekScope>>,
    idle: Duration,
}

/// How stale the cache's own idea of "recently used" may be: asking it on every call costs more than the sealing.
const TOUCH_MS: u64 = 1_000;

impl DekPool {
    /// A pool over these KEK rings and this registry. Its background work runs on `tracker`. `kms_answer_max` is how
    /// long a call to the KMS takes at most: renewals begin at least that much ahead.
    pub fn new(
        rings: KekRings,
        store: Arc<dyn Store>,
        watch: Arc<ChangeWatch>,
        clock: Clock,
        options: &Options,
        kms_answer_max: Duration,
        tracker: &TaskTracker,
    ) -> Self {
        let error_memory = Duration::from_millis(options.error_memory_ms);
        let active_flights = Arc::new(Flights::new(clock.clone(), error_memory, tracker.clone()));
        let openings = Flights::new(clock.clone(), error_memory, tracker.clone());
        let kms_clock = clock.clone();
        let lifetimes = Lifetimes {
            plaintext_max: Duration::from_secs(options.dek_plaintext_secs_max),
            stale_max: Duration::from_secs(options.dek_stale_secs_max),
            kms_answer: kms_answer_max,
        };
        let lives_max = lifetimes.plaintext_max.saturating_add(lifetimes.stale_max);
        let cache = Arc::new(Cache::new(options.deks_max, options.tenant_deks_max));
        let denials = Denials::new(Arc::clone(&store), clock.clone(), lives_max, tracker.clone());
        let fetch = Arc::new(Fetch {
            rings,
            denials,
            directory: Directory::new(Arc::clone(&store), Arc::clone(&watch), clock.clone()),
            store,
            watch,
            clock,
            turns: Turns::new(options),
            cache,
            active: papaya::HashMap::new(),
            openings,
            kms_calls: Rate::new(options.tenant_kms_calls_per_min, Duration::from_mins(1), 0)
                .map(|rate| Buckets::new(rate, kms_clock)),
            bound_scopes_max: options.tenant_bound_scopes_max,
            lifetimes,
        });
        let heeding = Arc::downgrade(&fetch);
        fetch.rings.on_denial(move |kek| {
            if let Some(fetch) = heeding.upgrade() {
                fetch.denied(kek);
            }
        });
        let heeding = Arc::downgrade(&fetch);
        fetch.watch.heed_denials(move |denial| {
            if let Some(fetch) = heeding.upgrade() {
                fetch.learn_of(denial);
            }
        });
        let idle = Duration::from_secs(options.dek_idle_secs_max);
        Self { fetch, active_flights, idle }
    }

    /// The active data key of this scope, for a message of `bytes` bytes of plaintext (0 where that is not known
    /// yet: see [`Sealing::count_bytes`]).
    pub async fn to_encrypt(&self, scope: &DekScope, bytes: u64) -> Result<Sealing, PoolError> {
        match self.hot(scope, bytes) {
            Some(sealing) => Ok(sealing),
            // Boxed, because it is rare and large: every call would carry its room.
            None => Box::pin(self.cold_sealing(scope, bytes)).await,
        }
    }

    async fn cold_sealing(&self, scope: &DekScope, bytes: u64) -> Result<Sealing, PoolError> {
        // Once more than the policy's limit allows within one go: the data key that comes back may have been used
        // up by those who waited for it with us.
        for _ in 0..3 {
            let fetch = Arc::clone(&self.fetch);
            let wanted = scope.clone();
            let pool = self.clone();
            let wanted_again = scope.clone();
            let good = move |live: &SharedDek| pool.serves(&wanted_again, live, bytes);
            let work = async move { fetch.active(&wanted, bytes).await };
            let mark = self.fetch.directory.mark(&scope.tenant);
            self.active_flights.join(scope.clone(), mark, good, work).await?;
            if let Some(sealing) = self.hot(scope, bytes) {
                return Ok(sealing);
            }
        }
        Err(PoolError::Busy)
    }

    /// Whether an earlier answer would do for this message: whether [`DekPool::hot`] finds it and takes it.
    fn serves(&self, scope: &DekScope, live: &SharedDek, bytes: u64) -> bool {
        let now = self.fetch.clock.monotonic();
        let in_place = self.fetch.active.pin().get(scope).is_some_and(|active| Arc::ptr_eq(active, live));
        in_place
            && self.fetch.watch.is_current(now)
            && live.usable(now).is_some_and(|(_, facts)| {
                facts.state == DekState::Active
                    && now < facts.retires_at
                    && live.counts.has_room(bytes, &facts.policy)
            })
    }

    fn hot(&self, scope: &DekScope, bytes: u64) -> Option<Sealing> {
        let fetch = &self.fetch;
        let now = fetch.clock.monotonic();
        let live = fetch.active.pin().get(scope)?.near();
        if !fetch.watch.is_current(now) {
            return None;
        }
        let (key, facts) = live.usable(now)?;
        if facts.state != DekState::Active
            || now >= facts.retires_at
            || !live.counts.admit(bytes, &facts.policy)
        {
            return None;
        }
        live.counts.sealed(fetch.clock.now());
        self.touch(&live, now);
        let (embedded, weight) = (facts.section.near(), facts.policy.envelope);
        Some(Sealing { key, embedded, weight, live })
    }

    /// The head of a tenant's envelope. That it is not read where it is the one of a data key in memory makes no
    /// difference but in time.
    pub fn inspect(&self, tenant: &TenantId, envelope: &[u8]) -> Result<Head, FormatError> {
        inspect_known(envelope, |id| self.fetch.cache.find(tenant, id, |live| live.section()))
    }

    /// The data key of an envelope with this head, for this tenant and a call with these key-bound pairs.
    pub async fn to_decrypt(
        &self,
        tenant: &TenantId,
        head: &Head,
        bound: &EncryptionContext,
    ) -> Result<Opening, PoolError> {
        let opening = match self.hot_opening(tenant, head.dek_id()) {
            Some(opening) => opening?,
            // Boxed for the same reason as what seals.
            None => Box::pin(self.cold_opening(tenant, head, bound)).await?,
        };
        if opening.1.scope.bound != *bound {
            return Err(PoolError::Disbelieved("its data key is bound to another context"));
        }
        agrees(&opening.0, &opening.1, head)?;
        opening.0.counts.opened(self.fetch.clock.now());
        Ok(opening.1)
    }

    async fn cold_opening(
        &self,
        tenant: &TenantId,
        head: &Head,
        bound: &EncryptionContext,
    ) -> Result<(Near<LiveDek>, Opening), PoolError> {
        // More than once: a change of the registry, or a crowded cache, can take back what was just fetched.
        for _ in 0..3 {
            let live = self.fetch_for(tenant, head, bound).await?.near();
            let now = self.fetch.clock.monotonic();
            if let Some((key, facts)) = live.usable(now) {
                let opening = opening(&live, key, &facts, now)?;
                return Ok((live, opening));
            }
        }
        Err(PoolError::Busy)
    }

    async fn fetch_for(
        &self,
        tenant: &TenantId,
        head: &Head,
        bound: &EncryptionContext,
    ) -> Result<SharedDek, PoolError> {
        let id = head.dek_id();
        let refused = match self.fetch.open(Wanted::registered(tenant, id), Asker::Request).await {
            Err(refused) if !head.wrapped().is_compact() => refused,
            other => return other,
        };
        // Not in the registry, or the registry is down: what the envelope brings may do, as far as it is believed.
        let asked = match refused {
            PoolError::UnknownDek => true,
            PoolError::Store(StoreError::Unavailable(_)) => false,
            other => return Err(other),
        };
        let brought = Brought { section: head.wrapped().clone(), bound: bound.clone(), asked };
        self.fetch.open(Wanted::brought(tenant, id, brought), Asker::Request).await
    }

    fn hot_opening(
        &self,
        tenant: &TenantId,
        id: DataKeyId,
    ) -> Option<Result<(Near<LiveDek>, Opening), PoolError>> {
        let fetch = &self.fetch;
        let now = fetch.clock.monotonic();
        let live = fetch.cache.find(tenant, id, |live| live.near())?;
        if !fetch.watch.is_current(now) {
            return None;
        }
        let (key, facts) = live.usable(now)?;
        self.touch(&live, now);
        let opening = opening(&live, key, &facts, now);
        Some(opening.map(|opening| (live, opening)))
    }

    fn touch(&self, live: &LiveDek, now: Duration) {
        let now_ms = as_ms(now);
        if now_ms.saturating_sub(live.touched_ms.load(Ordering::Relaxed)) > TOUCH_MS {
            live.touched_ms.store(now_ms, Ordering::Relaxed);
            self.fetch.cache.touch(live);
        }
    }

    /// Has a data key waiting to follow the scope's active one. Nothing happens where one waits already.
    pub async fn prepare_next(&self, scope: &DekScope) -> Result<(), PoolError> {
        self.fetch.prepare(scope).await
    }

    /// Ends the scope's active data key now, where it is `predecessor`, and puts the next one in its place. The next
    /// one is made first, so nobody waits for it. Returns the data key that is active afterwards.
    pub async fn rotate(&self, scope: &DekScope, predecessor: DataKeyId) -> Result<DataKeyId, PoolError> {
        self.prepare_next(scope).await?;
        let now = self.fetch.clock.now();
        let active = self.fetch.store.promote_next_dek(scope, predecessor, now).await?;
        active.map(|active| active.dek.id).ok_or(PoolError::Busy)
    }

    /// The KMS has said no for this KEK to somebody else than the pool: what the KEK has vouched for goes at once, here
    /// and in every process on the same registry.
    pub fn denied(&self, kek: &KekId) {
        self.fetch.denied(kek);
    }

    /// Keeps the pages of data keys that come into memory from now on out of the swap, in the whole process.
    pub fn lock_pages(&self) {
        pages::start();
    }

    /// How many plaintext data keys are in memory.
    pub fn plaintext_deks(&self) -> usize {
        self.fetch.cache.plaintext_count()
    }

    /// Wipes everything; for shutdown.
    pub fn clear(&self) {
        self.fetch.active.pin().clear();
        self.fetch.cache.clear();
        self.active_flights.clear();
        self.fetch.openings.clear();
    }
}

/// The section comes from the caller: it must be what this tenant, key and data key call for, whether it was needed
/// or not.
fn agrees(live: &LiveDek, opening: &Opening, head: &Head) -> Result<(), PoolError> {
    let brought = head.wrapped();
    match brought.kms_context() {
        Some(context) if *brought != opening.embedded && context.canonical() != *live.kms_context => {
            Err(PoolError::Disbelieved("its KMS context is another tenant's, key's or data key's"))
        }
        _ => Ok(()),
    }
}

fn opening(
    live: &Near<LiveDek>,
    key: Near<DataKey>,
    facts: &Facts,
    now: Duration,
) -> Result<Opening, PoolError> {
    match facts.state {
        DekState::Revoked => Err(PoolError::Revoked),
        DekState::Destroyed => Err(PoolError::Destroyed),
        DekState::Next | DekState::Active | DekState::Retired => Ok(Opening {
            key,
            scope: live.scope.clone(),
            // One that is past a limit, or stranded, is active until somebody seals: then another one is.
            active: facts.state == DekState::Active
                && now < facts.retires_at
                && live.counts.has_room(0, &facts.policy),
            embedded: facts.section.near(),
            weight: facts.policy.envelope,
            live: Near::clone(live),
        }),
    }
}
