//! Configuration: the only reader of files and of the environment. It yields each room's options.
//!
//! In order of precedence: flags, the environment (`KEYFOLD_HTTP__BODY_BYTES_MAX=...`), the configuration file, the
//! defaults. An unknown setting is an error wherever it stands: a misspelt limit must not be silently none.

mod access;
mod audit;
mod aws;
mod memory;
mod secrets;
mod tls;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use config::{Config, Environment, File, FileFormat};
use serde::Deserialize;

use crate::http::source::{Proxies, ToldBy};

pub use access::{
    AccessSettings, CertificateSettings, ConditionSettings, GrantSettings, IssuerSettings,
    RequiredClaimSettings, RestrictionSettings, RoleSettings,
};
pub use audit::{
    AuditFileSettings, AuditOtlpSettings, AuditSettings, AuditSinkSettings, AuditSyslogSettings,
};
pub use aws::AwsSettings;
pub use memory::{LockMemory, MemorySettings};
pub use secrets::{SecretError, Secrets, passphrase_in, write_new_secret};
pub use tls::{ClientCertificateDemand, TlsSettings, TlsVersion};

/// Everything that can be configured.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Where to listen. Default `127.0.0.1:8600`.
    pub listen: SocketAddr,
    /// A unix socket to listen on as well; none where nothing is said.
    pub listen_unix: Option<PathBuf>,
    /// Where the service keeps its data. Default `./keyfold-data`.
    pub data_dir: PathBuf,
    /// Which listeners may speak HTTP without TLS. Default `loopback-only`.
    pub plaintext_http: PlaintextHttp,
    /// How long requests in flight may take after the signal to stop, in seconds. Default 30.
    pub shutdown_secs_max: u64,
    /// TLS.
    pub tls: TlsSettings,
    /// The edge.
    pub http: HttpSettings,
    /// What of a request goes into its encryption context: the `[[context]]` entries. Default none.
    pub context: crate::http::ContextRules,
    /// How much a tenant and a principal may ask for in a second. Default no limit.
    pub quotas: crate::http::QuotaOptions,
    /// The data keys in memory.
    pub pool: PoolSettings,
    /// The registry.
    pub registry: RegistrySettings,
    /// Rotation.
    pub rotation: RotationSettings,
    /// Shredding.
    pub shredding: ShreddingSettings,
    /// The embedded key ring.
    pub keyring: KeyringSettings,
    /// AWS KMS.
    pub aws: AwsSettings,
    /// Secrets in memory.
    pub memory: MemorySettings,
    /// Credentials.
    pub access: AccessSettings,
    /// The record of who did what.
    pub audit: AuditSettings,
    /// The log.
    pub log: LogSettings,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 8600)),
            listen_unix: None,
            data_dir: PathBuf::from("keyfold-data"),
            plaintext_http: PlaintextHttp::default(),
            shutdown_secs_max: 30,
            tls: TlsSettings::default(),
            http: HttpSettings::default(),
            context: crate::http::ContextRules::default(),
            quotas: crate::http::QuotaOptions::default(),
            pool: PoolSettings::default(),
            registry: RegistrySettings::default(),
            rotation: RotationSettings::default(),
            shredding: ShreddingSettings::default(),
            keyring: KeyringSettings::default(),
            aws: AwsSettings::default(),
            memory: MemorySettings::default(),
            access: AccessSettings::default(),
            audit: AuditSettings::default(),
            log: LogSettings::default(),
        }
    }
}

/// Which listeners may speak HTTP without TLS.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PlaintextHttp {
    /// Only those on a loopback address.
    #[default]
    LoopbackOnly,
    /// All: plaintext and credentials cross the network unprotected, unless something in front protects them.
    EverywhereUnprotected,
}

