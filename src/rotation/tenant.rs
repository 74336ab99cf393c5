//! One tenant: load, decide, apply.

use std::collections::HashSet;
use std::time::Duration;

use envelope::DataKeyId;

use super::lease::Lease;
use super::sweep::{Materials, Step, View, sources, sweep};
use super::{Inner, RotationError};
use crate::clock::Timestamp;
use crate::kms::{self, KekState, KmsError, Urgency};
use crate::store::{
    FencedChange, JobKind, JobRecord, JobState, KekMaterial, KeyRecord, ShredRecord, StoreError, StoredDek,
    SweepRecord, Target, TenantRecord, WrappedRecord,
};
use crate::tenant::{Kek, KekId};

/// How many data keys' changes are written in one step.
const BATCH: usize = 16;
/// After so many outages in a row the KMS is left alone until the tenant is tried again.
const OUTAGES_MAX: u32 = 5;
/// Data keys' ids are in the order of the clocks that made them, which may differ by this much.
const CLOCKS_APART_MAX: Duration = Duration::from_hours(1);
const KEYS_PAGE: u32 = 100;
const SHREDS_PAGE: u32 = 100;

/// What came of a tenant's turn.
#[derive(Default)]
pub(super) struct Turn {
    /// Why it has to be tried again.
    pub(super) error: Option<String>,
    /// There is more to do, and others have their turn first.
    pub(super) unfinished: bool,
    /// What was found in order, if all of it was.
    pub(super) checked: Option<Checked>,
}

/// What the data keys agree with.
pub(super) struct Checked {
    pub(super) basis: String,
    pub(super) full: bool,
    pub(super) through: Option<DataKeyId>,
}

impl Turn {
    pub(super) fn failed(error: &str) -> Self {
        Self { error: Some(error.to_owned()), ..Self::default() }
    }
}

/// Everything that a turn knows and has done so far.
struct Work<'a> {
    inner: &'a Inner,
    lease: &'a Lease,
    tenant: TenantRecord,
    keys: Vec<KeyRecord>,
    shreds: Vec<ShredRecord>,
    materials: Materials,
    /// Data keys that must not be rewrapped yet: their successor could not be put in place.
    blocked: HashSet<DataKeyId>,
    job: Option<JobRecord>,
    errors: u64,
    last_error: Option<String>,
    outages: u32,
    /// KEKs whose denial the pool has been told of in this turn: many data keys meet the same one.
    denied: HashSet<KekId>,
    changed: usize,
    batch: Vec<(DataKeyId, Vec<FencedChange>)>,
}

/// Gives a tenant its turn. Only what keeps the registry from being read or written is an error here.
pub(super) async fn sweep_tenant(
    inner: &Inner,
    lease: &Lease,
    before: &SweepRecord,
) -> Result<Turn, StoreError> {
    let store = &inner.parts.store;
    let Some(tenant) = store.tenant(&before.tenant).await? else { return Ok(Turn::default()) };
    let job = store.open_job_for(&tenant.id, JobKind::RewrapKeys, &Target::Tenant).await?;
    // Somebody asked for it: the KMS is asked for its materials now, whatever it said a minute ago.
    let asked_for = job.as_ref().is_some_and(|job| job.state == JobState::Waiting);
    let materials = materials(inner, lease, &tenant, asked_for).await?;
    let keys = keys(inner, &tenant).await?;
    let shreds = shreds(inner, &tenant).await?;
    let basis = basis(&tenant, &materials);
    let full = before.basis.as_ref() != Some(&basis) || asked_for || is_full_due(inner, before);
    let after = if full { None } else { before.checked_through.and_then(rewound) };
    let mut work = Work {
        inner,
        lease,
        tenant,
        keys,
        shreds,
        materials,
        blocked: HashSet::new(),
        job,
        errors: 0,
        last_error: None,
        outages: 0,
        denied: HashSet::new(),
        changed: 0,
        batch: Vec::new(),
    };
    work.follow_all().await?;
    let (pending, through) = work.count(after).await?;
    work.open_job(pending).await?;
    let unfinished = if pending > 0 { work.wrap_all(after).await? } else { false };
    work.end_job(unfinished).await?;
    if let Some(error) = work.last_error {
        return Ok(Turn { error: Some(error), unfinished: false, checked: None });
    }
    let checked = (!unfinished).then_some(Checked { basis, full, through });
    Ok(Turn { error: None, unfinished, checked })
}

