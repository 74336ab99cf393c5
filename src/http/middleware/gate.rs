//! What every request passes on its way to a handler, in this order: how many are in flight, how long it may take, how
//! large its body may be, who sends it, and under which circumstances.
//!
//! One layer and not five: a layer boxes what is below it, and copies the boxes for every request.

use std::convert::Infallible;
use std::future::ready;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::extract::Request;
use axum::response::{IntoResponse, Response};
use pin_project_lite::pin_project;
use smol_str::SmolStr;
use tokio::task::coop::unconstrained;
use tokio::time::Sleep;
use tower::{Layer, Service};

use super::admission::{Admission, Place};
use super::authenticate::{Caller, authenticate};
use super::context::{ContextRules, circumstances};
use super::edge::{Arrival, Called};
use crate::access::Access;
use crate::audit::Stranger;
use crate::http::bulk::is_streamed;
use crate::http::problem::{Code, Problem};
use crate::operations::Operations;
use crate::spread::{Near, Spread};

/// The limits of one route, and who watches over them.
pub(in crate::http) struct Gate {
    /// The route's template.
    pub(in crate::http) route: SmolStr,
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
pub(in crate::http) struct GateLayer(Arc<Spread<Gate>>);

impl GateLayer {
    pub(in crate::http) fn new(gate: Gate) -> Self {
        Self(Arc::new(Spread::new(gate)))
    }

    /// The answer to a request that passes the gate before `next` gets it, and what the gate has found out about it.
    pub(in crate::http) fn before<N, F>(&self, request: Request, arrival: Arrival, next: N) -> GatedFuture
    where
        N: FnOnce(Request, Arc<Passed>) -> F + Send + 'static,
        F: Future<Output: IntoResponse> + Send + 'static,
    {
        let gate = self.0.near();
        let place = match gate.admission.as_deref().map(Admission::enter).transpose() {
            Ok(place) => place,
            Err(problem) => return Box::pin(ready(Ok(problem.into_response()))),
        };
        let unhurried = gate.streams && is_streamed(request.headers());
        let time_max = (!unhurried).then_some(gate.time_max);
        Box::pin(InTime { time_max, answer: gate.let_in(place, request, arrival, next), timer: None })
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
        let arrival = Arrival::of(&request);
        self.layer.before(request, arrival, move |mut request, passed| {
            request.extensions_mut().insert(passed);
            inner.call(request)
        })
    }
}

impl Gate {
    #[expect(
        clippy::manual_async_fn,
        reason = "the future of an `async fn` holds what it is given twice, and the request is large"
    )]
    fn let_in<N, F>(
        self: Near<Self>,
        place: Option<Place>,
        request: Request,
        arrival: Arrival,
        next: N,
    ) -> impl Future<Output = Response> + Send
    where
        N: FnOnce(Request, Arc<Passed>) -> F + Send,
        F: Future<Output: IntoResponse> + Send,
    {
        async move {
            let (mut caller, mut allowed) = (None, Ok(()));
            // Before the body is read.
            if let Some(access) = &self.access {
                let principal = match authenticate(access, request.headers(), request.extensions()).await {
                    Ok(principal) => principal,
                    Err(problem) => return self.turn_away(&request, &arrival, problem),
                };
                if self.by_principal
                    && let Some(place) = &place
                {
                    allowed = place.belongs_to(principal.id());
                }
                let mut found = None;
                if self.recorder.is_some() || !self.rules.is_empty() {
                    let (circumstances, outcome) =
                        circumstances(&self.rules, &principal, request.headers(), &arrival);
                    (found, allowed) = (Some(circumstances), allowed.and(outcome));
                }
                caller = Some(Caller(principal, found));
            }
            // The place is given back when all is done, the record too.
            let rules = (!self.rules.is_empty()).then(|| self.rules.clone());
            let passed = Arc::new(Passed { place, body_bytes_max: self.body_bytes_max, caller, rules });
            let record = self.recorder.as_ref().zip(passed.caller.as_ref());
            let record = record.map(|(recorder, caller)| Unfinished {
                recorder,
                called: self.called(&request),
                caller,
            });
            let response = match allowed {
                Ok(()) => next(request, Arc::clone(&passed)).await.into_response(),
                Err(problem) => problem.into_response(),
            };
            match record.and_then(|record| Some((record.due(&response)?, record))) {
                // Boxed, because it is rare: every call would carry its room.
                Some((code, record)) => Box::pin(record.finish(code, response)).await,
                None => response,
            }
        }
    }

    fn called(&self, request: &Request) -> Called {
        Called { method: request.method().clone(), route: Some(self.route.clone()) }
    }

    fn turn_away(&self, request: &Request, arrival: &Arrival, problem: Problem) -> Response {
        if let Some(recorder) = &self.recorder {
            let route = self.called(request).to_string();
            let reason = problem.internal.as_deref().unwrap_or(&problem.detail);
            let stranger = Stranger { request_id: &arrival.id, source: arrival.source, reason };
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
    /// With which code it was refused, where that is to be recorded.
    fn due(&self, response: &Response) -> Option<&'static str> {
        let problem = response.extensions().get::<Problem>()?;
        let taken_over = self.caller.1.as_ref().is_none_or(|circumstances| circumstances.is_taken_over());
        (!taken_over).then(|| problem.code.name())
    }

    async fn finish(self, code: &'static str, response: Response) -> Response {
        let Caller(principal, Some(circumstances)) = self.caller else { return response };
        let (route, who) = (self.called.to_string(), circumstances.who(principal));
        match self.recorder.record_refusal(&route, who, code).await {
            Ok(()) => response,
            Err(error) => Problem::from(error).into_response(),
        }
    }
}

pin_project! {
    /// An answer, or that it was not there in time. Most requests are answered without having to wait, and pay for no
    /// timer.
    struct InTime<F> {
        #[pin]
        answer: F,
        // None where it may take as long as it takes.
        time_max: Option<Duration>,
        #[pin]
        timer: Option<Sleep>,
    }
}

impl<F: Future<Output = Response>> Future for InTime<F> {
    type Output = Result<Response, Infallible>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let mut this = self.project();
        if let Poll::Ready(response) = this.answer.poll(context) {
            return Poll::Ready(Ok(response));
        }
        let Some(time_max) = *this.time_max else { return Poll::Pending };
        if this.timer.is_none() {
            this.timer.set(Some(tokio::time::sleep(time_max)));
        }
        if let Some(timer) = this.timer.as_pin_mut() {
            // Even where the answer has used up the task's turn each time.
            ready!(pin!(unconstrained(timer)).poll(context));
        }
        Poll::Ready(
            Ok(Problem::new(Code::DeadlineExceeded, Code::DeadlineExceeded.example()).into_response()),
        )
    }
}
