//! What a record says, and how it stands in a line.

use std::net::IpAddr;

use envelope::{DataKeyId, EncryptionContext};
use serde_json::{Value, json};

use super::chain::Keys;
use crate::clock::Timestamp;

/// How many items of a batch are named; the rest is counted.
pub const REFS_MAX: usize = 100;

/// One call or change, as it is told to every sink.
#[derive(Debug, Default)]
pub(super) struct Record {
    pub(super) time: Timestamp,
    /// `call` or `change`.
    pub(super) event: &'static str,
    /// The verb, or what kind of change.
    pub(super) what: Box<str>,
    /// `begin`, `done`, `failed`, `abandoned` or `refused`.
    pub(super) outcome: &'static str,
    /// The stable name of what went wrong.
    pub(super) code: &'static str,
    /// What went wrong, for operators.
    pub(super) reason: String,
    pub(super) request_id: Box<str>,
    pub(super) source: Option<IpAddr>,
    pub(super) principal: Box<str>,
    pub(super) method: &'static str,
    pub(super) tenant: Option<Box<str>>,
    pub(super) details: Details,
    pub(super) micros: u64,
}

/// What is only known while the work is done.
#[derive(Debug, Default)]
pub(super) struct Details {
    /// Which of the tenant's keys.
    pub(super) key: Option<Box<str>>,
    /// Which data key.
    pub(super) dek: Option<DataKeyId>,
    /// Bytes that came.
    pub(super) bytes_in: u64,
    /// Bytes that went.
    pub(super) bytes_out: u64,
    /// The encryption context. Names are recorded; values only as a keyed hash, unless the configuration calls the
    /// name public.
    pub(super) context: EncryptionContext,
    /// How many items a batch had, and how many of them failed.
    pub(super) items: Option<(u64, u64)>,
    /// The callers' names for them, at most [`REFS_MAX`].
    pub(super) refs: Vec<Box<str>>,
}

impl Record {
    /// The record as an object that is not closed yet: the chain adds its code.
    pub(super) fn write(&self, seq: u64, keys: &Keys, line: &mut Vec<u8>) {
        let mut object = Object::open(line, seq, self.event, self.time);
        object.text("what", &self.what);
        object.text("outcome", self.outcome);
        object.some_text("code", self.code);
        object.some_text("reason", &self.reason);
        object.text("principal", &self.principal);
        object.some_text("method", self.method);
        if let Some(source) = self.source {
            object.text("source", &source.to_string());
        }
        object.some_text("request_id", &self.request_id);
        let tenant = self.tenant.as_deref().unwrap_or_default();
        object.some_text("tenant", tenant);
        self.write_details(tenant, keys, &mut object);
        object.number("micros", self.micros);
    }

    fn write_details(&self, tenant: &str, keys: &Keys, object: &mut Object<'_>) {
        let details = &self.details;
        object.some_text("key", details.key.as_deref().unwrap_or_default());
        if let Some(dek) = details.dek {
            object.text("dek", &dek.to_string());
        }
        if details.bytes_in > 0 || details.bytes_out > 0 {
            object.number("bytes_in", details.bytes_in);
            object.number("bytes_out", details.bytes_out);
        }
        if let Some((items, failed)) = details.items {
            object.number("items", items);
            object.number("items_failed", failed);
        }
        if !details.refs.is_empty() {
            object.value("refs", &json!(details.refs));
        }
        // The service's own pairs repeat what stands beside.
        let pairs = details.context.iter().filter(|(name, _)| !name.starts_with("keyfold:"));
        let context: serde_json::Map<String, Value> =
            pairs.map(|(name, value)| (name.to_owned(), keys.shown(tenant, name, value))).collect();
        if !context.is_empty() {
            object.value("context", &Value::Object(context));
        }
    }
}

/// Writes the members of one JSON object.
pub(super) struct Object<'a>(&'a mut Vec<u8>);

impl<'a> Object<'a> {
    /// The members that every line begins with.
    pub(super) fn open(line: &'a mut Vec<u8>, seq: u64, event: &str, time: Timestamp) -> Self {
        line.extend_from_slice(b"{\"seq\":");
        line.extend_from_slice(seq.to_string().as_bytes());
        let mut object = Self(line);
        object.text("time", &time.to_string());
        object.text("event", event);
        object
    }

    pub(super) fn text(&mut self, name: &str, text: &str) {
        self.name(name);
        // Writing into memory does not fail.
        let _ = serde_json::to_writer(&mut *self.0, text);
    }

    pub(super) fn some_text(&mut self, name: &str, text: &str) {
        if !text.is_empty() {
            self.text(name, text);
        }
    }

    pub(super) fn number(&mut self, name: &str, number: u64) {
        self.name(name);
        self.0.extend_from_slice(number.to_string().as_bytes());
    }

    fn value(&mut self, name: &str, value: &Value) {
        self.name(name);
        let _ = serde_json::to_writer(&mut *self.0, value);
    }

    fn name(&mut self, name: &str) {
        self.0.extend_from_slice(b",\"");
        self.0.extend_from_slice(name.as_bytes());
        self.0.extend_from_slice(b"\":");
    }
}
