//! What a record says, and how it stands in a line.

use std::net::IpAddr;

use envelope::{DataKeyId, EncryptionContext};
use serde_json::{Value, json};

use super::asked::Asked;
use super::chain::Keys;
use super::room::Refs;
use super::tally::Items;
use crate::clock::Timestamp;
use crate::tenant::{KeyName, PrincipalId, TenantId};

/// How much of a reason is recorded.
const REASON_BYTES_MAX: usize = 1_024;

/// One call or change, as it is told to every sink.
#[derive(Default)]
pub(super) struct Record<'a> {
    pub(super) time: Timestamp,
    /// `call` or `change`.
    pub(super) event: &'static str,
    /// The verb, or what kind of change.
    pub(super) what: &'a str,
    /// `begin`, `done`, `failed`, `abandoned` or `refused`.
    pub(super) outcome: &'static str,
    /// The stable name of what went wrong.
    pub(super) code: &'static str,
    /// What went wrong, for operators.
    pub(super) reason: &'a str,
    pub(super) request_id: &'a str,
    pub(super) source: Option<IpAddr>,
    /// None where nobody is known.
    pub(super) principal: Option<&'a PrincipalId>,
    pub(super) method: &'static str,
    pub(super) tenant: Option<&'a TenantId>,
    /// The same in the two records of one change.
    pub(super) change_id: Option<u64>,
    /// The API key or grant that a change is about: which of the two, and its id.
    pub(super) named: Option<(Member, &'a str)>,
    /// What a change asks for.
    pub(super) asked: Option<&'a Asked>,
    pub(super) details: Option<&'a Details>,
    pub(super) items: Option<&'a Items>,
    /// How many others like it there were that have no record.
    pub(super) more: u64,
    pub(super) micros: u64,
}

/// What is only known while the work on a message is done.
#[derive(Debug, Default)]
pub struct Details {
    wanted: bool,
    /// Which of the tenant's keys.
    pub(super) key: Option<KeyName>,
    /// Which data key.
    pub(super) dek: Option<DataKeyId>,
    /// Bytes that came.
    pub(super) bytes_in: u64,
    /// Bytes that went.
    pub(super) bytes_out: u64,
    /// The encryption context. Names are recorded; values only as a keyed hash, unless the configuration calls the
    /// name public.
    pub(super) context: Option<EncryptionContext>,
}

impl Details {
    pub(super) fn new(wanted: bool) -> Self {
        Self { wanted, ..Self::default() }
    }

    /// Whether they are recorded: what it takes to find them out can be left out where not.
    pub fn are_wanted(&self) -> bool {
        self.wanted
    }

    /// Under which key.
    pub fn with_key(&mut self, key: &KeyName) {
        if self.wanted {
            self.key = Some(key.clone());
        }
    }

    /// Under which data key.
    pub fn with_dek(&mut self, dek: DataKeyId) {
        self.dek = Some(dek);
    }

    /// How many bytes came and went.
    pub fn with_bytes(&mut self, bytes_in: usize, bytes_out: usize) {
        self.bytes_in = bytes_in as u64;
        self.bytes_out = bytes_out as u64;
    }

    /// So many more bytes came and went.
    pub fn add_bytes(&mut self, bytes_in: usize, bytes_out: usize) {
        self.bytes_in += bytes_in as u64;
        self.bytes_out += bytes_out as u64;
    }

    /// With which encryption context.
    pub fn with_context(&mut self, context: EncryptionContext) {
        if self.wanted {
            self.context = Some(context);
        }
    }
}

/// What most records have room in.
pub(super) const RECORD_BYTES: usize = 768;

