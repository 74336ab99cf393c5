//! One file a verb: parse, call the operation, answer.

pub(super) mod api_keys;
pub(super) mod decrypt;
pub(super) mod deks;
pub(super) mod encrypt;
pub(super) mod grants;
pub(super) mod health;
pub(super) mod jobs;
pub(super) mod keys;
pub(super) mod rewrap;
pub(super) mod shreds;
pub(super) mod tenants;

use std::sync::Arc;

use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::{FromRequest, FromRequestParts, Request};
use axum::response::{IntoResponse, Response};
use bytes::Buf;
use http::request::Parts;
use http::{Extensions, HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use http_body::Body as _;
use http_body_util::{BodyExt, Collected, LengthLimitError, Limited};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use utoipa::{IntoParams, ToSchema};

use super::SharedState;
use super::bulk::{self, refuse_raw_headers};
use super::json::ObjectOnly;
use super::middleware::authenticate::Caller;
use super::middleware::gate::Passed;
use super::middleware::quota::Tab;
use super::problem::{Code, Problem};
use crate::access::{AdminOf, Operate, Permit, PermitVerb};
use crate::operations::Page;
use crate::store::{EnvelopeWeight, Status};
use crate::tenant::{Kek, TenantId};

/// A JSON body within its route's limit.
pub(super) struct JsonBody(pub(super) Bytes);

impl<S: Send + Sync> FromRequest<S> for JsonBody {
    type Rejection = Problem;

    fn from_request(request: Request, _state: &S) -> impl Future<Output = Result<Self, Problem>> + Send {
        let bounds = Bounds::of(&request);
        let reading = json_text(request, bounds);
        async move { reading.await.map(Self) }
    }
}

/// A JSON body in one piece.
pub(super) fn json_text(
    request: Request,
    bounds: Bounds,
) -> impl Future<Output = Result<Bytes, Problem>> + Send {
    let reading = json_body(request, bounds);
    async move {
        let mut body = reading.await?;
        let bytes = body.remaining();
        Ok(body.copy_to_bytes(bytes))
    }
}

/// A JSON body within its route's limit, in the pieces in which it came.
///
/// The request ends here, and only its body is waited for: a future that took the request would hold it twice.
pub(super) fn json_body(
    request: Request,
    bounds: Bounds,
) -> impl Future<Output = Result<impl Buf + Send + 'static, Problem>> + Send {
    let announced = bounds.check_json(&request);
    let body = request.into_body();
    async move {
        announced?;
        let Bounds { bytes_max, tab } = bounds;
        match pieces(Limited::new(body, bytes_max)).await {
            Ok(body) => {
                if let Some(tab) = tab {
                    tab.more_bytes(body.remaining() as u64)?;
                }
                Ok(body)
            }
            Err(error) if error.is::<LengthLimitError>() => Err(too_large(bytes_max)),
            Err(_) => Err(Problem::new(Code::MalformedRequest, "the body ended before it was complete")),
        }
    }
}

/// The answer to a call that has leave, by what its body is: bytes that are streamed, or a text in JSON.
#[expect(
    clippy::manual_async_fn,
    reason = "the future of an `async fn` holds what it is given twice, and the request is large"
)]
pub(super) fn by_body<V, R, T>(
    state: SharedState,
    permit: Permit<V>,
    bounds: Bounds,
    request: Request,
    raw: impl FnOnce(SharedState, Permit<V>, Request) -> R + Send,
    text: impl FnOnce(SharedState, Permit<V>, Bytes) -> T + Send,
) -> impl Future<Output = Result<Response, Problem>> + Send
where
    V: PermitVerb + Send,
    R: Future<Output = Result<Response, Problem>> + Send,
    T: Future<Output = Result<Response, Problem>> + Send,
{
    async move {
        if bulk::is(request.headers(), bulk::OCTETS) {
            // Boxed: the state of a stream must not make every small call's larger.
            return Box::pin(raw(state, permit, request)).await;
        }
        let body = json_text(request, bounds).await?;
        text(state, permit, body).await
    }
}

