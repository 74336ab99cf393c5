//! Open one envelope.

use envelope::{DataKeyId, EncryptionContext, Head, inspect, open_in_place};
use zeroize::Zeroizing;

use super::{OperationError, Operations, message_context};
use crate::access::{Decrypt, Permit};
use crate::pool::Opening;
use crate::tenant::{KeyName, Verb};

/// An envelope to be opened.
pub struct Decryption {
    /// The envelope; it is opened in place.
    pub envelope: Vec<u8>,
    /// The caller's context, the same as on encryption.
    pub context: EncryptionContext,
}

/// An opened envelope.
pub struct Decrypted {
    buffer: Zeroizing<Vec<u8>>,
    plaintext_bytes: usize,
    body_offset: usize,
    /// The key under which it was sealed.
    pub key: KeyName,
    /// The data key that opened it.
    pub dek_id: DataKeyId,
    /// Whether rewrapping would change it.
    pub rewrap_advised: bool,
}

impl Decrypted {
    /// The message.
    pub fn plaintext(&self) -> &[u8] {
        &self.buffer[self.body_offset..self.body_offset + self.plaintext_bytes]
    }
}

impl Operations {
    /// Opens an envelope of the permit's tenant.
    pub async fn decrypt(
        &self,
        permit: &Permit<Decrypt>,
        request: Decryption,
    ) -> Result<Decrypted, OperationError> {
        let attempt = self.audit.begin(Verb::Decrypt, permit.principal(), permit.tenant());
        match self.open(permit, request).await {
            Ok(decrypted) => {
                attempt.done();
                Ok(decrypted)
            }
            Err(error) => {
                attempt.failed(&error);
                // The audit has the difference: outside, a section that is not believed is one more wrong context.
                Err(error.told())
            }
        }
    }

    async fn open(&self, permit: &Permit<Decrypt>, request: Decryption) -> Result<Decrypted, OperationError> {
        let head = inspect(&request.envelope)?;
        let opening = self.pool.to_decrypt(permit.tenant(), &head, &permit.service_context().bound).await?;
        open_with(&opening, &head, permit, request)
    }
}

/// Opens an envelope whose data key is found.
pub(super) fn open_with(
    opening: &Opening,
    head: &Head,
    permit: &Permit<Decrypt>,
    request: Decryption,
) -> Result<Decrypted, OperationError> {
    let key = opening.scope.key.clone();
    let context = message_context(request.context, permit, &key)?;
    let rewrap_advised = opening.outdated(head);
    let mut buffer = Zeroizing::new(request.envelope);
    let plaintext_bytes = open_in_place(&opening.key, &context, &mut buffer)?.len();
    let (body_offset, dek_id) = (head.body_offset(), head.dek_id());
    Ok(Decrypted { buffer, plaintext_bytes, body_offset, key, dek_id, rewrap_advised })
}
