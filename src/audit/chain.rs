//! The chain: each line carries a code over itself and over the code of the line before, made with a key that is not
//! in the file. Whoever changes, removes, adds or reorders a line without the key breaks it from there on.
//!
//! `mac = HMAC-SHA-256(key, mac of the line before || the line up to its mac)`. A cut at the end leaves a chain that
//! holds: what shows it is an anchor, the number and code of a later line that was kept elsewhere.

use std::collections::HashMap;

use hmac::{Hmac, KeyInit, Mac};
use serde::Deserialize;
use serde_json::{Value, json};
use sha2::Sha256;
use subtle::ConstantTimeEq;

use super::record::{Member, Object, member, number_line, write_text};
use crate::clock::Timestamp;

type HmacSha256 = Hmac<Sha256>;

/// The code of a line.
pub(super) type Code = [u8; 32];

/// What stands before the first line of a chain.
const START: Code = [0; 32];
const MAC_MEMBER: &[u8] = b",\"mac\":\"";
/// `,"mac":"` and 64 digits and `"}`.
const TAIL_BYTES: usize = MAC_MEMBER.len() + 64 + 2;
/// The least bytes of an audit key.
const KEY_BYTES_MIN: usize = 32;
/// How much of a value's hash is recorded: enough that no two values meet by chance.
const VALUE_HASH_BYTES: usize = 16;

/// The audit key is shorter than it has to be.
#[derive(Debug, thiserror::Error)]
#[error("the audit key has {0} bytes: use {KEY_BYTES_MIN} or more random ones")]
pub struct WeakKey(usize);

/// The keys of an audit trail, and which context values it shows.
#[derive(Clone)]
pub struct Keys {
    chain: HmacSha256,
    values: HmacSha256,
    public: Vec<String>,
}

impl Keys {
    /// From the audit's secret. The values of the context names in `public` are recorded as they are.
    pub fn new(secret: &[u8], public: Vec<String>) -> Result<Self, WeakKey> {
        if secret.len() < KEY_BYTES_MIN {
            return Err(WeakKey(secret.len()));
        }
        Ok(Self {
            chain: derived(secret, b"keyfold/v1/audit/chain"),
            values: derived(secret, b"keyfold/v1/audit/values"),
            public,
        })
    }

    /// The code of a line up to its own, after a line with the code `before`.
    fn code(&self, before: &Code, body: &[u8]) -> Code {
        let mut mac = self.chain.clone();
        mac.update(before);
        mac.update(body);
        mac.finalize().into_bytes().into()
    }

    /// A context value as it is recorded: the same value of one tenant and name is always the same text.
    pub(super) fn shown(&self, tenant: &str, name: &str, value: &str) -> Value {
        if self.is_public(name) {
            return json!({"value": value});
        }
        json!({"hash": self.value_hash(tenant, name, value)})
    }

    /// The same, as it stands in a line.
    pub(super) fn write_shown(&self, tenant: &str, name: &str, value: &str, line: &mut Vec<u8>) {
        if self.is_public(name) {
            line.extend_from_slice(b"{\"value\":");
            write_text(line, value);
            line.push(b'}');
            return;
        }
        line.extend_from_slice(b"{\"hash\":\"");
        write_hex(&self.hashed(tenant, name, value), line);
        line.extend_from_slice(b"\"}");
    }

    fn is_public(&self, name: &str) -> bool {
        self.public.iter().any(|public| public == name)
    }

    /// The keyed hash under which a context value is recorded.
    pub fn value_hash(&self, tenant: &str, name: &str, value: &str) -> String {
        hex(&self.hashed(tenant, name, value))
    }

    fn hashed(&self, tenant: &str, name: &str, value: &str) -> [u8; VALUE_HASH_BYTES] {
        let mut mac = self.values.clone();
        for part in [tenant, name, value] {
            mac.update(&(part.len() as u64).to_be_bytes());
            mac.update(part.as_bytes());
        }
        let whole = mac.finalize().into_bytes();
        std::array::from_fn(|at| whole[at])
    }
}

fn keyed(key: &[u8]) -> HmacSha256 {
    #[expect(clippy::expect_used, reason = "HMAC takes a key of any length")]
    HmacSha256::new_from_slice(key).expect("a key of any length")
}

fn derived(secret: &[u8], label: &[u8]) -> HmacSha256 {
    let mut mac = keyed(secret);
    mac.update(label);
    keyed(&mac.finalize().into_bytes())
}

/// Where a chain is: the number and the code of its last line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Link {
    /// The last line's number; 0 before the first.
    pub seq: u64,
    /// The last line's code.
    pub mac: [u8; 32],
}

impl Link {
    /// Before the first line.
    pub const START: Self = Self { seq: 0, mac: START };

