//! The operations on data: all of them with symmetric keys.

use serde::Deserialize;
use serde_json::{Value, json};

use super::Work;
use super::input::{Base64, base64, required};
use super::lookup::{Found, key_of_blob};
use crate::arn::KeyRef;
use crate::blob::{self, Blob, Made};
use crate::context::{EncryptionContext, check};
use crate::engine::Material;
use crate::error::KmsError;
use crate::policy::Facts;

const ALGORITHM: &str = "SYMMETRIC_DEFAULT";

/// What AWS encrypts at most.
const MAX_PLAINTEXT: usize = 4096;

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub(super) struct GenerateDataKey {
    key_id: Option<String>,
    encryption_context: Option<EncryptionContext>,
    number_of_bytes: Option<usize>,
    key_spec: Option<String>,
    recipient: Option<Value>,
    dry_run: Option<bool>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub(super) struct Encrypt {
    key_id: Option<String>,
    plaintext: Option<Base64>,
    encryption_context: Option<EncryptionContext>,
    encryption_algorithm: Option<String>,
    dry_run: Option<bool>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub(super) struct Decrypt {
    key_id: Option<String>,
    ciphertext_blob: Option<Base64>,
    encryption_context: Option<EncryptionContext>,
    encryption_algorithm: Option<String>,
    recipient: Option<Value>,
    dry_run: Option<bool>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub(super) struct ReEncrypt {
    ciphertext_blob: Option<Base64>,
    source_encryption_context: Option<EncryptionContext>,
    source_key_id: Option<String>,
    destination_key_id: Option<String>,
    destination_encryption_context: Option<EncryptionContext>,
    source_encryption_algorithm: Option<String>,
    destination_encryption_algorithm: Option<String>,
    dry_run: Option<bool>,
}

pub(super) fn generate_data_key(work: &mut Work<'_>, input: &GenerateDataKey) -> Result<Value, KmsError> {
    let (plaintext, mut answer) = new_data_key(work, input, "GenerateDataKey")?;
    answer["Plaintext"] = base64(&plaintext).into();
    Ok(answer)
}

pub(super) fn generate_data_key_without_plaintext(
    work: &mut Work<'_>,
    input: &GenerateDataKey,
) -> Result<Value, KmsError> {
    new_data_key(work, input, "GenerateDataKeyWithoutPlaintext").map(|(_, answer)| answer)
}

pub(super) fn encrypt(work: &mut Work<'_>, input: &Encrypt) -> Result<Value, KmsError> {
    let context = context(input.encryption_context.as_ref())?;
    let Some(Base64(plaintext)) = &input.plaintext else { return Err(KmsError::missing("plaintext")) };
    if plaintext.is_empty() || plaintext.len() > MAX_PLAINTEXT {
        return Err(KmsError::validation(format!(
            "1 validation error detected: Value at 'plaintext' failed to satisfy constraint: \
             Member must have length between 1 and {MAX_PLAINTEXT}"
        )));
    }
    let arn = usable(work, input.key_id.as_ref(), "Encrypt", "Encrypt", &context)?;
    check_algorithm(input.encryption_algorithm.as_ref())?;
    check_dry_run(input.dry_run)?;
    let (blob, _) = seal(work, Made::ByEncrypt, &arn, plaintext, &context)?;
    Ok(json!({"CiphertextBlob": base64(&blob), "EncryptionAlgorithm": ALGORITHM, "KeyId": arn}))
}

pub(super) fn decrypt(work: &mut Work<'_>, input: &Decrypt) -> Result<Value, KmsError> {
    refuse_recipient(input.recipient.as_ref())?;
    check_algorithm(input.encryption_algorithm.as_ref())?;
    let context = context(input.encryption_context.as_ref())?;
    let opened =
        open(work, input.ciphertext_blob.as_ref(), input.key_id.as_ref(), "Decrypt", "Decrypt", &context)?;
    check_dry_run(input.dry_run)?;
    Ok(json!({
        "EncryptionAlgorithm": ALGORITHM,
        "KeyId": opened.arn,
        "KeyMaterialId": opened.material_id,
        "Plaintext": base64(&opened.plaintext),
    }))
}

pub(super) fn re_encrypt(work: &mut Work<'_>, input: &ReEncrypt) -> Result<Value, KmsError> {
    check_algorithm(input.source_encryption_algorithm.as_ref())?;
    check_algorithm(input.destination_encryption_algorithm.as_ref())?;
    let from = context(input.source_encryption_context.as_ref())?;
    let to = context(input.destination_encryption_context.as_ref())?;
    let (blob, source) = (input.ciphertext_blob.as_ref(), input.source_key_id.as_ref());
    let opened = open(work, blob, source, "ReEncryptFrom", "ReEncrypt", &from)?;
    let destination = input.destination_key_id.as_ref();
    required(destination, "destinationKeyId")?;
    let arn = usable(work, destination, "ReEncryptTo", "ReEncrypt", &to)?;
    check_dry_run(input.dry_run)?;
    let (blob, material_id) = seal(work, Made::ByEncrypt, &arn, &opened.plaintext, &to)?;
    Ok(json!({
        "CiphertextBlob": base64(&blob),
        "DestinationEncryptionAlgorithm": ALGORITHM,
        "DestinationKeyMaterialId": material_id,
        "KeyId": arn,
        "SourceEncryptionAlgorithm": ALGORITHM,
        "SourceKeyId": opened.arn,
        "SourceKeyMaterialId": opened.material_id,
    }))
}

/// A blob that has been opened.
struct Opened {
    arn: String,
    material_id: String,
    plaintext: Vec<u8>,
}

fn new_data_key(
    work: &mut Work<'_>,
    input: &GenerateDataKey,
    operation: &str,
) -> Result<(Vec<u8>, Value), KmsError> {
    refuse_recipient(input.recipient.as_ref())?;
    let context = context(input.encryption_context.as_ref())?;
    let length = match (input.number_of_bytes, input.key_spec.as_deref()) {
        (Some(bytes), None) if (1..=1024).contains(&bytes) => bytes,
        (Some(bytes), None) => {
            return Err(KmsError::constraint("numberOfBytes", bytes, "have value between 1 and 1024"));
        }
        (None, Some("AES_256")) => 32,
        (None, Some("AES_128")) => 16,
        (None, Some(spec)) => {
            return Err(KmsError::constraint("keySpec", spec, "satisfy enum value set: [AES_256, AES_128]"));
        }
        (None, None) | (Some(_), Some(_)) => {
            return Err(KmsError::validation("Please specify either number of bytes or key spec."));
        }
    };
    let arn = usable(work, input.key_id.as_ref(), operation, operation, &context)?;
    check_dry_run(input.dry_run)?;
    let mut plaintext = vec![0; length];
    blob::random(&mut plaintext)?;
    let (blob, material_id) = seal(work, Made::ByGenerateDataKey, &arn, &plaintext, &context)?;
    work.data_keys.push(plaintext.clone());
    Ok((plaintext, json!({"CiphertextBlob": base64(&blob), "KeyId": arn, "KeyMaterialId": material_id})))
}

/// The ARN of a key that the caller may use for `action`, and that can be used at all.
fn usable(
    work: &Work<'_>,
    key_id: Option<&String>,
    action: &str,
    operation: &str,
    context: &EncryptionContext,
) -> Result<String, KmsError> {
    let found = work.find(required(key_id, "keyId")?, action)?;
    work.authorize(&found, action, facts(context))?;
    check_usable(work, &found.arn, operation)?;
    Ok(found.arn)
}

fn check_usable(work: &Work<'_>, arn: &str, operation: &str) -> Result<(), KmsError> {
    let (_, family) = work.key(arn)?;
    if family.usage != "ENCRYPT_DECRYPT" || !family.is_symmetric() {
        let usage = &family.usage;
        return Err(KmsError::invalid_key_usage(format!(
            "{arn} key usage is {usage} which is not valid for {operation}."
        )));
    }
    work.must_be_enabled(arn)
}

fn open(
    work: &Work<'_>,
    blob: Option<&Base64>,
    key_id: Option<&String>,
    action: &str,
    operation: &str,
    context: &EncryptionContext,
) -> Result<Opened, KmsError> {
    let Some(Base64(bytes)) = blob else { return Err(KmsError::missing("ciphertextBlob")) };
    let blob = Blob::parse(bytes);
    let of_blob = blob.as_ref().ok().and_then(|blob| key_of_blob(work.state, &work.caller.region, blob));
    let found = if let Some(key_id) = key_id {
        named(work, key_id, of_blob.as_ref(), action)?
    } else {
        // Without a key id it is the blob that names the key.
        blob.as_ref().map_err(Clone::clone)?;
        Found { arn: of_blob.clone().ok_or_else(unknown_key_of_blob)?, alias: None }
    };
    work.authorize(&found, action, facts(context))?;
    let blob = blob?;
    if of_blob.as_ref() != Some(&found.arn) {
        let message = "The key ID in the request does not identify a CMK that can perform this operation.";
        return Err(KmsError::incorrect_key(message));
    }
    check_usable(work, &found.arn, operation)?;
    let (_, family) = work.key(&found.arn)?;
    let of_blob = |material: &&Material| material.id.0 == blob.material_id();
    let material = family.materials.iter().find(of_blob).ok_or_else(KmsError::invalid_ciphertext)?;
    let plaintext = blob.open(&material.secret.0, context)?;
    Ok(Opened { arn: found.arn, material_id: material.id.hex(), plaintext })
}

/// A bare key id may be that of the blob's key even if this is another account's.
fn named(work: &Work<'_>, key_id: &str, of_blob: Option<&String>, action: &str) -> Result<Found, KmsError> {
    if let (KeyRef::Id(id), Some(arn)) = (KeyRef::parse(key_id)?, of_blob)
        && arn.rsplit('/').next() == Some(&id)
    {
        return Ok(Found { arn: arn.clone(), alias: None });
    }
    work.find(key_id, action)
}

fn seal(
    work: &Work<'_>,
    made: Made,
    arn: &str,
    plaintext: &[u8],
    context: &EncryptionContext,
) -> Result<(Vec<u8>, String), KmsError> {
    let (key, family) = work.key(arn)?;
    let material = family.current().ok_or_else(|| KmsError::internal("a key without material"))?;
    let blob = blob::seal(made, &key.id, &material.id.0, &material.secret.0, plaintext, context)?;
    Ok((blob, material.id.hex()))
}

fn context(context: Option<&EncryptionContext>) -> Result<EncryptionContext, KmsError> {
    let context = context.cloned().unwrap_or_default();
    check(&context)?;
    Ok(context)
}

fn facts(context: &EncryptionContext) -> Facts {
    let mut facts = Facts::default();
    facts.add("kms:EncryptionAlgorithm", ALGORITHM);
    for (key, value) in context {
        facts.add(&format!("kms:EncryptionContext:{key}"), value);
        facts.add("kms:EncryptionContextKeys", key);
    }
    facts
}

fn check_algorithm(algorithm: Option<&String>) -> Result<(), KmsError> {
    match algorithm {
        Some(other) if other != ALGORITHM => Err(KmsError::invalid_key_usage(format!(
            "Algorithm {other} is incompatible with key spec {ALGORITHM}."
        ))),
        _ => Ok(()),
    }
}

fn check_dry_run(dry_run: Option<bool>) -> Result<(), KmsError> {
    match dry_run {
        Some(true) => {
            Err(KmsError::dry_run("The request would have succeeded, but the DryRun option is set."))
        }
        _ => Ok(()),
    }
}

/// Answering an enclave in the clear would be worse than not at all.
fn refuse_recipient(recipient: Option<&Value>) -> Result<(), KmsError> {
    match recipient {
        Some(Value::Null) | None => Ok(()),
        Some(_) => Err(KmsError::unsupported("Recipient is not supported by this emulator.")),
    }
}

fn unknown_key_of_blob() -> KmsError {
    KmsError::access_denied(
        "The ciphertext refers to a customer master key that does not exist, does not exist in this region, or you \
         are not allowed to access.",
    )
}
