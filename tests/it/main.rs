//! The tests of the whole: what a user of the service, its command line or its rooms could notice.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on ends with a panic")]

mod api;
mod audit;
mod caller;
mod context;
mod contract;
mod keyring_file;
mod kms_contract;
mod layering;
mod readme;
mod pool;
mod probes;
mod quota;
mod service;
mod store_contract;
mod store_model;
mod store_sqlite;
