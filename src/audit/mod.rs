//! Who did what: begin -> done | failed | abandoned.
//!
//! An [`Attempt`] that is dropped without an outcome is recorded as abandoned: a client that went away, or a task
//! that died, leaves a trace too. A record names who, what and the outcome, and holds no plaintext, key material or
//! context values (a keyed hash of each instead).
//!
//! A call has one record, written when it ends; a place for it is taken before it begins. A change of administration
//! has two: the first is durable before anything is changed, so that a crash leaves a visible beginning. Without a
//! sink records go to the log under the target `keyfold::audit`: changes at INFO, calls at DEBUG (off by default).

mod chain;
mod output;
mod reading;
mod record;
mod sink;

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use envelope::{DataKeyId, EncryptionContext};

use crate::clock::Clock;
use crate::tenant::{KeyName, PrincipalId, TenantId, Verb};
use output::{FileOutput, Opened, Output, Stdout, Syslog};
use record::{Details, Record};
use sink::{Settings, Sink, Start};

pub use chain::{Fault, Keys, Link, Summary, Verifier, WeakKey};
pub use output::{FileOptions, TrailError, TrailFiles, trails};
pub use reading::{Located, Query, ReadError, search, verify};
pub use record::REFS_MAX;
pub use sink::OnFull;

/// Where records go, and the audit's limits.
#[derive(Clone, Debug)]
pub struct Options {
    /// The chained file.
    pub file: Option<(FileOptions, OnFull)>,
    /// Standard output.
    pub stdout: Option<OnFull>,
    /// The local syslog's socket.
    pub syslog: Option<(PathBuf, OnFull)>,
    /// How many records may wait for each sink. Default 10,000.
    pub queue_records_max: usize,
    /// After how many records a seal is written. Default 1,000.
    pub seal_records: u64,
    /// After how many seconds with new records a seal is written. Default 60.
    pub seal_secs: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            file: None,
            stdout: None,
            syslog: None,
            queue_records_max: 10_000,
            seal_records: 1_000,
            seal_secs: 60,
        }
    }
}

impl Options {
    /// Whether there is any sink.
    pub fn is_on(&self) -> bool {
        self.file.is_some() || self.stdout.is_some() || self.syslog.is_some()
    }
}

