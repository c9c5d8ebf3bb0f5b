//! `nbd-img bitmap`: what it makes of an image is what qemu-img makes of it, in QEMU's eyes, and QEMU goes on with it.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[allow(dead_code)]
mod support;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::{Value, json};
use support::tools::{output, qemu_img, qemu_io, run, tool};

fn nbd_img(folder: &Path, args: &[&str]) -> Output {
    output(Command::new(env!("CARGO_BIN_EXE_nbd-img")).current_dir(folder).arg("bitmap").args(args))
}

#[track_caller]
fn ok(folder: &Path, args: &[&str]) -> String {
    let output = nbd_img(folder, args);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{args:?}: {said}");
    assert_eq!(said, "", "{args:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// What QEMU says of the bitmaps: name, granularity, flags.
fn seen(folder: &Path, image: &str) -> Value {
    let info: Value =
        serde_json::from_slice(&qemu_img(folder, &format!("info --output=json {image}"))).unwrap();
    info["format-specific"]["data"]["bitmaps"].clone()
}

fn entry(name: &str, granularity: u64, flags: &[&str]) -> Value {
    json!({"name": name, "granularity": granularity, "flags": flags})
}

/// Where QEMU says that a bitmap is dirty.
fn dirty(folder: &Path, image: &str, bitmap: &str) -> Vec<(u64, u64)> {
    let socket = folder.join("nbd.sock");
    let _ = fs::remove_file(&socket);
    let mut server = tool("qemu-nbd")
        .current_dir(folder)
        .args(["--read-only", "--format=qcow2", "--persistent", "--bitmap", bitmap, "--socket"])
        .arg(&socket)
        .arg(image)
        .spawn()
        .unwrap();
    while std::os::unix::net::UnixStream::connect(&socket).is_err() {
        assert!(server.try_wait().unwrap().is_none(), "qemu-nbd has ended");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    let map = format!("--map=qemu:dirty-bitmap:{bitmap}");
    let uri = format!("nbd+unix:///?socket={}", socket.display());
    let map: Value = serde_json::from_slice(&run(tool("nbdinfo").args([&map, "--json", &uri]))).unwrap();
    server.kill().unwrap();
    server.wait().unwrap();
    let extents = map.as_array().unwrap().iter().filter(|extent| extent["type"] == 1);
    extents.map(|extent| (extent["offset"].as_u64().unwrap(), extent["length"].as_u64().unwrap())).collect()
}

#[test]
fn every_command_does_what_qemu_img_does() {
    let folder = support::scratch("cli-bitmap");
    let path = folder.path();
    qemu_img(path, "create -f qcow2 disk 64M");
    ok(path, &["add", "disk", "a"]);
    ok(path, &["add", "disk", "b", "-g", "1M", "--disabled"]);
    ok(path, &["add", "disk", "fine", "--granularity", "512"]);
    let all = json!([entry("a", 65536, &["auto"]), entry("b", 1 << 20, &[]), entry("fine", 512, &["auto"])]);
    assert_eq!(seen(path, "disk"), all);
    // QEMU records in them.
    qemu_io(path, "qcow2", "disk", &["write 3M 64k", "write 9M 512"]);
    assert_eq!(dirty(path, "disk", "a"), [(3 << 20, 65536), (9 << 20, 65536)]);
    assert_eq!(dirty(path, "disk", "fine"), [(3 << 20, 65536), (9 << 20, 512)]);
    assert_eq!(dirty(path, "disk", "b"), []);
    ok(path, &["merge", "disk", "b", "fine"]);
    assert_eq!(dirty(path, "disk", "b"), [(3 << 20, 1 << 20), (9 << 20, 1 << 20)]);
    ok(path, &["disable", "disk", "a"]);
    ok(path, &["enable", "disk", "b"]);
    ok(path, &["clear", "disk", "fine"]);
    assert_eq!(dirty(path, "disk", "fine"), []);
    qemu_io(path, "qcow2", "disk", &["write 20M 512"]);
    assert_eq!(dirty(path, "disk", "a").len(), 2);
    assert_eq!(dirty(path, "disk", "b").len(), 3);
    let all = json!([entry("a", 65536, &[]), entry("b", 1 << 20, &["auto"]), entry("fine", 512, &["auto"])]);
    assert_eq!(seen(path, "disk"), all);
    qemu_img(path, "check disk");
    let listed: Value = serde_json::from_str(&ok(path, &["list", "disk", "--json"])).unwrap();
    assert_eq!(listed, all);
    let listed = ok(path, &["list", "disk"]);
    assert_eq!(listed.lines().count(), 3);
    assert!(listed.contains("1048576  auto          b"), "{listed}");
    for name in ["a", "b", "fine"] {
        ok(path, &["remove", "disk", name]);
        qemu_img(path, "check disk");
    }
    assert_eq!(seen(path, "disk"), Value::Null);
    // Nothing is left of them, and they can come back.
    assert_eq!(ok(path, &["list", "disk"]), "");
    ok(path, &["add", "disk", "a"]);
    assert_eq!(seen(path, "disk"), json!([entry("a", 65536, &["auto"])]));
    qemu_img(path, "bitmap --remove disk a");
    ok(path, &["add", "disk", "again"]);
    qemu_img(path, "check disk");
}

/// A backing file's name may lie where the header has to tell of bitmaps; it moves. Small clusters leave little room.
#[test]
fn the_first_bitmap_finds_room_in_the_header() {
    for options in ["cluster_size=512", "cluster_size=4k", "cluster_size=64k", "cluster_size=2M"] {
        let folder = support::scratch("cli-bitmap-header");
        let path = folder.path();
        qemu_img(path, "create -f qcow2 base 5M");
        qemu_io(path, "qcow2", "base", &["write -P 7 0 5M"]);
        for (image, backing) in [("alone", ""), ("overlay", "-b base -F qcow2")] {
            qemu_img(path, &format!("create -f qcow2 -o {options} {backing} {image} 5M"));
            ok(path, &["add", image, "first", "-g", "64K"]);
            ok(path, &["add", image, "second"]);
            let bitmaps = seen(path, image);
            assert_eq!(bitmaps.as_array().unwrap().len(), 2, "{options} {image}: {bitmaps}");
            qemu_img(path, &format!("check {image}"));
            qemu_io(path, "qcow2", image, &["write -P 9 1M 64k"]);
            assert_eq!(dirty(path, image, "first"), [(1 << 20, 65536)]);
        }
        qemu_io(path, "qcow2", "overlay", &["read -P 7 0 1M", "read -P 9 1M 64k", "read -P 7 2M 3M"]);
        ok(path, &["remove", "overlay", "first"]);
        ok(path, &["remove", "overlay", "second"]);
        qemu_img(path, "check overlay");
        qemu_io(path, "qcow2", "overlay", &["read -P 7 0 1M"]);
    }
}

/// The data file is named by the image, so it is opened and locked, and left alone.
#[test]
fn an_image_with_a_data_file_has_bitmaps() {
    let folder = support::scratch("cli-bitmap-data");
    let path = folder.path();
    qemu_img(path, &format!("create -f qcow2 -o data_file={}/data,data_file_raw=on disk 8M", path.display()));
    ok(path, &["add", "disk", "a"]);
    qemu_io(path, "qcow2", "disk", &["write -P 5 1M 64k"]);
    assert_eq!(dirty(path, "disk", "a"), [(1 << 20, 65536)]);
    ok(path, &["clear", "disk", "a"]);
    assert_eq!(dirty(path, "disk", "a"), []);
    qemu_io(path, "qcow2", "disk", &["read -P 5 1M 64k"]);
    let info: Value = serde_json::from_slice(&qemu_img(path, "info --output=json disk")).unwrap();
    assert_eq!(info["format-specific"]["data"]["data-file-raw"], true);
    ok(path, &["remove", "disk", "a"]);
    qemu_img(path, "check disk");
}

#[test]
fn bitmaps_of_other_images_are_merged() {
    let folder = support::scratch("cli-bitmap-merge");
    let path = folder.path();
    for image in ["one", "two"] {
        qemu_img(path, &format!("create -f qcow2 {image} 64M"));
    }
    qemu_img(path, "create -f qcow2 small 32M");
    ok(path, &["add", "one", "sum", "--disabled"]);
    ok(path, &["add", "two", "x", "-g", "4K"]);
    ok(path, &["add", "two", "y"]);
    qemu_io(path, "qcow2", "two", &["write 1M 4k"]);
    ok(path, &["disable", "two", "y"]);
    qemu_io(path, "qcow2", "two", &["write 5M 4k"]);
    ok(path, &["merge", "one", "sum", "x", "y", "-b", "two", "-F", "qcow2"]);
    assert_eq!(dirty(path, "one", "sum"), [(1 << 20, 65536), (5 << 20, 65536)]);
    qemu_img(path, "check one");
    ok(path, &["add", "small", "z"]);
    let refused = nbd_img(path, &["merge", "one", "sum", "z", "-b", "small"]);
    assert!(!refused.status.success());
    assert!(String::from_utf8_lossy(&refused.stderr).contains("33554432 bytes"), "{refused:?}");
}

/// Whoever was killed leaves a bitmap in use: it can be removed, and nothing else.
#[test]
fn a_bitmap_in_use_is_only_removed() {
    let folder = support::scratch("cli-bitmap-in-use");
    let path = folder.path();
    qemu_img(path, "create -f qcow2 disk 64M");
    ok(path, &["add", "disk", "left"]);
    let bytes = fs::read(path.join("disk")).unwrap();
    let name = bytes.windows(4).rposition(|four| four == b"left").unwrap() as u64;
    File::options().write(true).open(path.join("disk")).unwrap().write_all_at(&[3], name - 24 + 15).unwrap();
    assert_eq!(seen(path, "disk"), json!([entry("left", 65536, &["in-use", "auto"])]));
    for command in ["clear", "enable", "disable"] {
        let refused = nbd_img(path, &[command, "disk", "left"]);
        assert!(!refused.status.success(), "{command}");
        assert!(String::from_utf8_lossy(&refused.stderr).contains("bitmap remove"), "{refused:?}");
    }
    let resized = resize(path, &["disk", "128M"]);
    let said = String::from_utf8_lossy(&resized.stderr);
    assert!(!resized.status.success() && said.contains("'left'") && said.contains("bitmap remove"), "{said}");
    ok(path, &["add", "disk", "new"]);
    assert_eq!(seen(path, "disk")[0], entry("left", 65536, &["in-use", "auto"]));
    ok(path, &["remove", "disk", "left"]);
    assert!(resize(path, &["disk", "128M"]).status.success());
    assert_eq!(seen(path, "disk"), json!([entry("new", 65536, &["auto"])]));
    qemu_img(path, "check disk");
}

fn resize(folder: &Path, args: &[&str]) -> Output {
    output(Command::new(env!("CARGO_BIN_EXE_nbd-img")).current_dir(folder).args(["resize", "-q"]).args(args))
}

/// What becomes of bitmaps when the disk gets another size is what QEMU makes of them, and whoever writes the image then
/// goes on with them.
#[test]
fn bitmaps_follow_the_disk_as_with_qemu() {
    for (options, size, changes) in [
        ("cluster_size=64k", "100M", &["1G", "40G", "12345344", "20M"][..]),
        ("cluster_size=512", "5M", &["5000K", "7M", "1M", "3M"]),
        ("cluster_size=4k,extended_l2=off,refcount_bits=1", "300M", &["100M", "128M", "4M", "1G"]),
    ] {
        let folder = support::scratch("cli-bitmap-resize");
        let path = folder.path();
        qemu_img(path, &format!("create -q -f qcow2 -o {options} ours {size}"));
        qemu_img(path, "bitmap --add -g 512 ours fine");
        qemu_img(path, "bitmap --add ours coarse");
        qemu_io(path, "qcow2", "ours", &["write -z 0 2500k", "write 3M 70k", "write -z 4000k 1000k"]);
        qemu_img(path, "bitmap --disable ours fine");
        qemu_io(path, "qcow2", "ours", &["write 100k 100k", "write 4700k 1k"]);
        for change in changes {
            fs::copy(path.join("ours"), path.join("theirs")).unwrap();
            let what = format!("{options}: {change}");
            let resized = resize(path, &["--shrink", "ours", change]);
            assert!(resized.status.success(), "{what}: {resized:?}");
            qemu_img(path, &format!("resize -q --shrink -f qcow2 theirs {change}"));
            assert_eq!(seen(path, "ours"), seen(path, "theirs"), "{what}");
            for bitmap in ["fine", "coarse"] {
                assert_eq!(dirty(path, "ours", bitmap), dirty(path, "theirs", bitmap), "{what}: {bitmap}");
            }
            qemu_img(path, "check -q ours");
            let server =
                support::server::Serve::image(path.join("ours")).peer(support::server::Peer::NbdImg).start();
            qemu_io(path, "raw", &server.uri(""), &["write -P 5 1000k 10k"]);
            server.stop();
            qemu_io(path, "qcow2", "ours", &["write -P 6 900k 10k", "read -P 5 1000k 10k"]);
        }
    }
}

#[test]
fn what_makes_no_sense_is_refused_and_changes_nothing() {
    let folder = support::scratch("cli-bitmap-refusals");
    let path = folder.path();
    qemu_img(path, "create -f qcow2 disk 64M");
    qemu_img(path, "create -f qcow2 -o compat=0.10 old 64M");
    qemu_img(path, "create -f raw raw 64M");
    ok(path, &["add", "disk", "there"]);
    let long = "x".repeat(1024);
    let before = ["disk", "old", "raw"].map(|image| fs::read(path.join(image)).unwrap());
    for (args, hint) in [
        (&["add", "disk", "there"][..], "already"),
        (&["add", "disk", "x", "-g", "3K"], "power of two"),
        (&["add", "disk", "x", "-g", "256"], "granularity"),
        (&["add", "disk", "x", "-g", "4G"], "granularity"),
        (&["add", "disk", ""], "name"),
        (&["add", "disk", &long], "1023"),
        (&["add", "old", "x"], "version 2"),
        (&["add", "raw", "x"], "qcow2"),
        (&["remove", "disk", "x"], "no bitmap 'x'"),
        (&["clear", "disk", "x"], "no bitmap 'x'"),
        (&["merge", "disk", "there", "x"], "no bitmap 'x'"),
        (&["merge", "disk", "x", "there"], "no bitmap 'x'"),
    ] {
        let refused = nbd_img(path, args);
        assert!(!refused.status.success(), "{args:?}");
        let said = String::from_utf8_lossy(&refused.stderr);
        assert!(said.contains(hint), "{args:?}: {said}");
    }
    let after = ["disk", "old", "raw"].map(|image| fs::read(path.join(image)).unwrap());
    assert!(before == after);
}

/// An image whose bitmaps could take more clusters than a writer keeps track of is not written, says what helps, and that
/// does help.
#[test]
fn too_many_clusters_of_bits_are_refused_and_mended() {
    let folder = support::scratch("cli-bitmap");
    let path = folder.path();
    // 2^16 clusters of bits each, and 2^10 of a table; none of the bits is there.
    qemu_img(path, "create -f qcow2 -o cluster_size=512 disk 128G");
    for number in 0..9 {
        qemu_img(path, &format!("bitmap --add -g 512 disk b{number}"));
    }
    let refused = |args: &[&str]| {
        let output = nbd_img(path, args);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(
            !output.status.success() && said.contains("nbd-img bitmap remove, disable"),
            "{args:?}: {said}"
        );
    };
    refused(&["add", "disk", "another"]);
    refused(&["merge", "disk", "b0", "b1"]);
    let serve = |more: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_nbd-img"));
        let run = ["serve", "disk", "--socket", "none/x.sock"];
        output(command.current_dir(path).args(run).args(more))
    };
    let said = |output: Output| String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said(serve(&[])).contains("could come to take 599040 clusters"));
    assert!(!said(serve(&["--read-only"])).contains("bitmap"));
    ok(path, &["disable", "disk", "b0"]);
    refused(&["enable", "disk", "b0"]);
    ok(path, &["remove", "disk", "b1"]);
    // Seven of 2^16 and their tables, and an eighth that is not recorded.
    ok(path, &["merge", "disk", "b2", "b3"]);
    refused(&["enable", "disk", "b0"]);
    let said = said(serve(&[]));
    assert!(said.contains("none/x.sock") && !said.contains("bitmap"), "it fails for its socket only: {said}");
    qemu_img(path, "check disk");
}

/// An image that is being served has the lock.
#[test]
fn an_image_in_use_is_left_alone() {
    let folder = support::scratch("cli-bitmap-lock");
    let path = folder.path();
    qemu_img(path, "create -f qcow2 disk 64M");
    let server = support::server::Serve::image(path.join("disk")).peer(support::server::Peer::NbdImg).start();
    let refused = nbd_img(path, &["add", "disk", "x"]);
    assert!(!refused.status.success());
    server.stop();
    ok(path, &["add", "disk", "x"]);
}
