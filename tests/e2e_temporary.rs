//! `serve --temporary`: clients write, everybody sees it, and the image stays byte for byte what it was.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[allow(dead_code)]
mod support;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use support::scratch;
use support::server::{Export, Serve};
use support::tools::{output, qemu_img, qemu_io, run, tool};

fn names(folder: &Path) -> Vec<String> {
    fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

/// A base, an overlay on it, and a raw disk of an odd size.
fn images(dir: &Path) {
    qemu_img(dir, "create -q -f qcow2 base 8M");
    qemu_io(dir, "qcow2", "base", &["write -P 1 0 4M"]);
    qemu_img(dir, "create -q -f qcow2 -b base -F qcow2 -o cluster_size=4k top");
    qemu_io(dir, "qcow2", "top", &["write -P 2 1M 1M"]);
    qemu_img(dir, "snapshot -c then top");
    qemu_io(dir, "qcow2", "top", &["write -P 3 1M 64k"]);
    fs::write(dir.join("raw"), vec![4; 3_000_100]).unwrap();
    fs::create_dir(dir.join("tmp")).unwrap();
}

#[test]
fn writes_are_seen_and_thrown_away() {
    let folder = scratch("temporary");
    let dir = folder.path();
    images(dir);
    let tmp = dir.join("tmp");
    for (image, format, first) in [("top", "qcow2", 3), ("base", "qcow2", 1), ("raw", "raw", 4)] {
        let path = dir.join(image);
        let before = (fs::read(&path).unwrap(), fs::metadata(&path).unwrap().mtime_nsec());
        for _ in 0..2 {
            let server = Serve::image(&path)
                .format(format)
                .args(&["--temporary", "--temporary-dir", tmp.to_str().unwrap()])
                .start();
            // Nothing of the round before is left.
            let old = format!("read -P {first} 1M 64k");
            qemu_io(
                dir,
                "raw",
                &server.uri(""),
                &[&old, "write -P 9 1M 700k", "write -z 10k 900k", "discard 2M 64k", "flush"],
            );
            let seen = ["read -P 9 1M 700k", "read -P 0 10k 900k"];
            qemu_io(dir, "raw", &server.uri(""), &seen);
            assert!(names(&tmp).is_empty(), "{image}: the temporary file has a name");
            // Others may read it, and nobody may write it.
            run(tool("qemu-img").current_dir(dir).args(["info", image]));
            let writer =
                output(tool("qemu-io").current_dir(dir).args(["-f", format, "-c", "write 0 512", image]));
            assert!(!writer.status.success(), "{image}: QEMU writes it meanwhile");
            server.stop();
        }
        let after = (fs::read(&path).unwrap(), fs::metadata(&path).unwrap().mtime_nsec());
        assert!(after == before, "{image} was written");
    }
    assert!(names(&tmp).is_empty());
}

#[test]
fn each_export_has_its_own_and_a_snapshot_can_be_written_on() {
    let folder = scratch("temporary");
    let dir = folder.path();
    images(dir);
    let before = fs::read(dir.join("top")).unwrap();
    let file = |what: &str| format!("name={what},file={},temporary", dir.join("top").display());
    let snapshot = format!("{},load-snapshot=then", file("then"));
    let server = Serve::exports(Vec::<Export>::new())
        .args(&["--export", &file("a"), "--export", &file("b"), "--export", &snapshot])
        .start();
    qemu_io(dir, "raw", &server.uri("a"), &["read -P 3 1M 64k", "write -P 5 0 1M"]);
    qemu_io(dir, "raw", &server.uri("b"), &["read -P 1 0 1M", "write -P 6 0 1M"]);
    qemu_io(dir, "raw", &server.uri("then"), &["read -P 2 1M 64k", "read -P 1 0 1M", "write -P 7 0 1M"]);
    qemu_io(dir, "raw", &server.uri("a"), &["read -P 5 0 1M"]);
    qemu_io(dir, "raw", &server.uri("then"), &["read -P 7 0 1M"]);
    server.stop();
    assert!(fs::read(dir.join("top")).unwrap() == before);
}

/// Whatever becomes of it is thrown away: nothing of it is synced.
#[test]
fn nothing_is_made_durable() {
    let folder = scratch("temporary");
    let dir = folder.path();
    images(dir);
    let trace = dir.join("trace");
    let server = Serve::image(dir.join("top"))
        .wrapper(&[
            "strace",
            "-D",
            "-f",
            "-e",
            "trace=fsync,fdatasync,sync_file_range",
            "-o",
            trace.to_str().unwrap(),
        ])
        .args(&["--temporary", "--temporary-dir", dir.join("tmp").to_str().unwrap(), "--aio", "threads"])
        .start();
    qemu_io(dir, "raw", &server.uri(""), &["write -P 9 1M 700k", "write -f -P 8 0 4k", "flush"]);
    server.stop();
    // The tracer sees the end a moment after us.
    let ended = || fs::read_to_string(&trace).unwrap_or_default().contains("+++ exited with 0 +++");
    for _ in 0..100 {
        if ended() {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    assert!(ended(), "the tracer saw no end");
    let trace = fs::read_to_string(trace).unwrap();
    assert!(!trace.contains("sync("), "{trace}");
}

#[test]
fn what_makes_no_sense_is_said() {
    let folder = scratch("temporary");
    let dir = folder.path();
    images(dir);
    for (args, hint) in [
        (&["--temporary", "--read-only"][..], "--read-only"),
        (&["--temporary-dir", "/var/tmp"], "--temporary"),
        (&["--temporary", "--temporary-dir", "/nowhere"], "/nowhere"),
    ] {
        let refusal = Serve::image(dir.join("top")).args(args).start_refused();
        assert!(refusal.stderr.contains(hint), "{args:?}: {}", refusal.stderr);
    }
}
