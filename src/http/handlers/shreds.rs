//! `.../shred`: of a data key, a key, a tenant.

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use http::StatusCode;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{JsonBody, PageQuery, Path, Query, dek_id, name, next_cursor};
use crate::http::SharedState;
use crate::http::json::parse;
use crate::http::middleware::authenticate::Caller;
use crate::http::problem::{Code, Problem};
use crate::operations::Shredding;
use crate::store::{ShredRecord, Target};

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::http) struct ShredRequest {
    /// How long it can be cancelled, in seconds: 3,600 (an hour) to 31,536,000. Default 604,800: 7 days.
    #[serde(default)]
    #[schema(example = 604_800, maximum = 31_536_000)]
    waiting_secs: Option<u64>,
}

/// Something that is to be destroyed, or was.
#[derive(Serialize, ToSchema)]
pub(in crate::http) struct Shred {
    /// Whose.
    #[schema(example = "acme")]
    tenant: String,
    /// What: empty for the whole tenant, `key:NAME`, or `dek:ID`.
    #[schema(example = "key:billing")]
    target: String,
    /// When that was asked for, RFC 3339.
    #[schema(example = "2026-11-23T12:00:00Z")]
    requested_at: String,
    /// By whom.
    #[schema(example = "api-key:4b1f0a6c")]
    requested_by: String,
    /// From when on it is destroyed; until then it can be cancelled.
    #[schema(example = "2026-11-30T12:00:00Z")]
    due_at: String,
    /// When the last of it was destroyed.
    done_at: Option<String>,
}

impl From<ShredRecord> for Shred {
    fn from(record: ShredRecord) -> Self {
        Self {
            tenant: record.tenant.to_string(),
            target: record.target.name(),
            requested_at: record.requested_at.to_string(),
            requested_by: record.requested_by,
            due_at: record.due_at.to_string(),
            done_at: record.done_at.map(|at| at.to_string()),
        }
    }
}

/// What is to be destroyed, and what that does not reach.
#[derive(Serialize, ToSchema)]
pub(in crate::http) struct ShredResponse {
    shred: Shred,
    /// Copies of the data keys that stay where they are, and what to do about them.
    beyond_reach: Vec<BeyondReach>,
}

/// A copy of a data key that this service cannot destroy.
#[derive(Serialize, ToSchema)]
pub(in crate::http) struct BeyondReach {
    /// `embedded_envelopes`, `registry_backups` or `memory`.
    #[schema(example = "embedded_envelopes")]
    what: &'static str,
    /// What it means, and what to do.
    advice: String,
    /// The master keys whose deletion would end it.
    keks: Vec<SharedKek>,
}

/// A master key, and who else depends on it.
#[derive(Serialize, ToSchema)]
pub(in crate::http) struct SharedKek {
    /// Which.
    #[schema(example = "arn:aws:kms:eu-west-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab")]
    kek: String,
    /// How many tenants have it in their ring, or had it: more than one, and others lose their data with it.
    #[schema(example = 1)]
    tenants: u64,
}

impl From<Shredding> for ShredResponse {
    fn from(shredding: Shredding) -> Self {
        let beyond_reach = shredding.beyond_reach.into_iter().map(|beyond| BeyondReach {
            what: beyond.what,
            advice: beyond.advice,
            keks: beyond
                .keks
                .into_iter()
                .map(|(kek, of)| SharedKek { kek: kek.to_string(), tenants: of.rings + of.former_rings })
                .collect(),
        });
        Self { beyond_reach: beyond_reach.collect(), shred: shredding.record.into() }
    }
}

/// A page of what is to be destroyed.
#[derive(Serialize, ToSchema)]
pub(in crate::http) struct ShredList {
    items: Vec<Shred>,
    /// The cursor of the next page; none where this is the last.
    next: Option<String>,
}

fn accepted(shredding: Shredding) -> Response {
    (StatusCode::ACCEPTED, Json(ShredResponse::from(shredding))).into_response()
}

/// Shred a data key
///
/// It opens nothing from now on, and is destroyed for good when the waiting period is over; until then this can be
/// cancelled. Needs the verb `admin` in the tenant, or `operate`.
#[utoipa::path(post, path = "/v1/tenants/{tenant}/deks/{dek}/shred", operation_id = "shredDek", tag = "administration",
    params(("tenant" = String, Path, description = "The tenant's id", example = "acme"),
           ("dek" = String, Path, description = "The data key's id", example = "019ad1b2-8c1e-7c3a-9d7e-0123456789ab")),
    request_body = ShredRequest,
    responses((status = 202, description = "It waits", body = ShredResponse)))]
pub(in crate::http) async fn shred_dek(
    State(state): State<SharedState>,
    caller: Caller,
    Path((tenant, dek)): Path<(String, String)>,
    JsonBody(body): JsonBody,
) -> Result<Response, Problem> {
    let permit = caller.admin_of(&tenant)?;
    let request: ShredRequest = parse(&body)?;
    let target = Target::Dek(dek_id(&dek)?);
    Ok(accepted(state.operations.shred(&permit, target, request.waiting_secs).await?))
}

