//! `keyfold encrypt|decrypt|rewrap FILE...`: files of any size through a service, or straight against a KMS.

mod offline;
mod output_file;
mod places;
mod remote;

use std::os::fd::AsFd as _;
use std::path::PathBuf;

use anyhow::{Context as _, bail};
use clap::Args;
use envelope::{EncryptionContext, text};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use tokio::fs::File;
use tokio::io::{AsyncRead, AsyncReadExt as _};

use super::interrupt::interrupted;
use super::{Common, block_on, output};
use crate::config::Variables;
use crate::tenant::{Kek, KekId, KekRing, KeyName, TenantId};
use output_file::OutputFile;
use places::Job;

/// What all three take.
#[derive(Args)]
struct FileArgs {
    /// The files, or with --recursive folders; standard input where none, or `-`, is named.
    files: Vec<PathBuf>,
    /// Where the result goes; `-` is standard output. For one file only.
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Go into folders, and report at the end. Symbolic links are not followed.
    #[arg(short, long)]
    recursive: bool,
    /// Overwrite results that are there already.
    #[arg(short, long)]
    force: bool,
    /// A pair of the encryption context; may be given several times. Decryption needs the same.
    #[arg(short = 'c', long = "context", value_name = "NAME=VALUE")]
    pairs: Vec<String>,
    /// The tenant. Offline, encryption needs it, and decryption checks it where it is given.
    #[arg(long, env = "KEYFOLD_TENANT")]
    tenant: Option<TenantId>,
    /// The service. Its API key comes from KEYFOLD_API_KEY.
    #[arg(long, env = "KEYFOLD_URL", value_name = "URL")]
    url: Option<String>,
    /// Talk to a service without TLS that is not on this machine: your API key and plaintext cross the network
    /// unprotected.
    #[arg(long)]
    unprotected_http: bool,
    /// Offline: straight against this master key (an AWS KMS key's ARN or local:NAME), without a service; may be given
    /// several times. Only KEKs that you name are asked.
    #[arg(long = "kek", value_name = "KEK")]
    keks: Vec<KekId>,
}

#[derive(Args)]
pub(super) struct EncryptArgs {
    #[command(flatten)]
    files: FileArgs,
    /// Under which of the tenant's keys.
    #[arg(long, default_value_t)]
    key: KeyName,
    /// What the envelope carries, with a service: `embedded` or `compact`.
    #[arg(long, value_parser = ["embedded", "compact"])]
    envelope: Option<String>,
}

#[derive(Args)]
pub(super) struct DecryptArgs {
    #[command(flatten)]
    files: FileArgs,
}

#[derive(Args)]
pub(super) struct RewrapArgs {
    #[command(flatten)]
    files: FileArgs,
    /// Offline: the master keys that open the file from now on; where none is named, those of --kek.
    #[arg(long = "to-kek", value_name = "KEK", requires = "keks")]
    to_keks: Vec<KekId>,
}

/// What is done to each file.
enum Verb {
    Encrypt { key: KeyName, weight: Option<String> },
    Decrypt,
    Rewrap { to: Option<KekRing> },
}

/// Who does it.
enum Way {
    Service(remote::Service),
    Offline(Box<offline::Direct>),
}

/// What came of a file.
enum Done {
    Written,
    /// It was up to date: in place nothing was written, elsewhere the same.
    Unchanged,
}

pub(super) fn encrypt(common: &Common, args: EncryptArgs, variables: &Variables) -> anyhow::Result<()> {
    let verb = Verb::Encrypt { key: args.key, weight: args.envelope };
    run(common, &args.files, &verb, variables)
}

pub(super) fn decrypt(common: &Common, args: &DecryptArgs, variables: &Variables) -> anyhow::Result<()> {
    run(common, &args.files, &Verb::Decrypt, variables)
}

pub(super) fn rewrap(common: &Common, args: RewrapArgs, variables: &Variables) -> anyhow::Result<()> {
    let to = if args.to_keks.is_empty() { None } else { Some(ring(args.to_keks)?) };
    run(common, &args.files, &Verb::Rewrap { to }, variables)
}

fn run(common: &Common, args: &FileArgs, verb: &Verb, variables: &Variables) -> anyhow::Result<()> {
    let (context, jobs) = (context(&args.pairs)?, places::jobs(args, verb)?);
    block_on(async {
        let way = way(common, args, verb, variables).await?;
        // Temporary files are removed on the way out.
        tokio::select! {
            done = all(&way, verb, args, &context, jobs) => done,
            ended = interrupted() => {
                ended?;
                bail!("interrupted: the file at hand was not written")
            }
        }
    })
}

async fn way(common: &Common, args: &FileArgs, verb: &Verb, variables: &Variables) -> anyhow::Result<Way> {
    if args.keks.is_empty() {
        let Some(url) = &args.url else {
            bail!(
                "name the service with --url or KEYFOLD_URL, or a master key with --kek to work without one"
            );
        };
        return Ok(Way::Service(remote::Service::new(url, args, variables)?));
    }
    let settings = common.settings(variables)?;
    let keks = ring(args.keks.clone())?;
    Ok(Way::Offline(Box::new(
        offline::Direct::open(&settings, variables, keks, args.tenant.clone(), verb).await?,
    )))
}

