//! `keyfold doctor`: do the master keys work, with the credentials at hand?

use anyhow::bail;
use clap::Args;

use super::output;
use crate::app::{App, Check, Finding};
use crate::config::{Settings, Variables};
use crate::kms::local::LocalKeyRing;
use crate::tenant::TenantId;

#[derive(Args)]
pub(super) struct DoctorArgs {
    /// The tenant whose KEK ring is tried out. Default: all tenants.
    tenant: Option<TenantId>,
}

pub(super) async fn run(settings: &Settings, args: DoctorArgs, variables: &Variables) -> anyhow::Result<()> {
    let dev = LocalKeyRing::is_unencrypted(&settings.keyring_file());
    let app = App::open(settings, variables, dev).await?;
    let examined = app.examine(args.tenant.as_ref()).await;
    app.stop().await;
    let findings = examined?;
    if findings.is_empty() {
        output::line("There is no tenant yet: make one with `keyfold tenant create`.");
        return Ok(());
    }
    for row in table(&findings) {
        output::line(row);
    }
    let in_trouble = findings.iter().filter(|finding| !is_well(finding)).count();
    for finding in findings.iter().filter(|finding| !is_well(finding)) {
        explain(finding);
    }
    if in_trouble > 0 {
        bail!("{in_trouble} of {} KEKs do not work", findings.len());
    }
    output::line(format_args!("\nAll {} KEKs work.", findings.len()));
    Ok(())
}

fn is_well(finding: &Finding) -> bool {
    finding.checks.iter().all(|(_, outcome)| outcome.is_ok())
}

fn table(findings: &[Finding]) -> Vec<String> {
    let tenants = findings.iter().map(|finding| finding.tenant.as_str().len()).max().unwrap_or(0).max(6);
    let keks = findings.iter().map(|finding| finding.kek.as_str().len()).max().unwrap_or(0).max(3);
    let heads: Vec<String> = Check::ALL.iter().map(|check| format!("{:8}", check.name())).collect();
    let mut rows = vec![format!("{:tenants$}  {:keks$}  {}", "TENANT", "KEK", heads.join("  "))];
    for finding in findings {
        let cells: Vec<String> =
            Check::ALL.iter().map(|check| format!("{:8}", cell(finding, *check))).collect();
        let row = format!(
            "{:tenants$}  {:keks$}  {}",
            finding.tenant.as_str(),
            finding.kek.as_str(),
            cells.join("  ")
        );
        rows.push(row.trim_end().to_owned());
    }
    rows
}

fn cell(finding: &Finding, check: Check) -> &'static str {
    match finding.checks.iter().find(|(made, _)| *made == check) {
        Some((_, Ok(()))) => "ok",
        Some((_, Err(_))) => "FAILED",
        None => "-",
    }
}

fn explain(finding: &Finding) {
    output::line(format_args!("\n{} of tenant {}", finding.kek, finding.tenant));
    for (check, outcome) in &finding.checks {
        let Err(trouble) = outcome else { continue };
        output::line(format_args!("  {}: {}", check.name(), trouble.said));
        if let Some(action) = &trouble.missing_action {
            output::line(format_args!("    the IAM action {action} is not allowed: see docs/aws.md"));
        }
    }
}
