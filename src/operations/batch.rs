//! Many messages in one go: a batch, or a stretch of a longer stream of items.
//!
//! Each data key is looked up once and each stretch draws its salts at once; everything else is as for one message,
//! and each item fails or succeeds by itself. Held for moments only: what the pool would say differently a minute
//! later, it is asked again by the next stretch.

use std::collections::HashMap;

use envelope::{DataKeyId, EncryptionContext, FormatError, Head, Salt, inspect_known};

use super::decrypt::open_with;
use super::encrypt::seal_with;
use super::rewrap::{Renewed, renew_in_place};
use super::{
    Decrypted, Decryption, Encrypted, Encryption, OperationError, Operations, Rewrapped, Rewrapping,
    message_context, scope,
};
use crate::access::{Decrypt, Encrypt, Permit, PermitVerb, Rewrap};
use crate::audit::{Attempt, Details, PartTally, Tally};
use crate::pool::{DekPool, Opening, PoolError, Sealing};
use crate::store::DekScope;
use crate::tenant::KeyName;

/// Seals many messages.
pub struct Encryptor<'a> {
    permit: &'a Permit<Encrypt>,
    sealings: Sealings<'a>,
    salts: Salts,
    tally: PartTally,
}

/// Many messages of one caller: one record of the audit for all of them.
pub struct Batch<'a> {
    attempt: Attempt<'a>,
    tally: Option<Tally>,
}

impl Batch<'_> {
    /// Where the parts of it count what they do; none where nothing is recorded.
    pub fn tally(&self) -> Option<Tally> {
        self.tally.clone()
    }

    /// All parts were worked through.
    pub fn finish(self) {
        self.attempt.worked_through();
    }

    /// It did not come to its end.
    pub fn broken_off(self, code: &'static str, reason: &dyn std::fmt::Display) {
        self.attempt.failed(code, reason);
    }
}

impl Operations {
    /// Begins a batch.
    pub async fn batch<'a, V: PermitVerb>(
        &'a self,
        permit: &'a Permit<V>,
    ) -> Result<Batch<'a>, OperationError> {
        let mut attempt = self.audit.begin(V::VERB, permit.who()).await?;
        let tally = attempt.tally();
        Ok(Batch { attempt, tally })
    }

    /// Seals about `items` messages for the permit's tenant, as a part of a batch.
    pub fn encryptor<'a>(
        &'a self,
        permit: &'a Permit<Encrypt>,
        items: usize,
        tally: Option<&Tally>,
    ) -> Encryptor<'a> {
        Encryptor {
            permit,
            sealings: Sealings::new(&self.pool),
            salts: Salts::new(items),
            tally: PartTally::new(tally),
        }
    }

    /// Opens many envelopes of the permit's tenant, as a part of a batch.
    pub fn decryptor<'a>(&'a self, permit: &'a Permit<Decrypt>, tally: Option<&Tally>) -> Decryptor<'a> {
        Decryptor { permit, openings: Openings::new(&self.pool), tally: PartTally::new(tally) }
    }

    /// Brings about `items` envelopes of the permit's tenant up to date, as a part of a batch.
    pub fn rewrapper<'a>(
        &'a self,
        permit: &'a Permit<Rewrap>,
        items: usize,
        tally: Option<&Tally>,
    ) -> Rewrapper<'a> {
        Rewrapper {
            permit,
            openings: Openings::new(&self.pool),
            sealings: Sealings::new(&self.pool),
            salts: Salts::new(items),
            tally: PartTally::new(tally),
        }
    }
}

