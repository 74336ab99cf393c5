//! How the process ends: a soft stop that lets requests in flight finish, a hard one that does not wait.
//!
//! The first SIGTERM or SIGINT stops softly, within the configured time; a second one, or the end of that time,
//! stops hard. Either way keys are wiped on the way out.

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// The process's tasks and its two kinds of stop.
#[derive(Clone, Default)]
pub struct Lifecycle {
    /// Every task of the process runs on it.
    pub tracker: TaskTracker,
    /// Cancelled when the process is to stop softly.
    pub soft: CancellationToken,
    /// Cancelled when it is to stop at once.
    pub hard: CancellationToken,
}

impl Lifecycle {
    /// Turns signals into stops.
    pub fn watch_signals(&self) -> std::io::Result<()> {
        let mut signals = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        let (soft, hard) = (self.soft.clone(), self.hard.clone());
        let watch = async move {
            let first = next(&mut signals).await;
            tracing::info!(
                signal = first,
                "stopping: requests in flight may finish; a second signal ends them"
            );
            soft.cancel();
            let second = next(&mut signals).await;
            tracing::warn!(signal = second, "stopping at once");
            hard.cancel();
        };
        let ended = self.hard.clone();
        self.tracker.spawn(async move {
            tokio::select! { () = watch => {}, () = ended.cancelled() => {} }
        });
        Ok(())
    }
}

async fn next((terminate, interrupt): &mut (Signal, Signal)) -> &'static str {
    tokio::select! {
        _ = terminate.recv() => "SIGTERM",
        _ = interrupt.recv() => "SIGINT",
    }
}
