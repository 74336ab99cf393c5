//! Who is calling: before the body is read.

use std::sync::Arc;

use axum_server::tls::TlsInfo;
use http::{Extensions, HeaderMap, header};

use crate::access::{Access, AuthenticationError, Circumstances, Presented, Principal};
use crate::http::problem::Problem;
use crate::spread::Near;

/// What a bearer token follows (RFC 6750 section 2.1), in whatever case.
const SCHEME: &[u8] = b"bearer ";

/// The authenticated caller, for the handlers, and the circumstances of his call where they are wanted.
#[derive(Clone)]
pub(in crate::http) struct Caller(
    pub(in crate::http) Near<Principal>,
    pub(in crate::http) Option<Arc<Circumstances>>,
);

/// Finds out who sends the request with these.
pub(super) async fn authenticate(
    access: &Access,
    headers: &HeaderMap,
    extensions: &Extensions,
) -> Result<Near<Principal>, Problem> {
    let bearer = bearer(headers)?;
    let connection = extensions.get::<Arc<TlsInfo>>();
    let certificates = connection.map_or(&[][..], |connection| &connection.peer_certificates);
    Ok(access.authenticate(Presented { bearer, certificates }).await?)
}

/// The bearer token, where there is one. Two `Authorization` headers are refused: which of them counts is what an
/// attacker would like to choose. So is a header that is no bearer token, even where a client certificate would do.
fn bearer(headers: &HeaderMap) -> Result<Option<&str>, AuthenticationError> {
    let mut values = headers.get_all(header::AUTHORIZATION).iter();
    let Some(value) = values.next() else { return Ok(None) };
    if values.next().is_some() {
        return Err(AuthenticationError::Malformed);
    }
    let (scheme, token) =
        value.as_bytes().split_at_checked(SCHEME.len()).ok_or(AuthenticationError::Malformed)?;
    if !scheme.eq_ignore_ascii_case(SCHEME) || !token.is_ascii() {
        return Err(AuthenticationError::Malformed);
    }
    std::str::from_utf8(token).map(Some).map_err(|_| AuthenticationError::Malformed)
}
