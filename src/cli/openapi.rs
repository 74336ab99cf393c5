//! `keyfold openapi`

use super::output;

pub(super) fn run() -> anyhow::Result<()> {
    output::line(crate::http::openapi_document().to_pretty_json()?);
    Ok(())
}
