//! What happens on a miss: the registry is asked, then the KMS; or a new data key is made.

use std::hash::{Hash, Hasher};
use std::sync::Arc;
use std::time::Duration;

use envelope::{DataKey, DataKeyId, EncryptionContext, WRAPPED_KEYS_MAX, WrappedDataKey, WrappedKeys};

use super::PoolError;
use super::cache::Cache;
use super::denials::Denials;
use super::directory::Directory;
use super::flights::{Destination, Flights};
use super::live::{Facts, Lifetimes, LiveDek, SharedDek};
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
use crate::tenant::{Kek, KekId, KekRing, KeyName, TenantId};

/// Everything that a miss needs.
pub(super) struct Fetch {
    pub(super) rings: KekRings,
    pub(super) store: Arc<dyn Store>,
    pub(super) watch: Arc<ChangeWatch>,
    pub(super) directory: Directory,
    pub(super) clock: Clock,
    pub(super) turns: Turns,
    pub(super) cache: Arc<Cache>,
    pub(super) denials: Arc<Denials>,
    pub(super) active: papaya::HashMap<DekScope, SharedDek>,
    pub(super) openings: Flights<Wanted>,
    pub(super) kms_calls: Option<Buckets<TenantId>>,
    pub(super) bound_scopes_max: u64,
    pub(super) lifetimes: Lifetimes,
}

/// On whose behalf the KMS is asked.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Asker {
    /// A request waits.
    Request,
    /// Nobody waits: what is done ahead of time.
    Background,
    /// Nobody waits yet: a renewal that has not come to its turn for long, and is about to be too late.
    Overdue,
}

impl Asker {
    fn urgency(self) -> Urgency {
        match self {
            Self::Request | Self::Overdue => Urgency::Foreground,
            Self::Background => Urgency::Background,
        }
    }
}

/// A data key that somebody waits for.
#[derive(Clone, PartialEq)]
pub(super) struct Wanted {
    tenant: TenantId,
    id: DataKeyId,
    /// What the envelope brings, where the registry does not give the data key. It is part of what is wanted, so
    /// that one caller's forged section cannot make another's fail; so are the pairs that his call binds to it.
    brought: Option<Brought>,
}

/// What a caller brings to open a data key with.
#[derive(Clone, PartialEq)]
pub(super) struct Brought {
    /// The envelope's wrapped keys.
    pub(super) section: WrappedKeys,
    /// The key-bound pairs of the call.
    pub(super) bound: EncryptionContext,
    /// Whether the registry was asked, and does not know the data key; it may also not have answered.
    pub(super) asked: bool,
}

impl Eq for Wanted {}

impl Hash for Wanted {
    fn hash<H: Hasher>(&self, state: &mut H) {
        let brought = self.brought.as_ref();
        let brought = brought.map(|brought| (brought.section.as_bytes(), &brought.bound, brought.asked));
        (&self.tenant, self.id, brought).hash(state);
    }
}

impl Wanted {
    pub(super) fn registered(tenant: &TenantId, id: DataKeyId) -> Self {
        Self { tenant: tenant.clone(), id, brought: None }
    }

    pub(super) fn brought(tenant: &TenantId, id: DataKeyId, brought: Brought) -> Self {
        Self { tenant: tenant.clone(), id, brought: Some(brought) }
    }
}

impl Destination for Wanted {
    fn brought_bytes(&self) -> usize {
        self.brought
            .as_ref()
            .map_or(0, |brought| brought.section.as_bytes().len() + brought.bound.canonical().len())
    }
}

impl Destination for DekScope {
    fn brought_bytes(&self) -> usize {
        0
    }
}

impl Fetch {
    /// Brings a data key into memory, from the registry or from what an envelope brings. Who encrypts and who decrypts
    /// share one flight, so that a data key is in memory once.
    pub(super) async fn open(self: &Arc<Self>, wanted: Wanted, asker: Asker) -> Result<SharedDek, PoolError> {
        self.open_known(wanted, None, asker).await
    }

