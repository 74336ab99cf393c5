//! Denials by KEKs' owners.

use super::{SqliteStore, failure};
use crate::clock::Timestamp;
use crate::store::{KekDenial, StoreError, rows, sql};
use crate::tenant::KekId;

pub(super) async fn note(
    store: &SqliteStore,
    kek: &KekId,
    now: Timestamp,
    forget_before: Timestamp,
) -> Result<u64, StoreError> {
    let mut change = store.change().await?;
    let noted = sqlx::query(sql::NOTE_DENIAL)
        .bind(kek.as_str())
        .bind(now.unix_ms())
        .fetch_one(&mut *change)
        .await
        .map_err(failure::of)?;
    let noted = rows::kek_denial(&noted)?;
    sqlx::query(sql::FORGET_DENIALS)
        .bind(forget_before.unix_ms())
        .bind(rows::saturated(noted.seq))
        .execute(&mut *change)
        .await
        .map_err(failure::of)?;
    change.commit().await.map_err(failure::of)?;
    Ok(noted.seq)
}

pub(super) async fn after(store: &SqliteStore, after: u64) -> Result<Vec<KekDenial>, StoreError> {
    let found = sqlx::query(sql::DENIALS)
        .bind(rows::saturated(after))
        .fetch_all(&store.readers)
        .await
        .map_err(failure::of)?;
    found.iter().map(rows::kek_denial).collect()
}
