//! The registry in a few maps: what the contract means, without a database. Random histories are played on a store
//! and on this, and must not differ in any answer.

#![allow(clippy::unwrap_used, reason = "a test helper that fails is a failed test")]

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard};

use async_trait::async_trait;
use envelope::DataKeyId;
use keyfold::clock::Timestamp;
use keyfold::store::{
    Activation, ApiKeyRecord, Change, DekRecord, DekScope, DekState, EnvelopeWeight, KekDenial, KeyRecord,
    Status, Store, StoreError, StoredDek, TenantRecord, Usage, WrappedRecord,
};
use keyfold::tenant::{Kek, KekId, KekRing, KeyName, TenantId, Verb};
use proptest::prelude::*;
use proptest::sample::select;
use proptest::test_runner::{Config, TestRunner};

use crate::store_contract::{
    Fixture, api_key, at, dek_id, form, kek, key, key_name, scope, tenant, tenant_id,
};

/// A store in memory, for one process, that is never wrong because it is too simple to be.
#[derive(Default)]
struct Model(Mutex<Tables>);

#[derive(Default)]
struct Tables {
    tenants: BTreeMap<TenantId, TenantRecord>,
    keys: BTreeMap<(TenantId, KeyName), KeyRecord>,
    deks: BTreeMap<[u8; 16], StoredDek>,
    api_keys: BTreeMap<String, ApiKeyRecord>,
    changes: BTreeMap<Option<TenantId>, u64>,
    denials: Vec<KekDenial>,
}

fn conflict<T>() -> Result<T, StoreError> {
    Err(StoreError::Conflict("model".into()))
}

fn missing<T>() -> Result<T, StoreError> {
    Err(StoreError::Missing("model".into()))
}

impl Model {
    fn tables(&self) -> MutexGuard<'_, Tables> {
        self.0.lock().unwrap()
    }
}

impl Tables {
    fn note(&mut self, tenant: Option<&TenantId>) {
        let last = self.changes.values().max().copied().unwrap_or(0);
        self.changes.insert(tenant.cloned(), last + 1);
    }

    fn in_state(&mut self, scope: &DekScope, state: DekState) -> Option<&mut StoredDek> {
        self.deks.values_mut().find(|stored| stored.dek.scope == *scope && stored.dek.state == state)
    }

    fn insert(&mut self, dek: &DekRecord, wrapped: &[WrappedRecord]) -> Result<Activation, StoreError> {
        if self.deks.contains_key(dek.id.as_bytes()) {
            return conflict();
        }
        if !self.keys.contains_key(&(dek.scope.tenant.clone(), dek.scope.key.clone())) {
            return missing();
        }
        self.deks.insert(*dek.id.as_bytes(), StoredDek { dek: dek.clone(), wrapped: wrapped.to_vec() });
        Ok(Activation::Done)
    }
}

fn retire(stored: &mut StoredDek, now: Timestamp) {
    stored.dek.state = DekState::Retired;
    stored.dek.retired_at = Some(now);
}

fn page<'a, K: Ord + 'a, V: Clone + 'a>(
    all: impl Iterator<Item = (&'a K, &'a V)>,
    after: Option<&K>,
    limit: u32,
) -> Vec<V> {
    let rest = all.filter(|(key, _)| after.is_none_or(|after| *key > after));
    rest.take(limit as usize).map(|(_, value)| value.clone()).collect()
}

#[async_trait]
impl Store for Model {
    async fn insert_tenant(&self, tenant: &TenantRecord) -> Result<(), StoreError> {
        let mut tables = self.tables();
        if tables.tenants.contains_key(&tenant.id) {
            return conflict();
        }
        tables.tenants.insert(tenant.id.clone(), TenantRecord { version: 1, ..tenant.clone() });
        tables.note(Some(&tenant.id));
        Ok(())
    }

    async fn insert_tenant_with_key(&self, tenant: &TenantRecord, key: &KeyRecord) -> Result<(), StoreError> {
        let mut tables = self.tables();
        let id = (key.tenant.clone(), key.name.clone());
        if tables.tenants.contains_key(&tenant.id) || tables.keys.contains_key(&id) {
            return conflict();
        }
        tables.tenants.insert(tenant.id.clone(), TenantRecord { version: 1, ..tenant.clone() });
        tables.keys.insert(id, KeyRecord { version: 1, ..key.clone() });
        tables.note(Some(&tenant.id));
        Ok(())
    }

