//! Images of every kind that qemu-img makes, small, each with a name and the commands that make it.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::rng::Rng;
use super::tools::{qemu_img, qemu_io, run, tool};

/// Of [`small_disk`].
pub const SMALL_DISK_LEN: usize = 1 << 20;

/// Writes a raw disk whose sectors differ: its path and content.
pub fn small_disk(folder: &Path) -> (PathBuf, Vec<u8>) {
    let content: Vec<u8> = (0..SMALL_DISK_LEN).map(|i| (i / 512 + i) as u8).collect();
    let path = folder.join("disk.img");
    fs::write(&path, &content).unwrap();
    (path, content)
}

/// How one image is made and served.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    pub name: &'static str,
    pub format: &'static str,
    /// Whether the server is told the format; else it probes.
    pub stated: bool,
    /// Run in a folder of its own that holds `src.raw` and `odd.raw`; the result is the file `disk`.
    ///
    /// - `img ARGS`: qemu-img
    /// - `io FILE COMMAND; COMMAND`: qemu-io on a qcow2 file
    /// - `copy FROM TO`: with its holes; `clone FROM TO`: without making holes of zeroes, as cp does
    /// - `mkdir FOLDER`
    /// - `incompatible FILE BITS`: sets header bits that QEMU leaves to a crash
    pub steps: &'static [&'static str],
    /// Further arguments of `nbd-img serve`, and of qemu-nbd in its place.
    pub args: &'static [&'static str],
    pub qemu_args: &'static [&'static str],
    /// What `qemu-img convert` reads for the expected content.
    pub reference: &'static str,
}

const fn qcow2(name: &'static str, steps: &'static [&'static str]) -> Case {
    let reference = "-f qcow2 disk";
    Case { name, format: "qcow2", stated: false, steps, args: &[], qemu_args: &[], reference }
}

const fn stated(case: Case) -> Case {
    Case { stated: true, ..case }
}

const fn raw(name: &'static str, format: &'static str, steps: &'static [&'static str]) -> Case {
    Case { format, stated: true, reference: "-f raw disk", ..qcow2(name, steps) }
}

/// Overwrites, zeroes and unmaps here and there: clusters of every kind, aligned to nothing in particular.
macro_rules! scribble {
    ($file:literal) => {
        concat!(
            "io ",
            $file,
            " write -P 0x11 3k 70k; write -P 0x22 700k 1k; write -z 200k 90k; write -zu 1000k 300k; ",
            "discard 1500k 200k; write -P 0x33 2047k 2k; write -P 0 2500k 64k"
        )
    };
}

