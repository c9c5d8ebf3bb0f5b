//! Writing qcow2 through the server, over the kinds of images there are: what 16 clients write at once is what QEMU reads
//! afterwards, the image is clean, snapshots and backing files are as they were; fio verifies its own checksums; copies
//! into an export stay sparse.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[allow(dead_code)]
mod support;

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use support::client::{Client, Wishes};
use support::rng::Rng;
use support::server::{Peer, Serve, Server};
use support::tools::{qemu_img, qemu_io, run, tool};
use support::writers::{self, DISK_LEN, sparse_source};
use support::{assert_same, qcow2};

/// One way to make the image that the writers get. `source` is the raw disk with the first content.
struct Kind {
    name: &'static str,
    /// Arguments of qemu-img, one command each.
    made_by: &'static [&'static str],
    cache: &'static str,
    /// A snapshot that must still hold the first content.
    snapshot: bool,
}

const fn kind(name: &'static str, made_by: &'static [&'static str]) -> Kind {
    Kind { name, made_by, cache: "writeback", snapshot: false }
}

const fn cached(cache: &'static str, name: &'static str, made_by: &'static [&'static str]) -> Kind {
    Kind { cache, ..kind(name, made_by) }
}

#[test]
fn sixteen_writers_on_each_cluster_size() {
    for kind in [
        kind("cluster-64k", &["convert -f raw -O qcow2 source disk"]),
        kind("cluster-4k", &["convert -f raw -O qcow2 -o cluster_size=4k source disk"]),
        kind("cluster-2m", &["convert -f raw -O qcow2 -o cluster_size=2M source disk"]),
        kind("cluster-512", &["convert -f raw -O qcow2 -o cluster_size=512,refcount_bits=1 source disk"]),
    ] {
        writers_against_shadow(&kind);
    }
}

#[test]
fn sixteen_writers_on_old_and_compressed_images() {
    for kind in [
        kind("v2", &["convert -f raw -O qcow2 -o compat=0.10 source disk"]),
        kind("zlib", &["convert -c -f raw -O qcow2 source disk"]),
        kind("zstd", &["convert -c -f raw -O qcow2 -o compression_type=zstd,cluster_size=16k source disk"]),
        kind("lazy-refcounts", &["convert -f raw -O qcow2 -o lazy_refcounts=on source disk"]),
    ] {
        writers_against_shadow(&kind);
    }
}

#[test]
fn sixteen_writers_on_overlays() {
    for kind in [
        kind("overlay", &["create -f qcow2 -b source -F raw disk"]),
        kind("overlay-v2", &["create -f qcow2 -o compat=0.10,cluster_size=8k -b source -F raw disk"]),
        kind(
            "overlay-on-compressed",
            &[
                "convert -c -f raw -O qcow2 -o cluster_size=32k source base",
                "create -f qcow2 -b base -F qcow2 disk",
            ],
        ),
        kind(
            "overlay-on-shorter",
            &["create -f qcow2 -o cluster_size=2M -b source -F raw disk", "resize -q disk +1M"],
        ),
    ] {
        writers_against_shadow(&kind);
    }
}

#[test]
fn sixteen_writers_on_images_with_snapshots() {
    for kind in [
        kind("snapshot", &["convert -f raw -O qcow2 source disk", "snapshot -c first disk"]),
        kind(
            "snapshot-4k",
            &["convert -f raw -O qcow2 -o cluster_size=4k source disk", "snapshot -c first disk"],
        ),
        kind("snapshot-compressed", &["convert -c -f raw -O qcow2 source disk", "snapshot -c first disk"]),
    ] {
        writers_against_shadow(&Kind { snapshot: true, ..kind });
    }
}

#[test]
fn sixteen_writers_with_each_cache_mode() {
    for kind in [
        cached("writethrough", "writethrough", &["convert -f raw -O qcow2 source disk"]),
        cached("none", "none", &["convert -f raw -O qcow2 source disk"]),
        cached("none", "none-4k", &["create -f qcow2 -o cluster_size=4k -b source -F raw disk"]),
        cached("directsync", "directsync", &["convert -c -f raw -O qcow2 source disk"]),
    ] {
        writers_against_shadow(&kind);
    }
}

fn writers_against_shadow(kind: &Kind) {
    let folder = support::scratch(kind.name);
    let folder = folder.path();
    let mut rng = Rng::new(kind.name);
    let first = first_content(&mut rng);
    fs::write(folder.join("source"), &first).unwrap();
    for command in kind.made_by {
        qemu_img(folder, command);
    }
    let disk = folder.join("disk");
    let cache = format!("--cache={}", kind.cache);
    let server = Serve::image(&disk).format("qcow2").args(&[&cache]).qemu_args(&[&cache]).start();
    let mut reader = Client::unix(server.socket(), "", Wishes::STRUCTURED);
    let mut shadow = first.clone();
    shadow.resize(usize::try_from(reader.size).unwrap(), 0);
    let rounds = support::count("NBD_IMG_QCOW2_WRITE_ROUNDS", 12);
    let written = &mut shadow[..first.len()];
    writers::write_all_parts(&server, written, &mut rng, rounds);
    assert_same(&format!("{}: the export after all writers", kind.name), &reader.read_all(), &shadow);
    reader.flush();
    reader.disconnect();
    server.stop();

    qcow2::check_clean(folder, "disk");
    assert_same(&format!("{}: as QEMU reads it", kind.name), &qcow2::content(folder, "disk", None), &shadow);
    if kind.snapshot {
        assert_same(kind.name, &qcow2::content(folder, "disk", Some("first")), &first);
    }
    assert_same("what lies below", &fs::read(folder.join("source")).unwrap(), &first);
}

