//! Open one envelope.

use envelope::{DataKeyId, EncryptionContext, Head, open_body_in_place};

use super::{OperationError, Operations, Wiped, conclude, message_context};
use crate::access::{Decrypt, Permit};
use crate::audit::Details;
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
    buffer: Wiped,
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
        &self.buffer.0[self.body_offset..self.body_offset + self.plaintext_bytes]
    }
}

impl Operations {
    /// Opens an envelope of the permit's tenant.
    pub async fn decrypt(
        &self,
        permit: &Permit<Decrypt>,
        request: Decryption,
    ) -> Result<Decrypted, OperationError> {
        let mut attempt = self.audit.begin(Verb::Decrypt, permit.who()).await?;
        let outcome = self.open(permit, request, attempt.details()).await;
        conclude(attempt, outcome)
    }

    async fn open(
        &self,
        permit: &Permit<Decrypt>,
        request: Decryption,
        details: &mut Details,
    ) -> Result<Decrypted, OperationError> {
        details.with_bytes(request.envelope.len(), 0);
        let head = self.pool.inspect(permit.tenant(), &request.envelope)?;
        details.with_dek(head.dek_id());
        let opening = self.pool.to_decrypt(permit.tenant(), &head, &permit.service_context().bound).await?;
        open_with(&opening, &head, permit, request, details)
    }
}

/// Opens an envelope whose data key is found.
pub(super) fn open_with(
    opening: &Opening,
    head: &Head,
    permit: &Permit<Decrypt>,
    request: Decryption,
    details: &mut Details,
) -> Result<Decrypted, OperationError> {
    let key = opening.scope.key.clone();
    let context = message_context(request.context, permit, &key, details)?;
    let rewrap_advised = opening.outdated(head);
    let mut buffer = Wiped(request.envelope);
    let opened =
        open_body_in_place(&opening.key, &context, head, &mut buffer.0).map(|plaintext| plaintext.len());
    details.with_context(context);
    details.with_bytes(buffer.0.len(), *opened.as_ref().unwrap_or(&0));
    let plaintext_bytes = opened?;
    let (body_offset, dek_id) = (head.body_offset(), head.dek_id());
    Ok(Decrypted { buffer, plaintext_bytes, body_offset, key, dek_id, rewrap_advised })
}
