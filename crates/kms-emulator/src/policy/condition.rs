//! Conditions of policy statements.

use std::collections::BTreeMap;

use serde_json::Value;

use super::document::strings;
use super::matches_pattern;

/// What is known of a request, by condition key. Keys are compared without regard to case, as AWS does.
#[derive(Clone, Debug, Default)]
pub(crate) struct Facts(BTreeMap<String, Vec<String>>);

impl Facts {
    pub(crate) fn add(&mut self, key: &str, value: impl Into<String>) {
        self.0.entry(key.to_ascii_lowercase()).or_default().push(value.into());
    }

    fn values(&self, key: &str) -> &[String] {
        self.0.get(key).map_or(&[], Vec::as_slice)
    }
}

/// One operator on one condition key.
#[derive(Clone, Debug)]
pub(super) struct Condition {
    set: Option<SetOperator>,
    operator: Operator,
    if_exists: bool,
    key: String,
    wanted: Vec<String>,
}

#[derive(Clone, Copy, Debug)]
enum SetOperator {
    ForAnyValue,
    ForAllValues,
}

#[derive(Clone, Copy, Debug)]
enum Operator {
    /// True if the key is absent.
    Null,
    Text {
        not: bool,
        how: How,
    },
}

#[derive(Clone, Copy, Debug)]
enum How {
    Equal,
    EqualIgnoringCase,
    Like,
}

impl Condition {
    pub(super) fn parse_all(value: &Value) -> Result<Vec<Self>, String> {
        let operators = value.as_object().ok_or("a Condition that is no object")?;
        let mut all = Vec::new();
        for (name, keys) in operators {
            let (set, operator, if_exists) =
                parse_operator(name).ok_or(format!("unknown operator {name}"))?;
            for (key, wanted) in keys.as_object().ok_or("a condition operator without keys")? {
                let (key, wanted) = (key.to_ascii_lowercase(), strings(wanted)?);
                all.push(Self { set, operator, if_exists, key, wanted });
            }
        }
        Ok(all)
    }

    pub(super) fn holds(&self, facts: &Facts) -> bool {
        let found = facts.values(&self.key);
        let Operator::Text { not, how } = self.operator else {
            let absent = found.is_empty();
            return self.wanted.iter().any(|wanted| wanted == if absent { "true" } else { "false" });
        };
        if found.is_empty() {
            // AWS: absent keys satisfy negated operators, ...IfExists and ForAllValues.
            return match self.set {
                Some(SetOperator::ForAllValues) => true,
                Some(SetOperator::ForAnyValue) => self.if_exists,
                None => not || self.if_exists,
            };
        }
        let holds = |value: &String| self.wanted.iter().any(|wanted| how.matches(wanted, value)) != not;
        match self.set {
            Some(SetOperator::ForAllValues) => found.iter().all(holds),
            None if not => found.iter().all(holds),
            Some(SetOperator::ForAnyValue) | None => found.iter().any(holds),
        }
    }
}

impl How {
    fn matches(self, wanted: &str, value: &str) -> bool {
        match self {
            Self::Equal => wanted == value,
            Self::EqualIgnoringCase => wanted.eq_ignore_ascii_case(value),
            Self::Like => matches_pattern(wanted, value),
        }
    }
}

fn parse_operator(name: &str) -> Option<(Option<SetOperator>, Operator, bool)> {
    let (set, name) = match name.split_once(':') {
        Some(("ForAnyValue", name)) => (Some(SetOperator::ForAnyValue), name),
        Some(("ForAllValues", name)) => (Some(SetOperator::ForAllValues), name),
        Some(_) => return None,
        None => (None, name),
    };
    let (name, if_exists) = match name.strip_suffix("IfExists") {
        Some(name) => (name, true),
        None => (name, false),
    };
    let text = |not, how| Operator::Text { not, how };
    let operator = match name {
        "Null" => Operator::Null,
        "StringEquals" => text(false, How::Equal),
        "StringNotEquals" => text(true, How::Equal),
        "StringEqualsIgnoreCase" | "Bool" => text(false, How::EqualIgnoringCase),
        "StringNotEqualsIgnoreCase" => text(true, How::EqualIgnoringCase),
        "StringLike" | "ArnLike" | "ArnEquals" => text(false, How::Like),
        "StringNotLike" | "ArnNotLike" | "ArnNotEquals" => text(true, How::Like),
        _ => return None,
    };
    Some((set, operator, if_exists))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn holds(condition: &Value, facts: &[(&str, &str)]) -> bool {
        let mut known = Facts::default();
        for (key, value) in facts {
            known.add(key, *value);
        }
        Condition::parse_all(condition).unwrap().iter().all(|condition| condition.holds(&known))
    }

    #[test]
    fn operators() {
        let tenant = "kms:EncryptionContext:keyfold:tenant";
        let equals = json!({"StringEquals": {tenant: "acme"}});
        assert!(holds(&equals, &[(tenant, "acme")]));
        assert!(!holds(&equals, &[(tenant, "ACME")]));
        assert!(!holds(&equals, &[]));
        assert!(holds(&json!({"StringNotEquals": {tenant: "acme"}}), &[]));
        assert!(!holds(&json!({"StringNotEquals": {tenant: ["acme", "b"]}}), &[(tenant, "b")]));
        assert!(holds(&json!({"StringEqualsIfExists": {tenant: "acme"}}), &[]));
        assert!(holds(&json!({"StringLike": {tenant: "ac*"}}), &[(tenant, "acme")]));
        assert!(holds(&json!({"Null": {tenant: true}}), &[]));
        assert!(!holds(&json!({"Null": {tenant: "true"}}), &[(tenant, "acme")]));
    }

    #[test]
    fn set_operators() {
        let keys = "kms:EncryptionContextKeys";
        let facts = [(keys, "a"), (keys, "b")];
        assert!(holds(&json!({"ForAnyValue:StringEquals": {keys: "b"}}), &facts));
        assert!(!holds(&json!({"ForAllValues:StringEquals": {keys: "b"}}), &facts));
        assert!(holds(&json!({"ForAllValues:StringEquals": {keys: ["a", "b", "c"]}}), &facts));
        assert!(!holds(&json!({"ForAnyValue:StringEquals": {keys: "b"}}), &[]));
    }

    #[test]
    fn unknown_operators_are_refused() {
        assert!(Condition::parse_all(&json!({"IpAddress": {"aws:SourceIp": "10.0.0.0/8"}})).is_err());
    }
}