macro_rules! settings {
    ($(#[$doc:meta])* $name:ident from $options:ty { $($(#[$field_doc:meta])* $field:ident: $type:ty,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Debug, Deserialize)]
        #[serde(deny_unknown_fields, default)]
        pub struct $name {
            $($(#[$field_doc])* pub $field: $type,)*
        }

        impl Default for $name {
            fn default() -> Self {
                let defaults = <$options>::default();
                Self { $($field: defaults.$field,)* }
            }
        }

        impl From<&$name> for $options {
            fn from(settings: &$name) -> Self {
                Self { $($field: settings.$field,)* }
            }
        }
    };
}

settings! {
    /// The pool's limits: see [`crate::pool::Options`].
    PoolSettings from crate::pool::Options {
        /// How many data keys are kept in memory in all.
        deks_max: u64,
        /// How many data keys of one tenant are kept in memory.
        tenant_deks_max: usize,
        /// How many KMS calls a minute a tenant's requests may cause.
        tenant_kms_calls_per_min: u32,
        /// For how many values of its key-bound context a tenant has active data keys.
        tenant_bound_scopes_max: u64,
        /// How long a plaintext data key lives after the KMS last vouched for it.
        dek_plaintext_secs_max: u64,
        /// How long after that it is used while the KMS cannot be reached.
        dek_stale_secs_max: u64,
        /// After how long without use it is let go.
        dek_idle_secs_max: u64,
        /// How long an error is remembered.
        error_memory_ms: u64,
        /// How many data keys of one tenant are fetched from the KMS at the same time.
        tenant_kms_calls_max: usize,
        /// How long a request waits for its turn among them.
        tenant_kms_wait_ms_max: u64,
        /// How often usage counts are written.
        usage_flush_secs: u64,
    }
}

settings! {
    /// Rotation's limits: see [`crate::rotation::Options`].
    RotationSettings from crate::rotation::Options {
        /// How often the registry is asked which tenants are due.
        poll_secs: u64,
        /// How long the lease lasts without being renewed.
        lease_secs: u64,
        /// How often each tenant is looked at without a reason, on average.
        sweep_secs: u64,
        /// How often all data keys of a tenant are looked at.
        full_sweep_secs: u64,
        /// For how long a KEK's answer about its material counts.
        kek_check_secs: u64,
        /// How many KMS calls rotation may make in a second.
        kms_calls_per_sec_max: u32,
        /// How many tenants are worked on at once.
        tenants_at_once_max: usize,
        /// How many data keys of one tenant are changed before others have their turn.
        deks_per_turn_max: usize,
        /// How many data keys are loaded at a time.
        page_deks: u32,
        /// The longest wait before a tenant that failed is tried again.
        backoff_secs_max: u64,
    }
}

settings! {
    /// The waiting period's limits: see [`crate::operations::ShredOptions`].
    ShreddingSettings from crate::operations::ShredOptions {
        /// How long it is where nothing is said.
        waiting_secs: u64,
        /// The shortest that may be asked for: an hour or more.
        waiting_secs_min: u64,
        /// The longest.
        waiting_secs_max: u64,
    }
}

/// The edge's limits: see [`crate::http::Options`] and [`crate::http::server::Options`].
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HttpSettings {
    /// The largest plaintext of a JSON call.
    pub plaintext_bytes_max: usize,
    /// The largest body of a JSON data-plane call.
    pub body_bytes_max: usize,
    /// The largest body of an administration call.
    pub admin_body_bytes_max: usize,
    /// How long a request may take.
    pub request_secs_max: u64,
    /// How many requests may be in flight at once.
    pub in_flight_max: usize,
    /// From how many of them on each tenant is held to its share, in percent of the limit.
    pub fair_from_percent: usize,
    /// How many administration calls may be in flight at once.
    pub admin_in_flight_max: usize,
    /// The most items of a batch.
    pub batch_items_max: usize,
    /// The largest body of a batch.
    pub batch_body_bytes_max: usize,
    /// How much memory all batches together may take.
    pub batch_memory_bytes_max: usize,
    /// The longest line of a body of lines.
    pub line_bytes_max: usize,
    /// How many bodies may be streamed at once.
    pub transfers_max: usize,
    /// The largest body that is streamed.
    pub transfer_bytes_max: u64,
    /// How much of a streamed answer is held back, so that early failures are ordinary problems.
    pub transfer_held_bytes_max: usize,
    /// How long one side of a streamed body may stand still.
    pub idle_secs_max: u64,
    /// How long a client may take to send a request's head.
    pub head_secs_max: u64,
    /// The largest head of a request.
    pub head_bytes_max: usize,
    /// How many requests one HTTP/2 connection may have open at once.
    pub streams_max: u32,
    /// How many connections may be open at once.
    pub connections_max: usize,
    /// How long a connection may be open without use.
    pub connection_idle_secs_max: u64,
    /// How long the rest of a body is taken that was answered before it was read.
    pub linger_secs_max: u64,
    /// The networks of the load balancers whose word for a request's source is taken. Default none.
    pub trusted_proxies: Vec<ipnet::IpNet>,
    /// How they tell it: `proxy-protocol-v2` or `forwarded`. Default not at all.
    pub source_from: Option<ToldBy>,
}

impl Default for HttpSettings {
    fn default() -> Self {
        let (edge, server) = (crate::http::Options::default(), crate::http::server::Options::default());
        Self {
            plaintext_bytes_max: edge.plaintext_bytes_max,
            body_bytes_max: edge.body_bytes_max,
            admin_body_bytes_max: edge.admin_body_bytes_max,
            request_secs_max: edge.request_secs_max,
            in_flight_max: edge.in_flight_max,
            fair_from_percent: edge.fair_from_percent,
            admin_in_flight_max: edge.admin_in_flight_max,
            batch_items_max: edge.batch_items_max,
            batch_body_bytes_max: edge.batch_body_bytes_max,
            batch_memory_bytes_max: edge.batch_memory_bytes_max,
            line_bytes_max: edge.line_bytes_max,
            transfers_max: edge.transfer.transfers_max,
            transfer_bytes_max: edge.transfer.transfer_bytes_max,
            transfer_held_bytes_max: edge.transfer.transfer_held_bytes_max,
            idle_secs_max: edge.transfer.idle_secs_max,
            head_secs_max: server.head_secs_max,
            head_bytes_max: server.head_bytes_max,
            streams_max: server.streams_max,
            connections_max: server.connections_max,
            connection_idle_secs_max: server.connection_idle_secs_max,
            linger_secs_max: server.linger_secs_max,
            trusted_proxies: vec![],
            source_from: None,
        }
    }
}

impl HttpSettings {
    /// The edge's options.
    fn edge(&self) -> crate::http::Options {
        crate::http::Options {
            proxies: self.proxies(),
            plaintext_bytes_max: self.plaintext_bytes_max,
            body_bytes_max: self.body_bytes_max,
            admin_body_bytes_max: self.admin_body_bytes_max,
            request_secs_max: self.request_secs_max,
            in_flight_max: self.in_flight_max,
            fair_from_percent: self.fair_from_percent,
            admin_in_flight_max: self.admin_in_flight_max,
            batch_items_max: self.batch_items_max,
            batch_body_bytes_max: self.batch_body_bytes_max,
            batch_memory_bytes_max: self.batch_memory_bytes_max,
            line_bytes_max: self.line_bytes_max,
            transfer: crate::http::TransferOptions {
                transfers_max: self.transfers_max,
                idle_secs_max: self.idle_secs_max,
                transfer_bytes_max: self.transfer_bytes_max,
                transfer_held_bytes_max: self.transfer_held_bytes_max,
            },
            ..crate::http::Options::default()
        }
    }

    /// The listener's options.
    pub fn server(&self) -> crate::http::server::Options {
        crate::http::server::Options {
            head_secs_max: self.head_secs_max,
            head_bytes_max: self.head_bytes_max,
            streams_max: self.streams_max,
            connections_max: self.connections_max,
            connection_idle_secs_max: self.connection_idle_secs_max,
            linger_secs_max: self.linger_secs_max,
            proxies: self.proxies(),
        }
    }

    fn proxies(&self) -> Arc<Proxies> {
        Arc::new(Proxies { trusted: self.trusted_proxies.clone(), told_by: self.source_from })
    }
}

/// The registry.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RegistrySettings {
    /// The SQLite file. Default `registry.sqlite` in the data folder.
    pub file: Option<PathBuf>,
    /// How long what is in memory of tenants, keys and API keys serves on while the registry does not answer, in
    /// seconds. Default 3,600.
    pub stale_secs_max: u64,
    /// How many keys a tenant may have. Default 1,000.
    pub tenant_keys_max: u64,
}

impl Default for RegistrySettings {
    fn default() -> Self {
        let tenant_keys_max = crate::operations::TENANT_KEYS_MAX;
        Self { file: None, stale_secs_max: 3_600, tenant_keys_max }
    }
}

/// The embedded key ring.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct KeyringSettings {
    /// The key ring's file. Default `keyring` in the data folder.
    pub file: Option<PathBuf>,
    /// A file that holds the passphrase, for where the environment variable `KEYFOLD_KEYRING_PASSPHRASE` is not
    /// wanted.
    pub passphrase_file: Option<PathBuf>,
}

/// The log.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LogSettings {
    /// `json` or `text`. Default `json`.
    pub format: LogFormat,
    /// Which lines, such as `info` or `info,keyfold::audit=debug`. Default `info`.
    pub filter: String,
}

