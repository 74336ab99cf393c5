//! Envelopes straight against a KMS: no service, no registry. What a user who has his KEK can always do with his data.
//!
//! The section of an envelope comes from whoever brought the file. It is believed only as far as it agrees with what
//! the user says: only KEKs that he names are asked, the KMS context must name the envelope's own data key, and where
//! he names the tenant or the key, it must name those.

use std::sync::Arc;

use envelope::{
    ContextError, DataKey, DataKeyId, EncryptionContext, FormatError, Head, WrappedDataKey, WrappedKeys,
};

use crate::clock::Timestamp;
use crate::kms::{Kms, KmsError, Urgency, kms_context};
use crate::tenant::{Kek, KekRing, KeyName, TenantId};

/// The KEKs that a user names, and the KMS that reaches them.
pub struct Offline {
    kms: Arc<dyn Kms>,
    keks: KekRing,
}

/// A data key, and what is known of it.
pub struct OfflineKey {
    /// The data key.
    pub key: DataKey,
    /// What its envelopes carry.
    pub section: WrappedKeys,
    /// Whose it is.
    pub tenant: TenantId,
    /// Under which of the tenant's keys it was made.
    pub key_name: KeyName,
}

/// Why it was not done.
#[derive(Debug, thiserror::Error)]
pub enum OfflineError {
    /// A compact envelope: its data key is in the registry only.
    #[error(
        "the envelope is compact: its data key is in the service's registry, so only the service opens it"
    )]
    Compact,
    /// None of the KEKs that wrapped the data key was named.
    #[error("the data key is wrapped under {0}: name one of these with --kek, if you trust it")]
    OtherKeks(String),
    /// The section does not belong to this envelope, or not to what the user has named.
    #[error("the envelope's wrapped-key section is not believed: {0}")]
    Disbelieved(&'static str),
    /// A context name is not the user's to set.
    #[error(
        "the context name {0:?} is reserved: names that begin with \"keyfold:\" or \"aws\" are the service's"
    )]
    Reserved(String),
    /// The context is over a limit, or names something twice.
    #[error("the context is not valid: {0}")]
    Context(#[from] ContextError),
    /// The wrapped forms do not fit into an envelope.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// The KMS.
    #[error(transparent)]
    Kms(#[from] KmsError),
    /// No random bytes.
    #[error("the operating system gives no randomness")]
    Random,
}

impl OfflineKey {
    /// The context of a message under this data key: the user's pairs and the service's own.
    pub fn message_context(&self, pairs: &EncryptionContext) -> Result<EncryptionContext, OfflineError> {
        if let Some((name, _)) = pairs.iter().find(|(name, _)| EncryptionContext::is_reserved(name)) {
            return Err(OfflineError::Reserved(name.to_owned()));
        }
        let mut context = pairs.clone();
        context.insert("keyfold:tenant", self.tenant.as_str())?;
        context.insert("keyfold:key", self.key_name.as_str())?;
        Ok(context)
    }
}

impl Offline {
    /// Over these KEKs: the first makes new data keys, any opens.
    pub fn new(kms: Arc<dyn Kms>, keks: KekRing) -> Self {
        Self { kms, keks }
    }

    /// A new data key, wrapped under every KEK. Fails where one cannot be asked: a file that only some of the named
    /// KEKs open is not what was asked for.
    pub async fn new_key(
        &self,
        tenant: TenantId,
        key_name: KeyName,
        now: Timestamp,
    ) -> Result<OfflineKey, OfflineError> {
        let id = new_id(now)?;
        let context = kms_context(&tenant, &key_name, id, &EncryptionContext::new())?;
        let primary = &self.keks.members()[0];
        let generated = self.kms.generate(primary, &context, Urgency::Foreground).await?;
        let mut forms = vec![(primary.clone(), generated.wrapped.blob)];
        for kek in &self.keks.members()[1..] {
            // Replicas of one multi-Region key open the same form.
            if !forms.iter().any(|(known, _)| known.id.same_material(&kek.id)) {
                let wrapped = self.kms.wrap(kek, &context, &generated.plaintext, Urgency::Foreground).await?;
                forms.push((kek.clone(), wrapped.blob));
            }
        }
        let section = section(&context, forms)?;
        Ok(OfflineKey { key: DataKey::new(id, generated.plaintext), section, tenant, key_name })
    }

    /// The data key of the envelope with this head.
    pub async fn key_of(
        &self,
        head: &Head,
        tenant: Option<&TenantId>,
        key_name: Option<&KeyName>,
    ) -> Result<OfflineKey, OfflineError> {
        let claim = Claim::of(head, tenant, key_name)?;
        let mut failure = None;
        for (kek, blob) in self.named(head)? {
            match self.kms.unwrap(&kek, claim.context, blob, Urgency::Foreground).await {
                Ok(material) => {
                    return Ok(OfflineKey {
                        key: DataKey::new(head.dek_id(), material),
                        section: head.wrapped().clone(),
                        tenant: claim.tenant,
                        key_name: claim.key_name,
                    });
                }
                Err(error) => failure = failure.or(Some(error)),
            }
        }
        Err(failure.map_or(OfflineError::Compact, OfflineError::Kms))
    }

    /// The section of the same data key under these KEKs. Inside one KMS the data key does not come out.
    pub async fn rewrap(
        &self,
        head: &Head,
        to: &KekRing,
        tenant: Option<&TenantId>,
        key_name: Option<&KeyName>,
    ) -> Result<WrappedKeys, OfflineError> {
        let claim = Claim::of(head, tenant, key_name)?;
        let mut failure = None;
        for (from, blob) in self.named(head)? {
            match self.rewrap_from(&from, blob, to, claim.context).await {
                Ok(forms) => return section(claim.context, forms),
                Err(error) => failure = failure.or(Some(error)),
            }
        }
        Err(failure.map_or(OfflineError::Compact, OfflineError::Kms))
    }

    async fn rewrap_from(
        &self,
        from: &Kek,
        blob: &[u8],
        to: &KekRing,
        context: &EncryptionContext,
    ) -> Result<Vec<(Kek, Vec<u8>)>, KmsError> {
        let mut forms: Vec<(Kek, Vec<u8>)> = Vec::new();
        for kek in to.members() {
            if !forms.iter().any(|(known, _)| known.id.same_material(&kek.id)) {
                let wrapped = self.kms.rewrap(from, kek, context, blob, Urgency::Foreground).await?;
                forms.push((kek.clone(), wrapped.blob));
            }
        }
        Ok(forms)
    }

    /// The wrapped forms whose KEKs the user has named, in his order.
    fn named<'a>(&self, head: &'a Head) -> Result<Vec<(Kek, &'a [u8])>, OfflineError> {
        let keys = head.wrapped().keys();
        let mut named = Vec::new();
        for kek in self.keks.members() {
            let form = keys.iter().find(|form| {
                form.kek.parse().is_ok_and(|id: crate::tenant::KekId| id.same_material(&kek.id))
            });
            named.extend(form.map(|form| (kek.clone(), form.blob.as_slice())));
        }
        if named.is_empty() {
            let keks: Vec<&str> = keys.iter().map(|form| form.kek.as_str()).collect();
            return Err(OfflineError::OtherKeks(keks.join(", ")));
        }
        Ok(named)
    }
}

