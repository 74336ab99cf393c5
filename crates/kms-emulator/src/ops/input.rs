//! Parameters as they come over the wire, and the checks that many operations share.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer};
use serde_json::Value;

use crate::error::KmsError;

pub(super) fn parse<T: DeserializeOwned>(body: Value) -> Result<T, KmsError> {
    serde_json::from_value(body).map_err(|error| KmsError::serialization(error.to_string()))
}

pub(super) fn required<'a>(value: Option<&'a String>, parameter: &str) -> Result<&'a str, KmsError> {
    value.map(String::as_str).ok_or_else(|| KmsError::missing(parameter))
}

/// A blob: base64 on the wire.
#[derive(Debug)]
pub(super) struct Base64(pub(super) Vec<u8>);

impl<'de> Deserialize<'de> for Base64 {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        STANDARD.decode(text).map(Self).map_err(serde::de::Error::custom)
    }
}

pub(super) fn base64(bytes: &[u8]) -> String {
    STANDARD.encode(bytes)
}

/// The parameters of operations that take a key and nothing else.
#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub(super) struct KeyOnly {
    pub(super) key_id: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Tag {
    tag_key: String,
    tag_value: String,
}

pub(super) fn tags(tags: Vec<Tag>) -> Result<BTreeMap<String, String>, KmsError> {
    let given = tags.len();
    let tags: BTreeMap<_, _> = tags.into_iter().map(|tag| (tag.tag_key, tag.tag_value)).collect();
    if tags.len() != given {
        return Err(KmsError::tag("Duplicate tag keys"));
    }
    if tags.keys().any(|key| key.is_empty() || key.len() > 128 || key.starts_with("aws:")) {
        return Err(KmsError::tag("Invalid tag key"));
    }
    Ok(tags)
}

pub(super) fn description(text: Option<String>) -> Result<String, KmsError> {
    match text {
        Some(text) if text.chars().count() > 8192 => {
            Err(KmsError::constraint("description", text, "have length less than or equal to 8192"))
        }
        text => Ok(text.unwrap_or_default()),
    }
}

/// One page of a list: `Limit` items after `Marker`.
#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub(super) struct Paging {
    limit: Option<usize>,
    marker: Option<String>,
}

impl Paging {
    /// The answer of a list operation, with its items under `name`.
    pub(super) fn answer(
        &self,
        name: &str,
        items: Vec<Value>,
        default_limit: usize,
    ) -> Result<Value, KmsError> {
        let limit = self.limit.unwrap_or(default_limit);
        if !(1..=1000).contains(&limit) {
            return Err(KmsError::constraint("limit", limit, "have value between 1 and 1000"));
        }
        let start = match &self.marker {
            None => 0,
            // A marker is the number of items that came before.
            Some(marker) => marker.parse().map_err(|_| KmsError::invalid_marker("Invalid marker"))?,
        };
        let end = items.len().min(limit.saturating_add(start));
        let mut answer = serde_json::json!({"Truncated": end < items.len()});
        if end < items.len() {
            answer["NextMarker"] = Value::String(end.to_string());
        }
        answer[name] = items.into_iter().take(end).skip(start).collect();
        Ok(answer)
    }
}
