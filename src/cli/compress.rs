//! `--compress auto|zlib|zstd[:LEVEL]`: how whole clusters that are written are compressed.

use std::ops::RangeInclusive;

use nbd_img_formats::qcow2::{Compress, Compression};

/// Levels of zlib.
const ZLIB_LEVELS: RangeInclusive<u8> = 1..=9;
/// Levels of zstd.
const ZSTD_LEVELS: RangeInclusive<u8> = 1..=22;

/// Parses the value of `--compress`.
pub fn parse(text: &str) -> Result<Compress, String> {
    let (name, level) = match text.split_once(':') {
        None => (text, None),
        Some((name, level)) => (name, Some(level)),
    };
    let (compression, levels) = match name {
        "auto" if level.is_none() => return Ok(Compress::default()),
        "auto" => return Err("a level goes with zlib or zstd, as in zlib:9".to_owned()),
        "zlib" => (Compression::Zlib, ZLIB_LEVELS),
        "zstd" => (Compression::Zstd, ZSTD_LEVELS),
        _ => return Err("write zlib, zstd, or auto for what the image has".to_owned()),
    };
    let parsed = |level: &str| {
        let number = level.parse().ok().filter(|number| levels.contains(number));
        number.ok_or_else(|| {
            format!("the level of {name} is a number from {} to {}", levels.start(), levels.end())
        })
    };
    Ok(Compress { compression: Some(compression), level: level.map(parsed).transpose()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_levels() {
        let zlib = |level| Ok(Compress { compression: Some(Compression::Zlib), level });
        let zstd = |level| Ok(Compress { compression: Some(Compression::Zstd), level });
        for (text, expected) in [
            ("auto", Ok(Compress::default())),
            ("zlib", zlib(None)),
            ("zlib:9", zlib(Some(9))),
            ("zstd:22", zstd(Some(22))),
        ] {
            assert_eq!(parse(text), expected, "{text}");
        }
        for text in ["", "gzip", "zlib:", "zlib:0", "zlib:10", "zstd:23", "zstd:-1", "auto:3", "zlib:6:6"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
