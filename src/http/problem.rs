//! Errors at the edge: RFC 9457 problem details. One table says what each code means; nothing below knows HTTP.

use std::borrow::Cow;

use axum::response::{IntoResponse, Response};
use http::{HeaderValue, StatusCode, header};
use serde::Serialize;
use utoipa::ToSchema;

use crate::access::{AuthenticationError, Forbidden};
use crate::kms::KmsError;
use crate::operations::{OperationError, TransferError};
use crate::pool::PoolError;
use crate::store::StoreError;

/// A stable name for what went wrong, for programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    /// The request is not what the interface asks for.
    MalformedRequest,
    /// The ciphertext is not an envelope.
    MalformedEnvelope,
    /// A context name is the service's.
    ReservedContext,
    /// No credential, or not a valid one.
    Unauthenticated,
    /// The tenant's key-bound context has as many values as are allowed.
    ContextLimit,
    /// The credential is not granted this.
    Forbidden,
    /// The owner of the master key has cut it off.
    KekDenied,
    /// The key or data key is switched off.
    KeyRevoked,
    /// There is no such thing.
    NotFound,
    /// The path is there, with another method.
    MethodNotAllowed,
    /// It collides with what is there.
    Conflict,
    /// The data key is destroyed for good.
    KeyDestroyed,
    /// The body, or the plaintext, is too long.
    TooLarge,
    /// The body is of another media type.
    UnsupportedMediaType,
    /// Another context, or another tenant's.
    ContextMismatch,
    /// The ciphertext was changed.
    CiphertextDamaged,
    /// More than the quota allows.
    RateLimited,
    /// A fault of keyfold's own.
    InternalError,
    /// The KMS cannot be reached.
    KmsUnavailable,
    /// The registry cannot be reached.
    StoreUnavailable,
    /// The keys of a token's issuer cannot be fetched.
    IssuerUnavailable,
    /// The audit takes no record, and what is not recorded is not done.
    AuditUnavailable,
    /// Too much at once.
    Overloaded,
    /// It took too long.
    DeadlineExceeded,
}

