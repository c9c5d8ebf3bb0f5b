//! From a file to a driver: the image, and the chain of files below it.
//!
//! The chain is walked from the top in a loop, every file through the policy, and the drivers are then
//! put on each other from the bottom. Nothing below the top is ever opened for writing: only the image that
//! the operator named, and the data file of that image.

use std::path::{Path, PathBuf};

use super::policy::{FileIdentity, Gate, Role};
use super::probe::{magic_name, probe};
use super::{Backing, Names, OpenOptions, part_of};
use crate::driver::{BlockDriver, Format};
use crate::error::{Error, ErrorKind, Result};
use crate::qcow2::{BitmapChange, Caches, Header, ImageNumber, Parts, Qcow2Driver, WriteOptions};
use crate::raw::{RawDriver, RawOptions};
use crate::storage::{FileOptions, FileStorage, LockMode, MappedStorage, Storage};
use crate::sync::Arc;

/// Most images in a chain. Our choice: operators who make a snapshot a day and consolidate monthly have
/// 30; each image costs a stack frame for a read and a file descriptor or two.
pub const CHAIN_MAX: usize = 64;

/// Opens the raw disk at `path`.
pub fn open_raw(
    path: &Path,
    options: &OpenOptions,
    format: Format,
    probed: bool,
) -> Result<Arc<dyn BlockDriver>> {
    check_raw_options(path, options)?;
    let lock = if options.writable { LockMode::Writer } else { reader_lock(options) };
    let file_options = FileOptions { writable: options.writable, direct: options.direct, lock };
    let file = FileStorage::open(path, &file_options)?;
    let storage: Arc<dyn Storage> = match format {
        Format::MmapRaw => MappedStorage::new(file)?,
        Format::Raw | Format::Qcow2 => part_of(file, options)?,
    };
    // It was probed before it was locked and may be another file by now.
    if probed && probe(&storage)? != Format::Raw {
        return Err(Error::new(ErrorKind::InvalidInput, "the file was replaced while it was being opened")
            .with_path(path));
    }
    let raw_options = RawOptions {
        exact_size: options.exact_size,
        discard: options.discard,
        format,
        refuse_magic: probed.then_some(magic_name),
    };
    Ok(RawDriver::open(storage, raw_options)?)
}

/// Opens the qcow2 image at `path`, and what is below it read-only.
pub fn open_qcow2(path: &Path, options: &OpenOptions) -> Result<Arc<dyn BlockDriver>> {
    check_qcow2_options(path, options)?;
    let mut chain = Chain { options, layers: Vec::new(), seen: Vec::new() };
    let file_options = chain.top_file_options();
    let mut top = chain.open_named_by_operator(path, &file_options)?;
    top.storage = part_of(top.storage, options)?;
    let bottom = chain.descend(top)?;
    chain.assemble(bottom)
}

/// An image file that is changed as it lies there.
pub struct Top {
    /// The file.
    pub image: Arc<dyn Storage>,
    /// Its external data file, if it has one, to be written, too.
    pub data_file: Option<Arc<dyn Storage>>,
    /// The disk below, if there is one.
    pub below: Option<Arc<dyn BlockDriver>>,
}

/// Opens the qcow2 image at `path` for changing it as it lies there, and drivers of what is below it.
pub fn open_top(path: &Path, options: &OpenOptions) -> Result<Top> {
    check_qcow2_options(path, options)?;
    let written = OpenOptions { writable: true, ..options.clone() };
    let read = OpenOptions { writable: false, ..options.clone() };
    let mut chain = Chain { options: &written, layers: Vec::new(), seen: Vec::new() };
    let file_options = chain.top_file_options();
    let top = chain.open_named_by_operator(path, &file_options)?;
    let bottom = chain.descend(top)?;
    let Layer { image, data_file, .. } = chain.layers.remove(0);
    // What lies below becomes the top of a chain of its own.
    chain.options = &read;
    let below = if chain.layers.is_empty() { bottom } else { Some(chain.assemble(bottom)?) };
    Ok(Top { image, data_file, below })
}

/// A qcow2 image of the chain, before there is a driver for it.
struct Layer {
    image: Arc<dyn Storage>,
    header: Header,
    data_file: Option<Arc<dyn Storage>>,
}

/// A file of the chain whose format is not looked at yet.
struct Link {
    storage: Arc<dyn Storage>,
    /// What names in it are relative to.
    path: PathBuf,
    /// Which files may be named in it.
    gate: Arc<Gate>,
}

struct Chain<'a> {
    options: &'a OpenOptions,
    layers: Vec<Layer>,
    seen: Vec<FileIdentity>,
}

