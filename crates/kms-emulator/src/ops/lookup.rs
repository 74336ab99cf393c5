//! From a `KeyId` parameter to a key that the caller may use.

use serde_json::Value;

use super::Work;
use super::input::Base64;
use crate::arn::{KeyRef, Resource, alias_arn, key_arn};
use crate::blob::Blob;
use crate::calls::Arrival;
use crate::context::EncryptionContext;
use crate::directory::Caller;
use crate::engine::{Family, Key, State, Status};
use crate::error::KmsError;
use crate::policy::{Facts, Request, authorize, elsewhere};

/// AWS lets a caller use or look at the keys of other accounts, but not manage them.
const ACROSS_ACCOUNTS: [&str; 8] = [
    "DescribeKey",
    "GenerateDataKey",
    "GenerateDataKeyWithoutPlaintext",
    "Encrypt",
    "Decrypt",
    "ReEncryptFrom",
    "ReEncryptTo",
    "GetKeyRotationStatus",
];

/// A key that was found: its ARN, and the alias by which it was asked for.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) arn: String,
    pub(super) alias: Option<String>,
}

impl Work<'_> {
    /// The ARN of the key that `key_id` names, if the caller may do `operation` with it.
    pub(super) fn permitted(&self, key_id: Option<&String>, operation: &str) -> Result<String, KmsError> {
        let found = self.find(super::input::required(key_id, "keyId")?, operation)?;
        self.authorize(&found, operation, Facts::default())?;
        Ok(found.arn)
    }

    pub(super) fn find(&self, key_id: &str, operation: &str) -> Result<Found, KmsError> {
        find(self.state, self.caller, key_id, operation)
    }

    /// Asks the policies; `facts` are those of the operation itself.
    pub(super) fn authorize(&self, found: &Found, operation: &str, mut facts: Facts) -> Result<(), KmsError> {
        let (key, family) = self.key(&found.arn)?;
        add_facts_of_caller(self.caller, &mut facts);
        facts.add("kms:KeySpec", &family.spec);
        facts.add("kms:KeyUsage", &family.usage);
        facts.add("kms:KeyOrigin", "AWS_KMS");
        facts.add("kms:MultiRegion", family.multi_region.to_string());
        if let Some(alias) = &found.alias {
            facts.add("kms:RequestAlias", alias);
        }
        for alias in aliases_of(self.state, key) {
            facts.add("kms:ResourceAliases", alias);
        }
        let request = Request {
            caller: self.caller,
            action: &format!("kms:{operation}"),
            key_arn: &found.arn,
            key_account: &key.account,
            facts: &facts,
            across_accounts: ACROSS_ACCOUNTS.contains(&operation),
        };
        authorize(&request, &key.policy)
    }

    pub(super) fn key(&self, arn: &str) -> Result<(&Key, &Family), KmsError> {
        let key = self.state.keys.get(arn).ok_or_else(|| no_such_key(arn))?;
        let family = self.state.families.get(&key.id).ok_or_else(|| no_such_key(arn))?;
        Ok((key, family))
    }

    pub(super) fn key_mut(&mut self, arn: &str) -> Result<&mut Key, KmsError> {
        self.state.keys.get_mut(arn).ok_or_else(|| no_such_key(arn))
    }

    pub(super) fn family_mut(&mut self, arn: &str) -> Result<&mut Family, KmsError> {
        let key = self.state.keys.get(arn).ok_or_else(|| no_such_key(arn))?;
        self.state.families.get_mut(&key.id).ok_or_else(|| no_such_key(arn))
    }

    /// Refuses keys that are disabled or on their way out.
    pub(super) fn must_be_enabled(&self, arn: &str) -> Result<(), KmsError> {
        match self.key(arn)?.0.status {
            Status::Enabled => Ok(()),
            Status::Disabled => Err(KmsError::disabled(arn)),
            Status::PendingDeletion { .. } | Status::PendingReplicaDeletion { .. } => {
                Err(pending_deletion(arn))
            }
        }
    }

    /// Refuses keys that are on their way out.
    pub(super) fn must_not_be_pending_deletion(&self, arn: &str) -> Result<(), KmsError> {
        match self.key(arn)?.0.status {
            Status::Enabled | Status::Disabled => Ok(()),
            Status::PendingDeletion { .. } | Status::PendingReplicaDeletion { .. } => {
                Err(pending_deletion(arn))
            }
        }
    }
}

pub(super) fn add_facts_of_caller(caller: &Caller, facts: &mut Facts) {
    facts.add("kms:CallerAccount", &caller.account);
    facts.add("aws:PrincipalAccount", &caller.account);
    // For a session AWS gives the ARN of its role.
    facts.add("aws:PrincipalArn", caller.names.last().unwrap_or(&caller.principal));
    facts.add("aws:RequestedRegion", &caller.region);
}

