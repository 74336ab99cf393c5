//! What was begun and will have an outcome, and who began it.

use std::net::IpAddr;
use std::time::Duration;

use envelope::DataKeyId;

use super::asked::Asked;
use super::record::{Details, Member, Record, member};
use super::tally::{Items, Tally};
use super::{Audit, CALL};
use crate::store::Target;
use crate::tenant::{KeyName, PrincipalId, TenantId};

/// What a change is about.
#[derive(Clone, Copy)]
pub enum Subject<'a> {
    /// A key.
    Key(&'a KeyName),
    /// A data key.
    Dek(DataKeyId),
    /// An API key, by its id.
    ApiKey(&'a str),
    /// A grant of the registry, by its id.
    Grant(&'a str),
}

/// Who does it, how he was recognised, and where he calls from.
#[derive(Clone, Copy)]
pub struct Who<'a> {
    /// Who.
    pub principal: &'a PrincipalId,
    /// How he authenticated.
    pub method: &'static str,
    /// In which tenant.
    pub tenant: Option<&'a TenantId>,
    /// The request's id; empty where there is no request.
    pub request_id: &'a str,
    /// The address that the request came from.
    pub source: Option<IpAddr>,
    /// What he changes, where that is less than a tenant.
    pub subject: Option<Subject<'a>>,
}

impl<'a> Who<'a> {
    /// Somebody within the service, or at its command line.
    pub fn local(principal: &'a PrincipalId, tenant: Option<&'a TenantId>) -> Self {
        Self { principal, method: "local", tenant, request_id: "", source: None, subject: None }
    }

    /// The same, changing this.
    pub fn changing(self, subject: Subject<'a>) -> Self {
        Self { subject: Some(subject), ..self }
    }

    /// The same, changing this of his tenant.
    pub fn changing_target(self, target: &'a Target) -> Self {
        match target {
            Target::Tenant => self,
            Target::Key(key) => self.changing(Subject::Key(key)),
            Target::Dek(dek) => self.changing(Subject::Dek(*dek)),
        }
    }

    /// The same in this tenant.
    pub fn in_tenant(self, tenant: &'a TenantId) -> Self {
        Self { tenant: Some(tenant), ..self }
    }
}

/// Something that was begun and has no outcome yet.
pub struct Attempt<'a> {
    audit: &'a Audit,
    who: Who<'a>,
    event: &'static str,
    what: &'a str,
    logged: bool,
    held: u8,
    began: Duration,
    change_id: Option<u64>,
    made: Option<(Member, Box<str>)>,
    asked: Asked,
    details: Details,
    tally: Option<Tally>,
    /// Boxed: few calls have any, and each carries what it has through its work.
    items: Option<Box<Items>>,
}

impl<'a> Attempt<'a> {
    /// With the places that are held for its record, whether it is logged too, and when it began.
    pub(super) fn new(
        audit: &'a Audit,
        event: &'static str,
        what: &'a str,
        who: Who<'a>,
        (held, logged, began): (u8, bool, Duration),
    ) -> Self {
        Self {
            audit,
            who,
            event,
            what,
            logged,
            held,
            began,
            change_id: None,
            made: None,
            asked: Asked::NOTHING,
            details: Details::new(held != 0),
            tally: None,
            items: None,
        }
    }
}

