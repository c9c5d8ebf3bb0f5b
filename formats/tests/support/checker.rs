//! Our own `qemu-img check`: counts the references to every cluster of a qcow2 image and compares.
//!
//! What QEMU calls a corruption is one here; `overlaps` and `shared` are wrong too, but QEMU does not look for them
//! as long as the refcounts agree. Proven against `qemu-img check` in `qcow2_checker.rs`.

use std::fmt;

use nbd_img_formats::Storage;

use super::image::{
    Bytes, COPIED, Entry, Image, L1_RESERVED, L2_RESERVED, OFFSET_MASK, TABLE_RESERVED, ZERO,
};

/// What a check has found. Offsets are those of clusters in the file.
#[derive(Default, Debug)]
pub struct Report {
    /// What makes the image wrong: one text each.
    pub corruptions: Vec<String>,
    /// Clusters that are used for two things of which one is metadata.
    pub overlaps: Vec<String>,
    /// Clusters that hold data twice in the active disk, or blobs and other data. Counted right they do no harm,
    /// but nobody makes them on purpose.
    pub shared: Vec<String>,
    /// Clusters inside the file that are counted and not used.
    pub leaks: Vec<u64>,
    /// Clusters behind the end of the file that are counted and not used. QEMU does not look there.
    pub leaks_behind_end: Vec<u64>,
    /// Whether the image says that it was not closed.
    pub dirty: bool,
    /// Whether the image says that it is corrupt.
    pub corrupt: bool,
}

impl Report {
    /// Whether nothing is wrong, leaks apart.
    pub fn is_sound(&self) -> bool {
        let doubly = !self.overlaps.is_empty() || !self.shared.is_empty();
        self.corruptions.is_empty() && !doubly && !self.dirty && !self.corrupt
    }

    /// Whether nothing is wrong and nothing is lost.
    pub fn is_clean(&self) -> bool {
        self.is_sound() && self.has_no_leaks()
    }

    /// Whether nothing is lost.
    pub fn has_no_leaks(&self) -> bool {
        self.leaks.is_empty() && self.leaks_behind_end.is_empty()
    }

    /// What `qemu-img check` exits with.
    pub fn exit_code(&self) -> i32 {
        match (self.corruptions.is_empty(), self.leaks.is_empty()) {
            (false, _) => 2,
            (true, false) => 3,
            (true, true) => 0,
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for text in self.corruptions.iter().chain(&self.overlaps).chain(&self.shared).take(20) {
            writeln!(f, "  {text}")?;
        }
        let (corruptions, overlaps) = (self.corruptions.len(), self.overlaps.len());
        write!(f, "  {corruptions} corruptions, {overlaps} overlaps, {} shared", self.shared.len())?;
        write!(f, ", leaks {:x?}", self.leaks)?;
        write!(f, ", behind the end {:x?}, dirty {}", self.leaks_behind_end, self.dirty)?;
        write!(f, ", corrupt {}", self.corrupt)
    }
}

/// Checks an image; an error where it cannot be opened at all.
pub fn check(bytes: &dyn Bytes) -> Result<Report, String> {
    let image = Image::parse(bytes)?;
    let mut report = Report { dirty: image.is_dirty(), corrupt: image.is_corrupt(), ..Report::default() };
    let mut walk = Walk::new(&image, &mut report);
    walk.all();
    let uses = walk.uses;
    compare(&image, &uses, &mut report);
    check_copied(&image, &mut report);
    Ok(report)
}

/// Checks the image in a storage.
pub fn check_storage(storage: &dyn Storage) -> Result<Report, String> {
    check(&storage)
}

/// What a cluster is used for, by how many.
#[derive(Clone, Copy, Default)]
struct Use {
    metadata: u64,
    /// L2 tables, which snapshots share among each other and with the active disk.
    l2: u64,
    /// Data of the active disk: once at most.
    active: u64,
    /// Data of snapshots.
    data: u64,
    /// Compressed clusters, which share what they lie in among each other only.
    blobs: u64,
}

impl Use {
    fn count(&self) -> u64 {
        self.metadata + self.l2 + self.active + self.data + self.blobs
    }

    /// Whether two of the uses exclude each other.
    fn overlaps(&self) -> bool {
        let kinds = [self.metadata, self.l2, self.active.max(self.data), self.blobs];
        let kinds = kinds.iter().filter(|count| **count > 0).count();
        kinds > 1 || self.metadata > 1 || self.active > 1
    }
}

/// What there is to say of an entry of an L2 table. Not a text yet: of most entries nothing is said.
struct Said<'a> {
    name: &'a str,
    index: usize,
    at: u64,
    entry: u64,
    what: &'static str,
}

impl fmt::Display for Said<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Said { name, index, at, entry, what } = self;
        write!(f, "{name}: entry {index} of the L2 table at {at:#x}, {entry:#x}: {what}")
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Metadata,
    L2,
    ActiveData,
    Data,
    Blob,
}

