//! `[access]`: roles, grants, restrictions, client certificates, token issuers. It yields [`Rules`].

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;

use serde::Deserialize;

use super::ConfigError;
use crate::access::claims::{ClaimPath, ClaimWords, RequiredClaim};
use crate::access::jwt::{self, IssuerRule};
use crate::access::rules::{
    Binding, CertificateRule, Condition, Holding, Pattern, Restriction, Role, Rules, SanRule, Scope,
    TokenLimits,
};
use crate::tenant::{TenantId, Verb};

/// Credentials and what they may do.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AccessSettings {
    /// A file of 32 or more random bytes that go into the hash of every API key. Default `pepper` in the data
    /// folder, made at first start. All replicas on one registry need the same.
    pub pepper_file: Option<PathBuf>,
    /// The roles by name.
    pub roles: BTreeMap<String, RoleSettings>,
    /// What principals hold.
    pub grants: Vec<GrantSettings>,
    /// What narrows principals.
    pub restrictions: Vec<RestrictionSettings>,
    /// Whose client certificates are.
    pub certificates: Vec<CertificateSettings>,
    /// Who issues tokens.
    pub issuers: Vec<IssuerSettings>,
    /// How often a client certificate is verified again while its connection is open, in seconds. Default 60.
    pub certificate_recheck_secs: u64,
    /// How many grants of the registry a tenant may have. Default 1,000.
    pub tenant_grants_max: u64,
    /// How many API keys that are neither revoked nor expired a tenant may have. Default 10,000.
    pub tenant_api_keys_max: u64,
    /// How many API keys are remembered. Default 100,000.
    pub api_keys_remembered_max: u64,
    /// The longest token that is looked at, in bytes. Default 8,192.
    pub token_bytes_max: usize,
    /// How many verified tokens are remembered. Default 4,096.
    pub tokens_remembered_max: u64,
    /// How long a verified token is remembered, in seconds. Default 300.
    pub token_remembered_secs_max: u64,
}

impl Default for AccessSettings {
    fn default() -> Self {
        let tokens = TokenLimits::default();
        Self {
            pepper_file: None,
            roles: BTreeMap::new(),
            grants: vec![],
            restrictions: vec![],
            certificates: vec![],
            issuers: vec![],
            certificate_recheck_secs: 60,
            tenant_grants_max: 1_000,
            tenant_api_keys_max: 10_000,
            api_keys_remembered_max: 100_000,
            token_bytes_max: tokens.token_bytes_max,
            tokens_remembered_max: tokens.tokens_remembered_max,
            token_remembered_secs_max: tokens.token_remembered_secs_max,
        }
    }
}

/// A role: verbs, and with which keys and contexts.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RoleSettings {
    /// The verbs.
    pub verbs: Vec<String>,
    /// Only these keys; a `*` at the end stands for anything. All where nothing is said.
    pub keys: Option<Vec<String>>,
    /// Only contexts with these pairs: the name, and its values.
    #[serde(default)]
    pub context: Vec<ConditionSettings>,
}

/// A pair that the encryption context must hold.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConditionSettings {
    /// The pair's name.
    pub name: String,
    /// Its values; a `*` at the end stands for anything.
    pub values: Vec<String>,
}

/// What some principals hold: roles, or verbs without limits, in tenants.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GrantSettings {
    /// The principal, such as `jwt:corp:alice`, `cert:billing` or `api-key:ID`; a `*` at the end stands for
    /// anything.
    pub principal: String,
    /// The tenants.
    pub tenants: Vec<String>,
    /// The roles there.
    #[serde(default)]
    pub roles: Vec<String>,
    /// Verbs with every key and context.
    #[serde(default)]
    pub verbs: Vec<String>,
}

/// What narrows some principals.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RestrictionSettings {
    /// The principal, as in a grant.
    pub principal: String,
    /// Which verbs are narrowed.
    pub verbs: Vec<String>,
    /// To these keys.
    pub keys: Option<Vec<String>>,
    /// To contexts with these pairs.
    #[serde(default)]
    pub context: Vec<ConditionSettings>,
}

