//! How much a tenant and a principal may ask for in a second: past it, 429 with the time to wait.
//!
//! Taken from the buckets when the permit is given, before the body is read: one request, one item, and the bytes that
//! the head announces; bytes that it does not announce, and further items of a batch, when they are known. The
//! principal's buckets come first, so that one of a tenant's callers who is past his own takes nothing from the others.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::Response;
use http::{HeaderName, HeaderValue};
use serde::Deserialize;

use crate::clock::Clock;
use crate::http::problem::{Code, Problem};
use crate::quota::{Buckets, Exceeded, Rate};
use crate::tenant::{PrincipalId, TenantId};

const RATE_LIMIT: HeaderName = HeaderName::from_static("ratelimit");
const RATE_LIMIT_POLICY: HeaderName = HeaderName::from_static("ratelimit-policy");
/// Bytes are counted in pieces of this size, begun ones as whole.
const PIECE_BYTES: u64 = 1_024;

/// What one may ask for in a second; 0 for no limit. Default none.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Rates {
    /// Requests in a second.
    pub requests_per_sec: u32,
    /// Requests at once after a rest; as many as in a second where nothing is said.
    pub requests_burst: u32,
    /// Items in a second: a single call has one, a batch as many as it has.
    pub items_per_sec: u32,
    /// Items at once after a rest.
    pub items_burst: u32,
    /// KiB of request bodies in a second.
    pub kib_per_sec: u32,
    /// KiB at once after a rest. A body that is larger takes all that is there, and waits for that.
    pub kib_burst: u32,
}

/// The edge's quotas.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct QuotaOptions {
    /// For each tenant.
    pub tenant: Rates,
    /// For each principal.
    pub principal: Rates,
}

/// One kind of thing that is counted.
struct Counted<K> {
    name: &'static str,
    buckets: Option<Buckets<K>>,
}

struct Limits<K> {
    requests: Counted<K>,
    items: Counted<K>,
    pieces: Counted<K>,
}

/// Everybody's buckets.
pub(in crate::http) struct Quotas {
    tenants: Limits<TenantId>,
    principals: Limits<PrincipalId>,
}

#[derive(Clone, Copy, Default)]
struct Cost {
    requests: u32,
    items: u32,
    pieces: u32,
}

/// How a bucket stands: for the headers of the answer.
struct Standing {
    name: &'static str,
    rate: Rate,
    left: u32,
    wait_secs: u64,
}

impl<K: std::hash::Hash + Eq + Clone + Send + Sync + 'static> Limits<K> {
    fn new(rates: &Rates, names: [&'static str; 3], clock: &Clock) -> Self {
        let counted = |name, amount, burst| {
            let rate = Rate::new(amount, Duration::from_secs(1), burst);
            Counted { name, buckets: rate.map(|rate| Buckets::new(rate, clock.clone())) }
        };
        Self {
            requests: counted(names[0], rates.requests_per_sec, rates.requests_burst),
            items: counted(names[1], rates.items_per_sec, rates.items_burst),
            pieces: counted(names[2], rates.kib_per_sec, rates.kib_burst),
        }
    }

    fn take(&self, key: &K, cost: Cost, standings: &mut Vec<Standing>) -> Result<(), Exceeded> {
        for (counted, amount) in
            [(&self.requests, cost.requests), (&self.items, cost.items), (&self.pieces, cost.pieces)]
        {
            let Some(buckets) = counted.buckets.as_ref().filter(|_| amount > 0) else { continue };
            let (name, rate) = (counted.name, buckets.rate());
            let taken = buckets.take(key, amount);
            let (left, wait_secs) = match taken {
                Ok(left) => (left, 1),
                Err(exceeded) => (0, exceeded.retry_after_secs),
            };
            standings.retain(|standing| standing.name != name);
            standings.push(Standing { name, rate, left, wait_secs });
            taken?;
        }
        Ok(())
    }
}

impl Quotas {
    /// None where nothing is limited.
    pub(in crate::http) fn new(options: &QuotaOptions, clock: &Clock) -> Option<Self> {
        let limits =
            |rates: &Rates| rates.requests_per_sec > 0 || rates.items_per_sec > 0 || rates.kib_per_sec > 0;
        if !limits(&options.tenant) && !limits(&options.principal) {
            return None;
        }
        let tenant = ["tenant-requests", "tenant-items", "tenant-kib"];
        let principal = ["principal-requests", "principal-items", "principal-kib"];
        Some(Self {
            tenants: Limits::new(&options.tenant, tenant, clock),
            principals: Limits::new(&options.principal, principal, clock),
        })
    }
}

