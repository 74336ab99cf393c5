//! How long a request may take, its body included. A body that is streamed has an idle time of its own instead.

use std::time::Duration;

use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use crate::http::bulk::is_streamed;
use crate::http::problem::{Code, Problem};

pub(in crate::http) async fn deadline(
    State((time_max, streams)): State<(Duration, bool)>,
    request: Request,
    next: Next,
) -> Response {
    if streams && is_streamed(request.headers()) {
        return next.run(request).await;
    }
    match tokio::time::timeout(time_max, next.run(request)).await {
        Ok(response) => response,
        Err(_) => Problem::new(Code::DeadlineExceeded, Code::DeadlineExceeded.example()).into_response(),
    }
}