/// The record of what is about to be done has no room: so it is not done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the audit ({0}) takes no record at present, and what is not recorded is not done")]
pub struct Unrecorded(&'static str);

/// Where records go. Cloning is cheap.
#[derive(Clone)]
pub struct Audit {
    clock: Clock,
    sinks: Arc<[Sink]>,
}

impl Audit {
    /// Records into the log only.
    pub fn new(clock: Clock) -> Self {
        Self { clock, sinks: Arc::new([]) }
    }

    /// Opens the sinks and starts their threads. [`Audit::close`] ends them.
    pub fn open(clock: Clock, options: &Options, keys: &Keys) -> Result<Self, TrailError> {
        let settings = Settings {
            queue_records_max: options.queue_records_max,
            seal_records: options.seal_records,
            seal_every: Duration::from_secs(options.seal_secs),
        };
        let mut sinks = vec![];
        let mut start = |name, on_full, start: Start| {
            let sink = Sink::start(name, on_full, &settings, clock.clone(), keys.clone(), start);
            sinks.push(sink.map_err(|source| TrailError::File { path: PathBuf::from(name), source })?);
            Ok(())
        };
        if let Some((file, on_full)) = &options.file {
            let Opened { output, link, is_new, torn_bytes } = FileOutput::open(file, keys)?;
            start("file", *on_full, Start { output: Box::new(output), link, is_new, torn_bytes })?;
        }
        let fresh =
            |output: Box<dyn Output>| Start { output, link: Link::START, is_new: true, torn_bytes: 0 };
        if let Some(on_full) = options.stdout {
            start("stdout", on_full, fresh(Box::new(Stdout)))?;
        }
        if let Some((path, on_full)) = &options.syslog {
            start("syslog", *on_full, fresh(Box::new(Syslog::new(path.clone()))))?;
        }
        Ok(Self { clock, sinks: sinks.into() })
    }

    /// A data-plane call begins. Refused where its record would have no room.
    pub async fn begin<'a>(&'a self, verb: Verb, who: Who<'a>) -> Result<Attempt<'a>, Unrecorded> {
        let logged = tracing::enabled!(target: "keyfold::audit", tracing::Level::DEBUG);
        let held = self.reserve().await?;
        let began = if logged || !self.sinks.is_empty() { self.clock.monotonic() } else { Duration::ZERO };
        let details = Details::default();
        Ok(Attempt { audit: self, who, event: CALL, what: verb.name(), logged, held, began, details })
    }

    /// A change of administration begins: what kind (`tenant.create`). Its beginning is durable when this returns.
    pub async fn begin_change<'a>(
        &'a self,
        change: &'a str,
        who: Who<'a>,
    ) -> Result<Attempt<'a>, Unrecorded> {
        let tenant = who.tenant.map(TenantId::as_str);
        tracing::info!(target: "keyfold::audit", change, principal = %who.principal, tenant, "begin");
        let began = self.clock.monotonic();
        let first = self.reserve().await?;
        let details = Details::default();
        let mut attempt = Attempt {
            audit: self,
            who,
            event: CHANGE,
            what: change,
            logged: true,
            held: first,
            began,
            details,
        };
        attempt.send("begin", "", "");
        attempt.held = self.reserve().await?;
        for sink in self.sinks.iter() {
            if !sink.durable().await {
                attempt.end("failed", "audit_unavailable", "the audit could not write that it begins");
                return Err(Unrecorded(sink.name()));
            }
        }
        Ok(attempt)
    }

    /// A call that was refused before any verb took it over.
    pub async fn refused(&self, route: &str, who: Who<'_>, code: &'static str) -> Result<(), Unrecorded> {
        if self.sinks.is_empty() {
            return Ok(());
        }
        let (held, began, details) = (self.reserve().await?, self.clock.monotonic(), Details::default());
        let what = route.get(..route.len().min(100)).unwrap_or_default();
        let attempt = Attempt { audit: self, who, event: CALL, what, logged: false, held, began, details };
        attempt.end("refused", code, "");
        Ok(())
    }

    /// Waits until everything that was recorded is durable. False where a sink cannot write.
    pub async fn flush(&self) -> bool {
        let mut all = true;
        for sink in self.sinks.iter() {
            all &= sink.durable().await;
        }
        all
    }

    /// Seals and ends the sinks. Blocks until they are done.
    pub fn close(&self) {
        self.sinks.iter().for_each(Sink::close);
    }

    /// Takes a place in every sink's queue; a bit for each that has given one.
    async fn reserve(&self) -> Result<u8, Unrecorded> {
        let mut held = 0;
        for (at, sink) in self.sinks.iter().enumerate() {
            match sink.reserve().await {
                Ok(true) => held |= 1 << at,
                Ok(false) => {}
                Err(full) => {
                    self.release(held);
                    return Err(Unrecorded(full.0));
                }
            }
        }
        Ok(held)
    }

    fn release(&self, held: u8) {
        self.held(held).for_each(Sink::release);
    }

    fn held(&self, held: u8) -> impl Iterator<Item = &Sink> {
        self.sinks.iter().enumerate().filter(move |(at, _)| held & (1 << at) != 0).map(|(_, sink)| sink)
    }
}

const CALL: &str = "call";
const CHANGE: &str = "change";

/// Who does it, how he was recognised, and where he calls from.
#[derive(Clone, Copy)]
pub struct Who<'a> {
    /// Who.
    pub principal: &'a PrincipalId,
    /// How he authenticated.
    pub method: &'static str,
    /// In which tenant.
    pub tenant: Option<&'a TenantId>,
    /// The request's id; empty where there is no request.
    pub request_id: &'a str,
    /// The address that the request came from.
    pub source: Option<IpAddr>,
}

impl<'a> Who<'a> {
    /// Somebody within the service, or at its command line.
    pub fn local(principal: &'a PrincipalId, tenant: Option<&'a TenantId>) -> Self {
        Self { principal, method: "local", tenant, request_id: "", source: None }
    }

