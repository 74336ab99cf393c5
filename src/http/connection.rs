//! One connection: counted against a limit, closed when nobody has used it for a while, and closed such that the last
//! answer arrives.

use std::future::Future;
use std::io;
use std::mem::MaybeUninit;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use axum::body::{Bytes, HttpBody};
use axum_server::accept::Accept;
use http::{Request, Version};
use http_body::{Frame, SizeHint};
use hyper::body::Incoming;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::coop::unconstrained;
use tokio::time::Sleep;
use tower::Service;

/// HTTP/2's own upkeep (PING, SETTINGS, WINDOW_UPDATE) comes in frames of at most 17 bytes: it keeps a connection
/// open at the peer's wish only, and does not count as use.
const UPKEEP_BYTES_MAX: usize = 32;

/// How long a connection may stand still.
#[derive(Clone, Copy)]
pub(super) struct Times {
    /// Before its first request has come.
    pub(super) head: Duration,
    /// Without a request or a body's bytes.
    pub(super) idle: Duration,
    /// While what the peer still sends behind the last answer is taken and let go.
    pub(super) linger: Duration,
}

/// Accepts at most so many connections at once, and closes those that are idle.
#[derive(Clone)]
pub(super) struct Bounded<A> {
    inner: A,
    slots: Arc<Semaphore>,
    times: Times,
}

impl<A> Bounded<A> {
    pub(super) fn new(inner: A, connections_max: usize, times: Times) -> Self {
        let slots = Arc::new(Semaphore::new(connections_max.min(Semaphore::MAX_PERMITS)));
        Self { inner, slots, times }
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
        let seen = Arc::new(Seen { _slot: Some(slot), ..Seen::default() });
        let counted = Counted { service, seen: Arc::clone(&seen) };
        let (accepting, times) = (self.inner.accept(stream, counted), self.times);
        Box::pin(async move {
            let (stream, service) = accepting.await?;
            Ok((IdleClosed::new(stream, seen, times), service))
        })
    }
}

/// What a connection's service has seen, for its stream to know.
// On cache lines of its own: every request writes to it, and its neighbours are other connections'.
#[derive(Default)]
#[repr(align(128))]
struct Seen {
    /// How often the connection was used.
    uses: AtomicU64,
    /// Whether a request has come.
    begun: AtomicBool,
    /// Whether a request's body has not come to its end.
    unread: AtomicBool,
    /// The connection's, until its last user is gone.
    _slot: Option<OwnedSemaphorePermit>,
}

impl Seen {
    /// Two uses at the same moment may be counted as one: it is one that counts.
    fn used(&self) {
        self.uses.store(self.uses.load(Ordering::Relaxed).wrapping_add(1), Ordering::Relaxed);
    }
}

/// A connection's service: says when a request comes and whether its body was read.
#[derive(Clone)]
pub(super) struct Counted<S> {
    service: S,
    seen: Arc<Seen>,
}

impl<S: Service<Request<Watched>>> Service<Request<Incoming>> for Counted<S> {
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.service.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Incoming>) -> Self::Future {
        self.seen.used();
        self.seen.begun.store(true, Ordering::Relaxed);
        // HTTP/2 ends a stream and not the connection where a body is not wanted.
        let in_turn = request.version() < Version::HTTP_2;
        if in_turn && !request.body().is_end_stream() {
            self.seen.unread.store(true, Ordering::Relaxed);
        }
        let seen = Arc::clone(&self.seen);
        self.service.call(request.map(|body| Watched { body, seen, in_turn }))
    }
}

/// A request's body that says when something of it comes, and when it has been read to its end.
pub(super) struct Watched {
    body: Incoming,
    seen: Arc<Seen>,
    in_turn: bool,
}

