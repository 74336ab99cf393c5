//! keyfold.
pub mod clock;
pub mod kms;
pub mod store;
pub mod tenant;
