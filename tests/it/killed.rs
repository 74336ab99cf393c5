//! The real program, killed (-9) at random moments while it changes the master key of 5,000 data keys.

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use envelope::{DataKey, EncryptionContext, WrappedDataKey, WrappedKeys};
use keyfold::clock::{Clock, Timestamp};
use keyfold::kms::{Kms, Urgency, kms_context};
use keyfold::store::sqlite::SqliteStore;
use keyfold::store::{DekRecord, DekScope, DekState, RotationStore, Store, WrappedRecord};
use keyfold::tenant::{Kek, KekId};
use kms_emulator::{CreateKey, Emulator};
use reqwest::Method;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::caller::{Caller, plaintext, receive};
use crate::kms_aws::{IRELAND, aws};
use crate::service::open_registry;

const DEKS: usize = 5_000;
const KILLS: usize = 20;
const BINARY: &str = env!("CARGO_BIN_EXE_keyfold");

/// A data folder and the KMS that the program reaches.
pub(crate) struct Site {
    folder: tempfile::TempDir,
    pub(crate) emulator: Emulator,
}

impl Site {
    pub(crate) async fn new() -> Self {
        let emulator = Emulator::builder().region(IRELAND).start().await.unwrap();
        let folder = tempfile::tempdir().unwrap();
        let config = format!(
            "data_dir = {:?}\n[aws]\nkms_endpoint = {:?}\n[rotation]\npoll_secs = 1\nlease_secs = 1\n\
             kms_calls_per_sec_max = 300\n",
            folder.path().join("data"),
            emulator.url(),
        );
        std::fs::write(folder.path().join("keyfold.toml"), config).unwrap();
        Self { folder, emulator }
    }

    pub(crate) fn registry(&self) -> PathBuf {
        self.folder.path().join("data/registry.sqlite")
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(BINARY);
        command.args(arguments).arg("--config").arg(self.folder.path().join("keyfold.toml"));
        command.env("AWS_ACCESS_KEY_ID", "any").env("AWS_SECRET_ACCESS_KEY", "secret");
        command.env("AWS_EC2_METADATA_DISABLED", "true");
        command
    }

    /// What a command prints.
    pub(crate) fn run(&self, arguments: &[&str]) -> String {
        let ran = self.command(arguments).output().unwrap();
        assert!(ran.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&ran.stderr));
        String::from_utf8(ran.stdout).unwrap()
    }

    /// Starts the service, and waits until it listens. `settings` go before the file's.
    pub(crate) fn serve(&self, settings: &[(&str, &str)]) -> Running {
        let mut child = self
            .command(&["serve", "--listen", "127.0.0.1:0"])
            .envs(settings.iter().copied())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let (out, err) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
        let (said, hears) = std::sync::mpsc::channel();
        for stream in [Box::new(out) as Box<dyn std::io::Read + Send>, Box::new(err)] {
            let said = said.clone();
            std::thread::spawn(move || {
                for line in BufReader::new(stream).lines().map_while(Result::ok) {
                    let _ = said.send(line);
                }
            });
        }
        let address = loop {
            let line = hears.recv_timeout(Duration::from_secs(30)).unwrap();
            if let Some((_, rest)) = line.split_once("\"address\":\"") {
                break rest.split('"').next().unwrap().parse().unwrap();
            }
        };
        Running { child, address, log: hears }
    }
}

/// A service that runs. Killed when it is dropped.
pub(crate) struct Running {
    child: Child,
    address: std::net::SocketAddr,
    log: std::sync::mpsc::Receiver<String>,
}

impl Running {
    /// Sends it a signal.
    pub(crate) fn signal(&self, signal: Signal) {
        let id = i32::try_from(self.child.id()).unwrap();
        kill_process(Pid::from_raw(id).unwrap(), signal).unwrap();
    }