struct Walk<'a, 'b> {
    image: &'a Image<'a>,
    report: &'b mut Report,
    /// As far as anything is used: a file may have megabytes behind that.
    uses: Vec<Use>,
}

impl<'a, 'b> Walk<'a, 'b> {
    fn new(image: &'a Image<'a>, report: &'b mut Report) -> Self {
        Walk { image, report, uses: Vec::new() }
    }

    fn all(&mut self) {
        let image = self.image;
        self.refer(&"header", 0, image.cluster_len(), Kind::Metadata);
        self.disk("active", image.l1_at, image.l1_entries, Kind::ActiveData);
        for snapshot in &image.snapshots {
            let name = format!("snapshot {}", snapshot.name);
            if !snapshot.l1_at.is_multiple_of(image.cluster_len()) || snapshot.l1_entries > (32 << 20) / 8 {
                self.report.corruptions.push(format!("{name}: its L1 table is misplaced or too long"));
                continue;
            }
            self.disk(&name, snapshot.l1_at, snapshot.l1_entries, Kind::Data);
        }
        self.refer(&"snapshot table", image.snapshots_at, image.snapshots_len, Kind::Metadata);
        self.refer(
            &"refcount table",
            image.table_at,
            image.table_clusters * image.cluster_len(),
            Kind::Metadata,
        );
        self.bitmaps();
        self.refcount_blocks();
    }

    fn disk(&mut self, name: &str, at: u64, entries: u64, data: Kind) {
        self.refer(&name, at, entries * 8, Kind::Metadata);
        for (index, entry) in self.image.bytes.table(at, entries).into_iter().enumerate() {
            if entry == 0 {
                continue;
            }
            let l2_at = entry & OFFSET_MASK;
            if entry & L1_RESERVED != 0 || !l2_at.is_multiple_of(self.image.cluster_len()) {
                self.report.corruptions.push(format!("{name}: L1 entry {index} is {entry:#x}"));
            }
            if l2_at.is_multiple_of(self.image.cluster_len()) {
                self.refer(
                    &format_args!("{name}: L2 table {index}"),
                    l2_at,
                    self.image.cluster_len(),
                    Kind::L2,
                );
                self.l2_table(name, l2_at, data);
            }
        }
    }

    /// Subclusters are data or zeroes or neither, and data only where there is a cluster.
    fn subclusters(&mut self, name: &str, at: u64) {
        let entries = self.image.l2_table(at).into_iter().zip(self.image.l2_bitmaps(at));
        for (index, (entry, bitmap)) in entries.enumerate() {
            let (data, zero) = (bitmap as u32, (bitmap >> 32) as u32);
            let bad = match self.image.decode(entry) {
                Entry::Compressed { .. } => bitmap != 0,
                Entry::Data { .. } => data & zero != 0 || entry & ZERO != 0,
                Entry::Unallocated | Entry::Zero { .. } => data != 0 || entry & ZERO != 0,
            };
            if bad {
                let what =
                    format!("{name}: entry {index} of {at:#x}, {entry:#x}, has subclusters {bitmap:#x}");
                self.report.corruptions.push(what);
            }
        }
    }

    fn l2_table(&mut self, name: &str, at: u64, kind: Kind) {
        if self.image.has_subclusters() {
            self.subclusters(name, at);
        }
        for (index, entry) in self.image.l2_table(at).into_iter().enumerate() {
            if entry == 0 {
                continue;
            }
            let said = |what: &'static str| Said { name, index, at, entry, what };
            let decoded = self.image.decode(entry);
            if self.image.version < 3 && matches!(decoded, Entry::Zero { .. }) {
                self.report.overlaps.push(said("a zero flag in a version 2 image").to_string());
            }
            match decoded {
                Entry::Unallocated if entry & L2_RESERVED == 0 => {}
                Entry::Compressed { host, len } => {
                    if entry & COPIED != 0 || self.image.has_data_file() {
                        self.report.corruptions.push(said("compressed and more").to_string());
                    }
                    self.refer(&said("blob"), host, len, Kind::Blob);
                }
                Entry::Data { host } | Entry::Zero { host: Some(host) }
                    if !host.is_multiple_of(self.image.cluster_len()) =>
                {
                    self.report.corruptions.push(said("misaligned").to_string());
                }
                _ if entry & L2_RESERVED != 0 => {
                    self.report.corruptions.push(said("reserved bits").to_string())
                }
                Entry::Data { host } | Entry::Zero { host: Some(host) } => {
                    if !self.image.has_data_file() {
                        self.refer(&said("data"), host, self.image.cluster_len(), kind);
                    }
                }
                Entry::Unallocated | Entry::Zero { host: None } => {}
            }
        }
    }