/// What a body may have.
pub(super) struct Bounds {
    bytes_max: usize,
    /// Who counts what comes of it unannounced, where that is wanted.
    tab: Option<Tab>,
}

impl Bounds {
    /// Those of a request that the router has brought.
    pub(super) fn of(request: &Request) -> Self {
        let passed = request.extensions().get::<Arc<Passed>>();
        let bytes_max = passed.map_or(0, |passed| passed.body_bytes_max);
        Self { bytes_max, tab: request.extensions().get::<Tab>().cloned() }
    }

    /// Those of a request that has passed a gate, where there are no quotas.
    pub(super) fn within(passed: &Passed) -> Self {
        Self { bytes_max: passed.body_bytes_max, tab: None }
    }

    /// Whether a request announces JSON within them: what is announced is refused before it is sent, and what is not
    /// announced is counted.
    fn check_json(&self, request: &Request) -> Result<(), Problem> {
        if !bulk::is(request.headers(), "application/json") {
            return Err(Problem::new(Code::UnsupportedMediaType, Code::UnsupportedMediaType.example()));
        }
        refuse_raw_headers(request.headers())?;
        if request.body().size_hint().lower() > self.bytes_max as u64 {
            return Err(too_large(self.bytes_max));
        }
        Ok(())
    }
}

fn too_large(limit: usize) -> Problem {
    Problem::new(Code::TooLarge, format!("the body is larger than the {limit} bytes that this call takes"))
}

/// The pieces of a body. Most bodies are one, and need no list.
async fn pieces(mut body: Limited<Body>) -> Result<impl Buf + Send + 'static, axum::BoxError> {
    let mut first = Bytes::new();
    while first.is_empty()
        && let Some(frame) = body.frame().await.transpose()?
    {
        first = frame.into_data().unwrap_or_default();
    }
    let rest = if body.is_end_stream() { Collected::default() } else { body.collect().await? };
    Ok(first.chain(rest.aggregate()))
}

