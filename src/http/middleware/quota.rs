//! How much a tenant and a principal may ask for in a second: past it, 429 with the time to wait.
//!
//! Taken from the buckets when the permit is given, before the body is read: one request, one item, and the bytes that
//! the head announces; bytes that it does not announce, and the items of a batch, when they are known. A raw body of
//! unknown length is not stopped for it: its bytes are owed, and the next calls wait. The principal's buckets come
//! first, so that one of a tenant's callers who is past his own takes nothing from the others. What is refused before
//! its body is read costs nothing.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Display;
use std::hash::Hash;
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::Response;
use http::{HeaderName, HeaderValue};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer};

use crate::clock::Clock;
use crate::http::problem::{Code, Problem};
use crate::quota::{Buckets, Exceeded, Rate, Standing};
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
    /// KiB at once after a rest. A body that is larger waits for all of it, and the next calls until it is paid.
    pub kib_burst: u32,
}

impl Rates {
    fn limit(&self) -> bool {
        self.requests_per_sec > 0 || self.items_per_sec > 0 || self.kib_per_sec > 0
    }
}

/// The edge's quotas.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct QuotaOptions {
    /// For each tenant.
    pub tenant: Rates,
    /// For each principal.
    pub principal: Rates,
    /// For these tenants, in place of [`QuotaOptions::tenant`].
    #[serde(deserialize_with = "named")]
    pub tenants: BTreeMap<TenantId, Rates>,
    /// For these principals, in place of [`QuotaOptions::principal`].
    #[serde(deserialize_with = "named")]
    pub principals: BTreeMap<PrincipalId, Rates>,
}

fn named<'de, D, K>(deserializer: D) -> Result<BTreeMap<K, Rates>, D::Error>
where
    D: Deserializer<'de>,
    K: FromStr<Err: Display> + Ord,
{
    let rates = BTreeMap::<String, Rates>::deserialize(deserializer)?;
    let parse = |(name, rates): (String, Rates)| {
        let parsed =
            name.parse().map_err(|error| D::Error::custom(format_args!("quotas: {name:?}: {error}")));
        Ok((parsed?, rates))
    };
    rates.into_iter().map(parse).collect()
}

/// One kind of thing that is counted.
struct Counted<K> {
    name: &'static str,
    unit: Unit,
    buckets: Option<Buckets<K>>,
}

/// How the headers count, and in which unit (`qu`).
#[derive(Clone, Copy)]
struct Unit {
    /// None for requests, which is what is meant where nothing is said.
    name: Option<&'static str>,
    /// How many of it are one of what the bucket holds.
    each: u64,
}

const REQUESTS: Unit = Unit { name: None, each: 1 };
const ITEMS: Unit = Unit { name: Some("items"), each: 1 };
const BYTES: Unit = Unit { name: Some("content-bytes"), each: PIECE_BYTES };

struct Limits<K> {
    requests: Counted<K>,
    items: Counted<K>,
    pieces: Counted<K>,
}

/// The limits of all of a kind, and of those who have their own.
struct Shares<K> {
    all: Limits<K>,
    own: HashMap<K, Limits<K>>,
}

impl<K: Hash + Eq + Clone + Send + Sync + 'static> Shares<K> {
    fn new(rates: &Rates, own: &BTreeMap<K, Rates>, names: [&'static str; 3], clock: &Clock) -> Self {
        let limits = |rates| Limits::new(rates, names, clock);
        Self {
            all: limits(rates),
            own: own.iter().map(|(key, rates)| (key.clone(), limits(rates))).collect(),
        }
    }

    fn of(&self, key: &K) -> &Limits<K> {
        self.own.get(key).unwrap_or(&self.all)
    }
}

/// Everybody's buckets.
pub(in crate::http) struct Quotas {
    tenants: Shares<TenantId>,
    principals: Shares<PrincipalId>,
}

#[derive(Clone, Copy, Default)]
struct Cost {
    requests: u32,
    items: u32,
    pieces: u32,
}

impl Cost {
    fn more(&mut self, other: Self) {
        self.requests = self.requests.saturating_add(other.requests);
        self.items = self.items.saturating_add(other.items);
        self.pieces = self.pieces.saturating_add(other.pieces);
    }

