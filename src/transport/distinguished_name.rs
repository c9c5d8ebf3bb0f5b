//! Distinguished names as GnuTLS prints them, and so as QEMU's `tls-authz` compares them: `C=GB,O=Example,CN=client`, in
//! the certificate's order. GnuTLS has a second order, the reverse (RFC 4514), in which certtool prints; a rule may be
//! written in either.
//!
//! What is here was found by asking GnuTLS 3.7 (`gnutls_x509_dn_get_str2`) for names of every attribute in every string
//! type. Where it prints bytes that are no text, or drops a zero at the end, this prints hexadecimal digits instead: then
//! no rule matches by accident.

use std::fmt::{self, Write};

use x509_parser::asn1_rs::{Any, Tag, ToDer};
use x509_parser::x509::{AttributeTypeAndValue, X509Name};

/// A subject that is not empty.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DistinguishedName {
    /// Its parts as printed, in the certificate's order.
    parts: Vec<String>,
}

/// The string types that an attribute may have to be printed as text.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Form {
    /// Any of X.520's DirectoryString.
    Directory,
    Printable,
    Ia5,
    Numeric,
}

/// Attributes that have a name; the others are printed by number, their values in hexadecimal.
const ATTRIBUTES: [(&str, &str, Form); 34] = [
    ("2.5.4.3", "CN", Form::Directory),
    ("2.5.4.4", "surName", Form::Directory),
    ("2.5.4.5", "serialNumber", Form::Printable),
    ("2.5.4.6", "C", Form::Printable),
    ("2.5.4.7", "L", Form::Directory),
    ("2.5.4.8", "ST", Form::Directory),
    ("2.5.4.9", "street", Form::Directory),
    ("2.5.4.10", "O", Form::Directory),
    ("2.5.4.11", "OU", Form::Directory),
    ("2.5.4.12", "title", Form::Directory),
    ("2.5.4.13", "description", Form::Directory),
    ("2.5.4.15", "businessCategory", Form::Directory),
    ("2.5.4.17", "postalCode", Form::Directory),
    ("2.5.4.20", "telephoneNumber", Form::Printable),
    ("2.5.4.41", "name", Form::Directory),
    ("2.5.4.42", "givenName", Form::Directory),
    ("2.5.4.43", "initials", Form::Directory),
    ("2.5.4.44", "generationQualifier", Form::Directory),
    ("2.5.4.46", "dnQualifier", Form::Printable),
    ("2.5.4.65", "pseudonym", Form::Directory),
    ("0.9.2342.19200300.100.1.1", "UID", Form::Directory),
    ("0.9.2342.19200300.100.1.25", "DC", Form::Ia5),
    ("1.2.840.113549.1.9.1", "EMAIL", Form::Ia5),
    ("1.3.6.1.5.5.7.9.2", "placeOfBirth", Form::Directory),
    ("1.3.6.1.5.5.7.9.3", "gender", Form::Printable),
    ("1.3.6.1.5.5.7.9.4", "countryOfCitizenship", Form::Printable),
    ("1.3.6.1.5.5.7.9.5", "countryOfResidence", Form::Printable),
    ("1.3.6.1.4.1.311.60.2.1.1", "jurisdictionOfIncorporationLocalityName", Form::Directory),
    ("1.3.6.1.4.1.311.60.2.1.2", "jurisdictionOfIncorporationStateOrProvinceName", Form::Directory),
    ("1.3.6.1.4.1.311.60.2.1.3", "jurisdictionOfIncorporationCountryName", Form::Printable),
    ("1.2.643.100.1", "OGRN", Form::Numeric),
    ("1.2.643.100.3", "SNILS", Form::Numeric),
    ("1.2.643.100.5", "OGRNIP", Form::Numeric),
    ("1.2.643.3.131.1.1", "INN", Form::Numeric),
];

impl DistinguishedName {
    /// As a certificate has it. Nothing if it is empty, or has an empty value, which GnuTLS does not print.
    pub fn of_x509(name: &X509Name<'_>) -> Option<DistinguishedName> {
        let mut parts = Vec::new();
        for rdn in name.iter_rdn() {
            let printed = rdn.iter().map(attribute).collect::<Option<Vec<_>>>()?;
            parts.push(printed.join("+"));
        }
        (!parts.is_empty()).then_some(DistinguishedName { parts })
    }