#[rustfmt::skip] // one image a line reads as the table that it is
pub const CASES: &[Case] = &[
    // raw
    raw("raw-sparse", "raw", &["copy src.raw disk"]),
    raw("raw-odd-size", "raw", &["copy odd.raw disk"]),
    raw("raw-512-bytes", "raw", &["img create -f raw disk 512"]),
    raw("raw-all-hole", "raw", &["img create -f raw disk 5M"]),
    raw("raw-preallocated", "raw", &["img create -f raw -o preallocation=falloc disk 3M"]),
    Case { stated: false, ..raw("raw-probed", "raw", &["copy src.raw disk"]) },
    raw("mmap-raw-sparse", "mmap-raw", &["copy src.raw disk"]),
    raw("mmap-raw-odd-size", "mmap-raw", &["copy odd.raw disk"]),
    // Versions and cluster sizes
    qcow2("v2", &["img convert -O qcow2 -o compat=0.10 src.raw disk", scribble_v2()]),
    qcow2("v2-compressed", &["img convert -c -O qcow2 -o compat=0.10 src.raw disk"]),
    qcow2("v3-cluster-512", &["img convert -O qcow2 -o cluster_size=512 src.raw disk", scribble!("disk")]),
    qcow2("v3-cluster-1k", &["img convert -O qcow2 -o cluster_size=1k src.raw disk", scribble!("disk")]),
    stated(qcow2("v3-cluster-4k", &["img convert -O qcow2 -o cluster_size=4k src.raw disk", scribble!("disk")])),
    qcow2("v3-cluster-16k", &["img convert -O qcow2 -o cluster_size=16k src.raw disk", scribble!("disk")]),
    stated(qcow2("v3-cluster-64k", &["img convert -O qcow2 src.raw disk", scribble!("disk")])),
    qcow2("v3-cluster-256k", &["img convert -O qcow2 -o cluster_size=256k src.raw disk", scribble!("disk")]),
    qcow2("v3-cluster-2m", &["img convert -O qcow2 -o cluster_size=2M src.raw disk", scribble!("disk")]),
    // Compression
    qcow2("zlib-512", &["img convert -c -O qcow2 -o cluster_size=512 src.raw disk"]),
    qcow2("zlib-4k", &["img convert -c -O qcow2 -o cluster_size=4k src.raw disk", scribble!("disk")]),
    qcow2("zlib-64k", &["img convert -c -O qcow2 src.raw disk", scribble!("disk")]),
    qcow2("zlib-2m", &["img convert -c -O qcow2 -o cluster_size=2M src.raw disk", scribble!("disk")]),
    qcow2("zstd-512", &["img convert -c -O qcow2 -o compression_type=zstd,cluster_size=512 src.raw disk"]),
    qcow2("zstd-4k", &["img convert -c -O qcow2 -o compression_type=zstd,cluster_size=4k src.raw disk", scribble!("disk")]),
    qcow2("zstd-64k", &["img convert -c -O qcow2 -o compression_type=zstd src.raw disk", scribble!("disk")]),
    qcow2("zstd-2m", &["img convert -c -O qcow2 -o compression_type=zstd,cluster_size=2M src.raw disk"]),
    // Refcount widths
    qcow2("refcount-1", &["img convert -O qcow2 -o refcount_bits=1 src.raw disk", scribble!("disk")]),
    qcow2("refcount-2", &["img convert -O qcow2 -o refcount_bits=2,cluster_size=4k src.raw disk", scribble!("disk")]),
    qcow2("refcount-4", &["img convert -O qcow2 -o refcount_bits=4 src.raw disk", scribble!("disk")]),
    qcow2("refcount-8", &["img convert -c -O qcow2 -o refcount_bits=8,cluster_size=8k src.raw disk", scribble!("disk")]),
    qcow2("refcount-32", &["img convert -O qcow2 -o refcount_bits=32,cluster_size=1k src.raw disk", scribble!("disk")]),
    qcow2("refcount-64", &["img convert -c -O qcow2 -o refcount_bits=64 src.raw disk", scribble!("disk")]),
    qcow2("lazy-refcounts", &["img convert -O qcow2 -o lazy_refcounts=on src.raw disk", scribble!("disk")]),
    // Preallocation and sizes
    qcow2("empty", &["img create -f qcow2 disk 3M"]),
    qcow2("one-sector", &["img create -f qcow2 disk 512", "io disk write -P 9 0 512"]),
    qcow2("size-no-multiple-of-cluster", &["img create -f qcow2 disk 3000832", "io disk write -P 9 2999808 1024; write -P 8 1k 1k"]),
    qcow2("preallocation-metadata", &["img create -f qcow2 -o preallocation=metadata disk 3M", scribble!("disk")]),
    qcow2("preallocation-falloc", &["img create -f qcow2 -o preallocation=falloc disk 3M", scribble!("disk")]),
    qcow2("preallocation-full", &["img create -f qcow2 -o preallocation=full disk 3M"]),
    qcow2("resized", &["img convert -O qcow2 src.raw disk", "img resize -q disk +3M", "io disk write -P 5 5000k 9k"]),
    // Extended L2
    qcow2("extended-l2-16k", &["img convert -O qcow2 -o extended_l2=on,cluster_size=16k src.raw disk", scribble!("disk")]),
    qcow2("extended-l2-64k", &["img create -f qcow2 -o extended_l2=on disk 3M", scribble!("disk"), "io disk write -zu 12k 2k; discard 16k 6k"]),
    qcow2("extended-l2-2m", &["img create -f qcow2 -o extended_l2=on,cluster_size=2M disk 5M", scribble!("disk")]),
    qcow2("extended-l2-compressed", &["img convert -c -O qcow2 -o extended_l2=on,cluster_size=32k src.raw disk", scribble!("disk")]),
    qcow2("extended-l2-backing", &["copy src.raw base.raw", "img create -f qcow2 -o extended_l2=on,cluster_size=128k -b base.raw -F raw disk", scribble!("disk"), "io disk write -P 1 5k 1k; write -z 9k 3k"]),
    // Backing chains
    qcow2("backing-raw", &["copy src.raw base.raw", "img create -f qcow2 -b base.raw -F raw disk", scribble!("disk")]),
    qcow2("backing-raw-odd-size", &["copy odd.raw base.raw", "img create -f qcow2 -o cluster_size=4k -b base.raw -F raw disk 3M", "io disk write -P 3 9k 1k"]),
    qcow2("backing-qcow2", &["img convert -O qcow2 src.raw base", "img create -f qcow2 -b base -F qcow2 disk", scribble!("disk")]),
    qcow2("backing-v2", &["img convert -O qcow2 -o compat=0.10 src.raw base", "img create -f qcow2 -o compat=0.10 -b base -F qcow2 disk", scribble_v2()]),
    qcow2("backing-shorter", &["img convert -O qcow2 -o cluster_size=4k src.raw base", "img create -f qcow2 -b base -F qcow2 disk 7M", "io disk write -P 6 3500k 3000"]),
    qcow2("backing-longer", &["img convert -O qcow2 src.raw base", "img create -f qcow2 -o cluster_size=4k -b base -F qcow2 disk 1500672", "io disk write -P 6 1400k 3000"]),
    qcow2("backing-compressed", &["img convert -c -O qcow2 -o compression_type=zstd src.raw base", "img create -f qcow2 -o cluster_size=4k -b base -F qcow2 disk", scribble!("disk")]),
    qcow2("backing-in-a-folder-below", &["mkdir sub", "img convert -O qcow2 src.raw sub/base", "img create -f qcow2 -b sub/base -F qcow2 disk", scribble!("disk")]),
    qcow2("backing-compressed-overlay", &["img convert -O qcow2 src.raw base", "img convert -c -O qcow2 -B base -F qcow2 odd.raw disk"]),
    qcow2("backing-chain-of-5", &[
        "copy odd.raw c0", "img create -f qcow2 -o cluster_size=64k -b c0 -F raw c1 2M", "io c1 write -P 1 10k 30k",
        "img create -f qcow2 -o cluster_size=4k -b c1 -F qcow2 c2 3M", scribble!("c2"), "img create -f qcow2 -o cluster_size=2M -b c2 -F qcow2 c3 3M",
        "io c3 write -P 4 600k 2k; write -z 900k 5k", "img create -f qcow2 -o cluster_size=512 -b c3 -F qcow2 disk 4M", "io disk write -P 5 11k 1k; discard 300k 64k",
    ]),
    Case {
        args: &["--backing", "none"], reference: "-f qcow2 alone",
        ..qcow2("backing-none", &["img convert -O qcow2 src.raw base", "img create -f qcow2 -b base -F qcow2 disk", scribble!("disk"),
            "clone disk alone", "img rebase -u -f qcow2 -b  alone"])
    },
    // Internal snapshots
    qcow2("snapshots", &["img convert -O qcow2 src.raw disk", "img snapshot -c one disk", scribble!("disk"), "img snapshot -c two disk", "io disk write -P 0x77 0 500k"]),
    Case {
        args: &["--load-snapshot", "one"], qemu_args: &["--load-snapshot=snapshot.name=one"], reference: "-f qcow2 -l snapshot.name=one disk",
        ..qcow2("load-snapshot-name", &["img convert -c -O qcow2 src.raw disk", "img snapshot -c one disk", scribble!("disk"), "img snapshot -c two disk", "io disk write -P 0x77 0 500k"])
    },
    Case {
        args: &["--load-snapshot", "2"], qemu_args: &["--load-snapshot=snapshot.id=2"], reference: "-f qcow2 -l snapshot.id=2 disk",
        ..qcow2("load-snapshot-id", &["img convert -O qcow2 -o cluster_size=4k src.raw disk", "img snapshot -c one disk", scribble!("disk"), "img snapshot -c two disk", "io disk write -P 0x77 0 500k"])
    },
    // External data files, bitmaps, states
    qcow2("data-file", &["img create -f qcow2 -o data_file=data disk 3M", scribble!("disk")]),
    qcow2("data-file-raw", &["img create -f qcow2 -o data_file=data,data_file_raw=on disk 3M", scribble!("disk")]),
    qcow2("bitmaps", &["img convert -O qcow2 src.raw disk", "img bitmap --add disk b0", scribble!("disk")]),
    qcow2("dirty", &["img convert -O qcow2 -o lazy_refcounts=on src.raw disk", scribble!("disk"), "incompatible disk 1"]),
    qcow2("corrupt", &["img convert -O qcow2 src.raw disk", scribble!("disk"), "incompatible disk 2"]),
];

