//! What happens on a miss: the registry is asked, then the KMS; or a new data key is made.

use std::hash::{Hash, Hasher};
use std::sync::Arc;
use std::time::Duration;

use envelope::{DataKey, DataKeyId, EncryptionContext, WRAPPED_KEYS_MAX, WrappedDataKey, WrappedKeys};

use super::PoolError;
use super::cache::Cache;
use super::denials::Denials;
use super::directory::Directory;
use super::flights::Destination;
use super::live::{Facts, Lifetimes, LiveDek};
use super::turns::Turns;
use super::usage::Counts;
use crate::clock::{Clock, Timestamp};
use crate::kms::ring::{KekRings, RingFailure};
use crate::kms::{self, KmsError, Urgency};
use crate::quota::Buckets;
use crate::store::watch::ChangeWatch;
use crate::store::{
    Activation, DekRecord, DekScope, DekState, KekDenial, KeyPolicy, KeyRecord, Store, StoreError, StoredDek,
    TenantRecord, WrappedRecord,
};
use crate::tenant::{Kek, KekId, KeyName, TenantId};

/// Everything that a miss needs.
pub(super) struct Fetch {
    pub(super) rings: KekRings,
    pub(super) store: Arc<dyn Store>,
    pub(super) watch: Arc<ChangeWatch>,
    pub(super) directory: Directory,
    pub(super) clock: Clock,
    pub(super) turns: Turns,
    pub(super) cache: Cache,
    pub(super) denials: Arc<Denials>,
    pub(super) active: papaya::HashMap<DekScope, Arc<LiveDek>>,
    pub(super) kms_calls: Option<Buckets<TenantId>>,
    pub(super) bound_scopes_max: u64,
    pub(super) lifetimes: Lifetimes,
}

/// A data key that somebody waits for.
#[derive(Clone, PartialEq)]
pub(super) struct Wanted {
    tenant: TenantId,
    id: DataKeyId,
    /// What the envelope brings, where the registry does not know the data key. It is part of what is wanted, so
    /// that one caller's forged section cannot make another's fail; so are the pairs that his call binds to it.
    brought: Option<(WrappedKeys, EncryptionContext)>,
}

impl Eq for Wanted {}

impl Hash for Wanted {
    fn hash<H: Hasher>(&self, state: &mut H) {
        let brought = self.brought.as_ref().map(|(section, bound)| (section.as_bytes(), bound));
        (&self.tenant, self.id, brought).hash(state);
    }
}

impl Wanted {
    pub(super) fn tenant(&self) -> &TenantId {
        &self.tenant
    }

    pub(super) fn registered(tenant: &TenantId, id: DataKeyId) -> Self {
        Self { tenant: tenant.clone(), id, brought: None }
    }

    pub(super) fn brought(
        tenant: &TenantId,
        id: DataKeyId,
        section: &WrappedKeys,
        bound: &EncryptionContext,
    ) -> Self {
        Self { tenant: tenant.clone(), id, brought: Some((section.clone(), bound.clone())) }
    }
}

impl Destination for Wanted {
    fn brought_bytes(&self) -> usize {
        self.brought.as_ref().map_or(0, |(section, bound)| section.as_bytes().len() + bound.canonical().len())
    }
}

impl Destination for DekScope {
    fn brought_bytes(&self) -> usize {
        0
    }
}

impl Fetch {
    /// Brings a data key into memory, from the registry or from what an envelope brings.
    pub(super) async fn open(&self, wanted: &Wanted) -> Result<Arc<LiveDek>, PoolError> {
        self.watch.ensure_current().await?;
        let seen_mark = self.directory.mark(&wanted.tenant).now();
        match &wanted.brought {
            None => {
                let stored = self.store.dek(wanted.id).await?;
                // Another tenant's data key is as unknown as one that does not exist.
                let stored = stored.filter(|stored| stored.dek.scope.tenant == wanted.tenant);
                // That it is gone for good says more than that its tenant or key is switched off.
                if stored.as_ref().is_some_and(|stored| stored.dek.state == DekState::Destroyed) {
                    return Err(PoolError::Destroyed);
                }
                let tenant = self.directory.tenant(&wanted.tenant).await?;
                let stored = stored.ok_or(PoolError::UnknownDek)?;
                self.open_stored(&tenant, stored, seen_mark, Urgency::Foreground).await
            }
            Some((section, bound)) => {
                let tenant = self.directory.tenant(&wanted.tenant).await?;
                self.open_brought(&tenant, wanted.id, section, bound, seen_mark).await
            }
        }
    }

