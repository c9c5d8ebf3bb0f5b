//! Images of every kind that qemu-img makes read as QEMU reads them, and report as zero what QEMU does
//! and nothing else.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod qcow2_support;

use std::path::Path;

use nbd_img_formats::open::{OpenOptions, open};
use qcow2_support::{
    Folder, Random, assert_as_qemu, assert_reads, mixed_content, open_read_only, qemu, qemu_bytes, qemu_io,
};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// Which random operations qemu-io does.
#[derive(Clone, Copy)]
struct Mix {
    cluster: u64,
    size: u64,
    compressed: bool,
    /// Zeroing by flag is for version 3.
    zeroes: bool,
}

fn random_operations(mix: Mix, count: u32, random: &mut Random) -> Vec<String> {
    let sectors = mix.size / 512;
    (0..count)
        .map(|_| {
            let at = random.below(sectors) * 512;
            let len = (512 * (1 + random.below(mix.cluster * 3 / 512))).min(mix.size / 512 * 512 - at);
            let cluster_at = at / mix.cluster * mix.cluster;
            let whole = cluster_at + mix.cluster <= mix.size;
            match random.below(10) {
                0 | 1 if mix.zeroes => format!("write -z {at} {len}"),
                2 if mix.zeroes => format!("write -z -u {at} {len}"),
                3 => format!("discard {at} {len}"),
                4..=6 if mix.compressed && whole => {
                    format!("write -c -P {} {cluster_at} {}", 1 + random.below(255), mix.cluster)
                }
                _ => format!("write -P {} {at} {len}", 1 + random.below(255)),
            }
        })
        .collect()
}

/// A size that is no multiple of the cluster length and needs several L2 tables where they are small.
fn size_for(cluster: u64) -> u64 {
    (cluster * 70).clamp(3 * MIB, 40 * MIB) + 3 * 512
}

struct Case {
    options: String,
    cluster: u64,
    compressed: bool,
    zeroes: bool,
}

impl Case {
    fn new(cluster: u64, options: &str) -> Self {
        let zeroes = !options.contains("compat=v2");
        let compressed = !options.contains("data_file");
        Case { options: format!("cluster_size={cluster},{options}"), cluster, compressed, zeroes }
    }

    fn mix(&self, size: u64) -> Mix {
        Mix { cluster: self.cluster, size, compressed: self.compressed, zeroes: self.zeroes }
    }
}

/// Creates, writes, compares, writes again, compares.
fn check(case: &Case, seed: u64) {
    let folder = Folder::new();
    let size = size_for(case.cluster);
    // A data file's name is relative to where qemu-img runs unless it is absolute.
    let options = case.options.replace("DATA", folder.file("data.bin").to_str().unwrap());
    let image = folder.create("image.qcow2", &options, size);
    assert_as_qemu(&folder, &image, seed);
    let mut random = Random::new(seed);
    for _ in 0..2 {
        qemu_io(&image, &random_operations(case.mix(size), 25, &mut random));
        assert_as_qemu(&folder, &image, seed);
    }
}

fn check_all(cases: impl IntoIterator<Item = Case>) {
    for (seed, case) in cases.into_iter().enumerate() {
        println!("{} (seed {seed})", case.options);
        check(&case, seed as u64 + 1);
    }
}

#[test]
fn versions_and_cluster_lengths() {
    let clusters = [512, KIB, 2 * KIB, 4 * KIB, 16 * KIB, 64 * KIB, 256 * KIB, MIB, 2 * MIB];
    check_all(
        clusters
            .into_iter()
            .flat_map(|cluster| [Case::new(cluster, "compat=v2"), Case::new(cluster, "compat=v3")]),
    );
}

#[test]
fn refcount_widths() {
    let widths = [1, 2, 4, 8, 32, 64];
    check_all(widths.map(|bits| {
        // Compressed clusters share host clusters, which a refcount of one bit cannot count.
        let case = Case::new(64 * KIB, &format!("refcount_bits={bits}"));
        Case { compressed: bits > 8, ..case }
    }));
}