impl Work<'_> {
    fn view<'v>(&'v self, key: &'v KeyRecord, deks: &'v [StoredDek]) -> View<'v> {
        View { tenant: &self.tenant, key, deks, materials: &self.materials, shreds: &self.shreds }
    }

    fn failed(&mut self, error: impl std::fmt::Display) {
        self.errors += 1;
        self.last_error = Some(error.to_string());
    }

    /// Next and retire, for every scope of every key.
    async fn follow_all(&mut self) -> Result<(), StoreError> {
        let inner = self.inner;
        for key in self.keys.clone() {
            let mut after = None;
            loop {
                let page = inner
                    .parts
                    .store
                    .active_deks(&self.tenant.id, &key.name, after.as_ref(), inner.options.page_deks)
                    .await?;
                let Some(last) = page.last() else { break };
                after = Some(last.dek.scope.bound.clone());
                for active in page {
                    let next = inner.parts.store.next_dek(&active.dek.scope).await?;
                    let deks: Vec<StoredDek> = std::iter::once(active).chain(next).collect();
                    let steps = sweep(&self.view(&key, &deks), inner.parts.clock.now());
                    self.follow(&steps).await?;
                }
            }
        }
        Ok(())
    }

    async fn follow(&mut self, steps: &[Step]) -> Result<(), StoreError> {
        let mut failed = false;
        for step in steps {
            let applied = match step {
                Step::Retire { dek, .. } if failed => {
                    self.blocked.insert(*dek);
                    continue;
                }
                Step::Next { scope } => {
                    for _ in self.tenant.ring.members() {
                        self.inner.budget.take().await;
                    }
                    self.inner.parts.pool.prepare_next(scope).await.map_err(|error| error.to_string())
                }
                Step::RetireNext { dek } => self.change(FencedChange::RetireNext { dek: *dek }).await?,
                Step::Retire { scope, dek } => {
                    self.change(FencedChange::Promote { scope: scope.clone(), predecessor: *dek }).await?
                }
                Step::Rewrap { .. } | Step::Add { .. } | Step::Drop { .. } | Step::Destroy { .. } => continue,
            };
            if let Err(error) = applied {
                failed = true;
                self.blocked.extend(step.dek());
                self.failed(error);
            }
        }
        Ok(())
    }

    /// One change now. The inner error is this tenant's alone.
    async fn change(&self, change: FencedChange) -> Result<Result<(), String>, StoreError> {
        self.lease.keep().await?;
        let (store, now) = (&self.inner.parts.store, self.inner.parts.clock.now());
        match store.apply_fenced(&self.lease.fence(), &[change], now).await {
            Ok(()) => Ok(Ok(())),
            Err(error @ (StoreError::Conflict(_) | StoreError::Missing(_))) => Ok(Err(error.to_string())),
            Err(other) => Err(other),
        }
    }

    /// How many data keys have something to be done, and which is the last one there is.
    async fn count(&self, after: Option<DataKeyId>) -> Result<(u64, Option<DataKeyId>), StoreError> {
        let (mut pending, mut through) = (0, None);
        for key in &self.keys {
            let mut at = after;
            loop {
                let page = self.page(key, at).await?;
                let Some(last) = page.last() else { break };
                at = Some(last.dek.id);
                through = through.max(at);
                let steps = self.wrapping_steps(key, &page);
                let concerned: HashSet<DataKeyId> = steps.iter().filter_map(Step::dek).collect();
                pending += concerned.len() as u64;
            }
        }
        Ok((pending, through))
    }

    async fn page(&self, key: &KeyRecord, after: Option<DataKeyId>) -> Result<Vec<StoredDek>, StoreError> {
        let limit = self.inner.options.page_deks;
        self.inner.parts.store.deks(&self.tenant.id, &key.name, after, limit).await
    }

    /// Rewrap, add, drop. A page of data keys may tear a scope's active one from the one that waits, so the other
    /// steps are not taken from it.
    fn wrapping_steps(&self, key: &KeyRecord, page: &[StoredDek]) -> Vec<Step> {
        let steps = sweep(&self.view(key, page), self.inner.parts.clock.now());
        let wrapping =
            |step: &Step| matches!(step, Step::Rewrap { .. } | Step::Add { .. } | Step::Drop { .. });
        steps.into_iter().filter(wrapping).collect()
    }

    /// Brings the wrapped forms in order. True where the turn is over before everything is.
    async fn wrap_all(&mut self, after: Option<DataKeyId>) -> Result<bool, StoreError> {
        for key in self.keys.clone() {
            let mut at = after;
            loop {
                let page = self.page(&key, at).await?;
                let Some(last) = page.last() else { break };
                at = Some(last.dek.id);
                let steps = self.wrapping_steps(&key, &page);
                for stored in &page {
                    let own: Vec<&Step> =
                        steps.iter().filter(|step| step.dek() == Some(stored.dek.id)).collect();
                    if own.is_empty() || self.blocked.contains(&stored.dek.id) {
                        continue;
                    }
                    self.wrap(stored, &own).await?;
                    if self.outages >= OUTAGES_MAX {
                        self.flush().await?;
                        return Ok(true);
                    }
                    if self.changed >= self.inner.options.deks_per_turn_max {
                        self.flush().await?;
                        return Ok(true);
                    }
                }
            }
        }
        self.flush().await?;
        Ok(false)
    }

    /// One data key. Forms are dropped only where all others could be made: they come last.
    async fn wrap(&mut self, stored: &StoredDek, steps: &[&Step]) -> Result<(), StoreError> {
        let dek = stored.dek.id;
        let mut changes = Vec::new();
        let mut denied = std::mem::take(&mut self.denied);
        for step in steps {
            match step {
                Step::Rewrap { kek, .. } | Step::Add { kek, .. } => {
                    match self.rewrap(stored, kek, &mut denied).await {
                        Ok(wrapped) => {
                            self.outages = 0;
                            changes.push(FencedChange::PutWrapped { dek, wrapped });
                        }
                        Err(error) => {
                            self.outages += u32::from(matches!(error, KmsError::Outage { .. }));
                            tracing::warn!(tenant = %self.tenant.id, %dek, %error, "a data key was not rewrapped");
                            self.failed(error);
                            break;
                        }
                    }
                }
                Step::Drop { kek, .. } => changes.push(FencedChange::RemoveWrapped { dek, kek: kek.clone() }),
                _ => {}
            }
        }
        self.denied = denied;
        if !changes.is_empty() {
            self.batch.push((dek, changes));
        }
        if self.batch.len() >= BATCH { self.flush().await } else { Ok(()) }
    }

    /// Has the KMS wrap a data key under `to`, from whichever form it can open. `denied` are the KEKs whose denial is
    /// known to the pool.
    async fn rewrap(
        &self,
        stored: &StoredDek,
        to: &KekId,
        denied: &mut HashSet<KekId>,
    ) -> Result<WrappedRecord, KmsError> {
        let scope = &stored.dek.scope;
        let context = kms::kms_context(&scope.tenant, &scope.key, stored.dek.id, &scope.bound)
            .map_err(|error| KmsError::damaged(to, error.to_string()))?;
        let target =
            self.tenant.ring.member(to).ok_or_else(|| KmsError::denied(to, "it has left the ring"))?;
        let mut decisive = None;
        for form in sources(&self.tenant, stored, to) {
            let Some(from) = self.opener(&form.kek) else { continue };
            self.inner.budget.take().await;
            let kms = &self.inner.parts.kms;
            match kms.rewrap(from, target, &context, &form.blob, Urgency::Background).await {
                Ok(wrapped) => {
                    return Ok(WrappedRecord {
                        kek: to.clone(),
                        blob: wrapped.blob,
                        material: wrapped.material,
                        wrapped_at: self.inner.parts.clock.now(),
                    });
                }
                Err(error) => {
                    if let KmsError::Denied { kek, .. } = &error
                        && denied.insert(kek.clone())
                    {
                        self.inner.parts.pool.denied(kek);
                    }
                    decisive.get_or_insert(error);
                }
            }
        }
        Err(decisive.unwrap_or_else(|| KmsError::damaged(to, "no form of it is under a KEK of this tenant")))
    }

    /// The KEK that opens what `kek` wrapped: itself, or a member of the ring that is its replica.
    fn opener(&self, kek: &KekId) -> Option<&Kek> {
        let members = self.tenant.ring.members();
        self.tenant
            .ring
            .member(kek)
            .or_else(|| members.iter().find(|member| member.id.same_material(kek)))
            .or_else(|| self.tenant.former_keks.iter().find(|former| former.id == *kek))
    }

    /// Writes what the KMS has given, together with how far the job has come.
    async fn flush(&mut self) -> Result<(), StoreError> {
        let batch = std::mem::take(&mut self.batch);
        if batch.is_empty() {
            return Ok(());
        }
        self.lease.keep().await?;
        let (store, now) = (&self.inner.parts.store, self.inner.parts.clock.now());
        let mut changes: Vec<FencedChange> =
            batch.iter().flat_map(|(_, changes)| changes.iter().cloned()).collect();
        let progressed = self.progressed(batch.len() as u64, now);
        changes.extend(progressed.clone().map(FencedChange::Job));
        match store.apply_fenced(&self.lease.fence(), &changes, now).await {
            Ok(()) => {
                self.job = progressed;
                self.changed += batch.len();
                Ok(())
            }
            // One of them was destroyed in the meantime, or has lost its forms otherwise: the others go on.
            Err(StoreError::Conflict(_) | StoreError::Missing(_)) => self.flush_one_by_one(batch).await,
            Err(other) => Err(other),
        }
    }

    async fn flush_one_by_one(
        &mut self,
        batch: Vec<(DataKeyId, Vec<FencedChange>)>,
    ) -> Result<(), StoreError> {
        let (store, fence) = (&self.inner.parts.store, self.lease.fence());
        for (dek, mut changes) in batch {
            let now = self.inner.parts.clock.now();
            let progressed = self.progressed(1, now);
            changes.extend(progressed.clone().map(FencedChange::Job));
            match store.apply_fenced(&fence, &changes, now).await {
                Ok(()) => {
                    self.job = progressed;
                    self.changed += 1;
                }
                Err(error @ (StoreError::Conflict(_) | StoreError::Missing(_))) => {
                    tracing::warn!(tenant = %self.tenant.id, %dek, %error, "a data key was not rewrapped");
                    self.errors += 1;
                    self.last_error = Some(error.to_string());
                }
                Err(other) => return Err(other),
            }
        }
        Ok(())
    }

    fn progressed(&self, more: u64, now: Timestamp) -> Option<JobRecord> {
        let job = self.job.as_ref()?;
        let done = job.done.saturating_add(more);
        Some(JobRecord { done, total: job.total.max(done), updated_at: now, ..job.clone() })
    }

    /// Work that takes a while is a job, asked for or not.
    async fn open_job(&mut self, pending: u64) -> Result<(), StoreError> {
        let now = self.inner.parts.clock.now();
        let job = match self.job.take() {
            Some(job) => job,
            None if pending == 0 => return Ok(()),
            None => {
                let random = random().map_err(|error| StoreError::Unavailable(error.to_string().into()))?;
                let new =
                    JobRecord::new(JobKind::RewrapKeys, self.tenant.id.clone(), Target::Tenant, now, random);
                self.inner.parts.store.open_job(&new).await?
            }
        };
        let started_at = job.started_at.or(Some(now));
        let total = job.done.saturating_add(pending);
        let job = JobRecord { state: JobState::Running, total, started_at, updated_at: now, ..job };
        self.lease.keep().await?;
        let change = [FencedChange::Job(job.clone())];
        self.inner.parts.store.apply_fenced(&self.lease.fence(), &change, now).await?;
        self.job = Some(job);
        Ok(())
    }

    /// Says how it went: done, or what failed.
    async fn end_job(&mut self, unfinished: bool) -> Result<(), StoreError> {
        let Some(job) = self.job.take() else { return Ok(()) };
        let now = self.inner.parts.clock.now();
        let mut job = JobRecord { updated_at: now, errors: job.errors.saturating_add(self.errors), ..job };
        if self.last_error.is_some() {
            job.last_error.clone_from(&self.last_error);
        } else if !unfinished {
            job.state = JobState::Done;
            job.finished_at = Some(now);
        }
        self.lease.keep().await?;
        self.inner.parts.store.apply_fenced(&self.lease.fence(), &[FencedChange::Job(job)], now).await
    }
}

