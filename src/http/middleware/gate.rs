//! What every request passes on its way to a handler, in this order: how many are in flight, how long it may take, how
//! large its body may be, who sends it.
//!
//! One layer and not four: a layer boxes what is below it, and copies the boxes for every request.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::admission::Admission;
use super::authenticate::authenticate;
use super::context::source;
use super::edge::{request_id, route};
use crate::access::Access;
use crate::audit::Stranger;
use crate::http::bulk::is_streamed;
use crate::http::handlers::BodyBytesMax;
use crate::http::problem::{Code, Problem};
use crate::operations::Operations;

/// The limits of one route, and who watches over them.
pub(in crate::http) struct Gate {
    /// Not for health: it is answered however many requests are in flight. A busy service is not a dead one.
    pub(in crate::http) admission: Option<Arc<Admission>>,
    /// How long a request may take, its body included.
    pub(in crate::http) time_max: Duration,
    /// Whether it also takes bodies that are streamed: they have an idle time of their own instead.
    pub(in crate::http) streams: bool,
    pub(in crate::http) body_bytes_max: usize,
    /// Who knows the callers; none where everybody may come in.
    pub(in crate::http) access: Option<Arc<Access>>,
    /// Who records that somebody was turned away, where that is wanted.
    pub(in crate::http) recorder: Option<Arc<Operations>>,
}

pub(in crate::http) async fn gate(
    State(gate): State<Arc<Gate>>,
    mut request: Request,
    next: Next,
) -> Response {
    let place = match gate.admission.as_ref().map(Admission::enter).transpose() {
        Ok(place) => place.map(Arc::new),
        Err(problem) => return problem.into_response(),
    };
    // Whose place it is shows when the permit is given.
    if let Some(place) = &place {
        request.extensions_mut().insert(Arc::clone(place));
    }
    let unhurried = gate.streams && is_streamed(request.headers());
    let inside = enter(&gate, request, next);
    if unhurried {
        return inside.await;
    }
    match tokio::time::timeout(gate.time_max, inside).await {
        Ok(response) => response,
        Err(_) => Problem::new(Code::DeadlineExceeded, Code::DeadlineExceeded.example()).into_response(),
    }
}

async fn enter(gate: &Gate, mut request: Request, next: Next) -> Response {
    request.extensions_mut().insert(BodyBytesMax(gate.body_bytes_max));
    // Before the body is read.
    if let Some(access) = &gate.access
        && let Err(problem) = authenticate(access, &mut request).await
    {
        if let Some(recorder) = &gate.recorder {
            let route = route(&request);
            let request_id = request_id(request.headers());
            let reason = problem.internal.as_deref().unwrap_or(&problem.detail);
            let stranger = Stranger { request_id, source: source(request.extensions()), reason };
            recorder.record_stranger(&route, stranger, problem.code.name());
        }
        return problem.into_response();
    }
    next.run(request).await
}
