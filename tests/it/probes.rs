//! A KMS and a registry that count what they are asked, and fail when they are told to.

use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use envelope::{DataKeyId, EncryptionContext, KeyMaterial};
use keyfold::clock::Timestamp;
use keyfold::kms::local::LocalKeyRing;
use keyfold::kms::{Generated, KekDescription, Kms, KmsError, Urgency, Wrapped};
use keyfold::store::sqlite::SqliteStore;
use keyfold::store::{
    Activation, ApiKeyRecord, Change, DekRecord, DekScope, DekState, Fence, FencedChange, GrantRecord,
    GrantStore, JobKind, JobRecord, KekDenial, KekMaterial, KekUse, KeyRecord, RotationStore, ShredRecord,
    Store, StoreError, StoredDek, SweepRecord, Target, TenantRecord, Usage, WrappedRecord,
};
use keyfold::tenant::{Kek, KekId, KeyName, TenantId};
use tokio::sync::watch;

/// What the KMS does instead of answering.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum KmsFault {
    Outage,
    Denied,
    Panic,
}

/// What the panicking KMS says: it stands for a secret that a panic's message quotes.
pub(crate) const PANIC_MESSAGE: &str = "panic-message-with-a-canary";

/// The embedded key ring, watched.
pub(crate) struct ProbedKms {
    inner: LocalKeyRing,
    generated: Mutex<HashMap<String, u64>>,
    unwraps: AtomicU64,
    fault: Mutex<Option<KmsFault>>,
    open: watch::Sender<bool>,
    arrivals: watch::Sender<u64>,
}

impl ProbedKms {
    pub(crate) fn new(inner: LocalKeyRing) -> Self {
        Self {
            inner,
            generated: Mutex::default(),
            unwraps: AtomicU64::new(0),
            fault: Mutex::default(),
            open: watch::channel(true).0,
            arrivals: watch::channel(0).0,
        }
    }

    /// How many data keys were asked for, for this tenant.
    pub(crate) fn generates_of(&self, tenant: &str) -> u64 {
        self.generated.lock().unwrap().get(tenant).copied().unwrap_or(0)
    }

    /// How many data keys were asked for.
    pub(crate) fn generates(&self) -> u64 {
        self.generated.lock().unwrap().values().sum()
    }

    /// How many data keys were asked to be opened.
    pub(crate) fn unwraps(&self) -> u64 {
        self.unwraps.load(Ordering::SeqCst)
    }

    /// From now on every call fails like this; `None` for no longer.
    pub(crate) fn fail(&self, fault: impl Into<Option<KmsFault>>) {
        *self.fault.lock().unwrap() = fault.into();
    }

    /// From now on every call waits for [`ProbedKms::release`].
    pub(crate) fn hold(&self) {
        self.open.send_replace(false);
    }

    /// Lets the waiting calls, and those after them, go on.
    pub(crate) fn release(&self) {
        self.open.send_replace(true);
    }

    /// Waits until so many calls in all have arrived.
    pub(crate) async fn arrived(&self, calls: u64) {
        self.arrivals.subscribe().wait_for(|arrived| *arrived >= calls).await.unwrap();
    }

    /// How many calls have arrived in all.
    pub(crate) fn calls(&self) -> u64 {
        *self.arrivals.borrow()
    }

    async fn enter(&self, kek: &Kek) -> Result<(), KmsError> {
        self.arrivals.send_modify(|arrived| *arrived += 1);
        self.open.subscribe().wait_for(|open| *open).await.unwrap();
        let fault = *self.fault.lock().unwrap();
        match fault {
            None => Ok(()),
            Some(KmsFault::Outage) => Err(KmsError::outage(&kek.id, "told to be out")),
            Some(KmsFault::Denied) => Err(KmsError::denied(&kek.id, "told to deny")),
            Some(KmsFault::Panic) => panic!("{PANIC_MESSAGE}"),
        }
    }
}

