//! Seal one message.

use envelope::{DataKeyId, EncryptionContext, Salt, head_bytes, seal_in_place, sealed_bytes};

use super::{OperationError, Operations, conclude, message_context, new_salt, scope};
use crate::access::{Encrypt, Permit};
use crate::audit::Details;
use crate::pool::Sealing;
use crate::store::EnvelopeWeight;
use crate::tenant::{KeyName, Verb};

/// A message to be sealed.
pub struct Encryption<'a> {
    /// Under which of the tenant's keys.
    pub key: KeyName,
    /// The caller's context.
    pub context: EncryptionContext,
    /// What the envelope carries, where that is not to be as the key's policy says.
    pub weight: Option<EnvelopeWeight>,
    /// The message.
    pub plaintext: &'a (dyn Plaintext + Sync),
}

/// A message that can be written where it will be sealed, so that it is copied once and not twice.
pub trait Plaintext {
    /// Its length in bytes, or a little more where that is not known before it is decoded.
    fn bytes_max(&self) -> usize;

    /// What can be told to be wrong with it before anything is done.
    fn check(&self) -> Result<(), OperationError>;

    /// Appends the message. What it wrote before an error is wiped by the caller.
    fn append_to(&self, buffer: &mut Vec<u8>) -> Result<(), OperationError>;
}

/// A sealed message.
pub struct Encrypted {
    /// The envelope.
    pub envelope: Vec<u8>,
    /// The key that was used.
    pub key: KeyName,
    /// The data key that was used.
    pub dek_id: DataKeyId,
}

impl Operations {
    /// Seals a message for the permit's tenant.
    pub async fn encrypt(
        &self,
        permit: &Permit<Encrypt>,
        request: Encryption<'_>,
    ) -> Result<Encrypted, OperationError> {
        let mut attempt = self.audit.begin(Verb::Encrypt, permit.who()).await?;
        let outcome = self.seal(permit, request, attempt.details()).await;
        conclude(attempt, outcome)
    }

    async fn seal(
        &self,
        permit: &Permit<Encrypt>,
        mut request: Encryption<'_>,
        details: &mut Details,
    ) -> Result<Encrypted, OperationError> {
        let context = std::mem::take(&mut request.context);
        let context = message_context(context, permit, &request.key, details)?;
        let bytes_max = request.plaintext.bytes_max();
        let sealed = self.seal_now(permit, &context, request).await;
        details.with_context(context);
        if let Ok(sealed) = &sealed {
            details.with_dek(sealed.dek_id);
            details.with_bytes(bytes_max, sealed.envelope.len());
        }
        sealed
    }

    async fn seal_now(
        &self,
        permit: &Permit<Encrypt>,
        context: &EncryptionContext,
        request: Encryption<'_>,
    ) -> Result<Encrypted, OperationError> {
        request.plaintext.check()?;
        let scope = scope(permit.tenant(), &request.key, permit.service_context());
        let sealing = self.pool.to_encrypt(&scope, request.plaintext.bytes_max() as u64).await?;
        seal_with(&sealing, new_salt()?, context, request)
    }
}

/// Seals a message that was checked and admitted.
pub(super) fn seal_with(
    sealing: &Sealing,
    salt: Salt,
    context: &EncryptionContext,
    request: Encryption<'_>,
) -> Result<Encrypted, OperationError> {
    let section = sealing.section(request.weight);
    let mut buffer = Vec::with_capacity(sealed_bytes(&section, request.plaintext.bytes_max()));
    buffer.resize(head_bytes(&section), 0);
    if let Err(error) = request.plaintext.append_to(&mut buffer) {
        zeroize::Zeroize::zeroize(&mut buffer);
        return Err(error);
    }
    seal_in_place(&sealing.key, salt, &section, context, &mut buffer)?;
    Ok(Encrypted { envelope: buffer, key: request.key, dek_id: sealing.key.id() })
}
