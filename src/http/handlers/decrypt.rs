//! `POST /v1/decrypt`

use axum::body::Bytes;
use axum::extract::{Request, State};
use axum::response::Response;
use envelope::text;
use http::StatusCode;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{Bounds, Permitted, by_body, json};
use crate::access::{Decrypt, Permit};
use crate::http::SharedState;
use crate::http::bulk::raw;
use crate::http::json::{BASE64, Context, Encoded, parse};
use crate::http::problem::{Code, Problem};
use crate::operations::{Decrypted, Decryption, OperationError};

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::http) struct DecryptRequest<'a> {
    /// The envelope in text form.
    #[serde(borrow)]
    #[schema(value_type = String, example = "kf1.S0YBAZrR...")]
    ciphertext: Encoded<'a>,
    /// The encryption context, the same as on encryption.
    #[serde(default)]
    #[schema(value_type = Option<std::collections::BTreeMap<String, String>>, example = json!({"record": "42"}))]
    context: Context,
}

/// An opened message.
#[derive(Serialize, ToSchema)]
pub(in crate::http) struct DecryptResponse {
    /// The bytes that were encrypted, in standard base64 with padding.
    #[schema(format = Byte, example = "aGVsbG8=")]
    plaintext: String,
    /// The key under which they were encrypted.
    #[schema(example = "default")]
    key: String,
    /// The data key that opened it.
    #[schema(example = "019ad1b2-8c1e-7c3a-9d7e-0123456789ab")]
    dek_id: String,
    /// Whether `rewrap` would change this envelope.
    rewrap_advised: bool,
}

/// Decrypt
///
/// Opens an envelope of the tenant. Nothing is given out unless everything verified.
///
/// With `application/octet-stream` the body is the binary envelope itself, of any length, and the answer is the plaintext:
/// both are streamed in constant memory, and only verified segments are given out. A failure after the first byte of the
/// answer breaks the transfer off: what was received until then is not the whole message.
#[utoipa::path(post, path = "/v1/decrypt", operation_id = "decrypt", tag = "data",
    params(("Keyfold-Tenant" = Option<String>, Header, description = "Which tenant, where the credential holds several"),
        ("Keyfold-Context" = Option<String>, Header, description = "With application/octet-stream: the encryption context as a dictionary of strings (RFC 9651), such as record=\"42\"; or one byte sequence that holds the JSON object, for names that a dictionary cannot hold")),
    request_body(content((DecryptRequest<'static> = "application/json"), (Vec<u8> = "application/octet-stream"))),
    responses((status = 200, description = "Opened",
        content((DecryptResponse = "application/json"), (Vec<u8> = "application/octet-stream")),
        headers(("Keyfold-Key" = Option<String>, description = "With application/octet-stream: the key under which it was encrypted"),
            ("Keyfold-Dek-Id" = Option<String>, description = "With application/octet-stream: the data key that opened it"),
            ("Keyfold-Rewrap-Advised" = Option<bool>, description = "With application/octet-stream: whether rewrap would change the envelope")))))]
pub(in crate::http) async fn decrypt(
    State(state): State<SharedState>,
    Permitted(permit): Permitted<Decrypt>,
    request: Request,
) -> Result<Response, Problem> {
    let bounds = Bounds::of(&request);
    answer(state, permit, bounds, request).await
}

/// The answer to a call that has leave.
pub(in crate::http) fn answer(
    state: SharedState,
    permit: Permit<Decrypt>,
    bounds: Bounds,
    request: Request,
) -> impl Future<Output = Result<Response, Problem>> + Send {
    by_body(state, permit, bounds, request, raw::decrypt, answer_text)
}

async fn answer_text(state: SharedState, permit: Permit<Decrypt>, body: Bytes) -> Result<Response, Problem> {
    let request: DecryptRequest<'_> = parse(&body)?;
    let envelope = text::decode(&request.ciphertext.0).map_err(OperationError::from)?;
    let decryption = Decryption { envelope, context: request.context.0 };
    let decrypted = state.operations.decrypt(&permit, decryption).await?;
    let mut out = Vec::with_capacity(decrypted.plaintext().len().div_ceil(3) * 4 + 192);
    out.push(b'{');
    write(&decrypted, &mut out)?;
    out.push(b'}');
    Ok(json(StatusCode::OK, out))
}

/// The fields of an answer.
pub(in crate::http) fn write(decrypted: &Decrypted, out: &mut Vec<u8>) -> Result<(), Problem> {
    let plaintext = decrypted.plaintext();
    out.extend_from_slice(br#""plaintext":""#);
    let at = out.len();
    out.resize(at + plaintext.len().div_ceil(3) * 4, 0);
    let written = BASE64.encode_slice(plaintext, &mut out[at..]);
    written
        .map_err(|_| Problem::internal(Code::InternalError, "base64 needs more room than RFC 4648 says"))?;
    out.extend_from_slice(br#"","key":""#);
    out.extend_from_slice(decrypted.key.as_str().as_bytes());
    out.extend_from_slice(br#"","dek_id":""#);
    decrypted.dek_id.write_to(out);
    out.extend_from_slice(br#"","rewrap_advised":"#);
    out.extend_from_slice(if decrypted.rewrap_advised { b"true" } else { b"false" });
    Ok(())
}
