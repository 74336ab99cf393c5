//! Where a call comes from, for the audit: the peer of its connection, or, behind a load balancer that is trusted by
//! configuration, whom that says it speaks for.
//!
//! Nobody's word is taken but a trusted network's. A client can write what it likes into a header; only what trusted
//! hops have added to it counts, read from the nearest backwards.

use std::future::Future;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum_server::accept::Accept;
use http::{Extensions, HeaderMap, Request, header};
use hyper::body::Incoming;
use ipnet::IpNet;
use serde::Deserialize;
use tokio::io::{AsyncRead, AsyncReadExt as _};
use tokio::net::TcpStream;
use tower::Service;

/// The load balancers in front of the service.
#[derive(Clone, Debug, Default)]
pub struct Proxies {
    /// The networks that they are in.
    pub trusted: Vec<IpNet>,
    /// How they tell whom they speak for; not at all where there is nothing.
    pub told_by: Option<ToldBy>,
}

/// How a load balancer tells whom it speaks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ToldBy {
    /// By a PROXY protocol header, version 2, at the beginning of each connection.
    ProxyProtocolV2,
    /// By the `Forwarded` header of each request (RFC 7239).
    Forwarded,
}

/// Where a request comes from, among its extensions: as far as somebody before the router has found that out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Source(pub IpAddr);

impl Source {
    /// Where the request with these extensions comes from; none on a unix socket.
    pub fn of(extensions: &Extensions) -> Option<IpAddr> {
        extensions.get::<Self>().map(|Self(source)| *source)
    }
}

impl Proxies {
    fn trust(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        self.trusted.iter().any(|network| network.contains(&address))
    }

    /// What a connection from this address to the listener begins with, when it speaks for nobody but itself: nothing,
    /// unless the address is one of theirs and they send PROXY protocol headers.
    pub(super) fn header_of_their_own(&self, from: IpAddr) -> &'static [u8] {
        // LOCAL, with no addresses.
        const LOCAL: &[u8; 16] = b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0";
        if self.told_by == Some(ToldBy::ProxyProtocolV2) && self.trust(from) { LOCAL } else { &[] }
    }

    /// Where a request with these headers comes from that `peer` has sent: somewhere else where that is a trusted one
    /// which has sent a `Forwarded` header.
    pub fn source(&self, headers: &HeaderMap, peer: IpAddr) -> IpAddr {
        if self.told_by == Some(ToldBy::Forwarded) { self.farthest(headers, peer) } else { peer }
    }

    /// The first address that is not a trusted hop's, from the peer backwards; the last one that is known where
    /// something is not understood or not told.
    fn farthest(&self, headers: &HeaderMap, peer: IpAddr) -> IpAddr {
        let mut hop = peer;
        for line in headers.get_all(header::FORWARDED).iter().rev() {
            let Some(elements) = line.to_str().ok().and_then(|line| split(line, ',')) else { return hop };
            for element in elements.iter().rev() {
                if !self.trust(hop) {
                    return hop;
                }
                match forwarded_for(element) {
                    Some(address) => hop = address.to_canonical(),
                    None => return hop,
                }
            }
        }
        hop
    }
}

/// Splits at a separator that does not stand in a quoted text; none where a quote is not closed.
fn split(text: &str, separator: char) -> Option<Vec<&str>> {
    let (mut parts, mut start, mut quoted, mut escaped) = (Vec::new(), 0, false, false);
    for (at, char) in text.char_indices() {
        match char {
            _ if escaped => escaped = false,
            '\\' if quoted => escaped = true,
            '"' => quoted = !quoted,
            _ if char == separator && !quoted => {
                parts.push(text[start..at].trim());
                start = at + char.len_utf8();
            }
            _ => {}
        }
    }
    parts.push(text[start..].trim());
    (!quoted).then_some(parts)
}

