//! Raw bodies on the routes of the single calls: bytes in, bytes out, of any length.

use std::sync::Arc;

use axum::body::{Body, Bytes};
use axum::extract::Request;
use axum::response::{IntoResponse, Response};
use envelope::{HEAD_BYTES_MAX, HeadReader};
use http::request::Parts;
use http::{HeaderMap, HeaderName, HeaderValue, header};
use http_body_util::BodyExt;

use super::context_header::{NAME as CONTEXT, context};
use super::{OCTETS, is, refuse_unread_headers};
use crate::access::{Decrypt, Encrypt, Permit, Rewrap};
use crate::http::SharedState;
use crate::http::handlers::{Permitted, Weight};
use crate::http::middleware::quota::Tab;
use crate::http::problem::{Code, Problem};
use crate::http::transfer::{Answer, Output};
use crate::operations::{
    Begun, OperationError, RewrapMode, Sink, StreamDecryption, StreamEncryption, StreamRewrapping,
    TransferError,
};
use crate::tenant::KeyName;

const KEY: HeaderName = HeaderName::from_static("keyfold-key");
const ENVELOPE: HeaderName = HeaderName::from_static("keyfold-envelope");
const MODE: HeaderName = HeaderName::from_static("keyfold-rewrap-mode");
const DEK_ID: HeaderName = HeaderName::from_static("keyfold-dek-id");
const REWRAP_ADVISED: HeaderName = HeaderName::from_static("keyfold-rewrap-advised");
const CHANGED: HeaderName = HeaderName::from_static("keyfold-changed");
const REPLACES_BYTES: HeaderName = HeaderName::from_static("keyfold-replaces-bytes");

/// Seals a body.
pub(in crate::http) async fn encrypt(
    state: SharedState,
    permit: Permit<Encrypt>,
    request: Request,
) -> Result<Response, Problem> {
    let ((parts, body), tenant) = (charged(request), permit.tenant().clone());
    refuse_unread_headers(&parts.headers, &[CONTEXT, KEY.as_str(), ENVELOPE.as_str()])?;
    let key = one(&parts.headers, &KEY)?.map_or_else(|| Ok(state.default_key.clone()), key_name)?;
    let (context, weight) = (context(&parts.headers)?, weight(&parts.headers)?.map(Into::into));
    let operations = Arc::clone(&state.operations);
    let work = |mut source, mut sink| async move {
        let request = StreamEncryption { key, context, weight };
        Ok(operations.encrypt_stream(&permit, request, &mut source, &mut sink).await?)
    };
    state.transfers.run(&tenant, body, Answer::Held, work).await
}

/// Opens a body.
pub(in crate::http) async fn decrypt(
    state: SharedState,
    permit: Permit<Decrypt>,
    request: Request,
) -> Result<Response, Problem> {
    let ((parts, body), tenant) = (charged(request), permit.tenant().clone());
    refuse_unread_headers(&parts.headers, &[CONTEXT])?;
    let request = StreamDecryption { context: context(&parts.headers)? };
    let operations = Arc::clone(&state.operations);
    let work = |mut source, mut sink| async move {
        Ok(operations.decrypt_stream(&permit, request, &mut source, &mut sink).await?)
    };
    state.transfers.run(&tenant, body, Answer::Held, work).await
}

/// Brings a body up to date.
pub(in crate::http) async fn rewrap(
    state: SharedState,
    permit: Permit<Rewrap>,
    request: Request,
) -> Result<Response, Problem> {
    let ((parts, body), tenant) = (charged(request), permit.tenant().clone());
    refuse_unread_headers(&parts.headers, &[CONTEXT, ENVELOPE.as_str(), MODE.as_str()])?;
    let mode = match one(&parts.headers, &MODE)? {
        None | Some("auto") => RewrapMode::Auto,
        Some("wrapped_key") => RewrapMode::WrappedKey,
        Some(_) => {
            return Err(Problem::new(Code::MalformedRequest, "Keyfold-Rewrap-Mode is auto or wrapped_key"));
        }
    };
    let (context, weight) = (context(&parts.headers)?, weight(&parts.headers)?.map(Into::into));
    let request = StreamRewrapping { context, mode, weight };
    let operations = Arc::clone(&state.operations);
    let work = |mut source, mut sink| async move {
        Ok(operations.rewrap_stream(&permit, request, &mut source, &mut sink).await?)
    };
    state.transfers.run(&tenant, body, Answer::Held, work).await
}

/// Rewrap a head
///
/// Takes the first bytes of an envelope and gives back its new head. The object in your store is then renewed by
/// writing this head in place of its first `Keyfold-Replaces-Bytes` bytes: the rest need not travel. The message is not
/// decrypted, no context is needed, and the data key stays the same; `Keyfold-Rewrap-Advised: true` says that it is
/// retired, so that rewrapping the whole envelope would do more.
#[utoipa::path(post, path = "/v1/rewrap/head", operation_id = "rewrap_head", tag = "data",
    params(("Keyfold-Tenant" = Option<String>, Header, description = "Which tenant, where the credential holds several"),
        ("Keyfold-Envelope" = Option<Weight>, Header, description = "What the envelope is to carry; as the key's policy says where nothing is said")),
    request_body(content = Vec<u8>, content_type = "application/octet-stream",
        description = "The first bytes of an envelope: the whole head, and whatever of the body. 64 KiB are enough for up to 8 master keys in AWS KMS"),
    responses((status = 200, description = "The new head", content_type = "application/octet-stream", body = Vec<u8>,
        headers(("Keyfold-Replaces-Bytes" = u64, description = "How many bytes at the beginning of the old envelope the new head stands for"),
            ("Keyfold-Changed" = bool, description = "Whether the new head is another one"),
            ("Keyfold-Dek-Id" = String, description = "The envelope's data key"),
            ("Keyfold-Rewrap-Advised" = bool, description = "Whether rewrapping the whole envelope would do more")))))]
