//! Asks the listener of a process on this host whether it lives, spoken to as its own options say: for health checks of
//! containers that have no shell and no curl.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::version::TLS13;
use rustls::{
    AlertDescription, ClientConfig, ClientConnection, DigitallySignedStruct, SignatureScheme, StreamOwned,
};

use super::source::Proxies;
use super::tls;

/// How long each step may take: to connect, to send, to be answered.
const PATIENCE: Duration = Duration::from_secs(2);

/// Why a service is not taken to be alive.
#[derive(Debug, thiserror::Error)]
pub enum NotAlive {
    /// Nobody can be connected to there.
    #[error("nothing listens on {0}: is the service running? ({1})")]
    Nobody(SocketAddr, io::Error),
    /// Somebody is there, and says nothing in time, or not what was to be expected.
    #[error("the service on {0} does not answer: {1}")]
    Silent(SocketAddr, io::Error),
    /// It answers, and not that it lives.
    #[error("the service on {0} does not say that it lives")]
    Unwell(SocketAddr),
}

/// Asks `/live` of the service that listens on this address with these options for TLS, if any, behind these load
/// balancers. A service that listens everywhere is asked on loopback.
///
/// Its certificate is not verified: nothing is entrusted to whom answers. One that requires client certificates lives
/// when the handshake gets as far as that it misses ours.
pub fn ask(listen: SocketAddr, tls: Option<&tls::Options>, proxies: &Proxies) -> Result<(), NotAlive> {
    let address = reachable(listen);
    let mut connection =
        TcpStream::connect_timeout(&address, PATIENCE).map_err(|error| NotAlive::Nobody(address, error))?;
    let silent = |error| NotAlive::Silent(address, error);
    connection.set_read_timeout(Some(PATIENCE)).map_err(silent)?;
    connection.set_write_timeout(Some(PATIENCE)).map_err(silent)?;
    let own = connection.local_addr().map_err(silent)?.ip();
    connection.write_all(proxies.header_of_their_own(own)).map_err(silent)?;
    let lives = match tls {
        None => says_live(&mut connection),
        Some(options) => handshake(connection).and_then(|mut connection| {
            if options.clients.as_ref().is_some_and(|clients| clients.required) {
                misses_our_certificate(&mut connection)
            } else {
                says_live(&mut connection)
            }
        }),
    };
    if lives.map_err(silent)? { Ok(()) } else { Err(NotAlive::Unwell(address)) }
}

fn reachable(listen: SocketAddr) -> SocketAddr {
    let ip = match listen.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, listen.port())
}

fn says_live(connection: &mut (impl Read + Write)) -> io::Result<bool> {
    connection.write_all(b"GET /live HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
    let mut head = [0; 12];
    connection.read_exact(&mut head)?;
    Ok(head == *b"HTTP/1.1 200")
}

/// Every listener speaks TLS 1.3, in which the client has gone through the handshake before the server looks at
/// its certificate.
fn handshake(mut connection: TcpStream) -> io::Result<StreamOwned<ClientConnection, TcpStream>> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])
        .map_err(io::Error::other)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anybody))
        .with_no_client_auth();
    let name = ServerName::from(connection.peer_addr()?.ip());
    let mut tls = ClientConnection::new(Arc::new(config), name).map_err(io::Error::other)?;
    while tls.is_handshaking() || tls.wants_write() {
        tls.complete_io(&mut connection)?;
    }
    Ok(StreamOwned::new(tls, connection))
}

fn misses_our_certificate(connection: &mut impl Read) -> io::Result<bool> {
    let Err(error) = connection.read(&mut [0]) else { return Ok(false) };
    let wanted = rustls::Error::AlertReceived(AlertDescription::CertificateRequired);
    match error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
        Some(said) => Ok(*said == wanted),
        None => Err(error),
    }
}

/// Takes whoever answers for the service.
#[derive(Debug)]
struct Anybody;

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        rustls::crypto::aws_lc_rs::default_provider().signature_verification_algorithms.supported_schemes()
    }
}
