//! What every [`RotationStore`] must do: the contract of the trait, line by line. A store joins with a
//! [`RotationFixture`] and `rotation_contract!(ItsFixture);`.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use keyfold::clock::Timestamp;
use keyfold::store::{
    DekState, Fence, FencedChange, JobKind, JobRecord, JobState, KekMaterial, Registry, ShredRecord, Status,
    StoreError, SweepRecord, Swept, Target,
};
use keyfold::tenant::{Kek, KekRing};
use tokio::task::JoinSet;

use crate::store_contract::{
    Fixture, active, at, dek_id, form, kek, key, key_name, next, scope, tenant, tenant_id,
};

/// A place where whole registries of one kind can be made.
#[async_trait]
pub(crate) trait RotationFixture: Fixture {
    /// A handle on it, as another process has it.
    async fn registry(&self) -> Arc<dyn Registry>;
}

macro_rules! rotation_contract {
    ($fixture:ty) => {
        $crate::rotation_contract::rotation_contract!($fixture:
            a_lease_has_one_holder_and_each_new_one_a_larger_token
            of_racing_takers_of_a_lease_one_gets_it
            an_older_token_changes_nothing_whatever_the_clock_says
            fenced_changes_are_made_together_or_not_at_all
            what_is_new_or_has_changed_is_due_and_no_nudge_is_lost
            what_is_to_be_shredded_opens_nothing_from_that_moment_on
            nothing_is_destroyed_that_nobody_wants_destroyed_by_now
            one_job_is_open_for_a_target_and_what_has_ended_stays_so
            what_needs_a_kek_is_found_and_counted
            active_data_keys_come_in_pages_by_their_bound_context
        );
    };
    ($fixture:ty: $($case:ident)*) => {
        $(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $case() {
                crate::rotation_contract::$case::<$fixture>().await;
            }
        )*
    };
}
pub(crate) use rotation_contract;

const TTL: Duration = Duration::from_millis(100);

async fn with_acme<F: RotationFixture>() -> (F, Arc<dyn Registry>) {
    let fixture = F::fresh().await;
    let store = fixture.registry().await;
    store.insert_tenant(&tenant("acme")).await.unwrap();
    store.insert_key(&key("acme", "default")).await.unwrap();
    (fixture, store)
}

async fn with_dek<F: RotationFixture>() -> (F, Arc<dyn Registry>, Fence) {
    let (fixture, store) = with_acme::<F>().await;
    let dek = active(1, &scope("acme", "default", &[]));
    store.activate_dek(None, &dek, &[form("main", b"1")]).await.unwrap();
    let fence = fence(&*store, 0).await;
    (fixture, store, fence)
}

async fn fence(store: &dyn Registry, now: i64) -> Fence {
    let token = store.acquire_lease("rotation", "me", TTL, at(now)).await.unwrap().unwrap();
    Fence { lease: "rotation".to_owned(), token }
}

fn shred(target: Target, due: i64) -> ShredRecord {
    ShredRecord {
        tenant: tenant_id("acme"),
        target,
        requested_at: at(10),
        requested_by: "api-key:test".to_owned(),
        due_at: at(due),
        done_at: None,
    }
}

fn dek_target() -> Target {
    Target::Dek(dek_id(1))
}

pub(crate) async fn a_lease_has_one_holder_and_each_new_one_a_larger_token<F: RotationFixture>() {
    let fixture = F::fresh().await;
    let (a, b) = (fixture.registry().await, fixture.registry().await);
    let first = a.acquire_lease("x", "a", TTL, at(0)).await.unwrap().unwrap();
    assert_eq!(b.acquire_lease("x", "b", TTL, at(99)).await.unwrap(), None);
    assert!(b.acquire_lease("y", "b", TTL, at(0)).await.unwrap().is_some(), "leases do not know each other");
    // Renewed in time it stays the same.
    assert_eq!(a.acquire_lease("x", "a", TTL, at(99)).await.unwrap(), Some(first));
    assert_eq!(b.acquire_lease("x", "b", TTL, at(198)).await.unwrap(), None);
    let second = b.acquire_lease("x", "b", TTL, at(199)).await.unwrap().unwrap();
    assert!(second > first);
    // Its former holder's word counts no more, not even to give it back.
    a.release_lease(&Fence { lease: "x".to_owned(), token: first }, at(200)).await.unwrap();
    assert_eq!(a.acquire_lease("x", "a", TTL, at(200)).await.unwrap(), None);
    b.release_lease(&Fence { lease: "x".to_owned(), token: second }, at(200)).await.unwrap();
    let third = a.acquire_lease("x", "a", TTL, at(200)).await.unwrap().unwrap();
    assert!(third > second);
    // Who lets his own run out has lost it, too.
    assert!(a.acquire_lease("x", "a", TTL, at(300)).await.unwrap().unwrap() > third);
}