impl HttpBody for Watched {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        // However little it is: it is not upkeep.
        self.seen.used();
        if self.in_turn && (frame.is_none() || self.body.is_end_stream()) {
            self.seen.unread.store(false, Ordering::Relaxed);
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// A stream that ends when for the idle time neither a request began nor a body's bytes went either way. An answer
/// that is being made counts as idle: the time is no shorter than what a request may take.
///
/// Where the last request's body has not been read, what comes of it is taken for a while after the answer: a socket
/// that is closed on unread bytes resets the connection, and the reset can take the answer away from the peer.
pub(super) struct IdleClosed<T> {
    stream: T,
    seen: Arc<Seen>,
    uses_seen: u64,
    times: Times,
    timer: Pin<Box<Sleep>>,
    /// Whom the timer wakes, where it was asked.
    woken: Option<Waker>,
    lingering: bool,
}

impl<T> IdleClosed<T> {
    fn new(stream: T, seen: Arc<Seen>, times: Times) -> Self {
        // Nothing else bounds a connection that sends nothing at all, before it is known which protocol it speaks.
        let first = tokio::time::sleep(times.head.min(times.idle));
        Self { stream, seen, uses_seen: 0, times, timer: Box::pin(first), woken: None, lingering: false }
    }

    fn moved(&self, bytes: usize) {
        if bytes > UPKEEP_BYTES_MAX {
            self.seen.used();
        }
    }

    /// Ready where the time is over. Every request passes here while it waits for the next one: a timer that has been
    /// told whom to wake is not told again, which would cost as much as reading the request's head.
    fn poll_idle(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let told = self.woken.as_ref().is_some_and(|woken| woken.will_wake(cx.waker()));
        if told && !self.timer.is_elapsed() {
            return Poll::Pending;
        }
        loop {
            // Whatever else the task has done: of a timer that was not started for want of budget nobody is woken.
            if pin!(unconstrained(self.timer.as_mut())).poll(cx).is_pending() {
                self.woken = Some(cx.waker().clone());
                return Poll::Pending;
            }
            let uses = self.seen.uses.load(Ordering::Relaxed);
            let mut time = self.times.idle;
            if !self.seen.begun.load(Ordering::Relaxed) {
                // What is left of it.
                self.times.head = self.times.head.saturating_sub(time);
                time = time.min(self.times.head);
            } else if uses == self.uses_seen {
                time = Duration::ZERO;
            }
            if time.is_zero() {
                return Poll::Ready(());
            }
            self.uses_seen = uses;
            self.timer.set(tokio::time::sleep(time));
        }
    }

    /// What a write says that goes on, or has waited too long for the peer to take what was written before.
    fn poll_written<R>(&mut self, cx: &mut Context<'_>, written: Poll<io::Result<R>>) -> Poll<io::Result<R>> {
        if written.is_pending() {
            ready!(self.poll_idle(cx));
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the peer takes nothing")));
        }
        written
    }
}

impl<T: AsyncRead + Unpin> IdleClosed<T> {
    /// Takes what comes until the peer ends, or the time is over.
    fn poll_linger(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let mut taken = [MaybeUninit::uninit(); LINGER_BYTES];
        while self.timer.as_mut().poll(cx).is_pending() {
            let mut taken = ReadBuf::uninit(&mut taken);
            let read = ready!(Pin::new(&mut self.stream).poll_read(cx, &mut taken));
            if read.is_err() || taken.filled().is_empty() {
                break;
            }
        }
        Poll::Ready(())
    }
}

/// How much is taken at once of what nobody wants.
const LINGER_BYTES: usize = 8 << 10;

impl<T: AsyncRead + Unpin> AsyncRead for IdleClosed<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        // What is read is no use by itself, or a head that never ends would be: requests and bodies are counted.
        match Pin::new(&mut self.stream).poll_read(cx, buffer) {
            Poll::Ready(read) => Poll::Ready(read),
            // The reader sees the end of the stream.
            Poll::Pending => self.poll_idle(cx).map(Ok),
        }
    }
}

