//! Lines of JSON: any number of items, answered in order while more arrive.

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use futures_util::stream;
use reqwest::Body;
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt as _;
use tokio::sync::mpsc;

use super::{Half, NDJSON, all_transfers_end, request};
use crate::caller::{Caller, plaintext, text};
use crate::service::World;

/// Posts lines and receives the answers to them.
async fn answers(caller: &Caller, path: &str, body: impl Into<Body>) -> Vec<Value> {
    let response = request(caller, path, NDJSON, body).send().await.unwrap();
    assert_eq!(response.status(), 200);
    assert_eq!(response.headers()["content-type"], NDJSON);
    let body = response.text().await.unwrap();
    assert!(body.is_empty() || body.ends_with('\n'));
    body.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Every hundredth line is bad, in one of four ways.
fn line(n: usize) -> String {
    match n % 400 {
        99 => "{\"plaintext\": \"no base64!\"}".to_owned(),
        199 => "{".to_owned(),
        299 => format!("{{\"ref\": \"{n}\", \"plaintext\": \"{}\"}}", "A".repeat(5_000)),
        399 => "\u{fffd}\u{0}".to_owned(),
        _ => format!("{{\"ref\":\"{n}\",\"plaintext\":\"{}\"}}", STANDARD.encode(n.to_string())),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn many_lines_are_answered_in_order_and_each_bad_one_is_told() {
    // A million of them go through a release build in scripts/bench-bulk.
    const LINES: usize = 20_000;
    let mut world = World::new().await;
    world.settings.http.line_bytes_max = 1_024;
    let service = world.start().await;
    let caller = service.tenant_and_caller("acme").await;
    let pieces = (0..LINES).step_by(37).map(|start| {
        let lines: String = (start..(start + 37).min(LINES)).map(|n| line(n) + "\n").collect();
        Ok::<_, std::io::Error>(Bytes::from(lines))
    });
    let pieces: Vec<_> = pieces.collect();
    let sealed = answers(&caller, "/v1/encrypt/batch", Body::wrap_stream(stream::iter(pieces))).await;
    assert_eq!(sealed.len(), LINES);
    for (n, answer) in sealed.iter().enumerate() {
        if n % 100 == 99 {
            let code = if n % 400 == 299 { "too_large" } else { "malformed_request" };
            assert_eq!(answer["error"]["code"], code, "line {n}");
        } else {
            assert_eq!(answer["ref"], n.to_string());
        }
    }
    let lines: String = sealed
        .iter()
        .filter(|answer| answer.get("ciphertext").is_some())
        .map(|answer| json!({"ref": answer["ref"], "ciphertext": answer["ciphertext"]}).to_string() + "\n")
        .collect();
    let opened = answers(&caller, "/v1/decrypt/batch", lines.clone()).await;
    assert_eq!(opened.len(), LINES - LINES / 100);
    for answer in &opened {
        assert_eq!(plaintext(answer), text(&answer["ref"]).into_bytes());
    }
    let renewed = answers(&caller.clone().over_http2(), "/v1/rewrap/batch", lines).await;
    assert!(renewed.len() == opened.len() && renewed.iter().all(|answer| answer["changed"] == false));
    all_transfers_end(&service).await;
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_line_is_answered_before_the_next_is_sent() {
    let world = World::new().await;
    let service = world.start().await;
    let caller = service.tenant_and_caller("acme").await;
    let (send, receive) = mpsc::channel::<String>(1);
    let body = stream::unfold(receive, |mut receive| async move {
        let line = receive.recv().await?;
        Some((Ok::<_, std::io::Error>(Bytes::from(line)), receive))
    });
    send.send("{\"ref\":\"0\",\"plaintext\":\"\"}\n".to_owned()).await.unwrap();
    let response = request(&caller, "/v1/encrypt/batch", NDJSON, Body::wrap_stream(body)).send();
    let mut response = tokio::time::timeout(Duration::from_secs(20), response).await.unwrap().unwrap();
    for n in 0..5 {
        let chunk = response.chunk().await.unwrap().unwrap();
        let answer: Value = serde_json::from_slice(&chunk).unwrap();
        assert_eq!(answer["ref"], n.to_string());
        // In two pieces, with a blank line, the last without a line break.
        send.send(format!("\n{{\"ref\":\"{}\",", n + 1)).await.unwrap();
        send.send(format!("\"plaintext\":\"\"}}{}", if n == 4 { "" } else { "\n" })).await.unwrap();
    }
    drop(send);
    let rest = response.chunk().await.unwrap().unwrap();
    assert_eq!(serde_json::from_slice::<Value>(&rest).unwrap()["ref"], "5");
    assert!(response.chunk().await.unwrap().is_none(), "a clean end");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_breaks_off_gets_no_clean_end_and_frees_everything() {
    let world = World::new().await;
    let service = world.start().await;
    let caller = service.tenant_and_caller("acme").await;
    let line = Bytes::from_static(b"{\"plaintext\":\"\"}\n{\"plaint");
    let body = stream::iter([Ok(line), Err(std::io::Error::other("gone"))]);
    let sent = request(&caller, "/v1/encrypt/batch", NDJSON, Body::wrap_stream(body)).send().await;
    let got = match sent {
        Ok(response) => response.text().await,
        Err(error) => Err(error),
    };
    assert!(got.is_err(), "a clean end");
    all_transfers_end(&service).await;
    // One that goes away in the middle.
    let mut half = Half::post(&service, &caller, "/v1/encrypt/batch", NDJSON, 1 << 30).await;
    half.0.write_all("{\"plaintext\":\"\"}\n".repeat(10_000).as_bytes()).await.unwrap();
    drop(half);
    all_transfers_end(&service).await;
    assert!(answers(&caller, "/v1/encrypt/batch", "").await.is_empty());
    service.stop().await;
}
