//! The layers around every handler. `http/mod.rs` says in which order they stand.

pub(super) mod admission;
pub(super) mod authenticate;
pub(super) mod context;
pub(super) mod edge;
pub(super) mod gate;
pub(super) mod quota;
