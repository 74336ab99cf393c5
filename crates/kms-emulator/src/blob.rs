//! Ciphertext blobs: opaque to callers as AWS's are, and of the same sizes.
//!
//! A blob is a header that names the key and its material, a nonce, filler up to AWS's size, and
//! AES-256-GCM under the material. The header, the filler and the encryption context are its associated
//! data, so that no byte of a blob can change without notice.

use aes_gcm::aead::{Aead, Payload};
use aes_gcm::{Aes256Gcm, KeyInit, Nonce};
use uuid::Uuid;

use crate::context::{EncryptionContext, append_canonical};
use crate::error::KmsError;

/// Which operation made the blob: AWS's data keys come in longer ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Made {
    ByEncrypt,
    ByGenerateDataKey,
}

impl Made {
    /// Bytes beyond the plaintext: 167 and 184 for 32 of it.
    const fn overhead(self) -> usize {
        match self {
            Self::ByEncrypt => 135,
            Self::ByGenerateDataKey => 152,
        }
    }

    const fn header(self) -> [u8; 5] {
        match self {
            Self::ByEncrypt => [1, 2, 2, 0, 0x78],
            Self::ByGenerateDataKey => [1, 2, 3, 0, 0x78],
        }
    }

    /// Everything before the ciphertext proper.
    const fn prefix(self) -> usize {
        self.overhead() - TAG
    }
}

const TAG: usize = 16;
const MATERIAL: std::ops::Range<usize> = 5..37;
const MULTI_REGION: usize = 37;
const KEY: std::ops::Range<usize> = 38..54;
const NONCE: std::ops::Range<usize> = 54..66;

/// The longest blob that AWS takes.
const MAX: usize = 6144;

/// What a blob says of itself before it is opened: nothing to be believed until it has been.
#[derive(Debug)]
pub(crate) struct Blob<'a> {
    bytes: &'a [u8],
    prefix: usize,
}

impl<'a> Blob<'a> {
    pub(crate) fn parse(bytes: &'a [u8]) -> Result<Self, KmsError> {
        let made = [Made::ByEncrypt, Made::ByGenerateDataKey]
            .into_iter()
            .find(|made| bytes.starts_with(&made.header()) && bytes.len() > made.overhead())
            .ok_or_else(KmsError::invalid_ciphertext)?;
        if bytes.len() > MAX {
            return Err(KmsError::invalid_ciphertext());
        }
        Ok(Self { bytes, prefix: made.prefix() })
    }

    pub(crate) fn key_id(&self) -> String {
        let id = Uuid::from_slice(&self.bytes[KEY]).unwrap_or_default();
        match self.bytes[MULTI_REGION] {
            0 => id.hyphenated().to_string(),
            _ => format!("mrk-{}", id.simple()),
        }
    }

    pub(crate) fn material_id(&self) -> &[u8] {
        &self.bytes[MATERIAL]
    }

    pub(crate) fn open(&self, material: &[u8; 32], context: &EncryptionContext) -> Result<Vec<u8>, KmsError> {
        let (prefix, sealed) = self.bytes.split_at(self.prefix);
        let nonce = nonce(prefix)?;
        let aad = associated_data(prefix, context);
        Aes256Gcm::new(material.into())
            .decrypt(&nonce, Payload { msg: sealed, aad: &aad })
            .map_err(|_| KmsError::invalid_ciphertext())
    }
}

