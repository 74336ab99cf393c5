//! Seal one message.

use envelope::{DataKeyId, EncryptionContext, head_bytes, seal_in_place, sealed_bytes};

use super::{OperationError, Operations, conclude, message_context, new_salt, scope};
use crate::access::{Encrypt, Permit};
use crate::audit::Attempt;
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
        let outcome = self.seal(permit, request, &mut attempt).await;
        conclude(attempt, outcome)
    }

    async fn seal(
        &self,
        permit: &Permit<Encrypt>,
        request: Encryption<'_>,
        attempt: &mut Attempt<'_>,
    ) -> Result<Encrypted, OperationError> {
        attempt.with_key(&request.key);
        let service = permit.service_context();
        let context = message_context(request.context, service, permit.tenant(), &request.key)?;
        let sealed = self.seal_with(permit, &request.key, &context, request.plaintext, request.weight).await;
        attempt.with_context(context);
        let (envelope, dek_id, bytes) = sealed?;
        attempt.with_dek(dek_id);
        attempt.with_bytes(bytes, envelope.len());
        Ok(Encrypted { envelope, key: request.key, dek_id })
    }

    /// The envelope, its data key, and how many bytes of plaintext it holds.
    async fn seal_with(
        &self,
        permit: &Permit<Encrypt>,
        key: &KeyName,
        context: &EncryptionContext,
        plaintext: &(dyn Plaintext + Sync),
        weight: Option<EnvelopeWeight>,
    ) -> Result<(Vec<u8>, DataKeyId, usize), OperationError> {
        plaintext.check()?;
        let scope = scope(permit.tenant(), key, permit.service_context());
        let bytes_max = plaintext.bytes_max();
        let sealing = self.pool.to_encrypt(&scope, bytes_max as u64).await?;
        let section = sealing.section(weight);
        let mut buffer = Vec::with_capacity(sealed_bytes(&section, bytes_max));
        buffer.resize(head_bytes(&section), 0);
        if let Err(error) = plaintext.append_to(&mut buffer) {
            zeroize::Zeroize::zeroize(&mut buffer);
            return Err(error);
        }
        let plaintext_bytes = buffer.len() - head_bytes(&section);
        seal_in_place(&sealing.key, new_salt()?, &section, context, &mut buffer)?;
        Ok((buffer, sealing.key.id(), plaintext_bytes))
    }
}