    /// Adds a record with this body to `lines`, and moves on to it.
    pub(super) fn add(&mut self, keys: &Keys, lines: &mut Vec<u8>, body: &[u8]) {
        let from = lines.len();
        number_line(lines, self.seq + 1);
        lines.extend_from_slice(body);
        self.close(keys, lines, from);
    }

    /// Closes the object that was begun at `from` in `lines` with its code, and moves on to it.
    fn close(&mut self, keys: &Keys, lines: &mut Vec<u8>, from: usize) {
        self.mac = keys.code(&self.mac, &lines[from..]);
        self.seq += 1;
        lines.extend_from_slice(MAC_MEMBER);
        write_hex(&self.mac, lines);
        lines.extend_from_slice(b"\"}\n");
    }

    /// As `SEQ:CODE`, to be kept elsewhere.
    pub fn anchor(&self) -> String {
        format!("{}:{}", self.seq, hex(&self.mac))
    }

    /// From `SEQ:CODE`.
    pub fn from_anchor(text: &str) -> Option<Self> {
        let (seq, mac) = text.trim().split_once(':')?;
        Some(Self { seq: seq.parse().ok()?, mac: unhex(mac.as_bytes())? })
    }
}

/// A digit from its value, without a table: so many are made at once.
fn hex_digit(value: u8) -> u8 {
    const TO_LETTER: u8 = b'a' - 10 - b'0';
    let letter = if value > 9 { TO_LETTER } else { 0 };
    (b'0' | value).wrapping_add(letter)
}

fn write_hex<const N: usize>(bytes: &[u8; N], text: &mut Vec<u8>) {
    let start = text.len();
    text.resize(start + 2 * N, 0);
    for (pair, byte) in text[start..].chunks_exact_mut(2).zip(bytes) {
        (pair[0], pair[1]) = (hex_digit(byte >> 4), hex_digit(byte & 15));
    }
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().flat_map(|byte| [byte >> 4, byte & 15]).map(|n| char::from(hex_digit(n))).collect()
}

fn unhex(text: &[u8]) -> Option<Code> {
    let digit = |byte: u8| match byte {
        b'0'..=b'9' => Some(byte - b'0'),
        b'a'..=b'f' => Some(byte - b'a' + 10),
        _ => None,
    };
    let mut code = START;
    if text.len() != 2 * code.len() {
        return None;
    }
    for (byte, pair) in code.iter_mut().zip(text.chunks_exact(2)) {
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(code)
}

/// What is wrong with a trail.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// Not a line of an audit trail, or one that was changed.
    #[error("the record is changed: its code does not fit what it says")]
    Changed,
    /// Another record stands here than should.
    #[error("record {expected} should stand here, and record {found} does: records are missing or reordered")]
    OutOfOrder {
        /// Which should.
        expected: u64,
        /// Which does.
        found: u64,
    },
    /// A file does not begin with the record that says how it goes on from the one before.
    #[error("the file does not begin where a file begins: its first records are missing")]
    NoBeginning,
    /// The last line is not ended.
    #[error("the last record is not complete: it was cut, or a crash has left it so")]
    Torn,
    /// An anchor tells of records that are not here.
    #[error("record {0} is known to have been written, and is not here: the trail was cut at its end")]
    Truncated(u64),
    /// An anchor tells of a record before the first one that is here.
    #[error("record {0} is known to have been written, and is not here: the trail's beginning is missing")]
    Beheaded(u64),
    /// An anchor's record is another one.
    #[error("record {0} is not the one that is known to have been written: the trail was replaced")]
    Replaced(u64),
}

#[derive(Deserialize)]
struct Position {
    seq: u64,
    event: String,
    previous: Option<String>,
    outcome: Option<String>,
    change_id: Option<String>,
}

/// Follows a chain line by line. Cloning remembers a place in it.
#[derive(Clone)]
pub struct Verifier<'a> {
    keys: &'a Keys,
    link: Option<Link>,
    first: u64,
    anchors: Vec<Link>,
    sealed: bool,
    /// Changes that have begun, and which record says so.
    begun: HashMap<String, u64>,
}

impl<'a> Verifier<'a> {
    /// Beginning at the first file that is there. What the anchors tell of has to be met.
    pub fn new(keys: &'a Keys, anchors: Vec<Link>) -> Self {
        Self { keys, link: None, first: 0, anchors, sealed: false, begun: HashMap::new() }
    }

