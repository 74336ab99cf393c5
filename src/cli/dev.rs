//! `keyfold serve --dev`: what a first start makes.

use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::{Context as _, bail};
use zeroize::Zeroizing;

use super::output;
use crate::access::{Presented, Principal};
use crate::app::{App, keyring_protection};
use crate::clock::Clock;
use crate::config::{Settings, Variables, write_new_secret};
use crate::kms::local::{LocalKeyRing, Protection};
use crate::operations::{ApiKeyGrant, OperationError};
use crate::spread::Near;
use crate::store::TenantRecord;
use crate::tenant::{Kek, KekHome, KekId, KekRing, TenantId, Verb};

const TENANT: &str = "dev";
const KEK: &str = "local:dev";

/// What to tell whoever started it.
pub(super) struct Welcome {
    token: Option<Zeroizing<String>>,
    token_file: PathBuf,
}

impl Welcome {
    pub(super) fn text(&self, address: SocketAddr, settings: &Settings) -> String {
        let scheme = if settings.tls.is_on() { "https" } else { "http" };
        let base = format!("{scheme}://{address}");
        let trust = if settings.tls.self_signed {
            format!("--cacert {} ", settings.data_dir.join("tls-self-signed.pem").display())
        } else {
            String::new()
        };
        let Some(token) = &self.token else {
            return format!(
                "keyfold (development) on {base} - docs: {base}/docs - the API key is in {}",
                self.token_file.display()
            );
        };
        format!(
            "keyfold (development) on {base} - docs: {base}/docs\n\
             The API key of the tenant '{TENANT}' is shown this once, and kept in {file}:\n\n  {token}\n\n\
             Try it:\n\n  curl {trust}{base}/v1/encrypt -H 'Authorization: Bearer {token}' \
             -H 'Content-Type: application/json' -d '{{\"plaintext\":\"aGVsbG8=\"}}'\n",
            token = token.as_str(),
            file = self.token_file.display(),
        )
    }
}

/// Opens the service on a data folder for development, and makes what is missing there.
pub(super) async fn open(
    settings: &Settings,
    variables: &Variables,
    kek: Option<KekId>,
) -> anyhow::Result<(App, Welcome)> {
    let kek = kek.map_or_else(|| KEK.parse().context("the default KEK"), Ok)?;
    make_key_ring(settings, variables, &kek).await?;
    let app = App::open(settings, variables, true).await?;
    let operator = Principal::local_operator();
    let tenant: TenantId = TENANT.parse()?;
    let token_file = settings.data_dir.join("dev-api-key");
    make_tenant(&app, &operator, &tenant, &kek).await?;
    let token = if token_file.exists() {
        check_token(&app, &token_file).await;
        None
    } else {
        Some(make_token(&app, &operator, tenant, &token_file).await?)
    };
    Ok((app, Welcome { token, token_file }))
}

/// The file is there from an earlier start: says so where its API key is not (or no longer) one of this registry's.
async fn check_token(app: &App, file: &std::path::Path) {
    let token = std::fs::read_to_string(file).map(Zeroizing::new).unwrap_or_default();
    if app.access.authenticate(Presented { bearer: Some(token.trim_end()), certificates: &[] }).await.is_err()
    {
        output::note(format_args!(
            "the API key in {} is not valid: remove the file and start again to have a new one made",
            file.display()
        ));
    }
}

async fn make_key_ring(settings: &Settings, variables: &Variables, kek: &KekId) -> anyhow::Result<()> {
    let KekHome::Local { name } = kek.home() else { return Ok(()) };
    let (file, clock) = (settings.keyring_file(), Clock::system());
    let protection = keyring_protection(settings, variables, true)?;
    let ring = if file.exists() {
        LocalKeyRing::open(file, protection, clock).await?
    } else {
        if matches!(protection, Protection::Dev) {
            output::note(
                "making an unencrypted key ring for development: never use it for data that matters",
            );
        }
        LocalKeyRing::create(file, protection, clock).await?
    };
    if !ring.list().await?.iter().any(|known| known.id == *kek) {
        ring.add(name).await?;
    }
    Ok(())
}

async fn make_tenant(
    app: &App,
    operator: &Near<Principal>,
    tenant: &TenantId,
    kek: &KekId,
) -> anyhow::Result<()> {
    let permit = operator.permit_admin(tenant)?;
    match app.operations.tenant(&permit).await {
        Ok(record) => same_kek(&record, kek)?,
        Err(OperationError::NotFound(_)) => {
            let ring = KekRing::new(vec![Kek::direct(kek.clone())])?;
            let made = app.operations.create_tenant(&operator.permit_operate()?, tenant.clone(), ring).await;
            made.context("the tenant 'dev' cannot be made")?;
        }
        Err(error) => return Err(error.into()),
    }
    Ok(())
}

/// The tenant is there from an earlier start: a different `--kek` now is a misunderstanding, and is said so.
fn same_kek(record: &TenantRecord, kek: &KekId) -> anyhow::Result<()> {
    let primary = &record.ring.members()[0].id;
    // Without --kek whatever the tenant has is right.
    if primary != kek && kek.as_str() != KEK {
        bail!(
            "the tenant 'dev' in this data folder has the KEK {primary}, not {kek}: leave --kek out, change it with \
             `keyfold tenant set-keks dev {kek}`, or name another folder with --data-dir"
        );
    }
    Ok(())
}

async fn make_token(
    app: &App,
    operator: &Near<Principal>,
    tenant: TenantId,
    file: &std::path::Path,
) -> anyhow::Result<Zeroizing<String>> {
    let permit = operator.permit_admin(&tenant)?;
    let grant = ApiKeyGrant {
        name: "dev".to_owned(),
        tenants: vec![tenant],
        verbs: Verb::ALL.to_vec(),
        expires_at: None,
    };
    let new = app.operations.create_api_key(&permit, operator, grant).await?;
    let text = Zeroizing::new(format!("{}\n", new.token.as_str()));
    write_new_secret(file, text.as_bytes())
        .with_context(|| format!("{} cannot be written", file.display()))?;
    Ok(new.token)
}
