//! Which format a file has, by its magic.
//!
//! Only unmistakable magic counts. Formats that cannot be served are recognised so that they are refused
//! by name rather than served as raw; whoever wants their bytes states the format.

use crate::address::HostOffset;
use crate::driver::Format;
use crate::error::{Error, ErrorKind, Result};
use crate::mover::storage_error;
use crate::qcow2;
use crate::storage::Storage;
use crate::sync::Arc;

/// Bytes of a file's beginning that are looked at: the last magic ends at 68.
const HEAD_LEN: usize = 512;
/// Bytes of a file's end that are looked at: the footer of a VHD image.
const FOOTER_LEN: u64 = 512;
/// Begins the header or footer of a VHD image (Microsoft, "Virtual Hard Disk Image Format").
const VHD_COOKIE: &[u8] = b"conectix";

/// Magics of formats that are recognised by bytes at a fixed place: offset, bytes, name.
const FOREIGN: [(usize, &[u8], &str); 10] = [
    (0, b"QED\0", "QED"),
    (0, b"KDMV", "VMDK"),
    (0, b"COWD", "VMDK"),
    (0, b"# Disk DescriptorFile", "VMDK"),
    (0, VHD_COOKIE, "VHD"),
    (0, b"vhdxfile", "VHDX"),
    (64, &[0x7f, 0x10, 0xda, 0xbe], "VDI"),
    (0, b"LUKS\xba\xbe", "LUKS"),
    (0, b"WithoutFreeSpace", "Parallels"),
    (0, b"WithouFreSpacExt", "Parallels"),
];

/// What a magic says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Found {
    Qcow2,
    Foreign(&'static str),
}

/// The format of the image in `storage`: qcow2, or raw when nothing else is recognised. Fails with
/// `Unsupported` when it is a known format that cannot be served.
pub fn probe(storage: &Arc<dyn Storage>) -> Result<Format> {
    let mut head = [0u8; HEAD_LEN];
    let got = read_at(storage, HostOffset(0), &mut head)?;
    let found = match recognise(head.get(..got).unwrap_or_default()) {
        None if has_vhd_footer(storage)? => Some(Found::Foreign("VHD")),
        found => found,
    };
    match found {
        Some(Found::Qcow2) => Ok(Format::Qcow2),
        None => Ok(Format::Raw),
        Some(Found::Foreign(name)) => Err(Error::new(
            ErrorKind::Unsupported,
            format!(
                "this is a {name} image, which cannot be served; --format raw serves its bytes as a disk"
            ),
        )
        .with_path(&storage.facts().path)),
    }
}

/// Names the format whose magic the first bytes of a disk have. A raw disk whose format was probed must
/// not come to begin with any of them.
pub fn magic_name(head: &[u8]) -> Option<&'static str> {
    recognise(head).map(|found| match found {
        Found::Qcow2 => "qcow2",
        Found::Foreign(name) => name,
    })
}

fn recognise(head: &[u8]) -> Option<Found> {
    if head.starts_with(&qcow2::MAGIC.to_be_bytes()) {
        return match head.get(4..8) {
            Some([0, 0, 0, 1]) => Some(Found::Foreign("qcow (version 1)")),
            // Versions to come are the qcow2 driver's to refuse.
            _ => Some(Found::Qcow2),
        };
    }
    let has = |at: usize, magic: &[u8]| head.get(at..).is_some_and(|rest| rest.starts_with(magic));
    FOREIGN.iter().find(|(at, magic, _)| has(*at, magic)).map(|(_, _, name)| Found::Foreign(name))
}

/// A VHD image of fixed size has only a footer.
fn has_vhd_footer(storage: &Arc<dyn Storage>) -> Result<bool> {
    let len =
        storage.len().map_err(|e| storage_error(storage, "cannot tell its length", HostOffset(0), e))?;
    let Some(at) = len.checked_sub(FOOTER_LEN) else { return Ok(false) };
    let mut cookie = [0u8; VHD_COOKIE.len()];
    let got = read_at(storage, HostOffset(at), &mut cookie)?;
    Ok(cookie.get(..got) == Some(VHD_COOKIE))
}

fn read_at(storage: &Arc<dyn Storage>, at: HostOffset, buf: &mut [u8]) -> Result<usize> {
    storage.pread(buf, at).map_err(|e| storage_error(storage, "cannot read", at, e))
}
