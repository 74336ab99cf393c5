//! Whether the service can serve, said to load balancers and operators: `ready`, `degraded` with what is wrong since
//! when, or `unable`.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::Mutex;

use crate::clock::Clock;
use crate::http::{Probe, Readiness, ReadinessStatus};
use crate::kms::guarded::{Circuit, GuardedKms, RegionHealth};
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
        for region in &regions {
            reasons.extend(troubles(region));
        }
        // Who is unable gets no requests, and without them nobody would find out that a region is well again: so only
        // what was seen lately counts here.
        let all_out = !regions.is_empty() && regions.iter().all(|region| region.out_lately) && !self.embedded;
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

/// What is wrong with a region's KMS, and what to do where that can be said.
fn troubles(region: &RegionHealth) -> Vec<String> {
    let name = &region.region;
    let mut troubles = Vec::new();
    if region.circuit != Circuit::Closed {
        let since = region.since.map(|since| format!(" since {since}")).unwrap_or_default();
        troubles.push(format!("the KMS in {name} has not answered{since}"));
    }
    if let Some(since) = region.credentials_since {
        troubles.push(format!(
            "the credentials for the KMS in {name} have not done since {since}: renew them, or look after what gives \
             them (web identity, role, profile)"
        ));
    }
    if region.throttles {
        troubles.push(format!(
            "the KMS in {name} throttles: raise the account's request quota there, or make fewer calls"
        ));
    }
    troubles
}
