//! Who did what: begin -> done | failed | abandoned.
//!
//! An [`Attempt`] that is dropped without an outcome is recorded as abandoned: a client that went away, or a task
//! that died, leaves a trace too. A record names who, what and the outcome, and holds no plaintext, key material or
//! context values (a keyed hash of each instead).
//!
//! A call has one record, written when it ends; a place for it is taken before it begins. A change of administration
//! has two: the first is durable before anything is changed, so that a crash leaves a visible beginning. Without a
//! sink records go to the log under the target `keyfold::audit`: changes at INFO, calls at DEBUG (off by default).

mod asked;
mod attempt;
mod chain;
mod otlp;
mod output;
mod queue;
mod reading;
mod record;
mod room;
mod sink;
mod strangers;
mod tally;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::clock::Clock;
use crate::tenant::{TenantId, Verb};
use otlp::Otlp;
use output::{FileOutput, Opened, Output, Syslog};
use record::{RECORD_BYTES, Record};
use sink::{Settings, Sink, Start};
use strangers::Strangers;

pub use asked::Asked;
pub use attempt::{Attempt, Subject, Who};
pub use chain::{Fault, Keys, Link, Summary, Verifier, WeakKey};
pub use otlp::{OtlpError, OtlpOptions};
pub use output::{FileOptions, Stream, TrailError, TrailFiles, trails};
pub use reading::{Located, Query, ReadError, search, verify};
pub use record::Details;
pub use room::REFS_BYTES_MAX;
pub use sink::OnFull;
pub use strangers::Stranger;
pub use tally::{PartTally, Tally};

/// Where records go, and the audit's limits.
#[derive(Clone, Debug)]
pub struct Options {
    /// The chained file.
    pub file: Option<(FileOptions, OnFull)>,
    /// Standard output, or for a command standard error.
    pub stdout: Option<(Stream, OnFull)>,
    /// The local syslog's socket.
    pub syslog: Option<(PathBuf, OnFull)>,
    /// An OpenTelemetry collector.
    pub otlp: Option<(OtlpOptions, OnFull)>,
    /// How many records may wait for each sink. Default 10,000.
    pub queue_records_max: usize,
    /// After how many records a seal is written. Default 10,000.
    pub seal_records: u64,
    /// After how many seconds with new records a seal is written. Default 10.
    pub seal_secs: u64,
    /// How many calls a second without a valid credential have a record of their own; the others are counted.
    /// Default 10.
    pub strangers_per_sec_max: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            file: None,
            stdout: None,
            syslog: None,
            otlp: None,
            queue_records_max: 10_000,
            seal_records: 10_000,
            seal_secs: 10,
            strangers_per_sec_max: 10,
        }
    }
}

impl Options {
    /// Whether there is any sink.
    pub fn is_on(&self) -> bool {
        self.file.is_some() || self.stdout.is_some() || self.syslog.is_some() || self.otlp.is_some()
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
    trail: Option<Arc<Trail>>,
    strangers: Arc<Strangers>,
}

/// What there is where records are kept.
struct Trail {
    keys: Keys,
    sinks: Vec<Sink>,
}

impl Trail {
    /// Sends a record to the sinks that hold a place for it.
    fn record(&self, held: u8, record: &Record<'_>) {
        if held.is_power_of_two() && record.is_short() {
            // Where it will lie.
            return self.held(held).for_each(|sink| sink.send(|line| record.write(&self.keys, line)));
        }
        let mut body = Vec::with_capacity(RECORD_BYTES);
        record.write(&self.keys, &mut body);
        self.held(held).for_each(|sink| sink.send(|line| line.extend_from_slice(&body)));
    }

    fn held(&self, held: u8) -> impl Iterator<Item = &Sink> {
        self.sinks.iter().enumerate().filter(move |(at, _)| held & (1 << at) != 0).map(|(_, sink)| sink)
    }
}

impl Audit {
    /// Records into the log only.
    pub fn new(clock: Clock) -> Self {
        Self { clock, trail: None, strangers: Arc::default() }
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
            Ok::<_, TrailError>(())
        };
        if let Some((file, on_full)) = &options.file {
            let Opened { output, link, is_new, torn_bytes } = FileOutput::open(file, keys)?;
            start("file", *on_full, Start { output: Box::new(output), link, is_new, torn_bytes })?;
        }
        let fresh =
            |output: Box<dyn Output>| Start { output, link: Link::START, is_new: true, torn_bytes: 0 };
        if let Some((stream, on_full)) = options.stdout {
            start("stdout", on_full, fresh(Box::new(stream)))?;
        }
        if let Some((path, on_full)) = &options.syslog {
            start("syslog", *on_full, fresh(Box::new(Syslog::new(path.clone()))))?;
        }
        if let Some((otlp, on_full)) = &options.otlp {
            start("otlp", *on_full, fresh(Box::new(Otlp::new(otlp.clone())?)))?;
        }
        let strangers = Strangers::new(options.strangers_per_sec_max);
        let trail = (!sinks.is_empty()).then(|| Arc::new(Trail { keys: keys.clone(), sinks }));
        Ok(Self { clock, trail, strangers: Arc::new(strangers) })
    }

