//! OpenTelemetry: each record is a log record of OTLP over HTTP, in JSON, whose body is the line as the chain has it.
//!
//! A collector that answers too late may have taken what is sent again: the records' numbers show it.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use reqwest::Url;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use serde_json::{Value, json};
use tokio::runtime::Runtime;

use super::output::Output;
use crate::clock::Timestamp;

/// How many bytes of lines go into one request: collectors take 4 MiB and more.
const REQUEST_BYTES_MAX: usize = 1 << 20;
/// How much of an answer is read: what it says of records that were not taken.
const ANSWER_BYTES_MAX: usize = 64 << 10;
const SEVERITY_INFO: u8 = 9;
const SEVERITY_WARN: u8 = 13;

/// Options of the collector.
#[derive(Clone, Debug)]
pub struct OtlpOptions {
    /// Where it takes logs, with the path: usually `https://HOST:4318/v1/logs`.
    pub endpoint: String,
    /// A file of the CA certificates that it is believed by. Default the system's.
    pub ca_file: Option<PathBuf>,
    /// A file of the token that is sent with each request, read anew each time. Default none.
    pub bearer_token_file: Option<PathBuf>,
    /// Whether plain HTTP is fine elsewhere than on this machine. Default not.
    pub allow_http: bool,
    /// How long a request may take, in seconds. Default 10.
    pub request_secs_max: u64,
}

/// The collector cannot be used as it is configured; the text says what to do.
#[derive(Debug, thiserror::Error)]
#[error("audit.otlp: {0}")]
pub struct OtlpError(String);

/// A collector.
pub(super) struct Otlp {
    options: OtlpOptions,
    url: Url,
    client: reqwest::Client,
    /// A runtime of its own, on the sink's thread: records go out however busy the service's is.
    runtime: Option<Runtime>,
}

impl Otlp {
    pub(super) fn new(options: OtlpOptions) -> Result<Self, OtlpError> {
        let url: Url = options.endpoint.parse().map_err(|error| {
            OtlpError(format!(
                "endpoint {:?} is not a URL ({error}): use https://HOST:4318/v1/logs",
                options.endpoint
            ))
        })?;
        let host = url.host_str().unwrap_or_default().trim_matches(['[', ']']);
        let loopback = host == "localhost"
            || host.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback());
        if url.scheme() != "https" && !(url.scheme() == "http" && (loopback || options.allow_http)) {
            return Err(OtlpError(format!(
                "endpoint {url}: use https, or, where the way there is protected by other means, allow_http = true"
            )));
        }
        let client = client(&options).map_err(OtlpError)?;
        Ok(Self { options, url, client, runtime: None })
    }

    fn runtime(&mut self) -> io::Result<Runtime> {
        self.runtime
            .take()
            .map_or_else(|| tokio::runtime::Builder::new_current_thread().enable_all().build(), Ok)
    }

    async fn post(&self, body: Vec<u8>) -> io::Result<Vec<u8>> {
        let mut request = self.client.post(self.url.clone()).header("content-type", "application/json");
        if let Some(file) = &self.options.bearer_token_file {
            request = request.bearer_auth(std::fs::read_to_string(file)?.trim());
        }
        // The URL may hold what is nobody's business: errors are told without it.
        let failed = |error: reqwest::Error| io::Error::other(error.without_url());
        let mut response = request.body(body).send().await.map_err(failed)?;
        if !response.status().is_success() {
            return Err(io::Error::other(format!("the collector answers {}", response.status())));
        }
        let mut answer = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(failed)? {
            if answer.len() + chunk.len() > ANSWER_BYTES_MAX {
                break;
            }
            answer.extend_from_slice(&chunk);
        }
        Ok(answer)
    }
}

