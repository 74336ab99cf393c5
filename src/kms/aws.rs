//! AWS KMS.
//!
//! One call of the [`Kms`] is one call of AWS (two where a data key moves between regions or accounts): nothing is
//! tried again here, [`super::guarded`] does that for all. No client is made before the first use of a KEK in AWS:
//! a service whose master keys are all in the embedded key ring never loads AWS credentials.

mod answer;
mod clients;

use std::collections::HashMap;

use async_trait::async_trait;
use aws_sdk_kms::Client;
use aws_sdk_kms::config::SharedCredentialsProvider;
use aws_sdk_kms::primitives::Blob;
use aws_sdk_kms::types::{DataKeySpec, KeyState};
use envelope::{EncryptionContext, KeyMaterial};

use self::answer::{incomplete, to_error};
use self::clients::Clients;
use super::{Generated, KekDescription, KekState, Kms, KmsError, Urgency, Wrapped};
use crate::tenant::{Kek, KekId};

/// How AWS is reached. What is not said here, the AWS SDK finds where AWS users expect it: credentials in the
/// environment, the profile, a web identity, the container's or the instance's role; endpoints in
/// `AWS_ENDPOINT_URL_KMS`, `AWS_USE_FIPS_ENDPOINT` and the profile.
#[derive(Clone, Debug)]
pub struct Options {
    /// The endpoint of KMS, where it is not AWS's public one: a VPC endpoint, for example. `{region}` stands for the
    /// KEK's region.
    pub kms_endpoint: Option<String>,
    /// The endpoint of STS, for KEKs with a role to assume. `{region}` stands for the KEK's region.
    pub sts_endpoint: Option<String>,
    /// Whether AWS's FIPS endpoints are used. Default: as the SDK's environment and profile say.
    pub fips: Option<bool>,
    /// How long making a connection may take, in milliseconds. Default 1,000.
    pub connect_ms_max: u64,
    /// After how long without use a connection is closed, in seconds. Default 60. A connection's buffers hold the
    /// last answers, plaintext data keys among them, until they are closed and wiped.
    pub connection_idle_secs_max: u64,
    /// How long the session of an assumed role lasts, in seconds. Default 900, the least that AWS grants: it is how
    /// long keyfold goes on after a role's trust in it was withdrawn.
    pub role_session_secs: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            kms_endpoint: None,
            sts_endpoint: None,
            fips: None,
            connect_ms_max: 1_000,
            connection_idle_secs_max: 60,
            role_session_secs: 900,
        }
    }
}

/// AWS KMS in all regions and accounts that the KEKs name.
pub struct AwsKms {
    clients: Clients,
}

impl AwsKms {
    /// AWS KMS, not contacted yet.
    pub fn new(options: Options) -> Self {
        Self { clients: Clients::new(options, None) }
    }

    /// The same with these credentials instead of the SDK's chain.
    pub fn with_credentials(options: Options, credentials: SharedCredentialsProvider) -> Self {
        Self { clients: Clients::new(options, Some(credentials)) }
    }

    async fn client(&self, kek: &Kek) -> Result<Client, KmsError> {
        self.clients.of(kek).await
    }
}

#[async_trait]
impl Kms for AwsKms {
    async fn generate(
        &self,
        kek: &Kek,
        context: &EncryptionContext,
        _urgency: Urgency,
    ) -> Result<Generated, KmsError> {
        let call = self.client(kek).await?.generate_data_key();
        let call = call.key_id(kek.id.as_str()).key_spec(DataKeySpec::Aes256);
        let answer = call.set_encryption_context(Some(pairs(context))).send().await;
        let answer = answer.map_err(|error| to_error(kek, "GenerateDataKey", &error))?;
        let plaintext = key_material(&kek.id, "GenerateDataKey", answer.plaintext)?;
        same_key(&kek.id, "GenerateDataKey", answer.key_id.as_deref())?;
        let blob = answer.ciphertext_blob.ok_or_else(|| incomplete(&kek.id, "GenerateDataKey"))?;
        let wrapped =
            Wrapped { kek: kek.id.clone(), blob: blob.into_inner(), material: answer.key_material_id };
        Ok(Generated { plaintext, wrapped })
    }

    async fn wrap(
        &self,
        kek: &Kek,
        context: &EncryptionContext,
        plaintext: &KeyMaterial,
        _urgency: Urgency,
    ) -> Result<Wrapped, KmsError> {
        let call = self.client(kek).await?.encrypt().key_id(kek.id.as_str());
        let call = call.plaintext(Blob::new(plaintext.expose().as_slice()));
        let answer = call.set_encryption_context(Some(pairs(context))).send().await;
        let answer = answer.map_err(|error| to_error(kek, "Encrypt", &error))?;
        same_key(&kek.id, "Encrypt", answer.key_id.as_deref())?;
        let blob = answer.ciphertext_blob.ok_or_else(|| incomplete(&kek.id, "Encrypt"))?;
        // Encrypt does not tell the material.
        Ok(Wrapped { kek: kek.id.clone(), blob: blob.into_inner(), material: None })
    }

