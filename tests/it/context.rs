//! Request metadata in the encryption context: what the configuration binds is bound, whoever tries to say otherwise.

use keyfold::config::{Settings, Variables};
use keyfold::tenant::Verb;
use serde_json::json;

use crate::caller::Caller;
use crate::service::{Service, World};

const DATA: &[Verb] = &[Verb::Encrypt, Verb::Decrypt, Verb::Rewrap];

/// A service with these `[[context]]` entries and a tenant `acme`.
async fn service(entries: &str) -> (World, Service, Caller) {
    let mut world = World::new().await;
    let file = world.path("keyfold.toml");
    std::fs::write(&file, entries).unwrap();
    let settings = Settings::load(Some(&file), &Variables::default()).unwrap();
    world.settings.context = settings.context;
    world.settings.pool = settings.pool;
    let service = world.start_without_keeper().await;
    service.tenant("acme").await;
    let caller = service.caller(&["acme"], DATA).await;
    (world, service, caller)
}

fn refused(entries: &str) -> String {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("keyfold.toml");
    std::fs::write(&file, entries).unwrap();
    Settings::load(Some(&file), &Variables::default()).unwrap_err().to_string()
}

const PROJECT: &str = r#"
[[context]]
source = "header.X-Project"
name = "project"
bind = "message"
pattern = "[a-z]+-[0-9]+"
"#;

