//! What load balancers, or who plays one, say about where a call comes from.

use std::future::Future as _;
use std::io;
use std::net::IpAddr;
use std::pin::pin;
use std::task::{Context, Poll, Waker};

use http::{HeaderMap, HeaderValue, header};
use keyfold::http::source::{Proxies, ToldBy, read_proxy_header};

const HEADER_BYTES: usize = 16;

/// A PROXY protocol header takes its own bytes and no other.
pub fn proxy_header(bytes: &[u8]) {
    let mut rest = bytes;
    let read = {
        let mut reading = pin!(read_proxy_header(&mut rest));
        match reading.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(read) => read,
            Poll::Pending => panic!("a slice has all its bytes"),
        }
    };
    match read {
        Ok(_) => {
            let told = usize::from(u16::from_be_bytes([bytes[14], bytes[15]]));
            assert_eq!(bytes.len() - rest.len(), HEADER_BYTES + told);
        }
        Err(error) => {
            let kind = error.kind();
            assert!(matches!(kind, io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof), "{error}");
        }
    }
}

pub fn proxy_seeds() -> Vec<Vec<u8>> {
    let header = |command: u8, family: u8, addresses: &[u8]| {
        let length = (addresses.len() as u16).to_be_bytes();
        [&b"\r\n\r\n\0\r\nQUIT\n"[..], &[command, family], &length, addresses, b"GET / HTTP/1.1\r\n"].concat()
    };
    vec![
        header(0x20, 0x00, &[]),
        header(0x21, 0x11, &[192, 0, 2, 7, 10, 0, 0, 1, 0x12, 0x34, 0x01, 0xbb]),
        header(0x21, 0x21, &[0x20; 36]),
        header(0x21, 0x11, &[7; 40]),
    ]
}

/// `Forwarded` from a trusted hop and from nobody: nobody's word is not taken, whatever it is.
pub fn forwarded(bytes: &[u8]) {
    let mut headers = HeaderMap::new();
    for line in bytes.split(|byte| *byte == b'\n') {
        let Ok(value) = HeaderValue::from_bytes(line) else { return };
        headers.append(header::FORWARDED, value);
    }
    let proxies = Proxies { trusted: vec!["10.0.0.0/8".parse().unwrap()], told_by: Some(ToldBy::Forwarded) };
    for peer in ["10.0.0.1", "192.0.2.1"] {
        let peer: IpAddr = peer.parse().unwrap();
        let source = proxies.source(&headers, peer);
        assert!(source == peer || peer.to_string() == "10.0.0.1", "{source}");
    }
}

pub fn forwarded_seeds() -> Vec<Vec<u8>> {
    [
        "for=192.0.2.7",
        "For=\"[2001:db8::7]:4711\";proto=https;by=10.0.0.1",
        "for=1.2.3.4, for=192.0.2.7, for=10.9.9.9",
        "for=unknown, for=_hidden\nfor=\"10.0.0.2:80\"",
    ]
    .map(|seed| seed.as_bytes().to_vec())
    .into()
}
