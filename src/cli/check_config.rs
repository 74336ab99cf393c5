//! `keyfold check-config`

use super::output;
use crate::config::Settings;

/// Reads the configuration as `serve` would, and says what it amounts to. Opens nothing.
pub(super) fn run(settings: &Settings) -> anyhow::Result<()> {
    settings.check_listener()?;
    crate::telemetry::log_filter(&settings.log.filter)?;
    output::line(format_args!("{settings:#?}"));
    output::line(format_args!("registry          {}", settings.registry_file().display()));
    output::line(format_args!("key ring          {}", settings.keyring_file().display()));
    output::line(format_args!("pepper            {}", settings.pepper_file().display()));
    output::line("the configuration is valid");
    Ok(())
}