#[test]
fn preallocation() {
    let modes = ["off", "metadata", "falloc", "full"];
    check_all(modes.into_iter().flat_map(|mode| {
        [
            Case::new(64 * KIB, &format!("preallocation={mode}")),
            Case::new(4 * KIB, &format!("preallocation={mode},lazy_refcounts=on")),
        ]
    }));
}

#[test]
fn extended_l2() {
    let clusters = [16 * KIB, 64 * KIB, 128 * KIB, 2 * MIB];
    check_all(clusters.into_iter().flat_map(|cluster| {
        [
            Case::new(cluster, "extended_l2=on"),
            Case::new(cluster, "extended_l2=on,compression_type=zstd,preallocation=metadata"),
        ]
    }));
}

#[test]
fn external_data_files() {
    check_all([
        Case::new(64 * KIB, "data_file=DATA"),
        Case::new(4 * KIB, "data_file=DATA"),
        Case::new(64 * KIB, "data_file=DATA,data_file_raw=on"),
        Case::new(4 * KIB, "data_file=DATA,data_file_raw=on,preallocation=metadata"),
        Case::new(64 * KIB, "data_file=DATA,extended_l2=on"),
    ]);
}

#[test]
fn compressed_by_qemu_img() {
    let size = 5 * MIB + 7 * 512;
    for (seed, cluster) in [512, 4 * KIB, 64 * KIB, 2 * MIB].into_iter().enumerate() {
        for compression in ["zlib", "zstd"] {
            let folder = Folder::new();
            let source = folder.file("source.raw");
            mixed_content(&source, size, seed as u64);
            let image = folder.file("image.qcow2");
            let options = format!("cluster_size={cluster},compression_type={compression}");
            let (from, to) = (source.to_str().unwrap(), image.to_str().unwrap());
            qemu("qemu-img", ["convert", "-f", "raw", "-c", "-O", "qcow2", "-o", &options, from, to]);
            assert_as_qemu(&folder, &image, seed as u64);
            assert_reads(&*open_read_only(&image).driver, &std::fs::read(&source).unwrap(), seed as u64);
        }
    }
}

/// A backing file that is shorter, longer or odd, in both formats, stated and probed.
#[test]
fn backing_files() {
    let size = 3 * MIB + 512;
    let lengths = [("short", MIB), ("long", 5 * MIB), ("odd", 2 * MIB + 77), ("tiny", 300)];
    for (seed, (_, base_len)) in lengths.into_iter().enumerate() {
        for format in ["raw", "qcow2"] {
            for overlay in
                ["cluster_size=64k", "cluster_size=1k,compat=v2", "cluster_size=64k,extended_l2=on"]
            {
                let folder = Folder::new();
                let base = folder.file("base.img");
                mixed_content(&base, base_len, seed as u64);
                if format == "qcow2" {
                    to_qcow2(&base, "cluster_size=4k");
                }
                let options = format!("{overlay},backing_file=base.img,backing_fmt={format}");
                let image = folder.create("overlay.qcow2", &options, size);
                assert_as_qemu(&folder, &image, seed as u64);
                let zeroes = !overlay.contains("v2");
                let mix = Mix { cluster: 4 * KIB, size, compressed: false, zeroes };
                qemu_io(&image, &random_operations(mix, 20, &mut Random::new(seed as u64)));
                assert_as_qemu(&folder, &image, seed as u64);
            }
        }
    }
}

/// Turns a raw file into a qcow2 image in its place.
fn to_qcow2(path: &Path, options: &str) {
    let made = path.with_extension("made");
    let (from, to) = (path.to_str().unwrap(), made.to_str().unwrap());
    qemu("qemu-img", ["convert", "-f", "raw", "-O", "qcow2", "-o", options, from, to]);
    std::fs::rename(made, path).unwrap();
}

