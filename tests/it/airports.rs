//! Real input: every field of a public data set of 3,376 airports, through the HTTP server and back.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use keyfold::tenant::Verb;
use serde_json::{Value, json};

use crate::caller::{plaintext, text};
use crate::lanes::post_all;
use crate::service::World;

const AIRPORTS: &str = include_str!("../data/airports.csv");

/// A field, and where it stands: row and column are its context.
#[derive(Clone, Debug, PartialEq)]
struct Field {
    iata: String,
    column: String,
    value: String,
}

/// Splits a line of CSV; a field may stand in quotes, and a doubled quote in it stands for one.
fn cells(line: &str) -> Vec<String> {
    let (mut cells, mut quoted) = (vec![String::new()], false);
    let mut chars = line.chars().peekable();
    while let Some(char) = chars.next() {
        let cell = cells.last_mut().unwrap();
        match char {
            '"' if quoted && chars.peek() == Some(&'"') => cell.push(chars.next().unwrap()),
            '"' => quoted = !quoted,
            ',' if !quoted => cells.push(String::new()),
            other => cell.push(other),
        }
    }
    cells
}

fn fields() -> Vec<Field> {
    let mut lines = AIRPORTS.lines();
    let columns = cells(lines.next().unwrap());
    let field = |row: &[String], (column, value): (&String, &String)| Field {
        iata: row[0].clone(),
        column: column.clone(),
        value: value.clone(),
    };
    lines
        .flat_map(|line| {
            let row = cells(line);
            assert_eq!(row.len(), columns.len(), "{line}");
            columns.iter().zip(&row).map(|cell| field(&row, cell)).collect::<Vec<_>>()
        })
        .collect()
}

fn context(field: &Field) -> Value {
    json!({"iata": field.iata, "column": field.column})
}

fn opening<'a>(sealed: impl Iterator<Item = (&'a Field, &'a String)>) -> Vec<String> {
    let body = |(field, ciphertext): (&Field, &String)| {
        json!({"ciphertext": ciphertext, "context": context(field)}).to_string()
    };
    sealed.map(body).collect()
}

async fn there_and_back(weight: &'static str) {
    let fields = fields();
    assert_eq!(fields.len(), 3_376 * 7);
    let world = World::new().await;
    let service = world.start().await;
    let token = service.tenant_and_caller("airports").await.token().to_owned();
    let sealing = |field: &Field| {
        let plaintext = STANDARD.encode(&field.value);
        json!({"plaintext": plaintext, "context": context(field), "envelope": weight}).to_string()
    };
    let bodies = fields.iter().map(sealing).collect();
    let sealed = post_all(service.address, &token, "/v1/encrypt", bodies).await;
    let ciphertext = |(status, answer): &(u16, Value)| {
        assert_eq!(*status, 200, "{answer}");
        text(&answer["ciphertext"])
    };
    let ciphertexts: Vec<String> = sealed.iter().map(ciphertext).collect();
    service.stop().await;

    let service = world.start().await;
    let bodies = opening(fields.iter().zip(&ciphertexts));
    let opened = post_all(service.address, &token, "/v1/decrypt", bodies).await;
    assert_eq!(opened.len(), fields.len());
    for (field, (status, answer)) in fields.iter().zip(&opened) {
        assert_eq!(*status, 200, "{field:?}: {answer}");
        assert_eq!(plaintext(answer), field.value.as_bytes(), "{field:?}");
    }
    assert_eq!((world.kms.generates(), world.kms.unwraps()), (1, 1));

    // Each row's ciphertexts in the place of the row before: none opens, though most values look alike.
    let bodies = opening(fields.iter().zip(ciphertexts.iter().cycle().skip(7)));
    for (status, answer) in post_all(service.address, &token, "/v1/decrypt", bodies).await {
        assert_eq!((status, &answer["code"]), (422, &json!("context_mismatch")), "{answer}");
        assert!(answer["plaintext"].is_null());
    }
    // Another tenant with the same row and column gets none of it.
    service.tenant("trains").await;
    let stranger = service.token(&["trains"], &[Verb::Decrypt]).await;
    let refused = if weight == "embedded" { "context_mismatch" } else { "not_found" };
    let bodies = opening(fields.iter().zip(&ciphertexts).step_by(100));
    for (_, answer) in post_all(service.address, &stranger, "/v1/decrypt", bodies).await {
        assert_eq!(answer["code"], refused);
    }
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_field_comes_back_after_a_restart_and_none_in_the_place_of_another_embedded() {
    there_and_back("embedded").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_field_comes_back_after_a_restart_and_none_in_the_place_of_another_compact() {
    there_and_back("compact").await;
}
