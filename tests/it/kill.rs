//! A process that is killed in the middle of its work has lost nothing that it had answered.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use reqwest::Method;
use rustix::process::Signal;
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::lanes::post_all;
use crate::program::Program;

const LANES: usize = 8;
const MESSAGES: usize = 1_000;

/// The key's data keys end after ten messages, so that the kill meets data keys that are just being made.
#[tokio::test(flavor = "multi_thread")]
async fn every_ciphertext_that_was_answered_opens_after_a_kill() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("keyfold-data");
    let mut answered: Vec<(usize, String)> = Vec::new();
    let mut told = 0;
    for (round, kill_after) in [5, 100, 400, 700].into_iter().enumerate() {
        let program = Program::serve(folder.path(), &["--dev"], &[]).await;
        let caller = program.dev_caller(&data);
        if round == 0 {
            let policy = json!({"key": "busy", "policy": {"dek_messages_max": 10}});
            caller.post("/v1/tenants/dev/keys", &policy).await.ok(201);
        }
        let (next, done) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let mut lanes = JoinSet::new();
        for _ in 0..LANES {
            let (caller, next, done) = (caller.clone(), Arc::clone(&next), Arc::clone(&done));
            lanes.spawn(async move {
                let mut answered = Vec::new();
                loop {
                    let n = next.fetch_add(1, Ordering::SeqCst);
                    if n >= MESSAGES {
                        return answered;
                    }
                    let weight = if n % 2 == 0 { "compact" } else { "embedded" };
                    let body = json!({"plaintext": STANDARD.encode(n.to_string()), "context": {"n": n.to_string()}, "key": "busy", "envelope": weight});
                    let request = caller.request(Method::POST, "/v1/encrypt").header("content-type", "application/json");
                    let Ok(response) = request.body(body.to_string()).send().await else { return answered };
                    let status = response.status().as_u16();
                    let Ok(bytes) = response.bytes().await else { return answered };
                    let answer: Value = serde_json::from_slice(&bytes).unwrap();
                    assert_eq!(status, 200, "{answer}");
                    answered.push((n, answer["ciphertext"].as_str().unwrap().to_owned()));
                    done.fetch_add(1, Ordering::SeqCst);
                }
            });
        }
        while done.load(Ordering::SeqCst) < kill_after && !lanes.is_empty() {
            tokio::task::yield_now().await;
        }
        program.signal(Signal::KILL);
        for lane in lanes.join_all().await {
            answered.extend(lane);
        }
        assert!(!program.ended().await.0.success());
        assert!(
            answered.len() >= told + kill_after && answered.len() < told + MESSAGES,
            "{}",
            answered.len()
        );
        told = answered.len();
    }

    let program = Program::serve(folder.path(), &["--dev"], &[]).await;
    let token = program.dev_caller(&data).token().to_owned();
    let body = |(n, ciphertext): &(usize, String)| {
        json!({"ciphertext": ciphertext, "context": {"n": n.to_string()}}).to_string()
    };
    let opened = post_all(program.address, &token, "/v1/decrypt", answered.iter().map(body).collect()).await;
    for ((n, _), (status, answer)) in answered.iter().zip(opened) {
        assert_eq!((status, &answer["plaintext"]), (200, &json!(STANDARD.encode(n.to_string()))), "{answer}");
    }
    program.stop().await;
}
