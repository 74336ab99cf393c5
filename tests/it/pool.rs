//! Data keys as a caller notices them: how often the KMS is asked, how long plaintext keys live, when a new one is made.

use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::caller::{Caller, plaintext, text};
use crate::probes::KmsFault;
use crate::service::{Service, World};

/// Lets the background run until `done`; fails if that does not come about.
async fn until(what: &str, done: impl Fn() -> bool) {
    let wait = async {
        while !done() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    assert!(tokio::time::timeout(Duration::from_secs(20), wait).await.is_ok(), "waited in vain: {what}");
}

async fn dek_of(caller: &Caller, key: &str, plaintext: &[u8]) -> String {
    let body = json!({"plaintext": STANDARD.encode(plaintext), "key": key});
    text(&caller.post("/v1/encrypt", &body).await.ok(200)["dek_id"])
}

async fn key_with(caller: &Caller, key: &str, policy: Value) {
    caller.post("/v1/tenants/acme/keys", &json!({"key": key, "policy": policy})).await.ok(201);
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_messages_of_a_hundred_tenants_ask_the_kms_once_for_each_tenant() {
    let world = World::new().await;
    let service = Arc::new(world.start().await);
    let mut clients = JoinSet::new();
    for n in 0..100 {
        let service = Arc::clone(&service);
        clients.spawn(async move {
            let tenant = format!("t{n}");
            let caller = service.tenant_and_caller(&tenant).await;
            for _ in 0..100 {
                let request = caller.request(reqwest::Method::POST, "/v1/encrypt");
                let request = request.header("content-type", "application/json");
                let response = request.body(r#"{"plaintext":"aGVsbG8="}"#).send().await.unwrap();
                assert_eq!(response.status(), 200);
                response.bytes().await.unwrap();
            }
        });
    }
    clients.join_all().await;
    for n in 0..100 {
        assert_eq!(world.kms.generates_of(&format!("t{n}")), 1);
    }
    assert_eq!(world.kms.unwraps(), 0);
    assert_eq!(service.app.pool().plaintext_deks(), 100);
}

/// The requests all wait for one KMS call.
#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_first_requests_of_a_cold_tenant_make_one_kms_call() {
    let mut world = World::new().await;
    // He is alone, and may fill the service.
    world.settings.http.fair_from_percent = 100;
    let service = world.start().await;
    let caller = service.tenant_and_caller("acme").await;
    let before = world.kms.calls();
    world.kms.hold();
    let mut clients = JoinSet::new();
    for _ in 0..1_000 {
        let caller = caller.clone();
        clients.spawn(async move { text(&caller.try_encrypt(b"hello", &json!({})).await.ok(200)["dek_id"]) });
    }
    world.kms.arrived(before + 1).await;
    // The rest arrive while the first is answered, or after: both must not ask again.
    tokio::time::sleep(Duration::from_millis(200)).await;
    world.kms.release();
    let mut deks = clients.join_all().await;
    deks.sort();
    deks.dedup();
    assert_eq!((deks.len(), world.kms.generates()), (1, 1));
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_first_decrypts_after_a_restart_make_one_kms_call() {
    let mut world = World::new().await;
    // He is alone, and may fill the service.
    world.settings.http.fair_from_percent = 100;
    let service = world.start().await;
    let caller = service.tenant_and_caller("acme").await;
    let ciphertext = caller.encrypt(b"hello", &json!({})).await;
    let token = caller.token().to_owned();
    service.stop().await;
    let service = world.start().await;
    let caller = service.anonymous().with_token(token);
    world.kms.hold();
    let before = world.kms.calls();
    let mut clients = JoinSet::new();
    for _ in 0..1_000 {
        let (caller, ciphertext) = (caller.clone(), ciphertext.clone());
        clients.spawn(async move { assert_eq!(caller.decrypt(&ciphertext, &json!({})).await, b"hello") });
    }
    world.kms.arrived(before + 1).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    world.kms.release();
    clients.join_all().await;
    assert_eq!((world.kms.unwraps(), world.kms.generates()), (1, 1));
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_goes_away_takes_the_kms_call_from_nobody() {
    let world = World::new().await;
    let service = world.start().await;
    let caller = service.tenant_and_caller("acme").await;
    let before = world.kms.calls();
    world.kms.hold();
    let mut first = JoinSet::new();
    let impatient = caller.clone();
    first.spawn(async move { impatient.try_encrypt(b"hello", &json!({})).await });
    world.kms.arrived(before + 1).await;
    let mut others = JoinSet::new();
    for _ in 0..10 {
        let caller = caller.clone();
        others.spawn(async move { caller.try_encrypt(b"hello", &json!({})).await.ok(200) });
    }
    tokio::time::sleep(Duration::from_millis(100)).await;
    first.shutdown().await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    world.kms.release();
    others.join_all().await;
    assert_eq!(world.kms.generates(), 1);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_error_is_shared_and_remembered_for_a_second_and_no_longer() {
    let world = World::new().await;
    let service = world.start_without_keeper().await;
    let caller = service.tenant_and_caller("acme").await;
    for (fault, code) in [(KmsFault::Outage, "kms_unavailable"), (KmsFault::Denied, "kek_denied")] {
        let before = world.kms.generates();
        world.kms.fail(fault);
        let mut clients = JoinSet::new();
        for _ in 0..100 {
            let caller = caller.clone();
            clients.spawn(async move { caller.try_encrypt(b"hello", &json!({})).await.problem(code) });
        }
        clients.join_all().await;
        assert_eq!(world.kms.generates(), before + 1);
        world.clock.advance(Duration::from_millis(999));
        caller.try_encrypt(b"hello", &json!({})).await.problem(code);
        assert_eq!(world.kms.generates(), before + 1);
        world.clock.advance(Duration::from_millis(1));
        caller.try_encrypt(b"hello", &json!({})).await.problem(code);
        assert_eq!(world.kms.generates(), before + 2);
        world.pass(1);
    }
    world.kms.fail(None);
    caller.encrypt(b"hello", &json!({})).await;
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_tenants_dead_key_is_no_other_tenants_trouble() {
    let world = World::new().await;
    world.keyring.add("two").await.unwrap();
    let service = world.start().await;
    let acme = service.tenant_and_caller("acme").await;
    service.tenant_with("emil", &["local:two"]).await;
    let emil = acme.with_token(service.token(&["emil"], &keyfold::tenant::Verb::ALL).await);
    world.keyring.disable("two").await.unwrap();
    emil.try_encrypt(b"hello", &json!({})).await.problem("kek_denied");
    acme.encrypt(b"hello", &json!({})).await;
    service.stop().await;
}

/// 300 seconds after the KMS last vouched for it, a key that nobody uses is gone from memory.
#[tokio::test(flavor = "multi_thread")]
async fn an_unused_plaintext_key_is_gone_when_its_time_is_over() {
    let world = World::new().await;
    let service = world.start_without_keeper().await;
    let tracker = tokio_util::task::TaskTracker::new();
    let caller = service.tenant_and_caller("acme").await;
    let ciphertext = caller.encrypt(b"hello", &json!({})).await;
    world.pass(299);
    caller.encrypt(b"hello", &json!({})).await;
    assert_eq!(world.kms.calls(), 2, "one to look at the KEK, one to make the data key");
    assert_eq!(service.app.pool().plaintext_deks(), 1);
    world.pass(1);
    // Its time is over: not even a request in time may use it without the KMS.
    world.kms.fail(KmsFault::Denied);
    caller.try_decrypt(&ciphertext, &json!({})).await.problem("kek_denied");
    assert_eq!(service.app.pool().plaintext_deks(), 0);
    world.kms.fail(None);
    world.pass(1);
    assert_eq!(caller.decrypt(&ciphertext, &json!({})).await, b"hello");
    // Nobody uses it any more: the background lets it go instead of renewing it for ever.
    for _ in 0..60 {
        world.pass(10);
        service.app.pool().tend(&tracker).await;
        tracker.close();
        tracker.wait().await;
    }
    assert_eq!(service.app.pool().plaintext_deks(), 0);
    assert!(world.kms.unwraps() <= 3, "{}", world.kms.unwraps());
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_in_use_is_renewed_in_the_background_before_its_time_is_over() {
    let world = World::new().await;
    let service = world.start().await;
    let caller = service.tenant_and_caller("acme").await;
    for round in 1..=4 {
        caller.encrypt(b"hello", &json!({})).await;
        world.pass(239);
        caller.encrypt(b"hello", &json!({})).await;
        let in_time = world.clock.monotonic() + Duration::from_secs(60);
        until("a renewal at 240 of 300 seconds", || {
            world.pass(1);
            world.kms.unwraps() == round
        })
        .await;
        assert!(world.clock.monotonic() < in_time, "the renewal was not ahead of time");
    }
    assert_eq!(world.kms.generates(), 1);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disabled_kek_cuts_the_tenant_off_within_300_seconds_though_the_key_is_in_use() {
    let world = World::new().await;
    let service = world.start().await;
    let caller = service.tenant_and_caller("acme").await;
    let ciphertext = caller.encrypt(b"hello", &json!({})).await;
    world.pass(100);
    caller.encrypt(b"hello", &json!({})).await;
    world.keyring.disable("one").await.unwrap();
    caller.encrypt(b"still vouched for", &json!({})).await;
    world.pass(200);
    caller.try_encrypt(b"hello", &json!({})).await.problem("kek_denied");
    caller.try_decrypt(&ciphertext, &json!({})).await.problem("kek_denied");
    assert_eq!(service.app.pool().plaintext_deks(), 0);
    service.stop().await;
}

/// Outage is not denial: what is in memory serves on for an hour, and no longer.
#[tokio::test(flavor = "multi_thread")]
async fn in_an_outage_a_hot_tenant_is_served_up_to_the_stated_time_and_a_cold_one_is_told_to_come_back() {
    let world = World::new().await;
    let service = world.start_without_keeper().await;
    let hot = service.tenant_and_caller("acme").await;
    let cold = service.tenant_and_caller("cold").await;
    let ciphertext = hot.encrypt(b"hello", &json!({})).await;
    world.kms.fail(KmsFault::Outage);
    cold.try_encrypt(b"hello", &json!({})).await.problem("kms_unavailable");
    for elapsed in [299, 300, 301, 1_000, 3_899] {
        let now = world.clock.monotonic().as_secs();
        world.pass(elapsed - now);
        hot.encrypt(b"hello", &json!({})).await;
        assert_eq!(hot.decrypt(&ciphertext, &json!({})).await, b"hello");
    }
    world.pass(1);
    hot.try_encrypt(b"hello", &json!({})).await.problem("kms_unavailable");
    hot.try_decrypt(&ciphertext, &json!({})).await.problem("kms_unavailable");
    world.kms.fail(None);
    world.pass(1);
    hot.encrypt(b"hello", &json!({})).await;
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_data_key_seals_as_many_messages_as_its_policy_says_and_the_next_has_a_new_one() {
    let world = World::new().await;
    let service = world.start_without_keeper().await;
    let caller = service.tenant_and_caller("acme").await;
    key_with(&caller, "three", json!({"dek_messages_max": 3})).await;
    let mut deks = Vec::new();
    for _ in 0..9 {
        deks.push(dek_of(&caller, "three", b"hello").await);
    }
    assert_eq!((&deks[0], &deks[3], &deks[6]), (&deks[2], &deks[5], &deks[8]));
    assert_ne!(deks[2], deks[3]);
    assert_ne!(deks[5], deks[6]);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_data_key_seals_as_many_bytes_as_its_policy_says_and_no_message_is_larger_than_that() {
    let world = World::new().await;
    let service = world.start_without_keeper().await;
    let caller = service.tenant_and_caller("acme").await;
    key_with(&caller, "hundred", json!({"dek_bytes_max": 100})).await;
    let first = dek_of(&caller, "hundred", &[0; 60]).await;
    assert_eq!(dek_of(&caller, "hundred", &[0; 40]).await, first, "100 bytes are within the limit");
    let second = dek_of(&caller, "hundred", &[0; 1]).await;
    assert_ne!(second, first, "101 bytes are not");
    let third = dek_of(&caller, "hundred", &[0; 100]).await;
    assert_ne!(third, second);
    let body = json!({"plaintext": STANDARD.encode([0; 101]), "key": "hundred"});
    assert!(caller.post("/v1/encrypt", &body).await.problem("too_large").contains("100 bytes"));
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_data_key_seals_until_its_age_and_not_a_millisecond_longer() {
    let world = World::new().await;
    let service = world.start_without_keeper().await;
    let caller = service.tenant_and_caller("acme").await;
    key_with(&caller, "minute", json!({"dek_age_secs_max": 60})).await;
    let first = dek_of(&caller, "minute", b"hello").await;
    world.clock.advance(Duration::from_millis(59_999));
    assert_eq!(dek_of(&caller, "minute", b"hello").await, first);
    world.clock.advance(Duration::from_millis(1));
    assert_ne!(dek_of(&caller, "minute", b"hello").await, first);
    // A policy that is narrowed takes effect on the data key that is there.
    let default = dek_of(&caller, "default", b"hello").await;
    world.pass(60);
    let policy = json!({"policy": {"dek_age_secs_max": 60}});
    caller.put("/v1/tenants/acme/keys/default", &policy).await.ok(200);
    assert_ne!(dek_of(&caller, "default", b"hello").await, default);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_next_data_key_is_made_ahead_so_that_no_request_waits_for_the_kms() {
    let world = World::new().await;
    let service = world.start().await;
    let caller = service.tenant_and_caller("acme").await;
    key_with(&caller, "hour", json!({"dek_age_secs_max": 3_600})).await;
    let first = dek_of(&caller, "hour", b"hello").await;
    while world.clock.monotonic() < Duration::from_secs(3_590) {
        world.pass(10);
        dek_of(&caller, "hour", b"hello").await;
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    until("the next data key", || world.kms.generates() == 2).await;
    assert_eq!(dek_of(&caller, "hour", b"hello").await, first);
    // The KMS is out at the very moment of the change: nobody notices.
    world.kms.fail(KmsFault::Outage);
    world.pass(10);
    assert_ne!(dek_of(&caller, "hour", b"hello").await, first);
    assert_eq!(world.kms.generates(), 2);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_with_many_keys_pushes_out_its_own_and_nobody_elses() {
    let mut world = World::new().await;
    world.settings.pool.tenant_deks_max = 3;
    let service = world.start_without_keeper().await;
    let acme = service.tenant_and_caller("acme").await;
    let emil = service.tenant_and_caller("emil").await;
    emil.encrypt(b"hello", &json!({})).await;
    for n in 0..10 {
        world.pass(1);
        key_with(&acme, &format!("k{n}"), json!({})).await;
        dek_of(&acme, &format!("k{n}"), b"hello").await;
        assert!(service.app.pool().plaintext_deks() <= 1 + 3, "{}", service.app.pool().plaintext_deks());
    }
    assert_eq!(service.app.pool().plaintext_deks(), 1 + 3);
    let before = world.kms.calls();
    emil.encrypt(b"hello", &json!({})).await;
    dek_of(&acme, "k9", b"hello").await;
    assert_eq!(world.kms.calls(), before, "these are still in memory");
    dek_of(&acme, "k0", b"hello").await;
    assert_eq!((world.kms.calls(), world.kms.generates()), (before + 1, 11), "this one is asked for again");
    service.stop().await;
}

/// A tenant with the keys `a` and `b`, and a data key for each, of which only one has room in memory. All that this
/// process knows of them is up to date.
async fn two_keys_and_room_for_one(service: &Service) -> Caller {
    let acme = service.tenant_and_caller("acme").await;
    for key in ["a", "b"] {
        key_with(&acme, key, json!({})).await;
        dek_of(&acme, key, b"hello").await;
    }
    tend(service).await;
    for key in ["a", "b"] {
        dek_of(&acme, key, b"hello").await;
    }
    acme
}

/// One round of the background, to its end.
async fn tend(service: &Service) {
    let tracker = tokio_util::task::TaskTracker::new();
    service.app.pool().tend(&tracker).await;
    tracker.close();
    tracker.wait().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_data_key_that_was_pushed_out_and_comes_back_is_counted_dropped_and_wiped_as_any_other() {
    let mut world = World::new().await;
    world.settings.pool.tenant_deks_max = 1;
    let service = world.start_without_keeper().await;
    let acme = two_keys_and_room_for_one(&service).await;
    for key in ["a", "b", "a", "b", "a"] {
        world.pass(1);
        let before = world.kms.calls();
        dek_of(&acme, key, b"hello").await;
        assert_eq!(world.kms.calls(), before + 1, "{key} had been pushed out");
        assert_eq!(service.app.pool().plaintext_deks(), 1);
    }
    service.app.pool().flush_usage().await;
    assert_eq!(service.counted("acme", "a").await.1, 5);
    assert_eq!(service.counted("acme", "b").await.1, 4);
    // What somebody else hears of the KEK counts for it.
    let emil = service.tenant_and_caller("emil").await;
    world.kms.fail(KmsFault::Denied);
    dek_of(&acme, "a", b"still vouched for").await;
    emil.try_encrypt(b"hello", &json!({})).await.problem("kek_denied");
    let body = json!({"plaintext": "aGVsbG8=", "key": "a"});
    acme.post("/v1/encrypt", &body).await.problem("kek_denied");
    world.kms.fail(None);
    world.pass(1);
    for key in ["a", "b", "a"] {
        dek_of(&acme, key, b"hello").await;
    }
    assert_eq!(service.app.pool().plaintext_deks(), 1);
    world.pass(200);
    let before = world.kms.unwraps();
    dek_of(&acme, "a", b"hello").await;
    world.pass(41);
    tend(&service).await;
    assert_eq!(world.kms.unwraps(), before + 1, "it is renewed ahead of time");
    world.pass(301);
    tend(&service).await;
    assert_eq!(service.app.pool().plaintext_deks(), 0);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn encrypting_and_decrypting_at_once_after_a_restart_make_one_kms_call() {
    let world = World::new().await;
    let service = world.start().await;
    let caller = service.tenant_and_caller("acme").await;
    let ciphertext = caller.encrypt(b"hello", &json!({})).await;
    let token = caller.token().to_owned();
    service.stop().await;
    let service = world.start().await;
    let caller = service.anonymous().with_token(token);
    world.kms.hold();
    let before = world.kms.calls();
    let mut clients = JoinSet::new();
    for _ in 0..50 {
        let (encrypts, decrypts, ciphertext) = (caller.clone(), caller.clone(), ciphertext.clone());
        clients.spawn(async move { drop(encrypts.encrypt(b"hello", &json!({})).await) });
        clients.spawn(async move { assert_eq!(decrypts.decrypt(&ciphertext, &json!({})).await, b"hello") });
    }
    world.kms.arrived(before + 1).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    world.kms.release();
    clients.join_all().await;
    assert_eq!((world.kms.unwraps(), world.kms.generates()), (1, 1));
    assert_eq!(service.app.pool().plaintext_deks(), 1);
    service.stop().await;
}

/// While the registry cannot be asked, the envelope is believed; once it can, what it says counts.
#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_data_key_that_was_opened_while_the_registry_was_away_is_refused_once_it_is_back() {
    let world = World::new().await;
    let service = world.start_without_keeper().await;
    let caller = service.tenant_and_caller("acme").await;
    key_with(&caller, "other", json!({})).await;
    let ciphertext = caller.encrypt(b"hello", &json!({})).await;
    let other = json!({"plaintext": "aGVsbG8=", "key": "other"});
    let kept = text(&caller.post("/v1/encrypt", &other).await.ok(200)["ciphertext"]);
    let dek = service.counted("acme", "default").await.0;
    let token = caller.token().to_owned();
    caller.post(&format!("/v1/tenants/acme/deks/{dek}/revoke"), &json!({})).await.ok(200);
    service.stop().await;

    let service = world.start_without_keeper().await;
    let caller = service.anonymous().with_token(token);
    tend(&service).await;
    caller.try_decrypt(&ciphertext, &json!({})).await.problem("key_revoked");
    service.store.down(true);
    world.pass(1);
    for _ in 0..5 {
        assert_eq!(caller.decrypt(&ciphertext, &json!({})).await, b"hello");
        assert_eq!(caller.decrypt(&kept, &json!({})).await, b"hello");
        world.pass(1);
        tend(&service).await;
    }
    assert_eq!(world.kms.unwraps(), 2, "one call for each, for as long as the registry is away");
    service.store.down(false);
    world.pass(1);
    tend(&service).await;
    caller.try_decrypt(&ciphertext, &json!({})).await.problem("key_revoked");
    assert_eq!(caller.decrypt(&kept, &json!({})).await, b"hello");
    assert_eq!(world.kms.unwraps(), 3, "the registry's own form is opened, and not what was brought");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn with_more_data_keys_than_have_room_in_all_the_one_that_was_used_longest_ago_goes() {
    let mut world = World::new().await;
    world.settings.pool.deks_max = 3;
    let service = world.start_without_keeper().await;
    let mut callers = Vec::new();
    for n in 0..4 {
        world.pass(2);
        let caller = service.tenant_and_caller(&format!("t{n}")).await;
        caller.encrypt(b"hello", &json!({})).await;
        callers.push(caller);
        tend(&service).await;
        assert_eq!(service.app.pool().plaintext_deks(), 3.min(n + 1));
    }
    let before = world.kms.calls();
    for caller in &callers[1..] {
        world.pass(2);
        caller.encrypt(b"hello", &json!({})).await;
    }
    assert_eq!(world.kms.calls(), before, "three have room");
    callers[0].encrypt(b"hello", &json!({})).await;
    assert_eq!((world.kms.calls(), world.kms.unwraps()), (before + 1, 1), "the first one had gone");
    tend(&service).await;
    assert_eq!(service.app.pool().plaintext_deks(), 3);
    callers[1].encrypt(b"hello", &json!({})).await;
    assert_eq!(world.kms.unwraps(), 2, "it went for the first one");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_data_key_without_use_is_let_go_after_the_stated_time() {
    let mut world = World::new().await;
    world.settings.pool.dek_idle_secs_max = 20;
    let service = world.start_without_keeper().await;
    let caller = service.tenant_and_caller("acme").await;
    caller.encrypt(b"hello", &json!({})).await;
    world.pass(5);
    caller.encrypt(b"hello", &json!({})).await;
    world.pass(19);
    tend(&service).await;
    assert_eq!(service.app.pool().plaintext_deks(), 1);
    world.pass(1);
    tend(&service).await;
    assert_eq!(service.app.pool().plaintext_deks(), 0);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_waits_for_its_turn_among_its_tenants_calls_as_long_as_is_stated() {
    let mut world = World::new().await;
    world.settings.pool.tenant_kms_calls_max = 1;
    world.settings.pool.tenant_kms_wait_ms_max = 2_000;
    let service = world.start_without_keeper().await;
    let acme = service.tenant_and_caller("acme").await;
    key_with(&acme, "second", json!({})).await;
    let emil = service.tenant_and_caller("emil").await;
    let before = world.kms.calls();
    world.kms.hold();
    let first = acme.clone();
    let mut clients = JoinSet::new();
    clients.spawn(async move { first.try_encrypt(b"hello", &json!({})).await });
    world.kms.arrived(before + 1).await;
    let mut waits = JoinSet::new();
    waits.spawn(async move { acme.post("/v1/encrypt", &json!({"plaintext": "", "key": "second"})).await });
    // Another tenant's call has a turn of its own.
    clients.spawn(async move { emil.try_encrypt(b"hello", &json!({})).await });
    world.kms.arrived(before + 2).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    world.clock.advance(Duration::from_millis(1_999));
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(waits.try_join_next().is_none(), "it did not wait as long as it may");
    world.clock.advance(Duration::from_millis(1));
    let refused = waits.join_next().await.unwrap().unwrap();
    refused.problem("overloaded");
    assert_eq!(world.kms.calls(), before + 2);
    world.kms.release();
    for answer in clients.join_all().await {
        answer.ok(200);
    }
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_error_is_remembered_for_as_long_as_is_stated() {
    for memory_ms in [0, 3_000] {
        let mut world = World::new().await;
        world.settings.pool.error_memory_ms = memory_ms;
        let service = world.start_without_keeper().await;
        let caller = service.tenant_and_caller("acme").await;
        world.kms.fail(KmsFault::Outage);
        caller.try_encrypt(b"hello", &json!({})).await.problem("kms_unavailable");
        let before = world.kms.generates();
        if memory_ms > 0 {
            world.clock.advance(Duration::from_millis(memory_ms - 1));
            caller.try_encrypt(b"hello", &json!({})).await.problem("kms_unavailable");
            assert_eq!(world.kms.generates(), before);
            world.clock.advance(Duration::from_millis(1));
        }
        caller.try_encrypt(b"hello", &json!({})).await.problem("kms_unavailable");
        assert_eq!(world.kms.generates(), before + 1);
        service.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn usage_is_written_as_often_as_is_stated() {
    let mut world = World::new().await;
    world.settings.pool.usage_flush_secs = 20;
    let service = world.start().await;
    let caller = service.tenant_and_caller("acme").await;
    caller.encrypt(b"hello", &json!({})).await;
    for _ in 0..19 {
        world.pass(1);
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(service.counted("acme", "default").await.1, 0);
    let wait = async {
        while service.counted("acme", "default").await.1 == 0 {
            world.pass(1);
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    assert!(tokio::time::timeout(Duration::from_secs(20), wait).await.is_ok(), "waited for a flush in vain");
    assert!(world.clock.monotonic() < Duration::from_secs(40), "it came late");
    service.stop().await;
}

/// His quota is no reason to refuse what the outage excuses, and once it is over no excuse.
#[tokio::test(flavor = "multi_thread")]
async fn who_has_used_up_his_calls_to_a_kms_that_is_out_is_served_from_memory_until_it_is_back() {
    let mut world = World::new().await;
    world.settings.pool.tenant_kms_calls_per_min = 1;
    let service = world.start_without_keeper().await;
    let acme = service.tenant_and_caller("acme").await;
    key_with(&acme, "cold", json!({})).await;
    let cold = json!({"plaintext": "aGVsbG8=", "key": "cold"});
    acme.encrypt(b"hello", &json!({})).await;
    world.kms.fail(KmsFault::Outage);
    world.pass(300);
    acme.post("/v1/encrypt", &cold).await.problem("kms_unavailable");
    let calls = world.kms.calls();
    acme.encrypt(b"hello", &json!({})).await;
    assert_eq!(world.kms.calls(), calls, "he has no more calls in this minute");
    // It answers somebody else.
    world.kms.fail(None);
    service.tenant_and_caller("emil").await.encrypt(b"hello", &json!({})).await;
    world.pass(300);
    acme.post("/v1/encrypt", &cold).await.ok(200);
    acme.try_encrypt(b"hello", &json!({})).await.problem("rate_limited");
    service.stop().await;
}

/// A ciphertext whose data key is forgotten by a crash would be lost for ever.
#[tokio::test(flavor = "multi_thread")]
async fn no_ciphertext_leaves_before_its_data_key_is_durable() {
    let world = World::new().await;
    let service = world.start().await;
    let caller = service.tenant_and_caller("acme").await;
    service.store.refuse_deks(true);
    let answer = caller.try_encrypt(b"hello", &json!({})).await;
    answer.problem("store_unavailable");
    assert!(!answer.raw.contains("kf1."));
    assert_eq!(world.kms.generates(), 1, "the data key was made, and is not used");
    assert_eq!(service.app.pool().plaintext_deks(), 0);
    service.store.refuse_deks(false);
    world.pass(1);
    caller.encrypt(b"hello", &json!({})).await;
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn with_the_registry_down_hot_tenants_and_embedded_envelopes_are_served() {
    let world = World::new().await;
    let service = world.start().await;
    let caller = service.tenant_and_caller("acme").await;
    let cold = service.tenant_and_caller("cold").await;
    let ciphertext = caller.encrypt(b"hello", &json!({})).await;
    let token = caller.token().to_owned();
    service.store.down(true);
    caller.encrypt(b"hello", &json!({})).await;
    assert_eq!(caller.decrypt(&ciphertext, &json!({})).await, b"hello");
    cold.try_encrypt(b"hello", &json!({})).await.problem("store_unavailable");
    // Past the plaintext key's time the KMS is asked again, and the registry is not needed for that.
    for _ in 0..40 {
        world.pass(10);
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    caller.encrypt(b"hello", &json!({})).await;
    assert_eq!(caller.decrypt(&ciphertext, &json!({})).await, b"hello");
    // What is remembered of tenants and credentials is good for an hour.
    world.pass(3_600);
    caller.try_encrypt(b"hello", &json!({})).await.problem("store_unavailable");
    service.store.down(false);
    world.pass(2);
    caller.encrypt(b"hello", &json!({})).await;
    assert_eq!(caller.with_token(token).decrypt(&ciphertext, &json!({})).await, b"hello");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn usage_is_written_every_few_seconds_and_at_the_end_and_counted_on_after_a_restart() {
    let world = World::new().await;
    let service = world.start().await;
    let caller = service.tenant_and_caller("acme").await;
    for _ in 0..5 {
        caller.encrypt(&[0; 10], &json!({})).await;
    }
    assert_eq!(service.counted("acme", "default").await.1, 0);
    for _ in 0..6 {
        world.pass(1);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let wait = async {
        while service.counted("acme", "default").await.1 < 5 {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    assert!(tokio::time::timeout(Duration::from_secs(20), wait).await.is_ok(), "waited for a flush in vain");
    let (dek, messages, bytes) = service.counted("acme", "default").await;
    assert_eq!((messages, bytes), (5, 50));
    for _ in 0..2 {
        caller.encrypt(&[0; 10], &json!({})).await;
    }
    let token = caller.token().to_owned();
    service.stop().await;

    let service = world.start().await;
    let caller = service.anonymous().with_token(token);
    assert_eq!(
        service.counted("acme", "default").await,
        (dek.clone(), 7, 70),
        "the last ones were written at the end"
    );
    caller.encrypt(&[0; 10], &json!({})).await;
    service.app.pool().flush_usage().await;
    assert_eq!(service.counted("acme", "default").await, (dek, 8, 80));
    service.stop().await;
}

/// The renewal that is due in that very round must not keep it: it is held at the KMS here, so it cannot have ended.
#[tokio::test(flavor = "multi_thread")]
async fn a_key_past_its_last_limit_is_wiped_though_its_renewal_is_due() {
    let world = World::new().await;
    let service = world.start_without_keeper().await;
    let tracker = tokio_util::task::TaskTracker::new();
    let caller = service.tenant_and_caller("acme").await;
    caller.encrypt(b"hello", &json!({})).await;
    world.kms.fail(KmsFault::Outage);
    world.pass(300);
    caller.encrypt(b"hello", &json!({})).await;
    world.pass(3_599);
    caller.encrypt(b"hello", &json!({})).await;
    assert_eq!(service.app.pool().plaintext_deks(), 1, "an outage is outlasted to the last second");
    world.kms.hold();
    world.pass(1);
    service.app.pool().tend(&tracker).await;
    assert_eq!(service.app.pool().plaintext_deks(), 0);
    world.kms.release();
    service.stop().await;
}

/// What a panic says may hold anything: it goes nowhere.
#[tokio::test(flavor = "multi_thread")]
async fn a_panic_while_a_data_key_is_fetched_is_an_error_for_all_who_wait_and_the_service_lives() {
    let world = World::new().await;
    let service = world.start().await;
    let caller = service.tenant_and_caller("acme").await;
    let before = world.kms.calls();
    world.kms.fail(KmsFault::Panic);
    world.kms.hold();
    let mut clients = JoinSet::new();
    for _ in 0..50 {
        let caller = caller.clone();
        clients.spawn(async move {
            let answer = caller.try_encrypt(b"hello", &json!({})).await;
            answer.problem("internal_error");
            assert!(!answer.raw.contains(crate::probes::PANIC_MESSAGE));
        });
    }
    world.kms.arrived(before + 1).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    world.kms.release();
    clients.join_all().await;
    assert_eq!(world.kms.generates(), 1);
    world.kms.fail(None);
    world.pass(1);
    let ciphertext = caller.encrypt(b"hello", &json!({})).await;
    assert_eq!(caller.decrypt(&ciphertext, &json!({})).await, b"hello");
    service.stop().await;
}

/// The same in a handler itself: looking at a KEK is not a flight.
#[tokio::test(flavor = "multi_thread")]
async fn a_panic_in_a_handler_is_a_500_and_the_service_lives() {
    let world = World::new().await;
    let service = world.start().await;
    let operator = service.tenant_and_caller("acme").await;
    let body = json!({"tenant": "emil", "keks": [{"kek": "local:one"}]});
    world.kms.fail(KmsFault::Panic);
    for caller in [operator.clone(), operator.clone().over_http2()] {
        let answer = caller.post("/v1/tenants", &body).await;
        answer.problem("internal_error");
        assert!(!answer.raw.contains(crate::probes::PANIC_MESSAGE));
    }
    world.kms.fail(None);
    operator.post("/v1/tenants", &body).await.ok(201);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_stop_no_plaintext_key_is_in_memory() {
    let world = World::new().await;
    let service = world.start().await;
    let caller = service.tenant_and_caller("acme").await;
    caller.encrypt(b"hello", &json!({})).await;
    let pool = service.app.pool().clone();
    assert_eq!(pool.plaintext_deks(), 1);
    service.stop().await;
    assert_eq!(pool.plaintext_deks(), 0);
}

/// A KMS that never answers must not keep the process from ending.
#[tokio::test(flavor = "multi_thread")]
async fn a_kms_that_hangs_does_not_hold_up_the_stop() {
    let world = World::new().await;
    let service = world.start().await;
    let caller = service.tenant_and_caller("acme").await;
    let before = world.kms.calls();
    world.kms.hold();
    let mut client = JoinSet::new();
    client.spawn(async move { caller.try_encrypt(b"hello", &json!({})).await });
    world.kms.arrived(before + 1).await;
    client.shutdown().await;
    let stopped = tokio::time::timeout(Duration::from_secs(20), Service::stop(service)).await;
    assert!(stopped.is_ok(), "the stop waits for a KMS that hangs");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_ring_that_is_rotated_goes_on_opening_what_it_wrapped_before() {
    let world = World::new().await;
    let service = world.start().await;
    let caller = service.tenant_and_caller("acme").await;
    let ciphertext = caller.encrypt(b"hello", &json!({})).await;
    world.keyring.rotate("one").await.unwrap();
    world.pass(400);
    let opened = caller.try_decrypt(&ciphertext, &json!({})).await.ok(200);
    assert_eq!(plaintext(&opened), b"hello");
    service.stop().await;
}

/// Each has its own memory, and its own renewals are minutes away.
#[tokio::test(flavor = "multi_thread")]
async fn a_denial_that_one_process_hears_takes_effect_in_the_others_with_their_next_poll() {
    let world = World::new().await;
    world.keyring.add("two").await.unwrap();
    let (one, two) = (world.start_without_keeper().await, world.start_without_keeper().await);
    let hot = one.tenant_and_caller("hot").await;
    let cold = one.tenant_and_caller("cold").await;
    one.tenant_with("other", &["local:two"]).await;
    let other = one.caller(&["other"], &keyfold::tenant::Verb::ALL).await;
    let ciphertext = hot.encrypt(b"hello", &json!({})).await;
    other.encrypt(b"hello", &json!({})).await;
    let hot_at_two = two.anonymous().with_token(hot.token());
    let other_at_two = two.anonymous().with_token(other.token());
    hot_at_two.encrypt(b"hello", &json!({})).await;
    assert_eq!(hot_at_two.decrypt(&ciphertext, &json!({})).await, b"hello");
    other_at_two.encrypt(b"hello", &json!({})).await;
    tend(&two).await;

    world.keyring.disable("one").await.unwrap();
    hot_at_two.encrypt(b"nobody has heard of it yet", &json!({})).await;
    cold.try_encrypt(b"hello", &json!({})).await.problem("kek_denied");
    until("the denial is written down", || one.store.denials_noted() == 1).await;
    tend(&two).await;
    hot_at_two.try_encrypt(b"hello", &json!({})).await.problem("kek_denied");
    hot_at_two.try_decrypt(&ciphertext, &json!({})).await.problem("kek_denied");
    let calls = world.kms.calls();
    other_at_two.encrypt(b"hello", &json!({})).await;
    assert_eq!(world.kms.calls(), calls, "what another KEK has vouched for stays");

    world.keyring.enable("one").await.unwrap();
    world.pass(2);
    assert_eq!(hot_at_two.decrypt(&ciphertext, &json!({})).await, b"hello");
    tend(&two).await;
    let calls = world.kms.calls();
    assert_eq!(hot_at_two.decrypt(&ciphertext, &json!({})).await, b"hello");
    assert_eq!(world.kms.calls(), calls, "an old denial is heeded once");
    one.stop().await;
    two.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kek_that_is_denied_again_and_again_is_written_down_every_five_seconds_and_no_word_is_lost() {
    let world = World::new().await;
    let service = world.start_without_keeper().await;
    let hot = service.tenant_and_caller("hot").await;
    let mut cold = Vec::new();
    for n in 0..20 {
        cold.push(service.tenant_and_caller(&format!("cold{n}")).await);
    }
    hot.encrypt(b"hello", &json!({})).await;
    world.keyring.disable("one").await.unwrap();
    let deny_all = async || {
        for caller in &cold {
            caller.try_encrypt(b"hello", &json!({})).await.problem("kek_denied");
        }
    };
    let noted = async |times: u64| {
        until("the denial is written down", || service.store.denials_noted() >= times).await;
        tend(&service).await;
        assert_eq!(service.store.denials_noted(), times);
    };
    deny_all().await;
    noted(1).await;
    world.clock.advance(Duration::from_millis(4_999));
    deny_all().await;
    noted(1).await;
    // The last of them is told when the time comes, though nobody asks any more.
    world.clock.advance(Duration::from_millis(1));
    tend(&service).await;
    noted(2).await;
    world.pass(60);
    tend(&service).await;
    noted(2).await;

    // A registry that is away takes no word from anybody: it is told later.
    service.store.down(true);
    service.app.pool().denied(&crate::service::KEK.parse().unwrap());
    tend(&service).await;
    service.store.down(false);
    world.pass(5);
    tend(&service).await;
    noted(3).await;
    service.stop().await;
}

/// What the KMS was asked before a denial may be answered after it.
#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_a_denial_has_overtaken_is_not_used_and_the_kms_is_asked_again() {
    let world = World::new().await;
    let service = world.start_without_keeper().await;
    let caller = service.tenant_and_caller("acme").await;
    let ciphertext = caller.encrypt(b"hello", &json!({})).await;
    service.app.pool().clear();
    world.kms.hold();
    let before = world.kms.calls();
    let mut asking = JoinSet::new();
    asking.spawn(async move { caller.decrypt(&ciphertext, &json!({})).await });
    world.kms.arrived(before + 1).await;
    world.clock.advance(Duration::from_millis(1));
    service.app.pool().denied(&crate::service::KEK.parse().unwrap());
    world.kms.release();
    assert_eq!(asking.join_all().await, [b"hello"]);
    assert_eq!(world.kms.unwraps(), 2);
    service.stop().await;
}
