//! What a token's claims mean here: claims -> tenants, verbs, roles.

use std::fmt;

use serde_json::{Map, Value};

use super::rules::Pattern;

/// The claims of a token.
pub type Claims = Map<String, Value>;

/// Where a claim stands: its name as it is (`sub`, `cognito:groups`), or, beginning with `/`, the JSON Pointer
/// (RFC 6901) to a nested one (`/kubernetes.io/namespace`; a `/` in a name is written `~1`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClaimPath(String);

impl ClaimPath {
    /// From its text form.
    pub fn parse(text: &str) -> Result<Self, String> {
        if text.is_empty() || text == "/" {
            return Err("it is empty: name a claim, or point into one as /outer/inner".to_owned());
        }
        Ok(Self(text.to_owned()))
    }

    /// The claim's value, where there is one.
    pub fn find<'a>(&self, claims: &'a Claims) -> Option<&'a Value> {
        let Some(pointer) = self.0.strip_prefix('/') else { return claims.get(&self.0) };
        let mut names = pointer.split('/').map(|name| name.replace("~1", "/").replace("~0", "~"));
        let outer = claims.get(&names.next()?)?;
        names.try_fold(outer, |value, name| match value {
            Value::Object(map) => map.get(&name),
            Value::Array(list) => list.get(name.parse::<usize>().ok()?),
            _ => None,
        })
    }

    /// The claim's value where it is one text.
    pub fn text<'a>(&self, claims: &'a Claims) -> Option<&'a str> {
        self.find(claims)?.as_str()
    }

    /// The words of a claim: those of a list of texts, or of one text with spaces between them, as OAuth's `scope`
    /// has. What is not a text says nothing.
    pub fn words<'a>(&self, claims: &'a Claims) -> Vec<&'a str> {
        match self.find(claims) {
            Some(Value::String(text)) => text.split(' ').filter(|word| !word.is_empty()).collect(),
            Some(Value::Array(list)) => list.iter().filter_map(Value::as_str).collect(),
            _ => vec![],
        }
    }
}

impl fmt::Display for ClaimPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Words of a claim that begin with a prefix, without it: `keyfold:encrypt` -> `encrypt`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClaimWords {
    /// Which claim.
    pub path: ClaimPath,
    /// What its words begin with; other words mean something to somebody else.
    pub prefix: String,
}

impl ClaimWords {
    /// The words that are meant for keyfold, parsed; what does not parse gives nothing.
    pub fn parsed<T: std::str::FromStr>(&self, claims: &Claims) -> Vec<T> {
        let words = self.path.words(claims).into_iter();
        words.filter_map(|word| word.strip_prefix(&self.prefix)?.parse().ok()).collect()
    }
}

/// A claim that a token must have, with one of these values.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RequiredClaim {
    /// Which claim.
    pub path: ClaimPath,
    /// One of its words is one of these; of a claim that is true or false, `true` or `false`.
    pub values: Vec<Pattern>,
}

impl RequiredClaim {
    /// Whether these claims have it.
    pub fn met(&self, claims: &Claims) -> bool {
        let fits = |text: &str| self.values.iter().any(|pattern| pattern.matches(text));
        match self.path.find(claims) {
            Some(Value::String(text)) => fits(text),
            Some(Value::Array(list)) => list.iter().filter_map(Value::as_str).any(fits),
            Some(Value::Bool(value)) => fits(if *value { "true" } else { "false" }),
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::tenant::{TenantId, Verb};

    fn claims(value: Value) -> Claims {
        match value {
            Value::Object(map) => map,
            _ => unreachable!(),
        }
    }

    #[test]
    fn a_claim_is_found_by_its_name_or_by_a_pointer() {
        let claims = claims(json!({
            "sub": "a", "cognito:groups": ["x", "y"], "https://example.com/t": "b",
            "kubernetes.io": {"namespace": "billing", "list": [{"x": "c"}]},
        }));
        let find = |path: &str| ClaimPath::parse(path).unwrap().words(&claims).join(",");
        assert_eq!(find("sub"), "a");
        assert_eq!(find("cognito:groups"), "x,y");
        assert_eq!(find("https://example.com/t"), "b");
        assert_eq!(find("/https:~1~1example.com~1t"), "b");
        assert_eq!(find("/kubernetes.io/namespace"), "billing");
        assert_eq!(find("/kubernetes.io/list/0/x"), "c");
        assert_eq!(find("/kubernetes.io"), "");
        assert_eq!(find("none"), "");
    }

    #[test]
    fn words_without_the_prefix_and_words_that_make_no_sense_give_nothing() {
        let claims = claims(json!({
            "scope": "openid keyfold:encrypt keyfold:everything encrypt",
            "groups": ["tenant-acme", "tenant-ACME", "tenant-аcme", 7, "evil"],
        }));
        let words = |path: &str, prefix: &str| ClaimWords {
            path: ClaimPath::parse(path).unwrap(),
            prefix: prefix.to_owned(),
        };
        assert_eq!(words("scope", "keyfold:").parsed::<Verb>(&claims), [Verb::Encrypt]);
        let tenants: Vec<TenantId> = words("groups", "tenant-").parsed(&claims);
        assert_eq!(tenants, ["acme".parse().unwrap()], "neither another case nor a look-alike");
    }
}
