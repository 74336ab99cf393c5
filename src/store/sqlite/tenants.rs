//! Tenants and their keys.

use sqlx::{Row, SqliteConnection};

use super::{SqliteStore, failure};
use crate::clock::Timestamp;
use crate::store::{Change, KeyRecord, StoreError, TenantRecord, rows, sql};
use crate::tenant::{KeyName, TenantId};

pub(super) async fn insert_tenant(store: &SqliteStore, tenant: &TenantRecord) -> Result<(), StoreError> {
    let mut change = store.change().await?;
    add_tenant(&mut change, tenant).await?;
    change.commit().await.map_err(failure::of)
}

pub(super) async fn insert_tenant_with_key(
    store: &SqliteStore,
    tenant: &TenantRecord,
    key: &KeyRecord,
) -> Result<(), StoreError> {
    let mut change = store.change().await?;
    add_tenant(&mut change, tenant).await?;
    add_key(&mut change, key).await?;
    change.commit().await.map_err(failure::of)
}

async fn add_tenant(change: &mut SqliteConnection, tenant: &TenantRecord) -> Result<(), StoreError> {
    sqlx::query(sql::INSERT_TENANT)
        .bind(tenant.id.as_str())
        .bind(tenant.status.name())
        .bind(tenant.created_at.unix_ms())
        .bind(tenant.updated_at.unix_ms())
        .execute(&mut *change)
        .await
        .map_err(failure::naming(|| format!("tenant {}", tenant.id), || format!("tenant {}", tenant.id)))?;
    insert_keks(change, tenant).await?;
    nudge(change, &tenant.id, tenant.created_at).await
}

/// Has rotation look at a tenant.
pub(super) async fn nudge(
    change: &mut SqliteConnection,
    tenant: &TenantId,
    now: Timestamp,
) -> Result<(), StoreError> {
    sqlx::query(sql::NUDGE_SWEEP)
        .bind(tenant.as_str())
        .bind(now.unix_ms())
        .execute(change)
        .await
        .map_err(failure::naming(|| format!("tenant {tenant}"), || format!("tenant {tenant}")))?;
    Ok(())
}

pub(super) async fn tenant(store: &SqliteStore, id: &TenantId) -> Result<Option<TenantRecord>, StoreError> {
    let found =
        sqlx::query(sql::TENANT).bind(id.as_str()).fetch_all(&store.readers).await.map_err(failure::of)?;
    Ok(rows::tenants(&found)?.pop())
}

pub(super) async fn tenants(
    store: &SqliteStore,
    after: Option<&TenantId>,
    limit: u32,
) -> Result<Vec<TenantRecord>, StoreError> {
    let found = sqlx::query(sql::TENANTS)
        .bind(after.map_or("", TenantId::as_str))
        .bind(i64::from(limit))
        .fetch_all(&store.readers)
        .await
        .map_err(failure::of)?;
    rows::tenants(&found)
}

pub(super) async fn update_tenant(store: &SqliteStore, record: &TenantRecord) -> Result<(), StoreError> {
    let mut change = store.change().await?;
    let updated = sqlx::query(sql::UPDATE_TENANT)
        .bind(record.id.as_str())
        .bind(rows::saturated(record.version))
        .bind(record.status.name())
        .bind(record.updated_at.unix_ms())
        .execute(&mut *change)
        .await
        .map_err(failure::of)?;
    if updated.rows_affected() == 0 {
        let found = sqlx::query(sql::TENANT_VERSION)
            .bind(record.id.as_str())
            .fetch_optional(&mut *change)
            .await
            .map_err(failure::of)?;
        return Err(version_moved(found.as_ref(), &format!("tenant {}", record.id), record.version));
    }
    sqlx::query(sql::DELETE_TENANT_KEKS)
        .bind(record.id.as_str())
        .execute(&mut *change)
        .await
        .map_err(failure::of)?;
    insert_keks(&mut change, record).await?;
    nudge(&mut change, &record.id, record.updated_at).await?;
    change.commit().await.map_err(failure::of)
}

async fn insert_keks(change: &mut SqliteConnection, tenant: &TenantRecord) -> Result<(), StoreError> {
    let members = tenant.ring.members().iter().enumerate().map(|(at, kek)| ("ring", at, kek));
    let former = tenant.former_keks.iter().enumerate().map(|(at, kek)| ("former", at, kek));
    for (membership, at, kek) in members.chain(former) {
        let role = kek.role.as_ref();
        sqlx::query(sql::INSERT_TENANT_KEK)
            .bind(tenant.id.as_str())
            .bind(membership)
            .bind(i64::try_from(at).unwrap_or(i64::MAX))
            .bind(kek.id.as_str())
            .bind(role.map(|role| &*role.arn))
            .bind(role.and_then(|role| role.external_id.as_deref()))
            .execute(&mut *change)
            .await
            .map_err(failure::of)?;
    }
    Ok(())
}

