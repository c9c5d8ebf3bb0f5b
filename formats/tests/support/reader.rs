//! What a guest sees in a qcow2 image, read by code that shares nothing with the driver.

use std::io::Read;

use super::image::{Bytes, COMPRESSED, COPIED, Entry, Image, OFFSET_MASK};

/// Which disk of an image.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Disk {
    /// The one that is written.
    Active,
    /// That of the snapshot with this number.
    Snapshot(usize),
}

/// All bytes of a disk. What is not allocated comes from `backing`; behind its end there are zeroes.
pub fn read_disk(bytes: &dyn Bytes, disk: Disk, backing: &[u8]) -> Result<Vec<u8>, String> {
    read_files(bytes, bytes, disk, backing)
}

/// The same of an image whose data clusters lie in `data`.
pub fn read_files(
    bytes: &dyn Bytes,
    data: &dyn Bytes,
    disk: Disk,
    backing: &[u8],
) -> Result<Vec<u8>, String> {
    let image = Image::parse(bytes)?;
    let (l1_at, l1_entries, size) = match disk {
        Disk::Active => (image.l1_at, image.l1_entries, image.size),
        Disk::Snapshot(number) => {
            let snapshot = image.snapshots.get(number).ok_or("there is no such snapshot")?;
            (snapshot.l1_at, snapshot.l1_entries, snapshot.size)
        }
    };
    let mut content = vec![0; size as usize];
    let there = backing.len().min(content.len());
    content[..there].copy_from_slice(&backing[..there]);
    let span = image.l2_entries() * image.cluster_len();
    for (index, entry) in image.bytes.table(l1_at, l1_entries).into_iter().enumerate() {
        let at = index as u64 * span;
        if entry & OFFSET_MASK == 0 || at >= size {
            continue;
        }
        let bitmaps = image.has_subclusters().then(|| image.l2_bitmaps(entry & OFFSET_MASK));
        for (number, entry) in image.l2_table(entry & OFFSET_MASK).into_iter().enumerate() {
            let at = at + number as u64 * image.cluster_len();
            if at < size {
                let len = image.cluster_len().min(size - at) as usize;
                let part = &mut content[at as usize..at as usize + len];
                // Also with the zero flag; the copied flag tells the first place from none.
                let host = entry & OFFSET_MASK;
                if image.has_data_file() && (host != 0 || entry & COPIED != 0) && host != at {
                    return Err(format!("the cluster of {at:#x} lies at {host:#x} of the data file"));
                }
                match &bitmaps {
                    Some(bitmaps) if entry & COMPRESSED == 0 => {
                        read_subclusters(&image, data, (entry, bitmaps[number]), part)?;
                    }
                    _ => read_cluster(&image, data, entry, part)?,
                }
            }
        }
    }
    Ok(content)
}

/// 32 subclusters: the lower half of the bitmap says which are data, the upper one which are zeroes.
fn read_subclusters(
    image: &Image<'_>,
    data: &dyn Bytes,
    (entry, bitmap): (u64, u64),
    buf: &mut [u8],
) -> Result<(), String> {
    let host = match image.decode(entry) {
        Entry::Data { host } => Some(host),
        Entry::Unallocated | Entry::Zero { .. } | Entry::Compressed { .. } => None,
    };
    let len = image.cluster_len() as usize / 32;
    for (number, part) in buf.chunks_mut(len).enumerate() {
        match (bitmap >> number & 1 == 1, bitmap >> (32 + number) & 1 == 1, host) {
            (false, false, _) => {}
            (false, true, _) => part.fill(0),
            (true, false, Some(host)) => data.fill(part, host + (number * len) as u64),
            _ => return Err(format!("the entry {entry:#x} has the subclusters {bitmap:#x}")),
        }
    }
    Ok(())
}

fn read_cluster(image: &Image<'_>, data: &dyn Bytes, entry: u64, buf: &mut [u8]) -> Result<(), String> {
    match image.decode(entry) {
        Entry::Unallocated => {}
        Entry::Zero { .. } => buf.fill(0),
        Entry::Data { host } => data.fill(buf, host),
        Entry::Compressed { host, len } => {
            let mut blob = vec![0; len as usize];
            image.bytes.fill(&mut blob, host);
            let read = if image.zstd {
                zstd::stream::read::Decoder::new(&blob[..]).and_then(|mut decoder| decoder.read_exact(buf))
            } else {
                flate2::read::DeflateDecoder::new(&blob[..]).read_exact(buf)
            };
            read.map_err(|e| format!("the blob at {host:#x}: {e}"))?;
        }
    }
    Ok(())
}