    /// The data key that encrypts for this scope: the one in memory, the registry's, the one that waits, or a new
    /// one.
    pub(super) async fn active(&self, scope: &DekScope, bytes: u64) -> Result<Arc<LiveDek>, PoolError> {
        self.watch.ensure_current().await?;
        let seen_mark = self.directory.mark(&scope.tenant).now();
        let tenant = self.directory.tenant(&scope.tenant).await?;
        let key = self.directory.key(&scope.tenant, &scope.key).await?;
        if bytes > key.policy.dek_bytes_max {
            return Err(PoolError::TooLargeForKey(key.policy.dek_bytes_max));
        }
        if let Some(live) = self.in_memory(scope, bytes, seen_mark) {
            let keks = believed(&tenant);
            self.vouch(&live, &live.facts().section, &keks, Urgency::Foreground).await?;
            return Ok(live);
        }
        let live = match self.store.active_dek(scope).await? {
            Some(stored) if self.has_room(&stored, &tenant, &key, bytes) => {
                let id = stored.dek.id;
                let opened = self.open_stored(&tenant, stored, seen_mark, Urgency::Foreground).await;
                opened.map_err(|refused| unfit_to_encrypt(id, refused))?
            }
            Some(stored) => self.succeed(&tenant, &key, scope, stored.dek.id, seen_mark).await?,
            None => {
                self.has_room_for_scope(scope).await?;
                self.make(&tenant, &key, scope, None, seen_mark).await?
            }
        };
        self.active.pin().insert(scope.clone(), Arc::clone(&live));
        Ok(live)
    }

    /// The active data key as this process knows it, where all that is wrong with it is that the KMS has to be
    /// asked again. It needs no registry.
    fn in_memory(&self, scope: &DekScope, bytes: u64, seen_mark: u64) -> Option<Arc<LiveDek>> {
        let live = self.active.pin().get(scope).cloned()?;
        let facts = live.facts();
        let now = self.clock.monotonic();
        let serves = facts.seen_mark == seen_mark
            && self.watch.is_current(now)
            && facts.state == DekState::Active
            && now < facts.retires_at
            && live.counts.has_room(bytes, &facts.policy);
        drop(facts);
        serves.then_some(live)
    }

    fn has_room(&self, stored: &StoredDek, tenant: &TenantRecord, key: &KeyRecord, bytes: u64) -> bool {
        let counted = match self.cache.find(&tenant.id, stored.dek.id) {
            Some(live) => live.counts.has_room(bytes, &key.policy),
            None => Counts::from_registry(stored.dek.messages, stored.dek.bytes).has_room(bytes, &key.policy),
        };
        counted && self.retires_at(tenant, stored, &key.policy) > self.clock.monotonic()
    }

    /// Refuses one more value of the key-bound context than the tenant may have. Two that come at the very same time
    /// may both pass: the limit keeps a mapping from exploding, and is no promise to the last one.
    async fn has_room_for_scope(&self, scope: &DekScope) -> Result<(), PoolError> {
        let limit = self.bound_scopes_max;
        if scope.bound.is_empty() || self.store.bound_scopes(&scope.tenant).await? < limit {
            return Ok(());
        }
        Err(PoolError::TooManyBoundScopes(limit))
    }

    /// Ends `predecessor` and puts the data key that waits, or else a new one, in its place.
    async fn succeed(
        &self,
        tenant: &TenantRecord,
        key: &KeyRecord,
        scope: &DekScope,
        predecessor: DataKeyId,
        seen_mark: u64,
    ) -> Result<Arc<LiveDek>, PoolError> {
        let now = self.clock.now();
        self.pass_over_stranded(tenant, scope).await?;
        let live = match self.store.promote_next_dek(scope, predecessor, now).await? {
            Some(active) if active.dek.id != predecessor => {
                self.open_stored(tenant, active, seen_mark, Urgency::Foreground).await?
            }
            _ => self.make(tenant, key, scope, Some(predecessor), seen_mark).await?,
        };
        if let Some(former) = self.cache.find(&scope.tenant, predecessor) {
            let facts = Facts { state: DekState::Retired, ..Facts::clone(&former.facts()) };
            former.learn(facts);
        }
        Ok(live)
    }

