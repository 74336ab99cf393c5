//! What can be configured of the audit.

use std::path::PathBuf;

use serde::Deserialize;

use super::Settings;
use crate::audit::{FileOptions, OnFull, Options, OtlpOptions, Stream};

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
    /// How many calls a second without a valid credential have a record of their own; the others are counted.
    pub strangers_per_sec_max: u64,
    /// A chained file.
    pub file: Option<AuditFileSettings>,
    /// Standard output.
    pub stdout: Option<AuditSinkSettings>,
    /// The local syslog.
    pub syslog: Option<AuditSyslogSettings>,
    /// An OpenTelemetry collector.
    pub otlp: Option<AuditOtlpSettings>,
    /// Whether records for standard output go to standard error: those of a command, whose output is its result.
    #[serde(skip)]
    pub is_of_command: bool,
}

impl Default for AuditSettings {
    fn default() -> Self {
        let Options { queue_records_max, seal_records, seal_secs, strangers_per_sec_max, .. } =
            Options::default();
        Self {
            key_file: None,
            public_context: vec![],
            queue_records_max,
            seal_records,
            seal_secs,
            strangers_per_sec_max,
            file: None,
            stdout: None,
            syslog: None,
            otlp: None,
            is_of_command: false,
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

/// A collector that takes OTLP over HTTP: see [`crate::audit::OtlpOptions`].
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AuditOtlpSettings {
    /// Where it takes logs, with the path: usually `https://HOST:4318/v1/logs`.
    pub endpoint: String,
    /// A file of the CA certificates that it is believed by. Default the system's.
    pub ca_file: Option<PathBuf>,
    /// A file of the token that is sent with each request. Default none.
    pub bearer_token_file: Option<PathBuf>,
    /// Whether plain HTTP is fine elsewhere than on this machine. Default not.
    #[serde(default)]
    pub allow_http: bool,
    /// How long a request may take, in seconds. Default 10.
    #[serde(default = "request_secs_max")]
    pub request_secs_max: u64,
    /// What happens to work whose record has no room. Default `refuse`.
    #[serde(default)]
    pub on_full: OnFull,
}

fn request_secs_max() -> u64 {
    10
}

impl AuditOtlpSettings {
    /// At this endpoint, and everything else as by default.
    pub fn at(endpoint: String) -> Self {
        Self {
            endpoint,
            ca_file: None,
            bearer_token_file: None,
            allow_http: false,
            request_secs_max: request_secs_max(),
            on_full: OnFull::Refuse,
        }
    }

    fn options(&self) -> OtlpOptions {
        OtlpOptions {
            endpoint: self.endpoint.clone(),
            ca_file: self.ca_file.clone(),
            bearer_token_file: self.bearer_token_file.clone(),
            allow_http: self.allow_http,
            request_secs_max: self.request_secs_max,
        }
    }
}

impl AuditSettings {
    /// Whether there is any sink.
    pub fn is_on(&self) -> bool {
        self.file.is_some() || self.stdout.is_some() || self.syslog.is_some() || self.otlp.is_some()
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
            stdout: audit
                .stdout
                .as_ref()
                .map(|sink| (if audit.is_of_command { Stream::Error } else { Stream::Output }, sink.on_full)),
            syslog: audit.syslog.as_ref().map(|sink| (sink.path.clone(), sink.on_full)),
            otlp: audit.otlp.as_ref().map(|sink| (sink.options(), sink.on_full)),
            queue_records_max: audit.queue_records_max,
            seal_records: audit.seal_records,
            seal_secs: audit.seal_secs,
            strangers_per_sec_max: audit.strangers_per_sec_max,
        }
    }
}
