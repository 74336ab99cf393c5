//! The registry: what must outlive the process. Tenants, keys, data keys in wrapped form, API keys.
//!
//! [`Store`] is the contract; [`sqlite`] is the embedded default. The store never sees a plaintext data key, nor an
//! API key's secret.

mod grants;
mod rotation;
mod rows;
mod sql;
pub mod sqlite;
pub mod watch;

use std::sync::Arc;

use async_trait::async_trait;
use envelope::{DataKeyId, EncryptionContext};

use crate::clock::Timestamp;
use crate::tenant::{Kek, KekId, KekRing, KeyName, TenantId, Verb};

pub use grants::{GrantCondition, GrantRecord, GrantScope, GrantStore};
pub use rotation::{
    Fence, FencedChange, JobKind, JobRecord, JobState, KekMaterial, KekUse, RotationStore, ShredRecord,
    SweepRecord, Swept, Target,
};

/// Where records live. Every method that returns `Ok` for a change has made it durable: it is there after a power
/// cut. A change is whole or not at all. Several processes may use one store at once.
///
/// Contract, tested for every implementation by `tests/it/store_contract.rs`. Lists are ordered by name or id and
/// paged: `after` is the last one of the page before, `limit` how many at most. A record and what belongs to it (a
/// data key and its wrapped forms) are read in one step. Counts above `i64::MAX` are kept as `i64::MAX`, which is
/// what databases can hold.
#[async_trait]
pub trait Store: Send + Sync {
    /// Adds a tenant, at version 1. [`StoreError::Conflict`] where its id is taken.
    async fn insert_tenant(&self, tenant: &TenantRecord) -> Result<(), StoreError>;

    /// Adds a tenant and its first key, at version 1, in one step: there is never one without the other.
    /// [`StoreError::Conflict`] where the tenant's id is taken. The key is of this tenant.
    async fn insert_tenant_with_key(&self, tenant: &TenantRecord, key: &KeyRecord) -> Result<(), StoreError>;

    /// A tenant.
    async fn tenant(&self, id: &TenantId) -> Result<Option<TenantRecord>, StoreError>;

    /// Tenants by id.
    async fn tenants(&self, after: Option<&TenantId>, limit: u32) -> Result<Vec<TenantRecord>, StoreError>;

    /// Replaces a tenant's record if its version in the store is still `record.version`, and raises the version by
    /// one. [`StoreError::Conflict`] where somebody else changed it first, [`StoreError::Missing`] where there is
    /// none.
    async fn update_tenant(&self, record: &TenantRecord) -> Result<(), StoreError>;

    /// Adds a key, at version 1. [`StoreError::Conflict`] where the tenant has one of this name,
    /// [`StoreError::Missing`] where there is no such tenant.
    async fn insert_key(&self, key: &KeyRecord) -> Result<(), StoreError>;

    /// A key of a tenant.
    async fn key(&self, tenant: &TenantId, name: &KeyName) -> Result<Option<KeyRecord>, StoreError>;

    /// A tenant's keys by name.
    async fn keys(
        &self,
        tenant: &TenantId,
        after: Option<&KeyName>,
        limit: u32,
    ) -> Result<Vec<KeyRecord>, StoreError>;

    /// How many keys a tenant has, whatever became of their data keys.
    async fn count_keys(&self, tenant: &TenantId) -> Result<u64, StoreError>;

    /// Replaces a key's record, as [`Store::update_tenant`] does a tenant's.
    async fn update_key(&self, record: &KeyRecord) -> Result<(), StoreError>;

    /// Makes `new` the active data key of its scope in one step, together with its wrapped forms, and retires
    /// `predecessor` (at `new.created_at`). Where the scope's active data key is another than `predecessor` (a
    /// replica was faster), nothing is written and that one is returned; so a caller who tries again after he lost
    /// an answer finds his own. Where none is active (an operator retired it), `new` takes the place.
    ///
    /// [`StoreError::Missing`] where there is no such key. [`StoreError::Conflict`] where the id is taken, where
    /// `new` is not in state [`DekState::Active`], or where no wrapped form comes with it: nobody could ever open
    /// what it seals.
    async fn activate_dek(
        &self,
        predecessor: Option<DataKeyId>,
        new: &DekRecord,
        wrapped: &[WrappedRecord],
    ) -> Result<Activation, StoreError>;

