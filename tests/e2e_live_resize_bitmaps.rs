//! Dirty bitmaps of a disk that is resized while it is served: clients are told what QEMU says of the same disk, and QEMU
//! finds the same in the image afterwards.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[allow(dead_code)]
mod support;

use std::fs;
use std::path::Path;
use std::time::Duration;

use rustix::process::Signal;
use support::client::{Client, Request, Wishes};
use support::served::Served;
use support::server::{Peer, Serve, Server};
use support::tools::{qemu_img, qemu_io, run, tool};
use support::{qcow2, scratch, wire};

const MIB: u64 = 1 << 20;
/// `off` is disabled.
const BITMAPS: [&str; 3] = ["fine", "coarse", "off"];

/// A disk of 10 MiB with bitmaps that have recorded something.
fn make(dir: &Path, options: &str) {
    qemu_img(dir, &format!("create -q -f qcow2 {options} disk 10M"));
    qemu_img(dir, "bitmap --add -g 64k disk coarse");
    qemu_img(dir, "bitmap --add -g 512 disk off");
    qemu_io(dir, "qcow2", "disk", &["write -P 1 5000k 1M", "write -P 2 9M 1M"]);
    qemu_img(dir, "bitmap --disable disk off");
    qemu_img(dir, "bitmap --add -g 512 disk fine");
    qemu_io(dir, "qcow2", "disk", &["write -P 3 3M 3k"]);
}

fn with_bitmaps(serve: Serve) -> Serve {
    let args = BITMAPS.map(|name| format!("--bitmap={name}"));
    let args = args.each_ref().map(String::as_str);
    serve.args(&args).qemu_args(&args)
}

/// What a server says of the bitmaps.
fn maps(server: &Server) -> Vec<String> {
    let map = |name: &str| {
        let context = format!("--map=qemu:dirty-bitmap:{name}");
        String::from_utf8(run(tool("nbdinfo").args([&context, &server.uri("")]))).unwrap()
    };
    BITMAPS.map(map).to_vec()
}

/// What qemu-nbd says of those of an image.
fn maps_by_qemu(dir: &Path) -> Vec<String> {
    let serve = with_bitmaps(Serve::image(dir.join("disk")).format("qcow2").read_only());
    let server = serve.peer(Peer::QemuNbd).start();
    let maps = maps(&server);
    server.stop();
    maps
}

fn flags(dir: &Path) -> Vec<(String, Vec<String>)> {
    qcow2::bitmap_flags(dir, "disk")
}

/// Larger and smaller, to ends of granules, clusters of bits and tables, and not; with writes up to the new end.
#[test]
fn dirty_bitmaps_follow_as_qemu_has_it() {
    for options in ["", "-o cluster_size=512", "-o cluster_size=16k,extended_l2=on"] {
        let (folder, other) = (scratch("resize-bitmaps"), scratch("resize-bitmaps"));
        let (dir, theirs) = (folder.path(), other.path());
        make(dir, options);
        fs::copy(dir.join("disk"), theirs.join("disk")).unwrap();
        let before = flags(dir);
        let serve = with_bitmaps(Serve::image(dir.join("disk")).format("qcow2"));
        let served = Served::start(serve, dir);
        assert_eq!(maps(&served.server), maps_by_qemu(theirs));
        for (kib, write) in [
            (20 << 10, "write -P 4 15M 100k"),
            (9 * 1024 + 530, "write -P 5 9M 530k"),
            (64 << 10, "write -z -u 60M 4M"),
            (5 << 10, "discard 1M 1M"),
            (5 * 1024 + 1, "write -P 6 5M 1k"),
            (40 << 10, "write -P 7 39M 3k"),
        ] {
            // Whoever was told a larger size is gone a moment later.
            served.resized_in_time(&["--shrink", &format!("{kib}K")]);
            qemu_img(theirs, &format!("resize -q --shrink -f qcow2 disk {kib}K"));
            let resized = maps(&served.server);
            assert_eq!(resized, maps_by_qemu(theirs), "{options}: {kib} KiB");
            qemu_io(dir, "raw", &served.server.uri(""), &[write]);
            qemu_io(theirs, "qcow2", "disk", &[write]);
            let written = maps(&served.server);
            assert_eq!(written, maps_by_qemu(theirs), "{options}: {kib} KiB, {write}");
            assert_ne!(resized, written);
        }
        served.server.stop();
        qcow2::check_clean(dir, "disk");
        assert_eq!(flags(dir), before);
        assert_eq!(maps_by_qemu(dir), maps_by_qemu(theirs), "{options}: in the image");
        // It goes on where it was stored.
        qemu_img(dir, "resize -q -f qcow2 disk 50M");
        qemu_img(theirs, "resize -q -f qcow2 disk 50M");
        assert_eq!(maps_by_qemu(dir), maps_by_qemu(theirs), "{options}: resized by QEMU");
    }
}

/// Who is connected asks for bits of the size that he was told, before and after.
#[test]
fn a_client_goes_on_asking() {
    let folder = scratch("resize-bitmaps");
    let dir = folder.path();
    make(dir, "");
    let served = Served::start(with_bitmaps(Serve::image(dir.join("disk")).format("qcow2")), dir);
    let contexts = &["qemu:dirty-bitmap:fine", "qemu:dirty-bitmap:off"];
    let wishes = Wishes { structured: true, extended: true, contexts };
    let mut client = Client::unix(served.server.socket(), "", wishes);
    let mut ask = || {
        let reply = client.ask(Request::new(wire::command::BLOCK_STATUS, 0, 10 * 1024 * 1024), &[]);
        assert_eq!(reply.error, 0, "{}", reply.text);
        reply.contexts
    };
    let before = ask();
    served.resized(&["33M"]);
    assert_eq!(ask(), before);
    qemu_io(dir, "raw", &served.server.uri(""), &["write -P 4 32M 1M"]);
    assert_eq!(ask(), before);
    qemu_io(dir, "raw", &served.server.uri(""), &["write -P 4 1M 1M"]);
    assert_ne!(ask(), before);
    client.disconnect();
    served.server.stop();
    qcow2::check_clean(dir, "disk");
}

/// A server that is killed leaves all of them in use, for a full backup, and a disk of the new size.
#[test]
fn a_kill_leaves_them_in_use() {
    let folder = scratch("resize-bitmaps");
    let dir = folder.path();
    make(dir, "");
    let mut served = Served::start(Serve::image(dir.join("disk")).format("qcow2"), dir);
    served.resized(&["33M"]);
    served.server.signal(Signal::KILL);
    served.server.wait(Duration::from_secs(30));
    qcow2::wait_until_let_go(dir, "disk");
    qcow2::check(dir, "disk");
    assert!(flags(dir).iter().all(|(_, flags)| flags.contains(&"in-use".to_owned())), "{:?}", flags(dir));
    let info: serde_json::Value = serde_json::from_slice(&qemu_img(dir, "info --output=json disk")).unwrap();
    assert_eq!(info["virtual-size"], 33 * MIB);
}
