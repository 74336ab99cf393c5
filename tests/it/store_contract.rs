//! What every [`Store`] must do: the contract of the trait, line by line.
//!
//! A store joins with a [`Fixture`] and `store_contract!(ItsFixture);`.

#![allow(clippy::unwrap_used, reason = "a test helper that fails is a failed test")]

use std::fmt::Debug;
use std::sync::Arc;

use async_trait::async_trait;
use envelope::{DataKeyId, EncryptionContext};
use keyfold::clock::Timestamp;
use keyfold::store::{
    Activation, ApiKeyRecord, DekRecord, DekScope, DekState, EnvelopeWeight, KekDenial, KeyPolicy, KeyRecord,
    Status, Store, StoreError, StoredDek, TenantRecord, Usage, WrappedRecord,
};
use keyfold::tenant::{AssumedRole, Kek, KekId, KekRing, KeyName, TenantId, Verb};
use tokio::task::JoinSet;

/// A place where registries of one kind can be made.
#[async_trait]
pub(crate) trait Fixture: Send + Sync + Sized {
    /// An empty registry.
    async fn fresh() -> Self;

    /// A handle on it, sharing nothing in memory with other handles: as another process has it.
    async fn open(&self) -> Arc<dyn Store>;
}

macro_rules! store_contract {
    ($fixture:ty) => {
        $crate::store_contract::store_contract!($fixture:
            what_was_written_is_there_after_reopening
            another_handle_sees_a_change_at_once
            a_tenant_is_inserted_once_at_version_1
            a_tenant_and_its_first_key_come_together_or_not_at_all
            a_tenant_is_updated_by_whoever_saw_its_last_version
            of_racing_updates_of_one_version_one_wins
            a_key_is_inserted_once_and_only_for_a_tenant
            a_key_is_updated_by_whoever_saw_its_last_version
            counts_beyond_the_database_are_kept_at_its_limit
            tenants_and_keys_come_in_pages_ordered_byte_by_byte
            data_keys_come_in_pages_in_the_order_of_their_ids
            activation_takes_a_free_place_and_retires_the_predecessor_it_names
            scopes_do_not_touch_each_other
            a_refused_activation_changes_nothing
            of_racing_activations_one_wins_and_the_others_get_the_winner
            one_data_key_waits_for_each_scope
            promotion_follows_the_predecessor_it_names
            of_racing_promotions_one_promotes_and_all_get_the_same
            every_step_between_states_is_allowed_or_refused_as_the_table_says
            a_data_key_that_is_taken_back_is_no_longer_revoked
            what_is_destroyed_has_no_wrapped_form_and_gets_none
            wrapped_forms_are_replaced_and_removed_but_never_the_last
            usage_adds_up_and_its_times_never_go_back
            racing_usage_is_not_lost
            an_api_key_is_inserted_whole_or_not_at_all
            api_keys_come_in_pages_all_of_them_or_one_tenants
            a_revocation_stands
            an_api_key_loses_a_tenant_and_keeps_the_others
            keys_and_usable_api_keys_are_counted_for_each_tenant
            changes_tell_whose_records_to_read_again
            what_changes_nothing_is_no_change
            denials_are_found_by_their_numbers_and_forgotten_in_time_but_for_the_newest
            a_closed_store_says_that_it_is_unavailable
            random_histories_are_those_of_the_model
        );
    };
    ($fixture:ty: $($case:ident)*) => {
        $(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $case() {
                crate::store_contract::$case::<$fixture>().await;
            }
        )*
    };
}
pub(crate) use store_contract;

pub(crate) use crate::store_model::random_histories_are_those_of_the_model;

// ---- records to play with ----

pub(crate) fn at(ms: i64) -> Timestamp {
    Timestamp::from_unix_ms(ms)
}

pub(crate) fn tenant_id(text: &str) -> TenantId {
    text.parse().unwrap()
}

pub(crate) fn key_name(text: &str) -> KeyName {
    text.parse().unwrap()
}

pub(crate) fn kek(name: &str) -> KekId {
    format!("local:{name}").parse().unwrap()
}

pub(crate) fn dek_id(n: u64) -> DataKeyId {
    DataKeyId::from_bytes((u128::from(n) + (0x0192 << 112)).to_be_bytes())
}

pub(crate) fn tenant(id: &str) -> TenantRecord {
    TenantRecord {
        id: tenant_id(id),
        status: Status::Enabled,
        ring: KekRing::new(vec![Kek::direct(kek("main"))]).unwrap(),
        former_keks: vec![],
        created_at: at(1_000),
        updated_at: at(1_000),
        version: 1,
    }
}

pub(crate) fn key(tenant: &str, name: &str) -> KeyRecord {
    KeyRecord {
        tenant: tenant_id(tenant),
        name: key_name(name),
        status: Status::Enabled,
        policy: KeyPolicy::default(),
        created_at: at(1_000),
        updated_at: at(1_000),
        version: 1,
    }
}

pub(crate) fn scope(tenant: &str, key: &str, bound: &[(&str, &str)]) -> DekScope {
    let mut context = EncryptionContext::new();
    for (name, value) in bound {
        context.insert(*name, *value).unwrap();
    }
    DekScope { tenant: tenant_id(tenant), key: key_name(key), bound: context }
}

fn default_scope() -> DekScope {
    scope("acme", "default", &[])
}

pub(crate) fn active(n: u64, scope: &DekScope) -> DekRecord {
    DekRecord::new(dek_id(n), scope.clone(), DekState::Active, at(n.cast_signed()))
}

pub(crate) fn next(n: u64, scope: &DekScope) -> DekRecord {
    DekRecord::new(dek_id(n), scope.clone(), DekState::Next, at(n.cast_signed()))
}

pub(crate) fn form(kek_name: &str, blob: &[u8]) -> WrappedRecord {
    WrappedRecord { kek: kek(kek_name), blob: blob.to_vec(), material: None, wrapped_at: at(5) }
}

fn one_form() -> Vec<WrappedRecord> {
    vec![form("main", b"wrapped")]
}

pub(crate) fn api_key(id: &str, tenants: &[&str]) -> ApiKeyRecord {
    ApiKeyRecord {
        id: id.to_owned(),
        name: format!("the key {id}"),
        secret_hash: [7; 32],
        tenants: tenants.iter().map(|tenant| tenant_id(tenant)).collect(),
        verbs: vec![Verb::Encrypt, Verb::Decrypt],
        created_at: at(1_000),
        expires_at: None,
        revoked_at: None,
    }
}

/// A registry with the tenant `acme` and its key `default`.
async fn with_acme<F: Fixture>() -> (F, Arc<dyn Store>) {
    let fixture = F::fresh().await;
    let store = fixture.open().await;
    store.insert_tenant(&tenant("acme")).await.unwrap();
    store.insert_key(&key("acme", "default")).await.unwrap();
    (fixture, store)
}

/// A registry with an active data key 1 in the default scope.
async fn with_dek<F: Fixture>() -> (F, Arc<dyn Store>) {
    let (fixture, store) = with_acme::<F>().await;
    let done = store.activate_dek(None, &active(1, &default_scope()), &one_form()).await.unwrap();
    assert_eq!(done, Activation::Done);
    (fixture, store)
}

#[track_caller]
#[expect(clippy::needless_pass_by_value, reason = "reads better around a call")]
fn assert_conflict<T: Debug>(result: Result<T, StoreError>) {
    assert!(matches!(result, Err(StoreError::Conflict(_))), "{result:?}");
}

