//! When somebody wants a command to end before it is done.

use std::task::Poll;

use tokio::signal::unix::{SignalKind, signal};

/// Comes back at the first SIGINT, SIGTERM or SIGHUP, so that work can be left in good order. What the process was
/// started to ignore (by `nohup`, or in a shell's background) it goes on ignoring.
pub(super) async fn interrupted() -> std::io::Result<()> {
    let ignored = ignored();
    let kinds = [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()];
    let watched = kinds.into_iter().filter(|kind| (ignored >> (kind.as_raw_value() - 1)) & 1 == 0);
    let mut signals = watched.map(signal).collect::<Result<Vec<_>, _>>()?;
    std::future::poll_fn(|waiting| {
        let came = signals.iter_mut().any(|signal| signal.poll_recv(waiting).is_ready());
        if came { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
    Ok(())
}

/// The signals that this process ignores, one bit each; none where the system does not say.
fn ignored() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0)
}
