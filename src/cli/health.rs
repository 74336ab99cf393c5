//! `keyfold health`: asks a running service whether it lives, for a container that has no shell and no curl.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context as _, bail};

use super::output;
use crate::config::Settings;

const PATIENCE: Duration = Duration::from_secs(2);

/// Asks `/live` where the settings say that the service listens.
pub(super) fn run(settings: &Settings) -> anyhow::Result<()> {
    let address = reachable(settings.listen);
    let mut connection = TcpStream::connect_timeout(&address, PATIENCE)
        .with_context(|| format!("nothing listens on {address}: is the service running?"))?;
    connection.set_read_timeout(Some(PATIENCE))?;
    connection.write_all(b"GET /live HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
    let mut head = [0; 12];
    connection.read_exact(&mut head).context("the service does not answer")?;
    if head != *b"HTTP/1.1 200" {
        bail!("the service on {address} does not say that it lives");
    }
    output::line("live");
    Ok(())
}

/// A service that listens everywhere is asked on loopback.
fn reachable(listen: SocketAddr) -> SocketAddr {
    let ip = match listen.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, listen.port())
}
