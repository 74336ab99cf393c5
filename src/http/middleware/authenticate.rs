//! Who is calling: before the body is read.

use std::sync::Arc;

use axum_server::tls::TlsInfo;
use http::{Extensions, HeaderMap, header};

use crate::access::{Access, AuthenticationError, Circumstances, Presented, Principal};
use crate::http::problem::Problem;

/// The authenticated caller, for the handlers, and the circumstances of his call where they are wanted.
#[derive(Clone)]
pub(in crate::http) struct Caller(
    pub(in crate::http) Arc<Principal>,
    pub(in crate::http) Option<Arc<Circumstances>>,
);

/// Finds out who sends the request with these.
pub(super) async fn authenticate(
    access: &Access,
    headers: &HeaderMap,
    extensions: &Extensions,
) -> Result<Arc<Principal>, Problem> {
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
    let text = value.to_str().map_err(|_| AuthenticationError::Malformed)?;
    let (scheme, token) = text.split_once(' ').ok_or(AuthenticationError::Malformed)?;
    if scheme.eq_ignore_ascii_case("bearer") { Ok(Some(token)) } else { Err(AuthenticationError::Malformed) }
}