    /// A data key that waits under a KEK that has left the ring is not to be used any more.
    async fn pass_over_stranded(&self, tenant: &TenantRecord, scope: &DekScope) -> Result<(), PoolError> {
        let waiting = self.store.next_dek(scope).await?;
        let Some(waiting) = waiting.filter(|waiting| is_stranded(tenant, waiting)) else { return Ok(()) };
        let retired =
            self.store.set_dek_state(waiting.dek.id, DekState::Next, DekState::Retired, self.clock.now());
        match retired.await {
            // Somebody else was faster.
            Ok(()) | Err(StoreError::Conflict(_)) => Ok(()),
            Err(other) => Err(other.into()),
        }
    }

    /// Has a data key waiting for this scope, for whoever promotes it. Where the scope is in use here, its plaintext
    /// is kept for that moment; otherwise it is forgotten at once, and no other data key has to make room.
    pub(super) async fn prepare(&self, scope: &DekScope) -> Result<(), PoolError> {
        if self.active.pin().contains_key(scope) {
            return self.next(scope).await.map(drop);
        }
        let tenant = self.directory.tenant(&scope.tenant).await?;
        self.directory.key(&scope.tenant, &scope.key).await?;
        self.pass_over_stranded(&tenant, scope).await?;
        if self.store.next_dek(scope).await?.is_none() {
            let new = self.generate(&tenant, scope, DekState::Next, Urgency::Background).await?;
            self.store.insert_next_dek(&new.stored.dek, &new.stored.wrapped).await?;
        }
        Ok(())
    }

    /// What the registry says now of a data key in memory.
    pub(super) async fn refresh(&self, live: &LiveDek, tenant: &TenantRecord) -> Result<(), PoolError> {
        let seen_mark = self.directory.mark(&tenant.id).now();
        let key = self.directory.key(&tenant.id, &live.scope.key).await?;
        if let Some(stored) = self.store.dek(live.id).await? {
            live.learn(self.facts(tenant, &stored, &key.policy, seen_mark)?);
        }
        Ok(())
    }

    async fn make(
        &self,
        tenant: &TenantRecord,
        key: &KeyRecord,
        scope: &DekScope,
        predecessor: Option<DataKeyId>,
        seen_mark: u64,
    ) -> Result<Arc<LiveDek>, PoolError> {
        let new = self.generate(tenant, scope, DekState::Active, Urgency::Foreground).await?;
        // Durable before first use: a ciphertext under a data key that a crash forgets would be lost for ever.
        match self.store.activate_dek(predecessor, &new.stored.dek, &new.stored.wrapped).await? {
            Activation::Done => {
                let live = self.live(tenant, &new.stored, &key.policy, seen_mark)?;
                self.received(&live, new.key, new.by, new.asked_at);
                Ok(live)
            }
            Activation::Taken(theirs) => {
                self.open_stored(tenant, *theirs, seen_mark, Urgency::Foreground).await
            }
        }
    }

    /// The data key that will follow the scope's active one, made before it is needed.
    pub(super) async fn next(&self, scope: &DekScope) -> Result<Arc<LiveDek>, PoolError> {
        let seen_mark = self.directory.mark(&scope.tenant).now();
        let tenant = self.directory.tenant(&scope.tenant).await?;
        let key = self.directory.key(&scope.tenant, &scope.key).await?;
        self.pass_over_stranded(&tenant, scope).await?;
        if let Some(waiting) = self.store.next_dek(scope).await? {
            return self.open_stored(&tenant, waiting, seen_mark, Urgency::Background).await;
        }
        let new = self.generate(&tenant, scope, DekState::Next, Urgency::Background).await?;
        match self.store.insert_next_dek(&new.stored.dek, &new.stored.wrapped).await? {
            Activation::Done => {
                let live = self.live(&tenant, &new.stored, &key.policy, seen_mark)?;
                self.received(&live, new.key, new.by, new.asked_at);
                Ok(live)
            }
            Activation::Taken(theirs) => {
                self.open_stored(&tenant, *theirs, seen_mark, Urgency::Background).await
            }
        }
    }

