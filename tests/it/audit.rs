//! The record of who did what: it is complete, it can be verified, and what is not recorded is not done.

use std::fs;
use std::path::Path;

use keyfold::audit::{self, Fault, Keys, Link, ReadError, TrailFiles, Verifier};
use keyfold::config::{AuditFileSettings, Settings};
use keyfold::tenant::Verb;
use serde_json::{Value, json};

use crate::service::{AUDIT_KEY, World};

fn keys() -> Keys {
    Keys::new(AUDIT_KEY, vec![]).unwrap()
}

/// A world whose services write an audit file.
async fn world(more: impl FnOnce(&mut Settings)) -> World {
    let mut world = World::new().await;
    world.settings.audit.file = Some(AuditFileSettings::default());
    more(&mut world.settings);
    world
}

fn trail(world: &World) -> TrailFiles {
    audit::trails(&world.settings.audit_file()).unwrap().remove(0)
}

fn records(world: &World) -> Vec<Value> {
    let files = trail(world).files;
    let text: String = files.iter().map(|file| fs::read_to_string(file).unwrap()).collect();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn fault(trail: &TrailFiles, anchors: &[Link]) -> (u64, Fault) {
    match audit::verify(trail, &keys(), anchors) {
        Err(ReadError::Fault(located)) => (located.line, located.fault),
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_call_and_change_is_recorded_with_who_what_and_how_it_ended_and_no_value() {
    let world = world(|settings| settings.audit.public_context = vec!["purpose".to_owned()]).await;
    let service = world.start_without_keeper().await;
    service.tenant("acme").await;
    let caller = service.caller(&["acme"], &[Verb::Encrypt, Verb::Decrypt]).await;
    let context = json!({"patient": "canary-value", "purpose": "billing"});
    let sealed = caller.with_header("x-request-id", "call-1").encrypt(b"canary-plaintext", &context).await;
    caller.try_decrypt(&sealed, &json!({"patient": "other-canary"})).await.problem("context_mismatch");
    caller.post("/v1/rewrap", &json!({"ciphertext": sealed})).await.problem("forbidden");
    caller.post_text("/v1/encrypt", "{").await.problem("malformed_request");
    let (token, id) = (caller.token().to_owned(), caller.token()[3..19].to_owned());
    service.stop().await;

    let summary = audit::verify(&trail(&world), &keys(), &[]).unwrap();
    assert!(summary.sealed && summary.first == 1);
    let raw = fs::read_to_string(world.settings.audit_file()).unwrap();
    for secret in ["canary", &token, token.rsplit('_').next().unwrap()] {
        assert!(!raw.contains(secret), "{secret} is in the audit");
    }
    let all = records(&world);
    let calls: Vec<&Value> = all.iter().filter(|record| record["event"] == "call").collect();
    assert_eq!(calls.len(), 4, "{calls:#?}");
    let (sealed, refused) = (calls[0], calls[1]);
    for (name, expected) in [
        ("what", "encrypt"),
        ("outcome", "done"),
        ("principal", &format!("api-key:{id}")),
        ("method", "api-key"),
        ("source", "127.0.0.1"),
        ("request_id", "call-1"),
        ("tenant", "acme"),
        ("key", "default"),
        ("time", "2026-11-23T12:00:00Z"),
    ] {
        assert_eq!(sealed[name], expected, "{name}");
    }
    assert_eq!(sealed["bytes_in"], 16);
    assert!(sealed["bytes_out"].as_u64().unwrap() > 16 && sealed["dek"].is_string());
    assert!(sealed["micros"].is_u64());
    assert_eq!(sealed["context"]["purpose"], json!({"value": "billing"}));
    let hash = keys().value_hash("acme", "patient", "canary-value");
    assert_eq!(sealed["context"]["patient"], json!({"hash": hash}));
    assert_eq!((&refused["what"], &refused["outcome"]), (&json!("decrypt"), &json!("failed")));
    assert_eq!((&refused["code"], &refused["dek"]), (&json!("context_mismatch"), &sealed["dek"]));
    assert_ne!(refused["context"]["patient"], sealed["context"]["patient"]);
    for (call, code) in [(calls[2], "forbidden"), (calls[3], "malformed_request")] {
        assert_eq!((&call["outcome"], &call["code"]), (&json!("refused"), &json!(code)));
    }
    let changes: Vec<_> = all.iter().filter(|record| record["event"] == "change").collect();
    let told: Vec<_> = changes.iter().map(|r| (r["what"].clone(), r["outcome"].clone())).collect();
    let expected = ["tenant.create", "tenant.create", "api-key.create", "api-key.create"];
    let outcomes = ["begin", "done", "begin", "done"];
    assert_eq!(told, expected.iter().zip(outcomes).map(|(w, o)| (json!(w), json!(o))).collect::<Vec<_>>());
}

/// A file of this many short records.
async fn long_trail(world: &World, records: usize) -> TrailFiles {
    let options = world.settings.audit_options();
    let audit = audit::Audit::open(world.clock.clone(), &options, &keys()).unwrap();
    let (principal, tenant) = ("api-key:x".parse().unwrap(), "acme".parse().unwrap());
    for _ in 0..records {
        let who = audit::Who::local(&principal, Some(&tenant));
        audit.begin(Verb::Encrypt, who).await.unwrap().done();
    }
    assert!(audit.flush().await);
    audit.close();
    trail(world)
}

/// Changes each byte of a line, one bit of it, and has the change found.
fn every_byte_counts(before: &Verifier<'_>, line: &[u8], number: usize) {
    let mut other = line.to_vec();
    for at in 0..line.len() {
        // Another bit for each byte: over the lines every bit of every kind of byte is met.
        other[at] ^= 1 << ((at + number) % 8);
        let mut parts = other.split_inclusive(|byte| *byte == b'\n');
        let followed = parts.try_fold(before.clone(), |mut verifier, part| {
            verifier.line(part)?;
            Ok::<_, Fault>(verifier)
        });
        assert!(followed.is_err(), "byte {at} of {}", String::from_utf8_lossy(line));
        other[at] = line[at];
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_change_of_a_single_byte_of_ten_thousand_records_is_found() {
    let world = world(|settings| settings.audit.queue_records_max = 20_000).await;
    let trail = long_trail(&world, 10_000).await;
    let file = &trail.files[0];
    let bytes = fs::read(file).unwrap();
    let keys = keys();
    assert!(audit::verify(&trail, &keys, &[]).unwrap().last.seq > 10_000);
    // A line's code depends on nothing that comes after it: so for each byte it is enough to look at its line, from
    // the state before. Only a line break reaches into the next one.
    let lines: Vec<&[u8]> = bytes.split_inclusive(|byte| *byte == b'\n').collect();
    let mut verifier = Verifier::new(&keys, vec![]);
    let states: Vec<_> = lines
        .iter()
        .map(|line| {
            let before = verifier.clone();
            verifier.line(line).unwrap();
            before
        })
        .collect();
    let (states, lines) = (&states, &lines);
    std::thread::scope(|scope| {
        for part in 0..2 {
            scope.spawn(move || {
                for at in (part..lines.len()).step_by(2) {
                    every_byte_counts(&states[at], lines[at], at);
                }
            });
        }
    });
    // And all the way through the file as the command does it, for some.
    for at in (0..bytes.len()).step_by(bytes.len() / 23) {
        let mut other = bytes.clone();
        other[at] = other[at].wrapping_add(1);
        fs::write(file, &other).unwrap();
        let (line, _) = fault(&trail, &[]);
        let expected = bytes[..at].iter().filter(|byte| **byte == b'\n').count() as u64 + 1;
        assert_eq!(line, expected);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn missing_reordered_repeated_cut_and_replaced_records_are_found() {
    let world = world(|_| ()).await;
    let trail = long_trail(&world, 50).await;
    let file = &trail.files[0];
    let text = fs::read_to_string(file).unwrap();
    let lines: Vec<&str> = text.split_inclusive('\n').collect();
    let last = audit::verify(&trail, &keys(), &[]).unwrap().last;
    let with = |lines: &[&str]| fs::write(file, lines.concat()).unwrap();
    let out_of_order = |expected, found| Fault::OutOfOrder { expected, found };

    with(&[&lines[..10], &lines[11..]].concat());
    assert_eq!(fault(&trail, &[]), (11, out_of_order(11, 12)));
    with(&[&lines[..10], &[lines[11], lines[10]], &lines[12..]].concat());
    assert_eq!(fault(&trail, &[]), (11, out_of_order(11, 12)));
    with(&[&lines[..10], &lines[9..]].concat());
    assert_eq!(fault(&trail, &[]), (11, out_of_order(11, 10)));
    with(&lines[1..]);
    assert_eq!(fault(&trail, &[]), (1, Fault::NoBeginning));
    fs::write(file, &text[..text.len() - 1]).unwrap();
    assert_eq!(fault(&trail, &[]).1, Fault::Torn);
    // Cut at a record: the note beside it knows better; without the note an anchor from the log does.
    with(&lines[..20]);
    assert_eq!(fault(&trail, &[]).1, Fault::Truncated(last.seq));
    let mut alone = self::trail(&world);
    alone.noted = None;
    assert!(!audit::verify(&alone, &keys(), &[]).unwrap().sealed);
    assert_eq!(fault(&alone, &[last]).1, Fault::Truncated(last.seq));
    // Without the key nobody makes a record that fits.
    let forger = Keys::new(&[8; 32], vec![]).unwrap();
    with(&lines);
    assert!(audit::verify(&trail, &forger, &[]).is_err());
    assert!(audit::verify(&trail, &keys(), &[Link { mac: [0; 32], ..last }]).is_err());
    assert!(audit::verify(&trail, &keys(), &[last]).is_ok());
    // A service does not go on after what was cut, and says why.
    with(&lines[..20]);
    let refused = audit::Audit::open(world.clock.clone(), &world.settings.audit_options(), &keys());
    let refused = refused.err().unwrap().to_string();
    assert!(refused.contains("keyfold audit verify"), "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_and_a_rotation_go_on_with_the_chain_and_a_torn_line_is_told() {
    let world = world(|settings| settings.audit.file.as_mut().unwrap().rotate_bytes = 4_096).await;
    drop(long_trail(&world, 30).await);
    // A crash in the middle of a line.
    let file = world.settings.audit_file();
    let mut bytes = fs::read(&file).unwrap();
    bytes.extend_from_slice(b"{\"seq\":9999,\"ti");
    fs::write(&file, bytes).unwrap();
    for _ in 0..10 {
        long_trail(&world, 30).await;
    }
    let trail = trail(&world);
    assert!(trail.files.len() > 5, "{:?}", trail.files);
    let summary = audit::verify(&trail, &keys(), &[]).unwrap();
    assert!(summary.sealed && summary.first == 1);
    let all = records(&world);
    assert_eq!(all.iter().filter(|record| record["event"] == "call").count(), 330);
    let torn: Vec<_> = all.iter().filter(|record| record["event"] == "recovered").collect();
    assert_eq!(torn.len(), 1);
    assert_eq!(torn[0]["torn_bytes"], 15);
    // A former file that is taken away is missed: the rest tells where it begins, or does not hold.
    fs::remove_file(&trail.files[1]).unwrap();
    assert!(audit::verify(&self::trail(&world), &keys(), &[]).is_err());
    let first = fs::read_to_string(&trail.files[0]).unwrap();
    let first =
        first.lines().nth(3).unwrap().split_once("\"mac\":\"").unwrap().1.trim_end_matches("\"}").to_owned();
    let anchor = Link::from_anchor(&format!("4:{first}")).unwrap();
    fs::remove_file(&trail.files[0]).unwrap();
    assert!(audit::verify(&self::trail(&world), &keys(), &[]).unwrap().first > 1);
    // Who kept a place in what was taken away is told so.
    assert_eq!(fault(&self::trail(&world), &[anchor]).1, Fault::Beheaded(4));
    // Two processes do not write into one file.
    let options = world.settings.audit_options();
    let one = audit::Audit::open(world.clock.clone(), &options, &keys()).unwrap();
    let two = audit::Audit::open(world.clock.clone(), &options, &keys()).unwrap();
    one.close();
    two.close();
    let trails = audit::trails(&file).unwrap();
    assert_eq!(trails.len(), 2);
    assert_eq!(audit::verify(&trails[1], &keys(), &[]).unwrap().first, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_refuses_rather_than_forgets() {
    let world = World::new().await;
    let service = world.start_without_keeper().await;
    service.tenant("acme").await;
    let token = service.token(&["acme"], &Verb::ALL).await;
    service.stop().await;
    let mut world = world;
    world.settings.audit.file = Some(AuditFileSettings::default());
    let file = world.settings.audit_file();
    fs::create_dir_all(file.parent().unwrap()).unwrap();
    std::os::unix::fs::symlink(Path::new("/dev/full"), &file).unwrap();
    let service = world.start_without_keeper().await;
    let caller = service.anonymous().with_token(token);
    // The change is not made: its beginning cannot be written.
    let tenant = json!({"tenant": "late", "keks": [{"kek": "local:one"}]});
    caller.post("/v1/tenants", &tenant).await.problem("audit_unavailable");
    assert!(service.store_has_no("late").await);
    let answer = caller.try_encrypt(b"hello", &json!({})).await;
    answer.problem("audit_unavailable");
    assert_eq!(answer.status, 503);
    assert!(answer.headers.contains_key("retry-after"));
    // What is refused anyway is refused for this reason: it could not be recorded either.
    caller.post_text("/v1/encrypt", "{").await.problem("audit_unavailable");
    assert_eq!(service.anonymous().get("/live").await.status, 200);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_local_syslog_gets_each_record_as_a_datagram() {
    let mut world = World::new().await;
    let socket = world.path("log");
    let log = std::os::unix::net::UnixDatagram::bind(&socket).unwrap();
    world.settings.audit.syslog =
        Some(keyfold::config::AuditSyslogSettings { path: socket, ..Default::default() });
    let service = world.start_without_keeper().await;
    service.tenant("acme").await;
    service.stop().await;
    let (mut buffer, mut lines) = ([0; 4_096], vec![]);
    log.set_nonblocking(true).unwrap();
    while let Ok(bytes) = log.recv(&mut buffer) {
        let text = String::from_utf8_lossy(&buffer[..bytes]).into_owned();
        lines.push(text.strip_prefix("<85>1 - - keyfold - audit - ").unwrap().to_owned() + "\n");
    }
    let keys = keys();
    let mut verifier = Verifier::new(&keys, vec![]);
    for line in &lines {
        verifier.line(line.as_bytes()).unwrap();
    }
    assert!(verifier.end().unwrap().sealed && lines.iter().any(|line| line.contains("tenant.create")));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_has_one_record_and_a_stranger_has_one_too_up_to_a_limit() {
    let world = world(|settings| settings.audit.strangers_per_sec_max = 2).await;
    let service = world.start_without_keeper().await;
    let caller = service.tenant_and_caller("acme").await;
    // More than one stretch; every tenth is not base64.
    let item = |n: usize| {
        let plaintext = if n.is_multiple_of(10) { "?" } else { "aGVsbG8=" };
        json!({"ref": format!("row-{n}"), "plaintext": plaintext, "context": {"same": "s", "row": n.to_string()}})
    };
    let items: Vec<Value> = (0..200).map(item).collect();
    assert_eq!(caller.post("/v1/encrypt/batch", &json!({"items": items})).await.status, 200);
    let stranger = service.anonymous().with_token("kf_not-a-token");
    for _ in 0..5 {
        stranger.try_encrypt(b"hello", &json!({})).await.problem("unauthenticated");
    }
    world.pass(1);
    stranger.try_encrypt(b"hello", &json!({})).await.problem("unauthenticated");
    service.stop().await;
    let all = records(&world);
    let calls: Vec<&Value> = all.iter().filter(|record| record["event"] == "call").collect();
    let batch: Vec<&&Value> = calls.iter().filter(|record| record["what"] == "encrypt").collect();
    assert_eq!(batch.len(), 1, "{calls:#?}");
    let batch = batch[0];
    assert_eq!((&batch["items"], &batch["items_failed"]), (&json!(200), &json!(20)));
    assert_eq!(batch["codes"], json!({"malformed_request": 20}));
    assert_eq!(batch["refs"].as_array().unwrap().len(), 200);
    assert_eq!(batch["refs_failed"].as_array().unwrap().len(), 20);
    assert!(batch["context"]["same"]["hash"].is_string(), "{batch}");
    assert_eq!(batch["context_varying"], json!(["row"]));
    let strangers: Vec<&&Value> = calls.iter().filter(|record| record["code"] == "unauthenticated").collect();
    assert_eq!(strangers.len(), 3, "{strangers:#?}");
    assert_eq!(strangers[2]["more"], 3);
    assert!(strangers.iter().all(|record| record["principal"].is_null()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_gets_each_record_and_work_is_refused_while_it_takes_none() {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::sync::{Arc, Mutex};
    let (taken, down): (Arc<Mutex<Vec<Value>>>, Arc<AtomicBool>) = Default::default();
    let (into, is_down) = (Arc::clone(&taken), Arc::clone(&down));
    let logs = axum::routing::post(move |axum::Json(body): axum::Json<Value>| async move {
        if is_down.load(Ordering::SeqCst) {
            return axum::http::StatusCode::SERVICE_UNAVAILABLE;
        }
        into.lock().unwrap().push(body);
        axum::http::StatusCode::OK
    });
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}/v1/logs", listener.local_addr().unwrap());
    let app = axum::Router::new().route("/v1/logs", logs);
    let mut collector = tokio::task::JoinSet::new();
    collector.spawn(async move { axum::serve(listener, app).await.unwrap() });

    let mut world = World::new().await;
    world.settings.audit.otlp = Some(keyfold::config::AuditOtlpSettings::at(endpoint));
    let service = world.start_without_keeper().await;
    let caller = service.tenant_and_caller("acme").await;
    down.store(true, Ordering::SeqCst);
    let tenant = json!({"tenant": "late", "keks": [{"kek": "local:one"}]});
    caller.post("/v1/tenants", &tenant).await.problem("audit_unavailable");
    caller.try_encrypt(b"hello", &json!({})).await.problem("audit_unavailable");
    down.store(false, Ordering::SeqCst);
    service.stop().await;
    let (keys, bodies) = (keys(), taken.lock().unwrap().clone());
    let mut verifier = Verifier::new(&keys, vec![]);
    let sent = bodies
        .iter()
        .flat_map(|body| body["resourceLogs"][0]["scopeLogs"][0]["logRecords"].as_array().unwrap().clone());
    let mut all = String::new();
    for record in sent {
        let line = record["body"]["stringValue"].as_str().unwrap().to_owned() + "\n";
        verifier.line(line.as_bytes()).unwrap();
        all.push_str(&line);
    }
    assert!(verifier.end().unwrap().sealed && all.contains("tenant.create"));
}

/// Records of this kind.
fn of_event<'a>(records: &'a [Value], event: &str) -> Vec<&'a Value> {
    records.iter().filter(|record| record["event"] == event).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn seals_come_after_so_many_records_and_so_many_seconds_and_not_before() {
    let world = world(|settings| {
        settings.audit.seal_records = 3;
        settings.audit.seal_secs = 60;
    })
    .await;
    let audit = audit::Audit::open(world.clock.clone(), &world.settings.audit_options(), &keys()).unwrap();
    let principal = "api-key:x".parse().unwrap();
    let record =
        async || audit.begin(Verb::Encrypt, audit::Who::local(&principal, None)).await.unwrap().done();
    let seals = async || {
        assert!(audit.flush().await);
        of_event(&records(&world), "seal").len()
    };
    for expected in [0, 0, 1, 1, 1, 2] {
        record().await;
        assert_eq!(seals().await, expected);
    }
    record().await;
    world.pass(59);
    assert_eq!(seals().await, 2);
    world.pass(1);
    assert_eq!(seals().await, 3);
    // Nothing new, nothing to seal.
    world.pass(600);
    assert_eq!(seals().await, 3);
    audit.close();
    let all = records(&world);
    let sealed: Vec<&Value> = of_event(&all, "seal").iter().map(|seal| &seal["records"]).collect();
    assert_eq!(sealed, [3, 3, 1]);
}

#[tokio::test(flavor = "multi_thread")]
async fn as_many_former_files_are_kept_as_configured_and_the_rest_still_verifies() {
    let world = world(|settings| {
        let file = settings.audit.file.as_mut().unwrap();
        file.rotate_bytes = 4_096;
        file.files_max = 2;
    })
    .await;
    for _ in 0..10 {
        long_trail(&world, 30).await;
    }
    let trail = trail(&world);
    assert_eq!(trail.files.len(), 3, "two former ones and the present one: {:?}", trail.files);
    let summary = audit::verify(&trail, &keys(), &[]).unwrap();
    assert!(summary.sealed && summary.first > 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn no_batch_makes_a_record_that_a_sink_does_not_take() {
    let mut world = world(|_| ()).await;
    let socket = world.path("log");
    let log = std::os::unix::net::UnixDatagram::bind(&socket).unwrap();
    let taken = std::thread::spawn(move || {
        let (mut buffer, mut longest) = (vec![0; 1 << 20], 0);
        while let Ok(bytes) = log.recv(&mut buffer) {
            longest = longest.max(bytes);
            if buffer[..bytes].windows(7).any(|text| text == b"the-end") {
                break;
            }
        }
        longest
    });
    world.settings.audit.syslog =
        Some(keyfold::config::AuditSyslogSettings { path: socket, ..Default::default() });
    let service = world.start_without_keeper().await;
    let caller = service.tenant_and_caller("acme").await;
    // Each name of an item and of a pair is as long as may be, and six times that in JSON.
    let item = |n: usize| {
        let name = format!("{n:03}{}", "\u{1}".repeat(7_000));
        json!({"ref": name[..200].to_owned(), "plaintext": "?", "context": {name: "\u{2}".repeat(500)}})
    };
    let items: Vec<Value> = (0..300).map(item).collect();
    assert_eq!(caller.post("/v1/encrypt/batch", &json!({"items": items})).await.status, 200);
    // One item alone: its context is recorded whole.
    caller.try_encrypt(b"hello", &items[0]["context"]).await.ok(200);
    caller.with_header("x-request-id", "the-end").encrypt(b"hello", &json!({})).await;
    service.stop().await;
    let longest = tokio::task::spawn_blocking(move || taken.join().unwrap()).await.unwrap();
    assert!((40 << 10..160 << 10).contains(&longest), "{longest}");
    let all = records(&world);
    let batch = all.iter().find(|record| record["items"] == 300).unwrap();
    assert_eq!(batch["context_varying_more"], true);
    let (kept, more) = (batch["refs"].as_array().unwrap().len() as u64, batch["refs_more"].as_u64().unwrap());
    assert_eq!(kept + more, 300);
    // The next start finds the end of the file.
    let service = world.start_without_keeper().await;
    service.stop().await;
    assert!(audit::verify(&trail(&world), &keys(), &[]).unwrap().sealed);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_trail_alone_tells_what_was_granted_and_changed() {
    let world = world(|settings| settings.audit.public_context = vec!["region".to_owned()]).await;
    let service = world.start_without_keeper().await;
    service.tenant("acme").await;
    let admin = service.caller(&["acme"], &Verb::ALL).await;
    let grant = json!({
        "principal": "jwt:corp:ci", "verbs": ["encrypt"], "keys": ["orders"],
        "context": [{"name": "purpose", "values": ["billing"]}, {"name": "region", "values": ["eu-*"]}],
    });
    let made = admin.post("/v1/tenants/acme/grants", &grant).await.ok(201);
    let grant_id = made["grant"].as_str().unwrap();
    let path = format!("/v1/tenants/acme/grants/{grant_id}");
    let deleted = admin.request(reqwest::Method::DELETE, &path).send().await.unwrap();
    assert_eq!(deleted.status(), 204);
    let key = json!({"name": "ci", "verbs": ["encrypt", "decrypt"], "expires_at": "2027-01-01T00:00:00Z"});
    let key = admin.post("/v1/tenants/acme/api-keys", &key).await.ok(201);
    service.stop().await;
    let all = records(&world);
    let changes = of_event(&all, "change");
    let of = |what: &str, outcome: &str| {
        let found = changes.iter().rfind(|record| record["what"] == what && record["outcome"] == outcome);
        found.unwrap_or_else(|| panic!("{what} {outcome}"))
    };
    let hash = keys().value_hash("acme", "purpose", "billing");
    assert_eq!(
        of("grant.create", "begin")["asked"],
        json!({
            "principal": "jwt:corp:ci", "verbs": ["encrypt"], "keys": ["orders"],
            "context": {"purpose": [{"hash": hash}], "region": [{"value": "eu-*"}]},
        })
    );
    assert_eq!(of("grant.create", "done")["grant"], grant_id);
    assert_eq!(of("grant.create", "done")["change_id"], of("grant.create", "begin")["change_id"]);
    assert_eq!(of("grant.delete", "begin")["grant"], grant_id);
    let asked = &of("api-key.create", "begin")["asked"];
    assert_eq!(asked["verbs"], json!(["encrypt", "decrypt"]));
    assert_eq!(asked["tenants"], json!([]));
    assert_eq!(asked["expires_at"], "2027-01-01T00:00:00Z");
    assert_eq!(of("api-key.create", "done")["api_key"], key["id"]);
    assert_eq!(of("tenant.create", "begin")["asked"], json!({"keks": [crate::service::KEK]}));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_is_recorded_with_what_was_refused_and_a_lapsed_key_with_whose_it_was() {
    let world = world(|settings| {
        let restriction = "[[access.restrictions]]\nprincipal = \"*\"\nverbs = [\"decrypt\"]\n\
                           context = [{ name = \"purpose\", values = [\"billing\"] }]\n";
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), restriction).unwrap();
        let loaded = Settings::load(Some(file.path()), &keyfold::config::Variables::default()).unwrap();
        settings.access = loaded.access;
    })
    .await;
    let service = world.start_without_keeper().await;
    service.tenant("acme").await;
    let admin = service.caller(&["acme"], &Verb::ALL).await;
    let context = json!({"purpose": "support"});
    let sealed = admin.encrypt(b"hello", &context).await;
    admin.try_decrypt(&sealed, &context).await.problem("forbidden");
    let lapsed = service.caller(&["acme"], &[Verb::Encrypt]).await;
    let id = lapsed.token()[3..19].to_owned();
    admin.post(&format!("/v1/tenants/acme/api-keys/{id}/revoke"), &json!({})).await.ok(200);
    lapsed.try_encrypt(b"hello", &context).await.problem("unauthenticated");
    let mut wrong = lapsed.token().to_owned();
    wrong.replace_range(25..26, if wrong.as_bytes()[25] == b'A' { "B" } else { "A" });
    service.anonymous().with_token(wrong).try_encrypt(b"hello", &context).await.problem("unauthenticated");
    service.stop().await;
    let all = records(&world);
    let refused = all.iter().find(|record| record["code"] == "forbidden").unwrap();
    let hash = keys().value_hash("acme", "purpose", "support");
    assert_eq!((&refused["key"], &refused["context"]["purpose"]["hash"]), (&json!("default"), &json!(hash)));
    let strangers: Vec<&str> = all
        .iter()
        .filter(|record| record["code"] == "unauthenticated")
        .map(|record| record["reason"].as_str().unwrap())
        .collect();
    assert_eq!(strangers[0], format!("the credential of api-key:{id} is revoked"));
    assert!(
        !strangers[1].contains(&id),
        "a secret that is wrong says nothing of whose it is: {}",
        strangers[1]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_search_finds_what_is_in_a_batch_and_what_its_record_leaves_out() {
    let world = world(|_| ()).await;
    let service = world.start_without_keeper().await;
    let caller = service.tenant_and_caller("acme").await;
    let item = |n: usize| {
        let plaintext = if n == 7 { "?" } else { "aGVsbG8=" };
        json!({"ref": format!("row-{n}"), "plaintext": plaintext, "context": {"same": "s", "row": n.to_string()}})
    };
    let items: Vec<Value> = (0..20).map(item).collect();
    let answer = caller.post("/v1/encrypt/batch", &json!({"items": items})).await.ok(200);
    let dek = answer["items"][0]["dek_id"].as_str().unwrap().to_owned();
    service.stop().await;
    let found = |query: audit::Query| {
        let mut found = 0;
        audit::search(&trail(&world), &keys(), &query, |_| found += 1).unwrap();
        found
    };
    let by = |name: &'static str, text: &str| {
        found(audit::Query {
            members: vec![("what", "encrypt".to_owned()), (name, text.to_owned())],
            ..Default::default()
        })
    };
    for (name, text, expected) in [
        ("key", "default", 1),
        ("key", "other", 0),
        ("dek", &*dek, 1),
        ("dek", "01a22863-9df1-7567-b5f0-050554eaf653", 0),
        ("code", "malformed_request", 1),
        ("code", "forbidden", 0),
        ("ref", "row-19", 1),
        ("ref", "row-20", 0),
    ] {
        assert_eq!(by(name, text), expected, "{name} {text}");
    }
    let with = |name: &str, value: &str| {
        found(audit::Query { context: vec![(name.to_owned(), value.to_owned())], ..Default::default() })
    };
    // The values that differ from item to item are not recorded: it may be any of them.
    assert_eq!([with("same", "s"), with("same", "t"), with("row", "4"), with("table", "x")], [1, 0, 1, 0]);
}