impl Record<'_> {
    /// Whether it is one of those that have no lists. Others may take a while to write, for which no lock is held.
    pub(super) fn is_short(&self) -> bool {
        self.items.is_none() && self.asked.is_none_or(Asked::is_nothing)
    }

    /// Appends what follows the number in the record's line, up to the code with which the chain closes it.
    pub(super) fn write(&self, keys: &Keys, line: &mut Vec<u8>) {
        let mut object = Object::begin(line, self.event, self.time);
        object.word(member!("what"), self.what);
        object.word(member!("outcome"), self.outcome);
        object.some_word(member!("code"), self.code);
        object.some_text(member!("reason"), head_of(self.reason, REASON_BYTES_MAX));
        object.some_text(member!("principal"), self.principal.map_or("", PrincipalId::as_str));
        object.some_word(member!("method"), self.method);
        if let Some(source) = self.source {
            object.quoted(member!("source"), |line| write_address(line, source));
        }
        object.some_text(member!("request_id"), self.request_id);
        let tenant = self.tenant.map_or("", TenantId::as_str);
        object.some_word(member!("tenant"), tenant);
        if let Some(id) = self.change_id {
            object.word(member!("change_id"), &format!("{id:016x}"));
        }
        if let Some((kind, id)) = self.named {
            object.some_text(kind, id);
        }
        if let Some(asked) = self.asked.filter(|asked| !asked.is_nothing()) {
            object.value(member!("asked"), &asked.value(tenant, keys));
        }
        if let Some(details) = self.details {
            details.write(tenant, keys, &mut object);
        }
        if let Some(items) = self.items {
            items.write(tenant, keys, &mut object);
        }
        if self.more > 0 {
            object.number(member!("more"), self.more);
        }
        object.number(member!("micros"), self.micros);
    }
}

impl Details {
    fn write(&self, tenant: &str, keys: &Keys, object: &mut Object<'_>) {
        object.some_word(member!("key"), self.key.as_ref().map_or("", KeyName::as_str));
        if let Some(dek) = self.dek {
            object.quoted(member!("dek"), |line| dek.write_to(line));
        }
        object.bytes(self.bytes_in, self.bytes_out);
        if let Some(context) = &self.context {
            object.context(context, tenant, keys);
        }
    }
}

impl Items {
    fn write(&self, tenant: &str, keys: &Keys, object: &mut Object<'_>) {
        object.number(member!("items"), self.tried);
        object.number(member!("items_failed"), self.failed());
        if !self.codes.is_empty() {
            object.value(member!("codes"), &json!(self.codes));
        }
        object.list(member!("keys"), &self.keys.items.iter().map(KeyName::as_str).collect::<Vec<_>>());
        object.flag(member!("keys_more"), self.keys.more);
        let deks: Vec<String> = self.deks.items.iter().map(ToString::to_string).collect();
        object.list(member!("deks"), &deks.iter().map(String::as_str).collect::<Vec<_>>());
        object.flag(member!("deks_more"), self.deks.more);
        object.bytes(self.bytes_in, self.bytes_out);
        object.refs(member!("refs"), member!("refs_more"), &self.refs);
        object.refs(member!("refs_failed"), member!("refs_failed_more"), &self.failed_refs);
        if let Some(context) = &self.context {
            object.context(context, tenant, keys);
        }
        object.list(
            member!("context_varying"),
            &self.varying.items.iter().map(|name| &**name).collect::<Vec<_>>(),
        );
        object.flag(member!("context_varying_more"), self.varying.more);
    }
}

fn head_of(text: &str, bytes_max: usize) -> &str {
    &text[..text.floor_char_boundary(bytes_max)]
}

impl Object<'_> {
    fn bytes(&mut self, bytes_in: u64, bytes_out: u64) {
        if bytes_in > 0 || bytes_out > 0 {
            self.number(member!("bytes_in"), bytes_in);
            self.number(member!("bytes_out"), bytes_out);
        }
    }

    fn refs(&mut self, name: Member, more: Member, refs: &Refs) {
        self.list(name, &refs.names.iter().map(|name| &**name).collect::<Vec<_>>());
        if refs.more > 0 {
            self.number(more, refs.more);
        }
    }

    fn context(&mut self, context: &EncryptionContext, tenant: &str, keys: &Keys) {
        // The service's own pairs repeat what stands beside.
        let mut pairs = context.iter().filter(|(name, _)| !name.starts_with("keyfold:")).peekable();
        if pairs.peek().is_none() {
            return;
        }
        self.name(member!("context"));
        // Written straight into the line: every call has it.
        let mut before = b'{';
        for (name, value) in pairs {
            self.0.push(before);
            write_text(self.0, name);
            self.0.push(b':');
            keys.write_shown(tenant, name, value, self.0);
            before = b',';
        }
        self.0.push(b'}');
    }
}

