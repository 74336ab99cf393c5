//! The outermost layer: gives the request its id, turns a problem into its body, and logs what went wrong, once.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use axum::extract::{MatchedPath, Request, State};
use axum::middleware::Next;
use axum::response::Response;
use http::{HeaderMap, HeaderName, HeaderValue, Method};

use crate::http::problem::{Code, Problem};
use crate::http::source::Proxies;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// The longest request id that is taken over from a client.
const REQUEST_ID_BYTES_MAX: usize = 64;

/// What the layer needs.
pub(in crate::http) struct Outermost {
    ids: RequestIds,
    proxies: Arc<Proxies>,
}

impl Outermost {
    pub(in crate::http) fn new(proxies: Arc<Proxies>) -> Self {
        Self { ids: RequestIds::new(), proxies }
    }
}

/// Names requests: a random part for the process, and a number.
struct RequestIds {
    process: u64,
    next: AtomicU64,
}

impl RequestIds {
    fn new() -> Self {
        // Without randomness requests are still told apart within the process.
        let process = getrandom::u64().unwrap_or_default();
        Self { process, next: AtomicU64::new(1) }
    }

    fn next(&self) -> HeaderValue {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let id = format!("{:016x}-{number:x}", self.process);
        HeaderValue::from_str(&id).unwrap_or_else(|_| HeaderValue::from_static("unknown"))
    }
}

/// The id of a request, as this layer has put it there.
pub(in crate::http) fn request_id(headers: &HeaderMap) -> &str {
    headers.get(REQUEST_ID).and_then(|id| id.to_str().ok()).unwrap_or_default()
}

/// What is called, as `POST /v1/encrypt`: the route's template. A path itself comes from outside and may hold
/// anything, such as a token that was pasted where its id belongs: it is recorded nowhere.
pub(in crate::http) fn route(request: &Request) -> String {
    let template = request.extensions().get::<MatchedPath>().map_or("none", MatchedPath::as_str);
    format!("{} {template}", request.method())
}

/// A client's own id is taken over where it is short and harmless in a log.
fn acceptable(id: &HeaderValue) -> bool {
    let bytes = id.as_bytes();
    (1..=REQUEST_ID_BYTES_MAX).contains(&bytes.len())
        && bytes.iter().all(|byte| byte.is_ascii_alphanumeric() || b"-_.:+/=".contains(byte))
}

pub(in crate::http) async fn edge(
    State(outermost): State<Arc<Outermost>>,
    mut request: Request,
    next: Next,
) -> Response {
    let theirs = request.headers().get(REQUEST_ID).filter(|id| acceptable(id)).cloned();
    let id = theirs.unwrap_or_else(|| outermost.ids.next());
    let seen = Seen { method: request.method().clone(), route: request.extensions().get().cloned() };
    // Inner layers read it where it came from: the one that counts, and no other.
    request.headers_mut().insert(REQUEST_ID, id.clone());
    if outermost.proxies.told_by.is_some() {
        let (mut parts, body) = request.into_parts();
        outermost.proxies.read_forwarded(&parts.headers, &mut parts.extensions);
        request = Request::from_parts(parts, body);
    }
    let mut response = next.run(request).await;
    if let Some(problem) = response.extensions_mut().remove::<Problem>() {
        let text = id.to_str().unwrap_or_default();
        log(&problem, &seen, text);
        let mut rendered = problem.render(text);
        // What inner layers have put there stays: `Allow` beside a 405.
        for (name, value) in response.headers() {
            if !rendered.headers().contains_key(name) && name != http::header::CONTENT_LENGTH {
                rendered.headers_mut().insert(name.clone(), value.clone());
            }
        }
        response = rendered;
    }
    let headers = response.headers_mut();
    headers.insert(REQUEST_ID, id);
    headers.insert(http::header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(http::header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

struct Seen {
    method: Method,
    /// Its template, for the same reason as in [`route`].
    route: Option<MatchedPath>,
}

fn log(problem: &Problem, seen: &Seen, request_id: &str) {
    let method = &seen.method;
    let route = seen.route.as_ref().map_or("none", MatchedPath::as_str);
    let (code, reason) = (problem.code.name(), problem.internal.as_deref().unwrap_or_default());
    match problem.code {
        Code::InternalError => tracing::error!(%method, route, code, reason, request_id, "request failed"),
        code_ if code_.status().is_server_error() => {
            tracing::warn!(%method, route, code, reason, request_id, "request failed");
        }
        _ => tracing::debug!(%method, route, code, reason, request_id, "request refused"),
    }
}
