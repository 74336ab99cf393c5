//! `POST /v1/{encrypt,decrypt,rewrap}/batch`: many items in one body, each with its own outcome.
//!
//! The items are cut into short stretches, which as many tasks as there are cores take one after the other, on threads
//! of their own: a small request that comes meanwhile does not wait for the batch, and batches share these threads.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::fmt;
use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::{Request, State};
use axum::response::Response;
use bytes::Buf as _;
use http::StatusCode;
use http_body::{Frame, SizeHint};
use serde::de::{SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::value::RawValue;
use tokio_util::task::AbortOnDropHandle;
use utoipa::ToSchema;

use super::items::{Answers, DecryptItem, EncryptItem, ItemProblem, ItemVerb, RewrapItem, answer_all};
use super::memory::Room;
use super::threads::{BULK_FAILED, give_way};
use super::{NDJSON, is, lines, refuse_raw_headers};
use crate::access::{Decrypt, Encrypt, Permit, Rewrap};
use crate::audit::Tally;
use crate::http::handlers::{Bounds, Permitted, announced, json, json_body};
use crate::http::json::parse;
use crate::http::middleware::quota::Tab;
use crate::http::problem::{Code, Problem};
use crate::http::{HttpState, SharedState};

/// The most items that are answered before other work gets its turn.
pub(super) const STRETCH_ITEMS: usize = 16;
/// The most bytes of them.
pub(super) const STRETCH_BYTES: usize = 16 << 10;
/// Larger bodies are read, taken apart and worked off where nothing waits behind them: the service's own threads get them
/// from the connection only as fast as the threads of bulk work take them.
const INLINE_BYTES: usize = 4 * STRETCH_BYTES;
/// The same of how many stretches there are.
const INLINE_STRETCHES: usize = 4;

macro_rules! batch_schemas {
    ($($request:ident $item:ident $response:ident $result:ident { $($(#[$doc:meta])* $field:ident: $type:ty,)* })*) => {
        $(
            /// Many items.
            #[derive(Deserialize, ToSchema)]
            #[serde(deny_unknown_fields)]
            #[expect(dead_code, reason = "the shape of what is taken apart by hand")]
            pub(in crate::http) struct $request<'a> {
                /// Up to `batch_items_max` (10,000) of them.
                #[serde(borrow)]
                items: Vec<$item<'a>>,
            }

            /// One outcome for each item, in the same order.
            #[derive(Serialize, ToSchema)]
            pub(in crate::http) struct $response {
                items: Vec<$result>,
                /// How many of them have an `error`.
                failed: usize,
            }

            /// The outcome of one item: an `error`, or all the rest.
            #[derive(Serialize, ToSchema)]
            pub(in crate::http) struct $result {
                /// The item's own.
                #[serde(rename = "ref")]
                reference: Option<String>,
                $($(#[$doc])* $field: Option<$type>,)*
                /// What went wrong.
                error: Option<ItemProblem<'static>>,
            }
        )*
    };
}

batch_schemas! {
    EncryptBatchRequest EncryptItem EncryptBatchResponse EncryptResult {
        /// The envelope in text form.
        ciphertext: String,
        /// The key that was used.
        key: String,
        /// The data key that was used.
        dek_id: String,
    }
    DecryptBatchRequest DecryptItem DecryptBatchResponse DecryptResult {
        /// The bytes that were encrypted, in standard base64 with padding.
        plaintext: String,
        /// The key under which they were encrypted.
        key: String,
        /// The data key that opened it.
        dek_id: String,
        /// Whether `rewrap` would change this envelope.
        rewrap_advised: bool,
    }
    RewrapBatchRequest RewrapItem RewrapBatchResponse RewrapResult {
        /// The envelope in text form: as encryption would make it today.
        ciphertext: String,
        /// Whether it is another one than was sent.
        changed: bool,
        /// The data key of the envelope that was sent.
        from_dek_id: String,
        /// The data key of the envelope that is returned.
        to_dek_id: String,
    }
}

macro_rules! batch_handlers {
    ($($(#[$doc:meta])* $name:ident $verb:ident $path:literal $id:literal
        $request:ident $item:ident $response:ident $result:ident;)*) => {
        $(
            $(#[$doc])*
            ///
            /// Each item has its own outcome: the answer is 200 whatever they are, and `failed` counts those that have an
            /// `error`. With `application/x-ndjson`, any number of lines are taken, each an item, and answered in order
            /// while more are sent; the answer ends cleanly only if every line was answered. Empty lines are passed over.
            #[utoipa::path(post, path = $path, operation_id = $id, tag = "data",
                params(("Keyfold-Tenant" = Option<String>, Header, description = "Which tenant, where the credential holds several")),
                request_body(content(($request<'static> = "application/json"), ($item<'static> = "application/x-ndjson"))),
                responses((status = 200, description = "Each item's outcome",
                    content(($response = "application/json"), ($result = "application/x-ndjson")))))]
            pub(in crate::http) async fn $name(
                State(state): State<SharedState>,
                Permitted(permit): Permitted<$verb>,
                request: Request,
            ) -> Result<Response, Problem> {
                answer(state, permit, request).await
            }
        )*
    };
}

batch_handlers! {
    /// Encrypt many
    encrypt_batch Encrypt "/v1/encrypt/batch" "encrypt_batch"
        EncryptBatchRequest EncryptItem EncryptBatchResponse EncryptResult;
    /// Decrypt many
    decrypt_batch Decrypt "/v1/decrypt/batch" "decrypt_batch"
        DecryptBatchRequest DecryptItem DecryptBatchResponse DecryptResult;
    /// Rewrap many
    rewrap_batch Rewrap "/v1/rewrap/batch" "rewrap_batch"
        RewrapBatchRequest RewrapItem RewrapBatchResponse RewrapResult;
}

async fn answer<V: ItemVerb>(
    state: SharedState,
    permit: Permit<V>,
    request: Request,
) -> Result<Response, Problem> {
    if is(request.headers(), NDJSON) {
        refuse_raw_headers(request.headers())?;
        return lines::answer(state, permit, request).await;
    }
    let tab = request.extensions().get::<Tab>().cloned();
    let bytes_max = state.options.batch_body_bytes_max;
    let announced = announced(request.headers()).map(|bytes| usize::try_from(bytes).unwrap_or(usize::MAX));
    let room_bytes = announced.unwrap_or(bytes_max).min(bytes_max);
    let room = Arc::new(state.batch_memory.room(room_bytes)?);
    let (inside, items_max) = (Arc::clone(&room), state.options.batch_items_max);
    let taken_in = async move {
        let bounds = Bounds::of(&request);
        let mut body = json_body(request, bounds).await?;
        let bytes = body.remaining();
        take_apart(body.copy_to_bytes(bytes), inside, items_max)
    };
    let work = if announced.is_some_and(|bytes| bytes <= INLINE_BYTES) {
        taken_in.await?
    } else {
        let taken_in = state.bulk.spawn(state.transfers.tracker(), taken_in).await;
        taken_in.map_err(|_| Problem::internal(Code::InternalError, BULK_FAILED))??
    };
    if let Some(tab) = tab {
        tab.more_items(work.items.len())?;
    }
    let permit = Arc::new(permit);
    let record = state.operations.batch(&permit).await?;
    let answers = spread(&state, &permit, record.tally(), work).await?;
    record.finish();
    room.shrink(room_bytes);
    Ok(json(StatusCode::OK, Body::new(AnswerBody::new(answers, room, state))))
}

/// How many pieces of an answer are given out at a time.
const PIECES_AT_ONCE: usize = 16;

/// The answers in a row, as they were written: nothing is copied.
///
/// The service's own threads write them to the connection. With a long answer a thread would be busy for milliseconds at
/// a stretch, and the system's scheduler would let the threads of other requests wait behind it: so it stops after each
/// few pieces until a thread of bulk work has had its turn.
struct AnswerBody {
    state: SharedState,
    pieces: VecDeque<Bytes>,
    bytes: u64,
    /// How many more are given out before it stops.
    at_once: usize,
    turn: Option<AbortOnDropHandle<()>>,
    /// Theirs until they are sent.
    _room: Arc<Room>,
}

impl AnswerBody {
    fn new(mut answers: Vec<Answers>, room: Arc<Room>, state: SharedState) -> Self {
        if let Some(last) = answers.last_mut() {
            // Its last item's comma.
            last.json.pop();
        }
        let failed: usize = answers.iter().map(|answers| answers.failed).sum();
        let mut pieces = VecDeque::with_capacity(answers.len() + 2);
        pieces.push_back(Bytes::from_static(br#"{"items":["#));
        pieces.extend(answers.into_iter().map(|answers| Bytes::from(answers.json)));
        pieces.push_back(format!("],\"failed\":{failed}}}").into());
        let bytes = pieces.iter().map(|piece| piece.len() as u64).sum();
        Self { state, pieces, bytes, at_once: PIECES_AT_ONCE, turn: None, _room: room }
    }
}

impl HttpBody for AnswerBody {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let this = &mut *self;
        if this.at_once == 0 {
            let HttpState { bulk, transfers, .. } = &**this.state;
            let turn = this.turn.get_or_insert_with(|| bulk.spawn(transfers.tracker(), async {}));
            // However it ended: it was only a turn.
            let _ = ready!(Pin::new(turn).poll(context));
            (this.turn, this.at_once) = (None, PIECES_AT_ONCE);
        }
        let piece = this.pieces.pop_front();
        this.at_once -= 1;
        this.bytes -= piece.as_ref().map_or(0, |piece| piece.len() as u64);
        Poll::Ready(piece.map(|piece| Ok(Frame::data(piece))))
    }

    fn is_end_stream(&self) -> bool {
        self.pieces.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.bytes)
    }
}

/// A batch, and how far it has come.
struct Work {
    body: Bytes,
    room: Arc<Room>,
    items: Vec<Range<usize>>,
    stretches: Vec<Range<usize>>,
    next: AtomicUsize,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Batch<'a> {
    #[serde(borrow)]
    items: RawItems<'a>,
}

/// The items as they are written.
struct RawItems<'a>(Vec<&'a RawValue>);

impl<'de: 'a, 'a> Deserialize<'de> for RawItems<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ItemsVisitor;
        impl<'de> Visitor<'de> for ItemsVisitor {
            type Value = RawItems<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a sequence")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut all: A) -> Result<RawItems<'de>, A::Error> {
                let mut items = Vec::new();
                while let Some(item) = all.next_element()? {
                    items.push(item);
                    if items.len().is_multiple_of(STRETCH_ITEMS) {
                        give_way();
                    }
                }
                Ok(RawItems(items))
            }
        }
        deserializer.deserialize_seq(ItemsVisitor)
    }
}

/// Finds the items in the body. Each is parsed by itself later, so that a malformed one fails alone.
fn take_apart(body: Bytes, room: Arc<Room>, items_max: usize) -> Result<Work, Problem> {
    let Batch { items: RawItems(raw) } = parse(&body)?;
    if raw.len() > items_max {
        let told = format!("{} items, and a batch takes {items_max}: send several", raw.len());
        return Err(Problem::new(Code::TooLarge, told));
    }
    let start = body.as_ptr().addr();
    let place = |item: &&RawValue| {
        let at = item.get().as_ptr().addr() - start;
        at..at + item.get().len()
    };
    let items: Vec<Range<usize>> = raw.iter().map(place).collect();
    let stretches = cut(items.iter().map(Range::len));
    Ok(Work { body, room, items, stretches, next: AtomicUsize::new(0) })
}

/// Cuts items of these lengths into stretches.
pub(super) fn cut(lengths: impl Iterator<Item = usize>) -> Vec<Range<usize>> {
    let (mut stretches, mut start, mut bytes, mut end) = (Vec::new(), 0, 0, 0);
    for length in lengths {
        if end > start && (end - start >= STRETCH_ITEMS || bytes + length > STRETCH_BYTES) {
            stretches.push(start..end);
            (start, bytes) = (end, 0);
        }
        bytes += length;
        end += 1;
    }
    if end > start {
        stretches.push(start..end);
    }
    stretches
}

/// Answers all stretches, on as many cores as there are.
async fn spread<V: ItemVerb>(
    state: &SharedState,
    permit: &Arc<Permit<V>>,
    tally: Option<Tally>,
    work: Work,
) -> Result<Vec<Answers>, Problem> {
    let work = Arc::new(work);
    let mut answers: Vec<(usize, Answers)> = Vec::with_capacity(work.stretches.len());
    if work.body.len() <= INLINE_BYTES && work.stretches.len() <= INLINE_STRETCHES {
        answers.extend(take_turns(Arc::clone(state), Arc::clone(permit), tally, work).await);
    } else {
        let width = state.bulk.count().min(work.stretches.len());
        let tasks: Vec<_> = (0..width)
            .map(|_| take_turns(Arc::clone(state), Arc::clone(permit), tally.clone(), Arc::clone(&work)))
            .map(|turns| state.bulk.spawn(state.transfers.tracker(), turns))
            .collect();
        for task in tasks {
            let done = task.await.map_err(|_| Problem::internal(Code::InternalError, BULK_FAILED))?;
            answers.extend(done);
        }
    }
    answers.sort_unstable_by_key(|(place, _)| *place);
    Ok(answers.into_iter().map(|(_, answers)| answers).collect())
}

/// Answers one stretch after the other until none is left.
async fn take_turns<V: ItemVerb>(
    state: SharedState,
    permit: Arc<Permit<V>>,
    tally: Option<Tally>,
    work: Arc<Work>,
) -> Vec<(usize, Answers)> {
    let mut answers = Vec::new();
    loop {
        let turn = work.next.fetch_add(1, Ordering::Relaxed);
        let Some(stretch) = work.stretches.get(turn) else { return answers };
        let items = work.items[stretch.clone()].iter().map(|place| Ok(&work.body[place.clone()]));
        let answered = answer_all(&state, &permit, tally.as_ref(), items, b',').await;
        work.room.grow(answered.json.capacity());
        answers.push((turn, answered));
        give_way();
        tokio::task::yield_now().await;
    }
}

#[cfg(test)]
mod tests {
    use super::super::memory::BatchMemory;
    use super::*;

    #[test]
    fn stretches_cover_all_items_in_order_and_are_short() {
        assert!(cut(std::iter::empty()).is_empty());
        let lengths = [10, STRETCH_BYTES, 1, 1, STRETCH_BYTES * 3, 5];
        assert_eq!(cut(lengths.into_iter()), [0..1, 1..2, 2..4, 4..5, 5..6]);
        let many = cut((0..1_000).map(|_| 1));
        assert_eq!(
            (many.first(), many.len()),
            (Some(&(0..STRETCH_ITEMS)), 1_000_usize.div_ceil(STRETCH_ITEMS))
        );
        assert!(many.windows(2).all(|pair| pair[0].end == pair[1].start));
    }

    #[test]
    fn items_are_found_where_they_stand() {
        let body = Bytes::from_static(br#" {"items": [ {"a": 1} , 7, "x" ]} "#);
        let room = || Arc::new(BatchMemory::new(100).room(100).unwrap());
        let work = take_apart(body.clone(), room(), 3).unwrap();
        let found: Vec<&[u8]> = work.items.iter().map(|place| &body[place.clone()]).collect();
        assert_eq!(found, [br#"{"a": 1}"#.as_slice(), b"7", br#""x""#]);
        assert_eq!(take_apart(body, room(), 2).err().unwrap().code, Code::TooLarge);
    }
}
