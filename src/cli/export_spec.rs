//! `--export name=N,file=PATH[,read-only][,...]`: the flags of one image in one argument.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

use clap::ValueEnum;

use super::args::{ImageArgs, TemporaryArg};
use super::{compress, size};

/// What one `--export` says.
#[derive(Debug)]
pub struct ParsedExport {
    /// The image.
    pub path: PathBuf,
    /// The rest, as if it had been written in flags.
    pub image: ImageArgs,
}

/// The keys, for error texts.
const KEYS: &str = "name, file, read-only, temporary, temporary-dir, format, description, offset, size, exact-size, cache, cluster-cache, \
                    aio, discard, detect-zeroes, compress, load-snapshot, bitmap, backing, allow-dir, force-share, tls-required, \
                    access";

/// Keys that may come more than once.
const REPEATABLE: [&[u8]; 3] = [b"allow-dir", b"bitmap", b"access"];

/// Parses the argument of one `--export`.
pub fn parse(text: &OsStr) -> Result<ParsedExport, String> {
    let wrong = |why: String| format!("--export {}: {why}", text.to_string_lossy().escape_debug());
    let mut image = ImageArgs::default();
    let mut path = None;
    let mut seen: Vec<Vec<u8>> = Vec::new();
    for field in split_fields(text.as_bytes()) {
        let (key, value) = match field.iter().position(|&byte| byte == b'=') {
            Some(at) => (&field[..at], Some(OsStr::from_bytes(&field[at + 1..]))),
            None => (field.as_slice(), None),
        };
        if !REPEATABLE.contains(&key) && seen.iter().any(|other| other == key) {
            return Err(wrong(format!("{} is given twice", lossy(key))));
        }
        seen.push(key.to_vec());
        if key == b"file" {
            path = Some(PathBuf::from(needed(key, value).map_err(wrong)?));
        } else {
            set(&mut image, key, value).map_err(wrong)?;
        }
    }
    if image.export_name.is_none() {
        return Err(wrong(
            "name= is missing; write name= with nothing after it for the default export".into(),
        ));
    }
    let path = path.filter(|path| !path.as_os_str().is_empty());
    Ok(ParsedExport { path: path.ok_or_else(|| wrong("file=PATH is missing".into()))?, image })
}

/// Splits at commas; two commas in a row stand for one that belongs to the field.
pub fn split_fields(text: &[u8]) -> Vec<Vec<u8>> {
    let mut fields = vec![Vec::new()];
    let mut bytes = text.iter().copied().peekable();
    while let Some(byte) = bytes.next() {
        if byte == b',' && bytes.next_if_eq(&b',').is_none() {
            fields.push(Vec::new());
        } else if let Some(field) = fields.last_mut() {
            field.push(byte);
        }
    }
    fields
}

fn set(image: &mut ImageArgs, key: &[u8], value: Option<&OsStr>) -> Result<(), String> {
    match key {
        b"name" => image.export_name = Some(needed_text(key, value)?),
        b"description" => image.description = Some(needed_text(key, value)?),
        b"read-only" => image.read_only = switch(key, value)?,
        b"temporary" => image.temporary = sharing(key, value)?,
        b"temporary-dir" => image.temporary_dir = Some(needed(key, value)?.into()),
        b"exact-size" => image.exact_size = switch(key, value)?,
        b"force-share" => image.force_share = switch(key, value)?,
        b"tls-required" => image.tls_required = switch(key, value)?,
        b"format" => image.format = Some(one_of(key, value)?),
        b"cache" => image.cache = Some(one_of(key, value)?),
        b"cluster-cache" => image.cluster_cache = Some(size::parse(&needed_text(key, value)?)?),
        b"aio" => image.aio = Some(one_of(key, value)?),
        b"discard" => image.discard = Some(one_of(key, value)?),
        b"detect-zeroes" => image.detect_zeroes = Some(one_of(key, value)?),
        b"compress" => {
            let text = needed_text(key, value)?;
            image.compress = Some(
                compress::parse(&text).map_err(|why| format!("compress={}: {why}", text.escape_debug()))?,
            );
        }
        b"offset" => image.offset = Some(size::parse(&needed_text(key, value)?)?),
        b"size" => image.size = Some(size::parse(&needed_text(key, value)?)?),
        b"load-snapshot" => image.load_snapshot = Some(needed_text(key, value)?),
        b"backing" => image.backing = Some(needed(key, value)?.into()),
        b"bitmap" => image.bitmap.push(needed_text(key, value)?),
        b"allow-dir" => image.allow_dir.push(needed(key, value)?.into()),
        b"access" => {
            let rule = needed_text(key, value)?;
            image.access.push(rule.parse().map_err(|why| format!("access={}: {why}", rule.escape_debug()))?);
        }
        b"" => return Err("a field is empty; a comma inside of a value is written twice".to_owned()),
        unknown => return Err(format!("{} is not a key; the keys are {KEYS}", lossy(unknown))),
    }
    Ok(())
}

fn needed(key: &[u8], value: Option<&OsStr>) -> Result<OsString, String> {
    value
        .map(|value| OsString::from_vec(value.as_bytes().to_vec()))
        .ok_or_else(|| format!("{} wants a value, as in {0}=...", lossy(key)))
}

fn needed_text(key: &[u8], value: Option<&OsStr>) -> Result<String, String> {
    needed(key, value)?.into_string().map_err(|_| format!("the value of {} is not UTF-8", lossy(key)))
}

