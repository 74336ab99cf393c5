//! `keyfold grant`: on the service's own data folder, while it runs or not.

use anyhow::Context as _;
use clap::{Args, Subcommand};

use super::output;
use crate::access::Principal;
use crate::app::App;
use crate::config::{Settings, Variables};
use crate::kms::local::LocalKeyRing;
use crate::operations::{NewGrant, Page};
use crate::store::{GrantCondition, GrantRecord, GrantScope};
use crate::tenant::{TenantId, Verb};

#[derive(Subcommand)]
pub(super) enum GrantCommand {
    /// Grant somebody something in a tenant. A running service knows it within seconds.
    Create(CreateArgs),
    /// List the grants in a tenant. What the configuration gives is not among them.
    List {
        /// The tenant.
        tenant: TenantId,
    },
    /// Take a grant back. A running service knows it within seconds.
    Delete {
        /// The tenant.
        tenant: TenantId,
        /// The grant's id.
        id: String,
    },
}

#[derive(Args)]
pub(super) struct CreateArgs {
    /// In which tenant.
    tenant: TenantId,
    /// To whom: api-key:ID, jwt:ISSUER:SUBJECT or cert:NAME, or with a * at the end all that begin so.
    #[arg(long)]
    principal: String,
    /// What: encrypt, decrypt, rewrap, or admin without --keys and --context.
    #[arg(long, required = true, value_delimiter = ',')]
    verbs: Vec<Verb>,
    /// Only with these keys, or with a * at the end those that begin so.
    #[arg(long, value_delimiter = ',')]
    keys: Vec<String>,
    /// Only with encryption contexts that hold this pair. A name that is given again adds a value to choose from; a *
    /// at the end of a value means all that begin so.
    #[arg(long, value_name = "NAME=VALUE")]
    context: Vec<String>,
}

pub(super) async fn run(
    settings: &Settings,
    command: GrantCommand,
    variables: &Variables,
) -> anyhow::Result<()> {
    let dev = LocalKeyRing::is_unencrypted(&settings.keyring_file());
    let app = App::open(settings, variables, dev).await?;
    let outcome = act(&app, command).await;
    app.stop().await;
    outcome
}

async fn act(app: &App, command: GrantCommand) -> anyhow::Result<()> {
    let operator = Principal::local_operator();
    match command {
        GrantCommand::Create(args) => {
            let permit = operator.permit_admin(&args.tenant)?;
            let scope = GrantScope {
                keys: (!args.keys.is_empty()).then_some(args.keys),
                context: conditions(&args.context)?,
            };
            let new = NewGrant { principal: args.principal, verbs: args.verbs, scope };
            show(&app.operations.create_grant(&permit, &operator, new).await?);
        }
        GrantCommand::List { tenant } => {
            let permit = operator.permit_admin(&tenant)?;
            let mut after = None;
            loop {
                let page = app.operations.list_grants(&permit, Page { after, limit: 1_000 }).await?;
                let Some(last) = page.last() else { break };
                after = Some(last.id.clone());
                page.iter().for_each(show);
            }
        }
        GrantCommand::Delete { tenant, id } => {
            app.operations.delete_grant(&operator.permit_admin(&tenant)?, &id).await?;
        }
    }
    Ok(())
}

fn conditions(pairs: &[String]) -> anyhow::Result<Vec<GrantCondition>> {
    let mut conditions: Vec<GrantCondition> = Vec::new();
    for pair in pairs {
        let (name, value) =
            pair.split_once('=').with_context(|| format!("--context is NAME=VALUE, and not {pair:?}"))?;
        match conditions.iter_mut().find(|known| known.name == name) {
            Some(known) => known.values.push(value.to_owned()),
            None => {
                conditions.push(GrantCondition { name: name.to_owned(), values: vec![value.to_owned()] });
            }
        }
    }
    Ok(conditions)
}

fn show(grant: &GrantRecord) {
    let verbs: Vec<&str> = grant.verbs.iter().map(|verb| verb.name()).collect();
    let keys = grant.scope.keys.as_ref().map_or_else(|| "all".to_owned(), |keys| keys.join(","));
    let context = grant.scope.context.iter();
    let context: Vec<String> =
        context.map(|pair| format!("{}={}", pair.name, pair.values.join("|"))).collect();
    let context = if context.is_empty() { "any".to_owned() } else { context.join(" ") };
    output::line(format_args!(
        "{}  {}  verbs {}  keys {keys}  context {context}",
        grant.id,
        grant.principal,
        verbs.join(",")
    ));
}