impl Default for LogSettings {
    fn default() -> Self {
        Self { format: LogFormat::Json, filter: "info".to_owned() }
    }
}

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// One JSON object a line.
    Json,
    /// For people.
    Text,
}

/// What is wrong with the configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("the configuration file {path} cannot be read: {source}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Something in it is not valid.
    #[error("the configuration is not valid: {0}")]
    Invalid(String),
}

/// Variables that begin with `KEYFOLD_` and are no settings: secrets, and what the command line and its tests read.
const NOT_SETTINGS: [&str; 8] = [
    "KEYFOLD_AUDIT_KEY",
    "KEYFOLD_CONFIG",
    "KEYFOLD_KEYRING_PASSPHRASE",
    "KEYFOLD_PEPPER",
    "KEYFOLD_URL",
    "KEYFOLD_API_KEY",
    "KEYFOLD_TENANT",
    "KEYFOLD_REENCRYPT_DATABASE",
];
/// What the project's own tests read begins so.
const TEST_PREFIX: &str = "KEYFOLD_TEST_";

impl Settings {
    /// From the file, where one is named, and the environment.
    pub fn load(file: Option<&Path>, environment: &Variables) -> Result<Self, ConfigError> {
        let mut builder = Config::builder();
        if let Some(path) = file {
            let text = std::fs::read_to_string(path)
                .map_err(|source| ConfigError::File { path: path.to_owned(), source })?;
            builder = builder.add_source(File::from_str(&text, FileFormat::Toml));
        }
        let settings = environment.0.iter().filter(|(name, _)| is_setting(name));
        let source = settings.map(|(name, value)| (name.clone(), value.clone())).collect();
        let environment = Environment::with_prefix("KEYFOLD").prefix_separator("_").separator("__");
        builder = builder.add_source(environment.source(Some(source)));
        let config = builder.build().map_err(|error| ConfigError::Invalid(error.to_string()))?;
        let mut settings: Self =
            config.try_deserialize().map_err(|error| ConfigError::Invalid(error.to_string()))?;
        settings.fit_kms_into_requests();
        settings.check()?;
        Ok(settings)
    }

