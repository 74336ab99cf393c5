//! Files through a service.

use anyhow::{Context as _, bail};
use envelope::{EncryptionContext, HEAD_BYTES_MAX, HeadReader};
use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use reqwest::{Body, Response};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio_util::io::ReaderStream;

use super::{Done, FileArgs, Input, OutputFile, Verb};
use crate::cli::transport::Transport;
use crate::config::Variables;

/// How much is read at once.
const PIECE_BYTES: usize = 256 << 10;

pub(super) struct Service(Transport);

impl Service {
    pub(super) fn new(url: &str, args: &FileArgs, variables: &Variables) -> anyhow::Result<Self> {
        Ok(Self(Transport::new(url, args.tenant.as_ref(), args.unprotected_http, variables)?))
    }

    pub(super) async fn carry_out(
        &self,
        verb: &Verb,
        context: &EncryptionContext,
        input: &mut Input,
        output: &mut OutputFile,
    ) -> anyhow::Result<Done> {
        let mut headers = self.0.headers.clone();
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
        let done = if yes("keyfold-changed") { Done::Written } else { Done::Unchanged };
        if matches!(done, Done::Unchanged) && output.in_place() {
            return Ok(done);
        }
        // Unchanged, it is the head that was sent.
        let head_now = response.bytes().await?;
        output.writer.write_all(&head_now).await?;
        output.writer.write_all(&beginning[head.body_offset()..]).await?;
        tokio::io::copy(&mut input.reader, &mut output.writer).await?;
        Ok(done)
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
        let url = self.0.url.join(path)?;
        let request = self.0.client.post(url).headers(headers).body(body);
        let octets = HeaderValue::from_static("application/octet-stream");
        let response = request.header(HeaderName::from_static("content-type"), octets).send().await;
        let response = response.with_context(|| format!("{} cannot be reached", self.0.url))?;
        if response.status().is_success() {
            return Ok(response);
        }
        let status = response.status();
        let problem: serde_json::Value =
            serde_json::from_slice(&response.bytes().await.unwrap_or_default()).unwrap_or_default();
        match (problem["code"].as_str(), problem["detail"].as_str()) {
            (Some(code), Some(detail)) => bail!("{detail} ({code})"),
            _ => bail!("{} answers {status}: is it a keyfold service?", self.0.url),
        }
    }
}

/// As one byte sequence that holds the JSON object: any name and any value can stand in it.
fn context_header(context: &EncryptionContext) -> anyhow::Result<HeaderValue> {
    use base64::Engine as _;
    let pairs: std::collections::BTreeMap<&str, &str> = context.iter().collect();
    let json = serde_json::to_vec(&pairs)?;
    let encoded = base64::engine::general_purpose::STANDARD.encode(json);
    Ok(HeaderValue::from_str(&format!(":{encoded}:"))?)
}
