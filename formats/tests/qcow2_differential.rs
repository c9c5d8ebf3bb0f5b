//! The same operations on the qcow2 driver and on QEMU: the same data, the same block status, and each one
//! opens the other's image and goes on with it. Two more readers look at what the driver wrote.
//!
//! QEMU is one storage daemon for all scripts, which is given each image and driven over NBD; the driver
//! runs in the test. `NBD_IMG_SCRIPTS` says how many scripts, `NBD_IMG_MODEL_SEED` which: a seed that is
//! larger by as many goes on where another run has ended.

#![allow(clippy::unwrap_used)] // Helpers of tests are not told apart from a program's code.

#[path = "differential_support/bitmaps.rs"]
mod bitmaps;
#[path = "differential_support/daemon.rs"]
mod daemon;
#[path = "differential_support/readers.rs"]
mod readers;
mod support;

/// The root package's client of NBD and its way of driving QEMU.
#[allow(dead_code)]
#[path = "../../tests/support"]
mod peer {
    pub mod client;
    pub mod qmp;
    pub mod tools;
    pub mod wire;
}

use std::fmt::Debug;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Instant;

use daemon::Daemon;
use nbd_img_formats::driver::Status;
use nbd_img_formats::open::{OpenOptions, open};
use nbd_img_formats::plan::MapMode;
use nbd_img_formats::sync::Arc;
use nbd_img_formats::{BlockDriver, Durability, Format, GuestRange, Place, Provision, ReadPlan};
use nbd_img_formats::{StatusQuery, ZeroRequest};
use support::maker::{self, text};
use support::random::Random;
use support::{checker, session, steps};

/// A kind of image.
struct Kind {
    options: &'static str,
    cluster: u64,
    backing: bool,
    /// It has dirty bitmaps.
    bitmaps: bool,
    /// How many of a hundred scripts it gets: large clusters move many bytes.
    share: u64,
}

const fn kind(options: &'static str, cluster: u64, backing: bool, share: u64) -> Kind {
    Kind { options, cluster, backing, bitmaps: false, share }
}

const KINDS: [Kind; 24] = [
    kind("cluster_size=512", 512, false, 9),
    kind("cluster_size=512,refcount_bits=64", 512, true, 10),
    kind("cluster_size=512,refcount_bits=2", 512, true, 7),
    kind("cluster_size=512,refcount_bits=1", 512, false, 5),
    kind("cluster_size=512,compat=v2", 512, true, 8),
    kind("cluster_size=1k,refcount_bits=4", 1024, false, 5),
    kind("cluster_size=1k,refcount_bits=32", 1024, true, 5),
    kind("cluster_size=2k,refcount_bits=8,compression_type=zstd", 2048, true, 5),
    kind("cluster_size=4k,refcount_bits=1", 4096, true, 7),
    kind("cluster_size=4k,compression_type=zstd", 4096, true, 7),
    kind("cluster_size=4k,compat=v2", 4096, false, 7),
    kind("cluster_size=512,data_file=DATA", 512, true, 3),
    kind("cluster_size=4k,data_file=DATA", 4096, false, 2),
    kind("cluster_size=512,data_file=DATA,data_file_raw=on", 512, false, 2),
    kind("cluster_size=64k,data_file=DATA,data_file_raw=on", 65536, false, 1),
    kind("cluster_size=16k,extended_l2=on", 16384, false, 2),
    kind("cluster_size=16k,extended_l2=on,refcount_bits=1", 16384, true, 3),
    kind("cluster_size=64k,extended_l2=on,refcount_bits=1", 65536, false, 1),
    kind("cluster_size=16k,extended_l2=on,data_file=DATA", 16384, true, 1),
    kind("cluster_size=8k,lazy_refcounts=on", 8192, true, 3),
    kind("cluster_size=16k", 16384, true, 3),
    kind("cluster_size=64k,lazy_refcounts=on", 65536, true, 2),
    kind("cluster_size=64k", 65536, false, 1),
    kind("cluster_size=2M", 2 << 20, true, 1),
];

/// Scripts after which a new image to begin with is made.
const SCRIPTS_PER_START: u64 = 200;

/// One script in so many is also looked at by `qemu-img check`.
const CHECK_ONE_IN: u64 = 40;

fn scripts() -> u64 {
    std::env::var("NBD_IMG_SCRIPTS").map_or(3000, |text| text.parse().unwrap())
}

