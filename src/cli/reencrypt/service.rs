//! The service that brings envelopes up to date, many at once and with patience.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context as _, bail};
use envelope::DataKeyId;
use reqwest::header::{CONTENT_TYPE, RETRY_AFTER};
use serde::{Deserialize, Serialize};

use super::row::{Failure, Row, Sealed, dek_of};
use crate::cli::transport::Transport;
use crate::clock::Clock;

/// How many bytes of envelopes and contexts go into one request; the service's own limit is 32 MiB by default.
const REQUEST_BYTES_MAX: usize = 8 << 20;
/// How long one request may take.
const REQUEST_TIME_MAX: Duration = Duration::from_mins(5);
/// The first wait before a request is sent again; each further one is twice as long.
const BACKOFF: Duration = Duration::from_millis(500);
/// The longest.
const BACKOFF_MAX: Duration = Duration::from_secs(30);

/// What came of a row.
pub(super) enum Outcome {
    /// It was up to date.
    Current(DataKeyId),
    /// It is to be replaced.
    Renewed {
        envelope: String,
        from: DataKeyId,
        to: DataKeyId,
    },
    Failed(Failure),
}

/// How far rewrapping goes.
#[derive(Clone, Copy, Debug, clap::ValueEnum, Serialize, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub(super) enum Mode {
    /// Whatever is needed: where the data key is retired, the message is sealed again under the active one.
    Auto,
    /// Only the wrapped keys are renewed: no message is decrypted, and no context is needed.
    WrappedKey,
}

/// What the envelopes are to carry.
#[derive(Clone, Copy, Debug, clap::ValueEnum, Serialize, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub(super) enum Weight {
    Embedded,
    Compact,
}

/// A running service.
pub(super) struct Service {
    pub(super) transport: Transport,
    pub(super) clock: Clock,
    pub(super) mode: Mode,
    pub(super) weight: Option<Weight>,
    /// For how long what may succeed later is tried again.
    pub(super) retry_max: Duration,
}

#[derive(Serialize)]
struct Request<'a> {
    items: Vec<Item<'a>>,
}

#[derive(Serialize)]
struct Item<'a> {
    r#ref: String,
    ciphertext: &'a str,
    context: &'a BTreeMap<String, String>,
    mode: Mode,
    #[serde(skip_serializing_if = "Option::is_none")]
    envelope: Option<Weight>,
}

#[derive(Deserialize)]
struct Response {
    items: Vec<Answer>,
}

#[derive(Deserialize)]
struct Answer {
    r#ref: String,
    ciphertext: Option<String>,
    changed: Option<bool>,
    error: Option<Problem>,
}

/// What is wrong, with an item or a whole request.
#[derive(Deserialize)]
struct Problem {
    code: String,
    detail: String,
    #[serde(default)]
    retryable: bool,
}

impl Problem {
    fn why(&self) -> String {
        format!("{} ({})", self.detail, self.code)
    }
}

impl From<Problem> for Failure {
    fn from(problem: Problem) -> Self {
        Self::new(&problem.code, problem.detail)
    }
}

/// A request that did not succeed.
enum Refused {
    /// It may, later.
    Later {
        why: String,
        after: Option<Duration>,
    },
    TooLarge,
    Never(anyhow::Error),
}

impl Service {
    /// What comes of each row, in order. An error where the whole cannot go on.
    pub(super) async fn rewrap(&self, rows: &[Row]) -> anyhow::Result<Vec<Outcome>> {
        let mut outcomes: Vec<Option<Outcome>> = Vec::with_capacity(rows.len());
        let mut waiting = Vec::new();
        for (at, row) in rows.iter().enumerate() {
            outcomes.push(match &row.sealed {
                Ok(sealed) => {
                    waiting.push((at, sealed));
                    None
                }
                Err(failure) => Some(Outcome::Failed(failure.clone())),
            });
        }
        let mut requests = split(waiting);
        let (mut patience, mut answered_any) = (Patience::new(self), false);
        while let Some(mut request) = requests.pop() {
            match self.send(&request).await {
                Ok(answers) => {
                    let (mut later, mut problems) = (Vec::new(), Vec::new());
                    for ((at, sealed), answer) in request.into_iter().zip(answers) {
                        match answer {
                            Ok(outcome) => outcomes[at] = Some(outcome),
                            Err(problem) => {
                                later.push((at, sealed));
                                problems.push(problem);
                            }
                        }
                    }
                    let Some(first) = problems.first() else {
                        (patience, answered_any) = (Patience::new(self), true);
                        continue;
                    };
                    answered_any |= outcomes.iter().any(Option::is_some);
                    match patience.wait(&first.why(), None).await {
                        Ok(()) => requests.push(later),
                        // Where others of this page are answered, it is not the service that is down.
                        Err(_) if answered_any => {
                            for ((at, _), problem) in later.into_iter().zip(problems) {
                                outcomes[at] = Some(Outcome::Failed(problem.into()));
                            }
                        }
                        Err(error) => return Err(error),
                    }
                }
                Err(Refused::Later { why, after }) => {
                    requests.push(request);
                    patience.wait(&why, after).await?;
                }
                Err(Refused::TooLarge) if request.len() > 1 => {
                    let back = request.split_off(request.len() / 2);
                    requests.extend([back, request]);
                }
                Err(Refused::TooLarge) => {
                    let detail = "the service does not take a request of this size";
                    outcomes[request[0].0] = Some(Outcome::Failed(Failure::new("too_large", detail)));
                }
                Err(Refused::Never(error)) => return Err(error),
            }
        }
        outcomes.into_iter().map(|outcome| outcome.context("a row was not answered")).collect()
    }

