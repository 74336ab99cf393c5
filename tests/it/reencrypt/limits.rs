//! A service that is busy, gone, or not what it should be; and how fast rows go to it.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};
use axum::routing::post;
use serde_json::{Value, json};
use tokio::sync::Mutex;
use tokio::task::JoinSet;

use super::Desk;
use crate::probes::KmsFault;

/// How the stand-in answers its n-th request, the items of which are these.
type Script = fn(usize, Vec<Value>) -> Response;

/// A stand-in for the service.
struct Standin {
    script: Script,
    asked: AtomicUsize,
    at_once: AtomicUsize,
    at_once_most: AtomicUsize,
    /// When how many rows came.
    rows: Mutex<Vec<(Instant, usize)>>,
    delay: Duration,
}

async fn answer(State(standin): State<Arc<Standin>>, body: Bytes) -> Response {
    let body: Value = serde_json::from_slice(&body).unwrap();
    let items = body["items"].as_array().unwrap().clone();
    let now = standin.at_once.fetch_add(1, Ordering::SeqCst) + 1;
    standin.at_once_most.fetch_max(now, Ordering::SeqCst);
    #[expect(clippy::disallowed_methods, reason = "the program goes by the real time")]
    standin.rows.lock().await.push((Instant::now(), items.len()));
    tokio::time::sleep(standin.delay).await;
    standin.at_once.fetch_sub(1, Ordering::SeqCst);
    (standin.script)(standin.asked.fetch_add(1, Ordering::SeqCst), items)
}

/// Every row is up to date.
fn all_current(items: Vec<Value>) -> Response {
    let items: Vec<Value> = items
        .into_iter()
        .map(|item| json!({"ref": item["ref"], "ciphertext": item["ciphertext"], "changed": false}))
        .collect();
    json!({"items": items, "failed": 0}).to_string().into_response()
}

struct Site {
    desk: Desk,
    standin: Arc<Standin>,
    url: String,
    _server: JoinSet<()>,
}

impl Site {
    async fn new(rows: usize, script: Script, delay: Duration) -> Self {
        let desk = Desk::new().await;
        let lines: Vec<String> = desk
            .sealed(0..rows)
            .await
            .iter()
            .enumerate()
            .map(|(row, sealed)| format!("{{\"id\":{row},\"secret\":\"{sealed}\"}}\n"))
            .collect();
        std::fs::write(desk.path("rows.ndjson"), lines.concat()).unwrap();
        let standin = Arc::new(Standin {
            script,
            asked: AtomicUsize::new(0),
            at_once: AtomicUsize::new(0),
            at_once_most: AtomicUsize::new(0),
            rows: Mutex::default(),
            delay,
        });
        let router = Router::new().route("/v1/rewrap/batch", post(answer)).with_state(standin.clone());
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let mut server = JoinSet::new();
        server.spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self { desk, standin, url, _server: server }
    }