impl Output for Otlp {
    fn write(&mut self, lines: &[u8]) -> io::Result<usize> {
        let mut end = 0;
        for line in lines.split_inclusive(|byte| *byte == b'\n') {
            if end > 0 && end + line.len() > REQUEST_BYTES_MAX {
                break;
            }
            end += line.len();
        }
        let runtime = self.runtime()?;
        let answer = runtime.block_on(self.post(request(&lines[..end])));
        self.runtime = Some(runtime);
        if let Some(rejected) = rejected(&answer?) {
            // The protocol forbids to send them again.
            tracing::error!(target: "keyfold::audit", sink = "otlp", rejected, "the collector has not taken all records");
        }
        Ok(end)
    }

    fn sync(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What the collector says of records that it did not take.
fn rejected(answer: &[u8]) -> Option<String> {
    let answer: Value = serde_json::from_slice(answer).ok()?;
    let partial = answer.get("partialSuccess")?;
    let count = partial.get("rejectedLogRecords")?;
    let none = count == 0 || count == "0";
    (!none).then(|| format!("{count} records: {}", partial["errorMessage"]))
}

fn request(lines: &[u8]) -> Vec<u8> {
    let records: Vec<Value> =
        lines.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()).map(record).collect();
    let resource = json!({"attributes": [
        attribute("service.name", "keyfold"),
        attribute("service.version", env!("CARGO_PKG_VERSION")),
    ]});
    let scope = json!({"name": "keyfold.audit"});
    let logs = json!([{"resource": resource, "scopeLogs": [{"scope": scope, "logRecords": records}]}]);
    json!({"resourceLogs": logs}).to_string().into_bytes()
}

fn record(line: &[u8]) -> Value {
    let told: Value = serde_json::from_slice(line).unwrap_or_default();
    let word = |name: &str| told[name].as_str().unwrap_or_default().to_owned();
    let at = Timestamp::parse_rfc3339(&word("time")).unwrap_or_default();
    let nanos = (i128::from(at.unix_ms()) * 1_000_000).to_string();
    let fine = matches!(told["outcome"].as_str(), None | Some("begin" | "done"));
    let (number, text) = if fine { (SEVERITY_INFO, "INFO") } else { (SEVERITY_WARN, "WARN") };
    let named = ["what", "outcome", "code", "principal", "tenant", "request_id"].into_iter();
    let mut attributes: Vec<Value> = named
        .filter(|name| told[*name].is_string())
        .map(|name| attribute(&format!("keyfold.audit.{name}"), &word(name)))
        .collect();
    attributes.push(json!({"key": "keyfold.audit.seq", "value": {"intValue": told["seq"].to_string()}}));
    json!({
        "timeUnixNano": nanos,
        "observedTimeUnixNano": nanos,
        "severityNumber": number,
        "severityText": text,
        "eventName": format!("keyfold.audit.{}", word("event")),
        "body": {"stringValue": String::from_utf8_lossy(line)},
        "attributes": attributes,
    })
}

fn attribute(key: &str, value: &str) -> Value {
    json!({"key": key, "value": {"stringValue": value}})
}

fn client(options: &OtlpOptions) -> Result<reqwest::Client, String> {
    let mut roots = rustls::RootCertStore::empty();
    if let Some(file) = &options.ca_file {
        let unusable = |error: String| format!("ca_file {}: {error}", file.display());
        let bytes = std::fs::read(file).map_err(|error| unusable(error.to_string()))?;
        for certificate in CertificateDer::pem_slice_iter(&bytes) {
            let certificate = certificate.map_err(|error| unusable(error.to_string()))?;
            roots.add(certificate).map_err(|error| unusable(error.to_string()))?;
        }
        if roots.is_empty() {
            return Err(unusable("it holds no certificate in PEM".to_owned()));
        }
    } else {
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let tls = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?
        .with_root_certificates(roots)
        .with_no_client_auth();
    reqwest::Client::builder()
        .tls_backend_preconfigured(tls)
        .redirect(reqwest::redirect::Policy::none())
        .timeout(Duration::from_secs(options.request_secs_max))
        .build()
        .map_err(|error| error.to_string())
}
