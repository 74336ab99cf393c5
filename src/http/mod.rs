//! The edge: the routes with their limits, and the layers around them.
//!
//! Outermost first:
//! ```text
//! front (the calls made most by their path; all others through the router)
//!   > per route: edge (request id, panic -> problem, problem -> body, log)
//!     > gate (in-flight limit and load shed > deadline > body limit > authenticate > circumstances)
//!     > quota > handler (permit, parse, operation)
//! ```
//! A route cannot be declared without its limits and its guard: `Route` has no defaults.

pub mod alive;
mod bulk;
mod connection;
mod front;
mod handlers;
mod json;
mod middleware;
mod openapi;
pub mod problem;
pub mod server;
pub mod source;
pub mod tls;
mod transfer;

use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use async_trait::async_trait;
use axum::handler::Handler as _;
use axum::middleware::from_fn_with_state;
use axum::routing::MethodRouter;
use smol_str::SmolStr;
use tokio_util::task::TaskTracker;
use utoipa_axum::router::{OpenApiRouter, UtoipaMethodRouter};
use utoipa_axum::routes;

use crate::access::Access;
use crate::operations::Operations;
use crate::spread::{Apart, Near, Spread};
use crate::tenant::KeyName;
use bulk::memory::BatchMemory;
use bulk::threads::BulkThreads;
use front::Frequent;
use handlers::{api_keys, decrypt, deks, encrypt, grants, health, jobs, keys, rewrap, shreds, tenants};
use middleware::admission::Admission;
use middleware::edge::{EdgeLayer, Outermost};
use middleware::gate::{Gate, GateLayer};
use middleware::quota::{Quotas, quota};
use problem::{Code, Problem};
use transfer::Transfers;

pub use front::Front;
pub use handlers::health::{Readiness, ReadinessStatus};
pub use middleware::context::{ContextEntry, ContextRules};
pub use middleware::quota::{QuotaOptions, Rates};
pub use transfer::Options as TransferOptions;

/// The edge's limits.
#[derive(Clone, Debug)]
pub struct Options {
    /// The largest plaintext of a JSON call, in bytes. Default 8 MiB.
    pub plaintext_bytes_max: usize,
    /// The largest body of a JSON data-plane call, in bytes. Default 12 MiB: room for a plaintext of 8 MiB in
    /// base64, its envelope, and a context.
    pub body_bytes_max: usize,
    /// The largest body of an administration call, in bytes. Default 64 KiB.
    pub admin_body_bytes_max: usize,
    /// How long a request may take, its body included, in seconds. Default 30.
    pub request_secs_max: u64,
    /// How many requests may be in flight at once. Default 1,024.
    pub in_flight_max: usize,
    /// From how many of them on, in percent of the limit, each tenant is held to its share, so that one tenant alone
    /// cannot fill the service: the same of transfers, and of administration's places for each principal. 100 for
    /// never. Default 75.
    pub fair_from_percent: usize,
    /// The most items of a batch. Default 10,000.
    pub batch_items_max: usize,
    /// The largest body of a batch, in bytes. Default 32 MiB.
    pub batch_body_bytes_max: usize,
    /// How much memory all batches together may take, in bytes. Default 256 MiB.
    pub batch_memory_bytes_max: usize,
    /// The longest line of a body of lines, in bytes. Default 1 MiB.
    pub line_bytes_max: usize,
    /// Bodies that are streamed.
    pub transfer: TransferOptions,
    /// What of a request goes into its encryption context. Default nothing.
    pub context: ContextRules,
    /// The load balancers whose word for a request's source is taken. Default none.
    pub proxies: Arc<source::Proxies>,
    /// How much a tenant and a principal may ask for in a second. Default no limit.
    pub quotas: QuotaOptions,
    /// How many administration calls may be in flight at once: they have a room of their own, so that a busy data
    /// plane does not lock the operator out. Default 64.
    pub admin_in_flight_max: usize,
    /// Whether calls are recorded: then their ids and sources are handed on, and so is what is refused before any
    /// verb takes it over. Default not.
    pub recorded: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            plaintext_bytes_max: 8 << 20,
            body_bytes_max: 12 << 20,
            admin_body_bytes_max: 64 << 10,
            request_secs_max: 30,
            in_flight_max: 1_024,
            fair_from_percent: 75,
            batch_items_max: 10_000,
            batch_body_bytes_max: 32 << 20,
            batch_memory_bytes_max: 256 << 20,
            line_bytes_max: 1 << 20,
            transfer: TransferOptions::default(),
            context: ContextRules::default(),
            proxies: Arc::default(),
            quotas: QuotaOptions::default(),
            admin_in_flight_max: 64,
            recorded: false,
        }
    }
}

