//! The command line. Errors go to people: what is wrong, where, what to do.

mod access;
mod api_key;
mod audit;
mod check_config;
mod dev;
mod doctor;
mod files;
mod grant;
mod health;
mod inspect;
mod interrupt;
mod jobs;
mod keyring;
mod keys;
mod openapi;
mod output;
mod put;
mod reencrypt;
mod serve;
mod tenant;
mod transport;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use crate::config::{Settings, Variables};

/// Encryption as a service: encrypt, decrypt and rewrap over HTTP, with master keys in AWS KMS or in an embedded
/// key ring.
#[derive(Parser)]
#[command(name = "keyfold", version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    common: Common,
}

/// What every command takes.
#[derive(Args, Clone)]
struct Common {
    /// The configuration file (TOML).
    #[arg(long, global = true, env = "KEYFOLD_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    /// Where the service keeps its data.
    #[arg(long, global = true, value_name = "DIR")]
    data_dir: Option<PathBuf>,
}

#[derive(Subcommand)]
enum Command {
    /// Run the service.
    Serve(serve::ServeArgs),
    /// Manage the embedded key ring.
    #[command(subcommand)]
    Keyring(keyring::KeyringCommand),
    /// Manage tenants.
    #[command(subcommand)]
    Tenant(tenant::TenantCommand),
    /// Manage API keys.
    #[command(subcommand)]
    ApiKey(api_key::ApiKeyCommand),
    /// Manage grants: who may do what in a tenant, beside what the configuration says.
    #[command(subcommand)]
    Grant(grant::GrantCommand),
    /// Tell who may do what, and why.
    #[command(subcommand)]
    Access(access::AccessCommand),
    /// Verify and search the record of who did what.
    #[command(subcommand)]
    Audit(audit::AuditCommand),
    /// Encrypt files of any size, through a service or straight against a KMS.
    Encrypt(files::EncryptArgs),
    /// Decrypt files of any size, through a service or straight against a KMS.
    Decrypt(files::DecryptArgs),
    /// Bring encrypted files up to date, in place, through a service or straight against a KMS.
    Rewrap(files::RewrapArgs),
    /// Bring the envelopes in a file or a database table up to date, through a service: NDJSON, CSV, SQLite, PostgreSQL.
    Reencrypt(reencrypt::ReencryptArgs),
    /// Try out the master keys with the credentials at hand, and say what is missing.
    Doctor(doctor::DoctorArgs),
    #[command(flatten)]
    Keys(keys::KeysCommand),
    #[command(flatten)]
    Jobs(jobs::JobsCommand),
    /// Explain the head of an envelope. Needs no key.
    Inspect(inspect::InspectArgs),
    /// Print the OpenAPI document.
    Openapi,
    /// Ask the service that runs here whether it lives; for health checks of containers.
    Health(health::HealthArgs),
    /// Check the configuration, and say what it amounts to.
    CheckConfig,
}

impl Common {
    fn settings(&self, variables: &Variables) -> anyhow::Result<Settings> {
        let mut settings = Settings::load(self.config.as_deref(), variables)?;
        if let Some(data_dir) = &self.data_dir {
            settings.data_dir.clone_from(data_dir);
        }
        settings.audit.is_of_command = true;
        Ok(settings)
    }
}

/// Runs the command that the process was started with.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let variables = Variables::of_process();
    match run(cli, &variables) {
        Ok(()) if output::everything_written() => ExitCode::SUCCESS,
        Ok(()) => {
            output::error(&anyhow::anyhow!("the standard output could not be written"));
            ExitCode::FAILURE
        }
        Err(error) => {
            output::error(&error);
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli, variables: &Variables) -> anyhow::Result<()> {
    let common = cli.common;
    match cli.command {
        Command::Serve(args) => serve::run(&common, args, variables),
        Command::Keyring(command) => block_on(keyring::run(&common.settings(variables)?, command, variables)),
        Command::Tenant(command) => block_on(tenant::run(&common.settings(variables)?, command, variables)),
        Command::ApiKey(command) => block_on(api_key::run(&common.settings(variables)?, command, variables)),
        Command::Grant(command) => block_on(grant::run(&common.settings(variables)?, command, variables)),
        Command::Access(command) => block_on(access::run(&common.settings(variables)?, command)),
        Command::Audit(command) => audit::run(&common.settings(variables)?, command, variables),
        Command::Encrypt(args) => files::encrypt(&common, args, variables),
        Command::Decrypt(args) => files::decrypt(&common, &args, variables),
        Command::Rewrap(args) => files::rewrap(&common, args, variables),
        Command::Reencrypt(args) => reencrypt::run(&args, variables),
        Command::Doctor(args) => block_on(doctor::run(&common.settings(variables)?, args, variables)),
        Command::Keys(command) => block_on(keys::run(&common.settings(variables)?, command, variables)),
        Command::Jobs(command) => block_on(jobs::run(&common.settings(variables)?, command, variables)),
        Command::Inspect(args) => inspect::run(&args),
        Command::Openapi => openapi::run(),
        Command::Health(args) => health::run(common.settings(variables)?, &args),
        Command::CheckConfig => check_config::run(&common.settings(variables)?),
    }
}

/// A command that is not the server needs no threads.
fn block_on(work: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let done = runtime.block_on(work);
    // Standard input may be silent for ever: whoever reads it is not waited for.
    runtime.shutdown_background();
    done
}

/// The flags that override settings of the server.
fn apply(settings: &mut Settings, listen: Option<SocketAddr>) {
    if let Some(listen) = listen {
        settings.listen = listen;
    }
}
