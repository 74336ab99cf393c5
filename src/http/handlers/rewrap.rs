//! `POST /v1/rewrap`

use axum::body::Bytes;
use axum::extract::{Request, State};
use axum::response::Response;
use envelope::text;
use http::StatusCode;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{Bounds, Permitted, Weight, by_body, json};
use crate::access::{Permit, Rewrap};
use crate::http::SharedState;
use crate::http::bulk::raw;
use crate::http::json::{Context, Encoded, parse};
use crate::http::problem::Problem;
use crate::operations::{OperationError, RewrapMode, Rewrapped, Rewrapping};

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::http) struct RewrapRequest<'a> {
    /// The envelope in text form.
    #[serde(borrow)]
    #[schema(value_type = String, example = "kf1.S0YBAZrR...")]
    ciphertext: Encoded<'a>,
    /// The encryption context, the same as on encryption. Not needed with `mode: "wrapped_key"`.
    #[serde(default)]
    #[schema(value_type = Option<std::collections::BTreeMap<String, String>>, example = json!({"record": "42"}))]
    context: Context,
    /// How far rewrapping may go; `auto` where nothing is said.
    #[serde(default)]
    mode: Mode,
    /// What the envelope is to carry; as the key's policy says where nothing is said.
    #[serde(default)]
    envelope: Option<Weight>,
}

/// How far rewrapping may go.
#[derive(Clone, Copy, Default, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(in crate::http) enum Mode {
    /// Whatever is needed: where the data key is retired, the message is sealed again under the active one.
    #[default]
    Auto,
    /// Only the wrapped-key section is replaced: no message is decrypted and no context is needed.
    WrappedKey,
}

/// The shape of what is written by hand below.
#[derive(Serialize, ToSchema)]
pub(in crate::http) struct RewrapResponse {
    /// The envelope in text form: as encryption would make it today.
    #[schema(example = "kf1.S0YBAZrR...")]
    ciphertext: String,
    /// Whether it is another one than was sent.
    changed: bool,
    /// The data key of the envelope that was sent.
    #[schema(example = "019ad1b2-8c1e-7c3a-9d7e-0123456789ab")]
    from_dek_id: String,
    /// The data key of the envelope that is returned.
    #[schema(example = "019ad1b2-8c1e-7c3a-9d7e-0123456789ab")]
    to_dek_id: String,
}

/// Rewrap
///
/// Brings an envelope to what encryption would make today, and returns it unchanged where it is so already. No
/// plaintext leaves the service.
///
/// With `application/octet-stream` the body is the binary envelope itself, of any length, and so is the answer: both are
/// streamed in constant memory. Where the data key still serves, the message passes through untouched. A failure after
/// the first byte of the answer breaks the transfer off.
#[utoipa::path(post, path = "/v1/rewrap", operation_id = "rewrap", tag = "data",
    params(("Keyfold-Tenant" = Option<String>, Header, description = "Which tenant, where the credential holds several"),
        ("Keyfold-Context" = Option<String>, Header, description = "With application/octet-stream: the encryption context as a dictionary of strings (RFC 9651), such as record=\"42\"; or one byte sequence that holds the JSON object, for names that a dictionary cannot hold"),
        ("Keyfold-Rewrap-Mode" = Option<String>, Header, description = "With application/octet-stream: auto or wrapped_key"),
        ("Keyfold-Envelope" = Option<Weight>, Header, description = "With application/octet-stream: what the envelope carries")),
    request_body(content((RewrapRequest<'static> = "application/json"), (Vec<u8> = "application/octet-stream"))),
    responses((status = 200, description = "Up to date",
        content((RewrapResponse = "application/json"), (Vec<u8> = "application/octet-stream")),
        headers(("Keyfold-Key" = Option<String>, description = "With application/octet-stream: the envelope's key"),
            ("Keyfold-Dek-Id" = Option<String>, description = "With application/octet-stream: the data key of the envelope that is returned"),
            ("Keyfold-Changed" = Option<bool>, description = "With application/octet-stream: whether it is another envelope than was sent")))))]
pub(in crate::http) async fn rewrap(
    State(state): State<SharedState>,
    Permitted(permit): Permitted<Rewrap>,
    request: Request,
) -> Result<Response, Problem> {
    let bounds = Bounds::of(&request);
    answer(state, permit, bounds, request).await
}

/// The answer to a call that has leave.
pub(in crate::http) fn answer(
    state: SharedState,
    permit: Permit<Rewrap>,
    bounds: Bounds,
    request: Request,
) -> impl Future<Output = Result<Response, Problem>> + Send {
    by_body(state, permit, bounds, request, raw::rewrap, answer_text)
}

async fn answer_text(state: SharedState, permit: Permit<Rewrap>, body: Bytes) -> Result<Response, Problem> {
    let request: RewrapRequest<'_> = parse(&body)?;
    let envelope = text::decode(&request.ciphertext.0).map_err(OperationError::from)?;
    let weight = request.envelope.map(Into::into);
    let rewrapping = Rewrapping { envelope, context: request.context.0, mode: request.mode.into(), weight };
    let rewrapped = state.operations.rewrap(&permit, rewrapping).await?;
    let mut out = Vec::with_capacity(text::encoded_bytes(rewrapped.envelope.len()) + 192);
    out.push(b'{');
    write(&rewrapped, &mut out);
    out.push(b'}');
    Ok(json(StatusCode::OK, out))
}

/// The fields of an answer.
pub(in crate::http) fn write(rewrapped: &Rewrapped, out: &mut Vec<u8>) {
    out.extend_from_slice(br#""ciphertext":""#);
    text::encode_to(&rewrapped.envelope, out);
    out.extend_from_slice(br#"","changed":"#);
    out.extend_from_slice(if rewrapped.changed { b"true" } else { b"false" });
    out.extend_from_slice(br#","from_dek_id":""#);
    rewrapped.from_dek_id.write_to(out);
    out.extend_from_slice(br#"","to_dek_id":""#);
    rewrapped.to_dek_id.write_to(out);
    out.push(b'"');
}

impl From<Mode> for RewrapMode {
    fn from(mode: Mode) -> Self {
        match mode {
            Mode::Auto => Self::Auto,
            Mode::WrappedKey => Self::WrappedKey,
        }
    }
}