/// Seals `plaintext` for the key `key_id` under the material `material_id`.
pub(crate) fn seal(
    made: Made,
    key_id: &str,
    material_id: &[u8; 32],
    material: &[u8; 32],
    plaintext: &[u8],
    context: &EncryptionContext,
) -> Result<Vec<u8>, KmsError> {
    let mut blob = vec![0; made.prefix()];
    // The nonce and the filler are random; what has a meaning is written over the rest.
    random(&mut blob)?;
    blob[..5].copy_from_slice(&made.header());
    blob[MATERIAL].copy_from_slice(material_id);
    blob[MULTI_REGION] = u8::from(key_id.starts_with("mrk-"));
    let id = Uuid::parse_str(key_id.trim_start_matches("mrk-"));
    blob[KEY].copy_from_slice(id.map_err(|_| KmsError::internal("a key id that is no UUID"))?.as_bytes());
    let nonce = nonce(&blob)?;
    let aad = associated_data(&blob, context);
    let sealed = Aes256Gcm::new(material.into())
        .encrypt(&nonce, Payload { msg: plaintext, aad: &aad })
        .map_err(|_| KmsError::internal("encryption failed"))?;
    blob.extend_from_slice(&sealed);
    Ok(blob)
}

/// Fresh random bytes from the system.
pub(crate) fn random(out: &mut [u8]) -> Result<(), KmsError> {
    getrandom::fill(out).map_err(|_| KmsError::internal("the system gives no random bytes"))
}

fn nonce(prefix: &[u8]) -> Result<aes_gcm::aead::Nonce<Aes256Gcm>, KmsError> {
    Nonce::try_from(&prefix[NONCE]).map_err(|_| KmsError::invalid_ciphertext())
}

fn associated_data(prefix: &[u8], context: &EncryptionContext) -> Vec<u8> {
    let mut aad = b"kms-emulator blob 1\0".to_vec();
    // Of a length that the header decides, so the context cannot run into it.
    aad.extend_from_slice(prefix);
    append_canonical(context, &mut aad);
    aad
}

#[cfg(test)]
mod tests {
    use super::*;

    const MATERIAL_ID: [u8; 32] = [7; 32];
    const SECRET: [u8; 32] = [9; 32];

    fn sealed(made: Made, key_id: &str) -> Vec<u8> {
        seal(made, key_id, &MATERIAL_ID, &SECRET, &[1; 32], &EncryptionContext::new()).unwrap()
    }

    #[test]
    fn sizes_are_those_of_aws() {
        let id = Uuid::new_v4().to_string();
        assert_eq!(sealed(Made::ByEncrypt, &id).len(), 167);
        assert_eq!(sealed(Made::ByGenerateDataKey, &id).len(), 184);
    }

    #[test]
    fn a_blob_names_its_key_and_material() {
        for id in [Uuid::new_v4().to_string(), format!("mrk-{}", Uuid::new_v4().simple())] {
            let bytes = sealed(Made::ByEncrypt, &id);
            let blob = Blob::parse(&bytes).unwrap();
            assert_eq!((blob.key_id(), blob.material_id()), (id, MATERIAL_ID.as_slice()));
        }
    }

    #[test]
    fn no_bit_of_a_blob_can_change() {
        let context = EncryptionContext::new();
        for made in [Made::ByEncrypt, Made::ByGenerateDataKey] {
            let bytes = sealed(made, &Uuid::new_v4().to_string());
            assert_eq!(Blob::parse(&bytes).unwrap().open(&SECRET, &context).unwrap(), [1; 32]);
            for bit in 0..bytes.len() * 8 {
                let mut changed = bytes.clone();
                changed[bit / 8] ^= 1 << (bit % 8);
                let opened = Blob::parse(&changed).and_then(|blob| blob.open(&SECRET, &context));
                assert_eq!(opened, Err(KmsError::invalid_ciphertext()), "bit {bit}");
            }
        }
    }

    #[test]
    fn a_blob_cut_short_or_with_another_context_does_not_open() {
        let bytes = sealed(Made::ByGenerateDataKey, &Uuid::new_v4().to_string());
        let context = EncryptionContext::from([("a".to_owned(), "b".to_owned())]);
        assert!(Blob::parse(&bytes).unwrap().open(&SECRET, &context).is_err());
        for len in 0..bytes.len() {
            let opened =
                Blob::parse(&bytes[..len]).and_then(|blob| blob.open(&SECRET, &EncryptionContext::new()));
            assert!(opened.is_err(), "{len} bytes");
        }
    }
}
