//! The same operations on the qcow2 driver and on QEMU (qemu-io): the same data, the same block status,
//! and each one opens the other's image and goes on with it.
//!
//! `NBD_IMG_SCRIPTS` says how many scripts, `NBD_IMG_MODEL_SEED` which.

#![allow(clippy::unwrap_used)] // Helpers of tests are not told apart from a program's code.

mod support;

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use nbd_img_formats::driver::Status;
use nbd_img_formats::open::{OpenOptions, open};
use nbd_img_formats::plan::MapMode;
use nbd_img_formats::sync::Arc;
use nbd_img_formats::{BlockDriver, Durability, Format, GuestRange, Place, Provision, ReadPlan};
use nbd_img_formats::{StatusQuery, ZeroRequest};
use support::maker::{self, text};
use support::random::Random;
use support::{checker, steps};

const KINDS: [(&str, u64, bool); 9] = [
    ("cluster_size=512", 512, false),
    ("cluster_size=512,refcount_bits=64", 512, true),
    ("cluster_size=4k,refcount_bits=1", 4096, true),
    ("cluster_size=4k,compression_type=zstd", 4096, true),
    ("cluster_size=4k,compat=v2", 4096, false),
    ("cluster_size=512,compat=v2", 512, true),
    ("cluster_size=64k,lazy_refcounts=on", 65536, true),
    ("cluster_size=64k", 65536, false),
    ("cluster_size=2M", 2 << 20, true),
];

fn scripts() -> u64 {
    std::env::var("NBD_IMG_SCRIPTS").map_or(27, |text| text.parse().unwrap())
}

#[derive(Clone, Copy, Debug)]
enum Operation {
    Write { byte: u8, at: u64, len: u64 },
    Zero { at: u64, len: u64, unmap: bool },
    Discard { at: u64, len: u64 },
    Flush,
}

impl Operation {
    fn random(kind: (&str, u64, bool), size: u64, random: &mut Random) -> Operation {
        let (options, cluster, backing) = kind;
        let unit = random.pick(&[512, 512, cluster]);
        let at = random.below(size / unit) * unit;
        let len = ((1 + random.below(cluster * 3 / unit)) * unit).min(size - at);
        let version_2 = options.contains("v2");
        match random.below(10) {
            0 => Operation::Zero { at, len, unmap: false },
            1 | 2 => Operation::Zero { at, len, unmap: true },
            // QEMU lets the backing file shine through there; the driver does not.
            3 | 4 if !(version_2 && backing) => Operation::Discard { at, len },
            5 => Operation::Flush,
            _ => Operation::Write { byte: 1 + random.below(255) as u8, at, len },
        }
    }

    fn for_qemu(self) -> String {
        match self {
            Operation::Write { byte, at, len } => format!("write -q -P {byte} {at} {len}"),
            Operation::Zero { at, len, unmap } => {
                format!("write -q -z {} {at} {len}", if unmap { "-u" } else { "" })
            }
            Operation::Discard { at, len } => format!("discard -q {at} {len}"),
            Operation::Flush => "flush".to_owned(),
        }
    }