/// Whose a client certificate is.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CertificateSettings {
    /// Its one URI name, such as `spiffe://example.org/ns/billing/sa/api`; `/*` at the end stands for anything
    /// below.
    pub uri: Option<String>,
    /// A DNS name of it.
    pub dns: Option<String>,
    /// Its SHA-256 fingerprint in hexadecimal, with or without colons.
    pub sha256: Option<String>,
    /// The principal is `cert:` and this; the name above where nothing is said.
    pub principal: Option<String>,
    /// The tenants that it holds.
    #[serde(default)]
    pub tenants: Vec<String>,
    /// The roles there.
    #[serde(default)]
    pub roles: Vec<String>,
    /// Verbs with every key and context.
    #[serde(default)]
    pub verbs: Vec<String>,
}

/// A token issuer.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IssuerSettings {
    /// A short name: principals are `jwt:NAME:SUBJECT`.
    pub name: String,
    /// The `iss` of its tokens.
    pub issuer: String,
    /// One of these is in a token's `aud`.
    pub audiences: Vec<String>,
    /// The signature algorithms that are taken. Default `RS256` and `ES256`.
    #[serde(default = "algorithms")]
    pub algorithms: Vec<String>,
    /// The `typ` that are taken. Default `JWT` and `at+jwt`.
    #[serde(default = "types")]
    pub types: Vec<String>,
    /// Whether a token must have a `typ`. Default no.
    #[serde(default)]
    pub type_required: bool,
    /// How far clocks may be apart, in seconds. Default 60.
    #[serde(default = "secs::<60>")]
    pub leeway_secs: u64,
    /// Where its keys are; as its discovery document says where nothing is said.
    pub jwks_url: Option<String>,
    /// The authorities from which its server's certificate is believed, in PEM; the system's where nothing is said.
    pub ca_file: Option<PathBuf>,
    /// A file with a bearer token to fetch the keys with.
    pub bearer_token_file: Option<PathBuf>,
    /// Whether keys may be fetched by plain HTTP from elsewhere than this host. Default no.
    #[serde(default)]
    pub allow_http: bool,
    /// How often its keys are fetched, in seconds. Default 300.
    #[serde(default = "secs::<300>")]
    pub keys_refresh_secs: u64,
    /// How long its keys are believed after they were last fetched, in seconds. Default 86,400.
    #[serde(default = "secs::<86_400>")]
    pub keys_stale_secs_max: u64,
    /// How long between two fetches that tokens with an unknown key cause, in seconds. Default 10.
    #[serde(default = "secs::<10>")]
    pub unknown_key_secs_min: u64,
    /// How many tokens with an unknown key may wait for such a fetch at once. Less than `http.in_flight_max`. Default
    /// 32.
    #[serde(default = "unknown_key_waiting_max")]
    pub unknown_key_waiting_max: usize,
    /// How long a fetch may take, in seconds. Default 5.
    #[serde(default = "secs::<5>")]
    pub fetch_secs_max: u64,
    /// The claim that names the subject. Default `sub`.
    pub principal_claim: Option<String>,
    /// The claim that names tenants.
    pub tenants_claim: Option<String>,
    /// What a tenant's words in it begin with. Default nothing.
    #[serde(default)]
    pub tenants_prefix: String,
    /// The claim that names verbs.
    pub verbs_claim: Option<String>,
    /// What a verb's words in it begin with. Default nothing.
    #[serde(default)]
    pub verbs_prefix: String,
    /// The verbs that it can give. Default `encrypt`, `decrypt` and `rewrap`.
    #[serde(default = "claimable_verbs")]
    pub claimable_verbs: Vec<String>,
    /// The claim that names roles.
    pub roles_claim: Option<String>,
    /// What a role's words in it begin with. Default nothing.
    #[serde(default)]
    pub roles_prefix: String,
    /// What a token must claim.
    #[serde(default)]
    pub required_claims: Vec<RequiredClaimSettings>,
    /// Tenants that every token of this issuer holds.
    #[serde(default)]
    pub tenants: Vec<String>,
    /// Roles that every token of this issuer has in its tenants.
    #[serde(default)]
    pub roles: Vec<String>,
    /// Verbs that every token of this issuer has in its tenants, with every key and context.
    #[serde(default)]
    pub verbs: Vec<String>,
}

