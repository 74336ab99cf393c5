//! API keys.

use super::{SqliteStore, failure};
use crate::clock::Timestamp;
use crate::store::{ApiKeyRecord, StoreError, rows, sql};
use crate::tenant::TenantId;

pub(super) async fn insert(store: &SqliteStore, key: &ApiKeyRecord) -> Result<(), StoreError> {
    let mut tenants = key.tenants.clone();
    tenants.sort_unstable();
    tenants.dedup();
    let mut change = store.change().await?;
    sqlx::query(sql::INSERT_API_KEY)
        .bind(&key.id)
        .bind(&key.name)
        .bind(&key.secret_hash[..])
        .bind(rows::verbs_text(&key.verbs))
        .bind(key.created_at.unix_ms())
        .bind(key.expires_at.map(Timestamp::unix_ms))
        .bind(key.revoked_at.map(Timestamp::unix_ms))
        .execute(&mut *change)
        .await
        .map_err(failure::naming(|| format!("API key {}", key.id), || format!("API key {}", key.id)))?;
    for tenant in &tenants {
        sqlx::query(sql::INSERT_API_KEY_TENANT)
            .bind(&key.id)
            .bind(tenant.as_str())
            .execute(&mut *change)
            .await
            .map_err(failure::naming(|| format!("API key {}", key.id), || format!("tenant {tenant}")))?;
    }
    change.commit().await.map_err(failure::of)
}

pub(super) async fn api_key(store: &SqliteStore, id: &str) -> Result<Option<ApiKeyRecord>, StoreError> {
    let found = sqlx::query(sql::API_KEY).bind(id).fetch_all(&store.readers).await.map_err(failure::of)?;
    Ok(rows::api_keys(&found)?.pop())
}

pub(super) async fn api_keys(
    store: &SqliteStore,
    tenant: Option<&TenantId>,
    after: Option<&str>,
    limit: u32,
) -> Result<Vec<ApiKeyRecord>, StoreError> {
    let query = match tenant {
        Some(tenant) => sqlx::query(sql::API_KEYS_OF_TENANT).bind(tenant.as_str()),
        None => sqlx::query(sql::API_KEYS),
    };
    let found = query
        .bind(after.unwrap_or(""))
        .bind(i64::from(limit))
        .fetch_all(&store.readers)
        .await
        .map_err(failure::of)?;
    rows::api_keys(&found)
}

pub(super) async fn revoke(store: &SqliteStore, id: &str, now: Timestamp) -> Result<(), StoreError> {
    let revoked = sqlx::query(sql::REVOKE_API_KEY)
        .bind(id)
        .bind(now.unix_ms())
        .execute(&store.writer)
        .await
        .map_err(failure::of)?;
    if revoked.rows_affected() == 0 {
        return Err(StoreError::Missing(format!("API key {id}").into()));
    }
    Ok(())
}

pub(super) async fn release(store: &SqliteStore, id: &str, tenant: &TenantId) -> Result<(), StoreError> {
    let mut change = store.change().await?;
    let query = sqlx::query(sql::RELEASE_API_KEY).bind(id).bind(tenant.as_str());
    if query.execute(&mut *change).await.map_err(failure::of)?.rows_affected() == 0 {
        return Err(StoreError::Missing(format!("API key {id} of tenant {tenant}").into()));
    }
    sqlx::query(sql::TOUCH_API_KEY).bind(id).execute(&mut *change).await.map_err(failure::of)?;
    change.commit().await.map_err(failure::of)
}

pub(super) async fn count(store: &SqliteStore, tenant: &TenantId, now: Timestamp) -> Result<u64, StoreError> {
    let query = sqlx::query(sql::COUNT_API_KEYS).bind(tenant.as_str()).bind(now.unix_ms());
    rows::counted(&query.fetch_one(&store.readers).await.map_err(failure::of)?)
}
