//! Under which circumstances a call is made: what goes with its permit into the operation and its audit record.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use arrayvec::ArrayString;
use envelope::{ContextError, EncryptionContext};

use super::Principal;
use crate::audit::Who;

/// What names a request in log and audit, in 64 bytes at most. Lies where it is used: every call has one.
pub type RequestId = ArrayString<64>;

/// The circumstances of one call, as the edge has established them.
#[derive(Debug, Default)]
pub struct Circumstances {
    /// Names the call in log and audit.
    pub request_id: RequestId,
    /// Where it came from.
    pub source: Option<IpAddr>,
    /// What the configuration adds to its encryption context.
    pub context: ServiceContext,
    recorded: AtomicBool,
    /// Of which call these are other pairs.
    call: Option<Arc<Self>>,
}

impl Circumstances {
    /// Of a call with this id, from there, with these pairs.
    pub fn new(request_id: RequestId, source: Option<IpAddr>, context: ServiceContext) -> Self {
        Self { request_id, source, context, ..Self::default() }
    }

    /// The same call with other pairs.
    pub fn with_context(self: &Arc<Self>, context: ServiceContext) -> Self {
        let call = self.call.as_ref().unwrap_or(self);
        Self { call: Some(Arc::clone(call)), ..Self::new(self.request_id, self.source, context) }
    }

    /// Who calls, for the record of a call that was refused before its tenant was known.
    pub fn who<'a>(&'a self, principal: &'a Principal) -> Who<'a> {
        Who {
            principal: principal.id(),
            method: principal.attributes().method,
            tenant: None,
            request_id: &self.request_id,
            source: self.source,
            subject: None,
        }
    }

    /// An operation has taken the call over, and will record it.
    pub fn take_over(&self) {
        self.recorded().store(true, Ordering::Relaxed);
    }

    /// Whether an operation has taken the call over.
    pub fn is_taken_over(&self) -> bool {
        self.recorded().load(Ordering::Relaxed)
    }

    fn recorded(&self) -> &AtomicBool {
        &self.call.as_deref().unwrap_or(self).recorded
    }
}

/// The pairs that the service adds to a call's encryption context, beside its own `keyfold:` ones.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServiceContext {
    /// Every name that the configuration gives a source, whether this call has a value for it or not: none of them
    /// is the caller's to use. None where it gives none: an empty list would be counted by every request.
    pub names: Option<Arc<[Box<str>]>>,
    /// What is bound to the message only.
    pub message: EncryptionContext,
    /// What is bound to the message and to the data key.
    pub bound: EncryptionContext,
}

impl ServiceContext {
    /// Adds a pair, bound to the data key too where `to_key` says so.
    pub fn insert(&mut self, name: &str, value: &str, to_key: bool) -> Result<(), ContextError> {
        let pairs = if to_key { &mut self.bound } else { &mut self.message };
        pairs.insert(name, value)
    }

    /// All pairs that are bound to the message.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.message.iter().chain(self.bound.iter())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_with_other_pairs_is_the_same_call() {
        let call = Arc::new(Circumstances::default());
        let other = Arc::new(call.with_context(ServiceContext::default()));
        let third = Arc::new(other.with_context(ServiceContext::default()));
        assert!(!call.is_taken_over() && !other.is_taken_over() && !third.is_taken_over());
        third.take_over();
        assert!(call.is_taken_over() && other.is_taken_over() && third.is_taken_over());
    }
}