    async fn generate(
        &self,
        tenant: &TenantRecord,
        scope: &DekScope,
        state: DekState,
        urgency: Urgency,
    ) -> Result<Made, PoolError> {
        let now = self.clock.now();
        let id = new_dek_id(now)?;
        let context = kms_context(scope, id)?;
        self.may_call(&scope.tenant, urgency)?;
        let _turn = self.turns.wait(&tenant.id, &self.clock).await?;
        let asked_at = self.clock.monotonic();
        let generated = match self.rings.generate(&tenant.ring, &context, urgency).await {
            Ok(generated) => generated,
            Err(failure) => return Err(self.refused(failure)),
        };
        self.heed(&generated.missing);
        for missing in &generated.missing {
            tracing::warn!(tenant = %tenant.id, dek = %id, error = %missing, "a new data key lacks a wrapped form");
        }
        let wrapped = generated.wrapped.into_iter().map(|form| WrappedRecord {
            kek: form.kek,
            blob: form.blob,
            material: form.material,
            wrapped_at: now,
        });
        let stored =
            StoredDek { dek: DekRecord::new(id, scope.clone(), state, now), wrapped: wrapped.collect() };
        Ok(Made { stored, key: DataKey::new(id, generated.plaintext), by: generated.by, asked_at })
    }

    /// Brings a data key of the registry into memory, or what is in memory up to date.
    async fn open_stored(
        &self,
        tenant: &TenantRecord,
        stored: StoredDek,
        seen_mark: u64,
        urgency: Urgency,
    ) -> Result<Arc<LiveDek>, PoolError> {
        let refused = match stored.dek.state {
            DekState::Revoked => Some(PoolError::Revoked),
            DekState::Destroyed => Some(PoolError::Destroyed),
            DekState::Next | DekState::Active | DekState::Retired => None,
        };
        if let Some(refused) = refused {
            if let Some(live) = self.cache.find(&tenant.id, stored.dek.id) {
                self.cache.drop_one(&live);
            }
            return Err(refused);
        }
        let key = self.directory.key(&tenant.id, &stored.dek.scope.key).await?;
        let live = match self.cache.find(&tenant.id, stored.dek.id) {
            Some(live) => {
                live.learn(self.facts(tenant, &stored, &key.policy, seen_mark)?);
                live
            }
            None => self.live(tenant, &stored, &key.policy, seen_mark)?,
        };
        let section = live.facts().section.clone();
        if live.plaintext(self.clock.monotonic()).is_none() {
            self.vouch(&live, &section, &believed(tenant), urgency).await?;
        }
        self.cache.keep(Arc::clone(&live));
        Ok(live)
    }

    /// Opens a data key that only the envelope knows. The section comes from the caller, so it is believed only as
    /// far as it agrees with what is known: its KMS context must be exactly the one that this tenant, key, data key
    /// and the call's key-bound pairs call for, and only KEKs of the tenant's ring, now or earlier, are asked. Otherwise anyone could bring a
    /// data key of his own, wrapped under a KEK of his own, and have his forgery opened as genuine.
    async fn open_brought(
        &self,
        tenant: &TenantRecord,
        id: DataKeyId,
        section: &WrappedKeys,
        bound: &EncryptionContext,
        seen_mark: u64,
    ) -> Result<Arc<LiveDek>, PoolError> {
        let brought = section.kms_context().ok_or(PoolError::UnknownDek)?;
        let disbelieved = PoolError::Disbelieved("its KMS context is not of this tenant, key and data key");
        let key_name = brought.get("keyfold:key").and_then(|name| name.parse::<KeyName>().ok());
        let key_name = key_name.ok_or_else(|| disbelieved.clone())?;
        let scope = DekScope { tenant: tenant.id.clone(), key: key_name, bound: bound.clone() };
        if kms_context(&scope, id)? != *brought {
            return Err(disbelieved);
        }
        let policy = match self.directory.key(&tenant.id, &scope.key).await {
            Ok(key) => key.policy,
            // The registry was lost, or cannot be asked: the envelope is then all there is.
            Err(PoolError::NoKey(_) | PoolError::Store(_)) => KeyPolicy::default(),
            Err(other) => return Err(other),
        };
        let facts = Facts {
            state: DekState::Retired,
            policy,
            section: section.clone(),
            retires_at: Duration::ZERO,
            seen_mark,
            registered: false,
        };
        let canonical = brought.canonical();
        let mark = self.directory.mark(&tenant.id);
        let live = Arc::new(LiveDek::new(id, scope, &canonical, Counts::default(), facts, mark));
        self.vouch(&live, section, &believed(tenant), Urgency::Foreground).await?;
        self.cache.keep(Arc::clone(&live));
        Ok(live)
    }

