//! The emulator as a program, for demonstrations and compose files.

use std::io::{IsTerminal as _, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use kms_emulator::{CreateKey, Emulator, Principal, Role};
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

type Result<T, E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

/// An AWS KMS of real semantics for tests and demonstrations. It keeps no secret: never use it for real data.
#[derive(Debug, Parser)]
#[command(version)]
#[expect(clippy::struct_excessive_bools, reason = "each is a switch of the command line")]
struct Arguments {
    /// The address to listen on.
    #[arg(long, env = "KMS_EMULATOR_LISTEN", default_value = "127.0.0.1:4599")]
    listen: SocketAddr,

    /// Keep keys and aliases in this file; without it they are gone when the program ends.
    #[arg(long, env = "KMS_EMULATOR_STATE", value_name = "FILE")]
    state: Option<PathBuf>,

    /// A region to serve (repeatable; the first is the default).
    #[arg(long = "region", env = "KMS_EMULATOR_REGIONS", value_delimiter = ',', default_value = "us-east-1")]
    regions: Vec<String>,

    /// The account of access keys that are not registered.
    #[arg(long, env = "KMS_EMULATOR_ACCOUNT", default_value = "111122223333")]
    account: String,

    /// An access key id and whose it is (repeatable): AKIA1=arn:aws:iam::444455556666:user/alice
    #[arg(long = "principal", value_name = "ACCESS_KEY=ARN", value_parser = parse_pair)]
    principals: Vec<(String, String)>,

    /// A role that can be assumed (repeatable), with the external id that it requires, if any:
    /// arn:aws:iam::444455556666:role/keyfold=EXTERNAL_ID
    #[arg(long = "role", value_name = "ARN[=EXTERNAL_ID]")]
    roles: Vec<String>,

    /// Make a key with this alias in the first region unless there is one (repeatable), and print its ARN. With a
    /// UUID for its id its ARN is known beforehand: alias/demo=1234abcd-12ab-34cd-56ef-1234567890ab
    #[arg(
        long = "create-key",
        env = "KMS_EMULATOR_CREATE_KEYS",
        value_delimiter = ',',
        value_name = "ALIAS[=UUID]"
    )]
    create_keys: Vec<String>,

    /// Make the keys of --create-key multi-Region ones, with a replica and the alias in every region.
    #[arg(long)]
    multi_region: bool,

    /// Refuse access keys that are not registered.
    #[arg(long)]
    strict_credentials: bool,

    /// Ask the emulator at --listen whether it is well, and end: for the health checks of containers.
    #[arg(long)]
    check: bool,

    /// Remember the plaintext data keys and show them under /_emulator/data-keys.
    #[arg(long)]
    remember_data_keys: bool,
}

#[tokio::main]
async fn main() -> ExitCode {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let colours = std::io::stderr().is_terminal();
    tracing_subscriber::fmt().with_env_filter(filter).with_ansi(colours).with_writer(std::io::stderr).init();
    match run(Arguments::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let cause = error.source().map(|cause| format!(": {cause}")).unwrap_or_default();
            tracing::error!("{error}{cause}");
            ExitCode::FAILURE
        }
    }
}

async fn run(arguments: Arguments) -> Result<()> {
    if arguments.check {
        return check(arguments.listen);
    }
    let mut builder = Emulator::builder().listen(arguments.listen).account(arguments.account);
    for region in &arguments.regions {
        builder = builder.region(region);
    }
    for (access_key, arn) in arguments.principals {
        builder = builder.principal(access_key, Principal::new(arn));
    }
    for role in arguments.roles {
        builder = builder.role(match role.split_once('=') {
            Some((arn, external_id)) => Role::new(arn).external_id(external_id),
            None => Role::new(role),
        });
    }
    if let Some(path) = arguments.state {
        builder = builder.state_file(path);
    }
    if arguments.strict_credentials {
        builder = builder.strict_credentials();
    }
    if arguments.remember_data_keys {
        builder = builder.remember_data_keys();
    }
    // Before the first key is printed, so that a signal that comes right after it is not missed.
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let emulator = builder.start().await?;
    tracing::info!(url = emulator.url(), regions = ?emulator.regions(), "listening");
    for key in &arguments.create_keys {
        let arn = provide_key(&emulator, key, arguments.multi_region)?;
        writeln!(std::io::stdout(), "{arn}")?;
    }
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    emulator.shutdown().await;
    Ok(())
}

/// Whether an emulator at this address says that it is well.
fn check(address: SocketAddr) -> Result<()> {
    const TIME_MAX: Duration = Duration::from_secs(2);
    let mut stream = TcpStream::connect_timeout(&address, TIME_MAX)?;
    stream.set_read_timeout(Some(TIME_MAX))?;
    stream.write_all(b"GET /_emulator/health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.take(4_096).read_to_string(&mut answer)?;
    if answer.starts_with("HTTP/1.1 200 ") { Ok(()) } else { Err("it is not well".into()) }
}

/// The ARN of the key with this alias, and this id if one is given, which is made if need be.
fn provide_key(emulator: &Emulator, key: &str, multi_region: bool) -> Result<String> {
    let (alias, id) = key.split_once('=').map_or((key, None), |(alias, id)| (alias, Some(id)));
    let regions = emulator.regions();
    if let Some(arn) = emulator.key_of_alias(&regions[0], alias) {
        return Ok(arn);
    }
    let mut options = CreateKey::new().alias(alias);
    if let Some(id) = id {
        options = options.id(id);
    }
    if !multi_region {
        return Ok(emulator.create_key(&regions[0], options)?);
    }
    let primary = emulator.create_key(&regions[0], options.multi_region())?;
    for region in &regions[1..] {
        let replica = emulator.replicate_key(&primary, region)?;
        emulator.set_alias(alias, &replica)?;
    }
    Ok(primary)
}

fn parse_pair(text: &str) -> Result<(String, String), String> {
    let pair = text.split_once('=').ok_or("not of the form ACCESS_KEY=ARN")?;
    Ok((pair.0.to_owned(), pair.1.to_owned()))
}
