//! Who calls: access keys, the principals behind them, and the roles that they may assume.
//!
//! Signatures are not verified: the access key id is believed. A request without an Authorization
//! header is refused all the same, so that a client that does not sign is noticed.

use std::collections::HashMap;
use std::sync::Arc;

use http::HeaderMap;
use http::header::AUTHORIZATION;

use crate::arn::{account_of, is_account, root_arn};
use crate::clock::Timestamp;
use crate::engine::State;
use crate::error::KmsError;
use crate::policy::Policy;

/// Temporary access key ids of AWS begin so.
const TEMPORARY: &str = "ASIA";

/// Who an access key belongs to.
#[derive(Clone, Debug)]
pub struct Principal {
    pub(crate) arn: String,
    pub(crate) policy: Option<String>,
}

impl Principal {
    /// A user or role by ARN, such as `arn:aws:iam::444455556666:user/alice`.
    pub fn new(arn: impl Into<String>) -> Self {
        Self { arn: arn.into(), policy: None }
    }

    /// The identity policy (JSON). Without one the principal may do what the key policies leave to its
    /// account.
    pub fn identity_policy(mut self, policy: impl Into<String>) -> Self {
        self.policy = Some(policy.into());
        self
    }
}

/// A role that AssumeRole gives credentials for.
#[derive(Clone, Debug)]
pub struct Role {
    pub(crate) arn: String,
    pub(crate) external_id: Option<String>,
    pub(crate) trusted: Vec<String>,
    pub(crate) web_identity: Option<String>,
    pub(crate) policy: Option<String>,
}

impl Role {
    /// A role by ARN, such as `arn:aws:iam::444455556666:role/keyfold`, that anybody may assume.
    pub fn new(arn: impl Into<String>) -> Self {
        Self { arn: arn.into(), external_id: None, trusted: Vec::new(), web_identity: None, policy: None }
    }

    /// Only callers that give this external id may assume the role.
    pub fn external_id(mut self, id: impl Into<String>) -> Self {
        self.external_id = Some(id.into());
        self
    }

    /// Only this principal (an ARN, or an account number to mean all of it) may assume the role; may be
    /// called several times.
    pub fn trust(mut self, principal: impl Into<String>) -> Self {
        self.trusted.push(principal.into());
        self
    }

    /// Whoever has this web identity token may assume the role (AssumeRoleWithWebIdentity). The token is
    /// compared and not verified.
    pub fn web_identity(mut self, token: impl Into<String>) -> Self {
        self.web_identity = Some(token.into());
        self
    }

    /// The role's identity policy (JSON). Without one its sessions may do what the key policies leave to
    /// the account.
    pub fn identity_policy(mut self, policy: impl Into<String>) -> Self {
        self.policy = Some(policy.into());
        self
    }
}

/// Who makes a request, and where.
#[derive(Clone, Debug)]
pub(crate) struct Caller {
    pub(crate) region: String,
    pub(crate) account: String,
    /// The ARN that AWS's messages show.
    pub(crate) principal: String,
    /// The ARNs by which a policy can name the caller.
    pub(crate) names: Vec<String>,
    pub(crate) policy: Option<Arc<Policy>>,
    /// The test itself, through the library: above all policies.
    pub(crate) is_owner: bool,
}

impl Caller {
    /// The test itself.
    pub(crate) fn owner(region: &str, account: &str) -> Self {
        let principal = root_arn(account);
        Self {
            region: region.to_owned(),
            account: account.to_owned(),
            names: vec![principal.clone()],
            principal,
            policy: None,
            is_owner: true,
        }
    }
}

#[derive(Clone, Debug)]
struct Known {
    arn: String,
    account: String,
    policy: Option<Arc<Policy>>,
}

#[derive(Clone, Debug)]
pub(crate) struct KnownRole {
    pub(crate) account: String,
    external_id: Option<String>,
    trusted: Vec<String>,
    web_identity: Option<String>,
    policy: Option<Arc<Policy>>,
}

impl KnownRole {
    /// May the caller assume the role, with the external id that he gave?
    pub(crate) fn trusts(&self, caller: &Caller, external_id: Option<&str>) -> bool {
        let is_caller = |who: &String| *who == caller.account || caller.names.contains(who);
        let is_trusted = self.trusted.is_empty() || self.trusted.iter().any(is_caller);
        is_trusted && (self.external_id.is_none() || self.external_id.as_deref() == external_id)
    }

    /// May whoever holds this web identity token assume the role?
    pub(crate) fn trusts_token(&self, token: Option<&str>) -> bool {
        self.web_identity.is_some() && self.web_identity.as_deref() == token
    }
}

#[derive(Debug)]
pub(crate) struct Directory {
    default_account: String,
    default_region: String,
    /// Refuse access keys that are not in the table.
    strict: bool,
    principals: HashMap<String, Known>,
    roles: HashMap<String, KnownRole>,
}

/// The parts of an Authorization header that say who and where.
#[derive(Debug)]
struct Credential {
    access_key: String,
    region: Option<String>,
    service: String,
}

impl Directory {
    pub(crate) fn new(default_account: String, default_region: String, strict: bool) -> Self {
        let (principals, roles) = (HashMap::new(), HashMap::new());
        Self { default_account, default_region, strict, principals, roles }
    }

