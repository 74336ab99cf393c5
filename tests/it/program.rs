//! The real program, as its users start it.

use std::io::Write as _;
use std::net::SocketAddr;
use std::path::Path;
use std::process::{ExitStatus, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::{Child, Command};
use tokio::task::JoinSet;

use crate::caller::Caller;

pub(crate) const BINARY: &str = env!("CARGO_BIN_EXE_keyfold");
/// Longer than anything takes.
const TIME_MAX: Duration = Duration::from_secs(60);

/// Runs a command of the program to its end, in a folder and with nothing in its environment but `variables`.
pub(crate) fn keyfold(folder: &Path, arguments: &[&str], variables: &[(&str, &str)]) -> Ran {
    keyfold_reading(folder, arguments, variables, b"")
}

/// The same with something to read on its standard input.
pub(crate) fn keyfold_reading(
    folder: &Path,
    arguments: &[&str],
    variables: &[(&str, &str)],
    input: &[u8],
) -> Ran {
    let mut process = std::process::Command::new(BINARY)
        .args(arguments)
        .current_dir(folder)
        .env_clear()
        .envs(variables.iter().copied())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // Who does not read it closes it.
    let _ = process.stdin.take().unwrap().write_all(input);
    Ran(process.wait_with_output().unwrap())
}

/// What a command did.
pub(crate) struct Ran(pub(crate) Output);

impl Ran {
    /// The standard output of a command that must have succeeded.
    #[track_caller]
    pub(crate) fn ok(self) -> String {
        assert!(self.0.status.success(), "{}", self.err());
        String::from_utf8(self.0.stdout).unwrap()
    }

    /// What a command that must have failed said: on the standard error only, without a panic's trace.
    #[track_caller]
    pub(crate) fn refused(self) -> String {
        let err = self.err();
        assert_eq!(self.0.status.code(), Some(1), "{err}");
        assert!(self.0.stdout.is_empty(), "{}", String::from_utf8_lossy(&self.0.stdout));
        assert!(err.starts_with("keyfold: ") && !err.contains("panicked"), "{err}");
        err
    }

    pub(crate) fn err(&self) -> String {
        String::from_utf8_lossy(&self.0.stderr).into_owned()
    }
}

/// `keyfold serve`.
pub(crate) struct Program {
    child: Child,
    pub(crate) address: SocketAddr,
    log: Arc<Mutex<String>>,
    reader: JoinSet<()>,
}

impl Program {
    /// Starts it on a free port, and waits until it is ready.
    pub(crate) async fn serve(folder: &Path, arguments: &[&str], variables: &[(&str, &str)]) -> Self {
        Self::serve_by(Command::new(BINARY), folder, arguments, variables).await
    }

    /// The same by a command that ends in the program's: one that changes its limits or its user first.
    pub(crate) async fn serve_by(
        mut command: Command,
        folder: &Path,
        arguments: &[&str],
        variables: &[(&str, &str)],
    ) -> Self {
        let mut child = command
            .args(["serve", "--listen", "127.0.0.1:0"])
            .args(arguments)
            .current_dir(folder)
            .env_clear()
            .envs(variables.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let log: Arc<Mutex<String>> = Arc::default();
        let mut address = None;
        let ready = async {
            while address.is_none() {
                let line = lines.next_line().await.unwrap();
                let line = line.unwrap_or_else(|| panic!("it did not start: {}", log.lock().unwrap()));
                if line.contains("ready") {
                    address = address_in(&line);
                }
                let mut log = log.lock().unwrap();
                log.push_str(&line);
                log.push('\n');
            }
        };
        tokio::time::timeout(TIME_MAX, ready).await.unwrap();
        let (mut reader, sink) = (JoinSet::new(), Arc::clone(&log));
        reader.spawn(async move {
            while let Ok(Some(line)) = lines.next_line().await {
                let mut log = sink.lock().unwrap();
                log.push_str(&line);
                log.push('\n');
            }
        });
        Self { child, address: address.unwrap(), log, reader }
    }

    /// A caller without a credential.
    pub(crate) fn anonymous(&self) -> Caller {
        Caller::new(self.address, None)
    }

    /// A caller with the token of `--dev`, which is in a file.
    pub(crate) fn dev_caller(&self, data_dir: &Path) -> Caller {
        let token = std::fs::read_to_string(data_dir.join("dev-api-key")).unwrap();
        self.anonymous().with_token(token.trim_end())
    }

    /// Its process.
    pub(crate) fn id(&self) -> u32 {
        self.child.id().unwrap()
    }

    /// What it has written to its standard error so far.
    pub(crate) fn log(&self) -> String {
        self.log.lock().unwrap().clone()
    }

    /// Sends it a signal.
    pub(crate) fn signal(&self, signal: Signal) {
        let id = i32::try_from(self.child.id().unwrap()).unwrap();
        kill_process(Pid::from_raw(id).unwrap(), signal).unwrap();
    }

    /// Waits for its end, and gives all that it has written.
    pub(crate) async fn ended(mut self) -> (ExitStatus, String) {
        let status = tokio::time::timeout(TIME_MAX, self.child.wait()).await;
        let status = status.unwrap_or_else(|_| panic!("it does not end: {}", self.log())).unwrap();
        while self.reader.join_next().await.is_some() {}
        (status, self.log())
    }

    /// Ends it softly.
    pub(crate) async fn stop(self) -> String {
        self.signal(Signal::TERM);
        let (status, log) = self.ended().await;
        assert!(status.success(), "{status}: {log}");
        log
    }
}

fn address_in(line: &str) -> Option<SocketAddr> {
    let start = line.find("127.0.0.1:")?;
    let text = &line[start..];
    let end =
        text.find(|char: char| !char.is_ascii_digit() && char != '.' && char != ':').unwrap_or(text.len());
    text[..end].parse().ok()
}
