//! Bring one envelope to what encryption would make today.

use envelope::{
    DataKeyId, EncryptionContext, Head, Salt, head_bytes, inspect, matches_commitment, open_body_in_place,
    replace_head, seal_in_place, sealed_bytes, with_wrapped_keys,
};

use super::{OperationError, Operations, Wiped, conclude, message_context, new_salt};
use crate::access::{Forbidden, Permit, Rewrap};
use crate::audit::Details;
use crate::pool::{Opening, Sealing};
use crate::store::EnvelopeWeight;
use crate::tenant::Verb;

/// An envelope to be brought up to date.
pub struct Rewrapping {
    /// The envelope.
    pub envelope: Vec<u8>,
    /// The caller's context, the same as on encryption. [`RewrapMode::WrappedKey`] looks at
    /// it only where the permit depends on it.
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
    /// Only the wrapped-key section is ever replaced: no message is decrypted, and no context is needed, but for
    /// callers who may rewrap only with certain contexts.
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

impl Rewrapped {
    /// What there is to record of it.
    pub(super) fn tell(&self, bytes_in: usize, details: &mut Details) {
        details.with_dek(self.to_dek_id);
        details.with_bytes(bytes_in, self.envelope.len());
    }
}

/// The head of an envelope, brought up to date without its body.
#[derive(Debug)]
pub struct NewHead {
    /// The new head.
    pub head: Vec<u8>,
    /// How many bytes at the beginning of the old envelope it stands for.
    pub replaces_bytes: usize,
    /// Whether it is another one than was given.
    pub changed: bool,
    /// The envelope's data key.
    pub dek_id: DataKeyId,
    /// Whether rewrapping the whole envelope would do more: its data key is retired.
    pub rewrap_advised: bool,
}

impl Operations {
    /// Brings the head of an envelope up to date. `beginning` holds the whole head, and whatever of the body.
    pub async fn rewrap_head(
        &self,
        permit: &Permit<Rewrap>,
        beginning: &[u8],
        weight: Option<EnvelopeWeight>,
    ) -> Result<NewHead, OperationError> {
        let mut attempt = self.audit.begin(Verb::Rewrap, permit.who()).await?;
        let outcome = self.renew_head(permit, beginning, weight, attempt.details()).await;
        conclude(attempt, outcome)
    }

    async fn renew_head(
        &self,
        permit: &Permit<Rewrap>,
        beginning: &[u8],
        weight: Option<EnvelopeWeight>,
        details: &mut Details,
    ) -> Result<NewHead, OperationError> {
        let head = inspect(beginning)?;
        details.with_dek(head.dek_id());
        let opening = self.pool.to_decrypt(permit.tenant(), &head, &permit.service_context().bound).await?;
        let key = &opening.scope.key;
        details.with_key(key);
        if permit.needs_context(key) {
            permit.covers(key, &EncryptionContext::new())?;
            // A head alone does not show what its message was bound to.
            return Err(Forbidden::Context(Verb::Rewrap).into());
        }
        let section = opening.section(weight);
        let (new, replaces_bytes) = replace_head(beginning, &section)?;
        details.with_bytes(beginning.len(), new.len());
        Ok(NewHead {
            head: new,
            replaces_bytes,
            changed: section != *head.wrapped(),
            dek_id: head.dek_id(),
            rewrap_advised: !opening.active,
        })
    }

    /// Brings an envelope of the permit's tenant up to date. Its plaintext never leaves this function.
    pub async fn rewrap(
        &self,
        permit: &Permit<Rewrap>,
        request: Rewrapping,
    ) -> Result<Rewrapped, OperationError> {
        let mut attempt = self.audit.begin(Verb::Rewrap, permit.who()).await?;
        let outcome = self.renew(permit, request, attempt.details()).await;
        conclude(attempt, outcome)
    }

    async fn renew(
        &self,
        permit: &Permit<Rewrap>,
        request: Rewrapping,
        details: &mut Details,
    ) -> Result<Rewrapped, OperationError> {
        let bytes_in = request.envelope.len();
        let head = self.pool.inspect(permit.tenant(), &request.envelope)?;
        details.with_dek(head.dek_id());
        let opening = self.pool.to_decrypt(permit.tenant(), &head, &permit.service_context().bound).await?;
        let rewrapped = match renew_in_place(&opening, &head, permit, request, details)? {
            Renewed::Whole(rewrapped) => rewrapped,
            Renewed::Opened(opened) => {
                let bytes = opened.plaintext().len() as u64;
                let sealing = self.pool.to_encrypt(&opening.scope, bytes).await?;
                opened.seal(&sealing, new_salt()?)?
            }
        };
        rewrapped.tell(bytes_in, details);
        Ok(rewrapped)
    }
}

/// How far an envelope gets without the active data key.
pub(super) enum Renewed {
    /// All the way.
    Whole(Rewrapped),
    /// Its data key is retired: the message has to be sealed again.
    Opened(Opened),
}

/// A message on its way from one data key to another.
pub(super) struct Opened {
    envelope: Wiped,
    plaintext: std::ops::Range<usize>,
    context: EncryptionContext,
    weight: Option<EnvelopeWeight>,
    from_dek_id: DataKeyId,
}

impl Opened {
    pub(super) fn plaintext(&self) -> &[u8] {
        &self.envelope.0[self.plaintext.clone()]
    }

    pub(super) fn seal(self, sealing: &Sealing, salt: Salt) -> Result<Rewrapped, OperationError> {
        let section = sealing.section(self.weight);
        let mut buffer = Vec::with_capacity(sealed_bytes(&section, self.plaintext.len()));
        buffer.resize(head_bytes(&section), 0);
        buffer.extend_from_slice(self.plaintext());
        seal_in_place(&sealing.key, salt, &section, &self.context, &mut buffer)?;
        let (from_dek_id, to_dek_id) = (self.from_dek_id, sealing.key.id());
        Ok(Rewrapped { envelope: buffer, changed: true, from_dek_id, to_dek_id })
    }
}

/// Renews an envelope whose data key is found, as far as that data key reaches.
pub(super) fn renew_in_place(
    opening: &Opening,
    head: &Head,
    permit: &Permit<Rewrap>,
    request: Rewrapping,
    details: &mut Details,
) -> Result<Renewed, OperationError> {
    let Rewrapping { envelope, context, mode, weight } = request;
    details.with_key(&opening.scope.key);
    let blind = mode == RewrapMode::WrappedKey;
    // Who may rewrap only with certain contexts shows that it is one of them, whatever the mode.
    if blind && !permit.needs_context(&opening.scope.key) {
        return replace_section(envelope, head, opening, weight).map(Renewed::Whole);
    }
    let context = message_context(context, permit, &opening.scope.key, details)?;
    if details.are_wanted() {
        details.with_context(context.clone());
    }
    if !matches_commitment(&opening.key, &context, head) {
        return Err(OperationError::ContextMismatch);
    }
    if blind || opening.active {
        return replace_section(envelope, head, opening, weight).map(Renewed::Whole);
    }
    let mut envelope = Wiped(envelope);
    let bytes = open_body_in_place(&opening.key, &context, head, &mut envelope.0)?.len();
    let plaintext = head.body_offset()..head.body_offset() + bytes;
    Ok(Renewed::Opened(Opened { envelope, plaintext, context, weight, from_dek_id: head.dek_id() }))
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