    /// Puts `next` (state [`DekState::Next`]) in store as the data key that will follow its scope's active one.
    /// Where the scope has one waiting already, nothing is written and that one is returned. Refuses what
    /// [`Store::activate_dek`] refuses.
    async fn insert_next_dek(
        &self,
        next: &DekRecord,
        wrapped: &[WrappedRecord],
    ) -> Result<Activation, StoreError>;

    /// Makes the scope's waiting data key the active one in one step, and retires `predecessor` at `now`. Returns
    /// the data key that is active afterwards: where the active one is another than `predecessor`, or none waits,
    /// nothing is written. Where none is active, the waiting one takes the place.
    async fn promote_next_dek(
        &self,
        scope: &DekScope,
        predecessor: DataKeyId,
        now: Timestamp,
    ) -> Result<Option<StoredDek>, StoreError>;

    /// The scope's active data key with its wrapped forms.
    async fn active_dek(&self, scope: &DekScope) -> Result<Option<StoredDek>, StoreError>;

    /// The data key that waits to follow the scope's active one.
    async fn next_dek(&self, scope: &DekScope) -> Result<Option<StoredDek>, StoreError>;

    /// A data key by its id, in whatever state.
    async fn dek(&self, id: DataKeyId) -> Result<Option<StoredDek>, StoreError>;

    /// A key's data keys by id (which is the order of making).
    async fn deks(
        &self,
        tenant: &TenantId,
        key: &KeyName,
        after: Option<DataKeyId>,
        limit: u32,
    ) -> Result<Vec<StoredDek>, StoreError>;

    /// How many active data keys of this tenant are bound to a context (one that is not empty): each is one value of
    /// its key-bound context. This reads through all data keys; a store that can count does better.
    async fn bound_scopes(&self, tenant: &TenantId) -> Result<u64, StoreError> {
        const PAGE: u32 = 1_000;
        let (mut count, mut after_key) = (0, None);
        loop {
            let keys = self.keys(tenant, after_key.as_ref(), PAGE).await?;
            let Some(last_key) = keys.last().map(|key| key.name.clone()) else { return Ok(count) };
            for key in keys {
                let mut after = None;
                loop {
                    let page = self.deks(tenant, &key.name, after, PAGE).await?;
                    let Some(last) = page.last() else { break };
                    after = Some(last.dek.id);
                    let counts = |stored: &&StoredDek| {
                        stored.dek.state == DekState::Active && !stored.dek.scope.bound.is_empty()
                    };
                    count += page.iter().filter(counts).count() as u64;
                }
            }
            after_key = Some(last_key);
        }
    }

    /// Moves a data key from one state to another and stamps the time. [`StoreError::Conflict`] where it is not in
    /// state `from`, or where [`DekState::may_become`] has no such step; [`StoreError::Missing`] where there is none.
    /// What becomes [`DekState::Destroyed`] loses all its wrapped forms in the same step. What is taken back
    /// (revoked to retired) is no longer stamped as revoked.
    async fn set_dek_state(
        &self,
        id: DataKeyId,
        from: DekState,
        to: DekState,
        now: Timestamp,
    ) -> Result<(), StoreError>;

    /// Adds or replaces the wrapped form of a data key under one KEK. [`StoreError::Missing`] where there is no such
    /// data key. [`StoreError::Conflict`] where it is destroyed: a rewrapping that was under way while somebody
    /// destroyed it does not bring it back.
    async fn put_wrapped(&self, id: DataKeyId, wrapped: &WrappedRecord) -> Result<(), StoreError>;

    /// Removes the wrapped form of a data key under one KEK; nothing happens where there is none.
    /// [`StoreError::Conflict`] where it is the last one: a data key is destroyed by [`Store::set_dek_state`], and
    /// never by mistake.
    async fn remove_wrapped(&self, id: DataKeyId, kek: &KekId) -> Result<(), StoreError>;

    /// Adds to the usage counts of data keys, in one step for all. An unknown id is passed over.
    async fn add_usage(&self, usage: &[Usage]) -> Result<(), StoreError>;