#[track_caller]
#[expect(clippy::needless_pass_by_value, reason = "reads better around a call")]
fn assert_missing<T: Debug>(result: Result<T, StoreError>) {
    assert!(matches!(result, Err(StoreError::Missing(_))), "{result:?}");
}

async fn state(store: &dyn Store, n: u64) -> DekState {
    store.dek(dek_id(n)).await.unwrap().unwrap().dek.state
}

// ---- durability ----

pub(crate) async fn what_was_written_is_there_after_reopening<F: Fixture>() {
    let fixture = F::fresh().await;
    let store = fixture.open().await;

    let role = AssumedRole {
        arn: "arn:aws:iam::111122223333:role/keyfold".into(),
        external_id: Some("outside 'quoted' \u{1f511}".into()),
    };
    let arn = "arn:aws:kms:eu-west-1:111122223333:key/mrk-1234".parse().unwrap();
    let mut acme = tenant("acme");
    acme.status = Status::Disabled;
    acme.ring = KekRing::new(vec![
        Kek { id: arn, role: Some(role) },
        Kek::direct(kek("b")),
        Kek { id: kek("a"), role: Some(AssumedRole { arn: "r".into(), external_id: None }) },
    ])
    .unwrap();
    acme.former_keks = vec![Kek::direct(kek("z")), Kek::direct(kek("a"))];
    acme.updated_at = at(-1);
    store.insert_tenant(&acme).await.unwrap();

    let mut records = key("acme", "records");
    records.status = Status::Disabled;
    records.policy = KeyPolicy {
        dek_age_secs_max: 1,
        dek_messages_max: 2,
        dek_bytes_max: 3,
        envelope: EnvelopeWeight::Compact,
    };
    records.updated_at = at(2_000);
    store.insert_key(&records).await.unwrap();

    let scope = scope("acme", "records", &[("department", "R&D"), ("a", "")]);
    let mut dek = active(1, &scope);
    dek.messages = 17;
    dek.bytes = 18;
    dek.last_sealed_at = Some(at(19));
    dek.last_opened_at = Some(at(20));
    let mut forms = vec![form("a", &[0, 255]), form("b", &[1; 65_535])];
    forms[1].material = Some("2026-11".to_owned());
    store.activate_dek(None, &dek, &forms).await.unwrap();
    let waiting = next(2, &scope);
    store.insert_next_dek(&waiting, &one_form()).await.unwrap();

    let mut caller = api_key("k1", &["acme"]);
    caller.verbs = Verb::ALL.to_vec();
    caller.expires_at = Some(at(9));
    caller.revoked_at = Some(at(8));
    store.insert_api_key(&caller).await.unwrap();
    store.close().await;

    let store = fixture.open().await;
    assert_eq!(store.tenant(&acme.id).await.unwrap(), Some(acme));
    assert_eq!(store.key(&records.tenant, &records.name).await.unwrap(), Some(records));
    let stored = StoredDek { dek, wrapped: forms };
    assert_eq!(store.active_dek(&scope).await.unwrap().as_ref(), Some(&stored));
    assert_eq!(store.dek(dek_id(1)).await.unwrap(), Some(stored));
    assert_eq!(store.dek(dek_id(2)).await.unwrap(), Some(StoredDek { dek: waiting, wrapped: one_form() }));
    assert!(store.api_key("k1").await.unwrap().is_some_and(|found| found == caller));
    store.ping().await.unwrap();
}

pub(crate) async fn another_handle_sees_a_change_at_once<F: Fixture>() {
    let (fixture, here) = with_dek::<F>().await;
    let there = fixture.open().await;
    for n in 2..12 {
        let (writer, reader) = if n % 2 == 0 { (&here, &there) } else { (&there, &here) };
        let dek = active(n, &default_scope());
        writer.activate_dek(Some(dek_id(n - 1)), &dek, &one_form()).await.unwrap();
        assert_eq!(reader.active_dek(&default_scope()).await.unwrap().unwrap().dek, dek);
    }
}

pub(crate) async fn a_closed_store_says_that_it_is_unavailable<F: Fixture>() {
    let (_fixture, store) = with_acme::<F>().await;
    store.close().await;
    store.close().await;
    for result in [
        store.ping().await,
        store.tenant(&tenant_id("acme")).await.map(drop),
        store.insert_tenant(&tenant("beta")).await,
    ] {
        assert!(matches!(result, Err(StoreError::Unavailable(_))), "{result:?}");
    }
}

// ---- tenants and keys ----

pub(crate) async fn a_tenant_is_inserted_once_at_version_1<F: Fixture>() {
    let fixture = F::fresh().await;
    let store = fixture.open().await;
    assert_eq!(store.tenant(&tenant_id("acme")).await.unwrap(), None);

    let given = TenantRecord { version: 41, ..tenant("acme") };
    store.insert_tenant(&given).await.unwrap();
    let other = TenantRecord { status: Status::Disabled, ..tenant("acme") };
    assert_conflict(store.insert_tenant(&other).await);

    assert_eq!(store.tenant(&tenant_id("acme")).await.unwrap(), Some(tenant("acme")));
    assert_eq!(store.tenant(&tenant_id("acm")).await.unwrap(), None);
}

pub(crate) async fn a_tenant_is_updated_by_whoever_saw_its_last_version<F: Fixture>() {
    let fixture = F::fresh().await;
    let store = fixture.open().await;
    assert_missing(store.update_tenant(&tenant("acme")).await);
    store.insert_tenant(&tenant("acme")).await.unwrap();
    store.insert_tenant(&tenant("beta")).await.unwrap();

    let mut change = tenant("acme");
    change.ring = KekRing::new(vec![Kek::direct(kek("new")), Kek::direct(kek("main"))]).unwrap();
    change.former_keks = vec![Kek::direct(kek("old"))];
    change.status = Status::Disabled;
    change.updated_at = at(2_000);
    store.update_tenant(&change).await.unwrap();
    let expected = TenantRecord { version: 2, ..change.clone() };
    assert_eq!(store.tenant(&change.id).await.unwrap(), Some(expected.clone()));

    assert_conflict(store.update_tenant(&TenantRecord { version: 1, ..tenant("acme") }).await);
    assert_conflict(store.update_tenant(&TenantRecord { version: 3, ..tenant("acme") }).await);
    assert_eq!(store.tenant(&change.id).await.unwrap(), Some(expected));
    assert_eq!(store.tenant(&tenant_id("beta")).await.unwrap(), Some(tenant("beta")));

    store.update_tenant(&TenantRecord { version: 2, ..tenant("acme") }).await.unwrap();
    let back = TenantRecord { version: 3, ..tenant("acme") };
    assert_eq!(store.tenant(&change.id).await.unwrap(), Some(back));
}

pub(crate) async fn of_racing_updates_of_one_version_one_wins<F: Fixture>() {
    let (fixture, here) = with_acme::<F>().await;
    let there = fixture.open().await;
    let mut tasks = JoinSet::new();
    for n in 0..16 {
        let store = if n % 2 == 0 { here.clone() } else { there.clone() };
        tasks.spawn(async move {
            let change = TenantRecord { updated_at: at(n), ..tenant("acme") };
            (n, store.update_tenant(&change).await)
        });
    }
    let results = tasks.join_all().await;
    let winners: Vec<_> = results.iter().filter(|(_, result)| result.is_ok()).map(|(n, _)| *n).collect();
    assert_eq!(winners.len(), 1, "{results:?}");
    for (_, result) in results.into_iter().filter(|(_, result)| result.is_err()) {
        assert_conflict(result);
    }
    let expected = TenantRecord { updated_at: at(winners[0]), version: 2, ..tenant("acme") };
    assert_eq!(here.tenant(&tenant_id("acme")).await.unwrap(), Some(expected));
}