    /// The same for a data key that is remembered, and up to date but for the KMS's word: it needs no registry.
    async fn open_known(
        self: &Arc<Self>,
        wanted: Wanted,
        known: Option<SharedDek>,
        asker: Asker,
    ) -> Result<SharedDek, PoolError> {
        let (fetch, watch, clock) = (Arc::clone(self), Arc::clone(&self.watch), self.clock.clone());
        let good = move |live: &SharedDek| {
            let now = clock.monotonic();
            watch.is_current(now) && live.usable(now).is_some()
        };
        let (destination, mark) = (wanted.clone(), self.directory.mark(&wanted.tenant));
        let work = async move {
            match known {
                Some(live) => {
                    let tenant = fetch.directory.tenant(&wanted.tenant).await?;
                    fetch.serve(live, &tenant, asker).await
                }
                None => fetch.fetch(&wanted, asker).await,
            }
        };
        self.openings.join(destination, mark, good, work).await
    }

    /// The same for one that the registry has just told of: its state may be newer than what is in memory.
    async fn open_read(
        self: &Arc<Self>,
        tenant: &TenantRecord,
        key: &KeyRecord,
        stored: &StoredDek,
        seen_mark: u64,
        asker: Asker,
    ) -> Result<SharedDek, PoolError> {
        let live = self.open(Wanted::registered(&tenant.id, stored.dek.id), asker).await?;
        live.learn(self.facts(tenant, stored, &key.policy, seen_mark)?);
        Ok(live)
    }

