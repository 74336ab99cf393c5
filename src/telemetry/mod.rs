//! What the process tells of itself: its log.
//!
//! Never in the log: plaintext, keys, tokens, context values, bodies. What goes wrong with a request is logged once,
//! where it becomes an answer (`http/middleware/edge.rs`).

use tracing_subscriber::EnvFilter;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;

/// Reads which lines are wanted. Fails where `filter` cannot be read.
pub fn log_filter(filter: &str) -> anyhow::Result<EnvFilter> {
    EnvFilter::try_new(filter).map_err(|error| {
        anyhow::anyhow!("log.filter is not valid ({error}): use for example info,keyfold=debug")
    })
}

/// Starts the log. `json` is one object a line. Fails where `filter` cannot be read.
pub fn start_log(json: bool, filter: &str) -> anyhow::Result<()> {
    let filter = log_filter(filter)?;
    let registry = tracing_subscriber::registry().with(filter);
    let writer = std::io::stderr;
    if json {
        let lines = tracing_subscriber::fmt::layer().json().flatten_event(true).with_writer(writer);
        registry.with(lines).try_init()?;
    } else {
        // Colours are for a terminal; in a file they are rubbish.
        let ansi = std::io::IsTerminal::is_terminal(&std::io::stderr());
        registry.with(tracing_subscriber::fmt::layer().with_ansi(ansi).with_writer(writer)).try_init()?;
    }
    log_panics();
    Ok(())
}

/// Has a panic logged by its place only: what it says may quote a secret.
fn log_panics() {
    std::panic::set_hook(Box::new(|panic| {
        let location = panic.location().map(ToString::to_string).unwrap_or_default();
        tracing::error!(location, "panic");
    }));
}
