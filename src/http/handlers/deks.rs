//! `/v1/tenants/{tenant}/keys/{key}/deks`, `.../rotate`, and `/v1/tenants/{tenant}/deks/{dek}`

use axum::Json;
use axum::extract::State;
use serde::Serialize;
use utoipa::ToSchema;

use super::{PageQuery, Path, Query, dek_id, name, next_cursor};
use crate::http::SharedState;
use crate::http::middleware::authenticate::Caller;
use crate::http::problem::Problem;
use crate::store::StoredDek;

/// A data key, without its key material.
#[derive(Serialize, ToSchema)]
pub(in crate::http) struct Dek {
    /// Its id: it stands in every envelope that it sealed.
    #[schema(example = "019ad1b2-8c1e-7c3a-9d7e-0123456789ab")]
    #[serde(rename = "dek_id")]
    id: String,
    /// Whose.
    #[schema(example = "acme")]
    tenant: String,
    /// Under which key.
    #[schema(example = "billing")]
    key: String,
    /// `next`, `active`, `retired`, `revoked` or `destroyed`.
    #[schema(example = "active")]
    state: &'static str,
    /// When it was made, RFC 3339.
    #[schema(example = "2026-11-23T12:00:00Z")]
    created_at: String,
    /// When it began to seal.
    activated_at: Option<String>,
    /// When it stopped sealing.
    retired_at: Option<String>,
    /// When it was revoked.
    revoked_at: Option<String>,
    /// When its wrapped forms were deleted.
    destroyed_at: Option<String>,
    /// Messages sealed, to within the last few seconds.
    #[schema(example = 1200)]
    messages: u64,
    /// Bytes of plaintext sealed, to within the last few seconds.
    #[schema(example = 480_000)]
    bytes: u64,
    /// When it last sealed something, to the minute.
    last_sealed_at: Option<String>,
    /// When it last opened something, to the minute.
    last_opened_at: Option<String>,
    /// The master keys that it is wrapped under: any one of them opens it.
    wrapped: Vec<WrappedForm>,
}

/// One wrapped form of a data key.
#[derive(Serialize, ToSchema)]
pub(in crate::http) struct WrappedForm {
    /// The master key.
    #[schema(example = "arn:aws:kms:eu-west-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab")]
    kek: String,
    /// Which of its materials, where the KMS told.
    material: Option<String>,
    /// When it was wrapped, RFC 3339.
    #[schema(example = "2026-11-23T12:00:00Z")]
    wrapped_at: String,
}

impl From<StoredDek> for Dek {
    fn from(stored: StoredDek) -> Self {
        let text = |at: Option<crate::clock::Timestamp>| at.map(|at| at.to_string());
        let dek = stored.dek;
        let wrapped = stored.wrapped.into_iter().map(|form| WrappedForm {
            kek: form.kek.to_string(),
            material: form.material,
            wrapped_at: form.wrapped_at.to_string(),
        });
        Self {
            id: dek.id.to_string(),
            tenant: dek.scope.tenant.to_string(),
            key: dek.scope.key.to_string(),
            state: dek.state.name(),
            created_at: dek.created_at.to_string(),
            activated_at: text(dek.activated_at),
            retired_at: text(dek.retired_at),
            revoked_at: text(dek.revoked_at),
            destroyed_at: text(dek.destroyed_at),
            messages: dek.messages,
            bytes: dek.bytes,
            last_sealed_at: text(dek.last_sealed_at),
            last_opened_at: text(dek.last_opened_at),
            wrapped: wrapped.collect(),
        }
    }
}

/// A page of data keys.
#[derive(Serialize, ToSchema)]
pub(in crate::http) struct DekList {
    items: Vec<Dek>,
    /// The cursor of the next page; none where this is the last.
    next: Option<String>,
}

/// What a rotation did.
#[derive(Serialize, ToSchema)]
pub(in crate::http) struct RotateResponse {
    /// One for each value of the key-bound context; empty where the key was not used yet.
    rotated: Vec<RotatedDek>,
}

/// A data key that was ended, and the one that has its place.
#[derive(Serialize, ToSchema)]
pub(in crate::http) struct RotatedDek {
    /// The one that only opens from now on.
    #[schema(example = "019ad1b2-8c1e-7c3a-9d7e-0123456789ab")]
    from_dek_id: String,
    /// The one that seals from now on.
    #[schema(example = "019ad1b2-9d2f-7c3a-9d7e-0123456789ab")]
    to_dek_id: String,
}

