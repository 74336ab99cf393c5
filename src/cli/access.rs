//! `keyfold access`: asks the service's own rules, on its own configuration and registry. Needs no key.

use std::path::PathBuf;

use anyhow::{Context as _, bail};
use clap::{Args, Subcommand};
use envelope::EncryptionContext;

use super::output;
use crate::access::Principal;
use crate::access::client_cert::{self, CertificateNames};
use crate::access::granted::Book;
use crate::access::rules::Rules;
use crate::app::open_store;
use crate::config::Settings;
use crate::store::{ApiKeyRecord, GrantRecord, GrantStore as _, Store as _};
use crate::tenant::{KeyName, TenantId, Verb};

#[derive(Subcommand)]
pub(super) enum AccessCommand {
    /// Tell why a call would be allowed or refused. The exit code is 0 where it is allowed and 1 where not.
    Explain(ExplainArgs),
}

#[derive(Args)]
pub(super) struct ExplainArgs {
    #[command(flatten)]
    who: Who,
    /// What is to be done: encrypt, decrypt, rewrap, admin or operate.
    #[arg(long)]
    verb: Verb,
    /// In which tenant.
    #[arg(long)]
    tenant: TenantId,
    /// With which key.
    #[arg(long, default_value = KeyName::DEFAULT)]
    key: KeyName,
    /// With which pairs in the encryption context, those included that the service takes from the request.
    #[arg(long, value_name = "NAME=VALUE")]
    context: Vec<String>,
}

#[derive(Args)]
#[group(required = true, multiple = false)]
struct Who {
    /// The id of an API key in the registry: what stands between the first and the second '_' of the key.
    #[arg(long, value_name = "ID")]
    api_key: Option<String>,
    /// A file with the claims of a token, as JSON. Neither signature nor times are looked at.
    #[arg(long, value_name = "FILE")]
    claims: Option<PathBuf>,
    /// A client certificate in PEM. Its authority and validity are not looked at.
    #[arg(long, value_name = "FILE")]
    certificate: Option<PathBuf>,
}

pub(super) async fn run(settings: &Settings, command: AccessCommand) -> anyhow::Result<()> {
    let AccessCommand::Explain(args) = command;
    let rules = settings.access.rules()?;
    let (book, record) = registry(settings, args.who.api_key.as_deref()).await?;
    let principal = find(&rules, &book, &args.who, record)?;
    let mut context = EncryptionContext::new();
    for pair in &args.context {
        let (name, value) =
            pair.split_once('=').with_context(|| format!("--context is NAME=VALUE, and not {pair:?}"))?;
        context.insert(name, value).with_context(|| format!("--context {pair:?}"))?;
    }
    context.insert("keyfold:tenant", args.tenant.as_str())?;
    context.insert("keyfold:key", args.key.as_str())?;
    let explanation = principal.explain(args.verb, &args.tenant, &args.key, &context);
    output::line(format_args!("principal  {}", principal.id()));
    for reason in &explanation.reasons {
        output::line(format_args!("           {reason}"));
    }
    match explanation.outcome {
        Ok(()) => {
            output::line("allowed");
            Ok(())
        }
        Err(forbidden) => bail!("refused: {forbidden}"),
    }
}

/// The grants of the registry, and the API key that is asked for. Who has no registry has neither.
async fn registry(
    settings: &Settings,
    api_key: Option<&str>,
) -> anyhow::Result<(Book, Option<ApiKeyRecord>)> {
    if !settings.registry_file().exists() && api_key.is_none() {
        return Ok((Book::default(), None));
    }
    let store = open_store(settings).await?;
    let found = async {
        let mut grants: Vec<GrantRecord> = Vec::new();
        loop {
            let after = grants.last().map(|grant| grant.id.clone());
            let page = store.grants(None, after.as_deref(), 1_000).await?;
            if page.is_empty() {
                break;
            }
            grants.extend(page);
        }
        let record = match api_key {
            Some(id) => {
                Some(store.api_key(id).await?.with_context(|| format!("there is no API key {id:?}"))?)
            }
            None => None,
        };
        Ok((Book::new(&grants), record))
    }
    .await;
    store.close().await;
    found
}

fn find(rules: &Rules, book: &Book, who: &Who, record: Option<ApiKeyRecord>) -> anyhow::Result<Principal> {
    if let Some(record) = record {
        if record.revoked_at.is_some() {
            bail!("refused: the API key {} is revoked", record.id);
        }
        return rules.of_api_key(book, &record).context("the API key's id is not one");
    }
    if let Some(file) = &who.certificate {
        let pem = std::fs::read(file).with_context(|| format!("{} cannot be read", file.display()))?;
        let names = CertificateNames::of_pem(&pem)
            .with_context(|| format!("{} holds no certificate in PEM", file.display()))?;
        return client_cert::principal(rules, book, &names).with_context(|| {
            format!(
                "refused: no rule in access.certificates is for this certificate; its URIs are {:?}, its DNS names \
                 {:?}, its SHA-256 {}",
                names.uris,
                names.dns,
                names.fingerprint_text()
            )
        });
    }
    let file = who.claims.as_ref().context("name --api-key, --claims or --certificate")?;
    let text = std::fs::read_to_string(file).with_context(|| format!("{} cannot be read", file.display()))?;
    rules.of_claims_text(book, &text).map_err(|reason| anyhow::anyhow!("refused: {reason}"))
}