    fn args<'a>(&'a self, more: &[&'a str]) -> Vec<&'a str> {
        let mut args =
            vec!["rows.ndjson", "-o", "new.ndjson", "--force", "--column", "secret", "--url", &self.url];
        args.extend(more);
        args
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_that_is_busy_is_asked_again_when_it_says_so() {
    let script: Script = |n, items| match n {
        0 => (StatusCode::TOO_MANY_REQUESTS, [("retry-after", "2")], "").into_response(),
        1 => {
            let problem = json!({"code": "overloaded", "detail": "too much", "retryable": true});
            (StatusCode::SERVICE_UNAVAILABLE, problem.to_string()).into_response()
        }
        _ => all_current(items),
    };
    let site = Site::new(3, script, Duration::ZERO).await;
    let report = site.desk.report(&site.args(&[])).await;
    assert_eq!(report["rows"], 3);
    let asked = site.standin.rows.lock().await;
    assert_eq!(asked.len(), 3);
    assert!(asked[1].0 - asked[0].0 >= Duration::from_secs(2), "it did not wait as it was told");
    assert!(asked[2].0 - asked[1].0 >= Duration::from_millis(250), "it did not wait at all");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_stays_busy_ends_the_job_and_the_next_run_goes_on() {
    let script: Script = |n, items| match n {
        1..=2 => StatusCode::SERVICE_UNAVAILABLE.into_response(),
        _ => all_current(items),
    };
    let site = Site::new(6, script, Duration::ZERO).await;
    let args =
        site.args(&["--state", "state", "--batch-rows", "2", "--concurrency", "1", "--retry-secs-max", "0"]);
    for _ in 0..2 {
        let (_, err) = site.desk.not_ok(&args).await;
        assert!(err.contains("503") && err.contains("goes on where it was left"), "{err}");
    }
    assert_eq!(site.desk.report(&args).await["rows"], 6);
    let rows: Vec<usize> = site.standin.rows.lock().await.iter().map(|(_, rows)| *rows).collect();
    assert_eq!(rows, [2, 2, 2, 2, 2], "the first page was done once, and the second thrice");
}

/// Nothing is written over the only copy of a message because a proxy, or a fault, answers something.
#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_is_none_changes_nothing() {
    let scripts: [(Script, &str); 7] = [
        (|_, _| "hello".into_response(), "no batch"),
        (|_, _| StatusCode::NOT_FOUND.into_response(), "is it a keyfold service?"),
        (|_, items| all_current(items[1..].to_vec()), "answers 2 of 3 rows"),
        (|_, items| all_current(items.into_iter().rev().collect()), "another order"),
        (
            |_, items| {
                let items: Vec<Value> = items
                    .iter()
                    .map(|item| json!({"ref": item["ref"], "ciphertext": "kf1.AAAA", "changed": true}))
                    .collect();
                json!({"items": items}).to_string().into_response()
            },
            "no envelope",
        ),
        (
            |_, items| {
                let items: Vec<Value> = items.iter().map(|item| json!({"ref": item["ref"]})).collect();
                json!({"items": items}).to_string().into_response()
            },
            "contradicts itself",
        ),
        (
            |_, _| {
                let problem = json!({"code": "unauthenticated", "detail": "no such key", "retryable": false});
                (StatusCode::UNAUTHORIZED, problem.to_string()).into_response()
            },
            "no such key (unauthenticated)",
        ),
    ];
    for (script, told) in scripts {
        let site = Site::new(3, script, Duration::ZERO).await;
        let (_, err) = site.desk.not_ok(&site.args(&[])).await;
        assert!(err.contains(told), "{told}: {err}");
        assert!(!site.desk.path("new.ndjson").exists());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_more_goes_at_once_or_in_a_second_than_may() {
    let site = Site::new(120, |_, items| all_current(items), Duration::from_millis(30)).await;
    site.desk.ok(&site.args(&["--batch-rows", "5", "--concurrency", "3"])).await;
    assert_eq!(site.standin.at_once_most.load(Ordering::SeqCst), 3);
    site.standin.rows.lock().await.clear();
    site.desk.ok(&site.args(&["--batch-rows", "100", "--rows-per-sec-max", "40"])).await;
    let asked = site.standin.rows.lock().await;
    assert_eq!(asked.iter().map(|(_, rows)| *rows).collect::<Vec<_>>(), [40, 40, 40]);
    assert!(asked[2].0 - asked[0].0 >= Duration::from_millis(1_900), "faster than 40 rows a second");
}

/// Rows that are too large for one request go in several.
#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_is_too_large_is_divided() {
    let script: Script = |_, items| match items.len() {
        0..=2 => all_current(items),
        _ => StatusCode::PAYLOAD_TOO_LARGE.into_response(),
    };
    let site = Site::new(7, script, Duration::ZERO).await;
    assert_eq!(site.desk.report(&site.args(&[])).await["rows"], 7);
}

/// The master key's outage is waited for, too: each item says that it may succeed later.
#[tokio::test(flavor = "multi_thread")]
async fn an_outage_of_the_kms_is_waited_for() {
    let world = crate::service::World::new().await;
    let kms = world.kms.clone();
    let desk = Desk::with(world).await;
    let sealed = desk.sealed(0..1).await;
    std::fs::write(desk.path("rows.csv"), format!("id,secret\n0,{}\n", sealed[0])).unwrap();
    desk.service.app.pool().clear();
    kms.fail(KmsFault::Outage);
    let args = [
        "rows.csv",
        "-o",
        "new.csv",
        "--force",
        "--column",
        "secret",
        "--context-column",
        "row_id=id",
        "-c",
        "table=people",
        "--envelope",
        "compact",
    ];
    let (_, err) = desk.not_ok(&[&args[..], &["--retry-secs-max", "0"]].concat()).await;
    assert!(err.contains("kms_unavailable"), "{err}");
    let run = desk.run(&args);
    let heal = async {
        tokio::time::sleep(Duration::from_millis(700)).await;
        kms.fail(None);
        desk.world.pass(2);
    };
    let (output, ()) = tokio::join!(run, heal);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
