//! Small images with one of everything, and how to open them over any storage. All have clusters of 512 bytes (an L2
//! table of 64 entries covers 32 KiB) and a disk of three tables:
//!
//! | clusters | what is there |
//! |---|---|
//! | 0..16 | data |
//! | 16..24 | compressed, where the refcounts can count it |
//! | 24..28, 28..32 | zero without and with a cluster, in version 3 |
//! | 32..64 | nothing, below a table |
//! | 64..80 | data that a snapshot shares, table included |
//! | 80..128 | nothing, below a shared table |
//! | 128..192 | nothing, no table |

use nbd_img_formats::qcow2::{Caches, Compress, Header, ImageNumber, Parts, Qcow2Driver, WriteOptions};
use nbd_img_formats::raw::{RawDriver, RawOptions};
use nbd_img_formats::storage::{MemoryOptions, MemoryStorage, Storage};
use nbd_img_formats::sync::Arc;
use nbd_img_formats::{BlockDriver, Durability, HostOffset, Result};

use super::image::{Bytes, Image};
use super::maker::{self, Maker};
use super::reader::{self, Disk};
use super::units::{Writer, painted};

/// Bytes in a cluster.
pub const CLUSTER: u64 = 512;
/// Bytes of the disk.
pub const SIZE: u64 = 192 * CLUSTER;
/// Who wrote what the image had before.
const IMAGE: Writer = 0xf000_0001;
/// Who wrote the backing file.
const BACKING: Writer = 0xf000_0002;

/// Options of an image whose subclusters have 512 bytes.
const EXTENDED: &str = "cluster_size=16k,extended_l2=on";
/// Who wrote what lies in a data file where no entry leads.
const STALE: Writer = 0xf000_0003;

/// An image, and what is known of it.
pub struct Scene {
    pub name: &'static str,
    pub image: Vec<u8>,
    /// What its external data file holds, if it has one.
    pub data: Option<Vec<u8>>,
    pub backing: Option<Vec<u8>>,
    /// What the guest sees.
    pub content: Vec<u8>,
    /// What it sees in each snapshot.
    pub snapshots: Vec<Vec<u8>>,
    /// The image lies on a device of this length: it does not grow, and nothing on it is known to be zero.
    pub device_len: Option<u64>,
    /// Its data file lies on a device of this length.
    pub data_device_len: Option<u64>,
    /// Which clusters are compressed.
    pub compressed: std::ops::Range<u64>,
    /// What is written of whole clusters is compressed.
    pub compress: bool,
    /// Bytes of new bits of dirty bitmaps that stay in memory.
    pub bitmap_len_max: u64,
}

impl Scene {
    /// All of them.
    pub fn all() -> Vec<Scene> {
        let zstd = "refcount_bits=32,compression_type=zstd";
        vec![
            Scene::mixed("wide refcounts", "refcount_bits=64", None, true),
            Scene::mixed("overlay", "refcount_bits=16", Some(150 * CLUSTER), true),
            Scene::mixed("version 2", "compat=v2", None, true),
            Scene::mixed("narrow refcounts", "refcount_bits=1", None, false),
            Scene::mixed("version 2 overlay", "compat=v2", Some(SIZE), true),
            Scene::mixed("small overlay", zstd, Some(70 * CLUSTER), false),
            Scene::mixed("device", "refcount_bits=64", None, true).on_device(),
            Scene::mixed("overlay on a device", "refcount_bits=2", Some(SIZE), true).on_device(),
            Scene::mixed("lazy refcounts", "refcount_bits=16,lazy_refcounts=on", None, true),
            Scene::empty("empty", "refcount_bits=16"),
            Scene::mixed("bitmaps", "refcount_bits=64", None, true).with_bitmaps(),
            Scene::mixed("bitmaps on a device", "refcount_bits=16", None, false).with_bitmaps().on_device(),
            Scene::mixed("spilled bitmaps", "refcount_bits=64", None, true).with_bitmaps().spilled(),
            Scene::empty("spilled, on a device", "refcount_bits=16").with_bitmaps().spilled().on_device(),
        ]
    }

    /// Images whose data lies in a file of its own: `all` have theirs in the image.
    pub fn with_data_file() -> Vec<Scene> {
        let device = Scene::external("data file on a device", "refcount_bits=64", None);
        let raw_device = Scene::external("raw data file on a device", "data_file_raw=on", None);
        vec![
            Scene::external("data file", "refcount_bits=64", None),
            Scene::external("data file of an overlay", "refcount_bits=16", Some(150 * CLUSTER)),
            Scene::external("raw data file", "refcount_bits=64,data_file_raw=on", None),
            Scene { data_device_len: Some(SIZE), ..device },
            Scene { data_device_len: Some(SIZE), ..raw_device },
        ]
    }