impl Kind {
    fn of_script(number: u64) -> &'static Kind {
        let mut left = number % KINDS.iter().map(|kind| kind.share).sum::<u64>();
        KINDS
            .iter()
            .find(|kind| {
                let found = left < kind.share;
                left = left.saturating_sub(kind.share);
                found
            })
            .unwrap()
    }

    fn is_version_2(&self) -> bool {
        self.options.contains("compat=v2")
    }

    /// Whether QEMU and the driver may make zeroes in different ways. Version 2 has no flag for them: QEMU
    /// writes them, the driver gives the cluster back. In a raw data file both write them, and QEMU sets the
    /// flag, too. With subclusters, QEMU writes all zeroes of a request that touches a compressed cluster, and
    /// when it copies a shared cluster it copies what is zero between its data.
    fn zeroes_may_differ(&self) -> bool {
        let subclusters = self.options.contains("extended_l2=on");
        self.is_version_2() || self.has_raw_data_file() || (subclusters && self.has_history())
    }

    /// Whether images of the kind begin with a snapshot and with compressed clusters.
    fn has_history(&self) -> bool {
        !self.options.contains("refcount_bits=1") && !self.has_data_file()
    }

    fn has_data_file(&self) -> bool {
        self.options.contains("data_file=")
    }

    fn has_raw_data_file(&self) -> bool {
        self.options.contains("data_file_raw=on")
    }

    fn size(&self) -> u64 {
        (self.cluster * 60).clamp(64 << 10, 8 << 20) + 512
    }
}

#[derive(Clone, Copy, Debug)]
enum Operation {
    Write { byte: u8, at: u64, len: u64, fua: bool },
    Zero { at: u64, len: u64, unmap: bool },
    Discard { at: u64, len: u64 },
    Flush,
}

impl Operation {
    fn random(kind: &Kind, random: &mut Random) -> Operation {
        let unit = random.pick(&[512, 512, kind.cluster]);
        let size = kind.size();
        let at = random.below(size / unit) * unit;
        let len = ((1 + random.below(kind.cluster * 3 / unit)) * unit).min(size - at);
        match random.below(10) {
            0 => Operation::Zero { at, len, unmap: false },
            1 | 2 => Operation::Zero { at, len, unmap: true },
            // QEMU lets the backing file shine through there; the driver does not.
            3 | 4 if !(kind.is_version_2() && kind.backing) => Operation::Discard { at, len },
            5 => Operation::Flush,
            _ => {
                let fua = random.below(20) == 0;
                Operation::Write { byte: 1 + random.below(255) as u8, at, len, fua }
            }
        }
    }

    fn carry_out(self, driver: &dyn BlockDriver) {
        let range = |at, len| GuestRange::new(at, len).unwrap();
        match self {
            Operation::Write { byte, at, len, fua } => {
                let durability = if fua { Durability::Fua } else { Durability::Later };
                let bytes = vec![byte; len as usize];
                // In the two ways in which a session or a worker writes.
                if byte.is_multiple_of(2) {
                    session::write(driver, at, &bytes, durability).unwrap();
                } else {
                    driver.pwrite(at, &bytes, durability).unwrap();
                }
            }
            Operation::Zero { at, len, unmap } => {
                let provision = if unmap { Provision::Unmap } else { Provision::Keep };
                let request = ZeroRequest { provision, fast: false, durability: Durability::Later };
                driver.write_zeroes(range(at, len), request).unwrap();
            }
            Operation::Discard { at, len } => driver.discard(range(at, len), Durability::Later).unwrap(),
            Operation::Flush => driver.flush().unwrap(),
        }
    }
}

/// An image to begin with, and two copies of it in a folder: one for QEMU, one for the driver.
struct Pair {
    folder: tempfile::TempDir,
    kind: &'static Kind,
    /// How large the disk of the backing file is.
    base_len: Option<u64>,
}

impl Pair {
    fn new(kind: &'static Kind, random: &mut Random) -> Pair {
        let mut pair = Pair { folder: tempfile::tempdir_in("/dev/shm").unwrap(), kind, base_len: None };
        let size = kind.size();
        let mut options = kind.options.replace("DATA", text(&pair.data(START)));
        if kind.backing {
            let base = pair.base();
            let base_len = (size / 2 + random.below(size)).next_multiple_of(512).max(100 << 10);
            pair.base_len = Some(base_len);
            let (path, disk_len) = (text(&base), base_len.to_string());
            let small = "cluster_size=4k";
            maker::run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", small, path, &disk_len]);
            maker::run("qemu-io", &["-f", "qcow2", "-c", &format!("write -q -P 77 8k {}", size / 3), path]);
            options += ",backing_fmt=qcow2,backing_file=base.qcow2";
        }
        let start = pair.start();
        let path = text(&start);
        maker::run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", &options, path, &size.to_string()]);
        if kind.has_data_file() {
            // Neither snapshots nor compressed clusters.
            let commands = [format!("write -q -P 9 0 {}", size / 3), format!("write -q -z 8k {}", size / 6)];
            maker::run("qemu-io", &["-f", "qcow2", "-c", &commands[0], "-c", &commands[1], path]);
        } else if kind.has_history() {
            maker::run("qemu-io", &["-f", "qcow2", "-c", &format!("write -q -P 9 0 {}", size / 6), path]);
            if !["refcount_bits=2", "refcount_bits=4"].iter().any(|narrow| options.contains(narrow)) {
                // Many blobs lie in one cluster.
                let at = size / kind.cluster / 2 * kind.cluster;
                let len = (size / 8).next_multiple_of(kind.cluster);
                maker::run("qemu-io", &["-f", "qcow2", "-c", &format!("write -q -c -P 5 {at} {len}"), path]);
            }
            maker::run("qemu-img", &["snapshot", "-c", "snap", path]);
        }
        if kind.bitmaps {
            bitmaps::add(path);
        }
        pair
    }

