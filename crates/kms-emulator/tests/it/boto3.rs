//! boto3, a client that nobody here wrote, judges the wire.

use std::process::Command;

use kms_emulator::{Emulator, Principal, Role};

use crate::world::{FRANKFURT, IRELAND};

/// The interpreter comes from whoever runs the tests: one that can import boto3.
#[expect(clippy::disallowed_methods, reason = "the test has no configuration of its own")]
fn python() -> String {
    std::env::var("KEYFOLD_TEST_PYTHON").expect(
        "KEYFOLD_TEST_PYTHON is not set: it must name a Python that has boto3 \
         (python3 -m venv DIR && DIR/bin/pip install boto3; KEYFOLD_TEST_PYTHON=DIR/bin/python)",
    )
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn boto3_finds_nothing_to_object_to() {
    let python = python();
    let kms = Emulator::builder()
        .region(IRELAND)
        .region(FRANKFURT)
        .principal("AKIAMALLORY", Principal::new("arn:aws:iam::111122223333:user/mallory"))
        .role(Role::new("arn:aws:iam::444455556666:role/keyfold").external_id("tenant-7"))
        .start()
        .await
        .unwrap();
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/boto3_judge.py");
    let url = kms.url();
    let run = move || Command::new(python).args([script, &url]).env_remove("AWS_PROFILE").output();
    let output = tokio::task::spawn_blocking(run).await.unwrap().expect("KEYFOLD_TEST_PYTHON does not run");
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{out}\n{err}");
    // The script says last how many answers it has held against AWS's own model.
    assert!(out.trim_end().ends_with("answers are as AWS describes them"), "{out}");
    assert!(kms.calls().len() > 40, "{out}");
}
