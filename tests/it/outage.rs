//! Outage is not denial: what clients notice when the KMS hangs, throttles, is down, or says no.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use envelope::{EncryptionContext, WrappedDataKey, WrappedKeys};
use keyfold::config::{Settings, Variables};
use keyfold::store::{DekScope, Store as _, StoredDek, WrappedRecord};
use keyfold::tenant::Verb;
use kms_emulator::{CreateKey, Emulator, Fault, FaultScope, Principal, Role};
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::aws_world::AwsWorld;
use crate::caller::{Caller, text};
use crate::kms_aws::{FRANKFURT, IRELAND};
use crate::service::Service;

fn none() -> Value {
    json!({})
}

async fn ready(service: &Service) -> (String, String) {
    let answer = service.anonymous().get("/ready").await;
    (text(&answer.json["status"]), answer.json["reasons"].to_string())
}

/// Asks again, while the time runs, until the service says this of itself.
async fn until_ready_is(service: &Service, status: &str) {
    let wait = async {
        while ready(service).await.0 != status {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    let waited = tokio::time::timeout(Duration::from_secs(40), wait).await;
    assert!(waited.is_ok(), "waited in vain for {status}: {:?}", ready(service).await);
}

async fn active_dek(service: &Service, tenant: &str) -> StoredDek {
    let (tenant, key) = (tenant.parse().unwrap(), "default".parse().unwrap());
    let scope = DekScope { tenant, key, bound: EncryptionContext::new() };
    service.store.active_dek(&scope).await.unwrap().unwrap()
}

/// Keeps encrypting and decrypting until told to stop; gives back how often it did.
struct Load {
    stop: Arc<AtomicBool>,
    done: Arc<AtomicUsize>,
    failures: JoinSet<Vec<String>>,
}

impl Load {
    async fn on(callers: &[Caller]) -> Self {
        let (stop, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let mut failures = JoinSet::new();
        for caller in callers {
            let caller = caller.clone();
            let ciphertext = caller.encrypt(b"hello", &none()).await;
            let (stop, done) = (Arc::clone(&stop), Arc::clone(&done));
            failures.spawn(async move {
                let mut failures = Vec::new();
                while !stop.load(Ordering::SeqCst) {
                    for answer in [
                        caller.try_encrypt(b"hello", &none()).await,
                        caller.try_decrypt(&ciphertext, &none()).await,
                    ] {
                        if answer.status != 200 {
                            failures.push(answer.raw);
                        }
                    }
                    done.fetch_add(1, Ordering::SeqCst);
                    tokio::time::sleep(Duration::from_millis(2)).await;
                }
                failures
            });
        }
        Self { stop, done, failures }
    }

    /// Ends the load. Nothing may have failed.
    async fn was_served(self) {
        self.stop.store(true, Ordering::SeqCst);
        let failures: Vec<String> = self.failures.join_all().await.into_iter().flatten().collect();
        assert!(failures.is_empty(), "{} requests failed, such as {}", failures.len(), failures[0]);
        assert!(self.done.load(Ordering::SeqCst) > 50, "the load was no load");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_tenants_cost_one_call_each_and_after_a_restart_one_more_each() {
    let world = AwsWorld::new().await;
    let kek = world.key(IRELAND);
    let service = Arc::new(world.start().await);
    let mut clients = JoinSet::new();
    for n in 0..100 {
        let (service, kek) = (Arc::clone(&service), kek.clone());
        clients.spawn(async move {
            let tenant = format!("t{n}");
            service.tenant_with(&tenant, &[&kek]).await;
            let caller = service.caller(&[&tenant], &Verb::ALL).await;
            let mut ciphertexts = Vec::new();
            for _ in 0..100 {
                ciphertexts.push(caller.encrypt(b"hello", &none()).await);
            }
            (caller.token().to_owned(), ciphertexts)
        });
    }
    let sealed = clients.join_all().await;
    assert_eq!((world.count("GenerateDataKey"), world.count("Decrypt")), (100, 0));
    Service::stop(Arc::into_inner(service).unwrap()).await;

    let service = Arc::new(world.start().await);
    let mut clients = JoinSet::new();
    for (token, ciphertexts) in sealed {
        let caller = service.anonymous().with_token(token);
        clients.spawn(async move {
            for ciphertext in ciphertexts {
                assert_eq!(caller.decrypt(&ciphertext, &none()).await, b"hello");
            }
        });
    }
    clients.join_all().await;
    assert_eq!((world.count("GenerateDataKey"), world.count("Decrypt")), (100, 100));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_first_requests_of_a_cold_tenant_are_one_call() {
    let mut world = AwsWorld::new().await;
    // He is alone, and may fill the service.
    world.settings.http.fair_from_percent = 100;
    let service = world.start().await;
    let caller = world.tenant(&service, "acme", &[&world.key(IRELAND)]).await;
    world.emulator.faults().set(FaultScope::any(), Fault::latency(Duration::from_millis(300)));
    let mut clients = JoinSet::new();
    for _ in 0..1_000 {
        let caller = caller.clone();
        clients.spawn(async move { caller.encrypt(b"hello", &none()).await });
    }
    clients.join_all().await;
    assert_eq!((world.count("GenerateDataKey"), world.count("Decrypt")), (1, 0));
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cold_tenant_whose_kms_hangs_slows_down_neither_a_hot_one_nor_another_cold_one() {
    let mut world = AwsWorld::new().await;
    // One outage, and the region's circuit is open.
    world.settings.aws.breaker_failures = 1;
    let service = world.start().await;
    let (hung, fine) = (world.key(IRELAND), world.key(IRELAND));
    let hanging = world.tenant(&service, "hanging", &[&hung]).await;
    let hot = world.tenant(&service, "hot", &[&fine]).await;
    let cold = world.tenant(&service, "cold", &[&fine]).await;
    hot.encrypt(b"hello", &none()).await;
    world.emulator.faults().set(FaultScope::key(&hung), Fault::BlackHole);
    let mut hangs = JoinSet::new();
    for _ in 0..100 {
        let hanging = hanging.clone();
        hangs.spawn(async move { hanging.try_encrypt(b"hello", &none()).await });
    }
    tokio::time::sleep(Duration::from_millis(200)).await;
    let at_once = async {
        for _ in 0..200 {
            hot.encrypt(b"hello", &none()).await;
        }
        cold.encrypt(b"hello", &none()).await
    };
    let served = tokio::time::timeout(Duration::from_secs(1), at_once).await;
    assert!(served.is_ok(), "others wait for the tenant whose KMS hangs");
    for answer in hangs.join_all().await {
        answer.problem("kms_unavailable");
        assert_eq!(answer.headers["retry-after"], "5", "the circuit is open for five seconds");
    }
    assert_eq!(ready(&service).await.0, "degraded", "the region's circuit is open");
    // For another tenant's key that is no reason to be refused.
    let third = world.tenant(&service, "third", &[&world.key(IRELAND)]).await;
    third.encrypt(b"hello", &none()).await;
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn with_its_first_region_black_holed_no_hot_request_fails_and_cold_tenants_go_to_the_second() {
    let world = AwsWorld::new().await;
    let service = world.start().await;
    let (ireland, frankfurt) = (world.key(IRELAND), world.key(FRANKFURT));
    let [primary, replica] = world.replicated_key();
    let mut hot = Vec::new();
    for (n, ring) in [[&*ireland, &*frankfurt], [&*primary, &*replica]].iter().cycle().take(10).enumerate() {
        hot.push(world.tenant(&service, &format!("hot{n}"), ring).await);
    }
    let cold = world.tenant(&service, "cold", &[&ireland, &frankfurt]).await;
    let cold_too = world.tenant(&service, "cold-too", &[&primary, &replica]).await;
    let load = Load::on(&hot).await;
    // Another process, which has nothing in memory.
    let fresh = world.start().await;
    let mut to_open = Vec::new();
    for caller in &hot[..2] {
        let ciphertext = caller.encrypt(b"hello", &none()).await;
        to_open.push((fresh.anonymous().with_token(caller.token()), ciphertext));
    }
    world.emulator.faults().set(FaultScope::region(IRELAND), Fault::BlackHole);

    let started = world.clock.monotonic();
    let ciphertext = cold.encrypt(b"hello", &none()).await;
    cold_too.encrypt(b"hello", &none()).await;
    for (caller, ciphertext) in &to_open {
        assert_eq!(caller.decrypt(ciphertext, &none()).await, b"hello");
    }
    let took = world.clock.monotonic().checked_sub(started).unwrap();
    assert!(took < Duration::from_secs(5), "{took:?}");
    fresh.stop().await;
    let forms = active_dek(&service, "cold").await.wrapped;
    assert_eq!(forms.len(), 1, "the member that is down is missing");
    assert_eq!(forms[0].kek.as_str(), frankfurt);

    // Far past the time at which every data key has to be vouched for again.
    world.pass(700).await;
    load.was_served().await;
    let (status, reasons) = ready(&service).await;
    assert_eq!(status, "degraded");
    assert!(reasons.contains(IRELAND) && reasons.contains("since 2026-11-23T12:"), "{reasons}");
    assert!(!reasons.contains(FRANKFURT), "{reasons}");

    // The region is back: one probe closes its circuit, without a restart.
    world.emulator.faults().clear();
    world.pass(300).await;
    until_ready_is(&service, "ready").await;
    assert_eq!(cold.decrypt(&ciphertext, &none()).await, b"hello");
    let wait = async {
        while active_dek(&service, "cold").await.wrapped.len() < 2 {
            world.pass(10).await;
        }
    };
    let added = tokio::time::timeout(Duration::from_secs(120), wait).await;
    assert!(added.is_ok(), "the missing wrapped form is not added");
    let new = world.tenant(&service, "new", &[&ireland, &frankfurt]).await;
    new.encrypt(b"hello", &none()).await;
    assert_eq!(active_dek(&service, "new").await.wrapped.len(), 2, "new data keys have both forms again");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_hour_without_any_region_is_outlasted_by_hot_tenants_and_ends_with_one_probe() {
    let world = AwsWorld::new().await;
    let service = world.start().await;
    let ring = [world.key(IRELAND), world.key(FRANKFURT)];
    let ring = ring.each_ref().map(String::as_str);
    let hot = world.tenant(&service, "hot", &ring).await;
    let cold = world.tenant(&service, "cold", &ring).await;
    let ciphertext = hot.encrypt(b"hello", &none()).await;
    world.emulator.faults().set(FaultScope::any(), Fault::Unavailable);
    let out_since = world.clock.monotonic();
    let refused = cold.try_encrypt(b"hello", &none()).await;
    refused.problem("kms_unavailable");
    assert_eq!(refused.headers["retry-after"], "1");
    // 300 seconds after it was last vouched for, and 3,600 more, less the second or so that this test takes itself.
    while world.clock.monotonic().checked_sub(out_since).unwrap() < Duration::from_secs(3_880) {
        hot.encrypt(b"hello", &none()).await;
        assert_eq!(hot.decrypt(&ciphertext, &none()).await, b"hello");
        world.pass(10).await;
    }
    assert_eq!(ready(&service).await.0, "degraded");
    // An outage is no reason to ask more often. Each region is looked at every 30 seconds at most.
    let calls = world.calls_to(IRELAND);
    assert!(calls < 3_900 / 10, "{calls} calls to a region that is down");
    world.pass(30).await;
    hot.try_encrypt(b"hello", &none()).await.problem("kms_unavailable");
    // The circuits have been open for long: they are looked at every 30 seconds, and each answer tells when next.
    let mut told: Vec<u64> = Vec::new();
    for _ in 0..3 {
        let refused = hot.try_decrypt(&ciphertext, &none()).await;
        refused.problem("kms_unavailable");
        told.push(refused.headers["retry-after"].to_str().unwrap().parse().unwrap());
        world.pass(2).await;
    }
    assert!(told.iter().all(|seconds| (1..=30).contains(seconds)), "{told:?}");
    assert!(told.iter().any(|seconds| *seconds > 1), "{told:?}");
    world.pass(10).await;
    wiped_by_the_background(&service).await;
    assert_eq!(ready(&service).await.0, "unable");
    assert_eq!(service.anonymous().get("/live").await.status, 200, "the process is not to blame");

    world.emulator.faults().clear();
    // The longest that a circuit stays open.
    world.pass(31).await;
    hot.encrypt(b"hello", &none()).await;
    assert_eq!(hot.decrypt(&ciphertext, &none()).await, b"hello");
    cold.encrypt(b"hello", &none()).await;
    assert_eq!(ready(&service).await.0, "ready");
    service.stop().await;
}

/// The clock stands still meanwhile, so this waits for one round of the background and for no other time: what is past
/// its limit goes in the first round after it, whether a renewal was due in that round or not.
async fn wiped_by_the_background(service: &Service) {
    for _ in 0..2_000 {
        if service.app.pool().plaintext_deks() == 0 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("a data key past its last limit is still in memory");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disabled_kek_cuts_its_tenant_off_in_time_under_load_and_enabled_again_it_works() {
    let world = AwsWorld::new().await;
    let service = world.start().await;
    let (cut_off, others) = (world.key(IRELAND), world.key(IRELAND));
    let tenant = world.tenant(&service, "cut-off", &[&cut_off]).await;
    let other = world.tenant(&service, "other", &[&others]).await;
    let ciphertext = tenant.encrypt(b"hello", &none()).await;
    let load = Load::on(std::slice::from_ref(&other)).await;
    world.emulator.disable_key(&cut_off).unwrap();
    let disabled_at = world.clock.monotonic();
    let mut served_last = disabled_at;
    loop {
        let now = world.clock.monotonic();
        if now.checked_sub(disabled_at).unwrap() > Duration::from_secs(400) {
            break;
        }
        for answer in
            [tenant.try_encrypt(b"hello", &none()).await, tenant.try_decrypt(&ciphertext, &none()).await]
        {
            match answer.status {
                200 => served_last = now,
                _ => {
                    answer.problem("kek_denied");
                }
            }
        }
        world.pass(5).await;
    }
    let lasted = served_last.checked_sub(disabled_at).unwrap();
    assert!(lasted < Duration::from_secs(300), "served {lasted:?} after the KEK was disabled");
    load.was_served().await;
    assert_eq!(ready(&service).await.0, "ready", "a denial is no outage");

    world.emulator.enable_key(&cut_off).unwrap();
    world.pass(2).await;
    tenant.encrypt(b"hello", &none()).await;
    assert_eq!(tenant.decrypt(&ciphertext, &none()).await, b"hello");
    service.stop().await;
}

/// Whoever hears of a denial: what is in memory of that KEK is not used for the rest of its time.
#[tokio::test(flavor = "multi_thread")]
async fn a_denial_that_one_request_meets_takes_effect_at_once_for_everything_under_that_kek() {
    let world = AwsWorld::new().await;
    let service = world.start().await;
    let (kek, others) = (world.key(IRELAND), world.key(IRELAND));
    let hot = world.tenant(&service, "hot", &[&kek]).await;
    let hot_too = world.tenant(&service, "hot-too", &[&kek]).await;
    let cold = world.tenant(&service, "cold", &[&kek]).await;
    let elsewhere = world.tenant(&service, "elsewhere", &[&others]).await;
    let ciphertext = hot_too.encrypt(b"hello", &none()).await;
    for caller in [&hot, &elsewhere] {
        caller.encrypt(b"hello", &none()).await;
    }
    world.emulator.disable_key(&kek).unwrap();
    hot.encrypt(b"hello", &none()).await;
    cold.try_encrypt(b"hello", &none()).await.problem("kek_denied");
    hot.try_encrypt(b"hello", &none()).await.problem("kek_denied");
    hot_too.try_decrypt(&ciphertext, &none()).await.problem("kek_denied");
    elsewhere.encrypt(b"hello", &none()).await;
    assert_eq!(service.app.pool().plaintext_deks(), 1);
    service.stop().await;
}

/// The denial counts for the replica too, even where only the replica could still be used.
#[tokio::test(flavor = "multi_thread")]
async fn a_replica_is_no_way_round_a_denial_and_a_key_of_its_own_is() {
    let world = AwsWorld::new().await;
    let service = world.start().await;
    let [primary, replica] = world.replicated_key();
    let (first, second) = (world.key(IRELAND), world.key(FRANKFURT));
    let replicated = world.tenant(&service, "replicated", &[&primary, &replica]).await;
    let separate = world.tenant(&service, "separate", &[&first, &second]).await;
    let ciphertexts =
        [replicated.encrypt(b"hello", &none()).await, separate.encrypt(b"hello", &none()).await];
    world.emulator.disable_key(&primary).unwrap();
    world.emulator.disable_key(&first).unwrap();
    world.pass(310).await;
    let before = world.calls_to(FRANKFURT);
    replicated.try_decrypt(&ciphertexts[0], &none()).await.problem("kek_denied");
    assert_eq!(world.calls_to(FRANKFURT), before, "the replica was asked");
    assert_eq!(separate.decrypt(&ciphertexts[1], &none()).await, b"hello");
    service.stop().await;
}

/// What the second key's KMS has to say is not known yet: that may pass, and is no denial.
#[tokio::test(flavor = "multi_thread")]
async fn one_key_that_says_no_and_another_that_does_not_answer_are_an_outage() {
    let world = AwsWorld::new().await;
    let service = world.start().await;
    let (first, second) = (world.key(IRELAND), world.key(FRANKFURT));
    let hot = world.tenant(&service, "hot", &[&first, &second]).await;
    let cold = world.tenant(&service, "cold", &[&first, &second]).await;
    hot.encrypt(b"hello", &none()).await;
    world.emulator.disable_key(&first).unwrap();
    world.pass(310).await;
    hot.encrypt(b"the second key vouches for it", &none()).await;
    world.emulator.faults().set(FaultScope::region(FRANKFURT), Fault::Unavailable);
    cold.try_encrypt(b"hello", &none()).await.problem("kms_unavailable");
    for _ in 0..4 {
        hot.encrypt(b"hello", &none()).await;
        world.pass(100).await;
    }
    hot.encrypt(b"hello", &none()).await;
    world.emulator.faults().clear();
    world.emulator.disable_key(&second).unwrap();
    // The longest that a circuit stays open, and as long as an error is remembered.
    world.pass(32).await;
    until_all_are_dropped(&service).await;
    hot.try_encrypt(b"hello", &none()).await.problem("kek_denied");
    cold.try_encrypt(b"hello", &none()).await.problem("kek_denied");
    service.stop().await;
}

/// The replica is asked beside a key that keeps silent for a moment, and answers first; the no that comes after counts.
#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_answers_faster_is_no_way_round_a_denial() {
    let world = AwsWorld::new().await;
    let service = world.start().await;
    let [primary, replica] = world.replicated_key();
    let caller = world.tenant(&service, "acme", &[&primary, &replica]).await;
    let ciphertext = caller.encrypt(b"hello", &none()).await;
    world.emulator.faults().set(FaultScope::region(IRELAND), Fault::latency(Duration::from_millis(900)));
    world.emulator.disable_key(&primary).unwrap();
    // Nothing in memory counts any more: the first call may still be faster than the denial.
    world.clock.advance(Duration::from_secs(310));
    let _ = caller.try_decrypt(&ciphertext, &none()).await;
    until_all_are_dropped(&service).await;
    for _ in 0..3 {
        // As long as an error is remembered.
        pass_slowly(&world, 2).await;
        caller.try_decrypt(&ciphertext, &none()).await.problem("kek_denied");
        caller.try_encrypt(b"hello", &none()).await.problem("kek_denied");
    }
    world.emulator.enable_key(&primary).unwrap();
    pass_slowly(&world, 2).await;
    assert_eq!(caller.decrypt(&ciphertext, &none()).await, b"hello");
    service.stop().await;
}

/// Waits for the background to hear of a denial, while the time runs as fast as the world's.
async fn until_all_are_dropped(service: &Service) {
    for _ in 0..400 {
        if service.app.pool().plaintext_deks() == 0 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("{} data keys of a KEK that said no are in memory", service.app.pool().plaintext_deks());
}

/// Moves the time on at five times the world's pace, so that a call to the KMS may take its time meanwhile.
async fn pass_slowly(world: &AwsWorld, secs: u64) {
    for _ in 0..secs * 5 {
        world.clock.advance(Duration::from_millis(160));
        tokio::time::sleep(Duration::from_millis(40)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn where_data_keys_live_for_ten_seconds_a_kms_that_hangs_is_outlasted_and_a_denial_is_heard_in_time() {
    let mut world = AwsWorld::new().await;
    world.settings.pool.dek_plaintext_secs_max = 10;
    // As if others' calls kept the circuit closed.
    world.settings.aws.breaker_failures = 1_000_000;
    let service = world.start().await;
    let kek = world.key(IRELAND);
    let hot = world.tenant(&service, "hot", &[&kek]).await;
    hot.encrypt(b"hello", &none()).await;
    world.emulator.faults().set(FaultScope::key(&kek), Fault::BlackHole);
    for second in 0..45 {
        let asked = tokio::time::timeout(Duration::from_secs(1), hot.try_encrypt(b"hello", &none())).await;
        let answer = asked.unwrap_or_else(|_| panic!("a hot request waits for the KMS in second {second}"));
        assert_eq!(answer.status, 200, "in second {second}: {}", answer.raw);
        pass_slowly(&world, 1).await;
    }
    world.emulator.faults().clear();
    world.emulator.disable_key(&kek).unwrap();
    pass_slowly(&world, 10).await;
    hot.try_encrypt(b"hello", &none()).await.problem("kek_denied");
    service.stop().await;
}

/// A tenant's turns at the KMS are few, and here all are taken by calls that hang.
#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_with_two_hundred_hot_data_keys_outlasts_a_kms_that_hangs_for_him_alone() {
    let mut world = AwsWorld::new().await;
    world.settings.aws.breaker_failures = 1_000_000;
    let service = world.start().await;
    let kek = world.key(IRELAND);
    let hot = world.tenant(&service, "hot", &[&kek]).await;
    for n in 0..200 {
        hot.post("/v1/tenants/hot/keys", &json!({"key": format!("k{n}")})).await.ok(201);
    }
    assert!(not_served(&hot).await.is_empty());
    world.emulator.faults().set(FaultScope::key(&kek), Fault::BlackHole);
    for _ in 0..30 {
        let not_served = not_served(&hot).await;
        let example = not_served.first();
        assert!(not_served.is_empty(), "{} of 200 were not served, such as {example:?}", not_served.len());
        world.pass(20).await;
    }
    world.emulator.faults().clear();
    world.emulator.disable_key(&kek).unwrap();
    until_all_are_dropped(&service).await;
    assert_eq!(not_served(&hot).await.len(), 200);
    service.stop().await;
}

/// Encrypts once under each of the tenant's two hundred keys, all at once: the answers that were no success.
async fn not_served(caller: &Caller) -> Vec<String> {
    let mut clients = JoinSet::new();
    for n in 0..200 {
        let caller = caller.clone();
        clients.spawn(async move {
            let body = json!({"plaintext": "aGVsbG8=", "key": format!("k{n}")});
            caller.post("/v1/encrypt", &body).await
        });
    }
    let answers = clients.join_all().await;
    answers.into_iter().filter(|answer| answer.status != 200).map(|answer| answer.raw).collect()
}

/// Only a KMS that does not answer lengthens a data key's life: that others have taken all the calls does not.
#[tokio::test(flavor = "multi_thread")]
async fn a_crowd_that_takes_all_the_calls_to_the_kms_does_not_put_off_a_denial() {
    let mut world = AwsWorld::new().await;
    world.settings.aws.calls_per_sec_max = 5;
    world.settings.pool.dek_plaintext_secs_max = 60;
    world.settings.pool.tenant_deks_max = 1;
    let service = world.start().await;
    let (cut_off, others) = (world.key(IRELAND), world.key(IRELAND));
    let hot = world.tenant(&service, "hot", &[&cut_off]).await;
    let crowd = world.tenant(&service, "crowd", &[&others]).await;
    let mut ciphertexts = Vec::new();
    for n in 0..32 {
        world.clock.advance(Duration::from_secs(1));
        crowd.post("/v1/tenants/crowd/keys", &json!({"key": format!("k{n}")})).await.ok(201);
        let body = json!({"plaintext": "aGVsbG8=", "key": format!("k{n}")});
        ciphertexts.push(text(&crowd.post("/v1/encrypt", &body).await.ok(200)["ciphertext"]));
    }
    hot.encrypt(b"hello", &none()).await;
    let mut clients = JoinSet::new();
    for ciphertext in ciphertexts {
        let crowd = crowd.clone();
        clients.spawn(async move {
            loop {
                crowd.try_decrypt(&ciphertext, &none()).await;
            }
        });
    }
    world.emulator.disable_key(&cut_off).unwrap();
    let disabled_at = world.clock.monotonic();
    let since = || world.clock.monotonic().checked_sub(disabled_at).unwrap();
    let mut served_last = Duration::ZERO;
    while since() < Duration::from_secs(90) {
        let asked_after = since();
        if hot.try_encrypt(b"hello", &none()).await.status == 200 {
            served_last = asked_after;
        }
        pass_slowly(&world, 1).await;
    }
    assert!(served_last < Duration::from_secs(60), "served {served_last:?} after the KEK was disabled");
    clients.shutdown().await;
    pass_slowly(&world, 6).await;
    hot.try_encrypt(b"hello", &none()).await.problem("kek_denied");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn unwrapping_goes_to_the_nearest_region_first() {
    let mut world = AwsWorld::new().await;
    world.settings.aws.regions_nearest = vec![FRANKFURT.to_owned()];
    let service = world.start().await;
    let ring = [world.key(IRELAND), world.key(FRANKFURT)];
    let caller = world.tenant(&service, "acme", &ring.each_ref().map(String::as_str)).await;
    let ciphertext = caller.encrypt(b"hello", &none()).await;
    let token = caller.token().to_owned();
    service.stop().await;
    let service = world.start().await;
    let mark = world.emulator.mark();
    service.anonymous().with_token(token).decrypt(&ciphertext, &none()).await;
    let calls = world.emulator.calls_since(mark);
    assert_eq!(calls.len(), 1);
    assert_eq!((calls[0].operation.as_str(), calls[0].region.as_str()), ("Decrypt", FRANKFURT));
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn where_five_calls_a_second_are_allowed_the_service_sends_no_more() {
    let mut world = AwsWorld::new().await;
    world.settings.aws.calls_per_sec_max = 5;
    let (answers, throttled, sent) = crowd_of_cold_tenants(&world).await;
    assert_eq!(throttled, 0, "of {sent} calls");
    assert!(answers.iter().filter(|status| **status == 200).count() >= 20, "{answers:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn where_the_kms_throttles_at_five_a_second_there_is_no_storm() {
    let world = AwsWorld::new().await;
    let (answers, throttled, sent) = crowd_of_cold_tenants(&world).await;
    assert!(answers.iter().filter(|status| **status == 200).count() >= 15, "{answers:?}");
    // The crowd comes at once and learns by it, up to the limit of calls in flight; then hardly any is for nothing.
    assert!(throttled <= 64 + 20, "{throttled} of {sent} calls were throttled");
}

/// A hundred cold tenants come at once to a KMS that allows five calls a second: the statuses of the answers, how
/// many calls were throttled, and how many were sent.
async fn crowd_of_cold_tenants(world: &AwsWorld) -> (Vec<u16>, usize, usize) {
    let service = world.start().await;
    let kek = world.key(IRELAND);
    let mut callers = Vec::new();
    for n in 0..100 {
        let id = format!("t{n}");
        callers.push(loop {
            // Describing the KEK counts too.
            let operate = keyfold::access::Principal::local_operator().permit_operate().unwrap();
            let ring = keyfold::tenant::KekRing::new(vec![crate::kms_aws::kek(&kek)]).unwrap();
            world.clock.advance(Duration::from_secs(1));
            if service.app.operations.create_tenant(&operate, id.parse().unwrap(), ring).await.is_ok() {
                break service.caller(&[&id], &Verb::ALL).await;
            }
        });
    }
    world.pass(10).await;
    world.emulator.faults().set(FaultScope::any(), Fault::throttle(5));
    let mark = world.emulator.mark();
    let mut clients = JoinSet::new();
    for caller in callers {
        clients.spawn(async move { caller.try_encrypt(b"hello", &none()).await });
    }
    let mut statuses = Vec::new();
    for answer in clients.join_all().await {
        if answer.status != 200 {
            answer.problem("kms_unavailable");
        }
        statuses.push(answer.status);
    }
    let calls = world.emulator.calls_since(mark);
    let throttled = calls.iter().filter(|call| call.error_code() == Some("ThrottlingException")).count();
    service.stop().await;
    (statuses, throttled, calls.len())
}

/// The blob in this place of the registry instead of the one that belongs there.
async fn put(service: &Service, dek: &StoredDek, blob: &[u8]) {
    let form = WrappedRecord { blob: blob.to_vec(), ..dek.wrapped[0].clone() };
    service.store.put_wrapped(dek.dek.id, &form).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn wrapped_forms_swapped_in_the_registry_are_refused() {
    let world = AwsWorld::new().await;
    let service = world.start().await;
    let kek = world.key(IRELAND);
    let (acme, emil) =
        (world.tenant(&service, "acme", &[&kek]).await, world.tenant(&service, "emil", &[&kek]).await);
    let ciphertext = acme.encrypt(b"hello", &none()).await;
    emil.encrypt(b"hello", &none()).await;
    let older = active_dek(&service, "acme").await;
    acme.post("/v1/tenants/acme/keys", &json!({"key": "other"})).await.ok(201);
    let body = json!({"plaintext": "aGVsbG8=", "key": "other"});
    acme.post("/v1/encrypt", &body).await.ok(200);
    let other_key = {
        let scope = DekScope { key: "other".parse().unwrap(), ..older.dek.scope.clone() };
        service.store.active_dek(&scope).await.unwrap().unwrap()
    };
    let others = active_dek(&service, "emil").await;
    let token = acme.token().to_owned();
    let mut service = service;
    for foreign in [&others, &other_key] {
        put(&service, &older, &foreign.wrapped[0].blob).await;
        service.stop().await;
        service = world.start().await;
        let caller = service.anonymous().with_token(token.clone());
        caller.try_decrypt(&ciphertext, &none()).await.problem("context_mismatch");
        caller.try_encrypt(b"hello", &none()).await.problem("internal_error");
    }
    put(&service, &older, &older.wrapped[0].blob).await;
    world.pass(5).await;
    assert_eq!(service.anonymous().with_token(token).decrypt(&ciphertext, &none()).await, b"hello");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn wrapped_forms_swapped_in_an_envelope_are_refused() {
    let world = AwsWorld::new().await;
    let service = world.start().await;
    let kek = world.key(IRELAND);
    let acme = world.tenant(&service, "acme", &[&kek]).await;
    let emil = world.tenant(&service, "emil", &[&kek]).await;
    let (ours, theirs) = (acme.encrypt(b"hello", &none()).await, emil.encrypt(b"hello", &none()).await);
    service.stop().await;
    // The registry is lost: all there is, is in the envelopes.
    std::fs::remove_file(world.settings.registry_file()).unwrap();
    let service = world.start().await;
    let acme = world.tenant(&service, "acme", &[&kek]).await;
    let ours = envelope::text::decode(&ours).unwrap();
    let theirs = envelope::text::decode(&theirs).unwrap();
    let (own, foreign) = (envelope::inspect(&ours).unwrap(), envelope::inspect(&theirs).unwrap());
    let own_context = own.wrapped().kms_context().unwrap();
    let foreign_context = foreign.wrapped().kms_context().unwrap();
    let with = |context: &EncryptionContext, keys: &[WrappedDataKey]| {
        let section = WrappedKeys::new(context, keys).unwrap();
        envelope::text::encode(&envelope::with_wrapped_keys(&ours, &section).unwrap())
    };
    let not_of_the_ring =
        WrappedDataKey { kek: world.key(IRELAND), blob: own.wrapped().keys()[0].blob.clone() };
    for forged in [
        with(own_context, foreign.wrapped().keys()),
        with(foreign_context, foreign.wrapped().keys()),
        with(foreign_context, own.wrapped().keys()),
        with(own_context, &[not_of_the_ring]),
        envelope::text::encode(&theirs),
    ] {
        acme.try_decrypt(&forged, &none()).await.problem("context_mismatch");
        world.pass(2).await;
    }
    assert_eq!(acme.decrypt(&envelope::text::encode(&ours), &none()).await, b"hello");
    service.stop().await;
}

/// A policy that allows all of KMS and STS.
fn everything() -> String {
    let statement = json!([{"Effect": "Allow", "Action": "*", "Resource": "*"}]);
    json!({"Version": "2012-10-17", "Statement": statement}).to_string()
}

/// Nobody has decided anything about the key, and yet nobody is served.
#[tokio::test(flavor = "multi_thread")]
async fn credentials_that_the_kms_does_not_take_show_in_readiness_until_it_takes_them() {
    let keyfold = Principal::new("arn:aws:iam::111122223333:user/keyfold").identity_policy(everything());
    let builder = Emulator::builder().region(IRELAND).region(FRANKFURT).strict_credentials();
    let world = AwsWorld::of(builder.principal("AKIAGOOD", keyfold.clone())).await;
    let service = world.start_as("AKIAGOOD").await;
    let acme = world.tenant(&service, "acme", &[&world.key(IRELAND)]).await;
    let ciphertext = acme.encrypt(b"hello", &none()).await;
    let token = acme.token().to_owned();
    service.stop().await;

    let service = world.start_as("AKIALATER").await;
    let acme = service.anonymous().with_token(token);
    let refused_at = world.clock.monotonic();
    acme.try_decrypt(&ciphertext, &none()).await.problem("kms_unavailable");
    world.pass(2).await;
    let (status, reasons) = ready(&service).await;
    assert_eq!(status, "unable", "no data key is in memory, and none can be had");
    for said in [IRELAND, "credentials", "since 2026-11-23T12:", "web identity"] {
        assert!(reasons.contains(said), "{said}: {reasons}");
    }
    // Without requests nobody would ever find out that it is over.
    let elapsed = world.clock.monotonic().checked_sub(refused_at).unwrap();
    world.pass(62_u64.saturating_sub(elapsed.as_secs())).await;
    assert_eq!(ready(&service).await.0, "degraded");

    world.emulator.add_principal("AKIALATER", keyfold).unwrap();
    assert_eq!(acme.decrypt(&ciphertext, &none()).await, b"hello");
    world.pass(2).await;
    assert_eq!(ready(&service).await.0, "ready");

    // What throttles is told too, and is no reason to be taken out.
    world.emulator.faults().set(FaultScope::any(), Fault::throttle(0));
    let cold = service.anonymous().with_token(acme.token());
    world.pass(310).await;
    cold.try_decrypt(&ciphertext, &none()).await;
    world.pass(2).await;
    let (status, reasons) = ready(&service).await;
    assert_eq!(status, "degraded");
    assert!(reasons.contains("throttles"), "{reasons}");
    service.stop().await;
}

/// As docs/aws.md says it to owners: each key of a ring opens everything, so all of them have to be disabled.
#[tokio::test(flavor = "multi_thread")]
async fn who_disables_one_key_of_a_ring_cuts_nobody_off_and_who_disables_all_of_them_does() {
    let mut world = AwsWorld::new().await;
    world.settings.aws.regions_nearest = vec![FRANKFURT.to_owned()];
    let service = world.start().await;
    let separate = [world.key(FRANKFURT), world.key(IRELAND)];
    // The nearest is the replica: the primary is never asked.
    let [primary, replica] = world.replicated_key();
    let replicated = [replica, primary];
    let mut tenants = Vec::new();
    for (id, ring) in [("separate", &separate), ("replicated", &replicated)] {
        let caller = world.tenant(&service, id, &ring.each_ref().map(String::as_str)).await;
        let ciphertext = caller.encrypt(b"hello", &none()).await;
        tenants.push((caller, ciphertext));
    }
    world.emulator.disable_key(&separate[0]).unwrap();
    world.emulator.disable_key(&replicated[1]).unwrap();
    world.pass(310).await;
    for (caller, ciphertext) in &tenants {
        assert_eq!(caller.decrypt(ciphertext, &none()).await, b"hello");
        caller.encrypt(b"hello", &none()).await;
    }
    world.emulator.disable_key(&separate[1]).unwrap();
    world.emulator.disable_key(&replicated[0]).unwrap();
    world.pass(310).await;
    for (caller, ciphertext) in &tenants {
        caller.try_decrypt(ciphertext, &none()).await.problem("kek_denied");
        caller.try_encrypt(b"hello", &none()).await.problem("kek_denied");
    }
    service.stop().await;
}

/// The session that is there lasts for the 900 seconds that docs/aws.md names; the next one is not granted.
#[tokio::test(flavor = "multi_thread")]
async fn a_role_that_no_longer_trusts_the_service_cuts_its_tenant_off_with_the_next_session() {
    const ROLE: &str = "arn:aws:iam::444455556666:role/keyfold";
    let service_user = "arn:aws:iam::111122223333:user/keyfold";
    let role = || Role::new(ROLE).external_id("acme-7f3a");
    let builder = Emulator::builder().region(IRELAND).role(role().trust(service_user));
    let keyfold = Principal::new(service_user).identity_policy(everything());
    let world = AwsWorld::of(builder.principal("AKIASERVICE", keyfold)).await;
    let kek = world.emulator.create_key(IRELAND, CreateKey::new().account("444455556666")).unwrap();
    let service = world.start_as("AKIASERVICE").await;
    let operator = world.tenant(&service, "operator", &[&world.key(IRELAND)]).await;
    let keks = json!([{"kek": kek, "role": ROLE, "external_id": "acme-7f3a"}]);
    operator.post("/v1/tenants", &json!({"tenant": "acme", "keks": keks})).await.ok(201);
    let acme = service.caller(&["acme"], &Verb::ALL).await;
    let ciphertext = acme.encrypt(b"hello", &none()).await;
    let token = acme.token().to_owned();

    world.emulator.faults().set(FaultScope::any().operation("AssumeRole"), Fault::Deny);
    world.pass(310).await;
    assert_eq!(acme.decrypt(&ciphertext, &none()).await, b"hello", "the session that is there still counts");
    // It runs out. Until the next one is asked for this is no word of the owner's.
    world.emulator.advance(Duration::from_secs(901));
    world.pass(310).await;
    assert_eq!(acme.decrypt(&ciphertext, &none()).await, b"hello", "outlasted, as an outage is");
    service.stop().await;
    let service = world.start_as("AKIASERVICE").await;
    let acme = service.anonymous().with_token(token);
    acme.try_decrypt(&ciphertext, &none()).await.problem("kek_denied");
    acme.try_encrypt(b"hello", &none()).await.problem("kek_denied");
    world.emulator.faults().clear();
    world.pass(2).await;
    assert_eq!(acme.decrypt(&ciphertext, &none()).await, b"hello");
    service.stop().await;
}

/// The KMS is to blame, and the caller hears so, however short the time for requests is.
#[tokio::test(flavor = "multi_thread")]
async fn with_a_short_time_for_requests_a_kms_that_hangs_is_no_matter_of_the_deadline() {
    let mut world = AwsWorld::new().await;
    let short = Variables::of([("KEYFOLD_HTTP__REQUEST_SECS_MAX", "2")]);
    let data_dir = world.settings.data_dir.clone();
    world.settings = Settings { data_dir, ..Settings::load(None, &short).unwrap() };
    let service = world.start().await;
    let ring = [world.key(IRELAND), world.key(FRANKFURT)];
    let caller = world.tenant(&service, "acme", &ring.each_ref().map(String::as_str)).await;
    world.emulator.faults().set(FaultScope::any(), Fault::BlackHole);
    caller.try_encrypt(b"hello", &none()).await.problem("kms_unavailable");
    service.stop().await;
}
