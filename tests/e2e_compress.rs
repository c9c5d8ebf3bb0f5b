//! `--compress`: images that nbdcopy and qemu-img fill through the server are compressed, clean, and what was copied.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[allow(dead_code)]
mod support;

use std::fs;
use std::path::Path;

use support::front::{BOTH, Program, text};
use support::rng::Rng;
use support::server::{Serve, Server};
use support::tools::{qemu_img, run, tool};
use support::{assert_same, is_nbd_img, qcow2, scratch};

/// Bytes of the source that shrink, which it begins with.
const TEXT_LEN: usize = 6 << 20;

/// A disk with text, nothing, and what does not shrink.
fn make_source(folder: &Path) -> Vec<u8> {
    let mut rng = Rng::fixed(1);
    let words: Vec<Vec<u8>> =
        (0..2000).map(|_| rng.bytes(5).iter().map(|byte| b'a' + byte % 26).collect()).collect();
    let mut disk = Vec::with_capacity(10 << 20);
    while disk.len() < TEXT_LEN {
        disk.extend_from_slice(&words[usize::try_from(rng.in_range(0..2000)).unwrap()]);
    }
    disk.truncate(TEXT_LEN);
    disk.resize(8 << 20, 0);
    disk.extend(rng.bytes(1 << 20));
    // qemu-nbd compresses only what a disk has of whole clusters.
    disk.extend_from_within(..64 << 10);
    fs::write(folder.join("source"), &disk).unwrap();
    disk
}

/// What `qemu-img check` counts.
fn compressed_clusters(folder: &Path, image: &str) -> usize {
    let said = text(&qemu_img(folder, &format!("check -f qcow2 --output=json {image}")));
    let rest = said.split_once("\"compressed-clusters\":").map_or("0", |(_, rest)| rest);
    let digits: String = rest.trim_start().chars().take_while(char::is_ascii_digit).collect();
    digits.parse().unwrap()
}

fn nbdcopy(folder: &Path, server: &Server) {
    run(tool("nbdcopy").current_dir(folder).args(["--flush", "source"]).arg(server.uri("")));
}

fn convert(folder: &Path, server: &Server) {
    let line = ["convert", "-n", "-W", "-f", "raw", "-O", "raw", "source"];
    run(tool("qemu-img").current_dir(folder).args(line).arg(server.uri("")));
}

#[test]
fn copies_are_compressed() {
    if !is_nbd_img() {
        return eprintln!("qemu-nbd has no --compress");
    }
    let folder = scratch("compress");
    let folder = folder.path();
    let source = make_source(folder);
    for (number, (options, flags, cluster_len)) in [
        ("compression_type=zlib", ["--compress=zlib", "--cache=writeback"], 65536),
        ("compression_type=zstd", ["--compress=zstd", "--cache=none"], 65536),
        ("compression_type=zstd,cluster_size=4k", ["--compress=auto", "--cache=writeback"], 4096),
        ("compat=v2,cluster_size=16k", ["--compress=zlib:9", "--cache=none"], 16384),
        ("cluster_size=2M", ["--compress=zlib:9", "--cache=writeback"], 2 << 20),
    ]
    .into_iter()
    .enumerate()
    {
        qemu_img(folder, &format!("create -q -f qcow2 -o {options} disk {}", source.len()));
        let server = Serve::image(folder.join("disk")).format("qcow2").args(&flags).start();
        if number % 2 == 0 {
            nbdcopy(folder, &server)
        } else {
            convert(folder, &server)
        }
        server.stop();
        qcow2::check_clean(folder, "disk");
        assert_same(options, &qcow2::content(folder, "disk", None), &source);
        let (compressed, expected) = (compressed_clusters(folder, "disk"), TEXT_LEN / cluster_len);
        assert!(compressed >= expected, "{options}: {compressed} of {expected}");
        let len = fs::metadata(folder.join("disk")).unwrap().len();
        // Nine clusters of metadata.
        let most = TEXT_LEN * 3 / 4 + (1 << 20) + 9 * cluster_len;
        assert!(len < most as u64, "{options}: {len} bytes");
        // As small as QEMU makes it, give or take.
        qemu_img(folder, &format!("convert -c -f raw -O qcow2 -o {options} source yardstick"));
        let theirs = fs::metadata(folder.join("yardstick")).unwrap().len();
        assert!(len < theirs + theirs / 8, "{options}: {len} bytes, by qemu-img {theirs}");
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    if !is_nbd_img() {
        return eprintln!("qemu-nbd has no --compress");
    }
    let folder = scratch("compress-refused");
    qemu_img(folder.path(), "create -q -f qcow2 zlib 1M");
    qemu_img(folder.path(), "create -q -f raw raw 1M");
    for (image, format, flags, hint) in [
        ("zlib", "qcow2", &["--compress", "zstd"][..], "--compress zlib"),
        ("raw", "raw", &["--compress", "auto"], "no compressed clusters (--compress"),
        ("zlib", "qcow2", &["--compress", "zlib", "--read-only"], "--compress is about writes"),
        ("zlib", "qcow2", &["--compress", "zlib", "--temporary"], "--compress is about writes"),
    ] {
        let refusal = Serve::image(folder.path().join(image)).format(format).args(flags).start_refused();
        assert!(!refusal.status.success() && refusal.stderr.contains(hint), "{flags:?}: {}", refusal.stderr);
    }
}

/// virt-v2v's line for compressed output, on both programs.
#[test]
fn virt_v2v_writes_compressed() {
    let folder = scratch("compress,front");
    let folder = folder.path();
    let source = make_source(folder);
    let mut lens = Vec::new();
    for program in BOTH {
        let image = folder.join(format!("{program:?}.qcow2"));
        let name = format!("{program:?}.qcow2");
        qemu_img(folder, &format!("create -q -f qcow2 {name} {}", source.len()));
        let pid = folder.join("pid").display().to_string();
        let options = format!(
            "driver=compress,file.driver=qcow2,file.file.driver=file,file.file.filename={}",
            image.display().to_string().replace(',', ",,")
        );
        let line = ["-t", "--shared=0", "--discard=unmap", "--pid-file", &pid, "--image-opts", &options];
        let mut serving = program.serves(folder, &line);
        let copy = ["--flush", "--connections=4", "--request-size=65536", "source"];
        run(tool("nbdcopy").current_dir(folder).args(copy).arg(serving.uri("")));
        assert_eq!(serving.end(rustix::process::Signal::TERM).code(), Some(0), "{program:?}");
        qcow2::check_clean(folder, &name);
        assert_same(&name, &qcow2::content(folder, &name, None), &source);
        let compressed = compressed_clusters(folder, &name);
        assert!(compressed >= TEXT_LEN / 65536, "{program:?}: {compressed}");
        lens.push(fs::metadata(&image).unwrap().len());
    }
    assert!(lens[1] < lens[0] + lens[0] / 8, "{lens:?}");
}

/// With a raw disk below it both refuse.
#[test]
fn a_raw_disk_is_not_compressed_under_the_name_qemu_nbd() {
    let folder = scratch("compress-raw");
    qemu_img(folder.path(), "create -q -f raw raw 1M");
    for program in [Program::QemuNbd, Program::NbdImg] {
        let line =
            ["--image-opts", "driver=compress,file.driver=raw,file.file.driver=file,file.file.filename=raw"];
        let (status, _, said) = program.ends(folder.path(), &line);
        assert!(status == Some(1) && said.contains("ompress"), "{program:?}: {status:?} {said}");
    }
}