    /// Whether `text` is this name, in the one order or the other.
    pub fn is(&self, text: &str) -> bool {
        let reverse = || self.parts.iter().rev().map(String::as_str).collect::<Vec<_>>().join(",");
        self.to_string() == text || reverse() == text
    }
}

impl fmt::Display for DistinguishedName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.parts.join(","))
    }
}

fn attribute(attribute: &AttributeTypeAndValue<'_>) -> Option<String> {
    let oid = attribute.attr_type().to_id_string();
    let value = attribute.attr_value();
    let Some((_, name, form)) = ATTRIBUTES.iter().find(|(known, _, _)| *known == oid) else {
        return Some(format!("{oid}={}", whole_in_hex(value)?));
    };
    match text(value, *form) {
        Some(text) if text.is_empty() => None,
        Some(text) => Some(format!("{name}={}", escaped(&text))),
        None => Some(format!("{name}={}", whole_in_hex(value)?)),
    }
}

/// The value as text, if its type allows that and it has no zero inside.
fn text(value: &Any<'_>, form: Form) -> Option<String> {
    let bytes = value.data;
    let tag = value.tag();
    let text = match (form, tag) {
        (Form::Directory | Form::Printable, Tag::PrintableString)
        | (Form::Directory, Tag::Utf8String)
        | (Form::Ia5, Tag::Ia5String)
        | (Form::Numeric, Tag::NumericString) => std::str::from_utf8(bytes).ok()?.to_owned(),
        (Form::Directory, Tag::T61String) if bytes.is_ascii() => std::str::from_utf8(bytes).ok()?.to_owned(),
        (Form::Directory, Tag::BmpString) => utf16(bytes).unwrap_or_else(|| content_in_hex(bytes)),
        (Form::Directory, Tag::T61String | Tag::UniversalString) => content_in_hex(bytes),
        (Form::Directory | Form::Printable | Form::Ia5 | Form::Numeric, _) => return None,
    };
    (!text.contains('\0')).then_some(text)
}

fn utf16(bytes: &[u8]) -> Option<String> {
    let (units, rest) = bytes.as_chunks::<2>();
    let units = units.iter().map(|unit| u16::from_be_bytes(*unit));
    if rest.is_empty() { char::decode_utf16(units).collect::<Result<_, _>>().ok() } else { None }
}

/// Signs with a meaning get a backslash, and so do a blank at either end and a # in front.
fn escaped(text: &str) -> String {
    let mut out = String::new();
    let last = text.char_indices().next_back().map_or(0, |(at, _)| at);
    for (at, character) in text.char_indices() {
        let special = match character {
            ',' | '+' | '"' | '\\' | '<' | '>' | ';' => true,
            '#' => at == 0,
            ' ' => at == 0 || at == last,
            _ => false,
        };
        if special {
            out.push('\\');
        }
        out.push(character);
    }
    out
}

fn whole_in_hex(value: &Any<'_>) -> Option<String> {
    value.to_der_vec().ok().map(|der| content_in_hex(&der))
}