pub(crate) async fn a_key_is_inserted_once_and_only_for_a_tenant<F: Fixture>() {
    let fixture = F::fresh().await;
    let store = fixture.open().await;
    assert_missing(store.insert_key(&key("acme", "default")).await);
    store.insert_tenant(&tenant("acme")).await.unwrap();
    store.insert_tenant(&tenant("beta")).await.unwrap();

    store.insert_key(&KeyRecord { version: 9, ..key("acme", "default") }).await.unwrap();
    assert_conflict(store.insert_key(&key("acme", "default")).await);
    store.insert_key(&key("beta", "default")).await.unwrap();

    let stored = store.key(&tenant_id("acme"), &key_name("default")).await.unwrap();
    assert_eq!(stored, Some(key("acme", "default")));
    assert_eq!(store.key(&tenant_id("acme"), &key_name("defaul")).await.unwrap(), None);
    assert_eq!(store.key(&tenant_id("nobody"), &key_name("default")).await.unwrap(), None);
}

pub(crate) async fn a_key_is_updated_by_whoever_saw_its_last_version<F: Fixture>() {
    let (_fixture, store) = with_acme::<F>().await;
    store.insert_key(&key("acme", "other")).await.unwrap();
    assert_missing(store.update_key(&key("acme", "third")).await);
    assert_missing(store.update_key(&key("nobody", "default")).await);

    let mut change = key("acme", "default");
    change.status = Status::Disabled;
    change.policy.dek_messages_max = 5;
    change.policy.envelope = EnvelopeWeight::Compact;
    change.updated_at = at(2_000);
    store.update_key(&change).await.unwrap();
    let expected = KeyRecord { version: 2, ..change.clone() };
    assert_eq!(store.key(&change.tenant, &change.name).await.unwrap(), Some(expected.clone()));

    assert_conflict(store.update_key(&KeyRecord { version: 1, ..key("acme", "default") }).await);
    assert_conflict(store.update_key(&KeyRecord { version: 3, ..key("acme", "default") }).await);
    assert_eq!(store.key(&change.tenant, &change.name).await.unwrap(), Some(expected));
    let other = store.key(&change.tenant, &key_name("other")).await.unwrap();
    assert_eq!(other, Some(key("acme", "other")));
}

pub(crate) async fn counts_beyond_the_database_are_kept_at_its_limit<F: Fixture>() {
    const MAX: u64 = i64::MAX as u64;
    let (_fixture, store) = with_acme::<F>().await;
    let mut unlimited = key("acme", "unlimited");
    unlimited.policy.dek_messages_max = u64::MAX;
    unlimited.policy.dek_bytes_max = MAX;
    store.insert_key(&unlimited).await.unwrap();
    let stored = store.key(&unlimited.tenant, &unlimited.name).await.unwrap().unwrap();
    assert_eq!((stored.policy.dek_messages_max, stored.policy.dek_bytes_max), (MAX, MAX));

    store.activate_dek(None, &active(1, &default_scope()), &one_form()).await.unwrap();
    for (messages, bytes) in [(MAX - 1, 1), (1, u64::MAX), (1, 1), (u64::MAX, 0)] {
        let usage = Usage { id: dek_id(1), messages, bytes, last_sealed_at: None, last_opened_at: None };
        store.add_usage(&[usage]).await.unwrap();
    }
    let dek = store.dek(dek_id(1)).await.unwrap().unwrap().dek;
    assert_eq!((dek.messages, dek.bytes), (MAX, MAX));
}

/// Asks for pages of every size and from every start, and compares with the slice of `all`.
async fn assert_pages<T, P, Fut>(all: &[T], page: P)
where
    T: PartialEq + Debug + Clone,
    P: Fn(Option<T>, u32) -> Fut,
    Fut: Future<Output = Vec<T>>,
{
    for start in 0..=all.len() {
        let after = start.checked_sub(1).map(|last| all[last].clone());
        for limit in [0, 1, 2, all.len(), all.len() + 1, u32::MAX as usize] {
            let expected: Vec<T> = all[start..].iter().take(limit).cloned().collect();
            let found = page(after.clone(), u32::try_from(limit).unwrap()).await;
            assert_eq!(found, expected, "{limit} after {after:?}");
        }
    }
}

pub(crate) async fn tenants_and_keys_come_in_pages_ordered_byte_by_byte<F: Fixture>() {
    // A language's order would put these differently: '-' counts for nothing there, and digits come elsewhere.
    const ORDERED: [&str; 8] = ["0", "a", "a-", "a-z", "a0", "aa", "ab", "b"];
    let fixture = F::fresh().await;
    let store = fixture.open().await;
    assert_eq!(store.tenants(None, 10).await.unwrap(), []);
    for n in [3, 7, 0, 5, 1, 6, 4, 2] {
        store.insert_tenant(&tenant(ORDERED[n])).await.unwrap();
    }
    assert_pages(&ORDERED.map(tenant_id), |after, limit| {
        let store = &store;
        async move {
            let page = store.tenants(after.as_ref(), limit).await.unwrap();
            page.into_iter().map(|tenant| tenant.id).collect()
        }
    })
    .await;
    let after_none_that_is_there = store.tenants(Some(&tenant_id("a1")), 1).await.unwrap();
    assert_eq!(after_none_that_is_there, [tenant("aa")]);

    let acme = tenant_id("aa");
    assert_eq!(store.keys(&acme, None, 10).await.unwrap(), []);
    for n in [3, 7, 0, 5, 1, 6, 4, 2] {
        store.insert_key(&key("aa", ORDERED[n])).await.unwrap();
        store.insert_key(&key("ab", ORDERED[n])).await.unwrap();
    }
    assert_pages(&ORDERED.map(key_name), |after, limit| {
        let (store, acme) = (&store, &acme);
        async move {
            let page = store.keys(acme, after.as_ref(), limit).await.unwrap();
            assert!(page.iter().all(|key| key.tenant == *acme));
            page.into_iter().map(|key| key.name).collect()
        }
    })
    .await;
    assert_eq!(store.keys(&tenant_id("nobody"), None, 10).await.unwrap(), []);
}

// ---- data keys ----

pub(crate) async fn data_keys_come_in_pages_in_the_order_of_their_ids<F: Fixture>() {
    let (_fixture, store) = with_acme::<F>().await;
    store.insert_key(&key("acme", "other")).await.unwrap();
    let (acme, default) = (tenant_id("acme"), key_name("default"));
    assert_eq!(store.deks(&acme, &default, None, 10).await.unwrap(), []);

    let forms = vec![form("a", b"1"), form("b", b"2"), form("c", b"3")];
    for n in [3_u64, 1, 0xff, 2, 0x100] {
        let bound = scope("acme", "default", &[("n", &n.to_string())]);
        store.activate_dek(None, &active(n, &bound), &forms).await.unwrap();
    }
    store.activate_dek(None, &active(50, &scope("acme", "other", &[])), &forms).await.unwrap();

    assert_pages(&[1, 2, 3, 0xff, 0x100].map(dek_id), |after, limit| {
        let (store, acme, default, forms) = (&store, &acme, &default, &forms);
        async move {
            let page = store.deks(acme, default, after, limit).await.unwrap();
            // The limit counts data keys, not wrapped forms.
            assert!(page.iter().all(|stored| stored.wrapped == *forms));
            page.into_iter().map(|stored| stored.dek.id).collect()
        }
    })
    .await;
    let after_none_that_is_there = store.deks(&acme, &default, Some(dek_id(9)), 1).await.unwrap();
    assert_eq!(after_none_that_is_there[0].dek.id, dek_id(0xff));
    assert_eq!(store.dek(dek_id(9)).await.unwrap(), None);
}