/// How long a body is, where its head says so.
pub(super) fn announced(headers: &HeaderMap) -> Option<u64> {
    headers.get(header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

const TENANT: HeaderName = HeaderName::from_static("keyfold-tenant");

/// Leave for a verb in the tenant that the request names in `Keyfold-Tenant`, or in the caller's only one.
pub(super) struct Permitted<V>(pub(super) Permit<V>);

impl<V: PermitVerb, S: Send + Sync> FromRequestParts<S> for Permitted<V> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, Problem> {
        permit(passed(&parts.extensions)?, &parts.headers, parts.extensions.get::<Tab>()).map(Self)
    }
}

/// Leave for a verb in the tenant that the headers name, or in the caller's only one.
pub(super) fn permit<V: PermitVerb>(
    passed: &Passed,
    headers: &HeaderMap,
    tab: Option<&Tab>,
) -> Result<Permit<V>, Problem> {
    let mut named = headers.get_all(TENANT).iter();
    let tenant = named.next().map(|value| value.to_str().unwrap_or_default());
    if named.next().is_some() {
        return Err(Problem::new(Code::MalformedRequest, "send one Keyfold-Tenant header"));
    }
    let caller = passed.caller()?;
    let permit: Permit<V> = caller.0.permit(tenant)?;
    if let Some(place) = &passed.place {
        place.belongs_to(permit.tenant())?;
    }
    if let Some(tab) = tab {
        tab.open(permit.tenant(), permit.principal(), announced(headers))?;
    }
    let Some(circumstances) = &caller.1 else { return Ok(permit) };
    let of_tenant = match &passed.rules {
        Some(rules) => rules.for_tenant(circumstances, permit.tenant())?.map(Arc::new),
        None => None,
    };
    Ok(permit.under(Some(of_tenant.unwrap_or_else(|| Arc::clone(circumstances)))))
}

/// What the gate has found out. Every route has one.
fn passed(extensions: &Extensions) -> Result<&Passed, Problem> {
    let passed = extensions.get::<Arc<Passed>>().map(|passed| &**passed);
    passed.ok_or_else(|| Problem::internal(Code::InternalError, "a route without a gate"))
}

impl Passed {
    /// Who calls. Every route with a guard has one.
    fn caller(&self) -> Result<&Caller, Problem> {
        self.caller.as_ref().ok_or_else(|| {
            Problem::internal(Code::InternalError, "a route without authentication asks who calls")
        })
    }
}

impl<S: Send + Sync> FromRequestParts<S> for Caller {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, Problem> {
        passed(&parts.extensions)?.caller().cloned()
    }
}

impl Caller {
    fn admin_of(&self, tenant: &str) -> Result<Permit<AdminOf>, Problem> {
        let tenant: TenantId = name(tenant)?;
        Ok(self.0.permit_admin(&tenant)?.under(self.1.clone()))
    }

    fn operate(&self) -> Result<Operate, Problem> {
        Ok(self.0.permit_operate()?.under(self.1.clone()))
    }
}

/// Parses a name that came in a path or a body.
pub(super) fn name<T: std::str::FromStr<Err = crate::tenant::InvalidName>>(text: &str) -> Result<T, Problem> {
    text.parse()
        .map_err(|error: crate::tenant::InvalidName| Problem::new(Code::MalformedRequest, error.to_string()))
}

/// Parses the id of a data key.
fn dek_id(text: &str) -> Result<envelope::DataKeyId, Problem> {
    text.parse()
        .map_err(|error: envelope::InvalidDataKeyId| Problem::new(Code::MalformedRequest, error.to_string()))
}

/// A JSON answer that was written by hand.
pub(super) fn json(status: StatusCode, body: impl Into<Body>) -> Response {
    let mut response = Response::new(body.into());
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

fn created<T: Serialize>(body: T) -> Response {
    (StatusCode::CREATED, Json(body)).into_response()
}

/// What an envelope carries beside the message.
#[derive(Clone, Copy, Debug, Deserialize, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(super) enum Weight {
    /// The wrapped data key: the envelope opens with the master key alone.
    Embedded,
    /// Nothing: 92 bytes of overhead; the registry is needed to open it.
    Compact,
}

impl From<Weight> for EnvelopeWeight {
    fn from(weight: Weight) -> Self {
        match weight {
            Weight::Embedded => Self::Embedded,
            Weight::Compact => Self::Compact,
        }
    }
}

impl From<EnvelopeWeight> for Weight {
    fn from(weight: EnvelopeWeight) -> Self {
        match weight {
            EnvelopeWeight::Embedded => Self::Embedded,
            EnvelopeWeight::Compact => Self::Compact,
        }
    }
}

/// Whether a tenant or a key is served.
#[derive(Clone, Copy, Debug, Deserialize, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(super) enum StatusName {
    /// It is.
    Enabled,
    /// Nothing is encrypted, decrypted or rewrapped.
    Disabled,
}

impl From<StatusName> for Status {
    fn from(status: StatusName) -> Self {
        match status {
            StatusName::Enabled => Self::Enabled,
            StatusName::Disabled => Self::Disabled,
        }
    }
}

impl From<Status> for StatusName {
    fn from(status: Status) -> Self {
        match status {
            Status::Enabled => Self::Enabled,
            Status::Disabled => Self::Disabled,
        }
    }
}

