//! Making keys, looking at them, switching them on and off.

use serde::Deserialize;
use serde_json::{Value, json};
use uuid::Uuid;

use super::Work;
use super::input::{KeyOnly, Paging, Tag, description, tags};
use super::lookup::add_facts_of_caller;
use super::{metadata, policies};
use crate::arn::key_arn;
use crate::engine::{Family, Key, Material, Status};
use crate::error::KmsError;
use crate::policy::{Facts, Policy, authorize_without_key};

const ENCRYPTS: &str = "ENCRYPT_DECRYPT";
const SYMMETRIC: &str = "SYMMETRIC_DEFAULT";

/// Key specs by the usages that AWS allows them. Only SYMMETRIC_DEFAULT has material here: the others exist
/// to be refused by the operations of symmetric keys.
const SPECS: [(&str, &[&str]); 5] = [
    (SYMMETRIC, &[ENCRYPTS]),
    ("RSA_2048", &[ENCRYPTS, "SIGN_VERIFY"]),
    ("RSA_4096", &[ENCRYPTS, "SIGN_VERIFY"]),
    ("ECC_NIST_P256", &["SIGN_VERIFY", "KEY_AGREEMENT"]),
    ("HMAC_256", &["GENERATE_VERIFY_MAC"]),
];

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub(super) struct CreateKey {
    policy: Option<String>,
    description: Option<String>,
    key_usage: Option<String>,
    customer_master_key_spec: Option<String>,
    key_spec: Option<String>,
    origin: Option<String>,
    bypass_policy_lockout_safety_check: bool,
    tags: Vec<Tag>,
    multi_region: Option<bool>,
    /// AWS has no such parameter: the owner of this emulator may choose a key's id.
    key_id: Option<Uuid>,
}

pub(super) fn create(work: &mut Work<'_>, input: CreateKey) -> Result<Value, KmsError> {
    let mut facts = Facts::default();
    add_facts_of_caller(work.caller, &mut facts);
    authorize_without_key(work.caller, "kms:CreateKey", &facts)?;
    let usage = input.key_usage.unwrap_or_else(|| ENCRYPTS.to_owned());
    let spec = input.key_spec.or(input.customer_master_key_spec).unwrap_or_else(|| SYMMETRIC.to_owned());
    check_spec(&spec, &usage)?;
    if input.origin.is_some_and(|origin| origin != "AWS_KMS") {
        return Err(KmsError::unsupported("Only keys of origin AWS_KMS are supported by this emulator."));
    }
    let (account, region) = (work.caller.account.clone(), work.caller.region.clone());
    let policy = match &input.policy {
        Some(text) => Policy::parse(text)?,
        None => Policy::of_account(&account),
    };
    let multi_region = input.multi_region.unwrap_or(false);
    let chosen = input.key_id.filter(|_| work.caller.is_owner);
    let id = match (multi_region, chosen.unwrap_or_else(Uuid::new_v4)) {
        (true, id) => format!("mrk-{}", id.simple()),
        (false, id) => id.hyphenated().to_string(),
    };
    let arn = key_arn(&region, &account, &id);
    if work.state.members(&id).next().is_some() {
        return Err(KmsError::already_exists(format!("A key with the id {id} already exists")));
    }
    if !input.bypass_policy_lockout_safety_check {
        policies::must_not_lock_out(work.caller, &arn, &account, &policy)?;
    }
    let key = Key {
        id: id.clone(),
        region: region.clone(),
        account: account.clone(),
        created: work.now,
        description: description(input.description)?,
        status: Status::Enabled,
        policy,
        tags: tags(input.tags)?,
    };
    let materials = if spec == SYMMETRIC { vec![Material::generate(None)?] } else { Vec::new() };
    let family =
        Family { account, multi_region, primary_region: region, usage, spec, materials, rotation: None };
    let answer = json!({"KeyMetadata": metadata::of_key(work.state, &key, &family)});
    work.state.keys.insert(arn, key);
    work.state.families.insert(id, family);
    work.changed = true;
    Ok(answer)
}

pub(super) fn describe(work: &mut Work<'_>, input: &KeyOnly) -> Result<Value, KmsError> {
    let arn = work.permitted(input.key_id.as_ref(), "DescribeKey")?;
    let (key, family) = work.key(&arn)?;
    Ok(json!({"KeyMetadata": metadata::of_key(work.state, key, family)}))
}

pub(super) fn list(work: &mut Work<'_>, input: &Paging) -> Result<Value, KmsError> {
    let mut facts = Facts::default();
    add_facts_of_caller(work.caller, &mut facts);
    authorize_without_key(work.caller, "kms:ListKeys", &facts)?;
    let own = |key: &&Key| key.region == work.caller.region && key.account == work.caller.account;
    let keys = work.state.keys.values().filter(own);
    input.answer("Keys", keys.map(|key| json!({"KeyArn": key.arn(), "KeyId": key.id})).collect(), 100)
}

pub(super) fn list_tags(work: &mut Work<'_>, input: &KeyOnly) -> Result<Value, KmsError> {
    let arn = work.permitted(input.key_id.as_ref(), "ListResourceTags")?;
    let tags = work.key(&arn)?.0.tags.iter();
    let tags: Vec<Value> = tags.map(|(key, value)| json!({"TagKey": key, "TagValue": value})).collect();
    Ok(json!({"Tags": tags, "Truncated": false}))
}

pub(super) fn enable(work: &mut Work<'_>, input: &KeyOnly) -> Result<Value, KmsError> {
    switch(work, input, "EnableKey", Status::Enabled)
}

pub(super) fn disable(work: &mut Work<'_>, input: &KeyOnly) -> Result<Value, KmsError> {
    switch(work, input, "DisableKey", Status::Disabled)
}

fn switch(work: &mut Work<'_>, input: &KeyOnly, operation: &str, to: Status) -> Result<Value, KmsError> {
    let arn = work.permitted(input.key_id.as_ref(), operation)?;
    work.must_not_be_pending_deletion(&arn)?;
    work.key_mut(&arn)?.status = to;
    work.changed = true;
    Ok(json!({}))
}

fn check_spec(spec: &str, usage: &str) -> Result<(), KmsError> {
    let Some((_, usages)) = SPECS.iter().find(|(known, _)| *known == spec) else {
        let known: Vec<&str> = SPECS.iter().map(|(known, _)| *known).collect();
        let constraint = format!("satisfy enum value set: [{}]", known.join(", "));
        return Err(KmsError::constraint("keySpec", spec, &constraint));
    };
    if usages.contains(&usage) {
        return Ok(());
    }
    Err(KmsError::validation(format!("KeyUsage {usage} is not compatible with KeySpec {spec}")))
}