    async fn unwrap(
        &self,
        kek: &Kek,
        context: &EncryptionContext,
        blob: &[u8],
        _urgency: Urgency,
    ) -> Result<KeyMaterial, KmsError> {
        // Without a KeyId AWS would open the blob with whatever key made it: with an attacker's, if he brings one.
        let call = self.client(kek).await?.decrypt().key_id(kek.id.as_str());
        let call = call.ciphertext_blob(Blob::new(blob));
        let answer = call.set_encryption_context(Some(pairs(context))).send().await;
        let answer = answer.map_err(|error| to_error(kek, "Decrypt", &error))?;
        let plaintext = key_material(&kek.id, "Decrypt", answer.plaintext)?;
        same_key(&kek.id, "Decrypt", answer.key_id.as_deref())?;
        Ok(plaintext)
    }

    /// AWS moves a data key between two keys of one region that one principal may use. Otherwise it has to come out
    /// of the one KMS on its way into the other.
    async fn rewrap(
        &self,
        from: &Kek,
        to: &Kek,
        context: &EncryptionContext,
        blob: &[u8],
        urgency: Urgency,
    ) -> Result<Wrapped, KmsError> {
        if from.id.region() != to.id.region() || from.role != to.role {
            let plaintext = self.unwrap(from, context, blob, urgency).await?;
            return self.wrap(to, context, &plaintext, urgency).await;
        }
        let call = self.client(from).await?.re_encrypt().ciphertext_blob(Blob::new(blob));
        let call = call.source_key_id(from.id.as_str()).set_source_encryption_context(Some(pairs(context)));
        let call =
            call.destination_key_id(to.id.as_str()).set_destination_encryption_context(Some(pairs(context)));
        let answer = match call.send().await {
            Ok(answer) => answer,
            Err(error) => {
                let blamed = self.blamed(from, to, &error).await;
                return Err(to_error(blamed, "ReEncrypt", &error));
            }
        };
        same_key(&from.id, "ReEncrypt", answer.source_key_id.as_deref())?;
        same_key(&to.id, "ReEncrypt", answer.key_id.as_deref())?;
        let blob = answer.ciphertext_blob.ok_or_else(|| incomplete(&to.id, "ReEncrypt"))?;
        let material = answer.destination_key_material_id;
        Ok(Wrapped { kek: to.id.clone(), blob: blob.into_inner(), material })
    }

    async fn describe(&self, kek: &Kek, _urgency: Urgency) -> Result<KekDescription, KmsError> {
        let answer = self.client(kek).await?.describe_key().key_id(kek.id.as_str()).send().await;
        let answer = answer.map_err(|error| to_error(kek, "DescribeKey", &error))?;
        let metadata = answer.key_metadata.ok_or_else(|| incomplete(&kek.id, "DescribeKey"))?;
        same_key(&kek.id, "DescribeKey", metadata.arn.as_deref())?;
        let state = match metadata.key_state {
            Some(KeyState::Enabled) => KekState::Enabled,
            Some(KeyState::Disabled) => KekState::Disabled,
            Some(KeyState::PendingDeletion | KeyState::PendingReplicaDeletion) => KekState::PendingDeletion,
            _ => KekState::Unusable,
        };
        Ok(KekDescription { kek: kek.id.clone(), state, material: metadata.current_key_material_id })
    }
}

impl AwsKms {
    /// Which of the two KEKs of a refused ReEncrypt its refusal is about. AWS names the key in most messages, and in
    /// none as a field.
    async fn blamed<'a, E>(&self, from: &'a Kek, to: &'a Kek, error: &answer::SdkFailure<E>) -> &'a Kek
    where
        E: aws_sdk_kms::error::ProvideErrorMetadata,
    {
        use aws_sdk_kms::error::ProvideErrorMetadata as _;
        let message = error.message().unwrap_or_default();
        match (message.contains(key_part(&from.id)), message.contains(key_part(&to.id))) {
            (true, false) => return from,
            (false, true) => return to,
            _ => {}
        }
        let about_the_blob =
            matches!(error.code(), None | Some("InvalidCiphertextException" | "IncorrectKeyException"));
        if about_the_blob || from.id == to.id {
            return from;
        }
        // The message does not tell. A key that can be described and is enabled is not to blame.
        match self.describe(from, Urgency::Background).await {
            Ok(KekDescription { state: KekState::Enabled, .. }) => to,
            _ => from,
        }
    }
}

fn key_part(kek: &KekId) -> &str {
    kek.as_str().rsplit('/').next().unwrap_or_default()
}

fn pairs(context: &EncryptionContext) -> HashMap<String, String> {
    context.iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
}

/// Takes the key out of the SDK's buffer, and wipes the buffer.
fn key_material(kek: &KekId, call: &str, plaintext: Option<Blob>) -> Result<KeyMaterial, KmsError> {
    let mut plaintext = plaintext.ok_or_else(|| incomplete(kek, call))?.into_inner();
    KeyMaterial::from_mut(&mut plaintext)
        .map_err(|wrong| KmsError::damaged(kek, format!("{call}: the wrapped key is no data key: {wrong}")))
}

/// The answer must be about the very key that was asked for.
fn same_key(kek: &KekId, call: &str, answered: Option<&str>) -> Result<(), KmsError> {
    if answered == Some(kek.as_str()) {
        return Ok(());
    }
    let answered = answered.unwrap_or("no key");
    Err(KmsError::damaged(kek, format!("{call}: the answer is about another key, {answered}")))
}
