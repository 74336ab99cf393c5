//! `POST /v1/{encrypt,decrypt,rewrap}/batch`: many items in one body, each with its own outcome.
//!
//! The items are cut into short stretches, which as many tasks as there are cores take one after the other, on threads
//! of their own: a small request that comes meanwhile does not wait for the batch, and batches share these threads.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::{Request, State};
use axum::response::Response;
use bytes::Buf as _;
use http::StatusCode;
use http_body::{Frame, SizeHint};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use utoipa::ToSchema;

use super::items::{Answers, DecryptItem, EncryptItem, ItemProblem, ItemVerb, RewrapItem, answer_all};
use super::memory::Room;
use super::{NDJSON, is, lines, refuse_raw_headers};
use crate::access::{Decrypt, Encrypt, Permit, Rewrap};
use crate::audit::Tally;
use crate::http::HttpState;
use crate::http::handlers::{Permitted, announced, json, json_body};
use crate::http::json::parse;
use crate::http::middleware::quota::Tab;
use crate::http::problem::{Code, Problem};

/// The most items that are answered before other work gets its turn.
pub(super) const STRETCH_ITEMS: usize = 64;
/// The most bytes of them.
pub(super) const STRETCH_BYTES: usize = 64 << 10;
/// Larger bodies are put together, taken apart and worked off where nothing waits behind them.
const INLINE_BYTES: usize = STRETCH_BYTES;

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
                State(state): State<Arc<HttpState>>,
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
    state: Arc<HttpState>,
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
    let mut body = json_body(request).await?;
    let (bytes, items_max) = (body.remaining(), state.options.batch_items_max);
    let (tracker, inside) = (state.transfers.tracker(), Arc::clone(&room));
    let apart = move || take_apart(body.copy_to_bytes(bytes), inside, items_max);
    let work = if bytes <= INLINE_BYTES {
        apart()?
    } else {
        let apart = state.bulk.spawn(tracker, async move { apart() }).await;
        apart.map_err(|error| Problem::internal(Code::InternalError, &error))??
    };
    if let Some(tab) = tab {
        tab.more_items(work.items.len())?;
    }
    let permit = Arc::new(permit);
    let record = state.operations.batch(&permit).await?;
    let answers = spread(&state, &permit, record.tally(), work).await?;
    record.finish();
    room.shrink(room_bytes);
    Ok(json(StatusCode::OK, Body::new(AnswerBody::new(answers, room))))
}

/// The answers in a row, as they were written: nothing is copied.
struct AnswerBody {
    pieces: VecDeque<Bytes>,
    bytes: u64,
    /// Theirs until they are sent.
    _room: Arc<Room>,
}

impl AnswerBody {
    fn new(mut answers: Vec<Answers>, room: Arc<Room>) -> Self {
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
        Self { pieces, bytes, _room: room }
    }
}

impl HttpBody for AnswerBody {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let piece = self.pieces.pop_front();
        self.bytes -= piece.as_ref().map_or(0, |piece| piece.len() as u64);
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
    items: Vec<&'a RawValue>,
}

/// Finds the items in the body. Each is parsed by itself later, so that a malformed one fails alone.
fn take_apart(body: Bytes, room: Arc<Room>, items_max: usize) -> Result<Work, Problem> {
    let batch: Batch<'_> = parse(&body)?;
    if batch.items.len() > items_max {
        let told = format!("{} items, and a batch takes {items_max}: send several", batch.items.len());
        return Err(Problem::new(Code::TooLarge, told));
    }
    let start = body.as_ptr().addr();
    let place = |item: &&RawValue| {
        let at = item.get().as_ptr().addr() - start;
        at..at + item.get().len()
    };
    let items: Vec<Range<usize>> = batch.items.iter().map(place).collect();
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
    state: &Arc<HttpState>,
    permit: &Arc<Permit<V>>,
    tally: Option<Tally>,
    work: Work,
) -> Result<Vec<Answers>, Problem> {
    let work = Arc::new(work);
    let mut answers: Vec<(usize, Answers)> = Vec::with_capacity(work.stretches.len());
    if work.body.len() <= INLINE_BYTES && work.stretches.len() <= 1 {
        answers.extend(take_turns(Arc::clone(state), Arc::clone(permit), tally, work).await);
    } else {
        let width = state.bulk.count().min(work.stretches.len());
        let tasks: Vec<_> = (0..width)
            .map(|_| take_turns(Arc::clone(state), Arc::clone(permit), tally.clone(), Arc::clone(&work)))
            .map(|turns| state.bulk.spawn(state.transfers.tracker(), turns))
            .collect();
        for task in tasks {
            let done = task.await.map_err(|error| Problem::internal(Code::InternalError, &error))?;
            answers.extend(done);
        }
    }
    answers.sort_unstable_by_key(|(place, _)| *place);
    Ok(answers.into_iter().map(|(_, answers)| answers).collect())
}

/// Answers one stretch after the other until none is left.
async fn take_turns<V: ItemVerb>(
    state: Arc<HttpState>,
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