/// What an envelope's section says of its data key, as far as it was checked.
struct Claim<'a> {
    context: &'a EncryptionContext,
    tenant: TenantId,
    key_name: KeyName,
}

impl<'a> Claim<'a> {
    fn of(
        head: &'a Head,
        tenant: Option<&TenantId>,
        key_name: Option<&KeyName>,
    ) -> Result<Self, OfflineError> {
        let context = head.wrapped().kms_context().ok_or(OfflineError::Compact)?;
        if context.get("keyfold:dek") != Some(&head.dek_id().to_string()) {
            return Err(OfflineError::Disbelieved("it belongs to another data key"));
        }
        let claimed_tenant: Option<TenantId> =
            context.get("keyfold:tenant").and_then(|name| name.parse().ok());
        let claimed_key: Option<KeyName> = context.get("keyfold:key").and_then(|name| name.parse().ok());
        let (Some(claimed_tenant), Some(claimed_key)) = (claimed_tenant, claimed_key) else {
            return Err(OfflineError::Disbelieved("it names no tenant or no key"));
        };
        if tenant.is_some_and(|tenant| *tenant != claimed_tenant) {
            return Err(OfflineError::Disbelieved("it is of another tenant than you have named"));
        }
        if key_name.is_some_and(|key| *key != claimed_key) {
            return Err(OfflineError::Disbelieved("it is of another key than you have named"));
        }
        Ok(Self { context, tenant: claimed_tenant, key_name: claimed_key })
    }
}

fn section(context: &EncryptionContext, forms: Vec<(Kek, Vec<u8>)>) -> Result<WrappedKeys, OfflineError> {
    let forms: Vec<WrappedDataKey> =
        forms.into_iter().map(|(kek, blob)| WrappedDataKey { kek: kek.id.to_string(), blob }).collect();
    Ok(WrappedKeys::new(context, &forms)?)
}

/// A UUIDv7, as the service makes them.
fn new_id(now: Timestamp) -> Result<DataKeyId, OfflineError> {
    let mut random = [0; 10];
    getrandom::fill(&mut random).map_err(|_| OfflineError::Random)?;
    let unix_ms = u64::try_from(now.unix_ms()).unwrap_or(0);
    let id = uuid::Builder::from_unix_timestamp_millis(unix_ms, &random).into_uuid();
    Ok(DataKeyId::from_bytes(id.into_bytes()))
}
