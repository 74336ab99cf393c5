//! `/v1/tenants/{tenant}/api-keys`

use axum::Json;
use axum::extract::State;
use axum::response::Response;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{JsonBody, PageQuery, Path, Query, created, name, next_cursor};
use crate::clock::Timestamp;
use crate::http::SharedState;
use crate::http::json::parse;
use crate::http::middleware::authenticate::Caller;
use crate::http::problem::{Code, Problem};
use crate::operations::ApiKeyGrant;
use crate::store::ApiKeyRecord;
use crate::tenant::{TenantId, Verb};

/// What a credential may be allowed to do.
#[derive(Clone, Copy, Deserialize, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(in crate::http) enum VerbName {
    /// Seal data.
    Encrypt,
    /// Open data.
    Decrypt,
    /// Bring envelopes up to date without seeing their plaintext.
    Rewrap,
    /// Administer the tenant.
    Admin,
    /// Administer the service.
    Operate,
}

impl From<VerbName> for Verb {
    fn from(verb: VerbName) -> Self {
        match verb {
            VerbName::Encrypt => Self::Encrypt,
            VerbName::Decrypt => Self::Decrypt,
            VerbName::Rewrap => Self::Rewrap,
            VerbName::Admin => Self::Admin,
            VerbName::Operate => Self::Operate,
        }
    }
}

impl From<Verb> for VerbName {
    fn from(verb: Verb) -> Self {
        match verb {
            Verb::Encrypt => Self::Encrypt,
            Verb::Decrypt => Self::Decrypt,
            Verb::Rewrap => Self::Rewrap,
            Verb::Admin => Self::Admin,
            Verb::Operate => Self::Operate,
        }
    }
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::http) struct CreateApiKeyRequest {
    /// What people call it: 1 to 100 bytes.
    #[schema(
        example = "billing service",
        min_length = 1,
        max_length = 100,
        pattern = "^[^\\x00-\\x1f\\x7f-\\x9f]*$"
    )]
    name: String,
    /// What it may do; none implies another.
    #[schema(min_items = 1)]
    verbs: Vec<VerbName>,
    /// Tenants that it holds beside the one in the path. You must hold them too, or operate the service.
    #[serde(default)]
    #[schema(max_items = 100)]
    tenants: Vec<String>,
    /// From when on it is refused, RFC 3339; never where nothing is said.
    #[serde(default)]
    #[schema(example = "2027-11-23T12:00:00Z", format = DateTime)]
    expires_at: Option<String>,
}

/// An API key, without its secret.
#[derive(Serialize, ToSchema)]
pub(in crate::http) struct ApiKey {
    /// The public part of it.
    #[schema(example = "q83vEjRWeJASNFZ4")]
    id: String,
    /// What people call it.
    #[schema(example = "billing service")]
    name: String,
    /// The tenants that it holds, of those that you administer.
    tenants: Vec<String>,
    /// What it may do with them.
    verbs: Vec<VerbName>,
    /// When it was made, RFC 3339.
    #[schema(example = "2026-11-23T12:00:00Z")]
    created_at: String,
    /// From when on it is refused.
    expires_at: Option<String>,
    /// When it was revoked, where you administer it.
    revoked_at: Option<String>,
}

impl From<ApiKeyRecord> for ApiKey {
    fn from(record: ApiKeyRecord) -> Self {
        Self {
            id: record.id,
            name: record.name,
            tenants: record.tenants.iter().map(ToString::to_string).collect(),
            verbs: record.verbs.into_iter().map(Into::into).collect(),
            created_at: record.created_at.to_string(),
            expires_at: record.expires_at.map(|at| at.to_string()),
            revoked_at: record.revoked_at.map(|at| at.to_string()),
        }
    }
}

/// A new API key: the only time that its token is shown.
#[derive(Serialize, ToSchema)]
pub(in crate::http) struct CreatedApiKey {
    #[serde(flatten)]
    api_key: ApiKey,
    /// What to send as `Authorization: Bearer ...`. It is not kept and cannot be shown again.
    #[schema(example = "kf_q83vEjRWeJASNFZ4_...")]
    token: String,
}

