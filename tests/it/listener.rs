//! The listener as the network meets it: where a call comes from, the unix socket, and its limits.

use std::time::Duration;

use keyfold::config::AuditFileSettings;
use keyfold::http::server::{self, ServerHandle};
use keyfold::http::source::ToldBy;
use keyfold::tenant::Verb;
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpStream, UnixStream};

use crate::pki::Authority;
use crate::service::{Service, World};

/// Longer than anything takes.
const TIME_MAX: Duration = Duration::from_secs(30);
const SIGNATURE: &[u8; 12] = b"\r\n\r\n\0\r\nQUIT\n";

/// A PROXY protocol header.
fn proxy_header(command: u8, family: u8, addresses: &[u8]) -> Vec<u8> {
    let length = u16::try_from(addresses.len()).unwrap().to_be_bytes();
    [&SIGNATURE[..], &[command, family], &length, addresses].concat()
}

/// Sends an encryption, with whatever stands before and in its head, and gives the status line.
async fn encrypt<S: AsyncRead + AsyncWrite + Unpin>(
    mut stream: S,
    before: &[u8],
    token: &str,
    more: &str,
) -> String {
    let body = r#"{"plaintext":"eA=="}"#;
    let head = format!(
        "POST /v1/encrypt HTTP/1.1\r\nhost: x\r\nconnection: close\r\nauthorization: Bearer {token}\r\n\
         content-type: application/json\r\ncontent-length: {}\r\n{more}\r\n{body}",
        body.len()
    );
    // Who refuses the head may have closed before all of it is written.
    let _ = stream.write_all(&[before, head.as_bytes()].concat()).await;
    let mut answer = Vec::new();
    let _ = tokio::time::timeout(TIME_MAX, stream.read_to_end(&mut answer)).await.unwrap();
    String::from_utf8_lossy(&answer).lines().next().unwrap_or_default().to_owned()
}

struct Scene {
    world: World,
    service: Service,
    token: String,
}

impl Scene {
    async fn new(change: impl FnOnce(&mut World)) -> Self {
        let mut world = World::new().await;
        world.settings.audit.file = Some(AuditFileSettings::default());
        change(&mut world);
        let service = world.start_without_keeper().await;
        service.tenant("acme").await;
        let token = service.token(&["acme"], &[Verb::Encrypt]).await;
        Self { world, service, token }
    }

    async fn call(&self, before: &[u8], more: &str) -> String {
        let stream = TcpStream::connect(self.service.address).await.unwrap();
        encrypt(stream, before, &self.token, more).await
    }

    /// Ends the service, and tells where the calls came from that it has recorded.
    async fn sources(self) -> Vec<Value> {
        self.service.stop().await;
        let text = std::fs::read_to_string(self.world.settings.audit_file()).unwrap();
        let records = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        records.filter(|record| record["event"] == "call").map(|record| record["source"].clone()).collect()
    }
}