    fn base(&self) -> PathBuf {
        self.folder.path().join("base.qcow2")
    }

    fn start(&self) -> PathBuf {
        self.folder.path().join("start.qcow2")
    }

    fn theirs(&self) -> PathBuf {
        self.folder.path().join("theirs.qcow2")
    }

    fn ours(&self) -> PathBuf {
        self.folder.path().join("ours.qcow2")
    }

    /// The data file of one of the images.
    fn data(&self, of: &str) -> PathBuf {
        self.folder.path().join(format!("data.{of}"))
    }

    /// Both copies are as in the beginning.
    fn reset(&self) {
        for (copy, name) in [(self.theirs(), THEIRS), (self.ours(), OURS)] {
            std::fs::copy(self.start(), &copy).unwrap();
            if self.kind.has_data_file() {
                std::fs::copy(self.data(START), self.data(name)).unwrap();
                rename_in(&copy, text(&self.data(START)), text(&self.data(name)));
            }
        }
    }

    /// Nothing is wrong with either file, and nothing lost.
    fn check(&self, with_qemu: bool, said: &dyn Debug) {
        for path in [self.ours(), self.theirs()] {
            let path = &path;
            let report = checker::check(&std::fs::read(path).unwrap()).unwrap();
            assert!(report.is_clean(), "{said:?}: {}: {report}", path.display());
            if with_qemu {
                let (code, qemu) = maker::check_file(path);
                assert_eq!(code, 0, "{said:?}: {}: {qemu}", path.display());
            }
        }
    }

    /// What was seen in one image is what was seen in the other.
    fn compare(&self, one: &Seen, other: &Seen, said: &dyn Debug) {
        if self.kind.bitmaps {
            bitmaps::assert_same(&self.theirs(), &self.ours(), said);
        }
        assert!(one.content == other.content, "{said:?}: another content");
        if !self.kind.zeroes_may_differ() {
            assert_eq!(one.zeroes, other.zeroes, "{said:?}: what is zero by the metadata");
        }
    }
}

/// Which image a data file is of; all as long, so that one name can take another one's place in a header.
const START: &str = "start";
const THEIRS: &str = "qemu-";
const OURS: &str = "ours-";

/// Puts another name of the same length in the place of the one in an image's first cluster.
fn rename_in(image: &Path, from: &str, to: &str) {
    assert_eq!(from.len(), to.len());
    let mut bytes = std::fs::read(image).unwrap();
    let at = bytes.windows(from.len()).position(|window| window == from.as_bytes()).unwrap();
    bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
    std::fs::write(image, bytes).unwrap();
}

/// A disk as QEMU or the driver sees it.
#[derive(PartialEq)]
struct Seen {
    content: Vec<u8>,
    /// The ranges that are zero by the image's metadata.
    zeroes: Vec<(u64, u64)>,
}

impl Seen {
    fn by_driver(driver: &dyn BlockDriver) -> Seen {
        let content = steps::read_all(driver).unwrap();
        let zeroes = zeroes_by_driver(driver, content.len() as u64);
        check_status(driver, &content, &zeroes);
        Seen { content, zeroes }
    }

    fn assert_is(&self, other: &Seen, said: &dyn Debug) {
        assert!(self.content == other.content, "{said:?}: another content of the same image");
        assert_eq!(self.zeroes, other.zeroes, "{said:?}: what is zero in the same image");
    }
}

/// Does the operations by the driver: what it sees before and after them.
fn carry_out(operations: &[Operation], image: &Path) -> [Seen; 2] {
    let driver = open_for(image, true);
    let before = Seen::by_driver(&*driver);
    for operation in operations {
        operation.carry_out(&*driver);
    }
    let after = Seen::by_driver(&*driver);
    driver.close().unwrap();
    [before, after]
}

fn open_for(path: &Path, writable: bool) -> Arc<dyn BlockDriver> {
    // Marks go into the file before the next write: they are told from there, and stored in both ways.
    let bitmap_len_max = 0;
    let options =
        OpenOptions { format: Some(Format::Qcow2), writable, bitmap_len_max, ..OpenOptions::default() };
    open(path, &options).unwrap().driver
}

