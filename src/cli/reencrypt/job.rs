//! The work: pages are read, sent to the service, several at a time, and written back in their order.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use anyhow::bail;
use indicatif::ProgressBar;
use tokio_util::task::{AbortOnDropHandle, TaskTracker};

use super::report::Report;
use super::row::{Failure, Page, Place, Row, Value};
use super::service::{Outcome, Service};
use super::state::StateFile;
use crate::cli::output;

/// How often a row is read again that somebody else changes under our hands.
const TRIES_MAX: usize = 5;
/// How often progress is told where there is no terminal for a bar.
const TELL: Duration = Duration::from_secs(10);

/// How much is done at once.
pub(super) struct Pace {
    /// Rows of a page: read, sent and written together.
    pub(super) batch_rows: usize,
    /// Pages with the service at once.
    pub(super) concurrency: usize,
    pub(super) rows_per_sec_max: Option<u32>,
    /// After how many failures there is no point in going on.
    pub(super) failures_max: usize,
}

/// A page on its way.
struct Sent<H> {
    page: Page<H>,
    outcomes: Vec<Outcome>,
}

pub(super) struct Work<P: Place> {
    pub(super) place: P,
    pub(super) service: Arc<Service>,
    pub(super) pace: Pace,
    pub(super) state: StateFile,
    pub(super) bar: ProgressBar,
}

impl<P: Place> Work<P> {
    /// Goes through all rows; the report stands in the state.
    pub(super) async fn run(&mut self) -> anyhow::Result<()> {
        let tracker = TaskTracker::new();
        let mut sent: VecDeque<AbortOnDropHandle<anyhow::Result<Sent<P::Hold>>>> = VecDeque::new();
        let mut rate = Rate::new(self.pace.rows_per_sec_max, self.service.clock.monotonic());
        let rows_max = rate.rows_max(self.pace.batch_rows);
        let (mut ended, mut told) = (false, self.service.clock.monotonic());
        loop {
            while !ended && sent.len() < self.pace.concurrency {
                let Some(page) = self.place.page(rows_max).await? else {
                    ended = true;
                    break;
                };
                self.service.clock.sleep(rate.take(page.rows.len(), self.service.clock.monotonic())).await;
                let service = Arc::clone(&self.service);
                sent.push_back(AbortOnDropHandle::new(tracker.spawn(async move {
                    let outcomes = service.rewrap(&page.rows).await?;
                    Ok(Sent { page, outcomes })
                })));
            }
            let Some(first) = sent.pop_front() else { break };
            self.take(first.await??).await?;
            let now = self.service.clock.monotonic();
            if self.bar.is_hidden() && now - told >= TELL {
                told = now;
                output::note(format_args!("{} rows so far", self.state.state.report.rows));
            }
        }
        self.place.finish().await?;
        self.state.state.finished = true;
        self.state.save()
    }

    /// Writes a page, and remembers that it is written.
    async fn take(&mut self, sent: Sent<P::Hold>) -> anyhow::Result<()> {
        let Sent { mut page, mut outcomes } = sent;
        self.state.state.report.rows += page.rows.len() as u64;
        let progress = page.progress;
        let mut cursor = None;
        for tried in 1.. {
            let written = self.place.write(&page.hold, new_values(&page.rows, &outcomes)?).await?;
            // Rows that are read again say nothing of how far the job is.
            cursor.get_or_insert(written.cursor);
            let report = &mut self.state.state.report;
            let mut lost = written.lost.iter().peekable();
            for (at, (row, outcome)) in page.rows.iter().zip(&outcomes).enumerate() {
                if lost.next_if_eq(&&at).is_none() {
                    report.count(&row.name, outcome);
                } else if tried == TRIES_MAX {
                    report.fail(
                        &row.name,
                        Failure::new("changed_meanwhile", "somebody else changes it all the time"),
                    );
                }
            }
            if written.lost.is_empty() || tried == TRIES_MAX {
                break;
            }
            let lost = written.lost.len();
            page = self.place.again(&page.hold, &written.lost).await?;
            note_lost(report, lost, page.rows.len(), tried);
            outcomes = self.service.rewrap(&page.rows).await?;
        }
        self.state.state.cursor = cursor.unwrap_or_default();
        self.state.save()?;
        self.bar.inc(progress);
        let report = &self.state.state.report;
        self.bar.set_message(format!("{} renewed, {} failed", report.renewed_rows(), report.failed.len()));
        if report.failed.len() > self.pace.failures_max {
            bail!(
                "{} rows failed, more than --failures-max {}: the last with {} ({})",
                report.failed.len(),
                self.pace.failures_max,
                report.failed[report.failed.len() - 1].failure.detail,
                report.failed[report.failed.len() - 1].failure.code
            );
        }
        Ok(())
    }
}

/// What was lost and is there no more was removed; the rest was changed, and is counted once.
fn note_lost(report: &mut Report, lost: usize, still_there: usize, tried: usize) {
    let removed = (lost - still_there) as u64;
    report.removed_meanwhile += removed;
    // It is no row any more.
    report.rows -= removed;
    if tried == 1 {
        report.changed_meanwhile += still_there as u64;
    }
}

/// What is written into each row: nothing where it is up to date, and nothing where it failed.
fn new_values(rows: &[Row], outcomes: &[Outcome]) -> anyhow::Result<Vec<Option<Value>>> {
    let new = rows.iter().zip(outcomes).map(|(row, outcome)| match (&row.sealed, outcome) {
        (Ok(sealed), Outcome::Renewed { envelope, .. }) => sealed.form.write(envelope.clone()).map(Some),
        _ => Ok(None),
    });
    new.collect()
}

/// When the next rows may go.
struct Rate {
    rows_per_sec_max: Option<u32>,
    free_at: Duration,
}

impl Rate {
    fn new(rows_per_sec_max: Option<u32>, now: Duration) -> Self {
        Self { rows_per_sec_max, free_at: now }
    }

    /// A page is not more than a second's worth: the rate is even.
    fn rows_max(&self, batch_rows: usize) -> usize {
        self.rows_per_sec_max.map_or(batch_rows, |max| batch_rows.min(max as usize).max(1))
    }

    /// How long these rows wait.
    fn take(&mut self, rows: usize, now: Duration) -> Duration {
        let Some(max) = self.rows_per_sec_max else { return Duration::ZERO };
        let start = self.free_at.max(now);
        let rows = u32::try_from(rows).unwrap_or(u32::MAX);
        self.free_at = start + Duration::from_secs_f64(f64::from(rows) / f64::from(max));
        start - now
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_go_no_faster_than_they_may() {
        let mut rate = Rate::new(Some(100), Duration::from_secs(5));
        assert_eq!((rate.rows_max(1_000), rate.rows_max(10)), (100, 10));
        let mut now = Duration::from_secs(5);
        for _ in 0..20 {
            now += rate.take(50, now);
        }
        assert_eq!(now, Duration::from_millis(14_500), "1,000 rows, the last 50 at once");
        // What was not used is not made up for.
        now += Duration::from_secs(60);
        assert_eq!(rate.take(100, now), Duration::ZERO);
        assert_eq!(rate.take(1, now), Duration::from_secs(1));
        assert_eq!(Rate::new(None, now).take(1_000_000, now), Duration::ZERO);
    }
}
