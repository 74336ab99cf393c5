//! `keyfold rotate`, `deks`, `revoke`, `restore`, `shred`: on the service's own data folder, while it runs or not.

use clap::{Args, Subcommand};
use envelope::DataKeyId;

use super::output;
use crate::access::Principal;
use crate::app::App;
use crate::config::{Settings, Variables};
use crate::kms::local::LocalKeyRing;
use crate::operations::{KeyChange, Page, Shredding, TenantChange};
use crate::store::{Status, StoredDek, Target};
use crate::tenant::{KeyName, TenantId};

#[derive(Subcommand)]
pub(super) enum KeysCommand {
    /// End a key's active data key now; the next one takes its place. What was sealed before still opens.
    Rotate {
        /// The tenant.
        tenant: TenantId,
        /// The key; all of the tenant's where none is named.
        key: Option<KeyName>,
    },
    /// List a key's data keys: state, counts, when each last sealed and opened something.
    Deks {
        /// The tenant.
        tenant: TenantId,
        /// The key.
        #[arg(default_value = "default")]
        key: KeyName,
    },
    /// Let a data key, a key or a tenant open and seal nothing until it is restored.
    Revoke(What),
    /// Take a revocation back. A data key opens again what it sealed; it seals nothing more.
    Restore(What),
    /// Destroy a data key, a key or a tenant after a waiting period. It opens nothing from now on.
    Shred {
        #[command(flatten)]
        what: What,
        /// How long this can be cancelled, in hours. 7 days where nothing is said.
        #[arg(long)]
        waiting_hours: Option<u64>,
        /// Cancel it. What was revoked stays so until it is restored.
        #[arg(long, conflicts_with = "waiting_hours")]
        cancel: bool,
    },
}

/// A data key, a key, or a whole tenant.
#[derive(Args)]
pub(super) struct What {
    /// The tenant.
    tenant: TenantId,
    /// One of its keys. Without --key and --dek it is the whole tenant.
    #[arg(long)]
    key: Option<KeyName>,
    /// One data key, by its id: `keyfold inspect` finds it in an envelope.
    #[arg(long, conflicts_with = "key", value_name = "ID")]
    dek: Option<DataKeyId>,
}

impl What {
    fn target(&self) -> Target {
        match (&self.key, self.dek) {
            (_, Some(dek)) => Target::Dek(dek),
            (Some(key), None) => Target::Key(key.clone()),
            (None, None) => Target::Tenant,
        }
    }
}

pub(super) async fn run(
    settings: &Settings,
    command: KeysCommand,
    variables: &Variables,
) -> anyhow::Result<()> {
    let dev = LocalKeyRing::is_unencrypted(&settings.keyring_file());
    let app = App::open(settings, variables, dev).await?;
    let outcome = act(&app, command).await;
    app.stop().await;
    outcome
}

async fn act(app: &App, command: KeysCommand) -> anyhow::Result<()> {
    match command {
        KeysCommand::Rotate { tenant, key } => rotate(app, &tenant, key).await,
        KeysCommand::Deks { tenant, key } => list(app, &tenant, &key).await,
        KeysCommand::Revoke(what) => switch(app, &what, false).await,
        KeysCommand::Restore(what) => switch(app, &what, true).await,
        KeysCommand::Shred { what, waiting_hours, cancel } => shred(app, &what, waiting_hours, cancel).await,
    }
}

async fn rotate(app: &App, tenant: &TenantId, key: Option<KeyName>) -> anyhow::Result<()> {
    let permit = Principal::local_operator().permit_admin(tenant)?;
    let mut keys: Vec<KeyName> = key.into_iter().collect();
    if keys.is_empty() {
        let mut after = None;
        loop {
            let page = app.operations.list_keys(&permit, Page { after, limit: 1_000 }).await?;
            let Some(last) = page.last() else { break };
            after = Some(last.name.clone());
            keys.extend(page.into_iter().map(|key| key.name));
        }
    }
    for key in keys {
        let rotated = app.operations.rotate_key(&permit, &key).await?;
        if rotated.is_empty() {
            output::line(format_args!("{key}  was not used yet: it has no data key to end"));
        }
        for one in rotated {
            output::line(format_args!("{key}  {} -> {}", one.from, one.to));
        }
    }
    Ok(())
}

