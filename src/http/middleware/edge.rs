//! The outermost layer: gives the request its id, makes a panic a problem, turns a problem into its body, and logs what
//! went wrong, once.
//!
//! A service with a future of its own: a function as a layer boxes what is below it and its future for every request,
//! and so does tower-http's CatchPanic with every body.

use std::convert::Infallible;
use std::fmt;
use std::net::IpAddr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};

use axum::extract::Request;
use axum::response::{IntoResponse, Response};
use http::{HeaderName, HeaderValue, Method};
use pin_project_lite::pin_project;
use smol_str::SmolStr;
use tower::{Layer, Service};

use crate::access::RequestId;
use crate::http::problem::{Code, Problem};
use crate::http::source::{Proxies, Source};
use crate::spread::{Apart, here, places};

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// What the layer needs.
pub(in crate::http) struct Outermost {
    ids: RequestIds,
    proxies: Arc<Proxies>,
    /// Whether inner layers read the ids.
    ids_are_read: bool,
}

impl Outermost {
    pub(in crate::http) fn new(proxies: Arc<Proxies>, ids_are_read: bool) -> Self {
        Self { ids: RequestIds::new(), proxies, ids_are_read }
    }
}

/// Names requests: a random part for the process, and a number.
struct RequestIds {
    process: [u8; PROCESS_DIGITS],
    /// How many each place has given. The numbers go round the places: each has one of every round.
    given: Box<[Apart<AtomicU64>]>,
}

const PROCESS_DIGITS: usize = 16;

impl RequestIds {
    fn new() -> Self {
        let mut process = [0; PROCESS_DIGITS];
        // Without randomness requests are still told apart within the process.
        write_hex(getrandom::u64().unwrap_or_default(), &mut process);
        Self { process, given: (0..places()).map(|_| Apart::default()).collect() }
    }

    /// Written digit by digit: every request has one.
    fn next(&self) -> RequestId {
        let places = self.given.len();
        let at = here() % places;
        let before = self.given[at].fetch_add(1, Ordering::Relaxed);
        let number = before.wrapping_mul(places as u64).wrapping_add(at as u64);
        let digits = ((u64::BITS - number.leading_zeros()).div_ceil(4)).max(1) as usize;
        let mut id = [b'-'; PROCESS_DIGITS + 1 + 16];
        id[..PROCESS_DIGITS].copy_from_slice(&self.process);
        let end = PROCESS_DIGITS + 1 + digits;
        write_hex(number, &mut id[PROCESS_DIGITS + 1..end]);
        written(&id[..end]).unwrap_or_default()
    }
}

/// The last digits of a number, as many as there is room for.
fn write_hex(mut number: u64, digits: &mut [u8]) {
    for digit in digits.iter_mut().rev() {
        *digit = b"0123456789abcdef"[(number & 15) as usize];
        number >>= 4;
    }
}

/// What is known of a request from outside, for whoever records it.
pub(in crate::http) struct Arrival {
    /// Empty where nobody reads ids.
    pub(in crate::http) id: RequestId,
    /// None on a unix socket.
    pub(in crate::http) source: Option<IpAddr>,
}

impl Arrival {
    /// As the outermost layer has put it into a request.
    pub(in crate::http) fn of(request: &Request) -> Self {
        let id = request.headers().get(REQUEST_ID).and_then(acceptable);
        Self { id: id.unwrap_or_default(), source: Source::of(request.extensions()) }
    }

    /// Puts it into the request: this one counts, and no other.
    fn put_into(self, request: &mut Request) {
        if !self.id.is_empty() {
            request.headers_mut().insert(REQUEST_ID, header(&self.id));
        }
        if let Some(source) = self.source {
            request.extensions_mut().insert(Source(source));
        }
    }
}

