//! Files that may be somebody else's work: the key ring and the audit trail.

use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::sync::LazyLock;

use keyfold::access::Principal;
use keyfold::audit::{self, Verifier};
use keyfold::clock::Clock;
use keyfold::kms::local::{LocalKeyRing, Protection};
use tempfile::TempDir;
use tokio::runtime::{Builder, Runtime};

use super::service;

struct Scratch {
    runtime: Runtime,
    folder: TempDir,
}

static SCRATCH: LazyLock<Scratch> = LazyLock::new(|| Scratch {
    runtime: Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap(),
    folder: TempDir::new().unwrap(),
});

/// A key ring without encryption: it opens or is refused, and is left as it is.
pub fn key_ring(bytes: &[u8]) {
    let path = SCRATCH.folder.path().join("keyring");
    write(&path, bytes);
    let opened = SCRATCH.runtime.block_on(async {
        let ring = LocalKeyRing::open(&path, Protection::Dev, Clock::manual(service::START)).await?;
        ring.list().await
    });
    assert_eq!(std::fs::read(&path).unwrap(), bytes, "reading has changed it");
    if opened.is_ok() {
        assert!(LocalKeyRing::is_unencrypted(&path));
    }
}

fn write(path: &Path, bytes: &[u8]) {
    let mut options = std::fs::OpenOptions::new();
    let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(path).unwrap();
    file.write_all(bytes).unwrap();
}

pub fn key_ring_seeds() -> Vec<Vec<u8>> {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("keyring");
    SCRATCH.runtime.block_on(async {
        let clock = Clock::manual(service::START);
        let ring = LocalKeyRing::create(&path, Protection::Dev, clock).await.unwrap();
        let empty = std::fs::read(&path).unwrap();
        ring.add("local:one").await.unwrap();
        ring.rotate("local:one").await.unwrap();
        ring.add("local:two").await.unwrap();
        ring.disable("local:two").await.unwrap();
        vec![empty, std::fs::read(&path).unwrap()]
    })
}

/// The genuine trail that the mutations are of: one, since each has its own times and codes.
static TRAIL: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let service = service::started();
    let operator = Principal::local_operator();
    service.runtime.block_on(async {
        for name in ["one", "two", "three"] {
            let operate = operator.permit_operate().unwrap();
            let ring = keyfold::tenant::KekRing::new(vec![keyfold::tenant::Kek::direct(
                service::KEK.parse().unwrap(),
            )]);
            service
                .operations
                .create_tenant(&operate, format!("trail-{name}").parse().unwrap(), ring.unwrap())
                .await
                .unwrap();
        }
        assert!(service.audit.flush().await);
    });
    std::fs::read(service.folder.path().join("audit.jsonl")).unwrap()
});

/// A trail line by line: only the genuine one's own lines, in their order, are believed.
pub fn audit_trail(bytes: &[u8]) {
    let keys = service::audit_keys();
    let mut verifier = Verifier::new(&keys, Vec::new());
    let mut believed = Vec::new();
    for line in bytes.split_inclusive(|byte| *byte == b'\n') {
        if verifier.line(line).is_err() {
            break;
        }
        believed.extend_from_slice(line);
    }
    let _ = verifier.end();
    let _ = audit::Link::from_anchor(&String::from_utf8_lossy(bytes));
    // A trail whose first files were given away begins later: with a line that says so, of which there is none here.
    assert!(TRAIL.starts_with(&believed), "{}", String::from_utf8_lossy(&believed));
}

pub fn audit_seeds() -> Vec<Vec<u8>> {
    vec![TRAIL.clone()]
}