    /// As in the table above, but for compressed clusters and the snapshot, with a data file. Where no entry
    /// leads it holds old content, unless it is to be read as a raw disk.
    pub fn external(name: &'static str, options: &str, backing_len: Option<u64>) -> Scene {
        let backing = backing_len.map(|len| painted(0, len, BACKING));
        // What comes later counts.
        let mut options = format!("cluster_size=512,{options}");
        let below = Maker::of(backing.as_deref().unwrap_or_default());
        let below_path = below.path();
        if backing.is_some() {
            options += &format!(",backing_fmt=raw,backing_file={}", maker::text(&below_path));
        }
        let maker = Maker::with_data_file(&options, SIZE);
        for (from, clusters) in [(64, 16), (0, 16), (28, 4)] {
            let at = from * CLUSTER;
            maker.write(at, &painted(at, clusters * CLUSTER, IMAGE), false);
        }
        maker.io(&[format!("write -q -z {} {}", 28 * CLUSTER, 4 * CLUSTER)]);
        maker.io(&[format!("write -q -z -u {} {}", 24 * CLUSTER, 4 * CLUSTER)]);
        if !options.contains("data_file_raw") {
            let mut data = maker.data_bytes().unwrap();
            for clusters in [24..28, 32..48, 130..140] {
                let (at, end) = ((clusters.start * CLUSTER) as usize, (clusters.end * CLUSTER) as usize);
                data[at..end].copy_from_slice(&painted(at as u64, (end - at) as u64, STALE));
            }
            std::fs::write(maker.data_path(), data).unwrap();
        }
        assert_eq!(maker.check().0, 0);
        Scene::finish(name, &maker, backing, 0..0)
    }

    /// Images with extended L2 entries: clusters of 16 KiB, so that a subcluster is what a cluster is in the
    /// other scenes.
    pub fn with_subclusters() -> Vec<Scene> {
        let small = Scene::extended("subclusters on a device", "refcount_bits=64", None, true);
        let data_file = Scene::external("subclusters in a data file", EXTENDED, None);
        let data_overlay = Scene::external("subclusters in a data file of an overlay", EXTENDED, Some(SIZE));
        vec![
            Scene::extended("subclusters", "refcount_bits=64", None, true),
            Scene::extended("subclusters of an overlay", "refcount_bits=16", Some(150 * CLUSTER), true),
            Scene::extended("few subclusters below", "refcount_bits=2", Some(70 * CLUSTER), false),
            small.on_device(),
            data_file,
            data_overlay,
        ]
    }

    /// Images whose whole clusters are written compressed. Where clusters have 1 KiB, several writes share one of
    /// the file.
    pub fn compressing() -> Vec<Scene> {
        let larger = "refcount_bits=64,cluster_size=1k";
        let scenes = [
            Scene::mixed("compressing", "refcount_bits=64", None, true),
            Scene::mixed("compressing an overlay", "refcount_bits=16", Some(150 * CLUSTER), true),
            Scene::mixed("compressing by zstd", "refcount_bits=2,compression_type=zstd", None, false),
            Scene::mixed("compressing in version 2", "compat=v2", Some(SIZE), true).on_device(),
            Scene::extended("compressing subclusters", "refcount_bits=16", Some(70 * CLUSTER), false),
            Scene::empty("compressing larger clusters", larger),
            Scene::empty("compressing larger clusters on a device", larger).on_device(),
        ];
        scenes.into_iter().map(|scene| Scene { compress: true, ..scene }).collect()
    }

    /// How it is written.
    pub fn write_options(&self) -> WriteOptions {
        let (compress, bitmap_len_max) = (self.compress.then(Compress::default), self.bitmap_len_max);
        WriteOptions { compress, bitmap_len_max, ..WriteOptions::default() }
    }

