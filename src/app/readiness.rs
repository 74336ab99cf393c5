//! Whether the service can serve, said to load balancers and operators: `ready`, `degraded` with what is wrong since
//! when, or `unable`.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::Mutex;

use crate::clock::Clock;
use crate::http::{Probe, Readiness, ReadinessStatus};
use crate::kms::guarded::{Circuit, GuardedKms};
use crate::pool::DekPool;
use crate::store::Store;
use crate::store::watch::ChangeWatch;

/// How long an answer is given again: probes come from every load balancer, and each asks the registry.
const REMEMBERED: Duration = Duration::from_secs(1);
/// After this time a registry counts as one that does not answer.
const STORE_PATIENCE: Duration = Duration::from_secs(2);

/// Looks at the registry and at what the guard knows of the regions. It never calls the KMS.
pub(super) struct ServiceProbe {
    pub(super) store: Arc<dyn Store>,
    pub(super) watch: Arc<ChangeWatch>,
    pub(super) pool: DekPool,
    pub(super) guard: Option<GuardedKms>,
    /// Whether there is an embedded key ring, which no region's trouble touches.
    pub(super) embedded: bool,
    pub(super) clock: Clock,
    pub(super) last: Mutex<Option<(Duration, Readiness)>>,
}

#[async_trait]
impl Probe for ServiceProbe {
    async fn readiness(&self) -> Readiness {
        let mut last = self.last.lock().await;
        let now = self.clock.monotonic();
        if let Some((at, readiness)) = &*last
            && now.saturating_sub(*at) < REMEMBERED
        {
            return readiness.clone();
        }
        let readiness = self.look(now).await;
        *last = Some((now, readiness.clone()));
        readiness
    }
}

impl ServiceProbe {
    async fn look(&self, now: Duration) -> Readiness {
        let mut reasons = Vec::new();
        let mut unable = false;
        if !self.store_answers().await {
            reasons.push("the registry does not answer".to_owned());
            // What is known of tenants and keys is then too old to be used.
            unable |= !self.watch.is_current(now);
        }
        let regions = self.guard.as_ref().map(GuardedKms::health).unwrap_or_default();
        let out: Vec<_> = regions.iter().filter(|region| region.circuit != Circuit::Closed).collect();
        for region in &out {
            let since = region.since.map(|since| format!(" since {since}")).unwrap_or_default();
            reasons.push(format!("the KMS in {} has not answered{since}", region.region));
        }
        let all_out = !out.is_empty() && out.len() == regions.len() && !self.embedded;
        unable |= all_out && self.pool.plaintext_deks() == 0;
        let status = match (unable, reasons.is_empty()) {
            (true, _) => ReadinessStatus::Unable,
            (false, true) => ReadinessStatus::Ready,
            (false, false) => ReadinessStatus::Degraded,
        };
        Readiness { status, reasons }
    }

    async fn store_answers(&self) -> bool {
        tokio::select! {
            answer = self.store.ping() => answer.is_ok(),
            () = self.clock.sleep(STORE_PATIENCE) => false,
        }
    }
}