pub(crate) async fn activation_takes_a_free_place_and_retires_the_predecessor_it_names<F: Fixture>() {
    let (_fixture, store) = with_acme::<F>().await;
    let scope = default_scope();
    assert_eq!(store.active_dek(&scope).await.unwrap(), None);

    // The first.
    let first = store.activate_dek(None, &active(1, &scope), &one_form()).await.unwrap();
    assert_eq!(first, Activation::Done);
    let stored = StoredDek { dek: active(1, &scope), wrapped: one_form() };
    assert_eq!(store.active_dek(&scope).await.unwrap(), Some(stored.clone()));

    // Its place is taken, for one who knows of none, of another, or who tries again.
    for (predecessor, n) in [(None, 2), (Some(dek_id(9)), 2), (None, 1)] {
        let taken = store.activate_dek(predecessor, &active(n, &scope), &one_form()).await.unwrap();
        assert_eq!(taken, Activation::Taken(Box::new(stored.clone())));
    }
    assert_eq!(store.dek(dek_id(2)).await.unwrap(), None);

    // It is followed by the one that names it.
    let followed = store.activate_dek(Some(dek_id(1)), &active(3, &scope), &one_form()).await.unwrap();
    assert_eq!(followed, Activation::Done);
    let retired = DekRecord { state: DekState::Retired, retired_at: Some(at(3)), ..active(1, &scope) };
    assert_eq!(store.dek(dek_id(1)).await.unwrap().unwrap(), StoredDek { dek: retired, wrapped: one_form() });
    assert_eq!(store.active_dek(&scope).await.unwrap().unwrap().dek, active(3, &scope));

    // An operator retires it: the place is free, also for one who names the one that is gone.
    store.set_dek_state(dek_id(3), DekState::Active, DekState::Retired, at(7)).await.unwrap();
    assert_eq!(store.active_dek(&scope).await.unwrap(), None);
    let free = store.activate_dek(Some(dek_id(3)), &active(4, &scope), &one_form()).await.unwrap();
    assert_eq!(free, Activation::Done);
    let retired_once = store.dek(dek_id(3)).await.unwrap().unwrap().dek.retired_at;
    assert_eq!(retired_once, Some(at(7)));
}

pub(crate) async fn scopes_do_not_touch_each_other<F: Fixture>() {
    let (_fixture, store) = with_acme::<F>().await;
    store.insert_key(&key("acme", "other")).await.unwrap();
    store.insert_tenant(&tenant("beta")).await.unwrap();
    store.insert_key(&key("beta", "default")).await.unwrap();
    let scopes = [
        scope("acme", "default", &[]),
        scope("acme", "default", &[("a", "1")]),
        scope("acme", "default", &[("a", "1"), ("b", "")]),
        scope("acme", "other", &[("a", "1")]),
        scope("beta", "default", &[("a", "1")]),
    ];
    for (n, scope) in (1..).zip(&scopes) {
        assert_eq!(store.active_dek(scope).await.unwrap(), None);
        let done = store.activate_dek(None, &active(n, scope), &one_form()).await.unwrap();
        assert_eq!(done, Activation::Done);
        let waits = store.insert_next_dek(&next(n + 10, scope), &one_form()).await.unwrap();
        assert_eq!(waits, Activation::Done);
    }
    store.promote_next_dek(&scopes[1], dek_id(2), at(1)).await.unwrap();
    for (scope, n) in scopes.iter().zip([1, 12, 3, 4, 5]) {
        assert_eq!(store.active_dek(scope).await.unwrap().unwrap().dek.id, dek_id(n));
    }
    assert_eq!(store.active_dek(&scope("acme", "default", &[("b", "1")])).await.unwrap(), None);
}

pub(crate) async fn a_refused_activation_changes_nothing<F: Fixture>() {
    let (_fixture, store) = with_dek::<F>().await;
    let here = default_scope();
    let elsewhere = scope("acme", "default", &[("a", "1")]);
    store.activate_dek(None, &active(7, &elsewhere), &one_form()).await.unwrap();
    let before = store.deks(&here.tenant, &here.key, None, 100).await.unwrap();

    let one = Some(dek_id(1));
    // The id is taken, in this scope or another.
    assert_conflict(store.activate_dek(one, &active(1, &here), &one_form()).await);
    assert_conflict(store.activate_dek(one, &active(7, &here), &one_form()).await);
    assert_conflict(store.insert_next_dek(&next(7, &here), &one_form()).await);
    // Nobody could open what it seals.
    assert_conflict(store.activate_dek(one, &active(2, &here), &[]).await);
    assert_conflict(store.insert_next_dek(&next(2, &here), &[]).await);
    // Not in the state that it is to take.
    assert_conflict(store.activate_dek(one, &next(2, &here), &one_form()).await);
    assert_conflict(store.insert_next_dek(&active(2, &here), &one_form()).await);
    // No such key, no such tenant.
    for scope in [scope("acme", "nokey", &[]), scope("nobody", "default", &[])] {
        assert_missing(store.activate_dek(None, &active(2, &scope), &one_form()).await);
        assert_missing(store.insert_next_dek(&next(2, &scope), &one_form()).await);
        assert_eq!(store.promote_next_dek(&scope, dek_id(2), at(1)).await.unwrap(), None);
    }
    assert_eq!(store.deks(&here.tenant, &here.key, None, 100).await.unwrap(), before);
    assert_eq!(store.dek(dek_id(2)).await.unwrap(), None);
}

pub(crate) async fn of_racing_activations_one_wins_and_the_others_get_the_winner<F: Fixture>() {
    let (fixture, here) = with_acme::<F>().await;
    let there = fixture.open().await;
    let mut predecessor = None;
    for round in 1..=4_u64 {
        let mut tasks = JoinSet::new();
        for n in 0..16 {
            let store = if n % 2 == 0 { here.clone() } else { there.clone() };
            let dek = active(round * 100 + n, &default_scope());
            tasks.spawn(async move {
                let outcome = store.activate_dek(predecessor, &dek, &one_form()).await.unwrap();
                (dek.id, outcome)
            });
        }
        let outcomes = tasks.join_all().await;
        let winners: Vec<_> =
            outcomes.iter().filter(|(_, outcome)| *outcome == Activation::Done).map(|(id, _)| *id).collect();
        assert_eq!(winners.len(), 1, "round {round}: {winners:?}");
        let winner = here.active_dek(&default_scope()).await.unwrap().unwrap();
        assert_eq!(winner.dek.id, winners[0]);
        for (id, outcome) in outcomes.into_iter().filter(|(id, _)| *id != winners[0]) {
            assert_eq!(outcome, Activation::Taken(Box::new(winner.clone())));
            assert_eq!(there.dek(id).await.unwrap(), None, "what lost was not written");
        }
        if let Some(before) = predecessor {
            assert_eq!(there.dek(before).await.unwrap().unwrap().dek.state, DekState::Retired);
        }
        predecessor = Some(winners[0]);
    }
}

