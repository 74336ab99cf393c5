//! Bodies that are streamed both ways: as much is taken in as is given out, and nobody waits for a peer for ever.
//!
//! Each transfer is a task of its own, which ends when the client goes away. The answer waits until enough of it is
//! there, or all of it: what goes wrong until then is an ordinary problem. What goes wrong later breaks the transfer,
//! which never looks like a clean end: HTTP/1.1 lacks its last chunk, HTTP/2 has its stream reset.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::body::{Body, Bytes, HttpBody};
use axum::response::{IntoResponse, Response};
use http::HeaderMap;
use http_body_util::BodyExt;
use tokio::sync::mpsc;
use tokio_util::task::TaskTracker;

use super::middleware::admission::Admission;
use super::problem::{Code, Problem};
use crate::operations::TransferError;
use crate::spread::Apart;
use crate::tenant::TenantId;

/// The limits of bodies that are streamed.
#[derive(Clone, Debug)]
pub struct Options {
    /// How many transfers may be open at once. Default 256.
    pub transfers_max: usize,
    /// How long one side of a transfer may stand still, in seconds. Default 60.
    pub idle_secs_max: u64,
    /// The largest body of a transfer, in bytes. Default 2^63 - 1, which is none.
    pub transfer_bytes_max: u64,
    /// How much of an answer is held back, in bytes, so that what fails early can be told by an ordinary problem, and
    /// so that clients that send all before they read can use short bodies. Default 1 MiB.
    pub transfer_held_bytes_max: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            transfers_max: 256,
            idle_secs_max: 60,
            transfer_bytes_max: i64::MAX as u64,
            transfer_held_bytes_max: 1 << 20,
        }
    }
}

/// The transfers of this process.
pub(super) struct Transfers {
    open: Arc<Admission>,
    options: Options,
    tracker: TaskTracker,
}

/// How many pieces wait between a transfer and its connection.
const WAITING_PIECES: usize = 2;

/// When the answer to a transfer begins.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Answer {
    /// At the first byte.
    AtOnce,
    /// When the limit of what is held back is reached, or all is there.
    Held,
}

impl Transfers {
    pub(super) fn new(options: Options, fair_from_percent: usize, tracker: TaskTracker) -> Self {
        let full = "more transfers are open than the service takes at once";
        let open = Arc::new(Admission::new(options.transfers_max, fair_from_percent, full));
        Self { open, options, tracker }
    }

    /// The tracker of the process's tasks.
    pub(super) fn tracker(&self) -> &TaskTracker {
        &self.tracker
    }

    /// How many are open.
    pub(super) fn gauge(&self) -> Arc<Apart<AtomicUsize>> {
        self.open.gauge()
    }

    /// Runs `work` for this tenant between this body and the answer that is returned.
    pub(super) async fn run<W>(
        &self,
        tenant: &TenantId,
        body: Body,
        answer: Answer,
        work: impl FnOnce(Input, Output) -> W,
    ) -> Result<Response, Problem>
    where
        W: Future<Output = Result<(), Problem>> + Send + 'static,
    {
        let place = self.open.enter()?;
        place.belongs_to(tenant)?;
        let announced = body.size_hint().lower();
        let bytes_max = self.options.transfer_bytes_max;
        if announced > bytes_max {
            return Err(crate::operations::OperationError::from(TransferError::TooLarge(bytes_max)).into());
        }
        let (events, arriving) = mpsc::channel(WAITING_PIECES);
        let idle_secs = self.options.idle_secs_max;
        let input = Input { body, left: bytes_max, bytes_max, idle_secs };
        let work = work(input, Output { events: events.clone(), idle_secs });
        let answering = Arc::new(OnceLock::new());
        let stalled = Arc::clone(&answering);
        self.tracker.spawn(async move {
            let _place = place;
            let outcome = tokio::select! {
                biased;
                // The client has gone: what was begun is dropped where it stands.
                () = events.closed() => return,
                outcome = work => outcome,
            };
            let time = Duration::from_secs(idle_secs);
            if tokio::time::timeout(time, events.send(Event::End(outcome))).await.is_err() {
                // Nobody asks the body for more, and so it would keep what waits in it for as long as its connection.
                stalled.get().and_then(Weak::upgrade).inspect(empty);
            }
        });
        let held_max = if answer == Answer::AtOnce { 0 } else { self.options.transfer_held_bytes_max };
        respond(arriving, held_max, &answering).await
    }
}

/// What waits in an answer's body, until it is emptied from outside.
type Waiting = Mutex<Option<Pieces>>;

fn empty(waiting: &Arc<Waiting>) {
    let pieces = waiting.lock().unwrap_or_else(PoisonError::into_inner).take();
    drop(pieces);
}

enum Event {
    Begin(HeaderMap),
    Piece(Bytes),
    End(Result<(), Problem>),
}