    /// All that a request may wait for a KMS ends before the request's own deadline does, whatever the single times
    /// say: so its caller hears that it is the KMS that does not answer, and may hear it of the ring's last member.
    fn fit_kms_into_requests(&mut self) {
        const SHARE_PERCENT: u64 = 90;
        let most_ms = self.http.request_secs_max.saturating_mul(1_000 / 100 * SHARE_PERCENT);
        let hedges = crate::tenant::KEK_RING_MAX as u64 - 1;
        let times = [
            (&mut self.pool.tenant_kms_wait_ms_max, 1),
            (&mut self.aws.hedge_ms, hedges),
            (&mut self.aws.call_ms_max, 1),
            (&mut self.aws.wrap_ms_max, 1),
        ];
        let in_all_ms: u128 = times.iter().map(|(ms, often)| u128::from(**ms) * u128::from(*often)).sum();
        if in_all_ms <= u128::from(most_ms) {
            return;
        }
        for (ms, _) in times {
            let share = u128::from(*ms) * u128::from(most_ms) / in_all_ms;
            // A wait of nothing stays one: it means something of its own.
            *ms = u64::try_from(share).unwrap_or(u64::MAX).max((*ms).min(1));
        }
    }

    /// What single values cannot tell.
    fn check(&self) -> Result<(), ConfigError> {
        self.aws.check()?;
        let at_least = |name: &str, value: u64, min: u64| {
            if value >= min {
                Ok(())
            } else {
                Err(ConfigError::Invalid(format!("{name} is {value}: use {min} or more")))
            }
        };
        at_least("pool.deks_max", self.pool.deks_max, 1)?;
        at_least("pool.tenant_deks_max", self.pool.tenant_deks_max as u64, 1)?;
        at_least("pool.dek_plaintext_secs_max", self.pool.dek_plaintext_secs_max, 10)?;
        let renewal_secs = self.aws.call_ms_max.saturating_mul(2).div_ceil(1_000);
        if self.pool.dek_plaintext_secs_max < renewal_secs {
            return Err(ConfigError::Invalid(format!(
                "pool.dek_plaintext_secs_max is {}: use {renewal_secs} or more, twice aws.call_ms_max, so that a data key in use can be renewed in time",
                self.pool.dek_plaintext_secs_max
            )));
        }
        at_least("pool.dek_idle_secs_max", self.pool.dek_idle_secs_max, 10)?;
        at_least("pool.tenant_kms_calls_max", self.pool.tenant_kms_calls_max as u64, 1)?;
        at_least("pool.usage_flush_secs", self.pool.usage_flush_secs, 1)?;
        at_least("rotation.poll_secs", self.rotation.poll_secs, 1)?;
        at_least("rotation.lease_secs", self.rotation.lease_secs, 1)?;
        at_least("rotation.sweep_secs", self.rotation.sweep_secs, 1)?;
        at_least("rotation.kms_calls_per_sec_max", self.rotation.kms_calls_per_sec_max.into(), 1)?;
        at_least("rotation.tenants_at_once_max", self.rotation.tenants_at_once_max as u64, 1)?;
        at_least("rotation.deks_per_turn_max", self.rotation.deks_per_turn_max as u64, 1)?;
        at_least("rotation.page_deks", self.rotation.page_deks.into(), 1)?;
        at_least("rotation.backoff_secs_max", self.rotation.backoff_secs_max, 1)?;
        at_least("shredding.waiting_secs_min", self.shredding.waiting_secs_min, 3_600)?;
        at_least("shredding.waiting_secs", self.shredding.waiting_secs, self.shredding.waiting_secs_min)?;
        at_least("shredding.waiting_secs_max", self.shredding.waiting_secs_max, self.shredding.waiting_secs)?;
        at_least("http.body_bytes_max", self.http.body_bytes_max as u64, 1_024)?;
        at_least("http.admin_body_bytes_max", self.http.admin_body_bytes_max as u64, 1_024)?;
        at_least("http.head_bytes_max", self.http.head_bytes_max as u64, 8_192)?;
        at_least("http.head_secs_max", self.http.head_secs_max, 1)?;
        at_least("http.request_secs_max", self.http.request_secs_max, 1)?;
        at_least("http.in_flight_max", self.http.in_flight_max as u64, 1)?;
        if !(1..=100).contains(&self.http.fair_from_percent) {
            let told = format!("http.fair_from_percent is {}: use 1 to 100", self.http.fair_from_percent);
            return Err(ConfigError::Invalid(told));
        }
        at_least("audit.queue_records_max", self.audit.queue_records_max as u64, 1)?;
        at_least("audit.seal_records", self.audit.seal_records, 1)?;
        at_least("audit.seal_secs", self.audit.seal_secs, 1)?;
        if let Some(otlp) = &self.audit.otlp {
            at_least("audit.otlp.request_secs_max", otlp.request_secs_max, 1)?;
        }
        if let Some(file) = &self.audit.file {
            at_least("audit.file.rotate_bytes", file.rotate_bytes, 4_096)?;
        }
        at_least("http.admin_in_flight_max", self.http.admin_in_flight_max as u64, 1)?;
        at_least("http.batch_items_max", self.http.batch_items_max as u64, 1)?;
        at_least("http.batch_body_bytes_max", self.http.batch_body_bytes_max as u64, 1_024)?;
        // The largest batch must find room, if no other is there.
        let batch_bytes_max = self.http.batch_body_bytes_max as u64;
        at_least("http.batch_memory_bytes_max", self.http.batch_memory_bytes_max as u64, batch_bytes_max)?;
        at_least("http.line_bytes_max", self.http.line_bytes_max as u64, 1_024)?;
        at_least("http.transfers_max", self.http.transfers_max as u64, 1)?;
        at_least("http.transfer_bytes_max", self.http.transfer_bytes_max, 1_024)?;
        at_least("http.idle_secs_max", self.http.idle_secs_max, 1)?;
        at_least("http.streams_max", u64::from(self.http.streams_max), 1)?;
        at_least("http.connections_max", self.http.connections_max as u64, 1)?;
        // A connection whose answer is still being made, or whose transfer may go on, must not look idle.
        let busy_secs_max = self.http.request_secs_max.max(self.http.idle_secs_max);
        at_least("http.connection_idle_secs_max", self.http.connection_idle_secs_max, busy_secs_max)?;
        at_least("access.token_bytes_max", self.access.token_bytes_max as u64, 256)?;
        at_least("access.certificate_recheck_secs", self.access.certificate_recheck_secs, 1)?;
        if self.http.trusted_proxies.is_empty() != self.http.source_from.is_none() {
            return Err(ConfigError::Invalid(
                "http.trusted_proxies and http.source_from go together: set both, or neither".to_owned(),
            ));
        }
        self.tls.check()?;
        self.access.rules()?;
        // Tokens that anybody can forge wait so for an issuer that hangs: the rest of the places stays free.
        let places = self.http.in_flight_max;
        let waits = |issuer: &&IssuerSettings| issuer.unknown_key_waiting_max >= places;
        if let Some(issuer) = self.access.issuers.iter().find(waits) {
            return Err(ConfigError::Invalid(format!(
                "access.issuers: unknown_key_waiting_max of '{}' is {}: use less than http.in_flight_max, which is \
                 {places}",
                issuer.name, issuer.unknown_key_waiting_max
            )));
        }
        Ok(())
    }

