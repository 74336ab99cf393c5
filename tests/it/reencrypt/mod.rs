//! `keyfold reencrypt`: what clients hold is brought up to date, and nothing of it is lost.

mod files;
mod limits;
mod postgres;
mod sqlite;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use envelope::{inspect, text};
use reqwest::Method;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::caller::{Caller, plaintext, receive, text as text_of};
use crate::service::{Service, World};

const BINARY: &str = env!("CARGO_BIN_EXE_keyfold");

/// A service with a tenant, and a folder to work in.
struct Desk {
    service: Service,
    caller: Caller,
    folder: TempDir,
    world: World,
}

/// The plaintext of a row.
fn message(row: usize) -> Vec<u8> {
    format!("row {row}").into_bytes()
}

impl Desk {
    async fn new() -> Self {
        Self::with(World::new().await).await
    }

    async fn with(world: World) -> Self {
        let service = world.start_without_keeper().await;
        let caller = service.tenant_and_caller("acme").await;
        Self { service, caller, folder: tempfile::tempdir().unwrap(), world }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.path(name)).unwrap()
    }

    /// Envelopes of so many rows, each with its number as `row_id` in its context.
    async fn sealed(&self, rows: std::ops::Range<usize>) -> Vec<String> {
        use base64::Engine as _;
        let mut sealed = Vec::new();
        let rows: Vec<usize> = rows.collect();
        for rows in rows.chunks(5_000) {
            let items: Vec<Value> = rows
                .iter()
                .map(|row| {
                    let plaintext = base64::engine::general_purpose::STANDARD.encode(message(*row));
                    json!({"plaintext": plaintext, "context": {"row_id": row.to_string(), "table": "people"},
                        "envelope": "compact"})
                })
                .collect();
            let answer = self.post("/v1/encrypt/batch", &json!({"items": items})).await;
            sealed
                .extend(answer["items"].as_array().unwrap().iter().map(|item| text_of(&item["ciphertext"])));
        }
        sealed
    }

    /// All of them open, each with its own context, to what was sealed.
    async fn all_open<'a>(&self, rows: impl IntoIterator<Item = (usize, &'a str)>) {
        let rows: Vec<(usize, &str)> = rows.into_iter().collect();
        for rows in rows.chunks(5_000) {
            let items: Vec<Value> = rows
                .iter()
                .map(|(row, ciphertext)| {
                    json!({"ciphertext": ciphertext, "context": {"row_id": row.to_string(), "table": "people"}})
                })
                .collect();
            let answer = self.post("/v1/decrypt/batch", &json!({"items": items})).await;
            for ((row, _), item) in rows.iter().zip(answer["items"].as_array().unwrap()) {
                assert_eq!(plaintext(item), message(*row));
            }
        }
    }

    /// Not held against the OpenAPI document: that takes a while for so many items.
    async fn post(&self, path: &str, body: &Value) -> Value {
        let request = self.caller.request(Method::POST, path).header("content-type", "application/json");
        receive(request.body(body.to_string())).await.ok(200)
    }

    /// Ends the active data key: everything that was sealed is old now.
    async fn rotate(&self) -> (String, String) {
        let path = "/v1/tenants/acme/keys/default/rotate";
        let rotated = receive(self.caller.request(Method::POST, path)).await.ok(200);
        let rotated = &rotated["rotated"][0];
        (text_of(&rotated["from_dek_id"]), text_of(&rotated["to_dek_id"]))
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(BINARY);
        command.arg("reencrypt").args(args).current_dir(self.folder.path()).env_clear();
        command.env("KEYFOLD_URL", format!("http://{}", self.service.address));
        command.env("KEYFOLD_API_KEY", self.caller.token());
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Runs it to its end. Off the runtime's threads, on which the service runs.
    async fn run(&self, args: &[&str]) -> Output {
        let mut command = self.command(args);
        tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap()
    }

    /// What it prints when all rows are up to date.
    async fn ok(&self, args: &[&str]) -> String {
        let output = self.run(args).await;
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// The same in JSON.
    async fn report(&self, args: &[&str]) -> Value {
        let args: Vec<&str> = args.iter().copied().chain(["--json"]).collect();
        serde_json::from_str(&self.ok(&args).await).unwrap()
    }

    /// What it prints, and what it complains about, when not all are.
    async fn not_ok(&self, args: &[&str]) -> (String, String) {
        let output = self.run(args).await;
        assert_eq!(output.status.code(), Some(1), "{args:?} succeeds");
        (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap())
    }

    /// Starts it, kills it (-9) when its state file says that at least so many rows are done, and gives that number.
    async fn killed(&self, args: &[&str], state: &str, rows: u64) -> u64 {
        let mut running = Running(self.command(args).spawn().unwrap());
        loop {
            if done(&self.path(state)).is_some_and(|done| done >= rows) {
                running.0.kill().unwrap();
                running.0.wait().unwrap();
                return done(&self.path(state)).unwrap();
            }
            if let Some(status) = running.0.try_wait().unwrap() {
                let output = std::mem::replace(&mut running.0, noop()).wait_with_output().unwrap();
                panic!("it ended by itself ({status}): {}", String::from_utf8_lossy(&output.stderr));
            }
            tokio::time::sleep(std::time::Duration::from_millis(2)).await;
        }
    }
}

/// What is killed with the test.
struct Running(Child);

fn noop() -> Child {
    Command::new("true").spawn().unwrap()
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// How many rows a state file says are done. It is there whole at any moment.
fn done(state: &Path) -> Option<u64> {
    let text = std::fs::read(state).ok()?;
    let state: Value = serde_json::from_slice(&text).unwrap();
    state["report"]["rows"].as_u64()
}

fn dek_of(ciphertext: &str) -> String {
    inspect(&text::decode(ciphertext).unwrap()).unwrap().dek_id().to_string()
}

fn deks_of<'a>(ciphertexts: impl IntoIterator<Item = &'a str>) -> BTreeSet<String> {
    ciphertexts.into_iter().map(dek_of).collect()
}
