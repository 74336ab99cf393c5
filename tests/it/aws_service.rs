//! The service and AWS KMS: what the KMS is told, how often it is asked, and who is served when it says no.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use envelope::{WrappedDataKey, WrappedKeys, inspect, text as envelope_text};
use kms_emulator::{CreateKey, Fault, FaultScope, Outcome};
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::aws_world::AwsWorld;
use crate::caller::{Caller, text};
use crate::kms_aws::{FRANKFURT, IRELAND};
use crate::service::World;

fn none() -> Value {
    json!({})
}

/// The KEKs under which an embedded envelope carries its data key.
fn carried(ciphertext: &str) -> Vec<String> {
    let envelope = envelope_text::decode(ciphertext).unwrap();
    inspect(&envelope).unwrap().wrapped().keys().iter().map(|form| form.kek.clone()).collect()
}

async fn encrypted(caller: &Caller, body: &Value) -> (String, String) {
    let answer = caller.post("/v1/encrypt", body).await.ok(200);
    (text(&answer["ciphertext"]), text(&answer["dek_id"]))
}

#[tokio::test(flavor = "multi_thread")]
async fn every_call_tells_tenant_key_and_data_key_and_the_envelope_carries_every_wrapped_form() {
    let world = AwsWorld::new().await;
    let service = world.start().await;
    let ring = [world.key(IRELAND), world.key(FRANKFURT)];
    let caller = world.tenant(&service, "acme", &ring.each_ref().map(String::as_str)).await;
    caller.post("/v1/tenants/acme/keys", &json!({"key": "files"})).await.ok(201);
    let mark = world.emulator.mark();
    let body = json!({"plaintext": STANDARD.encode(b"hello"), "key": "files"});
    let (ciphertext, dek) = encrypted(&caller, &body).await;
    let mut expected = ring.to_vec();
    expected.sort();
    assert_eq!(carried(&ciphertext), expected);
    let token = caller.token().to_owned();
    service.stop().await;
    let service = world.start().await;
    service.anonymous().with_token(token).decrypt(&ciphertext, &none()).await;
    // The background looks at KEKs when it likes: no data key is concerned.
    let mut calls = world.emulator.calls_since(mark);
    calls.retain(|call| call.operation != "DescribeKey");
    let operations: Vec<_> =
        calls.iter().map(|call| (call.operation.as_str(), call.region.as_str())).collect();
    assert_eq!(operations, [("GenerateDataKey", IRELAND), ("Encrypt", FRANKFURT), ("Decrypt", IRELAND)]);
    let pairs = [("keyfold:dek", dek.as_str()), ("keyfold:key", "files"), ("keyfold:tenant", "acme")];
    let context: BTreeMap<String, String> =
        pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    for call in calls {
        assert_eq!(call.encryption_context, context, "{}", call.operation);
    }
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn replicas_of_one_key_share_a_wrapped_form_and_a_call() {
    let world = AwsWorld::new().await;
    let service = world.start().await;
    let [primary, replica] = world.replicated_key();
    let caller = world.tenant(&service, "acme", &[&primary, &replica]).await;
    let ciphertext = caller.encrypt(b"hello", &none()).await;
    assert_eq!(carried(&ciphertext), [primary]);
    assert_eq!((world.count("GenerateDataKey"), world.count("Encrypt")), (1, 0));
    // Its replica opens it where the first region is away.
    let token = caller.token().to_owned();
    service.stop().await;
    world.emulator.faults().set(FaultScope::region(IRELAND), Fault::Unavailable);
    let service = world.start().await;
    assert_eq!(service.anonymous().with_token(token).decrypt(&ciphertext, &none()).await, b"hello");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_who_opens_many_data_keys_while_his_kms_hangs_leaves_room_for_the_others() {
    let world = AwsWorld::new().await;
    let service = world.start().await;
    let hung = world.key(IRELAND);
    let many = world.tenant(&service, "many", &[&hung]).await;
    let policy = json!({"key": "one-each", "policy": {"dek_messages_max": 1}});
    many.post("/v1/tenants/many/keys", &policy).await.ok(201);
    let mut ciphertexts = Vec::new();
    for _ in 0..80 {
        let body = json!({"plaintext": STANDARD.encode(b"hello"), "key": "one-each"});
        ciphertexts.push(encrypted(&many, &body).await.0);
    }
    let other = world.tenant(&service, "other", &[&world.key(IRELAND)]).await;
    let (token, others) = (many.token().to_owned(), other.token().to_owned());
    service.stop().await;

    // All in memory is gone.
    let service = world.start().await;
    let many = service.anonymous().with_token(token);
    let other = service.anonymous().with_token(others);
    world.emulator.faults().set(FaultScope::key(&hung), Fault::BlackHole);
    let mark = world.emulator.mark();
    let mut clients = JoinSet::new();
    for ciphertext in ciphertexts {
        let many = many.clone();
        clients.spawn(async move { many.try_decrypt(&ciphertext, &none()).await.problem("kms_unavailable") });
    }
    let hanging = || {
        let calls = world.emulator.calls_since(mark);
        calls.iter().filter(|call| call.outcome == Outcome::Pending).count()
    };
    let wait = async {
        while hanging() < 16 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), wait).await.unwrap();
    // While all of his places are taken there are as many again for others.
    let began = world.clock.monotonic();
    other.encrypt(b"hello", &none()).await;
    let took = world.clock.monotonic().checked_sub(began).unwrap();
    assert!(took < Duration::from_secs(1), "another tenant waits for {took:?}");
    assert!(hanging() <= 16, "{} calls of one tenant hang", hanging());
    clients.join_all().await;
    service.stop().await;
}

/// Every way in which an owner can say no. Each tenant has a data key in memory that was just vouched for.
#[tokio::test(flavor = "multi_thread")]
async fn whatever_way_an_owner_says_no_his_tenant_is_cut_off_in_time_and_nobody_else() {
    let world = AwsWorld::new().await;
    let service = world.start().await;
    let keks: Vec<String> = (0..5).map(|_| world.key(IRELAND)).collect();
    let mut tenants = Vec::new();
    for (n, kek) in keks.iter().enumerate() {
        let caller = world.tenant(&service, &format!("t{n}"), &[kek]).await;
        let ciphertext = caller.encrypt(b"hello", &none()).await;
        tenants.push((caller, ciphertext));
    }
    let owner_only = json!({
        "Version": "2012-10-17",
        "Statement": [{
            "Effect": "Allow", "Principal": {"AWS": "arn:aws:iam::111122223333:user/owner"}, "Action": "kms:*",
            "Resource": "*",
        }],
    });
    world.emulator.disable_key(&keks[0]).unwrap();
    world.emulator.schedule_deletion(&keks[1], 7).unwrap();
    world.emulator.set_policy(&keks[2], &owner_only.to_string()).unwrap();
    // Deleted, and its time is over.
    world.emulator.schedule_deletion(&keks[3], 7).unwrap();
    world.emulator.advance(Duration::from_hours(8 * 24));
    world.pass(300).await;
    for (n, (caller, ciphertext)) in tenants.iter().enumerate() {
        for answer in
            [caller.try_encrypt(b"hello", &none()).await, caller.try_decrypt(ciphertext, &none()).await]
        {
            if n < 4 {
                answer.problem("kek_denied");
                assert!(!answer.headers.contains_key("retry-after"), "nothing will pass");
            } else {
                answer.ok(200);
            }
        }
    }
    assert_eq!(text(&service.anonymous().get("/ready").await.json["status"]), "ready");
    service.stop().await;
}

/// Many clients of the tenant itself, all the time: what is in use all the time is renewed all the same.
#[tokio::test(flavor = "multi_thread")]
async fn under_the_tenants_own_load_no_request_is_served_after_the_stated_time() {
    let mut world = AwsWorld::new().await;
    // A renewal that this test's fast time cuts short is an outage, which would rightly be outlasted: not here.
    world.settings.pool.dek_stale_secs_max = 0;
    let service = world.start().await;
    let kek = world.key(IRELAND);
    let tenant = world.tenant(&service, "cut-off", &[&kek]).await;
    let ciphertext = tenant.encrypt(b"hello", &none()).await;
    let stop = Arc::new(AtomicBool::new(false));
    let mut clients = JoinSet::new();
    for n in 0..16 {
        let (tenant, ciphertext, stop) = (tenant.clone(), ciphertext.clone(), Arc::clone(&stop));
        let clock = world.clock.clone();
        clients.spawn(async move {
            let mut answered = Vec::new();
            while !stop.load(Ordering::SeqCst) {
                let sent_at = clock.monotonic();
                let answer = match n % 2 {
                    0 => tenant.try_encrypt(b"hello", &none()).await,
                    _ => tenant.try_decrypt(&ciphertext, &none()).await,
                };
                answered.push((sent_at, answer.status));
            }
            answered
        });
    }
    pass_slowly(&world, 100).await;
    world.emulator.disable_key(&kek).unwrap();
    let cut_at = world.clock.monotonic() + Duration::from_secs(300);
    pass_slowly(&world, 400).await;
    stop.store(true, Ordering::SeqCst);
    let answered: Vec<_> = clients.join_all().await.into_iter().flatten().collect();
    let late: Vec<_> = answered.iter().filter(|(sent_at, _)| *sent_at >= cut_at).collect();
    assert!(late.len() > 20, "the load was no load: {} requests", late.len());
    // A call that is under way while the test moves the time may be out of time: that is an outage, and no service.
    assert!(late.iter().all(|(_, status)| matches!(status, 403 | 503)), "{late:?}");
    assert!(answered.iter().any(|(_, status)| *status == 200));
    // Such outages may have opened the region's circuit. With the time at rest between steps, it closes.
    let mut denied = false;
    for _ in 0..60 {
        pass_slowly(&world, 1).await;
        let answers = [
            tenant.try_encrypt(b"hello", &none()).await.status,
            tenant.try_decrypt(&ciphertext, &none()).await.status,
        ];
        assert!(!answers.contains(&200), "{answers:?}");
        denied = answers == [403, 403];
        if denied {
            break;
        }
    }
    assert!(denied, "the outage does not end");
    service.stop().await;
}

/// Moves the time in steps that leave calls under way a chance to end.
async fn pass_slowly(world: &AwsWorld, secs: u64) {
    for _ in 0..secs {
        world.clock.advance(Duration::from_secs(1));
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Two processes on one registry, and no request that meets the denial: the first renewal hears of it, for both.
#[tokio::test(flavor = "multi_thread")]
async fn a_denial_reaches_every_process_within_the_stated_time() {
    let world = AwsWorld::new().await;
    let (one, two) = (world.start().await, world.start().await);
    let kek = world.key(IRELAND);
    let at_one = world.tenant(&one, "acme", &[&kek]).await;
    let at_two = two.anonymous().with_token(at_one.token());
    let ciphertext = at_one.encrypt(b"hello", &none()).await;
    assert_eq!(at_two.decrypt(&ciphertext, &none()).await, b"hello");
    at_two.encrypt(b"hello", &none()).await;
    assert_eq!(world.count("GenerateDataKey"), 1, "the second process uses the first one's data key");
    world.emulator.disable_key(&kek).unwrap();
    world.pass(300).await;
    for caller in [&at_one, &at_two] {
        caller.try_encrypt(b"hello", &none()).await.problem("kek_denied");
        caller.try_decrypt(&ciphertext, &none()).await.problem("kek_denied");
    }
    one.stop().await;
    two.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_kms_calls_damaged_is_asked_once_and_not_tried_again() {
    let world = AwsWorld::new().await;
    let service = world.start().await;
    let kek = world.key(IRELAND);
    let caller = world.tenant(&service, "acme", &[&kek]).await;
    let ciphertext = caller.encrypt(b"hello", &none()).await;
    let token = caller.token().to_owned();
    service.stop().await;
    // The registry is lost: all there is, is in the envelope.
    std::fs::remove_file(world.settings.registry_file()).unwrap();
    let service = world.start().await;
    let caller = world.tenant(&service, "acme", &[&kek]).await;
    assert_ne!(token, caller.token());
    let envelope = envelope_text::decode(&ciphertext).unwrap();
    let head = inspect(&envelope).unwrap();
    let forms: Vec<_> = head
        .wrapped()
        .keys()
        .iter()
        .map(|form| {
            let mut blob = form.blob.clone();
            blob[100] ^= 1;
            WrappedDataKey { kek: form.kek.clone(), blob }
        })
        .collect();
    let section = WrappedKeys::new(head.wrapped().kms_context().unwrap(), &forms).unwrap();
    let forged = envelope_text::encode(&envelope::with_wrapped_keys(&envelope, &section).unwrap());
    let before = world.count("Decrypt");
    let answer = caller.try_decrypt(&forged, &none()).await;
    answer.problem("context_mismatch");
    assert_eq!((answer.status, world.count("Decrypt") - before), (422, 1));
    service.stop().await;
}

/// docs/aws.md names these numbers.
#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_in_use_costs_about_twenty_calls_an_hour_however_much_it_encrypts() {
    let world = World::new().await;
    let service = world.start_without_keeper().await;
    let caller = service.tenant_and_caller("acme").await;
    let tracker = tokio_util::task::TaskTracker::new();
    tracker.close();
    for _ in 0..1_800 {
        caller.encrypt(b"hello", &none()).await;
        world.pass(2);
        service.app.pool().tend(&tracker).await;
        tracker.wait().await;
    }
    assert_eq!(world.kms.generates(), 1);
    // One every 180 to 240 seconds.
    let renewals = world.kms.unwraps();
    assert!((14..=20).contains(&renewals), "{renewals} renewals in an hour");
    let page = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/aws.md")).unwrap();
    let row = page.lines().find(|line| line.starts_with("| one tenant, within an hour |")).unwrap();
    assert!(row.contains("| about 20 |"), "{row}");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kek_that_cannot_be_used_is_refused_when_the_tenant_is_made_and_not_later() {
    let world = AwsWorld::new().await;
    let service = world.start().await;
    let operator = world.tenant(&service, "acme", &[&world.key(IRELAND)]).await;
    let foreign = world.emulator.create_key(IRELAND, CreateKey::new().account("444455556666")).unwrap();
    let disabled = world.key(IRELAND);
    world.emulator.disable_key(&disabled).unwrap();
    for (kek, named) in [(foreign.as_str(), "kms:DescribeKey"), (disabled.as_str(), "not enabled")] {
        let answer = operator.post("/v1/tenants", &json!({"tenant": "new", "keks": [{"kek": kek}]})).await;
        let detail = answer.problem("malformed_request");
        assert!(detail.contains(named), "{detail}");
    }
    service.stop().await;
}
