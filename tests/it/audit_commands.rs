//! `keyfold audit` beside the running program, as operators and auditors type it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use kms_emulator::{CreateKey, Emulator, Fault, FaultScope};
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::kms_aws::IRELAND;
use crate::program::{Program, Ran, keyfold};

const CONFIGURATION: &str = "[audit]\npublic_context = [\"purpose\"]\n[audit.file]\n";

fn configured(folder: &Path, configuration: &str) -> [String; 2] {
    let file = folder.join("keyfold.toml");
    std::fs::write(&file, configuration).unwrap();
    ["--config".to_owned(), file.display().to_string()]
}

/// A command with a configuration file.
fn run(folder: &Path, words: &[&str]) -> Ran {
    let file = folder.join("keyfold.toml").display().to_string();
    keyfold(folder, &[words, &["--config", &file]].concat(), &[])
}

fn lines(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Repeats a look until it shows what is waited for: records are written a moment after the answer.
async fn until<T>(mut look: impl FnMut() -> Option<T>) -> T {
    for _ in 0..1_200 {
        if let Some(seen) = look() {
            return seen;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("it never comes");
}

fn trail(folder: &Path) -> PathBuf {
    folder.join("keyfold-data/audit/audit.jsonl")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_trail_is_searched_and_verified_while_it_is_written_after_a_kill_and_after_the_end() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let [flag, file] = configured(folder, CONFIGURATION);
    let serve = ["--dev", &flag, &file];
    let program = Program::serve(folder, &serve, &[]).await;
    let caller = program.dev_caller(&folder.join("keyfold-data"));
    let context = json!({"patient": "4711", "purpose": "billing"});
    let sealed = caller.with_header("x-request-id", "visit-1").encrypt(b"hello", &context).await;
    let other = json!({"patient": "4712", "purpose": "billing"});
    caller.try_decrypt(&sealed, &other).await.problem("context_mismatch");
    let search = |words: &[&str]| lines(&run(folder, &[&["audit", "search"], words].concat()).ok());
    let failed = until(|| search(&["--what", "decrypt", "--outcome", "failed"]).pop()).await;
    assert_eq!((&failed["code"], &failed["tenant"]), (&json!("context_mismatch"), &json!("dev")));
    // Who asks for a value gets the records about it, though it stands in none.
    let of_patient = search(&["--context", "patient=4711"]);
    assert_eq!(of_patient.len(), 1);
    assert_eq!(of_patient[0]["request_id"], "visit-1");
    assert_eq!(search(&["--context", "purpose=billing", "--tenant", "dev"]).len(), 2);
    assert_eq!(search(&["--request-id", "visit-1"]), of_patient);
    assert!(search(&["--source", "127.0.0.2"]).is_empty());
    let dek = of_patient[0]["dek"].as_str().unwrap();
    assert_eq!(search(&["--dek", dek, "--key", "default"]).len(), 2);
    let (at, all) = (of_patient[0]["time"].as_str().unwrap(), search(&[]).len());
    assert_eq!(search(&["--since", at]).len() + search(&["--until", at]).len(), all);
    assert!(
        run(folder, &["audit", "search", "--since", "yesterday"]).refused().contains("2026-11-23T12:00:00Z")
    );
    let verified = run(folder, &["audit", "verify"]).ok();
    assert!(verified.contains("records 1 to ") && verified.contains("not sealed at the end"), "{verified}");
    // A command beside the service has a trail of its own, which is read too.
    run(folder, &["rotate", "dev"]).ok();
    assert_eq!(search(&["--what", "key.rotate"]).len(), 2);
    let verified = run(folder, &["audit", "verify"]).ok();
    assert!(verified.contains("audit-2.jsonl: records 1 to 4 are whole, sealed"), "{verified}");

    program.signal(Signal::KILL);
    program.ended().await;
    let verified = run(folder, &["audit", "verify"]).ok();
    assert!(verified.contains("audit.jsonl: records 1 to "), "{verified}");
    // Goes on where it ended, and ends in order.
    let program = Program::serve(folder, &serve, &[]).await;
    caller_again(&program, folder).encrypt(b"hello", &context).await;
    program.stop().await;
    let verified = run(folder, &["audit", "verify"]).ok();
    let first: Vec<&str> = verified.lines().collect();
    assert!(first[0].ends_with("are whole, sealed"), "{verified}");
    assert_eq!(search(&["--context", "patient=4711"]).len(), 2);

    // A place in the trail that was kept elsewhere has to be met.
    let anchors: Vec<&str> = verified.lines().filter_map(|line| line.strip_prefix("anchor ")).collect();
    assert!(anchors[1].starts_with("audit-2.jsonl:4:"), "{verified}");
    let anchored = |anchors: &[&str]| {
        let words: Vec<&str> = anchors.iter().flat_map(|anchor| ["--anchor", anchor]).collect();
        run(folder, &[&["audit", "verify"], &*words].concat())
    };
    anchored(&anchors).ok();
    assert!(anchored(&["audit-9.jsonl:4:00"]).refused().contains("FILE:SEQ:CODE"));
    let text = std::fs::read_to_string(trail(folder)).unwrap();
    std::fs::write(trail(folder), text.replacen("\"dev\"", "\"div\"", 1)).unwrap();
    let refused = run(folder, &["audit", "verify"]).refused();
    assert!(refused.contains("audit.jsonl line 2: the record is changed"), "{refused}");
    std::fs::write(trail(folder), &text).unwrap();
    // The whole trail of the commands is taken away, with its note.
    for name in ["audit-2.jsonl", "audit-2.head"] {
        std::fs::remove_file(trail(folder).with_file_name(name)).unwrap();
    }
    run(folder, &["audit", "verify"]).ok();
    assert!(anchored(&anchors).refused().contains("the trail audit-2.jsonl is not here"));
    // And without the key nothing is vouched for.
    std::fs::write(folder.join("keyfold-data/audit-key"), [1; 32]).unwrap();
    assert!(run(folder, &["audit", "verify"]).refused().contains("the record is changed"));
    std::fs::remove_file(folder.join("keyfold-data/audit-key")).unwrap();
    assert!(run(folder, &["audit", "verify"]).refused().contains("audit-key"));
}

fn caller_again(program: &Program, folder: &Path) -> crate::caller::Caller {
    program.dev_caller(&folder.join("keyfold-data"))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_that_a_kill_cut_off_is_named_and_a_beginning_that_is_missing_too() {
    let emulator = Emulator::builder().region(IRELAND).start().await.unwrap();
    let kek = emulator.create_key(IRELAND, CreateKey::new()).unwrap();
    emulator.faults().set(FaultScope::any().operation("DescribeKey"), Fault::BlackHole);
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    configured(folder, "[audit.file]\nrotate_bytes = 4096\n");
    let file = folder.join("keyfold.toml").display().to_string();
    let create = |tenant: &str| {
        let mut command = crate::aws_program::keyfold(folder, &emulator.url());
        command.args(["tenant", "create", tenant, &kek, "--config", &file]);
        command.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null());
        command
    };
    let mut process = create("acme").spawn().unwrap();
    until(|| {
        let text = std::fs::read_to_string(trail(folder)).unwrap_or_default();
        text.contains("\"begin\"").then_some(())
    })
    .await;
    process.kill().unwrap();
    process.wait().unwrap();
    let verified = run(folder, &["audit", "verify"]).ok();
    assert!(verified.contains("record 2 begins a change that has no outcome"), "{verified}");
    let begun = lines(&run(folder, &["audit", "search", "--outcome", "begin"]).ok());
    assert_eq!((&begun[0]["tenant"], &begun[0]["asked"]), (&json!("acme"), &json!({"keks": [kek]})));

    // Enough for several files.
    emulator.faults().clear();
    for n in 0..8 {
        let mut command = create(&format!("tenant-{n}"));
        assert!(tokio::task::spawn_blocking(move || command.status()).await.unwrap().unwrap().success());
    }
    let verified = run(folder, &["audit", "verify"]).ok();
    let oldest = trail(folder).with_file_name("audit.00000000000000000001.jsonl");
    let kept = std::fs::read(&oldest).unwrap();
    std::fs::remove_file(&oldest).unwrap();
    let refused = run(folder, &["audit", "verify"]).refused();
    assert!(refused.contains("are missing") && refused.contains("--partial"), "{refused}");
    let partial = run(folder, &["audit", "verify", "--partial"]).ok();
    assert!(partial.contains("; those before are not here"), "{partial}");
    std::fs::write(&oldest, kept).unwrap();
    assert_eq!(run(folder, &["audit", "verify"]).ok(), verified);
}

#[tokio::test(flavor = "multi_thread")]
async fn records_on_standard_output_do_not_mix_with_what_a_command_prints() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    configured(folder, "[audit.stdout]\n");
    let file = folder.join("keyfold.toml").display().to_string();
    let out = std::fs::File::create(folder.join("out")).unwrap();
    let mut process = std::process::Command::new(crate::program::BINARY)
        .args(["serve", "--dev", "--listen", "127.0.0.1:0", "--config", &file])
        .current_dir(folder)
        .env_clear()
        .stdout(out)
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    // The service's go there, chained.
    let said = until(|| {
        let text = std::fs::read_to_string(folder.join("out")).unwrap();
        let made = text.lines().any(|line| line.contains("api-key.create") && line.contains("\"done\""));
        made.then_some(text)
    })
    .await;
    let keys = std::fs::read(folder.join("keyfold-data/audit-key")).unwrap();
    let keys = keyfold::audit::Keys::new(&keys, vec![]).unwrap();
    let mut verifier = keyfold::audit::Verifier::new(&keys, vec![]);
    for line in said.split_inclusive('\n').filter(|line| line.ends_with('\n')) {
        verifier.line(line.as_bytes()).unwrap();
    }
    let rotated = run(folder, &["rotate", "dev"]);
    assert!(rotated.err().contains("\"what\":\"key.rotate\""), "{}", rotated.err());
    let printed = rotated.ok();
    assert!(printed.starts_with("default  ") && printed.lines().count() == 1, "{printed}");
    process.kill().unwrap();
    process.wait().unwrap();
}
