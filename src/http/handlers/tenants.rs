//! `/v1/tenants`

use axum::Json;
use axum::extract::State;
use axum::response::Response;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{JsonBody, KekBody, PageQuery, Path, Query, StatusName, created, name, next_cursor};
use crate::http::SharedState;
use crate::http::json::parse;
use crate::http::middleware::authenticate::Caller;
use crate::http::problem::{Code, Problem};
use crate::operations::TenantChange;
use crate::store::TenantRecord;
use crate::tenant::{Kek, KekRing};

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::http) struct CreateTenantRequest {
    /// Its id: 1 to 63 characters of a-z, 0-9 and '-'.
    #[schema(example = "acme")]
    tenant: String,
    /// Its master keys, the primary first: 1 to 8.
    #[schema(min_items = 1, max_items = 8)]
    keks: Vec<KekBody>,
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::http) struct UpdateTenantRequest {
    /// Its master keys from now on, the primary first: 1 to 8. Former ones stay believed for opening.
    #[serde(default)]
    #[schema(min_items = 1, max_items = 8)]
    keks: Option<Vec<KekBody>>,
    /// Whether it is served.
    #[serde(default)]
    status: Option<StatusName>,
    /// The version that this change is based on: refused where the tenant is at another.
    #[serde(default)]
    #[schema(example = 1)]
    version: Option<u64>,
}

/// A tenant.
#[derive(Serialize, ToSchema)]
pub(in crate::http) struct Tenant {
    /// Its id.
    #[serde(rename = "tenant")]
    #[schema(example = "acme")]
    id: String,
    /// Whether it is served.
    status: StatusName,
    /// Its master keys, the primary first.
    keks: Vec<KekBody>,
    /// Master keys that were in its ring before.
    former_keks: Vec<KekBody>,
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

impl From<TenantRecord> for Tenant {
    fn from(record: TenantRecord) -> Self {
        Self {
            id: record.id.to_string(),
            status: record.status.into(),
            keks: record.ring.members().iter().map(KekBody::from).collect(),
            former_keks: record.former_keks.iter().map(KekBody::from).collect(),
            created_at: record.created_at.to_string(),
            updated_at: record.updated_at.to_string(),
            version: record.version,
        }
    }
}

/// A page of tenants.
#[derive(Serialize, ToSchema)]
pub(in crate::http) struct TenantList {
    items: Vec<Tenant>,
    /// The cursor of the next page; none where this is the last.
    next: Option<String>,
}

fn ring(keks: Vec<KekBody>) -> Result<KekRing, Problem> {
    let keks = keks.into_iter().map(Kek::try_from).collect::<Result<Vec<_>, _>>()?;
    KekRing::new(keks).map_err(|error| Problem::new(Code::MalformedRequest, error.to_string()))
}

/// Make a tenant
///
/// With its ring of master keys and its key `default`. Needs the verb `operate`.
#[utoipa::path(post, path = "/v1/tenants", operation_id = "createTenant", tag = "administration",
    request_body = CreateTenantRequest,
    responses((status = 201, description = "Made", body = Tenant)))]
pub(in crate::http) async fn create(
    State(state): State<SharedState>,
    caller: Caller,
    JsonBody(body): JsonBody,
) -> Result<Response, Problem> {
    let permit = caller.operate()?;
    let request: CreateTenantRequest = parse(&body)?;
    let made = state.operations.create_tenant(&permit, name(&request.tenant)?, ring(request.keks)?).await?;
    Ok(created(Tenant::from(made)))
}

/// List tenants
///
/// By id. Needs the verb `operate`.
#[utoipa::path(get, path = "/v1/tenants", operation_id = "listTenants", tag = "administration", params(PageQuery),
    responses((status = 200, description = "A page of tenants", body = TenantList)))]
pub(in crate::http) async fn list(
    State(state): State<SharedState>,
    caller: Caller,
    Query(query): Query<PageQuery>,
) -> Result<Json<TenantList>, Problem> {
    let permit = caller.operate()?;
    let page = query.page(name)?;
    let limit = page.limit;
    let records = state.operations.list_tenants(&permit, page).await?;
    let next = next_cursor(&records, limit, |record| record.id.to_string());
    Ok(Json(TenantList { items: records.into_iter().map(Into::into).collect(), next }))
}

/// Look at a tenant
///
/// Needs the verb `admin` in it, or `operate`.
#[utoipa::path(get, path = "/v1/tenants/{tenant}", operation_id = "readTenant", tag = "administration",
    params(("tenant" = String, Path, description = "The tenant's id", example = "acme")),
    responses((status = 200, description = "The tenant", body = Tenant)))]
pub(in crate::http) async fn read(
    State(state): State<SharedState>,
    caller: Caller,
    Path(tenant): Path<String>,
) -> Result<Json<Tenant>, Problem> {
    let permit = caller.admin_of(&tenant)?;
    Ok(Json(state.operations.tenant(&permit).await?.into()))
}

/// Change a tenant
///
/// Its ring or its status. Needs the verb `operate`.
#[utoipa::path(put, path = "/v1/tenants/{tenant}", operation_id = "updateTenant", tag = "administration",
    params(("tenant" = String, Path, description = "The tenant's id", example = "acme")),
    request_body = UpdateTenantRequest,
    responses((status = 200, description = "Changed", body = Tenant)))]
pub(in crate::http) async fn update(
    State(state): State<SharedState>,
    caller: Caller,
    Path(tenant): Path<String>,
    JsonBody(body): JsonBody,
) -> Result<Json<Tenant>, Problem> {
    let (operate, permit) = (caller.operate()?, caller.admin_of(&tenant)?);
    let request: UpdateTenantRequest = parse(&body)?;
    let change = TenantChange {
        ring: request.keks.map(ring).transpose()?,
        status: request.status.map(Into::into),
        version: request.version,
    };
    Ok(Json(state.operations.update_tenant(&permit, &operate, change).await?.into()))
}