    /// Adds an API key, with its tenants and verbs sorted and none twice. [`StoreError::Conflict`] where its id is
    /// taken, [`StoreError::Missing`] where a tenant that it names does not exist.
    async fn insert_api_key(&self, key: &ApiKeyRecord) -> Result<(), StoreError>;

    /// An API key by its id.
    async fn api_key(&self, id: &str) -> Result<Option<ApiKeyRecord>, StoreError>;

    /// The API keys that hold a tenant (all API keys where none is named), by id.
    async fn api_keys(
        &self,
        tenant: Option<&TenantId>,
        after: Option<&str>,
        limit: u32,
    ) -> Result<Vec<ApiKeyRecord>, StoreError>;

    /// Marks an API key as revoked from `now` on. An earlier revocation stands. [`StoreError::Missing`] where there
    /// is none.
    async fn revoke_api_key(&self, id: &str, now: Timestamp) -> Result<(), StoreError>;

    /// Takes a tenant out of an API key, which goes on holding its others. [`StoreError::Missing`] where it does not
    /// hold it.
    async fn release_api_key(&self, id: &str, tenant: &TenantId) -> Result<(), StoreError>;

    /// How many API keys hold a tenant and are neither revoked nor, at `now`, expired.
    async fn count_api_keys(&self, tenant: &TenantId, now: Timestamp) -> Result<u64, StoreError>;

    /// Which tenants have changed after the change numbered `after` (0 for all): their records, keys, data keys'
    /// states or wrapped forms (but not the making of a data key, nor usage counts). A change of an API key stands
    /// under no tenant. Each stands once, with its latest change, in the order of the changes.
    async fn changes(&self, after: u64) -> Result<Vec<Change>, StoreError>;

    /// Writes down that the KMS has said no for this KEK, for all who have its data keys in memory. Returns the denial's
    /// number, larger than all before. Of one KEK only the latest denial is kept. Those of before `forget_before` are
    /// forgotten, but for the newest of all: numbers never start again.
    async fn note_denial(
        &self,
        kek: &KekId,
        now: Timestamp,
        forget_before: Timestamp,
    ) -> Result<u64, StoreError>;

    /// The denials after the one numbered `after` (0 for all), in the order of their numbers.
    async fn denials(&self, after: u64) -> Result<Vec<KekDenial>, StoreError>;

    /// Whether the store answers: a cheap read.
    async fn ping(&self) -> Result<(), StoreError>;

    /// Ends all connections; what was written is safe already.
    async fn close(&self);
}

/// A whole registry: records, grants, and what rotation keeps.
pub trait Registry: Store + GrantStore + RotationStore {}

impl<S: Store + GrantStore + RotationStore> Registry for S {}

/// Why the store did not do what it was asked.
#[derive(Clone, Debug, thiserror::Error)]
pub enum StoreError {
    /// It does not answer, or not now: trying again later may help.
    #[error("the registry is unavailable: {0}")]
    Unavailable(Arc<str>),
    /// The change collides with what is there.
    #[error("the registry holds something else already: {0}")]
    Conflict(Arc<str>),
    /// What the change is about is not there.
    #[error("the registry holds no {0}")]
    Missing(Arc<str>),
    /// Somebody else has taken the lease that the change relied on. Nothing was changed.
    #[error("the lease {0} has passed to somebody else")]
    LostLease(Arc<str>),
    /// A newer keyfold has written this registry; this one would misread it.
    #[error(
        "the registry's schema is version {found}, and this keyfold knows versions up to {known}: run the newer \
         keyfold that wrote it, or restore the backup made before the upgrade"
    )]
    NewerSchema {
        /// The version found.
        found: i64,
        /// The newest version that this program knows.
        known: i64,
    },
    /// The database as a whole cannot be used, and waiting does not help: not a database, damaged, another
    /// program's, or with permissions that let others in.
    #[error("the registry cannot be used: {0}")]
    Unusable(Arc<str>),
    /// A record cannot be read: somebody else wrote into the database, or it is damaged.
    #[error("a record in the registry cannot be read: {0}")]
    Unreadable(Arc<str>),
}

