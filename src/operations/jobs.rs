//! Work that takes a while: look at it, ask for it, and find out what still needs a master key.

use envelope::DataKeyId;

use super::{OperationError, Operations, Page};
use crate::access::{AdminOf, Operate, Permit};
use crate::audit::Asked;
use crate::store::{JobKind, JobRecord, KekUse, StoredDek, Target};
use crate::tenant::KekId;

impl Operations {
    /// Jobs of the permit's tenant, the newest first.
    pub async fn list_jobs_of(
        &self,
        permit: &Permit<AdminOf>,
        page: Page<String>,
    ) -> Result<Vec<JobRecord>, OperationError> {
        Ok(self.store.jobs(Some(permit.tenant()), page.after.as_deref(), page.limit).await?)
    }

    /// Jobs of all tenants, the newest first.
    pub async fn list_jobs(
        &self,
        _permit: &Operate,
        page: Page<String>,
    ) -> Result<Vec<JobRecord>, OperationError> {
        Ok(self.store.jobs(None, page.after.as_deref(), page.limit).await?)
    }

    /// A job, if `may_see` says so of its tenant: to others it is one that does not exist.
    pub async fn job(
        &self,
        id: &str,
        may_see: impl FnOnce(&crate::tenant::TenantId) -> bool,
    ) -> Result<JobRecord, OperationError> {
        let job = self.store.job(id).await?.filter(|job| may_see(&job.tenant));
        job.ok_or_else(|| {
            OperationError::NotFound(format!("job '{}'", id.chars().take(80).collect::<String>()))
        })
    }

    /// Has the wrapped data keys of the permit's tenant brought up to its ring and the KEKs' materials now. Where that
    /// is under way, its job is returned.
    pub async fn rewrap_keys(&self, permit: &Permit<AdminOf>) -> Result<JobRecord, OperationError> {
        let attempt = self.audit.begin_change("keys.rewrap", permit.who(), Asked::NOTHING).await?;
        let opened = async {
            self.tenant(permit).await?;
            self.open_rewrap_job(permit).await
        };
        self.finish(attempt, opened.await).await
    }

    pub(super) async fn open_rewrap_job(
        &self,
        permit: &Permit<AdminOf>,
    ) -> Result<JobRecord, OperationError> {
        let (now, tenant) = (self.clock.now(), permit.tenant());
        let job = JobRecord::new(JobKind::RewrapKeys, tenant.clone(), Target::Tenant, now, super::random()?);
        let job = self.store.open_job(&job).await?;
        self.store.nudge_sweep(tenant, now).await?;
        // Rotation follows the registry's changes; this is none of a record, so it is woken by hand.
        self.watch.wake();
        Ok(job)
    }

    /// How much depends on a KEK, over all tenants, and which data keys still have a wrapped form under it.
    pub async fn kek_use(
        &self,
        _permit: &Operate,
        kek: &KekId,
        page: Page<DataKeyId>,
    ) -> Result<(KekUse, Vec<StoredDek>), OperationError> {
        // The list first: a count that is taken later can only be nearer to zero, and zero is what matters.
        let deks = self.store.deks_under_kek(kek, page.after, page.limit).await?;
        Ok((self.store.kek_use(kek).await?, deks))
    }
}
