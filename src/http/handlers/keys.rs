//! `/v1/tenants/{tenant}/keys`

use axum::Json;
use axum::extract::State;
use axum::response::Response;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use utoipa::ToSchema;

use super::{JsonBody, PageQuery, Path, Query, StatusName, Weight, created, name, next_cursor};
use crate::http::SharedState;
use crate::http::json::{ObjectOnly, parse};
use crate::http::middleware::authenticate::Caller;
use crate::http::problem::Problem;
use crate::operations::KeyChange;
use crate::store::{KeyPolicy, KeyRecord};

/// The policy under which a key's data keys are made and ended.
#[derive(Clone, Copy, Deserialize, Serialize, ToSchema)]
#[serde(remote = "Self", deny_unknown_fields, default)]
pub(in crate::http) struct Policy {
    /// How long a data key encrypts, in seconds: 60 to ten years. Default 86,400.
    #[schema(example = 86400, minimum = 60, maximum = 315_360_000)]
    dek_age_secs_max: u64,
    /// How many messages a data key seals: 1 to 2^48. Default 2^32.
    #[schema(example = 4_294_967_296_u64, minimum = 1, maximum = 281_474_976_710_656_u64)]
    dek_messages_max: u64,
    /// How many bytes of plaintext a data key seals: 1 to 2^60. Default 2^40.
    #[schema(example = 1_099_511_627_776_u64, minimum = 1, maximum = 1_152_921_504_606_846_976_u64)]
    dek_bytes_max: u64,
    /// What envelopes carry. Default embedded.
    envelope: Weight,
}

impl<'de> Deserialize<'de> for Policy {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::deserialize(ObjectOnly(deserializer))
    }
}

impl Serialize for Policy {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        Self::serialize(self, serializer)
    }
}

impl Default for Policy {
    fn default() -> Self {
        KeyPolicy::default().into()
    }
}

impl From<KeyPolicy> for Policy {
    fn from(policy: KeyPolicy) -> Self {
        Self {
            dek_age_secs_max: policy.dek_age_secs_max,
            dek_messages_max: policy.dek_messages_max,
            dek_bytes_max: policy.dek_bytes_max,
            envelope: policy.envelope.into(),
        }
    }
}

impl From<Policy> for KeyPolicy {
    fn from(policy: Policy) -> Self {
        Self {
            dek_age_secs_max: policy.dek_age_secs_max,
            dek_messages_max: policy.dek_messages_max,
            dek_bytes_max: policy.dek_bytes_max,
            envelope: policy.envelope.into(),
        }
    }
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::http) struct CreateKeyRequest {
    /// Its name: 1 to 63 characters of a-z, 0-9 and '-'.
    #[schema(example = "billing")]
    key: String,
    /// Its policy; what is not said is as the defaults say.
    #[serde(default)]
    policy: Policy,
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::http) struct UpdateKeyRequest {
    /// Its whole policy from now on; what is not said is as the defaults say.
    #[serde(default)]
    policy: Option<Policy>,
    /// Whether it is served.
    #[serde(default)]
    status: Option<StatusName>,
    /// The version that this change is based on: refused where the key is at another.
    #[serde(default)]
    #[schema(example = 1)]
    version: Option<u64>,
}

/// A key: a named policy of a tenant.
#[derive(Serialize, ToSchema)]
pub(in crate::http) struct Key {
    /// Whose.
    #[schema(example = "acme")]
    tenant: String,
    /// Its name.
    #[serde(rename = "key")]
    #[schema(example = "billing")]
    name: String,
    /// Whether it is served.
    status: StatusName,
    /// Its policy.
    policy: Policy,
    /// When it was made, RFC 3339.
    #[schema(example = "2026-11-23T12:00:00Z")]
    created_at: String,
    /// When it was changed last, RFC 3339.
    #[schema(example = "2026-11-23T12:00:00Z")]
    updated_at: String,
    /// Counts the changes.
    #[schema(example = 1)]
    version: u64,
}

