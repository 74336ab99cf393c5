//! The tests of the whole: what a user of the service, its command line or its rooms could notice.
#![allow(clippy::print_stderr, clippy::zombie_processes, reason = "tests are held to what finds faults")]
#![allow(
    clippy::duration_suboptimal_units,
    clippy::match_same_arms,
    clippy::similar_names,
    clippy::type_complexity,
    reason = "numbers, tables and names stand as what they test has them"
)]
#![allow(
    clippy::case_sensitive_file_extension_comparisons,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::unchecked_time_subtraction,
    clippy::unnecessary_debug_formatting,
    reason = "a test knows its values, and fails where it is wrong about them"
)]
#![allow(
    clippy::assigning_clones,
    clippy::format_collect,
    clippy::format_push_string,
    clippy::large_stack_arrays,
    clippy::naive_bytecount,
    clippy::single_match_else,
    reason = "brevity counts more here than speed"
)]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on ends with a panic")]

mod airports;
mod api;
mod aws_memory;
mod audit;
mod audit_commands;
mod aws_program;
mod aws_reach;
mod aws_service;
mod aws_world;
mod bad_input;
mod bulk;
mod caller;
mod cli;
mod compose;
mod context;
mod contract;
mod docs;
mod fairness;
mod fencing;
mod forgeries;
mod fuzzed;
mod keyring_file;
mod guard;
mod hardening;
mod kill;
mod killed;
mod kms_aws;
mod kms_contract;
mod kms_moto;
mod lanes;
mod matrix;
mod layering;
mod listener;
mod pki;
mod tokens;
mod grants;
mod openapi;
mod outage;
mod pool;
mod probes;
mod postgres_server;
mod quota;
mod program;
mod readme;
mod registry_grants;
mod reencrypt;
mod rotation;
mod rotation_commands;
mod rotation_contract;
mod secrets_stay_secret;
mod security_page;
mod service;
mod shutdown;
mod store_contract;
mod store_model;
mod store_sqlite;
mod tls;
