//! `keyfold jobs`, `rewrap-keys`, `kek-use`: on the service's own data folder, while it runs.

use std::collections::HashMap;
use std::time::Duration;

use clap::Subcommand;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use super::output;
use crate::access::Principal;
use crate::app::App;
use crate::clock::Clock;
use crate::config::{Settings, Variables};
use crate::kms::local::LocalKeyRing;
use crate::operations::Page;
use crate::store::{JobRecord, JobState};
use crate::tenant::{KekId, TenantId};

const POLL: Duration = Duration::from_millis(500);

#[derive(Subcommand)]
pub(super) enum JobsCommand {
    /// Show work that takes a while, the newest first: rewrapping, shredding.
    Jobs {
        /// Only this tenant's.
        tenant: Option<TenantId>,
        /// Show progress until nothing runs any more. What waits for its time is not waited for.
        #[arg(long)]
        watch: bool,
    },
    /// Bring a tenant's wrapped data keys up to its master keys now. The running service does the work.
    RewrapKeys {
        /// The tenant.
        tenant: TenantId,
        /// Show progress until it is done.
        #[arg(long)]
        watch: bool,
    },
    /// Which data keys still need a master key, and since when? None: it may go.
    KekUse {
        /// The master key: an ARN, or local:NAME.
        kek: KekId,
        /// List the data keys, too.
        #[arg(long)]
        list: bool,
    },
}

pub(super) async fn run(
    settings: &Settings,
    command: JobsCommand,
    variables: &Variables,
) -> anyhow::Result<()> {
    let dev = LocalKeyRing::is_unencrypted(&settings.keyring_file());
    let app = App::open(settings, variables, dev).await?;
    let outcome = act(&app, command).await;
    app.stop().await;
    outcome
}

async fn act(app: &App, command: JobsCommand) -> anyhow::Result<()> {
    match command {
        JobsCommand::Jobs { tenant, watch: false } => {
            jobs(app, tenant.as_ref()).await?.iter().for_each(show);
            Ok(())
        }
        JobsCommand::Jobs { tenant, watch: true } => watch(app, tenant.as_ref()).await,
        JobsCommand::RewrapKeys { tenant, watch: follow } => {
            let permit = Principal::local_operator().permit_admin(&tenant)?;
            show(&app.operations.rewrap_keys(&permit).await?);
            if follow { watch(app, Some(&tenant)).await } else { Ok(()) }
        }
        JobsCommand::KekUse { kek, list } => kek_use(app, &kek, list).await,
    }
}

async fn jobs(app: &App, tenant: Option<&TenantId>) -> anyhow::Result<Vec<JobRecord>> {
    let operator = Principal::local_operator();
    let page = Page { after: None, limit: 100 };
    Ok(match tenant {
        Some(tenant) => app.operations.list_jobs_of(&operator.permit_admin(tenant)?, page).await?,
        None => app.operations.list_jobs(&operator.permit_operate()?, page).await?,
    })
}

fn show(job: &JobRecord) {
    let rate = job.rate_per_sec().map(|rate| format!("  {rate:.0}/s")).unwrap_or_default();
    let error = match (&job.last_error, job.state) {
        (Some(error), JobState::Running) => format!("  last error: {error}"),
        _ => String::new(),
    };
    output::line(format_args!(
        "{}  {}  {}  {} of {}  {} error(s){rate}  since {}{error}",
        job.id,
        name(job),
        job.state.name(),
        job.done,
        job.total,
        job.errors,
        job.created_at
    ));
}

fn name(job: &JobRecord) -> String {
    let target = job.target.name();
    let space = if target.is_empty() { "" } else { " " };
    format!("{} {}{space}{target}", job.kind.name(), job.tenant)
}

/// Whether there is something to watch: a shred that waits for its time changes nothing for days.
fn runs(job: &JobRecord) -> bool {
    use crate::store::JobKind;
    job.finished_at.is_none() && (job.state == JobState::Running || job.kind == JobKind::RewrapKeys)
}

/// Progress bars on a terminal, lines elsewhere.
async fn watch(app: &App, tenant: Option<&TenantId>) -> anyhow::Result<()> {
    let clock = Clock::system();
    let screen = MultiProgress::new();
    let style = ProgressStyle::with_template("{prefix} [{bar:30}] {pos}/{len} {msg}")?;
    let mut bars: HashMap<String, (ProgressBar, JobRecord)> = HashMap::new();
    loop {
        let jobs = jobs(app, tenant).await?;
        for job in &jobs {
            if !runs(job) && !bars.contains_key(&job.id) {
                continue;
            }
            let (bar, before) = bars.entry(job.id.clone()).or_insert_with(|| {
                let bar = screen.add(ProgressBar::new(job.total));
                bar.set_style(style.clone());
                bar.set_prefix(name(job));
                if screen.is_hidden() {
                    show(job);
                }
                (bar, job.clone())
            });
            bar.set_length(job.total);
            bar.set_position(job.done);
            let rate = job.rate_per_sec().map(|rate| format!("{rate:.0}/s")).unwrap_or_default();
            bar.set_message(format!("{rate} {} {} error(s)", job.state.name(), job.errors));
            if screen.is_hidden() && job != before {
                show(job);
            }
            *before = job.clone();
            if !runs(job) {
                bar.abandon();
            }
        }
        if !jobs.iter().any(runs) {
            return Ok(());
        }
        clock.sleep(POLL).await;
    }
}

async fn kek_use(app: &App, kek: &KekId, list: bool) -> anyhow::Result<()> {
    let permit = Principal::local_operator().permit_operate()?;
    let (of, mut deks) = app.operations.kek_use(&permit, kek, Page { after: None, limit: 1_000 }).await?;
    let oldest = of.oldest_wrapped_at.map(|at| format!(", the oldest since {at}")).unwrap_or_default();
    output::line(format_args!(
        "{kek}: {} data key(s) are wrapped under it{oldest}; in the ring of {} tenant(s), formerly of {}",
        of.deks, of.rings, of.former_rings
    ));
    if of.deks == 0 && of.rings == 0 {
        output::line(
            "The registry does not need it. Embedded envelopes that were not rewrapped need it where there is no \
             registry to help.",
        );
    }
    while list {
        for stored in &deks {
            let form = stored.wrapped.iter().find(|form| form.kek == *kek);
            let since = form.map(|form| form.wrapped_at.to_string()).unwrap_or_default();
            let (dek, scope) = (&stored.dek, &stored.dek.scope);
            output::line(format_args!(
                "{}  {}/{}  {}  since {since}",
                dek.id,
                scope.tenant,
                scope.key,
                dek.state.name()
            ));
        }
        let Some(last) = deks.last() else { break };
        let after = Some(last.dek.id);
        deks = app.operations.kek_use(&permit, kek, Page { after, limit: 1_000 }).await?.1;
    }
    Ok(())
}
