//! Raw bodies of any length.

use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream;
use http_body_util::StreamBody;
use proptest::prelude::*;
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::{Half, NDJSON, OCTETS, all_transfers_end, noise, problem, raw, receive, request, through};
use crate::caller::Caller;
use crate::service::{Service, World};

const SEGMENT: usize = 65_536;
const TAG: usize = 16;

/// A body whose length is not announced, in pieces of this size.
fn pieces(bytes: &[u8], piece_bytes: usize) -> reqwest::Body {
    let pieces: Vec<_> = bytes
        .chunks(piece_bytes)
        .map(|piece| Ok::<_, std::io::Error>(Bytes::copy_from_slice(piece)))
        .collect();
    reqwest::Body::wrap_stream(stream::iter(pieces))
}

async fn started() -> (World, Service, Caller) {
    let world = World::new().await;
    let service = world.start().await;
    let caller = service.tenant_and_caller("acme").await;
    (world, service, caller)
}

#[tokio::test(flavor = "multi_thread")]
async fn every_length_goes_there_and_back_over_both_protocols() {
    let (_world, service, caller) = started().await;
    let message = noise(5 << 20);
    for caller in [caller.clone(), caller.clone().over_http2()] {
        for length in [0, 1, SEGMENT - 1, SEGMENT, SEGMENT + 1, 3 * SEGMENT, 1 << 20, (5 << 20) - 7] {
            let message = &message[..length];
            let envelope = through(&caller, "/v1/encrypt", pieces(message, 50_000)).await;
            let opened = through(&caller, "/v1/decrypt", pieces(&envelope, 33_333)).await;
            assert!(opened == message, "{length} bytes");
        }
    }
    all_transfers_end(&service).await;
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_headers_say_what_the_json_says() {
    let (_world, service, caller) = started().await;
    let made = caller.post("/v1/tenants/acme/keys", &json!({"key": "files"})).await;
    assert_eq!(made.status, 201, "{}", made.raw);
    let json_caller = caller.clone();
    let caller = caller.with_header("keyfold-context", "record=\"42\", name=%\"caf%c3%a9\"");
    let named = caller.with_header("keyfold-key", "files").with_header("keyfold-envelope", "compact");
    let (response, envelope) = raw(&named, "/v1/encrypt", "hello").await;
    let (headers, envelope) = (response.headers(), envelope.unwrap());
    assert_eq!(headers["content-type"], OCTETS);
    assert_eq!(headers["keyfold-key"], "files");
    let head = envelope::inspect(&envelope).unwrap();
    assert_eq!(headers["keyfold-dek-id"], head.dek_id().to_string());
    assert!(head.wrapped().is_compact());
    // The JSON call opens it, with the same context in JSON.
    let text = envelope::text::encode(&envelope);
    assert_eq!(json_caller.decrypt(&text, &json!({"record": "42", "name": "café"})).await, b"hello");
    let (response, opened) = raw(&caller, "/v1/decrypt", envelope.clone()).await;
    assert_eq!(opened.unwrap(), b"hello");
    assert_eq!(response.headers()["keyfold-key"], "files");
    assert_eq!(response.headers()["keyfold-rewrap-advised"], "true", "the policy says embedded");
    let (response, renewed) = raw(&caller, "/v1/rewrap", envelope).await;
    assert_eq!(response.headers()["keyfold-changed"], "true");
    let renewed = renewed.unwrap();
    assert!(!envelope::inspect(&renewed).unwrap().wrapped().is_compact());
    assert_eq!(through(&caller, "/v1/decrypt", renewed).await, b"hello");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_fails_before_the_first_byte_is_a_problem() {
    let (_world, service, caller) = started().await;
    let envelope = through(&caller, "/v1/encrypt", "hello").await;
    let mut damaged = envelope.clone();
    *damaged.last_mut().unwrap() ^= 1;
    assert_eq!(problem(&caller, "/v1/decrypt", damaged).await, (422, "ciphertext_damaged".to_owned()));
    assert_eq!(problem(&caller, "/v1/decrypt", "kf1.AAAA").await, (400, "malformed_envelope".to_owned()));
    assert_eq!(problem(&caller, "/v1/decrypt", "").await, (400, "malformed_envelope".to_owned()));
    let wrong = caller.with_header("keyfold-context", "a=\"1\"");
    assert_eq!(problem(&wrong, "/v1/decrypt", envelope.clone()).await, (422, "context_mismatch".to_owned()));
    assert_eq!(problem(&wrong, "/v1/rewrap", envelope.clone()).await, (422, "context_mismatch".to_owned()));
    let reserved = caller.with_header("keyfold-context", "awsx=\"1\"");
    assert_eq!(problem(&reserved, "/v1/encrypt", "x").await, (400, "reserved_context".to_owned()));
    for (name, value) in [
        ("keyfold-context", "a=1"),
        ("keyfold-key", "NOT A SLUG"),
        ("keyfold-envelope", "light"),
        ("keyfold-rewrap-mode", "fast"),
    ] {
        let path = if name == "keyfold-rewrap-mode" { "/v1/rewrap" } else { "/v1/encrypt" };
        let malformed = caller.with_header(name, value);
        assert_eq!(problem(&malformed, path, envelope.clone()).await.1, "malformed_request", "{name}");
    }
    let unknown = caller.with_header("keyfold-key", "other");
    assert_eq!(problem(&unknown, "/v1/encrypt", "x").await, (404, "not_found".to_owned()));
    service.stop().await;
}

/// As in JSON: whoever sends something believes that it does something.
#[tokio::test(flavor = "multi_thread")]
async fn a_header_that_a_call_does_not_read_is_refused() {
    let (_world, service, caller) = started().await;
    let envelope = through(&caller, "/v1/encrypt", "hello").await;
    let headers = [
        ("keyfold-context", "record=\"42\""),
        ("keyfold-key", "default"),
        ("keyfold-envelope", "compact"),
        ("keyfold-rewrap-mode", "wrapped_key"),
    ];
    for (path, unread) in [
        ("/v1/encrypt", &["keyfold-rewrap-mode"][..]),
        ("/v1/decrypt", &["keyfold-key", "keyfold-envelope", "keyfold-rewrap-mode"]),
        ("/v1/rewrap", &["keyfold-key"]),
        ("/v1/rewrap/head", &["keyfold-key", "keyfold-rewrap-mode"]),
    ] {
        for (name, value) in headers {
            let (response, body) = raw(&caller.with_header(name, value), path, envelope.clone()).await;
            let body = String::from_utf8_lossy(&body.unwrap()).into_owned();
            if unread.contains(&name) {
                assert_eq!(response.status(), 400, "{path} {name}: {body}");
                assert!(body.contains("malformed_request") && body.contains(name), "{path}: {body}");
            } else {
                // The context is another one than the envelope's, where it matters.
                let other = name == "keyfold-context" && ["/v1/decrypt", "/v1/rewrap"].contains(&path);
                assert_eq!(response.status(), if other { 422 } else { 200 }, "{path} {name}: {body}");
            }
        }
    }
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_limits_of_a_transfer_are_exact() {
    let mut world = World::new().await;
    world.settings.http.transfer_bytes_max = 10_000;
    world.settings.http.transfers_max = 1;
    let service = world.start().await;
    let caller = service.tenant_and_caller("acme").await;
    through(&caller, "/v1/encrypt", pieces(&noise(10_000), 999)).await;
    all_transfers_end(&service).await;
    assert_eq!(problem(&caller, "/v1/encrypt", pieces(&noise(10_001), 999)).await.1, "too_large");
    all_transfers_end(&service).await;
    assert_eq!(problem(&caller, "/v1/encrypt", noise(10_001)).await.1, "too_large", "as announced");
    all_transfers_end(&service).await;
    let open = Half::post(&service, &caller, "/v1/encrypt", OCTETS, 5_000).await;
    assert_eq!(problem(&caller, "/v1/encrypt", "x").await, (503, "overloaded".to_owned()));
    drop(open);
    all_transfers_end(&service).await;
    through(&caller, "/v1/encrypt", "x").await;
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_goes_away_frees_everything() {
    let (_world, service, caller) = started().await;
    let mut open = Vec::new();
    for _ in 0..5 {
        let mut half = Half::post(&service, &caller, "/v1/encrypt", OCTETS, 50 << 20).await;
        half.0.write_all(&noise(3 << 20)[..]).await.ok();
        open.push(half);
    }
    drop(open);
    all_transfers_end(&service).await;
    // One that has begun to receive.
    let envelope = through(&caller, "/v1/encrypt", noise(4 << 20)).await;
    let response = request(&caller, "/v1/decrypt", OCTETS, envelope).send().await.unwrap();
    assert_eq!(response.status(), 200);
    drop(response);
    all_transfers_end(&service).await;
    // One in the middle: over HTTP/2 its stream is reset and the connection goes on. What is sent is short
    // and what comes back is long, since this client ends nothing on which it is still sending.
    let lines = "{\n".repeat(50_000);
    for caller in [caller.clone(), caller.over_http2()] {
        all_transfers_end(&service).await;
        let response = request(&caller, "/v1/encrypt/batch", NDJSON, lines.clone()).send();
        let mut response = response.await.unwrap();
        assert_eq!(response.status(), 200);
        assert!(!response.chunk().await.unwrap().unwrap().is_empty());
        assert_eq!(service.app.open_transfers.load(Ordering::Acquire), 1, "it is in the middle");
        drop(response);
        all_transfers_end(&service).await;
        assert_eq!(through(&caller, "/v1/encrypt", "x").await[..2], *b"KF");
    }
    service.stop().await;
}

/// A receiver that stands still while its connection is in use for others: the connection's own idle time does not
/// end it.
async fn a_stalled_stream_is_broken_off(path: &str, media_type: &str, piece: Bytes) {
    let mut world = World::new().await;
    world.settings.http.idle_secs_max = 1;
    let service = world.start().await;
    let caller = service.tenant_and_caller("acme").await.over_http2();
    let endless = stream::repeat_with(move || Ok::<_, std::io::Error>(piece.clone()));
    let body = reqwest::Body::wrap_stream(endless);
    let stalled = request(&caller, path, media_type, body).send().await.unwrap();
    assert_eq!(stalled.status(), 200);
    assert_eq!(service.app.open_transfers.load(Ordering::Acquire), 1);
    let others = async {
        while service.app.open_transfers.load(Ordering::Acquire) > 0 {
            caller.encrypt(b"hello", &json!({})).await;
        }
    };
    assert!(tokio::time::timeout(Duration::from_secs(30), others).await.is_ok(), "it stays open");
    assert!(receive(stalled).await.1.is_err(), "what broke off looks like a clean end");
    caller.encrypt(b"hello", &json!({})).await;
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_http2_stream_of_bytes_that_is_not_read_is_broken_off() {
    a_stalled_stream_is_broken_off("/v1/encrypt", OCTETS, Bytes::from(noise(1 << 16))).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_http2_stream_of_lines_that_is_not_read_is_broken_off() {
    let lines = "{\"plaintext\":\"aGVsbG8=\"}\n".repeat(1_000);
    a_stalled_stream_is_broken_off("/v1/encrypt/batch", NDJSON, lines.into()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_side_that_stands_still_is_not_waited_for_for_ever() {
    let mut world = World::new().await;
    world.settings.http.idle_secs_max = 1;
    world.settings.http.request_secs_max = 1;
    world.settings.http.connection_idle_secs_max = 1;
    let service = world.start().await;
    let caller = service.tenant_and_caller("acme").await;
    // The sender.
    let mut half = Half::post(&service, &caller, "/v1/encrypt", OCTETS, 1_000).await;
    let mut answer = Vec::new();
    half.0.read_to_end(&mut answer).await.unwrap();
    let answer = String::from_utf8_lossy(&answer);
    assert!(answer.contains("504") && answer.contains("deadline_exceeded"), "{answer}");
    // The receiver: nothing of the answer is read, and more is sent than all buffers between hold.
    let mut half = Half::post(&service, &caller, "/v1/encrypt", OCTETS, 1 << 30).await;
    let sending = tokio::time::timeout(Duration::from_secs(20), async {
        let noise = noise(1 << 20);
        while half.0.write_all(&noise).await.is_ok() {}
    });
    assert!(sending.await.is_ok(), "its connection is closed");
    all_transfers_end(&service).await;
    // A transfer that moves, however slowly, is not bound by the deadline of small requests.
    let slow = stream::unfold(0, |n| async move {
        tokio::time::sleep(Duration::from_millis(400)).await;
        (n < 5).then(|| (Ok::<_, std::io::Error>(Bytes::from_static(b"x")), n + 1))
    });
    let envelope = through(&caller, "/v1/encrypt", reqwest::Body::wrap_stream(slow)).await;
    assert_eq!(through(&caller, "/v1/decrypt", envelope).await, b"xxxxx");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_early_answer_reaches_a_client_that_sends_all_before_it_reads() {
    const ANNOUNCED: usize = 50 << 20;
    let (_world, service, caller) = started().await;
    let mut envelope = through(&caller, "/v1/encrypt", noise(3 << 20)).await;
    envelope.resize(ANNOUNCED, 0);
    for (token, code) in [(caller.token(), "context_mismatch"), ("kf_nobody", "unauthenticated")] {
        let mut socket = tokio::net::TcpStream::connect(service.address).await.unwrap();
        let head = format!(
            "POST /v1/decrypt HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {token}\r\ncontent-type: {OCTETS}\r\n\
             keyfold-context: record=\"43\"\r\ncontent-length: {ANNOUNCED}\r\n\r\n"
        );
        socket.write_all(head.as_bytes()).await.unwrap();
        socket.write_all(&envelope).await.unwrap();
        let mut answer = Vec::new();
        socket.read_to_end(&mut answer).await.unwrap();
        let answer = String::from_utf8_lossy(&answer);
        assert!(answer.contains(code), "{answer}");
    }
    all_transfers_end(&service).await;
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_breaks_off_is_never_a_message() {
    let (_world, service, caller) = started().await;
    let message = noise(8 << 20);
    let envelope = through(&caller, "/v1/encrypt", message.clone()).await;
    all_transfers_end(&service).await;
    // With the data key still in use, rewrapping hands the body on untouched.
    let bodies = [("/v1/encrypt", &message), ("/v1/decrypt", &envelope), ("/v1/rewrap", &envelope)];
    for (path, body) in bodies {
        for (bytes, begun) in [(6 << 20, true), (1 << 10, false)] {
            let mut half = Half::post(&service, &caller, path, OCTETS, body.len()).await;
            let (mut reader, mut writer) = half.0.split();
            let mut answer = Vec::new();
            let sending = async {
                writer.write_all(&body[..bytes]).await.unwrap();
                writer.shutdown().await.unwrap();
            };
            let (read, ()) = tokio::join!(reader.read_to_end(&mut answer), sending);
            let told = String::from_utf8_lossy(&answer[..answer.len().min(500)]);
            assert_eq!(answer.starts_with(b"HTTP/1.1 200"), begun, "{path}: {told}");
            assert!(read.is_err() || !answer.ends_with(b"\r\n0\r\n\r\n"), "{path}: a clean end");
            all_transfers_end(&service).await;
        }
    }
    let caller = caller.over_http2();
    for (path, body) in bodies {
        let broken = stream::iter([
            Ok(Bytes::copy_from_slice(&body[..6 << 20])),
            Err(std::io::Error::other("the client's disk has failed")),
        ]);
        let sent = request(&caller, path, OCTETS, reqwest::Body::wrap_stream(broken)).send().await;
        let got = match sent {
            Ok(response) => receive(response).await.1,
            Err(error) => Err(error),
        };
        assert!(got.is_err(), "{path}: a clean end");
    }
    all_transfers_end(&service).await;
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_whose_data_key_serves_passes_through_untouched_and_a_retired_ones_is_sealed_again() {
    let world = World::new().await;
    let service = world.start_without_keeper().await;
    let caller = service.tenant_and_caller("acme").await.with_header("keyfold-context", "record=\"42\"");
    let message = noise(3 << 20);
    let envelope = through(&caller, "/v1/encrypt", message.clone()).await;
    assert!(through(&caller, "/v1/rewrap", envelope.clone()).await == envelope);
    // Whether the message is whole is not looked at where it only passes through.
    let mut damaged = envelope.clone();
    *damaged.last_mut().unwrap() ^= 1;
    assert!(through(&caller, "/v1/rewrap", damaged.clone()).await == damaged);
    world.pass(25 * 3_600);
    let only_head = caller.with_header("keyfold-rewrap-mode", "wrapped_key");
    assert!(through(&only_head, "/v1/rewrap", envelope.clone()).await == envelope);
    let (response, renewed) = raw(&caller, "/v1/rewrap", pieces(&envelope, 70_001)).await;
    let renewed = renewed.unwrap();
    assert_eq!(response.headers()["keyfold-changed"], "true");
    let ids = [&envelope, &renewed].map(|envelope| envelope::inspect(envelope).unwrap().dek_id());
    assert_ne!(ids[0], ids[1]);
    assert_eq!(response.headers()["keyfold-dek-id"], ids[1].to_string());
    assert!(through(&caller, "/v1/decrypt", renewed).await == message);
    let (response, cut) = raw(&caller, "/v1/rewrap", damaged).await;
    assert!(response.status() != 200 || cut.is_err(), "what is sealed again is verified");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_are_counted_as_they_pass() {
    let world = World::new().await;
    let service = world.start_without_keeper().await;
    let caller = service.tenant_and_caller("acme").await;
    caller
        .post("/v1/tenants/acme/keys", &json!({"key": "small", "policy": {"dek_bytes_max": 100_000}}))
        .await
        .ok(201);
    let small = caller.with_header("keyfold-key", "small");
    let mut ids = Vec::new();
    for _ in 0..3 {
        let (response, envelope) = raw(&small, "/v1/encrypt", noise(100_000)).await;
        envelope.unwrap();
        ids.push(response.headers()["keyfold-dek-id"].clone());
    }
    ids.dedup();
    // The limit is reached, not passed, by the first: the next message of one byte would not fit.
    let (response, _) = raw(&small, "/v1/encrypt", "x").await;
    assert!(ids.len() > 1 || response.headers()["keyfold-dek-id"] != ids[0]);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_head_alone_renews_an_object_in_a_store() {
    let world = World::new().await;
    let service = world.start().await;
    world.keyring.add("two").await.unwrap();
    let caller = service.tenant_and_caller("acme").await.with_header("keyfold-context", "record=\"42\"");
    let message = noise(300_000);
    let object = through(&caller, "/v1/encrypt", message.clone()).await;
    let compact = caller.with_header("keyfold-envelope", "compact");
    let offset = envelope::inspect(&object).unwrap().body_offset();
    for sent in [offset, offset + 1, SEGMENT] {
        let (response, head) = raw(&compact, "/v1/rewrap/head", object[..sent].to_vec()).await;
        let (headers, head) = (response.headers(), head.unwrap());
        assert_eq!(headers["keyfold-changed"], "true");
        assert_eq!(headers["keyfold-rewrap-advised"], "false");
        let replaced: usize = headers["keyfold-replaces-bytes"].to_str().unwrap().parse().unwrap();
        let renewed = [&head, &object[replaced..]].concat();
        assert!(through(&caller, "/v1/decrypt", renewed).await == message);
    }
    let (response, same) = raw(&caller, "/v1/rewrap/head", object[..SEGMENT].to_vec()).await;
    assert_eq!(response.headers()["keyfold-changed"], "false");
    assert_eq!(same.unwrap(), &object[..offset]);
    let short = object[..offset - 1].to_vec();
    assert_eq!(problem(&caller, "/v1/rewrap/head", short).await.1, "malformed_envelope");
    let mut long = object[..offset].to_vec();
    long.resize(envelope::HEAD_BYTES_MAX.next_multiple_of(SEGMENT), 0);
    assert_eq!(raw(&caller, "/v1/rewrap/head", long.clone()).await.0.status(), 200);
    long.push(0);
    assert_eq!(problem(&caller, "/v1/rewrap/head", long).await.1, "too_large");
    let other = service.tenant_and_caller("other").await;
    assert_eq!(problem(&other, "/v1/rewrap/head", object).await.0, 422);
    service.stop().await;
}

/// It is as small as any other call, and has the same time.
#[tokio::test(flavor = "multi_thread")]
async fn a_head_that_dribbles_in_is_not_waited_for() {
    let mut world = World::new().await;
    world.settings.http.request_secs_max = 1;
    let service = world.start().await;
    let caller = service.tenant_and_caller("acme").await;
    let object = through(&caller, "/v1/encrypt", "hello").await;
    // It never stands still for long, and would take a quarter of a minute.
    let dribble = stream::unfold(object.into_iter(), |mut rest| async move {
        tokio::time::sleep(Duration::from_millis(100)).await;
        rest.next().map(|byte| (Ok::<_, std::io::Error>(Bytes::from(vec![byte])), rest))
    });
    let body = reqwest::Body::wrap_stream(dribble);
    assert_eq!(problem(&caller, "/v1/rewrap/head", body).await, (504, "deadline_exceeded".to_owned()));
    service.stop().await;
}

/// What somebody may do to a stream.
#[derive(Clone, Debug)]
enum Harm {
    Cut(prop::sample::Index),
    Extend(Vec<u8>),
    Flip(prop::sample::Index, u8),
    Swap(prop::sample::Index, prop::sample::Index),
    Repeat(prop::sample::Index),
    Drop(prop::sample::Index),
}

fn harms() -> impl Strategy<Value = Harm> {
    let index = any::<prop::sample::Index>;
    prop_oneof![
        index().prop_map(Harm::Cut),
        prop::collection::vec(any::<u8>(), 1..100).prop_map(Harm::Extend),
        (index(), 0..8_u8).prop_map(|(at, bit)| Harm::Flip(at, bit)),
        (index(), index()).prop_map(|(a, b)| Harm::Swap(a, b)),
        index().prop_map(Harm::Repeat),
        index().prop_map(Harm::Drop),
    ]
}

impl Harm {
    fn done_to(&self, envelope: &[u8]) -> Vec<u8> {
        let offset = envelope::inspect(envelope).unwrap().body_offset();
        let (head, body) = envelope.split_at(offset);
        let mut segments: Vec<&[u8]> = body.chunks(SEGMENT + TAG).collect();
        match self {
            Self::Cut(at) => return envelope[..at.index(envelope.len())].to_vec(),
            Self::Extend(more) => return [envelope, more].concat(),
            Self::Flip(at, bit) => {
                let mut envelope = envelope.to_vec();
                let at = at.index(envelope.len());
                envelope[at] ^= 1 << bit;
                return envelope;
            }
            Self::Swap(a, b) => {
                let (a, b) = (a.index(segments.len()), b.index(segments.len()));
                segments.swap(a, b);
            }
            Self::Repeat(at) => {
                let at = at.index(segments.len());
                segments.insert(at, segments[at]);
            }
            Self::Drop(at) => {
                segments.remove(at.index(segments.len()));
            }
        }
        [head, &segments.concat()].concat()
    }
}

#[test]
fn a_stream_that_was_tampered_with_never_comes_to_a_clean_end() {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let message = noise(30 * SEGMENT + 77);
    let (_world, service, caller, envelope) = runtime.block_on(async {
        let (world, service, caller) = started().await;
        let envelope = through(&caller, "/v1/encrypt", message.clone()).await;
        (world, service, caller, envelope)
    });
    let http2 = caller.clone().over_http2();
    proptest!(ProptestConfig::with_cases(96), |(harm in harms(), over_http2: bool)| {
        let harmed = harm.done_to(&envelope);
        prop_assume!(harmed != envelope);
        let caller = if over_http2 { &http2 } else { &caller };
        runtime.block_on(async {
            let (response, body) = raw(caller, "/v1/decrypt", harmed).await;
            match body {
                Ok(_) => prop_assert!(response.status() != 200, "a clean end"),
                Err(_) => prop_assert_eq!(response.status(), 200, "broken off after the first byte"),
            }
            Ok(())
        })?;
    });
    // What was given out until then is the message's beginning.
    let mut late = envelope.clone();
    let at = late.len() - 10;
    late[at] ^= 1;
    runtime.block_on(async {
        let mut response = request(&caller, "/v1/decrypt", OCTETS, late).send().await.unwrap();
        let mut got = Vec::new();
        let end = loop {
            match response.chunk().await {
                Ok(Some(chunk)) => got.extend_from_slice(&chunk),
                other => break other,
            }
        };
        assert!(end.is_err(), "a broken transfer");
        assert!(!got.is_empty() && message.starts_with(&got) && got.len() < message.len());
        service.stop().await;
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn trailers_behind_a_body_are_let_go() {
    let (_world, service, caller) = started().await;
    let mut trailers = http::HeaderMap::new();
    trailers.insert("x-checksum", http::HeaderValue::from_static("1"));
    let frames = [
        Ok::<_, std::io::Error>(http_body::Frame::data(Bytes::from_static(b"hello"))),
        Ok(http_body::Frame::trailers(trailers)),
    ];
    let body = reqwest::Body::wrap(StreamBody::new(stream::iter(frames)));
    let envelope = through(&caller, "/v1/encrypt", body).await;
    assert_eq!(through(&caller, "/v1/decrypt", envelope).await, b"hello");
    service.stop().await;
}