    async fn tenant(&self, id: &TenantId) -> Result<Option<TenantRecord>, StoreError> {
        Ok(self.tables().tenants.get(id).cloned())
    }

    async fn tenants(&self, after: Option<&TenantId>, limit: u32) -> Result<Vec<TenantRecord>, StoreError> {
        Ok(page(self.tables().tenants.iter(), after, limit))
    }

    async fn update_tenant(&self, record: &TenantRecord) -> Result<(), StoreError> {
        let mut tables = self.tables();
        let Some(found) = tables.tenants.get_mut(&record.id) else { return missing() };
        if found.version != record.version {
            return conflict();
        }
        let created_at = found.created_at;
        *found = TenantRecord { version: record.version + 1, created_at, ..record.clone() };
        tables.note(Some(&record.id));
        Ok(())
    }

    async fn insert_key(&self, key: &KeyRecord) -> Result<(), StoreError> {
        let mut tables = self.tables();
        let id = (key.tenant.clone(), key.name.clone());
        if !tables.tenants.contains_key(&key.tenant) {
            return missing();
        }
        if tables.keys.contains_key(&id) {
            return conflict();
        }
        tables.keys.insert(id, KeyRecord { version: 1, ..key.clone() });
        tables.note(Some(&key.tenant));
        Ok(())
    }

    async fn key(&self, tenant: &TenantId, name: &KeyName) -> Result<Option<KeyRecord>, StoreError> {
        Ok(self.tables().keys.get(&(tenant.clone(), name.clone())).cloned())
    }

    async fn keys(
        &self,
        tenant: &TenantId,
        after: Option<&KeyName>,
        limit: u32,
    ) -> Result<Vec<KeyRecord>, StoreError> {
        let tables = self.tables();
        let of_tenant = tables.keys.iter().filter(|((owner, _), _)| owner == tenant);
        Ok(page(of_tenant.map(|((_, name), key)| (name, key)), after, limit))
    }

    async fn count_keys(&self, tenant: &TenantId) -> Result<u64, StoreError> {
        Ok(self.tables().keys.keys().filter(|(owner, _)| owner == tenant).count() as u64)
    }

    async fn update_key(&self, record: &KeyRecord) -> Result<(), StoreError> {
        let mut tables = self.tables();
        let id = (record.tenant.clone(), record.name.clone());
        let Some(found) = tables.keys.get_mut(&id) else { return missing() };
        if found.version != record.version {
            return conflict();
        }
        let created_at = found.created_at;
        *found = KeyRecord { version: record.version + 1, created_at, ..record.clone() };
        tables.note(Some(&record.tenant));
        Ok(())
    }

    async fn activate_dek(
        &self,
        predecessor: Option<DataKeyId>,
        new: &DekRecord,
        wrapped: &[WrappedRecord],
    ) -> Result<Activation, StoreError> {
        if new.state != DekState::Active || wrapped.is_empty() {
            return conflict();
        }
        let mut tables = self.tables();
        let active = tables.in_state(&new.scope, DekState::Active).map(|stored| stored.clone());
        if let Some(active) = &active
            && predecessor != Some(active.dek.id)
        {
            return Ok(Activation::Taken(Box::new(active.clone())));
        }
        let done = tables.insert(new, wrapped)?;
        if let Some(active) = active {
            retire(tables.deks.get_mut(active.dek.id.as_bytes()).unwrap(), new.created_at);
            tables.note(Some(&new.scope.tenant));
        }
        Ok(done)
    }

    async fn insert_next_dek(
        &self,
        next: &DekRecord,
        wrapped: &[WrappedRecord],
    ) -> Result<Activation, StoreError> {
        if next.state != DekState::Next || wrapped.is_empty() {
            return conflict();
        }
        let mut tables = self.tables();
        if let Some(waiting) = tables.in_state(&next.scope, DekState::Next) {
            return Ok(Activation::Taken(Box::new(waiting.clone())));
        }
        tables.insert(next, wrapped)
    }

