//! The OpenAPI document: reviewed as a file, complete, and readable without the internet.

use std::path::Path;

use keyfold::config::AuditFileSettings;
use keyfold::tenant::Verb;
use serde_json::{Value, json};

use crate::caller::receive;
use crate::contract::{DOCUMENT, PROBLEMS};
use crate::program::keyfold;
use crate::service::World;

/// Method, path and content of every operation.
fn operations() -> Vec<(&'static str, &'static str, &'static Value)> {
    let paths = DOCUMENT["paths"].as_object().unwrap();
    let of_path = |(path, item): (&'static String, &'static Value)| {
        let operations = item.as_object().unwrap().iter();
        operations
            .map(move |(method, operation)| (method.as_str(), path.as_str(), operation))
            .collect::<Vec<_>>()
    };
    paths.iter().flat_map(of_path).collect()
}

#[test]
fn the_file_in_the_tree_is_the_document_of_this_program() {
    let folder = tempfile::tempdir().unwrap();
    let printed = keyfold(folder.path(), &["openapi"], &[]).ok();
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("openapi/v1.json");
    let committed = std::fs::read_to_string(&file).unwrap_or_default();
    let first = printed.lines().zip(committed.lines()).position(|(printed, committed)| printed != committed);
    assert!(
        printed == committed,
        "openapi/v1.json is not what this program serves (from line {}). Where the change is meant, look at it \
         and run:\n\n    cargo run -- openapi > openapi/v1.json\n",
        first.map_or(printed.lines().count().min(committed.lines().count()), |line| line) + 1
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_service_serves_the_same_document_without_a_credential() {
    let world = World::new().await;
    let service = world.start().await;
    let answer = receive(service.anonymous().request(reqwest::Method::GET, "/openapi.json")).await;
    assert_eq!(answer.headers["content-type"], "application/json");
    assert_eq!(answer.ok(200), *DOCUMENT);
    service.stop().await;
}

#[test]
fn every_operation_says_what_it_does_and_every_answer_has_a_shape() {
    let mut ids = Vec::new();
    for (method, path, operation) in operations() {
        let name = format!("{method} {path}");
        for text in ["operationId", "summary", "description"] {
            assert!(operation[text].as_str().is_some_and(|text| !text.is_empty()), "{name} has no {text}");
        }
        ids.push(operation["operationId"].as_str().unwrap());
        let responses = operation["responses"].as_object().unwrap();
        assert!(responses.keys().any(|status| status.starts_with('2')), "{name}");
        for (status, response) in responses {
            if status == "204" {
                continue;
            }
            let content = response["content"].as_object().unwrap_or_else(|| panic!("{name} {status}"));
            assert!(content.values().all(|content| content["schema"].is_object()), "{name} {status}");
        }
        if path.starts_with("/v1/") {
            let either = json!([{"bearer": []}, {"clientCertificate": []}]);
            assert_eq!(operation["security"], either, "{name}");
            for status in ["401", "403", "500", "503", "504"] {
                assert!(responses.contains_key(status), "{name} does not document {status}");
            }
        }
        if operation["requestBody"].is_object() {
            for status in ["400", "413", "415"] {
                assert!(responses.contains_key(status), "{name} does not document {status}");
            }
        }
    }
    let all = ids.len();
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), all, "an operationId stands twice");
}

#[test]
fn every_problem_has_an_example_and_every_code_is_documented_somewhere() {
    let mut documented = Vec::new();
    for (method, path, operation) in operations() {
        for (status, response) in operation["responses"].as_object().unwrap() {
            let Some(content) = response["content"].get("application/problem+json") else { continue };
            let examples =
                content["examples"].as_object().unwrap_or_else(|| panic!("{method} {path} {status}"));
            assert!(!examples.is_empty());
            for (code, example) in examples {
                let value = &example["value"];
                let known = PROBLEMS.iter().find(|known| known.0 == code).unwrap();
                assert_eq!(
                    (&value["code"], value["status"].as_u64()),
                    (&known.0.into(), Some(known.1.into()))
                );
                assert_eq!((value["retryable"].as_bool(), status), (Some(known.2), &known.1.to_string()));
                documented.push(known.0);
            }
        }
    }
    for (code, ..) in PROBLEMS {
        // Only what no operation can answer is missing: a method that no operation has.
        assert!(documented.contains(&code) || code == "method_not_allowed", "{code} is documented nowhere");
    }
}

/// So that the page shows a request that can be sent as it is, and an answer that could come.
#[test]
fn every_field_has_an_example_a_choice_or_a_shape_of_its_own() {
    for (name, schema) in DOCUMENT["components"]["schemas"].as_object().unwrap() {
        let parts = schema["allOf"].as_array().cloned().unwrap_or_else(|| vec![schema.clone()]);
        for (field, property) in parts.iter().filter_map(|part| part["properties"].as_object()).flatten() {
            let named = ["$ref", "oneOf", "items", "example", "default"];
            assert!(named.iter().any(|word| !property[word].is_null()), "{name}.{field} has no example");
            assert_fits(&format!("{name}.{field}"), property);
        }
    }
}

