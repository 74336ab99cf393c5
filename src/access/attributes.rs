//! What a credential says of its holder beside who he is.

use std::borrow::Cow;
use std::sync::Arc;

use serde_json::Value;

/// What stands in a credential, as far as it is not needed to decide whether it is valid. Only what has been
/// verified is put here: a claim of a token whose signature holds, a name of a certificate whose chain does.
#[derive(Clone, Debug, Default)]
pub struct Attributes {
    /// How the caller authenticated: `api-key`, `jwt`, `client-certificate`.
    pub method: &'static str,
    /// Whom the credential names, as it names him; none where the principal's id is all there is.
    pub subject: Option<Arc<str>>,
    /// Who issued it.
    pub issuer: Option<Arc<str>>,
    /// The subject alternative name of a client certificate by which it was recognised.
    pub san: Option<Arc<str>>,
    /// The claims of a token, as an object.
    pub claims: Arc<Value>,
}

impl Attributes {
    /// Of an API key: it says nothing but its id.
    pub fn api_key() -> Self {
        Self { method: "api-key", ..Self::default() }
    }

    /// A claim as text. `name` is a claim's name, or a JSON pointer (RFC 6901) such as `/kubernetes.io/namespace`
    /// for one that stands deeper. None where there is no such claim, or where it is a list or an object: a value
    /// that means several things at once binds nothing.
    pub fn claim(&self, name: &str) -> Option<Cow<'_, str>> {
        let claim = if name.starts_with('/') { self.claims.pointer(name) } else { self.claims.get(name) };
        match claim? {
            Value::String(text) => Some(Cow::Borrowed(text)),
            Value::Number(number) => Some(Cow::Owned(number.to_string())),
            Value::Bool(truth) => Some(Cow::Borrowed(if *truth { "true" } else { "false" })),
            Value::Null | Value::Array(_) | Value::Object(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_claim_is_text_a_number_or_a_truth_and_nothing_that_means_several_things() {
        let claims = json!({
            "dept": "billing", "level": 3, "staff": true, "groups": ["a", "b"], "none": null,
            "kubernetes.io": {"namespace": "shop"},
        });
        let attributes = Attributes { claims: Arc::new(claims), ..Attributes::default() };
        assert_eq!(attributes.claim("dept").as_deref(), Some("billing"));
        assert_eq!(attributes.claim("level").as_deref(), Some("3"));
        assert_eq!(attributes.claim("staff").as_deref(), Some("true"));
        assert_eq!(attributes.claim("/kubernetes.io/namespace").as_deref(), Some("shop"));
        for missing in ["groups", "none", "kubernetes.io", "Dept", "", "/", "/groups"] {
            assert_eq!(attributes.claim(missing), None, "{missing}");
        }
        assert_eq!(Attributes::api_key().claim("dept"), None);
    }
}