    /// The edge's options.
    pub fn edge(&self) -> crate::http::Options {
        crate::http::Options {
            context: self.context.clone(),
            quotas: self.quotas.clone(),
            recorded: self.audit.is_on(),
            ..self.http.edge()
        }
    }

    /// The registry's file.
    pub fn registry_file(&self) -> PathBuf {
        self.registry.file.clone().unwrap_or_else(|| self.data_dir.join("registry.sqlite"))
    }

    /// The key ring's file.
    pub fn keyring_file(&self) -> PathBuf {
        self.keyring.file.clone().unwrap_or_else(|| self.data_dir.join("keyring"))
    }

    /// The audit key's file.
    pub fn audit_key_file(&self) -> PathBuf {
        self.audit.key_file.clone().unwrap_or_else(|| self.data_dir.join("audit-key"))
    }

    /// The audit's file, whether it is written or not.
    pub fn audit_file(&self) -> PathBuf {
        let path = self.audit.file.as_ref().and_then(|file| file.path.clone());
        path.unwrap_or_else(|| self.data_dir.join("audit").join("audit.jsonl"))
    }

    /// The pepper's file.
    pub fn pepper_file(&self) -> PathBuf {
        self.access.pepper_file.clone().unwrap_or_else(|| self.data_dir.join("pepper"))
    }