/// A member's name as it stands in a line, from the comma before it to the quote that begins a text behind it.
#[derive(Clone, Copy)]
pub(super) struct Member(pub(super) &'static str);

/// A [`Member`], known when this is compiled: so it is written in one step.
macro_rules! member {
    ($name:literal) => {
        $crate::audit::record::Member(concat!(",\"", $name, "\":\""))
    };
}
pub(super) use member;

/// Writes the members of one JSON object.
pub(super) struct Object<'a>(&'a mut Vec<u8>);

/// Begins a line with its number.
pub(super) fn number_line(line: &mut Vec<u8>, seq: u64) {
    line.extend_from_slice(b"{\"seq\":");
    write_number(line, seq);
}

/// In decimal digits, which is how JSON has it.
fn write_number(line: &mut Vec<u8>, number: u64) {
    // Writing into memory does not fail.
    let _ = serde_json::to_writer(line, &number);
}

/// As its own `Display` has it; without a formatter for the kind that nearly all are.
fn write_address(line: &mut Vec<u8>, address: IpAddr) {
    let IpAddr::V4(address) = address else {
        line.extend_from_slice(address.to_string().as_bytes());
        return;
    };
    for (at, octet) in address.octets().into_iter().enumerate() {
        if at > 0 {
            line.push(b'.');
        }
        write_number(line, octet.into());
    }
}

/// In quotes. Most text has nothing to escape, and that is found out for many bytes at once.
pub(super) fn write_text(line: &mut Vec<u8>, text: &str) {
    let escaped = text.bytes().map(|byte| u8::from(byte < b' ' || byte == b'"' || byte == b'\\'));
    if escaped.fold(0, |any, one| any | one) == 0 {
        line.push(b'"');
        line.extend_from_slice(text.as_bytes());
        line.push(b'"');
    } else {
        let _ = serde_json::to_writer(line, text);
    }
}

#[expect(clippy::inline_always, reason = "a name is copied without a call only where its length is known")]
impl<'a> Object<'a> {
    /// The members that follow the number in every line.
    pub(super) fn begin(line: &'a mut Vec<u8>, event: &str, time: Timestamp) -> Self {
        let mut object = Self(line);
        object.quoted(member!("time"), |line| time.write_to(line));
        object.word(member!("event"), event);
        object
    }

    #[inline(always)]
    pub(super) fn text(&mut self, name: Member, text: &str) {
        self.name(name);
        write_text(self.0, text);
    }

    /// Text in which JSON has nothing to escape: words of this service's own, and names that are slugs.
    #[inline(always)]
    fn word(&mut self, name: Member, word: &str) {
        debug_assert!(
            word.bytes().all(|byte| (b' '..=b'~').contains(&byte) && byte != b'"' && byte != b'\\')
        );
        self.quoted(name, |line| line.extend_from_slice(word.as_bytes()));
    }

    #[inline(always)]
    fn some_word(&mut self, name: Member, word: &str) {
        if !word.is_empty() {
            self.word(name, word);
        }
    }

    /// The same, of what is written straight into the line: a formatter would take as long as all the rest.
    #[inline(always)]
    fn quoted(&mut self, name: Member, write: impl FnOnce(&mut Vec<u8>)) {
        self.0.extend_from_slice(name.0.as_bytes());
        write(self.0);
        self.0.push(b'"');
    }

    #[inline(always)]
    pub(super) fn some_text(&mut self, name: Member, text: &str) {
        if !text.is_empty() {
            self.text(name, text);
        }
    }

    #[inline(always)]
    pub(super) fn number(&mut self, name: Member, number: u64) {
        self.name(name);
        write_number(self.0, number);
    }

    /// A list that is not empty.
    fn list(&mut self, name: Member, items: &[&str]) {
        if !items.is_empty() {
            self.value(name, &json!(items));
        }
    }

    fn flag(&mut self, name: Member, on: bool) {
        if on {
            self.value(name, &Value::Bool(true));
        }
    }

    fn value(&mut self, name: Member, value: &Value) {
        self.name(name);
        let _ = serde_json::to_writer(&mut *self.0, value);
    }

    #[inline(always)]
    fn name(&mut self, name: Member) {
        self.0.extend_from_slice(&name.0.as_bytes()[..name.0.len() - 1]);
    }
}