/// A tenant as stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TenantRecord {
    /// The tenant.
    pub id: TenantId,
    /// Whether it is served.
    pub status: Status,
    /// Its master keys now, the primary first.
    pub ring: KekRing,
    /// KEKs that were members of the ring before: a data key wrapped under one of them is still believed.
    pub former_keks: Vec<Kek>,
    /// When it was made.
    pub created_at: Timestamp,
    /// When it was changed last.
    pub updated_at: Timestamp,
    /// Counts the changes; a change must name the version that it saw.
    pub version: u64,
}

/// Whether a tenant or a key is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// It is.
    Enabled,
    /// Its administrator has switched it off: nothing is encrypted or decrypted until he switches it on again.
    Disabled,
}

impl Status {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Enabled, Self::Disabled];

    /// The status's name, the same in the registry and the API.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Enabled => "enabled",
            Self::Disabled => "disabled",
        }
    }
}

/// A key as stored: a named policy of a tenant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyRecord {
    /// Whose.
    pub tenant: TenantId,
    /// Its name.
    pub name: KeyName,
    /// Whether it is served.
    pub status: Status,
    /// When its data keys end, and what envelopes carry.
    pub policy: KeyPolicy,
    /// When it was made.
    pub created_at: Timestamp,
    /// When it was changed last.
    pub updated_at: Timestamp,
    /// Counts the changes; a change must name the version that it saw.
    pub version: u64,
}

/// The policy under which a key's data keys are made and ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeyPolicy {
    /// How long a data key encrypts, in seconds.
    pub dek_age_secs_max: u64,
    /// How many messages a data key seals.
    pub dek_messages_max: u64,
    /// How many bytes of plaintext a data key seals.
    pub dek_bytes_max: u64,
    /// Whether envelopes carry the wrapped data key.
    pub envelope: EnvelopeWeight,
}

impl Default for KeyPolicy {
    /// 24 hours, 2^32 messages, 2^40 bytes, embedded.
    fn default() -> Self {
        Self {
            dek_age_secs_max: 24 * 60 * 60,
            dek_messages_max: 1 << 32,
            dek_bytes_max: 1 << 40,
            envelope: EnvelopeWeight::Embedded,
        }
    }
}

/// What an envelope carries beside the message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EnvelopeWeight {
    /// The wrapped data key: it opens with the master key alone, without the registry.
    Embedded,
    /// Nothing: 92 bytes of overhead, and the registry is needed to open it.
    Compact,
}

impl EnvelopeWeight {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Embedded, Self::Compact];

    /// The weight's name, the same in the registry and the API.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Embedded => "embedded",
            Self::Compact => "compact",
        }
    }
}

/// What one active data key serves: a key of a tenant, for one value of the key-bound context (mostly empty).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct DekScope {
    /// Whose.
    pub tenant: TenantId,
    /// Which key.
    pub key: KeyName,
    /// The context pairs that the operator's configuration binds to the data key.
    pub bound: EncryptionContext,
}

/// A data key as stored, without its wrapped forms.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DekRecord {
    /// Its id, a UUIDv7.
    pub id: DataKeyId,
    /// What it serves.
    pub scope: DekScope,
    /// Where it is in its life.
    pub state: DekState,
    /// When it was made.
    pub created_at: Timestamp,
    /// When it became active.
    pub activated_at: Option<Timestamp>,
    /// When it stopped encrypting.
    pub retired_at: Option<Timestamp>,
    /// When it was revoked, if it is.
    pub revoked_at: Option<Timestamp>,
    /// When its wrapped forms were deleted.
    pub destroyed_at: Option<Timestamp>,
    /// Messages sealed, to within the last flush.
    pub messages: u64,
    /// Bytes of plaintext sealed, to within the last flush.
    pub bytes: u64,
    /// When it last sealed something, to the minute.
    pub last_sealed_at: Option<Timestamp>,
    /// When it last opened something, to the minute.
    pub last_opened_at: Option<Timestamp>,
}

impl DekRecord {
    /// A data key of this scope, made now, in the given state.
    pub fn new(id: DataKeyId, scope: DekScope, state: DekState, now: Timestamp) -> Self {
        Self {
            id,
            scope,
            state,
            created_at: now,
            activated_at: (state == DekState::Active).then_some(now),
            retired_at: None,
            revoked_at: None,
            destroyed_at: None,
            messages: 0,
            bytes: 0,
            last_sealed_at: None,
            last_opened_at: None,
        }
    }
}

