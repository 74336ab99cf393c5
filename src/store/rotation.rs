//! What rotation keeps in the registry: who may apply it, which tenants are due, what is to be shredded, how far the
//! work has come.

use std::time::Duration;

use async_trait::async_trait;
use envelope::{DataKeyId, EncryptionContext};

use super::{DekScope, StoreError, StoredDek, WrappedRecord};
use crate::clock::Timestamp;
use crate::tenant::{KekId, KeyName, TenantId};

/// The part of the registry that rotation works with, beside [`super::Store`].
///
/// The store itself does its share without being asked: a new tenant is due at once, and a tenant whose record
/// changes is nudged in the same step.
#[async_trait]
pub trait RotationStore: Send + Sync {
    /// Takes a lease, or renews the one that `holder` has. Returns its token: the same on renewal, a larger one
    /// whenever the lease was free or had run out. None where somebody else holds it.
    async fn acquire_lease(
        &self,
        name: &str,
        holder: &str,
        ttl: Duration,
        now: Timestamp,
    ) -> Result<Option<u64>, StoreError>;

    /// Gives a lease back, if `fence` is still its holder's.
    async fn release_lease(&self, fence: &Fence, now: Timestamp) -> Result<(), StoreError>;

    /// Makes these changes in one step, if `fence` is still the lease's latest token; [`StoreError::LostLease`]
    /// otherwise, whatever the clocks say. What [`super::Store`] refuses is refused here too, and then nothing is
    /// changed.
    async fn apply_fenced(
        &self,
        fence: &Fence,
        changes: &[FencedChange],
        now: Timestamp,
    ) -> Result<(), StoreError>;

    /// Tenants that are due at `now`, the longest overdue first.
    async fn due_sweeps(&self, now: Timestamp, limit: u32) -> Result<Vec<SweepRecord>, StoreError>;

    /// How a tenant's sweeps go. None where there is no such tenant.
    async fn sweep(&self, tenant: &TenantId) -> Result<Option<SweepRecord>, StoreError>;

    /// Has a tenant looked at as soon as possible.
    async fn nudge_sweep(&self, tenant: &TenantId, now: Timestamp) -> Result<(), StoreError>;

    /// Has all tenants looked at whose ring holds this KEK.
    async fn nudge_sweeps_of_kek(&self, kek: &KekId, now: Timestamp) -> Result<(), StoreError>;

    /// The active data keys of a key, in the order of their scopes' bound contexts (canonical form). `after` is the
    /// bound context of the last one of the page before.
    async fn active_deks(
        &self,
        tenant: &TenantId,
        key: &KeyName,
        after: Option<&EncryptionContext>,
        limit: u32,
    ) -> Result<Vec<StoredDek>, StoreError>;

    /// The data keys that have a wrapped form under this KEK, in whatever tenant, by id.
    async fn deks_under_kek(
        &self,
        kek: &KekId,
        after: Option<DataKeyId>,
        limit: u32,
    ) -> Result<Vec<StoredDek>, StoreError>;

    /// How much depends on a KEK.
    async fn kek_use(&self, kek: &KekId) -> Result<KekUse, StoreError>;

    /// The material that a KEK was last seen with.
    async fn kek_material(&self, kek: &KekId) -> Result<Option<KekMaterial>, StoreError>;

    /// Asks for something to be destroyed when its waiting period is over: a data key is revoked in the same step (if
    /// it is not yet), a key or a tenant switched off. [`StoreError::Conflict`] where that was asked for already, or
    /// where it is destroyed; [`StoreError::Missing`] where there is no such thing.
    async fn insert_shred(&self, shred: &ShredRecord) -> Result<(), StoreError>;

    /// Takes that back. What was revoked or switched off stays so. [`StoreError::Missing`] where nothing was asked
    /// for, [`StoreError::Conflict`] where the waiting period is over.
    async fn cancel_shred(
        &self,
        tenant: &TenantId,
        target: &Target,
        now: Timestamp,
    ) -> Result<(), StoreError>;

    /// What a tenant has asked to be destroyed, done or not, in the order of targets.
    async fn shreds(
        &self,
        tenant: &TenantId,
        after: Option<&Target>,
        limit: u32,
    ) -> Result<Vec<ShredRecord>, StoreError>;

    /// One of them.
    async fn shred(&self, tenant: &TenantId, target: &Target) -> Result<Option<ShredRecord>, StoreError>;

    /// What is to be destroyed now, the longest overdue first.
    async fn due_shreds(&self, now: Timestamp, limit: u32) -> Result<Vec<ShredRecord>, StoreError>;