    async fn promote_next_dek(
        &self,
        scope: &DekScope,
        predecessor: DataKeyId,
        now: Timestamp,
    ) -> Result<Option<StoredDek>, StoreError> {
        let mut tables = self.tables();
        let active = tables.in_state(scope, DekState::Active).map(|stored| stored.clone());
        if tables.in_state(scope, DekState::Next).is_none()
            || active.as_ref().is_some_and(|active| active.dek.id != predecessor)
        {
            return Ok(active);
        }
        if let Some(active) = tables.in_state(scope, DekState::Active) {
            retire(active, now);
        }
        let next = tables.in_state(scope, DekState::Next).unwrap();
        next.dek.state = DekState::Active;
        next.dek.activated_at = Some(now);
        let promoted = next.clone();
        tables.note(Some(&scope.tenant));
        Ok(Some(promoted))
    }

    async fn active_dek(&self, scope: &DekScope) -> Result<Option<StoredDek>, StoreError> {
        Ok(self.tables().in_state(scope, DekState::Active).map(|stored| stored.clone()))
    }

    async fn next_dek(&self, scope: &DekScope) -> Result<Option<StoredDek>, StoreError> {
        Ok(self.tables().in_state(scope, DekState::Next).map(|stored| stored.clone()))
    }

    async fn dek(&self, id: DataKeyId) -> Result<Option<StoredDek>, StoreError> {
        Ok(self.tables().deks.get(id.as_bytes()).cloned())
    }

    async fn deks(
        &self,
        tenant: &TenantId,
        key: &KeyName,
        after: Option<DataKeyId>,
        limit: u32,
    ) -> Result<Vec<StoredDek>, StoreError> {
        let tables = self.tables();
        let of_key = tables
            .deks
            .iter()
            .filter(|(_, stored)| stored.dek.scope.tenant == *tenant && stored.dek.scope.key == *key);
        Ok(page(of_key, after.as_ref().map(DataKeyId::as_bytes), limit))
    }

    async fn set_dek_state(
        &self,
        id: DataKeyId,
        from: DekState,
        to: DekState,
        now: Timestamp,
    ) -> Result<(), StoreError> {
        let mut tables = self.tables();
        let Some(found) = tables.deks.get(id.as_bytes()).cloned() else { return missing() };
        if found.dek.state != from || !from.may_become(to) {
            return conflict();
        }
        if to == DekState::Active && tables.in_state(&found.dek.scope, DekState::Active).is_some() {
            return conflict();
        }
        let stored = tables.deks.get_mut(id.as_bytes()).unwrap();
        let dek = &mut stored.dek;
        dek.state = to;
        if from == DekState::Active || to == DekState::Retired {
            dek.retired_at = dek.retired_at.or(Some(now));
        }
        match to {
            DekState::Active => dek.activated_at = Some(now),
            DekState::Retired => dek.revoked_at = None,
            DekState::Revoked => dek.revoked_at = Some(now),
            DekState::Destroyed => {
                dek.destroyed_at = Some(now);
                stored.wrapped.clear();
            }
            DekState::Next => {}
        }
        tables.note(Some(&found.dek.scope.tenant));
        Ok(())
    }

    async fn put_wrapped(&self, id: DataKeyId, wrapped: &WrappedRecord) -> Result<(), StoreError> {
        let mut tables = self.tables();
        let Some(stored) = tables.deks.get_mut(id.as_bytes()) else { return missing() };
        if stored.dek.state == DekState::Destroyed {
            return conflict();
        }
        stored.wrapped.retain(|form| form.kek != wrapped.kek);
        stored.wrapped.push(wrapped.clone());
        stored.wrapped.sort_by(|a, b| a.kek.cmp(&b.kek));
        let tenant = stored.dek.scope.tenant.clone();
        tables.note(Some(&tenant));
        Ok(())
    }

    async fn remove_wrapped(&self, id: DataKeyId, kek: &KekId) -> Result<(), StoreError> {
        let mut tables = self.tables();
        let Some(stored) = tables.deks.get_mut(id.as_bytes()) else { return Ok(()) };
        if stored.wrapped.len() == 1 && stored.wrapped[0].kek == *kek {
            return conflict();
        }
        if stored.wrapped.iter().any(|form| form.kek == *kek) {
            stored.wrapped.retain(|form| form.kek != *kek);
            let tenant = stored.dek.scope.tenant.clone();
            tables.note(Some(&tenant));
        }
        Ok(())
    }