pub(crate) async fn one_data_key_waits_for_each_scope<F: Fixture>() {
    let (_fixture, store) = with_dek::<F>().await;
    let scope = default_scope();
    let waits = store.insert_next_dek(&next(2, &scope), &one_form()).await.unwrap();
    assert_eq!(waits, Activation::Done);
    let stored = StoredDek { dek: next(2, &scope), wrapped: one_form() };
    for n in [3, 2] {
        let taken = store.insert_next_dek(&next(n, &scope), &one_form()).await.unwrap();
        assert_eq!(taken, Activation::Taken(Box::new(stored.clone())));
    }
    assert_eq!(store.dek(dek_id(3)).await.unwrap(), None);
    assert_eq!(store.next_dek(&scope).await.unwrap().as_ref(), Some(&stored));
    let elsewhere = scope_of_its_own(2);
    assert_eq!(store.next_dek(&elsewhere).await.unwrap(), None);
    assert_eq!(store.active_dek(&scope).await.unwrap().unwrap().dek.id, dek_id(1), "the active one stays");
    assert_eq!(store.dek(dek_id(2)).await.unwrap(), Some(stored));
}

pub(crate) async fn promotion_follows_the_predecessor_it_names<F: Fixture>() {
    let (_fixture, store) = with_dek::<F>().await;
    let scope = default_scope();
    let promote = async |predecessor, ms| {
        let promoted = store.promote_next_dek(&scope, dek_id(predecessor), at(ms)).await.unwrap();
        promoted.map(|stored| stored.dek)
    };

    // None waits.
    assert_eq!(promote(1, 50).await, Some(active(1, &scope)));
    store.insert_next_dek(&next(2, &scope), &one_form()).await.unwrap();
    // Another is active than the one named.
    assert_eq!(promote(9, 50).await, Some(active(1, &scope)));
    assert_eq!(state(&*store, 2).await, DekState::Next);
    // It follows, and waits no more.
    let followed = DekRecord { state: DekState::Active, activated_at: Some(at(51)), ..next(2, &scope) };
    assert_eq!(promote(1, 51).await, Some(followed.clone()));
    assert_eq!(store.next_dek(&scope).await.unwrap(), None);
    let retired = DekRecord { state: DekState::Retired, retired_at: Some(at(51)), ..active(1, &scope) };
    assert_eq!(store.dek(dek_id(1)).await.unwrap().unwrap().dek, retired);
    assert_eq!(store.active_dek(&scope).await.unwrap().unwrap().dek, followed);
    // Asked again, nothing changes, also when another waits by now.
    assert_eq!(promote(1, 52).await, Some(followed.clone()));
    store.insert_next_dek(&next(3, &scope), &one_form()).await.unwrap();
    assert_eq!(promote(1, 53).await, Some(followed));
    // None is active: the waiting one takes the place.
    store.set_dek_state(dek_id(2), DekState::Active, DekState::Revoked, at(54)).await.unwrap();
    assert_eq!(promote(2, 55).await.map(|dek| (dek.id, dek.activated_at)), Some((dek_id(3), Some(at(55)))));
    assert_eq!(state(&*store, 2).await, DekState::Revoked);
    // None is active, none waits.
    store.set_dek_state(dek_id(3), DekState::Active, DekState::Retired, at(56)).await.unwrap();
    assert_eq!(promote(3, 57).await, None);
}

pub(crate) async fn of_racing_promotions_one_promotes_and_all_get_the_same<F: Fixture>() {
    let (fixture, here) = with_dek::<F>().await;
    let there = fixture.open().await;
    let scope = default_scope();
    here.insert_next_dek(&next(2, &scope), &one_form()).await.unwrap();
    let mut tasks = JoinSet::new();
    for n in 0..16 {
        let store = if n % 2 == 0 { here.clone() } else { there.clone() };
        let scope = scope.clone();
        tasks.spawn(async move {
            let promoted = store.promote_next_dek(&scope, dek_id(1), at(100 + n)).await.unwrap().unwrap();
            // Whoever comes first puts the next one in line; it must not be promoted by those who come later.
            store.insert_next_dek(&next(3, &scope), &one_form()).await.unwrap();
            promoted
        });
    }
    let promoted = tasks.join_all().await;
    assert!(promoted.iter().all(|stored| *stored == promoted[0]));
    assert_eq!(promoted[0].dek.id, dek_id(2));
    assert_eq!(state(&*here, 1).await, DekState::Retired);
    assert_eq!(state(&*here, 3).await, DekState::Next);
}

fn scope_of_its_own(n: u64) -> DekScope {
    scope("acme", "default", &[("n", &n.to_string())])
}

/// Makes data key `n` in a scope of its own and walks it to a state.
async fn dek_in(store: &dyn Store, n: u64, wanted: DekState) {
    let scope = scope_of_its_own(n);
    if wanted == DekState::Next {
        store.insert_next_dek(&next(n, &scope), &one_form()).await.unwrap();
        return;
    }
    store.activate_dek(None, &active(n, &scope), &one_form()).await.unwrap();
    if wanted != DekState::Active {
        store.set_dek_state(dek_id(n), DekState::Active, wanted, at(500)).await.unwrap();
    }
}

pub(crate) async fn every_step_between_states_is_allowed_or_refused_as_the_table_says<F: Fixture>() {
    use DekState::{Active, Destroyed, Next, Retired, Revoked};
    const ALLOWED: [(DekState, DekState); 11] = [
        (Next, Active),
        (Next, Retired),
        (Next, Revoked),
        (Next, Destroyed),
        (Active, Retired),
        (Active, Revoked),
        (Active, Destroyed),
        (Retired, Revoked),
        (Retired, Destroyed),
        (Revoked, Retired),
        (Revoked, Destroyed),
    ];
    let (_fixture, store) = with_acme::<F>().await;
    assert_missing(store.set_dek_state(dek_id(1), Active, Retired, at(1)).await);
    let mut n = 0;
    for from in DekState::ALL {
        for to in DekState::ALL {
            n += 1;
            dek_in(&*store, n, from).await;
            let before = store.dek(dek_id(n)).await.unwrap().unwrap();
            for wrong in DekState::ALL.into_iter().filter(|wrong| *wrong != from) {
                assert_conflict(store.set_dek_state(dek_id(n), wrong, to, at(900)).await);
            }
            assert_eq!(store.dek(dek_id(n)).await.unwrap().unwrap(), before);

            let result = store.set_dek_state(dek_id(n), from, to, at(900)).await;
            let after = store.dek(dek_id(n)).await.unwrap().unwrap().dek;
            if !ALLOWED.contains(&(from, to)) {
                assert_conflict(result);
                assert_eq!(after, before.dek, "{from:?} to {to:?}");
                continue;
            }
            result.unwrap();
            let before = before.dek;
            let now = Some(at(900));
            let ends = from == Active || to == Retired;
            let expected = DekRecord {
                state: to,
                activated_at: if to == Active { now } else { before.activated_at },
                retired_at: if ends { before.retired_at.or(now) } else { before.retired_at },
                revoked_at: match to {
                    Revoked => now,
                    Destroyed => before.revoked_at,
                    _ => None,
                },
                destroyed_at: (to == Destroyed).then_some(at(900)),
                ..before
            };
            assert_eq!(after, expected, "{from:?} to {to:?}");
        }
    }
}

pub(crate) async fn a_data_key_that_is_taken_back_is_no_longer_revoked<F: Fixture>() {
    let (_fixture, store) = with_dek::<F>().await;
    let set = async |from, to, ms| store.set_dek_state(dek_id(1), from, to, at(ms)).await.unwrap();
    set(DekState::Active, DekState::Revoked, 10).await;
    assert_eq!(store.active_dek(&default_scope()).await.unwrap(), None);
    set(DekState::Revoked, DekState::Retired, 20).await;
    let stored = store.dek(dek_id(1)).await.unwrap().unwrap();
    assert_eq!((stored.dek.revoked_at, stored.dek.retired_at), (None, Some(at(10))));
    assert_eq!(stored.wrapped, one_form(), "a revoked data key keeps its wrapped forms");
}

