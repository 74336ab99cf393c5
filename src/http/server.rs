//! The listeners: HTTP/1.1 and HTTP/2 over sockets that are already bound.

use std::convert::Infallible;
use std::future::{Ready, ready};
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::os::unix::net::{SocketAddr as UnixAddr, UnixListener};
use std::sync::Arc;
use std::time::Duration;

use axum_server::accept::{DefaultAcceptor, NoDelayAcceptor};
use axum_server::tls_rustls::RustlsAcceptor;
use axum_server::{Address, Handle, Server};
use tower::Service;

use super::connection::{Bounded, Times};
use super::front::Front;
use super::source::{Proxies, ProxyHeaders};
use super::tls::Tls;

/// The listener's limits.
#[derive(Clone, Debug)]
pub struct Options {
    /// How long a client may take to send a request's head, in seconds: its first; a later one on the same
    /// connection has `connection_idle_secs_max`, and is given up before twice that. Default 10.
    pub head_secs_max: u64,
    /// The largest head of a request, in bytes: 8,192 or more. Default 32 KiB.
    pub head_bytes_max: usize,
    /// How many requests one HTTP/2 connection may have open at once. Default 128.
    pub streams_max: u32,
    /// How many connections a listener may have open at once; further ones are closed at once. Default 4,096.
    pub connections_max: usize,
    /// How long a connection may be open without a request or a body's bytes, in seconds: it is closed after that,
    /// and before twice that. No less than a request may take. Default 60.
    pub connection_idle_secs_max: u64,
    /// How long, in seconds, the rest of a body is taken and let go where it was answered before it was read: a client
    /// that sends all before it reads would not see the answer otherwise. Default 5.
    pub linger_secs_max: u64,
    /// The load balancers whose word for a connection's source is taken. Default none.
    pub proxies: Arc<Proxies>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            head_secs_max: 10,
            head_bytes_max: 32 << 10,
            streams_max: 128,
            connections_max: 4_096,
            connection_idle_secs_max: 60,
            linger_secs_max: 5,
            proxies: Arc::default(),
        }
    }
}

/// Makes aws-lc-rs what speaks TLS in this process, for whoever asks for no other.
pub fn use_crypto_provider() {
    // Somebody else was first: it is the same one.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
}

/// Stops listeners that run.
#[derive(Clone)]
pub struct ServerHandle {
    tcp: Handle<SocketAddr>,
    unix: Handle<UnixAddr>,
}

impl ServerHandle {
    /// Takes no more connections, lets what is in flight finish within `grace`, then ends.
    pub fn stop(&self, grace: Duration) {
        self.tcp.graceful_shutdown(Some(grace));
        self.unix.graceful_shutdown(Some(grace));
    }

    /// Ends at once.
    pub fn abort(&self) {
        self.tcp.shutdown();
        self.unix.shutdown();
    }

    /// How many connections are open.
    pub fn connections(&self) -> usize {
        self.tcp.connection_count() + self.unix.connection_count()
    }
}

impl Default for ServerHandle {
    fn default() -> Self {
        Self { tcp: Handle::new(), unix: Handle::new() }
    }
}

/// Serves HTTP without TLS until the handle stops it.
pub async fn serve(
    listener: TcpListener,
    front: impl Into<Front>,
    options: &Options,
    handle: ServerHandle,
) -> std::io::Result<()> {
    let server = limited(axum_server::from_tcp(listener)?, options).handle(handle.tcp);
    let server = server.acceptor(bounded(network(options), options));
    server.serve(knowing_peers(front.into(), |peer: SocketAddr| Some(peer.ip()))).await
}

/// Serves HTTP over TLS until the handle stops it.
pub async fn serve_tls(
    listener: TcpListener,
    front: impl Into<Front>,
    tls: &Tls,
    options: &Options,
    handle: ServerHandle,
) -> std::io::Result<()> {
    let server = limited(axum_server::from_tcp(listener)?, options).handle(handle.tcp);
    let acceptor = RustlsAcceptor::new(tls.config())
        .handshake_timeout(tls.handshake_time_max())
        .acceptor(network(options));
    let server = server.acceptor(bounded(acceptor, options));
    server.serve(knowing_peers(front.into(), |peer: SocketAddr| Some(peer.ip()))).await
}

/// Serves HTTP on a unix socket until the handle stops it.
pub async fn serve_unix(
    listener: UnixListener,
    front: impl Into<Front>,
    options: &Options,
    handle: ServerHandle,
) -> std::io::Result<()> {
    let server = limited(axum_server::from_unix(listener)?, options).handle(handle.unix);
    let server = server.acceptor(bounded(DefaultAcceptor::new(), options));
    server.serve(knowing_peers(front.into(), |_: UnixAddr| None)).await
}

/// Binds a unix socket that its owner and group can use. The socket of a process that is gone is replaced; that of
/// one that listens is not.
pub fn bind_unix(path: &std::path::Path) -> std::io::Result<UnixListener> {
    use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
    let is_socket = std::fs::symlink_metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket());
    if is_socket && std::os::unix::net::UnixStream::connect(path).is_err() {
        std::fs::remove_file(path)?;
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o660))?;
    Ok(listener)
}

/// What serves a connection: the same for all, but that it knows whose the connection is.
fn knowing_peers<A>(
    front: Front,
    ip: impl Fn(A) -> Option<IpAddr>,
) -> impl Service<A, Response = Front, Error = Infallible, Future = Ready<Result<Front, Infallible>>> {
    tower::service_fn(move |peer| ready(Ok(front.clone().of_peer(ip(peer)))))
}

fn network(options: &Options) -> ProxyHeaders<NoDelayAcceptor> {
    let time_max = Duration::from_secs(options.head_secs_max);
    ProxyHeaders::new(NoDelayAcceptor::new(), Arc::clone(&options.proxies), time_max)
}

fn bounded<A>(acceptor: A, options: &Options) -> Bounded<A> {
    let idle = Duration::from_secs(options.connection_idle_secs_max);
    let linger = Duration::from_secs(options.linger_secs_max);
    Bounded::new(acceptor, options.connections_max, Times { idle, linger })
}

fn limited<A: Address, Acc>(server: Server<A, Acc>, options: &Options) -> Server<A, Acc> {
    let head_time = Duration::from_secs(options.head_secs_max);
    // Bounds a connection that sends nothing at all, before it is known which protocol it will speak.
    let mut server = server.first_request_timeout(head_time);
    let builder = server.http_builder();
    // A later head has the connection's idle time: hyper's own limit would make and end a timer for every request.
    builder.http1().header_read_timeout(None).max_buf_size(options.head_bytes_max.max(8_192));
    builder
        .http2()
        .max_concurrent_streams(options.streams_max)
        .max_header_list_size(u32::try_from(options.head_bytes_max).unwrap_or(u32::MAX))
        .keep_alive_interval(head_time)
        .keep_alive_timeout(head_time);
    server
}
