//! Whole programs of others as clients: a storage migration by QEMU's mirror job while the disk is written to, libguestfs
//! looking into the sample, nbd-client's list, and a captive server below libnbd's tools.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[allow(dead_code)]
mod support;

use std::fs::{self, File};

use support::certificates::{self, Authority, SERVER};
use support::client::{Client, Wishes};
use support::rng::Rng;
use support::server::{Export, Serve, Server};
use support::tools::{output, run, tool};
use support::{assert_same, migration};

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

fn mirror(test: &str, format: &str, copy_mode: &str) {
    let folder = support::scratch(test);
    let target = folder.path().join("target");
    File::create_new(&target).unwrap().set_len(migration::DISK_LEN as u64).unwrap();
    let server = Serve::image(&target).format(format).start();
    let shadow = migration::mirror(folder.path(), &server, Rng::new(test), copy_mode);
    let mut client = Client::unix(server.socket(), "", Wishes::STRUCTURED);
    assert_same("the export after the move", &client.read_all(), &shadow);
    client.disconnect();
    server.stop();
    assert_same("the file after the move", &fs::read(&target).unwrap(), &shadow);
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

/// The program of the kernel's client lists exports; Debian's knows no TLS, so it is not told them where that is
/// required.
#[test]
fn nbd_client_lists_exports() {
    let folder = support::scratch("nbd-client");
    let export = |name: &str| {
        let file = folder.path().join(name);
        File::create_new(&file).unwrap().set_len(1 << 20).unwrap();
        Export { file, name: name.to_owned(), format: Some("raw".to_owned()), read_only: true }
    };
    let exports = vec![export("first"), export("second")];
    let list = |server: &Server| {
        let output = output(tool("nbd-client").arg("-l").arg("-unix").arg(server.socket()));
        (output.status.success(), String::from_utf8_lossy(&output.stdout).into_owned())
    };
    let server = Serve::exports(exports.clone()).start();
    let (success, text) = list(&server);
    assert!(success && text.ends_with("first\nsecond\n"), "{text}");
    server.stop();
    certificates::server_folder(folder.path(), &Authority::new("a CA"), SERVER);
    let server = Serve::exports(exports).args(&["--tls-dir", folder.path().to_str().unwrap()]).start();
    let (success, text) = list(&server);
    assert!(!success && !text.contains("first"), "{text}");
    server.stop();
}