    /// The next line, with its line break.
    pub fn line(&mut self, line: &[u8]) -> Result<Link, Fault> {
        let line = line.strip_suffix(b"\n").ok_or(Fault::Torn)?;
        let (body, mac) = split(line).ok_or(Fault::Changed)?;
        let before = self.link.map_or_else(|| beginning(body), Ok)?;
        let genuine = bool::from(self.keys.code(&before.mac, body).ct_eq(&mac));
        let expected = before.seq + 1;
        if !genuine {
            return Err(match seq(body) {
                Some(found) if found != expected => Fault::OutOfOrder { expected, found },
                _ => Fault::Changed,
            });
        }
        let position = position(body).ok_or(Fault::Changed)?;
        if position.seq != expected {
            return Err(Fault::OutOfOrder { expected, found: position.seq });
        }
        if self.link.is_none() {
            self.first = expected;
        }
        let next = Link { seq: expected, mac };
        if self.anchors.iter().any(|anchor| anchor.seq == expected && anchor.mac != mac) {
            return Err(Fault::Replaced(expected));
        }
        self.link = Some(next);
        match (position.change_id, position.outcome.as_deref()) {
            (Some(id), Some("begin")) => drop(self.begun.insert(id, expected)),
            (Some(id), _) => drop(self.begun.remove(&id)),
            _ => {}
        }
        // A file that was just begun has nothing to seal yet.
        self.sealed = position.event == "seal" || (position.event == "open" && self.sealed);
        Ok(next)
    }

    /// After the last line.
    pub fn end(&self) -> Result<Summary, Fault> {
        let last = self.link.unwrap_or(Link::START);
        for anchor in &self.anchors {
            if anchor.seq > last.seq {
                return Err(Fault::Truncated(anchor.seq));
            }
            if anchor.seq < self.first {
                return Err(Fault::Beheaded(anchor.seq));
            }
        }
        let mut unfinished: Vec<u64> = self.begun.values().copied().collect();
        unfinished.sort_unstable();
        Ok(Summary { first: self.first, last, sealed: self.sealed, unfinished })
    }
}

/// What was verified.
#[derive(Clone, Debug)]
pub struct Summary {
    /// The first record that is there; 1 where nothing is missing before it.
    pub first: u64,
    /// The last one.
    pub last: Link,
    /// Whether the last one is a seal, as an orderly end leaves it.
    pub sealed: bool,
    /// The records of changes that have begun and have no outcome: they are under way, or a crash ended them.
    pub unfinished: Vec<u64>,
}

/// The part of a line that its code is over, and the code.
fn split(line: &[u8]) -> Option<(&[u8], Code)> {
    let (body, tail) = line.split_at_checked(line.len().checked_sub(TAIL_BYTES)?)?;
    let digits = tail.strip_prefix(MAC_MEMBER)?.strip_suffix(b"\"}")?;
    Some((body, unhex(digits)?))
}

/// The number that a line gives itself.
fn seq(body: &[u8]) -> Option<u64> {
    let digits = body.strip_prefix(b"{\"seq\":")?.split(|byte| *byte == b',').next()?;
    std::str::from_utf8(digits).ok()?.parse().ok()
}

fn position(body: &[u8]) -> Option<Position> {
    let mut object = body.to_vec();
    object.push(b'}');
    serde_json::from_slice(&object).ok()
}

/// What the first line of the first file says it follows; whether that is true, its code shows.
fn beginning(body: &[u8]) -> Result<Link, Fault> {
    let position = position(body).ok_or(Fault::Changed)?;
    let previous = position.previous.filter(|_| position.event == "open").ok_or(Fault::NoBeginning)?;
    let mac = unhex(previous.as_bytes()).ok_or(Fault::Changed)?;
    Ok(Link { seq: position.seq.checked_sub(1).ok_or(Fault::Changed)?, mac })
}

/// Where a file that is to be continued ends: the link of its last whole line, and how many bytes follow it. `tail`
/// is the end of the file, from the beginning of a line. The last line's code is checked against the one before it.
pub(super) fn end_of(keys: &Keys, tail: &[u8]) -> Result<(Link, usize), Fault> {
    let whole = tail.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
    let mut lines = tail[..whole].split_inclusive(|byte| *byte == b'\n').rev();
    let last = lines.next().ok_or(Fault::NoBeginning)?;
    let before = match lines.next() {
        Some(line) => {
            let (body, mac) = split(&line[..line.len() - 1]).ok_or(Fault::Changed)?;
            Some(Link { seq: position(body).ok_or(Fault::Changed)?.seq, mac })
        }
        None => None,
    };
    let mut verifier = Verifier { link: before, ..Verifier::new(keys, vec![]) };
    Ok((verifier.line(last)?, tail.len() - whole))
}

/// A line that is none of a call or a change: `open`, `seal`, `recovered`, `dropped`.
pub(super) fn write_event(
    link: &mut Link,
    keys: &Keys,
    lines: &mut Vec<u8>,
    event: &str,
    time: Timestamp,
    number: Option<(Member, u64)>,
) {
    let from = lines.len();
    let previous = hex(&link.mac);
    number_line(lines, link.seq + 1);
    let mut object = Object::begin(lines, event, time);
    if event == "open" {
        object.text(member!("previous"), &previous);
    }
    if let Some((name, number)) = number {
        object.number(name, number);
    }
    link.close(keys, lines, from);
}
