//! What a change of administration asks for, so that the trail alone tells who held what and since when.

use std::fmt::Display;

use serde_json::{Map, Value, json};

use super::chain::Keys;
use super::room::{ASKED_BYTES_MAX, listed_bytes};
use crate::store::GrantCondition;

/// The parts of a change: names, verbs, limits. Never a secret. Values of encryption contexts are recorded as those of
/// calls are: by a keyed hash, unless the name is public.
#[derive(Debug, Default)]
pub struct Asked(Vec<(&'static str, Part)>);

#[derive(Debug)]
enum Part {
    Text(String),
    Number(u64),
    List(Vec<String>),
    Conditions(Vec<GrantCondition>),
}

impl Asked {
    /// Nothing that its name does not say.
    pub const NOTHING: Self = Self(Vec::new());

    /// With this text.
    #[must_use]
    pub fn text(self, name: &'static str, text: &impl Display) -> Self {
        self.with(name, Part::Text(text.to_string()))
    }

    /// With this text where there is one.
    #[must_use]
    pub fn some_text(self, name: &'static str, text: Option<&impl Display>) -> Self {
        text.map(ToString::to_string).into_iter().fold(self, |asked, text| asked.text(name, &text))
    }

    /// With this number.
    #[must_use]
    pub fn number(self, name: &'static str, number: u64) -> Self {
        self.with(name, Part::Number(number))
    }

    /// With these texts.
    #[must_use]
    pub fn list(self, name: &'static str, items: impl IntoIterator<Item: Display>) -> Self {
        self.with(name, Part::List(items.into_iter().map(|item| item.to_string()).collect()))
    }

    /// With these conditions on encryption contexts.
    #[must_use]
    pub fn conditions(self, conditions: &[GrantCondition]) -> Self {
        self.with("context", Part::Conditions(conditions.to_vec()))
    }

    fn with(mut self, name: &'static str, part: Part) -> Self {
        self.0.push((name, part));
        self
    }

    pub(super) fn is_nothing(&self) -> bool {
        self.0.is_empty()
    }

    /// As it stands in a record: what has no room is left out, and `more` says how many texts that are.
    pub(super) fn value(&self, tenant: &str, keys: &Keys) -> Value {
        let (mut room, mut more) = (ASKED_BYTES_MAX, 0_u64);
        let mut fits = |text: &str| {
            let bytes = listed_bytes(text);
            let fits = bytes <= room;
            if fits {
                room -= bytes;
            } else {
                more += 1;
            }
            fits
        };
        let mut told = Map::new();
        for (name, part) in &self.0 {
            let value = match part {
                Part::Number(number) => json!(number),
                Part::Text(text) if fits(text) => json!(text),
                Part::Text(_) => continue,
                Part::List(items) => items.iter().filter(|item| fits(item)).map(String::as_str).collect(),
                Part::Conditions(conditions) => {
                    let kept = conditions.iter().filter(|condition| fits(&condition.name));
                    let pairs: Vec<(String, Value)> = kept
                        .map(|condition| {
                            let name = &condition.name;
                            let shown = |value: &String| keys.shown(tenant, name, value);
                            (name.clone(), condition.values.iter().map(shown).collect())
                        })
                        .collect();
                    // A value's hash takes as much room as a short text.
                    let pairs = pairs.into_iter().filter(|(_, values)| fits(&values.to_string()));
                    Value::Object(pairs.collect())
                }
            };
            told.insert((*name).to_owned(), value);
        }
        if more > 0 {
            told.insert("more".to_owned(), json!(more));
        }
        Value::Object(told)
    }
}
