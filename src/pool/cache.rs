//! Which data keys are in memory: bounded in all and for each tenant, and wiped on the way out.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use envelope::DataKeyId;
use moka::policy::EvictionPolicy;

use super::live::{LiveDek, SharedDek};
use crate::tenant::{KekId, TenantId};

/// A tenant is part of the key: another tenant's data key cannot be found, whatever id is asked for.
type Slot = (TenantId, DataKeyId);

/// How many data keys that have left may wait for their counts to be flushed, while the registry is down.
const DEPARTED_MAX: usize = 100_000;

/// The data keys in memory.
pub(super) struct Cache {
    /// Decides who stays.
    live: moka::sync::Cache<Slot, SharedDek>,
    per_tenant_max: usize,
    members: Arc<Members>,
}

/// Who is in, and who has left with counts that are not in the registry yet.
#[derive(Default)]
struct Members {
    /// The same as in the cache, for the requests: they find their data key without the cache's bookkeeping.
    index: papaya::HashMap<Slot, SharedDek>,
    register: Mutex<Register>,
}

#[derive(Default)]
struct Register {
    tenants: HashMap<TenantId, Vec<SharedDek>>,
    departed: Vec<SharedDek>,
}

impl Members {
    fn register(&self) -> MutexGuard<'_, Register> {
        self.register.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wipes a data key, takes it off its tenant's list, and remembers it until its counts are flushed.
    fn forget(&self, live: &SharedDek) {
        live.wipe();
        let slot = (live.scope.tenant.clone(), live.id);
        let _ = self.index.pin().remove_if(&slot, |_, there| Arc::ptr_eq(there, live));
        self.take_off(live);
        // Whoever had the KMS vouch for it meanwhile has found it on the list, where nothing finds it any more.
        live.wipe();
    }

    fn take_off(&self, live: &SharedDek) {
        let mut register = self.register();
        let Some(own) = register.tenants.get_mut(&live.scope.tenant) else { return };
        let before = own.len();
        own.retain(|other| !Arc::ptr_eq(other, live));
        let was_in = own.len() < before;
        if own.is_empty() {
            register.tenants.remove(&live.scope.tenant);
        }
        if was_in && register.departed.len() < DEPARTED_MAX {
            register.departed.push(Arc::clone(live));
        }
    }
}

impl Cache {
    /// Room for `total_max` data keys, `per_tenant_max` of one tenant.
    pub(super) fn new(total_max: u64, per_tenant_max: usize) -> Self {
        let members: Arc<Members> = Arc::default();
        let leaving = Arc::clone(&members);
        let live = moka::sync::Cache::builder()
            .max_capacity(total_max)
            // The default policy may turn a new entry away, and a data key that was just made must not be.
            .eviction_policy(EvictionPolicy::lru())
            .eviction_listener(move |_, live: SharedDek, _| leaving.forget(&live))
            .build();
        Self { live, per_tenant_max, members }
    }

    /// What is wanted of a tenant's data key, if it is in memory.
    pub(super) fn find<R>(
        &self,
        tenant: &TenantId,
        id: DataKeyId,
        wanted: impl FnOnce(&SharedDek) -> R,
    ) -> Option<R> {
        self.members.index.pin().get(&(tenant.clone(), id)).map(wanted)
    }

    /// This data key is in use: others have to go before it.
    pub(super) fn touch(&self, live: &LiveDek) {
        self.live.get(&(live.scope.tenant.clone(), live.id));
    }

    /// Whether this very data key is in memory.
    pub(super) fn holds(&self, live: &SharedDek) -> bool {
        let register = self.register();
        register
            .tenants
            .get(&live.scope.tenant)
            .is_some_and(|own| own.iter().any(|other| Arc::ptr_eq(other, live)))
    }

    /// Keeps a data key, and lets the tenant's least recently used one go where it has too many. Nothing tends a data
    /// key that is not kept: whoever has the KMS vouch for one keeps it, or wipes it.
    pub(super) fn keep(&self, live: SharedDek) {
        let tenant = live.scope.tenant.clone();
        let crowded_out = {
            let mut register = self.register();
            let own = register.tenants.entry(tenant.clone()).or_default();
            if own.iter().any(|other| Arc::ptr_eq(other, &live)) {
                None
            } else {
                let least_used = own.iter().min_by_key(|other| other.used_at()).cloned();
                let crowded_out = least_used.filter(|_| own.len() >= self.per_tenant_max);
                own.push(Arc::clone(&live));
                crowded_out
            }
        };
        if let Some(least_used) = crowded_out {
            self.drop_one(&least_used);
        }
        let slot = (tenant, live.id);
        self.members.index.pin().insert(slot.clone(), Arc::clone(&live));
        // To put one in its own place would wipe it, as one that was replaced.
        if !self.live.get(&slot).is_some_and(|there| Arc::ptr_eq(&there, &live)) {
            self.live.insert(slot, live);
        }
    }

    /// Lets a data key go at once.
    pub(super) fn drop_one(&self, live: &SharedDek) {
        self.members.forget(live);
        self.live.invalidate(&(live.scope.tenant.clone(), live.id));
    }

    /// Lets go all data keys for which this KEK, or a replica of it, has vouched.
    pub(super) fn drop_kek(&self, kek: &KekId) {
        for live in self.all() {
            if live.vouched_by().same_material(kek) {
                live.wipe();
            }
        }
    }

    /// Lets everything go.
    pub(super) fn clear(&self) {
        for live in self.all() {
            self.drop_one(&live);
        }
        self.live.run_pending_tasks();
    }

    /// Everything that is in memory now.
    pub(super) fn all(&self) -> Vec<SharedDek> {
        self.register().tenants.values().flatten().cloned().collect()
    }

    /// Data keys that have left since the last time: their counts are still to be flushed.
    pub(super) fn take_departed(&self) -> Vec<SharedDek> {
        std::mem::take(&mut self.register().departed)
    }

    /// Gives back one that could not be flushed.
    pub(super) fn depart_again(&self, live: SharedDek) {
        let mut register = self.register();
        if register.departed.len() < DEPARTED_MAX {
            register.departed.push(live);
        }
    }

    fn register(&self) -> MutexGuard<'_, Register> {
        self.members.register()
    }

    /// How many data keys are in memory with their plaintext.
    pub(super) fn plaintext_count(&self) -> usize {
        self.all().iter().filter(|live| live.holds_plaintext()).count()
    }

    /// Lets the library do its housekeeping.
    pub(super) fn tidy(&self) {
        self.live.run_pending_tasks();
    }

    /// Lets go the data keys that have not been used for `idle`.
    pub(super) fn drop_idle(&self, now: Duration, idle: Duration) {
        for live in self.all() {
            if now.saturating_sub(live.used_at()) >= idle {
                self.drop_one(&live);
            }
        }
    }
}
