//! Tests.

mod store_contract;
mod store_model;
mod store_sqlite;
