//! What rotation keeps: leases, sweeps, shreds, jobs, and the changes that only a lease's holder may make.

use std::time::Duration;

use async_trait::async_trait;
use envelope::{DataKeyId, EncryptionContext};
use sqlx::SqliteConnection;

use super::{SqliteStore, deks, failure, tenants};
use crate::clock::Timestamp;
use crate::store::{
    DekState, Fence, FencedChange, JobKind, JobRecord, JobState, KekMaterial, KekUse, RotationStore,
    ShredRecord, StoreError, StoredDek, SweepRecord, Swept, Target, rows, sql,
};
use crate::tenant::{KekId, KeyName, TenantId};

#[async_trait]
impl RotationStore for SqliteStore {
    async fn acquire_lease(
        &self,
        name: &str,
        holder: &str,
        ttl: Duration,
        now: Timestamp,
    ) -> Result<Option<u64>, StoreError> {
        let mut change = self.change().await?;
        let found =
            sqlx::query(sql::LEASE).bind(name).fetch_optional(&mut *change).await.map_err(failure::of)?;
        let expires_at = now.plus(ttl).unix_ms();
        let token = match found.map(|row| rows::lease(&row)).transpose()? {
            None => {
                let insert = sqlx::query(sql::INSERT_LEASE).bind(name).bind(holder).bind(expires_at);
                insert.execute(&mut *change).await.map_err(failure::of)?;
                1
            }
            Some((_, token, ends)) if ends <= now => token + 1,
            Some((held_by, token, _)) if held_by == holder => token,
            Some(_) => return Ok(None),
        };
        sqlx::query(sql::UPDATE_LEASE)
            .bind(name)
            .bind(holder)
            .bind(rows::saturated(token))
            .bind(expires_at)
            .execute(&mut *change)
            .await
            .map_err(failure::of)?;
        change.commit().await.map_err(failure::of)?;
        Ok(Some(token))
    }

    async fn release_lease(&self, fence: &Fence, now: Timestamp) -> Result<(), StoreError> {
        sqlx::query(sql::RELEASE_LEASE)
            .bind(&fence.lease)
            .bind(rows::saturated(fence.token))
            .bind(now.unix_ms())
            .execute(&self.writer)
            .await
            .map_err(failure::of)?;
        Ok(())
    }

    async fn apply_fenced(
        &self,
        fence: &Fence,
        changes: &[FencedChange],
        now: Timestamp,
    ) -> Result<(), StoreError> {
        let mut change = self.change().await?;
        let found = sqlx::query(sql::LEASE)
            .bind(&fence.lease)
            .fetch_optional(&mut *change)
            .await
            .map_err(failure::of)?;
        let token = found.map(|row| rows::lease(&row)).transpose()?.map(|(_, token, _)| token);
        if token != Some(fence.token) {
            return Err(StoreError::LostLease(fence.lease.as_str().into()));
        }
        for fenced in changes {
            apply(&mut change, fenced, now).await?;
        }
        change.commit().await.map_err(failure::of)
    }

    async fn due_sweeps(&self, now: Timestamp, limit: u32) -> Result<Vec<SweepRecord>, StoreError> {
        let found = sqlx::query(sql::DUE_SWEEPS)
            .bind(now.unix_ms())
            .bind(i64::from(limit))
            .fetch_all(&self.readers)
            .await
            .map_err(failure::of)?;
        found.iter().map(rows::sweep).collect()
    }

    async fn sweep(&self, tenant: &TenantId) -> Result<Option<SweepRecord>, StoreError> {
        let found = sqlx::query(sql::SWEEP)
            .bind(tenant.as_str())
            .fetch_optional(&self.readers)
            .await
            .map_err(failure::of)?;
        found.map(|row| rows::sweep(&row)).transpose()
    }

    async fn nudge_sweep(&self, tenant: &TenantId, now: Timestamp) -> Result<(), StoreError> {
        let mut change = self.change().await?;
        tenants::nudge(&mut change, tenant, now).await?;
        change.commit().await.map_err(failure::of)
    }

    async fn nudge_sweeps_of_kek(&self, kek: &KekId, now: Timestamp) -> Result<(), StoreError> {
        sqlx::query(sql::NUDGE_SWEEPS_OF_KEK)
            .bind(kek.as_str())
            .bind(now.unix_ms())
            .execute(&self.writer)
            .await
            .map_err(failure::of)?;
        Ok(())
    }

    async fn active_deks(
        &self,
        tenant: &TenantId,
        key: &KeyName,
        after: Option<&EncryptionContext>,
        limit: u32,
    ) -> Result<Vec<StoredDek>, StoreError> {
        let found = sqlx::query(sql::ACTIVE_DEKS)
            .bind(tenant.as_str())
            .bind(key.as_str())
            .bind(after.map(EncryptionContext::canonical).unwrap_or_default())
            .bind(i64::from(limit))
            .fetch_all(&self.readers)
            .await
            .map_err(failure::of)?;
        let mut stored = rows::deks(&found)?;
        stored.sort_by_cached_key(|stored| stored.dek.scope.bound.canonical());
        Ok(stored)
    }