    /// Refuses to speak plain HTTP to the network, unless the operator has said so in so many words.
    pub fn check_listener(&self) -> Result<(), ConfigError> {
        if self.tls.is_on()
            || self.listen.ip().is_loopback()
            || self.plaintext_http == PlaintextHttp::EverywhereUnprotected
        {
            return Ok(());
        }
        Err(ConfigError::Invalid(format!(
            "{} is not a loopback address, and without TLS plaintext and API keys would cross the network \
             unprotected. Set tls.certificate_file and tls.key_file, or listen on 127.0.0.1, or, where something in front of keyfold does TLS, set \
             plaintext_http = \"everywhere-unprotected\"",
            self.listen
        )))
    }
}

fn is_setting(name: &str) -> bool {
    name.starts_with("KEYFOLD_") && !NOT_SETTINGS.contains(&name) && !name.starts_with(TEST_PREFIX)
}

/// The environment's variables.
#[derive(Clone, Default)]
pub struct Variables(HashMap<String, String>);

impl Variables {
    /// Those of this process. Values that are not UTF-8 are passed over.
    #[expect(clippy::disallowed_methods, reason = "the one place that reads the environment")]
    pub fn of_process() -> Self {
        let names_and_values = std::env::vars_os();
        Self(
            names_and_values
                .filter_map(|(n, v)| Some((n.into_string().ok()?, v.into_string().ok()?)))
                .collect(),
        )
    }