/// An example is of the property's type and form.
fn assert_fits(name: &str, property: &Value) {
    let example = &property["example"];
    if example.is_null() {
        return;
    }
    let kind = match example {
        Value::String(_) => "string",
        Value::Bool(_) => "boolean",
        Value::Number(number) if number.is_f64() => "number",
        Value::Number(_) => "integer",
        Value::Array(_) => "array",
        _ => "object",
    };
    let types = &property["type"];
    assert!(types == kind || types.as_array().is_some_and(|types| types.contains(&json!(kind))), "{name}");
    if let (Some(text), Some(pattern)) = (example.as_str(), property["pattern"].as_str()) {
        assert!(regex::Regex::new(pattern).unwrap().is_match(text), "{name}: {text} is not of its form");
    }
}

#[test]
fn every_field_of_a_request_is_described_and_no_other_is_taken() {
    for (name, schema) in DOCUMENT["components"]["schemas"].as_object().unwrap() {
        if !name.ends_with("Request") {
            continue;
        }
        for (field, property) in schema["properties"].as_object().unwrap() {
            let described =
                property["description"].is_string() || property["oneOf"][0]["description"].is_string();
            assert!(described, "{name}.{field} is not described");
        }
        assert_eq!(schema["additionalProperties"], false, "{name}: unknown fields are refused");
    }
}

#[test]
fn the_document_names_every_kind_of_credential() {
    let schemes = &DOCUMENT["components"]["securitySchemes"];
    assert_eq!(
        (&schemes["bearer"]["type"], &schemes["bearer"]["scheme"]),
        (&json!("http"), &json!("bearer"))
    );
    for words in ["kf_<id>_<secret>", "JWT"] {
        assert!(schemes["bearer"]["bearerFormat"].as_str().unwrap().contains(words), "{words}");
    }
    assert_eq!(schemes["clientCertificate"]["type"], "mutualTLS");
}

/// Whoever has seen a verb's name in a grant finds it in the document, in the code and in the audit.
#[tokio::test]
async fn a_verb_has_one_name_in_grants_routes_operation_ids_files_and_the_audit() {
    let mut world = World::new().await;
    world.settings.audit.file = Some(AuditFileSettings::default());
    let service = world.start_without_keeper().await;
    let caller = service.tenant_and_caller("acme").await;
    let ciphertext = caller.encrypt(b"hello", &json!({})).await;
    for verb in [Verb::Decrypt, Verb::Rewrap] {
        caller.post(&format!("/v1/{}", verb.name()), &json!({"ciphertext": ciphertext})).await.ok(200);
    }
    service.stop().await;
    let trail = std::fs::read_to_string(world.settings.audit_file()).unwrap();
    let records = trail.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let recorded: Vec<Value> =
        records.filter(|record| record["event"] == "call").map(|record| record["what"].clone()).collect();
    let verbs = [Verb::Encrypt, Verb::Decrypt, Verb::Rewrap];
    assert_eq!(recorded, verbs.map(|verb| json!(verb.name())));
    for verb in verbs.map(Verb::name) {
        assert_eq!(DOCUMENT["paths"][format!("/v1/{verb}")]["post"]["operationId"], verb);
        for room in ["http/handlers", "operations"] {
            let file = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("src/{room}/{verb}.rs"));
            let code =
                std::fs::read_to_string(&file).unwrap_or_else(|_| panic!("{} is missing", file.display()));
            assert!(code.contains(&format!("async fn {verb}(")), "{} has no {verb}", file.display());
        }
    }
}

/// What the page loads, it loads from the service; a browser is told to allow nothing else.
#[tokio::test(flavor = "multi_thread")]
async fn the_documentation_page_needs_nothing_from_elsewhere() {
    let world = World::new().await;
    let service = world.start().await;
    let get = async |path: &str| receive(service.anonymous().request(reqwest::Method::GET, path)).await;
    let page = get("/docs/").await;
    assert_eq!(page.status, 200);
    let policy = page.headers["content-security-policy"].to_str().unwrap().to_owned();
    for directive in
        ["default-src 'none'", "script-src 'self';", "connect-src 'self'", "frame-ancestors 'none'"]
    {
        assert!(policy.contains(directive), "{policy}");
    }
    assert!(!policy.contains("http") && !policy.contains("unsafe-eval") && !policy.contains('*'), "{policy}");
    let loaded: Vec<&str> = page
        .raw
        .split(['"', '\''])
        .zip(page.raw.split(['"', '\'']).skip(1))
        .filter(|(before, _)| before.ends_with("src=") || before.ends_with("href="))
        .map(|(_, asset)| asset)
        .collect();
    assert!(loaded.len() >= 4, "{loaded:?}");
    for asset in loaded {
        let asset = asset.strip_prefix("./").unwrap_or(asset);
        assert!(!asset.contains(':') && !asset.starts_with("//"), "the page loads {asset}");
        let answer = get(&format!("/docs/{asset}")).await;
        assert_eq!(answer.status, 200, "{asset}");
        assert_eq!(answer.headers["content-security-policy"], policy.as_str());
        if asset.ends_with(".css") {
            assert!(!answer.raw.contains("url(http") && !answer.raw.contains("@import"), "{asset}");
        }
        if asset.ends_with("initializer.js") {
            assert!(!answer.raw.contains("http"), "{}", answer.raw);
            assert!(
                answer.raw.contains("/openapi.json") && answer.raw.contains("\"validatorUrl\": \"none\""),
                "{}",
                answer.raw
            );
        }
    }
    service.stop().await;
}
