//! Shredding: destroy a data key, a key or a tenant after a waiting period, in which it can be cancelled.

use std::time::Duration;

use super::{OperationError, Operations, Page};
use crate::access::{AdminOf, Operate, Permit};
use crate::audit::Asked;
use crate::store::{
    EnvelopeWeight, JobKind, JobRecord, JobState, KekUse, KeyRecord, ShredRecord, StoreError, Target,
};
use crate::tenant::KekId;

/// The waiting period's limits.
#[derive(Clone, Debug)]
pub struct ShredOptions {
    /// How long it is where nothing is said, in seconds. Default 604,800: 7 days.
    pub waiting_secs: u64,
    /// The shortest that may be asked for, in seconds. Default 3,600: an hour. `--dev` allows 0.
    pub waiting_secs_min: u64,
    /// The longest, in seconds. Default 31,536,000: 365 days.
    pub waiting_secs_max: u64,
}

impl Default for ShredOptions {
    fn default() -> Self {
        Self { waiting_secs: 604_800, waiting_secs_min: 3_600, waiting_secs_max: 31_536_000 }
    }
}

/// What is to be destroyed, and what that does not reach.
#[derive(Clone, Debug)]
pub struct Shredding {
    /// What, and from when on.
    pub record: ShredRecord,
    /// What this service cannot destroy, and what to do about it.
    pub beyond_reach: Vec<BeyondReach>,
}

/// A copy of a data key that stays where it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BeyondReach {
    /// What it is: `embedded_envelopes`, `registry_backups`, `memory`.
    pub what: &'static str,
    /// What it means, and what to do.
    pub advice: String,
    /// The KEKs whose deletion would end it, and how much else depends on each.
    pub keks: Vec<(KekId, KekUse)>,
}

impl Operations {
    /// Has a data key or a key of the permit's tenant destroyed after a waiting period (the default one where none is
    /// named). It opens nothing from now on.
    pub async fn shred(
        &self,
        permit: &Permit<AdminOf>,
        target: Target,
        waiting_secs: Option<u64>,
    ) -> Result<Shredding, OperationError> {
        let subject = target.clone();
        let who = permit.who().changing_target(&subject);
        let attempt = self.audit.begin_change("shred.request", who, asked(waiting_secs)).await?;
        let asked = match target {
            Target::Tenant => Err(OperationError::Internal("a tenant is shredded by its operator only")),
            target => self.ask(permit, target, waiting_secs).await,
        };
        self.finish(attempt, asked).await
    }

    /// Has all data keys of the permit's tenant destroyed. The tenant is the operator's: hence both permits.
    pub async fn shred_tenant(
        &self,
        permit: &Permit<AdminOf>,
        _operate: &Operate,
        waiting_secs: Option<u64>,
    ) -> Result<Shredding, OperationError> {
        let attempt = self.audit.begin_change("shred.request", permit.who(), asked(waiting_secs)).await?;
        let asked = self.ask(permit, Target::Tenant, waiting_secs).await;
        self.finish(attempt, asked).await
    }

    async fn ask(
        &self,
        permit: &Permit<AdminOf>,
        target: Target,
        waiting_secs: Option<u64>,
    ) -> Result<Shredding, OperationError> {
        let limits = &self.shredding;
        let waiting_secs = waiting_secs.unwrap_or(limits.waiting_secs);
        if !(limits.waiting_secs_min..=limits.waiting_secs_max).contains(&waiting_secs) {
            return Err(OperationError::Invalid(format!(
                "waiting_secs is {waiting_secs}: use {} to {}",
                limits.waiting_secs_min, limits.waiting_secs_max
            )));
        }
        self.check_target(permit, &target).await?;
        let now = self.clock.now();
        let record = ShredRecord {
            tenant: permit.tenant().clone(),
            target: target.clone(),
            requested_at: now,
            requested_by: permit.principal().to_string(),
            due_at: now.plus(Duration::from_secs(waiting_secs)),
            done_at: None,
        };
        self.store.insert_shred(&record).await.map_err(|error| match error {
            StoreError::Conflict(_) => {
                OperationError::Conflict("it is to be shredded already, or was".to_owned())
            }
            StoreError::Missing(what) => OperationError::NotFound(what.to_string()),
            other => other.into(),
        })?;
        let job = JobRecord::new(JobKind::Shred, permit.tenant().clone(), target, now, super::random()?);
        self.store.open_job(&job).await?;
        let beyond_reach = self.beyond_reach(permit).await?;
        Ok(Shredding { record, beyond_reach })
    }