    /// Opens a job; where one of the same kind, tenant and target is open, that one is returned and nothing written.
    async fn open_job(&self, job: &JobRecord) -> Result<JobRecord, StoreError>;

    /// Ends a job that is not to be worked on any more. Nothing happens where it has ended.
    async fn close_job(&self, job: &JobRecord) -> Result<(), StoreError>;

    /// A job.
    async fn job(&self, id: &str) -> Result<Option<JobRecord>, StoreError>;

    /// The open job of a kind for this target.
    async fn open_job_for(
        &self,
        tenant: &TenantId,
        kind: JobKind,
        target: &Target,
    ) -> Result<Option<JobRecord>, StoreError>;

    /// Jobs, the newest first: of one tenant, or of all. `before` is the last one of the page before.
    async fn jobs(
        &self,
        tenant: Option<&TenantId>,
        before: Option<&str>,
        limit: u32,
    ) -> Result<Vec<JobRecord>, StoreError>;
}

/// Proof of a lease: which, and the token that was given with it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fence {
    /// The lease's name.
    pub lease: String,
    /// The token.
    pub token: u64,
}

/// A change that only the lease's holder may make.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FencedChange {
    /// As [`super::Store::promote_next_dek`]; nothing happens where none waits or another one is active.
    Promote {
        /// Of which scope.
        scope: DekScope,
        /// The active one that it follows.
        predecessor: DataKeyId,
    },
    /// Takes a data key that waits out of the row. Nothing happens where it does not wait.
    RetireNext {
        /// Which.
        dek: DataKeyId,
    },
    /// As [`super::Store::put_wrapped`].
    PutWrapped {
        /// Of which data key.
        dek: DataKeyId,
        /// The form.
        wrapped: WrappedRecord,
    },
    /// As [`super::Store::remove_wrapped`].
    RemoveWrapped {
        /// Of which data key.
        dek: DataKeyId,
        /// Under which KEK.
        kek: KekId,
    },
    /// Destroys a data key, if a shred that covers it (its own, its key's or its tenant's) is still asked for and its
    /// waiting period is over; [`StoreError::Conflict`] otherwise.
    Destroy {
        /// Which.
        dek: DataKeyId,
    },
    /// All that a shred covers is destroyed. Nothing happens where it was cancelled.
    ShredDone {
        /// Whose.
        tenant: TenantId,
        /// What.
        target: Target,
    },
    /// A KEK was seen with this material.
    KekMaterial(KekMaterial),
    /// A tenant was looked at.
    Swept(Swept),
    /// Where a job stands. Nothing happens where it is finished.
    Job(JobRecord),
}

/// When a tenant is to be looked at, and what was found the last time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SweepRecord {
    /// Whose.
    pub tenant: TenantId,
    /// From when on it is to be looked at.
    pub due_at: Timestamp,
    /// How often it was nudged: see [`Swept::nudges_seen`].
    pub nudges: u64,
    /// How often in a row it failed.
    pub failures: u64,
    /// Why it failed the last time.
    pub last_error: Option<String>,
    /// When it was last looked at.
    pub swept_at: Option<Timestamp>,
    /// When all its data keys were last looked at.
    pub full_at: Option<Timestamp>,
    /// The ring and the materials that the data keys were found to agree with.
    pub basis: Option<String>,
    /// Up to which data key they were.
    pub checked_through: Option<DataKeyId>,
}

/// What came of looking at a tenant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Swept {
    /// What is to stand there from now on. Its `due_at` counts only where nobody nudged in the meantime.
    pub record: SweepRecord,
    /// The nudges that were seen before the tenant was read.
    pub nudges_seen: u64,
}

/// The material that a KEK was last seen with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KekMaterial {
    /// Which KEK.
    pub kek: KekId,
    /// Its material, in the KMS's words.
    pub material: String,
    /// Since when it is known to have it; the beginning of time for the first one that was seen.
    pub since: Timestamp,
}

/// How much depends on a KEK.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KekUse {
    /// How many data keys have a wrapped form under it.
    pub deks: u64,
    /// When the oldest of these forms was made.
    pub oldest_wrapped_at: Option<Timestamp>,
    /// How many tenants have it in their ring: new data keys are wrapped under it.
    pub rings: u64,
    /// How many tenants had it in their ring before: what was wrapped under it is still believed.
    pub former_rings: u64,
}