/// What is called, as `POST /v1/encrypt`: the route's template. A path itself comes from outside and may hold
/// anything, such as a token that was pasted where its id belongs: it is recorded nowhere.
#[derive(Clone)]
pub(in crate::http) struct Called {
    pub(in crate::http) method: Method,
    /// None where no route's handler is called.
    pub(in crate::http) route: Option<SmolStr>,
}

impl Called {
    fn route(&self) -> &str {
        self.route.as_deref().unwrap_or("none")
    }
}

impl fmt::Display for Called {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.method, self.route())
    }
}

/// A client's own id is taken over where it is short and harmless in a log.
fn acceptable(id: &HeaderValue) -> Option<RequestId> {
    let harmless = |byte: &u8| byte.is_ascii_alphanumeric() || b"-_.:+/=".contains(byte);
    written(id.as_bytes()).filter(|id| !id.is_empty() && id.as_bytes().iter().all(harmless))
}

/// An id of these characters, where there is room for them.
fn written(bytes: &[u8]) -> Option<RequestId> {
    RequestId::from(std::str::from_utf8(bytes).ok()?).ok()
}

fn header(id: &RequestId) -> HeaderValue {
    HeaderValue::from_str(id).unwrap_or_else(|_| HeaderValue::from_static("unknown"))
}

/// Puts [`Edge`] around a service.
#[derive(Clone)]
pub(in crate::http) struct EdgeLayer {
    outermost: Arc<Outermost>,
    route: Option<SmolStr>,
}

impl EdgeLayer {
    /// For what is no route.
    pub(in crate::http) fn new(outermost: Outermost) -> Self {
        Self { outermost: Arc::new(outermost), route: None }
    }

    /// The same for a route with this template.
    pub(in crate::http) fn of(&self, route: SmolStr) -> Self {
        Self { outermost: Arc::clone(&self.outermost), route: Some(route) }
    }

    /// The answer to a request from `peer` that `inner` takes, made presentable.
    pub(in crate::http) fn around<F>(
        &self,
        request: Request,
        peer: Option<IpAddr>,
        inner: impl FnOnce(Request, Arrival) -> F,
    ) -> EdgeFuture<F> {
        let Outermost { ids, proxies, ids_are_read } = &*self.outermost;
        let theirs = request.headers().get(REQUEST_ID).and_then(acceptable);
        let id = theirs.unwrap_or_else(|| ids.next());
        let arrival = Arrival {
            id: if *ids_are_read { id } else { RequestId::default() },
            source: peer.map(|peer| proxies.source(request.headers(), peer)),
        };
        let called = Called { method: request.method().clone(), route: self.route.clone() };
        let inner = catch_unwind(AssertUnwindSafe(|| inner(request, arrival))).ok();
        EdgeFuture { inner, id, called }
    }
}

impl<S> Layer<S> for EdgeLayer {
    type Service = Edge<S>;

    fn layer(&self, inner: S) -> Edge<S> {
        Edge { inner, layer: self.clone() }
    }
}

#[derive(Clone)]
pub(in crate::http) struct Edge<S> {
    inner: S,
    layer: EdgeLayer,
}

impl<S> Service<Request> for Edge<S>
where
    S: Service<Request, Error = Infallible, Response: IntoResponse>,
{
    type Response = Response;
    type Error = Infallible;
    type Future = EdgeFuture<S::Future>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request) -> Self::Future {
        let peer = Source::of(request.extensions());
        self.layer.around(request, peer, |mut request, arrival| {
            arrival.put_into(&mut request);
            self.inner.call(request)
        })
    }
}

pin_project! {
    /// The answer of what is inside, made presentable.
    pub(in crate::http) struct EdgeFuture<F> {
        // None where its making has panicked.
        #[pin]
        inner: Option<F>,
        id: RequestId,
        called: Called,
    }
}

