//! keyfold.
pub mod access;
pub mod app;
pub mod audit;
pub mod cli;
pub mod clock;
pub mod config;
pub mod http;
pub mod kms;
pub mod lifecycle;
pub mod operations;
pub mod pool;
pub mod rotation;
pub mod store;
pub mod telemetry;
pub mod tenant;