async fn respond(
    mut arriving: mpsc::Receiver<Event>,
    held_max: usize,
    answering: &OnceLock<Weak<Waiting>>,
) -> Result<Response, Problem> {
    let (mut headers, mut held, mut held_bytes) = (HeaderMap::new(), VecDeque::new(), 0);
    let ended = loop {
        match arriving.recv().await {
            Some(Event::Begin(begun)) => headers = begun,
            Some(Event::Piece(piece)) => {
                held_bytes += piece.len();
                held.push_back(piece);
                if held_bytes > held_max {
                    break false;
                }
            }
            Some(Event::End(Ok(()))) => break true,
            Some(Event::End(Err(problem))) => return Err(problem),
            None => {
                return Err(Problem::internal(Code::InternalError, "a transfer ended without an outcome"));
            }
        }
    };
    let body = if ended {
        Body::from(held.into_iter().flatten().collect::<Vec<u8>>())
    } else {
        let waiting = Arc::new(Mutex::new(Some(Pieces { held, arriving })));
        let _ = answering.set(Arc::downgrade(&waiting));
        Body::new(Answering { waiting, ended: false })
    };
    Ok((headers, body).into_response())
}

/// The body of an answer that goes on.
struct Answering {
    /// Nothing once it has ended, or was emptied.
    waiting: Arc<Waiting>,
    ended: bool,
}

struct Pieces {
    held: VecDeque<Bytes>,
    arriving: mpsc::Receiver<Event>,
}

/// The transfer did not come to a clean end, and neither does the body.
#[derive(Debug, thiserror::Error)]
#[error("the transfer was broken off")]
struct Broken;

impl HttpBody for Answering {
    type Data = Bytes;
    type Error = Broken;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<http_body::Frame<Bytes>, Broken>>> {
        if self.ended {
            return Poll::Ready(None);
        }
        let piece = ready!(self.poll_piece(context));
        self.ended = !matches!(piece, Some(Ok(_)));
        Poll::Ready(piece.map(|piece| piece.map(http_body::Frame::data)))
    }
}

impl Answering {
    fn poll_piece(&self, context: &mut Context<'_>) -> Poll<Option<Result<Bytes, Broken>>> {
        // Held by nobody else but for the moment in which it is emptied.
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(pieces) = waiting.as_mut() else { return Poll::Ready(Some(Err(Broken))) };
        let end = loop {
            if let Some(piece) = pieces.held.pop_front() {
                return Poll::Ready(Some(Ok(piece)));
            }
            match ready!(pieces.arriving.poll_recv(context)) {
                Some(Event::Piece(piece)) => pieces.held.push_back(piece),
                Some(Event::Begin(_)) => {}
                Some(Event::End(Ok(()))) => break None,
                Some(Event::End(Err(problem))) => {
                    log(&problem);
                    break Some(Err(Broken));
                }
                None => break Some(Err(Broken)),
            }
        };
        *waiting = None;
        Poll::Ready(end)
    }
}

/// Nobody else can tell of it: the status has gone out long ago.
fn log(problem: &Problem) {
    let (code, reason) = (problem.code.name(), problem.internal.as_deref().unwrap_or(&problem.detail));
    if problem.code.status().is_server_error() {
        tracing::warn!(code, reason, "transfer broken off");
    } else {
        tracing::debug!(code, reason, "transfer broken off");
    }
}

/// What the client sends.
pub(super) struct Input {
    body: Body,
    left: u64,
    bytes_max: u64,
    idle_secs: u64,
}

impl crate::operations::Source for Input {
    async fn next(&mut self) -> Result<Option<Bytes>, TransferError> {
        let idle = Duration::from_secs(self.idle_secs);
        loop {
            let frame = tokio::time::timeout(idle, self.body.frame()).await;
            let frame = match frame.map_err(|_| TransferError::Idle(self.idle_secs))? {
                None => return Ok(None),
                Some(frame) => frame.map_err(|_| TransferError::BrokenOff)?,
            };
            // Trailers say nothing here.
            let Ok(piece) = frame.into_data() else { continue };
            let left = self.left.checked_sub(piece.len() as u64);
            self.left = left.ok_or(TransferError::TooLarge(self.bytes_max))?;
            if !piece.is_empty() {
                return Ok(Some(piece));
            }
        }
    }
}

/// What the client receives.
pub(super) struct Output {
    events: mpsc::Sender<Event>,
    idle_secs: u64,
}

impl Output {
    /// Comes before the first piece.
    pub(super) async fn begin(&mut self, headers: HeaderMap) -> Result<(), TransferError> {
        self.send(Event::Begin(headers)).await
    }

    /// Waits while the client takes nothing, up to the time that it may stand still.
    pub(super) async fn write(&mut self, piece: Bytes) -> Result<(), TransferError> {
        self.send(Event::Piece(piece)).await
    }

    async fn send(&mut self, event: Event) -> Result<(), TransferError> {
        let idle = Duration::from_secs(self.idle_secs);
        match tokio::time::timeout(idle, self.events.send(event)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err(TransferError::Gone),
            Err(_) => Err(TransferError::Idle(self.idle_secs)),
        }
    }
}