fn trusting(told_by: ToldBy, network: &str) -> impl FnOnce(&mut World) {
    let network = network.parse().unwrap();
    move |world| {
        world.settings.http.trusted_proxies = vec![network];
        world.settings.http.source_from = Some(told_by);
        world.settings.http.head_secs_max = 1;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_trusted_balancers_proxy_header_says_where_a_call_comes_from() {
    let scene = Scene::new(trusting(ToldBy::ProxyProtocolV2, "127.0.0.0/8")).await;
    let v4 = [192, 0, 2, 7, 127, 0, 0, 1, 0x12, 0x34, 0, 80];
    let mut v6 = [0; 36];
    v6[..4].copy_from_slice(&[0x20, 0x01, 0x0d, 0xb8]);
    v6[15] = 7;
    let with_extras = [&v4[..], &[0x03, 0, 4, 1, 2, 3, 4]].concat();
    for header in [
        proxy_header(0x21, 0x11, &v4),
        proxy_header(0x21, 0x11, &with_extras),
        proxy_header(0x21, 0x21, &v6),
        // The balancer's own health check, and one that does not know.
        proxy_header(0x20, 0x00, &[]),
        proxy_header(0x21, 0x00, &[]),
    ] {
        assert_eq!(scene.call(&header, "forwarded: for=1.2.3.4\r\n").await, "HTTP/1.1 200 OK");
    }
    // Without one, with one that is not well formed, or with half of one, the connection comes to nothing.
    let long = [0; 4_097];
    for refused in [
        vec![],
        b"PROXY TCP4 192.0.2.7 127.0.0.1 1 2\r\n".to_vec(),
        proxy_header(0x11, 0x11, &v4),
        proxy_header(0x22, 0x11, &v4),
        proxy_header(0x21, 0x12, &v4),
        proxy_header(0x21, 0x31, &v4),
        proxy_header(0x21, 0x11, &v4[..11]),
        proxy_header(0x21, 0x21, &v6[..35]),
        proxy_header(0x21, 0x11, &long),
    ] {
        assert_eq!(scene.call(&refused, "").await, "");
    }
    let mut half = TcpStream::connect(scene.service.address).await.unwrap();
    half.write_all(&SIGNATURE[..7]).await.unwrap();
    let mut rest = Vec::new();
    let _ = tokio::time::timeout(TIME_MAX, half.read_to_end(&mut rest)).await.unwrap();
    let expected = ["192.0.2.7", "192.0.2.7", "2001:db8::7", "127.0.0.1", "127.0.0.1"];
    assert_eq!(scene.sources().await, expected);

    // With quotas the calls go through the router.
    let scene = Scene::new(|world| {
        trusting(ToldBy::ProxyProtocolV2, "127.0.0.0/8")(world);
        world.settings.quotas.tenant.requests_per_sec = 1_000_000;
    });
    let scene = scene.await;
    for header in [proxy_header(0x21, 0x11, &v4), proxy_header(0x20, 0x00, &[])] {
        assert_eq!(scene.call(&header, "").await, "HTTP/1.1 200 OK");
    }
    assert_eq!(scene.sources().await, ["192.0.2.7", "127.0.0.1"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_else_is_believed_about_where_he_comes_from() {
    let header = proxy_header(0x21, 0x11, &[192, 0, 2, 7, 127, 0, 0, 1, 0, 1, 0, 80]);
    let forwarded = "forwarded: for=192.0.2.7\r\nx-forwarded-for: 192.0.2.7\r\n";
    for told_by in [None, Some(ToldBy::ProxyProtocolV2), Some(ToldBy::Forwarded)] {
        let scene = match told_by {
            None => Scene::new(|_| {}).await,
            Some(told_by) => Scene::new(trusting(told_by, "10.0.0.0/8")).await,
        };
        assert_ne!(scene.call(&header, "").await, "HTTP/1.1 200 OK", "{told_by:?}");
        assert_eq!(scene.call(b"", forwarded).await, "HTTP/1.1 200 OK", "{told_by:?}");
        assert_eq!(scene.sources().await, ["127.0.0.1"], "{told_by:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_trusted_balancers_forwarded_header_says_where_a_call_comes_from() {
    // With quotas the calls go through the router.
    for quotas in [false, true] {
        let scene = Scene::new(|world| {
            trusting(ToldBy::Forwarded, "127.0.0.1/32")(world);
            if quotas {
                world.settings.quotas.tenant.requests_per_sec = 1_000_000;
            }
        });
        let scene = scene.await;
        for more in [
            "forwarded: for=192.0.2.7\r\n",
            "forwarded: for=1.2.3.4\r\nforwarded: for=192.0.2.7\r\n",
            "x-forwarded-for: 1.2.3.4\r\n",
            "forwarded: for=unknown\r\n",
        ] {
            assert_eq!(scene.call(b"", more).await, "HTTP/1.1 200 OK");
        }
        assert_eq!(scene.sources().await, ["192.0.2.7", "192.0.2.7", "127.0.0.1", "127.0.0.1"]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_unix_socket_asks_for_credentials_too_and_replaces_only_a_dead_one() {
    use std::os::unix::fs::PermissionsExt as _;
    let scene = Scene::new(|_| {}).await;
    let path = scene.world.path("keyfold.sock");
    let listener = server::bind_unix(&path).unwrap();
    listener.set_nonblocking(true).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o660);
    assert!(server::bind_unix(&path).is_err(), "somebody listens there");
    let (front, options) = (scene.service.app.front.clone(), scene.world.settings.http.server());
    let handle = ServerHandle::default();
    let stop = handle.clone();
    let mut tasks = tokio::task::JoinSet::new();
    tasks.spawn(async move { server::serve_unix(listener, front, &options, handle).await });
    let connect = || UnixStream::connect(&path);
    assert_eq!(encrypt(connect().await.unwrap(), b"", &scene.token, "").await, "HTTP/1.1 200 OK");
    assert_eq!(encrypt(connect().await.unwrap(), b"", "kf_x", "").await, "HTTP/1.1 401 Unauthorized");
    stop.abort();
    tasks.join_next().await.unwrap().unwrap().unwrap();
    // What is left is nobody's.
    server::bind_unix(&path).unwrap();
    // The stranger has a record too.
    assert_eq!(scene.sources().await, [Value::Null, Value::Null]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_head_that_is_too_large_is_refused_and_one_within_the_limit_is_not() {
    let scene = Scene::new(|world| world.settings.http.head_bytes_max = 16 << 10).await;
    let pad = |bytes: usize| format!("x-pad: {}\r\n", "a".repeat(bytes));
    assert_eq!(scene.call(b"", &pad(15 << 10)).await, "HTTP/1.1 200 OK");
    let refused = scene.call(b"", &pad(17 << 10)).await;
    assert!(refused.is_empty() || refused.starts_with("HTTP/1.1 431"), "{refused}");
    assert_eq!(scene.call(b"", "").await, "HTTP/1.1 200 OK");
    scene.service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_http_2_connection_is_told_how_many_streams_and_how_large_a_head_it_may_have() {
    let scene = Scene::new(|world| world.settings.http.streams_max = 7).await;
    let mut stream = TcpStream::connect(scene.service.address).await.unwrap();
    // The preface, and an empty SETTINGS frame.
    let hello = [&b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[..], &[0, 0, 0, 4, 0, 0, 0, 0, 0]].concat();
    stream.write_all(&hello).await.unwrap();
    let mut head = [0; 9];
    stream.read_exact(&mut head).await.unwrap();
    assert_eq!(head[3], 4, "the first frame is SETTINGS");
    let mut settings = vec![0; usize::from(u16::from_be_bytes([head[1], head[2]]))];
    stream.read_exact(&mut settings).await.unwrap();
    let setting = |id: u8| {
        let found = settings.chunks(6).find(|setting| setting[..2] == [0, id]).unwrap();
        u32::from_be_bytes(found[2..].try_into().unwrap())
    };
    assert_eq!((setting(3), setting(6)), (7, 32 << 10));
    scene.service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_handshake_that_stands_still_is_ended_and_stops_nobody_else() {
    let authority = Authority::new("servers");
    let scene = Scene::new(|world| {
        let (certificate, key) = authority.server(1).write(&world.path(""), "server");
        world.settings.tls.certificate_file = Some(certificate);
        world.settings.tls.key_file = Some(key);
        world.settings.tls.handshake_secs_max = 1;
        world.settings.http.connections_max = 3;
    })
    .await;
    let mut silent = TcpStream::connect(scene.service.address).await.unwrap();
    let mut begun = TcpStream::connect(scene.service.address).await.unwrap();
    // The beginning of a ClientHello.
    begun.write_all(&[22, 3, 1, 2, 0, 1, 0, 1, 252]).await.unwrap();
    let token = Some(scene.token.clone());
    let caller = crate::caller::Caller::over_tls(scene.service.address, &authority.pem, None, token);
    caller.encrypt(b"x", &serde_json::json!({})).await;
    for stream in [&mut silent, &mut begun] {
        let mut rest = Vec::new();
        let _ = tokio::time::timeout(TIME_MAX, stream.read_to_end(&mut rest)).await.unwrap();
    }
    scene.service.stop().await;
}