/// A claim that tokens must have.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RequiredClaimSettings {
    /// Which.
    pub claim: String,
    /// With one of these values; a `*` at the end stands for anything.
    pub values: Vec<String>,
}

fn algorithms() -> Vec<String> {
    vec!["RS256".to_owned(), "ES256".to_owned()]
}

fn types() -> Vec<String> {
    vec!["jwt".to_owned(), "at+jwt".to_owned()]
}

fn claimable_verbs() -> Vec<String> {
    [Verb::Encrypt, Verb::Decrypt, Verb::Rewrap].map(|verb| verb.name().to_owned()).to_vec()
}

fn unknown_key_waiting_max() -> usize {
    32
}

fn secs<const SECS: u64>() -> u64 {
    SECS
}

type Parsed<T> = Result<T, ConfigError>;

fn invalid<T>(place: &str, problem: impl std::fmt::Display) -> Parsed<T> {
    Err(ConfigError::Invalid(format!("{place}: {problem}")))
}

fn all<T: FromStr<Err: std::fmt::Display>>(place: &str, texts: &[String]) -> Parsed<Vec<T>> {
    texts.iter().map(|text| text.parse().or_else(|error: T::Err| invalid(place, error))).collect()
}

fn pattern(place: &str, text: &str) -> Parsed<Pattern> {
    Pattern::parse(text).or_else(|error| invalid(place, error))
}

fn patterns(place: &str, texts: &[String]) -> Parsed<Vec<Pattern>> {
    if texts.is_empty() {
        return invalid(
            place,
            "the list is empty, so nothing would ever fit: name something, or leave it out",
        );
    }
    texts.iter().map(|text| pattern(place, text)).collect()
}

impl AccessSettings {
    /// The rules that these settings are.
    pub fn rules(&self) -> Result<Rules, ConfigError> {
        let mut named = BTreeMap::new();
        for (name, role) in &self.roles {
            let place = format!("access.roles.{name}");
            let verbs = data_verbs_or_unlimited(&place, &role.verbs, role.keys.as_ref(), &role.context)?;
            let scope = scope(&place, role.keys.as_ref(), &role.context)?;
            named.insert(name.clone(), Arc::new(Role { name: format!("the role '{name}'"), verbs, scope }));
        }
        let mut rules = Rules {
            roles: named,
            certificate_recheck_secs: self.certificate_recheck_secs,
            tenant_grants_max: self.tenant_grants_max,
            tenant_api_keys_max: self.tenant_api_keys_max,
            api_keys_remembered_max: self.api_keys_remembered_max,
            tokens: TokenLimits {
                token_bytes_max: self.token_bytes_max,
                tokens_remembered_max: self.tokens_remembered_max,
                token_remembered_secs_max: self.token_remembered_secs_max,
            },
            ..Rules::default()
        };
        for (at, grant) in self.grants.iter().enumerate() {
            let place = format!("access.grants[{at}]");
            let holding = holding(&place, &rules, &grant.tenants, &grant.roles, &grant.verbs)?;
            if holding.roles.is_empty() || holding.tenants.is_empty() {
                return invalid(&place, "it grants nothing: name tenants, and roles or verbs");
            }
            rules.bindings.push(Binding { principal: pattern(&place, &grant.principal)?, holding });
        }
        for (at, restriction) in self.restrictions.iter().enumerate() {
            let place = format!("access.restrictions[{at}]");
            rules.restrictions.push(Arc::new(restriction.parse(&place)?));
        }
        for (at, certificate) in self.certificates.iter().enumerate() {
            let rule = certificate.parse(&format!("access.certificates[{at}]"), &rules)?;
            rules.certificates.push(rule);
        }
        for (at, issuer) in self.issuers.iter().enumerate() {
            let place = format!("access.issuers[{at}]");
            let rule = issuer.parse(&place, &rules)?;
            if rules.issuers.iter().any(|known| known.name == rule.name || known.issuer == rule.issuer) {
                return invalid(&place, "an issuer before has the same name or issuer: each stands once");
            }
            rules.issuers.push(Arc::new(rule));
        }
        Ok(rules)
    }
}