#[async_trait]
impl Kms for ProbedKms {
    async fn generate(
        &self,
        kek: &Kek,
        context: &EncryptionContext,
        urgency: Urgency,
    ) -> Result<Generated, KmsError> {
        let tenant = context.get("keyfold:tenant").unwrap_or_default().to_owned();
        *self.generated.lock().unwrap().entry(tenant).or_default() += 1;
        self.enter(kek).await?;
        self.inner.generate(kek, context, urgency).await
    }

    async fn wrap(
        &self,
        kek: &Kek,
        context: &EncryptionContext,
        plaintext: &KeyMaterial,
        urgency: Urgency,
    ) -> Result<Wrapped, KmsError> {
        self.enter(kek).await?;
        self.inner.wrap(kek, context, plaintext, urgency).await
    }

    async fn unwrap(
        &self,
        kek: &Kek,
        context: &EncryptionContext,
        blob: &[u8],
        urgency: Urgency,
    ) -> Result<KeyMaterial, KmsError> {
        self.unwraps.fetch_add(1, Ordering::SeqCst);
        self.enter(kek).await?;
        self.inner.unwrap(kek, context, blob, urgency).await
    }

    async fn rewrap(
        &self,
        from: &Kek,
        to: &Kek,
        context: &EncryptionContext,
        blob: &[u8],
        urgency: Urgency,
    ) -> Result<Wrapped, KmsError> {
        self.enter(from).await?;
        self.inner.rewrap(from, to, context, blob, urgency).await
    }

    async fn describe(&self, kek: &Kek, urgency: Urgency) -> Result<KekDescription, KmsError> {
        // What the background asks about a KEK is no call that a request makes.
        if urgency == Urgency::Foreground {
            self.enter(kek).await?;
        }
        self.inner.describe(kek, urgency).await
    }
}

/// The SQLite registry, which can be made to fail.
pub(crate) struct FaultyStore {
    inner: SqliteStore,
    down: AtomicBool,
    refuses_deks: AtomicBool,
    denials_noted: AtomicU64,
}

impl FaultyStore {
    pub(crate) fn new(inner: SqliteStore) -> Self {
        Self {
            inner,
            down: AtomicBool::new(false),
            refuses_deks: AtomicBool::new(false),
            denials_noted: AtomicU64::new(0),
        }
    }

    /// Whether nothing answers from now on.
    pub(crate) fn down(&self, down: bool) {
        self.down.store(down, Ordering::SeqCst);
    }

    /// How many denials were written down.
    pub(crate) fn denials_noted(&self) -> u64 {
        self.denials_noted.load(Ordering::SeqCst)
    }

    /// Whether new data keys cannot be written from now on.
    pub(crate) fn refuse_deks(&self, refuse: bool) {
        self.refuses_deks.store(refuse, Ordering::SeqCst);
    }

    fn answers(&self) -> Result<&SqliteStore, StoreError> {
        if self.down.load(Ordering::SeqCst) {
            Err(StoreError::Unavailable("told to be down".into()))
        } else {
            Ok(&self.inner)
        }
    }

    fn takes_deks(&self) -> Result<&SqliteStore, StoreError> {
        if self.refuses_deks.load(Ordering::SeqCst) {
            Err(StoreError::Unavailable("told to take no data keys".into()))
        } else {
            self.answers()
        }
    }
}

#[async_trait]
impl Store for FaultyStore {
    async fn insert_tenant(&self, tenant: &TenantRecord) -> Result<(), StoreError> {
        self.answers()?.insert_tenant(tenant).await
    }

    async fn insert_tenant_with_key(&self, tenant: &TenantRecord, key: &KeyRecord) -> Result<(), StoreError> {
        self.answers()?.insert_tenant_with_key(tenant, key).await
    }

    async fn tenant(&self, id: &TenantId) -> Result<Option<TenantRecord>, StoreError> {
        self.answers()?.tenant(id).await
    }

    async fn tenants(&self, after: Option<&TenantId>, limit: u32) -> Result<Vec<TenantRecord>, StoreError> {
        self.answers()?.tenants(after, limit).await
    }

