//! Many messages in one go: a batch, or a stretch of a longer stream of items.
//!
//! Each data key is looked up once and each stretch draws its salts at once; everything else is as for one message,
//! and each item fails or succeeds by itself. Held for moments only: what the pool would say differently a minute
//! later, it is asked again by the next stretch.

use std::collections::HashMap;

use envelope::{DataKeyId, Head, Salt, inspect};

use super::decrypt::open_with;
use super::encrypt::seal_with;
use super::rewrap::{Renewed, renew_in_place};
use super::{
    Decrypted, Decryption, Encrypted, Encryption, OperationError, Operations, Rewrapped, Rewrapping,
    message_context, scope,
};
use crate::access::{Decrypt, Encrypt, Permit, Rewrap};
use crate::audit::{Attempt, REFS_MAX};
use crate::pool::{DekPool, Opening, PoolError, Sealing};
use crate::store::DekScope;
use crate::tenant::{KeyName, Verb};

/// Seals many messages.
pub struct Encryptor<'a> {
    permit: &'a Permit<Encrypt>,
    sealings: Sealings<'a>,
    salts: Salts,
    record: Record<'a>,
}

impl Operations {
    /// Seals about `items` messages for the permit's tenant.
    pub async fn encryptor<'a>(
        &'a self,
        permit: &'a Permit<Encrypt>,
        items: usize,
    ) -> Result<Encryptor<'a>, OperationError> {
        let attempt = self.audit.begin(Verb::Encrypt, permit.who()).await?;
        Ok(Encryptor {
            permit,
            sealings: Sealings::new(&self.pool),
            salts: Salts::new(items),
            record: Record::new(attempt),
        })
    }

    /// Opens many envelopes of the permit's tenant.
    pub async fn decryptor<'a>(
        &'a self,
        permit: &'a Permit<Decrypt>,
    ) -> Result<Decryptor<'a>, OperationError> {
        let attempt = self.audit.begin(Verb::Decrypt, permit.who()).await?;
        Ok(Decryptor { permit, openings: Openings::new(&self.pool), record: Record::new(attempt) })
    }

    /// Brings about `items` envelopes of the permit's tenant up to date.
    pub async fn rewrapper<'a>(
        &'a self,
        permit: &'a Permit<Rewrap>,
        items: usize,
    ) -> Result<Rewrapper<'a>, OperationError> {
        let attempt = self.audit.begin(Verb::Rewrap, permit.who()).await?;
        Ok(Rewrapper {
            permit,
            openings: Openings::new(&self.pool),
            sealings: Sealings::new(&self.pool),
            salts: Salts::new(items),
            record: Record::new(attempt),
        })
    }
}

impl Encryptor<'_> {
    /// Seals one of them.
    pub async fn encrypt(&mut self, request: Encryption<'_>) -> Result<Encrypted, OperationError> {
        let sealed = self.seal(request).await;
        self.record.note(&sealed);
        sealed
    }

    async fn seal(&mut self, mut request: Encryption<'_>) -> Result<Encrypted, OperationError> {
        let context = std::mem::take(&mut request.context);
        let (tenant, service) = (self.permit.tenant(), self.permit.service_context());
        let context = message_context(context, self.permit, &request.key)?;
        request.plaintext.check()?;
        let bytes = request.plaintext.bytes_max() as u64;
        let scope = |key: &KeyName| scope(tenant, key, service);
        let sealing = self.sealings.sealing(&request.key, bytes, scope).await?;
        seal_with(sealing, self.salts.next()?, &context, request)
    }

    /// What the caller calls the next one, for the audit's record.
    pub fn name(&mut self, reference: Option<&str>) {
        self.record.name(reference);
    }

    /// All were tried: the audit's record ends.
    pub fn finish(self) {
        self.record.end();
    }
}

/// Opens many envelopes.
pub struct Decryptor<'a> {
    permit: &'a Permit<Decrypt>,
    openings: Openings<'a>,
    record: Record<'a>,
}

impl Decryptor<'_> {
    /// Opens one of them.
    pub async fn decrypt(&mut self, request: Decryption) -> Result<Decrypted, OperationError> {
        let opened = self.open(request).await;
        self.record.note(&opened);
        opened.map_err(OperationError::told)
    }

    async fn open(&mut self, request: Decryption) -> Result<Decrypted, OperationError> {
        let head = inspect(&request.envelope)?;
        let opening = self.openings.opening(self.permit, &head).await?;
        open_with(opening, &head, self.permit, request, None)
    }

    /// What the caller calls the next one, for the audit's record.
    pub fn name(&mut self, reference: Option<&str>) {
        self.record.name(reference);
    }

    /// All were tried: the audit's record ends.
    pub fn finish(self) {
        self.record.end();
    }
}

/// Brings many envelopes up to date.
pub struct Rewrapper<'a> {
    permit: &'a Permit<Rewrap>,
    openings: Openings<'a>,
    sealings: Sealings<'a>,
    salts: Salts,
    record: Record<'a>,
}

impl Rewrapper<'_> {
    /// Brings one of them up to date.
    pub async fn rewrap(&mut self, request: Rewrapping) -> Result<Rewrapped, OperationError> {
        let renewed = self.renew(request).await;
        self.record.note(&renewed);
        renewed.map_err(OperationError::told)
    }

    async fn renew(&mut self, request: Rewrapping) -> Result<Rewrapped, OperationError> {
        let head = inspect(&request.envelope)?;
        let opening = self.openings.opening(self.permit, &head).await?;
        match renew_in_place(opening, &head, self.permit, request, None)? {
            Renewed::Whole(rewrapped) => Ok(rewrapped),
            Renewed::Opened(opened) => {
                let (key, bytes) = (&opening.scope.key, opened.plaintext().len() as u64);
                let sealing = self.sealings.sealing(key, bytes, |_| opening.scope.clone()).await?;
                opened.seal(sealing, self.salts.next()?)
            }
        }
    }

    /// What the caller calls the next one, for the audit's record.
    pub fn name(&mut self, reference: Option<&str>) {
        self.record.name(reference);
    }

    /// All were tried: the audit's record ends.
    pub fn finish(self) {
        self.record.end();
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

/// One record of the audit for all of them.
struct Record<'a> {
    attempt: Attempt<'a>,
    tried: u64,
    failed: u64,
    first: Option<(&'static str, String)>,
    names: Vec<Box<str>>,
}

impl<'a> Record<'a> {
    fn new(attempt: Attempt<'a>) -> Self {
        Self { attempt, tried: 0, failed: 0, first: None, names: vec![] }
    }

    fn name(&mut self, reference: Option<&str>) {
        if let Some(reference) =
            reference.filter(|_| self.attempt.is_recorded() && self.names.len() < REFS_MAX)
        {
            self.names.push(reference.into());
        }
    }

    fn note<T>(&mut self, outcome: &Result<T, OperationError>) {
        self.tried += 1;
        if let Err(error) = outcome {
            self.failed += 1;
            if self.first.is_none() {
                self.first = Some((error.code(), error.to_string()));
            }
        }
    }

    fn end(mut self) {
        self.attempt.with_items(self.tried, self.failed, self.names);
        match self.first {
            None => self.attempt.done(),
            Some((code, first)) => {
                let reason = format!("{} of {} items, the first: {first}", self.failed, self.tried);
                self.attempt.failed(code, &reason);
            }
        }
    }
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
