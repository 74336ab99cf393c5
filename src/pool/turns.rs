//! Fairness among tenants: how many of one tenant's data keys are on their way from the KMS at the same time.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::{Options, PoolError};
use crate::clock::Clock;
use crate::tenant::TenantId;

/// The tenants' turns.
pub(super) struct Turns {
    per_tenant: usize,
    wait_max: Duration,
    tenants: papaya::HashMap<TenantId, Arc<Semaphore>>,
}

impl Turns {
    pub(super) fn new(options: &Options) -> Self {
        Self {
            per_tenant: options.tenant_kms_calls_max.clamp(1, Semaphore::MAX_PERMITS),
            wait_max: Duration::from_millis(options.tenant_kms_wait_ms_max),
            tenants: papaya::HashMap::new(),
        }
    }

    /// Waits for the tenant's turn, for a stated time. It lasts as long as what is returned.
    pub(super) async fn wait(
        &self,
        tenant: &TenantId,
        clock: &Clock,
    ) -> Result<OwnedSemaphorePermit, PoolError> {
        let new = || Arc::new(Semaphore::new(self.per_tenant));
        let turns = Arc::clone(self.tenants.pin().get_or_insert_with(tenant.clone(), new));
        tokio::select! {
            biased;
            turn = turns.acquire_owned() => turn.map_err(|_| PoolError::Busy),
            () = clock.sleep(self.wait_max) => Err(PoolError::Busy),
        }
    }
}
