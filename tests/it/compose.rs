//! docker/compose.aws.yaml without a container engine: its commands in its environments, as processes on this host. Not
//! shown: that the images build, and that an engine takes the file.

use std::io::{BufRead as _, BufReader};
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};

use crate::kms_moto::python;
use crate::program::{BINARY, Program};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// The file as an engine reads it: by a YAML library that moto brings with it.
fn compose() -> Value {
    let read = "import json, sys, yaml; print(json.dumps(yaml.safe_load(open(sys.argv[1]))))";
    let file = format!("{ROOT}/docker/compose.aws.yaml");
    let output = Command::new(python()).args(["-c", read, &file]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn texts(list: &Value) -> Vec<String> {
    list.as_array().unwrap().iter().map(|text| text.as_str().unwrap().to_owned()).collect()
}

/// The emulator as the file starts it; ended with the value.
struct Kms(Child);

impl Drop for Kms {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The program of the other package, which is built with the tests of all.
fn emulator() -> Command {
    let program = Path::new(BINARY).with_file_name("kms-emulator");
    assert!(program.exists(), "build it first: cargo build --package keyfold-kms-emulator");
    let mut command = Command::new(program);
    command.env_clear().stdin(Stdio::null());
    command
}

/// Starts it, and waits for its key.
fn start_kms(arguments: &[String]) -> (Kms, String) {
    let mut child = emulator().args(arguments).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let mut arn = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut arn).unwrap();
    (Kms(child), arn.trim().to_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_compose_file_with_the_emulator_starts_works_and_goes_on_after_a_restart() {
    let compose = compose();
    let (kms, keyfold) = (&compose["services"]["kms"], &compose["services"]["keyfold"]);
    let folder = tempfile::tempdir().unwrap();
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    // What differs on this host: the port, the name of the other container, and where the volumes are.
    let here = |text: &str| {
        text.replace("http://kms:4599", &format!("http://127.0.0.1:{port}"))
            .replace("0.0.0.0:4599", &format!("127.0.0.1:{port}"))
            .replace("127.0.0.1:4599", &format!("127.0.0.1:{port}"))
            .replace("/var/lib/kms-emulator", folder.path().to_str().unwrap())
    };
    let kms_command: Vec<String> = texts(&kms["command"]).iter().map(|text| here(text)).collect();
    let healthy = || {
        let check = texts(&kms["healthcheck"]["test"]);
        assert_eq!(check[..2], ["CMD", "/usr/bin/kms-emulator"]);
        let arguments = check[2..].iter().map(|text| here(text));
        emulator().args(arguments).stderr(Stdio::null()).status().unwrap().success()
    };
    let command = texts(&keyfold["command"]);
    assert_eq!(command[0], "serve");
    let kek = command.iter().find_map(|argument| argument.strip_prefix("--kek=")).unwrap();
    let arguments: Vec<&str> = command[1..].iter().map(String::as_str).collect();
    let environment = keyfold["environment"].as_object().unwrap();
    let mut variables: Vec<(&str, String)> =
        environment.iter().map(|(name, value)| (name.as_str(), here(value.as_str().unwrap()))).collect();
    // As the Dockerfile sets it.
    let data_dir = folder.path().join("keyfold");
    variables.push(("KEYFOLD_DATA_DIR", data_dir.to_str().unwrap().to_owned()));
    let variables: Vec<(&str, &str)> =
        variables.iter().map(|(name, value)| (*name, value.as_str())).collect();

    assert!(!healthy(), "nothing is there yet");
    let (running, arn) = start_kms(&kms_command);
    assert_eq!(arn, kek, "the KEK that keyfold is told");
    assert!(healthy());
    let program = Program::serve(folder.path(), &arguments, &variables).await;
    let ciphertext = program.dev_caller(&data_dir).encrypt(b"hello", &json!({})).await;
    program.stop().await;
    drop(running);
    assert!(!healthy());

    let (_running, arn) = start_kms(&kms_command);
    assert_eq!(arn, kek);
    let program = Program::serve(folder.path(), &arguments, &variables).await;
    let caller = program.dev_caller(&data_dir);
    assert_eq!(caller.decrypt(&ciphertext, &json!({})).await, b"hello");
    program.stop().await;
}

/// The names that the file and the Dockerfile have to agree on.
#[test]
fn the_compose_file_names_what_the_dockerfile_has() {
    let compose = compose();
    let dockerfile = std::fs::read_to_string(format!("{ROOT}/Dockerfile")).unwrap();
    let stages: Vec<&str> = dockerfile.lines().filter(|line| line.starts_with("FROM ")).collect();
    let target = compose["services"]["kms"]["build"]["target"].as_str().unwrap();
    let named = format!(" AS {target}");
    assert!(stages.iter().any(|stage| stage.ends_with(&named)), "{stages:?}");
    assert!(
        !stages.last().unwrap().contains(" AS "),
        "the last stage is the service, which builds by default"
    );
    for service in ["kms", "keyfold"] {
        let volume = compose["services"][service]["volumes"][0].as_str().unwrap();
        let (name, path) = volume.split_once(':').unwrap();
        assert!(compose["volumes"].as_object().unwrap().contains_key(name), "{name}");
        assert!(dockerfile.contains(&format!("VOLUME {path}\n")), "{path}");
    }
    assert_eq!(compose["services"]["keyfold"]["depends_on"]["kms"]["condition"], "service_healthy");
}