    fn less(&mut self, other: Self) {
        self.requests = self.requests.saturating_sub(other.requests);
        self.items = self.items.saturating_sub(other.items);
        self.pieces = self.pieces.saturating_sub(other.pieces);
    }
}

/// A bucket of the call's: for the headers of the answer.
struct Shown {
    name: &'static str,
    unit: Unit,
    rate: Rate,
    standing: Standing,
}

impl<K: Hash + Eq + Clone + Send + Sync + 'static> Limits<K> {
    fn new(rates: &Rates, names: [&'static str; 3], clock: &Clock) -> Self {
        let counted = |name, unit, amount, burst| {
            let rate = Rate::new(amount, Duration::from_secs(1), burst);
            Counted { name, unit, buckets: rate.map(|rate| Buckets::new(rate, clock.clone())) }
        };
        Self {
            requests: counted(names[0], REQUESTS, rates.requests_per_sec, rates.requests_burst),
            items: counted(names[1], ITEMS, rates.items_per_sec, rates.items_burst),
            pieces: counted(names[2], BYTES, rates.kib_per_sec, rates.kib_burst),
        }
    }

    /// The buckets that such a cost is taken from.
    fn asked(&self, cost: Cost) -> impl Iterator<Item = (&Counted<K>, &Buckets<K>, u32)> {
        [(&self.requests, cost.requests), (&self.items, cost.items), (&self.pieces, cost.pieces)]
            .into_iter()
            .filter(|(_, amount)| *amount > 0)
            .filter_map(|(counted, amount)| Some((counted, counted.buckets.as_ref()?, amount)))
    }

    /// All of it or nothing.
    fn take(&self, key: &K, cost: Cost, shown: &mut Vec<Shown>) -> Result<(), Exceeded> {
        for (place, (counted, buckets, amount)) in self.asked(cost).enumerate() {
            let taken = buckets.take(key, amount);
            let standing = taken.unwrap_or_else(|exceeded| exceeded.standing);
            shown.retain(|shown| shown.name != counted.name);
            shown.push(Shown { name: counted.name, unit: counted.unit, rate: buckets.rate(), standing });
            if taken.is_err() {
                self.asked(cost).take(place).for_each(|(_, buckets, amount)| buckets.give_back(key, amount));
            }
            taken?;
        }
        Ok(())
    }

    fn give_back(&self, key: &K, cost: Cost) {
        self.asked(cost).for_each(|(_, buckets, amount)| buckets.give_back(key, amount));
    }

    fn owe(&self, key: &K, cost: Cost) {
        self.asked(cost).for_each(|(_, buckets, amount)| buckets.owe(key, amount));
    }
}

impl Quotas {
    /// None where nothing is limited.
    pub(in crate::http) fn new(options: &QuotaOptions, clock: &Clock) -> Option<Self> {
        let QuotaOptions { tenant, principal, tenants, principals } = options;
        let mut all = [tenant, principal].into_iter().chain(tenants.values()).chain(principals.values());
        if !all.any(Rates::limit) {
            return None;
        }
        let tenant_names = ["tenant-requests", "tenant-items", "tenant-bytes"];
        let principal_names = ["principal-requests", "principal-items", "principal-bytes"];
        Some(Self {
            tenants: Shares::new(tenant, tenants, tenant_names, clock),
            principals: Shares::new(principal, principals, principal_names, clock),
        })
    }
}

/// What one call has taken.
#[derive(Clone)]
pub(in crate::http) struct Tab(Arc<TabInner>);

