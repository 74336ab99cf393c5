//! What can be configured of the audit.

use std::path::PathBuf;

use serde::Deserialize;

use super::Settings;
use crate::audit::{FileOptions, OnFull, Options};

/// The record of who did what: see [`crate::audit::Options`]. A sink is on where its table is there.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AuditSettings {
    /// A file of 32 or more random bytes that the chain and the hashes of context values are made with. Default
    /// `audit-key` in the data folder, made at first start.
    pub key_file: Option<PathBuf>,
    /// The context names whose values are recorded as they are. Default none.
    pub public_context: Vec<String>,
    /// How many records may wait for each sink.
    pub queue_records_max: usize,
    /// After how many records a seal is written.
    pub seal_records: u64,
    /// After how many seconds with new records a seal is written.
    pub seal_secs: u64,
    /// A chained file.
    pub file: Option<AuditFileSettings>,
    /// Standard output.
    pub stdout: Option<AuditSinkSettings>,
    /// The local syslog.
    pub syslog: Option<AuditSyslogSettings>,
}

impl Default for AuditSettings {
    fn default() -> Self {
        let Options { queue_records_max, seal_records, seal_secs, .. } = Options::default();
        Self {
            key_file: None,
            public_context: vec![],
            queue_records_max,
            seal_records,
            seal_secs,
            file: None,
            stdout: None,
            syslog: None,
        }
    }
}

/// A file with rotation.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AuditFileSettings {
    /// The file. Default `audit/audit.jsonl` in the data folder.
    pub path: Option<PathBuf>,
    /// At how many bytes the next file is begun. Default 256 MiB.
    pub rotate_bytes: u64,
    /// How many former files are kept. Default 0: all.
    pub files_max: usize,
    /// What happens to work whose record has no room. Default `refuse`.
    pub on_full: OnFull,
}

impl Default for AuditFileSettings {
    fn default() -> Self {
        Self { path: None, rotate_bytes: 256 << 20, files_max: 0, on_full: OnFull::Refuse }
    }
}

/// A sink that has no settings of its own.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AuditSinkSettings {
    /// What happens to work whose record has no room. Default `refuse`.
    pub on_full: OnFull,
}

/// The local syslog.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AuditSyslogSettings {
    /// Its socket. Default `/dev/log`.
    pub path: PathBuf,
    /// What happens to work whose record has no room. Default `refuse`.
    pub on_full: OnFull,
}

impl Default for AuditSyslogSettings {
    fn default() -> Self {
        Self { path: PathBuf::from("/dev/log"), on_full: OnFull::Refuse }
    }
}

impl AuditSettings {
    /// Whether there is any sink.
    pub fn is_on(&self) -> bool {
        self.file.is_some() || self.stdout.is_some() || self.syslog.is_some()
    }
}

impl Settings {
    /// The audit's options.
    pub fn audit_options(&self) -> Options {
        let audit = &self.audit;
        let file = audit.file.as_ref().map(|file| {
            let (rotate_bytes, files_max) = (file.rotate_bytes, file.files_max);
            (FileOptions { path: self.audit_file(), rotate_bytes, files_max }, file.on_full)
        });
        Options {
            file,
            stdout: audit.stdout.as_ref().map(|sink| sink.on_full),
            syslog: audit.syslog.as_ref().map(|sink| (sink.path.clone(), sink.on_full)),
            queue_records_max: audit.queue_records_max,
            seal_records: audit.seal_records,
            seal_secs: audit.seal_secs,
        }
    }
}