pub(crate) async fn of_racing_takers_of_a_lease_one_gets_it<F: RotationFixture>() {
    let fixture = F::fresh().await;
    let mut takers = JoinSet::new();
    for n in 0..8 {
        let store = fixture.registry().await;
        takers.spawn(async move { store.acquire_lease("x", &n.to_string(), TTL, at(0)).await.unwrap() });
    }
    assert_eq!(takers.join_all().await.into_iter().flatten().count(), 1);
}

pub(crate) async fn an_older_token_changes_nothing_whatever_the_clock_says<F: RotationFixture>() {
    let (fixture, store, old) = with_dek::<F>().await;
    let other = fixture.registry().await;
    let taken = other.acquire_lease("rotation", "other", TTL, at(100)).await.unwrap().unwrap();
    let put = [FencedChange::PutWrapped { dek: dek_id(1), wrapped: form("two", b"2") }];
    for fence in [old, Fence { lease: "nobody's".to_owned(), token: 1 }] {
        let refused = store.apply_fenced(&fence, &put, at(0)).await.unwrap_err();
        assert!(matches!(refused, StoreError::LostLease(_)), "{refused:?}");
    }
    assert_eq!(store.dek(dek_id(1)).await.unwrap().unwrap().wrapped.len(), 1);
    // The holder may, even past the end of his time, as long as nobody has taken it.
    let current = Fence { lease: "rotation".to_owned(), token: taken };
    store.apply_fenced(&current, &put, at(10_000)).await.unwrap();
    assert_eq!(store.dek(dek_id(1)).await.unwrap().unwrap().wrapped.len(), 2);
}

pub(crate) async fn fenced_changes_are_made_together_or_not_at_all<F: RotationFixture>() {
    let (_fixture, store, fence) = with_dek::<F>().await;
    let scope = scope("acme", "default", &[]);
    store.insert_next_dek(&next(2, &scope), &[form("main", b"2")]).await.unwrap();
    let promote = FencedChange::Promote { scope: scope.clone(), predecessor: dek_id(1) };
    let material =
        FencedChange::KekMaterial(KekMaterial { kek: kek("main"), material: "m1".to_owned(), since: at(7) });
    let last = FencedChange::RemoveWrapped { dek: dek_id(1), kek: kek("main") };
    let refused = store.apply_fenced(&fence, &[promote.clone(), material.clone(), last.clone()], at(9)).await;
    assert!(matches!(refused, Err(StoreError::Conflict(_))), "{refused:?}");
    assert_eq!(store.active_dek(&scope).await.unwrap().unwrap().dek.id, dek_id(1));
    assert_eq!(store.kek_material(&kek("main")).await.unwrap(), None);
    let put = FencedChange::PutWrapped { dek: dek_id(1), wrapped: form("two", b"2") };
    store.apply_fenced(&fence, &[promote, material, put, last], at(9)).await.unwrap();
    assert_eq!(store.active_dek(&scope).await.unwrap().unwrap().dek.id, dek_id(2));
    assert_eq!(store.kek_material(&kek("main")).await.unwrap().unwrap().since, at(7));
    assert_eq!(store.dek(dek_id(1)).await.unwrap().unwrap().wrapped, [form("two", b"2")]);
    // A data key that waits can be passed over; one that does not wait stays as it is.
    store.insert_next_dek(&next(3, &scope), &[form("main", b"3")]).await.unwrap();
    let over = [dek_id(3), dek_id(2)].map(|dek| FencedChange::RetireNext { dek });
    store.apply_fenced(&fence, &over, at(9)).await.unwrap();
    assert_eq!(store.dek(dek_id(3)).await.unwrap().unwrap().dek.state, DekState::Retired);
    assert_eq!(store.dek(dek_id(2)).await.unwrap().unwrap().dek.state, DekState::Active);
}

