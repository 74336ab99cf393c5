//! `keyfold health`: asks a running service whether it lives, for a container that has no shell and no curl.

use std::net::SocketAddr;

use clap::Args;

use super::{apply, output};
use crate::config::Settings;
use crate::http::alive;

#[derive(Args)]
pub(super) struct HealthArgs {
    /// Where the service listens, if it was started with --listen.
    #[arg(long, value_name = "ADDR:PORT")]
    listen: Option<SocketAddr>,
    /// The service was started with --tls-self-signed.
    #[arg(long)]
    tls_self_signed: bool,
}

/// Asks `/live` where the settings say that the service listens, and as they say that it speaks.
pub(super) fn run(mut settings: Settings, args: &HealthArgs) -> anyhow::Result<()> {
    apply(&mut settings, args.listen);
    settings.tls.self_signed |= args.tls_self_signed;
    let tls = settings.tls.options(settings.listen, &settings.data_dir);
    alive::ask(settings.listen, tls.as_ref(), &settings.http.server().proxies)?;
    output::line("live");
    Ok(())
}