/// List data keys
///
/// In the order of their making, with when each last sealed and opened something. Needs the verb `admin` in the
/// tenant, or `operate`.
#[utoipa::path(get, path = "/v1/tenants/{tenant}/keys/{key}/deks", operation_id = "listDeks", tag = "administration",
    params(("tenant" = String, Path, description = "The tenant's id", example = "acme"),
           ("key" = String, Path, description = "The key's name", example = "billing"), PageQuery),
    responses((status = 200, description = "A page of data keys", body = DekList)))]
pub(in crate::http) async fn list(
    State(state): State<SharedState>,
    caller: Caller,
    Path((tenant, key)): Path<(String, String)>,
    Query(query): Query<PageQuery>,
) -> Result<Json<DekList>, Problem> {
    let permit = caller.admin_of(&tenant)?;
    let page = query.page(dek_id)?;
    let limit = page.limit;
    let records = state.operations.list_deks(&permit, &name(&key)?, page).await?;
    let next = next_cursor(&records, limit, |stored| stored.dek.id.to_string());
    Ok(Json(DekList { items: records.into_iter().map(Into::into).collect(), next }))
}

/// Rotate a key
///
/// Ends its active data key now; the next one has its place. What was sealed before still opens, and no request waits.
/// Needs the verb `admin` in the tenant, or `operate`.
#[utoipa::path(post, path = "/v1/tenants/{tenant}/keys/{key}/rotate", operation_id = "rotateKey", tag = "administration",
    params(("tenant" = String, Path, description = "The tenant's id", example = "acme"),
           ("key" = String, Path, description = "The key's name", example = "billing")),
    responses((status = 200, description = "Rotated", body = RotateResponse)))]
pub(in crate::http) async fn rotate(
    State(state): State<SharedState>,
    caller: Caller,
    Path((tenant, key)): Path<(String, String)>,
) -> Result<Json<RotateResponse>, Problem> {
    let permit = caller.admin_of(&tenant)?;
    let rotated = state.operations.rotate_key(&permit, &name(&key)?).await?;
    let rotated = rotated.into_iter().map(|rotated| RotatedDek {
        from_dek_id: rotated.from.to_string(),
        to_dek_id: rotated.to.to_string(),
    });
    Ok(Json(RotateResponse { rotated: rotated.collect() }))
}

/// Revoke a data key
///
/// It opens nothing until it is restored. Needs the verb `admin` in the tenant, or `operate`.
#[utoipa::path(post, path = "/v1/tenants/{tenant}/deks/{dek}/revoke", operation_id = "revokeDek", tag = "administration",
    params(("tenant" = String, Path, description = "The tenant's id", example = "acme"),
           ("dek" = String, Path, description = "The data key's id", example = "019ad1b2-8c1e-7c3a-9d7e-0123456789ab")),
    responses((status = 200, description = "Revoked", body = Dek)))]
pub(in crate::http) async fn revoke(
    State(state): State<SharedState>,
    caller: Caller,
    Path((tenant, dek)): Path<(String, String)>,
) -> Result<Json<Dek>, Problem> {
    let permit = caller.admin_of(&tenant)?;
    Ok(Json(state.operations.revoke_dek(&permit, dek_id(&dek)?).await?.into()))
}

/// Restore a data key
///
/// A revoked one opens again what it sealed; it seals nothing more. Needs the verb `admin` in the tenant, or `operate`.
#[utoipa::path(post, path = "/v1/tenants/{tenant}/deks/{dek}/restore", operation_id = "restoreDek",
    tag = "administration",
    params(("tenant" = String, Path, description = "The tenant's id", example = "acme"),
           ("dek" = String, Path, description = "The data key's id", example = "019ad1b2-8c1e-7c3a-9d7e-0123456789ab")),
    responses((status = 200, description = "Restored", body = Dek)))]
pub(in crate::http) async fn restore(
    State(state): State<SharedState>,
    caller: Caller,
    Path((tenant, dek)): Path<(String, String)>,
) -> Result<Json<Dek>, Problem> {
    let permit = caller.admin_of(&tenant)?;
    Ok(Json(state.operations.restore_dek(&permit, dek_id(&dek)?).await?.into()))
}