/// Tells how the service is.
#[async_trait]
pub trait Probe: Send + Sync {
    /// The state now, or as it was a moment ago.
    async fn readiness(&self) -> Readiness;
}

/// What the handlers need.
pub(crate) struct HttpState {
    operations: Arc<Operations>,
    probe: Arc<dyn Probe>,
    options: Options,
    /// Made once: most requests use it.
    default_key: KeyName,
    transfers: Transfers,
    bulk: BulkThreads,
    batch_memory: Arc<BatchMemory>,
}

/// The same for a handler.
pub(crate) type SharedState = Near<HttpState>;

/// Who may come in.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Guard {
    /// Everybody.
    Open,
    /// Who shows a credential; what it may do, its permit says.
    Credential,
}

/// A handler with what the document says of it. Made where it is wanted: all of them are megabytes.
type Methods = fn() -> UtoipaMethodRouter<SharedState>;

/// Makes of a handler what is called before the router.
type MakeFrequent = fn(SmolStr, EdgeLayer, GateLayer, Arc<Spread<HttpState>>) -> Frequent;

/// A route and all that must be said of it.
struct Route {
    methods: Methods,
    /// For what is called most.
    frequent: Option<MakeFrequent>,
    guard: Guard,
    /// Whether it belongs to the data plane: then it has quotas, and shares the room of the others there.
    data: bool,
    /// What of the request goes into its encryption context; nothing for what has none.
    context: ContextRules,
    body_bytes_max: usize,
    time_max: Duration,
    /// Whether it also takes bodies that are streamed: see [`transfer`]. Theirs is an idle time instead.
    streams: bool,
    /// Which problems it can answer, beside those that its guard and limits bring.
    problems: &'static [Code],
}

const DATA: &[Code] = &[
    Code::MalformedRequest,
    Code::ReservedContext,
    Code::Forbidden,
    Code::ContextLimit,
    Code::RateLimited,
    Code::KekDenied,
    Code::KeyRevoked,
    Code::NotFound,
    Code::KmsUnavailable,
    Code::StoreUnavailable,
];
const OPENING: &[Code] = &[
    Code::MalformedRequest,
    Code::MalformedEnvelope,
    Code::ReservedContext,
    Code::Forbidden,
    Code::ContextLimit,
    Code::RateLimited,
    Code::KekDenied,
    Code::KeyRevoked,
    Code::NotFound,
    Code::KeyDestroyed,
    Code::ContextMismatch,
    Code::CiphertextDamaged,
    Code::KmsUnavailable,
    Code::StoreUnavailable,
];
const LOOKING: &[Code] = &[Code::MalformedRequest, Code::Forbidden, Code::NotFound, Code::StoreUnavailable];
const CHANGING: &[Code] =
    &[Code::MalformedRequest, Code::Forbidden, Code::NotFound, Code::Conflict, Code::StoreUnavailable];
const CHANGING_DEKS: &[Code] = &[
    Code::MalformedRequest,
    Code::Forbidden,
    Code::NotFound,
    Code::Conflict,
    Code::KeyDestroyed,
    Code::StoreUnavailable,
];
const ROTATING: &[Code] = &[
    Code::MalformedRequest,
    Code::Forbidden,
    Code::KekDenied,
    Code::KeyRevoked,
    Code::NotFound,
    Code::KmsUnavailable,
    Code::StoreUnavailable,
];
const CHANGING_KEKS: &[Code] = &[
    Code::MalformedRequest,
    Code::Forbidden,
    Code::KekDenied,
    Code::NotFound,
    Code::Conflict,
    Code::KmsUnavailable,
    Code::StoreUnavailable,
];