    /// Has the KMS give the plaintext (again), and heeds its answer: a denial drops what it had vouched for, an
    /// outage lets what is in memory live on for a while.
    pub(super) async fn vouch(
        &self,
        live: &LiveDek,
        section: &WrappedKeys,
        keks: &[Kek],
        urgency: Urgency,
    ) -> Result<(), PoolError> {
        let context = kms_context(&live.scope, live.id)?;
        let forms: Vec<(KekId, &[u8])> = section
            .keys()
            .iter()
            .filter_map(|form| Some((form.kek.parse().ok()?, form.blob.as_slice())))
            .collect();
        self.may_call(&live.scope.tenant, urgency)?;
        let _turn = self.turns.wait(&live.scope.tenant, &self.clock).await?;
        // The KMS vouches for the moment at which it decided, which is not before it was asked.
        let asked_at = self.clock.monotonic();
        let failure = match self.rings.unwrap(keks, &forms, &context, urgency).await {
            Ok(unwrapped) => {
                self.heed(&unwrapped.denials);
                let key = DataKey::new(live.id, unwrapped.plaintext);
                self.vouched(live, key, unwrapped.by, asked_at);
                return Ok(());
            }
            Err(failure) => failure,
        };
        match self.refused(failure) {
            PoolError::Kms(KmsError::Outage { .. })
                if live.outlast(self.clock.monotonic(), self.lifetimes) =>
            {
                Ok(())
            }
            // The KMS has not said anything against what is in memory.
            silent @ (PoolError::Kms(KmsError::Outage { .. }) | PoolError::Internal(_)) => Err(silent),
            refused => {
                live.wipe();
                Err(refused)
            }
        }
    }

    /// Takes a KMS call out of the tenant's quota, where a request waits for it.
    fn may_call(&self, tenant: &TenantId, urgency: Urgency) -> Result<(), PoolError> {
        match &self.kms_calls {
            Some(calls) if urgency == Urgency::Foreground => {
                calls.take(tenant, 1).map(|_| ()).map_err(PoolError::KmsQuota)
            }
            _ => Ok(()),
        }
    }

    /// Heeds what every member of a ring has said, and gives the answer that decides.
    fn refused(&self, failure: RingFailure) -> PoolError {
        self.heed(&failure.failures);
        if failure.broken && !failure.failures.iter().any(|answer| matches!(answer, KmsError::Denied { .. }))
        {
            return PoolError::Internal("a call to the KMS did not end well");
        }
        failure
            .deciding()
            .map_or(PoolError::Disbelieved("none of its KEKs belongs to the tenant's ring"), PoolError::Kms)
    }

    /// A KEK's owner has said no: everything that this KEK has vouched for goes, whoever uses it.
    fn heed(&self, answers: &[KmsError]) {
        for answer in answers {
            if let KmsError::Denied { kek, .. } = answer {
                self.denied(kek);
            }
        }
    }

    /// The same, and every other process on the registry hears of it.
    pub(super) fn denied(&self, kek: &KekId) {
        self.denials.hear(kek);
        self.cache.drop_kek(kek);
    }

    /// Another process has heard a KEK's owner say no.
    pub(super) fn learn_of(&self, denial: &KekDenial) {
        if self.denials.learn(denial) {
            self.cache.drop_kek(&denial.kek);
        }
    }

    /// The KMS has given this key. Where a denial came while it was asked, that is not its last word: whoever waits
    /// finds nothing to use, and asks again.
    fn vouched(&self, live: &LiveDek, key: DataKey, by: KekId, asked_at: Duration) {
        live.vouch(key, by, asked_at, self.lifetimes);
        if self.denials.came_since(&live.vouched_by(), asked_at) {
            live.wipe();
        }
    }

    fn received(&self, live: &Arc<LiveDek>, key: DataKey, by: KekId, asked_at: Duration) {
        self.vouched(live, key, by, asked_at);
        self.cache.keep(Arc::clone(live));
    }