fn content_in_hex(bytes: &[u8]) -> String {
    let mut out = String::from("#");
    for byte in bytes {
        // Writing to a string does not fail.
        let _ = write!(out, "{byte:02x}");
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use x509_parser::prelude::FromDer;

    fn tlv(tag: u8, content: &[u8]) -> Vec<u8> {
        let len = content.len();
        let head =
            if len < 128 { vec![tag, len as u8] } else { vec![tag, 0x82, (len >> 8) as u8, len as u8] };
        [head, content.to_vec()].concat()
    }

    const CN: &[u8] = &[0x55, 4, 3];
    const C: &[u8] = &[0x55, 4, 6];
    const O: &[u8] = &[0x55, 4, 10];
    const OU: &[u8] = &[0x55, 4, 11];
    const EMAIL: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 9, 1];
    /// 1.2.3.4.5
    const UNKNOWN: &[u8] = &[0x2a, 3, 4, 5];
    const UTF8: u8 = 0x0c;
    const PRINTABLE: u8 = 0x13;
    const T61: u8 = 0x14;
    const IA5: u8 = 0x16;
    const UNIVERSAL: u8 = 0x1c;
    const BMP: u8 = 0x1e;

    /// An attribute: its object identifier, and the tag and content of its value.
    type Attribute<'a> = (&'a [u8], u8, &'a [u8]);

    /// A name of these sets of attributes.
    fn name(rdns: &[&[Attribute<'_>]]) -> Option<DistinguishedName> {
        let set = |rdn: &&[Attribute<'_>]| {
            let pair =
                |(oid, tag, value): &Attribute<'_>| tlv(0x30, &[tlv(6, oid), tlv(*tag, value)].concat());
            tlv(0x31, &rdn.iter().flat_map(pair).collect::<Vec<_>>())
        };
        let der = tlv(0x30, &rdns.iter().flat_map(set).collect::<Vec<_>>());
        let (rest, name) = X509Name::from_der(&der).unwrap();
        assert!(rest.is_empty());
        DistinguishedName::of_x509(&name)
    }

    /// The right side is what GnuTLS 3.7.9 printed for the same DER.
    #[test]
    fn values_are_printed_as_gnutls_prints_them() {
        for (oid, tag, value, want) in [
            (CN, UTF8, &b"client"[..], "CN=client"),
            (CN, UTF8, "Grüße".as_bytes(), "CN=Grüße"),
            (CN, UTF8, b"a\"b;c<d>e,f+g\\h", "CN=a\\\"b\\;c\\<d\\>e\\,f\\+g\\\\h"),
            (CN, UTF8, b"a=b/c#", "CN=a=b/c#"),
            (CN, UTF8, b"#", "CN=\\#"),
            (CN, UTF8, b" ", "CN=\\ "),
            (CN, UTF8, b"  a  ", "CN=\\  a \\ "),
            (CN, UTF8, b"a\nb", "CN=a\nb"),
            (CN, UTF8, b"a\0b", "CN=#0c03610062"),
            (CN, PRINTABLE, b"AB", "CN=AB"),
            (CN, T61, b"AB", "CN=AB"),
            (CN, T61, b"a\xe9", "CN=\\#61e9"),
            (CN, BMP, b"\0A\0B", "CN=AB"),
            (CN, BMP, b"\xd8\x3d\xde\0", "CN=\u{1f600}"),
            (CN, BMP, b"\xd8\0", "CN=\\#d800"),
            (CN, UNIVERSAL, b"\0\0\0A", "CN=\\#00000041"),
            (CN, IA5, b"AB", "CN=#16024142"),
            (CN, 2, b"\x05", "CN=#020105"),
            (C, PRINTABLE, b"GB", "C=GB"),
            (C, UTF8, b"GB", "C=#0c024742"),
            (EMAIL, IA5, b"a@b.c", "EMAIL=a@b.c"),
            (EMAIL, UTF8, b"AB", "EMAIL=#0c024142"),
            (UNKNOWN, UTF8, b"val", "1.2.3.4.5=#0c0376616c"),
            (UNKNOWN, 0x30, &[2, 1, 1], "1.2.3.4.5=#3003020101"),
        ] {
            assert_eq!(name(&[&[(oid, tag, value)]]).unwrap().to_string(), want, "{tag:#x} {value:?}");
        }
    }

    /// GnuTLS prints bytes here, and we do not.
    #[test]
    fn what_is_no_text_matches_no_rule() {
        for (tag, value, want) in [
            (UTF8, &b"\xff"[..], "CN=#0c01ff"),
            (PRINTABLE, b"a\xe9", "CN=#130261e9"),
            (BMP, b"\0A\0\0", "CN=#1e0400410000"),
        ] {
            assert_eq!(name(&[&[(CN, tag, value)]]).unwrap().to_string(), want);
        }
        assert_eq!(name(&[]), None);
        assert_eq!(name(&[&[(CN, UTF8, b"")]]), None);
    }

    #[test]
    fn either_order_is_the_name_and_no_other_is() {
        let name = name(&[
            &[(C, PRINTABLE, b"GB")],
            &[(O, UTF8, b"A"), (OU, UTF8, b"B")],
            &[(CN, UTF8, b"backup,O=Example")],
        ]);
        let name = name.unwrap();
        assert_eq!(name.to_string(), "C=GB,O=A+OU=B,CN=backup\\,O=Example");
        for (text, same) in [
            ("C=GB,O=A+OU=B,CN=backup\\,O=Example", true),
            ("CN=backup\\,O=Example,O=A+OU=B,C=GB", true),
            ("C=GB,O=A+OU=B,CN=backup,O=Example", false),
            ("O=A+OU=B,C=GB,CN=backup\\,O=Example", false),
            ("CN=backup\\,O=Example", false),
            ("c=GB,O=A+OU=B,CN=backup\\,O=Example", false),
            ("", false),
        ] {
            assert_eq!(name.is(text), same, "{text}");
        }
    }
}
