//! What is done ahead of time, so that no request has to wait for it: renewals, the next data key, the flushing of
//! counts, and the letting go of what nobody uses.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::fetch::Asker;
use super::live::{LiveDek, SharedDek, as_ms};
use super::{DekPool, PoolError};
use crate::clock::Clock;
use crate::store::{DekState, Usage};

/// At this share of any limit the background acts, in percent.
const AHEAD_PERCENT: u32 = 80;
/// Renewals begin up to this much earlier, each data key at a moment of its own: data keys that came into memory
/// together must not all ask the KMS together.
const SPREAD_PERCENT: u32 = 20;
/// From this share on a renewal goes before others in the background: it has waited for long enough.
const OVERDUE_PERCENT: u32 = 90;
/// How long after a failed renewal or preparation the next try waits.
const RETRY_AFTER: Duration = Duration::from_secs(2);
const TICK: Duration = Duration::from_secs(1);

/// Stands for the time of a try that is under way: however long the KMS takes, no second one joins it.
const UNDER_WAY: u64 = u64::MAX;

/// Says from when on something may be tried again, however the try ends.
struct Again<'a> {
    from: &'a AtomicU64,
    clock: &'a Clock,
    delay: Duration,
}

impl Drop for Again<'_> {
    fn drop(&mut self) {
        self.from.store(as_ms(self.clock.monotonic() + self.delay), Ordering::Relaxed);
    }
}

fn is_under_way(tried_ms: &AtomicU64) -> bool {
    tried_ms.load(Ordering::Relaxed) == UNDER_WAY
}

impl DekPool {
    /// Runs until `stop`, then flushes the counts a last time.
    pub async fn keep(self, usage_flush: Duration, tracker: TaskTracker, stop: CancellationToken) {
        let clock = self.fetch.clock.clone();
        let mut flushed_at = clock.monotonic();
        loop {
            tokio::select! {
                () = clock.sleep(TICK) => {}
                () = stop.cancelled() => break,
            }
            self.tend(&tracker).await;
            if clock.monotonic().saturating_sub(flushed_at) >= usage_flush {
                flushed_at = clock.monotonic();
                self.flush_usage().await;
            }
        }
        self.flush_usage().await;
    }

    /// One round: looks at everything in memory, and starts what is due. What takes long runs on `tracker`.
    pub async fn tend(&self, tracker: &TaskTracker) {
        if let Err(error) = self.fetch.watch.poll().await {
            tracing::warn!(%error, "the registry's changes cannot be followed; what is in memory serves on for its stated time");
        }
        self.fetch.denials.tell_due();
        let now = self.fetch.clock.monotonic();
        for live in self.fetch.cache.all() {
            // Before anything is tried once more: a renewal that fails must not keep it in memory.
            if live.holds_plaintext() && live.is_beyond_outage(now, self.fetch.lifetimes) {
                live.wipe();
            }
            if self.needs_renewal(&live, now) {
                live.tried_ms.store(UNDER_WAY, Ordering::Relaxed);
                let pool = self.clone();
                let renewed = Arc::clone(&live);
                tracker.spawn(async move { pool.renew(&renewed).await });
            } else if live.holds_plaintext() && live.is_past(now) && !is_under_way(&live.tried_ms) {
                // Nobody may use it; but while the KMS is asked, an outage may yet excuse it.
                live.wipe();
            }
            if self.needs_successor(&live, now) {
                live.prepared_ms.store(UNDER_WAY, Ordering::Relaxed);
                let pool = self.clone();
                tracker.spawn(async move { pool.prepare_successor(&live).await });
            }
        }
        self.fetch.cache.drop_idle(now, self.idle);
        let active = self.fetch.active.pin();
        for (scope, live) in &active {
            if now.saturating_sub(live.used_at()) >= self.idle {
                active.remove(scope);
            }
        }
        self.fetch.cache.tidy();
    }

    /// In use since the KMS last vouched for it, and close to its end or past it.
    fn needs_renewal(&self, live: &LiveDek, now: Duration) -> bool {
        // The end of a UUIDv7 is random.
        let spread = u32::from(live.id.as_bytes()[15]) * SPREAD_PERCENT / 255;
        let lifetimes = self.fetch.lifetimes;
        let ahead = lifetimes.plaintext_max * (AHEAD_PERCENT - spread) / 100;
        // In time for the answer, however late it comes.
        let due = live.vouched_at()
            + ahead.min(lifetimes.plaintext_max.saturating_sub(lifetimes.kms_answer).saturating_sub(TICK));
        live.holds_plaintext()
            && (live.used_at() >= live.vouched_at() || live.is_stale())
            && now >= due
            && now >= Duration::from_millis(live.tried_ms.load(Ordering::Relaxed)) + RETRY_AFTER
    }