/// What the ring's KEKs have for materials, as the KMS says or has said. A KEK that does not answer is taken to be as
/// it was: its turn comes again.
async fn materials(
    inner: &Inner,
    lease: &Lease,
    tenant: &TenantRecord,
    ask_now: bool,
) -> Result<Materials, StoreError> {
    let mut materials = Materials::new();
    for kek in tenant.ring.members() {
        let known = inner.parts.store.kek_material(&kek.id).await?;
        let known = match (ask(inner, kek, ask_now).await, known) {
            (Some(material), Some(known)) if known.material == material => Some(known),
            (Some(material), known) => Some(changed(inner, lease, kek, material, known).await?),
            (None, known) => known,
        };
        if let Some(known) = known {
            materials.insert(kek.id.clone(), known);
        }
    }
    Ok(materials)
}

async fn ask(inner: &Inner, kek: &Kek, ask_now: bool) -> Option<String> {
    let now = inner.parts.clock.monotonic();
    let fresh = Duration::from_secs(inner.options.kek_check_secs);
    if let Some((at, material)) = inner.asked().get(&kek.id)
        && !ask_now
        && now.saturating_sub(*at) < fresh
    {
        return material.clone();
    }
    inner.budget.take().await;
    match inner.parts.kms.describe(kek, Urgency::Background).await {
        Ok(described) => {
            if matches!(described.state, KekState::Disabled | KekState::PendingDeletion) {
                inner.parts.pool.denied(&kek.id);
            }
            inner.asked().insert(kek.id.clone(), (now, described.material.clone()));
            described.material
        }
        // Even a denial is only about describing: who may not look at a key may be allowed to use it.
        Err(error) => {
            tracing::warn!(kek = %kek.id, %error, "the KMS does not describe a KEK");
            None
        }
    }
}

