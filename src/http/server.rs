//! The listeners: HTTP/1.1 and HTTP/2 over sockets that are already bound.

use std::convert::Infallible;
use std::future::{Future, poll_fn};
use std::io;
use std::net::{IpAddr, TcpListener};
use std::os::unix::net::UnixListener;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Poll, Waker};
use std::time::Duration;

use axum::extract::Request;
use axum::response::Response;
use axum_server::accept::{Accept, DefaultAcceptor, NoDelayAcceptor};
use axum_server::tls_rustls::RustlsAcceptor;
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::task::coop::unconstrained;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::Service;

use super::connection::{Bounded, Times};
use super::front::Front;
use super::source::{Proxies, ProxyHeaders};
use super::tls::Tls;
use crate::spread::Apart;

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
#[derive(Clone, Default)]
pub struct ServerHandle {
    stopped: CancellationToken,
    aborted: CancellationToken,
    /// The same as `stopped`, for whoever asks often: a token is asked under a lock.
    stopping: Arc<Apart<AtomicBool>>,
    grace_ms: Arc<AtomicU64>,
    connections: TaskTracker,
}

impl ServerHandle {
    /// Takes no more connections, lets what is in flight finish within `grace`, then ends.
    pub fn stop(&self, grace: Duration) {
        self.grace_ms.store(u64::try_from(grace.as_millis()).unwrap_or(u64::MAX), Ordering::Relaxed);
        self.stop_accepting();
    }

    /// Ends at once.
    pub fn abort(&self) {
        self.aborted.cancel();
        self.stop_accepting();
    }

    fn stop_accepting(&self) {
        self.stopping.store(true, Ordering::Release);
        self.stopped.cancel();
    }

    /// What a connection has to know.
    fn of_connection(&self) -> Stops {
        // Each has a token of its own: of one that all wait for, all would take the lock for every request.
        let stopped = self.stopped.child_token();
        Stops { stopped, stopping: Arc::clone(&self.stopping), aborted: self.aborted.clone() }
    }

    /// How many connections are open.
    pub fn connections(&self) -> usize {
        self.connections.len()
    }

    /// Waits until all connections have ended, and no longer than they have grace.
    async fn ended(&self) {
        self.connections.close();
        let grace = Duration::from_millis(self.grace_ms.load(Ordering::Relaxed));
        tokio::select! {
            () = self.connections.wait() => {}
            () = self.aborted.cancelled() => {}
            () = tokio::time::sleep(grace) => self.aborted.cancel(),
        }
    }
}

/// When a connection ends before its client wants it to.
struct Stops {
    stopped: CancellationToken,
    stopping: Arc<Apart<AtomicBool>>,
    aborted: CancellationToken,
}

impl Stops {
    /// Waits until the listener stops. Polled for every request: the token is asked once, and then wakes the task.
    async fn stopped(&self) {
        let mut told = pin!(unconstrained(self.stopped.cancelled()));
        let mut asked: Option<Waker> = None;
        poll_fn(|cx| {
            if self.stopping.load(Ordering::Acquire) {
                return Poll::Ready(());
            }
            if asked.as_ref().is_some_and(|asked| asked.will_wake(cx.waker())) {
                return Poll::Pending;
            }
            asked = Some(cx.waker().clone());
            told.as_mut().poll(cx)
        })
        .await;
    }
}

/// Serves HTTP without TLS until the handle stops it.
pub async fn serve(
    listener: TcpListener,
    front: impl Into<Front>,
    options: &Options,
    handle: ServerHandle,
) -> io::Result<()> {
    let acceptor = bounded(network(options), options);
    accept_all(tcp(listener)?, acceptor, front.into(), options, &handle).await;
    Ok(())
}

/// Serves HTTP over TLS until the handle stops it.
pub async fn serve_tls(
    listener: TcpListener,
    front: impl Into<Front>,
    tls: &Tls,
    options: &Options,
    handle: ServerHandle,
) -> io::Result<()> {
    let acceptor = RustlsAcceptor::new(tls.config())
        .handshake_timeout(tls.handshake_time_max())
        .acceptor(network(options));
    let acceptor = bounded(acceptor, options);
    accept_all(tcp(listener)?, acceptor, front.into(), options, &handle).await;
    Ok(())
}

/// Serves HTTP on a unix socket until the handle stops it.
pub async fn serve_unix(
    listener: UnixListener,
    front: impl Into<Front>,
    options: &Options,
    handle: ServerHandle,
) -> io::Result<()> {
    listener.set_nonblocking(true)?;
    let listener = tokio::net::UnixListener::from_std(listener)?;
    let acceptor = bounded(DefaultAcceptor::new(), options);
    accept_all(listener, acceptor, front.into(), options, &handle).await;
    Ok(())
}

fn tcp(listener: TcpListener) -> io::Result<tokio::net::TcpListener> {
    listener.set_nonblocking(true)?;
    tokio::net::TcpListener::from_std(listener)
}

/// Where connections come from.
trait Listener {
    type Stream;

    /// The next one, and whose it is where that has an address.
    fn accept(&self) -> impl Future<Output = io::Result<(Self::Stream, Option<IpAddr>)>> + Send;
}

impl Listener for tokio::net::TcpListener {
    type Stream = tokio::net::TcpStream;