async fn swept(store: &dyn Registry, fence: &Fence, seen: &SweepRecord, due: i64) -> SweepRecord {
    let record = SweepRecord {
        due_at: at(due),
        basis: Some("b".to_owned()),
        checked_through: Some(dek_id(9)),
        swept_at: Some(at(5)),
        ..seen.clone()
    };
    let swept = FencedChange::Swept(Swept { record, nudges_seen: seen.nudges });
    store.apply_fenced(fence, &[swept], at(5)).await.unwrap();
    store.sweep(&seen.tenant).await.unwrap().unwrap()
}

pub(crate) async fn what_is_new_or_has_changed_is_due_and_no_nudge_is_lost<F: RotationFixture>() {
    let (_fixture, store) = with_acme::<F>().await;
    let fence = fence(&*store, 0).await;
    let due = store.due_sweeps(at(1_000), 10).await.unwrap();
    assert_eq!(due.iter().map(|due| due.tenant.as_str()).collect::<Vec<_>>(), ["acme"]);
    assert_eq!(store.due_sweeps(at(999), 10).await.unwrap(), []);
    let after = swept(&*store, &fence, &due[0], 9_000).await;
    assert_eq!((after.due_at, &after.basis), (at(9_000), &Some("b".to_owned())));
    assert_eq!(after.checked_through, Some(dek_id(9)));
    assert_eq!(store.due_sweeps(at(8_999), 10).await.unwrap(), []);
    // A change of the tenant makes it due; one that comes while it is looked at is not lost.
    store.update_tenant(&tenant("acme")).await.unwrap();
    let due = store.due_sweeps(at(1_000), 10).await.unwrap();
    store.nudge_sweep(&tenant_id("acme"), at(2_000)).await.unwrap();
    let after = swept(&*store, &fence, &due[0], 9_000).await;
    assert_eq!(after.due_at, at(1_000));
    swept(&*store, &fence, &after, 9_000).await;
    // A nudge never makes it later.
    store.nudge_sweep(&tenant_id("acme"), at(10_000)).await.unwrap();
    assert_eq!(store.sweep(&tenant_id("acme")).await.unwrap().unwrap().due_at, at(9_000));
    // A KEK's change concerns who has it in the ring.
    let mut other = tenant("other");
    other.ring = KekRing::new(vec![Kek::direct(kek("other"))]).unwrap();
    other.former_keks = vec![Kek::direct(kek("main"))];
    other.created_at = at(20_000);
    store.insert_tenant(&other).await.unwrap();
    store.nudge_sweeps_of_kek(&kek("main"), at(3_000)).await.unwrap();
    let due = store.due_sweeps(at(30_000), 10).await.unwrap();
    let order: Vec<_> = due.iter().map(|due| (due.tenant.as_str(), due.due_at)).collect();
    assert_eq!(order, [("acme", at(3_000)), ("other", at(20_000))]);
    assert_eq!(store.due_sweeps(at(30_000), 1).await.unwrap().len(), 1);
    let missing = store.nudge_sweep(&tenant_id("nobody"), at(1)).await;
    assert!(matches!(missing, Err(StoreError::Missing(_))), "{missing:?}");
}

pub(crate) async fn what_is_to_be_shredded_opens_nothing_from_that_moment_on<F: RotationFixture>() {
    let (_fixture, store, _) = with_dek::<F>().await;
    store.insert_shred(&shred(dek_target(), 1_000)).await.unwrap();
    assert_eq!(store.dek(dek_id(1)).await.unwrap().unwrap().dek.state, DekState::Revoked);
    store.insert_shred(&shred(Target::Key(key_name("default")), 1_000)).await.unwrap();
    let key = store.key(&tenant_id("acme"), &key_name("default")).await.unwrap().unwrap();
    assert_eq!((key.status, key.version), (Status::Disabled, 2));
    store.insert_shred(&shred(Target::Tenant, 1_000)).await.unwrap();
    let tenant = store.tenant(&tenant_id("acme")).await.unwrap().unwrap();
    assert_eq!((tenant.status, tenant.version), (Status::Disabled, 2));
    let all = store.shreds(&tenant_id("acme"), None, 10).await.unwrap();
    let targets: Vec<String> = all.iter().map(|shred| shred.target.name()).collect();
    assert_eq!(targets, [String::new(), format!("dek:{}", dek_id(1)), "key:default".to_owned()]);
    let rest = store.shreds(&tenant_id("acme"), Some(&Target::Tenant), 1).await.unwrap();
    assert_eq!(rest[0].target, dek_target());
    for again in [dek_target(), Target::Key(key_name("default")), Target::Tenant] {
        let refused = store.insert_shred(&shred(again, 2_000)).await;
        assert!(matches!(refused, Err(StoreError::Conflict(_))), "{refused:?}");
    }
    let elsewhere = ShredRecord { tenant: tenant_id("nobody"), ..shred(Target::Tenant, 1) };
    for missing in [shred(Target::Dek(dek_id(7)), 1), shred(Target::Key(key_name("none")), 1), elsewhere] {
        let refused = store.insert_shred(&missing).await;
        assert!(matches!(refused, Err(StoreError::Missing(_))), "{refused:?}");
    }
}

