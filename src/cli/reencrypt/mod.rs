//! `keyfold reencrypt`: brings the envelopes that clients hold up to date, in bulk, through a running service.
//!
//! Rows are read in pages, in the order of their keys or lines. A page goes to `/v1/rewrap/batch`, and what comes back
//! is written in one transaction, each row only if it still holds what was read. After that the state file is replaced.
//! So whenever the command dies, a row is old or new, and both open; the next run goes on after the last page that was
//! written, and doing a page twice changes nothing.

mod csv_file;
mod files;
mod job;
mod ndjson;
mod postgres;
mod report;
mod row;
mod service;
mod sql;
mod sqlite;
mod state;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use clap::{Args, ValueEnum};
use envelope::EncryptionContext;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::json;

use super::interrupt::interrupted;
use super::transport::Transport;
use super::{block_on, output};
use crate::clock::Clock;
use crate::config::Variables;
use crate::tenant::TenantId;
use files::{Input, Output, OutputOptions};
use job::{Pace, Work};
use ndjson::Fields;
use row::{Contexts, Place};
use service::{Mode, Service, Weight};
use sql::Table;
use state::{Parameters, StateFile};

/// A batch of the service takes no more by default.
const BATCH_ROWS_MAX: u32 = 10_000;
/// More would not be faster: the service has its own limit.
const CONCURRENCY_MAX: u16 = 64;

#[derive(Args)]
#[expect(clippy::struct_excessive_bools, reason = "flags of a command line are independent of each other")]
pub(super) struct ReencryptArgs {
    /// The file of rows; standard input where none, or `-`, is named.
    #[arg(conflicts_with = "database")]
    input: Option<PathBuf>,
    /// Where the rows go; standard output where nothing is said. It may be the input itself.
    #[arg(short, long, value_name = "FILE", conflicts_with = "database")]
    output: Option<PathBuf>,
    /// What the rows are; told by the name of the input where nothing is said.
    #[arg(long, conflicts_with = "database")]
    format: Option<Format>,
    /// What stands between two fields of CSV.
    #[arg(long, default_value = ",", value_name = "CHARACTER")]
    delimiter: char,
    /// Overwrite the output.
    #[arg(short, long)]
    force: bool,
    /// A database instead of a file: sqlite:FILE or postgres://USER@HOST/DATABASE. With a password in it, use the
    /// variable, which others on this machine do not see.
    #[arg(long, env = "KEYFOLD_REENCRYPT_DATABASE", hide_env_values = true, value_name = "URL")]
    database: Option<String>,
    /// The schema of the table (PostgreSQL).
    #[arg(long, requires = "database")]
    schema: Option<String>,
    /// The table.
    #[arg(long, requires = "database")]
    table: Option<String>,
    /// What tells the rows apart: in a table a primary key or another unique column; in a file any column, to name rows
    /// by.
    #[arg(long, value_name = "COLUMN")]
    key_column: Option<String>,
    /// The column, or field, that holds the envelope: in text form or in base64; in a database also as bytes.
    #[arg(long, value_name = "COLUMN")]
    column: String,
    /// A pair of the encryption context whose value stands in a column; may be given several times.
    #[arg(long = "context-column", value_name = "[NAME=]COLUMN")]
    context_columns: Vec<String>,
    /// A pair of the encryption context that is the same for all rows; may be given several times.
    #[arg(short = 'c', long = "context", value_name = "NAME=VALUE")]
    pairs: Vec<String>,
    /// How far to go.
    #[arg(long, value_enum, default_value_t = Mode::Auto)]
    mode: Mode,
    /// What the envelopes are to carry; as their key's policy says where nothing is said.
    #[arg(long)]
    envelope: Option<Weight>,
    /// Ask the service, write nothing, and say what would be.
    #[arg(long)]
    dry_run: bool,
    /// Remember here how far it is, and go on there the next time.
    #[arg(long, value_name = "FILE")]
    state: Option<PathBuf>,
    /// How many rows are read, sent and written together.
    #[arg(long, default_value_t = 1_000, value_parser = clap::value_parser!(u32).range(1..=i64::from(BATCH_ROWS_MAX)))]
    batch_rows: u32,
    /// How many batches are with the service at once.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=i64::from(CONCURRENCY_MAX)))]
    concurrency: u16,
    /// No more rows in a second than this.
    #[arg(long, value_name = "ROWS", value_parser = clap::value_parser!(u32).range(1..))]
    rows_per_sec_max: Option<u32>,
    /// For how long a service that does not answer, or says that it is busy, is tried again.
    #[arg(long, default_value_t = 300, value_name = "SECS")]
    retry_secs_max: u64,
    /// Stop when more rows than this have failed.
    #[arg(long, default_value_t = 1_000, value_name = "ROWS")]
    failures_max: usize,
    /// Report in JSON.
    #[arg(long)]
    json: bool,
    /// The tenant, where the credential holds several.
    #[arg(long, env = "KEYFOLD_TENANT")]
    tenant: Option<TenantId>,
    /// The service. Its API key comes from KEYFOLD_API_KEY.
    #[arg(long, env = "KEYFOLD_URL", value_name = "URL")]
    url: String,
    /// Talk to a service without TLS that is not on this machine: your API key crosses the network unprotected.
    #[arg(long)]
    unprotected_http: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    Ndjson,
    Csv,
}

