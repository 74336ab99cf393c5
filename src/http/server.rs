//! The listener: HTTP/1.1 and HTTP/2 over a socket that is already bound.

use std::net::{SocketAddr, TcpListener};
use std::time::Duration;

use axum::Router;
use axum_server::Handle;
use axum_server::accept::NoDelayAcceptor;

/// The listener's limits.
#[derive(Clone, Debug)]
pub struct Options {
    /// How long a client may take to send a request's head, in seconds. Default 10.
    pub head_secs_max: u64,
    /// The largest head of a request, in bytes: 8,192 or more. Default 32 KiB.
    pub head_bytes_max: usize,
    /// How many requests one HTTP/2 connection may have open at once. Default 128.
    pub streams_max: u32,
}

impl Default for Options {
    fn default() -> Self {
        Self { head_secs_max: 10, head_bytes_max: 32 << 10, streams_max: 128 }
    }
}

/// Makes aws-lc-rs what speaks TLS in this process, for whoever asks for no other.
pub fn use_crypto_provider() {
    // Somebody else was first: it is the same one.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
}

/// Stops a server that runs.
#[derive(Clone)]
pub struct ServerHandle(Handle<SocketAddr>);

impl ServerHandle {
    /// Takes no more connections, lets what is in flight finish within `grace`, then ends.
    pub fn stop(&self, grace: Duration) {
        self.0.graceful_shutdown(Some(grace));
    }

    /// Ends at once.
    pub fn abort(&self) {
        self.0.shutdown();
    }

    /// How many connections are open.
    pub fn connections(&self) -> usize {
        self.0.connection_count()
    }
}

impl Default for ServerHandle {
    fn default() -> Self {
        Self(Handle::new())
    }
}

/// Serves until the handle stops it.
pub async fn serve(
    listener: TcpListener,
    router: Router,
    options: &Options,
    handle: ServerHandle,
) -> std::io::Result<()> {
    let head_time = Duration::from_secs(options.head_secs_max);
    let mut server = axum_server::from_tcp(listener)?
        .acceptor(NoDelayAcceptor::new())
        .handle(handle.0)
        // Bounds a connection that sends nothing at all, before it is known which protocol it will speak.
        .first_request_timeout(head_time);
    let builder = server.http_builder();
    builder.http1().header_read_timeout(head_time).max_buf_size(options.head_bytes_max.max(8_192));
    builder
        .http2()
        .max_concurrent_streams(options.streams_max)
        .max_header_list_size(u32::try_from(options.head_bytes_max).unwrap_or(u32::MAX))
        .keep_alive_interval(head_time)
        .keep_alive_timeout(head_time);
    server.serve(router.into_make_service_with_connect_info::<SocketAddr>()).await
}
