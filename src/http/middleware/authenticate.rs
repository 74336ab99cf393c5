//! Who is calling: before the body is read.

use std::sync::Arc;

use axum::extract::Request;
use http::{HeaderMap, header};

use crate::access::{Access, AuthenticationError, Circumstances, Principal};
use crate::http::problem::Problem;

/// The authenticated caller, for the handlers, and the circumstances of his call where they are wanted.
#[derive(Clone)]
pub(in crate::http) struct Caller(
    pub(in crate::http) Arc<Principal>,
    pub(in crate::http) Option<Arc<Circumstances>>,
);

/// Puts the [`Caller`] into the request.
pub(in crate::http) async fn authenticate(access: &Access, request: &mut Request) -> Result<(), Problem> {
    let principal = access.authenticate(bearer(request.headers())?).await?;
    request.extensions_mut().insert(Caller(principal, None));
    Ok(())
}

/// The one bearer token. Two `Authorization` headers are refused: which of them counts is what an attacker would
/// like to choose.
fn bearer(headers: &HeaderMap) -> Result<&str, AuthenticationError> {
    let mut values = headers.get_all(header::AUTHORIZATION).iter();
    let value = values.next().ok_or(AuthenticationError::Missing)?;
    if values.next().is_some() {
        return Err(AuthenticationError::Malformed);
    }
    let text = value.to_str().map_err(|_| AuthenticationError::Malformed)?;
    let (scheme, token) = text.split_once(' ').ok_or(AuthenticationError::Malformed)?;
    if scheme.eq_ignore_ascii_case("bearer") { Ok(token) } else { Err(AuthenticationError::Malformed) }
}
