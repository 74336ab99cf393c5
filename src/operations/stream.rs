//! Messages of any size, in constant memory: what comes in goes out again before more is taken.

use std::future::Future;

use bytes::Bytes;
use envelope::{
    DataKeyId, EncryptionContext, Head, HeadReader, Opener, Sealer, matches_commitment, replace_head,
};

use super::{OperationError, Operations, RewrapMode, conclude, message_context, new_salt, scope};
use crate::access::{Decrypt, Encrypt, Permit, Rewrap};
use crate::audit::Details;
use crate::pool::Opening;
use crate::store::EnvelopeWeight;
use crate::tenant::{KeyName, Verb};

/// Where the bytes come from.
pub trait Source: Send {
    /// The next piece; nothing at the end. An end that is not clean is an error.
    fn next(&mut self) -> impl Future<Output = Result<Option<Bytes>, TransferError>> + Send;
}

/// Where the bytes go. Waits while the other side takes nothing.
pub trait Sink: Send {
    /// Comes before the first piece, and says what is known by then.
    fn begin(&mut self, begun: Begun) -> impl Future<Output = Result<(), TransferError>> + Send;

    /// Takes a piece.
    fn write(&mut self, piece: Bytes) -> impl Future<Output = Result<(), TransferError>> + Send;
}

/// Why bytes did not go through.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TransferError {
    /// The body broke off.
    #[error("the body ended before it was complete")]
    BrokenOff,
    /// Nothing moved for too long.
    #[error("nothing moved for {0} seconds")]
    Idle(u64),
    /// The body is larger than is taken.
    #[error("the body is larger than the {0} bytes that this call takes")]
    TooLarge(u64),
    /// Nobody takes the bytes any more.
    #[error("the receiver has gone")]
    Gone,
}

/// What is known before the first byte goes out.
#[derive(Clone, Debug)]
pub struct Begun {
    /// The key of the tenant that is used.
    pub key: KeyName,
    /// The data key: of the envelope that goes out, or of the one that is opened.
    pub dek_id: DataKeyId,
    /// Whether rewrapping would change the envelope that is opened.
    pub rewrap_advised: Option<bool>,
    /// Whether the envelope that goes out is another one than came in.
    pub changed: Option<bool>,
}

/// A message to be sealed.
pub struct StreamEncryption {
    /// Under which of the tenant's keys.
    pub key: KeyName,
    /// The caller's context.
    pub context: EncryptionContext,
    /// What the envelope carries, where that is not to be as the key's policy says.
    pub weight: Option<EnvelopeWeight>,
}

/// An envelope to be opened.
pub struct StreamDecryption {
    /// The caller's context, the same as on encryption.
    pub context: EncryptionContext,
}

/// An envelope to be brought up to date.
pub struct StreamRewrapping {
    /// The caller's context, the same as on encryption. [`RewrapMode::WrappedKey`] does not look at it.
    pub context: EncryptionContext,
    /// How far it may go.
    pub mode: RewrapMode,
    /// What the envelope is to carry, where that is not to be as the key's policy says.
    pub weight: Option<EnvelopeWeight>,
}

impl Operations {
    /// Seals a message for the permit's tenant. It goes on under the data key that it began with, however long it
    /// is: its bytes are counted as they pass.
    pub async fn encrypt_stream(
        &self,
        permit: &Permit<Encrypt>,
        request: StreamEncryption,
        source: &mut impl Source,
        sink: &mut impl Sink,
    ) -> Result<(), OperationError> {
        let mut attempt = self.audit.begin(Verb::Encrypt, permit.who()).await?;
        let sealed = self.seal_stream(permit, request, source, sink, attempt.details()).await;
        conclude(attempt, sealed)
    }

