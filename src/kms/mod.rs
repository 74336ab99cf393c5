//! The key management services that hold the master keys (KEKs).
//!
//! [`Kms`] is the contract; [`local`] is the embedded key ring, [`aws`] AWS KMS. [`guarded`] keeps a KMS's troubles
//! from becoming the service's, [`ring`] spreads one data key over the KEKs of a tenant. An error says which of three
//! things happened, because they call for three different answers: the KMS could not be asked
//! ([`KmsError::Outage`]), it said no ([`KmsError::Denied`]), or what it was given is not what it once made
//! ([`KmsError::Damaged`]).

pub mod aws;
pub mod guarded;
pub mod local;
pub mod ring;
pub mod router;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use envelope::{ContextError, DataKeyId, EncryptionContext, KeyMaterial};

use crate::tenant::{Kek, KekId, KeyName, TenantId};

/// A service that keeps master keys and never gives them out.
///
/// Contract, tested for every implementation by `tests/it/kms_contract.rs`:
/// - what `generate` or `wrap` made, `unwrap` opens under the same KEK and context, and under no other;
/// - a wrapped key is authenticated: a changed byte is [`KmsError::Damaged`], never another key;
/// - after the KEK's material was rotated, what was wrapped before still opens;
/// - a disabled KEK, one pending deletion, and one that does not exist are [`KmsError::Denied`] for everything but
///   `describe`, which tells the state of the first two;
/// - every call may be repeated; none changes what an earlier one gave.
#[async_trait]
pub trait Kms: Send + Sync {
    /// Makes a new 256-bit data key: in plaintext, and wrapped under `kek` with `context`.
    async fn generate(
        &self,
        kek: &Kek,
        context: &EncryptionContext,
        urgency: Urgency,
    ) -> Result<Generated, KmsError>;

    /// Wraps a data key that another KEK's KMS made.
    async fn wrap(
        &self,
        kek: &Kek,
        context: &EncryptionContext,
        plaintext: &KeyMaterial,
        urgency: Urgency,
    ) -> Result<Wrapped, KmsError>;

    /// Gives back the data key in `blob`.
    async fn unwrap(
        &self,
        kek: &Kek,
        context: &EncryptionContext,
        blob: &[u8],
        urgency: Urgency,
    ) -> Result<KeyMaterial, KmsError>;

    /// Wraps the data key in `blob` anew, under `to`'s current material. The plaintext stays inside the KMS where
    /// one KMS holds both KEKs.
    async fn rewrap(
        &self,
        from: &Kek,
        to: &Kek,
        context: &EncryptionContext,
        blob: &[u8],
        urgency: Urgency,
    ) -> Result<Wrapped, KmsError>;

    /// What is known of a KEK: its state and its current material.
    async fn describe(&self, kek: &Kek, urgency: Urgency) -> Result<KekDescription, KmsError>;
}

/// Who waits for a call: a guard serves the foreground before the background.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Urgency {
    /// A client's request waits.
    Foreground,
    /// Nobody waits: renewal ahead of time, rotation.
    Background,
}

/// A new data key.
pub struct Generated {
    /// The key itself.
    pub plaintext: KeyMaterial,
    /// The same, wrapped.
    pub wrapped: Wrapped,
}

/// A data key wrapped under a KEK.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wrapped {
    /// The KEK that opens it.
    pub kek: KekId,
    /// The wrapped key exactly as the KMS returned it; at most 65,535 bytes.
    pub blob: Vec<u8>,
    /// Which of the KEK's materials wrapped it, where the KMS tells. A KEK whose current material is another has
    /// been rotated since.
    pub material: Option<String>,
}

/// What a KMS tells of a KEK.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KekDescription {
    /// The KEK.
    pub kek: KekId,
    /// Whether it can be used.
    pub state: KekState,
    /// Its current material, where the KMS tells.
    pub material: Option<String>,
}

/// Whether a KEK can be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KekState {
    /// It wraps and unwraps.
    Enabled,
    /// Its owner has disabled it; he can enable it again.
    Disabled,
    /// Its owner has scheduled its deletion; he can cancel that until it has happened.
    PendingDeletion,
    /// It cannot be used for another reason (being created or updated, or its key store is unavailable).
    Unusable,
}

