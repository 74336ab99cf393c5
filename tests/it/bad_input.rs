//! What is not as the interface asks for: each gets its code, and none a 500.

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http_body_util::BodyExt as _;
use keyfold::store::Store as _;
use reqwest::Method;
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use crate::caller::{receive, text};
use crate::contract;
use crate::lanes::{read_to_close, send_raw};
use crate::service::{World, open_registry};

const DATA: [&str; 3] = ["/v1/encrypt", "/v1/decrypt", "/v1/rewrap"];

/// The code and the detail of a problem in a raw answer.
#[track_caller]
fn problem_in(answer: &str) -> (String, String) {
    let body = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no answer: {answer:?}")).1;
    // The body may be chunked: it is one JSON object all the same.
    let json = &body[body.find('{').unwrap()..=body.rfind('}').unwrap()];
    let problem: Value = serde_json::from_str(json).unwrap();
    (text(&problem["code"]), text(&problem["detail"]))
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_json_or_not_the_json_that_is_asked_for_is_malformed() {
    let world = World::new().await;
    let service = world.start().await;
    let caller = service.tenant_and_caller("acme").await;
    let deep = "[".repeat(60_000);
    let not_json = [
        "",
        " ",
        "{",
        "}",
        "nonsense",
        "\u{feff}{}",
        "{} {}",
        "{}x",
        "{'a': 1}",
        &deep,
        "{\"plaintext\": \"a",
    ];
    for path in DATA.into_iter().chain(["/v1/tenants", "/v1/tenants/acme/keys", "/v1/tenants/acme/api-keys"])
    {
        for body in not_json.into_iter().chain(["[]", "null", "1", "\"x\"", "true", "{}", "{\"surplus\": 1}"])
        {
            caller.post_text(path, body.to_owned()).await.problem("malformed_request");
        }
        for bytes in [
            &b"\xff\xfe{}"[..],
            b"{\"plaintext\": \"\xff\"}",
            b"{\"plaintext\": \"\\ud800\"}",
            b"{\"plaintext\": \"\x00\"}",
        ] {
            caller.post_text(path, bytes.to_vec()).await.problem("malformed_request");
        }
    }
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_types_and_unknown_or_repeated_fields_are_named_in_the_answer() {
    let world = World::new().await;
    let service = world.start().await;
    let caller = service.tenant_and_caller("acme").await;
    for (body, says) in [
        (r#"{"plaintext": 5}"#, "expected a string"),
        (r#"{"plaintext": null}"#, "expected a string"),
        (r#"{"plaintext": []}"#, "expected a string"),
        (r#"{"context": {}}"#, "missing field `plaintext`"),
        (r#"{"plaintext": "", "context": []}"#, "expected a map of strings to strings"),
        (r#"{"plaintext": "", "context": "x"}"#, "expected a map of strings to strings"),
        (r#"{"plaintext": "", "context": {"a": 1}}"#, "expected a string"),
        (r#"{"plaintext": "", "context": {"a": null}}"#, "expected a string"),
        (r#"{"plaintext": "", "context": {"a": {"b": "c"}}}"#, "expected a string"),
        (r#"{"plaintext": "", "key": 5}"#, "expected a string"),
        (r#"{"plaintext": "", "envelope": "Compact"}"#, "compact"),
        (r#"{"plaintext": "", "envelope": 1}"#, "malformed"),
        (r#"{"plaintext": "", "plain": ""}"#, "unknown field `plain`"),
        (r#"{"Plaintext": ""}"#, "unknown field `Plaintext`"),
        (r#"{"plaintext": "", "plaintext": ""}"#, "duplicate field `plaintext`"),
        (r#"{"plaintext": "", "context": {}, "context": {}}"#, "duplicate field `context`"),
        (r#"{"plaintext": "", "key": "default", "key": "default"}"#, "duplicate field `key`"),
        (r#"{"plaintext": "", "context": {"a": "1", "a": "1"}}"#, "twice"),
        (r#"{"plaintext": "", "context": {"": "1"}}"#, "name is empty"),
    ] {
        let answer = caller.post_text("/v1/encrypt", body).await;
        let detail = answer.problem("malformed_request");
        assert!(detail.contains(says) || says == "malformed", "{body}: {detail}");
    }
    for (body, says) in [
        (r#"{"ciphertext": 5}"#, "expected a string"),
        (r#"{"ciphertext": "kf1.", "key": "default"}"#, "unknown field `key`"),
        (r#"{"ciphertext": "kf1.", "ciphertext": "kf1."}"#, "duplicate field `ciphertext`"),
    ] {
        for path in ["/v1/decrypt", "/v1/rewrap"] {
            assert!(caller.post_text(path, body).await.problem("malformed_request").contains(says), "{body}");
        }
    }
    let body = r#"{"ciphertext": "kf1.", "mode": "all"}"#;
    assert!(caller.post_text("/v1/rewrap", body).await.problem("malformed_request").contains("wrapped_key"));
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn only_canonical_base64_is_a_plaintext() {
    let world = World::new().await;
    let service = world.start().await;
    let caller = service.tenant_and_caller("acme").await;
    for bad in [
        "aGVsbG8",
        "aGVsbG8==",
        "aGVsbG9=",
        "aGVsbG8 =",
        " aGVsbG8=",
        "aGVs\\nbG8=",
        "aGVsbG8=\\n",
        "_-8=",
        "a",
        "=",
        "====",
        "aGV=bG8=",
        "\\u00e9\\u00e9",
        "kf1.AAAA",
    ] {
        let body = format!(r#"{{"plaintext": "{bad}"}}"#);
        let detail = caller.post_text("/v1/encrypt", body).await.problem("malformed_request");
        assert!(detail.contains("base64"), "{bad}: {detail}");
    }
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_the_text_form_of_an_envelope_is_a_malformed_envelope() {
    let world = World::new().await;
    let service = world.start().await;
    let caller = service.tenant_and_caller("acme").await;
    let good = caller.encrypt(b"hello", &json!({})).await;
    let short = json!({"plaintext": STANDARD.encode(b"hello!"), "envelope": "compact"});
    let short = text(&caller.post("/v1/encrypt", &short).await.ok(200)["ciphertext"]);
    // 98 bytes are 131 characters: the last one has two bits to spare, which must be zero.
    let alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let last = alphabet.find(short.chars().last().unwrap()).unwrap();
    let spare = format!("{}{}", &short[..short.len() - 1], &alphabet[last + 1..=last + 1]);
    let bad = [
        "",
        "kf1",
        "kf1.",
        "kf2.AAAA",
        "KF1.AAAA",
        "AAAA",
        "kf1.A",
        "kf1.!!!!",
        "kf1.AAAA",
        "kf1.S0YB",
        "kf1.S0YC",
        &good[4..],
        &format!("{good}="),
        &format!("{good}\n"),
        &format!(" {good}"),
        &good.replace("kf1.", "kf1. "),
        &format!("{}+{}", &good[..40], &good[41..]),
        &format!("{}/{}", &good[..40], &good[41..]),
        &spare,
    ];
    for ciphertext in bad {
        for path in ["/v1/decrypt", "/v1/rewrap"] {
            caller.post(path, &json!({"ciphertext": ciphertext})).await.problem("malformed_envelope");
        }
    }
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plaintext_at_the_limit_is_sealed_and_one_byte_more_is_refused() {
    let world = World::new().await;
    let limit = world.settings.http.plaintext_bytes_max;
    assert_eq!(limit, 8 << 20);
    let service = world.start().await;
    let caller = service.tenant_and_caller("acme").await;
    let plaintext = vec![0xa5; limit];
    let ciphertext = caller.encrypt(&plaintext, &json!({"record": "42"})).await;
    assert!(caller.decrypt(&ciphertext, &json!({"record": "42"})).await == plaintext);
    let answer = caller.try_encrypt(&vec![0xa5; limit + 1], &json!({})).await;
    assert!(answer.problem("too_large").contains("8388608 bytes"));
    service.stop().await;

    let mut world = World::new().await;
    world.settings.http.plaintext_bytes_max = 10;
    let service = world.start().await;
    let caller = service.tenant_and_caller("acme").await;
    for good in 0..=10 {
        caller.encrypt(&vec![0; good], &json!({})).await;
    }
    for bad in 11..=14 {
        caller.try_encrypt(&vec![0; bad], &json!({})).await.problem("too_large");
    }
    service.stop().await;
}

/// With a length and without one, over HTTP/1.1 and HTTP/2.
#[tokio::test(flavor = "multi_thread")]
async fn a_body_at_the_limit_is_read_and_one_byte_more_is_refused() {
    let mut world = World::new().await;
    world.settings.http.body_bytes_max = 2_048;
    world.settings.http.admin_body_bytes_max = 1_024;
    let service = world.start().await;
    let http1 = service.tenant_and_caller("acme").await;
    for caller in [http1.clone(), http1.over_http2()] {
        for (path, limit, good) in [("/v1/encrypt", 2_048, 200), ("/v1/tenants/acme/api-keys", 1_024, 201)] {
            let start = match path {
                "/v1/encrypt" => r#"{"plaintext": "aGVsbG8="}"#,
                _ => r#"{"name": "ci", "verbs": ["encrypt"]}"#,
            };
            let padded = |bytes: usize| format!("{start}{}", " ".repeat(bytes - start.len()));
            caller.post_text(path, padded(limit)).await.ok(good);
            let detail = caller.post_text(path, padded(limit + 1)).await.problem("too_large");
            assert!(detail.contains(&limit.to_string()), "{detail}");
            // A body whose frames go through a function does not know its length any more.
            let unannounced = |bytes: usize| reqwest::Body::wrap(padded(bytes).map_frame(|frame| frame));
            caller.post_text(path, unannounced(limit)).await.ok(good);
            caller.post_text(path, unannounced(limit + 1)).await.problem("too_large");
        }
    }
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_announced_length_over_the_limit_is_refused_before_the_body_is_sent() {
    let world = World::new().await;
    let service = world.start().await;
    let caller = service.tenant_and_caller("acme").await;
    let head = |more: &str| {
        format!(
            "POST /v1/encrypt HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {}\r\ncontent-type: application/json\r\n{more}\r\n",
            caller.token()
        )
    };
    let answer =
        send_raw(service.address, head("content-length: 99999999999\r\nexpect: 100-continue\r\n").as_bytes())
            .await;
    assert!(answer.starts_with("HTTP/1.1 413"), "{answer}");
    assert_eq!(problem_in(&answer).0, "too_large");
    // Lengths that contradict each other, or are none, are no request at all.
    for bad in [
        "content-length: 1\r\ncontent-length: 2\r\n",
        "content-length: -1\r\n",
        "content-length: x\r\n",
        "content-length: 5\r\ntransfer-encoding: gzip\r\n",
    ] {
        let answer = send_raw(service.address, head(bad).as_bytes()).await;
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 400"), "{bad}: {answer}");
    }
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_never_ends_meets_the_limit_or_the_deadline() {
    let mut world = World::new().await;
    world.settings.http.request_secs_max = 1;
    world.settings.http.body_bytes_max = 100_000;
    let service = world.start().await;
    let caller = service.tenant_and_caller("acme").await;
    let head = format!(
        "POST /v1/encrypt HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {}\r\ncontent-type: application/json\r\n\
         transfer-encoding: chunked\r\n\r\n",
        caller.token()
    );
    // As fast as it goes: the limit.
    let mut stream = TcpStream::connect(service.address).await.unwrap();
    stream.write_all(head.as_bytes()).await.unwrap();
    let chunk = format!("1000\r\n{}\r\n", " ".repeat(0x1000));
    for _ in 0..25 {
        stream.write_all(chunk.as_bytes()).await.unwrap();
    }
    let answer = read_to_close(&mut stream).await;
    assert_eq!(problem_in(&answer).0, "too_large", "{answer}");
    // A byte now and then, or nothing more: the deadline.
    for trickle in [true, false] {
        let mut stream = TcpStream::connect(service.address).await.unwrap();
        stream.write_all(head.as_bytes()).await.unwrap();
        for _ in 0..5 {
            if trickle {
                stream.write_all(b"1\r\n \r\n").await.unwrap();
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
        let answer = read_to_close(&mut stream).await;
        assert_eq!(problem_in(&answer).0, "deadline_exceeded", "{answer}");
    }
    // A body that ends before it is complete.
    let mut stream = TcpStream::connect(service.address).await.unwrap();
    stream.write_all(head.as_bytes()).await.unwrap();
    stream.write_all(b"5\r\n{\"pla").await.unwrap();
    stream.shutdown().await.unwrap();
    let answer = read_to_close(&mut stream).await;
    assert!(answer.is_empty() || problem_in(&answer).0 == "malformed_request", "{answer}");
    service.anonymous().get("/live").await.ok(200);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_head_that_comes_too_slowly_or_is_too_large_closes_the_connection() {
    let mut world = World::new().await;
    world.settings.http.head_secs_max = 1;
    let service = world.start().await;
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
    let mut waits = JoinSet::new();
    for start in
        [&b""[..], b"GET", b"GET /live HTTP/1.1\r\nhost: x\r\nx-slow: ", b"PRI * HTTP/2.0\r\n", preface]
    {
        let address = service.address;
        waits.spawn(async move { send_raw(address, start).await });
    }
    for answer in waits.join_all().await {
        assert!(!answer.contains(" 200 ") && !answer.contains(" 500 "), "{answer}");
    }
    let large = format!("GET /live HTTP/1.1\r\nhost: x\r\nx-large: {}\r\n\r\n", "a".repeat(40_000));
    assert!(send_raw(service.address, large.as_bytes()).await.starts_with("HTTP/1.1 431"));
    let many = format!("GET /live HTTP/1.1\r\nhost: x\r\n{}\r\n", "x-many: a\r\n".repeat(200));
    assert!(send_raw(service.address, many.as_bytes()).await.starts_with("HTTP/1.1 431"));
    for nonsense in
        ["nonsense\r\n\r\n", "GET /live HTTP/9.9\r\n\r\n", "\x16\x03\x01\x02\0\x01\0\x01\x7c\x03\x03"]
    {
        let answer = send_raw(service.address, nonsense.as_bytes()).await;
        assert!(
            answer.is_empty() || answer.starts_with("HTTP/1.1 400") || answer.starts_with("HTTP/1.1 505"),
            "{answer}"
        );
    }
    service.anonymous().get("/live").await.ok(200);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_context_takes_62_pairs_of_the_callers_and_8192_bytes_in_all() {
    let world = World::new().await;
    let service = world.start().await;
    let caller = service.tenant_and_caller("acme").await;
    let pairs = |count: usize| Value::Object((0..count).map(|n| (format!("n{n}"), json!("v"))).collect());
    let ciphertext = caller.encrypt(b"hello", &pairs(62)).await;
    assert_eq!(caller.decrypt(&ciphertext, &pairs(62)).await, b"hello");
    // 2 bytes for the count, 4 for each pair's lengths, and the service's two pairs.
    let service_bytes =
        2 + (4 + "keyfold:tenant".len() + "acme".len()) + (4 + "keyfold:key".len() + "default".len());
    let large = |bytes: usize| json!({"v": "x".repeat(bytes - service_bytes - 5)});
    let ciphertext = caller.encrypt(b"hello", &large(8_192)).await;
    assert_eq!(caller.decrypt(&ciphertext, &large(8_192)).await, b"hello");
    for (context, says) in [
        (pairs(63), "64 pairs"),
        (pairs(64), "64 pairs"),
        (pairs(65), "64 pairs"),
        (large(8_193), "8,192"),
        (large(20_000), "8,192"),
    ] {
        let details = [
            caller.try_encrypt(b"hello", &context).await.problem("malformed_request"),
            caller.try_decrypt(&ciphertext, &context).await.problem("malformed_request"),
            caller
                .post("/v1/rewrap", &json!({"ciphertext": ciphertext, "context": context}))
                .await
                .problem("malformed_request"),
        ];
        assert!(details.iter().all(|detail| detail.contains(says)), "{details:?}");
    }
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn reserved_names_are_refused_whatever_their_value() {
    let world = World::new().await;
    let service = world.start().await;
    let caller = service.tenant_and_caller("acme").await;
    let ciphertext = caller.encrypt(b"hello", &json!({})).await;
    for name in ["keyfold:tenant", "keyfold:key", "keyfold:dek", "keyfold:", "aws:kms", "aws", "awsome"] {
        let context = json!({name: "acme"});
        let detail = caller.try_encrypt(b"hello", &context).await.problem("reserved_context");
        assert!(detail.contains(name), "{detail}");
        caller.try_decrypt(&ciphertext, &context).await.problem("reserved_context");
        let body = json!({"ciphertext": ciphertext, "context": context});
        caller.post("/v1/rewrap", &body).await.problem("reserved_context");
    }
    for name in ["Keyfold:tenant", "keyfold", "AWS", " aws", "my:aws"] {
        caller.encrypt(b"hello", &json!({name: "acme"})).await;
    }
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_is_not_there_is_not_found_and_a_name_that_is_none_is_malformed() {
    let world = World::new().await;
    let service = world.start().await;
    let caller = service.tenant_and_caller("acme").await;
    let seal = |key: &str| json!({"plaintext": "aGVsbG8=", "key": key});
    assert!(caller.post("/v1/encrypt", &seal("nothing")).await.problem("not_found").contains("nothing"));
    let long = "a".repeat(64);
    for bad in ["", "UPPER", "a b", "-a", "../a", "é", &long] {
        caller.post("/v1/encrypt", &seal(bad)).await.problem("malformed_request");
        caller.post("/v1/tenants/acme/keys", &json!({"key": bad})).await.problem("malformed_request");
    }
    for bad in ["UPPER", "a%20b", "%00", "a%2fb", "%ff", "..%2f"] {
        caller.get(&format!("/v1/tenants/{bad}")).await.problem("malformed_request");
        caller.get(&format!("/v1/tenants/acme/keys/{bad}")).await.problem("malformed_request");
        let path = format!("/v1/tenants/acme/api-keys/{bad}/revoke");
        caller.post(&path, &json!({})).await.problem("malformed_request");
    }
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn another_media_type_is_unsupported() {
    let world = World::new().await;
    let service = world.start().await;
    let caller = service.tenant_and_caller("acme").await;
    let send = async |media_type: Option<&str>| {
        let mut request = caller.request(Method::POST, "/v1/encrypt").body(r#"{"plaintext": "aGVsbG8="}"#);
        if let Some(media_type) = media_type {
            request = request.header("content-type", media_type);
        }
        receive(request).await
    };
    for good in
        ["application/json", "Application/JSON", "application/json; charset=utf-8", "application/json ;x"]
    {
        send(Some(good)).await.ok(200);
    }
    for bad in [
        "text/plain",
        "application/x-www-form-urlencoded",
        "application/jsonx",
        "application/json+x",
        "application",
        "",
    ] {
        send(Some(bad)).await.problem("unsupported_media_type");
    }
    send(None).await.problem("unsupported_media_type");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_shows_no_valid_credential_is_told_so_before_anything_else() {
    let world = World::new().await;
    let service = world.start().await;
    let caller = service.tenant_and_caller("acme").await;
    let token = caller.token().to_owned();
    let anonymous = service.anonymous();
    let wrong_secret =
        format!("{}{}", &token[..token.len() - 4], if token.ends_with("AAAA") { "BBBB" } else { "AAAA" });
    let unknown_id = format!("kf_AAAAAAAAAAAAAAAA{}", &token[19..]);
    let (long, cut) = (format!("Bearer {token}A"), format!("Bearer {}", &token[..token.len() - 1]));
    let (wrong_secret, unknown_id) = (format!("Bearer {wrong_secret}"), format!("Bearer {unknown_id}"));
    let (basic, bare, twice) = (format!("Basic {token}"), token.clone(), format!("Bearer  {token}"));
    let mut answers = vec![anonymous.clone()];
    for value in [
        "",
        "Bearer",
        "Bearer ",
        "Bearer kf_",
        &long,
        &cut,
        &wrong_secret,
        &unknown_id,
        &basic,
        &bare,
        &twice,
        "\u{e9}",
    ] {
        answers.push(anonymous.with_header("authorization", value));
    }
    // Which of two counts is what an attacker would like to choose.
    let right = format!("Bearer {token}");
    answers.push(caller.with_header("authorization", &right));
    answers.push(caller.with_header("authorization", "Bearer kf_x"));
    let mut details = Vec::new();
    for caller in answers {
        for (path, body) in [("/v1/encrypt", "not json"), ("/v1/tenants", "{}")] {
            let answer = caller.post_text(path, body).await;
            assert_eq!(answer.headers["www-authenticate"], "Bearer");
            details.push(answer.problem("unauthenticated"));
        }
        caller.get("/v1/tenants/acme").await.problem("unauthenticated");
    }
    details.dedup();
    assert_eq!(details.len(), 1, "the answer does not tell what was wrong: {details:?}");
    anonymous.with_header("authorization", &right).encrypt(b"hello", &json!({})).await;
    anonymous
        .with_header("authorization", &right.replace("Bearer", "bearer"))
        .encrypt(b"hello", &json!({}))
        .await;
    // Not even the first byte of its body is waited for.
    let head = "POST /v1/encrypt HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 1000\r\n\r\n";
    assert_eq!(problem_in(&send_raw(service.address, head.as_bytes()).await).0, "unauthenticated");
    service.stop().await;
}

/// By another process on the same registry: the command line, or a replica.
#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_another_process_revokes_is_refused_after_the_next_look_at_the_registry() {
    let world = World::new().await;
    let service = world.start().await;
    let caller = service.tenant_and_caller("acme").await;
    caller.encrypt(b"hello", &json!({})).await;
    let other = open_registry(&world.path("registry.sqlite")).await;
    other.revoke_api_key(&caller.token()[3..19], world.clock.now()).await.unwrap();
    other.close().await;
    let refused = async {
        loop {
            world.pass(1);
            if caller.try_encrypt(b"hello", &json!({})).await.status == 401 {
                break;
            }
        }
    };
    assert!(tokio::time::timeout(Duration::from_secs(10), refused).await.is_ok(), "it is still let in");
    assert!(world.clock.monotonic() < Duration::from_secs(60));
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn more_requests_than_the_limit_are_turned_away_at_once_and_health_is_answered() {
    let mut world = World::new().await;
    world.settings.http.in_flight_max = 3;
    let service = world.start().await;
    let mut callers = Vec::new();
    for tenant in ["a", "b", "c", "d"] {
        callers.push(service.tenant_and_caller(tenant).await);
    }
    let caller = callers.pop().unwrap();
    let before = world.kms.calls();
    world.kms.hold();
    let mut waiting = JoinSet::new();
    for caller in callers {
        waiting.spawn(async move { caller.try_encrypt(b"hello", &json!({})).await });
    }
    world.kms.arrived(before + 3).await;
    caller.try_encrypt(b"hello", &json!({})).await.problem("overloaded");
    // Administration has a room of its own: an operator gets in while the data plane is full.
    caller.get("/v1/tenants").await.ok(200);
    service.anonymous().get("/live").await.ok(200);
    service.anonymous().get("/ready").await.ok(200);
    world.kms.release();
    for answer in waiting.join_all().await {
        answer.ok(200);
    }
    caller.encrypt(b"hello", &json!({})).await;
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_takes_too_long_is_told_so_and_can_be_repeated() {
    let mut world = World::new().await;
    world.settings.http.request_secs_max = 1;
    let service = world.start().await;
    let caller = service.tenant_and_caller("acme").await;
    world.kms.hold();
    let answer = caller.try_encrypt(b"hello", &json!({})).await;
    answer.problem("deadline_exceeded");
    contract::check_problem(&answer);
    world.kms.release();
    caller.encrypt(b"hello", &json!({})).await;
    assert_eq!(world.kms.generates(), 1, "what was begun was finished, and used");
    service.stop().await;
}
