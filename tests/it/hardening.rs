//! What the program asks the system for, for the secrets in its memory, and what it says where that is refused.

use std::path::Path;
use std::process::Output;

use rustix::thread::{CapabilitySet, capabilities};
use serde_json::json;
use tokio::process::Command;

use crate::program::{BINARY, Program};

/// A user who may nothing.
pub(crate) const NOBODY: &str = "65534";

fn may(what: CapabilitySet) -> bool {
    capabilities(None).unwrap().effective.contains(what)
}

/// A command that goes on as its last arguments say, with so many kilobytes of memory to lock, and without the right
/// to exceed that.
fn with_memory_to_lock(kilobytes: &str) -> Command {
    let mut command = Command::new("sh");
    command.args(["-c", "ulimit -l $0 && exec \"$@\"", kilobytes]);
    if may(CapabilitySet::IPC_LOCK) {
        command.args(["setpriv", "--bounding-set=-ipc_lock", "--inh-caps=-ipc_lock"]);
    }
    command.arg(BINARY);
    command
}

/// What became of a start that is to be refused.
async fn refused(mut command: Command, folder: &Path, lock: &str) -> Output {
    let command = command.args(["serve", "--dev", "--listen", "127.0.0.1:0"]).current_dir(folder);
    command.env("KEYFOLD_MEMORY__LOCK", lock).env_remove("KEYFOLD_CONFIG").kill_on_drop(true);
    tokio::time::timeout(std::time::Duration::from_secs(60), command.output()).await.unwrap().unwrap()
}

/// How many kilobytes of its memory are locked.
fn locked_kilobytes(program: &Program) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", program.id())).unwrap();
    let locked = status.lines().find_map(|line| line.strip_prefix("VmLck:")).unwrap();
    locked.trim().trim_end_matches(" kB").parse().unwrap()
}

async fn serve(command: Command, folder: &Path, lock: &str) -> Program {
    let program = Program::serve_by(command, folder, &["--dev"], &[("KEYFOLD_MEMORY__LOCK", lock)]).await;
    program.dev_caller(&folder.join("keyfold-data")).encrypt(b"hello", &json!({})).await;
    program
}

