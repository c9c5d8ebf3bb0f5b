//! Header extensions: tagged records between the header and the end of the first cluster.
//!
//! Unknown ones are skipped, as the specification wants. What an extension says is only stored here;
//! names are opened nowhere but behind the policy of [`open`](crate::open).

use crate::error::{Error, ErrorKind, Result};

/// Ends the list (specification, "Header extensions").
const END: u32 = 0;
/// Name of the backing file's format.
const BACKING_FORMAT: u32 = 0xe279_2aca;
/// Names of feature bits.
const FEATURE_NAMES: u32 = 0x6803_f857;
/// Where the bitmap directory lies.
pub const BITMAPS: u32 = 0x2385_2875;
/// Where the LUKS header lies.
const FULL_DISK_ENCRYPTION: u32 = 0x0537_be77;
/// Name of the external data file.
const DATA_FILE: u32 = 0x4441_5441;

/// Bytes before an extension's data: magic and length.
pub const HEAD_LEN: usize = 8;
/// Bytes of the bitmaps extension's data (specification).
pub const BITMAPS_LEN: u64 = 24;
/// Bytes of an entry in the feature name table: type, bit, name.
const FEATURE_ENTRY_LEN: usize = 48;
/// Type of incompatible features in the feature name table.
const FEATURE_INCOMPATIBLE: u8 = 0;

/// What the extensions of an image say.
#[derive(Clone, Debug, Default)]
pub struct Extensions {
    /// Format of the backing file, as stated.
    pub backing_format: Option<String>,
    /// Name of the external data file, as stated.
    pub data_file_name: Option<Vec<u8>>,
    /// Where the bitmaps are listed; unchecked.
    pub bitmaps: Option<BitmapsExtension>,
    /// Whether there is an encryption header.
    pub encryption_header: bool,
    /// Where the mark of the list's end stands in the file, if there is one.
    pub end_at: Option<u64>,
    feature_names: Vec<(u8, u8, String)>,
}

/// The bitmaps extension, as it stands in the header.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BitmapsExtension {
    /// Number of bitmaps.
    pub count: u32,
    /// Bytes of the directory.
    pub directory_len: u64,
    /// Where the directory lies.
    pub directory_at: u64,
    /// Where the extension's own data lies in the file.
    pub data_at: u64,
    /// No other one follows it.
    pub is_last: bool,
}

impl Extensions {
    /// Reads the extensions of `first_cluster` (which the file may end inside of) that lie from
    /// `header_len` to before `end`.
    pub fn parse(first_cluster: &[u8], header_len: u32, end: u64) -> Result<Self> {
        let end = usize::try_from(end).unwrap_or(usize::MAX).min(first_cluster.len());
        let mut rest = first_cluster.get(header_len as usize..end).unwrap_or_default();
        let mut extensions = Extensions::default();
        while !rest.is_empty() {
            let head_at = end - rest.len();
            let data_at = head_at + HEAD_LEN;
            let (magic, data, behind) = split_extension(rest)?;
            if magic == END {
                extensions.end_at = (rest.len() >= HEAD_LEN).then_some(head_at as u64);
                break;
            }
            if let Some(bitmaps) = &mut extensions.bitmaps {
                bitmaps.is_last = false;
            }
            extensions.take(magic, data, data_at as u64)?;
            rest = behind;
        }
        Ok(extensions)
    }

    /// The name of an incompatible feature bit, from the image's own table if it is there.
    pub fn incompatible_feature_name(&self, bit: u8) -> String {
        self.feature_names
            .iter()
            .find(|(kind, named, _)| *kind == FEATURE_INCOMPATIBLE && *named == bit)
            .map_or_else(|| format!("bit {bit}"), |(_, _, name)| format!("'{}'", name.escape_debug()))
    }

    fn take(&mut self, magic: u32, data: &[u8], data_at: u64) -> Result<()> {
        match magic {
            BACKING_FORMAT => self.backing_format = Some(String::from_utf8_lossy(data).into_owned()),
            DATA_FILE => self.data_file_name = Some(data.to_vec()),
            FEATURE_NAMES => self.feature_names = feature_names(data),
            FULL_DISK_ENCRYPTION => self.encryption_header = true,
            BITMAPS => self.bitmaps = Some(BitmapsExtension::parse(data, data_at)?),
            _ => {}
        }
        Ok(())
    }
}

