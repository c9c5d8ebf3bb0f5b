//! Whom a certificate names. It reads what was verified already, and judges nothing.

use std::net::IpAddr;

use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::distinguished_name::DistinguishedName;

/// The names in a certificate. One that cannot be read is left out: nobody is let in by it.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct CertificateNames {
    subject: Option<DistinguishedName>,
    /// DNS names of the subject's alternative names, as written.
    pub dns: Vec<String>,
    /// Addresses of the alternative names.
    pub ip: Vec<IpAddr>,
    /// URIs of the alternative names.
    pub uri: Vec<String>,
    /// Mail addresses of the alternative names.
    pub email: Vec<String>,
}

impl CertificateNames {
    /// The names in a certificate in DER.
    pub fn of_der(der: &[u8]) -> CertificateNames {
        let Ok((_, certificate)) = X509Certificate::from_der(der) else { return CertificateNames::default() };
        let mut names = CertificateNames {
            subject: DistinguishedName::of_x509(certificate.subject()),
            ..CertificateNames::default()
        };
        if let Ok(Some(alternative)) = certificate.subject_alternative_name() {
            alternative.value.general_names.iter().for_each(|name| names.add(name));
        }
        names
    }

    /// The subject, unless it is empty.
    pub fn subject(&self) -> Option<&DistinguishedName> {
        self.subject.as_ref()
    }

    fn add(&mut self, name: &GeneralName<'_>) {
        match name {
            GeneralName::DNSName(text) => self.dns.push((*text).to_owned()),
            GeneralName::URI(text) => self.uri.push((*text).to_owned()),
            GeneralName::RFC822Name(text) => self.email.push((*text).to_owned()),
            GeneralName::IPAddress(bytes) => self.ip.extend(address(bytes)),
            GeneralName::OtherName(..)
            | GeneralName::X400Address(_)
            | GeneralName::DirectoryName(_)
            | GeneralName::EDIPartyName(_)
            | GeneralName::RegisteredID(_)
            | GeneralName::Invalid(..) => {}
        }
    }
}

fn address(bytes: &[u8]) -> Option<IpAddr> {
    let v4 = <[u8; 4]>::try_from(bytes).map(IpAddr::from);
    v4.or_else(|_| <[u8; 16]>::try_from(bytes).map(IpAddr::from)).ok().map(|address| address.to_canonical())
}

#[cfg(test)]
mod tests {
    use super::*;
    use rcgen::{CertificateParams, DistinguishedName as Dn, DnType, KeyPair, SanType};

    fn der(params: CertificateParams) -> Vec<u8> {
        params.self_signed(&KeyPair::generate().unwrap()).unwrap().der().to_vec()
    }

    #[test]
    fn every_kind_of_name_is_found() {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.distinguished_name = Dn::new();
        params.distinguished_name.push(DnType::CommonName, "a");
        params.subject_alt_names = vec![
            SanType::DnsName("Host.example".try_into().unwrap()),
            SanType::IpAddress("::ffff:10.0.0.1".parse().unwrap()),
            SanType::IpAddress("fd00::1".parse().unwrap()),
            SanType::URI("spiffe://example/backup".try_into().unwrap()),
            SanType::Rfc822Name("a@example.org".try_into().unwrap()),
        ];
        let names = CertificateNames::of_der(&der(params));
        assert_eq!(names.subject().unwrap().to_string(), "CN=a");
        assert_eq!(names.dns, ["Host.example"]);
        assert_eq!(names.ip, ["10.0.0.1".parse::<IpAddr>().unwrap(), "fd00::1".parse().unwrap()]);
        assert_eq!(names.uri, ["spiffe://example/backup"]);
        assert_eq!(names.email, ["a@example.org"]);
    }

    #[test]
    fn what_is_not_there_is_no_name() {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.distinguished_name = Dn::new();
        assert_eq!(CertificateNames::of_der(&der(params)), CertificateNames::default());
        assert_eq!(CertificateNames::of_der(b"nonsense"), CertificateNames::default());
    }
}
