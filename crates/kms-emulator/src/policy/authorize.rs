//! May the caller do it? In AWS's order, and refused in AWS's words.

use super::condition::Facts;
use super::document::{Answer, Policy};
use crate::calls::Arrival;
use crate::directory::Caller;
use crate::error::KmsError;

/// One question to the policies.
#[derive(Debug)]
pub(crate) struct Request<'a> {
    pub(crate) caller: &'a Caller,
    /// With its prefix: `kms:Decrypt`.
    pub(crate) action: &'a str,
    pub(crate) key_arn: &'a str,
    pub(crate) key_account: &'a str,
    pub(crate) facts: &'a Facts,
    /// AWS lets most operations manage keys of the caller's own account only.
    pub(crate) across_accounts: bool,
}

/// By the key's policy and the caller's own.
pub(crate) fn authorize(request: &Request<'_>, key_policy: &Policy) -> Result<(), KmsError> {
    let Request { caller, action, key_arn, facts, .. } = request;
    if caller.is_owner {
        return Ok(());
    }
    let by_key = key_policy.answer_as_key_policy(caller, action, key_arn, facts);
    let by_identity = identity_answer(caller, action, key_arn, facts);
    let same_account = caller.account == request.key_account;
    let refused = |why: &str| Err(refusal(caller, action, Some(key_arn), why));
    match (by_key, by_identity) {
        (Answer::Deny, _) => refused("with an explicit deny in a resource-based policy"),
        (_, Answer::Deny) => refused("with an explicit deny in an identity-based policy"),
        _ if !same_account && !request.across_accounts => refused(&no_resource_policy(action)),
        (Answer::Nothing, _) if same_account => refused(&no_resource_policy(action)),
        (Answer::Nothing, _) => Err(elsewhere(caller, action)),
        (Answer::Allow, _) if same_account => Ok(()),
        (_, Answer::Nothing) => refused(&no_identity_policy(action)),
        _ => Ok(()),
    }
}

/// For operations that concern no key (CreateKey, ListKeys, ...): by the caller's own policy alone.
pub(crate) fn authorize_without_key(caller: &Caller, action: &str, facts: &Facts) -> Result<(), KmsError> {
    if caller.is_owner {
        return Ok(());
    }
    match identity_answer(caller, action, "*", facts) {
        Answer::Allow | Answer::AllowToAccount => Ok(()),
        Answer::Deny => {
            Err(refusal(caller, action, None, "with an explicit deny in an identity-based policy"))
        }
        Answer::Nothing => Err(refusal(caller, action, None, &no_identity_policy(action))),
    }
}

/// AWS's answer about a key of another account that does not exist, or of which the caller may not know.
pub(crate) fn elsewhere(caller: &Caller, action: &str) -> KmsError {
    KmsError::access_denied(format!(
        "User: {} is not authorized to perform: {action} on this resource because the resource does not exist in \
         this Region, no resource-based policies allow access, or a resource-based policy explicitly denies access",
        caller.principal
    ))
}

/// The words for a denial that a fault injects.
pub(crate) fn explicitly_denied(call: &Arrival) -> String {
    let service = if call.operation == "AssumeRole" { "sts" } else { "kms" };
    let on = call.key.as_ref().map(|key| format!(" on resource: {key}")).unwrap_or_default();
    format!(
        "User: {} is not authorized to perform: {service}:{}{on} with an explicit deny in a resource-based policy",
        call.principal, call.operation
    )
}

fn identity_answer(caller: &Caller, action: &str, resource: &str, facts: &Facts) -> Answer {
    match &caller.policy {
        Some(policy) => policy.answer_as_identity_policy(action, resource, facts),
        // Who was given no policy may do everything that the key's policy leaves to his account.
        None => Answer::Allow,
    }
}

fn no_resource_policy(action: &str) -> String {
    format!("because no resource-based policy allows the {action} action")
}

fn no_identity_policy(action: &str) -> String {
    format!("because no identity-based policy allows the {action} action")
}

fn refusal(caller: &Caller, action: &str, key_arn: Option<&str>, why: &str) -> KmsError {
    let on = key_arn.map(|arn| format!(" on resource: {arn}")).unwrap_or_default();
    let principal = &caller.principal;
    KmsError::access_denied(format!("User: {principal} is not authorized to perform: {action}{on} {why}"))
}