    /// These.
    pub fn of<const N: usize>(variables: [(&str, &str); N]) -> Self {
        Self(variables.into_iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect())
    }

    /// One of them.
    pub fn value(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_environment_overrides_the_file_and_the_file_the_defaults() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("keyfold.toml");
        std::fs::write(&path, "[http]\nbody_bytes_max = 2048\nin_flight_max = 7\n").unwrap();
        let variables = Variables::of([
            ("KEYFOLD_HTTP__IN_FLIGHT_MAX", "9"),
            ("KEYFOLD_LISTEN", "127.0.0.1:1234"),
            ("KEYFOLD_KEYRING_PASSPHRASE", "secret"),
            ("KEYFOLD_TEST_PYTHON", "python3"),
        ]);
        let settings = Settings::load(Some(&path), &variables).unwrap();
        assert_eq!(settings.http.body_bytes_max, 2_048);
        assert_eq!(settings.http.in_flight_max, 9);
        assert_eq!(settings.listen.port(), 1234);
        assert_eq!(settings.pool.dek_plaintext_secs_max, 300);
    }

    #[test]
    fn a_misspelt_setting_is_an_error_wherever_it_stands() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("keyfold.toml");
        std::fs::write(&path, "[http]\nbody_byte_max = 2048\n").unwrap();
        let error = Settings::load(Some(&path), &Variables::default()).unwrap_err().to_string();
        assert!(error.contains("body_byte_max"), "{error}");
        let error = Settings::load(None, &Variables::of([("KEYFOLD_LISTENN", "x")])).unwrap_err().to_string();
        assert!(error.contains("listenn"), "{error}");
        let error =
            Settings::load(Some(&dir.path().join("none")), &Variables::default()).unwrap_err().to_string();
        assert!(error.contains("cannot be read"), "{error}");
        let zero = Variables::of([("KEYFOLD_POOL__DEKS_MAX", "0")]);
        assert!(Settings::load(None, &zero).unwrap_err().to_string().contains("pool.deks_max"));
    }

    #[test]
    fn a_renewal_has_time_for_a_call_to_the_kms_before_a_data_key_ends() {
        let load = |call_ms_max: &str| {
            let variables = Variables::of([
                ("KEYFOLD_POOL__DEK_PLAINTEXT_SECS_MAX", "10"),
                ("KEYFOLD_AWS__CALL_MS_MAX", call_ms_max),
            ]);
            Settings::load(None, &variables)
        };
        assert!(load("5000").is_ok());
        let error = load("5001").unwrap_err().to_string();
        assert!(error.contains("pool.dek_plaintext_secs_max is 10: use 11 or more"), "{error}");
    }

    #[test]
    fn plain_http_is_for_loopback_unless_said_otherwise() {
        let load = |listen: &str, plaintext: &str| {
            let variables =
                Variables::of([("KEYFOLD_LISTEN", listen), ("KEYFOLD_PLAINTEXT_HTTP", plaintext)]);
            Settings::load(None, &variables).unwrap().check_listener()
        };
        assert!(load("127.0.0.1:1", "loopback-only").is_ok());
        assert!(load("[::1]:1", "loopback-only").is_ok());
        assert!(load("0.0.0.0:1", "loopback-only").is_err());
        assert!(load("0.0.0.0:1", "everywhere-unprotected").is_ok());
    }
}
