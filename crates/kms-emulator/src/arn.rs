//! What names a KMS key: its id, its ARN, an alias, an alias's ARN.

use crate::error::KmsError;

/// A `KeyId` parameter, taken apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum KeyRef {
    Id(String),
    Alias(String),
    Arn { region: String, account: String, resource: Resource },
}

/// The last part of a KMS ARN.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Resource {
    Key(String),
    Alias(String),
}

impl KeyRef {
    pub(crate) fn parse(text: &str) -> Result<Self, KmsError> {
        if text.is_empty() || text.len() > 2048 {
            return Err(KmsError::constraint("keyId", text, "have length between 1 and 2048"));
        }
        if text.starts_with("arn:") {
            return parse_arn(text).ok_or_else(|| KmsError::invalid_arn(format!("Invalid arn {text}")));
        }
        Ok(match text.strip_prefix("alias/") {
            Some(name) if !name.is_empty() => Self::Alias(text.to_owned()),
            _ => Self::Id(text.to_owned()),
        })
    }
}

fn parse_arn(text: &str) -> Option<KeyRef> {
    let parts: Vec<&str> = text.splitn(6, ':').collect();
    let &["arn", partition, "kms", region, account, resource] = parts.as_slice() else { return None };
    if !partition.starts_with("aws") || region.is_empty() || !is_account(account) {
        return None;
    }
    let resource = match resource.split_once('/')? {
        ("key", id) if !id.is_empty() => Resource::Key(id.to_owned()),
        ("alias", name) if !name.is_empty() => Resource::Alias(resource.to_owned()),
        _ => return None,
    };
    Some(KeyRef::Arn { region: region.to_owned(), account: account.to_owned(), resource })
}

pub(crate) fn is_account(text: &str) -> bool {
    text.len() == 12 && text.bytes().all(|b| b.is_ascii_digit())
}

pub(crate) fn key_arn(region: &str, account: &str, key_id: &str) -> String {
    format!("arn:{}:kms:{region}:{account}:key/{key_id}", partition(region))
}

/// `name` includes the leading `alias/`.
pub(crate) fn alias_arn(region: &str, account: &str, name: &str) -> String {
    format!("arn:{}:kms:{region}:{account}:{name}", partition(region))
}

pub(crate) fn root_arn(account: &str) -> String {
    format!("arn:aws:iam::{account}:root")
}

/// The account in any ARN, such as that of a role.
pub(crate) fn account_of(arn: &str) -> Option<&str> {
    let account = arn.strip_prefix("arn:")?.split(':').nth(3)?;
    is_account(account).then_some(account)
}

/// Where the key with this ARN lives.
pub(crate) fn region_and_account(key_arn: &str) -> Option<(&str, &str)> {
    let region = key_arn.strip_prefix("arn:")?.split(':').nth(2)?;
    Some((region, account_of(key_arn)?))
}

fn partition(region: &str) -> &'static str {
    if region.starts_with("cn-") {
        "aws-cn"
    } else if region.starts_with("us-gov-") {
        "aws-us-gov"
    } else {
        "aws"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_four_ways_to_name_a_key() {
        let id = "1234abcd-12ab-34cd-56ef-1234567890ab";
        assert_eq!(KeyRef::parse(id), Ok(KeyRef::Id(id.to_owned())));
        assert_eq!(KeyRef::parse("alias/a/b"), Ok(KeyRef::Alias("alias/a/b".to_owned())));
        let arn = KeyRef::parse(&key_arn("eu-west-1", "111122223333", id));
        let resource = Resource::Key(id.to_owned());
        let (region, account) = ("eu-west-1".to_owned(), "111122223333".to_owned());
        assert_eq!(arn, Ok(KeyRef::Arn { region: region.clone(), account: account.clone(), resource }));
        let resource = Resource::Alias("alias/a/b".to_owned());
        let arn = KeyRef::parse("arn:aws:kms:eu-west-1:111122223333:alias/a/b");
        assert_eq!(arn, Ok(KeyRef::Arn { region, account, resource }));
    }

    #[test]
    fn malformed_arns_are_refused() {
        for arn in [
            "arn:",
            "arn:aws:s3:::bucket",
            "arn:aws:kms:eu-west-1:1111:key/x",
            "arn:aws:kms:eu-west-1:111122223333:key",
            "arn:aws:kms:eu-west-1:111122223333:grant/x",
            "arn:aws:kms::111122223333:key/x",
        ] {
            assert_eq!(KeyRef::parse(arn).map_err(|e| e.code()), Err("InvalidArnException"), "{arn}");
        }
    }
}
