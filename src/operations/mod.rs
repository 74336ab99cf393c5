//! The verbs: encrypt, decrypt, rewrap, and administration. No HTTP here.
//!
//! Every operation takes a permit, and takes the tenant from it.

mod administer;
mod batch;
mod decrypt;
mod encrypt;
mod grants;
mod jobs;
mod rewrap;
mod rotate;
mod shred;
mod stream;

use std::sync::Arc;

use envelope::{ContextError, EncryptionContext, FormatError, OpenError, Salt, SealError};
use zeroize::Zeroize as _;

use crate::access::{Access, Forbidden, Permit, PermitVerb, ServiceContext};
use crate::audit::{Attempt, Audit, Details, Stranger, Unrecorded, Who};
use crate::clock::Clock;
use crate::kms::KmsError;
use crate::pool::{DekPool, PoolError};
use crate::store::watch::ChangeWatch;
use crate::store::{DekScope, Registry, StoreError};
use crate::tenant::{Kek, KeyName, TenantId};

pub use administer::{ApiKeyGrant, KeyChange, Page, TenantChange};
pub use batch::{Batch, Decryptor, Encryptor, Rewrapper};
pub use decrypt::{Decrypted, Decryption};
pub use encrypt::{Encrypted, Encryption, Plaintext};
pub use grants::NewGrant;
pub use rewrap::{NewHead, RewrapMode, Rewrapped, Rewrapping};
pub use rotate::Rotated;
pub use shred::{BeyondReach, ShredOptions, Shredding};
pub use stream::{Begun, Sink, Source, StreamDecryption, StreamEncryption, StreamRewrapping, TransferError};

/// What the verbs need. Built once.
pub struct Operations {
    pool: DekPool,
    store: Arc<dyn Registry>,
    watch: Arc<ChangeWatch>,
    access: Arc<Access>,
    audit: Audit,
    clock: Clock,
    keks: Arc<dyn KekCheck>,
    shredding: ShredOptions,
    tenant_keys_max: u64,
}

/// How many keys a tenant may have where nothing else is said.
pub const TENANT_KEYS_MAX: u64 = 1_000;

/// Whether this service can use a master key: asked before a tenant's ring takes it.
#[async_trait::async_trait]
pub trait KekCheck: Send + Sync {
    /// What is wrong with this KEK, said to the operator; nothing where it can be used.
    async fn check(&self, kek: &Kek) -> Result<(), OperationError>;
}

impl Operations {
    /// The verbs over these parts.
    pub fn new(
        pool: DekPool,
        store: Arc<dyn Registry>,
        watch: Arc<ChangeWatch>,
        access: Arc<Access>,
        clock: Clock,
        keks: Arc<dyn KekCheck>,
        audit: Audit,
    ) -> Self {
        let shredding = ShredOptions::default();
        let tenant_keys_max = TENANT_KEYS_MAX;
        Self { pool, store, watch, access, audit, clock, keks, shredding, tenant_keys_max }
    }

    /// The same with other limits for the waiting period of shredding.
    pub fn with_shredding(self, shredding: ShredOptions) -> Self {
        Self { shredding, ..self }
    }

    /// The same with another limit for how many keys a tenant may have.
    pub fn with_tenant_keys_max(self, tenant_keys_max: u64) -> Self {
        Self { tenant_keys_max, ..self }
    }

    /// The pool of data keys.
    pub fn pool(&self) -> &DekPool {
        &self.pool
    }

    /// The time that the verbs go by.
    pub fn clock(&self) -> &Clock {
        &self.clock
    }

    /// Records a call that was refused before any verb took it over. Where it cannot be recorded, it is to be refused
    /// for that reason.
    pub async fn record_refusal(
        &self,
        route: &str,
        who: Who<'_>,
        code: &'static str,
    ) -> Result<(), OperationError> {
        Ok(self.audit.refused(route, who, code).await?)
    }

    /// Records somebody who did not show who he is.
    pub fn record_stranger(&self, route: &str, stranger: Stranger<'_>, code: &'static str) {
        self.audit.turned_away(route, stranger, code);
    }

