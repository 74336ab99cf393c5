//! Policy documents: parsed strictly, so that a statement that the emulator does not understand is
//! refused and not silently without effect.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::condition::{Condition, Facts};
use super::matches_pattern;
use crate::directory::Caller;
use crate::error::KmsError;

/// A key policy or an identity policy, with the text that it came as.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) struct Policy {
    text: String,
    statements: Vec<Statement>,
}

#[derive(Clone, Debug)]
struct Statement {
    allow: bool,
    principals: Option<Principals>,
    actions: Option<Patterns>,
    resources: Option<Patterns>,
    conditions: Vec<Condition>,
}

#[derive(Clone, Debug)]
struct Principals {
    not: bool,
    /// `*`, ARNs and account numbers.
    names: Vec<String>,
}

#[derive(Clone, Debug)]
struct Patterns {
    not: bool,
    patterns: Vec<String>,
}

/// What a document says of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    /// A statement denies it.
    Deny,
    /// A statement allows it to the caller by name, or to everybody.
    Allow,
    /// A statement allows it to the caller's account, whose identity policies decide.
    AllowToAccount,
    /// No statement speaks of it.
    Nothing,
}

impl Policy {
    pub(crate) fn parse(text: &str) -> Result<Self, KmsError> {
        let malformed = |why: &str| KmsError::malformed_policy(why.to_owned());
        let document: Value = serde_json::from_str(text).map_err(|e| malformed(&e.to_string()))?;
        let statements = match document.get("Statement") {
            Some(Value::Array(statements)) => statements.iter().map(parse_statement).collect(),
            Some(statement @ Value::Object(_)) => parse_statement(statement).map(|one| vec![one]),
            _ => Err("no Statement".to_owned()),
        };
        Ok(Self { text: text.to_owned(), statements: statements.map_err(|why| malformed(&why))? })
    }

    /// What AWS gives a key that is created without a policy: the account decides by its identity policies.
    pub(crate) fn of_account(account: &str) -> Self {
        let root = crate::arn::root_arn(account);
        let text = serde_json::json!({
            "Version": "2012-10-17",
            "Id": "key-default-1",
            "Statement": [{
                "Sid": "Enable IAM User Permissions",
                "Effect": "Allow",
                "Principal": {"AWS": root},
                "Action": "kms:*",
                "Resource": "*"
            }]
        });
        let statement = Statement {
            allow: true,
            principals: Some(Principals { not: false, names: vec![root] }),
            actions: Some(Patterns { not: false, patterns: vec!["kms:*".to_owned()] }),
            resources: Some(Patterns { not: false, patterns: vec!["*".to_owned()] }),
            conditions: Vec::new(),
        };
        Self { text: format!("{text:#}"), statements: vec![statement] }
    }

    pub(crate) fn text(&self) -> &str {
        &self.text
    }

    /// As a key policy: statements speak of the principals that they name.
    pub(crate) fn answer_as_key_policy(
        &self,
        caller: &Caller,
        action: &str,
        key: &str,
        facts: &Facts,
    ) -> Answer {
        self.answer(action, key, facts, |statement| match &statement.principals {
            Some(principals) => principals.include(caller),
            None => Answer::Nothing,
        })
    }

    /// As a policy of the caller's own: statements speak of whoever has it.
    pub(crate) fn answer_as_identity_policy(&self, action: &str, resource: &str, facts: &Facts) -> Answer {
        self.answer(action, resource, facts, |_| Answer::Allow)
    }

    fn answer(
        &self,
        action: &str,
        resource: &str,
        facts: &Facts,
        speaks_of_caller: impl Fn(&Statement) -> Answer,
    ) -> Answer {
        let mut answer = Answer::Nothing;
        for statement in &self.statements {
            let spoken = speaks_of_caller(statement);
            let applies = spoken != Answer::Nothing
                && statement.actions.as_ref().is_some_and(|actions| actions.match_ignoring_case(action))
                && statement.resources.as_ref().is_some_and(|resources| resources.match_exactly(resource))
                && statement.conditions.iter().all(|condition| condition.holds(facts));
            if !applies {
                continue;
            }
            if !statement.allow {
                return Answer::Deny;
            }
            if answer != Answer::Allow {
                answer = spoken;
            }
        }
        answer
    }
}