    fn live(
        &self,
        tenant: &TenantRecord,
        stored: &StoredDek,
        policy: &KeyPolicy,
        seen_mark: u64,
    ) -> Result<Arc<LiveDek>, PoolError> {
        let dek = &stored.dek;
        let context = kms_context(&dek.scope, dek.id)?.canonical();
        let counts = Counts::from_registry(dek.messages, dek.bytes);
        let facts = self.facts(tenant, stored, policy, seen_mark)?;
        let mark = self.directory.mark(&dek.scope.tenant);
        Ok(Arc::new(LiveDek::new(dek.id, dek.scope.clone(), &context, counts, facts, mark)))
    }

    fn facts(
        &self,
        tenant: &TenantRecord,
        stored: &StoredDek,
        policy: &KeyPolicy,
        seen_mark: u64,
    ) -> Result<Facts, PoolError> {
        let context = kms_context(&stored.dek.scope, stored.dek.id)?;
        // In one order, so that the same forms make the same section. While a ring changes there can be more forms
        // than an envelope has room for: the ring's own come first.
        let mut forms: Vec<&WrappedRecord> = stored.wrapped.iter().collect();
        forms.sort_by_key(|form| (tenant.ring.member(&form.kek).is_none(), &form.kek));
        let forms: Vec<_> = forms
            .into_iter()
            .take(WRAPPED_KEYS_MAX)
            .map(|form| WrappedDataKey { kek: form.kek.to_string(), blob: form.blob.clone() })
            .collect();
        let section = WrappedKeys::new(&context, &forms)
            .map_err(|_| PoolError::Internal("the registry's wrapped forms do not fit into an envelope"))?;
        let retires_at = self.retires_at(tenant, stored, policy);
        Ok(Facts {
            state: stored.dek.state,
            policy: *policy,
            section,
            retires_at,
            seen_mark,
            registered: true,
        })
    }

    /// When a data key stops encrypting: at its age, or at once where the tenant's ring no longer has a KEK that
    /// wraps it.
    fn retires_at(&self, tenant: &TenantRecord, stored: &StoredDek, policy: &KeyPolicy) -> Duration {
        if is_stranded(tenant, stored) {
            return Duration::ZERO;
        }
        let dek = &stored.dek;
        let since = dek.activated_at.unwrap_or(dek.created_at);
        let age = self.clock.now().since(since);
        self.clock.monotonic() + Duration::from_secs(policy.dek_age_secs_max).saturating_sub(age)
    }
}

struct Made {
    stored: StoredDek,
    key: DataKey,
    by: KekId,
    /// When the KMS was asked; monotonic.
    asked_at: Duration,
}

/// To who encrypts it is no fault of his that the registry's wrapped form is not what the KMS once made.
fn unfit_to_encrypt(id: DataKeyId, refused: PoolError) -> PoolError {
    match refused {
        PoolError::Kms(damaged @ KmsError::Damaged { .. }) => {
            tracing::error!(dek = %id, error = %damaged, "the registry holds a damaged or foreign wrapped form: rotate the key, and find out who wrote it");
            PoolError::Internal("the registry's wrapped form of the active data key does not open")
        }
        other => other,
    }
}

/// Whether a data key is wrapped under a KEK that has left the ring.
fn is_stranded(tenant: &TenantRecord, stored: &StoredDek) -> bool {
    stored.wrapped.iter().any(|form| !tenant.ring.serves(&form.kek))
}

/// The KEKs whose wrapped forms are believed: the tenant's ring, then what was in it before.
pub(super) fn believed(tenant: &TenantRecord) -> Vec<Kek> {
    tenant.ring.members().iter().chain(&tenant.former_keks).cloned().collect()
}

fn kms_context(scope: &DekScope, id: DataKeyId) -> Result<EncryptionContext, PoolError> {
    kms::kms_context(&scope.tenant, &scope.key, id, &scope.bound)
        .map_err(|_| PoolError::Internal("the context bound to the data key is too large"))
}

/// A UUIDv7: 48 bits of time, 74 random bits.
fn new_dek_id(now: Timestamp) -> Result<DataKeyId, PoolError> {
    let mut random = [0; 10];
    getrandom::fill(&mut random)
        .map_err(|_| PoolError::Internal("the operating system gives no randomness"))?;
    let unix_ms = u64::try_from(now.unix_ms()).unwrap_or(0);
    let id = uuid::Builder::from_unix_timestamp_millis(unix_ms, &random).into_uuid();
    Ok(DataKeyId::from_bytes(id.into_bytes()))
}
