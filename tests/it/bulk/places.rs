//! Where `keyfold encrypt|decrypt|rewrap` puts its results, and what it leaves alone.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown, symlink};
use std::process::Stdio;

use tokio::io::AsyncWriteExt as _;

use super::files::Desk;
use super::noise;
use crate::hardening::{NOBODY, unprivileged};
use crate::program::BINARY;
use crate::service::World;

/// Under any name that the system takes, and although a run that was killed has left its temporary file: in a container
/// every run may be process 1.
#[tokio::test(flavor = "multi_thread")]
async fn what_an_earlier_run_left_and_long_names_are_in_nobodys_way() {
    let world = World::new().await;
    let service = world.start().await;
    let desk = Desk::at(&service).await;
    desk.write("a", b"hello");
    let long = "n".repeat(255);
    desk.ok(&format!("encrypt a -o {long}")).await;
    assert_eq!(desk.ok(&format!("decrypt {long} -o -")).await, b"hello");
    let again = ["sh", "-c", "touch .a.kf.keyfold-$$; exec \"$0\" \"$@\""];
    let output = desk.start(&again, "encrypt a", Stdio::null()).wait_with_output().await.unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(desk.ok("decrypt a.kf -o -").await, b"hello");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_that_somebody_takes_meanwhile_stays_his() {
    let world = World::new().await;
    let service = world.start().await;
    let desk = Desk::at(&service).await;
    let mut child = desk.start(&[], "encrypt -o out", Stdio::piped());
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(&noise(4_000_000)).await.unwrap();
    desk.partly_written().await;
    desk.write("out", b"his");
    drop(stdin);
    let output = child.wait_with_output().await.unwrap();
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && told.contains("there already"), "{told}");
    assert_eq!(fs::read(desk.path("out")).unwrap(), b"his");
    assert_eq!(desk.names(), ["out"]);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rewrap_in_place_goes_through_a_symbolic_link_and_keeps_the_owner() {
    let world = World::new().await;
    let service = world.start_without_keeper().await;
    let desk = Desk::at(&service).await;
    let file = desk.write("store/a", b"hello");
    desk.ok("encrypt store/a").await;
    fs::remove_file(file).unwrap();
    symlink("store/a.kf", desk.path("link.kf")).unwrap();
    let before = fs::read(desk.path("store/a.kf")).unwrap();
    let root = rustix::process::geteuid().is_root();
    if root {
        chown(desk.path("store/a.kf"), Some(1234), Some(4321)).unwrap();
    }
    world.pass(25 * 3_600);
    desk.ok("rewrap link.kf").await;
    assert!(desk.path("link.kf").is_symlink());
    assert!(fs::read(desk.path("store/a.kf")).unwrap() != before);
    assert_eq!(desk.ok("decrypt link.kf -o -").await, b"hello");
    let owner = fs::metadata(desk.path("store/a.kf")).unwrap();
    assert!(!root || (owner.uid(), owner.gid()) == (1234, 4321));
    service.stop().await;
}

/// A result belongs to whoever made it: what its source might have done in another's name, it must not do in his.
#[tokio::test(flavor = "multi_thread")]
async fn a_result_runs_in_nobody_elses_name() {
    let world = World::new().await;
    let service = world.start().await;
    let desk = Desk::at(&service).await;
    let file = desk.write("a", b"#!/bin/sh");
    desk.ok("encrypt a").await;
    fs::remove_file(file).unwrap();
    fs::set_permissions(desk.path("a.kf"), fs::Permissions::from_mode(0o6755)).unwrap();
    desk.ok("decrypt a.kf").await;
    assert_eq!(fs::metadata(desk.path("a")).unwrap().permissions().mode() & 0o7777, 0o755);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_that_cannot_be_read_is_one_failure_of_the_report() {
    let world = World::new().await;
    let service = world.start().await;
    let desk = Desk::at(&service).await;
    for name in ["in/a", "in/closed/b", "in/open/c"] {
        desk.write(name, name.as_bytes());
    }
    if rustix::process::geteuid().is_root() {
        let nobody = NOBODY.parse().ok();
        for name in ["", "in", "in/a", "in/closed", "in/open", "in/open/c"] {
            chown(desk.path(name), nobody, nobody).unwrap();
        }
    }
    // Where the program is built may be closed to others.
    let program = desk.path("keyfold");
    fs::copy(BINARY, &program).unwrap();
    let closed =
        |mode| fs::set_permissions(desk.path("in/closed"), fs::Permissions::from_mode(mode)).unwrap();
    closed(0o000);
    let mut command = unprivileged(&[program.to_str().unwrap(), "encrypt", "-r", "in"]);
    desk.surround(&mut command);
    let output = command.output().await.unwrap();
    closed(0o755);
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{told}");
    assert!(told.contains("2 written, 0 up to date, 0 skipped, 1 failed"), "{told}");
    assert!(told.contains("in/closed"), "{told}");
    assert!(desk.path("in/a.kf").exists() && desk.path("in/open/c.kf").exists());
    service.stop().await;
}