    /// A data-plane call begins. Refused where its record would have no room.
    pub async fn begin<'a>(&'a self, verb: Verb, who: Who<'a>) -> Result<Attempt<'a>, Unrecorded> {
        let logged = tracing::enabled!(target: "keyfold::audit", tracing::Level::DEBUG);
        let held = self.reserve().await?;
        let began = if logged || self.trail.is_some() { self.clock.monotonic() } else { Duration::ZERO };
        Ok(Attempt::new(self, CALL, verb.name(), who, (held, logged, began)))
    }

    /// A change of administration begins: what kind (`tenant.create`), and what it asks for. Its beginning is durable
    /// when this returns.
    pub async fn begin_change<'a>(
        &'a self,
        change: &'a str,
        who: Who<'a>,
        asked: Asked,
    ) -> Result<Attempt<'a>, Unrecorded> {
        let tenant = who.tenant.map(TenantId::as_str);
        tracing::info!(target: "keyfold::audit", change, principal = %who.principal, tenant, "begin");
        let began = self.clock.monotonic();
        let held = self.reserve().await?;
        let mut attempt = Attempt::new(self, CHANGE, change, who, (held, true, began));
        attempt.begin(asked);
        attempt.hold(self.reserve().await?);
        for sink in self.sinks() {
            if !sink.durable().await {
                attempt.end("failed", "audit_unavailable", "the audit could not write that it begins");
                return Err(Unrecorded(sink.name()));
            }
        }
        Ok(attempt)
    }

    /// A call that was refused before any verb took it over.
    pub async fn refused(&self, route: &str, who: Who<'_>, code: &'static str) -> Result<(), Unrecorded> {
        if self.trail.is_none() {
            return Ok(());
        }
        let (held, began) = (self.reserve().await?, self.clock.monotonic());
        let what = &route[..route.floor_char_boundary(ROUTE_BYTES_MAX)];
        Attempt::new(self, CALL, what, who, (held, false, began)).end("refused", code, "");
        Ok(())
    }

    /// A call of somebody who did not show who he is. It is refused whether that can be recorded or not, and nobody
    /// is kept from his work by strangers: past [`Options::strangers_per_sec_max`], and where the queue has no room,
    /// they are only counted, and the next record tells how many they were.
    pub fn turned_away(&self, route: &str, stranger: Stranger<'_>, code: &'static str) {
        let Some(trail) = &self.trail else { return };
        let now = self.clock.monotonic();
        if !self.strangers.may_be_recorded(now) {
            return;
        }
        let held = self.try_reserve();
        if held == 0 {
            self.strangers.unrecorded();
            return;
        }
        let record = Record {
            time: self.clock.now(),
            event: CALL,
            what: &route[..route.floor_char_boundary(ROUTE_BYTES_MAX)],
            outcome: "refused",
            code,
            request_id: stranger.request_id,
            source: stranger.source,
            reason: stranger.reason,
            more: self.strangers.take_unrecorded(),
            ..Record::default()
        };
        trail.record(held, &record);
    }

    /// Waits until everything that was recorded is durable. False where a sink cannot write.
    pub async fn flush(&self) -> bool {
        let mut all = true;
        for sink in self.sinks() {
            all &= sink.durable().await;
        }
        all
    }

    /// Seals and ends the sinks. Blocks until they are done.
    pub fn close(&self) {
        self.sinks().iter().for_each(Sink::close);
    }

    /// Takes a place in every sink's queue; a bit for each that has given one.
    async fn reserve(&self) -> Result<u8, Unrecorded> {
        let mut held = 0;
        for (at, sink) in self.sinks().iter().enumerate() {
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

    /// The places that there are at once, and leaves half of each queue to those who are known.
    fn try_reserve(&self) -> u8 {
        let reserved = self.sinks().iter().enumerate().filter(|(_, sink)| sink.try_reserve());
        reserved.fold(0, |held, (at, _)| held | 1 << at)
    }

    fn release(&self, held: u8) {
        self.trail.iter().flat_map(|trail| trail.held(held)).for_each(Sink::release);
    }

    fn sinks(&self) -> &[Sink] {
        self.trail.as_ref().map_or(&[], |trail| &trail.sinks)
    }
}

const CALL: &str = "call";
const CHANGE: &str = "change";
/// How much of a path is recorded.
const ROUTE_BYTES_MAX: usize = 200;