fn ring(keks: Vec<KekId>) -> anyhow::Result<KekRing> {
    Ok(KekRing::new(keks.into_iter().map(Kek::direct).collect())?)
}

fn context(pairs: &[String]) -> anyhow::Result<EncryptionContext> {
    let mut context = EncryptionContext::new();
    for pair in pairs {
        let (name, value) = pair
            .split_once('=')
            .with_context(|| format!("--context takes NAME=VALUE, and {pair:?} has no '='"))?;
        context.insert(name, value).with_context(|| format!("the context pair {name:?} is not valid"))?;
    }
    Ok(context)
}

/// Does all of it: a single failure ends a single file's work, and is only reported among many.
async fn all(
    way: &Way,
    verb: &Verb,
    args: &FileArgs,
    context: &EncryptionContext,
    jobs: places::Jobs,
) -> anyhow::Result<()> {
    let (mut written, mut unchanged, mut failed) = (0, 0, jobs.unreadable.len());
    let many = args.recursive || jobs.files.len() > 1;
    for error in &jobs.unreadable {
        output::error(error);
    }
    for job in &jobs.files {
        let done = one(way, verb, args, context, job).await;
        match done {
            Ok(Done::Written) => written += 1,
            Ok(Done::Unchanged) => unchanged += 1,
            Err(error) if many => {
                failed += 1;
                output::error(&error.context(job.name()));
            }
            Err(error) => return Err(error.context(job.name())),
        }
    }
    if many {
        let skipped = jobs.skipped;
        output::note(format_args!(
            "{written} written, {unchanged} up to date, {skipped} skipped, {failed} failed"
        ));
    }
    if failed > 0 {
        bail!("{failed} file(s) failed");
    }
    Ok(())
}

async fn one(
    way: &Way,
    verb: &Verb,
    args: &FileArgs,
    context: &EncryptionContext,
    job: &Job,
) -> anyhow::Result<Done> {
    let mut input = Input::open(job, verb).await?;
    let mut output = OutputFile::open(&job.target, job.source.as_deref(), args.force)?;
    input.bar.set_message(job.name());
    let done = match way {
        Way::Service(service) => service.carry_out(verb, context, &mut input, &mut output).await,
        Way::Offline(direct) => direct.carry_out(verb, context, &mut input, &mut output).await,
    };
    input.bar.finish_and_clear();
    let done = done?;
    // In place there is nothing to replace; elsewhere somebody waits for the same.
    if !(matches!(done, Done::Unchanged) && output.in_place()) {
        output.finish().await?;
    }
    Ok(done)
}

/// The largest envelope in text form that is taken: it is decoded in memory.
const TEXT_BYTES_MAX: u64 = 64 << 20;

/// What is read.
struct Input {
    reader: Box<dyn AsyncRead + Send + Unpin>,
    bar: ProgressBar,
}

impl Input {
    async fn open(job: &Job, verb: &Verb) -> anyhow::Result<Self> {
        let file = match &job.source {
            Some(path) => File::open(path).await,
            None => stdin(),
        };
        let file = file.context("cannot be read")?;
        let bytes = file.metadata().await.ok().filter(std::fs::Metadata::is_file).map(|file| file.len());
        let mut reader: Box<dyn AsyncRead + Send + Unpin> = Box::new(file);
        if !matches!(verb, Verb::Encrypt { .. }) {
            reader = binary(reader).await?;
        }
        // Where nobody looks, nothing is drawn.
        let bar = ProgressBar::with_draw_target(bytes, ProgressDrawTarget::stderr());
        let style = "{msg} {bytes}/{total_bytes} {bar:30} {bytes_per_sec} {eta}";
        bar.set_style(ProgressStyle::with_template(style)?);
        let reader = Box::new(bar.wrap_async_read(reader));
        Ok(Self { reader, bar })
    }
}

/// As it was given to this process: by its path it cannot be opened where it is a socket, or was opened by another user.
fn stdin() -> std::io::Result<File> {
    Ok(File::from_std(std::io::stdin().as_fd().try_clone_to_owned()?.into()))
}

/// An envelope in binary form, whichever form it comes in: the text form is what databases hold.
async fn binary(
    mut reader: Box<dyn AsyncRead + Send + Unpin>,
) -> anyhow::Result<Box<dyn AsyncRead + Send + Unpin>> {
    let mut first = Vec::new();
    (&mut reader).take(text::PREFIX.len() as u64).read_to_end(&mut first).await?;
    if first != text::PREFIX.as_bytes() {
        return Ok(Box::new(std::io::Cursor::new(first).chain(reader)));
    }
    (&mut reader).take(TEXT_BYTES_MAX).read_to_end(&mut first).await?;
    if first.len() as u64 >= TEXT_BYTES_MAX {
        bail!(
            "an envelope in text form may have {TEXT_BYTES_MAX} bytes at most: send large ones in binary form"
        );
    }
    let text = std::str::from_utf8(&first).map_err(|_| envelope::FormatError::TextEncoding)?;
    let envelope = text::decode(text.trim_end_matches(['\r', '\n']))?;
    Ok(Box::new(std::io::Cursor::new(envelope)))
}