/// Where the rows are.
enum Source<'a> {
    Sqlite(&'a Path),
    Postgres(&'a str),
    File(Option<&'a Path>, Format),
}

pub(super) fn run(args: &ReencryptArgs, variables: &Variables) -> anyhow::Result<()> {
    block_on(async {
        tokio::select! {
            done = reencrypt(args, variables) => done,
            ended = interrupted() => {
                ended?;
                bail!("interrupted: {}", args.left())
            }
        }
    })
}

async fn reencrypt(args: &ReencryptArgs, variables: &Variables) -> anyhow::Result<()> {
    let source = args.source()?;
    let contexts = args.contexts()?;
    let (job, input) = args.job(&source, &contexts)?;
    let transport = Transport::new(&args.url, args.tenant.as_ref(), args.unprotected_http, variables)?;
    let service = Arc::new(Service {
        transport,
        clock: Clock::system(),
        mode: args.mode,
        weight: args.envelope,
        retry_max: Duration::from_secs(args.retry_secs_max),
    });
    let state = StateFile::open(args.state.clone(), job, &input)?;
    let cursor = state.state.cursor.clone();
    match source {
        Source::Sqlite(file) => {
            let table = args.table()?;
            let place = sqlite::SqliteTable::open(file, &table, contexts, &cursor, args.dry_run).await?;
            work(args, place, service, state).await
        }
        Source::Postgres(url) => {
            let table = args.table()?;
            let clock = service.clock.clone();
            let place =
                postgres::PostgresTable::open(url, &table, contexts, clock, &cursor, args.dry_run).await?;
            work(args, place, service, state).await
        }
        Source::File(path, format) => {
            let input = Input::open(path)?;
            let output = args.open_output(path, cursor["output_bytes"].as_u64().unwrap_or_default())?;
            let fields = Fields { column: args.column.clone(), key: args.key_column.clone(), contexts };
            match format {
                Format::Ndjson => {
                    let place = ndjson::Ndjson::open(input, output, fields, &cursor)?;
                    work(args, place, service, state).await
                }
                Format::Csv => {
                    let delimiter = u8::try_from(args.delimiter).ok().filter(u8::is_ascii);
                    let delimiter = delimiter.context("--delimiter takes one ASCII character")?;
                    let place = csv_file::CsvFile::open(input, output, fields, delimiter, &cursor)?;
                    work(args, place, service, state).await
                }
            }
        }
    }
}

async fn work<P: Place>(
    args: &ReencryptArgs,
    mut place: P,
    service: Arc<Service>,
    state: StateFile,
) -> anyhow::Result<()> {
    let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
    if !bar.is_hidden() {
        // Counting a large table takes a while: only where somebody sees it.
        bar.set_length(place.total().await?.unwrap_or_default());
        bar.set_style(ProgressStyle::with_template("{pos}/{len} {bar:30} {per_sec} {eta} {msg}")?);
    }
    if state.resumes() {
        output::note(format_args!("going on where it was left, after {} rows", state.state.report.rows));
        let done = state.state.cursor["input_bytes"].as_u64().unwrap_or(state.state.report.rows);
        bar.set_position(done);
    }
    let limits = Pace {
        batch_rows: args.batch_rows as usize,
        concurrency: usize::from(args.concurrency),
        rows_per_sec_max: args.rows_per_sec_max,
        failures_max: args.failures_max,
    };
    let mut work = Work { place, service, pace: limits, state, bar };
    let done = work.run().await;
    work.bar.finish_and_clear();
    let report = &work.state.state.report;
    if args.json {
        args.tell(&serde_json::to_string_pretty(report)?);
    } else {
        report.lines(args.dry_run).iter().for_each(|line| args.tell(line));
    }
    done.with_context(|| format!("it is not finished: {}", args.left()))?;
    let old = report.failed.len() as u64 + if args.dry_run { report.renewed_rows() } else { 0 };
    ensure!(old == 0, "{old} of {} rows are not up to date", report.rows);
    Ok(())
}

impl ReencryptArgs {
    fn source(&self) -> anyhow::Result<Source<'_>> {
        if let Some(url) = &self.database {
            if let Some(file) = url.strip_prefix("sqlite:") {
                return Ok(Source::Sqlite(Path::new(file.strip_prefix("//").unwrap_or(file))));
            }
            ensure!(
                url.starts_with("postgres://") || url.starts_with("postgresql://"),
                "--database takes sqlite:FILE or postgres://USER@HOST/DATABASE"
            );
            return Ok(Source::Postgres(url));
        }
        let path = self.input.as_deref().filter(|path| *path != Path::new("-"));
        let told = path.and_then(Path::extension).and_then(|extension| extension.to_str());
        let format = self.format.or(match told {
            Some("ndjson" | "jsonl") => Some(Format::Ndjson),
            Some("csv") => Some(Format::Csv),
            _ => None,
        });
        let format = format.context("say what the rows are with --format ndjson or --format csv")?;
        ensure!(
            self.state.is_none() || path.is_some() && (self.output_file().is_some() || self.dry_run),
            "--state needs a file to read and a file to write: standard input and output cannot go on where they were"
        );
        Ok(Source::File(path, format))
    }

    fn output_file(&self) -> Option<&Path> {
        self.output.as_deref().filter(|path| *path != Path::new("-"))
    }

    fn open_output(&self, input: Option<&Path>, bytes: u64) -> anyhow::Result<Output> {
        if self.dry_run {
            return Ok(Output::Nowhere);
        }
        let Some(target) = self.output_file() else {
            return Ok(Output::Stdout(std::io::BufWriter::new(std::io::stdout())));
        };
        let options =
            OutputOptions { target, source: input, overwrite: self.force, keep: self.state.is_some() };
        Output::file(&options, bytes)
    }

    fn table(&self) -> anyhow::Result<Table> {
        let key =
            self.key_column.clone().context("name the column that tells the rows apart: --key-column")?;
        ensure!(key != self.column, "--key-column and --column are the same");
        Ok(Table {
            schema: self.schema.clone(),
            name: self.table.clone().context("name the table with --table")?,
            key,
            column: self.column.clone(),
        })
    }

    fn contexts(&self) -> anyhow::Result<Contexts> {
        let mut contexts = Contexts { constant: std::collections::BTreeMap::new(), columns: Vec::new() };
        // The same rules as for the context itself, before the first row is read.
        let mut names = EncryptionContext::new();
        for pair in &self.pairs {
            let (name, value) = pair
                .split_once('=')
                .with_context(|| format!("--context takes NAME=VALUE, and {pair:?} has no '='"))?;
            names.insert(name, value).with_context(|| format!("the context pair {name:?} is not valid"))?;
            contexts.constant.insert(name.to_owned(), value.to_owned());
        }
        for pair in &self.context_columns {
            let (name, column) = pair.split_once('=').unwrap_or((pair, pair));
            names.insert(name, "any").with_context(|| format!("the context pair {name:?} is not valid"))?;
            contexts.columns.push((name.to_owned(), column.to_owned()));
        }
        Ok(contexts)
    }

    /// What the job is, and what it reads: a state file is for one job.
    fn job(
        &self,
        source: &Source<'_>,
        contexts: &Contexts,
    ) -> anyhow::Result<(Parameters, serde_json::Value)> {
        let absolute =
            |path: &Path| std::path::absolute(path).with_context(|| format!("{} is no path", path.display()));
        let mut input = serde_json::Value::Null;
        let from = match source {
            Source::Sqlite(file) => {
                let file = file.canonicalize().with_context(|| format!("cannot open {}", file.display()))?;
                json!({"sqlite": file, "table": self.table})
            }
            Source::Postgres(url) => {
                json!({"database": postgres::identity(url)?, "schema": self.schema, "table": self.table})
            }
            Source::File(path, format) => {
                input = Input::identity(*path)?;
                let output = self.output_file().map(absolute).transpose()?;
                let delimiter = (*format == Format::Csv).then_some(self.delimiter);
                json!({"file": path.map(absolute).transpose()?, "output": output, "delimiter": delimiter})
            }
        };
        let parameters = [
            ("source", from),
            ("key column", json!(self.key_column)),
            ("column", json!(self.column)),
            ("context", json!({"constant": contexts.constant, "columns": contexts.columns})),
            ("mode", json!(self.mode)),
            ("envelope", json!(self.envelope)),
            ("dry run", json!(self.dry_run)),
            ("url", json!(self.url)),
            ("tenant", json!(self.tenant.as_ref().map(TenantId::as_str))),
        ];
        Ok((parameters.into_iter().map(|(name, value)| (name.to_owned(), value)).collect(), input))
    }

    /// What there is when it ends early.
    fn left(&self) -> &'static str {
        match (self.state.is_some(), self.database.is_some()) {
            (true, _) => "the same command goes on where it was left",
            (false, true) => "what was written is written, and the same command does the rest",
            (false, false) => "nothing was kept",
        }
    }

    /// The report, where it does not mix with the rows.
    fn tell(&self, text: &str) {
        if self.database.is_some() || self.output_file().is_some() || self.dry_run {
            output::line(text);
        } else {
            output::note(text);
        }
    }
}
