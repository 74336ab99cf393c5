//! The real program with its master keys in AWS KMS, set up as AWS users do it: by the SDK's own environment.

use std::io::{BufRead as _, BufReader};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use kms_emulator::{CreateKey, Emulator, Fault, FaultScope, Principal, Role};
use serde_json::json;

use crate::caller::{Caller, text};
use crate::kms_aws::{FRANKFURT, IRELAND};
use crate::kms_moto::{Moto, create_key, owner};

const BINARY: &str = env!("CARGO_BIN_EXE_keyfold");

/// `keyfold` in the environment of an AWS user.
pub(crate) fn keyfold(folder: &Path, kms_url: &str) -> Command {
    let mut command = Command::new(BINARY);
    command.current_dir(folder).stdin(Stdio::null());
    for (name, _) in inherited() {
        if name.starts_with("AWS_") || name.starts_with("KEYFOLD_") {
            command.env_remove(name);
        }
    }
    command
        .env("AWS_ENDPOINT_URL_KMS", kms_url)
        .env("AWS_ENDPOINT_URL_STS", kms_url)
        .env("AWS_REGION", IRELAND)
        .env("AWS_ACCESS_KEY_ID", "AKIASERVICE")
        .env("AWS_SECRET_ACCESS_KEY", "secret")
        .env("AWS_CONFIG_FILE", "/dev/null")
        .env("AWS_SHARED_CREDENTIALS_FILE", "/dev/null");
    command
}

#[expect(
    clippy::disallowed_methods,
    reason = "what the test's own environment holds must not reach the program"
)]
pub(crate) fn inherited() -> Vec<(String, String)> {
    std::env::vars().collect()
}

/// `keyfold serve --dev`; ended with the value.
pub(crate) struct Program {
    pub(crate) process: Child,
    pub(crate) caller: Caller,
}

