//! Much at once: batches, lines of JSON, raw bodies, files.

mod batch;
mod files;
mod lines;
mod pipes;
mod places;
mod raw;
mod recipes;

use std::sync::atomic::Ordering;
use std::time::Duration;

use reqwest::{Body, Method, RequestBuilder, Response};
use serde_json::Value;
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;

use crate::caller::Caller;
use crate::service::Service;

pub(crate) const OCTETS: &str = "application/octet-stream";
pub(crate) const NDJSON: &str = "application/x-ndjson";

/// A request with a body of this media type.
pub(crate) fn request(
    caller: &Caller,
    path: &str,
    media_type: &str,
    body: impl Into<Body>,
) -> RequestBuilder {
    caller.request(Method::POST, path).header("content-type", media_type).body(body)
}

/// A raw body there and back: the answer's own body, or why it did not come to its end.
pub(crate) async fn raw(
    caller: &Caller,
    path: &str,
    body: impl Into<Body>,
) -> (Response, reqwest::Result<Vec<u8>>) {
    receive(request(caller, path, OCTETS, body).send().await.unwrap()).await
}

/// The whole body behind a response's head.
pub(crate) async fn receive(mut response: Response) -> (Response, reqwest::Result<Vec<u8>>) {
    let mut body = Vec::new();
    loop {
        match response.chunk().await {
            Ok(Some(chunk)) => body.extend_from_slice(&chunk),
            Ok(None) => return (response, Ok(body)),
            Err(error) => return (response, Err(error)),
        }
    }
}

/// A raw body that must go through.
pub(crate) async fn through(caller: &Caller, path: &str, body: impl Into<Body>) -> Vec<u8> {
    let (response, body) = raw(caller, path, body).await;
    let body = body.unwrap();
    assert_eq!(response.status(), 200, "{}", String::from_utf8_lossy(&body));
    body
}

/// The problem that must have come back.
pub(crate) async fn problem(caller: &Caller, path: &str, body: impl Into<Body>) -> (u16, String) {
    let (response, body) = raw(caller, path, body).await;
    let body = body.unwrap();
    let problem: Value = serde_json::from_slice(&body)
        .unwrap_or_else(|_| panic!("{}: {} bytes that are no problem", response.status(), body.len()));
    (response.status().as_u16(), problem["code"].as_str().unwrap().to_owned())
}

/// Bytes of which no two stretches are alike.
pub(crate) fn noise(bytes: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    (0..bytes)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()[0]
        })
        .collect()
}

/// Waits until no transfer is open any more.
pub(crate) async fn all_transfers_end(service: &Service) {
    for _ in 0..500 {
        if service.app.open_transfers.load(Ordering::Acquire) == 0 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("a transfer stays open after its client has gone");
}

/// A request by hand that has announced more than it has sent.
pub(crate) struct Half(pub(crate) TcpStream);

impl Half {
    pub(crate) async fn post(
        service: &Service,
        caller: &Caller,
        path: &str,
        media_type: &str,
        announced: usize,
    ) -> Self {
        let before = service.app.open_transfers.load(Ordering::Acquire);
        let mut socket = TcpStream::connect(service.address).await.unwrap();
        let head = format!(
            "POST {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {}\r\ncontent-type: {media_type}\r\n\
             content-length: {announced}\r\n\r\n",
            caller.token()
        );
        socket.write_all(head.as_bytes()).await.unwrap();
        for _ in 0..500 {
            if service.app.open_transfers.load(Ordering::Acquire) > before {
                return Self(socket);
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("the transfer does not begin");
    }
}
