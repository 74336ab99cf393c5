//! Who holds what by configuration: roles, grants, restrictions, and whose a certificate or token is.
//!
//! Everything here is decided when the configuration is read, and immutable after. What no rule gives, nobody has.

use std::collections::BTreeMap;
use std::sync::Arc;

use envelope::EncryptionContext;

use super::claims::Claims;
use super::client_cert::Fingerprint;
use super::granted::Book;
use super::jwt::IssuerRule;
use super::{Attributes, Principal};
use crate::store::ApiKeyRecord;
use crate::tenant::{KeyName, PrincipalId, TenantId, Verb};

/// All of it.
#[derive(Debug, Default)]
pub struct Rules {
    /// The roles by name.
    pub roles: BTreeMap<String, Arc<Role>>,
    /// What principals hold beside what their credential gives.
    pub bindings: Vec<Binding>,
    /// What narrows principals, whatever gives them what they hold.
    pub restrictions: Vec<Arc<Restriction>>,
    /// Whose client certificates are: the first that fits counts.
    pub certificates: Vec<CertificateRule>,
    /// Who issues tokens.
    pub issuers: Vec<Arc<IssuerRule>>,
    /// Limits of tokens.
    pub tokens: TokenLimits,
    /// How often a client certificate is verified again while its connection is open, in seconds. Default 60.
    pub certificate_recheck_secs: u64,
    /// How many grants of the registry a tenant may have. Default 1,000.
    pub tenant_grants_max: u64,
    /// How many API keys that are neither revoked nor expired a tenant may have. Default 10,000.
    pub tenant_api_keys_max: u64,
    /// How many API keys are remembered. Default 100,000.
    pub api_keys_remembered_max: u64,
}

/// What tokens may cost.
#[derive(Clone, Debug)]
pub struct TokenLimits {
    /// The longest token that is looked at, in bytes. Default 8,192.
    pub token_bytes_max: usize,
    /// How many verified tokens are remembered. Default 4,096.
    pub tokens_remembered_max: u64,
    /// How long a verified token is remembered, in seconds: never beyond its expiry. Default 300.
    pub token_remembered_secs_max: u64,
}

impl Default for TokenLimits {
    fn default() -> Self {
        Self { token_bytes_max: 8_192, tokens_remembered_max: 4_096, token_remembered_secs_max: 300 }
    }
}

/// A text, or all that begin with a text: `billing`, `billing-*`, `*`. Compared byte by byte, as it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pattern {
    text: String,
    prefix: bool,
}

impl Pattern {
    /// From its text form; a `*` stands at the end or nowhere.
    pub fn parse(text: &str) -> Result<Self, String> {
        let (rest, prefix) = text.strip_suffix('*').map_or((text, false), |rest| (rest, true));
        if rest.contains('*') {
            return Err(format!("{text:?}: a * stands at the end or nowhere"));
        }
        if text.is_empty() {
            return Err("it is empty: use * for everything".to_owned());
        }
        Ok(Self { text: rest.to_owned(), prefix })
    }

    /// Whether `text` is meant.
    pub fn matches(&self, text: &str) -> bool {
        if self.prefix { text.starts_with(&self.text) } else { text == self.text }
    }

    /// What it says, without the `*`.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Whether it means more than one text, and what they begin with.
    pub fn prefix(&self) -> Option<&str> {
        self.prefix.then_some(self.text.as_str())
    }
}

impl std::fmt::Display for Pattern {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}{}", self.text, if self.prefix { "*" } else { "" })
    }
}

/// A pair that the encryption context must hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Condition {
    /// The pair's name.
    pub name: String,
    /// One of these is its value.
    pub values: Vec<Pattern>,
}

/// With which keys and contexts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Scope {
    /// Only these keys; all where there is nothing.
    pub keys: Option<Vec<Pattern>>,
    /// Only contexts that meet each of these.
    pub context: Vec<Condition>,
}

/// What a call lacks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unmet {
    /// The key is another one.
    Key,
    /// The context has not this pair, or with another value.
    Context(String),
}

impl Scope {
    /// What a call with this key and context lacks; nothing where it is within.
    pub fn unmet(&self, key: &KeyName, context: &EncryptionContext) -> Option<Unmet> {
        if !self.covers_key(key) {
            return Some(Unmet::Key);
        }
        let lacking = self.context.iter().find(|condition| {
            let value = context.get(&condition.name);
            !value.is_some_and(|value| condition.values.iter().any(|pattern| pattern.matches(value)))
        });
        lacking.map(|condition| Unmet::Context(condition.name.clone()))
    }

