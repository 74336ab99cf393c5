//! What the listeners serve: the router, and before it the few calls that are made most.
//!
//! A router must be able to take any route: for every request it copies a boxed service, boxes its future once for each
//! thing that is around it, and keeps a list of the path's parameters. A call that is found by its whole path needs none
//! of that, and passes the same layers.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use axum::Router;
use axum::body::{Body, Bytes, HttpBody};
use axum::extract::Request;
use axum::handler::Handler;
use axum::response::Response;
use axum::routing::future::RouteFuture;
use http::Method;
use pin_project_lite::pin_project;
use tower::Service;

use super::HttpState;
use super::middleware::edge::{EdgeFuture, EdgeLayer};
use super::middleware::gate::{GateLayer, GatedFuture};

type State = Arc<HttpState>;

/// The whole service.
#[derive(Clone)]
pub struct Front {
    frequent: Arc<[Frequent]>,
    router: Router,
}

/// A call that is made so often that it is looked for before all others: `POST` to exactly this path.
pub(super) struct Frequent {
    path: Arc<str>,
    answer: Box<dyn Fn(Request) -> EdgeFuture<GatedFuture> + Send + Sync>,
}

impl Frequent {
    /// This handler, within the layers of its route.
    pub(super) fn new<H, T>(
        path: Arc<str>,
        edge: EdgeLayer,
        gate: GateLayer,
        handler: H,
        state: State,
    ) -> Self
    where
        H: Handler<T, State> + Sync,
    {
        let answer = move |request| {
            let (handler, state) = (handler.clone(), Arc::clone(&state));
            edge.around(request, |request| gate.before(request, |request| handler.call(request, state)))
        };
        Self { path, answer: Box::new(answer) }
    }
}

impl Front {
    pub(super) fn new(frequent: Vec<Frequent>, router: Router) -> Self {
        Self { frequent: frequent.into(), router }
    }
}

impl From<Router> for Front {
    fn from(router: Router) -> Self {
        Self::new(Vec::new(), router)
    }
}

impl<B> Service<http::Request<B>> for Front
where
    B: HttpBody<Data = Bytes, Error: Into<axum::BoxError>> + Send + 'static,
{
    type Response = Response;
    type Error = Infallible;
    type Future = FrontFuture;

    fn poll_ready(&mut self, _context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        // Neither a router nor a handler is ever busy: what there is too much of is refused within.
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<B>) -> FrontFuture {
        let path = request.uri().path();
        let frequent = self.frequent.iter().find(|frequent| *frequent.path == *path);
        let answering = match frequent.filter(|_| request.method() == Method::POST) {
            Some(frequent) => Answering::Frequent { future: (frequent.answer)(request.map(Body::new)) },
            None => Answering::Routed { future: self.router.call(request) },
        };
        FrontFuture { answering }
    }
}

pin_project! {
    /// The answer.
    pub struct FrontFuture {
        #[pin]
        answering: Answering,
    }
}

pin_project! {
    #[project = Projected]
    enum Answering {
        Frequent { #[pin] future: EdgeFuture<GatedFuture> },
        Routed { #[pin] future: RouteFuture<Infallible> },
    }
}

impl Future for FrontFuture {
    type Output = Result<Response, Infallible>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        match self.project().answering.project() {
            Projected::Frequent { future } => future.poll(context),
            Projected::Routed { future } => future.poll(context),
        }
    }
}