    async fn add_usage(&self, usage: &[Usage]) -> Result<(), StoreError> {
        let mut tables = self.tables();
        for used in usage {
            if let Some(StoredDek { dek, .. }) = tables.deks.get_mut(used.id.as_bytes()) {
                let max = i64::MAX.cast_unsigned();
                dek.messages = dek.messages.saturating_add(used.messages).min(max);
                dek.bytes = dek.bytes.saturating_add(used.bytes).min(max);
                dek.last_sealed_at = dek.last_sealed_at.max(used.last_sealed_at);
                dek.last_opened_at = dek.last_opened_at.max(used.last_opened_at);
            }
        }
        Ok(())
    }

    async fn insert_api_key(&self, key: &ApiKeyRecord) -> Result<(), StoreError> {
        let mut tables = self.tables();
        if tables.api_keys.contains_key(&key.id) {
            return conflict();
        }
        if key.tenants.iter().any(|tenant| !tables.tenants.contains_key(tenant)) {
            return missing();
        }
        let mut record = key.clone();
        record.tenants.sort();
        record.tenants.dedup();
        record.verbs.sort();
        record.verbs.dedup();
        tables.api_keys.insert(key.id.clone(), record);
        tables.note(None);
        Ok(())
    }

    async fn api_key(&self, id: &str) -> Result<Option<ApiKeyRecord>, StoreError> {
        Ok(self.tables().api_keys.get(id).cloned())
    }

    async fn api_keys(
        &self,
        tenant: Option<&TenantId>,
        after: Option<&str>,
        limit: u32,
    ) -> Result<Vec<ApiKeyRecord>, StoreError> {
        let tables = self.tables();
        let held = tables
            .api_keys
            .iter()
            .filter(|(_, key)| tenant.is_none_or(|tenant| key.tenants.contains(tenant)));
        Ok(page(held, after.map(str::to_owned).as_ref(), limit))
    }

    async fn revoke_api_key(&self, id: &str, now: Timestamp) -> Result<(), StoreError> {
        let mut tables = self.tables();
        let Some(key) = tables.api_keys.get_mut(id) else { return missing() };
        key.revoked_at = key.revoked_at.or(Some(now));
        tables.note(None);
        Ok(())
    }

    async fn release_api_key(&self, id: &str, tenant: &TenantId) -> Result<(), StoreError> {
        let mut tables = self.tables();
        let key = tables.api_keys.get_mut(id).filter(|key| key.tenants.contains(tenant));
        let Some(key) = key else { return missing() };
        key.tenants.retain(|held| held != tenant);
        tables.note(None);
        Ok(())
    }

    async fn count_api_keys(&self, tenant: &TenantId, now: Timestamp) -> Result<u64, StoreError> {
        let usable = |key: &&ApiKeyRecord| {
            key.tenants.contains(tenant)
                && key.revoked_at.is_none()
                && key.expires_at.is_none_or(|at| at > now)
        };
        Ok(self.tables().api_keys.values().filter(usable).count() as u64)
    }

    async fn changes(&self, after: u64) -> Result<Vec<Change>, StoreError> {
        let tables = self.tables();
        let mut changes: Vec<_> = tables
            .changes
            .iter()
            .filter(|(_, seq)| **seq > after)
            .map(|(tenant, seq)| Change { seq: *seq, tenant: tenant.clone() })
            .collect();
        changes.sort_by_key(|change| change.seq);
        Ok(changes)
    }

    async fn note_denial(
        &self,
        kek: &KekId,
        now: Timestamp,
        forget_before: Timestamp,
    ) -> Result<u64, StoreError> {
        let denials = &mut self.tables().denials;
        let seq = denials.last().map_or(0, |last| last.seq) + 1;
        denials.retain(|denial| denial.kek != *kek && denial.heard_at >= forget_before);
        denials.push(KekDenial { seq, kek: kek.clone(), heard_at: now });
        Ok(seq)
    }

    async fn denials(&self, after: u64) -> Result<Vec<KekDenial>, StoreError> {
        Ok(self.tables().denials.iter().filter(|denial| denial.seq > after).cloned().collect())
    }

    async fn ping(&self) -> Result<(), StoreError> {
        Ok(())
    }

    async fn close(&self) {}
}

// ---- histories ----