/// Half of it data, with room for copies that compress, half zeroes.
fn first_content(rng: &mut Rng) -> Vec<u8> {
    let len = usize::try_from(DISK_LEN).unwrap();
    let mut content = rng.bytes(len / 2);
    for chunk in content.chunks_mut(100_000).step_by(2) {
        chunk.fill(0x77);
    }
    content.resize(len, 0);
    content
}

#[test]
fn fio_verifies_qcow2() {
    for (options, sizes) in [("cluster_size=64k", "512-64k"), ("cluster_size=4k", "4k-128k")] {
        let folder = support::scratch("fio-qcow2");
        qemu_img(folder.path(), &format!("create -f qcow2 -o {options} disk 32M"));
        let server = Serve::image(folder.path().join("disk")).format("qcow2").start();
        writers::fio_verifies(folder.path(), &server, sizes);
        server.stop();
        qcow2::check_clean(folder.path(), "disk");
    }
}

#[test]
fn qemu_img_convert_into_an_empty_image_stays_sparse() {
    copies_stay_sparse("convert-qcow2", &|source, server| {
        run(tool("qemu-img")
            .args(["convert", "-n", "-f", "raw", "-O", "raw"])
            .arg(source)
            .arg(server.uri("")));
    });
}

#[test]
fn nbdcopy_into_an_empty_image_stays_sparse() {
    copies_stay_sparse("nbdcopy-qcow2", &|source, server| {
        run(tool("nbdcopy").arg("--flush").arg(source).arg(server.uri("")));
    });
}

/// Copies into an export of nbd-img and one of qemu-nbd: both equal to the source, and ours takes no more of the disk.
fn copies_stay_sparse(test: &str, copy: &dyn Fn(&Path, &Server)) {
    let folder = support::scratch(test);
    let folder = folder.path();
    let source = folder.join("source");
    let expected = sparse_source(&source);
    let used = |image: &str, peer: Peer| {
        qemu_img(folder, &format!("create -f qcow2 {image} {}", expected.len()));
        let server = Serve::image(folder.join(image)).format("qcow2").peer(peer).start();
        copy(&source, &server);
        server.stop();
        qcow2::check_clean(folder, image);
        assert_same(&format!("{test} by {peer:?}"), &qcow2::content(folder, image, None), &expected);
        let file = File::open(folder.join(image)).unwrap();
        file.sync_all().unwrap(); // delayed allocation must not hide anything
        let blocks = file.metadata().unwrap().blocks() * 512;
        eprintln!("{test} {peer:?}: {blocks} bytes on disk");
        blocks
    };
    let theirs = used("yardstick", Peer::QemuNbd);
    assert!(theirs < 16 << 20, "the yardstick itself is not sparse: {theirs}");
    let ours = used("ours", Peer::of_this_run());
    // A file system may round a fragment more or less.
    assert!(ours <= theirs + (256 << 10), "{test}: {ours} bytes on disk, with qemu-nbd {theirs}");
}

/// Trims the first half of a disk and zeroes the other one.
fn trim_and_zero(client: &mut Client, len: u64) {
    for (command, from) in
        [(support::wire::command::TRIM, 0), (support::wire::command::WRITE_ZEROES, len / 2)]
    {
        let request = support::client::Request::new(command, from, usize::try_from(len / 2).unwrap());
        assert_eq!(client.ask(request, &[]).error, 0);
        client.flush();
    }
}

/// What is trimmed and zeroed goes back to the file system, and its clusters are used again.
#[test]
fn trimmed_room_is_given_back() {
    const LEN: u64 = 32 << 20;
    let folder = support::scratch("trim-qcow2");
    let folder = folder.path();
    qemu_img(folder, &format!("create -f qcow2 disk {LEN}"));
    qemu_io(folder, "qcow2", "disk", &[&format!("write -P 0x41 0 {LEN}")]);
    let used = || {
        let file = File::open(folder.join("disk")).unwrap();
        file.sync_all().unwrap();
        file.metadata().unwrap().blocks() * 512
    };
    let full = used();
    assert!(full > LEN, "{full}");
    let file_len = || fs::metadata(folder.join("disk")).unwrap().len();
    let server = Serve::image(folder.join("disk")).format("qcow2").start();
    let mut client = Client::unix(server.socket(), "", Wishes::STRUCTURED);
    let data = Rng::fixed(3).bytes(1 << 20);
    // What was punched is handed out again a moment later. A flush takes longer, but on a busy machine not each time.
    let mut lens = vec![file_len()];
    loop {
        trim_and_zero(&mut client, LEN);
        // A flush is answered before; the time is for a machine that is busy with other things.
        let patience = Instant::now() + Duration::from_secs(60);
        while used() >= LEN / 8 {
            assert!(Instant::now() < patience, "{} bytes on disk of {full}: nothing is given back", used());
            thread::sleep(Duration::from_millis(5));
        }
        client.flush();
        let before = file_len();
        for at in (0..LEN).step_by(data.len()) {
            client.write(at, &data);
        }
        client.flush();
        lens.push(file_len());
        if file_len() <= before + LEN / 8 {
            break;
        }
        assert!(lens.len() <= 5, "freed clusters were not used again: {lens:?}");
    }
    client.disconnect();
    server.stop();
    qcow2::check_clean(folder, "disk");
    let expected = data.repeat(usize::try_from(LEN).unwrap() / data.len());
    assert_same("after writing again", &qcow2::content(folder, "disk", None), &expected);
}
