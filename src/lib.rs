//! keyfold.
pub mod access;
pub mod audit;
pub mod clock;
pub mod http;
pub mod kms;
pub mod operations;
pub mod pool;
pub mod store;
pub mod tenant;
