//! Making new image files: which files they may name, and that they appear whole or not at all.

use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::policy::{Gate, Role, folder_of};
use super::probe::probe;
use crate::address::HostOffset;
use crate::driver::Format;
use crate::error::{Error, ErrorKind, Result};
use crate::mover::storage_error;
use crate::qcow2::{self, BackingName, CreateOptions, DataFileName, Header, Preallocation};
use crate::storage::{FileOptions, FileStorage, LockMode, NewFile, Storage};
use crate::sync::Arc;

/// Raw disks are multiples of this (as with QEMU).
const SECTOR_LEN: u64 = 512;

/// What file to make.
#[derive(Clone, Debug)]
pub struct CreateRequest {
    /// Where.
    pub path: PathBuf,
    /// Its format.
    pub format: Format,
    /// Size of the disk; `None`: that of the backing file.
    pub size: Option<u64>,
    /// What a qcow2 image is to be; of these a raw one has only the preallocation. Its size is not looked
    /// at, and its names are opened.
    pub options: CreateOptions,
    /// Do not look at the backing file, which need not be there.
    pub trust_backing: bool,
    /// Ask the file system not to copy on write.
    pub nocow: bool,
    /// Whether files that are there may be replaced.
    pub replace: bool,
    /// Folders, besides the image's own, below which the backing file may lie.
    pub allow_dirs: Vec<PathBuf>,
}

/// Makes the image, and returns the size of its disk. When it returns, the files are durable; when it
/// fails, there are none.
pub fn create(request: &CreateRequest) -> Result<u64> {
    match request.format {
        Format::Qcow2 => create_qcow2(request),
        Format::Raw | Format::MmapRaw => create_raw(request),
    }
}

fn create_raw(request: &CreateRequest) -> Result<u64> {
    let CreateOptions { backing, data_file, preallocation, .. } = &request.options;
    if backing.is_some() || data_file.is_some() || *preallocation == Preallocation::Metadata {
        let text = "a raw image has neither a backing file nor a data file nor metadata";
        return Err(Error::new(ErrorKind::InvalidInput, text).with_path(&request.path));
    }
    let too_large = || Error::new(ErrorKind::InvalidInput, "a disk has less than 8 EiB");
    let size = stated_size(request)?.checked_next_multiple_of(SECTOR_LEN).ok_or_else(too_large)?;
    let file = begin(request, &request.path)?;
    let storage = file.storage();
    let fail = |e| storage_error(&storage, "cannot make the file this long", HostOffset(size), e);
    if storage.facts().grows {
        storage.set_len(size).map_err(fail)?;
    } else if storage.len().map_err(fail)? < size {
        return Err(Error::new(ErrorKind::NoSpace, "the device is smaller").with_path(&request.path));
    }
    qcow2::preallocate(&storage, HostOffset(0), size, *preallocation)?;
    storage.sync().map_err(|e| storage_error(&storage, "cannot make the file durable", HostOffset(0), e))?;
    file.finish()?;
    Ok(size)
}

fn create_qcow2(request: &CreateRequest) -> Result<u64> {
    let backing_size = match &request.options.backing {
        Some(backing) => check_backing(request, backing)?,
        None => None,
    };
    let virtual_size = match (request.size, backing_size) {
        (Some(size), _) | (None, Some(size)) => size,
        (None, None) => stated_size(request)?,
    };
    let options = CreateOptions { virtual_size, ..request.options.clone() };
    options.check().map_err(|e| e.with_path(&request.path))?;
    let size = options.rounded_size()?;
    let data_path = options.data_file.as_ref().map(|name| data_path(request, name)).transpose()?;
    let data_file = data_path.as_deref().map(|path| begin(request, path)).transpose()?;
    let image = begin(request, &request.path)?;
    let data_storage = data_file.as_ref().map(NewFile::storage);
    qcow2::create(&image.storage(), data_storage.as_ref(), &options)?;
    // The image last: it names the other.
    let data_is_there = match data_file {
        Some(file) => file.finish().map(|()| data_path.filter(|_| !request.replace))?,
        None => None,
    };
    image.finish().inspect_err(|_| {
        if let Some(path) = data_is_there {
            // Made just now, and nobody knows of it.
            let _ = std::fs::remove_file(path);
        }
    })?;
    Ok(size)
}

fn begin(request: &CreateRequest, path: &Path) -> Result<NewFile> {
    let file = NewFile::create(path, request.replace)?;
    if request.nocow && !file.set_nocow() {
        tracing::warn!(path = %path.display(), "the file system has no files that are not copied on write (nocow)");
    }
    Ok(file)
}

fn stated_size(request: &CreateRequest) -> Result<u64> {
    request.size.ok_or_else(|| {
        let text =
            "its size is missing; only an image with a backing file that is looked at has one of its own";
        Error::new(ErrorKind::InvalidInput, text).with_path(&request.path)
    })
}

/// Looks at the backing file as whoever opens the image will, and gives the size of its disk.
fn check_backing(request: &CreateRequest, backing: &BackingName) -> Result<Option<u64>> {
    let format = match backing.format.as_str() {
        "raw" => Format::Raw,
        "qcow2" => Format::Qcow2,
        other => {
            let text = format!("the format '{}' of the backing file is not supported", other.escape_debug());
            return Err(Error::new(ErrorKind::Unsupported, text).with_path(&request.path));
        }
    };
    if request.trust_backing {
        return Ok(None);
    }
    let gate = Gate::new(&request.path, &request.allow_dirs)?;
    let named = gate.open(&request.path, &backing.name, Role::Backing, false)?;
    // Only its header is read, which is there whether somebody writes it or not.
    let options = FileOptions { writable: false, direct: false, lock: LockMode::Off };
    let file: Arc<dyn Storage> = FileStorage::from_fd(named.file, &named.path, &options)?;
    match format {
        Format::Qcow2 => Ok(Some(Header::load(&file)?.virtual_size)),
        Format::Raw | Format::MmapRaw => {
            if probe(&file).is_ok_and(|found| found == Format::Qcow2) {
                let path = &file.facts().path;
                tracing::warn!(path = %path.display(), "the backing file looks like qcow2 and is taken as raw");
            }
            let fail = |e| storage_error(&file, "cannot tell the file's length", HostOffset(0), e);
            Ok(Some(file.len().map_err(fail)?.next_multiple_of(SECTOR_LEN)))
        }
    }
}

/// Where the data file is: relative to the image's folder, where whoever opens the image looks for it.
fn data_path(request: &CreateRequest, file: &DataFileName) -> Result<PathBuf> {
    let name = Path::new(std::ffi::OsStr::from_bytes(&file.name));
    let path = folder_of(&request.path).join(name);
    // Nothing is there to be opened yet; its folder is, and has to be allowed.
    let Some(folder) = path.parent().filter(|_| path.file_name().is_some()) else {
        return Err(
            Error::new(ErrorKind::InvalidInput, "data_file is no name for a file").with_path(&request.path)
        );
    };
    Gate::new(&request.path, &request.allow_dirs)?.check_folder(&request.path, &file.name, folder)?;
    Ok(path)
}