    async fn check_target(&self, permit: &Permit<AdminOf>, target: &Target) -> Result<(), OperationError> {
        match target {
            Target::Tenant => self.tenant(permit).await.map(drop),
            Target::Key(key) => self.key(permit, key).await.map(drop),
            Target::Dek(dek) => self.dek(permit, *dek).await.map(drop),
        }
    }

    /// Takes back what was asked for. What was revoked or switched off stays so until it is restored.
    ///
    /// # Errors
    ///
    /// Not found for a key or data key that there is not; a conflict where nobody asked to shred it, or its
    /// waiting period is over.
    pub async fn cancel_shred(
        &self,
        permit: &Permit<AdminOf>,
        target: &Target,
    ) -> Result<(), OperationError> {
        let who = permit.who().changing_target(target);
        let attempt = self.audit.begin_change("shred.cancel", who, Asked::NOTHING).await?;
        let cancelled = async {
            self.check_target(permit, target).await?;
            let now = self.clock.now();
            self.store.cancel_shred(permit.tenant(), target, now).await.map_err(|error| match error {
                StoreError::Conflict(_) => OperationError::Conflict(
                    "the waiting period is over: it is destroyed, or about to be".to_owned(),
                ),
                StoreError::Missing(_) => {
                    OperationError::Conflict("nobody asked to shred it: nothing is cancelled".to_owned())
                }
                other => other.into(),
            })?;
            self.cancel_job(permit, target).await
        };
        self.finish(attempt, cancelled.await).await
    }

    async fn cancel_job(&self, permit: &Permit<AdminOf>, target: &Target) -> Result<(), OperationError> {
        let job = self.store.open_job_for(permit.tenant(), JobKind::Shred, target).await?;
        let Some(job) = job else { return Ok(()) };
        let now = self.clock.now();
        let cancelled =
            JobRecord { state: JobState::Cancelled, updated_at: now, finished_at: Some(now), ..job };
        Ok(self.store.close_job(&cancelled).await?)
    }

    /// What the permit's tenant has asked to be destroyed, done or not.
    pub async fn list_shreds(
        &self,
        permit: &Permit<AdminOf>,
        page: Page<Target>,
    ) -> Result<Vec<ShredRecord>, OperationError> {
        self.tenant(permit).await?;
        Ok(self.store.shreds(permit.tenant(), page.after.as_ref(), page.limit).await?)
    }

    /// What stays when the registry's wrapped forms are gone.
    async fn beyond_reach(&self, permit: &Permit<AdminOf>) -> Result<Vec<BeyondReach>, OperationError> {
        let tenant = self.tenant(permit).await?;
        let mut keks = Vec::new();
        for kek in tenant.ring.members().iter().chain(&tenant.former_keks) {
            keks.push((kek.id.clone(), self.store.kek_use(&kek.id).await?));
        }
        let first: Vec<KeyRecord> = self.store.keys(permit.tenant(), None, 1_000).await?;
        let embeds = first.iter().any(|key| key.policy.envelope == EnvelopeWeight::Embedded);
        let how = if embeds { "carry" } else { "may carry (where a caller asked for embedded ones)" };
        Ok(vec![
            BeyondReach {
                what: "embedded_envelopes",
                advice: format!(
                    "embedded envelopes {how} a wrapped copy of their data key. This service refuses them while its \
                     registry knows that the data key is dead; who has an envelope and may use the master key can \
                     still open it elsewhere. Deleting the envelopes ends that, or scheduling the deletion of the \
                     master key in the KMS, where nobody else depends on it"
                ),
                keks: keks.clone(),
            },
            BeyondReach {
                what: "registry_backups",
                advice: "backups and snapshots of the registry, and database logs kept for recovery, hold wrapped \
                         copies until they are deleted or expire; restoring one brings the data keys back"
                    .to_owned(),
                keks,
            },
            BeyondReach {
                what: "memory",
                advice: "other replicas drop the data key from memory within seconds; plaintext that callers have \
                         already received is theirs"
                    .to_owned(),
                keks: vec![],
            },
        ])
    }
}

fn asked(waiting_secs: Option<u64>) -> Asked {
    waiting_secs.into_iter().fold(Asked::NOTHING, |asked, secs| asked.number("waiting_secs", secs))
}