pub(crate) async fn what_is_destroyed_has_no_wrapped_form_and_gets_none<F: Fixture>() {
    let (fixture, store) = with_dek::<F>().await;
    store.put_wrapped(dek_id(1), &form("second", b"2")).await.unwrap();
    store.set_dek_state(dek_id(1), DekState::Active, DekState::Revoked, at(10)).await.unwrap();
    store.set_dek_state(dek_id(1), DekState::Revoked, DekState::Destroyed, at(20)).await.unwrap();

    // A rewrapping that was under way.
    assert_conflict(store.put_wrapped(dek_id(1), &form("second", b"3")).await);
    assert_conflict(store.put_wrapped(dek_id(1), &form("third", b"3")).await);
    store.remove_wrapped(dek_id(1), &kek("main")).await.unwrap();
    store.close().await;
    let stored = fixture.open().await.dek(dek_id(1)).await.unwrap().unwrap();
    assert_eq!(stored.wrapped, []);
    assert_eq!(stored.dek.state, DekState::Destroyed);
    assert_eq!((stored.dek.revoked_at, stored.dek.destroyed_at), (Some(at(10)), Some(at(20))));
}

pub(crate) async fn wrapped_forms_are_replaced_and_removed_but_never_the_last<F: Fixture>() {
    let (_fixture, store) = with_dek::<F>().await;
    let forms = async || store.dek(dek_id(1)).await.unwrap().unwrap().wrapped;
    assert_missing(store.put_wrapped(dek_id(9), &form("main", b"1")).await);
    store.remove_wrapped(dek_id(9), &kek("main")).await.unwrap();

    let newer =
        WrappedRecord { material: Some("m2".to_owned()), wrapped_at: at(77), ..form("main", b"newer") };
    store.put_wrapped(dek_id(1), &newer).await.unwrap();
    assert_eq!(forms().await, std::slice::from_ref(&newer));
    for name in ["z", "a", "b"] {
        store.put_wrapped(dek_id(1), &form(name, name.as_bytes())).await.unwrap();
    }
    assert_eq!(forms().await, [form("a", b"a"), form("b", b"b"), newer.clone(), form("z", b"z")]);

    store.remove_wrapped(dek_id(1), &kek("nothere")).await.unwrap();
    for name in ["b", "main", "b", "z"] {
        store.remove_wrapped(dek_id(1), &kek(name)).await.unwrap();
    }
    assert_eq!(forms().await, [form("a", b"a")]);
    assert_conflict(store.remove_wrapped(dek_id(1), &kek("a")).await);
    store.remove_wrapped(dek_id(1), &kek("z")).await.unwrap();
    assert_eq!(forms().await, [form("a", b"a")]);
}

pub(crate) async fn usage_adds_up_and_its_times_never_go_back<F: Fixture>() {
    let (_fixture, store) = with_dek::<F>().await;
    let elsewhere = scope("acme", "default", &[("a", "1")]);
    store.activate_dek(None, &active(2, &elsewhere), &one_form()).await.unwrap();
    let used = |n, messages, bytes, sealed: Option<i64>, opened: Option<i64>| Usage {
        id: dek_id(n),
        messages,
        bytes,
        last_sealed_at: sealed.map(at),
        last_opened_at: opened.map(at),
    };
    let seen = async |n| {
        let dek = store.dek(dek_id(n)).await.unwrap().unwrap().dek;
        let ms = |at: Option<Timestamp>| at.map(Timestamp::unix_ms);
        (dek.messages, dek.bytes, ms(dek.last_sealed_at), ms(dek.last_opened_at))
    };
    store.add_usage(&[]).await.unwrap();
    assert_eq!(seen(1).await, (0, 0, None, None));

    store.add_usage(&[used(1, 2, 300, Some(60), None), used(2, 5, 5, None, Some(70))]).await.unwrap();
    assert_eq!(seen(1).await, (2, 300, Some(60), None));
    assert_eq!(seen(2).await, (5, 5, None, Some(70)));

    // An unknown one in between does not keep the others from being counted, and is not made.
    store
        .add_usage(&[
            used(1, 1, 1, Some(59), Some(50)),
            used(9, 1, 1, None, None),
            used(2, 1, 0, None, Some(69)),
        ])
        .await
        .unwrap();
    assert_eq!(seen(1).await, (3, 301, Some(60), Some(50)));
    assert_eq!(seen(2).await, (6, 5, None, Some(70)));
    assert_eq!(store.dek(dek_id(9)).await.unwrap(), None);

    // The same twice in one flush; times move on; no time leaves the time.
    store.add_usage(&[used(1, 1, 10, Some(80), None), used(1, 1, 10, None, Some(81))]).await.unwrap();
    store.add_usage(&[used(1, 0, 0, None, None)]).await.unwrap();
    assert_eq!(seen(1).await, (5, 321, Some(80), Some(81)));
    assert_eq!(state(&*store, 1).await, DekState::Active);
}

pub(crate) async fn racing_usage_is_not_lost<F: Fixture>() {
    let (fixture, here) = with_dek::<F>().await;
    let there = fixture.open().await;
    let mut tasks = JoinSet::new();
    for n in 0..24 {
        let store = if n % 2 == 0 { here.clone() } else { there.clone() };
        let usage = Usage {
            id: dek_id(1),
            messages: 1,
            bytes: 10,
            last_sealed_at: Some(at(n)),
            last_opened_at: None,
        };
        tasks.spawn(async move { store.add_usage(&[usage]).await.unwrap() });
    }
    tasks.join_all().await;
    let dek = here.dek(dek_id(1)).await.unwrap().unwrap().dek;
    assert_eq!((dek.messages, dek.bytes, dek.last_sealed_at), (24, 240, Some(at(23))));
}

// ---- API keys ----

pub(crate) async fn an_api_key_is_inserted_whole_or_not_at_all<F: Fixture>() {
    let (_fixture, store) = with_acme::<F>().await;
    store.insert_tenant(&tenant("beta")).await.unwrap();
    assert!(store.api_key("k1").await.unwrap().is_none());

    assert_missing(store.insert_api_key(&api_key("k1", &["acme", "nobody"])).await);
    assert!(store.api_key("k1").await.unwrap().is_none());
    assert!(store.api_keys(None, None, 10).await.unwrap().is_empty());

    let given = ApiKeyRecord {
        verbs: vec![Verb::Rewrap, Verb::Encrypt, Verb::Rewrap],
        ..api_key("k1", &["beta", "acme", "beta"])
    };
    store.insert_api_key(&given).await.unwrap();
    assert_conflict(store.insert_api_key(&api_key("k1", &["acme"])).await);
    let expected =
        ApiKeyRecord { verbs: vec![Verb::Encrypt, Verb::Rewrap], ..api_key("k1", &["acme", "beta"]) };
    assert!(store.api_key("k1").await.unwrap().is_some_and(|found| found == expected));

    let bare = ApiKeyRecord { verbs: vec![], name: String::new(), ..api_key("k2", &[]) };
    store.insert_api_key(&bare).await.unwrap();
    assert!(store.api_key("k2").await.unwrap().is_some_and(|found| found == bare));
    assert!(store.api_key("").await.unwrap().is_none());
    assert!(store.api_key("K1").await.unwrap().is_none());
}