    /// Whether this key is within.
    pub fn covers_key(&self, key: &KeyName) -> bool {
        self.keys.as_ref().is_none_or(|keys| keys.iter().any(|pattern| pattern.matches(key.as_str())))
    }
}

/// Verbs, and with which keys and contexts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Role {
    /// Its name, or where else it comes from: for who asks why.
    pub name: String,
    /// The verbs.
    pub verbs: Vec<Verb>,
    /// With what.
    pub scope: Scope,
}

impl Role {
    /// These verbs with every key and context.
    pub fn unlimited(name: impl Into<String>, verbs: Vec<Verb>) -> Arc<Self> {
        Arc::new(Self { name: name.into(), verbs, scope: Scope::default() })
    }
}

/// A role in some tenants.
#[derive(Clone, Debug)]
pub struct Grant {
    /// The tenants.
    pub tenants: Vec<TenantId>,
    /// What may be done there.
    pub role: Arc<Role>,
}

impl Grant {
    /// Whether it is for this verb in this tenant.
    pub(super) fn holds(&self, verb: Verb, tenant: &TenantId) -> bool {
        self.role.verbs.contains(&verb) && self.tenants.contains(tenant)
    }
}

/// Roles in tenants.
#[derive(Clone, Debug, Default)]
pub struct Holding {
    /// The tenants.
    pub tenants: Vec<TenantId>,
    /// The roles in each of them.
    pub roles: Vec<Arc<Role>>,
}

impl Holding {
    /// As grants, in these further tenants too.
    pub fn grants(&self, further: &[TenantId]) -> Vec<Grant> {
        let tenants: Vec<TenantId> = self.tenants.iter().chain(further).cloned().collect();
        self.roles.iter().map(|role| Grant { tenants: tenants.clone(), role: Arc::clone(role) }).collect()
    }
}

/// What some principals hold.
#[derive(Clone, Debug)]
pub struct Binding {
    /// Which principals.
    pub principal: Pattern,
    /// What.
    pub holding: Holding,
}

/// What narrows some principals: their calls with these verbs are within the scope, or refused.
#[derive(Clone, Debug)]
pub struct Restriction {
    /// Where it stands, for who asks why.
    pub name: String,
    /// Which principals.
    pub principal: Pattern,
    /// Which verbs.
    pub verbs: Vec<Verb>,
    /// Within what.
    pub scope: Scope,
}

/// By what a client certificate is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SanRule {
    /// The one URI among its alternative names.
    Uri(Pattern),
    /// A DNS name among them.
    Dns(Pattern),
    /// Its SHA-256.
    Fingerprint(Fingerprint),
}

/// Whose a client certificate is.
#[derive(Clone, Debug)]
pub struct CertificateRule {
    /// By what it is known.
    pub san: SanRule,
    /// The principal's name after `cert:`; the name by which it is known where there is nothing.
    pub principal: Option<String>,
    /// What it holds.
    pub holding: Holding,
}

impl Rules {
    /// What this API key of the registry holds, whatever its state.
    pub fn of_api_key(&self, book: &Book, record: &ApiKeyRecord) -> Option<Principal> {
        let id = format!("api-key:{}", record.id).parse().ok()?;
        let role = Role::unlimited("the API key's record", record.verbs.clone());
        let own = vec![Grant { tenants: record.tenants.clone(), role }];
        Some(self.principal(book, id, own, Attributes::api_key()))
    }

    /// What a token with these claims (JSON) would hold, if its issuer had signed it and its time were now.
    pub fn of_claims_text(&self, book: &Book, claims: &str) -> Result<Principal, String> {
        let claims: Claims = serde_json::from_str(claims).map_err(|error| format!("the claims: {error}"))?;
        let named = claims.get("iss").and_then(|issuer| issuer.as_str());
        let issuer = self.issuers.iter().find(|rule| Some(rule.issuer.as_str()) == named);
        let issuer = issuer.ok_or("no rule in access.issuers is for the issuer that `iss` names")?;
        issuer.principal(self, book, claims).map_err(str::to_owned)
    }

    /// A principal with what its credential gives, what the configuration binds to its name, and what the registry
    /// grants it.
    pub fn principal(
        &self,
        book: &Book,
        id: PrincipalId,
        own: Vec<Grant>,
        attributes: Attributes,
    ) -> Principal {
        let granted = book.of(&id).cloned().collect();
        let mut grants = own;
        let bound = self.bindings.iter().filter(|binding| binding.principal.matches(id.as_str()));
        grants.extend(bound.flat_map(|binding| binding.holding.grants(&[])));
        let restrictions = self.restrictions.iter().filter(|r| r.principal.matches(id.as_str()));
        let restrictions = restrictions.cloned().collect();
        Principal::new(id, grants, granted, restrictions, attributes)
    }
}