/// The address of an element's one `for`; none where it is hidden, unknown or not well formed.
fn forwarded_for(element: &str) -> Option<IpAddr> {
    let mut found = None;
    for pair in split(element, ';')? {
        let (name, value) = pair.split_once('=')?;
        if name.eq_ignore_ascii_case("for") && found.replace(value).is_some() {
            return None;
        }
    }
    let node = found?;
    let node = node.strip_prefix('"').and_then(|node| node.strip_suffix('"')).unwrap_or(node);
    if let Some(rest) = node.strip_prefix('[') {
        let (address, port) = rest.split_once(']')?;
        let port_fits = port.is_empty() || port.strip_prefix(':').is_some_and(is_port);
        return port_fits.then(|| address.parse().ok().map(IpAddr::V6))?;
    }
    let (address, port) = node.split_once(':').map_or((node, None), |(address, port)| (address, Some(port)));
    port.is_none_or(is_port).then(|| address.parse().ok().map(IpAddr::V4))?
}

fn is_port(text: &str) -> bool {
    (1..=5).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_digit())
}

/// Accepts what an inner acceptor does, and reads the PROXY protocol header of connections from trusted networks: they
/// have to begin with one. Those from elsewhere are taken as they are, so that a header there is no HTTP and no TLS.
#[derive(Clone)]
pub(super) struct ProxyHeaders<A> {
    inner: A,
    proxies: Arc<Proxies>,
    time_max: Duration,
}

impl<A> ProxyHeaders<A> {
    pub(super) fn new(inner: A, proxies: Arc<Proxies>, time_max: Duration) -> Self {
        Self { inner, proxies, time_max }
    }
}

impl<A, S> Accept<TcpStream, S> for ProxyHeaders<A>
where
    A: Accept<TcpStream, S, Stream = TcpStream> + Clone + Send + Sync + 'static,
    A::Future: Send,
    A::Service: Send,
    S: Send + 'static,
{
    type Stream = TcpStream;
    type Service = FromSource<A::Service>;
    type Future = Pin<Box<dyn Future<Output = io::Result<(Self::Stream, Self::Service)>> + Send>>;

    fn accept(&self, stream: TcpStream, service: S) -> Self::Future {
        let Self { inner, proxies, time_max } = self.clone();
        Box::pin(async move {
            let (mut stream, service) = inner.accept(stream, service).await?;
            let told = proxies.told_by == Some(ToldBy::ProxyProtocolV2);
            let mut source = None;
            if told && proxies.trust(stream.peer_addr()?.ip()) {
                let header = tokio::time::timeout(time_max, read_proxy_header(&mut stream)).await;
                source = header.map_err(|_| malformed("has not come in time"))??;
            }
            Ok((stream, FromSource { service, source }))
        })
    }
}

const SIGNATURE: &[u8; 12] = b"\r\n\r\n\0\r\nQUIT\n";
/// The longest header that is read, in bytes after its first 16: addresses, and what balancers add to them.
const HEADER_REST_BYTES_MAX: usize = 4_096;

