//! Who is calling, and may they: authenticate -> [`Principal`], authorise -> [`Permit`].
//!
//! A [`Permit`] can be made here and nowhere else, and an operation cannot be called without one: it takes the
//! tenant from the permit, so that a call across tenants cannot be written.

pub mod api_key;
mod attributes;
mod circumstances;
pub mod claims;
pub mod client_cert;
mod grant;
pub mod granted;
mod issuer_keys;
pub mod jwt;
pub mod rules;

use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use crate::clock::{Clock, Timestamp};
use crate::spread::{Near, Spread};
use crate::store::watch::ChangeWatch;
use crate::store::{GrantStore, Registry, Store, StoreError};
use crate::tenant::{PrincipalId, TenantId, Verb};

pub use api_key::{NewApiKey, Pepper, is_api_key_id};
pub use attributes::Attributes;
pub use circumstances::{Circumstances, RequestId, ServiceContext};
pub use grant::{AdminOf, Decrypt, Encrypt, Explanation, Operate, Permit, PermitVerb, Rewrap};
use rules::{Grant, Restriction, Role, Rules};

/// An authenticated caller and what it holds.
#[derive(Debug)]
pub struct Principal {
    id: PrincipalId,
    grants: Vec<Grant>,
    restrictions: Vec<Arc<Restriction>>,
    tenants: Vec<TenantId>,
    /// Those that only a grant of the registry gives: held, and never meant unless they are named.
    named_tenants: Vec<TenantId>,
    verbs: Vec<Verb>,
    attributes: Attributes,
}

impl Principal {
    fn new(
        id: PrincipalId,
        mut grants: Vec<Grant>,
        granted: Vec<Grant>,
        restrictions: Vec<Arc<Restriction>>,
        attributes: Attributes,
    ) -> Self {
        let tenants = tenants_of(&grants);
        let mut named_tenants = tenants_of(&granted);
        named_tenants.retain(|tenant| !tenants.contains(tenant));
        grants.extend(granted);
        let mut verbs: Vec<Verb> = grants.iter().flat_map(|grant| &grant.role.verbs).copied().collect();
        verbs.sort();
        verbs.dedup();
        Self { id, grants, restrictions, tenants, named_tenants, verbs, attributes }
    }

    /// Who: `api-key:ID`, `jwt:ISSUER:SUBJECT` or `cert:NAME`.
    pub fn id(&self) -> &PrincipalId {
        &self.id
    }

    /// What the credential says beside.
    pub fn attributes(&self) -> &Attributes {
        &self.attributes
    }

    /// The tenants in which its credential or the configuration gives it something.
    pub fn tenants(&self) -> &[TenantId] {
        &self.tenants
    }

    /// The verbs that it holds in some tenant.
    pub fn verbs(&self) -> &[Verb] {
        &self.verbs
    }

    /// Whoever runs the command line on the service's own data folder: he can read the registry and the pepper, so
    /// there is nothing that a credential could keep from him. He holds no tenant and opens no data this way.
    pub fn local_operator() -> Near<Self> {
        #[expect(clippy::expect_used, reason = "a constant that parses")]
        let id = "cli:local-operator".parse().expect("a valid principal");
        let role = Role::unlimited("the command line", vec![Verb::Admin, Verb::Operate]);
        let attributes = Attributes { method: "cli", ..Attributes::default() };
        let grants = vec![Grant { tenants: vec![], role }];
        Spread::new(Self::new(id, grants, vec![], vec![], attributes)).near()
    }

    fn may(&self, verb: Verb) -> bool {
        self.verbs.contains(&verb)
    }

    fn holds(&self, verb: Verb, tenant: &TenantId) -> bool {
        self.grants.iter().any(|grant| grant.holds(verb, tenant))
    }
}

fn tenants_of(grants: &[Grant]) -> Vec<TenantId> {
    let mut tenants: Vec<TenantId> = grants.iter().flat_map(|grant| &grant.tenants).cloned().collect();
    tenants.sort();
    tenants.dedup();
    tenants
}

