//! What every request passes on its way to a handler, in this order: how many are in flight, how long it may take, how
//! large its body may be, who sends it, and under which circumstances.
//!
//! One layer and not five: a layer boxes what is below it, and copies the boxes for every request.

use std::convert::Infallible;
use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::extract::Request;
use axum::response::{IntoResponse, Response};
use tokio::time::error::Elapsed;
use tower::{Layer, Service};

use super::admission::{Admission, Place};
use super::authenticate::{Caller, authenticate};
use super::context::{ContextRules, circumstances, source};
use super::edge::{Called, request_id};
use crate::access::Access;
use crate::audit::Stranger;
use crate::http::bulk::is_streamed;
use crate::http::problem::{Code, Problem};
use crate::operations::Operations;

/// The limits of one route, and who watches over them.
pub(in crate::http) struct Gate {
    /// The route's template.
    pub(in crate::http) route: Arc<str>,
    /// Not for health: it is answered however many requests are in flight. A busy service is not a dead one.
    pub(in crate::http) admission: Option<Arc<Admission>>,
    /// Whether the places are shared by principals; where not, by tenants, once a call's is known.
    pub(in crate::http) by_principal: bool,
    /// How long a request may take, its body included.
    pub(in crate::http) time_max: Duration,
    /// Whether it also takes bodies that are streamed: they have an idle time of their own instead.
    pub(in crate::http) streams: bool,
    pub(in crate::http) body_bytes_max: usize,
    /// Who knows the callers; none where everybody may come in.
    pub(in crate::http) access: Option<Arc<Access>>,
    /// What of a request goes into its encryption context.
    pub(in crate::http) rules: ContextRules,
    /// Who records what is refused before any verb takes it over, where that is wanted.
    pub(in crate::http) recorder: Option<Arc<Operations>>,
}

/// What the gate has found out about a request, for what stands behind it.
pub(in crate::http) struct Passed {
    /// Whose place it is shows when the permit is given.
    pub(in crate::http) place: Option<Place>,
    pub(in crate::http) body_bytes_max: usize,
    /// Every route with a guard has one.
    pub(in crate::http) caller: Option<Caller>,
    /// None where there are none.
    pub(in crate::http) rules: Option<ContextRules>,
}

/// Puts a gate in front of a service.
#[derive(Clone)]
pub(in crate::http) struct GateLayer(pub(in crate::http) Arc<Gate>);

impl GateLayer {
    /// The answer to a request that passes the gate before `next` gets it.
    pub(in crate::http) fn before<N, F>(&self, request: Request, next: N) -> GatedFuture
    where
        N: FnOnce(Request) -> F + Send + 'static,
        F: Future<Output = Response> + Send,
    {
        let gate = Arc::clone(&self.0);
        Box::pin(async move { Ok(gate.let_in(request, next).await) })
    }
}

impl<S> Layer<S> for GateLayer {
    type Service = Gated<S>;

    fn layer(&self, inner: S) -> Gated<S> {
        Gated { inner, layer: self.clone() }
    }
}

/// The answer of what is behind a gate.
pub(in crate::http) type GatedFuture = Pin<Box<dyn Future<Output = Result<Response, Infallible>> + Send>>;

#[derive(Clone)]
pub(in crate::http) struct Gated<S> {
    inner: S,
    layer: GateLayer,
}

impl<S> Service<Request> for Gated<S>
where
    S: Service<Request, Response = Response, Error = Infallible, Future: Send> + Clone + Send + 'static,
{
    type Response = Response;
    type Error = Infallible;
    type Future = GatedFuture;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request) -> Self::Future {
        // The one that was found ready is the one that is called.
        let next = self.inner.clone();
        let mut inner = std::mem::replace(&mut self.inner, next);
        self.layer.before(request, move |request| async move {
            let Ok(response) = inner.call(request).await;
            response
        })
    }
}