    async fn update_tenant(&self, record: &TenantRecord) -> Result<(), StoreError> {
        self.answers()?.update_tenant(record).await
    }

    async fn insert_key(&self, key: &KeyRecord) -> Result<(), StoreError> {
        self.answers()?.insert_key(key).await
    }

    async fn key(&self, tenant: &TenantId, name: &KeyName) -> Result<Option<KeyRecord>, StoreError> {
        self.answers()?.key(tenant, name).await
    }

    async fn keys(
        &self,
        tenant: &TenantId,
        after: Option<&KeyName>,
        limit: u32,
    ) -> Result<Vec<KeyRecord>, StoreError> {
        self.answers()?.keys(tenant, after, limit).await
    }

    async fn count_keys(&self, tenant: &TenantId) -> Result<u64, StoreError> {
        self.answers()?.count_keys(tenant).await
    }

    async fn update_key(&self, record: &KeyRecord) -> Result<(), StoreError> {
        self.answers()?.update_key(record).await
    }

    async fn activate_dek(
        &self,
        predecessor: Option<DataKeyId>,
        new: &DekRecord,
        wrapped: &[WrappedRecord],
    ) -> Result<Activation, StoreError> {
        self.takes_deks()?.activate_dek(predecessor, new, wrapped).await
    }

    async fn insert_next_dek(
        &self,
        next: &DekRecord,
        wrapped: &[WrappedRecord],
    ) -> Result<Activation, StoreError> {
        self.takes_deks()?.insert_next_dek(next, wrapped).await
    }

    async fn promote_next_dek(
        &self,
        scope: &DekScope,
        predecessor: DataKeyId,
        now: Timestamp,
    ) -> Result<Option<StoredDek>, StoreError> {
        self.takes_deks()?.promote_next_dek(scope, predecessor, now).await
    }

    async fn active_dek(&self, scope: &DekScope) -> Result<Option<StoredDek>, StoreError> {
        self.answers()?.active_dek(scope).await
    }

    async fn next_dek(&self, scope: &DekScope) -> Result<Option<StoredDek>, StoreError> {
        self.answers()?.next_dek(scope).await
    }

    async fn dek(&self, id: DataKeyId) -> Result<Option<StoredDek>, StoreError> {
        self.answers()?.dek(id).await
    }

    async fn deks(
        &self,
        tenant: &TenantId,
        key: &KeyName,
        after: Option<DataKeyId>,
        limit: u32,
    ) -> Result<Vec<StoredDek>, StoreError> {
        self.answers()?.deks(tenant, key, after, limit).await
    }

    async fn set_dek_state(
        &self,
        id: DataKeyId,
        from: DekState,
        to: DekState,
        now: Timestamp,
    ) -> Result<(), StoreError> {
        self.answers()?.set_dek_state(id, from, to, now).await
    }

    async fn put_wrapped(&self, id: DataKeyId, wrapped: &WrappedRecord) -> Result<(), StoreError> {
        self.answers()?.put_wrapped(id, wrapped).await
    }

    async fn remove_wrapped(&self, id: DataKeyId, kek: &KekId) -> Result<(), StoreError> {
        self.answers()?.remove_wrapped(id, kek).await
    }

    async fn add_usage(&self, usage: &[Usage]) -> Result<(), StoreError> {
        self.answers()?.add_usage(usage).await
    }

    async fn insert_api_key(&self, key: &ApiKeyRecord) -> Result<(), StoreError> {
        self.answers()?.insert_api_key(key).await
    }

    async fn api_key(&self, id: &str) -> Result<Option<ApiKeyRecord>, StoreError> {
        self.answers()?.api_key(id).await
    }

    async fn api_keys(
        &self,
        tenant: Option<&TenantId>,
        after: Option<&str>,
        limit: u32,
    ) -> Result<Vec<ApiKeyRecord>, StoreError> {
        self.answers()?.api_keys(tenant, after, limit).await
    }

    async fn revoke_api_key(&self, id: &str, now: Timestamp) -> Result<(), StoreError> {
        self.answers()?.revoke_api_key(id, now).await
    }