impl Program {
    pub(crate) fn start(mut command: Command, folder: &Path, kek: &str) -> Self {
        let mut process = command
            .args(["serve", "--dev", "--kek", kek, "--listen", "127.0.0.1:0"])
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(process.stderr.take().unwrap()).lines();
        let mut said = String::new();
        let address = lines.find_map(|line| {
            let line = line.unwrap();
            said.push_str(&line);
            said.push('\n');
            line.split_once(" on http://")?.1.split_whitespace().next()?.parse().ok()
        });
        std::thread::spawn(move || lines.for_each(drop));
        let address: SocketAddr = address.unwrap_or_else(|| panic!("keyfold does not start:\n{said}"));
        let token = std::fs::read_to_string(folder.join("keyfold-data/dev-api-key")).unwrap();
        Self { process, caller: Caller::new(address, Some(token.trim().to_owned())) }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

pub(crate) async fn run(mut command: Command) -> Output {
    tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap()
}

pub(crate) fn printed(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// What a first user does, from nothing to a restart.
async fn tried_out(folder: &Path, kms_url: &str, kek: &str) {
    let context = json!({"record": "42"});
    let ciphertext = {
        let program = Program::start(keyfold(folder, kms_url), folder, kek);
        let ciphertext = program.caller.encrypt(b"hello", &context).await;
        assert_eq!(program.caller.decrypt(&ciphertext, &context).await, b"hello");
        program.caller.try_decrypt(&ciphertext, &json!({"record": "43"})).await.problem("context_mismatch");
        let body = json!({"ciphertext": ciphertext, "context": context});
        assert_eq!(program.caller.post("/v1/rewrap", &body).await.ok(200)["changed"], false);
        let ready = program.caller.get("/ready").await;
        assert_eq!(text(&ready.json["status"]), "ready");
        ciphertext
    };
    let program = Program::start(keyfold(folder, kms_url), folder, kek);
    assert_eq!(program.caller.decrypt(&ciphertext, &context).await, b"hello");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_shortest_way_to_try_it_with_aws_works() {
    let emulator = Emulator::builder().region(IRELAND).start().await.unwrap();
    let kek = emulator.create_key(IRELAND, CreateKey::new()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    tried_out(folder.path(), &emulator.url(), &kek).await;
    assert_eq!((emulator.count("GenerateDataKey"), emulator.count("Decrypt")), (1, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn without_service_and_registry_the_kms_alone_opens_what_was_encrypted() {
    let emulator = Emulator::builder().region(IRELAND).start().await.unwrap();
    let kek = emulator.create_key(IRELAND, CreateKey::new()).unwrap();
    let other = emulator.create_key(IRELAND, CreateKey::new()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let sealed = {
        let program = Program::start(keyfold(folder.path(), &emulator.url()), folder.path(), &kek);
        program.caller.encrypt(b"hello", &json!({"record": "42"})).await
    };
    std::fs::remove_dir_all(folder.path().join("keyfold-data")).unwrap();
    std::fs::write(folder.path().join("field.kf"), sealed).unwrap();
    let offline = |verb: &str, record: &str, more: &[&str]| {
        let mut command = keyfold(folder.path(), &emulator.url());
        command.args([verb, "field.kf", "-c", &format!("record={record}")]).args(more);
        run(command)
    };
    let opened = offline("decrypt", "42", &["--kek", &kek, "-o", "-"]).await;
    assert!(opened.status.success() && opened.stdout == b"hello", "{}", printed(&opened));
    for (record, kek) in [("43", &kek), ("42", &other)] {
        let refused = offline("decrypt", record, &["--kek", kek, "-o", "-"]).await;
        assert!(!refused.status.success() && refused.stdout.is_empty(), "{}", printed(&refused));
    }
    let moved = offline("rewrap", "42", &["--kek", &kek, "--to-kek", &other]).await;
    assert!(moved.status.success(), "{}", printed(&moved));
    let opened = offline("decrypt", "42", &["--kek", &other, "-o", "-"]).await;
    assert!(opened.status.success() && opened.stdout == b"hello", "{}", printed(&opened));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_works_against_moto() {
    let moto = Moto::start();
    let kek = create_key(&owner(&moto.url)).await;
    let folder = tempfile::tempdir().unwrap();
    tried_out(folder.path(), &moto.url, &kek).await;
    let mut doctor = keyfold(folder.path(), &moto.url);
    doctor.arg("doctor");
    let said = run(doctor).await;
    assert!(said.status.success(), "{}", printed(&said));
}

const SERVICE: &str = "arn:aws:iam::111122223333:user/service";
const ROLE: &str = "arn:aws:iam::444455556666:role/keyfold";

/// The permissions of the service's user: everything that docs/aws.md asks for, without one action.
fn identity_without(action: &str) -> String {
    let actions = ["DescribeKey", "GenerateDataKey", "Decrypt", "Encrypt", "ReEncryptFrom", "ReEncryptTo"];
    let allowed: Vec<String> =
        actions.iter().filter(|name| **name != action).map(|name| format!("kms:{name}")).collect();
    json!({"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": allowed, "Resource": "*"}]})
        .to_string()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_doctor_tries_every_kek_of_every_tenant_and_names_the_action_that_is_missing() {
    let service = |policy: &str| Principal::new(SERVICE).identity_policy(policy);
    let role = Role::new(ROLE).external_id("a,b").trust(SERVICE);
    let emulator = Emulator::builder()
        .region(IRELAND)
        .region(FRANKFURT)
        .principal("AKIASERVICE", service(&identity_without("none")))
        .role(role)
        .start()
        .await
        .unwrap();
    let folder = tempfile::tempdir().unwrap();
    let cli = |arguments: &[&str]| {
        let mut command = keyfold(folder.path(), &emulator.url());
        command.args(arguments);
        run(command)
    };
    let keys = [
        emulator.create_key(IRELAND, CreateKey::new()).unwrap(),
        emulator.create_key(FRANKFURT, CreateKey::new()).unwrap(),
        emulator.create_key(IRELAND, CreateKey::new().account("444455556666")).unwrap(),
    ];
    let customers = format!("{},role={ROLE},external-id=a,b", keys[2]);
    for arguments in [
        ["tenant", "create", "acme", &keys[0], &keys[1]].as_slice(),
        &["tenant", "create", "emil", &customers],
    ] {
        let made = cli(arguments).await;
        assert!(made.status.success(), "{}", printed(&made));
    }
    let well = cli(&["doctor"]).await;
    let said = printed(&well);
    assert!(well.status.success() && said.contains("All 3 KEKs work."), "{said}");
    assert!(keys.iter().all(|key| said.contains(key.as_str())), "{said}");

    for (missing, named) in [
        ("DescribeKey", "kms:DescribeKey"),
        ("GenerateDataKey", "kms:GenerateDataKey"),
        ("Decrypt", "kms:Decrypt"),
        ("Encrypt", "kms:Encrypt"),
        ("ReEncryptFrom", "kms:ReEncryptFrom"),
        ("ReEncryptTo", "kms:ReEncryptTo"),
    ] {
        emulator.add_principal("AKIASERVICE", service(&identity_without(missing))).unwrap();
        let ill = cli(&["doctor", "acme"]).await;
        let said = printed(&ill);
        assert!(!ill.status.success(), "{said}");
        assert!(said.contains(&format!("the IAM action {named} is not allowed")), "{missing}: {said}");
        assert!(said.contains("FAILED") && !said.contains("emil"), "{said}");
    }
    emulator.add_principal("AKIASERVICE", service(&identity_without("none"))).unwrap();
    emulator.add_role(Role::new(ROLE).external_id("another").trust(SERVICE)).unwrap();
    let said = printed(&cli(&["doctor", "emil"]).await);
    assert!(said.contains("the IAM action sts:AssumeRole is not allowed"), "{said}");
    emulator.faults().set(FaultScope::region(FRANKFURT), Fault::Unavailable);
    let said = printed(&cli(&["doctor", "acme"]).await);
    assert!(said.contains("1 of 2 KEKs do not work"), "{said}");
}