impl Encryptor<'_> {
    /// Seals one of them.
    pub async fn encrypt(&mut self, request: Encryption<'_>) -> Result<Encrypted, OperationError> {
        let mut details = self.tally.details();
        let sealed = self.seal(request, &mut details).await;
        note(&mut self.tally, details, &sealed);
        sealed
    }

    async fn seal(
        &mut self,
        mut request: Encryption<'_>,
        details: &mut Details,
    ) -> Result<Encrypted, OperationError> {
        let context = std::mem::take(&mut request.context);
        let context = message_context(context, self.permit, &request.key, details)?;
        let bytes = request.plaintext.bytes_max();
        let sealed = self.seal_now(&context, request).await;
        details.with_context(context);
        if let Ok(sealed) = &sealed {
            details.with_dek(sealed.dek_id);
            details.with_bytes(bytes, sealed.envelope.len());
        }
        sealed
    }

    async fn seal_now(
        &mut self,
        context: &EncryptionContext,
        request: Encryption<'_>,
    ) -> Result<Encrypted, OperationError> {
        request.plaintext.check()?;
        let (tenant, service) = (self.permit.tenant(), self.permit.service_context());
        let scope = |key: &KeyName| scope(tenant, key, service);
        let bytes = request.plaintext.bytes_max() as u64;
        let sealing = self.sealings.sealing(&request.key, bytes, scope).await?;
        seal_with(sealing, self.salts.next()?, context, request)
    }

    /// What the audit is told of the items.
    pub fn items(&mut self) -> &mut PartTally {
        &mut self.tally
    }
}

/// Opens many envelopes.
pub struct Decryptor<'a> {
    permit: &'a Permit<Decrypt>,
    openings: Openings<'a>,
    tally: PartTally,
}

impl Decryptor<'_> {
    /// Opens one of them.
    pub async fn decrypt(&mut self, request: Decryption) -> Result<Decrypted, OperationError> {
        let mut details = self.tally.details();
        let opened = self.open(request, &mut details).await;
        note(&mut self.tally, details, &opened);
        opened.map_err(OperationError::told)
    }

    async fn open(
        &mut self,
        request: Decryption,
        details: &mut Details,
    ) -> Result<Decrypted, OperationError> {
        let head = self.openings.inspect(&request.envelope)?;
        details.with_dek(head.dek_id());
        let opening = self.openings.opening(self.permit, &head).await?;
        open_with(opening, &head, self.permit, request, details)
    }

    /// What the audit is told of the items.
    pub fn items(&mut self) -> &mut PartTally {
        &mut self.tally
    }
}

/// Brings many envelopes up to date.
pub struct Rewrapper<'a> {
    permit: &'a Permit<Rewrap>,
    openings: Openings<'a>,
    sealings: Sealings<'a>,
    salts: Salts,
    tally: PartTally,
}

impl Rewrapper<'_> {
    /// Brings one of them up to date.
    pub async fn rewrap(&mut self, request: Rewrapping) -> Result<Rewrapped, OperationError> {
        let mut details = self.tally.details();
        let renewed = self.renew(request, &mut details).await;
        note(&mut self.tally, details, &renewed);
        renewed.map_err(OperationError::told)
    }

    async fn renew(
        &mut self,
        request: Rewrapping,
        details: &mut Details,
    ) -> Result<Rewrapped, OperationError> {
        let bytes_in = request.envelope.len();
        let head = self.openings.inspect(&request.envelope)?;
        details.with_dek(head.dek_id());
        let opening = self.openings.opening(self.permit, &head).await?;
        let rewrapped = match renew_in_place(opening, &head, self.permit, request, details)? {
            Renewed::Whole(rewrapped) => rewrapped,
            Renewed::Opened(opened) => {
                let (key, bytes) = (&opening.scope.key, opened.plaintext().len() as u64);
                let sealing = self.sealings.sealing(key, bytes, |_| opening.scope.clone()).await?;
                opened.seal(sealing, self.salts.next()?)?
            }
        };
        rewrapped.tell(bytes_in, details);
        Ok(rewrapped)
    }

    /// What the audit is told of the items.
    pub fn items(&mut self) -> &mut PartTally {
        &mut self.tally
    }
}

/// The active data keys of the keys that were asked for, errors included: what fails for one item fails for the rest
/// of the stretch without asking again.
struct Sealings<'a> {
    pool: &'a DekPool,
    known: HashMap<KeyName, Result<Sealing, PoolError>>,
}

