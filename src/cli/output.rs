//! Where the command line writes. Lines for people go to standard output, errors to standard error.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "the one place that writes to the terminal")]

/// A line of result.
pub(super) fn line(text: impl std::fmt::Display) {
    println!("{text}");
}

/// What went wrong, with its causes.
pub(super) fn error(error: &anyhow::Error) {
    eprintln!("keyfold: {error:#}");
}

/// Something to be seen that is no result.
pub(super) fn note(text: impl std::fmt::Display) {
    eprintln!("{text}");
}
