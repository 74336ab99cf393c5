//! The JSON 1.1 protocol of AWS KMS.

use axum::body::Body;
use axum::response::Response;
use http::header::CONTENT_TYPE;
use http::{HeaderMap, HeaderValue, StatusCode};
use serde_json::{Value, json};
use uuid::Uuid;

use super::wire::WireControl;
use super::{Shared, faulty};
use crate::error::KmsError;

const JSON_1_1: HeaderValue = HeaderValue::from_static("application/x-amz-json-1.1");

pub(super) async fn serve(
    shared: &Shared,
    wire: &WireControl,
    headers: &HeaderMap,
    target: &HeaderValue,
    body: &[u8],
) -> Response {
    let Some(operation) = target.to_str().ok().and_then(|target| target.strip_prefix("TrentService.")) else {
        return unknown_operation();
    };
    let caller = match shared.engine.identify(headers, "kms") {
        Ok(caller) => caller,
        Err(error) => return render(Err(faulty::refused(shared, operation, error))),
    };
    let body: Value = match body {
        [] => json!({}),
        body => match serde_json::from_slice(body) {
            Ok(body) => body,
            Err(error) => {
                let error = KmsError::serialization(error.to_string());
                return render(Err(faulty::refused(shared, operation, error)));
            }
        },
    };
    let arrival = shared.engine.arrival(&caller, operation, &body);
    faulty::run(shared, wire, arrival, || shared.engine.execute(&caller, operation, body), render).await
}

pub(super) fn unknown_operation() -> Response {
    render(Err(KmsError::unknown_operation()))
}

/// An answer, or an error with its type in the body (where SDKs look) and in a header (where tools look).
fn render(result: Result<Value, KmsError>) -> Response {
    let (status, body, error_type) = match result {
        Ok(answer) => (StatusCode::OK, answer, None),
        Err(error) => {
            let mut body = json!({"__type": error.code()});
            if let Some(message) = error.message() {
                body["message"] = message.into();
            }
            let status = StatusCode::from_u16(error.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
            (status, body, Some(HeaderValue::from_static(error.code())))
        }
    };
    // AWS answers operations without a result with no body at all.
    let is_empty = body.as_object().is_some_and(serde_json::Map::is_empty);
    let mut response = Response::new(if is_empty { Body::empty() } else { Body::from(body.to_string()) });
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, JSON_1_1);
    if let Some(error_type) = error_type {
        headers.insert("x-amzn-errortype", error_type);
    }
    if let Ok(id) = HeaderValue::from_str(&Uuid::new_v4().to_string()) {
        headers.insert("x-amzn-requestid", id);
    }
    response
}