/// A switch stands alone, or with `=on` or `=off`.
fn switch(key: &[u8], value: Option<&OsStr>) -> Result<bool, String> {
    match value.map(OsStr::as_bytes) {
        None | Some(b"on") => Ok(true),
        Some(b"off") => Ok(false),
        Some(_) => Err(format!("{} is on or off", lossy(key))),
    }
}

/// A switch that also says whose the writes are.
fn sharing(key: &[u8], value: Option<&OsStr>) -> Result<Option<TemporaryArg>, String> {
    match switch(key, value) {
        Ok(on) => Ok(on.then_some(TemporaryArg::Shared)),
        Err(_) => one_of(key, value).map(Some),
    }
}

fn one_of<T: ValueEnum>(key: &[u8], value: Option<&OsStr>) -> Result<T, String> {
    let text = needed_text(key, value)?;
    T::from_str(&text, false).map_err(|_| {
        let all = T::value_variants().iter().filter_map(ValueEnum::to_possible_value);
        let names: Vec<_> = all.map(|value| value.get_name().to_owned()).collect();
        format!("{}={} is not one of {}", lossy(key), text.escape_debug(), names.join(", "))
    })
}

fn lossy(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).escape_debug().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::args::{AioArg, CacheArg, DiscardArg, FormatArg};

    fn parsed(text: &str) -> ParsedExport {
        parse(OsStr::new(text)).unwrap()
    }

    #[test]
    fn all_keys() {
        let got = parsed(
            "name=a,file=/x/y,read-only,format=qcow2,description=two words,offset=1K,size=2M,exact-size=off,\
             cache=directsync,cluster-cache=3M,aio=io_uring,discard=ignore,compress=zstd:9,detect-zeroes=unmap,load-snapshot=s,backing=none,allow-dir=/a,\
             allow-dir=/b,force-share=on,bitmap=x,bitmap=y,access=read:uid=1,access=write:tls-subject=CN=a,,O=b",
        );
        assert_eq!(got.path, PathBuf::from("/x/y"));
        let image = got.image;
        assert_eq!(image.export_name.as_deref(), Some("a"));
        assert!(image.read_only && image.force_share && !image.exact_size);
        assert_eq!(image.format, Some(FormatArg::Qcow2));
        assert_eq!(image.description.as_deref(), Some("two words"));
        assert_eq!((image.offset, image.size), (Some(1024), Some(2 << 20)));
        assert_eq!(image.cache, Some(CacheArg::Directsync));
        assert_eq!(image.cluster_cache, Some(3 << 20));
        assert_eq!(image.aio, Some(AioArg::IoUring));
        assert_eq!(image.discard, Some(DiscardArg::Ignore));
        assert_eq!(image.load_snapshot.as_deref(), Some("s"));
        assert_eq!(image.compress, compress::parse("zstd:9").ok());
        assert_eq!(image.backing, Some(PathBuf::from("none")));
        assert_eq!(image.allow_dir, [PathBuf::from("/a"), PathBuf::from("/b")]);
        assert_eq!(image.bitmap, ["x", "y"]);
        let rules = ["read:uid=1", "write:tls-subject=CN=a,O=b"].map(|rule| rule.parse().unwrap());
        assert_eq!(image.access, rules);
    }

    #[test]
    fn writes_that_are_thrown_away_are_shared_unless_it_says_otherwise() {
        for (key, sharing) in [
            ("temporary", Some(TemporaryArg::Shared)),
            ("temporary=on", Some(TemporaryArg::Shared)),
            ("temporary=shared", Some(TemporaryArg::Shared)),
            ("temporary=per-client", Some(TemporaryArg::PerClient)),
            ("temporary=off", None),
        ] {
            assert_eq!(parsed(&format!("name=a,file=b,{key}")).image.temporary, sharing, "{key}");
        }
    }

    #[test]
    fn commas_and_equals_signs_in_values() {
        let got = parsed("name=a,,b=c,file=x,,,,y");
        assert_eq!(got.image.export_name.as_deref(), Some("a,b=c"));
        assert_eq!(got.path, PathBuf::from("x,,y"));
    }

    #[test]
    fn names_may_be_empty_and_paths_need_not_be_utf8() {
        let got = parse(OsStr::from_bytes(b"name=,file=\xff")).unwrap();
        assert_eq!(got.image.export_name.as_deref(), Some(""));
        assert_eq!(got.path.as_os_str().as_bytes(), b"\xff");
    }

    #[test]
    fn mistakes_are_told_apart() {
        for (text, hint) in [
            ("file=x", "name= is missing"),
            ("name=a", "file=PATH is missing"),
            ("name=a,file=", "file=PATH is missing"),
            ("name,file=x", "name wants a value"),
            ("name=a,file=x,file=y", "file is given twice"),
            ("name=a,file=x,readonly", "readonly is not a key"),
            ("name=a,file=x,read-only=yes", "on or off"),
            ("name=a,file=x,format=vmdk", "format=vmdk is not one of raw, qcow2, mmap-raw"),
            ("name=a,file=x,size=big", "is not a size"),
            ("name=a,file=x,temporary=mine", "is not one of shared, per-client"),
            ("name=a,file=x,compress=lzma", "compress=lzma: write zlib, zstd, or auto"),
            ("name=a,file=x,access=uid=1", "access=uid=1: a rule begins with"),
            ("name=a,file=x,", "a field is empty"),
            ("", "a field is empty"),
        ] {
            let error = parse(OsStr::new(text)).unwrap_err();
            assert!(error.contains(hint) && error.starts_with("--export"), "{text}: {error}");
        }
        let error = parse(OsStr::from_bytes(b"name=\xff,file=x")).unwrap_err();
        assert!(error.contains("not UTF-8"), "{error}");
    }
}
