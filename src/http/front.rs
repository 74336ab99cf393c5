//! What the listeners serve: the router, and before it the few calls that are made most.
//!
//! A router must be able to take any route: for every request it copies a boxed service, boxes its future once for each
//! thing that is around it, and keeps a list of the path's parameters. A call that is found by its whole path needs none
//! of that, and passes the same layers.

use std::convert::Infallible;
use std::future::ready;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use axum::Router;
use axum::body::{Body, Bytes, HttpBody};
use axum::extract::Request;
use axum::response::Response;
use axum::routing::future::RouteFuture;
use http::Method;
use pin_project_lite::pin_project;
use smol_str::SmolStr;
use tokio_util::either::Either;
use tower::Service;

use super::handlers::{Bounds, permit};
use super::middleware::edge::{EdgeFuture, EdgeLayer};
use super::middleware::gate::{GateLayer, GatedFuture};
use super::problem::Problem;
use super::source::Source;
use super::{HttpState, SharedState};
use crate::access::{Permit, PermitVerb};
use crate::spread::Spread;

/// The whole service, as it serves one connection.
#[derive(Clone)]
pub struct Front(Arc<OfConnection>);

// Every request of the connection is one more that holds it: that is counted apart from those of other connections.
#[repr(align(128))]
struct OfConnection {
    routes: Arc<Routes>,
    /// Whose the connection is; none on a unix socket.
    peer: Option<IpAddr>,
}

struct Routes {
    frequent: Vec<Frequent>,
    router: Router,
}

/// A call that is made so often that it is looked for before all others: `POST` to exactly this path.
pub(super) struct Frequent {
    path: SmolStr,
    answer: Box<dyn Fn(Request, Option<IpAddr>) -> EdgeFuture<GatedFuture> + Send + Sync>,
}

impl Frequent {
    /// What makes the answer, within the layers of its route.
    pub(super) fn new<V, C, F>(
        path: SmolStr,
        edge: EdgeLayer,
        gate: GateLayer,
        state: Arc<Spread<HttpState>>,
        call: C,
    ) -> Self
    where
        V: PermitVerb,
        C: Fn(SharedState, Permit<V>, Bounds, Request) -> F + Copy + Send + Sync + 'static,
        F: Future<Output = Result<Response, Problem>> + Send + 'static,
    {
        let answer = move |request, peer| {
            let state = state.near();
            edge.around(request, peer, |request, arrival| {
                gate.before(request, arrival, move |request, passed| {
                    let bounds = Bounds::within(&passed);
                    match permit(&passed, request.headers(), None) {
                        Ok(permit) => Either::Left(call(state, permit, bounds, request)),
                        Err(problem) => Either::Right(ready(Err(problem))),
                    }
                })
            })
        };
        Self { path, answer: Box::new(answer) }
    }
}

impl Front {
    pub(super) fn new(frequent: Vec<Frequent>, router: Router) -> Self {
        Self(Arc::new(OfConnection { routes: Arc::new(Routes { frequent, router }), peer: None }))
    }

    /// The same for a connection of this peer.
    #[must_use]
    pub(super) fn of_peer(&self, peer: Option<IpAddr>) -> Self {
        let (routes, peer) = (Arc::clone(&self.0.routes), peer.map(|peer| peer.to_canonical()));
        Self(Arc::new(OfConnection { routes, peer }))
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

    fn call(&mut self, mut request: http::Request<B>) -> FrontFuture {
        // A load balancer's word for the whole connection is there before.
        let source = Source::of(request.extensions()).or(self.0.peer);
        let path = request.uri().path();
        let frequent = self.0.routes.frequent.iter().find(|frequent| *frequent.path == *path);
        let answering = if let Some(frequent) = frequent.filter(|_| request.method() == Method::POST) {
            Answering::Frequent { future: (frequent.answer)(request.map(Body::new), source) }
        } else {
            if let Some(source) = source {
                request.extensions_mut().insert(Source(source));
            }
            Answering::Routed { future: self.0.routes.router.clone().call(request) }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ipv4_peer_of_an_ipv6_socket_is_an_ipv4_peer() {
        for (peer, expected) in
            [("::ffff:192.0.2.7", "192.0.2.7"), ("192.0.2.7", "192.0.2.7"), ("::1", "::1")]
        {
            let front = Front::from(Router::new()).of_peer(Some(peer.parse().unwrap()));
            assert_eq!(front.0.peer, Some(expected.parse().unwrap()));
        }
    }
}
