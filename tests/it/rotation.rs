//! Rotation as operators and callers notice it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use keyfold::rotation::{self, Reconciler, Round};
use keyfold::store::{DekState, RotationStore, Store};
use keyfold::tenant::Verb;
use reqwest::Method;
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::caller::{Answer, Caller, plaintext, receive, text};
use crate::probes::KmsFault;
use crate::service::{Service, World};

const A_DAY: u64 = 24 * 60 * 60;

/// A world in which rotation never has to wait for its budget: its clock stands still.
async fn world() -> World {
    let mut world = World::new().await;
    world.settings.rotation.kms_calls_per_sec_max = 1_000_000;
    world
}

/// One round of rotation, of which nothing may fail.
async fn rotate(service: &Service) {
    let round = service.app.rotation.reconcile().await.unwrap();
    assert_eq!((round.failed, round.held_elsewhere), (0, false));
}

async fn post(caller: &Caller, path: &str) -> Answer {
    receive(caller.request(Method::POST, path)).await
}

async fn deks(caller: &Caller, key: &str) -> Vec<Value> {
    let list = caller.get(&format!("/v1/tenants/acme/keys/{key}/deks?limit=1000")).await.ok(200);
    list["items"].as_array().unwrap().clone()
}

async fn kek_use(caller: &Caller, kek: &str) -> Value {
    caller.get(&format!("/v1/kek-use?kek={kek}")).await.ok(200)
}

async fn last_job(caller: &Caller) -> Value {
    caller.get("/v1/jobs?tenant=acme").await.ok(200)["items"][0].clone()
}

fn keks_of(dek: &Value) -> Vec<String> {
    dek["wrapped"].as_array().unwrap().iter().map(|form| text(&form["kek"])).collect()
}

