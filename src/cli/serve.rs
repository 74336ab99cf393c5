//! `keyfold serve`

use std::net::{SocketAddr, TcpListener};
use std::time::Duration;

use anyhow::Context as _;
use clap::Args;

use super::{Common, apply, dev, output};
use crate::app::{App, Locking, harden};
use crate::config::{LogFormat, Settings, Variables};
use crate::http::server::{self, ServerHandle};
use crate::telemetry;
use crate::tenant::KekId;

#[derive(Args)]
pub(super) struct ServeArgs {
    /// For trying it out: all defaults, an unencrypted key ring, a tenant `dev`, and an API key for it that is
    /// printed at first start. Never for data that matters.
    #[arg(long)]
    dev: bool,
    /// The master key of the tenant `dev` (with --dev).
    #[arg(long, requires = "dev", value_name = "KEK")]
    kek: Option<KekId>,
    /// Where to listen.
    #[arg(long, value_name = "ADDR:PORT")]
    listen: Option<SocketAddr>,
}

pub(super) fn run(common: &Common, args: ServeArgs, variables: &Variables) -> anyhow::Result<()> {
    let mut settings = common.settings(variables)?;
    apply(&mut settings, args.listen);
    settings.check_listener()?;
    if args.dev && variables.value("KEYFOLD_LOG__FORMAT").is_none() && common.config.is_none() {
        settings.log.format = LogFormat::Text;
    }
    telemetry::start_log(settings.log.format == LogFormat::Json, &settings.log.filter)?;
    // Before the first secret is read.
    let locking = harden(&settings.memory)?;
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?
        .block_on(serve(settings, args, variables, locking))
}

async fn serve(
    settings: Settings,
    args: ServeArgs,
    variables: &Variables,
    locking: Locking,
) -> anyhow::Result<()> {
    // Bound before anything else: a second instance on the same port must not touch the data.
    let listener = TcpListener::bind(settings.listen).with_context(|| {
        format!("cannot listen on {}: name another address with --listen", settings.listen)
    })?;
    let address = listener.local_addr()?;
    let app = if args.dev {
        let (app, welcome) = dev::open(&settings, variables, args.kek).await?;
        output::note(welcome.text(address));
        app
    } else {
        App::open(&settings, variables, false).await?
    };
    if locking == Locking::PagesOfKeys {
        app.pool().lock_pages();
    }
    app.lifecycle.watch_signals()?;
    app.start();
    let handle = ServerHandle::default();
    stop_with(&app, &handle, Duration::from_secs(settings.shutdown_secs_max));
    if !envelope::hardware_accelerated() {
        tracing::warn!(
            "this processor has no AES instructions: encryption runs in software, some 20 times slower"
        );
    }
    tracing::info!(%address, version = env!("CARGO_PKG_VERSION"), "ready");
    let served = server::serve(listener, app.router.clone(), &settings.http.server(), handle).await;
    app.stop().await;
    tracing::info!("stopped");
    served.context("the listener failed")
}

fn stop_with(app: &App, handle: &ServerHandle, grace: Duration) {
    let (soft, hard) = (app.lifecycle.soft.clone(), app.lifecycle.hard.clone());
    let handle = handle.clone();
    app.lifecycle.tracker.spawn(async move {
        soft.cancelled().await;
        handle.stop(grace);
        hard.cancelled().await;
        handle.abort();
    });
}
