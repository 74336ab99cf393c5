//! `keyfold api-key`: on the service's own data folder, while it runs or not.

use anyhow::Context as _;
use clap::Subcommand;

use super::output;
use crate::access::Principal;
use crate::app::App;
use crate::clock::Timestamp;
use crate::config::{Settings, Variables};
use crate::kms::local::LocalKeyRing;
use crate::operations::{ApiKeyGrant, Page};
use crate::store::ApiKeyRecord;
use crate::tenant::{TenantId, Verb};

#[derive(Subcommand)]
pub(super) enum ApiKeyCommand {
    /// Make an API key. Its token is printed once, and kept nowhere.
    Create {
        /// The tenants that it holds.
        #[arg(required = true, value_name = "TENANT")]
        tenants: Vec<TenantId>,
        /// What people call it.
        #[arg(long)]
        name: String,
        /// What it may do: encrypt, decrypt, rewrap, admin, operate. None implies another.
        #[arg(long, required = true, value_delimiter = ',')]
        verbs: Vec<Verb>,
        /// From when on it is refused, as 2027-11-23T12:00:00Z.
        #[arg(long, value_name = "TIME")]
        expires_at: Option<String>,
    },
    /// List the API keys of a tenant.
    List {
        /// The tenant.
        tenant: TenantId,
    },
    /// Revoke an API key. A running service refuses it within seconds.
    Revoke {
        /// A tenant that it holds.
        tenant: TenantId,
        /// Its id: the 16 characters that follow `kf_` in its token.
        #[arg(allow_hyphen_values = true)]
        id: String,
    },
}

pub(super) async fn run(
    settings: &Settings,
    command: ApiKeyCommand,
    variables: &Variables,
) -> anyhow::Result<()> {
    let dev = LocalKeyRing::is_unencrypted(&settings.keyring_file());
    let app = App::open(settings, variables, dev).await?;
    let outcome = act(&app, command).await;
    app.stop().await;
    outcome
}

async fn act(app: &App, command: ApiKeyCommand) -> anyhow::Result<()> {
    let operator = Principal::local_operator();
    match command {
        ApiKeyCommand::Create { tenants, name, verbs, expires_at } => {
            let expires_at = expires_at.map(|text| {
                Timestamp::parse_rfc3339(&text).context("--expires-at takes a time as 2027-11-23T12:00:00Z")
            });
            let permit = operator.permit_admin(&tenants[0])?;
            let grant = ApiKeyGrant { name, tenants, verbs, expires_at: expires_at.transpose()? };
            let new = app.operations.create_api_key(&permit, &operator, grant).await?;
            show(&new.record);
            output::line(new.token.as_str());
        }
        ApiKeyCommand::List { tenant } => {
            let permit = operator.permit_admin(&tenant)?;
            let mut after = None;
            loop {
                let page = app.operations.list_api_keys(&permit, Page { after, limit: 1_000 }).await?;
                let Some(last) = page.last() else { break };
                after = Some(last.id.clone());
                page.iter().for_each(show);
            }
        }
        ApiKeyCommand::Revoke { tenant, id } => {
            show(&app.operations.revoke_api_key(&operator.permit_admin(&tenant)?, &id).await?);
        }
    }
    Ok(())
}

fn show(key: &ApiKeyRecord) {
    let tenants: Vec<&str> = key.tenants.iter().map(TenantId::as_str).collect();
    let verbs: Vec<&str> = key.verbs.iter().map(|verb| verb.name()).collect();
    let state = match (key.revoked_at, key.expires_at) {
        (Some(at), _) => format!("revoked {at}"),
        (None, Some(at)) => format!("expires {at}"),
        (None, None) => "does not expire".to_owned(),
    };
    output::line(format_args!(
        "{}  {:?}  tenants {}  verbs {}  {state}",
        key.id,
        key.name,
        tenants.join(","),
        verbs.join(",")
    ));
}
