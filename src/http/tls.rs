//! TLS: which certificate is shown, which client certificates are asked for, and how both change while it runs.
//!
//! Whatever changes, a whole new `ServerConfig` is built and swapped in: connections that are open keep theirs, new
//! ones get the new one, and none is refused meanwhile. A set of files that does not fit together (a key that is
//! not the certificate's, in the middle of being replaced) is said in the log, and the one before stays.

mod self_signed;

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum_server::tls_rustls::RustlsConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::time_provider::TimeProvider;
use rustls::version::{TLS12, TLS13};
use rustls::{ServerConfig, SupportedProtocolVersion};
use tokio_util::sync::CancellationToken;
use zeroize::Zeroizing;

use crate::access::client_cert::{ClientCertificates, TrustError, Trusted};
use crate::clock::Clock;

use self_signed::SelfSigned;

/// The largest file of certificates, keys or revocations that is read: 16 MiB, which is a large revocation list.
const FILE_BYTES_MAX: u64 = 16 << 20;

/// What the server shows of itself, and asks of clients.
#[derive(Clone, Debug)]
pub struct Options {
    /// The certificate and its key.
    pub identity: Identity,
    /// Which client certificates are asked for; none where there is nothing here.
    pub clients: Option<Clients>,
    /// Whether TLS 1.2 is spoken beside 1.3. Default yes.
    pub tls12: bool,
    /// How long a handshake may take, in seconds. Default 10.
    pub handshake_secs_max: u64,
    /// How often the files are looked at, in seconds. Default 10.
    pub reload_secs: u64,
}

/// Where the server's certificate comes from.
#[derive(Clone, Debug)]
pub enum Identity {
    /// From files in PEM.
    Files {
        /// The certificate, and the intermediate ones after it.
        certificate: PathBuf,
        /// Its private key: PKCS#8, PKCS#1 or SEC1, not encrypted.
        key: PathBuf,
    },
    /// Made at each start, for trials.
    SelfSigned {
        /// Where the certificate is written, for clients to trust. The key stays in memory.
        certificate: PathBuf,
        /// The host names and addresses that it is for.
        names: Vec<String>,
    },
}

/// Which client certificates are asked for.
#[derive(Clone, Debug)]
pub struct Clients {
    /// Whether a client without one is refused in the handshake.
    pub required: bool,
    /// The authorities whose certificates are believed, in PEM.
    pub ca_file: PathBuf,
    /// Their revocation lists, in PEM: one for each authority that issues, in one file. An outdated list is
    /// refused.
    pub crl_file: Option<PathBuf>,
}

