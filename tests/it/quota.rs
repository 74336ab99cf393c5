//! Quotas: exact at the edge, and nobody pays for another.

use bytes::Bytes;
use futures_util::stream;
use http_body_util::{BodyExt as _, Full};
use keyfold::tenant::Verb;
use reqwest::Method;
use serde_json::json;
use tokio::sync::mpsc;

use crate::bulk::{Half, OCTETS, all_transfers_end, problem, through};
use crate::caller::{Answer, Caller, receive};
use crate::service::World;

async fn call(caller: &Caller) -> Answer {
    caller.try_encrypt(b"hello", &json!({})).await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_burst_passes_the_next_is_told_when_and_then_passes() {
    let mut world = World::new().await;
    world.settings.quotas.tenant.requests_per_sec = 2;
    world.settings.quotas.tenant.requests_burst = 3;
    let service = world.start_without_keeper().await;
    let caller = service.tenant_and_caller("acme").await;
    for standing in ["r=2;t=1", "r=1;t=1", "r=0;t=2"] {
        let answer = call(&caller).await;
        assert_eq!(answer.status, 200);
        assert_eq!(answer.headers["ratelimit-policy"], "\"tenant-requests\";q=3;w=2");
        assert_eq!(answer.headers["ratelimit"], format!("\"tenant-requests\";{standing}"));
    }
    let answer = call(&caller).await;
    assert!(answer.problem("rate_limited").contains("tenant-requests"));
    assert_eq!((answer.status, &answer.headers["retry-after"]), (429, &"1".parse().unwrap()));
    assert_eq!(answer.headers["ratelimit"], "\"tenant-requests\";r=0;t=2");
    world.clock.advance(std::time::Duration::from_millis(499));
    call(&caller).await.problem("rate_limited");
    world.clock.advance(std::time::Duration::from_millis(1));
    assert_eq!(call(&caller).await.status, 200);
    call(&caller).await.problem("rate_limited");
    // Administration and health have no quota.
    for _ in 0..10 {
        assert_eq!(caller.get("/v1/tenants/acme").await.status, 200);
        assert_eq!(caller.get("/live").await.status, 200);
    }
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_past_his_quota_takes_nothing_from_another() {
    let mut world = World::new().await;
    world.settings.quotas.tenant.requests_per_sec = 10;
    let service = world.start_without_keeper().await;
    let (loud, quiet) = (service.tenant_and_caller("loud").await, service.tenant_and_caller("quiet").await);
    let (mut loud_passed, mut quiet_passed) = (0, 0);
    for _ in 0..5 {
        for _ in 0..40 {
            loud_passed += u32::from(call(&loud).await.status == 200);
        }
        for _ in 0..10 {
            quiet_passed += u32::from(call(&quiet).await.status == 200);
        }
        world.pass(1);
    }
    assert_eq!((loud_passed, quiet_passed), (50, 50));
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_principal_past_his_quota_takes_nothing_from_others_of_his_tenant() {
    let mut world = World::new().await;
    world.settings.quotas.principal.requests_per_sec = 3;
    world.settings.quotas.tenant.requests_per_sec = 5;
    let service = world.start_without_keeper().await;
    let one = service.tenant_and_caller("acme").await;
    let two = service.caller(&["acme"], &Verb::ALL).await;
    for _ in 0..3 {
        assert_eq!(call(&one).await.status, 200);
    }
    for _ in 0..10 {
        assert!(call(&one).await.problem("rate_limited").contains("principal-requests"));
    }
    for _ in 0..2 {
        assert_eq!(call(&two).await.status, 200);
    }
    assert!(call(&two).await.problem("rate_limited").contains("tenant-requests"));
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_and_a_principal_of_their_own_rates_have_those_and_no_others() {
    let mut world = World::new().await;
    let quotas = "[quotas.tenant]\nrequests_per_sec = 2\n[quotas.tenants.large]\nrequests_per_sec = 4\n\
                  [quotas.tenants.free]\n[quotas.principals.\"api-key:nobody\"]\nrequests_per_sec = 1\n";
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), quotas).unwrap();
    let load = || keyfold::config::Settings::load(Some(file.path()), &keyfold::config::Variables::default());
    world.settings.quotas = load().unwrap().quotas;
    let service = world.start_without_keeper().await;
    for (tenant, passes) in [("small", 2), ("large", 4), ("free", 20)] {
        let caller = service.tenant_and_caller(tenant).await;
        let mut passed = 0;
        for _ in 0..20 {
            passed += u32::from(call(&caller).await.status == 200);
        }
        assert_eq!(passed, passes, "{tenant}");
    }
    // A principal's own, beside his tenant's.
    let caller = service.tenant_and_caller("other").await;
    let id = format!("api-key:{}", &caller.token()[3..19]);
    service.stop().await;
    world.pass(10);
    let own = keyfold::http::Rates { requests_per_sec: 1, ..Default::default() };
    world.settings.quotas.principals = [(id.parse().unwrap(), own)].into();
    let service = world.start_without_keeper().await;
    let caller = service.anonymous().with_token(caller.token());
    assert_eq!(call(&caller).await.status, 200);
    assert!(call(&caller).await.problem("rate_limited").contains("principal-requests"));
    service.stop().await;
    std::fs::write(file.path(), "[quotas.tenants.\"No Tenant\"]\n").unwrap();
    let refused = load().unwrap_err().to_string();
    assert!(refused.contains("No Tenant"), "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_count_whether_they_are_announced_or_not() {
    let mut world = World::new().await;
    world.settings.quotas.tenant.kib_per_sec = 4;
    let service = world.start_without_keeper().await;
    let caller = service.tenant_and_caller("acme").await;
    // 3 KiB, begun ones as whole.
    let body = format!("{{\"plaintext\": \"{}\"}}", "aGVs".repeat(600));
    assert_eq!(body.len().div_ceil(1_024), 3);
    assert_eq!(caller.post_text("/v1/encrypt", body.clone()).await.status, 200);
    caller.post_text("/v1/encrypt", body.clone()).await.problem("rate_limited");
    world.pass(1);
    // A body that does not tell its length.
    let chunked =
        |body: &str| reqwest::Body::wrap(Full::new(Bytes::from(body.to_owned())).map_frame(|frame| frame));
    assert_eq!(caller.post_text("/v1/encrypt", chunked(&body)).await.status, 200);
    caller.post_text("/v1/encrypt", chunked(&body)).await.problem("rate_limited");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_head_of_an_envelope_is_paid_announced_or_not() {
    let mut world = World::new().await;
    world.settings.quotas.tenant.kib_per_sec = 4;
    let service = world.start_without_keeper().await;
    let caller = service.tenant_and_caller("acme").await;
    let octets = |path: &str, body: reqwest::Body| {
        caller.request(Method::POST, path).header("content-type", "application/octet-stream").body(body)
    };
    let object = octets("/v1/encrypt", vec![7; 2_500].into()).send().await.unwrap();
    let object = object.bytes().await.unwrap();
    assert_eq!(object.len().div_ceil(1_024), 3);
    for announced in [true, false] {
        world.pass(10);
        for status in [200, 429] {
            let body = if announced {
                reqwest::Body::from(object.clone())
            } else {
                reqwest::Body::wrap(Full::new(object.clone()).map_frame(|frame| frame))
            };
            let answer = octets("/v1/rewrap/head", body).send().await.unwrap();
            assert_eq!(answer.status(), status, "announced: {announced}");
        }
    }
    service.stop().await;
}

fn batch(items: usize) -> serde_json::Value {
    json!({"items": vec![json!({"plaintext": "aGVsbG8="}); items]})
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_costs_as_many_items_as_it_has() {
    let mut world = World::new().await;
    world.settings.quotas.tenant.items_per_sec = 4;
    world.settings.quotas.tenant.items_burst = 10;
    let service = world.start_without_keeper().await;
    let caller = service.tenant_and_caller("acme").await;
    let answer = caller.post("/v1/encrypt/batch", &batch(7)).await;
    assert_eq!(answer.headers["ratelimit-policy"], "\"tenant-items\";q=10;w=3;qu=\"items\"");
    assert_eq!(answer.headers["ratelimit"], "\"tenant-items\";r=3;t=2");
    assert_eq!(answer.ok(200)["failed"], 0);
    // Refused whole, and for nothing: a smaller one passes.
    let refused = caller.post("/v1/encrypt/batch", &batch(4)).await;
    assert!(refused.problem("rate_limited").contains("tenant-items"));
    assert_eq!(refused.headers["retry-after"], "1");
    assert_eq!(caller.post("/v1/encrypt/batch", &batch(3)).await.ok(200)["failed"], 0);
    call(&caller).await.problem("rate_limited");
    world.clock.advance(std::time::Duration::from_millis(249));
    call(&caller).await.problem("rate_limited");
    world.clock.advance(std::time::Duration::from_millis(1));
    assert_eq!(call(&caller).await.status, 200);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_of_more_items_than_the_burst_waits_for_all_of_it_and_is_paid_in_full() {
    let mut world = World::new().await;
    world.settings.quotas.tenant.items_per_sec = 10;
    let service = world.start_without_keeper().await;
    let caller = service.tenant_and_caller("acme").await;
    assert_eq!(caller.post("/v1/encrypt/batch", &batch(11)).await.ok(200)["failed"], 0);
    // One is owed, and eleven are more than the bucket: it has to be full.
    let refused = caller.post("/v1/encrypt/batch", &batch(11)).await;
    refused.problem("rate_limited");
    world.clock.advance(std::time::Duration::from_millis(1_099));
    caller.post("/v1/encrypt/batch", &batch(11)).await.problem("rate_limited");
    world.clock.advance(std::time::Duration::from_millis(1));
    assert_eq!(caller.post("/v1/encrypt/batch", &batch(30)).await.ok(200)["failed"], 0);
    world.clock.advance(std::time::Duration::from_millis(2_099));
    call(&caller).await.problem("rate_limited");
    world.clock.advance(std::time::Duration::from_millis(1));
    assert_eq!(call(&caller).await.status, 200);
    service.stop().await;
}

/// A stream of lines whose client reads each answer before it sends more.
struct Lines {
    send: mpsc::Sender<String>,
    response: reqwest::Response,
}

impl Lines {
    async fn open(caller: &Caller, first: &str) -> (Self, String) {
        let (send, receive) = mpsc::channel::<String>(1);
        let body = stream::unfold(receive, |mut receive| async move {
            let line = receive.recv().await?;
            Some((Ok::<_, std::io::Error>(Bytes::from(line)), receive))
        });
        send.send(first.to_owned()).await.unwrap();
        let request = caller.request(Method::POST, "/v1/encrypt/batch");
        let request = request.header("content-type", "application/x-ndjson");
        let response = request.body(reqwest::Body::wrap_stream(body)).send().await.unwrap();
        assert_eq!(response.status(), 200);
        let mut lines = Self { send, response };
        let answer = lines.answer().await;
        (lines, answer)
    }

    /// The code of the next answer's problem, the first where several come at once; `-` where it has none.
    async fn answer(&mut self) -> String {
        let chunk = self.response.chunk().await.unwrap().unwrap();
        let line = chunk.split(|byte| *byte == b'\n').next().unwrap();
        let answer: serde_json::Value = serde_json::from_slice(line).unwrap();
        answer["error"]["code"].as_str().unwrap_or("-").to_owned()
    }

    async fn send(&mut self, text: impl Into<String>) -> String {
        self.send.send(text.into()).await.unwrap();
        self.answer().await
    }
}

const LINE: &str = "{\"plaintext\":\"aGVsbG8=\"}\n";

#[tokio::test(flavor = "multi_thread")]
async fn lines_past_the_quota_are_told_so_and_the_stream_goes_on() {
    let mut world = World::new().await;
    world.settings.quotas.tenant.items_per_sec = 2;
    world.settings.quotas.tenant.items_burst = 3;
    let service = world.start_without_keeper().await;
    let caller = service.tenant_and_caller("acme").await;
    let (mut lines, first) = Lines::open(&caller, LINE).await;
    assert_eq!(first, "-");
    for expected in ["-", "-", "rate_limited", "rate_limited"] {
        assert_eq!(lines.send(LINE).await, expected);
    }
    world.clock.advance(std::time::Duration::from_millis(499));
    assert_eq!(lines.send(LINE).await, "rate_limited");
    world.clock.advance(std::time::Duration::from_millis(1));
    for expected in ["-", "rate_limited"] {
        assert_eq!(lines.send(LINE).await, expected);
    }
    drop(lines.send);
    assert!(lines.response.chunk().await.unwrap().is_none(), "a clean end");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lines_bytes_are_paid_where_they_come_also_those_that_make_no_line() {
    let mut world = World::new().await;
    world.settings.quotas.tenant.kib_per_sec = 4;
    world.settings.http.line_bytes_max = 1_024;
    let service = world.start_without_keeper().await;
    let caller = service.tenant_and_caller("acme").await;
    let long = format!("{{\"plaintext\":\"{}\"}}\n", "AAAA".repeat(245));
    // One begun KiB, and three more of a line that is too long, or of blank lines.
    for filler in ["x".repeat(3 << 10) + "\n", "\n".repeat(3 << 10) + "{}\n"] {
        let (mut lines, first) = Lines::open(&caller, LINE).await;
        assert_eq!(first, "-");
        let expected = if filler.starts_with('x') { "too_large" } else { "malformed_request" };
        assert_eq!(lines.send(filler).await, expected);
        assert_eq!(lines.send(long.clone() + "{\"plaintext\":").await, "rate_limited");
        world.pass(10);
        assert_eq!(lines.send("\"\"}\n").await, "rate_limited", "its end alone is not all of it");
        assert_eq!(lines.send(LINE).await, "-");
        drop(lines);
        world.pass(10);
    }
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transfer_that_finds_no_place_costs_nothing() {
    let mut world = World::new().await;
    world.settings.quotas.tenant.kib_per_sec = 8;
    world.settings.quotas.tenant.requests_per_sec = 2;
    world.settings.http.transfers_max = 1;
    let service = world.start_without_keeper().await;
    let caller = service.tenant_and_caller("acme").await;
    let other = service.tenant_and_caller("other").await;
    let open = Half::post(&service, &other, "/v1/encrypt", OCTETS, 5_000).await;
    for _ in 0..5 {
        let (status, code) = problem(&caller, "/v1/encrypt", vec![7; 5_000]).await;
        assert_eq!((status, code.as_str()), (503, "overloaded"));
    }
    drop(open);
    all_transfers_end(&service).await;
    through(&caller, "/v1/encrypt", vec![7; 5_000]).await;
    through(&caller, "/v1/encrypt", vec![7; 3_000]).await;
    assert_eq!(problem(&caller, "/v1/encrypt", vec![7; 1]).await.1, "rate_limited");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_larger_than_the_burst_is_paid_in_full_announced_or_not() {
    let mut world = World::new().await;
    world.settings.quotas.tenant.kib_per_sec = 4;
    let service = world.start_without_keeper().await;
    let caller = service.tenant_and_caller("acme").await;
    let octets = ("content-type", "application/octet-stream");
    let body = Bytes::from(vec![7; 20 << 10]);
    for announced in [true, false] {
        let body = if announced {
            reqwest::Body::from(body.clone())
        } else {
            reqwest::Body::wrap(Full::new(body.clone()).map_frame(|frame| frame))
        };
        let request = caller.request(Method::POST, "/v1/encrypt").header(octets.0, octets.1).body(body);
        let answer = request.send().await.unwrap();
        assert_eq!(answer.status(), 200);
        let headers = answer.headers().clone();
        answer.bytes().await.unwrap();
        if announced {
            let (policy, limit) = (&headers["ratelimit-policy"], &headers["ratelimit"]);
            assert_eq!(policy, "\"tenant-bytes\";q=4096;w=1;qu=\"content-bytes\"");
            assert_eq!(limit, "\"tenant-bytes\";r=0;t=5");
        }
        // 16 KiB are owed, and one more is wanted.
        let refused = call(&caller).await;
        assert!(refused.problem("rate_limited").contains("tenant-bytes"));
        assert_eq!(refused.headers["retry-after"], "5");
        world.clock.advance(std::time::Duration::from_millis(4_249));
        call(&caller).await.problem("rate_limited");
        world.clock.advance(std::time::Duration::from_millis(1));
        assert_eq!(call(&caller).await.status, 200);
        world.pass(10);
    }
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_that_the_tenants_quota_refuses_costs_the_caller_nothing() {
    let mut world = World::new().await;
    world.settings.quotas.tenant.requests_per_sec = 2;
    world.settings.quotas.principal.requests_per_sec = 4;
    world.settings.quotas.principal.requests_burst = 6;
    let service = world.start_without_keeper().await;
    let caller = service.tenant_and_caller("acme").await;
    for _ in 0..2 {
        assert_eq!(call(&caller).await.status, 200);
    }
    for _ in 0..10 {
        assert!(call(&caller).await.problem("rate_limited").contains("tenant-requests"));
    }
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn cold_keys_cost_a_tenant_no_more_kms_calls_than_he_may_cause() {
    let mut world = World::new().await;
    world.settings.pool.tenant_kms_calls_per_min = 2;
    let service = world.start_without_keeper().await;
    let caller = service.tenant_and_caller("acme").await;
    let other = service.tenant_and_caller("other").await;
    for key in ["one", "two", "three"] {
        caller.post("/v1/tenants/acme/keys", &json!({"key": key})).await.ok(201);
    }
    let of = |key: &str| json!({"plaintext": "aGVsbG8=", "key": key});
    assert_eq!(caller.post("/v1/encrypt", &of("one")).await.status, 200);
    assert_eq!(caller.post("/v1/encrypt", &of("two")).await.status, 200);
    let refused = caller.post("/v1/encrypt", &of("three")).await;
    assert!(refused.problem("rate_limited").contains("tenant_kms_calls_per_min"));
    assert_eq!(refused.headers["retry-after"], "30");
    // What is in memory goes on, and so do others.
    assert_eq!(caller.post("/v1/encrypt", &of("one")).await.status, 200);
    assert_eq!(call(&other).await.status, 200);
    let calls = world.kms.generates_of("acme");
    world.pass(29);
    caller.post("/v1/encrypt", &of("three")).await.problem("rate_limited");
    assert_eq!(world.kms.generates_of("acme"), calls);
    world.pass(1);
    assert_eq!(caller.post("/v1/encrypt", &of("three")).await.status, 200);
    service.stop().await;
}

const JSON: &str = "application/json";

/// The calls that are made most are answered before the router where there are no quotas, and by it where there are.
#[tokio::test(flavor = "multi_thread")]
async fn with_quotas_and_without_every_request_gets_the_same_answer() {
    let without = World::new().await;
    let mut with = World::new().await;
    with.settings.quotas.tenant.requests_per_sec = 1_000_000;
    let mut answers = Vec::new();
    for world in [&without, &with] {
        let service = world.start().await;
        let known = service.tenant_and_caller("acme").await;
        let sealed = known.encrypt(b"a", &json!({"a": "1"})).await;
        let raw = envelope::text::decode(&sealed).unwrap();
        let plain = json!({"plaintext": "YQ==", "context": {"a": "1"}}).to_string().into_bytes();
        let sealed = json!({"ciphertext": sealed, "context": {"a": "1"}}).to_string().into_bytes();
        let bodies =
            [(JSON, &plain), (JSON, &sealed), (JSON, &b"{}".to_vec()), (OCTETS, &raw), ("text/plain", &raw)];
        let mut seen = Vec::new();
        for caller in [&known, &known.clone().over_http2(), &service.anonymous()] {
            for path in [
                "/v1/encrypt",
                "/v1/encrypt?a=1",
                "/v1/encrypt/",
                "//v1/encrypt",
                "/v1/Encrypt",
                "/v1/%65ncrypt",
                "/v1/encrypt%00",
                "/v1/encrypt/batch",
                "/v1/decrypt",
                "/v1/rewrap",
            ] {
                for method in [Method::POST, Method::GET, Method::HEAD, Method::PUT, Method::OPTIONS] {
                    for (media_type, body) in bodies {
                        let request = caller.request(method.clone(), path).header("content-type", media_type);
                        let request = match media_type {
                            OCTETS => request.header("keyfold-context", "a=\"1\""),
                            _ => request,
                        };
                        let answer = receive(request.body(body.clone())).await;
                        let mut names: Vec<String> = answer.headers.keys().map(ToString::to_string).collect();
                        names.retain(|name| !name.starts_with("ratelimit"));
                        names.sort_unstable();
                        let allow = answer.headers.get("allow").cloned();
                        let told =
                            ["code", "detail", "plaintext", "key"].map(|name| answer.json[name].clone());
                        seen.push((method.clone(), path, media_type, answer.status, names, allow, told));
                    }
                }
            }
        }
        service.stop().await;
        answers.push(seen);
    }
    let (with, without) = (answers.pop().unwrap(), answers.pop().unwrap());
    // Each of them by both kinds of bodies, in both versions of HTTP.
    for path in ["/v1/encrypt", "/v1/decrypt", "/v1/rewrap"] {
        let done = |media_type| {
            without.iter().filter(|seen| seen.1 == path && seen.2 == media_type && seen.3 == 200).count()
        };
        assert_eq!((done(JSON), done(OCTETS)), (2, 2), "{path}");
    }
    assert!(without.iter().any(|seen| seen.3 == 405));
    for (without, with) in without.iter().zip(&with) {
        assert_eq!(without, with);
    }
}