pub(crate) async fn api_keys_come_in_pages_all_of_them_or_one_tenants<F: Fixture>() {
    let (_fixture, store) = with_acme::<F>().await;
    store.insert_tenant(&tenant("beta")).await.unwrap();
    store.insert_tenant(&tenant("idle")).await.unwrap();
    let held: [(&str, &[&str]); 6] = [
        ("d", &["acme"]),
        ("B", &["acme", "beta"]),
        ("a", &[]),
        ("c", &["beta"]),
        ("C", &["acme", "beta"]),
        ("e", &["acme"]),
    ];
    for (id, tenants) in held {
        store.insert_api_key(&api_key(id, tenants)).await.unwrap();
    }
    let cases: [(Option<&str>, &[&str]); 5] = [
        (None, &["B", "C", "a", "c", "d", "e"]),
        (Some("acme"), &["B", "C", "d", "e"]),
        (Some("beta"), &["B", "C", "c"]),
        (Some("idle"), &[]),
        (Some("nobody"), &[]),
    ];
    for (tenant, ids) in cases {
        let tenant = tenant.map(tenant_id);
        let ids: Vec<String> = ids.iter().map(|id| (*id).to_owned()).collect();
        assert_pages(&ids, |after, limit| {
            let (store, tenant) = (&store, tenant.as_ref());
            async move {
                let page = store.api_keys(tenant, after.as_deref(), limit).await.unwrap();
                for found in &page {
                    // All its tenants, not only the one that was asked for.
                    let (_, expected) = held.iter().find(|(id, _)| *id == found.id).unwrap();
                    assert!(*found == api_key(&found.id, expected));
                }
                page.into_iter().map(|key| key.id).collect()
            }
        })
        .await;
    }
}

pub(crate) async fn a_revocation_stands<F: Fixture>() {
    let (fixture, store) = with_acme::<F>().await;
    store.insert_api_key(&api_key("k1", &["acme"])).await.unwrap();
    store.insert_api_key(&api_key("k2", &["acme"])).await.unwrap();
    assert_missing(store.revoke_api_key("k3", at(5)).await);
    for ms in [50, 60, 40] {
        store.revoke_api_key("k1", at(ms)).await.unwrap();
    }
    store.close().await;
    let store = fixture.open().await;
    let expected = ApiKeyRecord { revoked_at: Some(at(50)), ..api_key("k1", &["acme"]) };
    assert!(store.api_key("k1").await.unwrap().is_some_and(|found| found == expected));
    assert!(store.api_key("k2").await.unwrap().is_some_and(|found| found.revoked_at.is_none()));
}

pub(crate) async fn an_api_key_loses_a_tenant_and_keeps_the_others<F: Fixture>() {
    let (fixture, store) = with_acme::<F>().await;
    store.insert_tenant(&tenant("beta")).await.unwrap();
    store.insert_api_key(&api_key("k1", &["acme", "beta"])).await.unwrap();
    store.insert_api_key(&api_key("k2", &["acme"])).await.unwrap();
    assert_missing(store.release_api_key("k3", &tenant_id("acme")).await);
    assert_missing(store.release_api_key("k2", &tenant_id("beta")).await);
    store.release_api_key("k1", &tenant_id("acme")).await.unwrap();
    assert_missing(store.release_api_key("k1", &tenant_id("acme")).await);
    store.close().await;
    let store = fixture.open().await;
    assert!(store.api_key("k1").await.unwrap().is_some_and(|found| found == api_key("k1", &["beta"])));
    assert!(store.api_key("k2").await.unwrap().is_some_and(|found| found == api_key("k2", &["acme"])));
    let left = store.api_keys(Some(&tenant_id("acme")), None, 10).await.unwrap();
    assert!(left.iter().map(|key| key.id.as_str()).eq(["k2"]));
}

pub(crate) async fn keys_and_usable_api_keys_are_counted_for_each_tenant<F: Fixture>() {
    let (_fixture, store) = with_acme::<F>().await;
    store.insert_tenant(&tenant("beta")).await.unwrap();
    store.insert_key(&key("acme", "second")).await.unwrap();
    for (id, tenants, expires_at) in [
        ("k1", &["acme", "beta"][..], None),
        ("k2", &["acme"], Some(at(60))),
        ("k3", &["acme"], Some(at(61))),
        ("k4", &["acme"], None),
    ] {
        store.insert_api_key(&ApiKeyRecord { expires_at, ..api_key(id, tenants) }).await.unwrap();
    }
    store.revoke_api_key("k4", at(5)).await.unwrap();
    for (tenant, keys, usable) in [("acme", 2, 2), ("beta", 0, 1), ("nobody", 0, 0)] {
        let tenant = tenant_id(tenant);
        assert_eq!(store.count_keys(&tenant).await.unwrap(), keys);
        assert_eq!(store.count_api_keys(&tenant, at(60)).await.unwrap(), usable);
    }
}

// ---- changes ----

/// Whose records have changed since the last call, in the order of the changes.
async fn changed(store: &dyn Store, seen: &mut u64) -> Vec<Option<TenantId>> {
    let changes = store.changes(*seen).await.unwrap();
    for change in &changes {
        assert!(change.seq > *seen, "{changes:?} after {seen}");
        *seen = change.seq;
    }
    changes.into_iter().map(|change| change.tenant).collect()
}

/// Data key `n`, made at the moment at which [`form`] wraps it.
fn made(n: u64, scope: &DekScope, state: DekState) -> DekRecord {
    DekRecord::new(dek_id(n), scope.clone(), state, form("main", b"").wrapped_at)
}

/// Whoever looks while a tenant is made, or after it was refused, sees it with its key or not at all.
pub(crate) async fn a_tenant_and_its_first_key_come_together_or_not_at_all<F: Fixture>() {
    let fixture = F::fresh().await;
    let (store, there) = (fixture.open().await, fixture.open().await);
    let (acme, name) = (tenant_id("acme"), KeyName::default());
    store.insert_tenant_with_key(&tenant("acme"), &key("acme", "default")).await.unwrap();
    assert_eq!(there.tenant(&acme).await.unwrap(), Some(tenant("acme")));
    assert_eq!(there.key(&acme, &name).await.unwrap(), Some(key("acme", "default")));
    assert_conflict(store.insert_tenant_with_key(&tenant("acme"), &key("acme", "other")).await);
    assert_eq!(
        there.keys(&acme, None, 10).await.unwrap().len(),
        1,
        "the key of a refused tenant is not there"
    );
    // A key that cannot be added takes its tenant with it.
    assert_conflict(store.insert_tenant_with_key(&tenant("beta"), &key("acme", "default")).await);
    assert_eq!(there.tenant(&tenant_id("beta")).await.unwrap(), None);
}

