//! Much at once: raw bodies of any length, batches, and lines of JSON.

pub(super) mod batch;
mod context_header;
pub(super) mod items;
mod lines;
pub(super) mod memory;
pub(super) mod raw;
pub(super) mod threads;

use http::{HeaderMap, HeaderName, HeaderValue, header};

use super::problem::{Code, Problem};

/// A body of bytes.
pub(super) const OCTETS: &str = "application/octet-stream";
/// A body of lines, each of them JSON.
pub(super) const NDJSON: &str = "application/x-ndjson";

/// Whether the body is announced as this media type, with whatever parameters.
pub(super) fn is(headers: &HeaderMap, media_type: &str) -> bool {
    essence(headers).eq_ignore_ascii_case(media_type.as_bytes())
}

/// The body's media type without its parameters; empty where there is none.
fn essence(headers: &HeaderMap) -> &[u8] {
    let value = headers.get(header::CONTENT_TYPE).map_or(&[][..], HeaderValue::as_bytes);
    value.split(|byte| *byte == b';').next().unwrap_or_default().trim_ascii()
}

/// Whether the body is streamed: its own idle time takes the place of the request's deadline.
pub(super) fn is_streamed(headers: &HeaderMap) -> bool {
    let essence = essence(headers);
    [OCTETS, NDJSON].iter().any(|streamed| essence.eq_ignore_ascii_case(streamed.as_bytes()))
}

/// Refuses what belongs to a raw body where there is none: a `Keyfold-Context` that nobody reads would leave its sender
/// in the belief that his data is bound to it.
pub(super) fn refuse_raw_headers(headers: &HeaderMap) -> Result<(), Problem> {
    let stray = raw_headers(headers).next();
    stray.map_or(Ok(()), |name| {
        let told = format!("the header {name} goes with Content-Type: {OCTETS}; in JSON, say it in the body");
        Err(Problem::new(Code::MalformedRequest, told))
    })
}

/// Refuses those of a raw body's headers that its call does not read, for the same reason.
fn refuse_unread_headers(headers: &HeaderMap, read: &[&str]) -> Result<(), Problem> {
    let unread = raw_headers(headers).find(|name| !read.contains(name));
    unread.map_or(Ok(()), |name| {
        let told = format!("the header {name} means nothing to this call: leave it out");
        Err(Problem::new(Code::MalformedRequest, told))
    })
}

/// Those that are there.
fn raw_headers(headers: &HeaderMap) -> impl Iterator<Item = &str> {
    headers.keys().map(HeaderName::as_str).filter(|name| RAW_HEADERS.contains(name))
}

const RAW_HEADERS: [&str; 4] = ["keyfold-context", "keyfold-key", "keyfold-envelope", "keyfold-rewrap-mode"];
