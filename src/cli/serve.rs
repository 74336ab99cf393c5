//! `keyfold serve`

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use clap::Args;

use super::{Common, apply, dev, output};
use crate::app::{App, Locking, harden};
use crate::clock::Clock;
use crate::config::{LogFormat, Settings, Variables};
use crate::http::server::{self, ServerHandle};
use crate::http::tls::Tls;
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
    /// For trying it out: TLS with a certificate that is made at each start, and written to tls-self-signed.pem in
    /// the data folder for clients to trust.
    #[arg(long)]
    tls_self_signed: bool,
}

pub(super) fn run(common: &Common, args: ServeArgs, variables: &Variables) -> anyhow::Result<()> {
    let mut settings = common.settings(variables)?;
    apply(&mut settings, args.listen);
    settings.tls.self_signed |= args.tls_self_signed;
    settings.audit.is_of_command = false;
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
        output::note(welcome.text(address, &settings));
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
    let tls = open_tls(&settings, address, &app)?;
    let unix = settings.listen_unix.as_deref().map(server::bind_unix).transpose();
    let unix = unix.context("cannot listen on the unix socket that listen_unix names")?;
    tracing::info!(%address, tls = tls.is_some(), version = env!("CARGO_PKG_VERSION"), "ready");
    let (front, options) = (app.front.clone(), settings.http.server());
    let local = async {
        match unix {
            Some(unix) => server::serve_unix(unix, front.clone(), &options, handle.clone()).await,
            None => Ok(()),
        }
    };
    let network = async {
        match &tls {
            Some(tls) => server::serve_tls(listener, front.clone(), tls, &options, handle.clone()).await,
            None => server::serve(listener, front.clone(), &options, handle.clone()).await,
        }
    };
    let served = tokio::try_join!(network, local).map(|_| ());
    if let Some(path) = &settings.listen_unix {
        // A socket that nobody listens on only misleads.
        let _ = std::fs::remove_file(path);
    }
    app.stop().await;
    tracing::info!("stopped");
    served.context("the listener failed")
}

fn open_tls(settings: &Settings, address: SocketAddr, app: &App) -> anyhow::Result<Option<Arc<Tls>>> {
    let Some(options) = settings.tls.options(address, &settings.data_dir) else { return Ok(None) };
    let tls = Tls::open(options, Clock::system(), Arc::clone(app.access.certificates()))?;
    let tls = Arc::new(tls);
    app.lifecycle.tracker.spawn(Arc::clone(&tls).watch(app.lifecycle.soft.clone()));
    Ok(Some(tls))
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
