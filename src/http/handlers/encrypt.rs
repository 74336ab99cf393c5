//! `POST /v1/encrypt`

use std::sync::Arc;

use axum::extract::State;
use axum::response::Response;
use envelope::text;
use http::StatusCode;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{JsonBody, Permitted, Weight, json, name};
use crate::access::Encrypt;
use crate::http::HttpState;
use crate::http::json::{Base64Plaintext, Context, Text, parse};
use crate::http::problem::Problem;
use crate::operations::Encryption;
use crate::tenant::KeyName;

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::http) struct EncryptRequest<'a> {
    /// The bytes to encrypt, in standard base64 with padding.
    #[serde(borrow)]
    #[schema(value_type = String, format = Byte, example = "aGVsbG8=")]
    plaintext: Text<'a>,
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
#[utoipa::path(post, path = "/v1/encrypt", operation_id = "encrypt", tag = "data",
    params(("Keyfold-Tenant" = Option<String>, Header, description = "Which tenant, where the credential holds several")),
    request_body(content = EncryptRequest<'_>, content_type = "application/json"),
    responses((status = 200, description = "Sealed", body = EncryptResponse)))]
pub(in crate::http) async fn encrypt(
    State(state): State<Arc<HttpState>>,
    Permitted(permit): Permitted<Encrypt>,
    JsonBody(body): JsonBody,
) -> Result<Response, Problem> {
    let request: EncryptRequest<'_> = parse(&body)?;
    let key = match request.key {
        None => state.default_key.clone(),
        Some(key) if key.0 == KeyName::DEFAULT => state.default_key.clone(),
        Some(key) => name(&key.0)?,
    };
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
    out.extend_from_slice(br#"{"ciphertext":""#);
    text::encode_to(&encrypted.envelope, &mut out);
    // Neither a key's name (a slug) nor an id can hold what JSON escapes.
    out.extend_from_slice(br#"","key":""#);
    out.extend_from_slice(encrypted.key.as_str().as_bytes());
    out.extend_from_slice(br#"","dek_id":""#);
    out.extend_from_slice(encrypted.dek_id.to_string().as_bytes());
    out.extend_from_slice(br#""}"#);
    Ok(json(StatusCode::OK, out))
}
