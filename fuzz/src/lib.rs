//! What libFuzzer calls. The targets are plain functions, which `tests/it/fuzzed.rs` calls too.
#![forbid(unsafe_code)]

pub mod targets;