fn route_table(options: &Options) -> Vec<Route> {
    let time_max = Duration::from_secs(options.request_secs_max);
    let open = |methods: Methods| Route {
        methods,
        frequent: None,
        guard: Guard::Open,
        data: false,
        context: ContextRules::default(),
        body_bytes_max: 0,
        time_max,
        streams: false,
        problems: &[],
    };
    let data = |methods: Methods, problems| Route {
        methods,
        frequent: None,
        guard: Guard::Credential,
        data: true,
        context: options.context.clone(),
        body_bytes_max: options.body_bytes_max,
        time_max,
        streams: true,
        problems,
    };
    let batch = |methods: Methods, problems| Route {
        methods,
        frequent: None,
        guard: Guard::Credential,
        data: true,
        context: options.context.clone(),
        body_bytes_max: options.batch_body_bytes_max,
        time_max,
        streams: true,
        problems,
    };
    let admin = |methods: Methods, problems| Route {
        methods,
        frequent: None,
        guard: Guard::Credential,
        data: false,
        context: ContextRules::default(),
        body_bytes_max: options.admin_body_bytes_max,
        time_max,
        streams: false,
        problems,
    };
    vec![
        Route {
            frequent: Some(|path, edge, gate, state| Frequent::new(path, edge, gate, state, encrypt::answer)),
            ..data(|| routes!(encrypt::encrypt), DATA)
        },
        Route {
            frequent: Some(|path, edge, gate, state| Frequent::new(path, edge, gate, state, decrypt::answer)),
            ..data(|| routes!(decrypt::decrypt), OPENING)
        },
        Route {
            frequent: Some(|path, edge, gate, state| Frequent::new(path, edge, gate, state, rewrap::answer)),
            ..data(|| routes!(rewrap::rewrap), OPENING)
        },
        batch(|| routes!(bulk::batch::encrypt_batch), DATA),
        batch(|| routes!(bulk::batch::decrypt_batch), OPENING),
        batch(|| routes!(bulk::batch::rewrap_batch), OPENING),
        // Bytes, but no stream: what it takes is short.
        Route { streams: false, ..data(|| routes!(bulk::raw::rewrap_head), OPENING) },
        admin(|| routes!(tenants::create), CHANGING_KEKS),
        admin(|| routes!(tenants::list), LOOKING),
        admin(|| routes!(tenants::read), LOOKING),
        admin(|| routes!(tenants::update), CHANGING_KEKS),
        admin(|| routes!(keys::create), CHANGING),
        admin(|| routes!(keys::list), LOOKING),
        admin(|| routes!(keys::read), LOOKING),
        admin(|| routes!(keys::update), CHANGING),
        admin(|| routes!(deks::list), LOOKING),
        admin(|| routes!(deks::rotate), ROTATING),
        admin(|| routes!(deks::revoke), CHANGING_DEKS),
        admin(|| routes!(deks::restore), CHANGING_DEKS),
        admin(|| routes!(shreds::shred_dek), CHANGING_DEKS),
        admin(|| routes!(shreds::cancel_dek), CHANGING),
        admin(|| routes!(shreds::shred_key), CHANGING),
        admin(|| routes!(shreds::cancel_key), CHANGING),
        admin(|| routes!(shreds::shred_tenant), CHANGING),
        admin(|| routes!(shreds::cancel_tenant), CHANGING),
        admin(|| routes!(shreds::list), LOOKING),
        admin(|| routes!(jobs::list), LOOKING),
        admin(|| routes!(jobs::read), LOOKING),
        admin(|| routes!(jobs::rewrap_keys), LOOKING),
        admin(|| routes!(jobs::kek_use), LOOKING),
        admin(|| routes!(api_keys::create), CHANGING),
        admin(|| routes!(api_keys::list), LOOKING),
        admin(|| routes!(api_keys::revoke), CHANGING),
        admin(|| routes!(grants::create), CHANGING),
        admin(|| routes!(grants::list), LOOKING),
        admin(|| routes!(grants::delete), CHANGING),
        open(|| routes!(health::live)),
        open(|| routes!(health::ready)),
    ]
}

