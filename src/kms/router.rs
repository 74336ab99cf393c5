//! Which KMS a KEK lives in: its id says so.

use std::sync::Arc;

use async_trait::async_trait;
use envelope::{EncryptionContext, KeyMaterial};

use super::{Generated, KekDescription, Kms, KmsError, Urgency, Wrapped};
use crate::tenant::{Kek, KekHome, KekId};

/// Sends each call to the KMS that holds its KEK.
pub struct KmsRouter {
    local: Option<Arc<dyn Kms>>,
    aws: Arc<dyn Kms>,
}

impl KmsRouter {
    /// A router over the embedded key ring, where there is one, and AWS KMS.
    pub fn new(local: Option<Arc<dyn Kms>>, aws: Arc<dyn Kms>) -> Self {
        Self { local, aws }
    }

    fn home(&self, kek: &KekId) -> Result<&dyn Kms, KmsError> {
        match kek.home() {
            KekHome::Local { .. } => self.local.as_deref().ok_or_else(|| {
                KmsError::denied(
                    kek,
                    "this service has no embedded key ring: make one with `keyfold keyring init`",
                )
            }),
            KekHome::Aws { .. } => Ok(&*self.aws),
        }
    }
}

#[async_trait]
impl Kms for KmsRouter {
    async fn generate(
        &self,
        kek: &Kek,
        context: &EncryptionContext,
        urgency: Urgency,
    ) -> Result<Generated, KmsError> {
        self.home(&kek.id)?.generate(kek, context, urgency).await
    }

    async fn wrap(
        &self,
        kek: &Kek,
        context: &EncryptionContext,
        plaintext: &KeyMaterial,
        urgency: Urgency,
    ) -> Result<Wrapped, KmsError> {
        self.home(&kek.id)?.wrap(kek, context, plaintext, urgency).await
    }

    async fn unwrap(
        &self,
        kek: &Kek,
        context: &EncryptionContext,
        blob: &[u8],
        urgency: Urgency,
    ) -> Result<KeyMaterial, KmsError> {
        self.home(&kek.id)?.unwrap(kek, context, blob, urgency).await
    }

    /// Inside one KMS the plaintext stays there. From one KMS to another it has to come out on the way.
    async fn rewrap(
        &self,
        from: &Kek,
        to: &Kek,
        context: &EncryptionContext,
        blob: &[u8],
        urgency: Urgency,
    ) -> Result<Wrapped, KmsError> {
        let (source, target) = (self.home(&from.id)?, self.home(&to.id)?);
        if std::ptr::addr_eq(source, target) {
            return source.rewrap(from, to, context, blob, urgency).await;
        }
        let plaintext = source.unwrap(from, context, blob, urgency).await?;
        target.wrap(to, context, &plaintext, urgency).await
    }

    async fn describe(&self, kek: &Kek, urgency: Urgency) -> Result<KekDescription, KmsError> {
        self.home(&kek.id)?.describe(kek, urgency).await
    }
}
