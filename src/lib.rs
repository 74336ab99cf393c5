//! keyfold.
pub mod clock;
pub mod tenant;
pub mod kms;
pub mod store;
pub mod access;
pub mod pool;
