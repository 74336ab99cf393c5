//! Faults on demand: which calls they hit, and what they do to them.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::calls::Arrival;
use crate::error::KmsError;

/// Which calls a fault hits: those that match every part that is set.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct FaultScope {
    /// The region of the call.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub region: Option<String>,
    /// The operation, such as `Decrypt` (or `AssumeRole`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub operation: Option<String>,
    /// The caller's account.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub account: Option<String>,
    /// The key: an ARN, or a key id to mean all replicas of a multi-Region key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
}

impl FaultScope {
    /// Every call.
    pub fn any() -> Self {
        Self::default()
    }

    /// Every call in `region`.
    pub fn region(region: impl Into<String>) -> Self {
        Self { region: Some(region.into()), ..Self::default() }
    }

    /// Every call that is about `key`.
    pub fn key(key: impl Into<String>) -> Self {
        Self { key: Some(key.into()), ..Self::default() }
    }

    /// Only calls of `operation`.
    pub fn operation(mut self, operation: impl Into<String>) -> Self {
        self.operation = Some(operation.into());
        self
    }

    /// Only calls from `account`.
    pub fn account(mut self, account: impl Into<String>) -> Self {
        self.account = Some(account.into());
        self
    }

    fn matches(&self, call: &Arrival) -> bool {
        fn is(wanted: Option<&String>, found: &str) -> bool {
            wanted.is_none_or(|wanted| wanted == found)
        }
        let keys = [call.key.as_deref(), call.source_key.as_deref()];
        is(self.region.as_ref(), &call.region)
            && is(self.operation.as_ref(), &call.operation)
            && is(self.account.as_ref(), &call.account)
            && self.key.as_ref().is_none_or(|wanted| {
                keys.iter().flatten().any(|arn| arn == wanted || arn.rsplit('/').next() == Some(wanted))
            })
    }
}

/// What happens to a call.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
#[non_exhaustive]
pub enum Fault {
    /// Answered as usual, but later. Real time passes, whatever the emulator's clock does.
    Latency {
        /// How much later.
        millis: u64,
    },
    /// A token bucket by the emulator's clock: that many calls at once, refilled at that many a second;
    /// the rest are `ThrottlingException`. 0 throttles every call.
    Throttle {
        /// Calls a second that pass.
        per_second: u32,
    },
    /// `KMSInternalException`, HTTP 500.
    Internal,
    /// `DependencyTimeoutException`, HTTP 500.
    DependencyTimeout,
    /// `KeyUnavailableException`, HTTP 500.
    KeyUnavailable,
    /// `ServiceUnavailableException`, HTTP 503.
    Unavailable,
    /// HTTP 502 with a page of HTML, as a proxy in between gives.
    BadGateway,
    /// `AccessDeniedException`, whatever the policies say.
    Deny,
    /// The connection is reset (TCP RST) instead of an answer.
    Reset,
    /// The connection is accepted, the request read, and never answered.
    BlackHole,
}

impl Fault {
    /// [`Fault::Latency`] of `by`.
    pub fn latency(by: Duration) -> Self {
        Self::Latency { millis: u64::try_from(by.as_millis()).unwrap_or(u64::MAX) }
    }

    /// [`Fault::Throttle`] at `per_second`.
    pub fn throttle(per_second: u32) -> Self {
        Self::Throttle { per_second }
    }
}

/// Names a fault that has been set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct FaultId(u64);

/// A fault that is set.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct FaultRule {
    /// Its name.
    pub id: FaultId,
    /// Which calls it hits.
    #[serde(flatten)]
    pub scope: FaultScope,
    /// What it does to them.
    pub fault: Fault,
    /// How many calls it will still hit; unset means all.
    pub times: Option<u64>,
}

/// The faults that are set. Latencies add up; of the others the oldest that hits a call decides.
#[derive(Debug, Default)]
pub struct Faults {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    rules: Vec<(FaultRule, Bucket)>,
    next: u64,
}

/// Tokens of a throttle in millionths, so that a refill needs no fractions.
#[derive(Debug, Default)]
struct Bucket {
    micro_tokens: u128,
    filled: Option<Duration>,
}

const MICRO: u128 = 1_000_000;

impl Bucket {
    fn take(&mut self, per_second: u32, now: Duration) -> bool {
        let full = u128::from(per_second) * MICRO;
        self.micro_tokens = match self.filled {
            None => full,
            Some(then) => {
                let refill = now.saturating_sub(then).as_micros().saturating_mul(u128::from(per_second));
                self.micro_tokens.saturating_add(refill).min(full)
            }
        };
        self.filled = Some(now);
        match self.micro_tokens.checked_sub(MICRO) {
            Some(rest) => {
                self.micro_tokens = rest;
                true
            }
            None => false,
        }
    }
}

/// What the faults make of a call.
#[derive(Debug)]
pub(crate) struct Verdict {
    pub(crate) delay: Duration,
    pub(crate) end: Option<End>,
}

/// How a fault ends a call that it does not let through.
#[derive(Debug)]
pub(crate) enum End {
    Error(KmsError),
    BadGateway,
    Reset,
    BlackHole,
}

impl Faults {
    /// Sets a fault until it is cleared. One of the same kind with the same scope is replaced.
    pub fn set(&self, scope: FaultScope, fault: Fault) -> FaultId {
        self.insert(scope, fault, None)
    }