    async fn accept(&self) -> io::Result<(Self::Stream, Option<IpAddr>)> {
        Self::accept(self).await.map(|(stream, peer)| (stream, Some(peer.ip())))
    }
}

impl Listener for tokio::net::UnixListener {
    type Stream = tokio::net::UnixStream;

    async fn accept(&self) -> io::Result<(Self::Stream, Option<IpAddr>)> {
        Self::accept(self).await.map(|(stream, _)| (stream, None))
    }
}

/// How long nothing is accepted after a failure: one that lasts, such as too many open files, must not take a core.
const ACCEPT_AGAIN: Duration = Duration::from_millis(50);

/// Accepts connections and serves each in a task of its own, until the handle stops it.
async fn accept_all<L, A>(listener: L, acceptor: A, front: Front, options: &Options, handle: &ServerHandle)
where
    L: Listener,
    A: Accept<
            L::Stream,
            Front,
            Stream: AsyncRead + AsyncWrite + Unpin + Send + 'static,
            Future: Send + 'static,
        >,
    A::Service: Service<Request<Incoming>, Response = Response, Error = Infallible> + Clone + Send + 'static,
    <A::Service as Service<Request<Incoming>>>::Future: Send,
{
    let builder = Arc::new(builder(options));
    loop {
        let accepted = tokio::select! {
            biased;
            () = handle.stopped.cancelled() => break,
            accepted = listener.accept() => accepted,
        };
        let Ok((stream, peer)) = accepted else {
            tokio::time::sleep(ACCEPT_AGAIN).await;
            continue;
        };
        let accepting = acceptor.accept(stream, front.of_peer(peer));
        handle.connections.spawn(serve_one(Arc::clone(&builder), accepting, handle.of_connection()));
    }
    // Whoever connects now is refused, and not kept waiting.
    drop(listener);
    handle.ended().await;
}

async fn serve_one<I, S>(
    builder: Arc<Builder<TokioExecutor>>,
    accepting: impl Future<Output = io::Result<(I, S)>>,
    stops: Stops,
) where
    I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    S: Service<Request<Incoming>, Response = Response, Error = Infallible, Future: Send>
        + Clone
        + Send
        + 'static,
{
    // Who is still in the handshake has nothing in flight.
    let accepted = tokio::select! {
        biased;
        () = stops.stopped.cancelled() => return,
        accepted = accepting => accepted,
    };
    let Ok((stream, service)) = accepted else { return };
    let mut serving = pin!(builder.serve_connection(TokioIo::new(stream), TowerToHyperService::new(service)));
    tokio::select! {
        biased;
        () = stops.stopped() => {}
        _ = serving.as_mut() => return,
    }
    serving.as_mut().graceful_shutdown();
    tokio::select! {
        biased;
        () = stops.aborted.cancelled() => {}
        _ = serving => {}
    }
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

fn network(options: &Options) -> ProxyHeaders<NoDelayAcceptor> {
    let time_max = Duration::from_secs(options.head_secs_max);
    ProxyHeaders::new(NoDelayAcceptor::new(), Arc::clone(&options.proxies), time_max)
}

fn bounded<A>(acceptor: A, options: &Options) -> Bounded<A> {
    let times = Times {
        head: Duration::from_secs(options.head_secs_max),
        idle: Duration::from_secs(options.connection_idle_secs_max),
        linger: Duration::from_secs(options.linger_secs_max),
    };
    Bounded::new(acceptor, options.connections_max, times)
}

fn builder(options: &Options) -> Builder<TokioExecutor> {
    let mut builder = Builder::new(TokioExecutor::new());
    // The connection has times for heads: hyper's own would make and end a timer for every request.
    builder.http1().header_read_timeout(None).max_buf_size(options.head_bytes_max.max(8_192));
    let head_time = Duration::from_secs(options.head_secs_max);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(options.streams_max)
        .max_header_list_size(u32::try_from(options.head_bytes_max).unwrap_or(u32::MAX))
        .keep_alive_interval(head_time)
        .keep_alive_timeout(head_time);
    builder
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Waits for the stop with the waker of whoever asks.
    async fn stopped(waiting: &std::sync::Mutex<std::pin::Pin<Box<dyn Future<Output = ()> + Send>>>) {
        poll_fn(|cx| waiting.lock().unwrap().as_mut().poll(cx)).await;
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_waits_last_hears_of_the_stop_also_where_his_turn_is_used_up() {
        let handle = ServerHandle::default();
        let stops = handle.of_connection();
        let waiting: Box<dyn Future<Output = ()> + Send> = Box::new(async move { stops.stopped().await });
        let waiting = Arc::new(std::sync::Mutex::new(Box::into_pin(waiting)));
        // Each of them polls with a waker of its own, and the first is polled no more.
        assert!(tokio::time::timeout(Duration::from_secs(1), stopped(&waiting)).await.is_err());
        let last = TaskTracker::new().spawn(async move {
            while tokio::task::coop::has_budget_remaining() {
                tokio::task::coop::consume_budget().await;
            }
            stopped(&waiting).await;
        });
        tokio::task::yield_now().await;
        handle.stop(Duration::ZERO);
        tokio::time::timeout(Duration::from_secs(1), last).await.expect("woken").unwrap();
    }

    #[tokio::test]
    async fn a_connection_that_comes_after_the_stop_is_stopped() {
        let handle = ServerHandle::default();
        handle.abort();
        handle.of_connection().stopped().await;
    }
}
