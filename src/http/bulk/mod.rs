//! Much at once: raw bodies of any length, batches, and lines of JSON.

pub(super) mod batch;
mod context_header;
pub(super) mod items;
mod lines;
pub(super) mod raw;

use http::{HeaderMap, header};

/// A body of bytes.
pub(super) const OCTETS: &str = "application/octet-stream";
/// A body of lines, each of them JSON.
pub(super) const NDJSON: &str = "application/x-ndjson";

/// Whether the body is announced as this media type.
pub(super) fn is(headers: &HeaderMap, media_type: &str) -> bool {
    let value = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let essence = value.unwrap_or_default().split(';').next().unwrap_or_default().trim();
    essence.eq_ignore_ascii_case(media_type)
}

/// Whether the body is streamed: its own idle time takes the place of the request's deadline.
pub(super) fn is_streamed(headers: &HeaderMap) -> bool {
    is(headers, OCTETS) || is(headers, NDJSON)
}