/// The ranges that read as zeroes according to the metadata, with neighbours joined.
fn joined(runs: impl IntoIterator<Item = (u64, u64, bool)>) -> Vec<(u64, u64)> {
    let mut zeroes: Vec<(u64, u64)> = Vec::new();
    for (at, len, _) in runs.into_iter().filter(|run| run.2) {
        match zeroes.last_mut() {
            Some(last) if last.1 == at => last.1 = at + len,
            _ => zeroes.push((at, at + len)),
        }
    }
    zeroes
}

/// By the metadata alone, as plans for reading have it.
fn zeroes_by_driver(driver: &dyn BlockDriver, size: u64) -> Vec<(u64, u64)> {
    let (mut plan, mut at) = (ReadPlan::default(), 0);
    driver.map_read(GuestRange::new(0, size).unwrap(), MapMode::Wait, &mut plan).unwrap();
    joined(plan.pieces.iter().map(|piece| {
        at += piece.len;
        (at - piece.len, piece.len, matches!(piece.place, Place::Zero { .. }))
    }))
}

/// The block status: at least what the metadata says is zero, and nothing that is not.
fn check_status(driver: &dyn BlockDriver, content: &[u8], zeroes: &[(u64, u64)]) {
    let (mut runs, mut at) = (Vec::new(), 0);
    let range = GuestRange::new(0, content.len() as u64).unwrap();
    driver
        .status(StatusQuery::Allocation, range, &mut |len, status| {
            let Status::Allocation { zero, .. } = status else { panic!("{status:?}") };
            runs.push((at, len, zero));
            at += len;
            ControlFlow::Continue(())
        })
        .unwrap();
    let said = joined(runs);
    for (from, to) in &said {
        assert!(content[*from as usize..*to as usize].iter().all(|byte| *byte == 0), "{from}..{to} is zero?");
    }
    for (from, to) in zeroes {
        let covered = said.iter().any(|(start, end)| start <= from && to <= end);
        assert!(covered, "{from}..{to} is not said to be zero: {said:?}");
    }
}

/// Runs the script with this number; `pairs` keeps the images that scripts begin with.
fn run(daemon: &mut Daemon, pairs: &mut [Option<Pair>], seed: u64, number: u64) {
    let mut random = Random::new(seed.wrapping_add(number));
    let kind = Kind::of_script(number);
    let index = KINDS.iter().position(|other| std::ptr::eq(other, kind)).unwrap();
    if number % (SCRIPTS_PER_START * 100 / kind.share) < 100 {
        pairs[index] = None;
    }
    let pair = pairs[index].get_or_insert_with(|| Pair::new(kind, &mut random));
    run_on(daemon, pair, &mut random, number);
}

/// The script on this pair.
fn run_on(daemon: &mut Daemon, pair: &Pair, random: &mut Random, number: u64) {
    let kind = pair.kind;
    pair.reset();
    let with_check = random.below(CHECK_ONE_IN) == 0;
    let script = |random: &mut Random| -> Vec<Operation> {
        let count = 1 + random.below(30);
        (0..count).map(|_| Operation::random(kind, random)).collect()
    };
    let (first, second) = (script(random), script(random));
    let said = (kind.options, number, &first);
    let [_, theirs] = daemon.carry_out(&first, &pair.theirs());
    let [_, ours] = carry_out(&first, &pair.ours());
    pair.compare(&theirs, &ours, &said);
    pair.check(with_check, &said);
    readers::assert_read(pair, &pair.ours(), &ours.content, &said);
    // Each finds what the other one has left, and goes on with it.
    let said = (kind.options, number, &first, &second);
    let [found, by_qemu] = daemon.carry_out(&second, &pair.ours());
    found.assert_is(&ours, &said);
    let [found, by_driver] = carry_out(&second, &pair.theirs());
    found.assert_is(&theirs, &said);
    pair.compare(&by_qemu, &by_driver, &said);
    pair.check(with_check, &said);
    readers::assert_read(pair, &pair.theirs(), &by_driver.content, &said);
    if kind.has_raw_data_file() {
        let data = std::fs::read(pair.data(THEIRS)).unwrap();
        assert!(data.starts_with(&by_driver.content), "{said:?}: the raw data file");
    }
    daemon.read(&pair.theirs()).assert_is(&by_driver, &said);
    Seen::by_driver(&*open_for(&pair.ours(), false)).assert_is(&by_qemu, &said);
}

#[test]
fn scripts_do_the_same() {
    let seed = Random::seed("differential");
    let begin = Instant::now();
    let mut daemon = Daemon::start();
    let mut pairs = KINDS.each_ref().map(|_| None);
    for number in 0..scripts() {
        run(&mut daemon, &mut pairs, seed, number);
    }
    eprintln!("{} scripts in {:.1?}", scripts(), begin.elapsed());
}