pub(super) async fn insert_key(store: &SqliteStore, key: &KeyRecord) -> Result<(), StoreError> {
    let mut change = store.change().await?;
    add_key(&mut change, key).await?;
    change.commit().await.map_err(failure::of)
}

async fn add_key(change: &mut SqliteConnection, key: &KeyRecord) -> Result<(), StoreError> {
    sqlx::query(sql::INSERT_KEY)
        .bind(key.tenant.as_str())
        .bind(key.name.as_str())
        .bind(key.status.name())
        .bind(rows::saturated(key.policy.dek_age_secs_max))
        .bind(rows::saturated(key.policy.dek_messages_max))
        .bind(rows::saturated(key.policy.dek_bytes_max))
        .bind(key.policy.envelope.name())
        .bind(key.created_at.unix_ms())
        .bind(key.updated_at.unix_ms())
        .execute(change)
        .await
        .map_err(failure::naming(
            || format!("key {} of tenant {}", key.name, key.tenant),
            || format!("tenant {}", key.tenant),
        ))?;
    Ok(())
}

pub(super) async fn key(
    store: &SqliteStore,
    tenant: &TenantId,
    name: &KeyName,
) -> Result<Option<KeyRecord>, StoreError> {
    let found = sqlx::query(sql::KEY)
        .bind(tenant.as_str())
        .bind(name.as_str())
        .fetch_all(&store.readers)
        .await
        .map_err(failure::of)?;
    Ok(rows::keys(&found)?.pop())
}

pub(super) async fn keys(
    store: &SqliteStore,
    tenant: &TenantId,
    after: Option<&KeyName>,
    limit: u32,
) -> Result<Vec<KeyRecord>, StoreError> {
    let found = sqlx::query(sql::KEYS)
        .bind(tenant.as_str())
        .bind(after.map_or("", KeyName::as_str))
        .bind(i64::from(limit))
        .fetch_all(&store.readers)
        .await
        .map_err(failure::of)?;
    rows::keys(&found)
}

pub(super) async fn count_keys(store: &SqliteStore, tenant: &TenantId) -> Result<u64, StoreError> {
    let query = sqlx::query(sql::COUNT_KEYS).bind(tenant.as_str());
    rows::counted(&query.fetch_one(&store.readers).await.map_err(failure::of)?)
}

pub(super) async fn update_key(store: &SqliteStore, record: &KeyRecord) -> Result<(), StoreError> {
    let mut change = store.change().await?;
    let updated = sqlx::query(sql::UPDATE_KEY)
        .bind(record.tenant.as_str())
        .bind(record.name.as_str())
        .bind(rows::saturated(record.version))
        .bind(record.status.name())
        .bind(rows::saturated(record.policy.dek_age_secs_max))
        .bind(rows::saturated(record.policy.dek_messages_max))
        .bind(rows::saturated(record.policy.dek_bytes_max))
        .bind(record.policy.envelope.name())
        .bind(record.updated_at.unix_ms())
        .execute(&mut *change)
        .await
        .map_err(failure::of)?;
    if updated.rows_affected() == 0 {
        let found = sqlx::query(sql::KEY_VERSION)
            .bind(record.tenant.as_str())
            .bind(record.name.as_str())
            .fetch_optional(&mut *change)
            .await
            .map_err(failure::of)?;
        let what = format!("key {} of tenant {}", record.name, record.tenant);
        return Err(version_moved(found.as_ref(), &what, record.version));
    }
    change.commit().await.map_err(failure::of)
}

/// Why a change that names a version found no row.
fn version_moved(found: Option<&sqlx::sqlite::SqliteRow>, what: &str, seen: u64) -> StoreError {
    match found.map(|row| row.try_get::<i64, _>("version")) {
        None => StoreError::Missing(what.into()),
        Some(Ok(version)) => StoreError::Conflict(
            format!("{what} is at version {version}, and the change was to {seen}").into(),
        ),
        Some(Err(error)) => rows::unreadable("version of", what, error),
    }
}

pub(super) async fn changes(store: &SqliteStore, after: u64) -> Result<Vec<Change>, StoreError> {
    let found = sqlx::query(sql::CHANGES)
        .bind(i64::try_from(after).unwrap_or(i64::MAX))
        .fetch_all(&store.readers)
        .await
        .map_err(failure::of)?;
    found.iter().map(rows::change).collect()
}
