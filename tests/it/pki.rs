//! Certificates for tests: an authority, what it issues, what it revokes.

use std::path::{Path, PathBuf};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams, SanType, SerialNumber,
};
use time::OffsetDateTime;

use crate::service::START;

/// An authority.
pub(crate) struct Authority {
    pub(crate) pem: String,
    issuer: Issuer<'static, KeyPair>,
}

/// A certificate with its key.
pub(crate) struct Issued {
    pub(crate) certificate: String,
    pub(crate) key: String,
    pub(crate) fingerprint: String,
}

/// Seconds after the tests' start.
pub(crate) fn at(secs: i64) -> OffsetDateTime {
    OffsetDateTime::from_unix_timestamp(START.unix_ms() / 1_000 + secs).unwrap()
}

const DAY: i64 = 86_400;

impl Authority {
    pub(crate) fn new(name: &str) -> Self {
        let mut params = CertificateParams::new(vec![]).unwrap();
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.not_before = at(-365 * DAY);
        params.not_after = at(36_500 * DAY);
        let key = KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        Self { pem, issuer: Issuer::new(params, key) }
    }

    /// A server's certificate for 127.0.0.1 and localhost.
    pub(crate) fn server(&self, serial: u64) -> Issued {
        let sans = vec![
            SanType::DnsName("localhost".try_into().unwrap()),
            SanType::IpAddress("127.0.0.1".parse().unwrap()),
        ];
        self.issue(serial, sans, ExtendedKeyUsagePurpose::ServerAuth, 36_500 * DAY)
    }

    /// A client's certificate with these names: URIs where there is a colon, DNS names otherwise.
    pub(crate) fn client(&self, serial: u64, names: &[&str], valid_secs: i64) -> Issued {
        let sans = names.iter().map(|name| {
            if name.contains(':') {
                SanType::URI((*name).try_into().unwrap())
            } else {
                SanType::DnsName((*name).try_into().unwrap())
            }
        });
        self.issue(serial, sans.collect(), ExtendedKeyUsagePurpose::ClientAuth, valid_secs)
    }

    fn issue(&self, serial: u64, sans: Vec<SanType>, usage: ExtendedKeyUsagePurpose, secs: i64) -> Issued {
        let mut params = CertificateParams::new(vec![]).unwrap();
        params.subject_alt_names = sans;
        params.serial_number = Some(SerialNumber::from(serial));
        params.extended_key_usages = vec![usage];
        params.not_before = at(-DAY);
        params.not_after = at(secs);
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let digest: [u8; 32] = sha2::Digest::finalize(sha2::Digest::chain_update(
            <sha2::Sha256 as sha2::Digest>::new(),
            certificate.der(),
        ))
        .into();
        let fingerprint = digest.map(|byte| format!("{byte:02X}")).join(":");
        Issued { certificate: certificate.pem(), key: key.serialize_pem(), fingerprint }
    }

    /// The list of what is revoked, outdated after so many seconds.
    pub(crate) fn revocations(&self, serials: &[u64], valid_secs: i64) -> String {
        let revoked = |serial: &u64| RevokedCertParams {
            serial_number: SerialNumber::from(*serial),
            revocation_time: at(-60),
            reason_code: None,
            invalidity_date: None,
        };
        let params = CertificateRevocationListParams {
            this_update: at(-60),
            next_update: at(valid_secs),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: serials.iter().map(revoked).collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        params.signed_by(&self.issuer).unwrap().pem().unwrap()
    }
}

impl Issued {
    /// Writes both, and says where: the certificate, the key.
    pub(crate) fn write(&self, folder: &Path, name: &str) -> (PathBuf, PathBuf) {
        let (certificate, key) = (folder.join(format!("{name}.pem")), folder.join(format!("{name}-key.pem")));
        std::fs::write(&certificate, &self.certificate).unwrap();
        std::fs::write(&key, &self.key).unwrap();
        (certificate, key)
    }
}
