//! Writing: what 16 clients write at once is what is read afterwards and what is in the file; fio verifies its own
//! checksums; qemu-img and nbdcopy copy into an export, and what is sparse stays sparse.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[allow(dead_code)]
mod support;

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use support::assert_same;
use support::client::{Client, Request, Wishes};
use support::rng::Rng;
use support::server::{Peer, Serve, Server};
use support::tools::{run, tool};
use support::wire::{command, transmission};
use support::writers::{self, DISK_LEN, sparse_source};

#[test]
fn sixteen_writers_on_raw() {
    writers_against_shadow("writers-raw", "raw", &[]);
}

#[test]
fn sixteen_writers_on_mmap_raw() {
    writers_against_shadow("writers-mmap-raw", "mmap-raw", &[]);
}

#[test]
fn sixteen_writers_with_o_direct() {
    writers_against_shadow("writers-direct", "raw", &["--cache", "none"]);
}

#[test]
fn sixteen_writers_with_write_through() {
    writers_against_shadow("writers-writethrough", "raw", &["--cache", "writethrough"]);
}

fn writers_against_shadow(test: &str, format: &str, args: &[&str]) {
    let folder = support::scratch(test);
    let disk = folder.path().join("disk");
    let mut rng = Rng::new(test);
    // Half of it stale data, half a hole.
    let mut shadow = rng.bytes(usize::try_from(DISK_LEN / 2).unwrap());
    fs::write(&disk, &shadow).unwrap();
    shadow.resize(usize::try_from(DISK_LEN).unwrap(), 0);
    File::options().write(true).open(&disk).unwrap().set_len(DISK_LEN).unwrap();

    let cache: Vec<String> = args.chunks(2).map(|pair| pair.join("=")).collect();
    let cache: Vec<&str> = cache.iter().map(String::as_str).collect();
    let server = Serve::image(&disk).format(format).args(args).qemu_args(&cache).start();
    writers::write_all_parts(&server, &mut shadow, &mut rng, support::count("NBD_IMG_WRITE_ROUNDS", 60));
    let mut reader = Client::unix(server.socket(), "", Wishes::STRUCTURED);
    assert_same("the export after all writers", &reader.read_all(), &shadow);
    reader.flush();
    reader.disconnect();
    server.stop();
    assert_same("the file after the end", &fs::read(&disk).unwrap(), &shadow);
}

#[test]
fn fio_verifies_raw() {
    fio_verifies("fio-raw", "raw", "512-64k");
}

#[test]
fn fio_verifies_mmap_raw() {
    fio_verifies("fio-mmap-raw", "mmap-raw", "512-64k");
}

fn fio_verifies(test: &str, format: &str, sizes: &str) {
    let folder = support::scratch(test);
    let disk = folder.path().join("disk");
    File::create(&disk).unwrap().set_len(32 << 20).unwrap();
    let server = Serve::image(&disk).format(format).start();
    writers::fio_verifies(folder.path(), &server, sizes);
    server.stop();
}

#[test]
fn qemu_img_convert_into_an_export_stays_sparse() {
    let convert: &dyn Fn(&Path, &Server) = &|source, server| {
        run(tool("qemu-img")
            .args(["convert", "-n", "-f", "raw", "-O", "raw"])
            .arg(source)
            .arg(server.uri("")));
    };
    copies_stay_sparse("convert-fresh", false, convert);
    copies_stay_sparse("convert-over", true, convert);
}

#[test]
fn nbdcopy_into_an_export_stays_sparse() {
    let nbdcopy: &dyn Fn(&Path, &Server) = &|source, server| {
        run(tool("nbdcopy").arg("--flush").arg(source).arg(server.uri("")));
    };
    copies_stay_sparse("nbdcopy-fresh", false, nbdcopy);
    copies_stay_sparse("nbdcopy-over", true, nbdcopy);
}

/// Copies into an export of nbd-img and one of qemu-nbd: both equal to the source, and ours takes no more of the disk.
fn copies_stay_sparse(test: &str, over_old_data: bool, copy: &dyn Fn(&Path, &Server)) {
    let folder = support::scratch(test);
    let source = folder.path().join("source");
    let expected = sparse_source(&source);
    let used = |target: &str, format: &str, peer: Peer| {
        let target = folder.path().join(target);
        if over_old_data {
            fs::write(&target, vec![0xee; expected.len()]).unwrap();
        } else {
            File::create_new(&target).unwrap().set_len(expected.len() as u64).unwrap();
        }
        let server = Serve::image(&target).format(format).peer(peer).start();
        copy(&source, &server);
        server.stop();
        assert_same(&format!("{test} {format} by {peer:?}"), &fs::read(&target).unwrap(), &expected);
        File::open(&target).unwrap().sync_all().unwrap(); // delayed allocation must not hide anything
        let blocks = fs::metadata(&target).unwrap().blocks() * 512;
        eprintln!("{test} {format} {peer:?}: {blocks} bytes on disk");
        blocks
    };
    let theirs = used("yardstick", "raw", Peer::QemuNbd);
    assert!(theirs < 16 << 20, "the yardstick itself is not sparse: {theirs}");
    for format in ["raw", "mmap-raw"] {
        let ours = used(format, format, Peer::of_this_run());
        // A file system may round a fragment more or less.
        assert!(
            ours <= theirs + (128 << 10),
            "{test} {format}: {ours} bytes on disk, with qemu-nbd {theirs}"
        );
    }
}

#[test]
fn a_read_only_export_refuses_every_change() {
    let folder = support::scratch("read-only");
    let disk = folder.path().join("disk");
    let content = Rng::fixed(1).bytes(1 << 20);
    fs::write(&disk, &content).unwrap();
    let server = Serve::image(&disk).format("raw").read_only().start();
    let mut client = Client::unix(server.socket(), "", Wishes::STRUCTURED);
    assert_ne!(client.flags & transmission::READ_ONLY, 0);
    for (command, payload) in
        [(command::WRITE, &[1; 512][..]), (command::TRIM, &[]), (command::WRITE_ZEROES, &[])]
    {
        let reply = client.ask(Request::new(command, 0, 512), payload);
        let expected =
            if support::is_nbd_img() { support::wire::errno::EPERM } else { support::wire::errno::EINVAL };
        assert_eq!(reply.error, expected, "command {command}: {reply:?}");
    }
    assert_same("the export", &client.read_all(), &content);
    let writable = |fd: &fs::DirEntry| {
        fs::read_link(fd.path()).is_ok_and(|target| target == disk)
            && !fs::read_to_string(format!("/proc/{}/fdinfo/{}", server.pid(), fd.file_name().display()))
                .unwrap()
                .lines()
                .any(|line| line.starts_with("flags:") && line.ends_with('0'))
    };
    let fds: Vec<_> =
        fs::read_dir(format!("/proc/{}/fd", server.pid())).unwrap().map(Result::unwrap).collect();
    assert!(fds.iter().any(|fd| fs::read_link(fd.path()).is_ok_and(|target| target == disk)));
    assert!(!fds.iter().any(writable), "a read-only export with a writable descriptor");
    server.stop();
}
