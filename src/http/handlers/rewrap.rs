//! `POST /v1/rewrap`

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use envelope::text;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{JsonBody, Permitted, Weight};
use crate::access::Rewrap;
use crate::http::HttpState;
use crate::http::json::{Context, Text, parse};
use crate::http::problem::Problem;
use crate::operations::{OperationError, RewrapMode, Rewrapping};

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::http) struct RewrapRequest<'a> {
    /// The envelope in text form.
    #[serde(borrow)]
    #[schema(value_type = String, example = "kf1.S0YBAZrR...")]
    ciphertext: Text<'a>,
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
#[utoipa::path(post, path = "/v1/rewrap", operation_id = "rewrap", tag = "data",
    params(("Keyfold-Tenant" = Option<String>, Header, description = "Which tenant, where the credential holds several")),
    request_body(content = RewrapRequest<'_>, content_type = "application/json"),
    responses((status = 200, description = "Up to date", body = RewrapResponse)))]
pub(in crate::http) async fn rewrap(
    State(state): State<Arc<HttpState>>,
    Permitted(permit): Permitted<Rewrap>,
    JsonBody(body): JsonBody,
) -> Result<Json<RewrapResponse>, Problem> {
    let request: RewrapRequest<'_> = parse(&body)?;
    let envelope = text::decode(&request.ciphertext.0).map_err(OperationError::from)?;
    let mode = match request.mode {
        Mode::Auto => RewrapMode::Auto,
        Mode::WrappedKey => RewrapMode::WrappedKey,
    };
    let weight = request.envelope.map(Into::into);
    let rewrapping = Rewrapping { envelope, context: request.context.0, mode, weight };
    let rewrapped = state.operations.rewrap(&permit, rewrapping).await?;
    Ok(Json(RewrapResponse {
        ciphertext: text::encode(&rewrapped.envelope),
        changed: rewrapped.changed,
        from_dek_id: rewrapped.from_dek_id.to_string(),
        to_dek_id: rewrapped.to_dek_id.to_string(),
    }))
}
