//! keyfold: encryption as a service. Envelope encryption over HTTP, with a cached data key for each tenant, and master
//! keys in AWS KMS or in an embedded key ring.
//!
//! The way of a request, by the modules ("rooms") it passes:
//!
//! ```text
//!   client ──► http::server ──► http::middleware ──► http::handlers ──► operations ──► pool ──► envelope::seal
//!              sockets, limits  request id, limits,  JSON <-> values    the verb, on   the      (crates/envelope)
//!                               access: who is it?                      a Permit of    data key
//!                                                                       access; audit     │ only where it is not
//!              http::problem  ◄──────────── an error, whatever its room ────┘             ▼ in memory
//!              (status, code)                                                         store, kms
//! ```
//!
//! On the hot path there is no lock that waits, no database and no KMS. The modules are declared in layer order: each
//! knows only some of those above it. ARCHITECTURE.md says which and why; `tests/it/layering.rs` holds them to it.

// Words: parsed once, valid ever after; and the time.
pub mod clock;
pub mod tenant;
pub mod quota;
pub mod spread;

// What we rely on: whoever keeps the master keys, and the registry.
pub mod kms;
pub mod store;

// Who, and what they did.
pub mod audit;
pub mod access;

// The work: data keys in memory, the verbs, and the change of keys.
pub mod pool;
pub mod operations;
pub mod rotation;

// The edge.
pub mod http;

// Files straight against a KMS, without the service: the users' insurance.
pub mod offline;

// Assembly: the process, its settings, the one place that knows all rooms, and the command line.
pub mod telemetry;
pub mod lifecycle;
pub mod config;
pub mod app;
pub mod cli;
