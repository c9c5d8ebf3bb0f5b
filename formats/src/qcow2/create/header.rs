//! The first cluster of a new image: header, extensions, names.

use zerocopy::IntoBytes;

use super::{CreateOptions, Layout};
use crate::error::{Error, ErrorKind, Result};
use crate::qcow2::extensions::{BACKING_FORMAT, DATA_FILE, FEATURE_ENTRY_LEN, FEATURE_NAMES};
use crate::qcow2::header::{
    Autoclear, BACKING_NAME_LEN_MAX, Compatible, Compression, Incompatible, MAGIC, RawHeader, V2_LEN,
};

/// Names of feature bits for programs that do not know them: type, bit, name (specification, "Feature name
/// table").
const FEATURES: [(u8, u8, &str); 8] = [
    (0, 0, "dirty bit"),
    (0, 1, "corrupt bit"),
    (0, 2, "external data file"),
    (0, 3, "compression type"),
    (0, 4, "extended L2 entries"),
    (1, 0, "lazy refcounts"),
    (2, 0, "bitmaps"),
    (2, 1, "raw external data"),
];

/// The bytes of the first cluster. Fails where the names do not fit into it.
pub fn encode(options: &CreateOptions, layout: &Layout) -> Result<Vec<u8>> {
    let header_len = if options.version == 2 { V2_LEN as usize } else { size_of::<RawHeader>() };
    let mut names = Vec::new();
    if let Some(backing) = &options.backing {
        extension(&mut names, BACKING_FORMAT, backing.format.as_bytes());
    }
    if let Some(file) = &options.data_file {
        extension(&mut names, DATA_FILE, &file.name);
    }
    let cluster_len = usize::try_from(options.cluster_len).unwrap_or(0);
    let backing_name = options.backing.as_ref().map_or(&[][..], |backing| &backing.name);
    let mut features = Vec::new();
    if options.version == 3 {
        extension(&mut features, FEATURE_NAMES, &feature_names());
    }
    // The names of features are a courtesy that may be left out.
    let needed = header_len + names.len() + size_of::<u64>() + backing_name.len();
    if needed + features.len() > cluster_len {
        features.clear();
    }
    let too_long = u32::try_from(backing_name.len()).is_ok_and(|len| len > BACKING_NAME_LEN_MAX);
    if needed > cluster_len || too_long {
        let text = "the names of the backing and the data file are too long for the first cluster (a name has \
                    1023 bytes at most; a larger cluster_size makes room)";
        return Err(Error::new(ErrorKind::InvalidInput, text));
    }
    let extensions = [names, features, vec![0; size_of::<u64>()]].concat();
    let raw = raw_header(options, layout, header_len + extensions.len());
    let mut bytes = raw.as_bytes().get(..header_len).unwrap_or_default().to_vec();
    bytes.extend(extensions);
    bytes.extend(backing_name);
    bytes.resize(cluster_len, 0);
    Ok(bytes)
}

fn raw_header(options: &CreateOptions, layout: &Layout, name_at: usize) -> RawHeader {
    let mut incompatible = Incompatible::empty();
    incompatible.set(Incompatible::DATA_FILE, options.data_file.is_some());
    incompatible.set(Incompatible::COMPRESSION, options.compression != Compression::Zlib);
    incompatible.set(Incompatible::EXTENDED_L2, options.extended_l2);
    let mut compatible = Compatible::empty();
    compatible.set(Compatible::LAZY_REFCOUNTS, options.lazy_refcounts);
    let mut autoclear = Autoclear::empty();
    autoclear.set(Autoclear::DATA_FILE_RAW, options.data_file.as_ref().is_some_and(|file| file.raw));
    let name_len = options.backing.as_ref().map_or(0, |backing| backing.name.len());
    let short = |number: u64| u32::try_from(number).unwrap_or(u32::MAX).into();
    RawHeader {
        magic: MAGIC.into(),
        version: options.version.into(),
        backing_file_offset: if name_len == 0 { 0 } else { name_at as u64 }.into(),
        backing_file_size: short(name_len as u64),
        cluster_bits: options.cluster_len.trailing_zeros().into(),
        size: layout.size.into(),
        crypt_method: 0.into(),
        l1_size: short(layout.l1_entries),
        l1_table_offset: layout.l1_at.0.into(),
        refcount_table_offset: layout.table_at.0.into(),
        refcount_table_clusters: short(layout.table_clusters),
        nb_snapshots: 0.into(),
        snapshots_offset: 0.into(),
        incompatible_features: incompatible.bits().into(),
        compatible_features: compatible.bits().into(),
        autoclear_features: autoclear.bits().into(),
        refcount_order: options.refcount_bits.trailing_zeros().into(),
        header_length: short(size_of::<RawHeader>() as u64),
        compression_type: match options.compression {
            Compression::Zlib => 0,
            Compression::Zstd => 1,
        },
        padding: [0; 7],
    }
}

fn extension(bytes: &mut Vec<u8>, kind: u32, data: &[u8]) {
    bytes.extend(kind.to_be_bytes());
    bytes.extend(u32::try_from(data.len()).unwrap_or(u32::MAX).to_be_bytes());
    bytes.extend(data);
    bytes.resize(bytes.len().next_multiple_of(8), 0);
}

fn feature_names() -> Vec<u8> {
    let mut bytes = Vec::new();
    for (number, (kind, bit, name)) in FEATURES.into_iter().enumerate() {
        bytes.extend([kind, bit]);
        bytes.extend(name.as_bytes());
        bytes.resize((number + 1) * FEATURE_ENTRY_LEN, 0);
    }
    bytes
}