/// A page of API keys.
#[derive(Serialize, ToSchema)]
pub(in crate::http) struct ApiKeyList {
    items: Vec<ApiKey>,
    /// The cursor of the next page; none where this is the last.
    next: Option<String>,
}

/// Make an API key
///
/// The token is in the answer, and never shown again. Needs the verb `admin` in the tenant, or `operate`.
#[utoipa::path(post, path = "/v1/tenants/{tenant}/api-keys", operation_id = "createApiKey", tag = "administration",
    params(("tenant" = String, Path, description = "The tenant's id", example = "acme")),
    request_body = CreateApiKeyRequest,
    responses((status = 201, description = "Made", body = CreatedApiKey)))]
pub(in crate::http) async fn create(
    State(state): State<SharedState>,
    caller: Caller,
    Path(tenant): Path<String>,
    JsonBody(body): JsonBody,
) -> Result<Response, Problem> {
    let permit = caller.admin_of(&tenant)?;
    let request: CreateApiKeyRequest = parse(&body)?;
    let expires_at = request.expires_at.as_deref().map(|text| {
        Timestamp::parse_rfc3339(text).ok_or_else(|| {
            Problem::new(
                Code::MalformedRequest,
                "expires_at is a time as RFC 3339 writes it: 2027-11-23T12:00:00Z",
            )
        })
    });
    let grant = ApiKeyGrant {
        name: request.name,
        tenants: request.tenants.iter().map(|tenant| name(tenant)).collect::<Result<Vec<TenantId>, _>>()?,
        verbs: request.verbs.into_iter().map(Into::into).collect(),
        expires_at: expires_at.transpose()?,
    };
    let new = state.operations.create_api_key(&permit, &caller.0, grant).await?;
    let token = new.token.as_str().to_owned();
    Ok(created(CreatedApiKey { api_key: new.record.into(), token }))
}

/// List API keys
///
/// Those that hold the tenant, by id. Needs the verb `admin` in the tenant, or `operate`.
#[utoipa::path(get, path = "/v1/tenants/{tenant}/api-keys", operation_id = "listApiKeys", tag = "administration",
    params(("tenant" = String, Path, description = "The tenant's id", example = "acme"), PageQuery),
    responses((status = 200, description = "A page of API keys", body = ApiKeyList)))]
pub(in crate::http) async fn list(
    State(state): State<SharedState>,
    caller: Caller,
    Path(tenant): Path<String>,
    Query(query): Query<PageQuery>,
) -> Result<Json<ApiKeyList>, Problem> {
    let permit = caller.admin_of(&tenant)?;
    let page = query.page(|after| Ok(after.to_owned()))?;
    let limit = page.limit;
    let records = state.operations.list_api_keys(&permit, page).await?;
    let next = next_cursor(&records, limit, |record| record.id.clone());
    Ok(Json(ApiKeyList { items: records.into_iter().map(Into::into).collect(), next }))
}

/// Revoke an API key
///
/// It is refused from now on, by this process at once and by others within seconds. An earlier revocation stands. A key
/// that also holds tenants which you do not administer goes on for them, and no longer holds this one.
/// Needs the verb `admin` in the tenant, or `operate`.
#[utoipa::path(post, path = "/v1/tenants/{tenant}/api-keys/{id}/revoke", operation_id = "revokeApiKey",
    tag = "administration",
    params(("tenant" = String, Path, description = "The tenant's id", example = "acme"),
           ("id" = String, Path, description = "The API key's id", example = "q83vEjRWeJASNFZ4")),
    responses((status = 200, description = "Revoked", body = ApiKey)))]
pub(in crate::http) async fn revoke(
    State(state): State<SharedState>,
    caller: Caller,
    Path((tenant, id)): Path<(String, String)>,
) -> Result<Json<ApiKey>, Problem> {
    let permit = caller.admin_of(&tenant)?;
    Ok(Json(state.operations.revoke_api_key(&permit, &id).await?.into()))
}