#[tokio::test(flavor = "multi_thread")]
async fn a_header_is_bound_to_the_message_and_decryption_must_bring_the_same() {
    let (_world, service, caller) = service(PROJECT).await;
    let one = caller.with_header("x-project", "alpha-1");
    let sealed = one.encrypt(b"hello", &json!({"record": "42"})).await;
    assert_eq!(one.decrypt(&sealed, &json!({"record": "42"})).await, b"hello");
    let two = caller.with_header("X-Project", "alpha-2");
    two.try_decrypt(&sealed, &json!({"record": "42"})).await.problem("context_mismatch");
    let rewrap = json!({"ciphertext": sealed, "context": {"record": "42"}});
    two.post("/v1/rewrap", &rewrap).await.problem("context_mismatch");
    one.post("/v1/rewrap", &rewrap).await.ok(200);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_speaks_for_a_mapped_name_in_his_own_context() {
    let optional = format!("{PROJECT}required = false\n");
    let (_world, service, caller) = service(&optional).await;
    let one = caller.with_header("x-project", "alpha-1");
    let sealed = one.encrypt(b"hello", &json!({})).await;
    // Neither with the header, nor in its place, nor with the very value.
    for context in [json!({"project": "alpha-1"}), json!({"project": "alpha-2"}), json!({"project": ""})] {
        for speaker in [&one, &caller] {
            let detail = speaker.try_encrypt(b"hello", &context).await.problem("reserved_context");
            assert!(detail.contains("\"project\"") && detail.contains("leave it out"), "{detail}");
            speaker.try_decrypt(&sealed, &context).await.problem("reserved_context");
            let rewrap = json!({"ciphertext": sealed, "context": context});
            speaker.post("/v1/rewrap", &rewrap).await.problem("reserved_context");
        }
    }
    // A look-alike is a pair of its own, and stands in for nothing.
    for name in ["Project", "рroject", "project ", "project\u{200b}", "ｐroject"] {
        caller.try_decrypt(&sealed, &json!({name: "alpha-1"})).await.problem("context_mismatch");
    }
    // Twice the name in the JSON, whichever would win.
    let twice = r#"{"plaintext": "aGVsbG8=", "context": {"a": "1", "a": "2"}}"#;
    one.post_text("/v1/encrypt", twice).await.problem("malformed_request");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_header_that_is_missing_doubled_or_not_allowed_is_refused_before_the_body_is_read() {
    let entries = format!(
        "{PROJECT}\n[[context]]\nsource = \"header.X-Stage\"\nname = \"stage\"\nbind = \"message\"\n\
         required = false\nallowed = [\"test\", \"live\"]\nvalue_bytes_max = 4\n"
    );
    let (_world, service, caller) = service(&entries).await;
    let refused = |caller: Caller| async move {
        caller.post_text("/v1/encrypt", "not JSON at all").await.problem("malformed_request")
    };
    assert!(refused(caller.clone()).await.contains("x-project"));
    for bad in ["alpha", "alpha-1 alpha-2", "ALPHA-1", "alpha-1x", "", "älpha-1", "alpha-1,alpha-2"] {
        assert!(refused(caller.with_header("x-project", bad)).await.contains("x-project"), "{bad}");
    }
    let twice = caller.with_header("x-project", "alpha-1").with_header("x-project", "alpha-1");
    assert!(refused(twice).await.contains("send one x-project header"));
    let one = caller.with_header("x-project", "alpha-1");
    assert!(refused(one.with_header("x-stage", "prod")).await.contains("x-stage"));
    // Within everything: it is the body that is wrong.
    assert!(refused(one.with_header("x-stage", "live")).await.contains("not JSON"));
    assert!(refused(one).await.contains("not JSON"));
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_credential_the_tenant_and_the_route_are_bound_and_headers_do_not_move_them() {
    let entries = "[[context]]\nsource = \"credential.subject\"\nname = \"who\"\nbind = \"message\"\n\
                   [[context]]\nsource = \"tenant\"\nname = \"org\"\nbind = \"message\"\n\
                   [[context]]\nsource = \"route\"\nname = \"api\"\nbind = \"message\"\n";
    let (_world, service, caller) = service(entries).await;
    let other = service.caller(&["acme"], DATA).await;
    let sealed = caller.encrypt(b"mine", &json!({})).await;
    assert_eq!(caller.decrypt(&sealed, &json!({})).await, b"mine");
    other.try_decrypt(&sealed, &json!({})).await.problem("context_mismatch");
    let id = &caller.token()[3..19];
    for (name, value) in [("who", id), ("subject", id), ("x-subject", id), ("keyfold-principal", id)] {
        let value = format!("api-key:{value}");
        other.with_header(name, &value).try_decrypt(&sealed, &json!({})).await.problem("context_mismatch");
    }
    for name in ["who", "org", "api"] {
        other.try_decrypt(&sealed, &json!({name: "acme"})).await.problem("reserved_context");
    }
    service.stop().await;
}

const REGION: &str = "[[context]]\nsource = \"header.X-Region\"\nname = \"region\"\nbind = \"key\"\n";

#[tokio::test(flavor = "multi_thread")]
async fn a_key_bound_pair_has_a_data_key_of_its_own_and_no_other_call_opens_it() {
    let (world, service, caller) = service(REGION).await;
    let (eu, us) = (caller.with_header("x-region", "eu"), caller.with_header("x-region", "us"));
    let sealed = eu.try_encrypt(b"hello", &json!({})).await.ok(200);
    let (text, dek) = (sealed["ciphertext"].as_str().unwrap(), sealed["dek_id"].as_str().unwrap());
    assert_ne!(us.try_encrypt(b"hello", &json!({})).await.ok(200)["dek_id"], dek);
    assert_eq!(eu.try_encrypt(b"again", &json!({})).await.ok(200)["dek_id"], dek);
    assert_eq!(eu.decrypt(text, &json!({})).await, b"hello");
    us.try_decrypt(text, &json!({})).await.problem("context_mismatch");
    // Not by its wrapped-key section either: which needs no message context.
    let section = json!({"ciphertext": text, "mode": "wrapped_key"});
    us.post("/v1/rewrap", &section).await.problem("context_mismatch");
    eu.post("/v1/rewrap", &section).await.ok(200);
    // The pair stands in the KMS context, so in the KMS's own audit trail.
    let head = envelope::inspect(&envelope::text::decode(text).unwrap()).unwrap();
    assert_eq!(head.wrapped().kms_context().unwrap().get("region"), Some("eu"));
    service.stop().await;

    // The registry is lost: what the envelope brings opens for the right call only, and a wrong one that comes
    // first does not spoil it.
    let calls = world.kms.unwraps();
    for file in ["registry.sqlite", "registry.sqlite-wal", "registry.sqlite-shm"] {
        let _ = std::fs::remove_file(world.path(file));
    }
    let service = world.start_without_keeper().await;
    service.tenant("acme").await;
    let caller = service.caller(&["acme"], DATA).await;
    let (eu, us) = (caller.with_header("x-region", "eu"), caller.with_header("x-region", "us"));
    us.try_decrypt(text, &json!({})).await.problem("context_mismatch");
    assert_eq!(world.kms.unwraps(), calls, "the KMS is not asked for what is not believed");
    assert_eq!(eu.decrypt(text, &json!({})).await, b"hello");
    us.try_decrypt(text, &json!({})).await.problem("context_mismatch");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn more_key_bound_values_than_the_limit_are_refused_and_those_that_are_there_go_on() {
    let entries = format!("{REGION}required = false\n[pool]\ntenant_bound_scopes_max = 3\n");
    let (world, service, caller) = service(&entries).await;
    let of = |value: &str| caller.with_header("x-region", value);
    for value in ["one", "two", "three"] {
        of(value).encrypt(b"hello", &json!({})).await;
    }
    let made = world.kms.generates();
    let detail = of("four").try_encrypt(b"hello", &json!({})).await.problem("context_limit");
    assert!(detail.contains('3') && detail.contains("tenant_bound_scopes_max"), "{detail}");
    assert_eq!(world.kms.generates(), made, "no data key is made for what is refused");
    of("two").encrypt(b"hello", &json!({})).await;
    // What is bound to nothing does not count, nor does another tenant's.
    caller.encrypt(b"hello", &json!({})).await;
    service.tenant("other").await;
    service
        .caller(&["other"], DATA)
        .await
        .with_header("x-region", "five")
        .encrypt(b"hello", &json!({}))
        .await;
    service.stop().await;
}

#[test]
fn what_makes_no_sense_or_would_be_dangerous_is_an_error_of_the_configuration() {
    let entry = |source: &str, name: &str, more: &str| {
        format!("[[context]]\nsource = \"{source}\"\nname = \"{name}\"\nbind = \"message\"\n{more}\n")
    };
    let twice = entry("credential.subject", "user", "") + &entry("header.X-User", "user", "");
    assert!(refused(&twice).contains("two sources"), "{}", refused(&twice));
    for (source, name, more, expected) in [
        ("header.Authorization", "a", "", "secret"),
        ("header.Cookie", "a", "", "secret"),
        ("header.X-Request-Id", "a", "", "differs from call to call"),
        ("header.", "a", "", "does not name a header"),
        ("header.a b", "a", "", "does not name a header"),
        ("credential.claim.", "a", "", "is not known"),
        ("query.a", "a", "", "is not known"),
        ("tenant", "keyfold:tenant", "", "reserved"),
        ("tenant", "aws:a", "", "reserved"),
        ("tenant", "", "", "1 to 128 bytes"),
        ("tenant", "a", "pattern = \"(\"", "pattern"),
        ("tenant", "a", "pattern = \"a)|(b\"", "pattern"),
        ("tenant", "a", "pattern = \"((a{1000}){1000}){1000}\"", "pattern"),
        ("tenant", "a", "value_bytes_max = 0", "value_bytes_max"),
        ("tenant", "a", "value_bytes_max = 4097", "value_bytes_max"),
        ("tenant", "a", "alowed = []", "alowed"),
    ] {
        let error = refused(&entry(source, name, more));
        assert!(error.contains(expected), "{source} {name} {more}: {error}");
    }
    let many: String = (0..33).map(|n| entry("tenant", &format!("n{n}"), "")).collect();
    assert!(refused(&many).contains("at most 32"));
}
