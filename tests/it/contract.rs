//! The OpenAPI document as a promise: every answer that a test receives has a status, a problem code and a shape that
//! the document names for its route.

use std::sync::LazyLock;

use serde_json::Value;

use crate::caller::Answer;

pub(crate) static DOCUMENT: LazyLock<Value> =
    LazyLock::new(|| serde_json::to_value(keyfold::http::openapi_document()).unwrap());

/// Every problem: its code, status, and whether the same request may succeed later. A copy on purpose: programs are
/// written against it, and a change of the table in the service must not go unnoticed.
pub(crate) const PROBLEMS: [(&str, u16, bool); 24] = [
    ("malformed_request", 400, false),
    ("malformed_envelope", 400, false),
    ("reserved_context", 400, false),
    ("unauthenticated", 401, false),
    ("forbidden", 403, false),
    ("context_limit", 403, false),
    ("kek_denied", 403, false),
    ("key_revoked", 403, false),
    ("not_found", 404, false),
    ("method_not_allowed", 405, false),
    ("conflict", 409, false),
    ("key_destroyed", 410, false),
    ("too_large", 413, false),
    ("unsupported_media_type", 415, false),
    ("context_mismatch", 422, false),
    ("ciphertext_damaged", 422, false),
    ("internal_error", 500, false),
    ("kms_unavailable", 503, true),
    ("store_unavailable", 503, true),
    ("issuer_unavailable", 503, true),
    ("audit_unavailable", 503, true),
    ("rate_limited", 429, true),
    ("overloaded", 503, true),
    ("deadline_exceeded", 504, true),
];

/// The template of a path: `/v1/tenants/{tenant}` for `/v1/tenants/acme`.
pub(crate) fn template(path: &str) -> Option<&'static str> {
    let path = path.split('?').next().unwrap_or_default();
    let matches = |template: &str| {
        let (mut wanted, mut given) = (template.split('/'), path.split('/'));
        loop {
            match (wanted.next(), given.next()) {
                (None, None) => return true,
                (Some(wanted), Some(given)) if wanted == given || wanted.starts_with('{') => {}
                _ => return false,
            }
        }
    };
    DOCUMENT["paths"].as_object().unwrap().keys().map(String::as_str).find(|template| matches(template))
}

/// Holds an answer against the document.
#[track_caller]
pub(crate) fn check(method: &str, path: &str, answer: &Answer) {
    let Some(template) = template(path) else { return };
    let operation = &DOCUMENT["paths"][template][method];
    if operation.is_null() {
        return;
    }
    let name = format!("{method} {template} {}", answer.status);
    let documented = &operation["responses"][answer.status.to_string()];
    assert!(!documented.is_null(), "{name} is not documented: {}", answer.raw);
    let content_type = answer.headers["content-type"].to_str().unwrap();
    let content = &documented["content"][content_type];
    assert!(!content.is_null(), "{name} is not documented as {content_type}");
    let mut faults = Vec::new();
    validate(&answer.json, &content["schema"], "body", &mut faults);
    assert!(faults.is_empty(), "{name} is not as documented: {faults:?}: {}", answer.raw);
    if content_type == "application/problem+json" {
        let code = answer.json["code"].as_str().unwrap();
        assert!(!content["examples"][code].is_null(), "{name} does not document the code {code}");
        check_problem(answer);
    }
}

/// Holds a problem against RFC 9457 and the table of codes.
#[track_caller]
pub(crate) fn check_problem(answer: &Answer) {
    let json = &answer.json;
    let code = json["code"].as_str().unwrap_or_else(|| panic!("no code: {}", answer.raw));
    let (_, status, retryable) =
        *PROBLEMS.iter().find(|known| known.0 == code).unwrap_or_else(|| panic!("unknown code {code}"));
    assert_eq!(answer.headers["content-type"], "application/problem+json");
    assert_eq!((answer.status, json["status"].as_u64()), (status, Some(status.into())), "{}", answer.raw);
    assert_eq!(json["retryable"], retryable, "{}", answer.raw);
    assert_eq!(answer.headers.contains_key("retry-after"), retryable, "{}", answer.raw);
    assert_eq!(json["type"], format!("urn:keyfold:problem:{code}"));
    assert_eq!(json["request_id"], answer.headers["x-request-id"].to_str().unwrap());
    assert!(!json["title"].as_str().unwrap().is_empty() && !json["detail"].as_str().unwrap().is_empty());
    assert_eq!(answer.headers["cache-control"], "no-store");
}

/// The part of JSON Schema that the document uses; what is not documented is a fault too.
fn validate(value: &Value, schema: &Value, at: &str, faults: &mut Vec<String>) {
    if let Some(reference) = schema["$ref"].as_str() {
        let target = DOCUMENT.pointer(&reference[1..]).unwrap_or_else(|| panic!("dangling {reference}"));
        return validate(value, target, at, faults);
    }
    if let Some(all) = schema["allOf"].as_array() {
        let mut merged = serde_json::json!({"type": "object", "properties": {}, "required": []});
        for part in all {
            let target =
                part["$ref"].as_str().map_or(part, |reference| DOCUMENT.pointer(&reference[1..]).unwrap());
            for (name, property) in target["properties"].as_object().unwrap() {
                merged["properties"][name] = property.clone();
            }
            merged["required"].as_array_mut().unwrap().extend(target["required"].as_array().unwrap().clone());
        }
        return validate(value, &merged, at, faults);
    }
    if let Some(choices) = schema["oneOf"].as_array() {
        let fits = |choice: &&Value| {
            let mut faults = Vec::new();
            validate(value, choice, at, &mut faults);
            faults.is_empty()
        };
        if choices.iter().filter(fits).count() != 1 {
            faults.push(format!("{at} is not one of the choices"));
        }
        return;
    }
    let name = match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(number) if number.is_u64() || number.is_i64() => "integer",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    };
    let types = schema["type"].as_array().cloned().unwrap_or_else(|| vec![schema["type"].clone()]);
    if !types.iter().any(|known| known == name) {
        faults.push(format!("{at} is a {name} and not {}", schema["type"]));
    }
    if let Some(known) = schema["enum"].as_array()
        && !known.contains(value)
    {
        faults.push(format!("{at} is not in the enumeration"));
    }
    for (index, item) in value.as_array().into_iter().flatten().enumerate() {
        validate(item, &schema["items"], &format!("{at}[{index}]"), faults);
    }
    let Some(object) = value.as_object() else { return };
    for required in schema["required"].as_array().into_iter().flatten() {
        if !object.contains_key(required.as_str().unwrap()) {
            faults.push(format!("{at} has no {required}"));
        }
    }
    for (name, item) in object {
        match &schema["properties"][name] {
            Value::Null => faults.push(format!("{at}.{name} is not documented")),
            property => validate(item, property, &format!("{at}.{name}"), faults),
        }
    }
}