/// Cancel the shredding of a data key
///
/// It stays revoked until it is restored. Needs the verb `admin` in the tenant, or `operate`.
#[utoipa::path(delete, path = "/v1/tenants/{tenant}/deks/{dek}/shred", operation_id = "cancelShredDek",
    tag = "administration",
    params(("tenant" = String, Path, description = "The tenant's id", example = "acme"),
           ("dek" = String, Path, description = "The data key's id", example = "019ad1b2-8c1e-7c3a-9d7e-0123456789ab")),
    responses((status = 204, description = "Cancelled")))]
pub(in crate::http) async fn cancel_dek(
    State(state): State<SharedState>,
    caller: Caller,
    Path((tenant, dek)): Path<(String, String)>,
) -> Result<StatusCode, Problem> {
    let permit = caller.admin_of(&tenant)?;
    state.operations.cancel_shred(&permit, &Target::Dek(dek_id(&dek)?)).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Shred a key
///
/// It is switched off at once, and all its data keys are destroyed for good when the waiting period is over; until
/// then this can be cancelled. Needs the verb `admin` in the tenant, or `operate`.
#[utoipa::path(post, path = "/v1/tenants/{tenant}/keys/{key}/shred", operation_id = "shredKey", tag = "administration",
    params(("tenant" = String, Path, description = "The tenant's id", example = "acme"),
           ("key" = String, Path, description = "The key's name", example = "billing")),
    request_body = ShredRequest,
    responses((status = 202, description = "It waits", body = ShredResponse)))]
pub(in crate::http) async fn shred_key(
    State(state): State<SharedState>,
    caller: Caller,
    Path((tenant, key)): Path<(String, String)>,
    JsonBody(body): JsonBody,
) -> Result<Response, Problem> {
    let permit = caller.admin_of(&tenant)?;
    let request: ShredRequest = parse(&body)?;
    let target = Target::Key(name(&key)?);
    Ok(accepted(state.operations.shred(&permit, target, request.waiting_secs).await?))
}

/// Cancel the shredding of a key
///
/// It stays switched off until it is enabled. Needs the verb `admin` in the tenant, or `operate`.
#[utoipa::path(delete, path = "/v1/tenants/{tenant}/keys/{key}/shred", operation_id = "cancelShredKey",
    tag = "administration",
    params(("tenant" = String, Path, description = "The tenant's id", example = "acme"),
           ("key" = String, Path, description = "The key's name", example = "billing")),
    responses((status = 204, description = "Cancelled")))]
pub(in crate::http) async fn cancel_key(
    State(state): State<SharedState>,
    caller: Caller,
    Path((tenant, key)): Path<(String, String)>,
) -> Result<StatusCode, Problem> {
    let permit = caller.admin_of(&tenant)?;
    state.operations.cancel_shred(&permit, &Target::Key(name(&key)?)).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Shred a tenant
///
/// It is switched off at once, and all its data keys are destroyed for good when the waiting period is over; until
/// then this can be cancelled. Needs the verb `operate`.
#[utoipa::path(post, path = "/v1/tenants/{tenant}/shred", operation_id = "shredTenant", tag = "administration",
    params(("tenant" = String, Path, description = "The tenant's id", example = "acme")),
    request_body = ShredRequest,
    responses((status = 202, description = "It waits", body = ShredResponse)))]
pub(in crate::http) async fn shred_tenant(
    State(state): State<SharedState>,
    caller: Caller,
    Path(tenant): Path<String>,
    JsonBody(body): JsonBody,
) -> Result<Response, Problem> {
    let (operate, permit) = (caller.operate()?, caller.admin_of(&tenant)?);
    let request: ShredRequest = parse(&body)?;
    Ok(accepted(state.operations.shred_tenant(&permit, &operate, request.waiting_secs).await?))
}

/// Cancel the shredding of a tenant
///
/// It stays switched off until it is enabled. Needs the verb `operate`.
#[utoipa::path(delete, path = "/v1/tenants/{tenant}/shred", operation_id = "cancelShredTenant",
    tag = "administration",
    params(("tenant" = String, Path, description = "The tenant's id", example = "acme")),
    responses((status = 204, description = "Cancelled")))]
pub(in crate::http) async fn cancel_tenant(
    State(state): State<SharedState>,
    caller: Caller,
    Path(tenant): Path<String>,
) -> Result<StatusCode, Problem> {
    caller.operate()?;
    let permit = caller.admin_of(&tenant)?;
    state.operations.cancel_shred(&permit, &Target::Tenant).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// List what is to be destroyed
///
/// And what was. Needs the verb `admin` in the tenant, or `operate`.
#[utoipa::path(get, path = "/v1/tenants/{tenant}/shreds", operation_id = "listShreds", tag = "administration",
    params(("tenant" = String, Path, description = "The tenant's id", example = "acme"), PageQuery),
    responses((status = 200, description = "A page", body = ShredList)))]
pub(in crate::http) async fn list(
    State(state): State<SharedState>,
    caller: Caller,
    Path(tenant): Path<String>,
    Query(query): Query<PageQuery>,
) -> Result<Json<ShredList>, Problem> {
    let permit = caller.admin_of(&tenant)?;
    let page = query.page(|cursor| {
        Target::parse(cursor)
            .ok_or_else(|| Problem::new(Code::MalformedRequest, "after is not a cursor of this list"))
    })?;
    let limit = page.limit;
    let records = state.operations.list_shreds(&permit, page).await?;
    let next = next_cursor(&records, limit, |record| record.target.name());
    Ok(Json(ShredList { items: records.into_iter().map(Into::into).collect(), next }))
}