    async fn release_api_key(&self, id: &str, tenant: &TenantId) -> Result<(), StoreError> {
        self.answers()?.release_api_key(id, tenant).await
    }

    async fn count_api_keys(&self, tenant: &TenantId, now: Timestamp) -> Result<u64, StoreError> {
        self.answers()?.count_api_keys(tenant, now).await
    }

    async fn changes(&self, after: u64) -> Result<Vec<Change>, StoreError> {
        self.answers()?.changes(after).await
    }

    async fn note_denial(
        &self,
        kek: &KekId,
        now: Timestamp,
        forget_before: Timestamp,
    ) -> Result<u64, StoreError> {
        let noted = self.answers()?.note_denial(kek, now, forget_before).await;
        self.denials_noted.fetch_add(1, Ordering::SeqCst);
        noted
    }

    async fn denials(&self, after: u64) -> Result<Vec<KekDenial>, StoreError> {
        self.answers()?.denials(after).await
    }

    async fn ping(&self) -> Result<(), StoreError> {
        self.answers()?.ping().await
    }

    async fn close(&self) {
        self.inner.close().await;
    }
}

/// Passes each call on to the registry, if it answers.
macro_rules! passed_on {
    ($room:ident: $(fn $name:ident($($argument:ident: $type:ty),*) -> $answer:ty;)*) => {
        #[async_trait]
        impl $room for FaultyStore {
            $(async fn $name(&self, $($argument: $type),*) -> Result<$answer, StoreError> {
                self.answers()?.$name($($argument),*).await
            })*
        }
    };
}

passed_on! { GrantStore:
    fn insert_grant(grant: &GrantRecord) -> ();
    fn grants(tenant: Option<&TenantId>, after: Option<&str>, limit: u32) -> Vec<GrantRecord>;
    fn count_grants(tenant: &TenantId) -> u64;
    fn delete_grant(tenant: &TenantId, id: &str) -> ();
}

passed_on! { RotationStore:
    fn acquire_lease(name: &str, holder: &str, ttl: Duration, now: Timestamp) -> Option<u64>;
    fn release_lease(fence: &Fence, now: Timestamp) -> ();
    fn apply_fenced(fence: &Fence, changes: &[FencedChange], now: Timestamp) -> ();
    fn due_sweeps(now: Timestamp, limit: u32) -> Vec<SweepRecord>;
    fn sweep(tenant: &TenantId) -> Option<SweepRecord>;
    fn nudge_sweep(tenant: &TenantId, now: Timestamp) -> ();
    fn nudge_sweeps_of_kek(kek: &KekId, now: Timestamp) -> ();
    fn active_deks(
        tenant: &TenantId, key: &KeyName, after: Option<&EncryptionContext>, limit: u32
    ) -> Vec<StoredDek>;
    fn deks_under_kek(kek: &KekId, after: Option<DataKeyId>, limit: u32) -> Vec<StoredDek>;
    fn kek_use(kek: &KekId) -> KekUse;
    fn kek_material(kek: &KekId) -> Option<KekMaterial>;
    fn insert_shred(shred: &ShredRecord) -> ();
    fn cancel_shred(tenant: &TenantId, target: &Target, now: Timestamp) -> ();
    fn shreds(tenant: &TenantId, after: Option<&Target>, limit: u32) -> Vec<ShredRecord>;
    fn shred(tenant: &TenantId, target: &Target) -> Option<ShredRecord>;
    fn due_shreds(now: Timestamp, limit: u32) -> Vec<ShredRecord>;
    fn open_job(job: &JobRecord) -> JobRecord;
    fn close_job(job: &JobRecord) -> ();
    fn job(id: &str) -> Option<JobRecord>;
    fn open_job_for(tenant: &TenantId, kind: JobKind, target: &Target) -> Option<JobRecord>;
    fn jobs(tenant: Option<&TenantId>, before: Option<&str>, limit: u32) -> Vec<JobRecord>;
}