impl<'a> Sealings<'a> {
    fn new(pool: &'a DekPool) -> Self {
        Self { pool, known: HashMap::new() }
    }

    /// The data key for one more message of this size, which is counted.
    async fn sealing(
        &mut self,
        key: &KeyName,
        bytes: u64,
        scope: impl FnOnce(&KeyName) -> DekScope,
    ) -> Result<&Sealing, PoolError> {
        let serves = match self.known.get(key) {
            Some(Ok(sealing)) => sealing.admit(bytes),
            // What is too large for the key's policy says nothing of a smaller message.
            Some(Err(PoolError::TooLargeForKey(_))) | None => false,
            Some(Err(_)) => true,
        };
        if !serves {
            let asked = self.pool.to_encrypt(&scope(key), bytes).await;
            self.known.insert(key.clone(), asked);
        }
        match &self.known[key] {
            Ok(sealing) => Ok(sealing),
            Err(error) => Err(error.clone()),
        }
    }
}

/// The data keys of the envelopes that were met. A failure is remembered together with the section that it was met
/// with: another envelope may bring a better one.
struct Openings<'a> {
    pool: &'a DekPool,
    known: HashMap<DataKeyId, Opening>,
    refused: HashMap<(DataKeyId, Vec<u8>), PoolError>,
}

impl<'a> Openings<'a> {
    fn new(pool: &'a DekPool) -> Self {
        Self { pool, known: HashMap::new(), refused: HashMap::new() }
    }

    /// The head of an envelope: see [`DekPool::inspect`].
    fn inspect(&self, envelope: &[u8]) -> Result<Head, FormatError> {
        inspect_known(envelope, |id| Some(self.known.get(&id)?.embedded.clone()))
    }

    async fn opening<V>(&mut self, permit: &Permit<V>, head: &Head) -> Result<&Opening, PoolError> {
        let id = head.dek_id();
        if !self.known.contains_key(&id) {
            let claim = (id, head.wrapped().as_bytes().to_vec());
            if let Some(error) = self.refused.get(&claim) {
                return Err(error.clone());
            }
            match self.pool.to_decrypt(permit.tenant(), head, &permit.service_context().bound).await {
                Ok(opening) => self.known.insert(id, opening),
                Err(error) => {
                    self.refused.insert(claim, error.clone());
                    return Err(error);
                }
            };
        }
        let opening = &self.known[&id];
        opening.agrees(head)?;
        Ok(opening)
    }
}

/// Fresh salts, drawn for many messages at once: a call of the system's generator costs as much for one as for forty.
struct Salts {
    drawn: Vec<Salt>,
    batch: usize,
}

/// How many salts are drawn at once, at most.
const SALTS_MAX: usize = 256;

impl Salts {
    fn new(items: usize) -> Self {
        Self { drawn: Vec::new(), batch: items.clamp(1, SALTS_MAX) }
    }

    fn next(&mut self) -> Result<Salt, OperationError> {
        if let Some(salt) = self.drawn.pop() {
            return Ok(salt);
        }
        self.drawn.resize(self.batch, Salt::default());
        if getrandom::fill(self.drawn.as_flattened_mut()).is_err() {
            // What stands there now is not random, and must never be given out.
            self.drawn.clear();
        }
        self.drawn.pop().ok_or(OperationError::Internal("the operating system gives no randomness"))
    }
}

fn note<T>(tally: &mut PartTally, details: Details, outcome: &Result<T, OperationError>) {
    let failure = outcome.as_ref().err();
    tally.note(details, failure.map(|error| (error.code(), error as &dyn std::fmt::Display)));
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn no_salt_is_given_out_twice_and_none_is_empty() {
        let mut salts = Salts::new(100);
        let drawn: HashSet<Salt> = (0..1_000).map(|_| salts.next().unwrap()).collect();
        assert_eq!(drawn.len(), 1_000);
        assert!(!drawn.contains(&Salt::default()));
    }
}