/// What one call has taken.
#[derive(Clone)]
pub(in crate::http) struct Tab(Arc<TabInner>);

struct TabInner {
    quotas: Arc<Quotas>,
    payer: Mutex<Option<(TenantId, PrincipalId)>>,
    /// Whether the head has announced how long the body is.
    announced: AtomicBool,
    /// Whether the one item that every call has is counted among those that were found since.
    counted: AtomicBool,
    standings: Mutex<Vec<Standing>>,
}

impl Tab {
    /// The call is allowed, and goes at the cost of these: one request, one item, and the bytes that it announces.
    pub(in crate::http) fn open(
        &self,
        tenant: &TenantId,
        principal: &PrincipalId,
        bytes: Option<u64>,
    ) -> Result<(), Problem> {
        self.0.announced.store(bytes.is_some(), Ordering::Relaxed);
        *lock(&self.0.payer) = Some((tenant.clone(), principal.clone()));
        self.take(Cost { requests: 1, items: 1, pieces: pieces(bytes.unwrap_or(0)) })
    }

    /// So many bytes have come; they are counted where they were not announced.
    pub(in crate::http) fn more_bytes(&self, bytes: u64) -> Result<(), Problem> {
        if self.0.announced.load(Ordering::Relaxed) {
            return Ok(());
        }
        self.take(Cost { pieces: pieces(bytes), ..Cost::default() })
    }

    /// So many items have been found, the one that is counted already among them.
    pub(in crate::http) fn more_items(&self, items: usize) -> Result<(), Problem> {
        let known = usize::from(!self.0.counted.swap(true, Ordering::Relaxed));
        let items = u32::try_from(items.saturating_sub(known)).unwrap_or(u32::MAX);
        self.take(Cost { items, ..Cost::default() })
    }

    /// So many lines of so many bytes have come.
    pub(in crate::http) fn more_lines(&self, lines: usize, bytes: u64) -> Result<(), Problem> {
        self.more_items(lines)?;
        self.more_bytes(bytes)
    }

    fn take(&self, cost: Cost) -> Result<(), Problem> {
        let payer = lock(&self.0.payer);
        let Some((tenant, principal)) = payer.as_ref() else { return Ok(()) };
        let mut standings = lock(&self.0.standings);
        let quotas = &self.0.quotas;
        let taken = quotas
            .principals
            .take(principal, cost, &mut standings)
            .and_then(|()| quotas.tenants.take(tenant, cost, &mut standings));
        taken.map_err(|exceeded| {
            let name = standings.last().map_or("", |standing| standing.name);
            let detail = format!("the quota {name} is used up: try again in {} s", exceeded.retry_after_secs);
            Problem { retry_after_secs: exceeded.retry_after_secs, ..Problem::new(Code::RateLimited, detail) }
        })
    }

    fn write_headers(&self, response: &mut Response) {
        let standings = lock(&self.0.standings);
        if standings.is_empty() {
            return;
        }
        let list = |item: &dyn Fn(&Standing) -> String| {
            let items: Vec<String> = standings.iter().map(item).collect();
            HeaderValue::from_str(&items.join(", "))
        };
        let policy = list(&|standing| {
            format!("\"{}\";q={};w={}", standing.name, standing.rate.burst(), standing.rate.window_secs())
        });
        let limit =
            list(&|standing| format!("\"{}\";r={};t={}", standing.name, standing.left, standing.wait_secs));
        if let (Ok(policy), Ok(limit)) = (policy, limit) {
            response.headers_mut().insert(RATE_LIMIT_POLICY, policy);
            response.headers_mut().insert(RATE_LIMIT, limit);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn pieces(bytes: u64) -> u32 {
    u32::try_from(bytes.div_ceil(PIECE_BYTES)).unwrap_or(u32::MAX)
}

/// Opens a tab for each call, and says in its answer how the buckets stand.
pub(in crate::http) async fn quota(
    State(quotas): State<Arc<Quotas>>,
    mut request: Request,
    next: Next,
) -> Response {
    let tab = Tab(Arc::new(TabInner {
        quotas,
        payer: Mutex::default(),
        announced: AtomicBool::new(false),
        counted: AtomicBool::new(false),
        standings: Mutex::default(),
    }));
    request.extensions_mut().insert(tab.clone());
    let mut response = next.run(request).await;
    tab.write_headers(&mut response);
    response
}
