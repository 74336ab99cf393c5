//! Key policies.

use serde::Deserialize;
use serde_json::{Value, json};

use super::Work;
use super::input::{KeyOnly, required};
use super::lookup::add_facts_of_caller;
use crate::directory::Caller;
use crate::error::KmsError;
use crate::policy::{Facts, Policy, Request, authorize};

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub(super) struct PutKeyPolicy {
    key_id: Option<String>,
    policy_name: Option<String>,
    policy: Option<String>,
    bypass_policy_lockout_safety_check: bool,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub(super) struct GetKeyPolicy {
    key_id: Option<String>,
    policy_name: Option<String>,
}

pub(super) fn put(work: &mut Work<'_>, input: &PutKeyPolicy) -> Result<Value, KmsError> {
    let arn = work.permitted(input.key_id.as_ref(), "PutKeyPolicy")?;
    let text = required(input.policy.as_ref(), "policy")?;
    if input.policy_name.as_ref().is_some_and(|name| name != "default") {
        return Err(KmsError::validation("Invalid policy name"));
    }
    let policy = Policy::parse(text)?;
    if !input.bypass_policy_lockout_safety_check {
        must_not_lock_out(work.caller, &arn, &work.key(&arn)?.0.account, &policy)?;
    }
    work.key_mut(&arn)?.policy = policy;
    work.changed = true;
    Ok(json!({}))
}

pub(super) fn get(work: &mut Work<'_>, input: &GetKeyPolicy) -> Result<Value, KmsError> {
    let arn = work.permitted(input.key_id.as_ref(), "GetKeyPolicy")?;
    if input.policy_name.as_ref().is_some_and(|name| name != "default") {
        return Err(KmsError::not_found("No such policy exists"));
    }
    Ok(json!({"Policy": work.key(&arn)?.0.policy.text(), "PolicyName": "default"}))
}

pub(super) fn list(work: &mut Work<'_>, input: &KeyOnly) -> Result<Value, KmsError> {
    work.permitted(input.key_id.as_ref(), "ListKeyPolicies")?;
    Ok(json!({"PolicyNames": ["default"], "Truncated": false}))
}

/// AWS refuses a policy under which the caller could not set the next one.
pub(super) fn must_not_lock_out(
    caller: &Caller,
    key_arn: &str,
    key_account: &str,
    policy: &Policy,
) -> Result<(), KmsError> {
    let mut facts = Facts::default();
    add_facts_of_caller(caller, &mut facts);
    let action = "kms:PutKeyPolicy";
    let request = Request { caller, action, key_arn, key_account, facts: &facts, across_accounts: false };
    authorize(&request, policy).map_err(|_| {
        KmsError::malformed_policy(
            "The new key policy will not allow you to update the key policy in the future.",
        )
    })
}
