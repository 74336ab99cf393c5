//! Where the command line writes. Lines for people go to standard output, errors to standard error.

use std::io::{ErrorKind, Write as _};
use std::sync::atomic::{AtomicBool, Ordering};

/// Whether a line of result was lost.
static LOST: AtomicBool = AtomicBool::new(false);

/// A line of result.
pub(super) fn line(text: impl std::fmt::Display) {
    if let Err(error) = writeln!(std::io::stdout(), "{text}") {
        // Whoever reads no further (`keyfold openapi | head`) has had enough.
        LOST.fetch_or(error.kind() != ErrorKind::BrokenPipe, Ordering::Relaxed);
    }
}

/// Whether every line of result was written: a full disk must not look like success.
pub(super) fn everything_written() -> bool {
    let flushed = std::io::stdout().flush();
    let had_enough = |error: &std::io::Error| error.kind() == ErrorKind::BrokenPipe;
    flushed.as_ref().err().is_none_or(had_enough) && !LOST.load(Ordering::Relaxed)
}

/// What went wrong, with its causes.
pub(super) fn error(error: &anyhow::Error) {
    note(format_args!("keyfold: {error:#}"));
}

/// Something to be seen that is no result. Where nobody can be told, there is nothing more to do.
pub(super) fn note(text: impl std::fmt::Display) {
    let _ = writeln!(std::io::stderr(), "{text}");
}