    /// The first 32 units are one cluster with data, zeroes and nothing; the next 32 are compressed; of the
    /// third cluster a part is shared with a snapshot.
    pub fn extended(name: &'static str, options: &str, backing_len: Option<u64>, snapshot: bool) -> Scene {
        let backing = backing_len.map(|len| painted(0, len, BACKING));
        let mut options = format!("{EXTENDED},{options}");
        let below = Maker::of(backing.as_deref().unwrap_or_default());
        let below_path = below.path();
        if backing.is_some() {
            options += &format!(",backing_fmt=raw,backing_file={}", maker::text(&below_path));
        }
        let maker = Maker::new(&options, SIZE);
        maker.write(64 * CLUSTER, &painted(64 * CLUSTER, 16 * CLUSTER, IMAGE), false);
        if snapshot {
            maker.snapshot("first");
        }
        maker.write(0, &painted(0, 16 * CLUSTER, IMAGE), false);
        maker.compress(&[(32 * CLUSTER, painted(32 * CLUSTER, 32 * CLUSTER, IMAGE))]);
        maker.write(28 * CLUSTER, &painted(28 * CLUSTER, 4 * CLUSTER, IMAGE), false);
        maker.io(&[format!("write -q -z {} {}", 28 * CLUSTER, 2 * CLUSTER)]);
        maker.io(&[format!("write -q -z -u {} {}", 24 * CLUSTER, 4 * CLUSTER)]);
        assert_eq!(maker.check().0, 0);
        Scene::finish(name, &maker, backing, 0..0)
    }

    /// An image without anything in it.
    pub fn empty(name: &'static str, options: &str) -> Scene {
        Scene::finish(name, &Maker::new(&format!("cluster_size=512,{options}"), SIZE), None, 0..0)
    }

    /// As in the table above.
    pub fn mixed(name: &'static str, options: &str, backing_len: Option<u64>, snapshot: bool) -> Scene {
        let backing = backing_len.map(|len| painted(0, len, BACKING));
        let mut options = format!("cluster_size=512,{options}");
        let raw = Maker::of(backing.as_deref().unwrap_or_default());
        let raw_path = raw.path();
        if backing.is_some() {
            options += &format!(",backing_fmt=raw,backing_file={}", maker::text(&raw_path));
        }
        let maker = Maker::new(&options, SIZE);
        maker.write(64 * CLUSTER, &painted(64 * CLUSTER, 16 * CLUSTER, IMAGE), false);
        if snapshot {
            maker.snapshot("first");
        }
        maker.write(0, &painted(0, 16 * CLUSTER, IMAGE), false);
        let compressed = if options.contains("refcount_bits=1,") || options.ends_with("refcount_bits=1") {
            0..0
        } else {
            let blob = |cluster| (cluster * CLUSTER, painted(cluster * CLUSTER, CLUSTER, IMAGE));
            maker.compress(&(16..24).map(blob).collect::<Vec<_>>());
            16..24
        };
        if !options.contains("compat=v2") {
            maker.write(28 * CLUSTER, &painted(28 * CLUSTER, 4 * CLUSTER, IMAGE), false);
            maker.io(&[format!("write -q -z {} {}", 28 * CLUSTER, 4 * CLUSTER)]);
            maker.io(&[format!("write -q -z -u {} {}", 24 * CLUSTER, 4 * CLUSTER)]);
        }
        assert_eq!(maker.check().0, 0);
        Scene::finish(name, &maker, backing, compressed)
    }

    /// As `mixed` without a snapshot, with so much more data behind it that the next few dozen clusters need
    /// a larger refcount table.
    pub fn near_table_growth() -> Scene {
        // A block of 512 bytes counts 64 clusters, the table of one cluster names 64 blocks.
        let full = 64 * 64;
        let maker = Maker::new("cluster_size=512,refcount_bits=64", 4 << 20);
        maker.write(0, &painted(0, 16 * CLUSTER, IMAGE), false);
        let mut next = SIZE;
        loop {
            let clusters = maker.bytes().len() as u64 / CLUSTER;
            let missing = (full - 16u64).saturating_sub(clusters);
            if missing == 0 {
                break;
            }
            // Tables and refcount blocks come on top.
            let len = (missing * 60 / 64).max(1) * CLUSTER;
            maker.write(next, &painted(next, len, IMAGE), false);
            next += len;
        }
        assert_eq!(maker.check().0, 0);
        Scene::finish("near the growth of the refcount table", &maker, None, 0..0)
    }

    fn finish(
        name: &'static str,
        maker: &Maker,
        backing: Option<Vec<u8>>,
        compressed: std::ops::Range<u64>,
    ) -> Scene {
        let (image, data) = (maker.bytes(), maker.data_bytes());
        let below = backing.as_deref().unwrap_or_default();
        let content =
            reader::read_files(&image, data.as_ref().unwrap_or(&image), Disk::Active, below).unwrap();
        let snapshots = Image::parse(&image).unwrap().snapshots.len();
        let snapshots =
            (0..snapshots).map(|n| reader::read_disk(&image, Disk::Snapshot(n), below).unwrap()).collect();
        Scene {
            name,
            image,
            data,
            backing,
            content,
            snapshots,
            device_len: None,
            data_device_len: None,
            compressed,
            compress: false,
            bitmap_len_max: WriteOptions::default().bitmap_len_max,
        }
    }

