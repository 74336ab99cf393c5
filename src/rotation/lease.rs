//! The right to apply anything: one process at a time, renewed while it works.

use std::sync::Arc;
use std::time::Duration;

use crate::clock::Clock;
use crate::store::{Fence, Registry, StoreError};

/// A lease that is held, so far as its holder knows. The registry knows better: each change is checked against it.
pub(super) struct Lease {
    store: Arc<dyn Registry>,
    clock: Clock,
    holder: String,
    ttl: Duration,
    fence: Fence,
    /// When it was last renewed; monotonic.
    renewed: tokio::sync::Mutex<Duration>,
}

impl Lease {
    /// Takes the lease, if it is free.
    pub(super) async fn take(
        store: Arc<dyn Registry>,
        clock: Clock,
        name: &str,
        holder: &str,
        ttl: Duration,
    ) -> Result<Option<Self>, StoreError> {
        let renewed = tokio::sync::Mutex::new(clock.monotonic());
        let Some(token) = store.acquire_lease(name, holder, ttl, clock.now()).await? else { return Ok(None) };
        let fence = Fence { lease: name.to_owned(), token };
        Ok(Some(Self { store, clock, holder: holder.to_owned(), ttl, fence, renewed }))
    }

    /// What proves it.
    pub(super) fn fence(&self) -> Fence {
        self.fence.clone()
    }

    /// Renews it when a third of its time is over. [`StoreError::LostLease`] where it ran out in the meantime, even
    /// if nobody took it: what was read under it may be out of date.
    pub(super) async fn keep(&self) -> Result<(), StoreError> {
        let mut renewed = self.renewed.lock().await;
        let now = self.clock.monotonic();
        if now.saturating_sub(*renewed) < self.ttl / 3 {
            return Ok(());
        }
        let name = &self.fence.lease;
        match self.store.acquire_lease(name, &self.holder, self.ttl, self.clock.now()).await? {
            Some(token) if token == self.fence.token => {
                *renewed = now;
                Ok(())
            }
            _ => Err(StoreError::LostLease(name.as_str().into())),
        }
    }

    /// Gives it back, so that nobody has to wait for its end.
    pub(super) async fn release(&self) {
        if let Err(error) = self.store.release_lease(&self.fence, self.clock.now()).await {
            tracing::debug!(%error, "the lease of rotation was not given back; it runs out");
        }
    }
}