    /// Sets a fault for the next `times` calls that it hits.
    pub fn set_times(&self, scope: FaultScope, fault: Fault, times: u64) -> FaultId {
        self.insert(scope, fault, Some(times))
    }

    /// Clears one fault. False if it was gone already.
    pub fn remove(&self, id: FaultId) -> bool {
        let mut inner = self.lock();
        let before = inner.rules.len();
        inner.rules.retain(|(rule, _)| rule.id != id);
        inner.rules.len() != before
    }

    /// Clears all faults with exactly this scope.
    pub fn clear_scope(&self, scope: &FaultScope) {
        self.lock().rules.retain(|(rule, _)| rule.scope != *scope);
    }

    /// Clears all faults. Calls that a black hole has swallowed stay so.
    pub fn clear(&self) {
        self.lock().rules.clear();
    }

    /// The faults that are set, oldest first.
    pub fn list(&self) -> Vec<FaultRule> {
        self.lock().rules.iter().map(|(rule, _)| rule.clone()).collect()
    }

    pub(crate) fn insert(&self, scope: FaultScope, fault: Fault, times: Option<u64>) -> FaultId {
        let mut inner = self.lock();
        let id = FaultId(inner.next);
        inner.next += 1;
        let same_kind = |other: &Fault| std::mem::discriminant(other) == std::mem::discriminant(&fault);
        inner.rules.retain(|(rule, _)| rule.scope != scope || !same_kind(&rule.fault));
        inner.rules.push((FaultRule { id, scope, fault, times }, Bucket::default()));
        id
    }

    /// Decides about a call that came at `now` (time since the emulator's start).
    pub(crate) fn judge(&self, call: &Arrival, now: Duration) -> Verdict {
        let mut verdict = Verdict { delay: Duration::ZERO, end: None };
        let mut inner = self.lock();
        for (rule, bucket) in &mut inner.rules {
            if !rule.scope.matches(call) || rule.times == Some(0) {
                continue;
            }
            let end = match &rule.fault {
                Fault::Latency { millis } => {
                    verdict.delay += Duration::from_millis(*millis);
                    rule.times = rule.times.map(|times| times - 1);
                    continue;
                }
                _ if verdict.end.is_some() => continue,
                Fault::Throttle { per_second } if bucket.take(*per_second, now) => continue,
                fault => end_of(fault, call),
            };
            rule.times = rule.times.map(|times| times - 1);
            verdict.end = Some(end);
        }
        inner.rules.retain(|(rule, _)| rule.times != Some(0));
        verdict
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn end_of(fault: &Fault, call: &Arrival) -> End {
    End::Error(match fault {
        Fault::Latency { .. } | Fault::Throttle { .. } => KmsError::throttled(),
        Fault::Internal => KmsError::internal("An internal error occurred."),
        Fault::DependencyTimeout => KmsError::dependency_timeout(),
        Fault::KeyUnavailable => KmsError::key_unavailable("The specified KMS key was not available."),
        Fault::Unavailable => KmsError::service_unavailable(),
        Fault::Deny => KmsError::access_denied(crate::policy::explicitly_denied(call)),
        Fault::BadGateway => return End::BadGateway,
        Fault::Reset => return End::Reset,
        Fault::BlackHole => return End::BlackHole,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(region: &str, operation: &str) -> Arrival {
        Arrival { region: region.to_owned(), operation: operation.to_owned(), ..Arrival::default() }
    }

    #[test]
    fn a_throttle_lets_its_rate_through_and_no_more() {
        let faults = Faults::default();
        faults.set(FaultScope::region("r"), Fault::throttle(5));
        let passed = |at_millis| {
            let now = Duration::from_millis(at_millis);
            (0..20).filter(|_| faults.judge(&call("r", "Decrypt"), now).end.is_none()).count()
        };
        assert_eq!(passed(0), 5);
        assert_eq!(passed(100), 0);
        assert_eq!(passed(200), 1);
        assert_eq!(passed(1200), 5);
        assert_eq!(passed(60_000), 5);
    }

    #[test]
    fn a_scope_hits_what_it_names() {
        let faults = Faults::default();
        faults.set(FaultScope::region("a").operation("Decrypt"), Fault::Internal);
        let hits = |region, operation| faults.judge(&call(region, operation), Duration::ZERO).end.is_some();
        assert!(hits("a", "Decrypt"));
        assert!(!hits("a", "Encrypt"));
        assert!(!hits("b", "Decrypt"));
        faults.clear();
        assert!(!hits("a", "Decrypt"));
    }

    #[test]
    fn a_fault_for_some_calls_is_used_up() {
        let faults = Faults::default();
        faults.set_times(FaultScope::any(), Fault::Reset, 2);
        let hits = || faults.judge(&call("a", "Decrypt"), Duration::ZERO).end.is_some();
        assert_eq!([hits(), hits(), hits()], [true, true, false]);
        assert!(faults.list().is_empty());
    }

    #[test]
    fn latencies_add_up_beside_another_fault() {
        let faults = Faults::default();
        faults.set(FaultScope::any(), Fault::latency(Duration::from_millis(30)));
        faults.set(FaultScope::region("a"), Fault::latency(Duration::from_millis(20)));
        faults.set(FaultScope::any(), Fault::Unavailable);
        let verdict = faults.judge(&call("a", "Decrypt"), Duration::ZERO);
        assert_eq!(verdict.delay, Duration::from_millis(50));
        assert!(verdict.end.is_some());
    }
}