    async fn deks_under_kek(
        &self,
        kek: &KekId,
        after: Option<DataKeyId>,
        limit: u32,
    ) -> Result<Vec<StoredDek>, StoreError> {
        let found = sqlx::query(sql::DEKS_UNDER_KEK)
            .bind(kek.as_str())
            .bind(after.map_or(uuid::Uuid::nil(), rows::uuid))
            .bind(i64::from(limit))
            .fetch_all(&self.readers)
            .await
            .map_err(failure::of)?;
        rows::deks(&found)
    }

    async fn kek_use(&self, kek: &KekId) -> Result<KekUse, StoreError> {
        let mut look = self.readers.begin().await.map_err(failure::of)?;
        let forms = sqlx::query(sql::KEK_FORMS)
            .bind(kek.as_str())
            .fetch_one(&mut *look)
            .await
            .map_err(failure::of)?;
        let (deks, oldest_wrapped_at) = rows::kek_forms(&forms)?;
        let mut counted = [0, 0];
        for (count, membership) in counted.iter_mut().zip(["ring", "former"]) {
            let row = sqlx::query(sql::KEK_RINGS)
                .bind(kek.as_str())
                .bind(membership)
                .fetch_one(&mut *look)
                .await
                .map_err(failure::of)?;
            *count = rows::kek_rings(&row)?;
        }
        look.commit().await.map_err(failure::of)?;
        Ok(KekUse { deks, oldest_wrapped_at, rings: counted[0], former_rings: counted[1] })
    }

    async fn kek_material(&self, kek: &KekId) -> Result<Option<KekMaterial>, StoreError> {
        let found = sqlx::query(sql::KEK_MATERIAL)
            .bind(kek.as_str())
            .fetch_optional(&self.readers)
            .await
            .map_err(failure::of)?;
        found.map(|row| rows::kek_material(&row)).transpose()
    }

    async fn insert_shred(&self, shred: &ShredRecord) -> Result<(), StoreError> {
        let mut change = self.change().await?;
        close_target(&mut change, shred).await?;
        let what = || format!("request to shred {} of tenant {}", shred.target.name(), shred.tenant);
        sqlx::query(sql::INSERT_SHRED)
            .bind(shred.tenant.as_str())
            .bind(shred.target.name())
            .bind(shred.requested_at.unix_ms())
            .bind(&shred.requested_by)
            .bind(shred.due_at.unix_ms())
            .bind(shred.done_at.map(Timestamp::unix_ms))
            .execute(&mut *change)
            .await
            .map_err(failure::naming(what, || format!("tenant {}", shred.tenant)))?;
        change.commit().await.map_err(failure::of)
    }

    async fn cancel_shred(
        &self,
        tenant: &TenantId,
        target: &Target,
        now: Timestamp,
    ) -> Result<(), StoreError> {
        let mut change = self.change().await?;
        let what = format!("request to shred {} of tenant {tenant}", target.name());
        let found = shred_in(&mut change, tenant, target).await?;
        let found = found.ok_or_else(|| StoreError::Missing(what.as_str().into()))?;
        if found.done_at.is_some() || found.due_at <= now {
            return Err(StoreError::Conflict(format!("the waiting period of the {what} is over").into()));
        }
        sqlx::query(sql::DELETE_SHRED)
            .bind(tenant.as_str())
            .bind(target.name())
            .execute(&mut *change)
            .await
            .map_err(failure::of)?;
        change.commit().await.map_err(failure::of)
    }

    async fn shreds(
        &self,
        tenant: &TenantId,
        after: Option<&Target>,
        limit: u32,
    ) -> Result<Vec<ShredRecord>, StoreError> {
        let query = match after {
            Some(after) => sqlx::query(sql::SHREDS).bind(tenant.as_str()).bind(after.name()),
            None => sqlx::query(sql::SHREDS_FIRST).bind(tenant.as_str()),
        };
        let found = query.bind(i64::from(limit)).fetch_all(&self.readers).await.map_err(failure::of)?;
        found.iter().map(rows::shred).collect()
    }

    async fn shred(&self, tenant: &TenantId, target: &Target) -> Result<Option<ShredRecord>, StoreError> {
        let mut reader = self.readers.acquire().await.map_err(failure::of)?;
        shred_in(&mut reader, tenant, target).await
    }