/// Why a KMS did not do what it was asked. The texts are for operators: they hold no key material.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KmsError {
    /// It could not be asked: a timeout, no connection, a 5xx, throttling. Trying again later may help.
    #[error("the KMS cannot be reached for {kek}: {detail}")]
    Outage {
        /// The KEK that the call was about.
        kek: KekId,
        /// Why.
        cause: OutageCause,
        /// What happened.
        detail: Arc<str>,
        /// After how long it is asked again at the earliest, where that is known: nobody is served before.
        again_in: Option<Duration>,
    },
    /// It said no: not permitted, disabled, pending deletion, no such key.
    #[error("the KMS refuses {kek}: {detail}")]
    Denied {
        /// The KEK that the call was about.
        kek: KekId,
        /// What it answered.
        detail: Arc<str>,
    },
    /// The wrapped key or its context is not what the KMS once wrapped under this KEK.
    #[error("the wrapped key is not one of {kek} in this encryption context: {detail}")]
    Damaged {
        /// The KEK that the call was about.
        kek: KekId,
        /// What it answered.
        detail: Arc<str>,
    },
}

/// Why a KMS could not be asked: it decides who is tried again, and who else is concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OutageCause {
    /// No answer, no connection, or an answer that says that the service is in trouble: everybody's calls to that
    /// region are concerned.
    Unreachable,
    /// Too many calls. Fewer calls help.
    Throttled,
    /// This one key is not available now (its key store is away); others are.
    KeyUnavailable,
    /// The service's own credentials do not do. Asking again at once does not help.
    Credentials,
    /// The service's own limits left no room for the call: the KMS was not asked, and may be well.
    OwnLimit,
}

impl KmsError {
    /// An outage of this KEK's KMS.
    pub fn outage(kek: &KekId, detail: impl Into<Arc<str>>) -> Self {
        Self::outage_by(kek, OutageCause::Unreachable, detail)
    }

    /// An outage of this KEK's KMS, with its cause.
    pub fn outage_by(kek: &KekId, cause: OutageCause, detail: impl Into<Arc<str>>) -> Self {
        Self::Outage { kek: kek.clone(), cause, detail: detail.into(), again_in: None }
    }

    /// An outage of this KEK's KMS, which is left alone for so long.
    pub fn left_alone(kek: &KekId, again_in: Duration, detail: impl Into<Arc<str>>) -> Self {
        let (cause, detail) = (OutageCause::Unreachable, detail.into());
        Self::Outage { kek: kek.clone(), cause, detail, again_in: Some(again_in) }
    }

    /// A denial by this KEK's KMS.
    pub fn denied(kek: &KekId, detail: impl Into<Arc<str>>) -> Self {
        Self::Denied { kek: kek.clone(), detail: detail.into() }
    }

    /// A wrapped key that is not this KEK's.
    pub fn damaged(kek: &KekId, detail: impl Into<Arc<str>>) -> Self {
        Self::Damaged { kek: kek.clone(), detail: detail.into() }
    }

    /// The KEK that the failed call was about.
    pub fn kek(&self) -> &KekId {
        match self {
            Self::Outage { kek, .. } | Self::Denied { kek, .. } | Self::Damaged { kek, .. } => kek,
        }
    }
}

/// The encryption context under which every KMS call for a data key is made, so that the KMS binds the wrapped key
/// to its tenant, key and id, and its audit trail shows them. `bound` are the pairs that the operator's
/// configuration binds to the data key.
pub fn kms_context(
    tenant: &TenantId,
    key: &KeyName,
    dek: DataKeyId,
    bound: &EncryptionContext,
) -> Result<EncryptionContext, ContextError> {
    let mut context = bound.clone();
    context.insert("keyfold:tenant", tenant.as_str())?;
    context.insert("keyfold:key", key.as_str())?;
    context.insert("keyfold:dek", dek.to_string())?;
    Ok(context)
}

/// The context of a trial: as a tenant's data keys have it, since a key's policy may depend on it, for a data key
/// that cannot be.
pub fn trial_context(tenant: &TenantId) -> EncryptionContext {
    let nobody = DataKeyId::from_bytes([0; 16]).to_string();
    let mut context = EncryptionContext::new();
    let pairs =
        [("keyfold:tenant", tenant.as_str()), ("keyfold:key", "default"), ("keyfold:dek", nobody.as_str())];
    for (name, value) in pairs {
        // Three short pairs with different names break no limit.
        let _ = context.insert(name, value);
    }
    context
}
