//! The file of `--tls-psk`: lines of `identity:hexkey`, as GnuTLS's psktool writes them. An identity that has a colon is
//! in hexadecimal digits behind a `#`.

use crate::transport::tls::psk::{IDENTITY_MAX_LEN, KEY_MAX_LEN, Keys};

/// From here down the log warns of a key. Our choice: whoever recorded a handshake can try shorter ones at leisure.
const KEY_SHORT_LEN: usize = 16;

/// The keys in such a file. The error says which line is wrong and why, without its key.
pub fn parse(bytes: &[u8]) -> Result<Keys, String> {
    let mut keys = Keys::new();
    for (number, line) in (1..).zip(bytes.split(|&byte| byte == b'\n')) {
        let line = line.trim_ascii_end();
        if line.is_empty() {
            continue;
        }
        let wrong = |why: &str| format!("line {number}: {why}");
        let (identity, key) = parse_line(line).map_err(wrong)?;
        if key.len() < KEY_SHORT_LEN {
            tracing::warn!(
                line = number,
                bytes = key.len(),
                "a pre-shared key is short enough to be guessed; psktool makes longer ones"
            );
        }
        if !keys.add(identity, key) {
            return Err(wrong("this identity has a key already, further up"));
        }
    }
    if keys.count() == 0 {
        Err("has no keys: psktool -u IDENTITY -p FILE adds one".to_owned())
    } else {
        Ok(keys)
    }
}

fn parse_line(line: &[u8]) -> Result<(String, Vec<u8>), &'static str> {
    const FORM: &str = "is not IDENTITY:HEXKEY";
    let colon = line.iter().rposition(|&byte| byte == b':').ok_or(FORM)?;
    let (identity, key) = (&line[..colon], &line[colon + 1..]);
    let identity = match identity.strip_prefix(b"#") {
        Some(digits) => hex(digits).ok_or("an identity behind # is written in hexadecimal digits")?,
        None if identity.contains(&b':') => {
            return Err("an identity with a colon is written behind # in hexadecimal digits");
        }
        None => identity.to_vec(),
    };
    let identity = String::from_utf8(identity).map_err(|_| "the identity is no UTF-8 text")?;
    let key = hex(key).ok_or("the key is not written in hexadecimal digits")?;
    match (identity.len(), key.len()) {
        (0, _) => Err("the identity is missing"),
        (IDENTITY_MAX_LEN.., _) => Err("the identity is longer than TLS clients can send (255 bytes)"),
        (_, 0) => Err("the key is missing"),
        (_, len) if len > KEY_MAX_LEN => Err("the key is longer than 512 bytes"),
        _ if identity.contains('\0') => Err("the identity contains a zero byte"),
        _ => Ok((identity, key)),
    }
}

/// Bytes of pairs of digits, of either case.
fn hex(digits: &[u8]) -> Option<Vec<u8>> {
    let (pairs, rest) = digits.as_chunks::<2>();
    let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    let bytes = pairs.iter().map(|[high, low]| Some(digit(*high)? << 4 | digit(*low)?)).collect();
    if rest.is_empty() { bytes } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn psktools_lines_are_understood() {
        let keys = parse(
            "alice:e151eaf1cd90a45fb0bc0ec5ee57e441\n\
             #626f6220776974683a20636f6c6f6e:A7D7\r\n\n\
             caf\u{e9}:463e"
                .as_bytes(),
        )
        .unwrap();
        assert_eq!(keys.count(), 3);
        let alice =
            [0xe1, 0x51, 0xea, 0xf1, 0xcd, 0x90, 0xa4, 0x5f, 0xb0, 0xbc, 0x0e, 0xc5, 0xee, 0x57, 0xe4, 0x41];
        assert_eq!(keys.get("alice").unwrap(), alice);
        assert_eq!(keys.get("bob with: colon").unwrap(), [0xa7, 0xd7]);
        assert_eq!(keys.get("caf\u{e9}").unwrap(), [0x46, 0x3e]);
        assert_eq!(keys.get("Alice"), None);
    }

    #[test]
    fn mistakes_are_told_with_their_line_and_without_the_key() {
        let long_identity = format!("{}:abcd", "x".repeat(256));
        let long_key = format!("a:{}", "ab".repeat(513));
        for (text, hint) in [
            (&b""[..], "has no keys"),
            (b"\n\n", "has no keys"),
            (b"a:abcd\nalice", "line 2: is not IDENTITY:HEXKEY"),
            (b":abcd", "the identity is missing"),
            (b"a:", "the key is missing"),
            (b"a:abc", "not written in hexadecimal"),
            (b"a:xyz1", "not written in hexadecimal"),
            (b"a:+1", "not written in hexadecimal"),
            (b"a:b:abcd", "behind #"),
            (b"#6:abcd", "hexadecimal digits"),
            (b"#x:abcd", "hexadecimal digits"),
            (b"#ff:abcd", "UTF-8"),
            (b"#6100:abcd", "zero byte"),
            (b"a:abcd\na:abce", "line 2: this identity has a key already"),
            (long_identity.as_bytes(), "255 bytes"),
            (long_key.as_bytes(), "512 bytes"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(hint) && !error.contains("abcd"), "{text:?}: {error}");
        }
    }
}