/// Seals a message under so many data keys, one after the other; gives back what was sealed, embedded and compact.
async fn history(caller: &Caller, deks: usize) -> Vec<String> {
    let mut sealed = Vec::new();
    for n in 0..deks {
        let weight = if n % 2 == 0 { "embedded" } else { "compact" };
        let body = json!({"plaintext": "aGVsbG8=", "envelope": weight});
        sealed.push(text(&caller.post("/v1/encrypt", &body).await.ok(200)["ciphertext"]));
        post(caller, "/v1/tenants/acme/keys/default/rotate").await.ok(200);
    }
    sealed
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_of_the_kek_is_one_call_and_then_nothing_needs_the_old_one() {
    let world = world().await;
    world.keyring.add("two").await.unwrap();
    let service = world.start_without_keeper().await;
    let caller = service.tenant_and_caller("acme").await;
    let sealed = history(&caller, 40).await;
    rotate(&service).await;
    caller.put("/v1/tenants/acme", &json!({"keks": [{"kek": "local:two"}]})).await.ok(200);
    let waiting = last_job(&caller).await;
    assert_eq!((&waiting["kind"], &waiting["state"]), (&json!("rewrap-keys"), &json!("waiting")));
    assert_eq!(kek_use(&caller, "local:one").await["needed"], true);
    rotate(&service).await;
    let job = last_job(&caller).await;
    assert_eq!((&job["job_id"], &job["state"]), (&waiting["job_id"], &json!("done")));
    assert_eq!((&job["done"], &job["total"], &job["errors"]), (&json!(41), &json!(41), &json!(0)));
    let used = kek_use(&caller, "local:one").await;
    assert_eq!((&used["deks"], &used["rings"], &used["needed"]), (&json!(0), &json!(0), &json!(false)));
    assert_eq!(used["former_rings"], 1);
    assert_eq!(kek_use(&caller, "local:two").await["deks"], 42);
    // The proof: without the old KEK everything still opens, and the section can be renewed.
    world.keyring.disable("one").await.unwrap();
    let token = caller.token().to_owned();
    service.stop().await;
    let service = world.start_without_keeper().await;
    let caller = service.anonymous().with_token(token);
    for ciphertext in &sealed {
        let opened = caller.try_decrypt(ciphertext, &json!({})).await.ok(200);
        assert_eq!((plaintext(&opened), &opened["rewrap_advised"]), (b"hello".to_vec(), &json!(true)));
        let renewed = caller.post("/v1/rewrap", &json!({"ciphertext": ciphertext})).await.ok(200);
        let again = caller.post("/v1/rewrap", &json!({"ciphertext": renewed["ciphertext"]})).await.ok(200);
        assert_eq!((&again["ciphertext"], &again["changed"]), (&renewed["ciphertext"], &json!(false)));
    }
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_wrapped_key_of_a_large_object_is_renewed_by_its_head_alone() {
    let world = world().await;
    world.keyring.add("two").await.unwrap();
    let service = world.start_without_keeper().await;
    let caller = service.tenant_and_caller("acme").await;
    let sealed = caller.encrypt(&[7; 300_000], &json!({"object": "1"})).await;
    caller.put("/v1/tenants/acme", &json!({"keks": [{"kek": "local:two"}]})).await.ok(200);
    rotate(&service).await;
    let bytes = envelope::text::decode(&sealed).unwrap();
    let offset = envelope::inspect(&bytes).unwrap().body_offset();
    let head = envelope::text::encode(&bytes[..offset]);
    let body = json!({"ciphertext": head, "mode": "wrapped_key"});
    let renewed = caller.post("/v1/rewrap", &body).await.ok(200);
    assert_eq!(renewed["changed"], true);
    let mut whole = envelope::text::decode(text(&renewed["ciphertext"])).unwrap();
    assert_eq!(envelope::inspect(&whole).unwrap().body_offset(), whole.len());
    whole.extend_from_slice(&bytes[offset..]);
    world.keyring.disable("one").await.unwrap();
    let opened = caller.decrypt(&envelope::text::encode(&whole), &json!({"object": "1"})).await;
    assert_eq!(opened, [7; 300_000]);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_of_material_under_the_same_kek_is_noticed_and_followed() {
    let world = world().await;
    let service = world.start_without_keeper().await;
    let caller = service.tenant_and_caller("acme").await;
    history(&caller, 3).await;
    rotate(&service).await;
    let before: Vec<Value> =
        deks(&caller, "default").await.iter().map(|dek| dek["wrapped"].clone()).collect();
    world.keyring.rotate("one").await.unwrap();
    // Each tenant is looked at by itself, and the KMS is asked again by then.
    world.pass(5_400);
    rotate(&service).await;
    let after = deks(&caller, "default").await;
    assert_eq!(after.len(), before.len());
    for (dek, before) in after.iter().zip(&before) {
        assert_ne!(dek["wrapped"][0]["material"], before[0]["material"], "{dek}");
    }
    let materials: Vec<&Value> = after.iter().map(|dek| &dek["wrapped"][0]["material"]).collect();
    assert!(materials.windows(2).all(|pair| pair[0] == pair[1]), "{materials:?}");
    assert_eq!(last_job(&caller).await["done"], 4);
    // By hand it does not take an hour.
    world.keyring.rotate("one").await.unwrap();
    post(&caller, "/v1/tenants/acme/rewrap-keys").await.ok(202);
    rotate(&service).await;
    assert_ne!(&deks(&caller, "default").await[0]["wrapped"][0]["material"], materials[0]);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_region_is_added_and_another_dropped() {
    let world = world().await;
    world.keyring.add("two").await.unwrap();
    let service = world.start_without_keeper().await;
    let caller = service.tenant_and_caller("acme").await;
    history(&caller, 3).await;
    let both = json!({"keks": [{"kek": "local:one"}, {"kek": "local:two"}]});
    caller.put("/v1/tenants/acme", &both).await.ok(200);
    rotate(&service).await;
    for dek in deks(&caller, "default").await {
        assert_eq!(keks_of(&dek), ["local:one", "local:two"]);
    }
    world.pass(1);
    // The new one is out when the old one is to go: nothing is dropped before everything has its form.
    world.keyring.add("three").await.unwrap();
    let other = json!({"keks": [{"kek": "local:two"}, {"kek": "local:three"}]});
    caller.put("/v1/tenants/acme", &other).await.ok(200);
    world.keyring.disable("three").await.unwrap();
    let round = service.app.rotation.reconcile().await.unwrap();
    assert_eq!(round.failed, 1);
    let job = last_job(&caller).await;
    assert_eq!(job["state"], "running");
    assert!(job["errors"].as_u64().unwrap() > 0 && text(&job["last_error"]).contains("local:three"), "{job}");
    for dek in deks(&caller, "default").await.iter().filter(|dek| dek["state"] != "active") {
        assert!(keks_of(dek).contains(&"local:two".to_owned()), "{dek}");
        assert!(keks_of(dek).contains(&"local:one".to_owned()), "{dek}");
    }
    world.keyring.enable("three").await.unwrap();
    // It is tried again after a while, and not at once.
    assert_eq!(service.app.rotation.reconcile().await.unwrap().tenants, 0);
    world.pass(10);
    rotate(&service).await;
    for dek in deks(&caller, "default").await {
        assert_eq!(keks_of(&dek), ["local:three", "local:two"]);
    }
    assert_eq!(last_job(&caller).await["state"], "done");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_tenants_panic_or_dead_kek_does_not_stop_the_others() {
    let world = world().await;
    world.keyring.add("two").await.unwrap();
    world.keyring.add("dead").await.unwrap();
    let service = world.start_without_keeper().await;
    let caller = service.tenant_and_caller("acme").await;
    history(&caller, 2).await;
    service.tenant_with("bad", &["local:dead"]).await;
    let bad = service.caller(&["bad"], &[Verb::Encrypt, Verb::Admin]).await;
    bad.encrypt(b"hello", &json!({})).await;
    rotate(&service).await;
    let two = json!({"keks": [{"kek": "local:two"}]});
    caller.put("/v1/tenants/acme", &two).await.ok(200);
    bad.put("/v1/tenants/bad", &two).await.problem("forbidden");
    let operator = service.caller(&["acme", "bad"], &Verb::ALL).await;
    operator.put("/v1/tenants/bad", &two).await.ok(200);
    world.keyring.disable("dead").await.unwrap();
    let round = service.app.rotation.reconcile().await.unwrap();
    assert_eq!((round.tenants, round.failed), (2, 1));
    assert_eq!(kek_use(&caller, "local:one").await["needed"], false);
    assert_eq!(kek_use(&operator, "local:dead").await["deks"], 1);
    // A panic in the KMS client is this tenant's alone as well.
    world.keyring.enable("dead").await.unwrap();
    world.kms.fail(KmsFault::Panic);
    world.pass(10);
    let round = service.app.rotation.reconcile().await.unwrap();
    assert_eq!((round.tenants, round.failed), (1, 1));
    world.kms.fail(None);
    world.pass(60);
    rotate(&service).await;
    assert_eq!(kek_use(&operator, "local:dead").await["needed"], false);
    service.stop().await;
}

/// The clock moved over a year, day by day: a busy key and one that nobody uses.
#[tokio::test(flavor = "multi_thread")]
async fn over_a_year_there_is_one_data_key_a_day_for_who_seals_every_day_and_one_in_all_for_who_does_not() {
    let world = world().await;
    let service = world.start_without_keeper().await;
    let caller = service.tenant_and_caller("acme").await;
    caller.post("/v1/tenants/acme/keys", &json!({"key": "idle"})).await.ok(201);
    let idle = json!({"plaintext": "aGVsbG8=", "key": "idle"});
    let first = text(&caller.post("/v1/encrypt", &idle).await.ok(200)["ciphertext"]);
    for _ in 0..365 {
        caller.encrypt(b"hello", &json!({})).await;
        service.app.pool().flush_usage().await;
        // Late in the day it is used once more, so that the next one is made ahead.
        world.pass(A_DAY - 600);
        caller.encrypt(b"hello", &json!({})).await;
        service.app.pool().flush_usage().await;
        rotate(&service).await;
        world.pass(600);
    }
    caller.encrypt(b"hello", &json!({})).await;
    let made = deks(&caller, "default").await;
    let of = |state: &str| made.iter().filter(|dek| dek["state"] == state).count();
    assert_eq!((of("active"), of("retired"), of("next")), (1, 365, 0));
    assert!(made.iter().all(|dek| keks_of(dek) == ["local:one"]));
    let idle = deks(&caller, "idle").await;
    assert_eq!((idle.len(), &idle[0]["state"]), (1, &json!("active")));
    // A call for each data key that was made, the idle one included, and one for each that was first used when it
    // was made by rotation and not kept in memory.
    assert_eq!(world.kms.generates(), 367);
    assert!(world.kms.unwraps() <= 366 * 2, "{}", world.kms.unwraps());
    assert_eq!(caller.decrypt(&first, &json!({})).await, b"hello");
    service.stop().await;
}

/// A rotation in the middle of load: nobody notices, and nobody waits for the KMS.
#[tokio::test(flavor = "multi_thread")]
async fn a_rotation_under_load_is_no_error_and_no_request_waits_for_the_kms() {
    let world = world().await;
    let service = Arc::new(world.start_without_keeper().await);
    let caller = service.tenant_and_caller("acme").await;
    let first = caller.encrypt(b"hello", &json!({})).await;
    let (stop, sent) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let mut clients = JoinSet::new();
    for _ in 0..32 {
        let (caller, stop, sent, first) = (caller.clone(), stop.clone(), sent.clone(), first.clone());
        clients.spawn(async move {
            while !stop.load(Ordering::SeqCst) {
                let sealed = caller.encrypt(b"hello", &json!({})).await;
                assert_eq!(caller.decrypt(&sealed, &json!({})).await, b"hello");
                assert_eq!(caller.decrypt(&first, &json!({})).await, b"hello");
                sent.fetch_add(3, Ordering::SeqCst);
            }
        });
    }
    for round in 1..=5_u64 {
        let before = sent.load(Ordering::SeqCst);
        // One call for the next data key, made by the operator's request. Whatever a client made would be another.
        post(&caller, "/v1/tenants/acme/keys/default/rotate").await.ok(200);
        while sent.load(Ordering::SeqCst) < before + 200 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert_eq!((world.kms.generates(), world.kms.unwraps()), (1 + round, 0));
    }
    stop.store(true, Ordering::SeqCst);
    clients.join_all().await;
    assert_eq!(deks(&caller, "default").await.len(), 6);
}

fn another(service: &Service, world: &World) -> Reconciler {
    let parts = rotation::Parts {
        store: service.store.clone(),
        kms: world.kms.clone(),
        pool: service.app.pool().clone(),
        watch: Arc::new(keyfold::store::watch::ChangeWatch::new(
            service.store.clone(),
            world.clock.clone(),
            Duration::from_secs(60),
        )),
        clock: world.clock.clone(),
        audit: keyfold::audit::Audit::new(world.clock.clone()),
    };
    Reconciler::new(parts, rotation::Options { kms_calls_per_sec_max: 1_000_000, ..Default::default() })
}

/// Two processes on one registry: one sleeps in the middle of a KMS call until its lease is long another's. What it
/// then has in its hands is older than what the other wrote, and must not be written.
#[tokio::test(flavor = "multi_thread")]
async fn who_lost_the_lease_in_his_sleep_changes_nothing() {
    let world = world().await;
    world.keyring.add("two").await.unwrap();
    let (first, second) = (world.start_without_keeper().await, world.start_without_keeper().await);
    let caller = first.tenant_and_caller("acme").await;
    caller.encrypt(b"hello", &json!({})).await;
    rotate(&first).await;
    caller.put("/v1/tenants/acme", &json!({"keks": [{"kek": "local:two"}]})).await.ok(200);
    let calls = world.kms.calls();
    world.kms.hold();
    let sleeper = first.app.rotation.clone();
    let mut tasks = JoinSet::new();
    tasks.spawn(async move { sleeper.reconcile().await });
    world.kms.arrived(calls + 1).await;
    // While the lease is held, another does nothing.
    assert_eq!(
        second.app.rotation.reconcile().await.unwrap(),
        Round { held_elsewhere: true, ..Round::default() }
    );
    world.pass(31);
    let taker = another(&second, &world);
    let fence_before =
        second.store.acquire_lease("rotation", "somebody", Duration::from_secs(5), world.clock.now());
    assert!(fence_before.await.unwrap().is_some());
    world.kms.release();
    let slept = tasks.join_next().await.unwrap().unwrap();
    assert!(slept.unwrap_err().to_string().contains("lease"), "the sleeper has written something");
    let of: Vec<Value> = deks(&caller, "default").await;
    assert!(of.iter().any(|dek| dek["state"] == "active" && keks_of(dek) == ["local:one"]), "{of:?}");
    world.pass(6);
    assert_eq!(taker.reconcile().await.unwrap().failed, 0);
    assert_eq!(kek_use(&caller, "local:one").await["needed"], false);
    first.stop().await;
    second.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_data_key_opens_nothing_until_it_is_restored() {
    let world = world().await;
    let service = world.start_without_keeper().await;
    let caller = service.tenant_and_caller("acme").await;
    let answer = caller.try_encrypt(b"hello", &json!({})).await.ok(200);
    let (sealed, dek) = (text(&answer["ciphertext"]), text(&answer["dek_id"]));
    for _ in 0..2 {
        let revoked = post(&caller, &format!("/v1/tenants/acme/deks/{dek}/revoke")).await.ok(200);
        assert_eq!(revoked["state"], "revoked");
    }
    caller.try_decrypt(&sealed, &json!({})).await.problem("key_revoked");
    caller.post("/v1/rewrap", &json!({"ciphertext": sealed})).await.problem("key_revoked");
    assert_ne!(caller.try_encrypt(b"hello", &json!({})).await.ok(200)["dek_id"], dek.as_str());
    let restored = post(&caller, &format!("/v1/tenants/acme/deks/{dek}/restore")).await.ok(200);
    assert_eq!(restored["state"], "retired");
    assert_eq!(caller.decrypt(&sealed, &json!({})).await, b"hello");
    // Another tenant's data key is one that does not exist.
    let evil = service.tenant_and_caller("evil").await;
    let stranger = service.caller(&["evil"], &[Verb::Admin]).await;
    post(&stranger, &format!("/v1/tenants/acme/deks/{dek}/revoke")).await.problem("forbidden");
    post(&evil, &format!("/v1/tenants/evil/deks/{dek}/revoke")).await.problem("not_found");
    post(&evil, "/v1/tenants/evil/deks/nonsense/revoke").await.problem("malformed_request");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shredded_data_key_can_be_taken_back_until_its_time_and_opens_nothing_afterwards() {
    let world = world().await;
    let service = world.start_without_keeper().await;
    let caller = service.tenant_and_caller("acme").await;
    let answer = caller.try_encrypt(b"hello", &json!({})).await.ok(200);
    let (sealed, dek) = (text(&answer["ciphertext"]), text(&answer["dek_id"]));
    let path = format!("/v1/tenants/acme/deks/{dek}/shred");
    caller.post(&path, &json!({"waiting_secs": 3_599})).await.problem("malformed_request");
    caller.post(&path, &json!({"waiting_secs": 31_536_001})).await.problem("malformed_request");
    caller.try_decrypt(&sealed, &json!({})).await.ok(200);
    let shred = caller.post(&path, &json!({"waiting_secs": 3_600})).await.ok(202);
    let beyond: Vec<&Value> = shred["beyond_reach"].as_array().unwrap().iter().map(|b| &b["what"]).collect();
    assert_eq!(beyond, ["embedded_envelopes", "registry_backups", "memory"]);
    assert_eq!(shred["beyond_reach"][0]["keks"], json!([{"kek": "local:one", "tenants": 1}]));
    caller.try_decrypt(&sealed, &json!({})).await.problem("key_revoked");
    caller.post(&path, &json!({})).await.problem("conflict");
    // Until its time it can be cancelled; it is revoked then, and can be restored.
    world.pass(3_599);
    rotate(&service).await;
    post(&caller, &format!("/v1/tenants/acme/deks/{dek}/restore")).await.problem("conflict");
    let cancelled = receive(caller.request(Method::DELETE, &path)).await;
    assert_eq!(cancelled.status, 204);
    receive(caller.request(Method::DELETE, &path)).await.problem("conflict");
    let unknown = caller.request(Method::DELETE, "/v1/tenants/acme/keys/unknown/shred");
    receive(unknown).await.problem("not_found");
    assert_eq!(last_job(&caller).await["state"], "cancelled");
    post(&caller, &format!("/v1/tenants/acme/deks/{dek}/restore")).await.ok(200);
    assert_eq!(caller.decrypt(&sealed, &json!({})).await, b"hello");
    world.pass(A_DAY);
    rotate(&service).await;
    assert_eq!(caller.decrypt(&sealed, &json!({})).await, b"hello");
    // And now in earnest.
    caller.post(&path, &json!({"waiting_secs": 3_600})).await.ok(202);
    world.pass(3_600);
    assert_eq!(receive(caller.request(Method::DELETE, &path)).await.status, 409);
    rotate(&service).await;
    caller.try_decrypt(&sealed, &json!({})).await.problem("key_destroyed");
    caller.post("/v1/rewrap", &json!({"ciphertext": sealed})).await.problem("key_destroyed");
    let section = json!({"ciphertext": sealed, "mode": "wrapped_key"});
    caller.post("/v1/rewrap", &section).await.problem("key_destroyed");
    for verb in ["revoke", "restore"] {
        let answer = post(&caller, &format!("/v1/tenants/acme/deks/{dek}/{verb}")).await;
        answer.problem("key_destroyed");
    }
    let gone = deks(&caller, "default").await;
    assert_eq!((&gone[0]["state"], &gone[0]["wrapped"]), (&json!("destroyed"), &json!([])));
    let job = last_job(&caller).await;
    assert_eq!((&job["kind"], &job["state"], &job["done"]), (&json!("shred"), &json!("done"), &json!(1)));
    // Nor after a restart, with nothing in memory, though the envelope has the wrapped key inside.
    assert!(!envelope::inspect(&envelope::text::decode(&sealed).unwrap()).unwrap().wrapped().is_compact());
    let token = caller.token().to_owned();
    service.stop().await;
    let service = world.start_without_keeper().await;
    let (caller, unwraps) = (service.anonymous().with_token(token), world.kms.unwraps());
    caller.try_decrypt(&sealed, &json!({})).await.problem("key_destroyed");
    caller.post("/v1/rewrap", &section).await.problem("key_destroyed");
    assert_eq!(world.kms.unwraps(), unwraps, "the KMS was asked for a data key that is dead");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shredded_key_and_a_shredded_tenant_open_nothing_and_are_not_switched_on_again() {
    let world = world().await;
    let service = world.start_without_keeper().await;
    let caller = service.tenant_and_caller("acme").await;
    caller.post("/v1/tenants/acme/keys", &json!({"key": "doomed"})).await.ok(201);
    let body = json!({"plaintext": "aGVsbG8=", "key": "doomed"});
    let doomed = text(&caller.post("/v1/encrypt", &body).await.ok(200)["ciphertext"]);
    let other = caller.encrypt(b"hello", &json!({})).await;
    caller.post("/v1/tenants/acme/keys/doomed/shred", &json!({})).await.ok(202);
    caller.try_decrypt(&doomed, &json!({})).await.problem("key_revoked");
    caller.post("/v1/encrypt", &body).await.problem("key_revoked");
    let on = json!({"status": "enabled"});
    caller.put("/v1/tenants/acme/keys/doomed", &on).await.problem("conflict");
    // Seven days where nothing is said.
    world.pass(7 * A_DAY - 1);
    rotate(&service).await;
    caller.try_decrypt(&doomed, &json!({})).await.problem("key_revoked");
    world.pass(1);
    rotate(&service).await;
    caller.try_decrypt(&doomed, &json!({})).await.problem("key_destroyed");
    caller.put("/v1/tenants/acme/keys/doomed", &on).await.problem("conflict");
    assert_eq!(caller.decrypt(&other, &json!({})).await, b"hello");
    // A tenant is its operator's.
    let admin = service.caller(&["acme"], &[Verb::Admin]).await;
    admin.post("/v1/tenants/acme/shred", &json!({})).await.problem("forbidden");
    caller.post("/v1/tenants/acme/shred", &json!({"waiting_secs": 3_600})).await.ok(202);
    caller.try_decrypt(&other, &json!({})).await.problem("key_revoked");
    caller.put("/v1/tenants/acme", &on).await.problem("conflict");
    let shreds = caller.get("/v1/tenants/acme/shreds").await.ok(200);
    let targets: Vec<&Value> = shreds["items"].as_array().unwrap().iter().map(|s| &s["target"]).collect();
    assert_eq!(targets, ["", "key:doomed"]);
    world.pass(3_600);
    rotate(&service).await;
    caller.try_decrypt(&other, &json!({})).await.problem("key_destroyed");
    let stored = service.store.deks(&"acme".parse().unwrap(), &"default".parse().unwrap(), None, 10).await;
    assert!(stored.unwrap().iter().all(|dek| dek.dek.state == DekState::Destroyed && dek.wrapped.is_empty()));
    assert_eq!(kek_use(&caller, "local:one").await["deks"], 0);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_listing_tells_when_a_data_key_last_sealed_and_opened_to_the_minute() {
    let world = world().await;
    let service = world.start_without_keeper().await;
    let caller = service.tenant_and_caller("acme").await;
    world.pass(90);
    let sealed = caller.encrypt(b"hello", &json!({})).await;
    world.pass(60);
    caller.decrypt(&sealed, &json!({})).await;
    service.app.pool().flush_usage().await;
    let dek = &deks(&caller, "default").await[0];
    assert_eq!(dek["last_sealed_at"], "2026-11-23T12:01:00Z");
    assert_eq!(dek["last_opened_at"], "2026-11-23T12:02:00Z");
    assert_eq!((&dek["messages"], &dek["bytes"]), (&json!(1), &json!(5)));
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_may_see_jobs_and_keks_is_told_and_nobody_else() {
    let world = world().await;
    let service = world.start_without_keeper().await;
    let caller = service.tenant_and_caller("acme").await;
    let job = post(&caller, "/v1/tenants/acme/rewrap-keys").await.ok(202);
    let again = post(&caller, "/v1/tenants/acme/rewrap-keys").await.ok(202);
    assert_eq!(job["job_id"], again["job_id"]);
    service.tenant("evil").await;
    let admin = service.caller(&["evil"], &[Verb::Admin]).await;
    admin.get("/v1/jobs").await.problem("forbidden");
    admin.get("/v1/jobs?tenant=acme").await.problem("forbidden");
    admin.get(&format!("/v1/jobs/{}", text(&job["job_id"]))).await.problem("not_found");
    admin.get("/v1/kek-use?kek=local:one").await.problem("forbidden");
    caller.get("/v1/kek-use?kek=nonsense").await.problem("malformed_request");
    caller.get("/v1/kek-use").await.problem("malformed_request");
    caller.get("/v1/jobs?after=x&limit=0").await.problem("malformed_request");
    assert_eq!(caller.get("/v1/jobs").await.ok(200)["items"][0]["job_id"], job["job_id"]);
    service.stop().await;
}

/// Nobody asks for it: the background task is woken by the change, though its clock stands still.
#[tokio::test(flavor = "multi_thread")]
async fn a_change_of_the_ring_is_followed_at_once() {
    let world = world().await;
    world.keyring.add("two").await.unwrap();
    let service = world.start().await;
    let caller = service.tenant_and_caller("acme").await;
    let sealed = caller.encrypt(b"hello", &json!({})).await;
    caller.put("/v1/tenants/acme", &json!({"keks": [{"kek": "local:two"}]})).await.ok(200);
    let followed = async {
        while kek_use(&caller, "local:one").await["needed"] == true {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    assert!(
        tokio::time::timeout(Duration::from_secs(20), followed).await.is_ok(),
        "{}",
        last_job(&caller).await
    );
    world.keyring.disable("one").await.unwrap();
    service.app.pool().clear();
    assert_eq!(caller.decrypt(&sealed, &json!({})).await, b"hello");
    service.stop().await;
}

/// More tenants than are loaded at a time, all due in the same moment.
#[tokio::test(flavor = "multi_thread")]
async fn many_tenants_due_at_once_are_worked_off_in_pages_and_within_the_budget() {
    const TENANTS: usize = 150;
    const PER_SEC: u64 = 50;
    let mut world = World::new().await;
    world.settings.rotation.kms_calls_per_sec_max = u32::try_from(PER_SEC).unwrap();
    let service = world.start_without_keeper().await;
    let ids: Vec<String> = (0..TENANTS).map(|n| format!("tenant-{n}")).collect();
    for id in &ids {
        let caller = service.tenant_and_caller(id).await;
        caller.encrypt(b"hello", &json!({})).await;
    }
    rotate_all(&service, &world, TENANTS).await;
    world.keyring.rotate("one").await.unwrap();
    world.pass(2 * 60 * 60);
    let (calls, took) = rotate_all(&service, &world, TENANTS).await;
    // One ReEncrypt each at least. Calls may come 100 ms early, and as many again as tenants are worked on at once.
    assert!(calls >= TENANTS as u64, "{calls} calls");
    assert!(
        took >= Duration::from_secs(1) * u32::try_from(calls - 10).unwrap() / 50,
        "{calls} calls in {took:?}"
    );
    let used = service.store.kek_use(&"local:one".parse().unwrap()).await.unwrap();
    let oldest = world.clock.now().since(used.oldest_wrapped_at.unwrap());
    assert!(oldest < Duration::from_hours(1), "not all were rewrapped: {oldest:?}");
    service.stop().await;
}

/// A round in which all of so many tenants have their turn, while time goes on by a tenth of a second at a time: how
/// many calls it made to the KMS in how much time.
async fn rotate_all(service: &Service, world: &World, tenants: usize) -> (u64, Duration) {
    let (before, start) = (world.kms.calls(), world.clock.monotonic());
    let rotation = service.app.rotation.clone();
    let mut tasks = JoinSet::new();
    tasks.spawn(async move { rotation.reconcile().await.unwrap() });
    loop {
        let waited = tokio::time::timeout(Duration::from_millis(10), tasks.join_next()).await;
        let took = world.clock.monotonic() - start;
        let calls = world.kms.calls() - before;
        let allowed = u64::try_from(took.as_millis()).unwrap() * 50 / 1_000 + 10;
        assert!(calls <= allowed, "{calls} calls in {took:?}");
        if let Ok(ended) = waited {
            let round = ended.unwrap().unwrap();
            // Who was nudged in the meantime, by the first to find the new material, has another turn.
            assert!(round.tenants >= tenants && round.failed == 0, "{round:?}");
            return (calls, took);
        }
        world.clock.advance(Duration::from_millis(100));
    }
}

/// Rotation asks the KMS too, and may be the first to hear of it.
#[tokio::test(flavor = "multi_thread")]
async fn what_rotation_hears_of_a_kek_takes_effect_for_what_is_in_memory() {
    let mut world = world().await;
    world.settings.rotation.kek_check_secs = 0;
    let service = world.start_without_keeper().await;
    let caller = service.tenant_and_caller("acme").await;
    history(&caller, 3).await;
    rotate(&service).await;
    let due = async || {
        service.store.nudge_sweep(&"acme".parse().unwrap(), world.clock.now()).await.unwrap();
    };
    // Described as disabled.
    caller.encrypt(b"hello", &json!({})).await;
    world.keyring.disable("one").await.unwrap();
    caller.encrypt(b"nobody has heard of it yet", &json!({})).await;
    due().await;
    service.app.rotation.reconcile().await.unwrap();
    caller.try_encrypt(b"hello", &json!({})).await.problem("kek_denied");
    world.keyring.enable("one").await.unwrap();
    world.pass(10);

    // Refused when data keys are to be rewrapped: several of them, which is one word.
    caller.encrypt(b"hello", &json!({})).await;
    let noted = service.store.denials_noted();
    world.keyring.rotate("one").await.unwrap();
    world.kms.fail(KmsFault::Denied);
    due().await;
    assert!(service.app.rotation.reconcile().await.unwrap().failed > 0);
    assert_eq!(service.app.pool().plaintext_deks(), 0);
    caller.try_encrypt(b"hello", &json!({})).await.problem("kek_denied");
    let wait = async {
        while service.store.denials_noted() == noted {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    assert!(tokio::time::timeout(Duration::from_secs(20), wait).await.is_ok(), "the others are not told");
    service.stop().await;
}
