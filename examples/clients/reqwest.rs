//! A field, a file of any size and a batch with reqwest.
//!
//! Usage: `cargo run --example client_reqwest FILE`, with `KEYFOLD_URL` and `KEYFOLD_API_KEY` set.
#![expect(clippy::disallowed_methods, clippy::print_stdout, reason = "an example of a client of its own")]

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use reqwest::{Client, RequestBuilder};
use serde_json::{Value, json};
use tokio::fs::File;
use tokio::io::AsyncWriteExt as _;

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

#[tokio::main]
async fn main() -> Outcome<()> {
    let file = std::env::args().nth(1).ok_or("name a file")?;
    // reqwest's feature `rustls` brings its own; this project chooses.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let client = Client::new();
    field(&client).await?;
    batch(&client).await?;
    stream(&client, "/v1/encrypt", &file, &format!("{file}.kf")).await?;
    stream(&client, "/v1/decrypt", &format!("{file}.kf"), &format!("{file}.out")).await?;
    println!("field, file and batch: done");
    Ok(())
}

fn post(client: &Client, path: &str) -> Outcome<RequestBuilder> {
    let (url, key) = (std::env::var("KEYFOLD_URL")?, std::env::var("KEYFOLD_API_KEY")?);
    Ok(client.post(format!("{url}{path}")).bearer_auth(key))
}

async fn call(client: &Client, path: &str, body: &Value) -> Outcome<Value> {
    let response = post(client, path)?.json(body).send().await?;
    let success = response.status().is_success();
    let answer: Value = response.json().await?;
    if success { Ok(answer) } else { Err(format!("{}: {}", answer["code"], answer["detail"]).into()) }
}

async fn field(client: &Client) -> Outcome<()> {
    // The context binds the ciphertext to its row: it opens nowhere else.
    let context = json!({"table": "people", "column": "name", "row": "42"});
    let plaintext = STANDARD.encode("Ada Lovelace");
    let sealed = call(client, "/v1/encrypt", &json!({"plaintext": plaintext, "context": context})).await?;
    let body = json!({"ciphertext": sealed["ciphertext"], "context": context});
    let opened = call(client, "/v1/decrypt", &body).await?;
    if opened["plaintext"] == plaintext { Ok(()) } else { Err("another plaintext came back".into()) }
}

async fn stream(client: &Client, path: &str, source: &str, target: &str) -> Outcome<()> {
    let request = post(client, path)?
        .header("content-type", "application/octet-stream")
        .header("keyfold-context", "name=\"report\"")
        .body(File::open(source).await?);
    let mut response = request.send().await?.error_for_status()?;
    let part = format!("{target}.part");
    let mut file = File::create(&part).await?;
    // A broken transfer is an error here, and the file never gets its name.
    while let Some(piece) = response.chunk().await? {
        file.write_all(&piece).await?;
    }
    file.sync_all().await?;
    tokio::fs::rename(part, target).await?;
    Ok(())
}

async fn batch(client: &Client) -> Outcome<()> {
    let item = |n: usize| json!({"ref": format!("row-{n}"), "plaintext": STANDARD.encode(n.to_string())});
    let items: Vec<Value> = (0..1_000).map(item).collect();
    let answer = call(client, "/v1/encrypt/batch", &json!({"items": items})).await?;
    // Each item has its own outcome: `ciphertext`, or `error` with a code.
    if answer["failed"] == 0 { Ok(()) } else { Err("items failed".into()) }
}