    fn bitmaps(&mut self) {
        let image = self.image;
        let Some((at, len)) = image.bitmap_directory else { return };
        self.refer(&"bitmap directory", at, len, Kind::Metadata);
        for bitmap in &image.bitmaps {
            self.refer(&"bitmap table", bitmap.table_at, bitmap.table_entries * 8, Kind::Metadata);
            for entry in image.bytes.table(bitmap.table_at, bitmap.table_entries) {
                if entry & OFFSET_MASK != 0 {
                    self.refer(&"bitmap", entry & OFFSET_MASK, image.cluster_len(), Kind::Metadata);
                }
            }
        }
    }

    fn refcount_blocks(&mut self) {
        let image = self.image;
        for (index, &entry) in image.refcount_table.iter().enumerate() {
            let block = entry & !TABLE_RESERVED;
            if entry & TABLE_RESERVED != 0 || !block.is_multiple_of(image.cluster_len()) {
                self.report.corruptions.push(format!("refcount table entry {index} is {entry:#x}"));
            } else if block != 0 {
                let what = format!("refcount block {index}");
                self.refer(&what, block, image.cluster_len(), Kind::Metadata);
                // Of these alone QEMU says that they must not be anything else, whatever the refcounts say.
                let used = self.uses.get((block / image.cluster_len()) as usize).map_or(0, Use::count);
                if used > 1 {
                    self.report.corruptions.push(format!("{what} at {block:#x} is used {used} times"));
                }
            }
        }
    }

    /// Counts a reference to each cluster that the range touches.
    fn refer(&mut self, what: &dyn fmt::Display, at: u64, len: u64, kind: Kind) {
        if len == 0 {
            return;
        }
        let cluster_len = self.image.cluster_len();
        let end = at.saturating_add(len);
        // The last cluster of a file may be cut off, but it has to begin in it.
        if end.saturating_sub(self.image.bytes.length()) >= cluster_len {
            self.report.corruptions.push(format!("{what}: {at:#x} and {len} bytes are outside of the file"));
            return;
        }
        for cluster in at / cluster_len..end.div_ceil(cluster_len) {
            if cluster as usize >= self.uses.len() {
                self.uses.resize(cluster as usize + 1, Use::default());
            }
            let used = &mut self.uses[cluster as usize];
            *match kind {
                Kind::Metadata => &mut used.metadata,
                Kind::L2 => &mut used.l2,
                Kind::ActiveData => &mut used.active,
                Kind::Data => &mut used.data,
                Kind::Blob => &mut used.blobs,
            } += 1;
            let list = match (used.overlaps(), used.metadata + used.l2) {
                (false, _) => continue,
                (true, 0) => &mut self.report.shared,
                (true, _) => &mut self.report.overlaps,
            };
            list.push(format!(
                "{what}: the cluster at {:#x} is used for something else",
                cluster * cluster_len
            ));
        }
    }
}

fn compare(image: &Image<'_>, uses: &[Use], report: &mut Report) {
    let per_block = image.cluster_len() * 8 / image.refcount_bits;
    let covered =
        image.refcount_table.iter().rposition(|entry| *entry != 0).map_or(0, |last| last as u64 + 1)
            * per_block;
    let mut block = Vec::new();
    for cluster in 0..covered.max(uses.len() as u64) {
        // A block at a time: there are many refcounts in a large one.
        if cluster % per_block == 0 {
            block = image.refcounts_of_block((cluster / per_block) as usize);
        }
        let counted = block.get((cluster % per_block) as usize).copied().unwrap_or(0);
        let used = uses.get(cluster as usize).map_or(0, Use::count);
        let at = cluster * image.cluster_len();
        if counted < used {
            report
                .corruptions
                .push(format!("the cluster at {at:#x} is used {used} times, counted {counted}"));
        } else if counted > used {
            let inside = cluster < image.file_clusters();
            if inside { report.leaks.push(at) } else { report.leaks_behind_end.push(at) }
        }
    }
}

/// The active disk's copied flags say whether the refcount is one.
fn check_copied(image: &Image<'_>, report: &mut Report) {
    for (index, entry) in image.bytes.table(image.l1_at, image.l1_entries).into_iter().enumerate() {
        let l2_at = entry & OFFSET_MASK;
        if l2_at == 0 || !l2_at.is_multiple_of(image.cluster_len()) {
            continue;
        }
        let mut check = |what: &str, index: usize, entry: u64, host: u64| {
            let refcount = image.refcount(host / image.cluster_len());
            if (refcount == 1) != (entry & COPIED != 0) {
                report
                    .corruptions
                    .push(format!("{what} entry {index} is {entry:#x} with refcount {refcount}"));
            }
        };
        check("L1", index, entry, l2_at);
        for (index, entry) in image.l2_table(l2_at).into_iter().enumerate().filter(|(_, entry)| *entry != 0) {
            match image.decode(entry) {
                Entry::Data { host } | Entry::Zero { host: Some(host) } if !image.has_data_file() => {
                    check("L2", index, entry, host);
                }
                Entry::Data { .. } | Entry::Zero { .. } | Entry::Unallocated | Entry::Compressed { .. } => {}
            }
        }
    }
}