/// What a code means: name, status, title, whether the same request may succeed later, an example of a detail.
struct Meaning(&'static str, StatusCode, &'static str, bool, &'static str);

impl Code {
    /// Every code.
    pub const ALL: [Self; 24] = [
        Self::MalformedRequest,
        Self::MalformedEnvelope,
        Self::ReservedContext,
        Self::Unauthenticated,
        Self::ContextLimit,
        Self::Forbidden,
        Self::KekDenied,
        Self::KeyRevoked,
        Self::NotFound,
        Self::MethodNotAllowed,
        Self::Conflict,
        Self::KeyDestroyed,
        Self::TooLarge,
        Self::UnsupportedMediaType,
        Self::ContextMismatch,
        Self::CiphertextDamaged,
        Self::RateLimited,
        Self::InternalError,
        Self::KmsUnavailable,
        Self::StoreUnavailable,
        Self::IssuerUnavailable,
        Self::AuditUnavailable,
        Self::Overloaded,
        Self::DeadlineExceeded,
    ];

    #[expect(clippy::too_many_lines, reason = "a table: one row a code")]
    fn meaning(self) -> Meaning {
        use StatusCode as S;
        match self {
            Self::MalformedRequest => Meaning(
                "malformed_request",
                S::BAD_REQUEST,
                "The request is malformed",
                false,
                "unknown field `plain`, expected one of `plaintext`, `context`, `key`, `envelope` at line 1 column 8",
            ),
            Self::MalformedEnvelope => Meaning(
                "malformed_envelope",
                S::BAD_REQUEST,
                "The ciphertext is not a keyfold envelope",
                false,
                "the ciphertext is not a keyfold envelope: the text form of an envelope starts with kf1.",
            ),
            Self::ReservedContext => Meaning(
                "reserved_context",
                S::BAD_REQUEST,
                "A context name is reserved",
                false,
                "the context name \"keyfold:tenant\" is reserved: names that begin with \"keyfold:\" or \"aws\" are the service's",
            ),
            Self::Unauthenticated => Meaning(
                "unauthenticated",
                S::UNAUTHORIZED,
                "A valid credential is needed",
                false,
                "send a valid API key or token as Authorization: Bearer ..., or a client certificate that this service knows",
            ),
            Self::ContextLimit => Meaning(
                "context_limit",
                S::FORBIDDEN,
                "The key-bound context has too many values",
                false,
                "this tenant has data keys for 100 values of its key-bound context already, which is the limit \
                 (pool.tenant_bound_scopes_max): bind what has many values to the message instead",
            ),
            Self::Forbidden => Meaning(
                "forbidden",
                S::FORBIDDEN,
                "The credential does not allow this",
                false,
                "this credential is not granted the verb 'encrypt'",
            ),
            Self::KekDenied => Meaning(
                "kek_denied",
                S::FORBIDDEN,
                "The owner of the master key does not allow its use",
                false,
                "the KMS refuses the tenant's master key: its owner has disabled it, scheduled its deletion or withdrawn the permission",
            ),
            Self::KeyRevoked => Meaning(
                "key_revoked",
                S::FORBIDDEN,
                "The key is switched off",
                false,
                "the data key of this ciphertext is revoked; an administrator can restore it",
            ),
            Self::NotFound => Meaning(
                "not_found",
                S::NOT_FOUND,
                "There is no such thing",
                false,
                "no data key of this tenant opens this envelope",
            ),
            Self::MethodNotAllowed => Meaning(
                "method_not_allowed",
                S::METHOD_NOT_ALLOWED,
                "The method is not allowed here",
                false,
                "this path is served, but not with this method: see the Allow header",
            ),
            Self::Conflict => Meaning(
                "conflict",
                S::CONFLICT,
                "It collides with what is there",
                false,
                "there is a tenant 'acme' already",
            ),
            Self::KeyDestroyed => Meaning(
                "key_destroyed",
                S::GONE,
                "The key is destroyed for good",
                false,
                "the data key of this ciphertext is destroyed; it never comes back",
            ),
            Self::TooLarge => Meaning(
                "too_large",
                S::PAYLOAD_TOO_LARGE,
                "The request is too large",
                false,
                "the body is larger than the 65536 bytes that this call takes",
            ),
            Self::UnsupportedMediaType => Meaning(
                "unsupported_media_type",
                S::UNSUPPORTED_MEDIA_TYPE,
                "The media type is not supported",
                false,
                "send Content-Type: application/json",
            ),
            Self::ContextMismatch => Meaning(
                "context_mismatch",
                S::UNPROCESSABLE_ENTITY,
                "The ciphertext was not made with this context",
                false,
                "the ciphertext was not made with this context, or not for this tenant",
            ),
            Self::CiphertextDamaged => Meaning(
                "ciphertext_damaged",
                S::UNPROCESSABLE_ENTITY,
                "The ciphertext is damaged",
                false,
                "the ciphertext is damaged",
            ),
            Self::RateLimited => Meaning(
                "rate_limited",
                S::TOO_MANY_REQUESTS,
                "The quota is used up",
                true,
                "the quota tenant-requests is used up: try again in 1 s",
            ),
            Self::InternalError => Meaning(
                "internal_error",
                S::INTERNAL_SERVER_ERROR,
                "A fault of the service's own",
                false,
                "the service has logged this fault under the request id",
            ),
            Self::KmsUnavailable => Meaning(
                "kms_unavailable",
                S::SERVICE_UNAVAILABLE,
                "The KMS cannot be reached",
                true,
                "the KMS of the tenant's master key cannot be reached",
            ),
            Self::StoreUnavailable => Meaning(
                "store_unavailable",
                S::SERVICE_UNAVAILABLE,
                "The registry cannot be reached",
                true,
                "the registry of keys cannot be reached",
            ),
            Self::IssuerUnavailable => Meaning(
                "issuer_unavailable",
                S::SERVICE_UNAVAILABLE,
                "The token's issuer cannot be reached",
                true,
                "the keys of the token's issuer cannot be fetched, so the token cannot be checked",
            ),
            Self::AuditUnavailable => Meaning(
                "audit_unavailable",
                S::SERVICE_UNAVAILABLE,
                "The audit takes no record",
                true,
                "the audit takes no record at present, and what is not recorded is not done",
            ),
            Self::Overloaded => Meaning(
                "overloaded",
                S::SERVICE_UNAVAILABLE,
                "The service is overloaded",
                true,
                "more requests are in flight than the service takes at once",
            ),
            Self::DeadlineExceeded => Meaning(
                "deadline_exceeded",
                S::GATEWAY_TIMEOUT,
                "The request took too long",
                true,
                "the request was not finished within its time; what it had begun may have been done",
            ),
        }
    }

    /// The code as programs see it.
    pub fn name(self) -> &'static str {
        self.meaning().0
    }

    /// The status that goes with it.
    pub fn status(self) -> StatusCode {
        self.meaning().1
    }

    /// What is wrong, in a few words.
    pub fn title(self) -> &'static str {
        self.meaning().2
    }

    /// Whether the same request may succeed later.
    pub fn retryable(self) -> bool {
        self.meaning().3
    }

    /// An example of a detail, for the documentation.
    pub fn example(self) -> &'static str {
        self.meaning().4
    }
}

