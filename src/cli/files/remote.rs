//! Files through a service.

use std::time::Duration;

use anyhow::{Context as _, bail};
use envelope::{EncryptionContext, HEAD_BYTES_MAX, HeadReader};
use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use reqwest::{Body, Client, Response, Url};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio_util::io::ReaderStream;
use zeroize::Zeroizing;

use super::{Done, FileArgs, Input, OutputFile, Verb};
use crate::config::Variables;

/// How much is read at once.
const PIECE_BYTES: usize = 256 << 10;
/// How long the service may take to be connected to, and how long it may send nothing.
const IDLE: Duration = Duration::from_secs(60);

pub(super) struct Service {
    client: Client,
    url: Url,
    headers: HeaderMap,
}

impl Service {
    pub(super) fn new(url: &str, args: &FileArgs, variables: &Variables) -> anyhow::Result<Self> {
        let url: Url = url.parse().with_context(|| format!("{url:?} is not a URL"))?;
        let loopback = match url.host_str() {
            Some(host) => host == "localhost" || host.trim_matches(['[', ']']).parse().is_ok_and(is_loopback),
            None => bail!("{url} names no host"),
        };
        match url.scheme() {
            "https" => {}
            "http" if loopback || args.unprotected_http => {}
            "http" => bail!(
                "{url} has no TLS: your API key and plaintext would cross the network unprotected. Use https, or say \
                 --unprotected-http"
            ),
            other => bail!("{other}: is no scheme of a keyfold service: use https"),
        }
        let api_key = variables.value("KEYFOLD_API_KEY").context("set KEYFOLD_API_KEY to your API key")?;
        let mut headers = HeaderMap::new();
        let bearer = Zeroizing::new(format!("Bearer {api_key}"));
        let mut bearer = HeaderValue::from_str(&bearer).context("KEYFOLD_API_KEY is not an API key")?;
        bearer.set_sensitive(true);
        headers.insert("authorization", bearer);
        if let Some(tenant) = &args.tenant {
            headers.insert("keyfold-tenant", HeaderValue::from_str(tenant.as_str())?);
        }
        crate::http::server::use_crypto_provider();
        let client = Client::builder()
            // The credential is for this service, and for nobody to whom it may point.
            .redirect(reqwest::redirect::Policy::none())
            .connect_timeout(IDLE)
            .build()?;
        Ok(Self { client, url, headers })
    }

    pub(super) async fn carry_out(
        &self,
        verb: &Verb,
        context: &EncryptionContext,
        input: &mut Input,
        output: &mut OutputFile,
    ) -> anyhow::Result<Done> {
        let mut headers = self.headers.clone();
        if !context.is_empty() {
            headers.insert("keyfold-context", context_header(context)?);
        }
        let path = match verb {
            Verb::Encrypt { key, weight } => {
                headers.insert("keyfold-key", HeaderValue::from_str(key.as_str())?);
                if let Some(weight) = weight {
                    headers.insert("keyfold-envelope", HeaderValue::from_str(weight)?);
                }
                "/v1/encrypt"
            }
            Verb::Decrypt => "/v1/decrypt",
            Verb::Rewrap { .. } => return self.rewrap(headers, input, output).await,
        };
        self.pass(path, headers, Vec::new(), input, output).await?;
        Ok(Done::Written)
    }

    /// The head first: where it is all that has to be renewed, the rest does not travel.
    async fn rewrap(
        &self,
        headers: HeaderMap,
        input: &mut Input,
        output: &mut OutputFile,
    ) -> anyhow::Result<Done> {
        let mut beginning = Vec::new();
        let mut reader = HeadReader::new();
        let head = loop {
            let mut piece = vec![0; PIECE_BYTES.min(HEAD_BYTES_MAX)];
            let bytes = input.reader.read(&mut piece).await?;
            if bytes == 0 {
                return Err(reader.unfinished().into());
            }
            beginning.extend_from_slice(&piece[..bytes]);
            if let Some((head, _)) = reader.push(&piece[..bytes])? {
                break head;
            }
        };
        let response = self.post("/v1/rewrap/head", headers.clone(), head.to_bytes().into()).await?;
        let yes = |name: &str| response.headers().get(name).is_some_and(|value| value == "true");
        if yes("keyfold-rewrap-advised") {
            self.pass("/v1/rewrap", headers, beginning, input, output).await?;
            return Ok(Done::Written);
        }
        if !yes("keyfold-changed") {
            return Ok(Done::Unchanged);
        }
        let new = response.bytes().await?;
        output.writer.write_all(&new).await?;
        output.writer.write_all(&beginning[head.body_offset()..]).await?;
        tokio::io::copy(&mut input.reader, &mut output.writer).await?;
        Ok(Done::Written)
    }

    /// Sends what was read already and all that follows, and writes what comes back as it comes. Only the answer's clean
    /// end says that it is whole.
    async fn pass(
        &self,
        path: &str,
        headers: HeaderMap,
        beginning: Vec<u8>,
        input: &mut Input,
        output: &mut OutputFile,
    ) -> anyhow::Result<()> {
        let empty: Box<dyn tokio::io::AsyncRead + Send + Unpin> = Box::new(tokio::io::empty());
        let rest = std::mem::replace(&mut input.reader, empty);
        let whole = std::io::Cursor::new(beginning).chain(rest);
        let body = Body::wrap_stream(ReaderStream::with_capacity(whole, PIECE_BYTES));
        let mut response = self.post(path, headers, body).await?;
        while let Some(piece) =
            response.chunk().await.context("the transfer broke off: what was received is not whole")?
        {
            output.writer.write_all(&piece).await?;
        }
        Ok(())
    }

    async fn post(&self, path: &str, headers: HeaderMap, body: Body) -> anyhow::Result<Response> {
        let url = self.url.join(path)?;
        let request = self.client.post(url).headers(headers).body(body);
        let octets = HeaderValue::from_static("application/octet-stream");
        let response = request.header(HeaderName::from_static("content-type"), octets).send().await;
        let response = response.with_context(|| format!("{} cannot be reached", self.url))?;
        if response.status().is_success() {
            return Ok(response);
        }
        let status = response.status();
        let problem: serde_json::Value =
            serde_json::from_slice(&response.bytes().await.unwrap_or_default()).unwrap_or_default();
        match (problem["code"].as_str(), problem["detail"].as_str()) {
            (Some(code), Some(detail)) => bail!("{detail} ({code})"),
            _ => bail!("{} answers {status}: is it a keyfold service?", self.url),
        }
    }
}

fn is_loopback(address: std::net::IpAddr) -> bool {
    address.is_loopback()
}

/// As one byte sequence that holds the JSON object: any name and any value can stand in it.
fn context_header(context: &EncryptionContext) -> anyhow::Result<HeaderValue> {
    use base64::Engine as _;
    let pairs: std::collections::BTreeMap<&str, &str> = context.iter().collect();
    let json = serde_json::to_vec(&pairs)?;
    let encoded = base64::engine::general_purpose::STANDARD.encode(json);
    Ok(HeaderValue::from_str(&format!(":{encoded}:"))?)
}