/// Version 2 knows no zero clusters.
const fn scribble_v2() -> &'static str {
    "io disk write -P 0x11 3k 70k; write -P 0x22 700k 1k; write -z 200k 90k; write -P 0x33 2047k 2k"
}

/// Writes `src.raw` (3 MiB and 5 sectors) and `odd.raw` (no multiple of 512): random bytes, text, zeroes, and holes.
pub fn make_sources(folder: &Path) {
    let mut rng = Rng::fixed(1);
    let mut content = vec![0; (3 << 20) + 5 * 512];
    let mut fill = |at: usize, len: usize, random: bool| {
        let bytes =
            if random { rng.bytes(len) } else { b"nbd-img ".iter().copied().cycle().take(len).collect() };
        content[at..at + len].copy_from_slice(&bytes);
    };
    fill(0, 100_000, true);
    fill(150_000, 400_000, false);
    fill(600_001, 13, true);
    fill(800_000, 600_000, true);
    fill(2_000_000, 300_000, false);
    fill((3 << 20) + 512, 4 * 512, true);
    write_sparse(&folder.join("src.raw"), &content);
    write_sparse(&folder.join("odd.raw"), &content[100_000..1_400_333]);
}

/// Makes the image of `case` in a new folder below `folder`, which holds the sources; gives the folder.
pub fn make(case: &Case, folder: &Path) -> PathBuf {
    let own = folder.join(case.name);
    fs::create_dir(&own).unwrap();
    for source in ["src.raw", "odd.raw"] {
        run(tool_cp().arg("--sparse=auto").arg(folder.join(source)).arg(own.join(source)));
    }
    for step in case.steps {
        let (verb, rest) = step.split_once(' ').unwrap();
        let words: Vec<&str> = rest.split(' ').collect();
        match verb {
            "img" => drop(run(tool("qemu-img").current_dir(&own).args(&words))),
            "io" => {
                let (file, commands) = rest.split_once(' ').unwrap();
                qemu_io(&own, "qcow2", file, &commands.split("; ").collect::<Vec<_>>());
            }
            "copy" => drop(run(tool_cp().current_dir(&own).arg("--sparse=auto").args(&words))),
            "clone" => fs::write(own.join(words[1]), fs::read(own.join(words[0])).unwrap()).unwrap(),
            "mkdir" => fs::create_dir(own.join(rest)).unwrap(),
            "incompatible" => set_incompatible(&own.join(words[0]), words[1].parse().unwrap()),
            other => panic!("{}: no step {other}", case.name),
        }
    }
    own
}