    /// Waits until it has logged a line with these words, and gives the line.
    pub(crate) fn says(&self, words: &str) -> String {
        loop {
            let line = self.log.recv_timeout(Duration::from_secs(60));
            let line = line.unwrap_or_else(|_| panic!("it never says {words:?}"));
            if line.contains(words) {
                return line;
            }
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            for line in self.log.try_iter() {
                eprintln!("{line}");
            }
        }
    }
}

/// Makes so many data keys of the tenant and seals a message under each: every other one embedded, the rest compact.
pub(crate) async fn seed(site: &Site, store: &SqliteStore, kek: &str, deks: usize) -> Vec<String> {
    let scope = DekScope {
        tenant: "acme".parse().unwrap(),
        key: "default".parse().unwrap(),
        bound: EncryptionContext::new(),
    };
    let (kms, kek) = (Arc::new(aws(&site.emulator.url())), Kek::direct(kek.parse().unwrap()));
    let mut made = JoinSet::new();
    for lane in 0..8 {
        let (kms, kek, scope) = (kms.clone(), kek.clone(), scope.clone());
        made.spawn(async move {
            let mut made = Vec::new();
            for n in (lane..deks).step_by(8) {
                let at = Clock::system().now().unix_ms().unsigned_abs();
                let id = uuid::Builder::from_unix_timestamp_millis(at, &[u8::try_from(n % 251).unwrap(); 10]);
                let mut bytes = id.into_uuid().into_bytes();
                bytes[8..].copy_from_slice(&(n as u64 | 1 << 63).to_be_bytes());
                let id = envelope::DataKeyId::from_bytes(bytes);
                let context = kms_context(&scope.tenant, &scope.key, id, &scope.bound).unwrap();
                let generated = kms.generate(&kek, &context, Urgency::Foreground).await.unwrap();
                made.push((n, id, context, generated));
            }
            made
        });
    }
    let mut message = EncryptionContext::new();
    message.insert("keyfold:tenant", "acme").unwrap();
    message.insert("keyfold:key", "default").unwrap();
    let (mut sealed, mut before) = (Vec::new(), None);
    for (n, id, context, generated) in made.join_all().await.into_iter().flatten() {
        let now = Timestamp::from_unix_ms(Clock::system().now().unix_ms());
        let wrapped = WrappedRecord {
            kek: kek.id.clone(),
            blob: generated.wrapped.blob.clone(),
            material: generated.wrapped.material,
            wrapped_at: now,
        };
        let dek = DekRecord::new(id, scope.clone(), DekState::Active, now);
        store.activate_dek(before, &dek, &[wrapped]).await.unwrap();
        before = Some(id);
        let section = if n % 2 == 0 {
            let form = WrappedDataKey { kek: kek.id.to_string(), blob: generated.wrapped.blob };
            WrappedKeys::new(&context, &[form]).unwrap()
        } else {
            WrappedKeys::compact()
        };
        let key = DataKey::new(id, generated.plaintext);
        let mut salt = [0; 24];
        getrandom::fill(&mut salt).unwrap();
        let envelope = envelope::seal(&key, salt, &section, &message, b"hello").unwrap();
        sealed.push(envelope::text::encode(&envelope));
    }
    sealed
}

async fn open(caller: &Caller, ciphertext: &str) {
    assert_eq!(plaintext(&caller.try_decrypt(ciphertext, &json!({})).await.ok(200)), b"hello");
}

/// Opens all of them. Not held against the OpenAPI document: that takes a while for so many items.
async fn open_all(caller: &Caller, sealed: &[String]) {
    for some in sealed.chunks(1_000) {
        let items: Vec<Value> = some.iter().map(|ciphertext| json!({"ciphertext": ciphertext})).collect();
        let request =
            caller.request(Method::POST, "/v1/decrypt/batch").header("content-type", "application/json");
        let opened = receive(request.body(json!({"items": items}).to_string())).await.ok(200);
        let opened = opened["items"].as_array().unwrap();
        assert_eq!(opened.len(), some.len());
        assert!(opened.iter().all(|item| plaintext(item) == b"hello"));
    }
}

