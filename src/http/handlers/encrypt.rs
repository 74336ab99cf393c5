//! `POST /v1/encrypt`

use axum::body::Bytes;
use axum::extract::{Request, State};
use axum::response::Response;
use envelope::text;
use http::StatusCode;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{Bounds, Permitted, Weight, by_body, json, name};
use crate::access::{Encrypt, Permit};
use crate::http::bulk::raw;
use crate::http::json::{Base64Plaintext, Context, Encoded, Text, parse};
use crate::http::problem::Problem;
use crate::http::{HttpState, SharedState};
use crate::operations::{Encrypted, Encryption};
use crate::tenant::KeyName;

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::http) struct EncryptRequest<'a> {
    /// The bytes to encrypt, in standard base64 with padding.
    #[serde(borrow)]
    #[schema(value_type = String, format = Byte, example = "aGVsbG8=")]
    plaintext: Encoded<'a>,
    /// The encryption context: authenticated, not stored. Decryption must bring the same. At most 62 pairs and,
    /// with the service's own, 8,192 bytes.
    #[serde(default)]
    #[schema(value_type = Option<std::collections::BTreeMap<String, String>>, example = json!({"record": "42"}))]
    context: Context,
    /// Under which of the tenant's keys; `default` where nothing is said.
    #[serde(default, borrow)]
    #[schema(value_type = Option<String>, example = "default")]
    key: Option<Text<'a>>,
    /// What the envelope carries; as the key's policy says where nothing is said.
    #[serde(default)]
    envelope: Option<Weight>,
}

/// A sealed message.
#[derive(Serialize, ToSchema)]
pub(in crate::http) struct EncryptResponse {
    /// The envelope in text form.
    #[schema(example = "kf1.S0YBAZrR...")]
    ciphertext: String,
    /// The key that was used.
    #[schema(example = "default")]
    key: String,
    /// The data key that was used.
    #[schema(example = "019ad1b2-8c1e-7c3a-9d7e-0123456789ab")]
    dek_id: String,
}

/// Encrypt
///
/// Seals a plaintext under the tenant's active data key, with AES-256-GCM and a key of its own for each message.
///
/// With `application/octet-stream` the body is the plaintext itself, of any length, and so is the answer: both are streamed
/// in constant memory. A failure after the first byte of the answer breaks the transfer off: only an answer that comes to
/// its clean end is a whole envelope.
#[utoipa::path(post, path = "/v1/encrypt", operation_id = "encrypt", tag = "data",
    params(("Keyfold-Tenant" = Option<String>, Header, description = "Which tenant, where the credential holds several"),
        ("Keyfold-Context" = Option<String>, Header, description = "With application/octet-stream: the encryption context as a dictionary of strings (RFC 9651), such as record=\"42\"; or one byte sequence that holds the JSON object, for names that a dictionary cannot hold"),
        ("Keyfold-Key" = Option<String>, Header, description = "With application/octet-stream: under which of the tenant's keys"),
        ("Keyfold-Envelope" = Option<Weight>, Header, description = "With application/octet-stream: what the envelope carries")),
    request_body(content((EncryptRequest<'static> = "application/json"), (Vec<u8> = "application/octet-stream"))),
    responses((status = 200, description = "Sealed",
        content((EncryptResponse = "application/json"), (Vec<u8> = "application/octet-stream")),
        headers(("Keyfold-Key" = Option<String>, description = "With application/octet-stream: the key that was used"),
            ("Keyfold-Dek-Id" = Option<String>, description = "With application/octet-stream: the data key that was used")))))]
pub(in crate::http) async fn encrypt(
    State(state): State<SharedState>,
    Permitted(permit): Permitted<Encrypt>,
    request: Request,
) -> Result<Response, Problem> {
    let bounds = Bounds::of(&request);
    answer(state, permit, bounds, request).await
}

/// The answer to a call that has leave.
pub(in crate::http) fn answer(
    state: SharedState,
    permit: Permit<Encrypt>,
    bounds: Bounds,
    request: Request,
) -> impl Future<Output = Result<Response, Problem>> + Send {
    by_body(state, permit, bounds, request, raw::encrypt, answer_text)
}

async fn answer_text(state: SharedState, permit: Permit<Encrypt>, body: Bytes) -> Result<Response, Problem> {
    let request: EncryptRequest<'_> = parse(&body)?;
    let key = key_name(&state, request.key.as_ref())?;
    let plaintext =
        Base64Plaintext { text: &request.plaintext.0, bytes_max: state.options.plaintext_bytes_max };
    let encrypted = state
        .operations
        .encrypt(
            &permit,
            Encryption {
                key,
                context: request.context.0,
                weight: request.envelope.map(Into::into),
                plaintext: &plaintext,
            },
        )
        .await?;
    let mut out = Vec::with_capacity(text::encoded_bytes(encrypted.envelope.len()) + 192);
    out.push(b'{');
    write(&encrypted, &mut out);
    out.push(b'}');
    Ok(json(StatusCode::OK, out))
}

/// The key that is named, or the one that is used where none is.
pub(in crate::http) fn key_name(state: &HttpState, named: Option<&Text<'_>>) -> Result<KeyName, Problem> {
    match named {
        None => Ok(state.default_key.clone()),
        Some(key) if key.0 == KeyName::DEFAULT => Ok(state.default_key.clone()),
        Some(key) => name(&key.0),
    }
}

/// The fields of an answer.
pub(in crate::http) fn write(encrypted: &Encrypted, out: &mut Vec<u8>) {
    out.extend_from_slice(br#""ciphertext":""#);
    text::encode_to(&encrypted.envelope, out);
    // Neither a key's name (a slug) nor an id can hold what JSON escapes.
    out.extend_from_slice(br#"","key":""#);
    out.extend_from_slice(encrypted.key.as_str().as_bytes());
    out.extend_from_slice(br#"","dek_id":""#);
    encrypted.dek_id.write_to(out);
    out.push(b'"');
}