/// A KEK has another material than before: every tenant whose ring holds it has to follow.
async fn changed(
    inner: &Inner,
    lease: &Lease,
    kek: &Kek,
    material: String,
    before: Option<KekMaterial>,
) -> Result<KekMaterial, StoreError> {
    let now = inner.parts.clock.now();
    let first = before.is_none();
    let since = if first { Timestamp::default() } else { now };
    let seen = KekMaterial { kek: kek.id.clone(), material, since };
    lease.keep().await?;
    let change = [FencedChange::KekMaterial(seen.clone())];
    inner.parts.store.apply_fenced(&lease.fence(), &change, now).await?;
    if !first {
        tracing::info!(kek = %kek.id, "a KEK's material has changed: its data keys are rewrapped");
        inner.parts.store.nudge_sweeps_of_kek(&kek.id, now).await?;
    }
    Ok(seen)
}

async fn keys(inner: &Inner, tenant: &TenantRecord) -> Result<Vec<KeyRecord>, StoreError> {
    let mut keys: Vec<KeyRecord> = Vec::new();
    loop {
        let after = keys.last().map(|key| &key.name);
        let page = inner.parts.store.keys(&tenant.id, after, KEYS_PAGE).await?;
        if page.is_empty() {
            return Ok(keys);
        }
        keys.extend(page);
    }
}

