//! TLS and client certificates, as clients meet them.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use keyfold::config::{CertificateSettings, ClientCertificateDemand, TlsVersion};
use keyfold::tenant::Verb;
use rustls::crypto::aws_lc_rs::default_provider;
use rustls::crypto::aws_lc_rs::kx_group::{X25519, X25519MLKEM768};
use rustls::crypto::{CryptoProvider, SupportedKxGroup};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use rustls::version::TLS13;
use rustls::{ClientConfig, ClientConnection, NamedGroup, RootCertStore};
use serde_json::json;
use tokio::io::AsyncReadExt as _;

use crate::caller::Caller;
use crate::pki::{Authority, Issued};
use crate::program::Program;
use crate::service::{Service, World};

struct Tlsed {
    world: World,
    authority: Authority,
    certificate: PathBuf,
    key: PathBuf,
}

const DAY: i64 = 86_400;
/// A client's name that the tests' rules know.
const WORKER: &str = "worker.example.org";

impl Tlsed {
    async fn new() -> Self {
        let mut world = World::new().await;
        let authority = Authority::new("servers");
        let (certificate, key) = authority.server(1).write(&world.path(""), "server");
        world.settings.tls.certificate_file = Some(certificate.clone());
        world.settings.tls.key_file = Some(key.clone());
        std::fs::write(world.path("servers.pem"), &authority.pem).unwrap();
        Self { world, authority, certificate, key }
    }

    /// Asks for client certificates of this authority, and knows whose they are.
    fn with_clients(&mut self, clients: &Authority, demand: ClientCertificateDemand) {
        let file = self.world.path("clients.pem");
        std::fs::write(&file, &clients.pem).unwrap();
        self.world.settings.tls.client_certificates = demand;
        self.world.settings.tls.client_ca_file = Some(file);
        let rule = |uri: Option<&str>, dns: Option<&str>, principal: Option<&str>| CertificateSettings {
            uri: uri.map(str::to_owned),
            dns: dns.map(str::to_owned),
            sha256: None,
            principal: principal.map(str::to_owned),
            tenants: vec!["acme".to_owned()],
            roles: vec![],
            verbs: vec!["encrypt".to_owned(), "decrypt".to_owned()],
        };
        self.world.settings.access.certificates = vec![
            rule(Some("spiffe://example.org/ns/billing/*"), None, None),
            rule(None, Some(WORKER), Some("worker")),
        ];
    }

    /// What a client that offers these groups and the server agree on.
    fn key_exchange(&self, service: &Service, groups: &[&'static dyn SupportedKxGroup]) -> NamedGroup {
        let provider = CryptoProvider { kx_groups: groups.to_vec(), ..default_provider() };
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(self.authority.pem.as_bytes()).unwrap()).unwrap();
        let config = ClientConfig::builder_with_provider(Arc::new(provider))
            .with_protocol_versions(&[&TLS13])
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let name = "localhost".try_into().unwrap();
        let mut client = ClientConnection::new(Arc::new(config), name).unwrap();
        let mut connection = std::net::TcpStream::connect(service.address).unwrap();
        while client.is_handshaking() {
            client.complete_io(&mut connection).unwrap();
        }
        client.negotiated_key_exchange_group().unwrap().name()
    }