impl Attempt<'_> {
    /// Sends the first record of two.
    pub(super) fn begin(&mut self, asked: Asked) {
        // Without randomness the two are still told to belong together by who, what and when.
        self.change_id = getrandom::u64().ok();
        self.asked = asked;
        self.send("begin", "", "");
    }

    /// Places for the record to come.
    pub(super) fn hold(&mut self, held: u8) {
        self.held = held;
    }

    /// What there is to tell of the message.
    pub fn details(&mut self) -> &mut Details {
        &mut self.details
    }

    /// It is a batch, and its items are counted here; none where nothing is recorded.
    pub fn tally(&mut self) -> Option<Tally> {
        let wanted = self.logged || self.held != 0;
        self.tally = wanted.then(Tally::default);
        self.tally.clone()
    }

    /// The API key or grant that was made.
    pub fn made(&mut self, subject: Subject<'_>) {
        self.made = named(subject).map(|(kind, id)| (kind, id.into()));
    }

    /// It was done.
    pub fn done(self) {
        self.end("done", "", "");
    }

    /// It failed with this code, for this reason: the full one, which the caller may not be told.
    pub fn failed(self, code: &'static str, reason: &dyn std::fmt::Display) {
        let reason = if self.logged || self.held != 0 { reason.to_string() } else { String::new() };
        self.end("failed", code, &reason);
    }

    /// A batch was worked through: it failed where any of its items did.
    pub fn worked_through(mut self) {
        self.take_items();
        match self.items.as_ref().and_then(|items| items.reason.as_ref().map(|first| (items, first))) {
            None => self.end("done", "", ""),
            Some((items, (code, first))) => {
                let (code, failed, tried) = (*code, items.failed(), items.tried);
                let reason = format!("{failed} of {tried} items, the first: {first}");
                self.end("failed", code, &reason);
            }
        }
    }

    fn take_items(&mut self) {
        if let Some(tally) = self.tally.take() {
            self.items = Some(Box::new(tally.take()));
        }
    }

    pub(super) fn end(mut self, outcome: &'static str, code: &'static str, reason: &str) {
        self.send(outcome, code, reason);
        self.logged = false;
    }

    /// Sends a record, and gives up the place that was held for it.
    fn send(&mut self, outcome: &'static str, code: &'static str, reason: &str) {
        let held = std::mem::take(&mut self.held);
        if !self.logged && held == 0 {
            return;
        }
        let elapsed = self.audit.clock.monotonic().saturating_sub(self.began);
        let micros = u64::try_from(elapsed.as_micros()).unwrap_or(u64::MAX);
        if self.logged && outcome != "begin" {
            self.log(outcome, code, reason, micros);
        }
        if held == 0 {
            return;
        }
        let Some(trail) = &self.audit.trail else { return };
        match self.who.subject {
            Some(Subject::Key(key)) => self.details.with_key(key),
            Some(Subject::Dek(dek)) => self.details.with_dek(dek),
            _ => {}
        }
        self.take_items();
        let made = self.made.as_ref().map(|(kind, id)| (*kind, &**id));
        let record = Record {
            time: self.audit.clock.now(),
            event: self.event,
            what: self.what,
            outcome,
            code,
            reason,
            request_id: self.who.request_id,
            source: self.who.source,
            principal: Some(self.who.principal),
            method: self.who.method,
            tenant: self.who.tenant,
            change_id: self.change_id,
            named: made.or_else(|| self.who.subject.and_then(named)),
            asked: Some(&self.asked),
            details: Some(&self.details),
            items: self.items.as_deref(),
            more: 0,
            micros,
        };
        trail.record(held, &record);
        // They stand in the beginning of a change, and are not repeated at its end.
        self.asked = Asked::NOTHING;
        self.details = Details::new(true);
    }

    fn log(&self, outcome: &str, code: &str, reason: &str, micros: u64) {
        let (principal, tenant) = (self.who.principal, self.who.tenant.map(TenantId::as_str));
        let what = self.what;
        if self.event == CALL {
            tracing::debug!(target: "keyfold::audit", verb = what, %principal, tenant, outcome, code, reason, micros);
        } else {
            tracing::info!(target: "keyfold::audit", change = what, %principal, tenant, outcome, code, reason, micros);
        }
    }
}

fn named(subject: Subject<'_>) -> Option<(Member, &str)> {
    match subject {
        Subject::ApiKey(id) => Some((member!("api_key"), id)),
        Subject::Grant(id) => Some((member!("grant"), id)),
        Subject::Key(_) | Subject::Dek(_) => None,
    }
}

impl Drop for Attempt<'_> {
    fn drop(&mut self) {
        self.send("abandoned", "", "");
    }
}