/// An error on its way to the client. It becomes a body when the request's id is known, at the outermost layer.
#[derive(Clone, Debug)]
pub struct Problem {
    /// What.
    pub code: Code,
    /// What is wrong and what to do, for the caller.
    pub detail: Cow<'static, str>,
    /// What only the operator's log may say.
    pub internal: Option<String>,
    /// After how long a retryable request is worth another try, in seconds.
    pub retry_after_secs: u64,
}

impl Problem {
    /// A problem with this explanation for the caller.
    pub fn new(code: Code, detail: impl Into<Cow<'static, str>>) -> Self {
        Self { code, detail: detail.into(), internal: None, retry_after_secs: 1 }
    }

    /// One whose details are the operator's business only; the caller reads the code's general explanation.
    pub fn internal(code: Code, internal: &(impl ToString + ?Sized)) -> Self {
        Self {
            code,
            detail: code.example().into(),
            internal: Some(internal.to_string()),
            retry_after_secs: 1,
        }
    }

    /// The response as the client sees it.
    pub fn render(&self, request_id: &str) -> Response {
        let body = ProblemBody {
            problem_type: format!("urn:keyfold:problem:{}", self.code.name()),
            title: self.code.title(),
            status: self.code.status().as_u16(),
            detail: &self.detail,
            code: self.code.name(),
            retryable: self.code.retryable(),
            request_id,
        };
        let bytes = serde_json::to_vec(&body).unwrap_or_default();
        let mut response = (self.code.status(), bytes).into_response();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        if self.code == Code::Unauthenticated {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if self.code.retryable() {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(self.retry_after_secs));
        }
        response
    }
}

/// The outermost layer turns this into a body: see [`Problem::render`].
impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let mut response = self.code.status().into_response();
        response.extensions_mut().insert(self);
        response
    }
}

/// A problem in the form of RFC 9457.
#[derive(Serialize, ToSchema)]
#[schema(as = Problem)]
pub struct ProblemBody<'a> {
    /// A URN that names the code.
    #[serde(rename = "type")]
    problem_type: String,
    /// What is wrong, in a few words; the same for every occurrence.
    title: &'a str,
    /// The HTTP status.
    status: u16,
    /// What is wrong this time, and what to do.
    detail: &'a str,
    /// A stable name for programs.
    code: &'a str,
    /// Whether the same request may succeed later.
    retryable: bool,
    /// Names this request in the service's log and audit.
    request_id: &'a str,
}

impl From<AuthenticationError> for Problem {
    fn from(error: AuthenticationError) -> Self {
        match error {
            AuthenticationError::Store(error) => error.into(),
            AuthenticationError::IssuerUnavailable(_) => Self::internal(Code::IssuerUnavailable, &error),
            // One answer for every reason: which of id, secret, expiry or revocation it was helps only a guesser.
            refused => Self {
                internal: Some(refused.to_string()),
                ..Self::new(Code::Unauthenticated, Code::Unauthenticated.example())
            },
        }
    }
}

