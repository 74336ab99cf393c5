//! Tests.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on ends with a panic")]

mod keyring_file;
mod kms_contract;
