//! Lines of JSON: any number of items, answered in order while more arrive.

use std::collections::VecDeque;
use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::Request;
use axum::response::Response;
use http::{HeaderMap, HeaderValue, header};
use tokio_util::task::AbortOnDropHandle;

use super::NDJSON;
use super::batch::cut;
use super::items::{Answers, ItemVerb, answer_all};
use super::threads::{BULK_FAILED, give_way};
use crate::access::Permit;
use crate::audit::Tally;
use crate::http::SharedState;
use crate::http::middleware::quota::Tab;
use crate::http::problem::{Code, Problem};
use crate::http::transfer::{Answer, Input, Output};
use crate::operations::{OperationError, Source as _, TransferError};

pub(super) async fn answer<V: ItemVerb>(
    state: SharedState,
    permit: Permit<V>,
    request: Request,
) -> Result<Response, Problem> {
    let permit = Arc::new(permit);
    let pipeline = Pipeline {
        permit: Arc::clone(&permit),
        tally: None,
        splitter: Splitter::new(state.options.line_bytes_max),
        unpaid: None,
        waiting: VecDeque::new(),
        under_way: VecDeque::new(),
        state: Arc::clone(&state),
        tab: request.extensions().get::<Tab>().cloned(),
    };
    let (body, tenant) = (request.into_body(), permit.tenant().clone());
    let operations = Arc::clone(&state.operations);
    let work = |source, sink| async move {
        let record = operations.batch(&permit).await?;
        let tally = record.tally();
        let outcome = Pipeline { tally, ..pipeline }.run(source, sink).await;
        match &outcome {
            Ok(()) => record.finish(),
            Err(problem) => record.broken_off(problem.code.name(), &problem.detail),
        }
        outcome
    };
    state.transfers.run(&tenant, body, Answer::AtOnce, work).await
}

/// Lines on their way: at most as many stretches under way as there are cores, and behind them what one piece of
/// the body brought.
struct Pipeline<V> {
    state: SharedState,
    permit: Arc<Permit<V>>,
    tally: Option<Tally>,
    splitter: Splitter,
    /// The line that is being read has a part that was past the quota.
    unpaid: Option<Problem>,
    /// `Err` for a line that is past the quota.
    waiting: VecDeque<Vec<Result<Line, Problem>>>,
    under_way: VecDeque<AbortOnDropHandle<Answers>>,
    tab: Option<Tab>,
}

impl<V: ItemVerb> Pipeline<V> {
    async fn run(mut self, mut source: Input, mut sink: Output) -> Result<(), Problem> {
        let told = |error: TransferError| Problem::from(OperationError::from(error));
        let mut headers = HeaderMap::new();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(NDJSON));
        sink.begin(headers).await.map_err(told)?;
        let mut more = true;
        loop {
            self.start();
            if !more && self.under_way.is_empty() {
                return Ok(());
            }
            // More is read only when nothing waits: so the memory that is used does not depend on what is sent.
            let reading = more && self.waiting.is_empty();
            tokio::select! {
                biased;
                answers = first(&mut self.under_way) => {
                    self.under_way.pop_front();
                    let answers = answers.map_err(|_| Problem::internal(Code::InternalError, BULK_FAILED))?;
                    sink.write(answers.json.into()).await.map_err(told)?;
                }
                piece = source.next(), if reading => {
                    let piece = piece.map_err(told)?;
                    more = piece.is_some();
                    let lines = self.lines(piece);
                    self.wait(lines);
                }
            }
        }
    }

    /// The lines that end with this piece of the body; none for its end. Its bytes are paid where they come, whatever
    /// lines they make: one without an end would otherwise be free.
    fn lines(&mut self, piece: Option<Bytes>) -> Vec<Result<Line, Problem>> {
        let bytes = piece.as_ref().map_or(0, Bytes::len);
        let past = self.tab.as_ref().and_then(|tab| tab.more_bytes(bytes as u64).err());
        let lines = match piece {
            Some(piece) => self.splitter.push(&piece),
            None => self.splitter.end().into_iter().collect(),
        };
        let mut begun = self.unpaid.take();
        if self.splitter.is_within_a_line() {
            self.unpaid = past.clone().or_else(|| begun.clone().filter(|_| lines.is_empty()));
        }
        let paid = |line| past.clone().or_else(|| begun.take()).map_or(Ok(line), Err);
        lines.into_iter().map(paid).collect()
    }

    fn wait(&mut self, mut lines: Vec<Result<Line, Problem>>) {
        let length = |line: &Result<Line, Problem>| line.as_ref().map_or(0, Line::length);
        let mut stretches: Vec<Vec<_>> = cut(lines.iter().map(length))
            .into_iter()
            .rev()
            .map(|stretch| lines.split_off(stretch.start))
            .collect();
        stretches.reverse();
        self.waiting.extend(stretches);
    }

    /// Puts as much under way as there is room for.
    fn start(&mut self) {
        while self.under_way.len() < self.state.bulk.count().max(2)
            && let Some(lines) = self.waiting.pop_front()
        {
            let (state, permit, tally) =
                (Arc::clone(&self.state), Arc::clone(&self.permit), self.tally.clone());
            // Past the quota lines are answered too, one by one: the answer has begun.
            let paid = lines.iter().filter(|line| line.is_ok()).count();
            let refused = self.tab.as_ref().and_then(|tab| tab.more_items(paid).err());
            let task = self.state.bulk.spawn(self.state.transfers.tracker(), async move {
                let items = lines.iter().map(|line| match (line, &refused) {
                    (Err(problem), _) | (Ok(_), Some(problem)) => Err(problem.clone()),
                    (Ok(line), None) => line.item(),
                });
                let answers = answer_all(&state, &permit, tally.as_ref(), items, b'\n').await;
                give_way();
                answers
            });
            self.under_way.push_back(task);
        }
    }
}

