//! The transcripts of README.md, run against a fresh server of the real program.

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// The address that the README uses.
const README_ADDRESS: &str = "127.0.0.1:8600";
const BINARY: &str = env!("CARGO_BIN_EXE_keyfold");

/// A command and what it printed.
struct Exchange {
    command: String,
    output: String,
}

#[test]
fn the_transcripts_of_the_readme_are_true() {
    let readme = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md")).unwrap();
    let exchanges = exchanges(&readme);
    assert!(exchanges.len() >= 6, "the README shows {} commands", exchanges.len());
    let folder = tempfile::tempdir().unwrap();
    let server = Server::start(folder.path());
    // One shell for all of it: later commands use what earlier ones have set.
    let mut script = String::from("set -eu\n");
    for exchange in &exchanges {
        script += &exchange.command.replace(README_ADDRESS, &server.address);
        script += &format!("\nprintf '\\n{SEPARATOR}\\n'\n");
    }
    let ran = Command::new("bash").args(["-c", &script]).current_dir(folder.path()).output().unwrap();
    assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
    let printed = String::from_utf8(ran.stdout).unwrap();
    for (exchange, printed) in exchanges.iter().zip(printed.split(SEPARATOR)) {
        assert_eq!(alike(printed), alike(&exchange.output), "{}\nprinted:\n{printed}", exchange.command);
    }
}

const SEPARATOR: &str = "--- next ---";

/// What stands in the blocks marked `console`: `$ ` begins a command, a `\` at the end of a line goes on with it.
fn exchanges(text: &str) -> Vec<Exchange> {
    let mut exchanges: Vec<Exchange> = vec![];
    let (mut inside, mut goes_on) = (false, false);
    for line in text.lines() {
        if line.starts_with("```") {
            inside = line == "```console";
            continue;
        }
        if !inside {
            continue;
        }
        if let Some(command) = line.strip_prefix("$ ") {
            exchanges.push(Exchange { command: command.to_owned(), output: String::new() });
            goes_on = command.ends_with('\\');
        } else if let Some(last) = exchanges.last_mut() {
            let text = if goes_on { &mut last.command } else { &mut last.output };
            *text += "\n";
            *text += line;
            goes_on = goes_on && line.ends_with('\\');
        }
    }
    exchanges
}

/// The text with what differs from run to run made the same: envelopes, ids of data keys and of requests.
fn alike(text: &str) -> String {
    let mut before = "";
    let parts = text.trim().split('"').map(|part| {
        let same = if part.starts_with("kf1.") {
            "(envelope)"
        } else if part.parse::<uuid::Uuid>().is_ok() {
            "(dek id)"
        } else if before == "request_id" {
            "(request id)"
        } else {
            part
        };
        if part != ":" {
            before = part;
        }
        same
    });
    parts.collect::<Vec<_>>().join("\"")
}

/// `keyfold serve --dev` in a folder of its own; ended with the test.
struct Server {
    process: Child,
    address: String,
}

impl Server {
    fn start(folder: &Path) -> Self {
        let mut process = Command::new(BINARY)
            .args(["serve", "--dev", "--listen", "127.0.0.1:0"])
            .current_dir(folder)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(process.stderr.take().unwrap()).lines();
        let address = lines.find_map(|line| {
            let line = line.unwrap();
            let address = line.split_once(" on http://")?.1.split_whitespace().next()?;
            Some(address.to_owned())
        });
        // Read on, so that the server never waits for its log to be read.
        std::thread::spawn(move || lines.for_each(drop));
        Self { process, address: address.expect("keyfold said no address") }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}