/// A master key in a ring.
#[derive(Clone, Debug, Deserialize, Serialize, ToSchema)]
#[serde(remote = "Self", deny_unknown_fields)]
pub(super) struct KekBody {
    /// The ARN of an AWS KMS key, or `local:NAME` of the embedded key ring.
    #[schema(example = "arn:aws:kms:eu-west-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab")]
    kek: String,
    /// The IAM role to assume for it, where it lives in another account.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(
        example = "arn:aws:iam::111122223333:role/keyfold",
        pattern = "^arn:.*:role/",
        max_length = 2048
    )]
    role: Option<String>,
    /// The external id that the role's trust policy asks for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    external_id: Option<String>,
}

impl<'de> Deserialize<'de> for KekBody {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::deserialize(ObjectOnly(deserializer))
    }
}

impl Serialize for KekBody {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        Self::serialize(self, serializer)
    }
}

impl From<&Kek> for KekBody {
    fn from(kek: &Kek) -> Self {
        let role = kek.role.as_ref();
        Self {
            kek: kek.id.to_string(),
            role: role.map(|role| role.arn.to_string()),
            external_id: role.and_then(|role| role.external_id.as_ref().map(ToString::to_string)),
        }
    }
}

impl TryFrom<KekBody> for Kek {
    type Error = Problem;

    fn try_from(body: KekBody) -> Result<Self, Problem> {
        let external_id = body.external_id.map(Into::into);
        let role = match body.role {
            Some(arn) if arn.starts_with("arn:") && arn.contains(":role/") && arn.len() <= 2_048 => {
                Some(crate::tenant::AssumedRole { arn: arn.into(), external_id })
            }
            None if external_id.is_none() => None,
            _ => {
                return Err(Problem::new(
                    Code::MalformedRequest,
                    "role is the ARN of an IAM role (arn:aws:iam::ACCOUNT:role/NAME); external_id goes with a role",
                ));
            }
        };
        Ok(Self { id: name(&body.kek)?, role })
    }
}

/// Which part of a list.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct PageQuery {
    /// The cursor from the page before (`next`); none for the first page.
    after: Option<String>,
    /// How many at most: 1 to 1,000, 100 where nothing is said.
    #[param(minimum = 1, maximum = 1000)]
    limit: Option<u32>,
}

const PAGE_DEFAULT: u32 = 100;
const PAGE_MAX: u32 = 1_000;

impl PageQuery {
    fn page<C>(self, parse: impl Fn(&str) -> Result<C, Problem>) -> Result<Page<C>, Problem> {
        let limit = self.limit.unwrap_or(PAGE_DEFAULT);
        if !(1..=PAGE_MAX).contains(&limit) {
            return Err(Problem::new(
                Code::MalformedRequest,
                format!("limit is {limit}: use 1 to {PAGE_MAX}"),
            ));
        }
        Ok(Page { after: self.after.as_deref().map(parse).transpose()?, limit })
    }
}

/// A query string, strictly.
pub(super) struct Query<T>(pub(super) T);

impl<T: serde::de::DeserializeOwned, S: Send + Sync> FromRequestParts<S> for Query<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, Problem> {
        match axum::extract::Query::try_from_uri(&parts.uri) {
            Ok(axum::extract::Query(query)) => Ok(Self(query)),
            Err(rejection) => {
                Err(Problem::new(Code::MalformedRequest, format!("the query is not valid: {rejection}")))
            }
        }
    }
}

/// The parts of a path, which are names.
pub(super) struct Path<T>(pub(super) T);

impl<T: serde::de::DeserializeOwned + Send, S: Send + Sync> FromRequestParts<S> for Path<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        match axum::extract::Path::from_request_parts(parts, state).await {
            Ok(axum::extract::Path(path)) => Ok(Self(path)),
            Err(_) => Err(Problem::new(Code::MalformedRequest, "the path is not valid")),
        }
    }
}

/// The cursor of the page that follows: there is one where this page is full.
fn next_cursor<T>(items: &[T], limit: u32, cursor: impl Fn(&T) -> String) -> Option<String> {
    let full = items.len() == usize::try_from(limit).unwrap_or(usize::MAX);
    items.last().filter(|_| full).map(cursor)
}