impl From<Forbidden> for Problem {
    fn from(error: Forbidden) -> Self {
        Self::new(Code::Forbidden, error.to_string())
    }
}

impl From<StoreError> for Problem {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Unavailable(_) => Self::internal(Code::StoreUnavailable, &error),
            other => Self::internal(Code::InternalError, &other),
        }
    }
}

impl From<KmsError> for Problem {
    fn from(error: KmsError) -> Self {
        match error {
            KmsError::Outage { again_in, .. } => {
                // Whole seconds, and none too early.
                let retry_after_secs = again_in.map_or(1, |wait| wait.as_millis().div_ceil(1_000).max(1));
                let retry_after_secs = u64::try_from(retry_after_secs).unwrap_or(u64::MAX);
                Self { retry_after_secs, ..Self::internal(Code::KmsUnavailable, &error) }
            }
            KmsError::Denied { .. } => Self::internal(Code::KekDenied, &error),
            KmsError::Damaged { .. } => Self::internal(Code::ContextMismatch, &error),
        }
    }
}

impl From<PoolError> for Problem {
    fn from(error: PoolError) -> Self {
        match error {
            PoolError::Kms(error) => error.into(),
            PoolError::Store(error) => error.into(),
            // A credential that holds a tenant that is not there: to the caller it is one that he does not hold.
            PoolError::NoTenant => Forbidden::Tenant.into(),
            PoolError::NoKey(_) | PoolError::UnknownDek => Self::new(Code::NotFound, error.to_string()),
            PoolError::TenantDisabled | PoolError::KeyDisabled(_) => {
                Self::new(Code::KeyRevoked, error.to_string())
            }
            PoolError::Revoked => Self::new(Code::KeyRevoked, Code::KeyRevoked.example()),
            PoolError::Destroyed => Self::new(Code::KeyDestroyed, Code::KeyDestroyed.example()),
            PoolError::Disbelieved(_) => Self::internal(Code::ContextMismatch, &error),
            PoolError::TooLargeForKey(_) => Self::new(Code::TooLarge, error.to_string()),
            PoolError::KmsQuota(exceeded) => Self {
                retry_after_secs: exceeded.retry_after_secs,
                ..Self::new(Code::RateLimited, error.to_string())
            },
            PoolError::TooManyBoundScopes(_) => Self::new(Code::ContextLimit, error.to_string()),
            PoolError::Busy => Self::internal(Code::Overloaded, &error),
            PoolError::Internal(_) => Self::internal(Code::InternalError, &error),
        }
    }
}

impl From<OperationError> for Problem {
    fn from(error: OperationError) -> Self {
        let code = match error {
            OperationError::Forbidden(error) => return error.into(),
            OperationError::Pool(error) => return error.into(),
            OperationError::Store(error) => return error.into(),
            OperationError::Unrecorded(error) => return Self::internal(Code::AuditUnavailable, &error),
            OperationError::Transfer(ref error) => match error {
                TransferError::BrokenOff | TransferError::Gone => Code::MalformedRequest,
                TransferError::Idle(_) => Code::DeadlineExceeded,
                TransferError::TooLarge(_) => Code::TooLarge,
            },
            OperationError::Internal(detail) => return Self::internal(Code::InternalError, detail),
            OperationError::Invalid(_) | OperationError::Context(_) => Code::MalformedRequest,
            OperationError::ReservedContext(_) | OperationError::ServiceContext(_) => Code::ReservedContext,
            OperationError::Malformed(_) => Code::MalformedEnvelope,
            OperationError::ContextMismatch => Code::ContextMismatch,
            OperationError::Damaged => Code::CiphertextDamaged,
            OperationError::NotFound(_) => Code::NotFound,
            OperationError::Conflict(_) => Code::Conflict,
            OperationError::Seal(_) | OperationError::TooLarge(_) => Code::TooLarge,
        };
        Self::new(code, error.to_string())
    }
}