pub(crate) async fn nothing_is_destroyed_that_nobody_wants_destroyed_by_now<F: RotationFixture>() {
    let (_fixture, store, fence) = with_dek::<F>().await;
    let acme = tenant_id("acme");
    let destroy = [FencedChange::Destroy { dek: dek_id(1) }];
    let refused = store.apply_fenced(&fence, &destroy, at(1)).await;
    assert!(matches!(refused, Err(StoreError::Conflict(_))), "{refused:?}");
    store.insert_shred(&shred(dek_target(), 1_000)).await.unwrap();
    assert_eq!(store.due_shreds(at(999), 10).await.unwrap(), []);
    assert!(store.apply_fenced(&fence, &destroy, at(999)).await.is_err());
    // Cancelled a moment before its time, and not a moment later.
    store.cancel_shred(&acme, &dek_target(), at(999)).await.unwrap();
    assert!(store.apply_fenced(&fence, &destroy, at(5_000)).await.is_err());
    assert_eq!(store.dek(dek_id(1)).await.unwrap().unwrap().dek.state, DekState::Revoked);
    let gone = store.cancel_shred(&acme, &dek_target(), at(999)).await;
    assert!(matches!(gone, Err(StoreError::Missing(_))), "{gone:?}");
    store.insert_shred(&shred(Target::Key(key_name("default")), 1_000)).await.unwrap();
    let late = store.cancel_shred(&acme, &Target::Key(key_name("default")), at(1_000)).await;
    assert!(matches!(late, Err(StoreError::Conflict(_))), "{late:?}");
    assert_eq!(store.due_shreds(at(1_000), 10).await.unwrap().len(), 1);
    store.apply_fenced(&fence, &destroy, at(1_000)).await.unwrap();
    let dead = store.dek(dek_id(1)).await.unwrap().unwrap();
    assert_eq!((dead.dek.state, dead.wrapped), (DekState::Destroyed, vec![]));
    // Twice is once, and then it is written down.
    store.apply_fenced(&fence, &destroy, at(1_001)).await.unwrap();
    let done = FencedChange::ShredDone { tenant: acme.clone(), target: Target::Key(key_name("default")) };
    store.apply_fenced(&fence, &[done], at(1_002)).await.unwrap();
    assert_eq!(store.due_shreds(at(9_000), 10).await.unwrap(), []);
    let done = store.shred(&acme, &Target::Key(key_name("default"))).await.unwrap().unwrap();
    assert_eq!(done.done_at, Some(at(1_002)));
    assert!(store.insert_shred(&shred(dek_target(), 9_000)).await.is_err(), "it is destroyed already");
}

fn job(target: Target, now: Timestamp, n: u8) -> JobRecord {
    JobRecord::new(JobKind::RewrapKeys, tenant_id("acme"), target, now, [n; 10])
}

