//! Data keys: their lives, wrapped forms and usage.

use envelope::{DataKeyId, EncryptionContext};
use sqlx::{Sqlite, SqliteConnection, Transaction};

use super::{SqliteStore, failure};
use crate::clock::Timestamp;
use crate::store::{
    Activation, DekRecord, DekScope, DekState, StoreError, StoredDek, Usage, WrappedRecord, rows, sql,
};
use crate::tenant::{KekId, KeyName, TenantId};

pub(super) async fn activate(
    store: &SqliteStore,
    predecessor: Option<DataKeyId>,
    new: &DekRecord,
    wrapped: &[WrappedRecord],
) -> Result<Activation, StoreError> {
    check_new(new, DekState::Active, wrapped)?;
    let mut change = store.change().await?;
    let active = id_of(&mut change, sql::ACTIVE_DEK_ID, &new.scope).await?;
    if let Some(active) = active {
        if predecessor != Some(active) {
            return taken(change, active).await;
        }
        step(&mut change, active, DekState::Active, DekState::Retired, new.created_at).await?;
    }
    insert(&mut change, new, wrapped).await?;
    change.commit().await.map_err(failure::of)?;
    Ok(Activation::Done)
}

pub(super) async fn insert_next(
    store: &SqliteStore,
    next: &DekRecord,
    wrapped: &[WrappedRecord],
) -> Result<Activation, StoreError> {
    check_new(next, DekState::Next, wrapped)?;
    let mut change = store.change().await?;
    if let Some(waiting) = id_of(&mut change, sql::NEXT_DEK_ID, &next.scope).await? {
        return taken(change, waiting).await;
    }
    insert(&mut change, next, wrapped).await?;
    change.commit().await.map_err(failure::of)?;
    Ok(Activation::Done)
}

pub(super) async fn promote_next(
    store: &SqliteStore,
    scope: &DekScope,
    predecessor: DataKeyId,
    now: Timestamp,
) -> Result<Option<StoredDek>, StoreError> {
    let mut change = store.change().await?;
    let stored = match promote_in(&mut change, scope, predecessor, now).await? {
        Some(id) => by_id(&mut *change, id).await?,
        None => None,
    };
    change.commit().await.map_err(failure::of)?;
    Ok(stored)
}

/// The same within a change. Returns the data key that is active afterwards.
pub(super) async fn promote_in(
    change: &mut SqliteConnection,
    scope: &DekScope,
    predecessor: DataKeyId,
    now: Timestamp,
) -> Result<Option<DataKeyId>, StoreError> {
    let active = id_of(change, sql::ACTIVE_DEK_ID, scope).await?;
    let next = id_of(change, sql::NEXT_DEK_ID, scope).await?;
    Ok(match (active, next) {
        (active, Some(next)) if active.is_none_or(|active| active == predecessor) => {
            if let Some(active) = active {
                step(change, active, DekState::Active, DekState::Retired, now).await?;
            }
            step(change, next, DekState::Next, DekState::Active, now).await?;
            Some(next)
        }
        (active, _) => active,
    })
}

pub(super) async fn active(store: &SqliteStore, scope: &DekScope) -> Result<Option<StoredDek>, StoreError> {
    of_scope(store, sql::ACTIVE_DEK, scope).await
}

pub(super) async fn next(store: &SqliteStore, scope: &DekScope) -> Result<Option<StoredDek>, StoreError> {
    of_scope(store, sql::NEXT_DEK, scope).await
}

async fn of_scope(
    store: &SqliteStore,
    statement: &'static str,
    scope: &DekScope,
) -> Result<Option<StoredDek>, StoreError> {
    let found = sqlx::query(statement)
        .bind(scope.tenant.as_str())
        .bind(scope.key.as_str())
        .bind(scope.bound.canonical())
        .fetch_all(&store.readers)
        .await
        .map_err(failure::of)?;
    Ok(rows::deks(&found)?.pop())
}

pub(super) async fn dek(store: &SqliteStore, id: DataKeyId) -> Result<Option<StoredDek>, StoreError> {
    by_id(&store.readers, id).await
}

pub(super) async fn bound_scopes(store: &SqliteStore, tenant: &TenantId) -> Result<u64, StoreError> {
    let count: i64 = sqlx::query_scalar(sql::BOUND_SCOPES)
        .bind(tenant.as_str())
        .bind(EncryptionContext::new().canonical())
        .fetch_one(&store.readers)
        .await
        .map_err(failure::of)?;
    Ok(u64::try_from(count).unwrap_or(0))
}