impl<T: AsyncRead + AsyncWrite + Unpin> AsyncWrite for IdleClosed<T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, bytes);
        let written = ready!(self.poll_written(cx, written))?;
        self.moved(written);
        Poll::Ready(Ok(written))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, slices);
        let written = ready!(self.poll_written(cx, written))?;
        self.moved(written);
        Poll::Ready(Ok(written))
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.stream).poll_flush(cx);
        self.poll_written(cx, flushed)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.lingering {
            let shut = Pin::new(&mut self.stream).poll_shutdown(cx);
            ready!(self.poll_written(cx, shut))?;
            if !self.seen.unread.load(Ordering::Relaxed) {
                return Poll::Ready(Ok(()));
            }
            self.lingering = true;
            let linger = self.times.linger;
            self.timer.set(tokio::time::sleep(linger));
        }
        self.poll_linger(cx).map(Ok)
    }
}

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "the runtime's clock, which these tests have stopped")]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex};
    use tokio::time::{Instant, sleep};

    use super::*;

    const TIMES: Times =
        Times { head: Duration::from_secs(10), idle: Duration::from_mins(1), linger: Duration::from_secs(5) };

    fn connected(unread: bool) -> (IdleClosed<DuplexStream>, DuplexStream) {
        let (own, peer) = duplex(1_000);
        let seen = Arc::new(Seen::default());
        seen.unread.store(unread, Ordering::Relaxed);
        seen.begun.store(true, Ordering::Relaxed);
        seen.uses.store(1, Ordering::Relaxed);
        (IdleClosed::new(own, seen, TIMES), peer)
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_takes_nothing_is_given_up() {
        let (mut own, mut peer) = connected(false);
        let began = Instant::now();
        let reading = async {
            // Slowly, and then no more.
            for _ in 0..5 {
                sleep(Duration::from_secs(59)).await;
                peer.read_exact(&mut [0; 1_000]).await.unwrap();
            }
            let last = Instant::now();
            (last, peer)
        };
        let writing = async {
            let failed = own.write_all(&vec![7; 1_000_000]).await.unwrap_err();
            (failed, Instant::now())
        };
        let ((failed, at), (last, _peer)) = tokio::join!(writing, reading);
        assert_eq!(failed.kind(), io::ErrorKind::TimedOut);
        assert!(last - began > 4 * TIMES.idle, "a peer that takes something is waited for");
        assert!((TIMES.idle..=2 * TIMES.idle).contains(&(at - last)), "{:?}", at - last);
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_sends_nothing_is_given_up() {
        let (mut own, _peer) = connected(false);
        let began = Instant::now();
        assert_eq!(own.read(&mut [0; 10]).await.unwrap(), 0, "the end");
        assert!((TIMES.idle..=2 * TIMES.idle).contains(&began.elapsed()));
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_has_sent_no_request_has_the_time_of_a_head() {
        for (head, idle) in [(10, 60), (60, 60), (61, 60), (200, 60)] {
            let (head, idle) = (Duration::from_secs(head), Duration::from_secs(idle));
            let (own, mut peer) = duplex(1_000);
            let times = Times { head, idle, ..TIMES };
            let mut own = IdleClosed::new(own, Arc::default(), times);
            let began = Instant::now();
            // Half a head, and what a server says of HTTP/2 by itself.
            peer.write_all(b"POST / HTTP/1.1\r\n").await.unwrap();
            own.write_all(&[0; 100]).await.unwrap();
            while own.read(&mut [0; 10]).await.unwrap() > 0 {}
            assert_eq!(began.elapsed(), head);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_longer_time_for_the_first_head_makes_no_connection_idle_for_longer() {
        let (own, _peer) = duplex(1_000);
        let seen = Arc::new(Seen::default());
        let times = Times { head: 3 * TIMES.idle, ..TIMES };
        let mut own = IdleClosed::new(own, Arc::clone(&seen), times);
        let began = Instant::now();
        seen.begun.store(true, Ordering::Relaxed);
        seen.uses.store(1, Ordering::Relaxed);
        assert_eq!(own.read(&mut [0; 10]).await.unwrap(), 0);
        assert!((TIMES.idle..=2 * TIMES.idle).contains(&began.elapsed()));
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_whose_head_never_ends_is_given_up() {
        let (mut own, mut peer) = connected(false);
        let began = Instant::now();
        let sending = async {
            for _ in 0..10 {
                sleep(Duration::from_secs(30)).await;
                if peer.write_all(&[b'a'; 500]).await.is_err() {
                    return;
                }
            }
        };
        let reading = async {
            while own.read(&mut [0; 1_000]).await.unwrap() > 0 {}
            drop(own);
            began.elapsed()
        };
        let ((), took) = tokio::join!(sending, reading);
        assert!((TIMES.idle..=2 * TIMES.idle).contains(&took));
    }

    #[tokio::test(start_paused = true)]
    async fn requests_and_bodies_keep_a_connection_and_the_time_runs_from_the_last() {
        let (mut own, _peer) = connected(false);
        let (seen, began) = (Arc::clone(&own.seen), Instant::now());
        let using = async {
            for _ in 0..5 {
                sleep(Duration::from_secs(50)).await;
                seen.uses.fetch_add(1, Ordering::Relaxed);
            }
        };
        let (read, ()) = tokio::join!(async { own.read(&mut [0; 10]).await.map(|_| began.elapsed()) }, using);
        let took = read.unwrap();
        assert!(
            (Duration::from_secs(250) + TIMES.idle..=Duration::from_secs(250) + 2 * TIMES.idle)
                .contains(&took)
        );
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_waits_last_is_the_one_who_is_woken() {
        let (own, _peer) = connected(false);
        let own = std::sync::Mutex::new(own);
        // Each of them polls with a waker of its own, and the first is polled no more.
        let first = tokio::time::timeout(Duration::from_secs(1), read(&own)).await;
        assert!(first.is_err());
        let second = tokio::spawn(async move { read(&own).await });
        let ended = tokio::time::timeout(2 * TIMES.idle, second).await;
        assert_eq!(ended.expect("woken").unwrap(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_task_that_has_used_up_its_turn_is_woken_all_the_same() {
        let (mut own, _peer) = connected(false);
        let reading = tokio::spawn(async move {
            while tokio::task::coop::has_budget_remaining() {
                tokio::task::coop::consume_budget().await;
            }
            own.read(&mut [0; 10]).await.unwrap()
        });
        let ended = tokio::time::timeout(2 * TIMES.idle, reading).await;
        assert_eq!(ended.expect("woken").unwrap(), 0);
    }

    async fn read(own: &std::sync::Mutex<IdleClosed<DuplexStream>>) -> usize {
        std::future::poll_fn(|cx| {
            let mut bytes = [0; 10];
            let mut buffer = ReadBuf::new(&mut bytes);
            let polled = Pin::new(&mut *own.lock().unwrap()).poll_read(cx, &mut buffer);
            polled.map(|read| read.map(|()| buffer.filled().len()).unwrap())
        })
        .await
    }

    #[tokio::test(start_paused = true)]
    async fn what_comes_behind_the_last_answer_is_taken_until_the_peer_ends() {
        let (mut own, mut peer) = connected(true);
        own.write_all(b"no").await.unwrap();
        let sending = async move {
            peer.write_all(&vec![7; 100_000]).await.unwrap();
            let mut answer = Vec::new();
            peer.read_to_end(&mut answer).await.unwrap();
            answer
        };
        let began = Instant::now();
        let (shut, answer) = tokio::join!(own.shutdown(), sending);
        assert!(shut.is_ok() && answer == b"no");
        assert_eq!(began.elapsed(), Duration::ZERO, "no longer than the peer needs");
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_sends_for_ever_is_not_listened_to_for_ever() {
        let (mut own, mut peer) = connected(true);
        let began = Instant::now();
        let sending = async {
            loop {
                sleep(Duration::from_millis(100)).await;
                peer.write_all(&[7; 500]).await.unwrap();
            }
        };
        tokio::select! {
            shut = own.shutdown() => shut.unwrap(),
            () = sending => unreachable!("it never ends"),
        }
        assert_eq!(began.elapsed(), TIMES.linger);
    }

    #[tokio::test(start_paused = true)]
    async fn where_all_was_read_nobody_is_waited_for() {
        let (mut own, _peer) = connected(false);
        let began = Instant::now();
        own.shutdown().await.unwrap();
        assert_eq!(began.elapsed(), Duration::ZERO);
    }
}