impl BitmapsExtension {
    fn parse(data: &[u8], data_at: u64) -> Result<Self> {
        let fields = (be_u32(data, 0), be_u64(data, 8), be_u64(data, 16));
        let (Some(count), Some(directory_len), Some(directory_at)) = fields else {
            return Err(corrupt("the bitmaps header extension is too short"));
        };
        Ok(BitmapsExtension { count, directory_len, directory_at, data_at, is_last: true })
    }
}

/// Magic, data and what follows behind the padding.
fn split_extension(bytes: &[u8]) -> Result<(u32, &[u8], &[u8])> {
    let too_large = || corrupt("a header extension reaches beyond its place");
    // Fewer bytes than a head can only be padding before the backing file's name.
    let (Some(magic), Some(len)) = (be_u32(bytes, 0), be_u32(bytes, 4)) else {
        return if bytes.iter().all(|byte| *byte == 0) { Ok((END, &[], &[])) } else { Err(too_large()) };
    };
    let body = bytes.get(HEAD_LEN..).unwrap_or_default();
    let len = usize::try_from(len).unwrap_or(usize::MAX);
    if magic == END {
        return Ok((END, &[], &[]));
    }
    let data = body.get(..len).ok_or_else(too_large)?;
    let padded = len.checked_next_multiple_of(8).ok_or_else(too_large)?;
    Ok((magic, data, body.get(padded..).unwrap_or_default()))
}

fn feature_names(data: &[u8]) -> Vec<(u8, u8, String)> {
    let name_of = |entry: &[u8]| match entry {
        [kind, bit, name @ ..] => {
            let name: Vec<u8> = name.iter().copied().take_while(|byte| *byte != 0).collect();
            Some((*kind, *bit, String::from_utf8_lossy(&name).into_owned()))
        }
        [] | [_] => None,
    };
    data.chunks_exact(FEATURE_ENTRY_LEN).filter_map(name_of).collect()
}

/// The big-endian number of 32 bits at `at`, if it is there.
pub fn be_u32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// The big-endian number of 64 bits at `at`, if it is there.
pub fn be_u64(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn corrupt(what: &'static str) -> Error {
    Error::new(ErrorKind::Corrupt, what)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extension(magic: u32, data: &[u8]) -> Vec<u8> {
        let mut bytes = magic.to_be_bytes().to_vec();
        bytes.extend_from_slice(&u32::try_from(data.len()).unwrap().to_be_bytes());
        bytes.extend_from_slice(data);
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        bytes
    }

    #[test]
    fn list_ends_at_the_end_mark_and_skips_the_unknown() {
        let mut bytes = extension(0x1234_5678, b"whatever it is");
        bytes.extend(extension(BACKING_FORMAT, b"raw"));
        bytes.extend(extension(END, b""));
        bytes.extend(extension(BACKING_FORMAT, b"qcow2"));
        let extensions = Extensions::parse(&bytes, 0, 4096).unwrap();
        assert_eq!(extensions.backing_format.as_deref(), Some("raw"));
    }

    #[test]
    fn nothing_is_read_behind_the_end_or_before_the_header() {
        let bytes = extension(BACKING_FORMAT, b"raw");
        assert!(Extensions::parse(&bytes, 0, 8).is_err());
        assert!(Extensions::parse(&bytes, 0, 11).is_ok());
        assert!(Extensions::parse(&bytes, 4000, 4096).unwrap().backing_format.is_none());
    }

    #[test]
    fn feature_bits_have_the_images_own_names() {
        let mut entry = [0u8; FEATURE_ENTRY_LEN];
        entry[1] = 40;
        entry[2..10].copy_from_slice(b"time\ntra");
        let extensions = Extensions::parse(&extension(FEATURE_NAMES, &entry), 0, 4096).unwrap();
        assert_eq!(extensions.incompatible_feature_name(40), "'time\\ntra'");
        assert_eq!(extensions.incompatible_feature_name(41), "bit 41");
    }

    #[test]
    fn an_endless_extension_is_refused() {
        let mut bytes = vec![0x12, 0x34, 0x56, 0x78, 0x7f, 0xff, 0xff, 0xff];
        bytes.resize(4096, 0);
        assert_eq!(Extensions::parse(&bytes, 0, 4096).unwrap_err().kind(), ErrorKind::Corrupt);
    }
}
