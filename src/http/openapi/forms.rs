//! Which form the names of the interface have, and what their values look like: said once, and put at every place where
//! the document has one.
//!
//! A name means the same wherever it stands (`tenant`, `key`, `dek`...), so its form is found by it. What is said here
//! is what the parsers take: a generated client can check a value before it sends it.

use serde_json::{Value, json};
use utoipa::openapi::path::{Operation, ParameterIn, Paths};
use utoipa::openapi::schema::{ArrayItems, Object, SchemaType, Type};
use utoipa::openapi::{KnownFormat, ObjectBuilder, OpenApi, RefOr, Schema, SchemaFormat};

use crate::http::problem::Code;

/// What a text of some name looks like.
struct Form {
    pattern: &'static str,
    bytes_max: usize,
}

const SLUG: Form = Form { pattern: "^[a-z0-9][a-z0-9-]{0,62}$", bytes_max: 63 };
const UUID: Form = Form { pattern: "^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$", bytes_max: 36 };
const API_KEY: Form = Form { pattern: "^[A-Za-z0-9_-]{16}$", bytes_max: 16 };
const KEK: Form = Form {
    pattern: "^(local:[a-z0-9][a-z0-9-]{0,62}|arn:[A-Za-z0-9-]+:kms:[A-Za-z0-9-]+:[0-9]{12}:key/[A-Za-z0-9-]+)$",
    bytes_max: 256,
};
const TARGET: Form = Form {
    pattern: "^(key:[a-z0-9][a-z0-9-]{0,62}|dek:[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12})?$",
    bytes_max: 67,
};

fn form(name: &str) -> Option<&'static Form> {
    match name {
        "tenant" | "tenants" | "key" | "keyfold-tenant" | "keyfold-key" => Some(&SLUG),
        "dek" | "dek_id" | "from_dek_id" | "to_dek_id" | "keyfold-dek-id" | "grant" => Some(&UUID),
        "kek" => Some(&KEK),
        "target" => Some(&TARGET),
        _ => None,
    }
}

/// What the value of a property of this schema may be, where the property itself does not say.
fn example(schema: &str, name: &str) -> Option<Value> {
    let id = "019ad1b2-8c1e-7c3a-9d7e-0123456789ab";
    let text = match (schema, name) {
        ("TenantList", "next") => "acme",
        ("KeyList", "next") | (_, "key") => "default",
        ("ApiKeyList", "next") => "q83vEjRWeJASNFZ4",
        ("ShredList", "next") => "key:default",
        (_, "next" | "dek_id" | "from_dek_id" | "to_dek_id") => id,
        (_, "ciphertext") => "kf1.S0YBAZrR...",
        (_, "plaintext") => "aGVsbG8=",
        (_, "ref") => "row 42",
        (_, "material") => "0a1b2c3d4e5f60718293a4b5c6d7e8f9",
        (_, "external_id") => "keyfold-acme",
        (_, "last_error") => "the KMS cannot be reached for local:main",
        (_, "advice") => "Rewrap the envelopes, or have the master keys deleted.",
        (_, "code") => Code::ContextMismatch.name(),
        (_, "type") => "urn:keyfold:problem:context_mismatch",
        (_, "title") => Code::ContextMismatch.title(),
        (_, "detail") => Code::ContextMismatch.example(),
        (_, "request_id") => "4b1f0a6c9d3e2f10-2a",
        (_, "status") => return Some(json!(Code::ContextMismatch.status().as_u16())),
        (_, "failed") => return Some(json!(1)),
        (_, "changed") => return Some(json!(true)),
        (_, "retryable" | "rewrap_advised") => return Some(json!(false)),
        (_, name) if name.ends_with("_at") => "2026-11-23T12:00:00Z",
        _ => return None,
    };
    Some(json!(text))
}

/// A page begins after what its list is ordered by.
fn cursor(path: &str) -> Option<&'static Form> {
    match path.rsplit('/').next() {
        Some("tenants" | "keys") => Some(&SLUG),
        Some("deks" | "kek-use") => Some(&UUID),
        Some("shreds") => Some(&TARGET),
        _ => None,
    }
}