/// Reads a PROXY protocol header, and no byte behind it. Gives whom the connection is for; none where the balancer
/// speaks for itself, or does not know. What is no such header is [`io::ErrorKind::InvalidData`].
pub async fn read_proxy_header(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<IpAddr>> {
    let mut head = [0; 16];
    stream.read_exact(&mut head).await?;
    let (signature, rest) = head.split_at(12);
    let rest_bytes = usize::from(u16::from_be_bytes([rest[2], rest[3]]));
    if signature != SIGNATURE || rest_bytes > HEADER_REST_BYTES_MAX {
        return Err(malformed("is not one of version 2, or is too long"));
    }
    let mut addresses = vec![0; rest_bytes];
    stream.read_exact(&mut addresses).await?;
    match (rest[0], rest[1]) {
        // LOCAL: the balancer's own health check.
        (0x20, _) | (0x21, 0x00) => Ok(None),
        (0x21, 0x11) if rest_bytes >= 12 => {
            let address: Option<[u8; 4]> = addresses[..4].try_into().ok();
            Ok(address.map(|address| Ipv4Addr::from(address).into()))
        }
        (0x21, 0x21) if rest_bytes >= 36 => {
            let address: Option<[u8; 16]> = addresses[..16].try_into().ok();
            Ok(address.map(|address| Ipv6Addr::from(address).to_canonical()))
        }
        _ => Err(malformed("is of a kind that TCP over IP does not have")),
    }
}

fn malformed(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the PROXY protocol header {what}"))
}

/// A connection's service: says of each request where it comes from.
#[derive(Clone)]
pub(super) struct FromSource<S> {
    service: S,
    source: Option<IpAddr>,
}

impl<S: Service<Request<Incoming>>> Service<Request<Incoming>> for FromSource<S> {
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.service.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<Incoming>) -> Self::Future {
        if let Some(source) = self.source {
            request.extensions_mut().insert(Source(source));
        }
        self.service.call(request)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn farthest(peer: &str, lines: &[&str]) -> String {
        let trusted = ["10.0.0.0/8", "fd00::/8"].map(|network| network.parse().unwrap()).to_vec();
        let proxies = Proxies { trusted, told_by: Some(ToldBy::Forwarded) };
        let mut headers = HeaderMap::new();
        for line in lines {
            headers.append(header::FORWARDED, line.parse().unwrap());
        }
        proxies.farthest(&headers, peer.parse().unwrap()).to_string()
    }

    #[test]
    fn of_forwarded_only_what_trusted_hops_have_added_counts() {
        for (peer, lines, expected) in [
            ("10.0.0.1", &["for=192.0.2.7"][..], "192.0.2.7"),
            ("10.0.0.1", &["For=192.0.2.7;proto=https;by=10.0.0.1"], "192.0.2.7"),
            ("10.0.0.1", &["for=\"192.0.2.7:4711\""], "192.0.2.7"),
            ("10.0.0.1", &["for=\"[2001:db8::7]:4711\""], "2001:db8::7"),
            ("::ffff:10.0.0.1", &["for=192.0.2.7"], "192.0.2.7"),
            ("fd00::1", &["for=192.0.2.7"], "192.0.2.7"),
            // What the client itself has written stands before what the balancer adds.
            ("10.0.0.1", &["for=1.2.3.4, for=192.0.2.7"], "192.0.2.7"),
            ("10.0.0.1", &["for=1.2.3.4", "for=192.0.2.7"], "192.0.2.7"),
            ("10.0.0.1", &["for=1.2.3.4, for=192.0.2.7, for=10.9.9.9"], "192.0.2.7"),
            ("10.0.0.1", &["for=10.0.0.3, for=10.0.0.2"], "10.0.0.3"),
            // Nobody's word but a trusted network's.
            ("192.0.2.1", &["for=10.0.0.1"], "192.0.2.1"),
            ("192.0.2.1", &[], "192.0.2.1"),
            ("10.0.0.1", &[], "10.0.0.1"),
        ] {
            let found = farthest(peer, lines);
            let peer: IpAddr = expected.parse().unwrap();
            assert_eq!(found, peer.to_string(), "{lines:?}");
        }
    }

    #[test]
    fn what_is_hidden_or_malformed_leaves_the_last_hop_that_is_known() {
        for line in [
            "for=unknown",
            "for=_hidden",
            "for=",
            "for",
            "",
            "proto=https",
            "for=192.0.2.7;for=1.2.3.4",
            "for=\"192.0.2.7",
            "for=1.2.3.4, for=\"192.0.2.7",
            "for=192.0.2",
            "for=192.0.2.7:port",
            "for=2001:db8::7",
            "for=\"[2001:db8::7\"",
            "for=\"[192.0.2.7]\"",
            "for = 192.0.2.7",
        ] {
            assert_eq!(farthest("10.0.0.1", &[line]), "10.0.0.1", "{line}");
        }
        assert_eq!(farthest("10.0.0.1", &["for=1.2.3.4, for=unknown, for=10.0.0.2"]), "10.0.0.2");
    }
}
