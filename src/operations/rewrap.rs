//! Bring one envelope to what encryption would make today.

use envelope::{
    DataKeyId, EncryptionContext, Head, head_bytes, inspect, matches_commitment, open_in_place,
    seal_in_place, sealed_bytes, with_wrapped_keys,
};
use zeroize::Zeroizing;

use super::{OperationError, Operations, conclude, message_context, new_salt};
use crate::access::{Permit, Rewrap};
use crate::audit::Attempt;
use crate::pool::Opening;
use crate::store::EnvelopeWeight;
use crate::tenant::Verb;

/// An envelope to be brought up to date.
pub struct Rewrapping {
    /// The envelope.
    pub envelope: Vec<u8>,
    /// The caller's context, the same as on encryption. [`RewrapMode::WrappedKey`] does not look at it.
    pub context: EncryptionContext,
    /// How far it may go.
    pub mode: RewrapMode,
    /// What the envelope is to carry, where that is not to be as the key's policy says.
    pub weight: Option<EnvelopeWeight>,
}

/// How far rewrapping may go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RewrapMode {
    /// Whatever is needed: where the data key is retired, the message is sealed again under the active one.
    #[default]
    Auto,
    /// Only the wrapped-key section is ever replaced: no message is decrypted and no context is needed.
    WrappedKey,
}

/// An envelope that is up to date.
#[derive(Debug)]
pub struct Rewrapped {
    /// The envelope.
    pub envelope: Vec<u8>,
    /// Whether it is another one than was given.
    pub changed: bool,
    /// The data key of the envelope that was given.
    pub from_dek_id: DataKeyId,
    /// The data key of the envelope that is returned.
    pub to_dek_id: DataKeyId,
}

impl Operations {
    /// Brings an envelope of the permit's tenant up to date. Its plaintext never leaves this function.
    pub async fn rewrap(
        &self,
        permit: &Permit<Rewrap>,
        request: Rewrapping,
    ) -> Result<Rewrapped, OperationError> {
        let bytes_in = request.envelope.len();
        let mut attempt = self.audit.begin(Verb::Rewrap, permit.who()).await?;
        let outcome = self.renew(permit, request, &mut attempt).await;
        if let Ok(rewrapped) = &outcome {
            attempt.with_dek(rewrapped.to_dek_id);
            attempt.with_bytes(bytes_in, rewrapped.envelope.len());
        }
        conclude(attempt, outcome)
    }

    async fn renew(
        &self,
        permit: &Permit<Rewrap>,
        request: Rewrapping,
        attempt: &mut Attempt<'_>,
    ) -> Result<Rewrapped, OperationError> {
        let head = inspect(&request.envelope)?;
        attempt.with_dek(head.dek_id());
        let service = permit.service_context();
        let opening = self.pool.to_decrypt(permit.tenant(), &head, &service.bound).await?;
        attempt.with_key(&opening.scope.key);
        if request.mode == RewrapMode::WrappedKey {
            return replace_section(request.envelope, &head, &opening, request.weight);
        }
        let context = message_context(request.context, service, permit.tenant(), &opening.scope.key)?;
        let renewed = if !matches_commitment(&opening.key, &context, &head) {
            Err(OperationError::ContextMismatch)
        } else if opening.active {
            replace_section(request.envelope, &head, &opening, request.weight)
        } else {
            self.seal_again(request.envelope, &head, &opening, &context, request.weight).await
        };
        attempt.with_context(context);
        renewed
    }

    async fn seal_again(
        &self,
        envelope: Vec<u8>,
        head: &Head,
        opening: &Opening,
        context: &EncryptionContext,
        weight: Option<EnvelopeWeight>,
    ) -> Result<Rewrapped, OperationError> {
        let mut envelope = Zeroizing::new(envelope);
        let plaintext = open_in_place(&opening.key, context, &mut envelope)?;
        let sealing = self.pool.to_encrypt(&opening.scope, plaintext.len() as u64).await?;
        let section = sealing.section(weight);
        let mut buffer = Vec::with_capacity(sealed_bytes(&section, plaintext.len()));
        buffer.resize(head_bytes(&section), 0);
        buffer.extend_from_slice(plaintext);
        seal_in_place(&sealing.key, new_salt()?, &section, context, &mut buffer)?;
        let (from_dek_id, to_dek_id) = (head.dek_id(), sealing.key.id());
        Ok(Rewrapped { envelope: buffer, changed: true, from_dek_id, to_dek_id })
    }
}

fn replace_section(
    envelope: Vec<u8>,
    head: &Head,
    opening: &Opening,
    weight: Option<EnvelopeWeight>,
) -> Result<Rewrapped, OperationError> {
    let section = opening.section(weight);
    let changed = section != *head.wrapped();
    let envelope = if changed { with_wrapped_keys(&envelope, &section)? } else { envelope };
    let id = head.dek_id();
    Ok(Rewrapped { envelope, changed, from_dek_id: id, to_dek_id: id })
}