/// Puts the forms into the document.
pub(in crate::http) fn add(document: &mut OpenApi) {
    add_to_parameters(&mut document.paths);
    let schemas = document.components.iter_mut().flat_map(|components| &mut components.schemas);
    for (schema_name, schema) in schemas {
        let RefOr::T(Schema::Object(object)) = schema else { continue };
        for (name, property) in &mut object.properties {
            if let Some(form) = form(name) {
                put(property, form);
            }
            if let RefOr::T(Schema::Object(property)) = property
                && property.example.is_none()
            {
                property.example = example(schema_name, name);
            }
        }
    }
}

fn add_to_parameters(paths: &mut Paths) {
    for (path, item) in &mut paths.paths {
        let operations = [&mut item.get, &mut item.put, &mut item.post, &mut item.delete];
        for operation in operations.into_iter().flatten() {
            add_to_operation(path, operation);
        }
    }
}

fn add_to_operation(path: &str, operation: &mut Operation) {
    for parameter in operation.parameters.iter_mut().flatten() {
        let RefOr::T(parameter) = parameter else { continue };
        let Some(schema) = &mut parameter.schema else { continue };
        if parameter.parameter_in == ParameterIn::Header {
            // It is there or not: null is what JSON knows, and no header does.
            *schema = not_null(std::mem::take(schema));
        }
        let found = match (parameter.name.as_str(), path) {
            ("after", path) => cursor(path),
            ("id", path) if path.contains("/api-keys/") => Some(&API_KEY),
            (name, _) => form(&name.to_ascii_lowercase()),
        };
        if let Some(form) = found {
            put(schema, form);
        }
    }
    let body = operation.request_body.iter_mut().filter_map(|body| match body {
        RefOr::T(body) => Some(body.content.iter_mut()),
        RefOr::Ref(_) => None,
    });
    let answers = operation.responses.responses.values_mut().filter_map(|response| match response {
        RefOr::T(response) => Some(response.content.iter_mut()),
        RefOr::Ref(_) => None,
    });
    for (media_type, content) in body.flatten().chain(answers.flatten()) {
        if let RefOr::T(content) = content
            && media_type == "application/octet-stream"
        {
            let bytes = ObjectBuilder::new().schema_type(Type::String);
            let binary = SchemaFormat::KnownFormat(KnownFormat::Binary);
            content.schema = Some(bytes.format(Some(binary)).build().into());
        }
    }
}

fn put(schema: &mut RefOr<Schema>, form: &Form) {
    match schema {
        RefOr::T(Schema::Object(text)) if is_text(text) => {
            text.pattern = Some(form.pattern.to_owned());
            text.max_length = Some(form.bytes_max);
        }
        RefOr::T(Schema::Array(list)) => {
            if let ArrayItems::RefOrSchema(items) = &mut list.items {
                put(items, form);
            }
        }
        _ => {}
    }
}

fn is_text(object: &Object) -> bool {
    match &object.schema_type {
        SchemaType::Type(only) => *only == Type::String,
        SchemaType::Array(types) => types.contains(&Type::String),
        SchemaType::AnyValue => false,
    }
}

fn not_null(schema: RefOr<Schema>) -> RefOr<Schema> {
    match schema {
        RefOr::T(Schema::Object(mut object)) => {
            if let SchemaType::Array(types) = &object.schema_type
                && let Some(only) = types.iter().find(|known| **known != Type::Null)
            {
                object.schema_type = SchemaType::Type(only.clone());
            }
            RefOr::T(Schema::Object(object))
        }
        RefOr::T(Schema::OneOf(mut choice)) => {
            let is_null = |item: &RefOr<Schema>| {
                matches!(item, RefOr::T(Schema::Object(object))
                    if object.schema_type == SchemaType::Type(Type::Null))
            };
            choice.items.retain(|item| !is_null(item));
            match choice.items.pop() {
                Some(only) if choice.items.is_empty() => only,
                Some(last) => {
                    choice.items.push(last);
                    RefOr::T(Schema::OneOf(choice))
                }
                None => RefOr::T(Schema::OneOf(choice)),
            }
        }
        other => other,
    }
}