    /// The same image with three bitmaps of other granularities: `on`, which is enabled, `off`, which is not,
    /// and `stale`, which is in use. The first two have recorded something.
    pub fn with_bitmaps(mut self) -> Scene {
        let maker = Maker::of(&self.image);
        let path = maker.path();
        let add = |name: &str, granularity: &str| {
            maker::run("qemu-img", &["bitmap", "--add", "-g", granularity, maker::text(&path), name]);
        };
        let write = |at: u64| {
            let same = &self.content[at as usize..(at + CLUSTER) as usize];
            maker.write(at, same, false);
        };
        add("off", "512");
        write(9 * CLUSTER);
        add("on", "1024");
        add("stale", "4096");
        write(3 * CLUSTER);
        write(64 * CLUSTER);
        maker::run("qemu-img", &["bitmap", "--disable", maker::text(&path), "off"]);
        self.image = maker.bytes();
        // As whoever was killed leaves it.
        let parsed = Image::parse(&self.image).unwrap();
        let stale = parsed.bitmaps.iter().find(|bitmap| bitmap.name == "stale").unwrap();
        let flags_end = stale.entry_at as usize + 16;
        self.image[flags_end - 1] |= 1;
        assert_eq!(maker::qemu_check(&self.image).0, 0);
        self
    }

    /// The same, with one more enabled bitmap, `new`, in which nothing is marked. New bits go into the file before
    /// the next write.
    pub fn spilled(mut self) -> Scene {
        let maker = Maker::of(&self.image);
        let path = maker.path();
        maker::run("qemu-img", &["bitmap", "--add", "-g", "512", maker::text(&path), "new"]);
        self.image = maker.bytes();
        Scene { bitmap_len_max: 0, ..self }
    }

    /// The same image on a device that has room for everything to be written once more.
    pub fn on_device(mut self) -> Scene {
        self.device_len = Some((self.image.len() as u64 + 2 * SIZE).next_multiple_of(CLUSTER));
        self
    }

    /// A storage with `image` in it, which is this scene's, or what became of it.
    pub fn storage(&self, image: &[u8]) -> Arc<MemoryStorage> {
        let storage = match self.device_len {
            None => MemoryStorage::new(0).unwrap(),
            Some(len) => MemoryStorage::with(MemoryOptions { len, grows: false, poisoned: true }).unwrap(),
        };
        storage.pwrite(image, HostOffset(0), Durability::Later).unwrap();
        storage
    }

    /// A storage with `data` in it, which is the content of this scene's data file, or what became of it.
    pub fn data_storage(&self, data: &[u8]) -> Arc<MemoryStorage> {
        let options = match self.data_device_len {
            None => MemoryOptions { len: 0, grows: true, poisoned: false },
            Some(len) => MemoryOptions { len, grows: false, poisoned: true },
        };
        let storage = MemoryStorage::with(options).unwrap();
        storage.pwrite(data, HostOffset(0), Durability::Later).unwrap();
        storage
    }

    /// Storages with these files in them.
    pub fn storages(&self, files: &Files) -> Storages {
        Storages {
            image: self.storage(&files.image),
            data: files.data.as_ref().map(|data| self.data_storage(data)),
        }
    }

    /// Bytes that one L2 table maps: all of the disk where there are subclusters.
    pub fn table_span(&self) -> u64 {
        let image = Image::parse(&self.image).unwrap();
        image.l2_entries() * image.cluster_len()
    }

    /// Its files.
    pub fn files(&self) -> Files {
        Files { image: self.image.clone(), data: self.data.clone() }
    }

    /// Opens the image in `storage` for writing, over this scene's backing file.
    pub fn open(&self, storage: Arc<dyn Storage>) -> Result<Arc<Qcow2Driver>> {
        self.open_files(storage, None)
    }

    /// The same, with a data file.
    pub fn open_files(
        &self,
        image: Arc<dyn Storage>,
        data: Option<Arc<dyn Storage>>,
    ) -> Result<Arc<Qcow2Driver>> {
        open_parts(image, data, self.backing_driver(), Some(self.write_options()), 0)
    }

    /// The same with other options.
    pub fn open_with(&self, storage: Arc<dyn Storage>, write: WriteOptions) -> Result<Arc<Qcow2Driver>> {
        open_over(storage, self.backing_driver(), Some(write), 0)
    }

