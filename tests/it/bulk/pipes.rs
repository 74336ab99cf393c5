//! `keyfold encrypt|decrypt|rewrap` in pipes: what comes in by standard input, and how it ends when nothing comes.

use std::fs;
use std::io::Write as _;
use std::os::unix::net::UnixStream;
use std::process::{Output, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use tokio::io::AsyncWriteExt as _;
use tokio::process::Child;

use super::files::{Desk, data_dir_of};
use super::{all_transfers_end, noise};
use crate::program::BINARY;
use crate::service::{KEK, World};

/// Longer than anything takes.
const TIME_MAX: Duration = Duration::from_secs(60);

/// Its end, which must come although its standard input stays open.
async fn ended(mut child: Child) -> Output {
    let stdin = child.stdin.take();
    let output = tokio::time::timeout(TIME_MAX, child.wait_with_output()).await;
    let output = output.expect("it waits for an input that never comes").unwrap();
    drop(stdin);
    output
}

fn signal(child: &Child, signal: Signal) {
    let id = i32::try_from(child.id().unwrap()).unwrap();
    kill_process(Pid::from_raw(id).unwrap(), signal).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rewrap_in_a_pipe_loses_nothing() {
    let world = World::new().await;
    let service = world.start_without_keeper().await;
    let desk = Desk::at(&service).await;
    let data = data_dir_of(&world, &desk);
    let offline = format!("--data-dir {} --kek {KEK}", data.display());
    // Less than one piece, and many: what is read while the head is looked for is the beginning of the rest.
    for bytes in [100, 3_000_000] {
        let message = noise(bytes);
        let sealed = desk.ok_with("encrypt", &message).await;
        let compact = desk.ok_with("encrypt --envelope compact", &message).await;
        assert!(desk.ok_with("rewrap", &sealed).await == sealed, "what is up to date passes through");
        desk.ok_with("rewrap - -o out --force", &sealed).await;
        assert!(fs::read(desk.path("out")).unwrap() == sealed);
        desk.write("in", &sealed);
        desk.ok("rewrap in -o out --force").await;
        assert!(fs::read(desk.path("out")).unwrap() == sealed);
        // Another head.
        let embedded = desk.ok_with("rewrap", &compact).await;
        assert!(!envelope::inspect(&embedded).unwrap().wrapped().is_compact());
        assert!(desk.ok_with("decrypt", &embedded).await == message);
        desk.ok_with("rewrap -o out --force", &compact).await;
        assert!(fs::read(desk.path("out")).unwrap().len() == embedded.len());
        // The same by hand of its user.
        let direct = desk.ok_with(&format!("rewrap {offline}"), &sealed).await;
        assert!(desk.ok_with("decrypt", &direct).await == message);
        desk.ok_with(&format!("rewrap -o out --force {offline}"), &sealed).await;
        assert!(desk.ok_with(&format!("decrypt out -o - {offline}"), b"").await == message);
        // A retired data key: all of it is renewed.
        world.pass(25 * 3_600);
        let renewed = desk.ok_with("rewrap", &sealed).await;
        let dek = |bytes: &[u8]| envelope::inspect(bytes).unwrap().dek_id();
        assert!(dek(&renewed) != dek(&sealed));
        assert!(desk.ok_with("decrypt", &renewed).await == message);
        desk.ok_with("rewrap -o out --force", &sealed).await;
        assert!(desk.ok("decrypt out -o -").await == message);
    }
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_early_refusal_ends_it_though_its_input_is_silent() {
    let world = World::new().await;
    let service = world.start().await;
    let desk = Desk::with(format!("http://{}", service.address), "kf_no_key".to_owned());
    let output = ended(desk.start(&[], "encrypt", Stdio::piped())).await;
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{told}");
    assert!(told.contains("unauthenticated"), "{told}");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signal_ends_it_though_its_input_is_silent_and_leaves_what_was_there() {
    let world = World::new().await;
    let service = world.start().await;
    let desk = Desk::at(&service).await;
    desk.write("out", b"before");
    for what in [Signal::INT, Signal::TERM, Signal::HUP] {
        let mut child = desk.start(&[], "encrypt -o out --force", Stdio::piped());
        // More than the service holds back: some of the result is there.
        child.stdin.as_mut().unwrap().write_all(&noise(4_000_000)).await.unwrap();
        desk.partly_written().await;
        signal(&child, what);
        let output = ended(child).await;
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{what:?}: {told}");
        assert!(told.contains("interrupted"), "{told}");
        assert_eq!(desk.names(), ["out"], "{what:?} leaves a temporary file");
        assert_eq!(fs::read(desk.path("out")).unwrap(), b"before");
    }
    all_transfers_end(&service).await;
    service.stop().await;
}

/// `nohup keyfold ... &` goes on when its terminal is closed.
#[tokio::test(flavor = "multi_thread")]
async fn a_signal_that_it_was_started_to_ignore_does_not_end_it() {
    let world = World::new().await;
    let service = world.start().await;
    let desk = Desk::at(&service).await;
    let nohup = ["sh", "-c", "trap '' HUP; exec \"$0\" \"$@\""];
    let mut child = desk.start(&nohup, "encrypt -o out", Stdio::piped());
    child.stdin.as_mut().unwrap().write_all(&noise(4_000_000)).await.unwrap();
    desk.partly_written().await;
    signal(&child, Signal::HUP);
    drop(child.stdin.take());
    let output = ended(child).await;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    desk.ok("decrypt out -o message").await;
    assert!(fs::read(desk.path("message")).unwrap() == noise(4_000_000));
    service.stop().await;
}

/// Node's child_process gives its children sockets.
#[tokio::test(flavor = "multi_thread")]
async fn standard_input_may_be_a_socket_or_the_rest_of_a_file() {
    let world = World::new().await;
    let service = world.start().await;
    let desk = Desk::at(&service).await;
    let (theirs, mut ours) = UnixStream::pair().unwrap();
    let child = desk.start(&[], "encrypt -o out", Stdio::from(std::os::fd::OwnedFd::from(theirs)));
    ours.write_all(b"hello").unwrap();
    drop(ours);
    let output = ended(child).await;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(desk.ok("decrypt out -o -").await, b"hello");
    // `(read line; keyfold encrypt) < file`: what was read already is not its own.
    desk.write("file", b"line\nhello");
    let script = ["sh", "-c", "exec < file; read -r line; exec \"$0\" \"$@\""];
    let output = ended(desk.start(&script, "encrypt -o rest", Stdio::null())).await;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(desk.ok("decrypt rest -o -").await, b"hello");
    service.stop().await;
}

/// On a terminal there is a bar; where nobody looks, there is none.
#[tokio::test(flavor = "multi_thread")]
async fn progress_is_drawn_on_a_terminal_and_nowhere_else() {
    let world = World::new().await;
    let service = world.start().await;
    let desk = Desk::at(&service).await;
    desk.write("report.pdf", &noise(7_000_000));
    let output = desk.run("encrypt report.pdf -o piped", b"").await;
    assert!(output.status.success() && output.stderr.is_empty() && output.stdout.is_empty());
    // A terminal of its own, whose screen is what `script` gives out.
    let on_terminal = ["env", "TERM=xterm", "script", "-qec"];
    let command = format!("{BINARY} encrypt report.pdf -o shown");
    let mut whole = on_terminal.to_vec();
    whole.extend([command.as_str(), "/dev/null"]);
    let output = ended(desk.start_as(&whole, Stdio::null())).await;
    let screen = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{screen}");
    assert!(screen.contains("report.pdf") && screen.contains("/6.68 MiB"), "{screen:?}");
    assert!(desk.path("shown").exists());
    service.stop().await;
}
