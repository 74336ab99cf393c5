//! Tries out every master key with the credentials at hand, as the service would use it.

use super::App;
use crate::kms::{KekState, Kms, KmsError, Urgency, trial_context};
use crate::store::{StoreError, TenantRecord};
use crate::tenant::{Kek, KekHome, KekId, TenantId};

/// How many tenants are read from the registry at a go.
const PAGE: u32 = 500;

/// What was found out about one KEK of one tenant.
pub struct Finding {
    /// Whose ring it is in.
    pub tenant: TenantId,
    /// Which.
    pub kek: KekId,
    /// Each check that was made, in the order of [`Check::ALL`].
    pub checks: Vec<(Check, Result<(), Trouble>)>,
}

/// What is wrong.
pub struct Trouble {
    /// What the KMS said.
    pub said: String,
    /// The IAM action that is not allowed, where it is that.
    pub missing_action: Option<String>,
}

/// What is tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Check {
    /// It is enabled.
    Describe,
    /// It makes a data key.
    Generate,
    /// It opens what it made.
    Unwrap,
    /// It wraps a data key that another member of the ring made.
    Wrap,
    /// It wraps anew what it wrapped before.
    Rewrap,
}

impl Check {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Describe, Self::Generate, Self::Unwrap, Self::Wrap, Self::Rewrap];

    /// Its name in the table.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Describe => "describe",
            Self::Generate => "generate",
            Self::Unwrap => "unwrap",
            Self::Wrap => "wrap",
            Self::Rewrap => "rewrap",
        }
    }

    /// The IAM action that it takes in AWS.
    const fn action(self) -> &'static str {
        match self {
            Self::Describe => "kms:DescribeKey",
            Self::Generate => "kms:GenerateDataKey",
            Self::Unwrap => "kms:Decrypt",
            Self::Wrap => "kms:Encrypt",
            Self::Rewrap => "kms:ReEncryptFrom and kms:ReEncryptTo",
        }
    }
}

impl App {
    /// Tries out the KEK rings of all tenants, or of one. Nothing is kept of the data keys that are made for it.
    pub async fn examine(&self, only: Option<&TenantId>) -> Result<Vec<Finding>, StoreError> {
        let mut findings = Vec::new();
        for tenant in self.rings_of(only).await? {
            for kek in tenant.ring.members() {
                findings.push(examine(&*self.kms, &tenant.id, kek).await);
            }
        }
        Ok(findings)
    }

    async fn rings_of(&self, only: Option<&TenantId>) -> Result<Vec<TenantRecord>, StoreError> {
        if let Some(id) = only {
            let missing = || StoreError::Missing(format!("tenant '{id}'").into());
            return Ok(vec![self.store.tenant(id).await?.ok_or_else(missing)?]);
        }
        let mut tenants: Vec<TenantRecord> = Vec::new();
        loop {
            let page = self.store.tenants(tenants.last().map(|last| &last.id), PAGE).await?;
            if page.is_empty() {
                return Ok(tenants);
            }
            tenants.extend(page);
        }
    }
}

/// The context is as the tenant's own data keys have it: a key's policy may depend on it.
async fn examine(kms: &dyn Kms, tenant: &TenantId, kek: &Kek) -> Finding {
    let mut checks = Vec::new();
    let described =
        kms.describe(kek, Urgency::Background).await.and_then(|described| match described.state {
            KekState::Enabled => Ok(()),
            KekState::Disabled => Err(KmsError::denied(&kek.id, "it is disabled")),
            KekState::PendingDeletion => Err(KmsError::denied(&kek.id, "its deletion is scheduled")),
            KekState::Unusable => Err(KmsError::denied(&kek.id, "it cannot be used now")),
        });
    checks.push((Check::Describe, described));
    let context = trial_context(tenant);
    match kms.generate(kek, &context, Urgency::Background).await {
        Ok(made) => {
            checks.push((Check::Generate, Ok(())));
            let blob = &made.wrapped.blob;
            let opened = kms.unwrap(kek, &context, blob, Urgency::Background).await;
            checks.push((Check::Unwrap, opened.map(drop)));
            let wrapped = kms.wrap(kek, &context, &made.plaintext, Urgency::Background).await;
            checks.push((Check::Wrap, wrapped.map(drop)));
            let moved = kms.rewrap(kek, kek, &context, blob, Urgency::Background).await;
            checks.push((Check::Rewrap, moved.map(drop)));
        }
        Err(failed) => checks.push((Check::Generate, Err(failed))),
    }
    let checks = checks
        .into_iter()
        .map(|(check, outcome)| (check, outcome.map_err(|error| trouble(check, kek, &error))));
    Finding { tenant: tenant.clone(), kek: kek.id.clone(), checks: checks.collect() }
}

fn trouble(check: Check, kek: &Kek, error: &KmsError) -> Trouble {
    let said = match error {
        KmsError::Outage { detail, .. }
        | KmsError::Denied { detail, .. }
        | KmsError::Damaged { detail, .. } => detail.to_string(),
    };
    let in_aws = matches!(kek.id.home(), KekHome::Aws { .. });
    let not_allowed = matches!(error, KmsError::Denied { .. }) && said.contains("AccessDenied") && in_aws;
    let missing_action = not_allowed.then(|| named_action(&said).unwrap_or(check.action()).to_owned());
    Trouble { said, missing_action }
}

/// AWS says it as "... is not authorized to perform: kms:Decrypt on resource: ...".
fn named_action(said: &str) -> Option<&str> {
    let (_, after) = said.split_once("perform: ")?;
    let action = after.split([' ', ',', '"']).next()?;
    action.contains(':').then_some(action)
}