    /// Whether the registry answers.
    pub async fn ping_store(&self) -> Result<(), StoreError> {
        self.store.ping().await
    }
}

/// Why an operation was not done. The texts are safe to show to the caller, except those of
/// [`OperationError::Pool`], [`OperationError::Store`] and [`OperationError::Internal`], which are for operators.
#[derive(Debug, thiserror::Error)]
pub enum OperationError {
    /// The caller may not.
    #[error(transparent)]
    Forbidden(#[from] Forbidden),
    /// What was asked makes no sense; the text says what to do.
    #[error("{0}")]
    Invalid(String),
    /// A context name of the caller's begins with a prefix that is not his to use.
    #[error(
        "the context name {0:?} is reserved: names that begin with \"keyfold:\" or \"aws\" are the service's"
    )]
    ReservedContext(String),
    /// A context name of the caller's is one to which the configuration gives another source.
    #[error("the context name {0:?} is set by the service from the request or its credential: leave it out")]
    ServiceContext(String),
    /// The context breaks a limit or names something twice.
    #[error("the context is not valid: {0}")]
    Context(#[from] ContextError),
    /// The ciphertext is not an envelope.
    #[error("the ciphertext is not a keyfold envelope: {0}")]
    Malformed(#[from] FormatError),
    /// The envelope was sealed with another context, or is another tenant's.
    #[error("the ciphertext was not made with this context, or not for this tenant")]
    ContextMismatch,
    /// The envelope's body is not what was sealed.
    #[error("the ciphertext is damaged")]
    Damaged,
    /// There is nothing of that name.
    #[error("there is no {0}")]
    NotFound(String),
    /// It collides with what is there.
    #[error("{0}")]
    Conflict(String),
    /// The message is larger than what this call takes.
    #[error("{0}")]
    TooLarge(String),
    /// The message cannot be sealed.
    #[error(transparent)]
    Seal(#[from] SealError),
    /// No data key.
    #[error(transparent)]
    Pool(#[from] PoolError),
    /// The registry.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// What cannot be recorded is not done.
    #[error(transparent)]
    Unrecorded(#[from] Unrecorded),
    /// A body that is streamed did not go through.
    #[error(transparent)]
    Transfer(#[from] TransferError),
    /// A fault of keyfold's own.
    #[error("{0}")]
    Internal(&'static str),
}

impl OperationError {
    /// The stable name under which the audit knows it: the one that the caller is told, except where he is told
    /// less.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Forbidden(_) | Self::Pool(PoolError::NoTenant) => "forbidden",
            Self::Invalid(_)
            | Self::Context(_)
            | Self::Transfer(TransferError::BrokenOff | TransferError::Gone) => "malformed_request",
            Self::ReservedContext(_) | Self::ServiceContext(_) => "reserved_context",
            Self::Malformed(_) => "malformed_envelope",
            Self::ContextMismatch => "context_mismatch",
            Self::Damaged => "ciphertext_damaged",
            Self::NotFound(_) => "not_found",
            Self::Conflict(_) => "conflict",
            Self::TooLarge(_) | Self::Seal(_) | Self::Transfer(TransferError::TooLarge(_)) => "too_large",
            Self::Pool(error) => pool_code(error),
            Self::Store(error) => store_code(error),
            Self::Unrecorded(_) => "audit_unavailable",
            Self::Transfer(TransferError::Idle(_)) => "deadline_exceeded",
            Self::Internal(_) => "internal_error",
        }
    }
}

fn pool_code(error: &PoolError) -> &'static str {
    match error {
        PoolError::Kms(KmsError::Outage { .. }) => "kms_unavailable",
        PoolError::Kms(KmsError::Denied { .. }) => "kek_denied",
        PoolError::Kms(KmsError::Damaged { .. }) => "context_mismatch",
        PoolError::Disbelieved(_) => "section_disbelieved",
        PoolError::Store(error) => store_code(error),
        PoolError::NoTenant => "forbidden",
        PoolError::NoKey(_) | PoolError::UnknownDek => "not_found",
        PoolError::TenantDisabled | PoolError::KeyDisabled(_) | PoolError::Revoked => "key_revoked",
        PoolError::Destroyed => "key_destroyed",
        PoolError::TooLargeForKey(_) => "too_large",
        PoolError::KmsQuota(_) => "rate_limited",
        PoolError::TooManyBoundScopes(_) => "context_limit",
        PoolError::Busy => "overloaded",
        PoolError::Internal(_) => "internal_error",
    }
}

fn store_code(error: &StoreError) -> &'static str {
    match error {
        StoreError::Unavailable(_) => "store_unavailable",
        _ => "internal_error",
    }
}

/// Records how a call ended.
fn conclude<T>(attempt: Attempt<'_>, outcome: Result<T, OperationError>) -> Result<T, OperationError> {
    match outcome {
        Ok(done) => {
            attempt.done();
            Ok(done)
        }
        Err(error) => {
            attempt.failed(error.code(), &error);
            Err(error.told())
        }
    }
}

impl OperationError {
    /// What the caller is told. The audit has the difference: outside, a section that is not believed is one more
    /// wrong context.
    fn told(self) -> Self {
        match self {
            Self::Pool(PoolError::Disbelieved(_)) => Self::ContextMismatch,
            other => other,
        }
    }
}

impl From<OpenError> for OperationError {
    fn from(error: OpenError) -> Self {
        match error {
            OpenError::Malformed(error) => Self::Malformed(error),
            OpenError::Damaged => Self::Damaged,
            _ => Self::ContextMismatch,
        }
    }
}

/// The context of a message: the caller's pairs, those that the configuration takes from the request, and the
/// service's own. The caller can neither set nor leave out any but his. Only for whom the permit covers this key with
/// this context.
fn message_context<V: PermitVerb>(
    caller: EncryptionContext,
    permit: &Permit<V>,
    key: &KeyName,
    details: &mut Details,
) -> Result<EncryptionContext, OperationError> {
    details.with_key(key);
    let service = permit.service_context();
    let quoted = |name: &str| name.chars().take(80).collect();
    if let Some((name, _)) = caller.iter().find(|(name, _)| EncryptionContext::is_reserved(name)) {
        return Err(OperationError::ReservedContext(quoted(name)));
    }
    // A name without a value in this call is not the caller's either: he would speak for the credential.
    let names = service.names.as_deref().unwrap_or_default();
    if let Some(name) = names.iter().find(|name| caller.get(name).is_some()) {
        return Err(OperationError::ServiceContext(quoted(name)));
    }
    let mut context = caller;
    for (name, value) in service.iter() {
        context.insert(name, value)?;
    }
    context.insert("keyfold:tenant", permit.tenant().as_str())?;
    context.insert("keyfold:key", key.as_str())?;
    match permit.covers(key, &context) {
        Ok(()) => Ok(context),
        Err(forbidden) => {
            // The record says with which context it was refused.
            details.with_context(context);
            Err(forbidden.into())
        }
    }
}

/// Bytes that are wiped when they are dropped. As a slice, which is done at once: a `Vec` wipes itself byte by byte.
struct Wiped(Vec<u8>);

impl Drop for Wiped {
    fn drop(&mut self) {
        self.0.as_mut_slice().zeroize();
    }
}

fn scope(tenant: &TenantId, key: &KeyName, service: &ServiceContext) -> DekScope {
    DekScope { tenant: tenant.clone(), key: key.clone(), bound: service.bound.clone() }
}

fn new_salt() -> Result<Salt, OperationError> {
    let mut salt = Salt::default();
    getrandom::fill(&mut salt)
        .map_err(|_| OperationError::Internal("the operating system gives no randomness"))?;
    Ok(salt)
}

/// What makes an id unique among those of the same millisecond.
fn random() -> Result<[u8; 10], OperationError> {
    let mut random = [0; 10];
    getrandom::fill(&mut random)
        .map_err(|_| OperationError::Internal("the operating system gives no randomness"))?;
    Ok(random)
}
