//! Compressed images as clients see them: copied, read by many at a time in every order, within the memory that was
//! stated, and damaged in the middle.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[allow(dead_code)]
mod support;

use std::fs;
use std::net::Shutdown;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;

use support::client::{Client, Request, Wishes};
use support::rng::Rng;
use support::server::{Serve, Server};
use support::tools::{qemu_img, run, tool};
use support::wire::command;
use support::{assert_same, proc};

const LEN: usize = 48 << 20;
/// Unless it is said otherwise.
const CLUSTER_LEN: usize = 64 << 10;

/// Half of it random, half of it words: about 2 to 1.
fn content() -> Vec<u8> {
    let mut rng = Rng::fixed(5);
    let words: Vec<Vec<u8>> = (0..200).map(|len| rng.bytes(3 + len % 8)).collect();
    let mut content = Vec::with_capacity(LEN + 4096);
    while content.len() < LEN {
        if rng.below(2) == 0 {
            let len = 1 + rng.below(40_000) as usize;
            content.extend(rng.bytes(len));
        } else {
            (0..4000).for_each(|_| content.extend(&words[rng.below(200) as usize]));
        }
    }
    content.truncate(LEN);
    content
}

/// `qemu-img convert -c` of the content.
fn image(folder: &Path, content: &[u8], options: &str) -> PathBuf {
    fs::write(folder.join("raw"), content).unwrap();
    qemu_img(folder, &format!("convert -c -f raw -O qcow2 -o {options} raw disk"));
    folder.join("disk")
}

fn serve(image: &Path, args: &[&str]) -> Server {
    Serve::image(image).format("qcow2").read_only().args(args).start()
}

#[test]
fn copies_are_right_whatever_the_cache_and_the_compression() {
    let content = content();
    for (options, cache) in [
        ("compression_type=zlib", "64M"),
        ("compression_type=zstd", "1M"),
        ("compression_type=zlib,cluster_size=4k", "0"),
        ("compression_type=zstd,cluster_size=2M", "3M"),
    ] {
        let folder = tempfile::tempdir_in("/dev/shm").unwrap();
        let server = serve(&image(folder.path(), &content, options), &["--cluster-cache", cache]);
        let copy = folder.path().join("copy");
        run(tool("nbdcopy").args([&server.uri(""), copy.to_str().unwrap()]));
        assert_same(options, &fs::read(&copy).unwrap(), &content);
        run(tool("qemu-img")
            .args(["compare", "-f", "raw", "-F", "raw", &server.uri("")])
            .arg(folder.path().join("raw")));
        server.stop();
    }
}

/// In order and at random, small and large, over an overlay too, from several connections at a time.
#[test]
fn many_readers_at_a_time_stay_within_the_cache() {
    let content = content();
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    image(folder.path(), &content, "cluster_size=512k");
    qemu_img(folder.path(), "create -q -f qcow2 -b disk -F qcow2 overlay");
    let overlay = folder.path().join("overlay");
    // All of the disk would be four times more than that. How much is under way at a time is a matter of chance, too.
    let is_right = |[without, with]: &[u64; 2]| *with < without + (20 << 20);
    let mut peaks = Vec::new();
    while peaks.len() < 3 && !peaks.last().is_some_and(is_right) {
        peaks.push(["0", "8M"].map(|cache| peak_of_readers(&overlay, cache, &content)));
    }
    assert!(
        peaks.last().is_some_and(is_right),
        "the server's bytes at its peak, without and with a cache: {peaks:?}"
    );
}

/// The most memory that a server of that has while several clients read.
fn peak_of_readers(image: &Path, cache: &str, content: &[u8]) -> u64 {
    let server = serve(image, &["--cluster-cache", cache]);
    thread::scope(|scope| {
        for index in 0..6 {
            let socket = server.socket();
            scope.spawn(move || {
                let mut client = Client::unix(socket, "", Wishes::STRUCTURED);
                let mut rng = Rng::fixed(index);
                let block = [4 << 10, 256 << 10, 1 << 20][index as usize % 3];
                let mut at = 0;
                for _ in 0..100 {
                    if index < 3 {
                        at = (at + block) % (LEN - block);
                    } else {
                        at = rng.below((LEN - block) as u64) as usize;
                    }
                    assert_same("a read", &client.read(at as u64, block), &content[at..][..block]);
                }
                client.disconnect();
            });
        }
    });
    let peak = proc::peak_len(server.pid());
    server.stop();
    peak
}

/// Who sends no more gets what he has asked for.
#[test]
fn reads_before_a_half_close_are_answered() {
    let content = content();
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let server = serve(&image(folder.path(), &content, "compression_type=zlib"), &[]);
    for round in 0..20 {
        let socket = UnixStream::connect(server.socket()).unwrap();
        let end = socket.try_clone().unwrap();
        let mut client = Client::over(Box::new(socket), "", Wishes::STRUCTURED);
        let offsets = (0..8).map(|index| (round * 8 + index) * 4 * CLUSTER_LEN);
        for at in offsets {
            client.send(Request::new(command::READ, at as u64, 2 * CLUSTER_LEN), &[]).unwrap();
        }
        end.shutdown(Shutdown::Write).unwrap();
        for _ in 0..8 {
            let reply = client.reply().unwrap();
            assert_eq!((reply.error, reply.data.len()), (0, 2 * CLUSTER_LEN), "round {round}");
        }
    }
    server.stop();
}

/// Where the blob of a cluster lies in an image of 64 KiB clusters (specification, "Compressed Clusters Descriptor").
fn blob_at(file: &fs::File, cluster: u64) -> u64 {
    let word = |at: u64| {
        let mut word = [0; 8];
        file.read_exact_at(&mut word, at).unwrap();
        u64::from_be_bytes(word)
    };
    let table = word(word(40)) & 0x00ff_ffff_ffff_fe00;
    let entry = word(table + 8 * cluster);
    assert_eq!(entry >> 62 & 1, 1, "cluster {cluster} is not compressed");
    entry & ((1 << 54) - 1)
}

/// A cluster that cannot be decompressed is an error for whoever reads it, and for nobody else.
#[test]
fn a_broken_blob_fails_the_reads_of_its_cluster() {
    let content = content();
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = image(folder.path(), &content, "compression_type=zlib");
    let bad = 100 * CLUSTER_LEN;
    let file = fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
    // Deflate knows no blocks of type 3.
    file.write_all_at(&[0xff], blob_at(&file, 100)).unwrap();
    let server = serve(&path, &[]);
    let mut client = Client::unix(server.socket(), "", Wishes::SIMPLE);
    for at in (0..LEN).step_by(CLUSTER_LEN) {
        let reply = client.ask(Request::new(command::READ, at as u64, CLUSTER_LEN), &[]);
        assert_eq!(reply.error, if at == bad { libc::EIO as u32 } else { 0 }, "at {at}");
        assert!(at == bad || reply.data == content[at..][..CLUSTER_LEN], "at {at}");
    }
    // It stays one, alone and in a large read.
    for len in [4096, CLUSTER_LEN, 1 << 20] {
        let reply = client.ask(Request::new(command::READ, bad as u64, len), &[]);
        assert_eq!(reply.error, libc::EIO as u32, "{len} bytes");
    }
    let beside = client.read((bad + CLUSTER_LEN) as u64, 1 << 20);
    assert_same("beside it", &beside, &content[bad + CLUSTER_LEN..][..1 << 20]);
    client.disconnect();
    server.stop();
}
