//! What can go wrong, in the format's own failure classes.

use thiserror::Error;

use crate::context::ContextError;

/// Why bytes are not an envelope of this format, or cannot be made one. The class `malformed_envelope`.
///
/// No message carries a byte of the input.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum FormatError {
    /// The first two bytes are not `KF`.
    #[error("not a keyfold envelope")]
    NotAnEnvelope,
    /// The magic is right and the version is one that this library does not know.
    #[error("envelope version {0} is not known")]
    UnknownVersion(u8),
    /// The input ends inside the head.
    #[error("the envelope ends inside its head")]
    Truncated,
    /// More wrapped keys than [`WRAPPED_KEYS_MAX`](crate::WRAPPED_KEYS_MAX).
    #[error("{0} wrapped keys, but at most 8 are allowed")]
    TooManyWrappedKeys(usize),
    /// An embedded section was asked for without a wrapped key.
    #[error("an embedded envelope needs at least one wrapped key")]
    NoWrappedKeys,
    /// A KEK's id or a wrapped key is longer than its 2-byte length field can say.
    #[error("a wrapped key's field is longer than 65,535 bytes")]
    FieldTooLong,
    /// A KEK's id is not UTF-8.
    #[error("a key encryption key's id is not UTF-8")]
    KekNotUtf8,
    /// Bytes are left after the wrapped-key section.
    #[error("bytes follow the wrapped-key section")]
    TrailingBytes,
    /// The KMS context in the section is not in canonical form.
    #[error("the KMS context is not canonical: {0}")]
    KmsContext(#[from] ContextError),
    /// A text form does not start with [`text::PREFIX`](crate::text::PREFIX).
    #[error("the text form of an envelope starts with kf1.")]
    TextPrefix,
    /// A text form is not base64url without padding, or its unused last bits are not zero.
    #[error("the text form of an envelope is base64url without padding")]
    TextEncoding,
}

impl FormatError {
    /// The failure class's name, always `malformed_envelope`.
    pub fn code(&self) -> &'static str {
        "malformed_envelope"
    }
}

/// Why a message cannot be sealed.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum SealError {
    /// More than 2^32 segments (2^48 bytes).
    #[error("the message is longer than 2^48 bytes")]
    TooLong,
    /// The buffer of [`seal_in_place`](crate::seal_in_place) is shorter than the head that goes in front.
    #[error("the buffer has no room for the envelope's head")]
    NoRoom,
}

/// Why an envelope does not open.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum OpenError {
    /// The input is not an envelope of this format.
    #[error("malformed envelope: {0}")]
    Malformed(#[from] FormatError),
    /// The commitment does not match: another context or another key. Nothing was decrypted.
    #[error("the envelope was sealed with another context or another key")]
    ContextMismatch,
    /// Key and context are right and the body is not what was sealed: changed, cut short or added to.
    #[error("the ciphertext is damaged")]
    Damaged,
}

impl OpenError {
    /// The failure class's name: `malformed_envelope`, `context_mismatch` or `ciphertext_damaged`.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Malformed(error) => error.code(),
            Self::ContextMismatch => "context_mismatch",
            Self::Damaged => "ciphertext_damaged",
        }
    }
}
