//! `/v1/tenants/{tenant}/grants`

use axum::Json;
use axum::extract::State;
use axum::response::Response;
use http::StatusCode;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use utoipa::ToSchema;

use super::api_keys::VerbName;
use super::{JsonBody, PageQuery, Path, Query, created, next_cursor};
use crate::http::SharedState;
use crate::http::json::{ObjectOnly, parse};
use crate::http::middleware::authenticate::Caller;
use crate::http::problem::{Code, Problem};
use crate::operations::NewGrant;
use crate::store::{GrantCondition, GrantRecord, GrantScope};

/// A pair that the encryption context must hold.
#[derive(Clone, Deserialize, Serialize, ToSchema)]
#[serde(remote = "Self", deny_unknown_fields)]
pub(in crate::http) struct ContextCondition {
    /// The pair's name.
    #[schema(example = "purpose", min_length = 1, max_length = 256)]
    name: String,
    /// One of these is its value, or with a `*` at the end it begins so.
    #[schema(example = json!(["billing", "tax-*"]), min_items = 1, max_items = 64)]
    values: Vec<String>,
}

impl<'de> Deserialize<'de> for ContextCondition {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::deserialize(ObjectOnly(deserializer))
    }
}

impl Serialize for ContextCondition {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        Self::serialize(self, serializer)
    }
}

#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(in crate::http) struct CreateGrantRequest {
    /// To whom: a principal (`api-key:ID`, `jwt:ISSUER:SUBJECT`, `cert:NAME`), or with a `*` at the end all that begin
    /// so.
    #[schema(example = "jwt:corp:alice", min_length = 5, max_length = 256)]
    principal: String,
    /// What: `encrypt`, `decrypt`, `rewrap`, or `admin` without `keys` and `context`.
    #[schema(min_items = 1)]
    verbs: Vec<VerbName>,
    /// Only with these keys, or with a `*` at the end those that begin so; with all where nothing is said.
    #[serde(default)]
    #[schema(example = json!(["billing", "invoices-*"]), min_items = 1, max_items = 64)]
    keys: Option<Vec<String>>,
    /// Only with encryption contexts that hold each of these pairs.
    #[serde(default)]
    #[schema(max_items = 64)]
    context: Vec<ContextCondition>,
}

/// A grant: what somebody may do in a tenant.
#[derive(Serialize, ToSchema)]
pub(in crate::http) struct AccessGrant {
    /// Its id.
    #[schema(example = "019ad1b2-8c1e-7c3a-9d7e-0123456789ab")]
    grant: String,
    /// In which tenant.
    #[schema(example = "acme")]
    tenant: String,
    /// To whom.
    #[schema(example = "jwt:corp:alice")]
    principal: String,
    /// What.
    verbs: Vec<VerbName>,
    /// With which keys; with all where there is nothing.
    keys: Option<Vec<String>>,
    /// With which encryption contexts.
    context: Vec<ContextCondition>,
    /// When it was made, RFC 3339.
    #[schema(example = "2026-11-23T12:00:00Z")]
    created_at: String,
    /// By whom.
    #[schema(example = "api-key:q83vEjRWeJASNFZ4")]
    created_by: String,
}

impl From<GrantRecord> for AccessGrant {
    fn from(record: GrantRecord) -> Self {
        let context = record.scope.context.into_iter();
        Self {
            grant: record.id,
            tenant: record.tenant.to_string(),
            principal: record.principal,
            verbs: record.verbs.into_iter().map(Into::into).collect(),
            keys: record.scope.keys,
            context: context.map(|pair| ContextCondition { name: pair.name, values: pair.values }).collect(),
            created_at: record.created_at.to_string(),
            created_by: record.created_by.to_string(),
        }
    }
}

/// A page of grants.
#[derive(Serialize, ToSchema)]
pub(in crate::http) struct GrantList {
    items: Vec<AccessGrant>,
    /// The cursor of the next page; none where this is the last.
    next: Option<String>,
}

/// Grant something
///
/// It counts from now on, in this process at once and in others within seconds. A principal that holds the tenant by a
/// grant alone names it in `Keyfold-Tenant`. Needs the verb `admin` in the tenant, or `operate`.
#[utoipa::path(post, path = "/v1/tenants/{tenant}/grants", operation_id = "createGrant", tag = "administration",
    params(("tenant" = String, Path, description = "The tenant's id", example = "acme")),
    request_body = CreateGrantRequest,
    responses((status = 201, description = "Granted", body = AccessGrant)))]
pub(in crate::http) async fn create(
    State(state): State<SharedState>,
    caller: Caller,
    Path(tenant): Path<String>,
    JsonBody(body): JsonBody,
) -> Result<Response, Problem> {
    let permit = caller.admin_of(&tenant)?;
    let request: CreateGrantRequest = parse(&body)?;
    let condition = |pair: ContextCondition| GrantCondition { name: pair.name, values: pair.values };
    let new = NewGrant {
        principal: request.principal,
        verbs: request.verbs.into_iter().map(Into::into).collect(),
        scope: GrantScope {
            keys: request.keys,
            context: request.context.into_iter().map(condition).collect(),
        },
    };
    let made = state.operations.create_grant(&permit, &caller.0, new).await?;
    Ok(created(AccessGrant::from(made)))
}

/// List grants
///
/// Those in the tenant that were made here, in the order of making; what the configuration gives is not among them.
/// Needs the verb `admin` in the tenant, or `operate`.
#[utoipa::path(get, path = "/v1/tenants/{tenant}/grants", operation_id = "listGrants", tag = "administration",
    params(("tenant" = String, Path, description = "The tenant's id", example = "acme"), PageQuery),
    responses((status = 200, description = "A page of grants", body = GrantList)))]
pub(in crate::http) async fn list(
    State(state): State<SharedState>,
    caller: Caller,
    Path(tenant): Path<String>,
    Query(query): Query<PageQuery>,
) -> Result<Json<GrantList>, Problem> {
    let permit = caller.admin_of(&tenant)?;
    let page = query.page(|after| Ok(after.to_owned()))?;
    let limit = page.limit;
    let records = state.operations.list_grants(&permit, page).await?;
    let next = next_cursor(&records, limit, |record| record.id.clone());
    Ok(Json(GrantList { items: records.into_iter().map(Into::into).collect(), next }))
}

/// Take a grant back
///
/// It counts no longer, in this process from now on and in others within seconds. Needs the verb `admin` in the tenant,
/// or `operate`.
#[utoipa::path(delete, path = "/v1/tenants/{tenant}/grants/{grant}", operation_id = "deleteGrant",
    tag = "administration",
    params(("tenant" = String, Path, description = "The tenant's id", example = "acme"),
           ("grant" = String, Path, description = "The grant's id", example = "019ad1b2-8c1e-7c3a-9d7e-0123456789ab")),
    responses((status = 204, description = "Taken back")))]
pub(in crate::http) async fn delete(
    State(state): State<SharedState>,
    caller: Caller,
    Path((tenant, grant)): Path<(String, String)>,
) -> Result<StatusCode, Problem> {
    let permit = caller.admin_of(&tenant)?;
    if uuid::Uuid::try_parse(&grant).is_err() {
        return Err(Problem::new(Code::MalformedRequest, "a grant's id is a hyphenated lower-case UUID"));
    }
    state.operations.delete_grant(&permit, &grant).await?;
    Ok(StatusCode::NO_CONTENT)
}