impl Chain<'_> {
    fn open_named_by_operator(&mut self, path: &Path, file_options: &FileOptions) -> Result<Link> {
        let file = FileStorage::open(path, file_options)?;
        self.note(FileIdentity::of(&*file)?, path, path)?;
        let gate = Arc::new(match self.options.names {
            Names::Confined => Gate::new(path, &self.options.allow_dirs)?,
            Names::Trusted => Gate::open_to_all(),
        });
        Ok(Link { storage: file, path: path.to_owned(), gate })
    }

    fn open_named_by_image(
        &mut self,
        image: &Path,
        gate: &Arc<Gate>,
        name: &[u8],
        role: Role,
        file_options: &FileOptions,
    ) -> Result<Link> {
        let named = gate.open(image, name, role, file_options.writable)?;
        self.note(named.identity, image, &named.path)?;
        let storage = FileStorage::from_fd(named.file, &named.path, file_options)?;
        Ok(Link { storage, path: named.path, gate: Arc::clone(gate) })
    }

    /// Walks down from a qcow2 image; returns the raw disk at the bottom, if there is one.
    fn descend(&mut self, top: Link) -> Result<Option<Arc<dyn BlockDriver>>> {
        let mut link = top;
        loop {
            if self.layers.len() >= CHAIN_MAX {
                return Err(Error::new(
                    ErrorKind::Denied,
                    format!("the chain of backing files is longer than {CHAIN_MAX} images"),
                )
                .with_path(&link.path));
            }
            let header = Header::load(&link.storage)?;
            let data_file = self.open_data_file(&link, &header)?;
            let below = self.open_backing(&link, &header)?;
            let stated = header.extensions.backing_format.clone();
            // As for the backing file itself, what the operator says is about the image that he named.
            let by_operator = self.options.backing_format.filter(|_| self.layers.is_empty());
            self.layers.push(Layer { image: link.storage, header, data_file });
            let Some(below) = below else { return Ok(None) };
            match by_operator.map_or_else(|| backing_format(stated.as_deref(), &below), Ok)? {
                Format::Qcow2 => link = below,
                Format::Raw | Format::MmapRaw => {
                    return Ok(Some(RawDriver::open(below.storage, RawOptions::default())?));
                }
            }
        }
    }

    fn open_data_file(&mut self, link: &Link, header: &Header) -> Result<Option<Arc<dyn Storage>>> {
        if !header.geometry.is_external() {
            return Ok(None);
        }
        // An image and its data are written together.
        let top = self.layers.is_empty();
        let file_options = if top { self.top_file_options() } else { self.backing_file_options() };
        if let Some(path) = self.options.data_file.as_deref().filter(|_| top) {
            return Ok(Some(self.open_named_by_operator(path, &file_options)?.storage));
        }
        let name = header.extensions.data_file_name.as_deref().ok_or_else(|| {
            Error::new(ErrorKind::Unsupported, "the image needs an external data file and does not name it")
                .with_path(&link.path)
        })?;
        let data_file =
            self.open_named_by_image(&link.path, &link.gate, name, Role::DataFile, &file_options)?;
        Ok(Some(data_file.storage))
    }

    fn open_backing(&mut self, link: &Link, header: &Header) -> Result<Option<Link>> {
        // What the operator says about the backing file is about the image that he named.
        let wanted = if self.layers.is_empty() { &self.options.backing } else { &Backing::Follow };
        match (wanted, &header.backing_name) {
            (Backing::None, _) | (Backing::Follow, None) => Ok(None),
            (Backing::Path(path), _) => {
                self.open_named_by_operator(path, &self.backing_file_options()).map(Some)
            }
            (Backing::Follow, Some(name)) => {
                let file_options = self.backing_file_options();
                self.open_named_by_image(&link.path, &link.gate, name, Role::Backing, &file_options).map(Some)
            }
        }
    }

    /// Refuses a file that is in the chain already.
    fn note(&mut self, identity: FileIdentity, image: &Path, named: &Path) -> Result<()> {
        if self.seen.contains(&identity) {
            return Err(Error::new(
                ErrorKind::Denied,
                format!("its chain of files comes back to {} (--backing none cuts it)", named.display()),
            )
            .with_path(image));
        }
        self.seen.push(identity);
        Ok(())
    }

    /// Puts the drivers on each other.
    fn assemble(self, bottom: Option<Arc<dyn BlockDriver>>) -> Result<Arc<dyn BlockDriver>> {
        let headers = self.layers.iter().map(|layer| &layer.header);
        let caches = Caches::new(self.options.table_cache_len, self.options.cluster_cache_len, headers)?;
        let mut backing = bottom;
        for (depth, layer) in self.layers.into_iter().enumerate().rev() {
            let number = ImageNumber(u16::try_from(depth).unwrap_or(u16::MAX));
            let snapshot = if depth == 0 { self.options.snapshot.clone() } else { None };
            let Layer { image, header, data_file } = layer;
            let caches = Arc::clone(&caches);
            let write = (depth == 0 && self.options.writable).then(|| write_options(self.options));
            let parts = Parts { image, header, data_file, backing, number, caches, snapshot, write };
            backing = Some(Qcow2Driver::open(parts)?);
        }
        backing.ok_or_else(|| Error::new(ErrorKind::InvalidInput, "the chain has no image"))
    }

    fn top_file_options(&self) -> FileOptions {
        let options = self.options;
        let lock = if options.writable { LockMode::Writer } else { reader_lock(options) };
        FileOptions { writable: options.writable, direct: options.direct, lock }
    }

    fn backing_file_options(&self) -> FileOptions {
        FileOptions { writable: false, direct: self.options.direct, lock: reader_lock(self.options) }
    }
}