impl From<KeyRecord> for Key {
    fn from(record: KeyRecord) -> Self {
        Self {
            tenant: record.tenant.to_string(),
            name: record.name.to_string(),
            status: record.status.into(),
            policy: record.policy.into(),
            created_at: record.created_at.to_string(),
            updated_at: record.updated_at.to_string(),
            version: record.version,
        }
    }
}

/// A page of keys.
#[derive(Serialize, ToSchema)]
pub(in crate::http) struct KeyList {
    items: Vec<Key>,
    /// The cursor of the next page; none where this is the last.
    next: Option<String>,
}

/// Make a key
///
/// Needs the verb `admin` in the tenant, or `operate`.
#[utoipa::path(post, path = "/v1/tenants/{tenant}/keys", operation_id = "createKey", tag = "administration",
    params(("tenant" = String, Path, description = "The tenant's id", example = "acme")),
    request_body = CreateKeyRequest,
    responses((status = 201, description = "Made", body = Key)))]
pub(in crate::http) async fn create(
    State(state): State<SharedState>,
    caller: Caller,
    Path(tenant): Path<String>,
    JsonBody(body): JsonBody,
) -> Result<Response, Problem> {
    let permit = caller.admin_of(&tenant)?;
    let request: CreateKeyRequest = parse(&body)?;
    let made = state.operations.create_key(&permit, name(&request.key)?, request.policy.into()).await?;
    Ok(created(Key::from(made)))
}

/// List keys
///
/// By name. Needs the verb `admin` in the tenant, or `operate`.
#[utoipa::path(get, path = "/v1/tenants/{tenant}/keys", operation_id = "listKeys", tag = "administration",
    params(("tenant" = String, Path, description = "The tenant's id", example = "acme"), PageQuery),
    responses((status = 200, description = "A page of keys", body = KeyList)))]
pub(in crate::http) async fn list(
    State(state): State<SharedState>,
    caller: Caller,
    Path(tenant): Path<String>,
    Query(query): Query<PageQuery>,
) -> Result<Json<KeyList>, Problem> {
    let permit = caller.admin_of(&tenant)?;
    let page = query.page(name)?;
    let limit = page.limit;
    let records = state.operations.list_keys(&permit, page).await?;
    let next = next_cursor(&records, limit, |record| record.name.to_string());
    Ok(Json(KeyList { items: records.into_iter().map(Into::into).collect(), next }))
}

/// Look at a key
///
/// Needs the verb `admin` in the tenant, or `operate`.
#[utoipa::path(get, path = "/v1/tenants/{tenant}/keys/{key}", operation_id = "readKey", tag = "administration",
    params(("tenant" = String, Path, description = "The tenant's id", example = "acme"),
           ("key" = String, Path, description = "The key's name", example = "billing")),
    responses((status = 200, description = "The key", body = Key)))]
pub(in crate::http) async fn read(
    State(state): State<SharedState>,
    caller: Caller,
    Path((tenant, key)): Path<(String, String)>,
) -> Result<Json<Key>, Problem> {
    let permit = caller.admin_of(&tenant)?;
    Ok(Json(state.operations.key(&permit, &name(&key)?).await?.into()))
}

/// Change a key
///
/// Its policy or its status. Needs the verb `admin` in the tenant, or `operate`.
#[utoipa::path(put, path = "/v1/tenants/{tenant}/keys/{key}", operation_id = "updateKey", tag = "administration",
    params(("tenant" = String, Path, description = "The tenant's id", example = "acme"),
           ("key" = String, Path, description = "The key's name", example = "billing")),
    request_body = UpdateKeyRequest,
    responses((status = 200, description = "Changed", body = Key)))]
pub(in crate::http) async fn update(
    State(state): State<SharedState>,
    caller: Caller,
    Path((tenant, key)): Path<(String, String)>,
    JsonBody(body): JsonBody,
) -> Result<Json<Key>, Problem> {
    let permit = caller.admin_of(&tenant)?;
    let request: UpdateKeyRequest = parse(&body)?;
    let change = KeyChange {
        policy: request.policy.map(Into::into),
        status: request.status.map(Into::into),
        version: request.version,
    };
    Ok(Json(state.operations.update_key(&permit, &name(&key)?, change).await?.into()))
}