    fn caller(&self, service: &Service, own: Option<&Issued>, token: Option<String>) -> Caller {
        Caller::over_tls(service.address, &self.authority.pem, own, token)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_speak_http_2_and_1_over_tls_1_3_with_a_key_exchange_that_outlives_quantum_computers() {
    let tlsed = Tlsed::new().await;
    let service = tlsed.world.start().await;
    service.tenant("acme").await;
    let token = service.token(&["acme"], &Verb::ALL).await;
    let caller = tlsed.caller(&service, None, Some(token));
    let sealed = caller.encrypt(b"hello", &json!({})).await;
    assert_eq!(caller.decrypt(&sealed, &json!({})).await, b"hello");
    let shown = s_client(service.address, &["-alpn", "h2,http/1.1"]).unwrap();
    assert!(shown.contains("TLSv1.3"), "{shown}");
    assert!(shown.contains("ALPN protocol: h2"), "{shown}");
    assert!(s_client(service.address, &["-tls1_2"]).unwrap().contains("TLSv1.2"));
    assert!(s_client(service.address, &["-tls1_1"]).is_none());
    let exchange = |groups: &[&'static dyn SupportedKxGroup]| tlsed.key_exchange(&service, groups);
    assert_eq!(exchange(&[X25519MLKEM768, X25519]), NamedGroup::X25519MLKEM768);
    assert_eq!(exchange(&[X25519]), NamedGroup::X25519, "who does not know it is served too");
    let own = default_provider().kx_groups;
    assert_eq!(exchange(&own), NamedGroup::X25519MLKEM768, "what the service offers where it is the client");
    // Plain HTTP on the TLS port is no HTTP at all.
    let plain = service.anonymous().request(reqwest::Method::GET, "/live").send().await;
    assert!(plain.is_err());
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn with_version_min_1_3_tls_1_2_is_refused() {
    let mut tlsed = Tlsed::new().await;
    tlsed.world.settings.tls.version_min = TlsVersion::V13;
    let service = tlsed.world.start().await;
    assert!(s_client(service.address, &["-tls1_3"]).is_some());
    assert!(s_client(service.address, &["-tls1_2"]).is_none());
    service.stop().await;
}

/// What `openssl s_client` says of a handshake; none where it fails.
fn s_client(address: SocketAddr, arguments: &[&str]) -> Option<String> {
    let mut openssl = Command::new("openssl");
    openssl.args(["s_client", "-connect", &address.to_string()]).args(arguments);
    let output = openssl.stdin(std::process::Stdio::null()).output().unwrap();
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_is_exchanged_under_load_without_one_failed_request() {
    let tlsed = Tlsed::new().await;
    let service = tlsed.world.start().await;
    service.tenant("acme").await;
    let token = service.token(&["acme"], &[Verb::Encrypt]).await;
    let (address, authority) = (service.address, tlsed.authority.pem.clone());
    let load = Load::start(move || Caller::over_tls(address, &authority, None, Some(token.clone())));
    let tls = service.tls.clone().unwrap();
    assert!(!tls.reload().unwrap(), "nothing has changed");
    for serial in 2..6 {
        tlsed.authority.server(serial).write(&tlsed.world.path(""), "server");
        assert!(tls.reload().unwrap());
        load.goes_on().await;
        let shown = s_client(service.address, &[]).unwrap();
        let own = std::fs::read_to_string(&tlsed.certificate).unwrap();
        assert!(shown.contains(own.trim()), "the new certificate is shown");
    }
    // Half a change, a key that is not the certificate's, changes nothing.
    std::fs::write(&tlsed.key, tlsed.authority.server(9).key).unwrap();
    assert!(tls.reload().unwrap_err().to_string().contains("cannot be used together"));
    assert!(s_client(service.address, &[]).is_some());
    load.stop().await;
    service.stop().await;
}

/// Clients that encrypt all the time, on connections that they keep and on new ones, and do not take a failure.
struct Load {
    stop: Arc<AtomicBool>,
    done: Arc<AtomicU64>,
    clients: tokio::task::JoinSet<()>,
}

impl Load {
    fn start(connect: impl Fn() -> Caller + Clone + Send + 'static) -> Self {
        let mut load =
            Self { stop: Arc::default(), done: Arc::default(), clients: tokio::task::JoinSet::new() };
        for kept in [true, true, false, false] {
            let (stop, done, connect) = (Arc::clone(&load.stop), Arc::clone(&load.done), connect.clone());
            load.clients.spawn(async move {
                let mut caller = connect();
                while !stop.load(Ordering::Relaxed) {
                    if !kept {
                        caller = connect();
                    }
                    caller.encrypt(b"x", &json!({})).await;
                    done.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        load
    }

    /// Waits for some more requests.
    async fn goes_on(&self) {
        let before = self.done.load(Ordering::Relaxed);
        while self.done.load(Ordering::Relaxed) < before + 20 {
            tokio::task::yield_now().await;
        }
    }

    async fn stop(mut self) {
        self.stop.store(true, Ordering::Relaxed);
        while let Some(outcome) = self.clients.join_next().await {
            outcome.unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_program_takes_replaced_files_by_itself_without_one_failed_request() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let (authority, clients, later) =
        (Authority::new("servers"), Authority::new("clients"), Authority::new("later"));
    authority.server(1).write(folder.path(), "server");
    std::fs::write(path("clients.pem"), &clients.pem).unwrap();
    let settings = format!(
        r#"
        [tls]
        certificate_file = "server.pem"
        key_file = "server-key.pem"
        client_certificates = "required"
        client_ca_file = "clients.pem"
        reload_secs = 1
        [[access.certificates]]
        dns = "{WORKER}"
        tenants = ["dev"]
        verbs = ["encrypt"]
        "#
    );
    std::fs::write(path("keyfold.toml"), settings).unwrap();
    let program = Program::serve(folder.path(), &["--dev", "--config", "keyfold.toml"], &[]).await;
    let address = program.address;
    let (own, new) = (clients.client(2, &[WORKER], 3_650 * DAY), later.client(3, &[WORKER], 3_650 * DAY));
    let (certificate, key) = own.write(folder.path(), "own");
    let (own, new) = (Arc::new(own), Arc::new(new));
    let connect = |own: &Arc<Issued>| {
        let (own, authority) = (Arc::clone(own), authority.pem.clone());
        move || Caller::over_tls(address, &authority, Some(&own), None)
    };
    let load = Load::start(connect(&own));
    load.goes_on().await;
    // A client of the next authority does not even get through the handshake yet.
    let early = connect(&new)().request(reqwest::Method::GET, "/live").send().await;
    assert!(early.is_err());
    // One file after the other, as a renewal replaces them: for a moment they do not fit together.
    std::fs::write(path("clients.pem"), format!("{}{}", clients.pem, later.pem)).unwrap();
    let (next, _) = authority.server(4).write(folder.path(), "server");
    let next = std::fs::read_to_string(next).unwrap();
    let shown = || s_client(address, &["-cert", &text(&certificate), "-key", &text(&key)]).unwrap();
    let renewed = async {
        while !shown().contains(next.trim()) {
            load.goes_on().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), renewed).await.expect("the new certificate is shown");
    connect(&new)().encrypt(b"x", &json!({})).await;
    load.goes_on().await;
    load.stop().await;
    assert!(program.stop().await.contains("the TLS files have changed"));
}

#[tokio::test]
async fn a_reload_that_fails_leaves_the_authorities_too_as_they_were() {
    let (clients, later) = (Authority::new("clients"), Authority::new("later"));
    let mut tlsed = Tlsed::new().await;
    tlsed.with_clients(&clients, ClientCertificateDemand::Required);
    let service = tlsed.world.start().await;
    service.tenant("acme").await;
    let (old, new) = (clients.client(2, &[WORKER], DAY), later.client(3, &[WORKER], DAY));
    let open = tlsed.caller(&service, Some(&old), None);
    open.encrypt(b"x", &json!({})).await;
    // The authorities are exchanged, and the key already is the next certificate's.
    std::fs::write(tlsed.world.path("clients.pem"), &later.pem).unwrap();
    let next = tlsed.authority.server(9);
    std::fs::write(&tlsed.key, &next.key).unwrap();
    let tls = service.tls.as_ref().unwrap();
    assert!(tls.reload().unwrap_err().to_string().contains("cannot be used together"));
    open.encrypt(b"x", &json!({})).await;
    tlsed.caller(&service, Some(&old), None).encrypt(b"x", &json!({})).await;
    std::fs::write(&tlsed.certificate, &next.certificate).unwrap();
    assert!(tls.reload().unwrap());
    open.try_encrypt(b"x", &json!({})).await.problem("unauthenticated");
    tlsed.caller(&service, Some(&new), None).encrypt(b"x", &json!({})).await;
    service.stop().await;
}

#[tokio::test]
async fn a_client_certificate_says_who_calls_by_its_uri_its_dns_name_or_its_fingerprint() {
    let clients = Authority::new("clients");
    let mut tlsed = Tlsed::new().await;
    tlsed.with_clients(&clients, ClientCertificateDemand::Optional);
    let pinned = clients.client(7, &["pinned.example.org"], DAY);
    tlsed.world.settings.access.certificates.push(CertificateSettings {
        uri: None,
        dns: None,
        sha256: Some(pinned.fingerprint.clone()),
        principal: Some("pinned".to_owned()),
        tenants: vec!["acme".to_owned()],
        roles: vec![],
        verbs: vec!["encrypt".to_owned()],
    });
    let service = tlsed.world.start().await;
    service.tenant("acme").await;
    service.tenant("evil").await;
    let by_uri = clients.client(2, &["spiffe://example.org/ns/billing/sa/api"], DAY);
    let by_dns = clients.client(3, &[WORKER], DAY);
    for own in [&by_uri, &by_dns, &pinned] {
        let caller = tlsed.caller(&service, Some(own), None);
        caller.encrypt(b"hello", &json!({})).await;
        caller.as_tenant("evil").try_encrypt(b"hello", &json!({})).await.problem("forbidden");
    }
    let caller = tlsed.caller(&service, Some(&pinned), None);
    caller.try_decrypt("kf1.x", &json!({})).await.problem("forbidden");
    for (serial, names) in [
        (10, vec![]),
        (11, vec!["spiffe://example.org/ns/shop/sa/api"]),
        (12, vec!["spiffe://example.org.evil/ns/billing/sa/api"]),
        (13, vec!["spiffe://EXAMPLE.org/ns/billing/sa/api"]),
        // Of two URIs, which one counts is what an attacker would like to choose.
        (14, vec!["spiffe://example.org/ns/billing/sa/api", "spiffe://example.org/ns/shop/sa/api"]),
        (15, vec!["notworker.example.org"]),
        (16, vec!["sub.worker.example.org"]),
    ] {
        let caller = tlsed.caller(&service, Some(&clients.client(serial, &names, DAY)), None);
        caller.try_encrypt(b"x", &json!({})).await.problem("unauthenticated");
    }
    // Without a certificate, and with one and a token: the token counts, also where it is wrong.
    let anonymous = tlsed.caller(&service, None, None);
    anonymous.try_encrypt(b"x", &json!({})).await.problem("unauthenticated");
    let token = service.token(&["evil"], &[Verb::Encrypt]).await;
    let both = tlsed.caller(&service, Some(&by_dns), Some(token.clone()));
    both.as_tenant("evil").encrypt(b"x", &json!({})).await;
    both.as_tenant("acme").try_encrypt(b"x", &json!({})).await.problem("forbidden");
    let wrong = both.with_token(format!("{token}x"));
    wrong.try_encrypt(b"x", &json!({})).await.problem("unauthenticated");
    service.stop().await;
}

#[tokio::test]
async fn certificates_of_others_expired_or_revoked_are_refused_in_the_handshake() {
    let (clients, others) = (Authority::new("clients"), Authority::new("others"));
    let mut tlsed = Tlsed::new().await;
    tlsed.with_clients(&clients, ClientCertificateDemand::Required);
    let crl = tlsed.world.path("revoked.pem");
    std::fs::write(&crl, clients.revocations(&[5], 30 * DAY)).unwrap();
    tlsed.world.settings.tls.client_crl_file = Some(crl.clone());
    let service = tlsed.world.start().await;
    service.tenant("acme").await;
    let names = [WORKER];
    let try_with = |own: Option<&Issued>| {
        let caller = tlsed.caller(&service, own, None);
        async move { caller.request(reqwest::Method::GET, "/live").send().await.is_ok() }
    };
    let good = clients.client(4, &names, 2 * DAY);
    assert!(try_with(Some(&good)).await);
    assert!(!try_with(None).await, "required");
    assert!(!try_with(Some(&clients.client(5, &names, DAY))).await, "revoked");
    assert!(!try_with(Some(&clients.client(6, &names, -60))).await, "expired");
    assert!(!try_with(Some(&others.client(4, &names, DAY))).await, "another authority's");
    assert!(!try_with(Some(&clients.server(8))).await, "a server's certificate is no client's");
    // Client certificates are asked for after a reload too.
    tlsed.authority.server(2).write(&tlsed.world.path(""), "server");
    assert!(service.tls.as_ref().unwrap().reload().unwrap());
    assert!(try_with(Some(&good)).await && !try_with(None).await);
    // An outdated list says nothing of what is revoked now.
    std::fs::write(&crl, clients.revocations(&[5], 60)).unwrap();
    assert!(service.tls.as_ref().unwrap().reload().unwrap());
    tlsed.world.pass(61);
    assert!(!try_with(Some(&good)).await, "outdated list");
    service.stop().await;
}

#[tokio::test]
async fn a_certificate_that_expires_or_is_revoked_loses_the_connections_it_has() {
    let clients = Authority::new("clients");
    let mut tlsed = Tlsed::new().await;
    tlsed.with_clients(&clients, ClientCertificateDemand::Required);
    let crl = tlsed.world.path("revoked.pem");
    std::fs::write(&crl, clients.revocations(&[], 30 * DAY)).unwrap();
    tlsed.world.settings.tls.client_crl_file = Some(crl.clone());
    let service = tlsed.world.start().await;
    service.tenant("acme").await;
    let names = [WORKER];
    let (short, revoked) = (clients.client(4, &names, 3_600), clients.client(5, &names, DAY));
    let (short, revoked) =
        (tlsed.caller(&service, Some(&short), None), tlsed.caller(&service, Some(&revoked), None));
    short.encrypt(b"x", &json!({})).await;
    revoked.encrypt(b"x", &json!({})).await;
    std::fs::write(&crl, clients.revocations(&[5], 30 * DAY)).unwrap();
    service.tls.as_ref().unwrap().reload().unwrap();
    // The connection is the one from before: a new one would fail in the handshake.
    revoked.try_encrypt(b"x", &json!({})).await.problem("unauthenticated");
    short.encrypt(b"x", &json!({})).await;
    tlsed.world.pass(3_601);
    short.try_encrypt(b"x", &json!({})).await.problem("unauthenticated");
    service.stop().await;
}

#[tokio::test]
async fn a_connection_too_many_is_closed_and_an_idle_one_after_its_time() {
    let mut world = World::new().await;
    world.settings.http.connections_max = 2;
    world.settings.http.connection_idle_secs_max = 1;
    let service = world.start().await;
    let open = || tokio::net::TcpStream::connect(service.address);
    let (mut first, _second) = (open().await.unwrap(), open().await.unwrap());
    let live = b"GET /live HTTP/1.1\r\nhost: x\r\n\r\n";
    tokio::io::AsyncWriteExt::write_all(&mut first, live).await.unwrap();
    let mut answer = [0; 15];
    first.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"HTTP/1.1 200 OK");
    let mut third = open().await.unwrap();
    let mut rest = Vec::new();
    let _ = third.read_to_end(&mut rest).await;
    assert!(rest.is_empty(), "closed before it said anything");
    // Nobody uses the first any more.
    let closed = tokio::time::timeout(Duration::from_secs(5), first.read_to_end(&mut rest)).await;
    assert!(closed.is_ok(), "an idle connection is closed");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn curl_python_and_node_come_in_with_a_certificate() {
    let clients = Authority::new("clients");
    let mut tlsed = Tlsed::new().await;
    tlsed.with_clients(&clients, ClientCertificateDemand::Required);
    let service = tlsed.world.start().await;
    service.tenant("acme").await;
    let (own, own_key) = clients.client(2, &[WORKER], 3_650 * DAY).write(&tlsed.world.path(""), "own");
    let (own, own_key, ca) = (text(&own), text(&own_key), text(&tlsed.world.path("servers.pem")));
    let url = format!("https://localhost:{}/v1/encrypt", service.address.port());
    let body = r#"{"plaintext":"aGVsbG8="}"#;
    let curl = ["-sS", "--cacert", &ca, "--cert", &own, "--key", &own_key, "-H"];
    run(Command::new("curl").args(curl).args(["content-type: application/json", "-d", body, &url]));
    let python = "import sys, requests\n\
                  url, ca, cert, key, body = sys.argv[1:]\n\
                  print(requests.post(url, data=body, headers={'content-type': 'application/json'},\
                   verify=ca, cert=(cert, key)).text)";
    #[expect(clippy::disallowed_methods, reason = "which Python the tests use is the environment's to say")]
    let interpreter = std::env::var_os("KEYFOLD_TEST_PYTHON").unwrap_or_else(|| "python3".into());
    run(Command::new(interpreter).args(["-c", python, &url, &ca, &own, &own_key, body]));
    // Node's fetch shows no client certificate without a package of its own: its https module does.
    let node = "const [url, ca, cert, key, body] = process.argv.slice(1), fs = require('fs');\
                const r = require('https').request(url, {method: 'POST', ca: fs.readFileSync(ca),\
                 cert: fs.readFileSync(cert), key: fs.readFileSync(key),\
                 headers: {'content-type': 'application/json'}}, a => a.pipe(process.stdout)); r.end(body);";
    run(Command::new("node").args(["-e", node, &url, &ca, &own, &own_key, body]));
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_fetch_trusts_the_self_signed_certificate_that_is_written_for_it() {
    let mut world = World::new().await;
    // Node has no other clock than the machine's.
    world.clock = keyfold::clock::Clock::system();
    world.settings.tls.self_signed = true;
    let service = world.start().await;
    service.tenant("acme").await;
    let token = service.token(&["acme"], &[Verb::Encrypt]).await;
    let script = "const [url, token, body] = process.argv.slice(1);\
                  fetch(url, {method: 'POST', body, headers: {authorization: 'Bearer ' + token,\
                   'content-type': 'application/json'}}).then(a => a.text()).then(console.log)";
    let url = format!("https://localhost:{}/v1/encrypt", service.address.port());
    let mut node = Command::new("node");
    node.env("NODE_EXTRA_CA_CERTS", world.path("tls-self-signed.pem"));
    run(node.args(["-e", script, &url, &token, r#"{"plaintext":"aGVsbG8="}"#]));
    service.stop().await;
}

fn text(path: &std::path::Path) -> String {
    path.to_str().unwrap().to_owned()
}

/// Runs a client, which prints the answer to an encryption.
fn run(command: &mut Command) {
    let output = command.output().unwrap();
    let (out, error) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(out.contains(r#"{"ciphertext":"kf1."#), "{command:?}: {out} {error}");
}