impl Gate {
    async fn let_in<N, F>(&self, request: Request, next: N) -> Response
    where
        N: FnOnce(Request) -> F,
        F: Future<Output = Response>,
    {
        let place = match self.admission.as_ref().map(Admission::enter).transpose() {
            Ok(place) => place,
            Err(problem) => return problem.into_response(),
        };
        let unhurried = self.streams && is_streamed(request.headers());
        let mut inside = pin!(self.find_out(place, request, next));
        if unhurried {
            return inside.await;
        }
        match in_time(self.time_max, inside.as_mut()).await {
            Ok(response) => response,
            Err(_) => Problem::new(Code::DeadlineExceeded, Code::DeadlineExceeded.example()).into_response(),
        }
    }

    async fn find_out<N, F>(&self, place: Option<Place>, mut request: Request, next: N) -> Response
    where
        N: FnOnce(Request) -> F,
        F: Future<Output = Response>,
    {
        let (mut caller, mut allowed) = (None, Ok(()));
        // Before the body is read.
        if let Some(access) = &self.access {
            let principal = match authenticate(access, request.headers(), request.extensions()).await {
                Ok(principal) => principal,
                Err(problem) => return self.turn_away(&request, problem),
            };
            if self.by_principal
                && let Some(place) = &place
            {
                allowed = place.belongs_to(principal.id());
            }
            let mut found = None;
            if self.recorder.is_some() || !self.rules.is_empty() {
                let (circumstances, outcome) = circumstances(&self.rules, &principal, &request);
                (found, allowed) = (Some(circumstances), allowed.and(outcome));
            }
            caller = Some(Caller(principal, found));
        }
        // The place is given back when all is done, the record too.
        let rules = (!self.rules.is_empty()).then(|| self.rules.clone());
        let passed = Arc::new(Passed { place, body_bytes_max: self.body_bytes_max, caller, rules });
        let record = self.recorder.as_ref().zip(passed.caller.as_ref());
        let record =
            record.map(|(recorder, caller)| Unfinished { recorder, called: self.called(&request), caller });
        let response = match allowed {
            Ok(()) => {
                request.extensions_mut().insert(Arc::clone(&passed));
                next(request).await
            }
            Err(problem) => problem.into_response(),
        };
        match record {
            Some(record) => record.finish(response).await,
            None => response,
        }
    }

    fn called(&self, request: &Request) -> Called {
        Called { method: request.method().clone(), route: Some(Arc::clone(&self.route)) }
    }

    fn turn_away(&self, request: &Request, problem: Problem) -> Response {
        if let Some(recorder) = &self.recorder {
            let route = self.called(request).to_string();
            let request_id = request_id(request.headers());
            let reason = problem.internal.as_deref().unwrap_or(&problem.detail);
            let stranger = Stranger { request_id, source: source(request.extensions()), reason };
            recorder.record_stranger(&route, stranger, problem.code.name());
        }
        problem.into_response()
    }
}

/// A call that is to be recorded here where no verb takes it over.
struct Unfinished<'a> {
    recorder: &'a Arc<Operations>,
    called: Called,
    caller: &'a Caller,
}

impl Unfinished<'_> {
    async fn finish(self, response: Response) -> Response {
        let Caller(principal, Some(circumstances)) = self.caller else { return response };
        let problem = response.extensions().get::<Problem>();
        let Some(problem) = problem.filter(|_| !circumstances.is_taken_over()) else { return response };
        let (route, who) = (self.called.to_string(), circumstances.who(principal));
        match self.recorder.record_refusal(&route, who, problem.code.name()).await {
            Ok(()) => response,
            Err(error) => Problem::from(error).into_response(),
        }
    }
}

/// What `future` comes to, or nothing where it takes longer. Most requests are answered without having to wait, and pay
/// for no timer.
async fn in_time<F: Future>(time_max: Duration, mut future: Pin<&mut F>) -> Result<F::Output, Elapsed> {
    if let Poll::Ready(output) = poll_fn(|context| Poll::Ready(future.as_mut().poll(context))).await {
        return Ok(output);
    }
    tokio::time::timeout(time_max, future).await
}
