//! A certificate of the server's own making, for trials.

use std::path::Path;
use std::time::Duration;

use rcgen::{
    CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, KeyPair, KeyUsagePurpose,
};
use time::OffsetDateTime;
use zeroize::Zeroizing;

use super::TlsError;
use crate::clock::Timestamp;

/// How long it is valid: a trial is over in a month.
const VALID: Duration = Duration::from_hours(30 * 24);
/// Clocks of clients may be this far behind.
const SKEW: Duration = Duration::from_hours(24);

/// A certificate that nobody vouches for, and its key, which is never written anywhere.
pub(super) struct SelfSigned {
    pub(super) certificate_pem: Vec<u8>,
    pub(super) key_pem: Zeroizing<Vec<u8>>,
}

impl SelfSigned {
    /// Makes one for these names, and writes the certificate where clients can find it.
    pub(super) fn make(names: &[String], now: Timestamp, file: &Path) -> Result<Self, TlsError> {
        let failed = |error: rcgen::Error| TlsError::SelfSigned(error.to_string());
        let key = KeyPair::generate().map_err(failed)?;
        let mut parameters = CertificateParams::new(names).map_err(failed)?;
        parameters.not_before = date(now.unix_ms() / 1_000 - SKEW.as_secs().cast_signed())?;
        parameters.not_after = date(now.unix_ms() / 1_000 + VALID.as_secs().cast_signed())?;
        parameters.distinguished_name = DistinguishedName::new();
        parameters.distinguished_name.push(DnType::CommonName, "keyfold self-signed, for trials");
        parameters.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        parameters.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let certificate = parameters.self_signed(&key).map_err(failed)?;
        let certificate_pem = certificate.pem().into_bytes();
        std::fs::write(file, &certificate_pem).map_err(|source| TlsError::File {
            what: "self-signed certificate",
            path: file.to_owned(),
            source,
        })?;
        Ok(Self { certificate_pem, key_pem: Zeroizing::new(key.serialize_pem().into_bytes()) })
    }
}

fn date(unix_secs: i64) -> Result<OffsetDateTime, TlsError> {
    OffsetDateTime::from_unix_timestamp(unix_secs)
        .map_err(|error| TlsError::SelfSigned(format!("the clock is not believable: {error}")))
}
