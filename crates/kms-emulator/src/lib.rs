//! An AWS KMS of real semantics, for tests and demonstrations.
//!
//! The emulator speaks the wire protocol of AWS KMS (JSON 1.1, `TrentService.*`) and as much of STS as
//! assuming a role takes, for several regions and accounts behind one listener. What it does not do:
//! verify signatures, keep its keys safe (the state file holds them in the clear), or evaluate grants.
//!
//! ```no_run
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! use kms_emulator::{CreateKey, Emulator, Fault, FaultScope};
//!
//! let kms = Emulator::builder().region("eu-west-1").region("eu-central-1").start().await?;
//! let key = kms.create_key("eu-west-1", CreateKey::new().alias("alias/demo"))?;
//! kms.faults().set(FaultScope::region("eu-west-1").operation("Decrypt"), Fault::BlackHole);
//! // ... point an SDK at kms.url() ...
//! assert_eq!(kms.count("GenerateDataKey"), 1);
//! kms.disable_key(&key)?;
//! kms.shutdown().await;
//! # Ok(())
//! # }
//! ```

mod arn;
mod blob;
mod builder;
mod calls;
mod clock;
mod context;
mod directory;
mod emulator;
mod engine;
mod error;
mod faults;
mod ops;
mod policy;
mod server;

pub use builder::{Builder, StartError};
pub use calls::{Call, Mark, Outcome};
pub use context::EncryptionContext;
pub use directory::{Principal, Role};
pub use emulator::{CreateKey, Emulator};
pub use error::KmsError;
pub use faults::{Fault, FaultId, FaultRule, FaultScope, Faults};