/// Compressed clusters at every depth, layers of different cluster lengths, growing and shrinking sizes.
#[test]
fn long_chains() {
    let folder = Folder::new();
    let base = folder.file("0.img");
    mixed_content(&base, 2 * MIB + 512, 9);
    let mut random = Random::new(9);
    let layers = [
        "cluster_size=4k",
        "cluster_size=64k,extended_l2=on",
        "cluster_size=512",
        "cluster_size=2M",
        "cluster_size=64k,compression_type=zstd",
    ];
    let mut below = ("0.img".to_owned(), "raw");
    for (depth, layer) in layers.into_iter().cycle().take(12).enumerate() {
        let name = format!("{}.img", depth + 1);
        let size = 2 * MIB + random.below(8) * 64 * KIB;
        let options = format!("{layer},backing_file={},backing_fmt={}", below.0, below.1);
        let image = folder.create(&name, &options, size);
        let cluster = if layer.contains("512") { 512 } else { 4 * KIB };
        let mix = Mix { cluster, size, compressed: false, zeroes: true };
        let mut operations = random_operations(mix, 8, &mut random);
        if layer.contains("64k") {
            operations.extend((0..4).map(|_| {
                format!("write -c -P {} {} 64k", 1 + random.below(255), random.below(32) * 64 * KIB)
            }));
        }
        qemu_io(&image, &operations);
        below = (name, "qcow2");
        assert_as_qemu(&folder, &image, depth as u64);
    }
    let chain = open_read_only(&folder.file("12.img")).driver.info().unwrap().chain;
    assert_eq!(chain.len(), 12);
    assert_eq!(chain[11].format, "raw");
}

#[test]
fn snapshots_are_read_by_id_and_by_name() {
    for options in ["compat=v2", "compat=v3", "extended_l2=on", "cluster_size=512", "compression_type=zstd"] {
        let folder = Folder::new();
        let image = folder.create("image.qcow2", options, 3 * MIB);
        let cluster = if options.contains("512") { 512 } else { 64 * KIB };
        let mix = Mix { cluster, size: 3 * MIB, compressed: true, zeroes: options != "compat=v2" };
        let mut random = Random::new(4);
        let path = image.to_str().unwrap();
        for name in ["first", "second"] {
            qemu_io(&image, &random_operations(mix, 15, &mut random));
            qemu("qemu-img", ["snapshot", "-c", name, path]);
        }
        qemu_io(&image, &random_operations(mix, 15, &mut random));
        assert_as_qemu(&folder, &image, 4);
        for (wanted, name) in [("first", "first"), ("1", "first"), ("second", "second"), ("2", "second")] {
            let expected = qemu_bytes(&folder, &image, &["-l", &format!("snapshot.name={name}")]);
            let options = OpenOptions { snapshot: Some(wanted.to_owned()), ..OpenOptions::default() };
            assert_reads(&*open(&image, &options).unwrap().driver, &expected, 4);
        }
        let options = OpenOptions { snapshot: Some("third".to_owned()), ..OpenOptions::default() };
        let error = open(&image, &options).err().unwrap().to_string();
        assert!(error.contains("'third'") && error.contains("1 'first', 2 'second'"), "{error}");
        let listed = open_read_only(&image).driver.info().unwrap().snapshots;
        let names: Vec<_> = listed.iter().map(|s| (s.id.as_str(), s.name.as_str(), s.virtual_size)).collect();
        assert_eq!(names, [("1", "first", 3 * MIB), ("2", "second", 3 * MIB)]);
    }
}

/// The disk was smaller when the snapshot was taken.
#[test]
fn a_snapshot_has_its_own_size() {
    let folder = Folder::new();
    let image = folder.create("image.qcow2", "", MIB);
    qemu_io(&image, &["write -P 7 0 1M".to_owned()]);
    let path = image.to_str().unwrap();
    qemu("qemu-img", ["snapshot", "-c", "small", path]);
    qemu("qemu-img", ["resize", "-q", path, "1G"]);
    qemu_io(&image, &["write -P 8 0 1M".to_owned(), "write -P 9 1023M 1M".to_owned()]);
    let options = OpenOptions { snapshot: Some("small".to_owned()), ..OpenOptions::default() };
    assert_reads(&*open(&image, &options).unwrap().driver, &vec![7; 1 << 20], 1);
    assert_eq!(open_read_only(&image).driver.size(), 1 << 30);
}
