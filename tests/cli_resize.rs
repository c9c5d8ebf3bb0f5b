//! `nbd-img resize`: the same disks as after `qemu-img resize`, sound images, snapshots as they were, and a kill at
//! any moment that leaves one size or the other.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[allow(dead_code)]
mod support;

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use support::scratch;
use support::server::Serve;
use support::tools::{output, qemu_img, qemu_io, run, tool};

fn resize(folder: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nbd-img"));
    command.current_dir(folder).arg("resize").args(args);
    command
}

#[track_caller]
fn same(folder: &Path, what: &str, options: [&str; 4]) {
    let compared =
        output(tool("qemu-img").current_dir(folder).arg("compare").args(options).args(["ours", "theirs"]));
    assert!(compared.status.success(), "{what}: {compared:?}");
    assert_eq!(size_of(folder, "ours"), size_of(folder, "theirs"), "{what}");
}

fn size_of(folder: &Path, name: &str) -> u64 {
    let info = qemu_img(folder, &format!("info --output=json {name}"));
    serde_json::from_slice::<serde_json::Value>(&info).unwrap()["virtual-size"].as_u64().unwrap()
}

#[track_caller]
fn check(folder: &Path, what: &str) {
    let checked = output(tool("qemu-img").current_dir(folder).args(["check", "-f", "qcow2", "ours"]));
    assert!(checked.status.success(), "{what}: {checked:?}");
}

/// How images are made, and how their size changes, step by step.
const QCOW2: [(&str, &str, &[&str]); 12] = [
    ("", "10M", &["20M", "+1000K", "20G", "12M"]),
    ("cluster_size=512", "1M", &["10M", "+100M", "-105M", "512", "3M"]),
    ("cluster_size=512,compat=0.10", "1M", &["+3M", "100K", "2M"]),
    ("cluster_size=1k,refcount_bits=1", "3M", &["100M", "1000K", "1500K"]),
    ("cluster_size=512,refcount_bits=64,preallocation=metadata", "1M", &["64M", "700K", "1M"]),
    ("cluster_size=2M,lazy_refcounts=on", "10M", &["9M", "+3M", "1G", "3M"]),
    ("cluster_size=4k,compression_type=zstd,refcount_bits=8", "3M", &["2500K", "9M"]),
    ("extended_l2=on,cluster_size=16k", "3M", &["1000M"]),
    ("backing_file=base.raw,backing_fmt=raw,cluster_size=4k", "1M", &["3M", "10M", "1M", "5M"]),
    ("backing_file=base.raw,backing_fmt=raw,cluster_size=512,compat=0.10", "1000K", &["2M", "1M", "3M"]),
    ("backing_file=mid,backing_fmt=qcow2", "700K", &["800K", "5M", "500K", "2M"]),
    ("cluster_size=64k", "1234432", &["1300K", "1234432", "5M"]),
];

#[test]
fn disks_are_what_qemu_makes_of_them() {
    for (options, size, changes) in QCOW2 {
        let folder = scratch("resize");
        let dir = folder.path();
        fs::write(dir.join("base.raw"), vec![0xbb; 4 << 20]).unwrap();
        qemu_img(dir, "create -q -f qcow2 -o backing_file=base.raw,backing_fmt=raw mid 4M");
        let with = if options.is_empty() { String::new() } else { format!("-o {options}") };
        qemu_img(dir, &format!("create -q -f qcow2 {with} ours {size}"));
        qemu_io(dir, "qcow2", "ours", &["write -P 1 0 512", "write -P 2 100k 300k", "write -P 3 690k 5k"]);
        fs::copy(dir.join("ours"), dir.join("theirs")).unwrap();
        for change in changes {
            let what = format!("{options} {size} {change}");
            let before = size_of(dir, "ours");
            run(&mut resize(dir, &["-q", "--shrink", "-f", "qcow2", "ours", change]));
            let theirs = output(
                tool("qemu-img")
                    .current_dir(dir)
                    .args(["resize", "-q", "--shrink", "-f", "qcow2", "theirs", change]),
            );
            check(dir, &what);
            let now = size_of(dir, "ours");
            if !theirs.status.success() {
                // It has no way to hide the backing file in version 2.
                assert!(options.contains("backing") && options.contains("compat=0.10"), "{what}: {theirs:?}");
                qemu_io(dir, "qcow2", "ours", &[&format!("read -P 0 {before} {}", now - before)]);
            } else if !what.contains("1234432") {
                // QEMU keeps what lay in the rest of a cluster, we zero it.
                same(dir, &what, ["-f", "qcow2", "-F", "qcow2"]);
            }
            write_at_the_end(dir, &what);
            fs::copy(dir.join("ours"), dir.join("theirs")).unwrap();
        }
    }
}