fn random(below: u64) -> u64 {
    let mut bytes = [0; 8];
    getrandom::fill(&mut bytes).unwrap();
    u64::from_le_bytes(bytes) % below
}

pub(crate) async fn still_needing(registry: &Path, kek: &str) -> u64 {
    let store = open_registry(registry).await;
    let kek: KekId = kek.parse().unwrap();
    let used = store.kek_use(&kek).await.unwrap();
    store.close().await;
    used.deks
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn five_thousand_data_keys_follow_a_new_kek_though_the_program_is_killed_twenty_times() {
    let site = Site::new().await;
    let (old, new) = (
        site.emulator.create_key(IRELAND, CreateKey::new()).unwrap(),
        site.emulator.create_key(IRELAND, CreateKey::new()).unwrap(),
    );
    site.run(&["tenant", "create", "acme", &old]);
    let printed = site.run(&["api-key", "create", "acme", "--name", "test", "--verbs", "encrypt,decrypt"]);
    let token = printed.lines().find(|line| line.starts_with("kf_")).unwrap().to_owned();
    let store = open_registry(&site.registry()).await;
    let sealed = seed(&site, &store, &old, DEKS).await;
    store.close().await;
    site.run(&["tenant", "set-keks", "acme", &new]);
    let mut left = vec![DEKS as u64];
    for _ in 0..KILLS {
        let running = site.serve(&[]);
        let caller = Caller::new(running.address, Some(token.clone()));
        // At a random moment after it has begun to work.
        let enough = left[left.len() - 1].saturating_sub(1 + random(200));
        while still_needing(&site.registry(), &old).await > enough {
            for _ in 0..5 {
                let at = usize::try_from(random(sealed.len() as u64)).unwrap();
                open(&caller, &sealed[at]).await;
            }
        }
        tokio::time::sleep(Duration::from_millis(random(30))).await;
        drop(running);
        left.push(still_needing(&site.registry(), &old).await);
        // All that the kill left behind opens, by one who has nothing in memory and hardly works on it himself.
        let reader = site.serve(&[("KEYFOLD_ROTATION__KMS_CALLS_PER_SEC_MAX", "1")]);
        let caller = Caller::new(reader.address, Some(token.clone()));
        open_all(&caller, &sealed).await;
    }
    assert!(left.is_sorted_by(|a, b| a > b), "the kills did not come while it worked: {left:?}");
    assert_ne!(left[KILLS], 0, "the last kills came too late: {left:?}");
    // In peace it comes to its end.
    let running = site.serve(&[]);
    let watched = site.run(&["jobs", "acme", "--watch"]);
    drop(running);
    assert_eq!(still_needing(&site.registry(), &old).await, 0, "{watched}");
    let summary = site.run(&["jobs", "acme"]);
    assert!(summary.contains("done") && summary.contains("5000 of 5000"), "{summary}");
    assert!(site.run(&["kek-use", &old]).contains("0 data key(s)"));
    // The old KEK is deleted; everything still opens, from cold.
    site.emulator.schedule_deletion(&old, 7).unwrap();
    site.emulator.advance(Duration::from_secs(8 * 24 * 60 * 60));
    assert!(site.emulator.describe_key(&old).is_err(), "the old KEK is still there");
    let running = site.serve(&[]);
    let caller = Caller::new(running.address, Some(token));
    let (sealed, mut clients) = (Arc::new(sealed), JoinSet::new());
    for lane in 0..16 {
        let (sealed, caller) = (sealed.clone(), caller.clone());
        clients.spawn(async move {
            for ciphertext in sealed.iter().skip(lane).step_by(16) {
                open(&caller, ciphertext).await;
            }
        });
    }
    clients.join_all().await;
    assert_eq!(sealed.len(), DEKS);
}
