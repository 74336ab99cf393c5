//! The emulator over HTTP, driven by AWS's own SDK for Rust and by boto3.

#![expect(clippy::unwrap_used, reason = "a test ends where it is surprised")]

mod accounts;
mod aliases;
mod boto3;
mod calls;
mod credentials;
mod crypto;
mod faults;
mod policies;
mod program;
mod replicas;
mod restart;
mod rotation;
mod states;
mod world;