    /// One request. Items that may succeed later are `Err`.
    async fn send(&self, rows: &[(usize, &Sealed)]) -> Result<Vec<Result<Outcome, Problem>>, Refused> {
        let items = rows.iter().map(|(at, sealed)| Item {
            r#ref: at.to_string(),
            ciphertext: &sealed.envelope,
            context: &sealed.context,
            mode: self.mode,
            envelope: self.weight,
        });
        let body = serde_json::to_vec(&Request { items: items.collect() }).map_err(never)?;
        let url = self.transport.url.join("/v1/rewrap/batch").map_err(never)?;
        let request = self.transport.client.post(url).headers(self.transport.headers.clone());
        let request = request.header(CONTENT_TYPE, "application/json").timeout(REQUEST_TIME_MAX).body(body);
        let unreachable = |error: reqwest::Error| Refused::Later {
            why: format!("{} cannot be reached: {:#}", self.transport.url, anyhow::Error::new(error)),
            after: None,
        };
        let response = request.send().await.map_err(unreachable)?;
        let (status, headers) = (response.status(), response.headers().clone());
        let body = response.bytes().await.map_err(unreachable)?;
        if !status.is_success() {
            let after = headers.get(RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok());
            return Err(self.refused(status, &body, after.map(Duration::from_secs)));
        }
        let response: Response = serde_json::from_slice(&body).map_err(|error| {
            never(anyhow::anyhow!("{} answers what is no batch ({error})", self.transport.url))
        })?;
        if response.items.len() != rows.len() {
            return Err(never(anyhow::anyhow!(
                "{} answers {} of {} rows",
                self.transport.url,
                response.items.len(),
                rows.len()
            )));
        }
        rows.iter().zip(response.items).map(|((at, sealed), answer)| outcome(*at, sealed, answer)).collect()
    }

    fn refused(&self, status: http::StatusCode, body: &[u8], after: Option<Duration>) -> Refused {
        let problem: Option<Problem> = serde_json::from_slice(body).ok();
        let why = match &problem {
            Some(problem) => problem.why(),
            None => format!("{} answers {status}: is it a keyfold service?", self.transport.url),
        };
        match status.as_u16() {
            413 => Refused::TooLarge,
            408 | 429 | 502 | 503 | 504 => Refused::Later { why, after },
            _ if problem.is_some_and(|problem| problem.retryable) => Refused::Later { why, after },
            _ => Refused::Never(anyhow::anyhow!(why)),
        }
    }
}

fn never(error: impl Into<anyhow::Error>) -> Refused {
    Refused::Never(error.into())
}

/// Requests of a size that the service takes, the first one last.
fn split(rows: Vec<(usize, &Sealed)>) -> Vec<Vec<(usize, &Sealed)>> {
    let (mut requests, mut request, mut bytes) = (Vec::new(), Vec::new(), 0);
    for (at, sealed) in rows {
        let context: usize = sealed.context.iter().map(|(name, value)| name.len() + value.len() + 8).sum();
        let size = sealed.envelope.len() + context + 100;
        if !request.is_empty() && bytes + size > REQUEST_BYTES_MAX {
            requests.push(std::mem::take(&mut request));
            bytes = 0;
        }
        bytes += size;
        request.push((at, sealed));
    }
    if !request.is_empty() {
        requests.push(request);
    }
    requests.reverse();
    requests
}

/// What an answer says of a row. What is written over the only copy of a message is looked at first: it is an
/// envelope, and answers this row.
fn outcome(at: usize, sealed: &Sealed, answer: Answer) -> Result<Result<Outcome, Problem>, Refused> {
    if answer.r#ref != at.to_string() {
        return Err(never(anyhow::anyhow!("the service answers in another order than it was asked")));
    }
    match (answer.error, answer.ciphertext, answer.changed) {
        (Some(problem), ..) if problem.retryable => Ok(Err(problem)),
        (Some(problem), ..) => Ok(Ok(Outcome::Failed(problem.into()))),
        (None, Some(envelope), Some(false)) if envelope == sealed.envelope => {
            Ok(Ok(Outcome::Current(sealed.dek)))
        }
        (None, Some(envelope), Some(true)) if envelope != sealed.envelope => match dek_of(&envelope) {
            Ok(to) => Ok(Ok(Outcome::Renewed { envelope, from: sealed.dek, to })),
            Err(error) => Err(never(anyhow::anyhow!("the service answers what is no envelope: {error}"))),
        },
        _ => Err(never(anyhow::anyhow!("the service's answer contradicts itself: nothing was written"))),
    }
}

/// How long what may succeed later is tried: it begins anew whenever something succeeds.
struct Patience<'a> {
    service: &'a Service,
    since: Option<Duration>,
    next: Duration,
}

impl<'a> Patience<'a> {
    fn new(service: &'a Service) -> Self {
        Self { service, since: None, next: BACKOFF }
    }

    async fn wait(&mut self, why: &str, after: Option<Duration>) -> anyhow::Result<()> {
        let now = self.service.clock.monotonic();
        let since = *self.since.get_or_insert(now);
        // Spread, so that those who were refused together do not come back together.
        let spread = getrandom::u32().context("the operating system gives no randomness")?;
        let wait = self.next.mul_f64(0.5 + f64::from(spread) / f64::from(u32::MAX) / 2.0);
        let wait = wait.max(after.unwrap_or_default());
        if now + wait > since + self.service.retry_max {
            bail!("{why}: still so after {} s of trying again", (now - since).as_secs());
        }
        self.next = (self.next * 2).min(BACKOFF_MAX);
        self.service.clock.sleep(wait).await;
        Ok(())
    }
}