/// Images with their data in a file beside them, and how their size changes.
const DATA_FILES: [(&str, &str, &[&str]); 5] = [
    ("", "1M", &["1234432", "3M", "300K", "10M", "1000K"]),
    ("data_file_raw=on,", "1M", &["1234432", "3M", "300K", "10M", "1000K"]),
    ("cluster_size=512,", "300K", &["+100M", "5K", "1000K"]),
    ("extended_l2=on,data_file_raw=on,cluster_size=16k,", "1000448", &["2M", "31K", "64M"]),
    ("extended_l2=on,", "1000448", &["2M", "31K", "64M"]),
];

/// The disk is what `qemu-img resize` makes of it, and the data file as long.
#[test]
fn data_files_are_what_qemu_makes_of_them() {
    for (options, size, changes) in DATA_FILES {
        let folder = scratch("resize");
        let [ours, theirs] = ["ours", "theirs"].map(|name| folder.path().join(name));
        for dir in [&ours, &theirs] {
            fs::create_dir(dir).unwrap();
            qemu_img(dir, &format!("create -q -f qcow2 -o {options}data_file=d disk {size}"));
            qemu_io(dir, "qcow2", "disk", &["write -P 1 0 512", "write -P 2 100k 150k"]);
        }
        for change in changes {
            let what = format!("{options}{size} {change}");
            run(&mut resize(&ours, &["-q", "--shrink", "disk", change]));
            qemu_img(&theirs, &format!("resize -q --shrink -f qcow2 disk {change}"));
            let now = size_of(&theirs, "disk");
            let disks = [&ours, &theirs].map(|dir| {
                qemu_img(dir, "check -q -f qcow2 disk");
                qemu_img(dir, "convert -f qcow2 -O raw disk raw");
                fs::read(dir.join("raw")).unwrap()
            });
            assert!(disks[0] == disks[1] && disks[0].len() as u64 == now, "{what}");
            let data = [&ours, &theirs].map(|dir| fs::read(dir.join("d")).unwrap());
            // QEMU makes a raw one longer by whole clusters.
            assert!(data[0].len() as u64 == now && data[1].len() as u64 >= now, "{what}");
            assert!(!options.contains("raw") || data[0] == disks[0], "{what}: the raw file is not the disk");
            for dir in [&ours, &theirs] {
                qemu_io(dir, "qcow2", "disk", &[&format!("write -P 7 {} 3k", now - 4096)]);
            }
        }
    }
}

/// Data at the very end, for the next change to deal with; by nbd-img where it writes such images.
fn write_at_the_end(dir: &Path, what: &str) {
    let size = size_of(dir, "ours");
    if size < 4096 {
        return;
    }
    let command = format!("write -P 77 {} 4096", size - 4096);
    if what.contains("extended_l2") {
        qemu_io(dir, "qcow2", "ours", &[&command]);
    } else {
        let server = Serve::image(dir.join("ours")).start();
        qemu_io(dir, "raw", &server.uri(""), &[&command]);
        server.stop();
    }
    check(dir, what);
}

#[test]
fn what_comes_to_light_is_zero() {
    let folder = scratch("resize");
    let dir = folder.path();
    for (options, odd) in [("cluster_size=64k", "1234432"), ("cluster_size=64k,compat=0.10", "1234432")] {
        qemu_img(dir, &format!("create -q -f qcow2 -o {options} ours 2M"));
        qemu_io(dir, "qcow2", "ours", &["write -P 9 0 2M"]);
        run(&mut resize(dir, &["-q", "--shrink", "ours", odd]));
        check(dir, options);
        run(&mut resize(dir, &["-q", "ours", "4M"]));
        check(dir, options);
        let rest = format!("read -P 0 {odd} {}", (4 << 20) - odd.parse::<u32>().unwrap());
        qemu_io(dir, "qcow2", "ours", &[&format!("read -P 9 0 {odd}"), &rest]);
        fs::remove_file(dir.join("ours")).unwrap();
    }
}

#[test]
fn snapshots_keep_their_disks() {
    let folder = scratch("resize");
    let dir = folder.path();
    for (options, change) in
        [("cluster_size=512", "5M"), ("cluster_size=512", "300K"), ("cluster_size=4k", "100K")]
    {
        qemu_img(dir, &format!("create -q -f qcow2 -o {options} ours 1M"));
        qemu_io(dir, "qcow2", "ours", &["write -P 1 0 1M"]);
        qemu_img(dir, "snapshot -c first ours");
        qemu_io(dir, "qcow2", "ours", &["write -P 2 200k 500k"]);
        run(&mut resize(dir, &["-q", "--shrink", "ours", change]));
        check(dir, change);
        // With its own size, which qemu-img does not give it.
        let server = Serve::image(dir.join("ours")).args(&["--load-snapshot", "first"]).start();
        run(tool("qemu-img").current_dir(dir).args([
            "convert",
            "-f",
            "raw",
            "-O",
            "raw",
            &server.uri(""),
            "snapshot.raw",
        ]));
        server.stop();
        assert!(fs::read(dir.join("snapshot.raw")).unwrap() == vec![1; 1 << 20], "{change}");
        // What the snapshot has in tables that both share does not come back.
        run(&mut resize(dir, &["-q", "ours", "6M"]));
        check(dir, change);
        let size =
            if change == "5M" { 1 << 20 } else { change.trim_end_matches('K').parse::<u64>().unwrap() << 10 };
        qemu_io(
            dir,
            "qcow2",
            "ours",
            &["read -P 1 0 100k", &format!("read -P 0 {size} {}", (6 << 20) - size)],
        );
        fs::remove_file(dir.join("ours")).unwrap();
    }
}