    async fn fetch(&self, wanted: &Wanted, asker: Asker) -> Result<SharedDek, PoolError> {
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
                self.open_stored(&tenant, stored, seen_mark, asker).await
            }
            Some(brought) => {
                let tenant = self.directory.tenant(&wanted.tenant).await?;
                self.open_brought(&tenant, wanted.id, brought, seen_mark).await
            }
        }
    }

    /// The data key that encrypts for this scope: the one in memory, the registry's, the one that waits, or a new
    /// one.
    pub(super) async fn active(
        self: &Arc<Self>,
        scope: &DekScope,
        bytes: u64,
    ) -> Result<SharedDek, PoolError> {
        self.watch.ensure_current().await?;
        let seen_mark = self.directory.mark(&scope.tenant).now();
        let tenant = self.directory.tenant(&scope.tenant).await?;
        let key = self.directory.key(&scope.tenant, &scope.key).await?;
        if bytes > key.policy.dek_bytes_max {
            return Err(PoolError::TooLargeForKey(key.policy.dek_bytes_max));
        }
        let live = match self.in_memory(scope, bytes, seen_mark) {
            Some(live) => {
                let wanted = Wanted::registered(&scope.tenant, live.id);
                self.open_known(wanted, Some(live), Asker::Request).await?
            }
            None => match self.store.active_dek(scope).await? {
                Some(stored) if self.has_room(&stored, &tenant, &key, bytes) => {
                    let opened = self.open_read(&tenant, &key, &stored, seen_mark, Asker::Request).await;
                    opened.map_err(|refused| unfit_to_encrypt(stored.dek.id, refused))?
                }
                Some(stored) => self.succeed(&tenant, &key, scope, stored.dek.id, seen_mark).await?,
                None => {
                    self.has_room_for_scope(scope).await?;
                    self.make(&tenant, &key, scope, None, seen_mark).await?
                }
            },
        };
        self.active.pin().insert(scope.clone(), Arc::clone(&live));
        Ok(live)
    }

    /// The active data key as this process knows it, where all that is wrong with it is that the KMS has to be
    /// asked again. It needs no registry.
    fn in_memory(&self, scope: &DekScope, bytes: u64, seen_mark: u64) -> Option<SharedDek> {
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
        let counted = match self.remembered(stored) {
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
        self: &Arc<Self>,
        tenant: &TenantRecord,
        key: &KeyRecord,
        scope: &DekScope,
        predecessor: DataKeyId,
        seen_mark: u64,
    ) -> Result<SharedDek, PoolError> {
        let now = self.clock.now();
        self.pass_over_stranded(tenant, scope).await?;
        let live = match self.store.promote_next_dek(scope, predecessor, now).await? {
            Some(active) if active.dek.id != predecessor => {
                self.open_read(tenant, key, &active, seen_mark, Asker::Request).await?
            }
            _ => self.make(tenant, key, scope, Some(predecessor), seen_mark).await?,
        };
        if let Some(former) = self.cache.find(&scope.tenant, predecessor, Arc::clone) {
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
    pub(super) async fn prepare(self: &Arc<Self>, scope: &DekScope) -> Result<(), PoolError> {
        if self.active.pin().contains_key(scope) {
            return self.next(scope).await.map(drop);
        }
        let tenant = self.directory.tenant(&scope.tenant).await?;
        self.directory.key(&scope.tenant, &scope.key).await?;
        self.pass_over_stranded(&tenant, scope).await?;
        if self.store.next_dek(scope).await?.is_none() {
            let new = self.generate(&tenant, scope, DekState::Next, Asker::Background).await?;
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
        self: &Arc<Self>,
        tenant: &TenantRecord,
        key: &KeyRecord,
        scope: &DekScope,
        predecessor: Option<DataKeyId>,
        seen_mark: u64,
    ) -> Result<SharedDek, PoolError> {
        let new = self.generate(tenant, scope, DekState::Active, Asker::Request).await?;
        // Durable before first use: a ciphertext under a data key that a crash forgets would be lost for ever.
        match self.store.activate_dek(predecessor, &new.stored.dek, &new.stored.wrapped).await? {
            Activation::Done => {
                let live = self.live(tenant, &new.stored, &key.policy, seen_mark)?;
                self.received(live, new, &tenant.ring)
            }
            Activation::Taken(theirs) => {
                self.open_read(tenant, key, &theirs, seen_mark, Asker::Request).await
            }
        }
    }

    /// The data key that will follow the scope's active one, made before it is needed.
    pub(super) async fn next(self: &Arc<Self>, scope: &DekScope) -> Result<SharedDek, PoolError> {
        let seen_mark = self.directory.mark(&scope.tenant).now();
        let tenant = self.directory.tenant(&scope.tenant).await?;
        let key = self.directory.key(&scope.tenant, &scope.key).await?;
        self.pass_over_stranded(&tenant, scope).await?;
        if let Some(waiting) = self.store.next_dek(scope).await? {
            return self.open_read(&tenant, &key, &waiting, seen_mark, Asker::Background).await;
        }
        let new = self.generate(&tenant, scope, DekState::Next, Asker::Background).await?;
        match self.store.insert_next_dek(&new.stored.dek, &new.stored.wrapped).await? {
            Activation::Done => {
                let live = self.live(&tenant, &new.stored, &key.policy, seen_mark)?;
                self.received(live, new, &tenant.ring)
            }
            Activation::Taken(theirs) => {
                self.open_read(&tenant, &key, &theirs, seen_mark, Asker::Background).await
            }
        }
    }

    async fn generate(
        &self,
        tenant: &TenantRecord,
        scope: &DekScope,
        state: DekState,
        asker: Asker,
    ) -> Result<Made, PoolError> {
        let now = self.clock.now();
        let id = new_dek_id(now)?;
        let context = kms_context(scope, id)?;
        self.may_call(&scope.tenant, asker)?;
        let _turn = self.turns.wait(&tenant.id, &self.clock).await?;
        let asked_at = self.clock.monotonic();
        let generated =
            self.rings.generate(&tenant.ring, &context, asker.urgency()).await.map_err(refused)?;
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
        asker: Asker,
    ) -> Result<SharedDek, PoolError> {
        let refused = match stored.dek.state {
            DekState::Revoked => Some(PoolError::Revoked),
            DekState::Destroyed => Some(PoolError::Destroyed),
            DekState::Next | DekState::Active | DekState::Retired => None,
        };
        if let Some(refused) = refused {
            if let Some(live) = self.cache.find(&tenant.id, stored.dek.id, Arc::clone) {
                self.cache.drop_one(&live);
            }
            return Err(refused);
        }
        let key = self.directory.key(&tenant.id, &stored.dek.scope.key).await?;
        let live = match self.remembered(&stored) {
            Some(live) => {
                live.learn(self.facts(tenant, &stored, &key.policy, seen_mark)?);
                live
            }
            None => self.live(tenant, &stored, &key.policy, seen_mark)?,
        };
        self.serve(live, tenant, asker).await
    }

    /// A registered data key that is in memory, or was pushed out while it encrypts: its counts go on.
    fn remembered(&self, stored: &StoredDek) -> Option<SharedDek> {
        let StoredDek { dek, .. } = stored;
        // What an envelope has brought is not what the registry holds: the KMS is asked about that.
        let cached =
            self.cache.find(&dek.scope.tenant, dek.id, Arc::clone).filter(|live| live.facts().registered);
        cached.or_else(|| self.active.pin().get(&dek.scope).filter(|live| live.id == dek.id).cloned())
    }

    /// Has the KMS vouch for a data key where that is due, and keeps it.
    async fn serve(
        &self,
        live: SharedDek,
        tenant: &TenantRecord,
        asker: Asker,
    ) -> Result<SharedDek, PoolError> {
        let keks = believed(tenant);
        if live.plaintext(self.clock.monotonic()).is_none() {
            self.vouch(&live, &keks, asker).await?;
        }
        self.cache.keep(Arc::clone(&live));
        self.still_allowed(&live, &keks)?;
        Ok(live)
    }

    /// Takes back what was vouched for by a replica of a KEK that has said no in the meantime. For what is kept: a
    /// denial that comes later finds it there.
    pub(super) fn still_allowed(&self, live: &LiveDek, keks: &[Kek]) -> Result<(), PoolError> {
        self.rings.forbidden(&live.vouched_by(), keks).map_or(Ok(()), |denied| {
            live.wipe();
            Err(PoolError::Kms(denied))
        })
    }

    /// Opens a data key that only the envelope knows. The section comes from the caller, so it is believed only as
    /// far as it agrees with what is known: its KMS context must be exactly the one that this tenant, key, data key
    /// and the call's key-bound pairs call for, and only KEKs of the tenant's ring, now or earlier, are asked. Otherwise anyone could bring a
    /// data key of his own, wrapped under a KEK of his own, and have his forgery opened as genuine.
    async fn open_brought(
        &self,
        tenant: &TenantRecord,
        id: DataKeyId,
        brought: &Brought,
        seen_mark: u64,
    ) -> Result<SharedDek, PoolError> {
        let Brought { section, bound, asked } = brought;
        let answers = self.watch.answers();
        let unasked_since = (!asked).then(|| answers.now());
        let context = section.kms_context().ok_or(PoolError::UnknownDek)?;
        let disbelieved = PoolError::Disbelieved("its KMS context is not of this tenant, key and data key");
        let key_name = context.get("keyfold:key").and_then(|name| name.parse::<KeyName>().ok());
        let key_name = key_name.ok_or_else(|| disbelieved.clone())?;
        let scope = DekScope { tenant: tenant.id.clone(), key: key_name, bound: bound.clone() };
        if kms_context(&scope, id)? != *context {
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
            section: Arc::new(section.clone().into()),
            retires_at: Duration::ZERO,
            seen_mark,
            registered: false,
            unasked_since,
        };
        // The same was brought before: the KMS's word for it still counts.
        let before = self.cache.find(&tenant.id, id, Arc::clone).filter(|live| {
            let known = live.facts();
            !known.registered && **known.section == *section && live.scope == scope
        });
        let live = if let Some(live) = before {
            live.learn(facts);
            live
        } else {
            let (canonical, mark) = (context.canonical(), self.directory.mark(&tenant.id));
            LiveDek::shared(id, scope, &canonical, Counts::default(), facts, mark, answers)
        };
        self.serve(live, tenant, Asker::Request).await
    }

    /// Has the KMS give the plaintext (again), and heeds its answer: after a denial nothing is left in memory, an outage
    /// lets it live on for a while. The service's own limits are no outage; but where the KMS has just left others
    /// without an answer, they are no reason either to refuse what that outage excuses.
    pub(super) async fn vouch(&self, live: &LiveDek, keks: &[Kek], asker: Asker) -> Result<(), PoolError> {
        let context = kms_context(&live.scope, live.id)?;
        let section = live.facts().section.clone();
        let forms: Vec<(KekId, &[u8])> = section
            .keys()
            .iter()
            .filter_map(|form| Some((form.kek.parse().ok()?, form.blob.as_slice())))
            .collect();
        let answer = async {
            self.may_call(&live.scope.tenant, asker)?;
            let _turn = self.turns.wait(&live.scope.tenant, &self.clock).await?;
            // The KMS vouches for the moment at which it decided, which is not before it was asked.
            let asked_at = self.clock.monotonic();
            let unwrapped =
                self.rings.unwrap(keks, &forms, &context, asker.urgency()).await.map_err(refused)?;
            Ok((unwrapped, asked_at))
        };
        match answer.await {
            Ok((unwrapped, asked_at)) => {
                let key = DataKey::new(live.id, unwrapped.plaintext);
                self.vouched(live, key, unwrapped.by, asked_at);
                Ok(())
            }
            Err(PoolError::Kms(KmsError::Outage { .. }) | PoolError::Busy | PoolError::KmsQuota(_))
                if self.outlasts(live, keks, &forms) =>
            {
                Ok(())
            }
            // The KMS has not said anything against what is in memory.
            Err(
                silent @ (PoolError::Kms(KmsError::Outage { .. })
                | PoolError::Busy
                | PoolError::KmsQuota(_)
                | PoolError::Internal(_)),
            ) => Err(silent),
            Err(refused) => {
                live.wipe();
                Err(refused)
            }
        }
    }

    /// Whether what is in memory lives on: the KMS that vouched for it is the one that does not answer. Where none of
    /// the forms is that KEK's any more, all that could be asked must be silent.
    fn outlasts(&self, live: &LiveDek, keks: &[Kek], forms: &[(KekId, &[u8])]) -> bool {
        let by = live.vouched_by();
        let could_answer = |kek: &KekId| forms.iter().any(|(form, _)| form.same_material(kek));
        let askable = keks.iter().map(|kek| &kek.id).filter(|kek| could_answer(kek));
        let silent_at = if keks.iter().any(|kek| kek.id == *by) && could_answer(&by) {
            self.rings.silent_at(&by)
        } else {
            askable.map(|kek| self.rings.silent_at(kek)).min().flatten()
        };
        silent_at.is_some_and(|at| live.outlast(at, self.clock.monotonic(), self.lifetimes))
    }

    /// Takes a KMS call out of the tenant's quota, where a request waits for it.
    fn may_call(&self, tenant: &TenantId, asker: Asker) -> Result<(), PoolError> {
        match &self.kms_calls {
            Some(calls) if asker == Asker::Request => {
                calls.take(tenant, 1).map(|_| ()).map_err(PoolError::KmsQuota)
            }
            _ => Ok(()),
        }
    }

    /// A KEK's owner has said no: everything that this KEK has vouched for goes, whoever uses it, and every other process
    /// on the registry hears of it.
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

    /// Keeps a data key that was just made, unless somebody has opened it already: it is in memory once.
    fn received(&self, live: SharedDek, new: Made, ring: &KekRing) -> Result<SharedDek, PoolError> {
        let live = self.remembered(&new.stored).unwrap_or(live);
        self.vouched(&live, new.key, new.by, new.asked_at);
        self.cache.keep(Arc::clone(&live));
        self.still_allowed(&live, ring.members())?;
        Ok(live)
    }

    fn live(
        &self,
        tenant: &TenantRecord,
        stored: &StoredDek,
        policy: &KeyPolicy,
        seen_mark: u64,
    ) -> Result<SharedDek, PoolError> {
        let dek = &stored.dek;
        let context = kms_context(&dek.scope, dek.id)?.canonical();
        let counts = Counts::from_registry(dek.messages, dek.bytes);
        let facts = self.facts(tenant, stored, policy, seen_mark)?;
        let mark = self.directory.mark(&dek.scope.tenant);
        let answers = self.watch.answers();
        Ok(LiveDek::shared(dek.id, dek.scope.clone(), &context, counts, facts, mark, answers))
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
            section: Arc::new(section.into()),
            retires_at,
            seen_mark,
            registered: true,
            unasked_since: None,
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

/// The answer that decides, of all that a ring's members have given.
fn refused(failure: RingFailure) -> PoolError {
    if failure.broken && !failure.failures.iter().any(|answer| matches!(answer, KmsError::Denied { .. })) {
        return PoolError::Internal("a call to the KMS did not end well");
    }
    failure
        .deciding()
        .map_or(PoolError::Disbelieved("none of its KEKs belongs to the tenant's ring"), PoolError::Kms)
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
