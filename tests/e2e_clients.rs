//! Whole programs of others as clients: a storage migration by QEMU's mirror job while the disk is written to, libguestfs
//! looking into the sample, and a captive server below libnbd's tools.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[allow(dead_code)]
mod support;

use std::fs::{self, File};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use serde_json::json;
use support::assert_same;
use support::client::{Client, Request, Wishes};
use support::qmp::StorageDaemon;
use support::rng::Rng;
use support::server::{Serve, Server};
use support::tools::{run, tool};
use support::wire::command;

const DISK_LEN: usize = 48 << 20;

#[test]
fn blockdev_mirror_in_the_background() {
    mirror("mirror-background", "raw", "background");
}

#[test]
fn blockdev_mirror_blocking_writes() {
    mirror("mirror-write-blocking", "raw", "write-blocking");
}

#[test]
fn blockdev_mirror_into_a_mapping() {
    mirror("mirror-mmap", "mmap-raw", "background");
}

/// The disk of a running guest moves into an export, as in a migration without shared storage: the guest (a client of the
/// storage daemon) writes before, during and after the switch.
fn mirror(test: &str, format: &str, copy_mode: &str) {
    let folder = support::scratch(test);
    let (source, target) = (folder.path().join("source"), folder.path().join("target"));
    let mut rng = Rng::new(test);
    let mut shadow = rng.bytes(DISK_LEN);
    shadow[10 << 20..20 << 20].fill(0);
    fs::write(&source, &shadow).unwrap();
    File::create_new(&target).unwrap().set_len(DISK_LEN as u64).unwrap();
    let server = Serve::image(&target).format(format).start();
    let mut daemon = start_daemon(folder.path(), &server);

    let over = AtomicBool::new(false);
    let guest_socket = folder.path().join("guest.sock");
    let guest = Client::unix(&guest_socket, "disk", Wishes::STRUCTURED);
    let (mut guest, shadow) = thread::scope(|scope| {
        let writer = scope.spawn(|| write_until(guest, shadow, rng, &over));
        daemon.execute(
            "blockdev-mirror",
            &json!({ "job-id": "move", "device": "source", "target": "target", "sync": "full", "copy-mode": copy_mode,
                "buf-size": 1 << 20 }),
        );
        daemon.wait_for("BLOCK_JOB_READY");
        daemon.execute("block-job-complete", &json!({ "device": "move" }));
        let end = daemon.wait_for("BLOCK_JOB_COMPLETED");
        over.store(true, Ordering::Relaxed);
        assert!(end.get("error").is_none(), "the mirror failed: {end}");
        assert_eq!(end["offset"], end["len"], "{end}");
        writer.join().unwrap()
    });
    // The guest's disk is the export now: what it reads and writes from here on comes to it through QEMU.
    guest.write(123_456, b"after the move");
    let mut shadow = shadow;
    shadow[123_456..123_470].copy_from_slice(b"after the move");
    guest.flush();
    drop(guest);
    drop(daemon);
    let mut client = Client::unix(server.socket(), "", Wishes::STRUCTURED);
    assert_same("the export after the move", &client.read_all(), &shadow);
    client.disconnect();
    server.stop();
    assert_same("the file after the move", &fs::read(&target).unwrap(), &shadow);
}

fn start_daemon(folder: &Path, server: &Server) -> StorageDaemon {
    let socket = server.socket().display();
    let args = [
        "--blockdev",
        "driver=file,node-name=source,filename=source",
        "--blockdev",
        &format!("driver=nbd,node-name=target,server.type=unix,server.path={socket},export="),
        "--nbd-server",
        "addr.type=unix,addr.path=guest.sock",
        "--export",
        "type=nbd,id=guest,node-name=source,name=disk,writable=on",
    ];
    StorageDaemon::start(folder, &args.map(String::from))
}

/// Writes and zeroes until told to stop; gives back what the disk must hold.
fn write_until(mut guest: Client, mut shadow: Vec<u8>, mut rng: Rng, over: &AtomicBool) -> (Client, Vec<u8>) {
    let mut writes = 0;
    while !over.load(Ordering::Relaxed) {
        let len = usize::try_from(rng.in_range(1..100_000)).unwrap();
        let at = usize::try_from(rng.below((DISK_LEN - len) as u64)).unwrap();
        if rng.one_in(4) {
            shadow[at..at + len].fill(0);
            let reply = guest.ask(Request::new(command::WRITE_ZEROES, at as u64, len), &[]);
            assert_eq!(reply.error, 0, "{}", reply.text);
        } else {
            let data = rng.bytes(len);
            guest.write(at as u64, &data);
            shadow[at..at + len].copy_from_slice(&data);
        }
        writes += 1;
    }
    assert!(writes > 10, "only {writes} writes during the move: it proves nothing");
    (guest, shadow)
}

/// guestfish boots an appliance (a small Linux below QEMU, here always emulated, so that it needs no /dev/kvm) with the
/// export as its disk. It takes some 15 s.
#[test]
fn guestfish_lists_the_sample() {
    let server = Serve::image(support::testdata("sample.qcow2")).read_only().start();
    let uri = format!("nbd://?socket={}", server.socket().display());
    let out = run(tool("guestfish")
        .env("LIBGUESTFS_BACKEND", "direct")
        .env("LIBGUESTFS_BACKEND_SETTINGS", "force_tcg")
        .args(["--ro", "--format=raw", "-a", &uri, "-m", "/dev/sda"])
        .args(["find", "/", ":", "checksums-out", "sha256", "/", "-"]));
    let text = String::from_utf8(out).unwrap();
    let expected = fs::read_to_string(support::testdata("sample.files")).unwrap();
    for line in expected.lines() {
        let (sum, file) = line.split_once("  ").unwrap();
        assert!(text.lines().any(|line| line == &file[1..]), "{file} is not in the list:\n{text}");
        assert!(
            text.lines().any(|line| line == format!("{sum}  .{file}")),
            "{file} has other content:\n{text}"
        );
    }
    server.stop();
}

#[test]
fn the_sample_is_what_its_checksum_says() {
    let server = Serve::image(support::testdata("sample.qcow2")).read_only().start();
    let folder = support::scratch("sample");
    let copy = folder.path().join("copy");
    run(tool("nbdcopy").arg(server.uri("")).arg(&copy));
    let sum = run(std::process::Command::new("sha256sum").arg(&copy));
    let expected = fs::read_to_string(support::testdata("sample.sha256")).unwrap();
    assert_eq!(String::from_utf8(sum).unwrap()[..64], expected[..64]);
    server.stop();
}

/// `nbdcopy -- [ nbd-img serve ... ]`: the tool starts the server itself and passes it a socket that listens already.
#[test]
fn captive_below_nbdcopy() {
    let folder = support::scratch("captive");
    let copy = folder.path().join("copy");
    let mut command = tool("nbdcopy");
    command.args(["--", "["]);
    if support::is_nbd_img() {
        command.args([env!("CARGO_BIN_EXE_nbd-img"), "serve", "--read-only"]);
    } else {
        command.args(["qemu-nbd", "--read-only", "--format=qcow2"]);
    }
    run(command.arg(support::testdata("sample.qcow2")).arg("]").arg(&copy));
    let expected = folder.path().join("expected");
    run(tool("qemu-img")
        .args(["convert", "-O", "raw"])
        .arg(support::testdata("sample.qcow2"))
        .arg(&expected));
    assert_same("the captive server", &fs::read(copy).unwrap(), &fs::read(expected).unwrap());
}
