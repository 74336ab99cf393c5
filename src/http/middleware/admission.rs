//! How many requests are in flight at once: past the limit they are told so at once, instead of waiting in memory.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use crate::http::problem::{Code, Problem};

/// Counts the requests in flight.
pub(in crate::http) struct Admission {
    in_flight: AtomicUsize,
    in_flight_max: usize,
}

impl Admission {
    pub(in crate::http) fn new(in_flight_max: usize) -> Self {
        Self { in_flight: AtomicUsize::new(0), in_flight_max }
    }
}

/// Takes one off when the request ends, however it ends.
struct Leaving(Arc<Admission>);

impl Drop for Leaving {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::AcqRel);
    }
}

pub(in crate::http) async fn admit(
    State(admission): State<Arc<Admission>>,
    request: Request,
    next: Next,
) -> Response {
    let before = admission.in_flight.fetch_add(1, Ordering::AcqRel);
    let _leaving = Leaving(Arc::clone(&admission));
    if before >= admission.in_flight_max {
        return Problem::new(Code::Overloaded, Code::Overloaded.example()).into_response();
    }
    next.run(request).await
}