/// What a job or a shred is about, within a tenant.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Target {
    /// All of it.
    Tenant,
    /// One of its keys.
    Key(KeyName),
    /// One data key.
    Dek(DataKeyId),
}

impl Target {
    /// The target's name in the registry: empty, `key:NAME` or `dek:UUID`.
    pub fn name(&self) -> String {
        match self {
            Self::Tenant => String::new(),
            Self::Key(name) => format!("key:{name}"),
            Self::Dek(id) => format!("dek:{id}"),
        }
    }

    /// The target of this name.
    pub fn parse(name: &str) -> Option<Self> {
        if name.is_empty() {
            return Some(Self::Tenant);
        }
        match name.split_once(':')? {
            ("key", key) => key.parse().ok().map(Self::Key),
            ("dek", id) => id.parse().ok().map(Self::Dek),
            _ => None,
        }
    }

    /// Whether this covers a data key of that id and key.
    pub fn covers(&self, key: &KeyName, dek: DataKeyId) -> bool {
        match self {
            Self::Tenant => true,
            Self::Key(name) => name == key,
            Self::Dek(id) => *id == dek,
        }
    }
}

/// Something that is to be destroyed, or was.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShredRecord {
    /// Whose.
    pub tenant: TenantId,
    /// What.
    pub target: Target,
    /// When that was asked for.
    pub requested_at: Timestamp,
    /// By whom.
    pub requested_by: String,
    /// From when on it is destroyed; until then it can be cancelled.
    pub due_at: Timestamp,
    /// When the last of it was destroyed.
    pub done_at: Option<Timestamp>,
}

/// Work that takes a while, and how far it has come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobRecord {
    /// A UUIDv7 as text.
    pub id: String,
    /// What kind of work.
    pub kind: JobKind,
    /// For which tenant.
    pub tenant: TenantId,
    /// For what of it.
    pub target: Target,
    /// Where it stands.
    pub state: JobState,
    /// How many data keys it is about, as far as that is known.
    pub total: u64,
    /// How many of them are done.
    pub done: u64,
    /// How many tries have failed so far; what failed is tried again.
    pub errors: u64,
    /// Why the last one failed.
    pub last_error: Option<String>,
    /// When it was asked for.
    pub created_at: Timestamp,
    /// When the work began.
    pub started_at: Option<Timestamp>,
    /// When this record was written last.
    pub updated_at: Timestamp,
    /// When it ended.
    pub finished_at: Option<Timestamp>,
}

impl JobRecord {
    /// A job that waits. `random` makes its id unique among those of the same millisecond.
    pub fn new(kind: JobKind, tenant: TenantId, target: Target, now: Timestamp, random: [u8; 10]) -> Self {
        let unix_ms = u64::try_from(now.unix_ms()).unwrap_or(0);
        Self {
            id: uuid::Builder::from_unix_timestamp_millis(unix_ms, &random).into_uuid().to_string(),
            kind,
            tenant,
            target,
            state: JobState::Waiting,
            total: 0,
            done: 0,
            errors: 0,
            last_error: None,
            created_at: now,
            started_at: None,
            updated_at: now,
            finished_at: None,
        }
    }

    /// Data keys done in a second, over the time from its start to the last record.
    pub fn rate_per_sec(&self) -> Option<f64> {
        let secs = self.updated_at.since(self.started_at?).as_secs_f64();
        #[expect(clippy::cast_precision_loss, reason = "a rate for people to read")]
        (secs > 0.0).then(|| self.done as f64 / secs)
    }
}

/// What kind of work a job is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum JobKind {
    /// Bringing a tenant's wrapped data keys up to its ring and the KEKs' materials.
    RewrapKeys,
    /// Destroying data keys after a waiting period.
    Shred,
}

impl JobKind {
    /// All kinds.
    pub const ALL: [Self; 2] = [Self::RewrapKeys, Self::Shred];

    /// The kind's name, the same in the registry and the API.
    pub const fn name(self) -> &'static str {
        match self {
            Self::RewrapKeys => "rewrap-keys",
            Self::Shred => "shred",
        }
    }
}

/// Where a job stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum JobState {
    /// It has not begun.
    Waiting,
    /// It has begun, or is tried again.
    Running,
    /// All of it is done.
    Done,
    /// It was taken back.
    Cancelled,
}

impl JobState {
    /// All states.
    pub const ALL: [Self; 4] = [Self::Waiting, Self::Running, Self::Done, Self::Cancelled];

    /// The state's name, the same in the registry and the API.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Running => "running",
            Self::Done => "done",
            Self::Cancelled => "cancelled",
        }
    }
}