async fn shreds(inner: &Inner, tenant: &TenantRecord) -> Result<Vec<ShredRecord>, StoreError> {
    let mut shreds: Vec<ShredRecord> = Vec::new();
    loop {
        let after = shreds.last().map(|shred| &shred.target);
        let page = inner.parts.store.shreds(&tenant.id, after, SHREDS_PAGE).await?;
        if page.is_empty() {
            return Ok(shreds);
        }
        shreds.extend(page);
    }
}

/// What the wrapped forms are compared with: the tenant's version (its ring and former KEKs) and the materials.
fn basis(tenant: &TenantRecord, materials: &Materials) -> String {
    let mut basis = format!("{}", tenant.version);
    for member in tenant.ring.members() {
        let material = materials.get(&member.id).map_or("", |known| &known.material);
        basis.extend([" ", member.id.as_str(), "=", material]);
    }
    basis
}

fn is_full_due(inner: &Inner, before: &SweepRecord) -> bool {
    let every = Duration::from_secs(inner.options.full_sweep_secs);
    before.full_at.is_none_or(|at| inner.parts.clock.now().since(at) >= every)
}

/// An id that comes before all those made within the last hour before `id`.
fn rewound(id: DataKeyId) -> Option<DataKeyId> {
    let apart_ms = CLOCKS_APART_MAX.as_millis();
    let made_ms = u128::from_be_bytes(*id.as_bytes()) >> 80;
    let earlier = made_ms.checked_sub(apart_ms)? << 80;
    Some(DataKeyId::from_bytes(earlier.to_be_bytes()))
}

pub(super) fn random() -> Result<[u8; 10], RotationError> {
    let mut random = [0; 10];
    getrandom::fill(&mut random).map_err(|_| RotationError::NoRandomness)?;
    Ok(random)
}
