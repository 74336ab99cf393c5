//! Tenants and keys as the registry last told, for the paths that miss.

use std::sync::Arc;

use super::PoolError;
use crate::clock::Clock;
use crate::store::watch::{ChangeWatch, Mark};
use crate::store::{KeyRecord, Status, Store, TenantRecord};
use crate::tenant::{KeyName, TenantId};

/// How many records of a kind are remembered.
const REMEMBERED_MAX: u64 = 10_000;

/// Tenants and keys, remembered until they change.
pub(super) struct Directory {
    store: Arc<dyn Store>,
    watch: Arc<ChangeWatch>,
    clock: Clock,
    tenants: moka::sync::Cache<TenantId, (u64, Arc<TenantRecord>)>,
    keys: moka::sync::Cache<(TenantId, KeyName), (u64, Arc<KeyRecord>)>,
}

impl Directory {
    pub(super) fn new(store: Arc<dyn Store>, watch: Arc<ChangeWatch>, clock: Clock) -> Self {
        let (tenants, keys) =
            (moka::sync::Cache::new(REMEMBERED_MAX), moka::sync::Cache::new(REMEMBERED_MAX));
        Self { store, watch, clock, tenants, keys }
    }

    pub(super) fn mark(&self, tenant: &TenantId) -> Arc<Mark> {
        self.watch.mark(Some(tenant))
    }

    /// A tenant that is served.
    pub(super) async fn tenant(&self, id: &TenantId) -> Result<Arc<TenantRecord>, PoolError> {
        let seen_mark = self.mark(id).now();
        let record = match self.tenants.get(id) {
            Some((mark, record)) if self.holds(mark, seen_mark) => record,
            _ => {
                let record = Arc::new(self.store.tenant(id).await?.ok_or(PoolError::NoTenant)?);
                self.tenants.insert(id.clone(), (seen_mark, Arc::clone(&record)));
                record
            }
        };
        match record.status {
            Status::Enabled => Ok(record),
            Status::Disabled => Err(PoolError::TenantDisabled),
        }
    }

    /// A key that is served.
    pub(super) async fn key(&self, tenant: &TenantId, name: &KeyName) -> Result<Arc<KeyRecord>, PoolError> {
        let seen_mark = self.mark(tenant).now();
        let slot = (tenant.clone(), name.clone());
        let record = match self.keys.get(&slot) {
            Some((mark, record)) if self.holds(mark, seen_mark) => record,
            _ => {
                let record = self.store.key(tenant, name).await?;
                let record = Arc::new(record.ok_or_else(|| PoolError::NoKey(name.clone()))?);
                self.keys.insert(slot, (seen_mark, Arc::clone(&record)));
                record
            }
        };
        match record.status {
            Status::Enabled => Ok(record),
            Status::Disabled => Err(PoolError::KeyDisabled(name.clone())),
        }
    }

    fn holds(&self, remembered_mark: u64, mark: u64) -> bool {
        remembered_mark == mark && self.watch.is_current(self.clock.monotonic())
    }
}
