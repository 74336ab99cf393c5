//! `keyfold encrypt|decrypt|rewrap FILE...`

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::time::Duration;

use assert_cmd::Command;
use tempfile::TempDir;
use tokio::process::Child;

use super::noise;
use crate::program::BINARY;
use crate::service::{KEK, Service, World};

/// A folder to work in, and where the service is.
pub(super) struct Desk {
    folder: TempDir,
    url: String,
    token: String,
}

impl Desk {
    pub(super) async fn at(service: &Service) -> Self {
        let caller = service.tenant_and_caller("acme").await;
        Self::with(format!("http://{}", service.address), caller.token().to_owned())
    }

    pub(super) fn with(url: String, token: String) -> Self {
        Self { folder: tempfile::tempdir().unwrap(), url, token }
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(super) fn write(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, bytes).unwrap();
        path
    }

    fn command(&self) -> Command {
        let mut command = Command::cargo_bin("keyfold").unwrap();
        command.current_dir(self.folder.path()).env_clear();
        command.env("KEYFOLD_URL", &self.url).env("KEYFOLD_API_KEY", &self.token);
        command
    }

    /// Off the runtime's threads, on which the service runs.
    pub(super) async fn run(&self, args: &str, stdin: &[u8]) -> Output {
        let mut command = self.command();
        command.args(args.split_whitespace()).write_stdin(stdin);
        tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap()
    }

    pub(super) async fn ok(&self, args: &str) -> Vec<u8> {
        self.ok_with(args, b"").await
    }

    pub(super) async fn ok_with(&self, args: &str, stdin: &[u8]) -> Vec<u8> {
        let output = self.run(args, stdin).await;
        assert!(output.status.success(), "{args}: {}", String::from_utf8_lossy(&output.stderr));
        output.stdout
    }

    pub(super) async fn fails(&self, args: &str) -> String {
        let output = self.run(args, b"").await;
        assert!(!output.status.success(), "{args} succeeds");
        String::from_utf8(output.stderr).unwrap()
    }

    /// The same on its way, to be written to and ended; `before` may be a program that goes on as the one behind it.
    pub(super) fn start(&self, before: &[&str], args: &str, stdin: Stdio) -> Child {
        let args: Vec<&str> = args.split_whitespace().collect();
        self.start_as(&[before, &[BINARY], &args].concat(), stdin)
    }

    pub(super) fn start_as(&self, whole: &[&str], stdin: Stdio) -> Child {
        let mut command = tokio::process::Command::new(whole[0]);
        command.args(&whole[1..]);
        self.surround(&mut command);
        command.stdin(stdin).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        command.spawn().unwrap()
    }

    /// Gives it its folder and its environment.
    pub(super) fn surround(&self, command: &mut tokio::process::Command) {
        command.current_dir(self.folder.path()).env_clear();
        command.env("KEYFOLD_URL", &self.url).env("KEYFOLD_API_KEY", &self.token);
    }