pub(in crate::http) async fn rewrap_head(
    axum::extract::State(state): axum::extract::State<SharedState>,
    Permitted(permit): Permitted<Rewrap>,
    request: Request,
) -> Result<Response, Problem> {
    if !is(request.headers(), OCTETS) {
        return Err(Problem::new(Code::UnsupportedMediaType, "send Content-Type: application/octet-stream"));
    }
    let (parts, mut body) = request.into_parts();
    // Clients send the context along, and the same request then serves for the whole envelope.
    refuse_unread_headers(&parts.headers, &[CONTEXT, ENVELOPE.as_str()])?;
    let weight = weight(&parts.headers)?.map(Into::into);
    // Whatever is sent behind the head is taken and let go.
    let (mut reader, mut head, mut bytes) = (HeadReader::new(), None, 0);
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|_| Problem::from(OperationError::from(TransferError::BrokenOff)))?;
        let Ok(piece) = frame.into_data() else { continue };
        bytes += piece.len();
        if bytes > HEAD_BODY_BYTES_MAX {
            let told = format!("send the first {HEAD_BODY_BYTES_MAX} bytes of the envelope at most");
            return Err(Problem::new(Code::TooLarge, told));
        }
        if head.is_none() {
            head = reader.push(&piece).map_err(OperationError::from)?.map(|(head, _)| head);
        }
    }
    if let Some(tab) = parts.extensions.get::<Tab>() {
        tab.more_bytes(bytes as u64)?;
    }
    let head = head.ok_or_else(|| OperationError::from(reader.unfinished()))?;
    let new = state.operations.rewrap_head(&permit, &head.to_bytes(), weight).await?;
    let mut headers = HeaderMap::new();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(OCTETS));
    headers.insert(REPLACES_BYTES, new.replaces_bytes.into());
    headers.insert(CHANGED, yes_or_no(new.changed));
    headers.insert(DEK_ID, text(&new.dek_id.to_string()));
    headers.insert(REWRAP_ADVISED, yes_or_no(new.rewrap_advised));
    Ok((headers, new.head).into_response())
}

/// The longest head, and the rest of a read that was aligned to 64 KiB.
const HEAD_BODY_BYTES_MAX: usize = HEAD_BYTES_MAX.next_multiple_of(64 << 10);

impl Sink for Output {
    async fn begin(&mut self, begun: Begun) -> Result<(), TransferError> {
        let mut headers = HeaderMap::new();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(OCTETS));
        headers.insert(KEY, text(begun.key.as_str()));
        headers.insert(DEK_ID, text(&begun.dek_id.to_string()));
        for (name, value) in [(REWRAP_ADVISED, begun.rewrap_advised), (CHANGED, begun.changed)] {
            if let Some(value) = value {
                headers.insert(name, yes_or_no(value));
            }
        }
        Self::begin(self, headers).await
    }

    async fn write(&mut self, piece: Bytes) -> Result<(), TransferError> {
        Self::write(self, piece).await
    }
}

/// What the head does not announce of the body is charged to the caller's quota while it comes.
fn charged(request: Request) -> (Parts, Body) {
    let (parts, body) = request.into_parts();
    let Some(tab) = parts.extensions.get::<Tab>().cloned() else { return (parts, body) };
    let charged = body.map_frame(move |frame| {
        if let Some(piece) = frame.data_ref() {
            tab.flowed(piece.len() as u64);
        }
        frame
    });
    (parts, Body::new(charged))
}

/// The one value of a header.
fn one<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Result<Option<&'a str>, Problem> {
    let mut values = headers.get_all(name).iter();
    let value = values.next().map(|value| value.to_str().unwrap_or_default());
    if values.next().is_some() {
        return Err(Problem::new(Code::MalformedRequest, format!("send one {name} header")));
    }
    Ok(value)
}

fn key_name(text: &str) -> Result<KeyName, Problem> {
    text.parse()
        .map_err(|error: crate::tenant::InvalidName| Problem::new(Code::MalformedRequest, error.to_string()))
}

fn weight(headers: &HeaderMap) -> Result<Option<Weight>, Problem> {
    match one(headers, &ENVELOPE)? {
        None => Ok(None),
        Some("embedded") => Ok(Some(Weight::Embedded)),
        Some("compact") => Ok(Some(Weight::Compact)),
        Some(_) => Err(Problem::new(Code::MalformedRequest, "Keyfold-Envelope is embedded or compact")),
    }
}

/// Slugs and ids are always fit for a header.
fn text(value: &str) -> HeaderValue {
    HeaderValue::from_str(value).unwrap_or_else(|_| HeaderValue::from_static(""))
}

fn yes_or_no(value: bool) -> HeaderValue {
    HeaderValue::from_static(if value { "true" } else { "false" })
}
