//! How the service ends: softly at the first signal, at once at the second.

use std::time::Duration;

use rustix::process::Signal;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::lanes::read_to_close;
use crate::program::Program;

const BODY: &str = r#"{"plaintext": "aGVsbG8="}"#;

/// A request whose body is still on its way.
async fn half_a_request(program: &Program, folder: &std::path::Path) -> TcpStream {
    let caller = program.dev_caller(folder);
    let head = format!(
        "POST /v1/encrypt HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {}\r\ncontent-type: application/json\r\n\
         content-length: {}\r\nexpect: 100-continue\r\n\r\n",
        caller.token(),
        BODY.len()
    );
    let mut stream = TcpStream::connect(program.address).await.unwrap();
    stream.write_all(head.as_bytes()).await.unwrap();
    // The handler asks for the body: from here on the request is in flight.
    let mut asked = [0; 25];
    stream.read_exact(&mut asked).await.unwrap();
    assert_eq!(&asked, b"HTTP/1.1 100 Continue\r\n\r\n");
    stream
}

async fn refuses_connections(program: &Program) {
    let refused = async {
        while TcpStream::connect(program.address).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    assert!(
        tokio::time::timeout(Duration::from_secs(10), refused).await.is_ok(),
        "it still takes connections"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_in_flight_is_finished_and_no_new_connection_is_taken() {
    for signal in [Signal::TERM, Signal::INT] {
        let folder = tempfile::tempdir().unwrap();
        let data = folder.path().join("keyfold-data");
        let program = Program::serve(folder.path(), &["--dev"], &[]).await;
        // A connection that is open and asks nothing holds nothing up.
        let caller = program.dev_caller(&data);
        caller.encrypt(b"hello", &serde_json::json!({})).await;
        let mut stream = half_a_request(&program, &data).await;
        program.signal(signal);
        refuses_connections(&program).await;
        stream.write_all(BODY.as_bytes()).await.unwrap();
        let answer = read_to_close(&mut stream).await;
        assert!(answer.starts_with("HTTP/1.1 200 ") && answer.contains("kf1."), "{answer}");
        let (status, log) = program.ended().await;
        assert!(status.success(), "{status}");
        assert!(log.contains("stopping") && log.contains("stopped"), "{log}");
        // Everything is in the registry's one file: it was closed in good order.
        assert!(!data.join("registry.sqlite-wal").exists());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_signal_ends_it_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let program = Program::serve(folder.path(), &["--dev"], &[]).await;
    let mut stream = half_a_request(&program, &folder.path().join("keyfold-data")).await;
    program.signal(Signal::TERM);
    refuses_connections(&program).await;
    program.signal(Signal::TERM);
    // Well before the 30 seconds that requests in flight have.
    let ended = tokio::time::timeout(Duration::from_secs(10), program.ended()).await.unwrap();
    assert!(ended.1.contains("stopping at once"), "{}", ended.1);
    let mut rest = Vec::new();
    let _ = stream.read_to_end(&mut rest).await;
    assert_eq!(rest, b"", "the request got no answer");
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_that_never_end_have_the_stated_time_and_no_longer() {
    let folder = tempfile::tempdir().unwrap();
    let program = Program::serve(folder.path(), &["--dev"], &[("KEYFOLD_SHUTDOWN_SECS_MAX", "1")]).await;
    let _stream = half_a_request(&program, &folder.path().join("keyfold-data")).await;
    program.signal(Signal::TERM);
    let ended = tokio::time::timeout(Duration::from_secs(15), program.ended()).await.unwrap();
    assert!(ended.0.success(), "{}", ended.1);
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_has_not_sent_a_head_holds_it_up_for_no_longer_than_a_head_may_take() {
    for options in [&["--dev"][..], &["--dev", "--tls-self-signed"]] {
        let folder = tempfile::tempdir().unwrap();
        let program = Program::serve(folder.path(), options, &[("KEYFOLD_HTTP__HEAD_SECS_MAX", "1")]).await;
        // Who says nothing, and who has said a little: half a head, or what is no handshake yet.
        let _silent = TcpStream::connect(program.address).await.unwrap();
        let mut begun = TcpStream::connect(program.address).await.unwrap();
        begun.write_all(b"\x16\x03\x01").await.unwrap();
        let mut head = TcpStream::connect(program.address).await.unwrap();
        head.write_all(b"POST /v1/encrypt HTTP/1.1\r\nhost").await.unwrap();
        program.signal(Signal::TERM);
        // Well before the 30 seconds that requests in flight have.
        let ended = tokio::time::timeout(Duration::from_secs(15), program.ended()).await;
        let (status, log) = ended.expect("it ends");
        assert!(status.success(), "{log}");
    }
}
