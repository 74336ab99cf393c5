//! The tests of the whole: what a user of the service, its command line or its rooms could notice.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on ends with a panic")]

mod airports;
mod api;
mod bad_input;
mod caller;
mod contract;
mod forgeries;
mod keyring_file;
mod kms_aws;
mod kms_contract;
mod lanes;
mod kms_moto;
mod layering;
mod pki;
mod pool;
mod probes;
mod readme;
mod service;
mod store_contract;
mod store_model;
mod store_sqlite;
mod tls;
