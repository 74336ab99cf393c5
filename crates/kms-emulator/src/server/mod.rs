//! The listener, and what it serves: KMS and STS at `/`, the emulator's own controls under `/_emulator`.

mod control;
mod faulty;
mod kms;
mod sts;
mod wire;

use std::net::SocketAddr;
use std::sync::Arc;

use axum::Router;
use axum::body::Bytes;
use axum::extract::{ConnectInfo, DefaultBodyLimit, State};
use axum::response::Response;
use http::HeaderMap;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use self::wire::{WireControl, Wires};
use crate::calls::CallLog;
use crate::engine::Engine;
use crate::faults::Faults;

/// More than any request of AWS's may have.
const MAX_BODY: usize = 256 * 1024;

/// What all handlers and the library share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) engine: Engine,
    pub(crate) faults: Faults,
    pub(crate) calls: CallLog,
    /// Cancelled when the emulator stops: even what a black hole has swallowed then ends.
    pub(crate) stop: CancellationToken,
}

/// Binds `listen` and serves from a task of `tracker`'s until `shared.stop` is cancelled.
pub(crate) async fn start(
    shared: Arc<Shared>,
    listen: SocketAddr,
    tracker: &TaskTracker,
) -> std::io::Result<SocketAddr> {
    let listener = TcpListener::bind(listen).await?;
    let address = listener.local_addr()?;
    let stop = shared.stop.clone();
    let service = router(shared).into_make_service_with_connect_info::<WireControl>();
    tracker.spawn(async move {
        let server = axum::serve(Wires(listener), service);
        if let Err(error) = server.with_graceful_shutdown(stop.cancelled_owned()).await {
            tracing::error!(%error, "the server ended");
        }
    });
    Ok(address)
}

fn router(shared: Arc<Shared>) -> Router {
    Router::new()
        .nest("/_emulator", control::router())
        // AWS serves its APIs at `/`; endpoints with a path in front are accepted too.
        .fallback(aws)
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .with_state(shared)
}

/// KMS names its operation in a header, STS in the form that it is sent.
async fn aws(
    State(shared): State<Arc<Shared>>,
    ConnectInfo(wire): ConnectInfo<WireControl>,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    match headers.get("x-amz-target") {
        Some(target) => kms::serve(&shared, &wire, &headers, target, &body).await,
        None if sts::is_form(&headers) => sts::serve(&shared, &wire, &headers, &body).await,
        None => kms::unknown_operation(),
    }
}