#[test]
fn room_is_given_back_and_raw_files_are_cut() {
    let folder = scratch("resize");
    let dir = folder.path();
    qemu_img(dir, "create -q -f qcow2 ours 20M");
    qemu_io(dir, "qcow2", "ours", &["write -P 1 0 20M"]);
    run(&mut resize(dir, &["--shrink", "ours", "-19M"]));
    assert!(fs::metadata(dir.join("ours")).unwrap().len() < 2 << 20);
    fs::write(dir.join("raw"), vec![7; 1000]).unwrap();
    for (change, len) in [("+24", 1024), ("1M", 1 << 20), ("-1048064", 512)] {
        let said = run(&mut resize(dir, &["--shrink", "-f", "raw", "raw", change]));
        assert_eq!(fs::metadata(dir.join("raw")).unwrap().len(), len);
        assert!(String::from_utf8(said).unwrap().contains(&format!("{len} now")));
    }
    assert_eq!(fs::read(dir.join("raw")).unwrap(), vec![7; 512]);
}

#[test]
fn what_is_not_done_is_said_and_nothing_is_touched() {
    let folder = scratch("resize");
    let dir = folder.path();
    qemu_img(dir, "create -q -f qcow2 plain 1M");
    qemu_img(dir, "create -q -f qcow2 -o cluster_size=512 small 1M");
    qemu_img(dir, "create -q -f qcow2 broken 1M");
    qemu_io(dir, "qcow2", "broken", &["write 0 64k"]);
    let mut bytes = fs::read(dir.join("broken")).unwrap();
    // An entry of the L1 table leads out of the file.
    bytes[0x30002] = 0x70;
    fs::write(dir.join("broken"), bytes).unwrap();
    for (args, hint) in [
        ("plain 512K", "--shrink"),
        ("plain -512K", "--shrink"),
        ("plain -2M --shrink", "1048576"),
        ("plain 16E", "2^64"),
        ("plain 9E", "by that much"),
        ("plain 1X", "size"),
        ("small 1T", "clusters of 512"),
        ("broken --shrink 512K", "check --repair all"),
        ("missing 1M", "missing"),
    ] {
        let name = args.split(' ').next().unwrap();
        let before = fs::read(dir.join(name)).ok();
        let said = output(resize(dir, &[]).args(args.split(' ')));
        let text = String::from_utf8(said.stderr).unwrap();
        assert!(!said.status.success() && text.contains(hint), "{args}: {text}");
        assert!(fs::read(dir.join(name)).ok() == before, "{args}: it was written");
    }
    let server = Serve::image(dir.join("plain")).start();
    let said = output(&mut resize(dir, &["plain", "2M"]));
    assert!(!said.status.success() && String::from_utf8_lossy(&said.stderr).contains("lock"));
    server.stop();
}

/// Whatever the moment, the image is of one size or the other, and has lost nothing.
#[test]
fn a_kill_leaves_one_size_or_the_other() {
    let folder = scratch("resize");
    let dir = folder.path();
    qemu_img(dir, "create -q -f qcow2 -o cluster_size=512 image 4M");
    qemu_io(dir, "qcow2", "image", &["write -P 5 0 4M"]);
    for number in 0..40 {
        fs::copy(dir.join("image"), dir.join("ours")).unwrap();
        let size = if number % 2 == 0 { "40M" } else { "1M" };
        let mut child = resize(dir, &["-q", "--shrink", "ours", size]).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(number));
        child.kill().unwrap();
        child.wait().unwrap();
        let checked = output(tool("qemu-img").current_dir(dir).args(["check", "-f", "qcow2", "ours"]));
        let dirty = fs::read(dir.join("ours")).unwrap()[79] & 1 != 0;
        assert!(dirty || matches!(checked.status.code(), Some(0 | 3)), "{number}: {checked:?}");
        let server = Serve::image(dir.join("ours")).start();
        qemu_io(dir, "raw", &server.uri(""), &["read -P 5 0 1M", "write -P 6 1000k 10k"]);
        server.stop();
        let checked = output(tool("qemu-img").current_dir(dir).args(["check", "-f", "qcow2", "ours"]));
        assert!(matches!(checked.status.code(), Some(0 | 3)), "{number}: {checked:?}");
    }
}
