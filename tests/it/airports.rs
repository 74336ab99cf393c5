//! Real input: every field of a public data set of 3,376 airports, through the HTTP server and back.

use std::net::SocketAddr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use keyfold::tenant::Verb;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufStream};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use crate::caller::{plaintext, text};
use crate::service::World;

const AIRPORTS: &str = include_str!("../data/airports.csv");
/// How many connections are in use at once, and how many requests each sends ahead.
const LANES: usize = 8;
const AHEAD: usize = 16;

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

/// Sends every body to `path`, and gives the answers in order. Over a few connections of its own, a few requests ahead:
/// there are some hundred thousand, and a full client would take most of the test's time.
async fn post_all(
    address: SocketAddr,
    token: &str,
    path: &'static str,
    bodies: Vec<String>,
) -> Vec<(u16, Value)> {
    let (mut lanes, lane_items) = (JoinSet::new(), bodies.len().div_ceil(LANES));
    for (lane, bodies) in bodies.chunks(lane_items).enumerate() {
        let (bodies, token) = (bodies.to_vec(), token.to_owned());
        lanes.spawn(async move {
            let mut stream = BufStream::new(TcpStream::connect(address).await.unwrap());
            let mut answers = Vec::with_capacity(bodies.len());
            for batch in bodies.chunks(AHEAD) {
                for body in batch {
                    let request = format!(
                        "POST {path} HTTP/1.1\r\nhost: keyfold\r\nauthorization: Bearer {token}\r\n\
                         content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
                        body.len()
                    );
                    stream.write_all(request.as_bytes()).await.unwrap();
                }
                stream.flush().await.unwrap();
                for _ in batch {
                    answers.push(read_answer(&mut stream).await);
                }
            }
            (lane, answers)
        });
    }
    let mut done = lanes.join_all().await;
    done.sort_by_key(|(lane, _)| *lane);
    done.into_iter().flat_map(|(_, answers)| answers).collect()
}

async fn read_answer(stream: &mut BufStream<TcpStream>) -> (u16, Value) {
    let (mut status, mut length, mut line) = (0, 0, String::new());
    loop {
        line.clear();
        stream.read_line(&mut line).await.unwrap();
        let text = line.trim_end();
        if let Some(rest) = text.strip_prefix("HTTP/1.1 ") {
            status = rest[..3].parse().unwrap();
        } else if let Some(rest) = text.strip_prefix("content-length: ") {
            length = rest.parse().unwrap();
        } else if text.is_empty() {
            break;
        }
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await.unwrap();
    (status, serde_json::from_slice(&body).unwrap())
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
    let bodies = opening(fields.iter().zip(ciphertexts.iter().cycle().skip(7)).step_by(2));
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
