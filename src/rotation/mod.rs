//! Rotation.
pub mod sweep;
