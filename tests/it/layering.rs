//! The rooms of the house and which may know which: ARCHITECTURE.md gives the reasons, this file holds the code to it.

#[path = "layering/paths.rs"]
mod paths;

use std::collections::BTreeSet;
use std::path::Path;

use paths::{Named, Source, sources};

/// A room, and what of the other rooms it may name: a whole room, or single items of it.
struct Room(&'static str, &'static [&'static str]);

/// In layer order: a room may only name rooms above it, and only those said here.
const ROOMS: &[Room] = &[
    // Words.
    Room("clock", &[]),
    Room("tenant", &[]),
    Room("quota", &["clock"]),
    Room("spread", &[]),
    // What we rely on.
    Room("kms", &["clock", "tenant"]),
    Room("store", &["clock", "tenant"]),
    // Who, and what they did.
    Room("audit", &["clock", "spread", "store", "tenant"]),
    Room("access", &["audit", "clock", "spread", "store", "tenant"]),
    // The work.
    Room("pool", &["clock", "kms", "quota", "spread", "store", "tenant"]),
    Room("operations", &["access", "audit", "clock", "kms::KmsError", "pool", "store", "tenant"]),
    Room("rotation", &["audit", "clock", "kms", "pool", "store", "tenant"]),
    // The edge.
    Room(
        "http",
        &[
            "access",
            "operations",
            "quota",
            "rotation",
            "spread",
            "tenant",
            "audit::PartTally",
            "audit::Stranger",
            "audit::Tally",
            "clock",
            "kms::KmsError",
            "pool::PoolError",
            "store::ApiKeyRecord",
            "store::EnvelopeWeight",
            "store::GrantCondition",
            "store::GrantRecord",
            "store::GrantScope",
            "store::JobRecord",
            "store::KeyPolicy",
            "store::KeyRecord",
            "store::ShredRecord",
            "store::Status",
            "store::StoreError",
            "store::StoredDek",
            "store::Target",
            "store::TenantRecord",
        ],
    ),
    // The users' insurance: files and a KMS, without the service.
    Room("offline", &["clock::Timestamp", "kms", "tenant"]),
    // Assembly.
    Room("telemetry", &[]),
    Room("lifecycle", &[]),
    Room(
        "config",
        &["access", "audit", "http", "kms", "operations", "pool", "rotation", "store", "telemetry", "tenant"],
    ),
    Room(
        "app",
        &[
            "access",
            "audit",
            "clock",
            "config",
            "http",
            "kms",
            "lifecycle",
            "operations",
            "pool",
            "rotation",
            "spread::Apart",
            "store",
            "telemetry",
            "tenant",
        ],
    ),
    Room(
        "cli",
        &[
            "access::Presented",
            "access::Principal",
            "access::client_cert",
            "access::granted",
            "access::rules",
            "audit",
            "app",
            "clock",
            "config",
            "http",
            "kms::KekState",
            "kms::local",
            "lifecycle",
            "offline",
            "operations",
            "spread::Near",
            "store",
            "telemetry",
            "tenant",
        ],
    ),
];

/// A crate, or a part of one, that is used only in these rooms.
struct Guarded(&'static str, &'static [&'static str]);

const GUARDED: &[Guarded] = &[
    // A plaintext data key is the pool's, and for a moment the KMS's and the verb's; never the registry's or the edge's.
    Guarded("envelope::DataKey", &["offline", "kms", "pool", "operations"]),
    // What a ciphertext is, is decided in one crate: the service has no cipher of its own.
    Guarded("aes_gcm", &["kms"]),
    Guarded(
        "envelope",
        &["kms", "store", "audit", "access", "pool", "operations", "rotation", "http", "offline", "cli"],
    ),
    Guarded("argon2", &["kms"]),
    Guarded("hmac", &["audit", "access"]),
    Guarded("sha2", &["audit", "access", "kms"]),
    Guarded("subtle", &["audit", "access"]),
    Guarded("aws_config", &["kms"]),
    Guarded("aws_sdk_kms", &["kms"]),
    Guarded("aws_sdk_sts", &["kms"]),
    Guarded("aws_smithy_http_client", &["kms"]),
    Guarded("regex", &["access", "config", "http"]),
    Guarded("region", &["pool"]),
    Guarded("rustix", &["kms", "http", "app", "cli"]),
    // cli: the tables of users that `keyfold reencrypt` goes through, which are no registry of ours.
    Guarded("sqlx", &["store", "cli"]),
    Guarded("csv", &["cli"]),
    Guarded("moka", &["quota", "access", "pool"]),
    Guarded("arc_swap", &["access", "pool"]),
    Guarded("papaya", &["access", "kms", "pool", "store"]),
    Guarded("axum", &["http", "app"]),
    Guarded("axum_server", &["http"]),
    Guarded("http_body", &["http"]),
    Guarded("http_body_util", &["http"]),
    Guarded("hyper", &["http"]),
    Guarded("hyper_util", &["http"]),
    Guarded("pin_project_lite", &["http"]),
    Guarded("memchr", &["http"]),
    Guarded("sfv", &["http"]),
    Guarded("indicatif", &["cli"]),
    Guarded("ipnet", &["config", "http"]),
    // Who is calling is decided in access: what a certificate or a token is worth, and whose it is.
    Guarded("rustls", &["access", "audit", "http"]),
    Guarded("webpki", &["access"]),
    Guarded("rustls_native_certs", &["access", "audit"]),
    Guarded("jsonwebtoken", &["access"]),
    // audit sends its records to a collector.
    Guarded("reqwest", &["access", "audit", "cli"]),
    Guarded("rcgen", &["http"]),
    Guarded("tower", &["http"]),
    Guarded("utoipa", &["http"]),
    Guarded("utoipa_axum", &["http"]),
    Guarded("utoipa_swagger_ui", &["http"]),
    Guarded("serde_json", &["access", "audit", "http", "kms", "store", "cli"]),
    Guarded("base64", &["access", "http", "cli"]),
    // What single calls go through; base64 is slower, and knows more alphabets.
    Guarded("base64_turbo", &["http"]),
    Guarded("smol_str", &["tenant", "http"]),
    Guarded("arrayvec", &["access"]),
    Guarded("tracing_subscriber", &["telemetry"]),
    Guarded("mimalloc", &["main"]),
    Guarded("zeroizing_alloc", &["main"]),
    Guarded("config", &["config"]),
    Guarded("toml", &["config"]),
    Guarded("secrecy", &["config", "kms", "app"]),
    Guarded("clap", &["cli"]),
    Guarded("anyhow", &["telemetry", "app", "cli"]),
    Guarded(
        "tokio",
        &[
            "clock",
            "kms",
            "store",
            "audit",
            "access",
            "pool",
            "operations",
            "rotation",
            "http",
            "lifecycle",
            "app",
            "cli",
        ],
    ),
    Guarded(
        "tokio_util",
        &["access", "audit", "kms", "pool", "operations", "rotation", "http", "lifecycle", "app", "cli"],
    ),
    Guarded("std::env", &["config"]),
    // access and http read certificates, keys and tokens that change while they run.
    Guarded("std::fs", &["access", "kms", "store", "audit", "http", "config", "app", "cli"]),
    Guarded("std::net", &["access", "audit", "http", "config", "cli"]),
    Guarded("std::thread::spawn", &[]),
    Guarded("std::thread::Builder", &["audit"]),
    Guarded("std::process", &["main", "config", "cli"]),
];

/// Crates that any room may use: they do no I/O and decide nothing.
const FREE: &[&str] = &[
    "async_trait",
    "bytes",
    "getrandom",
    "http",
    "serde",
    "thiserror",
    "time",
    "tracing",
    "uuid",
    "zeroize",
];

/// What the pure core may not name: it does no I/O, is not asynchronous and asks no clock.
const NOT_IN_ENVELOPE: &[&str] = &[
    "tokio",
    "futures",
    "async_trait",
    "tracing",
    "std::env",
    "std::fs",
    "std::io",
    "std::net",
    "std::os",
    "std::process",
    "std::thread",
    "std::time",
];

/// Names that say nothing about what is inside.
const NAMELESS: &[&str] = &["util", "utils", "common", "helper", "helpers", "types", "core", "misc"];

#[test]
fn a_room_knows_only_the_rooms_that_it_may() {
    let mut wrong = vec![];
    for source in sources("src") {
        let room = room_of(&source);
        for named in &source.paths {
            let Some(target) = other_room(&source, named) else { continue };
            let rights = ROOMS.iter().find(|Room(name, _)| *name == room).map_or(&[][..], |Room(_, r)| *r);
            let allowed =
                room == "lib" || room == "main" || rights.iter().any(|right| covers(right, &target));
            if !allowed && !target.starts_with(&format!("{room}::")) && target != room {
                wrong.push(at(&source, named, &format!("the room '{room}' may not import '{target}'")));
            }
        }
    }
    report(&wrong);
}

#[test]
fn a_guarded_crate_is_used_only_where_it_may_be() {
    let mut wrong = vec![];
    for source in sources("src") {
        let room = room_of(&source);
        for named in &source.paths {
            let guarded = GUARDED.iter().find(|Guarded(name, _)| named.is_under(name));
            if let Some(Guarded(name, rooms)) = guarded
                && !rooms.contains(&room.as_str())
            {
                wrong.push(at(&source, named, &format!("the room '{room}' may not use '{name}'")));
            }
        }
    }
    report(&wrong);
}

#[test]
fn every_dependency_is_guarded_or_free() {
    let text = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml")).unwrap();
    let manifest: toml::Table = text.parse().unwrap();
    let known: BTreeSet<&str> =
        GUARDED.iter().map(|Guarded(name, _)| *name).chain(FREE.iter().copied()).collect();
    let unknown: Vec<String> = manifest["dependencies"]
        .as_table()
        .unwrap()
        .keys()
        .map(|name| name.replace('-', "_"))
        .filter(|name| !known.contains(name.as_str()))
        .collect();
    assert!(unknown.is_empty(), "say in tests/it/layering.rs where these may be used: {unknown:?}");
}

#[test]
fn the_envelope_crate_does_no_io_and_asks_no_clock() {
    let mut wrong = vec![];
    for source in sources("crates/envelope/src") {
        for named in &source.paths {
            if let Some(name) = NOT_IN_ENVELOPE.iter().find(|name| named.is_under(name)) {
                wrong.push(at(&source, named, &format!("the envelope crate may not use '{name}'")));
            }
        }
        for (line, word) in &source.words {
            if word == "async" {
                wrong.push(format!(
                    "{}:{line}: the envelope crate is not asynchronous",
                    source.path.display()
                ));
            }
        }
    }
    report(&wrong);
}

#[test]
fn the_rooms_are_declared_in_layer_order_and_none_is_forgotten() {
    let lib = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/lib.rs")).unwrap();
    let declared: Vec<&str> =
        lib.lines().filter_map(|line| line.strip_prefix("pub mod ")?.strip_suffix(';')).collect();
    let in_table = ROOMS.iter().map(|Room(name, _)| *name);
    let expected: Vec<&str> = in_table.filter(|name| declared.contains(name)).collect();
    assert_eq!(declared, expected, "src/lib.rs declares the rooms in the order of the table");
    for (place, Room(name, rights)) in ROOMS.iter().enumerate() {
        for right in *rights {
            let above = ROOMS[..place].iter().any(|Room(other, _)| *other == room_in(right));
            assert!(above, "{name} -> {right} does not point up in the table");
        }
    }
}

/// ARCHITECTURE.md has the same table, with what belongs in each room.
#[test]
fn the_architectures_table_is_this_one() {
    let page =
        std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("ARCHITECTURE.md")).unwrap();
    let rows = page.lines().skip_while(|line| !line.starts_with("| room |")).skip(2);
    let rows: Vec<String> = rows.take_while(|line| line.starts_with('|')).map(str::to_owned).collect();
    let expected: Vec<(&str, String)> = ROOMS
        .iter()
        .map(|Room(name, rights)| {
            let mut rights: Vec<String> = rights
                .iter()
                .map(|right| match right.split_once("::") {
                    Some((room, _)) => format!("`{room}` (single items)"),
                    None => format!("`{right}`"),
                })
                .collect();
            rights.dedup();
            let rights = if rights.is_empty() { "-".to_owned() } else { rights.join(", ") };
            (*name, rights)
        })
        .collect();
    assert_eq!(rows.len(), expected.len(), "ARCHITECTURE.md has a row for each room");
    for (row, (name, rights)) in rows.iter().zip(&expected) {
        let cells: Vec<&str> = row.trim_matches('|').split('|').map(str::trim).collect();
        assert_eq!(cells[0], format!("`{name}`"), "the rooms in layer order");
        assert!(!cells[1].is_empty(), "{name}: what belongs there");
        assert_eq!(cells[2], rights, "what {name} may import");
    }
}

#[test]
fn house_rules() {
    let mut wrong = vec![];
    for folder in ["src", "crates/envelope/src", "crates/kms-emulator/src"] {
        for source in sources(folder) {
            let parts = source.path.with_extension("");
            for part in parts.iter().skip(1).filter_map(|part| part.to_str()) {
                if NAMELESS.contains(&part) {
                    wrong.push(format!("{}: name the thing instead of '{part}'", source.path.display()));
                }
            }
            for (line, word) in &source.words {
                if word == "unsafe" {
                    wrong.push(format!("{}:{line}: no unsafe code", source.path.display()));
                }
            }
            for (line, text) in source.text.lines().enumerate() {
                // Put together here, so that this file does not find itself.
                for mark in [concat!("TO", "DO"), concat!("FIX", "ME"), concat!("XX", "X")] {
                    if text.contains(mark) {
                        let path = source.path.display();
                        wrong.push(format!("{path}:{}: {mark} belongs into an issue", line + 1));
                    }
                }
            }
        }
    }
    report(&wrong);
}

/// `src/pool/cache.rs` and `src/clock.rs` are in the rooms `pool` and `clock`.
fn room_of(source: &Source) -> String {
    let below = source.path.strip_prefix("src").unwrap();
    let first = below.iter().next().unwrap().to_str().unwrap();
    first.strip_suffix(".rs").unwrap_or(first).to_owned()
}

/// The room that a path leads to, with what it names there: by way of `crate::`, or of enough `super::`.
fn other_room(source: &Source, named: &Named) -> Option<String> {
    let ups = named.segments.iter().take_while(|segment| *segment == "super").count();
    let rest = if named.segments[0] == "crate" {
        &named.segments[1..]
    } else if ups > 0 && ups >= depth(source) {
        &named.segments[ups..]
    } else {
        return None;
    };
    let is_room = rest.first().is_some_and(|first| ROOMS.iter().any(|Room(name, _)| name == first));
    is_room.then(|| rest.join("::"))
}

/// How many `super::` lead from a file to the top of the crate.
fn depth(source: &Source) -> usize {
    let parts = source.path.iter().count() - 1;
    if source.path.file_name().is_some_and(|name| name == "mod.rs") { parts - 1 } else { parts }
}

/// Whether the right `pool::PoolError`, or `pool`, lets `pool::PoolError::Busy` be named.
fn covers(right: &str, target: &str) -> bool {
    target.strip_prefix(right).is_some_and(|rest| rest.is_empty() || rest.starts_with("::"))
}

fn room_in(right: &str) -> &str {
    right.split("::").next().unwrap_or(right)
}

fn at(source: &Source, named: &Named, what: &str) -> String {
    format!("{}:{}: {what} ({})", source.path.display(), named.line, named.text())
}

fn report(wrong: &[String]) {
    assert!(wrong.is_empty(), "ARCHITECTURE.md says which room may know which:\n{}", wrong.join("\n"));
}