    fn needs_successor(&self, live: &LiveDek, now: Duration) -> bool {
        let facts = live.facts();
        let age_max = Duration::from_secs(facts.policy.dek_age_secs_max);
        let ahead = age_max * (100 - AHEAD_PERCENT) / 100;
        facts.state == DekState::Active
            && (now + ahead >= facts.retires_at
                || live.counts.reached(u64::from(AHEAD_PERCENT), &facts.policy))
            && live.used_at() + self.idle > now
            && now >= Duration::from_millis(live.prepared_ms.load(Ordering::Relaxed)) + RETRY_AFTER
    }

    /// Has the next data key made, and keeps it warm: its plaintext counts as used, and is renewed as any other.
    async fn prepare_successor(&self, live: &SharedDek) {
        let scope = &live.scope;
        let mut again = Again { from: &live.prepared_ms, clock: &self.fetch.clock, delay: Duration::ZERO };
        match self.fetch.next(scope).await {
            Ok(next) => {
                next.plaintext(self.fetch.clock.monotonic());
                again.delay = self.fetch.lifetimes.plaintext_max * 2 / 5;
            }
            Err(error) => {
                tracing::warn!(tenant = %scope.tenant, key = %scope.key, %error, "the next data key could not be made ahead of time");
            }
        }
    }

    async fn renew(&self, live: &SharedDek) {
        let _again = Again { from: &live.tried_ms, clock: &self.fetch.clock, delay: Duration::ZERO };
        // The registry is asked at its next use, and until then nobody renews what it has not been asked about.
        if !live.facts().registered && !live.is_current() {
            return;
        }
        let renewed: Result<(), PoolError> = async {
            let tenant = self.fetch.directory.tenant(&live.scope.tenant).await?;
            // It may have been rewrapped since it was read, and the KEK that it came by be gone.
            if live.facts().registered && !live.is_current() {
                self.fetch.refresh(live, &tenant).await?;
            }
            let keks = super::fetch::believed(&tenant);
            self.fetch.vouch(live, &keks, self.asker(live)).await?;
            self.fetch.still_allowed(live, &keks)
        }
        .await;
        // It was let go in the meantime.
        if !self.fetch.cache.holds(live) {
            live.wipe();
        }
        if let Err(error) = renewed {
            tracing::warn!(tenant = %live.scope.tenant, dek = %live.id, %error, "a data key was not renewed");
        }
    }

    fn asker(&self, live: &LiveDek) -> Asker {
        let overdue = live.vouched_at() + self.fetch.lifetimes.plaintext_max * OVERDUE_PERCENT / 100;
        if self.fetch.clock.monotonic() >= overdue && !live.is_stale() {
            Asker::Overdue
        } else {
            Asker::Background
        }
    }

    /// Writes the counts of the last seconds into the registry. What cannot be written is kept for the next time.
    pub async fn flush_usage(&self) {
        let departed = self.fetch.cache.take_departed();
        let counted: Vec<_> = self
            .fetch
            .cache
            .all()
            .into_iter()
            .map(|live| (live, false))
            .chain(departed.into_iter().map(|live| (live, true)))
            .filter(|(live, _)| live.facts().registered)
            .filter_map(|(live, departed)| {
                live.counts.take_unflushed().map(|counts| (live, departed, counts))
            })
            .collect();
        if counted.is_empty() {
            return;
        }
        let usage: Vec<Usage> = counted
            .iter()
            .map(|(live, _, counts)| Usage {
                id: live.id,
                messages: counts.messages,
                bytes: counts.bytes,
                last_sealed_at: counts.sealed_at,
                last_opened_at: counts.opened_at,
            })
            .collect();
        if let Err(error) = self.fetch.store.add_usage(&usage).await {
            tracing::warn!(%error, "usage counts could not be written; they are kept for the next time");
            for (live, departed, counts) in counted {
                live.counts.give_back(&counts);
                if departed {
                    self.fetch.cache.depart_again(live);
                }
            }
        }
    }
}