async fn list(app: &App, tenant: &TenantId, key: &KeyName) -> anyhow::Result<()> {
    let permit = Principal::local_operator().permit_admin(tenant)?;
    let mut after = None;
    loop {
        let page = app.operations.list_deks(&permit, key, Page { after, limit: 1_000 }).await?;
        let Some(last) = page.last() else { return Ok(()) };
        after = Some(last.dek.id);
        page.iter().for_each(show);
    }
}

fn show(stored: &StoredDek) {
    let dek = &stored.dek;
    let at = |at: Option<crate::clock::Timestamp>| at.map_or_else(|| "never".to_owned(), |at| at.to_string());
    let keks: Vec<&str> = stored.wrapped.iter().map(|form| form.kek.as_str()).collect();
    output::line(format_args!(
        "{}  {}  made {}  {} messages  {} bytes  last sealed {}  last opened {}  under {}",
        dek.id,
        dek.state.name(),
        dek.created_at,
        dek.messages,
        dek.bytes,
        at(dek.last_sealed_at),
        at(dek.last_opened_at),
        if keks.is_empty() { "nothing".to_owned() } else { keks.join(" ") },
    ));
}

async fn switch(app: &App, what: &What, on: bool) -> anyhow::Result<()> {
    let operator = Principal::local_operator();
    let permit = operator.permit_admin(&what.tenant)?;
    let status = Some(if on { Status::Enabled } else { Status::Disabled });
    let done = if on { "restored" } else { "revoked" };
    match what.target() {
        Target::Dek(dek) => {
            let stored = if on {
                app.operations.restore_dek(&permit, dek).await?
            } else {
                app.operations.revoke_dek(&permit, dek).await?
            };
            show(&stored);
        }
        Target::Key(key) => {
            let change = KeyChange { status, ..KeyChange::default() };
            app.operations.update_key(&permit, &key, change).await?;
            output::line(format_args!("{done} the key {key} of {}", what.tenant));
        }
        Target::Tenant => {
            let change = TenantChange { status, ..TenantChange::default() };
            app.operations.update_tenant(&permit, &operator.permit_operate()?, change).await?;
            output::line(format_args!("{done} the tenant {}", what.tenant));
        }
    }
    Ok(())
}

async fn shred(app: &App, what: &What, waiting_hours: Option<u64>, cancel: bool) -> anyhow::Result<()> {
    let operator = Principal::local_operator();
    let permit = operator.permit_admin(&what.tenant)?;
    let target = what.target();
    if cancel {
        app.operations.cancel_shred(&permit, &target).await?;
        output::line("cancelled: it stays revoked until it is restored");
        return Ok(());
    }
    let waiting_secs = waiting_hours.map(|hours| hours.saturating_mul(3_600));
    let shredding = match target {
        Target::Tenant => {
            app.operations.shred_tenant(&permit, &operator.permit_operate()?, waiting_secs).await?
        }
        target => app.operations.shred(&permit, target, waiting_secs).await?,
    };
    tell(&shredding);
    Ok(())
}

fn tell(shredding: &Shredding) {
    output::line(format_args!(
        "opens nothing from now on; destroyed for good at {} (until then: --cancel)",
        shredding.record.due_at
    ));
    output::line("What that does not reach:");
    for beyond in &shredding.beyond_reach {
        output::line(format_args!("- {}: {}", beyond.what, beyond.advice));
        for (kek, of) in &beyond.keks {
            let tenants = of.rings + of.former_rings;
            output::line(format_args!("    {kek}: {tenants} tenant(s) depend on it or did"));
        }
    }
}