struct TabInner {
    quotas: Arc<Quotas>,
    payer: Mutex<Option<(TenantId, PrincipalId)>>,
    /// What was taken from the payer's buckets.
    taken: Mutex<Cost>,
    /// Whether the head has announced how long the body is.
    announced: AtomicBool,
    /// Whether the one item that every call has is counted among those that were found since.
    counted: AtomicBool,
    /// How many bytes have come that were not announced.
    bytes: AtomicU64,
    shown: Mutex<Vec<Shown>>,
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
        self.take(self.unannounced(bytes))
    }

    /// So many bytes of a stream have come, which is not stopped for them: they are owed.
    pub(in crate::http) fn flowed(&self, bytes: u64) {
        let cost = self.unannounced(bytes);
        if let Some((tenant, principal)) = lock(&self.0.payer).as_ref() {
            self.0.quotas.principals.of(principal).owe(principal, cost);
            self.0.quotas.tenants.of(tenant).owe(tenant, cost);
        }
    }

    /// Of all bytes together a begun piece is counted as whole, not of each part in which they come.
    fn unannounced(&self, bytes: u64) -> Cost {
        if self.0.announced.load(Ordering::Relaxed) {
            return Cost::default();
        }
        let before = self.0.bytes.fetch_add(bytes, Ordering::Relaxed);
        Cost { pieces: pieces(before + bytes) - pieces(before), ..Cost::default() }
    }

    /// So many items have been found, the one that is counted already among them.
    pub(in crate::http) fn more_items(&self, items: usize) -> Result<(), Problem> {
        if items == 0 {
            return Ok(());
        }
        // They are taken together: beside one that is taken already, a bucket is never as full as more items than it
        // holds ask for, and none of them would ever pass.
        if !self.0.counted.swap(true, Ordering::Relaxed) {
            self.give_back(Cost { items: 1, ..Cost::default() });
        }
        let items = u32::try_from(items).unwrap_or(u32::MAX);
        self.take(Cost { items, ..Cost::default() })
    }

    /// The call found no place: all of it goes back.
    fn refused(&self) {
        let taken = *lock(&self.0.taken);
        self.give_back(taken);
        lock(&self.0.shown).clear();
    }

    fn give_back(&self, cost: Cost) {
        if let Some((tenant, principal)) = lock(&self.0.payer).as_ref() {
            self.0.quotas.principals.of(principal).give_back(principal, cost);
            self.0.quotas.tenants.of(tenant).give_back(tenant, cost);
            lock(&self.0.taken).less(cost);
        }
    }

    fn take(&self, cost: Cost) -> Result<(), Problem> {
        let payer = lock(&self.0.payer);
        let Some((tenant, principal)) = payer.as_ref() else { return Ok(()) };
        let mut shown = lock(&self.0.shown);
        let (principals, tenants) =
            (self.0.quotas.principals.of(principal), self.0.quotas.tenants.of(tenant));
        let taken = principals.take(principal, cost, &mut shown).and_then(|()| {
            tenants.take(tenant, cost, &mut shown).inspect_err(|_| principals.give_back(principal, cost))
        });
        if taken.is_ok() {
            lock(&self.0.taken).more(cost);
        }
        taken.map_err(|exceeded| {
            let name = shown.last().map_or("", |shown| shown.name);
            let detail = format!("the quota {name} is used up: try again in {} s", exceeded.retry_after_secs);
            Problem { retry_after_secs: exceeded.retry_after_secs, ..Problem::new(Code::RateLimited, detail) }
        })
    }

    /// As `draft-ietf-httpapi-ratelimit-headers-10` has them: `q` at once, `w` seconds to fill, `r` left, all there
    /// again after `t` seconds.
    fn write_headers(&self, response: &mut Response) {
        let shown = lock(&self.0.shown);
        if shown.is_empty() {
            return;
        }
        let list = |item: &dyn Fn(&Shown) -> String| {
            let items: Vec<String> = shown.iter().map(item).collect();
            HeaderValue::from_str(&items.join(", "))
        };
        let policy = list(&|Shown { name, unit, rate, .. }| {
            let quota = u64::from(rate.burst()) * unit.each;
            let unit = unit.name.map(|name| format!(";qu=\"{name}\"")).unwrap_or_default();
            format!("\"{name}\";q={quota};w={}{unit}", rate.window_secs())
        });
        let limit = list(&|Shown { name, unit, standing, .. }| {
            let left = u64::from(standing.left) * unit.each;
            format!("\"{name}\";r={left};t={}", standing.full_after_secs)
        });
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
        taken: Mutex::default(),
        announced: AtomicBool::new(false),
        counted: AtomicBool::new(false),
        bytes: AtomicU64::new(0),
        shown: Mutex::default(),
    }));
    request.extensions_mut().insert(tab.clone());
    let mut response = next.run(request).await;
    // A place is looked for after the quota in part: for a stream, for a batch's memory, at the KMS.
    if response.extensions().get::<Problem>().is_some_and(|problem| problem.code == Code::Overloaded) {
        tab.refused();
    }
    tab.write_headers(&mut response);
    response
}