/// What a request brings to show who sends it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Presented<'a> {
    /// The bearer token of its `Authorization` header.
    pub bearer: Option<&'a str>,
    /// The certificates of its connection in DER, the client's own first; none where there is no client
    /// certificate. The handshake has verified them.
    pub certificates: &'a [Vec<u8>],
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
    /// Unknown or wrong. The reason is for the audit record and the log only.
    #[error("the credential is refused: {0}")]
    Refused(&'static str),
    /// Genuine, and no longer good: who it belongs to and why are for the audit record and the log only.
    #[error("the credential of {0} is {1}")]
    Lapsed(PrincipalId, &'static str),
    /// A token's issuer has not been reached for so long that its keys are no longer believed.
    #[error("the keys of the token issuer '{0}' cannot be fetched")]
    IssuerUnavailable(String),
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
    /// The verb is granted, and not with this key.
    #[error("this credential is not granted the verb '{0}' with this key")]
    Key(Verb),
    /// The verb is granted, and not with this context.
    #[error(
        "this credential is granted the verb '{0}' only with certain encryption contexts, and this is none of them"
    )]
    Context(Verb),
    /// The tenant is not one that the credential holds, or does not exist: which of the two is nobody's business.
    #[error("this credential does not hold the tenant that the request names")]
    Tenant,
    /// The credential holds several tenants, or one by a grant of the registry, and the request says not which.
    #[error(
        "name the tenant in the Keyfold-Tenant header: this credential holds several, or holds it by a grant"
    )]
    TenantNotNamed,
    /// The credential holds no tenant.
    #[error("this credential holds no tenant")]
    NoTenant,
}

/// Decides who is let in. One for each process.
pub struct Access {
    granted: granted::Granted,
    tenant_grants_max: u64,
    tenant_api_keys_max: u64,
    api_keys: api_key::ApiKeys,
    tokens: jwt::Tokens,
    certificates: Arc<client_cert::ClientCertificates>,
}

impl Access {
    /// Access by these rules, and by the API keys in this store, whose secrets are hashed with `pepper`. Fails
    /// where a token issuer cannot be spoken to as the rules say.
    pub fn new(
        store: Arc<dyn Registry>,
        watch: Arc<ChangeWatch>,
        clock: Clock,
        pepper: Pepper,
        rules: Rules,
    ) -> Result<Self, jwt::IssuerError> {
        let grants: Arc<dyn GrantStore> = Arc::clone(&store) as Arc<dyn Registry>;
        let store: Arc<dyn Store> = store;
        let granted = granted::Granted::new(grants, Arc::clone(&watch), clock.clone());
        let (tenant_grants_max, tenant_api_keys_max) = (rules.tenant_grants_max, rules.tenant_api_keys_max);
        let rules = Arc::new(rules);
        let tokens = jwt::Tokens::new(&clock, Arc::clone(&rules))?;
        let certificates = Arc::new(client_cert::ClientCertificates::new(clock.clone(), Arc::clone(&rules)));
        let api_keys = api_key::ApiKeys::new(store, watch, clock, pepper, rules);
        Ok(Self { granted, tenant_grants_max, tenant_api_keys_max, api_keys, tokens, certificates })
    }

    /// Finds out who sends this. A bearer token counts more than the connection's certificate; a token that is not
    /// good is not made good by a certificate.
    pub async fn authenticate(
        &self,
        presented: Presented<'_>,
    ) -> Result<Near<Principal>, AuthenticationError> {
        if presented.bearer.is_none() && presented.certificates.is_empty() {
            return Err(AuthenticationError::Missing);
        }
        let api_key = presented.bearer.filter(|bearer| bearer.starts_with(api_key::PREFIX));
        let book = {
            let present = self.granted.now().await?;
            if let Some(api_key) = api_key
                && let Some(principal) = self.api_keys.recognise(api_key, &present.book)?
            {
                return Ok(principal);
            }
            // Counted for who may have to wait: a guard is for moments.
            Arc::clone(&present.book)
        };
        match (api_key, presented.bearer) {
            (Some(api_key), _) => self.api_keys.look_up(api_key, &book).await,
            (None, Some(token)) => self.tokens.authenticate(token, presented.certificates, &book).await,
            (None, None) => self.certificates.authenticate(presented.certificates, &book),
        }
    }

    /// Keeps the keys of token issuers fresh, until told to stop.
    pub async fn keep(self: Arc<Self>, stop: CancellationToken) {
        self.tokens.keep(stop).await;
    }

    /// How many grants of the registry a tenant may have.
    pub fn tenant_grants_max(&self) -> u64 {
        self.tenant_grants_max
    }

    /// How many API keys that are neither revoked nor expired a tenant may have.
    pub fn tenant_api_keys_max(&self) -> u64 {
        self.tenant_api_keys_max
    }

    /// The client certificates that are believed.
    pub fn certificates(&self) -> &Arc<client_cert::ClientCertificates> {
        &self.certificates
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
