//! `keyfold tenant`: on the service's own data folder, while it runs or not.

use clap::Subcommand;

use super::output;
use crate::access::Principal;
use crate::app::App;
use crate::config::{Settings, Variables};
use crate::kms::local::LocalKeyRing;
use crate::operations::{Page, TenantChange};
use crate::store::{Status, TenantRecord};
use crate::tenant::{Kek, KekId, KekRing, TenantId};

#[derive(Subcommand)]
pub(super) enum TenantCommand {
    /// Make a tenant.
    Create {
        /// Its id: 1 to 63 characters of a-z, 0-9 and '-'.
        tenant: TenantId,
        /// Its master keys, the primary first: ARNs of AWS KMS keys, or local:NAME.
        #[arg(required = true, value_name = "KEK")]
        keks: Vec<KekId>,
    },
    /// List the tenants.
    List,
    /// Change a tenant's master keys, the primary first. Former ones stay believed for opening.
    SetKeks {
        /// The tenant.
        tenant: TenantId,
        /// Its master keys from now on.
        #[arg(required = true, value_name = "KEK")]
        keks: Vec<KekId>,
    },
    /// Stop serving a tenant.
    Disable {
        /// The tenant.
        tenant: TenantId,
    },
    /// Serve a tenant again.
    Enable {
        /// The tenant.
        tenant: TenantId,
    },
}

pub(super) async fn run(
    settings: &Settings,
    command: TenantCommand,
    variables: &Variables,
) -> anyhow::Result<()> {
    let dev = LocalKeyRing::is_unencrypted(&settings.keyring_file());
    let app = App::open(settings, variables, dev).await?;
    let outcome = act(&app, command).await;
    app.stop().await;
    outcome
}

async fn act(app: &App, command: TenantCommand) -> anyhow::Result<()> {
    let operator = Principal::local_operator();
    let operate = operator.permit_operate()?;
    match command {
        TenantCommand::Create { tenant, keks } => {
            show(&app.operations.create_tenant(&operate, tenant, ring(keks)?).await?);
        }
        TenantCommand::List => {
            let mut after = None;
            loop {
                let page = app.operations.list_tenants(&operate, Page { after, limit: 1_000 }).await?;
                let Some(last) = page.last() else { break };
                after = Some(last.id.clone());
                page.iter().for_each(show);
            }
        }
        TenantCommand::SetKeks { tenant, keks } => {
            let change = TenantChange { ring: Some(ring(keks)?), ..TenantChange::default() };
            show(&app.operations.update_tenant(&operator.permit_admin(&tenant)?, &operate, change).await?);
        }
        TenantCommand::Disable { tenant } => {
            let change = TenantChange { status: Some(Status::Disabled), ..TenantChange::default() };
            show(&app.operations.update_tenant(&operator.permit_admin(&tenant)?, &operate, change).await?);
        }
        TenantCommand::Enable { tenant } => {
            let change = TenantChange { status: Some(Status::Enabled), ..TenantChange::default() };
            show(&app.operations.update_tenant(&operator.permit_admin(&tenant)?, &operate, change).await?);
        }
    }
    Ok(())
}

fn ring(keks: Vec<KekId>) -> anyhow::Result<KekRing> {
    Ok(KekRing::new(keks.into_iter().map(Kek::direct).collect())?)
}

fn show(tenant: &TenantRecord) {
    let keks: Vec<&str> = tenant.ring.members().iter().map(|kek| kek.id.as_str()).collect();
    output::line(format_args!("{}  {}  {}", tenant.id, tenant.status.name(), keks.join(" ")));
}
