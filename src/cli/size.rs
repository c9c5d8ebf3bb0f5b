//! Sizes as people write them: `4096`, `64K`, `1.5G`.

/// Parses a number of bytes with an optional suffix K, M, G, T, P or E (powers of 1024, in either
/// case, optionally followed by `iB` or `B`). A fraction is taken when it comes out as whole bytes.
pub fn parse(text: &str) -> Result<u64, String> {
    let wrong = || format!("{text:?} is not a size; write bytes, or a number with K, M, G or T, as in 512M");
    let (number, unit) = split_unit(text).ok_or_else(wrong)?;
    let (whole, fraction) = match number.split_once('.') {
        Some((whole, fraction)) if !fraction.is_empty() => (whole, fraction),
        Some(_) => return Err(wrong()),
        None => (number, ""),
    };
    let all_digits = |part: &str| part.bytes().all(|byte| byte.is_ascii_digit());
    if whole.is_empty() || !all_digits(whole) || !all_digits(fraction) {
        return Err(wrong());
    }
    let too_large = || format!("{text:?} is more than 2^64 bytes");
    let bytes = whole.parse::<u64>().ok().and_then(|whole| whole.checked_mul(unit)).ok_or_else(too_large)?;
    bytes.checked_add(parse_fraction(fraction, unit).ok_or_else(wrong)?).ok_or_else(too_large)
}

/// Splits off the suffix, as the number of bytes that it stands for.
fn split_unit(text: &str) -> Option<(&str, u64)> {
    let end = text.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(text.len());
    let (number, suffix) = text.split_at(end);
    let lower = suffix.to_ascii_lowercase();
    let shift = match lower.strip_suffix("ib").filter(|letter| !letter.is_empty()).unwrap_or(&lower) {
        "" | "b" => 0,
        "k" | "kb" => 10,
        "m" | "mb" => 20,
        "g" | "gb" => 30,
        "t" | "tb" => 40,
        "p" | "pb" => 50,
        "e" | "eb" => 60,
        _ => return None,
    };
    Some((number, 1 << shift))
}

/// The bytes in `0.digits` units, if that is a whole number. Six digits are plenty for people.
fn parse_fraction(digits: &str, unit: u64) -> Option<u64> {
    if digits.is_empty() {
        return Some(0);
    }
    if digits.len() > 6 {
        return None;
    }
    let scale = 10_u128.pow(u32::try_from(digits.len()).ok()?);
    let scaled = digits.parse::<u128>().ok()? * u128::from(unit);
    if scaled % scale != 0 {
        return None;
    }
    u64::try_from(scaled / scale).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (text, want) in [
            ("0", 0),
            ("512", 512),
            ("1k", 1 << 10),
            ("64K", 64 << 10),
            ("64KiB", 64 << 10),
            ("3M", 3 << 20),
            ("3MB", 3 << 20),
            ("1.5G", 3 << 29),
            ("0.25T", 1 << 38),
            ("2t", 2 << 40),
            ("15E", 15 << 60),
            ("10B", 10),
            ("18446744073709551615", u64::MAX),
        ] {
            assert_eq!(parse(text), Ok(want), "{text}");
        }
    }

    #[test]
    fn what_is_not_a_size() {
        for text in [
            "",
            "K",
            "-1",
            "+1",
            "1.K",
            ".5K",
            "1,5G",
            "1 G",
            "0x10",
            "1KK",
            "1iB",
            "0.3",
            "1.0000001G",
            "1e3",
        ] {
            assert!(parse(text).is_err(), "{text}");
        }
        for text in ["16E", "18446744073709551616", "99999999999999999999999"] {
            assert!(parse(text).unwrap_err().contains("2^64"), "{text}");
        }
    }
}