fn scope(place: &str, keys: Option<&Vec<String>>, context: &[ConditionSettings]) -> Parsed<Scope> {
    let keys = keys.map(|keys| patterns(&format!("{place}.keys"), keys)).transpose()?;
    let condition = |condition: &ConditionSettings| {
        let place = format!("{place}.context");
        Ok(Condition { name: condition.name.clone(), values: patterns(&place, &condition.values)? })
    };
    Ok(Scope { keys, context: context.iter().map(condition).collect::<Parsed<_>>()? })
}

/// Administration is of a whole tenant: no key or context narrows it, so a role that says so would promise what
/// nothing holds.
fn data_verbs_or_unlimited(
    place: &str,
    verbs: &[String],
    keys: Option<&Vec<String>>,
    context: &[ConditionSettings],
) -> Parsed<Vec<Verb>> {
    let parsed: Vec<Verb> = all(&format!("{place}.verbs"), verbs)?;
    if parsed.is_empty() {
        return invalid(place, "it has no verbs");
    }
    let administers = parsed.iter().any(|verb| matches!(verb, Verb::Admin | Verb::Operate));
    if administers && (keys.is_some() || !context.is_empty()) {
        return invalid(
            place,
            "admin and operate cannot be limited to keys or contexts: put them in a role alone",
        );
    }
    Ok(parsed)
}

fn holding(
    place: &str,
    rules: &Rules,
    tenants: &[String],
    names: &[String],
    verbs: &[String],
) -> Parsed<Holding> {
    let tenants: Vec<TenantId> = all(&format!("{place}.tenants"), tenants)?;
    let find = |name: &String| match rules.roles.get(name) {
        Some(role) => Ok(Arc::clone(role)),
        None => invalid(place, format_args!("there is no role {name:?} in access.roles")),
    };
    let mut held = names.iter().map(find).collect::<Parsed<Vec<_>>>()?;
    if !verbs.is_empty() {
        held.push(Role::unlimited(place, all(&format!("{place}.verbs"), verbs)?));
    }
    Ok(Holding { tenants, roles: held })
}

impl RestrictionSettings {
    fn parse(&self, place: &str) -> Parsed<Restriction> {
        if self.keys.is_none() && self.context.is_empty() {
            return invalid(place, "it narrows nothing: name keys or context");
        }
        Ok(Restriction {
            name: place.to_owned(),
            principal: pattern(place, &self.principal)?,
            verbs: data_verbs_or_unlimited(place, &self.verbs, self.keys.as_ref(), &self.context)?,
            scope: scope(place, self.keys.as_ref(), &self.context)?,
        })
    }
}

impl CertificateSettings {
    fn parse(&self, place: &str, rules: &Rules) -> Parsed<CertificateRule> {
        let san = match (&self.uri, &self.dns, &self.sha256) {
            (Some(uri), None, None) => {
                let uri = pattern(place, uri)?;
                if uri.prefix().is_some_and(|prefix| !prefix.ends_with('/') || prefix.ends_with("//")) {
                    return invalid(
                        place,
                        "a * in a uri stands after a / of its path: spiffe://example.org/*",
                    );
                }
                SanRule::Uri(uri)
            }
            (None, Some(dns), None) => {
                let dns = pattern(place, dns)?;
                if dns.prefix().is_some() {
                    return invalid(place, "a dns name stands as it is in the certificate, without a *");
                }
                SanRule::Dns(dns)
            }
            (None, None, Some(fingerprint)) => SanRule::Fingerprint(parse_fingerprint(place, fingerprint)?),
            _ => return invalid(place, "name one of uri, dns and sha256"),
        };
        let holding = holding(place, rules, &self.tenants, &self.roles, &self.verbs)?;
        Ok(CertificateRule { san, principal: self.principal.clone(), holding })
    }
}