    async fn due_shreds(&self, now: Timestamp, limit: u32) -> Result<Vec<ShredRecord>, StoreError> {
        let found = sqlx::query(sql::DUE_SHREDS)
            .bind(now.unix_ms())
            .bind(i64::from(limit))
            .fetch_all(&self.readers)
            .await
            .map_err(failure::of)?;
        found.iter().map(rows::shred).collect()
    }

    async fn open_job(&self, job: &JobRecord) -> Result<JobRecord, StoreError> {
        let mut change = self.change().await?;
        if let Some(open) = open_job_in(&mut change, &job.tenant, job.kind, &job.target).await? {
            return Ok(open);
        }
        insert_job(&mut change, job).await?;
        change.commit().await.map_err(failure::of)?;
        Ok(job.clone())
    }

    async fn close_job(&self, job: &JobRecord) -> Result<(), StoreError> {
        let mut change = self.change().await?;
        update_job(&mut change, job).await?;
        change.commit().await.map_err(failure::of)
    }

    async fn job(&self, id: &str) -> Result<Option<JobRecord>, StoreError> {
        let found =
            sqlx::query(sql::JOB).bind(id).fetch_optional(&self.readers).await.map_err(failure::of)?;
        found.map(|row| rows::job(&row)).transpose()
    }

    async fn open_job_for(
        &self,
        tenant: &TenantId,
        kind: JobKind,
        target: &Target,
    ) -> Result<Option<JobRecord>, StoreError> {
        let mut reader = self.readers.acquire().await.map_err(failure::of)?;
        open_job_in(&mut reader, tenant, kind, target).await
    }

    async fn jobs(
        &self,
        tenant: Option<&TenantId>,
        before: Option<&str>,
        limit: u32,
    ) -> Result<Vec<JobRecord>, StoreError> {
        let query = match tenant {
            Some(tenant) => sqlx::query(sql::JOBS_OF_TENANT).bind(tenant.as_str()),
            None => sqlx::query(sql::JOBS),
        };
        // Above every UUID in text.
        let found = query
            .bind(before.unwrap_or("g"))
            .bind(i64::from(limit))
            .fetch_all(&self.readers)
            .await
            .map_err(failure::of)?;
        found.iter().map(rows::job).collect()
    }
}

async fn apply(
    change: &mut SqliteConnection,
    fenced: &FencedChange,
    now: Timestamp,
) -> Result<(), StoreError> {
    match fenced {
        FencedChange::Promote { scope, predecessor } => {
            deks::promote_in(change, scope, *predecessor, now).await.map(drop)
        }
        FencedChange::RetireNext { dek } => match deks::state_of(change, *dek).await? {
            DekState::Next => deks::move_in(change, *dek, DekState::Next, DekState::Retired, now).await,
            _ => Ok(()),
        },
        FencedChange::PutWrapped { dek, wrapped } => deks::put_wrapped_in(change, *dek, wrapped).await,
        FencedChange::RemoveWrapped { dek, kek } => deks::remove_wrapped_in(change, *dek, kek).await,
        FencedChange::Destroy { dek } => destroy(change, *dek, now).await,
        FencedChange::ShredDone { tenant, target } => {
            sqlx::query(sql::SHRED_DONE)
                .bind(tenant.as_str())
                .bind(target.name())
                .bind(now.unix_ms())
                .execute(change)
                .await
                .map_err(failure::of)?;
            Ok(())
        }
        FencedChange::KekMaterial(seen) => {
            sqlx::query(sql::PUT_KEK_MATERIAL)
                .bind(seen.kek.as_str())
                .bind(&seen.material)
                .bind(seen.since.unix_ms())
                .execute(change)
                .await
                .map_err(failure::of)?;
            Ok(())
        }
        FencedChange::Swept(swept) => write_swept(change, swept).await,
        FencedChange::Job(job) => update_job(change, job).await,
    }
}

/// What is asked to be shredded opens nothing from now on.
async fn close_target(change: &mut SqliteConnection, shred: &ShredRecord) -> Result<(), StoreError> {
    let missing =
        || StoreError::Missing(format!("{} of tenant {}", shred.target.name(), shred.tenant).into());
    let (tenant, now) = (shred.tenant.as_str(), shred.requested_at);
    let closed = match &shred.target {
        Target::Tenant => sqlx::query(sql::DISABLE_TENANT).bind(tenant).bind(now.unix_ms()),
        Target::Key(key) => sqlx::query(sql::DISABLE_KEY).bind(tenant).bind(key.as_str()).bind(now.unix_ms()),
        Target::Dek(dek) => {
            let (owner, _, state) = place(change, *dek).await?.ok_or_else(missing)?;
            if owner != shred.tenant {
                return Err(missing());
            }
            return match state {
                DekState::Destroyed => {
                    Err(StoreError::Conflict(format!("data key {dek} is destroyed already").into()))
                }
                DekState::Revoked => Ok(()),
                state => deks::move_in(change, *dek, state, DekState::Revoked, now).await,
            };
        }
    };
    let closed = closed.execute(change).await.map_err(failure::of)?;
    if closed.rows_affected() == 0 { Err(missing()) } else { Ok(()) }
}