pub(super) async fn deks(
    store: &SqliteStore,
    tenant: &TenantId,
    key: &KeyName,
    after: Option<DataKeyId>,
    limit: u32,
) -> Result<Vec<StoredDek>, StoreError> {
    let found = sqlx::query(sql::DEKS)
        .bind(tenant.as_str())
        .bind(key.as_str())
        .bind(after.map_or(uuid::Uuid::nil(), rows::uuid))
        .bind(i64::from(limit))
        .fetch_all(&store.readers)
        .await
        .map_err(failure::of)?;
    rows::deks(&found)
}

pub(super) async fn set_state(
    store: &SqliteStore,
    id: DataKeyId,
    from: DekState,
    to: DekState,
    now: Timestamp,
) -> Result<(), StoreError> {
    let mut change = store.change().await?;
    let found = state_of(&mut change, id).await?;
    if found != from {
        return Err(StoreError::Conflict(
            format!("data key {id} is {}, not {}", found.name(), from.name()).into(),
        ));
    }
    if !from.may_become(to) {
        let why = format!("data key {id} is {} and cannot become {}", from.name(), to.name());
        return Err(StoreError::Conflict(why.into()));
    }
    move_in(&mut change, id, from, to, now).await?;
    change.commit().await.map_err(failure::of)
}

/// Moves a data key that is known to be in state `from`; what is destroyed loses its wrapped forms.
pub(super) async fn move_in(
    change: &mut SqliteConnection,
    id: DataKeyId,
    from: DekState,
    to: DekState,
    now: Timestamp,
) -> Result<(), StoreError> {
    step(change, id, from, to, now).await?;
    if to == DekState::Destroyed {
        sqlx::query(sql::DELETE_ALL_WRAPPED)
            .bind(rows::uuid(id))
            .execute(change)
            .await
            .map_err(failure::of)?;
    }
    Ok(())
}

pub(super) async fn put_wrapped(
    store: &SqliteStore,
    id: DataKeyId,
    wrapped: &WrappedRecord,
) -> Result<(), StoreError> {
    let mut change = store.change().await?;
    put_wrapped_in(&mut change, id, wrapped).await?;
    change.commit().await.map_err(failure::of)
}

/// The same within a change.
pub(super) async fn put_wrapped_in(
    change: &mut SqliteConnection,
    id: DataKeyId,
    wrapped: &WrappedRecord,
) -> Result<(), StoreError> {
    if state_of(change, id).await? == DekState::Destroyed {
        return Err(StoreError::Conflict(
            format!("data key {id} is destroyed and takes no wrapped form").into(),
        ));
    }
    write_wrapped(change, id, wrapped).await
}

pub(super) async fn remove_wrapped(
    store: &SqliteStore,
    id: DataKeyId,
    kek: &KekId,
) -> Result<(), StoreError> {
    let mut change = store.change().await?;
    remove_wrapped_in(&mut change, id, kek).await?;
    change.commit().await.map_err(failure::of)
}

/// The same within a change, which must not be committed after an error.
pub(super) async fn remove_wrapped_in(
    change: &mut SqliteConnection,
    id: DataKeyId,
    kek: &KekId,
) -> Result<(), StoreError> {
    let removed = sqlx::query(sql::DELETE_WRAPPED)
        .bind(rows::uuid(id))
        .bind(kek.as_str())
        .execute(&mut *change)
        .await
        .map_err(failure::of)?;
    if removed.rows_affected() > 0 {
        let other = sqlx::query(sql::OTHER_WRAPPED)
            .bind(rows::uuid(id))
            .bind(kek.as_str())
            .fetch_optional(change)
            .await
            .map_err(failure::of)?;
        if other.is_none() {
            let why = format!("the wrapped form under {kek} is the last one of data key {id}");
            return Err(StoreError::Conflict(why.into()));
        }
    }
    Ok(())
}

pub(super) async fn add_usage(store: &SqliteStore, usage: &[Usage]) -> Result<(), StoreError> {
    if usage.is_empty() {
        return Ok(());
    }
    let mut change = store.change().await?;
    for used in usage {
        sqlx::query(sql::ADD_USAGE)
            .bind(rows::uuid(used.id))
            .bind(rows::saturated(used.messages))
            .bind(rows::saturated(used.bytes))
            .bind(used.last_sealed_at.map(Timestamp::unix_ms))
            .bind(used.last_opened_at.map(Timestamp::unix_ms))
            .execute(&mut *change)
            .await
            .map_err(failure::of)?;
    }
    change.commit().await.map_err(failure::of)
}