impl<F, R> Future for EdgeFuture<F>
where
    F: Future<Output = Result<R, Infallible>>,
    R: IntoResponse,
{
    type Output = Result<Response, Infallible>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let polled = match this.inner.as_pin_mut() {
            Some(inner) => catch_unwind(AssertUnwindSafe(|| inner.poll(context))).ok(),
            None => None,
        };
        let response = match polled {
            Some(polled) => {
                let Ok(response) = ready!(polled);
                response.into_response()
            }
            // What the panic said may hold anything: the panic hook has logged where it was.
            None => Problem::internal(Code::InternalError, "a handler panicked").into_response(),
        };
        Poll::Ready(Ok(presentable(response, this.id, this.called)))
    }
}

fn presentable(mut response: Response, id: &RequestId, called: &Called) -> Response {
    if let Some(problem) = response.extensions_mut().remove::<Problem>() {
        log(&problem, called, id);
        let mut rendered = problem.render(id);
        // What inner layers have put there stays: `Allow` beside a 405.
        for (name, value) in response.headers() {
            if !rendered.headers().contains_key(name) && name != http::header::CONTENT_LENGTH {
                rendered.headers_mut().insert(name.clone(), value.clone());
            }
        }
        response = rendered;
    }
    let headers = response.headers_mut();
    headers.insert(REQUEST_ID, header(id));
    headers.insert(http::header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(http::header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

fn log(problem: &Problem, called: &Called, request_id: &str) {
    let (method, route) = (&called.method, called.route());
    let (code, reason) = (problem.code.name(), problem.internal.as_deref().unwrap_or_default());
    match problem.code {
        Code::InternalError => tracing::error!(%method, route, code, reason, request_id, "request failed"),
        code_ if code_.status().is_server_error() => {
            tracing::warn!(%method, route, code, reason, request_id, "request failed");
        }
        _ => tracing::debug!(%method, route, code, reason, request_id, "request refused"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(given: &[u64]) -> RequestIds {
        let given = given.iter().map(|given| Apart::from(AtomicU64::new(*given))).collect();
        RequestIds { given, ..RequestIds::new() }
    }

    #[test]
    fn ids_are_the_process_and_a_number_in_hexadecimal_digits() {
        let ids_of_one = RequestIds { process: *b"00f1e2d3c4b5a697", ..ids(&[15]) };
        assert_eq!(&*ids_of_one.next(), "00f1e2d3c4b5a697-f");
        assert_eq!(&*ids_of_one.next(), "00f1e2d3c4b5a697-10");
        for number in [0, 1, 0xabc, u64::MAX] {
            let ids = ids(&[number]);
            let process = String::from_utf8(ids.process.to_vec()).unwrap();
            let id = ids.next();
            assert_eq!(acceptable(&header(&id)), Some(id));
            assert_eq!(*id, format!("{process}-{number:x}"));
        }
    }

    #[test]
    fn an_id_from_outside_is_taken_over_where_it_is_short_and_harmless() {
        let longest = "x".repeat(64);
        for (id, taken_over) in [
            ("", false),
            ("a", true),
            ("Az09-_.:+/=", true),
            (&longest, true),
            (&format!("{longest}x"), false),
            ("a b", false),
            ("\"", false),
            ("\\", false),
        ] {
            let accepted = acceptable(&HeaderValue::from_str(id).unwrap());
            assert_eq!(accepted.as_deref(), taken_over.then_some(id));
        }
        assert_eq!(acceptable(&HeaderValue::from_bytes("é".as_bytes()).unwrap()), None);
        assert_eq!(acceptable(&HeaderValue::from_bytes(b"\xff").unwrap()), None);
    }

    #[test]
    fn no_two_requests_have_the_same_id_whichever_threads_they_are_on() {
        let ids = RequestIds::new();
        let given = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..=2 * places())
                .map(|_| scope.spawn(|| (0..1_000).map(|_| ids.next()).collect::<Vec<_>>()))
                .collect();
            threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
        });
        let different: std::collections::HashSet<_> = given.iter().collect();
        // More threads than places: some share one.
        assert_eq!(different.len(), (2 * places() + 1) * 1_000);
    }
}
