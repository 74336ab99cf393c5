//! The log of calls: what tests count.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::Serialize;

use crate::clock::Timestamp;
use crate::context::EncryptionContext;

/// The oldest calls make room for newer ones beyond this many.
const KEPT: usize = 200_000;

/// One call, never with a plaintext in it.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct Call {
    /// Its number since the emulator started, from 0.
    pub number: u64,
    /// When it came, by the emulator's clock, in milliseconds since the Unix epoch.
    pub at_millis: i64,
    /// The operation: `Decrypt`, `AssumeRole`, ...
    pub operation: String,
    /// The region of the caller's signature.
    pub region: String,
    /// The caller's account.
    pub account: String,
    /// The caller's ARN; empty if the caller could not be told.
    pub principal: String,
    /// The ARN of the key that the call is about (the destination, for ReEncrypt), if it names one.
    pub key: Option<String>,
    /// ReEncrypt: the ARN of the key that the blob was under.
    pub source_key: Option<String>,
    /// The encryption context (the destination's, for ReEncrypt).
    pub encryption_context: EncryptionContext,
    /// ReEncrypt: the context that the blob was under.
    pub source_encryption_context: EncryptionContext,
    /// What became of the call.
    pub outcome: Outcome,
}

/// What became of a call.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Outcome {
    /// It has not been answered yet (or never will be: a black hole).
    Pending,
    /// Answered with success.
    Ok,
    /// Answered with an error of AWS's.
    Error {
        /// The error's AWS name.
        code: String,
        /// True if an injected fault made it.
        injected: bool,
    },
    /// The connection was reset instead of an answer.
    Reset,
    /// The caller went away before the answer.
    Abandoned,
}

impl Call {
    /// True if the call was answered with success.
    pub fn is_ok(&self) -> bool {
        self.outcome == Outcome::Ok
    }

    /// AWS's name of the error that answered the call.
    pub fn error_code(&self) -> Option<&str> {
        match &self.outcome {
            Outcome::Error { code, .. } => Some(code),
            _ => None,
        }
    }
}

/// A place in the log: calls since then are those that come after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Mark(pub(crate) u64);

#[derive(Debug, Default)]
pub(crate) struct CallLog {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    calls: VecDeque<Call>,
    next: u64,
}

/// What is known of a call when it arrives.
#[derive(Debug, Default)]
pub(crate) struct Arrival {
    pub(crate) operation: String,
    pub(crate) region: String,
    pub(crate) account: String,
    pub(crate) principal: String,
    pub(crate) key: Option<String>,
    pub(crate) source_key: Option<String>,
    pub(crate) encryption_context: EncryptionContext,
    pub(crate) source_encryption_context: EncryptionContext,
}

impl CallLog {
    /// Logged on arrival, so that calls that are never answered count too.
    pub(crate) fn begin(&self, arrival: Arrival, now: Timestamp) -> u64 {
        let mut inner = self.lock();
        let number = inner.next;
        inner.next += 1;
        if inner.calls.len() == KEPT {
            inner.calls.pop_front();
        }
        inner.calls.push_back(Call {
            number,
            at_millis: now.0,
            operation: arrival.operation,
            region: arrival.region,
            account: arrival.account,
            principal: arrival.principal,
            key: arrival.key,
            source_key: arrival.source_key,
            encryption_context: arrival.encryption_context,
            source_encryption_context: arrival.source_encryption_context,
            outcome: Outcome::Pending,
        });
        number
    }

    pub(crate) fn finish(&self, number: u64, outcome: Outcome) {
        let mut inner = self.lock();
        // Numbers are consecutive, but the log may have been cleared or have dropped the call since.
        let Some(first) = inner.calls.front().map(|call| call.number) else { return };
        let Some(index) = number.checked_sub(first).and_then(|i| usize::try_from(i).ok()) else { return };
        if let Some(call) = inner.calls.get_mut(index) {
            call.outcome = outcome;
        }
    }

    pub(crate) fn mark(&self) -> Mark {
        Mark(self.lock().next)
    }

    pub(crate) fn since(&self, mark: Mark) -> Vec<Call> {
        self.lock().calls.iter().filter(|call| call.number >= mark.0).cloned().collect()
    }

    pub(crate) fn count(&self, predicate: impl Fn(&Call) -> bool) -> usize {
        self.lock().calls.iter().filter(|call| predicate(call)).count()
    }

    pub(crate) fn clear(&self) {
        self.lock().calls.clear();
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_calls_make_room_and_outcomes_find_their_call() {
        let log = CallLog::default();
        let numbers: Vec<u64> = (0..=KEPT).map(|_| log.begin(Arrival::default(), Timestamp(0))).collect();
        log.finish(numbers[0], Outcome::Reset);
        log.finish(numbers[1], Outcome::Ok);
        let calls = log.since(Mark(0));
        assert_eq!((calls.len(), calls[0].number), (KEPT, numbers[1]));
        assert!(calls[0].is_ok());
        assert!(calls[1..].iter().all(|call| call.outcome == Outcome::Pending));
        log.clear();
        log.finish(numbers[KEPT], Outcome::Ok);
        assert!(log.since(Mark(0)).is_empty());
    }
}