    fn carry_out(self, driver: &dyn BlockDriver) {
        let range = |at, len| GuestRange::new(at, len).unwrap();
        match self {
            Operation::Write { byte, at, len } => {
                driver.pwrite(at, &vec![byte; len as usize], Durability::Later).unwrap();
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

/// Two copies of an image in a folder: one for QEMU, one for the driver.
struct Pair {
    folder: tempfile::TempDir,
    size: u64,
    version_2: bool,
}

impl Pair {
    fn new(kind: (&str, u64, bool), random: &mut Random) -> Pair {
        let (options, cluster, backing) = kind;
        let folder = tempfile::tempdir_in("/dev/shm").unwrap();
        let size = (cluster * 60).clamp(100 << 10, 8 << 20) + 512;
        let mut options = options.to_owned();
        if backing {
            let base = folder.path().join("base.qcow2");
            let base_size = (size / 2 + random.below(size)).next_multiple_of(512).to_string();
            let path = text(&base);
            maker::run(
                "qemu-img",
                &["create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", path, &base_size],
            );
            maker::run("qemu-io", &["-f", "qcow2", "-c", &format!("write -q -P 77 8k {}", size / 3), path]);
            options += ",backing_fmt=qcow2,backing_file=base.qcow2";
        }
        let pair = Pair { folder, size, version_2: options.contains("compat=v2") };
        let theirs = pair.theirs();
        let path = text(&theirs);
        maker::run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", &options, path, &size.to_string()]);
        if !options.contains("refcount_bits=1") {
            maker::run(
                "qemu-io",
                &["-f", "qcow2", "-c", &format!("write -q -P 9 0 {}", size / 5 / 512 * 512), path],
            );
            maker::run("qemu-img", &["snapshot", "-c", "snap", path]);
        }
        std::fs::copy(&theirs, pair.ours()).unwrap();
        pair
    }

    fn theirs(&self) -> PathBuf {
        self.folder.path().join("theirs.qcow2")
    }

    fn ours(&self) -> PathBuf {
        self.folder.path().join("ours.qcow2")
    }

    /// Does the operations by QEMU on one, by the driver on the other.
    fn carry_out(&self, operations: &[Operation], by_qemu: &Path, by_driver: &Path) {
        let commands: Vec<_> = operations.iter().map(|operation| operation.for_qemu()).collect();
        let mut args = vec!["-f", "qcow2", "-d", "unmap"];
        for command in &commands {
            args.extend(["-c", command]);
        }
        args.push(text(by_qemu));
        maker::run("qemu-io", &args);
        let driver = open_for(by_driver, true);
        for operation in operations {
            operation.carry_out(&*driver);
        }
        driver.close().unwrap();
    }

    fn compare(&self, said: &dyn std::fmt::Debug) {
        let (ours, theirs) = (self.ours(), self.theirs());
        for path in [&ours, &theirs] {
            let (code, qemu) = maker::check_file(path);
            assert_eq!(code, 0, "{said:?}: {qemu}");
            let report = checker::check(&std::fs::read(path).unwrap()).unwrap();
            assert!(report.is_clean(), "{said:?}: {report}");
        }
        let output = maker::try_run(
            "qemu-img",
            &["compare", "-f", "qcow2", "-F", "qcow2", text(&ours), text(&theirs)],
        );
        assert!(output.status.success(), "{said:?}: {}", String::from_utf8_lossy(&output.stdout));
        let drivers = [open_for(&ours, false), open_for(&theirs, false)];
        let [one, other] = drivers.each_ref().map(|driver| steps::read_all(&**driver).unwrap());
        assert!(one == other, "{said:?}: the driver reads them differently");
        let by_qemu = [&ours, &theirs].map(|path| zeroes_by_qemu(path));
        // Version 2 has no flag for zeroes: QEMU writes them, the driver gives the cluster back.
        if !self.version_2 {
            assert_eq!(by_qemu[0], by_qemu[1], "{said:?}: what QEMU says is zero");
        }
        for (driver, zeroes) in drivers.iter().zip(&by_qemu) {
            check_status(&**driver, &one, zeroes);
        }
        let by_driver = drivers.each_ref().map(|driver| zeroes_by_driver(&**driver, self.size));
        assert_eq!(by_driver[0], by_qemu[0], "{said:?}: what the driver says of its image");
        assert_eq!(by_driver[1], by_qemu[1], "{said:?}: what the driver says of QEMU's image");
    }
}

fn open_for(path: &Path, writable: bool) -> Arc<dyn BlockDriver> {
    let options = OpenOptions { format: Some(Format::Qcow2), writable, ..OpenOptions::default() };
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

fn zeroes_by_qemu(path: &Path) -> Vec<(u64, u64)> {
    let output = maker::run("qemu-img", &["map", "--output=json", "-f", "qcow2", text(path)]);
    let map: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let number = |run: &serde_json::Value, name: &str| run[name].as_u64().unwrap();
    let runs = map.as_array().unwrap().iter();
    // What is data according to the image may be a hole of its file: that is not the image's doing.
    let zero = |run: &serde_json::Value| run["zero"] == true && run["data"] == false;
    joined(runs.map(|run| (number(run, "start"), number(run, "length"), zero(run))))
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

#[test]
fn scripts_do_the_same() {
    let seed = Random::seed("differential");
    for number in 0..scripts() {
        let mut random = Random::new(seed.wrapping_add(number));
        let kind = KINDS[(number % KINDS.len() as u64) as usize];
        let pair = Pair::new(kind, &mut random);
        let script = |random: &mut Random| -> Vec<Operation> {
            let count = 1 + random.below(30);
            (0..count).map(|_| Operation::random(kind, pair.size, random)).collect()
        };
        let first = script(&mut random);
        pair.carry_out(&first, &pair.theirs(), &pair.ours());
        pair.compare(&(kind, &first));
        // Each goes on with what the other one has written.
        let second = script(&mut random);
        pair.carry_out(&second, &pair.ours(), &pair.theirs());
        pair.compare(&(kind, &first, &second));
    }
}