const TENANTS: [&str; 2] = ["acme", "acme-2"];
const KEYS: [&str; 2] = ["default", "other"];
const KEKS: [&str; 3] = ["a", "b", "c"];
const DEKS: u64 = 10;
const API_KEYS: [&str; 3] = ["k1", "k2", "k3"];

/// One call. What it is about comes from a few names, so that calls meet.
#[derive(Clone, Debug)]
enum Call {
    InsertTenant(TenantRecord),
    UpdateTenant(TenantRecord),
    InsertKey(KeyRecord),
    UpdateKey(KeyRecord),
    Activate { scope: DekScope, predecessor: Option<u64>, current: bool, dek: u64, forms: Vec<WrappedRecord> },
    InsertNext { scope: DekScope, dek: u64, forms: Vec<WrappedRecord> },
    Promote { scope: DekScope, predecessor: u64, current: bool },
    SetState { dek: u64, from: DekState, current: bool, to: DekState },
    PutWrapped { dek: u64, form: WrappedRecord },
    RemoveWrapped { dek: u64, kek: KekId },
    AddUsage(Vec<Usage>),
    InsertApiKey { id: &'static str, tenants: Vec<&'static str>, verbs: Vec<Verb> },
    RevokeApiKey(&'static str),
    ReleaseApiKey(&'static str, &'static str),
    NoteDenial { kek: KekId, kept: u64 },
    Reopen,
}

fn a_tenant() -> impl Strategy<Value = TenantRecord> {
    let keks = || proptest::sample::subsequence(KEKS.to_vec(), 0..=3).prop_shuffle();
    (select(&TENANTS), select(&Status::ALL), keks(), keks(), 0..9_i64, 1..4_u64).prop_map(
        |(id, status, ring, former, ms, version)| {
            let direct = |names: Vec<&str>| names.into_iter().map(|name| Kek::direct(kek(name))).collect();
            TenantRecord {
                status,
                ring: KekRing::new(direct(ring)).unwrap_or_else(|_| tenant(id).ring),
                former_keks: direct(former),
                created_at: at(ms),
                updated_at: at(ms),
                version,
                ..tenant(id)
            }
        },
    )
}

fn a_key() -> impl Strategy<Value = KeyRecord> {
    (
        select(&TENANTS),
        select(&KEYS),
        select(&Status::ALL),
        select(&EnvelopeWeight::ALL),
        any::<u64>(),
        1..4_u64,
    )
        .prop_map(|(tenant, name, status, envelope, age, version)| {
            let mut record = KeyRecord { status, version, ..key(tenant, name) };
            record.policy.envelope = envelope;
            record.policy.dek_age_secs_max = age >> 1;
            record
        })
}

fn a_scope() -> impl Strategy<Value = DekScope> {
    // Mostly one scope, else histories seldom get anywhere.
    prop_oneof![
        3 => Just(scope(TENANTS[0], KEYS[0], &[])),
        1 => (select(&TENANTS), select(&KEYS), any::<bool>()).prop_map(|(tenant, key, bound)| {
            scope(tenant, key, if bound { &[("a", "1")] } else { &[] })
        }),
    ]
}

fn a_form() -> impl Strategy<Value = WrappedRecord> {
    (select(&KEKS), any::<[u8; 3]>(), proptest::option::of(Just("m".to_owned())))
        .prop_map(|(kek, blob, material)| WrappedRecord { material, ..form(kek, &blob) })
}

/// Wrapped forms ordered by KEK, as records have them; seldom none.
fn forms() -> impl Strategy<Value = Vec<WrappedRecord>> {
    proptest::collection::btree_map(select(&KEKS), a_form(), 0..=3).prop_map(|forms| {
        forms.into_iter().map(|(name, form)| WrappedRecord { kek: kek(name), ..form }).collect()
    })
}

fn a_usage() -> impl Strategy<Value = Usage> {
    let time = || proptest::option::of((0..100_i64).prop_map(at));
    let count = || prop_oneof![4 => 0..1000_u64, 1 => any::<u64>()];
    (0..DEKS, count(), count(), time(), time()).prop_map(
        |(dek, messages, bytes, last_sealed_at, last_opened_at)| Usage {
            id: dek_id(dek),
            messages,
            bytes,
            last_sealed_at,
            last_opened_at,
        },
    )
}

fn a_call() -> impl Strategy<Value = Call> {
    let mostly = || proptest::bool::weighted(0.8);
    let tenants = || proptest::collection::vec(select(&TENANTS), 0..=3);
    let verbs = || proptest::collection::vec(select(&Verb::ALL), 0..=3);
    prop_oneof![
        2 => a_tenant().prop_map(Call::InsertTenant),
        3 => a_tenant().prop_map(Call::UpdateTenant),
        3 => a_key().prop_map(Call::InsertKey),
        3 => a_key().prop_map(Call::UpdateKey),
        8 => (a_scope(), proptest::option::of(0..DEKS), mostly(), 0..DEKS, forms()).prop_map(
            |(scope, predecessor, current, dek, forms)| Call::Activate { scope, predecessor, current, dek, forms }
        ),
        5 => (a_scope(), 0..DEKS, forms()).prop_map(|(scope, dek, forms)| Call::InsertNext { scope, dek, forms }),
        5 => (a_scope(), 0..DEKS, mostly())
            .prop_map(|(scope, predecessor, current)| Call::Promote { scope, predecessor, current }),
        5 => (0..DEKS, select(&DekState::ALL), mostly(), select(&DekState::ALL))
            .prop_map(|(dek, from, current, to)| Call::SetState { dek, from, current, to }),
        3 => (0..DEKS, a_form()).prop_map(|(dek, form)| Call::PutWrapped { dek, form }),
        3 => (0..DEKS, select(&KEKS)).prop_map(|(dek, name)| Call::RemoveWrapped { dek, kek: kek(name) }),
        3 => proptest::collection::vec(a_usage(), 0..4).prop_map(Call::AddUsage),
        2 => (select(&API_KEYS), tenants(), verbs())
            .prop_map(|(id, tenants, verbs)| Call::InsertApiKey { id, tenants, verbs }),
        1 => select(&API_KEYS).prop_map(Call::RevokeApiKey),
        1 => (select(&API_KEYS), select(&TENANTS)).prop_map(|(id, tenant)| Call::ReleaseApiKey(id, tenant)),
        1 => (select(&KEKS), 0..9_u64).prop_map(|(name, kept)| Call::NoteDenial { kek: kek(name), kept }),
        1 => Just(Call::Reopen),
    ]
}

/// An answer to compare: an error by its kind, as its text is the store's own.
fn shown<T: std::fmt::Debug>(result: Result<T, StoreError>) -> String {
    match result {
        Ok(value) => format!("{value:?}"),
        Err(StoreError::Conflict(_)) => "conflict".to_owned(),
        Err(StoreError::Missing(_)) => "missing".to_owned(),
        Err(other) => format!("{other:?}"),
    }
}

async fn play(store: &dyn Store, call: &Call, now: Timestamp) -> String {
    let active_of =
        async |scope: &DekScope| store.active_dek(scope).await.unwrap().map(|stored| stored.dek.id);
    match call {
        Call::InsertTenant(record) => shown(store.insert_tenant(record).await),
        Call::UpdateTenant(record) => shown(store.update_tenant(record).await),
        Call::InsertKey(record) => shown(store.insert_key(record).await),
        Call::UpdateKey(record) => shown(store.update_key(record).await),
        Call::Activate { scope, predecessor, current, dek, forms } => {
            let predecessor = if *current { active_of(scope).await } else { predecessor.map(dek_id) };
            let new = DekRecord::new(dek_id(*dek), scope.clone(), DekState::Active, now);
            shown(store.activate_dek(predecessor, &new, &made(forms, now)).await)
        }
        Call::InsertNext { scope, dek, forms } => {
            let next = DekRecord::new(dek_id(*dek), scope.clone(), DekState::Next, now);
            shown(store.insert_next_dek(&next, &made(forms, now)).await)
        }
        Call::Promote { scope, predecessor, current } => {
            let named = if *current { active_of(scope).await } else { None };
            let predecessor = named.unwrap_or_else(|| dek_id(*predecessor));
            shown(store.promote_next_dek(scope, predecessor, now).await)
        }
        Call::SetState { dek, from, current, to } => {
            let found = store.dek(dek_id(*dek)).await.unwrap().map(|stored| stored.dek.state);
            let from = if *current { found.unwrap_or(*from) } else { *from };
            shown(store.set_dek_state(dek_id(*dek), from, *to, now).await)
        }
        Call::PutWrapped { dek, form } => shown(store.put_wrapped(dek_id(*dek), form).await),
        Call::RemoveWrapped { dek, kek } => shown(store.remove_wrapped(dek_id(*dek), kek).await),
        Call::AddUsage(usage) => shown(store.add_usage(usage).await),
        Call::InsertApiKey { id, tenants, verbs } => {
            let record = ApiKeyRecord { verbs: verbs.clone(), ..api_key(id, tenants) };
            shown(store.insert_api_key(&record).await)
        }
        Call::RevokeApiKey(id) => shown(store.revoke_api_key(id, now).await),
        Call::ReleaseApiKey(id, tenant) => shown(store.release_api_key(id, &tenant_id(tenant)).await),
        Call::NoteDenial { kek, kept } => {
            let forget_before = now.minus(std::time::Duration::from_millis(*kept));
            shown(store.note_denial(kek, now, forget_before).await)
        }
        Call::Reopen => String::new(),
    }
}

/// These wrapped forms as they are at the making of their data key.
fn made(forms: &[WrappedRecord], now: Timestamp) -> Vec<WrappedRecord> {
    forms.iter().map(|form| WrappedRecord { wrapped_at: now, ..form.clone() }).collect()
}

/// Everything that can be read.
async fn dump(store: &dyn Store) -> Vec<String> {
    let mut all = vec![shown(store.tenants(None, 100).await)];
    // Their order; how the numbers grow is the store's own affair.
    let changes = store.changes(0).await.unwrap();
    all.push(shown(Ok(changes.into_iter().map(|change| change.tenant).collect::<Vec<_>>())));
    all.push(shown(store.denials(0).await));
    for tenant in TENANTS.map(tenant_id) {
        all.push(shown(store.tenant(&tenant).await));
        all.push(shown(store.keys(&tenant, None, 100).await));
        for key in KEYS.map(key_name) {
            all.push(shown(store.key(&tenant, &key).await));
            all.push(shown(store.deks(&tenant, &key, None, 100).await));
            for bound in [&[][..], &[("a", "1")]] {
                let scope = scope(tenant.as_str(), key.as_str(), bound);
                all.push(shown(store.active_dek(&scope).await));
                all.push(shown(store.next_dek(&scope).await));
            }
        }
        all.push(shown(store.count_keys(&tenant).await));
        all.push(shown(store.count_api_keys(&tenant, at(50)).await));
        let held = store.api_keys(Some(&tenant), None, 100).await.unwrap();
        all.push(held.into_iter().map(|key| key.id).collect::<Vec<_>>().join(" "));
    }
    for dek in 0..DEKS {
        all.push(shown(store.dek(dek_id(dek)).await));
    }
    for key in store.api_keys(None, None, 100).await.unwrap() {
        let (id, hash, tenants, verbs) = (&key.id, key.secret_hash, &key.tenants, &key.verbs);
        all.push(format!("{id} {hash:?} {tenants:?} {verbs:?} {:?} {:?}", key.expires_at, key.revoked_at));
    }
    all
}

pub(crate) async fn random_histories_are_those_of_the_model<F: Fixture>() {
    let runtime = tokio::runtime::Handle::current();
    // The runner is not asynchronous, and this thread belongs to the runtime.
    let played = tokio::task::spawn_blocking(move || {
        let histories = proptest::collection::vec(a_call(), 1..80);
        let config = Config { cases: 48, failure_persistence: None, ..Config::default() };
        TestRunner::new(config).run(&histories, |calls| runtime.block_on(compare::<F>(&calls)))
    });
    if let Err(difference) = played.await.unwrap() {
        panic!("{difference}");
    }
}

async fn compare<F: Fixture>(calls: &[Call]) -> Result<(), TestCaseError> {
    let fixture = F::fresh().await;
    let model = Model::default();
    let mut store = fixture.open().await;
    for (n, call) in (100..).zip(calls) {
        if matches!(call, Call::Reopen) {
            store.close().await;
            store = fixture.open().await;
        }
        let (found, expected) = (play(&*store, call, at(n)).await, play(&model, call, at(n)).await);
        prop_assert_eq!(found, expected, "{:?}", call);
    }
    prop_assert_eq!(dump(&*store).await, dump(&model).await);
    store.close().await;
    Ok(())
}