    async fn seal_stream(
        &self,
        permit: &Permit<Encrypt>,
        request: StreamEncryption,
        source: &mut impl Source,
        sink: &mut impl Sink,
        details: &mut Details,
    ) -> Result<(), OperationError> {
        let context = message_context(request.context, permit, &request.key, details)?;
        note(details, &request.key, &context);
        let scope = scope(permit.tenant(), &request.key, permit.service_context());
        let sealing = self.pool.to_encrypt(&scope, 0).await?;
        details.with_dek(sealing.key.id());
        let section = sealing.section(request.weight);
        let mut sealer = Sealer::new(&sealing.key, new_salt()?, &section, &context);
        let dek_id = sealing.key.id();
        sink.begin(Begun { key: request.key, dek_id, rewrap_advised: None, changed: None }).await?;
        give(&mut sealer.head().to_vec(), sink, details).await?;
        let mut out = Vec::new();
        while let Some(piece) = source.next().await? {
            sealing.count_bytes(piece.len() as u64);
            details.add_bytes(piece.len(), 0);
            sealer.update(&piece, &mut out)?;
            give(&mut out, sink, details).await?;
        }
        sealer.finish(&mut out)?;
        give(&mut out, sink, details).await
    }

    /// Opens an envelope of the permit's tenant. Gives out verified segments only; that they are all is said by the
    /// `Ok` at the end and by nothing else.
    pub async fn decrypt_stream(
        &self,
        permit: &Permit<Decrypt>,
        request: StreamDecryption,
        source: &mut impl Source,
        sink: &mut impl Sink,
    ) -> Result<(), OperationError> {
        let mut attempt = self.audit.begin(Verb::Decrypt, permit.who()).await?;
        let opened = self.open_stream(permit, request, source, sink, attempt.details()).await;
        conclude(attempt, opened)
    }

    async fn open_stream(
        &self,
        permit: &Permit<Decrypt>,
        request: StreamDecryption,
        source: &mut impl Source,
        sink: &mut impl Sink,
        details: &mut Details,
    ) -> Result<(), OperationError> {
        let (head, body) = read_head(source).await?;
        details.add_bytes(head.to_bytes().len(), 0);
        details.with_dek(head.dek_id());
        let service = permit.service_context();
        let opening = self.pool.to_decrypt(permit.tenant(), &head, &service.bound).await?;
        let context = message_context(request.context, permit, &opening.scope.key, details)?;
        note(details, &opening.scope.key, &context);
        let mut opener = Opener::new(&opening.key, &context, &head)?;
        sink.begin(Begun {
            key: opening.scope.key.clone(),
            dek_id: head.dek_id(),
            rewrap_advised: Some(opening.outdated(&head)),
            changed: None,
        })
        .await?;
        let mut out = Vec::new();
        let mut piece = Some(body);
        while let Some(bytes) = piece {
            details.add_bytes(bytes.len(), 0);
            opener.update(&bytes, &mut out)?;
            give(&mut out, sink, details).await?;
            piece = source.next().await?;
        }
        opener.finish(&mut out)?;
        give(&mut out, sink, details).await
    }

    /// Brings an envelope of the permit's tenant up to date. Where its data key still serves, its body passes
    /// through untouched and nothing of it is decrypted.
    pub async fn rewrap_stream(
        &self,
        permit: &Permit<Rewrap>,
        request: StreamRewrapping,
        source: &mut impl Source,
        sink: &mut impl Sink,
    ) -> Result<(), OperationError> {
        let mut attempt = self.audit.begin(Verb::Rewrap, permit.who()).await?;
        let renewed = self.renew_stream(permit, request, source, sink, attempt.details()).await;
        conclude(attempt, renewed)
    }

    async fn renew_stream(
        &self,
        permit: &Permit<Rewrap>,
        request: StreamRewrapping,
        source: &mut impl Source,
        sink: &mut impl Sink,
        details: &mut Details,
    ) -> Result<(), OperationError> {
        let (head, body) = read_head(source).await?;
        details.add_bytes(head.to_bytes().len(), 0);
        details.with_dek(head.dek_id());
        let service = permit.service_context();
        let opening = self.pool.to_decrypt(permit.tenant(), &head, &service.bound).await?;
        let blind = request.mode == RewrapMode::WrappedKey;
        let context = if blind && !permit.needs_context(&opening.scope.key) {
            None
        } else {
            Some(checked_context(request.context, permit, &opening, &head, details)?)
        };
        note(details, &opening.scope.key, context.as_ref().unwrap_or(&EncryptionContext::new()));
        match context {
            Some(context) if !opening.active && !blind => {
                let opened = (&opening, &context, request.weight);
                self.seal_stream_again(opened, (&head, body), source, sink, details).await
            }
            _ => pass_on(&opening, request.weight, (&head, body), source, sink, details).await,
        }
    }

