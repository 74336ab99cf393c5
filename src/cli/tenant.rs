//! `keyfold tenant`: on the service's own data folder, while it runs or not.

use std::str::FromStr;

use clap::Subcommand;

use super::output;
use crate::access::Principal;
use crate::app::App;
use crate::config::{Settings, Variables};
use crate::kms::local::LocalKeyRing;
use crate::operations::{Page, TenantChange};
use crate::store::{Status, TenantRecord};
use crate::tenant::{AssumedRole, InvalidName, Kek, KekId, KekRing, TenantId};

#[derive(Subcommand)]
pub(super) enum TenantCommand {
    /// Make a tenant.
    Create {
        /// Its id: 1 to 63 characters of a-z, 0-9 and '-'.
        tenant: TenantId,
        /// Its master keys, the primary first: ARNs of AWS KMS keys, or local:NAME. A key in another account is
        /// reached through a role there: ARN,role=ROLE-ARN or ARN,role=ROLE-ARN,external-id=ID.
        #[arg(required = true, value_name = "KEK")]
        keks: Vec<KekArg>,
    },
    /// List the tenants.
    List,
    /// Change a tenant's master keys, the primary first. Former ones stay believed for opening.
    SetKeks {
        /// The tenant.
        tenant: TenantId,
        /// Its master keys from now on, written as for `create`.
        #[arg(required = true, value_name = "KEK")]
        keks: Vec<KekArg>,
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

fn ring(keks: Vec<KekArg>) -> anyhow::Result<KekRing> {
    Ok(KekRing::new(keks.into_iter().map(|kek| kek.0).collect())?)
}

/// A KEK on the command line, with the role to assume for it.
#[derive(Clone)]
pub(super) struct KekArg(Kek);

impl FromStr for KekArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (id, role) = match text.split_once(",role=") {
            Some((id, role)) => (id, Some(role)),
            None => (text, None),
        };
        let id: KekId = id.parse().map_err(|invalid: InvalidName| invalid.to_string())?;
        let Some(role) = role else { return Ok(Self(Kek::direct(id))) };
        // An external id may hold commas: it is all that is left.
        let (arn, external_id) = match role.split_once(",external-id=") {
            Some((arn, external_id)) => (arn, Some(external_id)),
            None => (role, None),
        };
        if id.region().is_none() || !arn.starts_with("arn:") || !arn.contains(":role/") {
            return Err(
                "a role is written KEY-ARN,role=arn:aws:iam::ACCOUNT:role/NAME, and only for a key of \
                        AWS KMS"
                    .to_owned(),
            );
        }
        let role = AssumedRole { arn: arn.into(), external_id: external_id.map(Into::into) };
        Ok(Self(Kek { id, role: Some(role) }))
    }
}

fn show(tenant: &TenantRecord) {
    let keks: Vec<&str> = tenant.ring.members().iter().map(|kek| kek.id.as_str()).collect();
    output::line(format_args!("{}  {}  {}", tenant.id, tenant.status.name(), keks.join(" ")));
}