pub(crate) async fn one_job_is_open_for_a_target_and_what_has_ended_stays_so<F: RotationFixture>() {
    let (_fixture, store, fence) = with_dek::<F>().await;
    let (acme, first) = (tenant_id("acme"), job(Target::Tenant, at(1), 1));
    assert_eq!(store.open_job(&first).await.unwrap(), first);
    assert_eq!(store.open_job(&job(Target::Tenant, at(2), 2)).await.unwrap(), first);
    let other = job(dek_target(), at(3), 3);
    assert_eq!(store.open_job(&other).await.unwrap(), other);
    let running = JobRecord {
        state: JobState::Running,
        total: 7,
        done: 3,
        errors: 1,
        last_error: Some("why".to_owned()),
        started_at: Some(at(4)),
        updated_at: at(5),
        ..first.clone()
    };
    store.apply_fenced(&fence, &[FencedChange::Job(running.clone())], at(5)).await.unwrap();
    assert_eq!(store.job(&first.id).await.unwrap(), Some(running.clone()));
    let ended = JobRecord { state: JobState::Done, finished_at: Some(at(6)), ..running.clone() };
    store.close_job(&ended).await.unwrap();
    store.apply_fenced(&fence, &[FencedChange::Job(running)], at(7)).await.unwrap();
    assert_eq!(store.job(&first.id).await.unwrap(), Some(ended.clone()));
    assert_eq!(store.open_job_for(&acme, JobKind::RewrapKeys, &Target::Tenant).await.unwrap(), None);
    let third = job(Target::Tenant, at(9), 4);
    assert_eq!(store.open_job(&third).await.unwrap(), third);
    // The newest first.
    for of in [None, Some(&acme)] {
        let page = store.jobs(of, None, 2).await.unwrap();
        assert_eq!(page, [third.clone(), other.clone()]);
        assert_eq!(store.jobs(of, Some(&page[1].id), 2).await.unwrap(), std::slice::from_ref(&ended));
    }
    assert_eq!(store.jobs(Some(&tenant_id("nobody")), None, 2).await.unwrap(), []);
    assert_eq!(store.job("nonsense").await.unwrap(), None);
}

pub(crate) async fn what_needs_a_kek_is_found_and_counted<F: RotationFixture>() {
    let (_fixture, store, _) = with_dek::<F>().await;
    let mut other = tenant("other");
    other.ring = KekRing::new(vec![Kek::direct(kek("two"))]).unwrap();
    other.former_keks = vec![Kek::direct(kek("main"))];
    store.insert_tenant(&other).await.unwrap();
    store.insert_key(&key("other", "default")).await.unwrap();
    let mut older = form("main", b"2");
    older.wrapped_at = at(2);
    let dek = active(2, &scope("other", "default", &[]));
    store.activate_dek(None, &dek, &[older, form("two", b"2")]).await.unwrap();
    let main = store.kek_use(&kek("main")).await.unwrap();
    assert_eq!((main.deks, main.oldest_wrapped_at), (2, Some(at(2))));
    assert_eq!((main.rings, main.former_rings), (1, 1));
    let first = store.deks_under_kek(&kek("main"), None, 1).await.unwrap();
    let rest = store.deks_under_kek(&kek("main"), Some(first[0].dek.id), 10).await.unwrap();
    assert_eq!((first[0].dek.id, rest[0].dek.id, rest.len()), (dek_id(1), dek_id(2), 1));
    assert_eq!(rest[0].wrapped.len(), 2, "a data key comes with all its forms");
    store.remove_wrapped(dek_id(2), &kek("main")).await.unwrap();
    assert_eq!(store.kek_use(&kek("main")).await.unwrap().deks, 1);
    assert_eq!(store.kek_use(&kek("nobody")).await.unwrap(), keyfold::store::KekUse::default());
}

pub(crate) async fn active_data_keys_come_in_pages_by_their_bound_context<F: RotationFixture>() {
    let (_fixture, store, _) = with_dek::<F>().await;
    for (n, desk) in [(2, "b"), (3, "a"), (4, "c")] {
        let scope = scope("acme", "default", &[("desk", desk)]);
        store.activate_dek(None, &active(n, &scope), &[form("main", b"x")]).await.unwrap();
        store.insert_next_dek(&next(n + 10, &scope), &[form("main", b"x")]).await.unwrap();
    }
    let (acme, default) = (tenant_id("acme"), key_name("default"));
    let mut seen = Vec::new();
    let mut after = None;
    loop {
        let page = store.active_deks(&acme, &default, after.as_ref(), 2).await.unwrap();
        let Some(last) = page.last() else { break };
        assert!(page.len() <= 2);
        after = Some(last.dek.scope.bound.clone());
        seen.extend(page.iter().map(|stored| stored.dek.id));
    }
    assert_eq!(seen, [dek_id(1), dek_id(3), dek_id(2), dek_id(4)]);
}
