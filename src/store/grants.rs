//! Grants: what principals hold in a tenant beside what their credential and the configuration give.

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

use super::StoreError;
use crate::clock::Timestamp;
use crate::tenant::{PrincipalId, TenantId, Verb};

/// Where grants live. As with [`super::Store`], a change that returns `Ok` is durable, and whole or not at all; it
/// shows in [`super::Store::changes`] under no tenant.
#[async_trait]
pub trait GrantStore: Send + Sync {
    /// Adds a grant. [`StoreError::Conflict`] where its id is taken, [`StoreError::Missing`] where there is no such
    /// tenant.
    async fn insert_grant(&self, grant: &GrantRecord) -> Result<(), StoreError>;

    /// The grants in a tenant (all where none is named), by id, which is the order of making.
    async fn grants(
        &self,
        tenant: Option<&TenantId>,
        after: Option<&str>,
        limit: u32,
    ) -> Result<Vec<GrantRecord>, StoreError>;

    /// How many grants there are in a tenant.
    async fn count_grants(&self, tenant: &TenantId) -> Result<u64, StoreError>;

    /// Deletes a grant of a tenant. [`StoreError::Missing`] where there is none.
    async fn delete_grant(&self, tenant: &TenantId, id: &str) -> Result<(), StoreError>;
}

/// A grant as stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GrantRecord {
    /// A UUIDv7 in text form.
    pub id: String,
    /// In which tenant.
    pub tenant: TenantId,
    /// To whom: a principal, or with a `*` at the end all that begin so.
    pub principal: String,
    /// What; sorted, none twice.
    pub verbs: Vec<Verb>,
    /// With what.
    pub scope: GrantScope,
    /// When it was made.
    pub created_at: Timestamp,
    /// By whom.
    pub created_by: PrincipalId,
}

impl GrantRecord {
    /// An id for a grant that is made now. `random` makes it unique among those of the same millisecond.
    pub fn new_id(now: Timestamp, random: [u8; 10]) -> String {
        let unix_ms = u64::try_from(now.unix_ms()).unwrap_or(0);
        uuid::Builder::from_unix_timestamp_millis(unix_ms, &random).into_uuid().to_string()
    }

    /// Whether this may be the id of a grant.
    pub fn is_id(text: &str) -> bool {
        uuid::Uuid::try_parse(text).is_ok_and(|id| id.hyphenated().to_string() == text)
    }
}

/// With which keys and encryption contexts, as written.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GrantScope {
    /// Only these keys, or with a `*` at the end those that begin so; all where there is nothing.
    pub keys: Option<Vec<String>>,
    /// Only contexts that meet each of these.
    pub context: Vec<GrantCondition>,
}

/// A pair that the encryption context must hold.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GrantCondition {
    /// The pair's name.
    pub name: String,
    /// One of these is its value, or with a `*` at the end it begins so.
    pub values: Vec<String>,
}