/// The outcome of the oldest stretch; waits for ever where there is none.
async fn first(
    under_way: &mut VecDeque<AbortOnDropHandle<Answers>>,
) -> Result<Answers, tokio::task::JoinError> {
    match under_way.front_mut() {
        Some(task) => task.await,
        None => std::future::pending().await,
    }
}

/// One line.
#[derive(Debug, PartialEq)]
enum Line {
    Whole(Bytes),
    /// Longer than this many bytes.
    TooLong(usize),
}

impl Line {
    fn length(&self) -> usize {
        match self {
            Self::Whole(bytes) => bytes.len(),
            Self::TooLong(_) => 0,
        }
    }

    fn item(&self) -> Result<&[u8], Problem> {
        match self {
            Self::Whole(bytes) => Ok(bytes),
            Self::TooLong(max) => {
                Err(Problem::new(Code::TooLarge, format!("the line is longer than {max} bytes")))
            }
        }
    }
}

/// Finds lines in pieces. Holds at most one line.
struct Splitter {
    held: Vec<u8>,
    /// The line that is being read is too long: what remains of it is let go.
    skipping: bool,
    line_bytes_max: usize,
}

impl Splitter {
    fn new(line_bytes_max: usize) -> Self {
        Self { held: Vec::new(), skipping: false, line_bytes_max }
    }

    fn push(&mut self, piece: &Bytes) -> Vec<Line> {
        let mut lines = Vec::new();
        let mut start = 0;
        while let Some(length) = memchr::memchr(b'\n', &piece[start..]) {
            let part = piece.slice(start..start + length);
            start += length + 1;
            lines.extend(self.line(part));
        }
        let rest = &piece[start..];
        if !self.skipping && self.held.len() + rest.len() <= self.line_bytes_max {
            self.held.extend_from_slice(rest);
        } else if !rest.is_empty() {
            self.skipping = true;
            self.held = Vec::new();
        }
        lines
    }

    fn is_within_a_line(&self) -> bool {
        self.skipping || !self.held.is_empty()
    }

    /// A last line that has no line break is one too.
    fn end(&mut self) -> Option<Line> {
        self.line(Bytes::new())
    }

    /// The line that ends with `part`. An empty one is none.
    fn line(&mut self, part: Bytes) -> Option<Line> {
        let too_long = self.skipping || self.held.len() + part.len() > self.line_bytes_max;
        self.skipping = false;
        let whole = if too_long {
            self.held = Vec::new();
            return Some(Line::TooLong(self.line_bytes_max));
        } else if self.held.is_empty() {
            part
        } else {
            self.held.extend_from_slice(&part);
            std::mem::take(&mut self.held).into()
        };
        let blank = whole.iter().all(u8::is_ascii_whitespace);
        (!blank).then_some(Line::Whole(whole))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split(text: &str, piece_bytes: usize) -> Vec<Line> {
        let mut splitter = Splitter::new(5);
        let mut lines = Vec::new();
        for piece in text.as_bytes().chunks(piece_bytes) {
            lines.extend(splitter.push(&Bytes::copy_from_slice(piece)));
            assert!(splitter.held.len() <= 5);
        }
        lines.extend(splitter.end());
        lines
    }

    #[test]
    fn lines_are_the_same_however_they_are_cut_and_the_limit_is_exact() {
        let whole = |text: &'static str| Line::Whole(Bytes::from_static(text.as_bytes()));
        let expected =
            [whole("a"), whole("12345"), Line::TooLong(5), whole("b\r"), Line::TooLong(5), whole("end")];
        for piece_bytes in 1..40 {
            let lines = split("a\n12345\n123456\n\nb\r\n \n1234567890abc\nend", piece_bytes);
            assert_eq!(lines, expected, "in pieces of {piece_bytes}");
        }
        assert!(split("", 1).is_empty() && split("\n\n", 1).is_empty());
        assert_eq!(split("123456", 3), [Line::TooLong(5)]);
    }
}