/// What `qemu-img convert` makes of the image.
pub fn expected(case: &Case, folder: &Path) -> Vec<u8> {
    qemu_img(folder, &format!("convert -O raw {} expected.raw", case.reference));
    fs::read(folder.join("expected.raw")).unwrap()
}

fn tool_cp() -> std::process::Command {
    std::process::Command::new("cp")
}

/// Blocks of 4 KiB of zeroes become holes, except one stretch: a reader must know zeroes that are stored, too.
fn write_sparse(path: &Path, content: &[u8]) {
    let file = OpenOptions::new().write(true).create_new(true).open(path).unwrap();
    file.set_len(content.len() as u64).unwrap();
    for (i, block) in content.chunks(4096).enumerate() {
        let stored_zeroes = (130..140).contains(&i);
        if stored_zeroes || block.iter().any(|&byte| byte != 0) {
            file.write_all_at(block, i as u64 * 4096).unwrap();
        }
    }
}

/// Bits 0 (dirty) and 1 (corrupt) of the incompatible features, which a version 3 header holds at byte 72, big-endian.
fn set_incompatible(path: &Path, bits: u8) {
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut low = [0];
    file.read_exact_at(&mut low, 79).unwrap();
    file.write_all_at(&[low[0] | bits], 79).unwrap();
}
