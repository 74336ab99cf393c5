//! The way of every call: logged, perhaps hit by a fault, run, answered.

use axum::body::Body;
use axum::response::Response;
use http::StatusCode;
use http::header::CONTENT_TYPE;

use super::Shared;
use super::wire::WireControl;
use crate::calls::{Arrival, Outcome};
use crate::error::KmsError;
use crate::faults::{End, Verdict};

/// A call in the log, of which the outcome is still open.
struct Logged<'a> {
    shared: &'a Shared,
    number: u64,
    open: bool,
}

impl Logged<'_> {
    fn finish(mut self, outcome: Outcome) {
        self.open = false;
        self.shared.calls.finish(self.number, outcome);
    }
}

/// The handler is dropped when its client goes away.
impl Drop for Logged<'_> {
    fn drop(&mut self) {
        if self.open {
            self.shared.calls.finish(self.number, Outcome::Abandoned);
        }
    }
}

/// Runs a call that has arrived, unless a fault prevents it; `render` makes the answer.
pub(super) async fn run<T>(
    shared: &Shared,
    wire: &WireControl,
    arrival: Arrival,
    call: impl FnOnce() -> Result<T, KmsError>,
    render: impl FnOnce(Result<T, KmsError>) -> Response,
) -> Response {
    let clock = &shared.engine.clock;
    let verdict = shared.faults.judge(&arrival, clock.elapsed());
    let number = shared.calls.begin(arrival, clock.now());
    let logged = Logged { shared, number, open: true };
    tokio::select! {
        // What is stopped in the middle is reset: the client must not take it for an answer.
        () = shared.stop.cancelled() => {
            logged.finish(Outcome::Reset);
            reset(wire)
        }
        end = suffer(verdict) => match end {
            None => {
                let result = call();
                logged.finish(outcome(result.as_ref().err(), false));
                render(result)
            }
            Some(End::Error(error)) => {
                logged.finish(outcome(Some(&error), true));
                render(Err(error))
            }
            Some(End::BadGateway) => {
                logged.finish(Outcome::Error { code: "502".to_owned(), injected: true });
                bad_gateway()
            }
            Some(End::Reset | End::BlackHole) => {
                logged.finish(Outcome::Reset);
                reset(wire)
            }
        }
    }
}

/// Logs a call that was refused before it was known whose it is or what it wants.
pub(super) fn refused(shared: &Shared, operation: &str, error: KmsError) -> KmsError {
    let arrival = Arrival { operation: operation.to_owned(), ..Arrival::default() };
    let number = shared.calls.begin(arrival, shared.engine.clock.now());
    shared.calls.finish(number, outcome(Some(&error), false));
    error
}

/// Waits as long as the fault has it: for ever in a black hole.
async fn suffer(verdict: Verdict) -> Option<End> {
    if !verdict.delay.is_zero() {
        tokio::time::sleep(verdict.delay).await;
    }
    if matches!(verdict.end, Some(End::BlackHole)) {
        std::future::pending::<()>().await;
    }
    verdict.end
}

fn outcome(error: Option<&KmsError>, injected: bool) -> Outcome {
    match error {
        None => Outcome::Ok,
        Some(error) => Outcome::Error { code: error.code().to_owned(), injected },
    }
}

/// The response is never seen: writing it closes the connection.
fn reset(wire: &WireControl) -> Response {
    wire.reset();
    Response::new(Body::empty())
}

fn bad_gateway() -> Response {
    let mut response = Response::new(Body::from("<html><body><h1>502 Bad Gateway</h1></body></html>\n"));
    *response.status_mut() = StatusCode::BAD_GATEWAY;
    response.headers_mut().insert(CONTENT_TYPE, http::HeaderValue::from_static("text/html"));
    response
}