#[tokio::test(flavor = "multi_thread")]
async fn where_no_memory_can_be_locked_it_says_so_at_start_and_with_require_it_does_not_start() {
    let folder = tempfile::tempdir().unwrap();
    for kilobytes in ["0", "64"] {
        let ended = refused(with_memory_to_lock(kilobytes), folder.path(), "require").await;
        let said = String::from_utf8_lossy(&ended.stderr);
        assert_eq!(ended.status.code(), Some(1), "{said}");
        let limit: u64 = kilobytes.parse::<u64>().unwrap() * 1_024;
        assert!(said.contains(&format!("limit of locked memory is {limit} bytes")), "{said}");
        assert!(said.contains("LimitMEMLOCK=infinity") && said.contains("memory.lock = \"try\""), "{said}");
        assert!(!folder.path().join("keyfold-data").exists(), "it has done something before it refused");
    }

    let tried = serve(with_memory_to_lock("0"), folder.path(), "try").await;
    assert_eq!(locked_kilobytes(&tried), 0);
    let log = tried.stop().await;
    let (at_start, _) = log.split_once("ready").unwrap();
    assert!(at_start.contains("WARN") && at_start.contains("lock no memory"), "{log}");
    assert_eq!(log.matches("lock").count(), at_start.matches("lock").count(), "it is said once: {log}");

    let off = serve(with_memory_to_lock("0"), folder.path(), "off").await;
    assert_eq!(locked_kilobytes(&off), 0);
    let log = off.stop().await;
    assert!(!log.contains("may reach the swap"), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn where_some_memory_can_be_locked_the_pages_of_data_keys_are() {
    let folder = tempfile::tempdir().unwrap();
    let program = serve(with_memory_to_lock("64"), folder.path(), "try").await;
    let locked = locked_kilobytes(&program);
    assert!((1..=64).contains(&locked), "{locked} kB are locked");
    let log = program.stop().await;
    assert!(log.contains("only the pages that data keys lie on"), "{log}");
    // Two pages, for the case that the first data key lies on two.
    let limit = 2 * region::page::size() as u64 / 1_024;
    let program = serve(with_memory_to_lock(&limit.to_string()), folder.path(), "try").await;
    let caller = program.dev_caller(&folder.path().join("keyfold-data"));
    for n in 0..200 {
        let key = format!("k{n}");
        caller.post("/v1/tenants/dev/keys", &json!({"key": key})).await.ok(201);
        caller.post("/v1/encrypt", &json!({"plaintext": "aGVsbG8=", "key": key})).await.ok(200);
    }
    let locked = locked_kilobytes(&program);
    assert!((1..=limit).contains(&locked), "{locked} kB are locked");
    let log = program.stop().await;
    assert_eq!(log.matches("the system locks no more pages").count(), 1, "{log}");
}

/// Who may lock all he wants, by his limit or by his right to exceed it, has all of it locked.
#[tokio::test(flavor = "multi_thread")]
async fn where_all_memory_can_be_locked_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let unlimited = rustix::process::getrlimit(rustix::process::Resource::Memlock).current.is_none();
    if may(CapabilitySet::IPC_LOCK) || unlimited {
        let program = serve(Command::new(BINARY), folder.path(), "require").await;
        assert!(locked_kilobytes(&program) > 4_096, "{} kB", locked_kilobytes(&program));
        assert!(!program.stop().await.contains("may reach the swap"));
    } else {
        let ended = refused(Command::new(BINARY), folder.path(), "require").await;
        assert_eq!(ended.status.code(), Some(1));
    }
}

/// Runs as somebody who is not the administrator, who may read everything anyway.
pub(crate) fn unprivileged(arguments: &[&str]) -> Command {
    let by = ["setpriv", "--reuid", NOBODY, "--regid", NOBODY, "--clear-groups"];
    let by: &[&str] = if rustix::process::geteuid().is_root() { &by } else { &[] };
    let all = [by, arguments].concat();
    let mut command = Command::new(all[0]);
    command.args(&all[1..]);
    command
}

#[tokio::test(flavor = "multi_thread")]
async fn not_even_its_own_user_can_look_into_its_memory_unless_that_is_switched_on() {
    for (setting, readable) in [(None, false), (Some("true"), false), (Some("false"), true)] {
        let folder = tempfile::tempdir().unwrap();
        // Where the program is built may be closed to others.
        let program = folder.path().join("keyfold");
        std::fs::copy(BINARY, &program).unwrap();
        if rustix::process::geteuid().is_root() {
            let nobody = NOBODY.parse().ok();
            std::os::unix::fs::chown(folder.path(), nobody, nobody).unwrap();
        }
        let variables: Vec<_> =
            setting.map(|value| ("KEYFOLD_MEMORY__NOT_DUMPABLE", value)).into_iter().collect();
        let command = unprivileged(&[program.to_str().unwrap()]);
        let program = Program::serve_by(command, folder.path(), &["--dev"], &variables).await;
        // What /proc/PID/mem asks, without a debugger's further rights.
        let look = unprivileged(&["cat", &format!("/proc/{}/maps", program.id())]).output().await.unwrap();
        assert_eq!(look.status.success(), readable, "{setting:?}: {}", String::from_utf8_lossy(&look.stderr));
        program.stop().await;
    }
}

fn core_limits(process: impl std::fmt::Display) -> Vec<String> {
    let limits = std::fs::read_to_string(format!("/proc/{process}/limits")).unwrap();
    let core = limits.lines().find(|line| line.starts_with("Max core")).unwrap();
    core.split_ascii_whitespace().skip(4).take(2).map(str::to_owned).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn it_leaves_no_core_unless_that_is_switched_on() {
    let folder = tempfile::tempdir().unwrap();
    let program = Program::serve(folder.path(), &["--dev"], &[]).await;
    assert_eq!(core_limits(program.id()), ["0", "0"]);
    program.stop().await;
    let variables = [("KEYFOLD_MEMORY__NO_CORE", "false")];
    let program = Program::serve(folder.path(), &["--dev"], &variables).await;
    assert_eq!(core_limits(program.id()), core_limits("self"));
    program.stop().await;
}

fn core_filter(process: impl std::fmt::Display) -> u32 {
    let filter = std::fs::read_to_string(format!("/proc/{process}/coredump_filter")).unwrap();
    u32::from_str_radix(filter.trim(), 16).unwrap()
}

/// Also where cores are written: who debugs a crash need not have the keys in it.
#[tokio::test(flavor = "multi_thread")]
async fn a_core_holds_none_of_its_memory_unless_that_is_switched_on() {
    assert_ne!(core_filter("self"), 0, "this test could not tell the difference");
    for (setting, expected) in [(None, 0), (Some("true"), 0), (Some("false"), core_filter("self"))] {
        for dumpable in ["false", "true"] {
            let folder = tempfile::tempdir().unwrap();
            let mut variables = vec![("KEYFOLD_MEMORY__NO_CORE", "false")];
            variables.push(("KEYFOLD_MEMORY__NOT_DUMPABLE", dumpable));
            variables.extend(setting.map(|value| ("KEYFOLD_MEMORY__DONT_DUMP", value)));
            let program = Program::serve(folder.path(), &["--dev"], &variables).await;
            assert_eq!(core_filter(program.id()), expected, "{variables:?}");
            let log = program.stop().await;
            assert!(!log.contains("out of a core"), "{log}");
        }
    }
}