/// The format of a backing file: what its overlay states, else what it looks like. A file that is stated
/// to be raw stays raw whatever its guest has written into it.
fn backing_format(stated: Option<&str>, below: &Link) -> Result<Format> {
    match stated {
        Some("raw") => Ok(Format::Raw),
        Some("qcow2") => Ok(Format::Qcow2),
        None => {
            tracing::warn!(
                path = %below.path.display(),
                "the overlay does not state the format of this backing file: it is probed"
            );
            probe(&below.storage)
        }
        Some(other) => Err(Error::new(
            ErrorKind::Unsupported,
            format!("the format '{}' of this backing file is not supported", other.escape_debug()),
        )
        .with_path(&below.path)),
    }
}

fn write_options(options: &OpenOptions) -> WriteOptions {
    WriteOptions {
        discard: options.discard,
        zeroes_as_qemu: options.zeroes_as_qemu,
        foreign_backing: options.backing != Backing::Follow,
        compress: options.compress,
        bitmap_len_max: options.bitmap_len_max,
        ..WriteOptions::default()
    }
}

fn reader_lock(options: &OpenOptions) -> LockMode {
    if options.force_share { LockMode::ForceShare } else { LockMode::Reader }
}

fn check_qcow2_options(path: &Path, options: &OpenOptions) -> Result<()> {
    if options.force_share && options.writable {
        let what = "--force-share is for reading (--read-only)";
        return Err(Error::new(ErrorKind::InvalidInput, what).with_path(path));
    }
    Ok(())
}

fn check_raw_options(path: &Path, options: &OpenOptions) -> Result<()> {
    let what = match options {
        OpenOptions { snapshot: Some(_), .. } => "a raw disk has no snapshots (--load-snapshot)",
        OpenOptions { backing: Backing::Path(_), .. } => "a raw disk has no backing file (--backing)",
        OpenOptions { force_share: true, writable: true, .. } => "--force-share is for reading (--read-only)",
        OpenOptions { compress: Some(_), writable: true, .. } => {
            "a raw disk has no compressed clusters (--compress, driver=compress)"
        }
        OpenOptions { part: Some(_), format: Some(Format::MmapRaw), .. } => "mmap-raw maps whole files",
        _ => return Ok(()),
    };
    Err(Error::new(ErrorKind::InvalidInput, what).with_path(path))
}

/// Changes a dirty bitmap of the qcow2 image at `path`, which nobody else may have open meanwhile.
pub fn change_bitmap(path: &Path, name: &str, change: BitmapChange<'_>) -> Result<()> {
    // What the disk holds does not matter.
    let options = OpenOptions { writable: true, backing: Backing::None, ..OpenOptions::default() };
    let mut chain = Chain { options: &options, layers: Vec::new(), seen: Vec::new() };
    let file_options = chain.top_file_options();
    let top = chain.open_named_by_operator(path, &file_options)?;
    chain.descend(top)?;
    let none = || Error::new(ErrorKind::InvalidInput, "the chain has no image");
    let Layer { image, header, data_file } = chain.layers.pop().ok_or_else(none)?;
    let caches = Caches::new(0, 0, [&header])?;
    let driver = Qcow2Driver::open(Parts {
        image,
        header,
        data_file,
        backing: None,
        number: ImageNumber(0),
        caches,
        snapshot: None,
        write: Some(change.write_options()),
    })?;
    let changed = driver.change_bitmap(name, change);
    changed.and(driver.close())
}
