//! What operators type while the service runs: each command is a process beside it, on the same data folder.

use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use crate::caller::{Caller, text};
use crate::program::{Program, keyfold};

/// The service hears of the command's change by the registry: at once or a little later.
async fn until_code(caller: &Caller, sealed: &str, code: Option<&str>) {
    for _ in 0..1_200 {
        let answer = caller.try_decrypt(sealed, &json!({})).await;
        match code {
            None if answer.status == 200 => return,
            Some(code) if answer.json["code"] == code => {
                answer.problem(code);
                return;
            }
            _ => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
    panic!("it never answers {code:?}");
}

/// Seals until it is done under this data key.
async fn until_sealed_under(caller: &Caller, dek: &str) -> String {
    for _ in 0..1_200 {
        let answer = seal(caller).await;
        if answer["dek_id"] == dek {
            return text(&answer["ciphertext"]);
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("it never seals under {dek}");
}

async fn seal(caller: &Caller) -> Value {
    caller.try_encrypt(b"hello", &json!({})).await.ok(200)
}

/// A service for development that looks for work every second, and who calls it.
async fn service(folder: &Path) -> (Program, Caller) {
    let often = [("KEYFOLD_ROTATION__POLL_SECS", "1")];
    let program = Program::serve(folder, &["--dev"], &often).await;
    let caller = program.dev_caller(&folder.join("keyfold-data"));
    (program, caller)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_data_key_is_rotated_revoked_restored_and_shredded_beside_the_running_service() {
    let folder = tempfile::tempdir().unwrap();
    let (program, caller) = service(folder.path()).await;
    let run = |arguments: &[&str]| keyfold(folder.path(), arguments, &[]);
    let first = seal(&caller).await;
    let (sealed, dek) = (text(&first["ciphertext"]), text(&first["dek_id"]));
    let rotated = run(&["rotate", "dev"]).ok();
    let (from, to) = rotated.trim().strip_prefix("default  ").unwrap().split_once(" -> ").unwrap();
    assert_eq!(from, dek);
    let second = until_sealed_under(&caller, to).await;
    let listed = run(&["deks", "dev"]).ok();
    assert!(listed.contains(&format!("{dek}  retired  made ")), "{listed}");
    assert!(
        listed.contains(&format!("{to}  active  made ")) && listed.contains("under local:dev"),
        "{listed}"
    );
    // Revoked and restored: the data key alone, then the key, then the tenant.
    let revoked = run(&["revoke", "dev", "--dek", &dek]).ok();
    assert!(revoked.contains(&format!("{dek}  revoked")), "{revoked}");
    until_code(&caller, &sealed, Some("key_revoked")).await;
    until_code(&caller, &second, None).await;
    assert!(run(&["restore", "dev", "--dek", &dek]).ok().contains(&format!("{dek}  retired")));
    until_code(&caller, &sealed, None).await;
    assert_eq!(run(&["revoke", "dev", "--key", "default"]).ok(), "revoked the key default of dev\n");
    until_code(&caller, &second, Some("key_revoked")).await;
    assert_eq!(run(&["restore", "dev", "--key", "default"]).ok(), "restored the key default of dev\n");
    until_code(&caller, &second, None).await;
    // Shredded and taken back. It says what that does not reach.
    let told = run(&["shred", "dev", "--dek", &dek, "--waiting-hours", "1"]).ok();
    for words in
        ["opens nothing from now on", "(until then: --cancel)", "- embedded_envelopes: ", "local:dev: 1"]
    {
        assert!(told.contains(words), "{words}: {told}");
    }
    until_code(&caller, &sealed, Some("key_revoked")).await;
    assert!(run(&["jobs", "dev"]).ok().contains(&format!("shred dev dek:{dek}  waiting")));
    assert!(run(&["shred", "dev", "--dek", &dek, "--cancel"]).ok().contains("stays revoked"));
    assert!(run(&["shred", "dev", "--dek", &dek, "--cancel"]).refused().contains("nothing is cancelled"));
    run(&["restore", "dev", "--dek", &dek]).ok();
    until_code(&caller, &sealed, None).await;
    // And in earnest, without waiting, which only a key ring for development allows.
    run(&["shred", "dev", "--dek", &dek, "--waiting-hours", "0"]).ok();
    until_code(&caller, &sealed, Some("key_destroyed")).await;
    until_code(&caller, &second, None).await;
    let listed = run(&["deks", "dev"]).ok();
    let line = listed.lines().find(|line| line.starts_with(&dek)).unwrap();
    assert!(line.contains("  destroyed  ") && line.ends_with("under nothing"), "{line}");
    assert!(run(&["jobs", "dev"]).ok().contains(&format!("shred dev dek:{dek}  done  1 of 1  0 error(s)")));
    assert!(run(&["restore", "dev", "--dek", &dek]).refused().contains("destroyed"));
    // What cannot be is refused with the reason.
    let long = run(&["shred", "dev", "--key", "default", "--waiting-hours", "8761"]).refused();
    assert!(long.contains("31536000"), "{long}");
    assert!(run(&["rotate", "nobody"]).refused().contains("nobody"));
    assert!(run(&["deks", "dev", "none"]).refused().contains("none"));
    // The tenant as a whole, last of all: with it goes the right to ask.
    let (_, told) = (run(&["revoke", "dev"]).ok(), run(&["tenant", "list"]).ok());
    assert!(told.contains("dev") && told.contains("disabled"), "{told}");
    assert_eq!(run(&["restore", "dev"]).ok(), "restored the tenant dev\n");
    until_code(&caller, &second, None).await;
    program.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn master_keys_are_changed_beside_the_running_service_and_the_old_one_is_shown_to_be_free() {
    let folder = tempfile::tempdir().unwrap();
    let (program, caller) = service(folder.path()).await;
    let run = |arguments: &[&str]| keyfold(folder.path(), arguments, &[]);
    let first = seal(&caller).await;
    let (sealed, dek) = (text(&first["ciphertext"]), text(&first["dek_id"]));
    // New material under the same master key.
    let before = run(&["kek-use", "local:dev", "--list"]).ok();
    assert!(before.contains(&format!("{dek}  dev/default  active  since ")), "{before}");
    run(&["keyring", "rotate", "dev"]).ok();
    let watched = run(&["rewrap-keys", "dev", "--watch"]).ok();
    assert!(watched.contains("rewrap-keys dev  waiting") && watched.contains("  done  "), "{watched}");
    assert_ne!(run(&["kek-use", "local:dev", "--list"]).ok(), before, "nothing was wrapped anew");
    // Another master key: one call, and the rest follows.
    run(&["keyring", "add", "two"]).ok();
    run(&["tenant", "set-keks", "dev", "local:two"]).ok();
    let watched = run(&["jobs", "dev", "--watch"]).ok();
    assert!(watched.is_empty() || watched.contains("rewrap-keys dev"), "{watched}");
    let jobs = run(&["jobs"]).ok();
    assert!(jobs.lines().count() >= 2 && jobs.lines().all(|line| line.contains("  done  ")), "{jobs}");
    let old = run(&["kek-use", "local:dev"]).ok();
    assert!(old.starts_with("local:dev: 0 data key(s)") && old.contains("does not need it"), "{old}");
    assert!(run(&["kek-use", "local:two", "--list"]).ok().contains(&dek));
    // The proof.
    run(&["keyring", "disable", "dev"]).ok();
    program.stop().await;
    let (program, caller) = service(folder.path()).await;
    assert_eq!(caller.decrypt(&sealed, &json!({})).await, b"hello");
    program.stop().await;
}
