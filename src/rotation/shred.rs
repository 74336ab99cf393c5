//! The end of data keys: what was asked to be destroyed, after its waiting period.

use super::Inner;
use super::lease::Lease;
use super::sweep::is_due;
use super::tenant::random;
use crate::audit::{Asked, Who};
use crate::store::{
    FencedChange, JobKind, JobRecord, JobState, KeyRecord, ShredRecord, StoreError, StoredDek, Target,
};
use crate::tenant::PrincipalId;

/// How many data keys are destroyed in one step.
const BATCH: usize = 50;
const KEYS_PAGE: u32 = 100;

/// Destroys what a shred covers. A registry that changes underneath (somebody is faster, or has cancelled) is no
/// error: the next round looks again.
pub(super) async fn destroy(inner: &Inner, lease: &Lease, shred: &ShredRecord) -> Result<(), StoreError> {
    let name = shred.target.name();
    #[expect(clippy::expect_used, reason = "a constant that parses")]
    let principal: PrincipalId = "keyfold:rotation".parse().expect("a valid principal");
    let who = Who::local(&principal, Some(&shred.tenant)).changing_target(&shred.target);
    let attempt = match inner.parts.audit.begin_change("shred.destroy", who, Asked::NOTHING).await {
        Ok(attempt) => attempt,
        // What is not recorded is not done; the next round tries again.
        Err(unrecorded) => {
            tracing::warn!(tenant = %shred.tenant, target = name, %unrecorded, "nothing is shredded");
            return Ok(());
        }
    };
    match destroy_all(inner, lease, shred).await {
        Ok(()) => {
            attempt.done();
            Ok(())
        }
        Err(error @ StoreError::Conflict(_)) => {
            attempt.failed("conflict", &error);
            tracing::warn!(tenant = %shred.tenant, target = name, %error, "shredding is tried again");
            Ok(())
        }
        Err(other) => {
            attempt.failed("store_unavailable", &other);
            Err(other)
        }
    }
}

async fn destroy_all(inner: &Inner, lease: &Lease, shred: &ShredRecord) -> Result<(), StoreError> {
    let (store, clock) = (&inner.parts.store, &inner.parts.clock);
    let random = random().map_err(|error| StoreError::Unavailable(error.to_string().into()))?;
    let new = JobRecord::new(JobKind::Shred, shred.tenant.clone(), shred.target.clone(), clock.now(), random);
    let mut job = store.open_job(&new).await?;
    job.state = JobState::Running;
    job.started_at = job.started_at.or(Some(clock.now()));
    for key in keys(inner, shred).await? {
        let mut after = None;
        loop {
            let page = match &shred.target {
                Target::Dek(id) if after.is_none() => store.dek(*id).await?.into_iter().collect(),
                Target::Dek(_) => vec![],
                _ => store.deks(&shred.tenant, &key.name, after, inner.options.page_deks).await?,
            };
            let Some(last) = page.last() else { break };
            after = Some(last.dek.id);
            let due = |stored: &&StoredDek| is_due(std::slice::from_ref(shred), &stored.dek, clock.now());
            let doomed: Vec<&StoredDek> = page.iter().filter(due).collect();
            for batch in doomed.chunks(BATCH) {
                job.done += batch.len() as u64;
                job.total = job.total.max(job.done);
                job.updated_at = clock.now();
                let destroyed = batch.iter().map(|stored| FencedChange::Destroy { dek: stored.dek.id });
                let changes: Vec<_> = destroyed.chain([FencedChange::Job(job.clone())]).collect();
                lease.keep().await?;
                store.apply_fenced(&lease.fence(), &changes, clock.now()).await?;
            }
        }
    }
    let now = clock.now();
    (job.state, job.updated_at, job.finished_at) = (JobState::Done, now, Some(now));
    let done = FencedChange::ShredDone { tenant: shred.tenant.clone(), target: shred.target.clone() };
    lease.keep().await?;
    store.apply_fenced(&lease.fence(), &[done, FencedChange::Job(job)], now).await
}

/// The keys that a shred covers.
async fn keys(inner: &Inner, shred: &ShredRecord) -> Result<Vec<KeyRecord>, StoreError> {
    let store = &inner.parts.store;
    let mut keys: Vec<KeyRecord> = match &shred.target {
        Target::Key(name) => return Ok(store.key(&shred.tenant, name).await?.into_iter().collect()),
        // One data key is found without its key: any one page of keys with one in it will do.
        Target::Dek(_) => return store.keys(&shred.tenant, None, 1).await,
        Target::Tenant => Vec::new(),
    };
    loop {
        let after = keys.last().map(|key| &key.name);
        let page = store.keys(&shred.tenant, after, KEYS_PAGE).await?;
        if page.is_empty() {
            return Ok(keys);
        }
        keys.extend(page);
    }
}
