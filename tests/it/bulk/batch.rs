//! Batches: one body, many items, an outcome for each.

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use futures_util::stream;
use keyfold::config::{AuditFileSettings, RestrictionSettings};
use keyfold::tenant::Verb;
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use crate::caller::{plaintext, text};
use crate::probes::KmsFault;
use crate::service::World;

fn message(n: usize) -> Vec<u8> {
    format!("message {n}").into_bytes()
}

fn encryption(n: usize) -> Value {
    json!({
        "ref": format!("r{n}"),
        "plaintext": STANDARD.encode(message(n)),
        "context": {"record": n.to_string()},
    })
}

fn ciphertexts(answer: &Value) -> Vec<String> {
    answer["items"].as_array().unwrap().iter().map(|item| text(&item["ciphertext"])).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_items_go_there_and_back_in_order_with_one_kms_call() {
    let world = World::new().await;
    let service = world.start().await;
    let caller = service.tenant_and_caller("acme").await;
    let items: Vec<Value> = (0..10_000).map(encryption).collect();
    let before = world.kms.calls();
    let sealed = caller.post("/v1/encrypt/batch", &json!({"items": items})).await.ok(200);
    assert_eq!(world.kms.calls() - before, 1, "one data key, one call");
    assert_eq!(sealed["failed"], 0);
    let ciphertexts = ciphertexts(&sealed);
    assert_eq!(ciphertexts.len(), 10_000);
    for n in [0, 1, 4_999, 9_999] {
        assert_eq!(sealed["items"][n]["ref"], format!("r{n}"));
        assert_eq!(sealed["items"][n]["key"], "default");
        let context = json!({"record": n.to_string()});
        assert_eq!(caller.decrypt(&ciphertexts[n], &context).await, message(n), "a single call opens it");
    }
    let distinct: std::collections::HashSet<&String> = ciphertexts.iter().collect();
    assert_eq!(distinct.len(), 10_000);
    let items: Vec<Value> = ciphertexts
        .iter()
        .enumerate()
        .map(|(n, ciphertext)| json!({"ciphertext": ciphertext, "context": {"record": n.to_string()}}))
        .collect();
    service.app.pool().clear();
    let before = world.kms.calls();
    let opened = caller.post("/v1/decrypt/batch", &json!({"items": items})).await.ok(200);
    assert_eq!(world.kms.calls() - before, 1, "one data key, one call");
    assert_eq!(opened["failed"], 0);
    for (n, item) in opened["items"].as_array().unwrap().iter().enumerate() {
        assert_eq!(plaintext(item), message(n));
        assert_eq!(item["rewrap_advised"], false);
        assert!(item.get("ref").is_none(), "none was sent");
    }
    service.stop().await;
}

#[tokio::test]
async fn each_item_fails_by_itself_with_the_code_of_a_single_call() {
    let world = World::new().await;
    let service = world.start().await;
    let caller = service.tenant_and_caller("acme").await;
    let good = caller.encrypt(b"hello", &json!({"a": "1"})).await;
    let mut damaged = good.clone();
    damaged.pop();
    damaged.push(if good.ends_with('A') { 'Q' } else { 'A' });
    let plain = STANDARD.encode("x");
    let body = json!({"items": [
        {"ref": "good", "plaintext": plain},
        {"ref": "unknown field", "plaintext": plain, "plain": 1},
        {"ref": "not base64", "plaintext": "!"},
        {"ref": "reserved", "plaintext": plain, "context": {"aws:x": "1"}},
        {"ref": "no such key", "plaintext": plain, "key": "other"},
        {"ref": "no key", "plaintext": plain, "key": "!"},
        {"ref": "x".repeat(257), "plaintext": plain},
        17,
        {"ref": "quote \" and \u{7}", "plaintext": plain},
    ]});
    let answer = caller.post("/v1/encrypt/batch", &body).await.ok(200);
    let codes = |answer: &Value| -> Vec<String> {
        let items = answer["items"].as_array().unwrap();
        items.iter().map(|item| item["error"]["code"].as_str().unwrap_or("-").to_owned()).collect()
    };
    let malformed = "malformed_request";
    let expected =
        ["-", malformed, malformed, "reserved_context", "not_found", malformed, malformed, malformed, "-"];
    assert_eq!(codes(&answer), expected);
    assert_eq!(answer["failed"], 7);
    assert_eq!(answer["items"][1]["ref"], "unknown field", "told even where the rest is malformed");
    assert_eq!(answer["items"][8]["ref"], "quote \" and \u{7}");
    assert_eq!(answer["items"][4]["error"]["status"], 404);
    let body = json!({"items": [
        {"ciphertext": good, "context": {"a": "2"}},
        {"ciphertext": damaged, "context": {"a": "1"}},
        {"ciphertext": "kf1.AAAA"},
        {"ciphertext": good, "context": {"a": "1"}},
    ]});
    let answer = caller.post("/v1/decrypt/batch", &body).await.ok(200);
    assert_eq!(codes(&answer), ["context_mismatch", "ciphertext_damaged", "malformed_envelope", "-"]);
    assert_eq!(plaintext(&answer["items"][3]), b"hello");
    let answer = caller.post("/v1/rewrap/batch", &body).await.ok(200);
    // Rewrapping does not decrypt what only needs its head looked at.
    assert_eq!(codes(&answer), ["context_mismatch", "-", "malformed_envelope", "-"]);
    assert_eq!(answer["items"][3]["changed"], false);
    service.stop().await;
}

#[tokio::test]
async fn a_retired_data_keys_items_are_sealed_again_beside_others() {
    let world = World::new().await;
    let service = world.start_without_keeper().await;
    let caller = service.tenant_and_caller("acme").await;
    let old = caller.encrypt(b"old", &json!({})).await;
    world.pass(25 * 3_600);
    let new = caller.encrypt(b"new", &json!({})).await;
    let body = json!({"items": [{"ciphertext": old}, {"ciphertext": new}, {"ciphertext": old, "mode": "wrapped_key"}]});
    let answer = caller.post("/v1/rewrap/batch", &body).await.ok(200);
    let changed: Vec<&Value> =
        answer["items"].as_array().unwrap().iter().map(|item| &item["changed"]).collect();
    assert_eq!(changed, [true, false, false]);
    assert_ne!(answer["items"][0]["from_dek_id"], answer["items"][0]["to_dek_id"]);
    assert_eq!(caller.decrypt(&ciphertexts(&answer)[0], &json!({})).await, b"old");
    service.stop().await;
}

#[tokio::test]
async fn a_data_keys_limit_holds_within_a_batch_too() {
    let world = World::new().await;
    let service = world.start_without_keeper().await;
    let caller = service.tenant_and_caller("acme").await;
    let policy = json!({"key": "small", "policy": {"dek_messages_max": 7}});
    let made = caller.post("/v1/tenants/acme/keys", &policy).await;
    assert_eq!(made.status, 201, "{}", made.raw);
    let items: Vec<Value> =
        (0..20).map(|n| json!({"plaintext": STANDARD.encode(message(n)), "key": "small"})).collect();
    let answer = caller.post("/v1/encrypt/batch", &json!({"items": items})).await.ok(200);
    let mut used = std::collections::BTreeMap::new();
    for item in answer["items"].as_array().unwrap() {
        *used.entry(text(&item["dek_id"])).or_insert(0) += 1;
    }
    let mut used: Vec<u32> = used.into_values().collect();
    used.sort_unstable();
    assert_eq!(used, [6, 7, 7]);
    service.stop().await;
}

#[tokio::test]
async fn the_limits_of_a_batch_are_exact() {
    let mut world = World::new().await;
    world.settings.http.batch_items_max = 3;
    world.settings.http.batch_body_bytes_max = 1_024;
    let service = world.start().await;
    let caller = service.tenant_and_caller("acme").await;
    let item = json!({"plaintext": ""});
    let three = json!({"items": [item, item, item]});
    assert_eq!(caller.post("/v1/encrypt/batch", &three).await.ok(200)["failed"], 0);
    let four = json!({"items": [item, item, item, item]});
    assert!(caller.post("/v1/encrypt/batch", &four).await.problem("too_large").contains("takes 3"));
    let body = three.to_string();
    let padded = format!("{body}{}", " ".repeat(1_024 - body.len()));
    assert_eq!(caller.post_text("/v1/encrypt/batch", padded.clone()).await.status, 200);
    caller.post_text("/v1/encrypt/batch", format!("{padded} ")).await.problem("too_large");
    let empty = caller.post("/v1/encrypt/batch", &json!({"items": []})).await.ok(200);
    assert_eq!(empty, json!({"items": [], "failed": 0}));
    caller.post_text("/v1/encrypt/batch", "{\"items\": [").await.problem("malformed_request");
    caller.post("/v1/encrypt/batch", &json!({"items": [], "x": 1})).await.problem("malformed_request");
    service.stop().await;
}

#[tokio::test]
async fn a_batch_needs_the_verbs_permit() {
    let world = World::new().await;
    let service = world.start().await;
    service.tenant("acme").await;
    let caller = service.caller(&["acme"], &[Verb::Decrypt]).await;
    caller.post("/v1/encrypt/batch", &json!({"items": []})).await.problem("forbidden");
    service.anonymous().post("/v1/encrypt/batch", &json!({"items": []})).await.problem("unauthenticated");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_outage_is_each_items_problem_and_asked_for_once() {
    let world = World::new().await;
    let service = world.start_without_keeper().await;
    let caller = service.tenant_and_caller("acme").await;
    let sealed = caller.encrypt(b"hello", &json!({})).await;
    let other = service.tenant_and_caller("other").await;
    service.app.pool().clear();
    world.kms.fail(KmsFault::Outage);
    let envelopes: Vec<Value> = (0..1_000).map(|_| json!({"ciphertext": sealed})).collect();
    let messages: Vec<Value> = (0..1_000).map(encryption).collect();
    for (caller, path, items) in
        [(&other, "/v1/encrypt/batch", messages), (&caller, "/v1/decrypt/batch", envelopes)]
    {
        let before = world.kms.calls();
        let answer = caller.post(path, &json!({"items": items})).await.ok(200);
        assert_eq!(answer["failed"], 1_000);
        for item in answer["items"].as_array().unwrap() {
            assert_eq!(item["error"]["code"], "kms_unavailable");
            assert_eq!(item["error"]["retryable"], true);
        }
        assert_eq!(world.kms.calls() - before, 1, "{path}: one call for the batch");
    }
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn items_name_different_keys_and_each_is_looked_up_once() {
    let mut world = World::new().await;
    let service = world.start_without_keeper().await;
    let admin = service.tenant_and_caller("acme").await;
    for key in ["a", "b", "c"] {
        admin.post("/v1/tenants/acme/keys", &json!({"key": key})).await.ok(201);
    }
    let token = service.token(&["acme"], &[Verb::Encrypt, Verb::Decrypt]).await;
    service.stop().await;
    world.settings.access.restrictions = vec![RestrictionSettings {
        principal: format!("api-key:{}", &token[3..19]),
        verbs: vec!["encrypt".to_owned(), "decrypt".to_owned()],
        keys: Some(vec!["a".to_owned(), "b".to_owned()]),
        context: vec![],
    }];
    let service = world.start_without_keeper().await;
    let (caller, admin) =
        (service.anonymous().with_token(token), service.anonymous().with_token(admin.token()));
    let key = |n: usize| ["a", "b", "c"][n % 3];
    let items: Vec<Value> =
        (0..3_000).map(|n| json!({"plaintext": STANDARD.encode(message(n)), "key": key(n)})).collect();
    let before = world.kms.calls();
    let sealed = caller.post("/v1/encrypt/batch", &json!({"items": items})).await.ok(200);
    assert_eq!(world.kms.calls() - before, 2, "one for each key that is granted");
    assert_eq!(sealed["failed"], 1_000);
    let mut envelopes = Vec::new();
    for (n, item) in sealed["items"].as_array().unwrap().iter().enumerate() {
        if key(n) == "c" {
            assert_eq!(item["error"]["code"], "forbidden");
        } else {
            assert_eq!(item["key"], key(n));
            envelopes.push(json!({"ref": n.to_string(), "ciphertext": item["ciphertext"]}));
        }
    }
    let foreign = json!({"plaintext": STANDARD.encode("c"), "key": "c"});
    let foreign = admin.post("/v1/encrypt", &foreign).await.ok(200);
    envelopes.insert(1, json!({"ciphertext": foreign["ciphertext"]}));
    service.app.pool().clear();
    let before = world.kms.calls();
    let opened = caller.post("/v1/decrypt/batch", &json!({"items": envelopes})).await.ok(200);
    assert_eq!(world.kms.calls() - before, 3, "whose key it is shows once it is found");
    assert_eq!(opened["failed"], 1);
    for item in opened["items"].as_array().unwrap() {
        let Some(n) = item["ref"].as_str() else {
            assert!(item["error"]["code"].is_string(), "{item}");
            continue;
        };
        let n = n.parse().unwrap();
        assert_eq!((item["key"].as_str(), plaintext(item)), (Some(key(n)), message(n)));
    }
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn batches_together_take_no_more_memory_than_they_may() {
    let mut world = World::new().await;
    world.settings.http.batch_memory_bytes_max = 1_000;
    world.settings.http.batch_body_bytes_max = 1_000;
    let service = world.start_without_keeper().await;
    let (cold, warm) = (service.tenant_and_caller("cold").await, service.tenant_and_caller("warm").await);
    warm.encrypt(b"hello", &json!({})).await;
    let body = |bytes: usize| {
        let body = json!({"items": [{"plaintext": ""}]}).to_string();
        format!("{body}{}", " ".repeat(bytes - body.len()))
    };
    let before = world.kms.calls();
    world.kms.hold();
    let long = body(600);
    let mut waiting = JoinSet::new();
    waiting.spawn(async move { cold.post_text("/v1/encrypt/batch", long).await });
    world.kms.arrived(before + 1).await;
    assert_eq!(warm.post_text("/v1/encrypt/batch", body(400)).await.ok(200)["failed"], 0);
    let refused = warm.post_text("/v1/encrypt/batch", body(401)).await;
    assert!(refused.problem("overloaded").contains("memory"));
    assert_eq!(refused.status, 503);
    assert!(refused.headers.contains_key("retry-after"));
    // One that does not say how long it is may be as long as any.
    let unannounced = || {
        let pieces = stream::iter([Ok::<_, std::io::Error>(body(100))]);
        reqwest::Body::wrap_stream(pieces)
    };
    warm.post_text("/v1/encrypt/batch", unannounced()).await.problem("overloaded");
    // Small calls need none of it.
    warm.encrypt(b"hello", &json!({})).await;
    world.kms.release();
    waiting.join_next().await.unwrap().unwrap().ok(200);
    warm.post_text("/v1/encrypt/batch", unannounced()).await.ok(200);
    warm.post_text("/v1/encrypt/batch", body(1_000)).await.ok(200);
    service.stop().await;
}

/// Nothing of it goes on, and the record says how it ended.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_batch_whose_client_goes_away_is_abandoned() {
    let mut world = World::new().await;
    world.settings.audit.file = Some(AuditFileSettings::default());
    world.settings.http.in_flight_max = 2;
    world.settings.http.fair_from_percent = 100;
    let service = world.start_without_keeper().await;
    let caller = service.tenant_and_caller("acme").await;
    let tasks = || service.app.lifecycle.tracker.len();
    let before = world.kms.calls();
    world.kms.hold();
    // The call that the batch's items will wait for too: it goes on when they have gone.
    let (mut first, again) = (JoinSet::new(), caller.clone());
    first.spawn(async move { again.try_encrypt(b"hello", &json!({})).await });
    world.kms.arrived(before + 1).await;
    let idle = tasks();
    let items: Vec<Value> = (0..1_000).map(encryption).collect();
    let body = json!({"items": items}).to_string();
    let head = format!(
        "POST /v1/encrypt/batch HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {}\r\ncontent-type: application/json\r\n\
         content-length: {}\r\n\r\n",
        caller.token(),
        body.len()
    );
    let mut socket = TcpStream::connect(service.address).await.unwrap();
    socket.write_all(head.as_bytes()).await.unwrap();
    socket.write_all(body.as_bytes()).await.unwrap();
    // Two work on the items, and each waits for the data key by a task that outlives it: others wait for it too.
    comes(|| tasks() == idle + 4, "the batch does not begin").await;
    caller.try_encrypt(b"hello", &json!({})).await.problem("overloaded");
    drop(socket);
    comes(|| tasks() == idle + 2, "its tasks go on").await;
    world.kms.release();
    first.join_next().await.unwrap().unwrap().ok(200);
    // Its place is free again.
    for n in 0..2 {
        caller.encrypt(&message(n), &json!({})).await;
    }
    service.stop().await;
    let lines = std::fs::read_to_string(world.settings.audit_file()).unwrap();
    let records = lines.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let calls: Vec<String> =
        records.filter(|record| record["event"] == "call").map(|record| text(&record["outcome"])).collect();
    assert_eq!(calls.iter().filter(|outcome| *outcome == "abandoned").count(), 1, "{calls:?}");
    assert_eq!(calls.iter().filter(|outcome| *outcome == "done").count(), 3, "{calls:?}");
}

async fn comes(there: impl Fn() -> bool, told: &str) {
    for _ in 0..1_000 {
        if there() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("{told}");
}