/// The whole service.
pub fn service(
    operations: Arc<Operations>,
    access: &Arc<Access>,
    probe: Arc<dyn Probe>,
    options: &Options,
    tracker: TaskTracker,
) -> Edge {
    let full = Code::Overloaded.example();
    let ids_are_read = options.recorded || !options.context.is_empty();
    let edge = EdgeLayer::new(Outermost::new(Arc::clone(&options.proxies), ids_are_read));
    let gates = Gates {
        edge: edge.clone(),
        access: Arc::clone(access),
        data: Arc::new(Admission::new(options.in_flight_max, options.fair_from_percent, full)),
        admin: Arc::new(Admission::new(options.admin_in_flight_max, options.fair_from_percent, full)),
        quotas: Quotas::new(&options.quotas, operations.clock()).map(Arc::new),
        recorder: options.recorded.then(|| Arc::clone(&operations)),
    };
    let transfers = Transfers::new(options.transfer.clone(), options.fair_from_percent, tracker);
    let open_transfers = transfers.gauge();
    let (default_key, bulk) = (KeyName::default(), BulkThreads::new());
    let batch_memory = BatchMemory::new(options.batch_memory_bytes_max);
    let state =
        HttpState { operations, probe, options: options.clone(), default_key, transfers, bulk, batch_memory };
    let state = Arc::new(Spread::new(state));
    let (mut router, mut frequent) = (axum::Router::new(), Vec::new());
    for route in route_table(options) {
        let guarded = guarded(&route, &gates, &state);
        router = router.route(&guarded.path, guarded.methods);
        frequent.extend(guarded.frequent);
    }
    // Each route has the edge with its gate, in one layer: every further one costs every request two boxes.
    let router = router
        .merge(openapi::pages().layer(edge.clone()))
        .fallback(nothing_here.layer(edge.clone()))
        .method_not_allowed_fallback(not_that_method.layer(edge))
        .with_state(state.near());
    Edge { front: Front::new(frequent, router), open_transfers }
}

async fn nothing_here() -> Problem {
    Problem::new(Code::NotFound, "there is nothing at this path")
}

async fn not_that_method() -> Problem {
    Problem::new(Code::MethodNotAllowed, Code::MethodNotAllowed.example())
}

/// The service, and what can be told of it from outside.
pub struct Edge {
    /// Everything behind the listener.
    pub front: Front,
    /// How many bodies are being streamed.
    pub open_transfers: Arc<Apart<AtomicUsize>>,
}

/// What stands before the handlers.
struct Gates {
    edge: EdgeLayer,
    access: Arc<Access>,
    data: Arc<Admission>,
    admin: Arc<Admission>,
    quotas: Option<Arc<Quotas>>,
    recorder: Option<Arc<Operations>>,
}

/// A route with its layers.
struct Guarded {
    path: SmolStr,
    methods: MethodRouter<SharedState>,
    frequent: Option<Frequent>,
}

fn guarded(route: &Route, gates: &Gates, state: &Arc<Spread<HttpState>>) -> Guarded {
    let (_, paths, mut methods) = (route.methods)();
    // Each has one.
    let path: SmolStr = paths.paths.into_keys().next().unwrap_or_default().into();
    let guarded = route.guard == Guard::Credential;
    // Not there where nobody wants it: an unused feature costs nothing.
    let quotas = gates.quotas.as_ref().filter(|_| route.data);
    if let Some(quotas) = quotas {
        methods = methods.layer(from_fn_with_state(Arc::clone(quotas), quota));
    }
    let gate = Gate {
        route: path.clone(),
        admission: guarded.then(|| Arc::clone(if route.data { &gates.data } else { &gates.admin })),
        by_principal: !route.data,
        time_max: route.time_max,
        streams: route.streams,
        body_bytes_max: route.body_bytes_max,
        access: guarded.then(|| Arc::clone(&gates.access)),
        rules: route.context.clone(),
        recorder: gates.recorder.clone(),
    };
    let (edge, gate) = (gates.edge.of(path.clone()), GateLayer::new(gate));
    // With quotas the layers are not the same.
    let frequent = route.frequent.filter(|_| quotas.is_none());
    let frequent = frequent.map(|make| make(path.clone(), edge.clone(), gate.clone(), Arc::clone(state)));
    Guarded { path, methods: methods.layer((edge, gate)), frequent }
}

/// The OpenAPI document of the service, made from its handlers and its routes. It is served as it is in the tree
/// (`openapi/v1.json`), so that a process that runs does not have to make it and to keep it.
pub fn openapi_document() -> utoipa::openapi::OpenApi {
    let mut router: OpenApiRouter<SharedState> = OpenApiRouter::with_openapi(openapi::base());
    for route in route_table(&Options::default()) {
        let (schemas, mut paths, methods) = (route.methods)();
        openapi::add_problems(
            &mut paths,
            route.guard == Guard::Credential,
            route.body_bytes_max > 0,
            route.problems,
        );
        router = router.routes((schemas, paths, methods));
    }
    let mut document = router.into_openapi();
    openapi::add_forms(&mut document);
    document
}
