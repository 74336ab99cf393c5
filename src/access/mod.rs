//! Who is calling, and may they: authenticate -> [`Principal`], authorise -> [`Permit`].
//!
//! A [`Permit`] can be made here and nowhere else, and an operation cannot be called without one: it takes the
//! tenant from the permit, so that a call across tenants cannot be written.

pub mod api_key;
mod attributes;
mod circumstances;
mod grant;

use std::sync::Arc;

use crate::clock::{Clock, Timestamp};
use crate::store::watch::ChangeWatch;
use crate::store::{Store, StoreError};
use crate::tenant::{PrincipalId, TenantId, Verb};

pub use api_key::{NewApiKey, Pepper, is_api_key_id};
pub use attributes::Attributes;
pub use circumstances::{Circumstances, ServiceContext};
pub use grant::{AdminOf, Decrypt, Encrypt, Operate, Permit, PermitVerb, Rewrap};

/// An authenticated caller and what it holds.
#[derive(Debug)]
pub struct Principal {
    id: PrincipalId,
    tenants: Vec<TenantId>,
    verbs: Vec<Verb>,
    attributes: Attributes,
}

impl Principal {
    /// Who: `api-key:ID` for an API key.
    pub fn id(&self) -> &PrincipalId {
        &self.id
    }

    /// What the credential says beside.
    pub fn attributes(&self) -> &Attributes {
        &self.attributes
    }

    /// The tenants that it holds.
    pub fn tenants(&self) -> &[TenantId] {
        &self.tenants
    }

    /// What it may do with them.
    pub fn verbs(&self) -> &[Verb] {
        &self.verbs
    }

    /// Whoever runs the command line on the service's own data folder: he can read the registry and the pepper, so
    /// there is nothing that a credential could keep from him. He holds no tenant and opens no data this way.
    pub fn local_operator() -> Arc<Self> {
        #[expect(clippy::expect_used, reason = "a constant that parses")]
        let id = "cli:local-operator".parse().expect("a valid principal");
        let attributes = Attributes { method: "cli", ..Attributes::default() };
        Arc::new(Self { id, tenants: vec![], verbs: vec![Verb::Admin, Verb::Operate], attributes })
    }

    fn may(&self, verb: Verb) -> bool {
        self.verbs.contains(&verb)
    }
}

/// Why a caller is not let in. `Display` tells operators; what the caller is told is the edge's business.
#[derive(Clone, Debug, thiserror::Error)]
pub enum AuthenticationError {
    /// No credential came with the request.
    #[error("no credential")]
    Missing,
    /// More than one, or one that is not of a known form.
    #[error("the credential is not of a known form")]
    Malformed,
    /// Unknown, wrong, expired or revoked. The reason is for the audit record only.
    #[error("the credential is refused: {0}")]
    Refused(&'static str),
    /// The registry cannot be asked.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Why an authenticated caller may not do what it asks.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Forbidden {
    /// The verb is not granted.
    #[error("this credential is not granted the verb '{0}'")]
    Verb(Verb),
    /// The tenant is not one that the credential holds, or does not exist: which of the two is nobody's business.
    #[error("this credential does not hold the tenant that the request names")]
    Tenant,
    /// The credential holds several tenants, and the request says not which.
    #[error("this credential holds several tenants: name one in the Keyfold-Tenant header")]
    TenantNotNamed,
    /// The credential holds no tenant.
    #[error("this credential holds no tenant")]
    NoTenant,
}

/// Decides who is let in. One for each process.
pub struct Access {
    api_keys: api_key::ApiKeys,
}

impl Access {
    /// Access by the API keys in this store, whose secrets are hashed with `pepper`.
    pub fn new(store: Arc<dyn Store>, watch: Arc<ChangeWatch>, clock: Clock, pepper: Pepper) -> Self {
        Self { api_keys: api_key::ApiKeys::new(store, watch, clock, pepper) }
    }

    /// Finds out who presents this bearer token.
    pub async fn authenticate(&self, bearer: &str) -> Result<Arc<Principal>, AuthenticationError> {
        self.api_keys.authenticate(bearer).await
    }

    /// Makes an API key. The token is in the answer and nowhere else: it cannot be shown again.
    pub fn new_api_key(
        &self,
        name: &str,
        tenants: Vec<TenantId>,
        verbs: Vec<Verb>,
        expires_at: Option<Timestamp>,
        now: Timestamp,
    ) -> NewApiKey {
        self.api_keys.pepper().new_api_key(name, tenants, verbs, expires_at, now)
    }
}