/// Where a data key is in its life. [`DekState::may_become`] has the steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DekState {
    /// Made ahead of time; waits to follow the active one.
    Next,
    /// Encrypts and decrypts. One for each scope.
    Active,
    /// Decrypts only.
    Retired,
    /// Does nothing; can be taken back.
    Revoked,
    /// Its wrapped forms are deleted. It never comes back.
    Destroyed,
}

impl DekState {
    /// Every state, in the order of a data key's life.
    pub const ALL: [Self; 5] = [Self::Next, Self::Active, Self::Retired, Self::Revoked, Self::Destroyed];

    /// Whether a data key may go from this state to that one. Forward, with two exceptions: a revoked one can be
    /// taken back, and then opens what it sealed but seals nothing more; a destroyed one never changes.
    pub const fn may_become(self, to: Self) -> bool {
        match self {
            Self::Next => matches!(to, Self::Active | Self::Retired | Self::Revoked | Self::Destroyed),
            Self::Active => matches!(to, Self::Retired | Self::Revoked | Self::Destroyed),
            Self::Retired => matches!(to, Self::Revoked | Self::Destroyed),
            Self::Revoked => matches!(to, Self::Retired | Self::Destroyed),
            Self::Destroyed => false,
        }
    }

    /// The state's name, the same in the registry, the API and the metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Next => "next",
            Self::Active => "active",
            Self::Retired => "retired",
            Self::Revoked => "revoked",
            Self::Destroyed => "destroyed",
        }
    }
}

/// One wrapped form of a data key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WrappedRecord {
    /// The KEK that opens it.
    pub kek: KekId,
    /// The wrapped key as the KMS returned it.
    pub blob: Vec<u8>,
    /// Which of the KEK's materials wrapped it, where the KMS told.
    pub material: Option<String>,
    /// When it was wrapped.
    pub wrapped_at: Timestamp,
}

/// A data key with all its wrapped forms, ordered by KEK.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredDek {
    /// The data key.
    pub dek: DekRecord,
    /// Its wrapped forms.
    pub wrapped: Vec<WrappedRecord>,
}

/// What became of a data key that was to be put in place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Activation {
    /// It is in place.
    Done,
    /// Another one has the place; the new one was not written.
    Taken(Box<StoredDek>),
}

/// What was done with a data key since the last flush.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// Which data key.
    pub id: DataKeyId,
    /// Messages sealed.
    pub messages: u64,
    /// Bytes of plaintext sealed.
    pub bytes: u64,
    /// When it last sealed something; an older time never replaces a newer one.
    pub last_sealed_at: Option<Timestamp>,
    /// When it last opened something; an older time never replaces a newer one.
    pub last_opened_at: Option<Timestamp>,
}

/// Says that something of a tenant changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// The change's number; later ones have larger numbers.
    pub seq: u64,
    /// Whose records; none for what belongs to no single tenant.
    pub tenant: Option<TenantId>,
}

/// Says that the KMS has said no for a KEK.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KekDenial {
    /// The denial's number; later ones have larger numbers.
    pub seq: u64,
    /// For which KEK.
    pub kek: KekId,
    /// When it was heard.
    pub heard_at: Timestamp,
}

/// An API key as stored: without its secret.
#[derive(Clone, PartialEq, Eq)]
pub struct ApiKeyRecord {
    /// The public part of the key, which finds it.
    pub id: String,
    /// What people call it.
    pub name: String,
    /// HMAC-SHA-256 of the secret under the server's pepper.
    pub secret_hash: [u8; 32],
    /// The tenants that it holds; sorted, none twice.
    pub tenants: Vec<TenantId>,
    /// What it may do with them; sorted, none twice.
    pub verbs: Vec<Verb>,
    /// When it was made.
    pub created_at: Timestamp,
    /// From when on it is refused.
    pub expires_at: Option<Timestamp>,
    /// When it was revoked.
    pub revoked_at: Option<Timestamp>,
}