    pub(crate) fn add_principal(&mut self, access_key: &str, principal: Principal) -> Result<(), KmsError> {
        let account = account_in(&principal.arn)?;
        let policy = parse(principal.policy.as_deref())?;
        self.principals.insert(access_key.to_owned(), Known { arn: principal.arn, account, policy });
        Ok(())
    }

    pub(crate) fn add_role(&mut self, role: Role) -> Result<(), KmsError> {
        let account = account_in(&role.arn)?;
        let policy = parse(role.policy.as_deref())?;
        let Role { arn, external_id, trusted, web_identity, .. } = role;
        self.roles.insert(arn, KnownRole { account, external_id, trusted, web_identity, policy });
        Ok(())
    }

    pub(crate) fn role(&self, arn: &str) -> Option<&KnownRole> {
        self.roles.get(arn)
    }

    /// Tells the caller from the Authorization header and, for temporary credentials, the session token.
    pub(crate) fn identify(
        &self,
        headers: &HeaderMap,
        service: &str,
        state: &State,
        now: Timestamp,
    ) -> Result<Caller, KmsError> {
        let header = headers.get(AUTHORIZATION).ok_or_else(KmsError::missing_token)?;
        let credential = header.to_str().ok().and_then(parse_authorization).ok_or_else(|| {
            KmsError::incomplete_signature("Authorization header requires 'Credential' parameter.")
        })?;
        if credential.service != service {
            return Err(KmsError::invalid_signature(format!(
                "Credential should be scoped to correct service: '{service}'."
            )));
        }
        let region = credential.region.unwrap_or_else(|| self.default_region.clone());
        if credential.access_key.starts_with(TEMPORARY)
            && !self.principals.contains_key(&credential.access_key)
        {
            return self.of_session(&credential.access_key, headers, region, state, now);
        }
        let known = match self.principals.get(&credential.access_key) {
            Some(known) => known.clone(),
            None if self.strict => return Err(invalid_token()),
            None => self.root_of(&credential.access_key),
        };
        let Known { arn, account, policy } = known;
        Ok(Caller { region, account, names: vec![arn.clone()], principal: arn, policy, is_owner: false })
    }

    /// An access key id that nobody registered: the root of the account that it spells, else of the default.
    fn root_of(&self, access_key: &str) -> Known {
        let account = if is_account(access_key) { access_key } else { &self.default_account };
        Known { arn: root_arn(account), account: account.to_owned(), policy: None }
    }

    fn of_session(
        &self,
        access_key: &str,
        headers: &HeaderMap,
        region: String,
        state: &State,
        now: Timestamp,
    ) -> Result<Caller, KmsError> {
        let session = state.sessions.get(access_key).ok_or_else(invalid_token)?;
        let token = headers.get("x-amz-security-token").and_then(|token| token.to_str().ok());
        if token != Some(session.token.as_str()) {
            return Err(invalid_token());
        }
        if session.expires <= now {
            return Err(KmsError::expired_token("The security token included in the request is expired"));
        }
        let account = account_in(&session.role_arn)?;
        let principal = session_arn(&session.role_arn, &account, &session.name);
        let policy = self.roles.get(&session.role_arn).and_then(|role| role.policy.clone());
        let names = vec![principal.clone(), session.role_arn.clone()];
        Ok(Caller { region, account, names, principal, policy, is_owner: false })
    }
}

/// The ARN of a session: the role's name without its path.
pub(crate) fn session_arn(role_arn: &str, account: &str, session: &str) -> String {
    let name = role_arn.rsplit('/').next().unwrap_or_default();
    format!("arn:aws:sts::{account}:assumed-role/{name}/{session}")
}

pub(crate) fn new_access_key(random: &[u8; 16]) -> String {
    use std::fmt::Write as _;
    random[..8].iter().fold(TEMPORARY.to_owned(), |mut id, byte| {
        // Writing to a String cannot fail.
        let _ = write!(id, "{byte:02X}");
        id
    })
}

fn invalid_token() -> KmsError {
    KmsError::unrecognized_client("The security token included in the request is invalid.")
}

fn account_in(arn: &str) -> Result<String, KmsError> {
    let account = account_of(arn).ok_or_else(|| KmsError::invalid_arn(format!("Invalid arn {arn}")))?;
    Ok(account.to_owned())
}

fn parse(policy: Option<&str>) -> Result<Option<Arc<Policy>>, KmsError> {
    policy.map(Policy::parse).transpose().map(|policy| policy.map(Arc::new))
}

/// `AWS4-HMAC-SHA256 Credential=KEY/DATE/REGION/SERVICE/aws4_request, ...`; signatures of version 4a have
/// no region.
fn parse_authorization(header: &str) -> Option<Credential> {
    let (algorithm, rest) = header.split_once(' ')?;
    let parameter = rest.split(',').find_map(|part| part.trim().strip_prefix("Credential="))?;
    let parts: Vec<&str> = parameter.split('/').collect();
    let (access_key, region, service) = match (algorithm, parts.as_slice()) {
        ("AWS4-HMAC-SHA256", [access_key, _, region, service, "aws4_request"]) => {
            (access_key, Some((*region).to_owned()), service)
        }
        ("AWS4-ECDSA-P256-SHA256", [access_key, _, service, "aws4_request"]) => (access_key, None, service),
        _ => return None,
    };
    let region = region.filter(|region| !region.is_empty());
    Some(Credential { access_key: (*access_key).to_owned(), region, service: (*service).to_owned() })
}
