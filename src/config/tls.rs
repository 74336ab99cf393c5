//! `[tls]`

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::ConfigError;
use crate::http::tls::{Clients, Identity, Options};

/// TLS of the listener: see [`crate::http::tls::Options`].
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TlsSettings {
    /// The server's certificate in PEM, with the intermediate ones after it.
    pub certificate_file: Option<PathBuf>,
    /// Its private key in PEM.
    pub key_file: Option<PathBuf>,
    /// Whether a certificate is made at each start, for trials. Default no.
    pub self_signed: bool,
    /// `1.2` or `1.3`. Default `1.2`.
    pub version_min: TlsVersion,
    /// `off`, `optional` or `required`. Default `off`.
    pub client_certificates: ClientCertificateDemand,
    /// The authorities of client certificates, in PEM.
    pub client_ca_file: Option<PathBuf>,
    /// What they have revoked, in PEM.
    pub client_crl_file: Option<PathBuf>,
    /// How long a handshake may take, in seconds. Default 10.
    pub handshake_secs_max: u64,
    /// How often these files are looked at for changes, in seconds. Default 10.
    pub reload_secs: u64,
}

impl Default for TlsSettings {
    fn default() -> Self {
        Self {
            certificate_file: None,
            key_file: None,
            self_signed: false,
            version_min: TlsVersion::V12,
            client_certificates: ClientCertificateDemand::Off,
            client_ca_file: None,
            client_crl_file: None,
            handshake_secs_max: 10,
            reload_secs: 10,
        }
    }
}

/// A version of TLS.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub enum TlsVersion {
    /// TLS 1.2.
    #[serde(rename = "1.2")]
    V12,
    /// TLS 1.3.
    #[serde(rename = "1.3")]
    V13,
}

/// Whether clients show certificates.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ClientCertificateDemand {
    /// They are not asked for.
    Off,
    /// They are asked for, and may come without.
    Optional,
    /// Who has none is refused in the handshake.
    Required,
}

impl TlsSettings {
    /// Whether the listener speaks TLS.
    pub fn is_on(&self) -> bool {
        self.self_signed || self.certificate_file.is_some()
    }

    /// The options of a listener on this address; none where TLS is off.
    pub fn options(&self, listen: SocketAddr, data_dir: &Path) -> Option<Options> {
        let identity = match (&self.certificate_file, &self.key_file) {
            _ if self.self_signed => Identity::SelfSigned {
                certificate: data_dir.join("tls-self-signed.pem"),
                names: names(listen),
            },
            (Some(certificate), Some(key)) => {
                Identity::Files { certificate: certificate.clone(), key: key.clone() }
            }
            _ => return None,
        };
        let clients = match (self.client_certificates, &self.client_ca_file) {
            (ClientCertificateDemand::Off, _) | (_, None) => None,
            (demand, Some(ca_file)) => Some(Clients {
                required: demand == ClientCertificateDemand::Required,
                ca_file: ca_file.clone(),
                crl_file: self.client_crl_file.clone(),
            }),
        };
        Some(Options {
            identity,
            clients,
            tls12: self.version_min == TlsVersion::V12,
            handshake_secs_max: self.handshake_secs_max,
            reload_secs: self.reload_secs,
        })
    }

    pub(super) fn check(&self) -> Result<(), ConfigError> {
        let invalid = |text: &str| Err(ConfigError::Invalid(text.to_owned()));
        if self.certificate_file.is_some() != self.key_file.is_some() {
            return invalid("tls.certificate_file and tls.key_file go together: set both, or neither");
        }
        if self.self_signed && self.certificate_file.is_some() {
            return invalid(
                "tls.self_signed makes a certificate, and tls.certificate_file names one: choose",
            );
        }
        let asks = self.client_certificates != ClientCertificateDemand::Off;
        if asks && self.client_ca_file.is_none() {
            return invalid(
                "tls.client_certificates needs tls.client_ca_file, the authorities whose certificates are believed",
            );
        }
        if asks && !self.is_on() {
            return invalid("tls.client_certificates needs TLS: set tls.certificate_file and tls.key_file");
        }
        if !asks && (self.client_ca_file.is_some() || self.client_crl_file.is_some()) {
            return invalid(
                "tls.client_ca_file and tls.client_crl_file do nothing while tls.client_certificates is \"off\": set \
                 it to \"optional\" or \"required\", or leave them out",
            );
        }
        if self.handshake_secs_max == 0 || self.reload_secs == 0 {
            return invalid("tls.handshake_secs_max and tls.reload_secs are 1 or more");
        }
        Ok(())
    }
}

fn names(listen: SocketAddr) -> Vec<String> {
    let mut names = vec!["localhost".to_owned(), "127.0.0.1".to_owned(), "::1".to_owned()];
    if !listen.ip().is_unspecified() && !listen.ip().is_loopback() {
        names.push(listen.ip().to_string());
    }
    names
}