pub(crate) async fn changes_tell_whose_records_to_read_again<F: Fixture>() {
    let fixture = F::fresh().await;
    let (store, there) = (fixture.open().await, fixture.open().await);
    let (acme, beta) = (Some(tenant_id("acme")), Some(tenant_id("beta")));
    let here = default_scope();
    let mut seen = 0;
    assert_eq!(changed(&*there, &mut seen).await, []);

    store.insert_tenant(&tenant("acme")).await.unwrap();
    assert_eq!(changed(&*there, &mut seen).await, std::slice::from_ref(&acme));
    store.insert_key(&key("acme", "default")).await.unwrap();
    assert_eq!(changed(&*there, &mut seen).await, std::slice::from_ref(&acme));
    store.update_key(&key("acme", "default")).await.unwrap();
    assert_eq!(changed(&*there, &mut seen).await, std::slice::from_ref(&acme));
    store.update_tenant(&tenant("acme")).await.unwrap();
    assert_eq!(changed(&*there, &mut seen).await, std::slice::from_ref(&acme));

    // The predecessor's state is what changes.
    store.activate_dek(None, &made(1, &here, DekState::Active), &one_form()).await.unwrap();
    assert_eq!(changed(&*there, &mut seen).await, []);
    let two = made(2, &here, DekState::Active);
    store.activate_dek(Some(dek_id(1)), &two, &one_form()).await.unwrap();
    assert_eq!(changed(&*there, &mut seen).await, std::slice::from_ref(&acme));
    store.insert_next_dek(&made(3, &here, DekState::Next), &one_form()).await.unwrap();
    assert_eq!(changed(&*there, &mut seen).await, []);
    store.promote_next_dek(&here, dek_id(2), at(6)).await.unwrap();
    assert_eq!(changed(&*there, &mut seen).await, std::slice::from_ref(&acme));
    let later = WrappedRecord { wrapped_at: at(90), ..form("second", b"2") };
    for form in [&later, &later] {
        store.put_wrapped(dek_id(3), form).await.unwrap();
        assert_eq!(changed(&*there, &mut seen).await, std::slice::from_ref(&acme));
    }
    store.remove_wrapped(dek_id(3), &kek("second")).await.unwrap();
    assert_eq!(changed(&*there, &mut seen).await, std::slice::from_ref(&acme));
    for (from, to) in [
        (DekState::Active, DekState::Revoked),
        (DekState::Revoked, DekState::Retired),
        (DekState::Retired, DekState::Destroyed),
    ] {
        store.set_dek_state(dek_id(3), from, to, at(9)).await.unwrap();
        assert_eq!(changed(&*there, &mut seen).await, std::slice::from_ref(&acme));
    }

    store.insert_api_key(&api_key("k1", &["acme"])).await.unwrap();
    assert_eq!(changed(&*there, &mut seen).await, [None]);
    store.revoke_api_key("k1", at(9)).await.unwrap();
    assert_eq!(changed(&*there, &mut seen).await, [None]);
    store.release_api_key("k1", &tenant_id("acme")).await.unwrap();
    assert_eq!(changed(&*there, &mut seen).await, [None]);

    // Each stands once, with its latest change; whoever comes late sees them all, also after reopening.
    store.insert_tenant(&tenant("beta")).await.unwrap();
    store.insert_key(&key("beta", "default")).await.unwrap();
    store.insert_key(&key("acme", "other")).await.unwrap();
    store.insert_key(&key("beta", "other")).await.unwrap();
    assert_eq!(changed(&*there, &mut seen).await, [acme.clone(), beta.clone()]);
    let whole = [None, acme, beta];
    assert_eq!(changed(&*there, &mut 0).await, whole);
    store.close().await;
    there.close().await;
    let store = fixture.open().await;
    assert_eq!(changed(&*store, &mut 0).await, whole);
    assert_eq!(changed(&*store, &mut seen).await, []);
    assert_eq!(store.changes(u64::MAX).await.unwrap(), []);
    store.insert_key(&key("acme", "third")).await.unwrap();
    assert_eq!(changed(&*store, &mut seen).await, [Some(tenant_id("acme"))]);
}

pub(crate) async fn what_changes_nothing_is_no_change<F: Fixture>() {
    let (_fixture, store) = with_dek::<F>().await;
    store.insert_api_key(&api_key("k1", &["acme"])).await.unwrap();
    let before = store.changes(0).await.unwrap();
    let here = default_scope();

    assert_conflict(store.insert_tenant(&tenant("acme")).await);
    assert_conflict(store.update_tenant(&TenantRecord { version: 9, ..tenant("acme") }).await);
    assert_conflict(store.update_key(&KeyRecord { version: 9, ..key("acme", "default") }).await);
    assert_missing(store.insert_key(&key("nobody", "default")).await);
    store.activate_dek(None, &active(2, &here), &one_form()).await.unwrap();
    assert_conflict(store.activate_dek(Some(dek_id(1)), &active(1, &here), &one_form()).await);
    store.promote_next_dek(&here, dek_id(1), at(9)).await.unwrap();
    assert_conflict(store.set_dek_state(dek_id(1), DekState::Retired, DekState::Revoked, at(9)).await);
    assert_conflict(store.remove_wrapped(dek_id(1), &kek("main")).await);
    store.remove_wrapped(dek_id(1), &kek("other")).await.unwrap();
    assert_conflict(store.insert_api_key(&api_key("k1", &[])).await);
    assert_missing(store.insert_api_key(&api_key("k2", &["nobody"])).await);
    assert_missing(store.revoke_api_key("k2", at(9)).await);
    assert_missing(store.release_api_key("k1", &tenant_id("nobody")).await);
    // Usage is flushed every few seconds, and must not make everybody read everything again.
    let usage = Usage {
        id: dek_id(1),
        messages: 1,
        bytes: 1,
        last_sealed_at: Some(at(9)),
        last_opened_at: Some(at(9)),
    };
    store.add_usage(&[usage]).await.unwrap();
    assert_eq!(store.changes(0).await.unwrap(), before);
}

// ---- denials ----

/// Which KEKs have been denied since the last call, in the order of the denials.
async fn denied(store: &dyn Store, seen: &mut u64) -> Vec<String> {
    let denials = store.denials(*seen).await.unwrap();
    for denial in &denials {
        assert!(denial.seq > *seen, "{denials:?} after {seen}");
        *seen = denial.seq;
    }
    denials.into_iter().map(|denial| denial.kek.to_string()).collect()
}

pub(crate) async fn denials_are_found_by_their_numbers_and_forgotten_in_time_but_for_the_newest<
    F: Fixture,
>() {
    let fixture = F::fresh().await;
    let (store, there) = (fixture.open().await, fixture.open().await);
    let (one, two, three) = (kek("one"), kek("two"), kek("three"));
    let never = at(0);
    let mut seen = 0;
    assert_eq!(denied(&*there, &mut seen).await, [""; 0]);
    let first = store.note_denial(&one, at(10), never).await.unwrap();
    assert_eq!(denied(&*there, &mut seen).await, ["local:one"]);
    assert_eq!(seen, first);
    store.note_denial(&two, at(20), never).await.unwrap();
    // Denied once more: it is news again, and stands once.
    let again = store.note_denial(&one, at(30), never).await.unwrap();
    assert_eq!(denied(&*there, &mut seen).await, ["local:two", "local:one"]);
    let latest = KekDenial { seq: again, kek: one.clone(), heard_at: at(30) };
    assert_eq!(there.denials(again - 1).await.unwrap(), [latest]);

    // At the very edge nothing is forgotten; a moment later it is.
    store.note_denial(&three, at(40), at(20)).await.unwrap();
    assert_eq!(denied(&*there, &mut 0).await, ["local:two", "local:one", "local:three"]);
    store.note_denial(&three, at(41), at(21)).await.unwrap();
    assert_eq!(denied(&*there, &mut 0).await, ["local:one", "local:three"]);
    // However old: were the newest forgotten, the numbers would start again, and who has seen it would miss the next.
    store.note_denial(&two, at(50), at(9_000)).await.unwrap();
    assert_eq!(denied(&*there, &mut 0).await, ["local:two"]);
    assert_eq!(denied(&*there, &mut seen).await, ["local:two"]);
    store.close().await;
    there.close().await;
    let store = fixture.open().await;
    assert!(store.note_denial(&one, at(60), at(9_000)).await.unwrap() > seen);
    assert_eq!(denied(&*store, &mut seen).await, ["local:one"]);
}