/// The names (`alias/...`) of a key's aliases.
pub(super) fn aliases_of(state: &State, key: &Key) -> Vec<String> {
    let prefix = alias_arn(&key.region, &key.account, "");
    let of_key = state.aliases.iter().filter(|(_, alias)| alias.target_key_id == key.id);
    of_key.filter_map(|(arn, _)| arn.strip_prefix(&prefix).map(str::to_owned)).collect()
}

/// The key that a blob says it is under, in the caller's region.
pub(super) fn key_of_blob(state: &State, region: &str, blob: &Blob<'_>) -> Option<String> {
    let id = blob.key_id();
    let arn = key_arn(region, &state.families.get(&id)?.account, &id);
    state.keys.contains_key(&arn).then_some(arn)
}

/// What a request says of itself, for the log and for faults. Says nothing where the request is wrong.
pub(crate) fn arrival(state: &State, caller: &Caller, operation: &str, body: &Value) -> Arrival {
    let named = |parameter| {
        let key_id = body.get(parameter)?.as_str()?;
        find(state, caller, key_id, operation).ok().map(|found| found.arn)
    };
    let of_blob = || {
        let Base64(bytes) = serde_json::from_value(body.get("CiphertextBlob")?.clone()).ok()?;
        key_of_blob(state, &caller.region, &Blob::parse(&bytes).ok()?)
    };
    let context = |parameter| -> EncryptionContext {
        body.get(parameter).and_then(|value| serde_json::from_value(value.clone()).ok()).unwrap_or_default()
    };
    let mut arrival = Arrival {
        operation: operation.to_owned(),
        region: caller.region.clone(),
        account: caller.account.clone(),
        principal: caller.principal.clone(),
        ..Arrival::default()
    };
    if operation == "ReEncrypt" {
        arrival.key = named("DestinationKeyId");
        arrival.source_key = named("SourceKeyId").or_else(of_blob);
        arrival.encryption_context = context("DestinationEncryptionContext");
        arrival.source_encryption_context = context("SourceEncryptionContext");
    } else {
        arrival.key = named("KeyId").or_else(|| named("TargetKeyId")).or_else(of_blob);
        arrival.encryption_context = context("EncryptionContext");
    }
    arrival
}

fn find(state: &State, caller: &Caller, key_id: &str, operation: &str) -> Result<Found, KmsError> {
    let (account, resource) = match KeyRef::parse(key_id)? {
        KeyRef::Id(id) => (caller.account.clone(), Resource::Key(id)),
        KeyRef::Alias(name) => (caller.account.clone(), Resource::Alias(name)),
        KeyRef::Arn { region, .. } if region != caller.region => {
            return Err(KmsError::not_found(format!("Invalid arn {region}")));
        }
        KeyRef::Arn { account, resource, .. } => (account, resource),
    };
    let found = match resource {
        Resource::Key(id) => key_by_id(state, caller, &account, &id),
        Resource::Alias(name) => key_by_alias(state, caller, &account, &name),
    };
    match found {
        // Of other accounts' keys nobody learns whether they exist.
        Err(_) if account != caller.account => Err(elsewhere(caller, &format!("kms:{operation}"))),
        found => found,
    }
}

fn key_by_id(state: &State, caller: &Caller, account: &str, id: &str) -> Result<Found, KmsError> {
    let uuid = id.strip_prefix("mrk-").unwrap_or(id);
    if uuid::Uuid::try_parse(uuid).is_err() {
        return Err(KmsError::not_found(format!("Invalid keyId '{id}'")));
    }
    let arn = key_arn(&caller.region, account, id);
    if !state.keys.contains_key(&arn) {
        return Err(no_such_key(&arn));
    }
    Ok(Found { arn, alias: None })
}

fn key_by_alias(state: &State, caller: &Caller, account: &str, name: &str) -> Result<Found, KmsError> {
    let arn = alias_arn(&caller.region, account, name);
    let alias = state.aliases.get(&arn).ok_or_else(|| no_such_alias(&arn))?;
    let target = key_arn(&caller.region, account, &alias.target_key_id);
    Ok(Found { arn: target, alias: Some(name.to_owned()) })
}

fn no_such_key(arn: &str) -> KmsError {
    KmsError::not_found(format!("Key '{arn}' does not exist"))
}

pub(super) fn no_such_alias(arn: &str) -> KmsError {
    KmsError::not_found(format!("Alias {arn} is not found."))
}

fn pending_deletion(arn: &str) -> KmsError {
    KmsError::invalid_state(format!("{arn} is pending deletion."))
}