    /// The same in this tenant.
    pub fn in_tenant(self, tenant: &'a TenantId) -> Self {
        Self { tenant: Some(tenant), ..self }
    }
}

/// Something that was begun and has no outcome yet.
pub struct Attempt<'a> {
    audit: &'a Audit,
    who: Who<'a>,
    event: &'static str,
    what: &'a str,
    logged: bool,
    held: u8,
    began: Duration,
    details: Details,
}

impl Attempt<'_> {
    /// Whether anything is recorded: what it takes to find out details can be left out where not.
    pub fn is_recorded(&self) -> bool {
        self.held != 0
    }

    /// Under which key.
    pub fn with_key(&mut self, key: &KeyName) {
        if self.is_recorded() {
            self.details.key = Some(key.as_str().into());
        }
    }

    /// Under which data key.
    pub fn with_dek(&mut self, dek: DataKeyId) {
        self.details.dek = Some(dek);
    }

    /// How many bytes came and went.
    pub fn with_bytes(&mut self, bytes_in: usize, bytes_out: usize) {
        self.details.bytes_in = bytes_in as u64;
        self.details.bytes_out = bytes_out as u64;
    }

    /// With which encryption context.
    pub fn with_context(&mut self, context: EncryptionContext) {
        if self.is_recorded() {
            self.details.context = context;
        }
    }

    /// Of a batch: how many items it had, how many of them failed, and what the caller calls them: no more than
    /// [`REFS_MAX`].
    pub fn with_items(&mut self, items: u64, failed: u64, refs: Vec<Box<str>>) {
        if self.is_recorded() {
            self.details.items = Some((items, failed));
            self.details.refs = refs;
        }
    }

    /// It was done.
    pub fn done(self) {
        self.end("done", "", "");
    }

    /// It failed with this code, for this reason: the full one, which the caller may not be told.
    pub fn failed(self, code: &'static str, reason: &dyn std::fmt::Display) {
        let reason = if self.logged || self.is_recorded() { reason.to_string() } else { String::new() };
        self.end("failed", code, &reason);
    }

    fn end(mut self, outcome: &'static str, code: &'static str, reason: &str) {
        self.send(outcome, code, reason);
        self.logged = false;
    }

    /// Sends a record, and gives up the place that was held for it.
    fn send(&mut self, outcome: &'static str, code: &'static str, reason: &str) {
        let held = std::mem::take(&mut self.held);
        if !self.logged && held == 0 {
            return;
        }
        let elapsed = self.audit.clock.monotonic().saturating_sub(self.began);
        let micros = u64::try_from(elapsed.as_micros()).unwrap_or(u64::MAX);
        if self.logged && outcome != "begin" {
            self.log(outcome, code, reason, micros);
        }
        if held == 0 {
            return;
        }
        let record = Arc::new(Record {
            time: self.audit.clock.now(),
            event: self.event,
            what: self.what.into(),
            outcome,
            code,
            reason: reason.to_owned(),
            request_id: self.who.request_id.into(),
            source: self.who.source,
            principal: self.who.principal.as_str().into(),
            method: self.who.method,
            tenant: self.who.tenant.map(|tenant| tenant.as_str().into()),
            details: std::mem::take(&mut self.details),
            micros,
        });
        for sink in self.audit.held(held) {
            sink.send(Arc::clone(&record));
        }
    }

    fn log(&self, outcome: &str, code: &str, reason: &str, micros: u64) {
        let (principal, tenant) = (self.who.principal, self.who.tenant.map(TenantId::as_str));
        let what = self.what;
        if self.event == CALL {
            tracing::debug!(target: "keyfold::audit", verb = what, %principal, tenant, outcome, code, reason, micros);
        } else {
            tracing::info!(target: "keyfold::audit", change = what, %principal, tenant, outcome, code, reason, micros);
        }
    }
}

impl Drop for Attempt<'_> {
    fn drop(&mut self) {
        self.send("abandoned", "", "");
    }
}
