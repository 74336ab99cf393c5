//! The program.

use std::io::{BufRead as _, BufReader};
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use aws_sdk_kms::config::Credentials;

use crate::world::{FRANKFURT, IRELAND, blob_of, client_of, data_key};

/// Killed if a test ends early.
struct Program(Child, String);

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Program {
    /// Starts it, and waits for the ARN that it prints.
    fn start(state: &Path, key: &str) -> (Self, String) {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let mut child = Command::new(env!("CARGO_BIN_EXE_kms-emulator"))
            .args(["--listen", &port.to_string(), "--region", IRELAND, "--region", FRANKFURT])
            .args(["--create-key", key, "--multi-region", "--state"])
            .arg(state)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut arn = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut arn).unwrap();
        (Self(child, format!("http://{port}")), arn.trim().to_owned())
    }

    /// Ends it as a container's runtime does; true if it took that well.
    fn terminate(mut self) -> bool {
        let id = self.0.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &id]).status().unwrap().success());
        self.0.wait().unwrap().success()
    }
}

#[tokio::test]
async fn a_demo_key_is_made_once_and_kept() {
    let folder = tempfile::tempdir().unwrap();
    let state = folder.path().join("state.json");
    let (program, arn) = Program::start(&state, "alias/demo");
    assert!(arn.starts_with("arn:aws:kms:eu-west-1:111122223333:key/mrk-"), "{arn}");
    let credentials = || Credentials::new("a", "b", None, None, "test");
    let made = data_key(&client_of(&program.1, IRELAND, credentials()), "alias/demo").await;
    assert!(program.terminate());

    let (program, again) = Program::start(&state, "alias/demo");
    assert_eq!(arn, again);
    let frankfurt = client_of(&program.1, FRANKFURT, credentials());
    let opened =
        frankfurt.decrypt().ciphertext_blob(blob_of(&made)).key_id("alias/demo").send().await.unwrap();
    assert_eq!(opened.plaintext(), made.plaintext());
}

#[tokio::test]
async fn a_demo_key_can_have_an_arn_that_is_known_beforehand() {
    let folder = tempfile::tempdir().unwrap();
    let state = folder.path().join("state.json");
    let key = "alias/demo=1234abcd-12ab-34cd-56ef-1234567890ab";
    let expected = "arn:aws:kms:eu-west-1:111122223333:key/mrk-1234abcd12ab34cd56ef1234567890ab";
    let (program, arn) = Program::start(&state, key);
    assert_eq!(arn, expected);
    let made =
        data_key(&client_of(&program.1, IRELAND, Credentials::new("a", "b", None, None, "test")), expected)
            .await;
    assert_eq!(made.key_id(), Some(expected));
    assert!(program.terminate());
    assert_eq!(Program::start(&state, key).1, expected);
}
