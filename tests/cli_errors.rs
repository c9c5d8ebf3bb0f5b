//! Command lines that make no sense, and images and places that cannot be used: what is said, with which status, and
//! that nothing is left behind.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[allow(dead_code)]
mod support;

use std::fs;
use std::path::Path;
use std::process::Command;

use support::scratch;
use support::tools::output;

const USAGE: i32 = 2;
const FAILED: i32 = 1;

/// A folder with an image `a.img`, a folder `folder` and nothing else.
fn folder() -> tempfile::TempDir {
    let folder = scratch("errors");
    fs::File::create(folder.path().join("a.img")).unwrap().set_len(1 << 20).unwrap();
    fs::create_dir(folder.path().join("folder")).unwrap();
    folder
}

/// Runs `nbd-img` and wants it to refuse with `status` and, on one line of stderr, all of `hints`.
#[track_caller]
fn refused(folder: &Path, args: &[&str], status: i32, hints: &[&str]) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nbd-img"));
    let out = output(command.current_dir(folder).args(args));
    let stderr = String::from_utf8(out.stderr).unwrap();
    assert_eq!(out.status.code(), Some(status), "{args:?}: {stderr}");
    assert!(out.stdout.is_empty(), "{args:?} wrote to stdout");
    for hint in hints {
        assert!(stderr.contains(hint), "{args:?} does not say {hint:?}: {stderr}");
    }
    let mut left: Vec<_> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    left.sort();
    assert_eq!(left, ["a.img", "folder"], "{args:?} left something behind");
}

#[test]
fn contradictions_are_usage_errors() {
    let folder = folder();
    for (args, hints) in [
        (&["serve"][..], &["no image", "--export"][..]),
        (&["serve", "a.img", "b.img"], &["a.img", "b.img", "--export"]),
        (&["serve", "-r", "--export", "name=a,file=a.img"], &["--read-only", "for one image"]),
        (&["serve", "--export", "name=a"], &["--export name=a", "file=PATH is missing"]),
        (&["serve", "--export", "name=a,file=a.img,speed=9"], &["speed is not a key", "read-only"]),
        (&["serve", "--export", "name=a,file=a.img", "--export", "name=a,file=b"], &["two exports", "\"a\""]),
        (&["serve", "a.img", "--size", "big"], &["--size", "\"big\" is not a size"]),
        (&["serve", "a.img", "--listen", "nowhere"], &["--listen", "port is needed"]),
        (&["serve", "a.img", "--listen", "::1:10809"], &["brackets"]),
        (&["serve", "a.img", "--format", "vmdk"], &["--format", "raw, qcow2, mmap-raw"]),
        (&["serve", "a.img", "--cache", "unsafe"], &["--cache", "writeback"]),
        (&["serve", "a.img", "--max-connections", "0"], &["--max-connections"]),
        (&["serve", "a.img", "--ready-fd", "1"], &["--ready-fd"]),
        (&["serve", "a.img", "--drain-timeout=-1"], &["--drain-timeout"]),
        (&["serve", "a.img", "--force-share"], &["a.img", "--read-only"]),
        (&["serve", "a.img", "--format", "mmap-raw", "--cache", "none"], &["a.img", "--cache writeback"]),
        (&["serve", "a.img", "--no-such-flag", "x"], &["--no-such-flag"]),
        (&["serve", "a.img", "--tls", "required"], &["--tls-dir", "nbd-img tls init"]),
        (&["serve", "a.img", "--tls-cert", "x"], &["--tls-key"]),
        (&["serve", "a.img", "--tls-dir", "x", "--tls-ca", "y"], &["--tls-ca"]),
        (&["serve", "a.img", "--tls-verify-peer", "on", "--tls-cert", "x", "--tls-key", "y"], &["--tls-ca"]),
        (
            &["serve", "--tls-dir", "x", "--tls", "off", "--export", "name=a,file=a,tls-required"],
            &["tls-required"],
        ),
        (&["info"], &["IMAGE"]),
        (&["mount", "a.img"], &["mount"]),
    ] {
        refused(folder.path(), args, USAGE, hints);
    }
}

#[test]
fn places_that_cannot_be_listened_on() {
    let folder = folder();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = taken.local_addr().unwrap().to_string();
    let long = "x".repeat(108);
    for (args, hints) in [
        (&["--listen", "0.0.0.0:0"][..], &["tcp:0.0.0.0:0", "--allow-plaintext"][..]),
        (&["--listen", "[::]:0"], &["tcp:[::]:0", "--allow-plaintext"]),
        (&["--listen", &taken], &[&taken, "another program listens"]),
        (&["--listen", "192.0.2.1:0", "--allow-plaintext"], &["192.0.2.1"]),
        (&["--socket", &long], &["108 bytes", "107"]),
        (&["--socket", "folder"], &["unix:folder", "not a socket"]),
        (&["--socket", "a.img"], &["unix:a.img", "not a socket"]),
        (&["--socket", "nowhere/s"], &["unix:nowhere/s", "No such file"]),
        (&["--socket", "s", "--pid-file", "nowhere/pid"], &["--pid-file nowhere/pid", "No such file"]),
        (&["--socket", "s", "--ready-fd", "99"], &["--ready-fd", "99"]),
    ] {
        refused(folder.path(), &[&["serve", "a.img", "--format", "raw"], args].concat(), FAILED, hints);
    }
}

#[test]
fn images_that_cannot_be_served() {
    let folder = folder();
    for (args, hints) in [
        (&["missing.img"][..], &["missing.img", "No such file"][..]),
        (&["folder"], &["folder"]),
        (&["/dev/null"], &["/dev/null"]),
        (&["a.img", "--offset", "2M"], &["a.img", "--offset"]),
        (&["a.img", "--size", "2M"], &["a.img", "--size"]),
        (&["a.img", "--offset", "512K", "--size", "1M"], &["a.img", "--size"]),
    ] {
        let line = [&["serve", "--socket", "s", "--format", "raw"], args].concat();
        refused(folder.path(), &line, FAILED, hints);
    }
    refused(folder.path(), &["info", "missing.img"], FAILED, &["missing.img", "No such file"]);
}

#[test]
fn help_and_version_go_to_stdout() {
    for (args, hint) in [
        (&["--help"][..], "serve"),
        (&["serve", "--help"], "--drain-timeout"),
        (&["info", "--help"], "--json"),
        (&["--version"], env!("CARGO_PKG_VERSION")),
    ] {
        let out = output(Command::new(env!("CARGO_BIN_EXE_nbd-img")).args(args));
        assert_eq!(out.status.code(), Some(0));
        assert!(out.stderr.is_empty() && String::from_utf8(out.stdout).unwrap().contains(hint), "{args:?}");
    }
}
