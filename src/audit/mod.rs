//! Who did what: begin -> done | failed | abandoned.
//!
//! An [`Attempt`] that is dropped without an outcome is recorded as abandoned: a client that went away, or a task
//! that died, leaves a trace too. Records go to the log under the target `keyfold::audit`: changes of administration
//! at INFO, data-plane calls at DEBUG (off by default). They name who, what and the outcome, and hold no plaintext,
//! key material or context values.

use crate::clock::Clock;
use crate::tenant::{PrincipalId, TenantId, Verb};
use std::time::Duration;

/// Where records go.
#[derive(Clone)]
pub struct Audit {
    clock: Clock,
}

impl Audit {
    /// Records into the log.
    pub fn new(clock: Clock) -> Self {
        Self { clock }
    }

    /// A data-plane call begins.
    pub fn begin<'a>(&'a self, verb: Verb, principal: &'a PrincipalId, tenant: &'a TenantId) -> Attempt<'a> {
        let enabled = tracing::enabled!(target: "keyfold::audit", tracing::Level::DEBUG);
        let began = if enabled { self.clock.monotonic() } else { Duration::ZERO };
        Attempt {
            audit: self,
            enabled,
            verb: verb.name(),
            principal,
            tenant: Some(tenant),
            change: "",
            began,
        }
    }

    /// A change of administration begins: what kind (`tenant.create`), and in which tenant.
    pub fn begin_change<'a>(
        &'a self,
        change: &'a str,
        principal: &'a PrincipalId,
        tenant: Option<&'a TenantId>,
    ) -> Attempt<'a> {
        let began = self.clock.monotonic();
        tracing::info!(target: "keyfold::audit", change, %principal, tenant = tenant.map(TenantId::as_str), "begin");
        Attempt { audit: self, enabled: true, verb: "", principal, tenant, change, began }
    }
}

/// Something that was begun and has no outcome yet.
pub struct Attempt<'a> {
    audit: &'a Audit,
    enabled: bool,
    verb: &'static str,
    principal: &'a PrincipalId,
    tenant: Option<&'a TenantId>,
    change: &'a str,
    began: Duration,
}

impl Attempt<'_> {
    /// It was done.
    pub fn done(self) {
        self.end("done", "");
    }

    /// It failed, for this reason: the full one, which the caller may not be told.
    pub fn failed(self, reason: &dyn std::fmt::Display) {
        if self.enabled {
            self.end("failed", &reason.to_string());
        } else {
            self.end("failed", "");
        }
    }

    fn end(mut self, outcome: &str, reason: &str) {
        self.record(outcome, reason);
        self.enabled = false;
    }

    fn record(&self, outcome: &str, reason: &str) {
        if !self.enabled {
            return;
        }
        let micros = self.audit.clock.monotonic().saturating_sub(self.began).as_micros();
        let (principal, tenant) = (self.principal, self.tenant.map(TenantId::as_str));
        if self.change.is_empty() {
            tracing::debug!(target: "keyfold::audit", verb = self.verb, %principal, tenant, outcome, reason, micros);
        } else {
            tracing::info!(target: "keyfold::audit", change = self.change, %principal, tenant, outcome, reason, micros);
        }
    }
}

impl Drop for Attempt<'_> {
    fn drop(&mut self) {
        self.record("abandoned", "");
    }
}
