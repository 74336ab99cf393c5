//! Very many requests in a short time, and bytes on the wire that no client would send.

use std::net::SocketAddr;
use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufStream};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

/// How many connections are in use at once, and how many requests each sends ahead.
const LANES: usize = 8;
const AHEAD: usize = 16;

/// Sends every body to `path`, and gives the answers in order. Over a few connections of its own, a few requests ahead:
/// there are some hundred thousand, and a full client would take most of the test's time.
pub(crate) async fn post_all(
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

/// Sends bytes as they are, and gives what comes back until the service closes the connection.
pub(crate) async fn send_raw(address: SocketAddr, bytes: &[u8]) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(bytes).await.unwrap();
    read_to_close(&mut stream).await
}

/// What comes until the service closes the connection, which it must do within twenty seconds.
pub(crate) async fn read_to_close(stream: &mut TcpStream) -> String {
    let mut answer = Vec::new();
    let closed = tokio::time::timeout(Duration::from_secs(20), stream.read_to_end(&mut answer)).await;
    // A reset is a close too: it is what a client sees that goes on sending.
    assert!(closed.is_ok(), "not closed after {:?}", String::from_utf8_lossy(&answer));
    String::from_utf8_lossy(&answer).into_owned()
}