    async fn seal_stream_again(
        &self,
        (opening, context, weight): (&Opening, &EncryptionContext, Option<EnvelopeWeight>),
        (head, body): (&Head, Bytes),
        source: &mut impl Source,
        sink: &mut impl Sink,
        details: &mut Details,
    ) -> Result<(), OperationError> {
        let sealing = self.pool.to_encrypt(&opening.scope, 0).await?;
        let mut opener = Opener::new(&opening.key, context, head)?;
        let mut sealer = Sealer::new(&sealing.key, new_salt()?, &sealing.section(weight), context);
        sink.begin(begun(opening, sealing.key.id(), true)).await?;
        details.with_dek(sealing.key.id());
        give(&mut sealer.head().to_vec(), sink, details).await?;
        let (mut plaintext, mut out) = (zeroize::Zeroizing::new(Vec::new()), Vec::new());
        let mut piece = Some(body);
        while let Some(bytes) = piece {
            details.add_bytes(bytes.len(), 0);
            opener.update(&bytes, &mut plaintext)?;
            sealing.count_bytes(plaintext.len() as u64);
            sealer.update(&plaintext, &mut out)?;
            plaintext.clear();
            give(&mut out, sink, details).await?;
            piece = source.next().await?;
        }
        opener.finish(&mut plaintext)?;
        sealing.count_bytes(plaintext.len() as u64);
        sealer.update(&plaintext, &mut out)?;
        sealer.finish(&mut out)?;
        give(&mut out, sink, details).await
    }
}

/// The context of a message whose commitment says that it is the right one.
fn checked_context(
    context: EncryptionContext,
    permit: &Permit<Rewrap>,
    opening: &Opening,
    head: &Head,
    details: &mut Details,
) -> Result<EncryptionContext, OperationError> {
    let context = message_context(context, permit, &opening.scope.key, details)?;
    if matches_commitment(&opening.key, &context, head) {
        Ok(context)
    } else {
        Err(OperationError::ContextMismatch)
    }
}

async fn pass_on(
    opening: &Opening,
    weight: Option<EnvelopeWeight>,
    (head, body): (&Head, Bytes),
    source: &mut impl Source,
    sink: &mut impl Sink,
    details: &mut Details,
) -> Result<(), OperationError> {
    let section = opening.section(weight);
    let mut new = replace_head(&head.to_bytes(), &section)?.0;
    sink.begin(begun(opening, head.dek_id(), section != *head.wrapped())).await?;
    give(&mut new, sink, details).await?;
    let mut piece = Some(body);
    while let Some(bytes) = piece {
        details.add_bytes(bytes.len(), bytes.len());
        if !bytes.is_empty() {
            sink.write(bytes).await?;
        }
        piece = source.next().await?;
    }
    Ok(())
}

fn begun(opening: &Opening, dek_id: DataKeyId, changed: bool) -> Begun {
    Begun { key: opening.scope.key.clone(), dek_id, rewrap_advised: None, changed: Some(changed) }
}

/// The head, and what came behind it in the same piece.
async fn read_head(source: &mut impl Source) -> Result<(Head, Bytes), OperationError> {
    let mut reader = HeadReader::new();
    while let Some(piece) = source.next().await? {
        if let Some((head, body)) = reader.push(&piece)? {
            let body = piece.slice(piece.len() - body.len()..);
            return Ok((head, body));
        }
    }
    Err(reader.unfinished().into())
}

/// What there is to record before the first byte goes out.
fn note(details: &mut Details, key: &KeyName, context: &EncryptionContext) {
    if details.are_wanted() {
        details.with_key(key);
        details.with_context(context.clone());
    }
}

/// Hands on what is there.
async fn give(out: &mut Vec<u8>, sink: &mut impl Sink, details: &mut Details) -> Result<(), OperationError> {
    if !out.is_empty() {
        details.add_bytes(0, out.len());
        sink.write(std::mem::take(out).into()).await?;
    }
    Ok(())
}
