//! Values as QEMU reads them: numbers in the way of strtol(3), switches, sizes, and lists of `key=value`.

/// A whole number from `text`: blanks in front, a sign, and the bases that `0x` and a leading zero stand for.
/// Nothing may follow.
pub fn integer(text: &str) -> Option<i128> {
    let text = text.trim_start_matches([' ', '\t', '\n', '\r', '\x0b', '\x0c']);
    let (negative, digits) = match text.strip_prefix('-') {
        Some(digits) => (true, digits),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    let lower = digits.to_ascii_lowercase();
    let (radix, digits) = match lower.strip_prefix("0x") {
        Some(hex) => (16, hex),
        None if lower.len() > 1 && lower.starts_with('0') => (8, lower.get(1..)?),
        None => (10, lower.as_str()),
    };
    // Rust's parser takes a sign of its own.
    if !digits.starts_with(|c: char| c.is_digit(radix)) {
        return None;
    }
    let number = i128::from_str_radix(digits, radix).ok()?;
    Some(if negative { -number } else { number })
}

/// A switch.
pub fn switch(text: &str) -> Option<bool> {
    match text {
        "on" | "yes" | "true" | "y" => Some(true),
        "off" | "no" | "false" | "n" => Some(false),
        _ => None,
    }
}

/// A size: bytes, or a number with a suffix (powers of 1024); hexadecimal without one.
pub fn size(text: &str) -> Option<u64> {
    if text.to_ascii_lowercase().starts_with("0x") {
        return integer(text).and_then(|number| u64::try_from(number).ok());
    }
    crate::cli::size::parse(text).ok()
}

/// Splits `a=1,b,c=2`; two commas in a row stand for one in a value. A key without a value is on, and off if it
/// begins with `no`; the first field may do without a key if `implied` names one.
pub fn key_values(text: &str, implied: Option<&str>) -> Vec<(String, String)> {
    let mut pairs = Vec::new();
    for (at, field) in split(text).into_iter().enumerate() {
        let pair = match (field.split_once('='), implied) {
            (Some((key, value)), _) => (key.to_owned(), value.to_owned()),
            (None, Some(key)) if at == 0 => (key.to_owned(), field),
            (None, _) => match field.strip_prefix("no") {
                Some(key) if !key.is_empty() => (key.to_owned(), "off".to_owned()),
                Some(_) | None => (field, "on".to_owned()),
            },
        };
        pairs.push(pair);
    }
    pairs
}

/// The fields of a list. A comma at the end begins none.
fn split(text: &str) -> Vec<String> {
    let mut fields = Vec::new();
    let mut field = String::new();
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        if c == ',' && chars.next_if_eq(&',').is_none() {
            fields.push(std::mem::take(&mut field));
        } else {
            field.push(c);
        }
    }
    if !field.is_empty() {
        fields.push(field);
    }
    fields
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn integers() {
        for (text, want) in [
            ("2", Some(2)),
            (" 2", Some(2)),
            ("+2", Some(2)),
            ("-1", Some(-1)),
            ("0x10", Some(16)),
            ("010", Some(8)),
            ("0", Some(0)),
            ("", None),
            ("0x", None),
            ("08", None),
            ("2 ", None),
            ("1M", None),
            ("--1", None),
            ("0x-1", None),
            ("x", None),
        ] {
            assert_eq!(integer(text), want, "{text:?}");
        }
    }

    #[test]
    fn sizes_and_switches() {
        assert_eq!((size("1M"), size("0x200"), size("1X")), (Some(1 << 20), Some(512), None));
        assert_eq!((switch("on"), switch("n"), switch("maybe")), (Some(true), Some(false), None));
    }

    #[test]
    fn lists() {
        let got = key_values("secret,id=a,,b,data=x=y,flag,nofoo,", Some("type"));
        let want = [("type", "secret"), ("id", "a,b"), ("data", "x=y"), ("flag", "on"), ("foo", "off")];
        assert_eq!(got, want.map(|(key, value)| (key.to_owned(), value.to_owned())));
        assert!(key_values("", Some("type")).is_empty());
    }
}