    /// Waits until a result has begun to come.
    pub(super) async fn partly_written(&self) {
        for _ in 0..500 {
            let begun =
                |name: &String| name.starts_with('.') && self.path(name).metadata().unwrap().len() > 0;
            if self.names().iter().any(begun) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("no result begins");
    }

    /// What is in the folder: no temporary file is left.
    pub(super) fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.folder.path()).unwrap();
        let mut names: Vec<String> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_goes_through_a_service_and_back_whole_with_its_permissions() {
    let world = World::new().await;
    let service = world.start().await;
    let desk = Desk::at(&service).await;
    let message = noise(7_000_001);
    let path = desk.write("report.pdf", &message);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
    desk.ok("encrypt report.pdf -c record=42 -c Owner:Name=café").await;
    assert_eq!(desk.names(), ["report.pdf", "report.pdf.kf"]);
    let mode = |name: &str| fs::metadata(desk.path(name)).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode("report.pdf.kf"), 0o640);
    // What is there is not overwritten unless that is said.
    assert!(desk.fails("decrypt report.pdf.kf -c record=42 -c Owner:Name=café").await.contains("--force"));
    fs::write(&path, "changed").unwrap();
    assert!(desk.fails("decrypt report.pdf.kf --force -c record=43").await.contains("context_mismatch"));
    assert_eq!(fs::read(&path).unwrap(), b"changed", "a failure leaves what was there");
    desk.ok("decrypt report.pdf.kf --force -c record=42 -c Owner:Name=café").await;
    assert!(fs::read(&path).unwrap() == message);
    assert_eq!(desk.names(), ["report.pdf", "report.pdf.kf"], "no temporary file is left");
    // From standard input to standard output.
    let sealed = desk.ok_with("encrypt --envelope compact", b"hello").await;
    assert!(envelope::inspect(&sealed).unwrap().wrapped().is_compact());
    assert_eq!(desk.ok_with("decrypt -", &sealed).await, b"hello");
    // The text form, which databases hold.
    let text = envelope::text::encode(&sealed) + "\n";
    assert_eq!(desk.ok_with("decrypt", text.as_bytes()).await, b"hello");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_file_leaves_nothing_behind() {
    let world = World::new().await;
    let service = world.start().await;
    let desk = Desk::at(&service).await;
    desk.write("a", &noise(4_000_000));
    desk.ok("encrypt a").await;
    let mut sealed = fs::read(desk.path("a.kf")).unwrap();
    *sealed.last_mut().unwrap() ^= 1;
    desk.write("b.kf", &sealed);
    let told = desk.fails("decrypt b.kf").await;
    assert!(told.contains("not whole") || told.contains("damaged"), "{told}");
    assert_eq!(desk.names(), ["a", "a.kf", "b.kf"]);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_is_done_with_a_report() {
    let world = World::new().await;
    let service = world.start_without_keeper().await;
    let desk = Desk::at(&service).await;
    for name in ["in/a", "in/deep/b", "in/deep/er/c"] {
        desk.write(name, name.as_bytes());
    }
    assert!(desk.fails("encrypt in").await.contains("--recursive"));
    let report = |output: &Output| String::from_utf8_lossy(&output.stderr).into_owned();
    let output = desk.run("encrypt -r in", b"").await;
    assert!(
        output.status.success() && report(&output).contains("3 written, 0 up to date, 0 skipped, 0 failed")
    );
    desk.write("in/deep/b.kf", b"no envelope");
    for name in ["in/a", "in/deep/b", "in/deep/er/c"] {
        fs::remove_file(desk.path(name)).unwrap();
    }
    let output = desk.run("decrypt -r in", b"").await;
    assert!(!output.status.success());
    assert!(report(&output).contains("2 written, 0 up to date, 0 skipped, 1 failed"), "{}", report(&output));
    assert!(report(&output).contains("deep/b.kf"));
    assert_eq!(fs::read(desk.path("in/deep/er/c")).unwrap(), b"in/deep/er/c");
    // In place: what is up to date stays, what is old is renewed.
    fs::remove_file(desk.path("in/deep/b.kf")).unwrap();
    let before = fs::read(desk.path("in/a.kf")).unwrap();
    let output = desk.run("rewrap -r in", b"").await;
    assert!(report(&output).contains("0 written, 2 up to date, 2 skipped"), "{}", report(&output));
    assert!(fs::read(desk.path("in/a.kf")).unwrap() == before);
    world.pass(25 * 3_600);
    let output = desk.run("rewrap -r in", b"").await;
    assert!(report(&output).contains("2 written"), "{}", report(&output));
    assert!(fs::read(desk.path("in/a.kf")).unwrap() != before);
    fs::remove_file(desk.path("in/a")).unwrap();
    desk.ok("decrypt in/a.kf").await;
    assert_eq!(fs::read(desk.path("in/a")).unwrap(), b"in/a");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn credentials_do_not_cross_a_network_in_clear() {
    let desk = Desk::with("http://192.0.2.1:8600".to_owned(), "kf_x_y".to_owned());
    desk.write("a", b"a");
    assert!(desk.fails("encrypt a").await.contains("no TLS"));
    assert!(desk.fails("encrypt a --url ftp://localhost/").await.contains("https"));
    assert!(desk.fails("encrypt a --kek nonsense").await.contains("local:NAME"));
    assert!(desk.fails("encrypt a -c nonsense").await.contains("NAME=VALUE"));
    assert_eq!(desk.names(), ["a"]);
}

/// Copies the key ring to where a command without a service finds it.
pub(super) fn data_dir_of(world: &World, desk: &Desk) -> PathBuf {
    let folder = desk.path("data");
    fs::create_dir(&folder).unwrap();
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o700)).unwrap();
    copy_private(&world.path("keyring"), &folder.join("keyring"));
    folder
}

fn copy_private(from: &Path, to: &Path) {
    fs::copy(from, to).unwrap();
    fs::set_permissions(to, fs::Permissions::from_mode(0o600)).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_service_and_its_registry_the_kek_alone_opens_embedded_envelopes() {
    let world = World::new().await;
    world.keyring.add("two").await.unwrap();
    let service = world.start().await;
    let desk = Desk::at(&service).await;
    let message = noise(1_000_000);
    desk.write("a", &message);
    desk.ok("encrypt a -c record=42").await;
    let field = desk.ok_with("encrypt", b"a field").await;
    desk.ok("encrypt a -o compact --envelope compact -c record=42").await;
    service.stop().await;
    let data = data_dir_of(&world, &desk);
    let data = data.to_str().unwrap();
    let offline = |kek: &str| format!("--data-dir {data} --kek {kek}");
    desk.ok(&format!("decrypt a.kf -o b -c record=42 {}", offline(KEK))).await;
    assert!(fs::read(desk.path("b")).unwrap() == message);
    let text = envelope::text::encode(&field);
    assert_eq!(desk.ok_with(&format!("decrypt {}", offline(KEK)), text.as_bytes()).await, b"a field");
    // Wrong context, another tenant, a KEK that was not named, nothing to go by.
    let wrong = desk.fails(&format!("decrypt a.kf -o c {}", offline(KEK))).await;
    assert!(wrong.contains("another context"), "{wrong}");
    let wrong = desk.fails(&format!("decrypt a.kf -o c -c record=42 --tenant evil {}", offline(KEK))).await;
    assert!(wrong.contains("another tenant"), "{wrong}");
    let wrong = desk.fails(&format!("decrypt a.kf -o c -c record=42 {}", offline("local:two"))).await;
    assert!(wrong.contains(KEK) && wrong.contains("--kek"), "{wrong}");
    let wrong = desk.fails(&format!("decrypt compact -o c -c record=42 {}", offline(KEK))).await;
    assert!(wrong.contains("compact"), "{wrong}");
    assert!(!desk.path("c").exists());
    // A new KEK for an old file.
    desk.ok(&format!("rewrap a.kf --to-kek local:two {}", offline(KEK))).await;
    desk.ok(&format!("decrypt a.kf -o c -c record=42 {}", offline("local:two"))).await;
    assert!(fs::read(desk.path("c")).unwrap() == message);
    assert!(
        desk.fails(&format!("decrypt a.kf -o d -c record=42 {}", offline(KEK))).await.contains("local:two")
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_encrypted_without_a_service_a_service_opens() {
    let world = World::new().await;
    let service = world.start().await;
    let desk = Desk::at(&service).await;
    let data = data_dir_of(&world, &desk);
    desk.write("a", b"hello");
    let args = format!("--data-dir {} --kek {KEK}", data.display());
    assert!(desk.fails(&format!("encrypt a {args}")).await.contains("--tenant"));
    desk.ok(&format!("encrypt a -c record=42 --tenant acme {args}")).await;
    desk.ok("decrypt a.kf -o b -c record=42").await;
    assert_eq!(fs::read(desk.path("b")).unwrap(), b"hello");
    service.stop().await;
}
