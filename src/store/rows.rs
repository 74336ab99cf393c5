//! Rows and records: how each record is read back, the same for every engine.
//!
//! A row is not trusted. Whatever does not parse is [`StoreError::Unreadable`] with the table and the id, and never
//! a guess: a data key read in the wrong state, or a ring without its second KEK, would do harm later and elsewhere.

use std::sync::Arc;

use envelope::{DataKeyId, EncryptionContext};
use sqlx::{ColumnIndex, Database, Decode, Row, Type};
use uuid::Uuid;

use super::{
    ApiKeyRecord, Change, DekRecord, DekScope, DekState, EnvelopeWeight, GrantRecord, GrantScope, JobKind,
    JobRecord, JobState, KekDenial, KekMaterial, KeyPolicy, KeyRecord, ShredRecord, Status, StoreError,
    StoredDek, SweepRecord, Target, TenantRecord, WrappedRecord,
};
use crate::clock::Timestamp;
use crate::tenant::{AssumedRole, Kek, KekRing, KeyName, TenantId, Verb};

/// Why a row is not a record.
type Doubt = Box<dyn std::error::Error + Send + Sync>;

/// A row of any engine whose types this registry uses.
pub(super) trait Cells {
    fn text(&self, column: &'static str) -> Result<String, sqlx::Error>;
    fn text_or_null(&self, column: &'static str) -> Result<Option<String>, sqlx::Error>;
    fn number(&self, column: &'static str) -> Result<i64, sqlx::Error>;
    fn number_or_null(&self, column: &'static str) -> Result<Option<i64>, sqlx::Error>;
    fn bytes(&self, column: &'static str) -> Result<Vec<u8>, sqlx::Error>;
    fn uuid(&self, column: &'static str) -> Result<Uuid, sqlx::Error>;
}

impl<DB: Database, R: Row<Database = DB>> Cells for R
where
    &'static str: ColumnIndex<R>,
    for<'r> String: Decode<'r, DB> + Type<DB>,
    for<'r> Option<String>: Decode<'r, DB> + Type<DB>,
    for<'r> i64: Decode<'r, DB> + Type<DB>,
    for<'r> Option<i64>: Decode<'r, DB> + Type<DB>,
    for<'r> Vec<u8>: Decode<'r, DB> + Type<DB>,
    for<'r> Uuid: Decode<'r, DB> + Type<DB>,
{
    fn text(&self, column: &'static str) -> Result<String, sqlx::Error> {
        self.try_get(column)
    }

    fn text_or_null(&self, column: &'static str) -> Result<Option<String>, sqlx::Error> {
        self.try_get(column)
    }

    fn number(&self, column: &'static str) -> Result<i64, sqlx::Error> {
        self.try_get(column)
    }

    fn number_or_null(&self, column: &'static str) -> Result<Option<i64>, sqlx::Error> {
        self.try_get(column)
    }

    fn bytes(&self, column: &'static str) -> Result<Vec<u8>, sqlx::Error> {
        self.try_get(column)
    }

    fn uuid(&self, column: &'static str) -> Result<Uuid, sqlx::Error> {
        self.try_get(column)
    }
}

/// A row of `sql::CHANGES`.
pub(super) fn change<R: Cells>(row: &R) -> Result<Change, StoreError> {
    let read = || -> Result<Change, Doubt> {
        let tenant = row.text("tenant")?;
        let tenant = if tenant.is_empty() { None } else { Some(tenant.parse()?) };
        Ok(Change { seq: row.number("seq")?.try_into()?, tenant })
    };
    read().map_err(|doubt| StoreError::Unreadable(format!("changes: {doubt}").into()))
}

/// A row of `sql::DENIALS`.
pub(super) fn kek_denial<R: Cells>(row: &R) -> Result<KekDenial, StoreError> {
    let read = || -> Result<KekDenial, Doubt> {
        Ok(KekDenial {
            seq: row.number("seq")?.try_into()?,
            kek: row.text("kek")?.parse()?,
            heard_at: Timestamp::from_unix_ms(row.number("heard_at")?),
        })
    };
    read().map_err(|doubt| StoreError::Unreadable(format!("kek_denials: {doubt}").into()))
}

/// The tenants in rows of `sql::TENANT*`: one row for each KEK, in the order of ids.
pub(super) fn tenants<R: Cells>(rows: &[R]) -> Result<Vec<TenantRecord>, StoreError> {
    records("tenants", rows, |row| row.text("id"), tenant)
}

fn tenant<R: Cells>(rows: &[R]) -> Result<TenantRecord, Doubt> {
    let first = rows.first().ok_or("no row")?;
    let (mut ring, mut former_keks) = (Vec::new(), Vec::new());
    for row in rows {
        // A tenant without any KEK comes as one row with nothing in these columns; then the ring is refused.
        match row.text_or_null("membership")?.as_deref() {
            Some("ring") => ring.push(kek(row)?),
            Some("former") => former_keks.push(kek(row)?),
            Some(other) => return Err(format!("a KEK's membership is {other:?}").into()),
            None => {}
        }
    }
    Ok(TenantRecord {
        id: first.text("id")?.parse()?,
        status: status(first)?,
        ring: KekRing::new(ring)?,
        former_keks,
        created_at: time(first, "created_at")?,
        updated_at: time(first, "updated_at")?,
        version: count(first, "version")?,
    })
}

fn kek<R: Cells>(row: &R) -> Result<Kek, Doubt> {
    let external_id: Option<Arc<str>> = row.text_or_null("external_id")?.map(Into::into);
    let role = row.text_or_null("role_arn")?.map(|arn| AssumedRole { arn: arn.into(), external_id });
    Ok(Kek { id: row.text("kek")?.parse()?, role })
}

/// The keys in rows of `sql::KEY*`.
pub(super) fn keys<R: Cells>(rows: &[R]) -> Result<Vec<KeyRecord>, StoreError> {
    let id = |row: &R| Ok(format!("{}/{}", row.text("tenant")?, row.text("name")?));
    records("keys", rows, id, |rows| key(rows.first().ok_or("no row")?))
}

fn key<R: Cells>(row: &R) -> Result<KeyRecord, Doubt> {
    let envelope = row.text("envelope")?;
    Ok(KeyRecord {
        tenant: row.text("tenant")?.parse()?,
        name: row.text("name")?.parse()?,
        status: status(row)?,
        policy: KeyPolicy {
            dek_age_secs_max: count(row, "dek_age_secs_max")?,
            dek_messages_max: count(row, "dek_messages_max")?,
            dek_bytes_max: count(row, "dek_bytes_max")?,
            envelope: EnvelopeWeight::ALL
                .into_iter()
                .find(|weight| weight.name() == envelope)
                .ok_or_else(|| format!("its envelope is {envelope:?}"))?,
        },
        created_at: time(row, "created_at")?,
        updated_at: time(row, "updated_at")?,
        version: count(row, "version")?,
    })
}

/// The data keys in rows of `sql::DEK*` and `sql::ACTIVE_DEK`: one row for each wrapped form, in the order of ids.
pub(super) fn deks<R: Cells>(rows: &[R]) -> Result<Vec<StoredDek>, StoreError> {
    records("deks", rows, |row| row.uuid("id"), dek)
}

fn dek<R: Cells>(rows: &[R]) -> Result<StoredDek, Doubt> {
    let row = rows.first().ok_or("no row")?;
    let dek = DekRecord {
        id: dek_id(row)?,
        scope: DekScope {
            tenant: row.text("tenant")?.parse()?,
            key: row.text("key_name")?.parse()?,
            bound: EncryptionContext::from_canonical(&row.bytes("bound_context")?)?,
        },
        state: dek_state(row)?,
        created_at: time(row, "created_at")?,
        activated_at: time_or_null(row, "activated_at")?,
        retired_at: time_or_null(row, "retired_at")?,
        revoked_at: time_or_null(row, "revoked_at")?,
        destroyed_at: time_or_null(row, "destroyed_at")?,
        messages: count(row, "messages")?,
        bytes: count(row, "bytes")?,
        last_sealed_at: time_or_null(row, "last_sealed_at")?,
        last_opened_at: time_or_null(row, "last_opened_at")?,
    };
    let mut wrapped = Vec::with_capacity(rows.len());
    for row in rows {
        // A data key without wrapped forms comes as one row with nothing in these columns.
        if let Some(kek) = row.text_or_null("kek")? {
            wrapped.push(WrappedRecord {
                kek: kek.parse()?,
                blob: row.bytes("blob")?,
                material: row.text_or_null("material")?,
                wrapped_at: time(row, "wrapped_at")?,
            });
        }
    }
    Ok(StoredDek { dek, wrapped })
}

/// The id of a data key.
pub(super) fn dek_id<R: Cells>(row: &R) -> Result<DataKeyId, sqlx::Error> {
    row.uuid("id").map(|id| DataKeyId::from_bytes(id.into_bytes()))
}

/// The state of a data key.
pub(super) fn dek_state<R: Cells>(row: &R) -> Result<DekState, Doubt> {
    let name = row.text("state")?;
    let known = DekState::ALL.into_iter().find(|state| state.name() == name);
    known.ok_or_else(|| format!("its state is {name:?}").into())
}

/// The API keys in rows of `sql::API_KEY*`: one row for each tenant, in the order of ids.
pub(super) fn api_keys<R: Cells>(rows: &[R]) -> Result<Vec<ApiKeyRecord>, StoreError> {
    records("api_keys", rows, |row| row.text("id"), api_key)
}

fn api_key<R: Cells>(rows: &[R]) -> Result<ApiKeyRecord, Doubt> {
    let row = rows.first().ok_or("no row")?;
    let mut tenants = Vec::with_capacity(rows.len());
    for row in rows {
        if let Some(tenant) = row.text_or_null("tenant")? {
            tenants.push(tenant.parse()?);
        }
    }
    Ok(ApiKeyRecord {
        id: row.text("id")?,
        name: row.text("name")?,
        secret_hash: row.bytes("secret_hash")?.try_into().map_err(|_| "its hash is not 32 bytes long")?,
        tenants,
        verbs: verbs(&row.text("verbs")?)?,
        created_at: time(row, "created_at")?,
        expires_at: time_or_null(row, "expires_at")?,
        revoked_at: time_or_null(row, "revoked_at")?,
    })
}

/// Verbs as one text, `encrypt,decrypt`: they are read and written together, and never searched.
pub(super) fn verbs_text(verbs: &[Verb]) -> String {
    let mut verbs = verbs.to_vec();
    verbs.sort_unstable();
    verbs.dedup();
    verbs.iter().map(|verb| verb.name()).collect::<Vec<_>>().join(",")
}

fn verbs(text: &str) -> Result<Vec<Verb>, Doubt> {
    if text.is_empty() {
        return Ok(Vec::new());
    }
    let verbs = text.split(',').map(str::parse).collect::<Result<Vec<Verb>, _>>()?;
    if verbs.is_sorted_by(|a, b| a < b) { Ok(verbs) } else { Err("its verbs are not in order".into()) }
}

/// A row of `sql::GRANTS`.
pub(super) fn grant<R: Cells>(row: &R) -> Result<GrantRecord, StoreError> {
    let read = || -> Result<GrantRecord, Doubt> {
        Ok(GrantRecord {
            id: row.text("id")?,
            tenant: row.text("tenant")?.parse()?,
            principal: row.text("principal")?,
            verbs: verbs(&row.text("verbs")?)?,
            scope: serde_json::from_str(&row.text("scope")?)?,
            created_at: time(row, "created_at")?,
            created_by: row.text("created_by")?.parse()?,
        })
    };
    read().map_err(|doubt| StoreError::Unreadable(format!("a count: {doubt}").into()))
}

/// A scope as one text: it is read and written whole, and never searched.
pub(super) fn grant_scope_text(scope: &GrantScope) -> Result<String, StoreError> {
    serde_json::to_string(scope).map_err(|error| StoreError::Unreadable(format!("grants: {error}").into()))
}

/// The one number of a row of `sql::COUNT_GRANTS`.
pub(super) fn counted<R: Cells>(row: &R) -> Result<u64, StoreError> {
    count(row, "count").map_err(|doubt| StoreError::Unreadable(format!("grants: {doubt}").into()))
}

/// A row of `sql::SWEEP`.
pub(super) fn sweep<R: Cells>(row: &R) -> Result<SweepRecord, StoreError> {
    let read = || -> Result<SweepRecord, Doubt> {
        Ok(SweepRecord {
            tenant: row.text("tenant")?.parse()?,
            due_at: time(row, "due_at")?,
            nudges: count(row, "nudges")?,
            failures: count(row, "failures")?,
            last_error: row.text_or_null("last_error")?,
            swept_at: time_or_null(row, "swept_at")?,
            full_at: time_or_null(row, "full_at")?,
            basis: row.text_or_null("basis")?,
            checked_through: row.text_or_null("checked_through")?.map(|id| id.parse()).transpose()?,
        })
    };
    read().map_err(|doubt| StoreError::Unreadable(format!("sweeps: {doubt}").into()))
}

/// A row of `sql::SHRED`.
pub(super) fn shred<R: Cells>(row: &R) -> Result<ShredRecord, StoreError> {
    let read = || -> Result<ShredRecord, Doubt> {
        Ok(ShredRecord {
            tenant: row.text("tenant")?.parse()?,
            target: target(row)?,
            requested_at: time(row, "requested_at")?,
            requested_by: row.text("requested_by")?,
            due_at: time(row, "due_at")?,
            done_at: time_or_null(row, "done_at")?,
        })
    };
    read().map_err(|doubt| StoreError::Unreadable(format!("shreds: {doubt}").into()))
}

/// A row of `sql::JOB`.
pub(super) fn job<R: Cells>(row: &R) -> Result<JobRecord, StoreError> {
    let read = || -> Result<JobRecord, Doubt> {
        let (kind, state) = (row.text("kind")?, row.text("state")?);
        Ok(JobRecord {
            id: row.text("id")?,
            kind: JobKind::ALL.into_iter().find(|known| known.name() == kind).ok_or("its kind is unknown")?,
            tenant: row.text("tenant")?.parse()?,
            target: target(row)?,
            state: JobState::ALL
                .into_iter()
                .find(|known| known.name() == state)
                .ok_or("its state is unknown")?,
            total: count(row, "total")?,
            done: count(row, "done")?,
            errors: count(row, "errors")?,
            last_error: row.text_or_null("last_error")?,
            created_at: time(row, "created_at")?,
            started_at: time_or_null(row, "started_at")?,
            updated_at: time(row, "updated_at")?,
            finished_at: time_or_null(row, "finished_at")?,
        })
    };
    read().map_err(|doubt| StoreError::Unreadable(format!("jobs: {doubt}").into()))
}

/// A row of `sql::KEK_MATERIAL`.
pub(super) fn kek_material<R: Cells>(row: &R) -> Result<KekMaterial, StoreError> {
    let read = || -> Result<KekMaterial, Doubt> {
        Ok(KekMaterial {
            kek: row.text("kek")?.parse()?,
            material: row.text("material")?,
            since: time(row, "since")?,
        })
    };
    read().map_err(|doubt| StoreError::Unreadable(format!("kek_materials: {doubt}").into()))
}

/// The row of `sql::LEASE`: holder, token, end.
pub(super) fn lease<R: Cells>(row: &R) -> Result<(String, u64, Timestamp), StoreError> {
    let read =
        || -> Result<_, Doubt> { Ok((row.text("holder")?, count(row, "token")?, time(row, "expires_at")?)) };
    read().map_err(|doubt| StoreError::Unreadable(format!("leases: {doubt}").into()))
}

/// The row of `sql::DEK_PLACE`: whose a data key is, and its state.
pub(super) fn dek_place<R: Cells>(row: &R) -> Result<(TenantId, KeyName, DekState), StoreError> {
    let read = || -> Result<_, Doubt> {
        Ok((row.text("tenant")?.parse()?, row.text("key_name")?.parse()?, dek_state(row)?))
    };
    read().map_err(|doubt| StoreError::Unreadable(format!("deks: {doubt}").into()))
}

/// The row of `sql::KEK_FORMS`: how many, the oldest.
pub(super) fn kek_forms<R: Cells>(row: &R) -> Result<(u64, Option<Timestamp>), StoreError> {
    let read = || -> Result<_, Doubt> { Ok((count(row, "deks")?, time_or_null(row, "oldest")?)) };
    read().map_err(|doubt| StoreError::Unreadable(format!("wrapped_forms: {doubt}").into()))
}

/// The row of `sql::KEK_RINGS`.
pub(super) fn kek_rings<R: Cells>(row: &R) -> Result<u64, StoreError> {
    count(row, "rings").map_err(|doubt| StoreError::Unreadable(format!("tenant_keks: {doubt}").into()))
}

fn target<R: Cells>(row: &R) -> Result<Target, Doubt> {
    let name = row.text("target")?;
    Target::parse(&name).ok_or_else(|| format!("its target is {name:?}").into())
}

/// A count as the database holds it.
pub(super) fn saturated(count: u64) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

/// A data key's id as the database holds it.
pub(super) fn uuid(id: DataKeyId) -> Uuid {
    Uuid::from_bytes(*id.as_bytes())
}

/// That a record does not parse.
pub(super) fn unreadable(table: &str, id: &str, why: impl std::fmt::Display) -> StoreError {
    StoreError::Unreadable(format!("{table} {id}: {why}").into())
}

/// Cuts rows, ordered by id, into records.
fn records<R, I: PartialEq + std::fmt::Display, T>(
    table: &str,
    rows: &[R],
    id: impl Fn(&R) -> Result<I, sqlx::Error>,
    parse: impl Fn(&[R]) -> Result<T, Doubt>,
) -> Result<Vec<T>, StoreError> {
    let ids = rows
        .iter()
        .map(|row| id(row).map_err(|why| unreadable(table, "whose id does not parse", why)))
        .collect::<Result<Vec<I>, _>>()?;
    let mut rest = rows;
    let mut found = Vec::new();
    for chunk in ids.chunk_by(PartialEq::eq) {
        let (these, others) = rest.split_at(chunk.len());
        found.push(parse(these).map_err(|why| unreadable(table, &chunk[0].to_string(), why))?);
        rest = others;
    }
    Ok(found)
}

fn status<R: Cells>(row: &R) -> Result<Status, Doubt> {
    let name = row.text("status")?;
    let known = Status::ALL.into_iter().find(|status| status.name() == name);
    known.ok_or_else(|| format!("its status is {name:?}").into())
}

fn count<R: Cells>(row: &R, column: &'static str) -> Result<u64, Doubt> {
    let number = row.number(column)?;
    u64::try_from(number).map_err(|_| format!("{column} is {number}").into())
}

fn time<R: Cells>(row: &R, column: &'static str) -> Result<Timestamp, sqlx::Error> {
    row.number(column).map(Timestamp::from_unix_ms)
}

fn time_or_null<R: Cells>(row: &R, column: &'static str) -> Result<Option<Timestamp>, sqlx::Error> {
    Ok(row.number_or_null(column)?.map(Timestamp::from_unix_ms))
}
