//! Certificates of a CA of the tests, good ones and bad ones, in the folder layout that QEMU, libnbd and nbdkit read.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DnType, ExtendedKeyUsagePurpose,
    IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams, SerialNumber,
};

const DAY: Duration = Duration::from_secs(86_400);

/// A CA.
pub struct Authority {
    pub cert: String,
    issuer: Issuer<'static, KeyPair>,
}

/// What a certificate says.
#[derive(Clone, Copy)]
pub struct Says {
    pub name: &'static str,
    pub serial: u64,
    pub usage: Usage,
    /// Its last day, counted from now.
    pub ends_in_days: i32,
}

/// What a certificate is for.
#[derive(Clone, Copy)]
pub enum Usage {
    Server,
    Client,
}

pub const SERVER: Says = Says { name: "localhost", serial: 1, usage: Usage::Server, ends_in_days: 90 };
pub const CLIENT: Says = Says { name: "a client", serial: 2, usage: Usage::Client, ends_in_days: 90 };

fn day(days: i32) -> SystemTime {
    let distance = DAY * days.unsigned_abs();
    if days < 0 { SystemTime::now() - distance } else { SystemTime::now() + distance }
}

impl Authority {
    pub fn new(name: &str) -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        (params.not_before, params.not_after) = (day(-400).into(), day(400).into());
        let cert = params.self_signed(&key).unwrap().pem();
        Self { cert, issuer: Issuer::new(params, key) }
    }

    /// A certificate and its key.
    pub fn issue(&self, says: Says) -> (String, String) {
        self.issue_with(says, |_| {})
    }

    /// The same with something changed.
    pub fn issue_with(&self, says: Says, change: impl FnOnce(&mut CertificateParams)) -> (String, String) {
        let key = KeyPair::generate().unwrap();
        let hosts = match says.usage {
            Usage::Server => vec!["localhost".to_owned(), "127.0.0.1".to_owned()],
            Usage::Client => Vec::new(),
        };
        let mut params = CertificateParams::new(hosts).unwrap();
        params.distinguished_name.push(DnType::CommonName, says.name);
        params.serial_number = Some(SerialNumber::from(says.serial));
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        params.extended_key_usages = vec![match says.usage {
            Usage::Server => ExtendedKeyUsagePurpose::ServerAuth,
            Usage::Client => ExtendedKeyUsagePurpose::ClientAuth,
        }];
        (params.not_before, params.not_after) = (day(-200).into(), day(says.ends_in_days).into());
        change(&mut params);
        (params.signed_by(&key, &self.issuer).unwrap().pem(), key.serialize_pem())
    }

    /// A list that revokes these serial numbers, and holds for so many days from now.
    pub fn revoke(&self, serials: &[u64], days: i32) -> String {
        let revoked_certs = serials
            .iter()
            .map(|serial| RevokedCertParams {
                serial_number: SerialNumber::from(*serial),
                revocation_time: day(-1).into(),
                reason_code: None,
                invalidity_date: None,
            })
            .collect();
        let params = CertificateRevocationListParams {
            this_update: day(-100).into(),
            next_update: day(days).into(),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs,
            key_identifier_method: KeyIdMethod::Sha256,
        };
        params.signed_by(&self.issuer).unwrap().pem().unwrap()
    }
}

/// The files of a server: its own, and the CA of its clients.
pub fn server_folder(folder: &Path, authority: &Authority, says: Says) {
    fs::create_dir_all(folder).unwrap();
    let (cert, key) = authority.issue(says);
    fs::write(folder.join("ca-cert.pem"), &authority.cert).unwrap();
    fs::write(folder.join("server-key.pem"), key).unwrap();
    fs::set_permissions(folder.join("server-key.pem"), fs::Permissions::from_mode(0o600)).unwrap();
    fs::write(folder.join("server-cert.pem"), cert).unwrap();
}

/// The files of a client: its own of `authority`, and the CA of its server.
pub fn client_folder(folder: &Path, authority: &Authority, says: Says, server_ca: &str) {
    fs::create_dir_all(folder).unwrap();
    let (cert, key) = authority.issue(says);
    fs::write(folder.join("ca-cert.pem"), server_ca).unwrap();
    fs::write(folder.join("client-key.pem"), key).unwrap();
    fs::write(folder.join("client-cert.pem"), cert).unwrap();
}
