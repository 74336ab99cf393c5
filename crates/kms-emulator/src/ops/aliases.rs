//! Aliases: names that can move from one key to another.

use serde::Deserialize;
use serde_json::{Value, json};

use super::Work;
use super::input::{Paging, required};
use super::lookup::{add_facts_of_caller, aliases_of, no_such_alias};
use crate::arn::alias_arn;
use crate::engine::Alias;
use crate::error::KmsError;
use crate::policy::{Facts, authorize_without_key};

/// AWS's quota.
const MAX_PER_KEY: usize = 50;

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub(super) struct NameAndTarget {
    alias_name: Option<String>,
    target_key_id: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub(super) struct ListAliases {
    key_id: Option<String>,
    #[serde(flatten)]
    paging: Paging,
}

pub(super) fn create(work: &mut Work<'_>, input: &NameAndTarget) -> Result<Value, KmsError> {
    let name = checked_name(input.alias_name.as_ref())?;
    let arn = alias_arn(&work.caller.region, &work.caller.account, name);
    let target = target(work, input.target_key_id.as_ref(), "CreateAlias")?;
    if work.state.aliases.contains_key(&arn) {
        return Err(KmsError::already_exists(format!("An alias with the name {arn} already exists")));
    }
    let alias = Alias { target_key_id: target, created: work.now, updated: work.now };
    work.state.aliases.insert(arn, alias);
    work.changed = true;
    Ok(json!({}))
}

pub(super) fn update(work: &mut Work<'_>, input: &NameAndTarget) -> Result<Value, KmsError> {
    let name = checked_name(input.alias_name.as_ref())?;
    let arn = alias_arn(&work.caller.region, &work.caller.account, name);
    let target = target(work, input.target_key_id.as_ref(), "UpdateAlias")?;
    let alias = work.state.aliases.get_mut(&arn).ok_or_else(|| no_such_alias(&arn))?;
    alias.target_key_id = target;
    alias.updated = work.now;
    work.changed = true;
    Ok(json!({}))
}

pub(super) fn delete(work: &mut Work<'_>, input: &NameAndTarget) -> Result<Value, KmsError> {
    let name = checked_name(input.alias_name.as_ref())?;
    let arn = alias_arn(&work.caller.region, &work.caller.account, name);
    let target = match work.state.aliases.get(&arn) {
        Some(alias) => alias.target_key_id.clone(),
        None => return Err(no_such_alias(&arn)),
    };
    work.permitted(Some(&target), "DeleteAlias")?;
    work.state.aliases.remove(&arn);
    work.changed = true;
    Ok(json!({}))
}

pub(super) fn list(work: &mut Work<'_>, input: &ListAliases) -> Result<Value, KmsError> {
    let mut facts = Facts::default();
    add_facts_of_caller(work.caller, &mut facts);
    authorize_without_key(work.caller, "kms:ListAliases", &facts)?;
    let of_key = match &input.key_id {
        Some(key_id) => Some(work.key(&work.find(key_id, "ListAliases")?.arn)?.0.id.clone()),
        None => None,
    };
    let prefix = alias_arn(&work.caller.region, &work.caller.account, "");
    let own =
        work.state.aliases.iter().filter_map(|(arn, alias)| Some((arn, arn.strip_prefix(&prefix)?, alias)));
    let wanted = own.filter(|(_, _, alias)| of_key.as_ref().is_none_or(|id| alias.target_key_id == *id));
    let items = wanted.map(|(arn, name, alias)| {
        json!({
            "AliasArn": arn,
            "AliasName": name,
            "CreationDate": alias.created.seconds(),
            "LastUpdatedDate": alias.updated.seconds(),
            "TargetKeyId": alias.target_key_id,
        })
    });
    input.paging.answer("Aliases", items.collect(), 50)
}

/// The id of a key that may get one more alias.
fn target(work: &Work<'_>, key_id: Option<&String>, operation: &str) -> Result<String, KmsError> {
    let key_id = required(key_id, "targetKeyId")?;
    if key_id.starts_with("alias/") {
        return Err(KmsError::validation("Aliases must refer to keys. Not aliases"));
    }
    let found = work.find(key_id, operation)?;
    work.authorize(&found, operation, Facts::default())?;
    work.must_not_be_pending_deletion(&found.arn)?;
    let (key, _) = work.key(&found.arn)?;
    if aliases_of(work.state, key).len() >= MAX_PER_KEY {
        return Err(KmsError::limit_exceeded(format!("{} has too many aliases", found.arn)));
    }
    Ok(key.id.clone())
}

fn checked_name(name: Option<&String>) -> Result<&str, KmsError> {
    let name = required(name, "aliasName")?;
    let allowed = |c: char| c.is_ascii_alphanumeric() || "/_-".contains(c);
    match name.strip_prefix("alias/") {
        None | Some("") => Err(KmsError::validation("Invalid identifier")),
        Some(rest) if rest.starts_with("aws/") => Err(KmsError::not_authorized("")),
        Some(rest) if !rest.chars().all(allowed) => {
            let message = format!("{name} contains invalid characters for an alias");
            Err(KmsError::invalid_alias_name(message))
        }
        Some(_) if name.len() > 256 => {
            Err(KmsError::constraint("aliasName", name, "have length less than or equal to 256"))
        }
        Some(_) => Ok(name),
    }
}