/// Why there is no TLS with these options.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read.
    #[error("the {what} file {path} cannot be read: {source}")]
    File {
        /// What it holds.
        what: &'static str,
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file does not hold what it should.
    #[error("the {what} file {path} {problem}")]
    Unfit {
        /// What it should hold.
        what: &'static str,
        /// Which.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// The certificate and the key do not make a server.
    #[error("the TLS certificate and key cannot be used together: {0}")]
    Unusable(#[from] rustls::Error),
    /// The client authorities cannot be used.
    #[error(transparent)]
    Trust(#[from] TrustError),
    /// The certificate for trials cannot be made.
    #[error("the self-signed certificate cannot be made: {0}")]
    SelfSigned(String),
}

/// The server's side of TLS, kept up to date with its files.
pub struct Tls {
    source: Source,
    options: Options,
    clock: Clock,
    certificates: Arc<ClientCertificates>,
    config: RustlsConfig,
    /// What the present configuration was built from.
    files: Mutex<Files>,
}

enum Source {
    Files { certificate: PathBuf, key: PathBuf },
    Made(SelfSigned),
}

#[derive(PartialEq)]
struct Files {
    certificate: Vec<u8>,
    key: Zeroizing<Vec<u8>>,
    ca: Option<Vec<u8>>,
    crl: Option<Vec<u8>>,
}

impl Tls {
    /// Reads the files and builds the first configuration.
    pub fn open(
        options: Options,
        clock: Clock,
        certificates: Arc<ClientCertificates>,
    ) -> Result<Self, TlsError> {
        let source = match &options.identity {
            Identity::Files { certificate, key } => {
                warn_if_loose(key);
                Source::Files { certificate: certificate.clone(), key: key.clone() }
            }
            Identity::SelfSigned { certificate, names } => {
                Source::Made(SelfSigned::make(names, clock.now(), certificate)?)
            }
        };
        let files = read_files(&source, options.clients.as_ref())?;
        let built = build(&options, &files, &clock)?;
        if let Some(clients) = built.clients {
            certificates.trust(clients);
        }
        let config = RustlsConfig::from_config(Arc::new(built.config));
        Ok(Self { source, options, clock, certificates, config, files: Mutex::new(files) })
    }

    /// Reads the files again, and takes what they hold from the next connection on. Tells whether something had
    /// changed. On an error all stays as it was.
    pub fn reload(&self) -> Result<bool, TlsError> {
        let files = read_files(&self.source, self.options.clients.as_ref())?;
        let mut present = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        if *present == files {
            return Ok(false);
        }
        let built = build(&self.options, &files, &self.clock)?;
        // Nothing fails from here on: requests are judged by the authorities that handshakes go by.
        if let Some(clients) = built.clients {
            self.certificates.trust(clients);
        }
        self.config.reload_from_config(Arc::new(built.config));
        *present = files;
        Ok(true)
    }

    /// Looks at the files now and then, until told to stop.
    pub async fn watch(self: Arc<Self>, stop: CancellationToken) {
        let every = Duration::from_secs(self.options.reload_secs.max(1));
        // The same complaint is not made again every few seconds.
        let mut complaint = String::new();
        loop {
            tokio::select! {
                () = self.clock.sleep(every) => {}
                () = stop.cancelled() => return,
            }
            let tls = Arc::clone(&self);
            match tokio::task::spawn_blocking(move || tls.reload()).await {
                Ok(Ok(changed)) => {
                    complaint.clear();
                    if changed {
                        tracing::info!("the TLS files have changed: new connections use what they hold now");
                    }
                }
                Ok(Err(error)) if error.to_string() != complaint => {
                    complaint = error.to_string();
                    tracing::error!(%error, "the TLS files cannot be used as they are: what was read before stays");
                }
                Ok(Err(_)) | Err(_) => {}
            }
        }
    }

    pub(super) fn handshake_time_max(&self) -> Duration {
        Duration::from_secs(self.options.handshake_secs_max)
    }

    pub(super) fn config(&self) -> RustlsConfig {
        self.config.clone()
    }
}

fn read_files(source: &Source, clients: Option<&Clients>) -> Result<Files, TlsError> {
    let (certificate, key) = match source {
        Source::Files { certificate, key } => {
            (read("TLS certificate", certificate)?, Zeroizing::new(read("TLS key", key)?))
        }
        Source::Made(made) => (made.certificate_pem.clone(), made.key_pem.clone()),
    };
    let ca = clients.map(|clients| read("client CA", &clients.ca_file)).transpose()?;
    let crl = clients.and_then(|clients| clients.crl_file.as_ref());
    let crl = crl.map(|file| read("certificate revocation list", file)).transpose()?;
    Ok(Files { certificate, key, ca, crl })
}

fn read(what: &'static str, path: &Path) -> Result<Vec<u8>, TlsError> {
    let failed = |source| TlsError::File { what, path: path.to_owned(), source };
    if std::fs::metadata(path).map_err(failed)?.len() > FILE_BYTES_MAX {
        return Err(TlsError::Unfit {
            what,
            path: path.to_owned(),
            problem: "is larger than 16 MiB".to_owned(),
        });
    }
    std::fs::read(path).map_err(failed)
}

fn warn_if_loose(key: &Path) {
    use std::os::unix::fs::PermissionsExt as _;
    if std::fs::metadata(key).is_ok_and(|metadata| metadata.permissions().mode() & 0o007 != 0) {
        tracing::warn!(file = %key.display(), "everybody on this host can read the TLS key: run chmod o= on it");
    }
}

/// What files make, before any of it is used.
struct Built {
    config: ServerConfig,
    /// Whose client certificates are believed; none where none are asked for.
    clients: Option<Trusted>,
}

fn build(options: &Options, files: &Files, clock: &Clock) -> Result<Built, TlsError> {
    let (certificate_file, key_file) = match &options.identity {
        Identity::Files { certificate, key } => (certificate.as_path(), key.as_path()),
        Identity::SelfSigned { certificate, .. } => (certificate.as_path(), Path::new("in memory")),
    };
    let unfit = |what, path: &Path, problem: String| TlsError::Unfit { what, path: path.to_owned(), problem };
    let chain: Vec<CertificateDer<'static>> = CertificateDer::pem_slice_iter(&files.certificate)
        .collect::<Result<_, _>>()
        .map_err(|error| unfit("TLS certificate", certificate_file, format!("is not valid PEM: {error}")))?;
    if chain.is_empty() {
        return Err(unfit("TLS certificate", certificate_file, "holds no certificate in PEM".to_owned()));
    }
    let key = PrivateKeyDer::from_pem_slice(&files.key).map_err(|error| {
        unfit("TLS key", key_file, format!("holds no private key in PEM (PKCS#8, PKCS#1 or SEC1): {error}"))
    })?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let versions: &[&SupportedProtocolVersion] = if options.tls12 { &[&TLS13, &TLS12] } else { &[&TLS13] };
    let builder = ServerConfig::builder_with_details(provider, Arc::new(ClockTime(clock.clone())))
        .with_protocol_versions(versions)?;
    let clients = match (&options.clients, &files.ca) {
        (Some(clients), Some(ca)) => Some(Trusted::parse(ca, files.crl.as_deref(), clients.required)?),
        _ => None,
    };
    // The same verifier looks again at every request: see access::client_cert.
    let verifier = clients.as_ref().map_or_else(WebPkiClientVerifier::no_client_auth, Trusted::verifier);
    let builder = builder.with_client_cert_verifier(verifier);
    let mut config = builder.with_single_cert(chain, key)?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(Built { config, clients })
}

/// The service's clock, for rustls.
struct ClockTime(Clock);

impl TimeProvider for ClockTime {
    fn current_time(&self) -> Option<UnixTime> {
        Some(crate::access::client_cert::unix_time(&self.0))
    }
}

impl fmt::Debug for ClockTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ClockTime")
    }
}