async fn destroy(change: &mut SqliteConnection, dek: DataKeyId, now: Timestamp) -> Result<(), StoreError> {
    let missing = || StoreError::Missing(format!("data key {dek}").into());
    let (tenant, key, state) = place(change, dek).await?.ok_or_else(missing)?;
    if state == DekState::Destroyed {
        return Ok(());
    }
    for target in [Target::Dek(dek), Target::Key(key), Target::Tenant] {
        let asked = shred_in(change, &tenant, &target).await?;
        if asked.is_some_and(|shred| shred.due_at <= now) {
            return deks::move_in(change, dek, state, DekState::Destroyed, now).await;
        }
    }
    Err(StoreError::Conflict(format!("nobody has asked for data key {dek} to be destroyed by now").into()))
}

async fn place(
    change: &mut SqliteConnection,
    dek: DataKeyId,
) -> Result<Option<(TenantId, KeyName, DekState)>, StoreError> {
    let found = sqlx::query(sql::DEK_PLACE)
        .bind(rows::uuid(dek))
        .fetch_optional(change)
        .await
        .map_err(failure::of)?;
    found.map(|row| rows::dek_place(&row)).transpose()
}

async fn shred_in(
    connection: &mut SqliteConnection,
    tenant: &TenantId,
    target: &Target,
) -> Result<Option<ShredRecord>, StoreError> {
    let found = sqlx::query(sql::SHRED)
        .bind(tenant.as_str())
        .bind(target.name())
        .fetch_optional(connection)
        .await
        .map_err(failure::of)?;
    found.map(|row| rows::shred(&row)).transpose()
}

async fn write_swept(change: &mut SqliteConnection, swept: &Swept) -> Result<(), StoreError> {
    let record = &swept.record;
    sqlx::query(sql::SWEPT)
        .bind(record.tenant.as_str())
        .bind(rows::saturated(swept.nudges_seen))
        .bind(record.due_at.unix_ms())
        .bind(rows::saturated(record.failures))
        .bind(&record.last_error)
        .bind(record.swept_at.map(Timestamp::unix_ms))
        .bind(record.full_at.map(Timestamp::unix_ms))
        .bind(&record.basis)
        .bind(record.checked_through.map(|id| id.to_string()))
        .execute(change)
        .await
        .map_err(failure::of)?;
    Ok(())
}

async fn open_job_in(
    connection: &mut SqliteConnection,
    tenant: &TenantId,
    kind: JobKind,
    target: &Target,
) -> Result<Option<JobRecord>, StoreError> {
    let found = sqlx::query(sql::OPEN_JOB)
        .bind(tenant.as_str())
        .bind(kind.name())
        .bind(target.name())
        .fetch_optional(connection)
        .await
        .map_err(failure::of)?;
    found.map(|row| rows::job(&row)).transpose()
}

async fn insert_job(change: &mut SqliteConnection, job: &JobRecord) -> Result<(), StoreError> {
    sqlx::query(sql::INSERT_JOB)
        .bind(&job.id)
        .bind(job.kind.name())
        .bind(job.tenant.as_str())
        .bind(job.target.name())
        .bind(job.state.name())
        .bind(rows::saturated(job.total))
        .bind(rows::saturated(job.done))
        .bind(rows::saturated(job.errors))
        .bind(&job.last_error)
        .bind(job.created_at.unix_ms())
        .bind(job.started_at.map(Timestamp::unix_ms))
        .bind(job.updated_at.unix_ms())
        .bind(job.finished_at.map(Timestamp::unix_ms))
        .execute(change)
        .await
        .map_err(failure::naming(|| format!("job {}", job.id), || format!("tenant {}", job.tenant)))?;
    Ok(())
}

async fn update_job(change: &mut SqliteConnection, job: &JobRecord) -> Result<(), StoreError> {
    debug_assert_eq!(
        matches!(job.state, JobState::Done | JobState::Cancelled),
        job.finished_at.is_some(),
        "a job is finished in state and time"
    );
    sqlx::query(sql::UPDATE_JOB)
        .bind(&job.id)
        .bind(job.state.name())
        .bind(rows::saturated(job.total))
        .bind(rows::saturated(job.done))
        .bind(rows::saturated(job.errors))
        .bind(&job.last_error)
        .bind(job.started_at.map(Timestamp::unix_ms))
        .bind(job.updated_at.unix_ms())
        .bind(job.finished_at.map(Timestamp::unix_ms))
        .execute(change)
        .await
        .map_err(failure::of)?;
    Ok(())
}