fn parse_fingerprint(place: &str, text: &str) -> Parsed<[u8; 32]> {
    let digits: Vec<u8> = text.bytes().filter(|byte| *byte != b':').collect();
    let wrong = "sha256 is 64 hexadecimal digits, as `openssl x509 -noout -fingerprint -sha256` shows them";
    let mut fingerprint = [0; 32];
    if digits.len() != 64 {
        return invalid(place, wrong);
    }
    for (byte, pair) in fingerprint.iter_mut().zip(digits.chunks(2)) {
        let digit = |at: usize| char::from(pair[at]).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
        match (digit(0), digit(1)) {
            (Some(high), Some(low)) => *byte = high * 16 + low,
            _ => return invalid(place, wrong),
        }
    }
    Ok(fingerprint)
}

impl IssuerSettings {
    fn parse(&self, place: &str, rules: &Rules) -> Parsed<IssuerRule> {
        let name: TenantId = self
            .name
            .parse()
            .or_else(|_| invalid(place, "a name is 1 to 63 characters of a-z, 0-9 and '-'"))?;
        if self.audiences.is_empty() || self.audiences.iter().any(String::is_empty) {
            return invalid(
                place,
                "name the audiences: without them, tokens for any other service would be taken",
            );
        }
        let algorithms = jwt::algorithms(&self.algorithms).or_else(|error| invalid(place, error))?;
        for (what, number) in [
            ("keys_refresh_secs", self.keys_refresh_secs),
            ("keys_stale_secs_max", self.keys_stale_secs_max),
            ("unknown_key_secs_min", self.unknown_key_secs_min),
            ("unknown_key_waiting_max", self.unknown_key_waiting_max as u64),
            ("fetch_secs_max", self.fetch_secs_max),
        ] {
            if number == 0 {
                return invalid(place, format_args!("{what} is 0: use 1 or more"));
            }
        }
        let url = |text: &str| jwt::key_url(text, self.allow_http).or_else(|error| invalid(place, error));
        let jwks_url = self.jwks_url.as_deref().map(url).transpose()?;
        if jwks_url.is_none() {
            url(&self.issuer)?;
        }
        let path = |claim: &str| ClaimPath::parse(claim).or_else(|error| invalid(place, error));
        let words = |claim: &Option<String>, prefix: &String| -> Parsed<Option<ClaimWords>> {
            let Some(claim) = claim else { return Ok(None) };
            Ok(Some(ClaimWords { path: path(claim)?, prefix: prefix.clone() }))
        };
        let required = |required: &RequiredClaimSettings| {
            Ok(RequiredClaim { path: path(&required.claim)?, values: patterns(place, &required.values)? })
        };
        Ok(IssuerRule {
            name: name.as_str().to_owned(),
            issuer: self.issuer.clone(),
            audiences: self.audiences.clone(),
            algorithms,
            types: self.types.iter().map(|taken| taken.to_ascii_lowercase()).collect(),
            type_required: self.type_required,
            leeway_secs: self.leeway_secs,
            jwks_url,
            ca_file: self.ca_file.clone(),
            bearer_token_file: self.bearer_token_file.clone(),
            allow_http: self.allow_http,
            keys_refresh_secs: self.keys_refresh_secs,
            keys_stale_secs_max: self.keys_stale_secs_max,
            unknown_key_secs_min: self.unknown_key_secs_min,
            unknown_key_waiting_max: self.unknown_key_waiting_max,
            fetch_secs_max: self.fetch_secs_max,
            principal_claim: path(self.principal_claim.as_deref().unwrap_or("sub"))?,
            tenants_claim: words(&self.tenants_claim, &self.tenants_prefix)?,
            verbs_claim: words(&self.verbs_claim, &self.verbs_prefix)?,
            claimable_verbs: all(&format!("{place}.claimable_verbs"), &self.claimable_verbs)?,
            roles_claim: words(&self.roles_claim, &self.roles_prefix)?,
            required_claims: self.required_claims.iter().map(required).collect::<Parsed<_>>()?,
            holding: holding(place, rules, &self.tenants, &self.roles, &self.verbs)?,
        })
    }
}
