//! The text form of an envelope: [`PREFIX`] and the whole envelope in base64url (RFC 4648 section 5) without
//! padding.

use base64_turbo::URL_SAFE_NO_PAD;

use crate::error::FormatError;

/// How every text form starts.
pub const PREFIX: &str = "kf1.";

/// The text form of an envelope.
pub fn encode(envelope: &[u8]) -> String {
    let mut text = String::with_capacity(encoded_bytes(envelope.len()));
    text.push_str(PREFIX);
    text.push_str(&URL_SAFE_NO_PAD.encode(envelope));
    text
}

/// Appends the text form of an envelope.
pub fn encode_to(envelope: &[u8], out: &mut Vec<u8>) {
    out.extend_from_slice(PREFIX.as_bytes());
    let start = out.len();
    out.resize(start + encoded_bytes(envelope.len()) - PREFIX.len(), 0);
    let written = URL_SAFE_NO_PAD.encode_slice(envelope, &mut out[start..]);
    debug_assert_eq!(written, Ok(out.len() - start), "encoded_bytes() is exact");
}

/// How long the text form of an envelope of this many bytes is.
pub fn encoded_bytes(envelope_bytes: usize) -> usize {
    PREFIX.len() + envelope_bytes / 3 * 4 + (envelope_bytes % 3 * 4).div_ceil(3)
}

/// The envelope in a text form. Refuses another prefix, padding, white space, the standard alphabet's `+` and
/// `/`, and last bits that are not zero: an envelope has exactly one text form.
///
/// Does not look at the envelope itself.
pub fn decode(text: impl AsRef<[u8]>) -> Result<Vec<u8>, FormatError> {
    let encoded = text.as_ref().strip_prefix(PREFIX.as_bytes()).ok_or(FormatError::TextPrefix)?;
    URL_SAFE_NO_PAD.decode(encoded).map_err(|_| FormatError::TextEncoding)
}
