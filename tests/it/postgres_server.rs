//! A PostgreSQL server of a test's own: Debian's, in a temporary folder, reached through a socket there.

use std::os::unix::fs::{PermissionsExt as _, chown};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use sqlx::postgres::PgConnectOptions;
use sqlx::{Connection as _, PgConnection};
use tempfile::TempDir;

/// A server that runs as long as this is held.
pub(crate) struct PostgresServer {
    child: Child,
    folder: TempDir,
}

impl PostgresServer {
    pub(crate) async fn start() -> Self {
        let bin = binaries();
        let folder = tempfile::Builder::new().prefix("kf-pg").tempdir_in("/tmp").unwrap();
        let data = folder.path().join("data");
        std::fs::create_dir(&data).unwrap();
        let user = unprivileged();
        // Others than root must get through to it.
        std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        if let Some((uid, gid)) = user {
            chown(folder.path(), Some(uid), Some(gid)).unwrap();
            chown(&data, Some(uid), Some(gid)).unwrap();
        }
        let command = |name: &str| {
            let mut command = Command::new(bin.join(name));
            command.current_dir(folder.path()).env_clear().env("LC_ALL", "C").stdin(Stdio::null());
            if let Some((uid, gid)) = user {
                command.uid(uid).gid(gid);
            }
            command.arg("-D").arg(&data);
            command
        };
        let initdb = ["--auth=trust", "--username=kf", "--no-sync", "--locale=C", "--encoding=UTF8"];
        let made = command("initdb").args(initdb).output().unwrap();
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        let log = std::fs::File::create(folder.path().join("log")).unwrap();
        let mut server = command("postgres");
        server.arg("-k").arg(folder.path()).args(["-c", "listen_addresses=", "-c", "fsync=off"]);
        let child = server.stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap();
        let server = Self { child, folder };
        for _ in 0..600 {
            if PgConnection::connect(&server.url()).await.is_ok() {
                return server;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("it does not start: {}", std::fs::read_to_string(server.folder.path().join("log")).unwrap());
    }

    /// Its database, for those who may do everything with it.
    pub(crate) fn url(&self) -> String {
        let folder = self.folder.path().to_str().unwrap().replace('/', "%2F");
        format!("postgres://kf@{folder}/postgres")
    }

    pub(crate) async fn connect(&self) -> PgConnection {
        let options: PgConnectOptions = self.url().parse().unwrap();
        PgConnection::connect_with(&options).await.unwrap()
    }
}

impl Drop for PostgresServer {
    fn drop(&mut self) {
        let id = i32::try_from(self.child.id()).unwrap();
        // At once, without waiting for those who are connected.
        let _ = kill_process(Pid::from_raw(id).unwrap(), Signal::QUIT);
        let _ = self.child.wait();
    }
}

/// The newest that Debian has put here.
fn binaries() -> PathBuf {
    let versions = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let found = versions.map(|version| version.path().join("bin")).filter(|bin| bin.join("initdb").exists());
    let number =
        |bin: &PathBuf| bin.parent().and_then(Path::file_name).and_then(|v| v.to_str()?.parse::<u32>().ok());
    found.max_by_key(number).expect("install Debian's package postgresql: scripts/test does")
}

/// Whom it runs as: PostgreSQL refuses to be root.
fn unprivileged() -> Option<(u32, u32)> {
    if !rustix::process::geteuid().is_root() {
        return None;
    }
    let users = std::fs::read_to_string("/etc/passwd").unwrap();
    let user = |name: &str| {
        let mut fields = users.lines().map(|line| line.split(':').collect::<Vec<_>>());
        let user = fields.find(|fields| fields[0] == name)?;
        Some((user[2].parse().ok()?, user[3].parse().ok()?))
    };
    user("postgres").or_else(|| user("nobody"))
}
