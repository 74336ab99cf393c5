//! Multi-Region keys: one family of material, a key in each region.

use serde::Deserialize;
use serde_json::{Value, json};

use super::input::{Tag, description, required, tags};
use super::{Work, metadata, policies};
use crate::arn::key_arn;
use crate::engine::{Key, Status};
use crate::error::KmsError;
use crate::policy::{Facts, Policy};

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub(super) struct ReplicateKey {
    key_id: Option<String>,
    replica_region: Option<String>,
    policy: Option<String>,
    bypass_policy_lockout_safety_check: bool,
    description: Option<String>,
    tags: Vec<Tag>,
}

/// AWS's replicas are `Creating` for some seconds; here they are enabled with the answer.
pub(super) fn replicate(work: &mut Work<'_>, input: ReplicateKey) -> Result<Value, KmsError> {
    let found = work.find(required(input.key_id.as_ref(), "keyId")?, "ReplicateKey")?;
    let region = required(input.replica_region.as_ref(), "replicaRegion")?.to_owned();
    let mut facts = Facts::default();
    facts.add("kms:ReplicaRegion", &region);
    work.authorize(&found, "ReplicateKey", facts)?;
    let (key, family) = work.key(&found.arn)?;
    if !family.multi_region {
        return Err(KmsError::unsupported(format!("{} is not a multi-region key.", found.arn)));
    }
    if key.region != family.primary_region {
        return Err(KmsError::unsupported(format!("{} is not a multi-region primary key.", found.arn)));
    }
    work.must_be_enabled(&found.arn)?;
    if !work.regions.contains(&region) {
        return Err(KmsError::constraint("replicaRegion", region, "be a region of this emulator"));
    }
    let arn = key_arn(&region, &key.account, &key.id);
    if work.state.keys.contains_key(&arn) {
        return Err(KmsError::already_exists(format!("{arn} already exists")));
    }
    let policy = match &input.policy {
        Some(text) => Policy::parse(text)?,
        None => Policy::of_account(&key.account),
    };
    if !input.bypass_policy_lockout_safety_check {
        policies::must_not_lock_out(work.caller, &arn, &key.account, &policy)?;
    }
    let replica = Key {
        id: key.id.clone(),
        region,
        account: key.account.clone(),
        created: work.now,
        description: description(input.description)?,
        status: Status::Enabled,
        policy,
        tags: tags(input.tags)?,
    };
    work.state.keys.insert(arn.clone(), replica);
    work.changed = true;
    let (replica, family) = work.key(&arn)?;
    Ok(json!({
        "ReplicaKeyMetadata": metadata::of_key(work.state, replica, family),
        "ReplicaPolicy": replica.policy.text(),
        "ReplicaTags": replica.tags.iter().map(|(k, v)| json!({"TagKey": k, "TagValue": v})).collect::<Vec<_>>(),
    }))
}
