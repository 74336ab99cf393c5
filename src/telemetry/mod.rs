//! What the process tells of itself: its log.
//!
//! Never in the log: plaintext, keys, tokens, context values, bodies. What goes wrong with a request is logged once,
//! where it becomes an answer (`http/middleware/edge.rs`).

use tracing::Subscriber;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer as _};

/// Reads which lines are wanted. Fails where `filter` cannot be read.
pub fn log_filter(filter: &str) -> anyhow::Result<EnvFilter> {
    EnvFilter::try_new(filter).map_err(|error| {
        anyhow::anyhow!("log.filter is not valid ({error}): use for example info,keyfold=debug")
    })
}

/// Starts the log. `json` is one object a line. Fails where `filter` cannot be read.
pub fn start_log(json: bool, filter: &str) -> anyhow::Result<()> {
    // Colours are for a terminal; in a file they are rubbish.
    let ansi = std::io::IsTerminal::is_terminal(&std::io::stderr());
    lines(json, log_filter(filter)?, std::io::stderr, ansi).try_init()?;
    log_panics();
    Ok(())
}

fn lines<W>(json: bool, filter: EnvFilter, writer: W, ansi: bool) -> impl Subscriber + Send + Sync
where
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    let layer = tracing_subscriber::fmt::layer().with_writer(writer);
    let layer = if json { layer.json().flatten_event(true).boxed() } else { layer.with_ansi(ansi).boxed() };
    tracing_subscriber::registry().with(filter).with(layer)
}

/// Has a panic logged by its place only: what it says may quote a secret.
fn log_panics() {
    std::panic::set_hook(Box::new(|panic| {
        let location = panic.location().map(ToString::to_string).unwrap_or_default();
        tracing::error!(location, "panic");
    }));
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn a_panic_is_logged_by_its_place_and_not_by_what_it_says() {
        let hook = std::panic::take_hook();
        log_panics();
        for json in [true, false] {
            let file = tempfile::NamedTempFile::new().unwrap();
            let writer = Arc::new(file.reopen().unwrap());
            tracing::subscriber::with_default(lines(json, EnvFilter::new("trace"), writer, false), || {
                let secret = "canary";
                assert!(std::panic::catch_unwind(|| panic!("{secret} of {secret:?}")).is_err());
            });
            let log = std::fs::read_to_string(file.path()).unwrap();
            assert!(log.contains("ERROR") && log.contains("location") && log.contains(file!()), "{log}");
            assert!(!log.contains("canary"), "{log}");
        }
        std::panic::set_hook(hook);
    }
}
