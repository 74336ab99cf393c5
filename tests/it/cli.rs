//! The command line: what it makes, what it prints, and what it says when something is wrong.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::Duration;

use envelope::text as envelope_text;
use serde_json::{Value, json};
use sqlx::{ConnectOptions as _, Connection as _, Executor as _};

use crate::pki::Authority;
use crate::program::{Program, keyfold, keyfold_reading};

const PASSPHRASE: (&str, &str) = ("KEYFOLD_KEYRING_PASSPHRASE", "correct horse battery staple");

fn mode(path: &Path) -> u32 {
    std::fs::metadata(path).unwrap().permissions().mode() & 0o777
}

#[tokio::test(flavor = "multi_thread")]
async fn a_first_start_with_dev_makes_all_that_is_needed_and_shows_the_token_once() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("keyfold-data");
    let program = Program::serve(folder.path(), &["--dev"], &[]).await;
    let token = std::fs::read_to_string(data.join("dev-api-key")).unwrap();
    let token = token.trim_end().to_owned();
    assert_eq!(mode(&data), 0o700);
    for file in ["dev-api-key", "registry.sqlite", "keyring", "pepper"] {
        assert_eq!(mode(&data.join(file)), 0o600, "{file}");
    }
    let log = program.log();
    assert!(log.contains(&token) && log.contains("/docs"), "{log}");
    assert!(pasted(folder.path(), &log).starts_with(r#"{"ciphertext":"kf1."#));
    let caller = program.dev_caller(&data);
    let ciphertext = caller.encrypt(b"hello", &json!({"record": "42"})).await;
    // It may do everything.
    caller.get("/v1/tenants").await.ok(200);
    caller.get("/v1/tenants/dev/api-keys").await.ok(200);
    caller.post("/v1/rewrap", &json!({"ciphertext": ciphertext, "context": {"record": "42"}})).await.ok(200);
    program.stop().await;

    let program = Program::serve(folder.path(), &["--dev"], &[]).await;
    assert!(!program.log().contains(&token), "the token is shown once");
    assert!(program.log().contains("dev-api-key"));
    assert_eq!(program.dev_caller(&data).decrypt(&ciphertext, &json!({"record": "42"})).await, b"hello");
    let log = program.stop().await;
    assert!(!log.contains(&token));

    // Another registry in the same folder: the key in the file is not one of it, and that is said.
    std::fs::remove_file(data.join("registry.sqlite")).unwrap();
    let program = Program::serve(folder.path(), &["--dev"], &[]).await;
    assert!(program.log().contains("remove the file"), "{}", program.log());
    program.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn dev_takes_a_folder_and_a_kek_and_says_when_the_kek_is_another_one_than_before() {
    let folder = tempfile::tempdir().unwrap();
    let elsewhere = folder.path().join("a/b");
    let arguments = ["--dev", "--data-dir", "a/b", "--kek", "local:mine"];
    let program = Program::serve(folder.path(), &arguments, &[]).await;
    let tenant = program.dev_caller(&elsewhere).get("/v1/tenants/dev").await.ok(200);
    assert_eq!(tenant["keks"], json!([{"kek": "local:mine"}]));
    program.stop().await;
    assert!(!folder.path().join("keyfold-data").exists());
    // Without --kek it is as it was.
    Program::serve(folder.path(), &["--dev", "--data-dir", "a/b"], &[]).await.stop().await;
    let other = ["serve", "--dev", "--listen", "127.0.0.1:0", "--data-dir", "a/b", "--kek", "local:other"];
    let said = keyfold(folder.path(), &other, &[]).refused();
    assert!(said.contains("local:mine") && said.contains("set-keks"), "{said}");
    // --kek without --dev, and what is no KEK, are usage errors.
    for wrong in [&["serve", "--kek", "local:mine"][..], &["serve", "--dev", "--kek", "mine"]] {
        let ran = keyfold(folder.path(), wrong, &[]);
        assert_eq!(ran.0.status.code(), Some(2), "{}", ran.err());
    }
}

/// What the command prints that the log shows for trying out.
fn pasted(folder: &Path, log: &str) -> String {
    let shown = log.lines().find(|line| line.trim_start().starts_with("curl "));
    let shown = shown.unwrap_or_else(|| panic!("no command to try: {log}"));
    let ran = std::process::Command::new("sh").args(["-c", shown]).current_dir(folder).output().unwrap();
    assert!(ran.status.success(), "{shown}: {}", String::from_utf8_lossy(&ran.stderr));
    String::from_utf8(ran.stdout).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_that_a_first_start_shows_trusts_the_certificate_that_it_has_made() {
    let folder = tempfile::tempdir().unwrap();
    let program = Program::serve(folder.path(), &["--dev", "--tls-self-signed"], &[]).await;
    assert!(pasted(folder.path(), &program.log()).starts_with(r#"{"ciphertext":"kf1."#));
    program.stop().await;
}

/// What a container is told by the files in docker/ is a configuration.
#[test]
fn the_variables_of_the_container_are_settings_that_go_together() {
    let read =
        |file: &str| std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(file)).unwrap();
    let text = [read("Dockerfile"), read("docker/compose.yaml")].concat();
    let variable = |line: &str| {
        let line = line.trim().strip_prefix("ENV ").unwrap_or(line.trim());
        let (name, value) = line.split_once(": ").or_else(|| line.split_once('='))?;
        name.starts_with("KEYFOLD_").then(|| (name.to_owned(), value.to_owned()))
    };
    let variables: Vec<(String, String)> = text.lines().filter_map(variable).collect();
    assert!(variables.len() >= 3, "{variables:?}");
    let variables: Vec<(&str, &str)> = variables.iter().map(|(name, value)| (&**name, &**value)).collect();
    let folder = tempfile::tempdir().unwrap();
    let said = keyfold(folder.path(), &["check-config"], &variables).ok();
    assert!(said.contains("0.0.0.0:8600"), "{said}");
}

/// From nothing to a running service with an encrypted key ring, and everything an operator does with it by hand.
#[tokio::test(flavor = "multi_thread")]
async fn an_operator_sets_up_a_service_and_changes_it_while_it_runs() {
    let folder = tempfile::tempdir().unwrap();
    let run = |arguments: &[&str]| keyfold(folder.path(), arguments, &[PASSPHRASE]);
    assert!(run(&["keyring", "init"]).ok().contains("back it up"));
    assert!(run(&["keyring", "add", "main"]).ok().contains("local:main  enabled"));
    assert!(run(&["tenant", "create", "acme", "local:main"]).ok().contains("acme  enabled  local:main"));
    let made = run(&["api-key", "create", "acme", "--name", "ci", "--verbs", "encrypt,decrypt"]).ok();
    let token = made.lines().last().unwrap().to_owned();
    assert!(token.starts_with("kf_"), "{made}");
    let id = token[3..19].to_owned();

    let program = Program::serve(folder.path(), &[], &[PASSPHRASE]).await;
    // In production the log is JSON, a line each.
    for line in program.log().lines() {
        assert!(serde_json::from_str::<Value>(line).unwrap()["level"].is_string(), "{line}");
    }
    let caller = program.anonymous().with_token(&token);
    let ciphertext = caller.encrypt(b"hello", &json!({})).await;
    let until = async |status: u16| {
        let changed = async {
            while caller.try_decrypt(&ciphertext, &json!({})).await.status != status {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        let within = Duration::from_secs(10);
        assert!(tokio::time::timeout(within, changed).await.is_ok(), "no {status} within seconds");
    };
    assert!(run(&["tenant", "disable", "acme"]).ok().contains("disabled"));
    until(403).await;
    assert!(run(&["tenant", "enable", "acme"]).ok().contains("enabled"));
    until(200).await;
    run(&["keyring", "add", "next"]).ok();
    assert!(
        run(&["tenant", "set-keks", "acme", "local:next", "local:main"])
            .ok()
            .contains("local:next local:main")
    );
    until(200).await;
    assert!(run(&["keyring", "rotate", "main"]).ok().contains("2 version(s)"));
    until(200).await;
    assert!(
        run(&["api-key", "list", "acme"])
            .ok()
            .contains(&format!("{id}  \"ci\"  tenants acme  verbs encrypt,decrypt"))
    );
    assert!(run(&["api-key", "revoke", "acme", &id]).ok().contains("revoked 20"));
    until(401).await;
    let log = program.stop().await;
    assert!(!log.contains(&token[20..]) && !log.contains(PASSPHRASE.1));
    assert!(run(&["tenant", "list"]).ok().starts_with("acme  enabled  local:next local:main\n"));
    assert!(run(&["keyring", "disable", "next"]).ok().contains("disabled"));
    assert!(run(&["keyring", "enable", "next"]).ok().contains("enabled"));
    assert!(
        run(&["keyring", "schedule-deletion", "next", "--days", "7"])
            .ok()
            .contains("pending deletion, deleted at")
    );
    assert!(run(&["keyring", "cancel-deletion", "next"]).ok().contains("disabled"));
    let list = run(&["keyring", "list"]).ok();
    assert!(list.contains("local:main  enabled") && list.contains("local:next  disabled"), "{list}");
}

#[test]
fn what_is_wrong_with_a_key_ring_is_said_with_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    let run = |arguments: &[&str], variables: &[(&str, &str)]| keyfold(folder.path(), arguments, variables);
    let says = |said: String, what: &str| assert!(said.contains(what), "{said}");
    says(run(&["keyring", "list"], &[PASSPHRASE]).refused(), "keyfold keyring init");
    says(run(&["keyring", "init"], &[]).refused(), "KEYFOLD_KEYRING_PASSPHRASE");
    says(run(&["keyring", "init"], &[("KEYFOLD_KEYRING_PASSPHRASE", "short")]).refused(), "12 characters");
    run(&["keyring", "init"], &[PASSPHRASE]).ok();
    says(run(&["keyring", "init"], &[PASSPHRASE]).refused(), "left as it is");
    let wrong = ("KEYFOLD_KEYRING_PASSPHRASE", "incorrect horse battery");
    says(run(&["keyring", "list"], &[wrong]).refused(), "passphrase does not open");
    says(run(&["serve", "--listen", "127.0.0.1:0"], &[wrong]).refused(), "passphrase does not open");
    says(run(&["serve", "--listen", "127.0.0.1:0"], &[]).refused(), "KEYFOLD_KEYRING_PASSPHRASE");
    says(run(&["serve", "--dev", "--listen", "127.0.0.1:0"], &[]).refused(), "encrypted");
    for command in
        [&["keyring", "rotate", "none"][..], &["keyring", "disable", "none"], &["keyring", "enable", "none"]]
    {
        says(run(command, &[PASSPHRASE]).refused(), "there is no KEK local:none");
    }
    run(&["keyring", "add", "one"], &[PASSPHRASE]).ok();
    says(run(&["keyring", "add", "one"], &[PASSPHRASE]).refused(), "already");
    says(run(&["keyring", "add", "Not A Name"], &[PASSPHRASE]).refused(), "a-z");
    says(
        run(&["keyring", "schedule-deletion", "one", "--days", "6"], &[PASSPHRASE]).refused(),
        "7 to 30 days",
    );
    let file = folder.path().join("keyfold-data/keyring");
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o644)).unwrap();
    says(run(&["keyring", "list"], &[PASSPHRASE]).refused(), "chmod 600");
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).unwrap();
    // A passphrase from a file, which must be its owner's only.
    let passphrase = folder.path().join("passphrase");
    std::fs::write(&passphrase, format!("{}\n", PASSPHRASE.1)).unwrap();
    let from_file = ("KEYFOLD_KEYRING__PASSPHRASE_FILE", passphrase.to_str().unwrap());
    std::fs::set_permissions(&passphrase, std::fs::Permissions::from_mode(0o644)).unwrap();
    says(run(&["keyring", "list"], &[from_file]).refused(), "chmod 600");
    std::fs::set_permissions(&passphrase, std::fs::Permissions::from_mode(0o600)).unwrap();
    says(run(&["keyring", "list"], &[from_file]).ok(), "local:one");
}

#[test]
fn a_key_ring_gets_another_passphrase_and_keeps_its_keks() {
    let folder = tempfile::tempdir().unwrap();
    let run = |arguments: &[&str], passphrase: &str| {
        keyfold(folder.path(), arguments, &[("KEYFOLD_KEYRING_PASSPHRASE", passphrase)])
    };
    let (old, new) = (PASSPHRASE.1, "another horse, another battery");
    run(&["keyring", "init"], old).ok();
    run(&["keyring", "add", "one"], old).ok();
    let before = run(&["keyring", "list"], old).ok();
    let change = ["keyring", "change-passphrase", "--new-passphrase-file", "new"];
    let offer = |text: &str, mode: u32| {
        std::fs::write(folder.path().join("new"), text).unwrap();
        std::fs::set_permissions(folder.path().join("new"), std::fs::Permissions::from_mode(mode)).unwrap();
    };
    for (text, mode, says) in
        [("short\n", 0o600, "12 characters"), (new, 0o644, "chmod 600"), ("\n", 0o600, "empty")]
    {
        offer(text, mode);
        let said = run(&change, old).refused();
        assert!(said.contains(says), "{said}");
    }
    offer(&format!("{new}\n"), 0o600);
    assert!(run(&change, "not the right one").refused().contains("passphrase does not open"));
    assert_eq!(run(&["keyring", "list"], old).ok(), before, "what was refused changed nothing");
    let said = run(&change, old).ok();
    assert!(said.contains("restart") && !said.contains(new), "{said}");
    assert!(run(&["keyring", "list"], old).refused().contains("passphrase does not open"));
    assert_eq!(run(&["keyring", "list"], new).ok(), before);
    assert_eq!(mode(&folder.path().join("keyfold-data/keyring")), 0o600);
    // Without a passphrase there is none to change, and what lay open does not become safe by one.
    let dev = tempfile::tempdir().unwrap();
    keyfold(dev.path(), &["keyring", "init", "--dev"], &[]).ok();
    std::fs::copy(folder.path().join("new"), dev.path().join("new")).unwrap();
    assert!(keyfold(dev.path(), &change, &[]).refused().contains("NOT encrypted"));
}

#[test]
fn tenants_and_api_keys_that_make_no_sense_are_refused_with_the_reason() {
    let folder = tempfile::tempdir().unwrap();
    let run = |arguments: &[&str]| keyfold(folder.path(), arguments, &[]);
    let says = |said: String, what: &str| assert!(said.contains(what), "{said}");
    run(&["keyring", "init", "--dev"]).ok();
    run(&["keyring", "add", "one"]).ok();
    run(&["tenant", "create", "acme", "local:one"]).ok();
    says(run(&["tenant", "create", "acme", "local:one"]).refused(), "already");
    says(run(&["tenant", "create", "emil", "local:none"]).refused(), "local:none");
    says(run(&["tenant", "create", "emil", "local:one", "local:one"]).refused(), "twice");
    says(run(&["tenant", "disable", "emil"]).refused(), "there is no tenant 'emil'");
    says(run(&["api-key", "list", "emil"]).refused(), "there is no tenant 'emil'");
    says(run(&["api-key", "create", "emil", "--name", "x", "--verbs", "encrypt"]).refused(), "tenant");
    let create = ["api-key", "create", "acme", "--name", "x", "--verbs", "encrypt", "--expires-at"];
    says(run(&[&create[..], &["tomorrow"]].concat()).refused(), "2027-11-23T12:00:00Z");
    says(run(&[&create[..], &["2001-01-01T00:00:00Z"]].concat()).refused(), "past");
    let made = run(&[&create[..], &["2127-01-01T00:00:00Z"]].concat()).ok();
    says(made.clone(), "expires 2127-01-01T00:00:00Z");
    // A third of all ids have a hyphen or an underscore in them, some at the front.
    says(run(&["api-key", "revoke", "acme", "-AAAAAAA_AAAAAAA"]).refused(), "there is no API key");
    let token = made.lines().last().unwrap();
    let said = run(&["api-key", "revoke", "acme", token]).refused();
    assert!(said.contains("16 characters") && !said.contains(&token[20..]), "{said}");
    for usage in [
        &["tenant", "create", "UPPER", "local:one"][..],
        &["tenant", "create", "emil", "one"],
        &["tenant", "create", "emil"],
        &["api-key", "create", "acme", "--name", "x", "--verbs", "sign"],
        &["api-key", "create", "acme", "--verbs", "encrypt"],
        &["nonsense"],
        &[],
    ] {
        let ran = run(usage);
        assert_eq!(ran.0.status.code(), Some(2), "{usage:?}: {}", ran.err());
        assert!(ran.err().contains("Usage") || ran.err().contains("--help"), "{usage:?}: {}", ran.err());
    }
    assert!(run(&["--version"]).ok().starts_with("keyfold "));
    assert!(run(&["--help"]).ok().contains("serve"));
}

#[tokio::test(flavor = "multi_thread")]
async fn inspect_explains_an_envelope_from_a_file_or_standard_input_in_either_form() {
    let folder = tempfile::tempdir().unwrap();
    let program = Program::serve(folder.path(), &["--dev"], &[]).await;
    let caller = program.dev_caller(&folder.path().join("keyfold-data"));
    let body = json!({"plaintext": "aGVsbG8=", "context": {"record": "canary"}});
    let sealed = caller.post("/v1/encrypt", &body).await.ok(200);
    let compact = json!({"plaintext": "aGVsbG8=", "envelope": "compact"});
    let compact =
        caller.post("/v1/encrypt", &compact).await.ok(200)["ciphertext"].as_str().unwrap().to_owned();
    let long = caller.encrypt(&vec![7; 3_000_000], &json!({})).await;
    program.stop().await;
    let (text, dek) = (sealed["ciphertext"].as_str().unwrap(), sealed["dek_id"].as_str().unwrap());
    let binary = envelope_text::decode(text).unwrap();
    let inspect = |input: &[u8], arguments: &[&str]| {
        keyfold_reading(folder.path(), &[&["inspect"], arguments].concat(), &[], input)
    };
    std::fs::write(folder.path().join("text"), text).unwrap();
    std::fs::write(folder.path().join("binary"), &binary).unwrap();
    let expected = inspect(text.as_bytes(), &[]).ok();
    for what in [dek, "keyfold:tenant = dev", "keyfold:key = default", "local:dev", "embedded"] {
        assert!(expected.contains(what), "{expected}");
    }
    assert!(!expected.contains("canary"));
    let with_line_break = format!("{text}\n");
    for (input, arguments) in [
        (&binary[..], &[][..]),
        (text.as_bytes(), &["-"]),
        (with_line_break.as_bytes(), &[]),
        (b"", &["text"]),
        (b"", &["binary"]),
        // The head alone will do, wherever it is cut behind its end.
        (&binary[..binary.len() - 20], &[]),
        (&text.as_bytes()[..text.len() - 7], &[]),
    ] {
        assert_eq!(inspect(input, arguments).ok(), expected);
    }
    assert!(inspect(long.as_bytes(), &[]).ok().contains("embedded"));
    assert!(inspect(compact.as_bytes(), &[]).ok().contains("compact"));
    let garbage: Vec<u8> = (0..5_000_000_u32).map(|n| (n % 251) as u8).collect();
    for bad in [
        &b""[..],
        b"kf1.",
        b"kf1.!!!!",
        b"kf1.AAAA",
        b"kf1.\xff\xff",
        b"KF",
        b"KF\x02",
        &binary[..100],
        b"hello",
        &garbage,
    ] {
        assert!(inspect(bad, &[]).refused().contains("envelope"));
    }
    assert!(inspect(b"", &["no-such-file"]).refused().contains("no-such-file"));
}

#[test]
fn check_config_says_what_a_configuration_amounts_to_or_what_is_wrong_with_it() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("keyfold.toml");
    let check = |config: &str, variables: &[(&str, &str)]| {
        std::fs::write(&file, config).unwrap();
        keyfold(folder.path(), &["check-config", "--config", "keyfold.toml"], variables)
    };
    let said = check("listen = \"127.0.0.1:9999\"\n[http]\nbody_bytes_max = 4096\n", &[]).ok();
    assert!(said.contains("127.0.0.1:9999") && said.contains("4096") && said.contains("is valid"), "{said}");
    assert!(!folder.path().join("keyfold-data").exists(), "nothing is made");
    let passphrase = check("", &[PASSPHRASE, ("KEYFOLD_PEPPER", "0123456789abcdef0123456789abcdef")]).ok();
    assert!(!passphrase.contains(PASSPHRASE.1) && !passphrase.contains("0123456789abcdef"));
    for (config, says) in [
        ("listn = \"127.0.0.1:1\"", "listn"),
        ("listen = \"localhost\"", "listen"),
        ("[http]\nbody_byte_max = 1", "body_byte_max"),
        ("[http]\nbody_bytes_max = \"much\"", "body_bytes_max"),
        ("[http]\nbody_bytes_max = -1", "body_bytes_max"),
        ("[http]\nin_flight_max = 0", "http.in_flight_max is 0"),
        ("[pool]\ndek_plaintext_secs_max = 9", "use 10 or more"),
        ("listen = \"0.0.0.0:8600\"", "everywhere-unprotected"),
        ("[log]\nfilter = \"keyfold=loud\"", "log.filter"),
        ("[log]\nformat = \"xml\"", "xml"),
        ("this is not toml", "TOML"),
    ] {
        let said = check(config, &[]).refused();
        assert!(said.contains(says), "{config}: {said}");
    }
    assert!(check("", &[("KEYFOLD_LISTENN", "x")]).refused().contains("listenn"));
    let said = keyfold(folder.path(), &["check-config", "--config", "none.toml"], &[]).refused();
    assert!(said.contains("none.toml"), "{said}");
    // What the check refuses, the server refuses too.
    std::fs::write(&file, "listen = \"0.0.0.0:0\"").unwrap();
    let said = keyfold(folder.path(), &["serve", "--dev", "--config", "keyfold.toml"], &[]).refused();
    assert!(said.contains("loopback"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_port_in_use_is_said_before_the_data_is_touched() {
    let folder = tempfile::tempdir().unwrap();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let said = keyfold(folder.path(), &["serve", "--dev", "--listen", &address], &[]).refused();
    assert!(said.contains(&address) && said.contains("--listen"), "{said}");
    assert!(!folder.path().join("keyfold-data").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_of_a_newer_keyfold_is_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    Program::serve(folder.path(), &["--dev"], &[]).await.stop().await;
    let path = folder.path().join("keyfold-data/registry.sqlite");
    let mut registry = sqlx::sqlite::SqliteConnectOptions::new().filename(&path).connect().await.unwrap();
    let newer = "INSERT INTO keyfold_migrations (version, description, success, checksum, execution_time) \
                 VALUES (9000, 'later', TRUE, x'00', 0)";
    registry.execute(newer).await.unwrap();
    registry.close().await.unwrap();
    for command in [&["serve", "--dev", "--listen", "127.0.0.1:0"][..], &["tenant", "list"]] {
        let said = keyfold(folder.path(), command, &[]).refused();
        assert!(said.contains("9000") && said.contains("newer"), "{said}");
    }
}

/// `keyfold openapi | head` ends quietly; a full disk does not look like success.
#[test]
fn output_that_nobody_reads_is_no_error_and_output_that_is_lost_is_one() {
    let binary = env!("CARGO_BIN_EXE_keyfold");
    let shell = |script: String| std::process::Command::new("sh").args(["-c", &script]).output().unwrap();
    let piped = shell(format!("{{ {binary} openapi; echo \"status $?\" >&2; }} | head -c 1 >/dev/null"));
    assert_eq!(String::from_utf8_lossy(&piped.stderr), "status 0\n");
    let full = shell(format!("{binary} openapi > /dev/full"));
    assert_eq!(full.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&full.stderr).contains("could not be written"));
}

#[tokio::test(flavor = "multi_thread")]
async fn health_tells_whether_the_service_lives_and_speaks_as_it_is_configured() {
    let folder = tempfile::tempdir().unwrap();
    let health = |program: &Program, arguments: &[&str], variables: &[(&str, &str)]| {
        let listen = program.address.to_string();
        let variables = [&[("KEYFOLD_LISTEN", listen.as_str())], variables].concat();
        keyfold(folder.path(), &[&["health"], arguments].concat(), &variables)
    };
    let program = Program::serve(folder.path(), &["--dev"], &[]).await;
    assert_eq!(health(&program, &[], &[]).ok(), "live\n");
    let (everywhere, here) = (format!("0.0.0.0:{}", program.address.port()), program.address.to_string());
    assert_eq!(keyfold(folder.path(), &["health"], &[("KEYFOLD_LISTEN", &everywhere)]).ok(), "live\n");
    assert_eq!(keyfold(folder.path(), &["health", "--listen", &here], &[]).ok(), "live\n");
    health(&program, &["--tls-self-signed"], &[]).refused();
    program.stop().await;
    let said = keyfold(folder.path(), &["health"], &[("KEYFOLD_LISTEN", &here)]).refused();
    assert!(said.contains("nothing listens on") && said.contains(&here), "{said}");

    let program = Program::serve(folder.path(), &["--dev", "--tls-self-signed"], &[]).await;
    assert_eq!(health(&program, &["--tls-self-signed"], &[]).ok(), "live\n");
    assert_eq!(health(&program, &[], &[("KEYFOLD_TLS__SELF_SIGNED", "true")]).ok(), "live\n");
    health(&program, &[], &[]).refused();
    program.stop().await;

    let (servers, clients) = (Authority::new("servers"), Authority::new("clients"));
    servers.server(1).write(folder.path(), "server");
    std::fs::write(folder.path().join("clients.pem"), &clients.pem).unwrap();
    let settings = |demand: &str, version_min: &str| {
        format!(
            r#"
            [http]
            trusted_proxies = ["127.0.0.0/8"]
            source_from = "proxy-protocol-v2"
            [tls]
            certificate_file = "server.pem"
            key_file = "server-key.pem"
            version_min = "{version_min}"
            client_certificates = "{demand}"
            client_ca_file = "clients.pem"
            "#
        )
    };
    let file = folder.path().join("keyfold.toml");
    for (demand, version_min) in [("required", "1.2"), ("required", "1.3"), ("optional", "1.2")] {
        std::fs::write(&file, settings(demand, version_min)).unwrap();
        let program = Program::serve(folder.path(), &["--dev", "--config", "keyfold.toml"], &[]).await;
        assert_eq!(health(&program, &["--config", "keyfold.toml"], &[]).ok(), "live\n", "{demand}");
        // Without the header of a load balancer nobody is spoken to.
        health(&program, &["--tls-self-signed"], &[]).refused();
        program.stop().await;
    }
}

/// Something else that listens there, or a service that is not well.
#[test]
fn health_takes_no_other_answer_for_life() {
    for answer in ["HTTP/1.1 503 Service Unavailable\r\n\r\n", "HTTP/1.1 2", "SSH-2.0-OpenSSH_10.0\r\n", ""] {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let server = std::thread::spawn(move || {
            let (mut connection, _) = listener.accept().unwrap();
            let mut head = [0; 16];
            std::io::Read::read_exact(&mut connection, &mut head).unwrap();
            std::io::Write::write_all(&mut connection, answer.as_bytes()).unwrap();
        });
        let folder = tempfile::tempdir().unwrap();
        let said = keyfold(folder.path(), &["health", "--listen", &address], &[]).refused();
        assert!(said.contains(&address), "{said}");
        server.join().unwrap();
    }
}
