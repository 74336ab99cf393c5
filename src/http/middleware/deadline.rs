//! How long a request may take, its body included.

use std::time::Duration;

use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use crate::http::problem::{Code, Problem};

pub(in crate::http) async fn deadline(
    State(time_max): State<Duration>,
    request: Request,
    next: Next,
) -> Response {
    match tokio::time::timeout(time_max, next.run(request)).await {
        Ok(response) => response,
        Err(_) => Problem::new(Code::DeadlineExceeded, Code::DeadlineExceeded.example()).into_response(),
    }
}