/// What no data key may be put in place without.
fn check_new(new: &DekRecord, state: DekState, wrapped: &[WrappedRecord]) -> Result<(), StoreError> {
    if new.state != state {
        let why = format!("data key {} is {}, not {}", new.id, new.state.name(), state.name());
        return Err(StoreError::Conflict(why.into()));
    }
    if wrapped.is_empty() {
        return Err(StoreError::Conflict(format!("data key {} comes without a wrapped form", new.id).into()));
    }
    Ok(())
}

/// Gives up the change and tells who has the place.
async fn taken(mut change: Transaction<'static, Sqlite>, by: DataKeyId) -> Result<Activation, StoreError> {
    let stored = by_id(&mut *change, by).await?;
    change.rollback().await.map_err(failure::of)?;
    let stored = stored.ok_or_else(|| rows::unreadable("deks", &by.to_string(), "it is gone"))?;
    Ok(Activation::Taken(Box::new(stored)))
}

async fn insert(
    change: &mut SqliteConnection,
    dek: &DekRecord,
    wrapped: &[WrappedRecord],
) -> Result<(), StoreError> {
    let ms = |at: Option<Timestamp>| at.map(Timestamp::unix_ms);
    sqlx::query(sql::INSERT_DEK)
        .bind(rows::uuid(dek.id))
        .bind(dek.scope.tenant.as_str())
        .bind(dek.scope.key.as_str())
        .bind(dek.scope.bound.canonical())
        .bind(dek.state.name())
        .bind(dek.created_at.unix_ms())
        .bind(ms(dek.activated_at))
        .bind(ms(dek.retired_at))
        .bind(ms(dek.revoked_at))
        .bind(ms(dek.destroyed_at))
        .bind(rows::saturated(dek.messages))
        .bind(rows::saturated(dek.bytes))
        .bind(ms(dek.last_sealed_at))
        .bind(ms(dek.last_opened_at))
        .execute(&mut *change)
        .await
        .map_err(failure::naming(
            || format!("data key {}", dek.id),
            || format!("key {} of tenant {}", dek.scope.key, dek.scope.tenant),
        ))?;
    for form in wrapped {
        write_wrapped(change, dek.id, form).await?;
    }
    Ok(())
}

async fn write_wrapped(
    change: &mut SqliteConnection,
    id: DataKeyId,
    wrapped: &WrappedRecord,
) -> Result<(), StoreError> {
    sqlx::query(sql::PUT_WRAPPED)
        .bind(rows::uuid(id))
        .bind(wrapped.kek.as_str())
        .bind(&wrapped.blob)
        .bind(&wrapped.material)
        .bind(wrapped.wrapped_at.unix_ms())
        .execute(change)
        .await
        .map_err(failure::of)?;
    Ok(())
}

/// Moves a data key that is known to be in state `from`: the change holds the write lock.
async fn step(
    change: &mut SqliteConnection,
    id: DataKeyId,
    from: DekState,
    to: DekState,
    now: Timestamp,
) -> Result<(), StoreError> {
    sqlx::query(sql::MOVE_DEK)
        .bind(rows::uuid(id))
        .bind(from.name())
        .bind(to.name())
        .bind(now.unix_ms())
        .execute(change)
        .await
        .map_err(failure::of)?;
    Ok(())
}

/// The active or the waiting data key of a scope, depending on the statement.
async fn id_of(
    change: &mut SqliteConnection,
    statement: &'static str,
    scope: &DekScope,
) -> Result<Option<DataKeyId>, StoreError> {
    let row = sqlx::query(statement)
        .bind(scope.tenant.as_str())
        .bind(scope.key.as_str())
        .bind(scope.bound.canonical())
        .fetch_optional(change)
        .await
        .map_err(failure::of)?;
    row.map(|row| rows::dek_id(&row)).transpose().map_err(failure::of)
}

pub(super) async fn state_of(change: &mut SqliteConnection, id: DataKeyId) -> Result<DekState, StoreError> {
    let row = sqlx::query(sql::DEK_STATE)
        .bind(rows::uuid(id))
        .fetch_optional(change)
        .await
        .map_err(failure::of)?
        .ok_or_else(|| StoreError::Missing(format!("data key {id}").into()))?;
    rows::dek_state(&row).map_err(|why| rows::unreadable("deks", &id.to_string(), why))
}

async fn by_id<'c>(
    executor: impl sqlx::SqliteExecutor<'c>,
    id: DataKeyId,
) -> Result<Option<StoredDek>, StoreError> {
    let found = sqlx::query(sql::DEK).bind(rows::uuid(id)).fetch_all(executor).await.map_err(failure::of)?;
    Ok(rows::deks(&found)?.pop())
}