    /// A driver of the backing file.
    pub fn backing_driver(&self) -> Option<Arc<dyn BlockDriver>> {
        Some(RawDriver::open(self.backing_storage()?, RawOptions::default()).unwrap())
    }

    /// The backing file.
    pub fn backing_storage(&self) -> Option<Arc<MemoryStorage>> {
        Some(MemoryStorage::copy_of(self.backing.as_ref()?).unwrap())
    }

    /// Whether the bitmaps of `image`, in which the guest sees `content`, can be relied on: what they do not
    /// say is not dirty is as it was at first.
    pub fn check_bitmaps(&self, image: &dyn Bytes, content: &[u8]) -> std::result::Result<(), String> {
        let (before, now) = (Image::parse(&self.image)?, Image::parse(image)?);
        let named = |image: &Image<'_>| -> Vec<String> {
            image.bitmaps.iter().map(|bitmap| bitmap.name.clone()).collect()
        };
        if named(&before) != named(&now) {
            return Err(format!("the bitmaps are {:?}", named(&now)));
        }
        for (old, bitmap) in before.bitmaps.iter().zip(&now.bitmaps) {
            let (was, is) = (before.dirty_granules(old), now.dirty_granules(bitmap));
            let enabled = old.flags == 2;
            if !enabled && (was, old.flags) != (is.clone(), bitmap.flags) {
                return Err(format!("the bitmap {} has changed", old.name));
            }
            if !enabled || bitmap.flags == 3 {
                continue;
            }
            let len = 1 << bitmap.granularity_bits;
            let pairs = self.content.chunks(len).zip(content.chunks(len));
            let missed = pairs
                .zip(before.dirty_granules(old).iter().zip(&is))
                .position(|((old, now), (was, is))| (old != now || *was) && !is);
            if let Some(granule) = missed {
                let flags = bitmap.flags;
                return Err(format!("the bitmap {} ({flags}) does not tell of granule {granule}", old.name));
            }
        }
        Ok(())
    }

    /// What the guest sees in `image`, and in its snapshots: these must be as they were.
    pub fn read(&self, image: &dyn Bytes) -> std::result::Result<Vec<u8>, String> {
        self.read_files(image, image)
    }

    /// The same of an image whose data lies in `data`.
    pub fn read_files(&self, image: &dyn Bytes, data: &dyn Bytes) -> std::result::Result<Vec<u8>, String> {
        let below = self.backing.as_deref().unwrap_or_default();
        for (number, content) in self.snapshots.iter().enumerate() {
            if reader::read_disk(image, Disk::Snapshot(number), below)? != *content {
                return Err(format!("snapshot {number} has changed"));
            }
        }
        reader::read_files(image, data, Disk::Active, below)
    }

    /// What whoever reads a raw data file without the image sees, if it is one.
    pub fn read_raw(
        &self,
        image: &dyn Bytes,
        data: &dyn Bytes,
    ) -> std::result::Result<Option<Vec<u8>>, String> {
        if !Image::parse(image)?.has_raw_data_file() {
            return Ok(None);
        }
        if data.length() < SIZE {
            return Err(format!("the raw data file has {} bytes", data.length()));
        }
        let mut content = vec![0; SIZE as usize];
        data.fill(&mut content, 0);
        Ok(Some(content))
    }
}

/// The bytes of an image's files.
#[derive(Clone)]
pub struct Files {
    pub image: Vec<u8>,
    pub data: Option<Vec<u8>>,
}

/// The files of an image.
pub struct Storages {
    pub image: Arc<MemoryStorage>,
    pub data: Option<Arc<MemoryStorage>>,
}

/// Opens the image in `storage` over a backing driver; `write: None` is read-only.
pub fn open_over(
    storage: Arc<dyn Storage>,
    backing: Option<Arc<dyn BlockDriver>>,
    write: Option<WriteOptions>,
    table_cache_len: u64,
) -> Result<Arc<Qcow2Driver>> {
    open_parts(storage, None, backing, write, table_cache_len)
}

/// The same, with a data file.
pub fn open_parts(
    storage: Arc<dyn Storage>,
    data_file: Option<Arc<dyn Storage>>,
    backing: Option<Arc<dyn BlockDriver>>,
    write: Option<WriteOptions>,
    table_cache_len: u64,
) -> Result<Arc<Qcow2Driver>> {
    let header = Header::load(&storage)?;
    let caches = Caches::new(table_cache_len, 1 << 20, [&header])?;
    Qcow2Driver::open(Parts {
        image: storage,
        header,
        data_file,
        backing,
        number: ImageNumber(0),
        caches,
        snapshot: None,
        write,
    })
}