impl Principals {
    fn include(&self, caller: &Caller) -> Answer {
        let root = crate::arn::root_arn(&caller.account);
        let mut found = Answer::Nothing;
        for name in &self.names {
            if name == "*" || caller.names.contains(name) {
                found = Answer::Allow;
            } else if (*name == root || *name == caller.account) && found == Answer::Nothing {
                found = Answer::AllowToAccount;
            }
        }
        match (self.not, found) {
            (false, found) => found,
            (true, Answer::Nothing) => Answer::Allow,
            (true, _) => Answer::Nothing,
        }
    }
}

impl Patterns {
    /// Actions are matched without regard to case, as AWS does.
    fn match_ignoring_case(&self, action: &str) -> bool {
        let action = action.to_ascii_lowercase();
        self.patterns.iter().any(|p| matches_pattern(&p.to_ascii_lowercase(), &action)) != self.not
    }

    fn match_exactly(&self, resource: &str) -> bool {
        self.patterns.iter().any(|p| matches_pattern(p, resource)) != self.not
    }
}

fn parse_statement(value: &Value) -> Result<Statement, String> {
    let object = value.as_object().ok_or("a Statement that is no object")?;
    for name in object.keys() {
        const KNOWN: [&str; 9] = [
            "Sid",
            "Effect",
            "Principal",
            "NotPrincipal",
            "Action",
            "NotAction",
            "Resource",
            "NotResource",
            "Condition",
        ];
        if !KNOWN.contains(&name.as_str()) {
            return Err(format!("unknown element {name}"));
        }
    }
    let allow = match object.get("Effect").and_then(Value::as_str) {
        Some("Allow") => true,
        Some("Deny") => false,
        _ => return Err("Effect is neither Allow nor Deny".to_owned()),
    };
    let principals = match (object.get("Principal"), object.get("NotPrincipal")) {
        (None, None) => None,
        (Some(value), None) => Some(Principals { not: false, names: principal_names(value)? }),
        (None, Some(value)) => Some(Principals { not: true, names: principal_names(value)? }),
        (Some(_), Some(_)) => return Err("both Principal and NotPrincipal".to_owned()),
    };
    Ok(Statement {
        allow,
        principals,
        actions: patterns(object, "Action", "NotAction")?,
        resources: patterns(object, "Resource", "NotResource")?,
        conditions: object.get("Condition").map(Condition::parse_all).transpose()?.unwrap_or_default(),
    })
}

fn principal_names(value: &Value) -> Result<Vec<String>, String> {
    let names = match value {
        Value::String(any) if any == "*" => vec!["*".to_owned()],
        Value::Object(kinds) => {
            let mut names = Vec::new();
            for (kind, value) in kinds {
                match kind.as_str() {
                    "AWS" => names.extend(strings(value)?),
                    // No service calls the emulator, so a service principal never matches.
                    "Service" | "Federated" | "CanonicalUser" => {}
                    _ => return Err(format!("unknown kind of principal {kind}")),
                }
            }
            names
        }
        _ => return Err("a Principal that is neither * nor an object".to_owned()),
    };
    let valid = |name: &String| name == "*" || name.starts_with("arn:aws") || crate::arn::is_account(name);
    match names.iter().find(|name| !valid(name)) {
        Some(_) => Err("Policy contains a statement with one or more invalid principals.".to_owned()),
        None => Ok(names),
    }
}

fn patterns(object: &Map<String, Value>, name: &str, not: &str) -> Result<Option<Patterns>, String> {
    match (object.get(name), object.get(not)) {
        (None, None) => Ok(None),
        (Some(value), None) => Ok(Some(Patterns { not: false, patterns: strings(value)? })),
        (None, Some(value)) => Ok(Some(Patterns { not: true, patterns: strings(value)? })),
        (Some(_), Some(_)) => Err(format!("both {name} and {not}")),
    }
}

/// One string, or a list of them.
pub(super) fn strings(value: &Value) -> Result<Vec<String>, String> {
    let one = |value: &Value| match value {
        Value::String(text) if text.contains("${") => Err("policy variables are not supported".to_owned()),
        Value::String(text) => Ok(text.clone()),
        Value::Bool(_) | Value::Number(_) => Ok(value.to_string()),
        _ => Err("a value that is no string".to_owned()),
    };
    match value {
        Value::Array(values) => values.iter().map(one).collect(),
        value => one(value).map(|text| vec![text]),
    }
}

impl TryFrom<String> for Policy {
    type Error = KmsError;

    fn try_from(text: String) -> Result<Self, KmsError> {
        Self::parse(&text)
    }
}

impl From<Policy> for String {
    fn from(policy: Policy) -> Self {
        policy.text
    }
}
