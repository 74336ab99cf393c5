//! One connection: counted against a limit, and closed when nobody has used it for a while.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum_server::accept::Accept;
use http::Request;
use hyper::body::Incoming;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Sleep;
use tower::Service;

/// HTTP/2's own upkeep (PING, SETTINGS, WINDOW_UPDATE) comes in frames of at most 17 bytes: it keeps a connection
/// open at the peer's wish only, and does not count as use.
const UPKEEP_BYTES_MAX: usize = 32;

/// Accepts at most so many connections at once, and closes those that are idle.
#[derive(Clone)]
pub(super) struct Bounded<A> {
    inner: A,
    slots: Arc<Semaphore>,
    idle: Duration,
}

impl<A> Bounded<A> {
    pub(super) fn new(inner: A, connections_max: usize, idle: Duration) -> Self {
        let slots = Arc::new(Semaphore::new(connections_max.min(Semaphore::MAX_PERMITS)));
        Self { inner, slots, idle }
    }
}

impl<A, I, S> Accept<I, S> for Bounded<A>
where
    A: Accept<I, Counted<S>>,
    A::Stream: Send + 'static,
    A::Service: Send + 'static,
    A::Future: Send + 'static,
{
    type Stream = IdleClosed<A::Stream>;
    type Service = A::Service;
    type Future = Pin<Box<dyn Future<Output = io::Result<(Self::Stream, Self::Service)>> + Send>>;

    fn accept(&self, stream: I, service: S) -> Self::Future {
        // The slot is taken before the handshake: half-open connections count too.
        let Ok(slot) = Arc::clone(&self.slots).try_acquire_owned() else {
            return Box::pin(std::future::ready(Err(io::Error::other(
                "as many connections are open as http.connections_max allows",
            ))));
        };
        let used = Arc::new(AtomicU64::new(0));
        let counted = Counted { service, used: Arc::clone(&used), _slot: Arc::new(slot) };
        let (accepting, idle) = (self.inner.accept(stream, counted), self.idle);
        Box::pin(async move {
            let (stream, service) = accepting.await?;
            let timer = Box::pin(tokio::time::sleep(idle));
            Ok((IdleClosed { stream, used, used_seen: 0, idle, timer }, service))
        })
    }
}

/// A connection's service: holds its slot, and says when a request comes.
#[derive(Clone)]
pub(super) struct Counted<S> {
    service: S,
    used: Arc<AtomicU64>,
    _slot: Arc<OwnedSemaphorePermit>,
}

impl<S: Service<Request<Incoming>>> Service<Request<Incoming>> for Counted<S> {
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.service.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Incoming>) -> Self::Future {
        self.used.fetch_add(1, Ordering::Relaxed);
        self.service.call(request)
    }
}

/// A stream that ends when for `idle` neither a request began nor a body's bytes went either way. An answer that is
/// being made counts as idle: `idle` is no shorter than what a request may take.
pub(super) struct IdleClosed<T> {
    stream: T,
    used: Arc<AtomicU64>,
    used_seen: u64,
    idle: Duration,
    timer: Pin<Box<Sleep>>,
}

impl<T> IdleClosed<T> {
    fn moved(&self, bytes: usize) {
        if bytes > UPKEEP_BYTES_MAX {
            self.used.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Ready where the time is over: the reader sees the end of the stream.
    fn poll_idle(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            ready!(self.timer.as_mut().poll(cx));
            let used = self.used.load(Ordering::Relaxed);
            if used == self.used_seen {
                return Poll::Ready(());
            }
            self.used_seen = used;
            self.timer.set(tokio::time::sleep(self.idle));
        }
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for IdleClosed<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        match Pin::new(&mut self.stream).poll_read(cx, buffer) {
            Poll::Ready(Ok(())) => {
                self.moved(buffer.filled().len() - before);
                Poll::Ready(Ok(()))
            }
            Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
            Poll::Pending => self.poll_idle(cx).map(Ok),
        }
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for IdleClosed<T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.stream).poll_write(cx, bytes))?;
        self.moved(written);
        Poll::Ready(Ok(written))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.stream).poll_write_vectored(cx, slices))?;
        self.moved(written);
        Poll::Ready(Ok(written))
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
