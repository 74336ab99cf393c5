//! The operations of AWS KMS.

mod aliases;
mod crypto;
mod deletion;
mod input;
mod keys;
mod lookup;
mod metadata;
mod policies;
mod replicas;
mod rotation;

use serde_json::Value;

pub(crate) use lookup::arrival;

use crate::clock::Timestamp;
use crate::directory::Caller;
use crate::engine::State;
use crate::error::KmsError;

/// What an operation works on and with.
#[derive(Debug)]
pub(crate) struct Work<'a> {
    pub(crate) state: &'a mut State,
    pub(crate) caller: &'a Caller,
    pub(crate) now: Timestamp,
    pub(crate) regions: &'a [String],
    /// Plaintext data keys that the operation has generated.
    pub(crate) data_keys: Vec<Vec<u8>>,
    /// Set by an operation that has changed the state.
    pub(crate) changed: bool,
}

/// Runs `operation` with the parameters in `body`. On an error nothing has changed.
pub(crate) fn run(work: &mut Work<'_>, operation: &str, body: Value) -> Result<Value, KmsError> {
    match operation {
        "CreateKey" => keys::create(work, input::parse(body)?),
        "DescribeKey" => keys::describe(work, &input::parse(body)?),
        "ListKeys" => keys::list(work, &input::parse(body)?),
        "ListResourceTags" => keys::list_tags(work, &input::parse(body)?),
        "EnableKey" => keys::enable(work, &input::parse(body)?),
        "DisableKey" => keys::disable(work, &input::parse(body)?),
        "CreateAlias" => aliases::create(work, &input::parse(body)?),
        "UpdateAlias" => aliases::update(work, &input::parse(body)?),
        "DeleteAlias" => aliases::delete(work, &input::parse(body)?),
        "ListAliases" => aliases::list(work, &input::parse(body)?),
        "GenerateDataKey" => crypto::generate_data_key(work, &input::parse(body)?),
        "GenerateDataKeyWithoutPlaintext" => {
            crypto::generate_data_key_without_plaintext(work, &input::parse(body)?)
        }
        "Encrypt" => crypto::encrypt(work, &input::parse(body)?),
        "Decrypt" => crypto::decrypt(work, &input::parse(body)?),
        "ReEncrypt" => crypto::re_encrypt(work, &input::parse(body)?),
        "ScheduleKeyDeletion" => deletion::schedule(work, &input::parse(body)?),
        "CancelKeyDeletion" => deletion::cancel(work, &input::parse(body)?),
        "EnableKeyRotation" => rotation::enable(work, &input::parse(body)?),
        "DisableKeyRotation" => rotation::disable(work, &input::parse(body)?),
        "RotateKeyOnDemand" => rotation::rotate_on_demand(work, &input::parse(body)?),
        "ListKeyRotations" => rotation::list(work, &input::parse(body)?),
        "GetKeyRotationStatus" => rotation::status(work, &input::parse(body)?),
        "ReplicateKey" => replicas::replicate(work, input::parse(body)?),
        "PutKeyPolicy" => policies::put(work, &input::parse(body)?),
        "GetKeyPolicy" => policies::get(work, &input::parse(body)?),
        "ListKeyPolicies" => policies::list(work, &input::parse(body)?),
        _ => Err(KmsError::unknown_operation()),
    }
}
