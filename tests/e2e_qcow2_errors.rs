//! What goes wrong with qcow2 images that are written, and what a user sees of it: no room on the file system, images
//! that are not written, images in use, images that a crash left behind. And one request that must cost nothing.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[allow(dead_code)]
mod support;

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use support::client::{Client, Request, Wishes};
use support::rng::Rng;
use support::server::Serve;
use support::tools::{output, qemu_img, qemu_io, tool};
use support::wire::{command, command_flag, errno, transmission};
use support::{assert_same, qcow2, scratch};

/// A file system in memory with little room; unmounted when it is dropped.
struct SmallFileSystem(tempfile::TempDir);

impl SmallFileSystem {
    /// Of `len` bytes.
    fn mount(len: u64) -> Self {
        let folder = scratch("small");
        let output = output(
            tool("mount").args(["-t", "tmpfs", "-o", &format!("size={len}"), "none"]).arg(folder.path()),
        );
        assert!(output.status.success(), "this test needs root, to mount a small tmpfs: {output:?}");
        Self(folder)
    }

    fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for SmallFileSystem {
    fn drop(&mut self) {
        // Lazily: a server that a failed test left behind must not keep it.
        let _ = output(tool("umount").arg("-l").arg(self.0.path()));
    }
}

#[test]
fn a_full_file_system_fails_requests_and_not_the_image() {
    for options in ["cluster_size=64k", "cluster_size=4k"] {
        full_file_system(&format!("create -f qcow2 -o {options} disk 64M"), 0);
    }
}

#[test]
fn a_full_file_system_below_an_overlay() {
    full_file_system("create -f qcow2 -o cluster_size=16k -b ../base -F qcow2 disk", 0x11);
}

/// Writes until there is no room, in pieces that need copy-on-write, then makes room and goes on.
fn full_file_system(made_by: &str, old: u8) {
    const LEN: usize = 64 << 20;
    let outside = scratch("outside");
    let small = SmallFileSystem::mount(24 << 20);
    let folder = small.path();
    if old != 0 {
        qemu_img(outside.path(), &format!("create -f qcow2 base {LEN}"));
        qemu_io(outside.path(), "qcow2", "base", &[&format!("write -P {old} 0 {LEN}")]);
    }
    let made_by = made_by.replace("../base", &outside.path().join("base").display().to_string());
    qemu_img(folder, &made_by);
    for ballast in ["ballast-1", "ballast-2"] {
        fs::write(folder.join(ballast), vec![1; 5 << 20]).unwrap();
    }
    let allow = format!("--allow-dir={}", outside.path().display());
    let server = Serve::image(folder.join("disk")).format("qcow2").args(&[&allow]).start();
    let mut client = Client::unix(server.socket(), "", Wishes::STRUCTURED);
    let mut shadow = vec![old; LEN];
    let mut rng = Rng::new("full");
    let mut next = 1234;
    write_until_refused(&mut client, &mut shadow, &mut next, &mut rng, 5);
    // What has its room is written as ever.
    let data = rng.bytes(4096);
    client.write(4096, &data);
    shadow[4096..8192].copy_from_slice(&data);
    assert_same("while it is full", &client.read_all(), &shadow);
    fs::remove_file(folder.join("ballast-1")).unwrap();
    client.flush();
    write_until_refused(&mut client, &mut shadow, &mut next, &mut rng, 6);
    // The metadata may find no room; then the flush says so, and succeeds when there is some.
    let reply = client.ask(Request::new(command::FLUSH, 0, 0), &[]);
    assert!([0, errno::ENOSPC].contains(&reply.error), "flush: {reply:?}");
    eprintln!("{made_by}: the flush without room: {reply:?}");
    fs::remove_file(folder.join("ballast-2")).unwrap();
    client.flush();
    // Room within the image: what is given back can be used again.
    let reply = client.ask(Request::new(command::TRIM, 0, 8 << 20), &[]);
    assert_eq!(reply.error, 0);
    shadow[..8 << 20].copy_from_slice(&client.read(0, 8 << 20));
    client.flush();
    let data = rng.bytes(2 << 20);
    client.write((LEN - data.len()) as u64, &data);
    shadow[LEN - data.len()..].copy_from_slice(&data);
    client.flush();
    assert_same("after writing on", &client.read_all(), &shadow);
    client.disconnect();
    server.stop();
    qcow2::check_clean(folder, "disk");
    qemu_img(folder, &format!("convert -f qcow2 -O raw disk {}", outside.path().join("copy").display()));
    assert_same("as QEMU reads it", &fs::read(outside.path().join("copy")).unwrap(), &shadow);
}

/// Writes pieces from `next` on until so many were refused for want of room.
fn write_until_refused(
    client: &mut Client,
    shadow: &mut [u8],
    next: &mut usize,
    rng: &mut Rng,
    times: usize,
) {
    const PIECE: usize = 72 << 10;
    let mut refused = 0;
    while refused < times {
        let range = *next..*next + PIECE;
        *next = range.end;
        assert!(range.end <= shadow.len(), "the file system was never full");
        let data = rng.bytes(PIECE);
        let reply = client.ask(Request::new(command::WRITE, range.start as u64, PIECE), &data);
        match reply.error {
            0 => shadow[range].copy_from_slice(&data),
            errno::ENOSPC => {
                refused += 1;
                // Some of it may be there, and nothing that is neither old nor new.
                let found = client.read(range.start as u64, PIECE);
                let (old, at) = (&shadow[range.clone()], range.start);
                let known = found.iter().enumerate().all(|(i, &byte)| byte == data[i] || byte == old[i]);
                assert!(known, "after ENOSPC at {at:#x} there are bytes that nobody wrote");
                shadow[range].copy_from_slice(&found);
            }
            other => panic!("error {other} for want of room: {}", reply.text),
        }
    }
}

/// Makes an image `disk` with `make`, and wants a read-write open to say all of `hints`, to change nothing, and to tell of
/// the file; read-only it is served.
#[track_caller]
fn refused_read_write(make: impl FnOnce(&Path), hints: &[&str]) {
    let folder = scratch("refused");
    make(folder.path());
    let disk = folder.path().join("disk");
    let before = fs::read(&disk).unwrap();
    let refusal = Serve::image(&disk).format("qcow2").start_refused();
    assert_eq!(refusal.status.code(), Some(1), "{}", refusal.stderr);
    for hint in hints.iter().chain(&[&*disk.display().to_string()]) {
        assert!(refusal.stderr.contains(hint), "it does not say {hint:?}: {}", refusal.stderr);
    }
    assert_same("the file", &fs::read(&disk).unwrap(), &before);
    let server = Serve::image(&disk).format("qcow2").read_only().folder(folder.path()).start();
    let mut client = Client::unix(server.socket(), "", Wishes::STRUCTURED);
    assert_eq!(client.read(0, 4096), [0x31; 4096]);
    client.disconnect();
    server.stop();
    assert_same("the file", &fs::read(&disk).unwrap(), &before);
}

/// `qemu-img create` with options, and some data.
fn make(folder: &Path, options: &str) {
    qemu_img(folder, &format!("create -f qcow2 {options} disk 8M"));
    qemu_io(folder, "qcow2", "disk", &["write -P 0x31 0 1M"]);
}

#[test]
fn images_that_are_not_written() {
    let mark_corrupt = |folder: &Path| {
        make(folder, "");
        let file = File::options().write(true).open(folder.join("disk")).unwrap();
        file.write_all_at(&[2], 79).unwrap(); // the lowest byte of the incompatible features
    };
    refused_read_write(mark_corrupt, &["corrupt", "qemu-img check -r", "--read-only"]);
}

#[test]
fn a_snapshot_is_not_written() {
    let folder = scratch("snapshot-refused");
    make(folder.path(), "");
    qemu_img(folder.path(), "snapshot -c first disk");
    let disk = folder.path().join("disk");
    let before = fs::read(&disk).unwrap();
    let server = Serve::image(&disk).format("qcow2").args(&["--load-snapshot=first"]).start();
    let mut client = Client::unix(server.socket(), "", Wishes::STRUCTURED);
    assert_ne!(client.flags & transmission::READ_ONLY, 0);
    for command in [command::WRITE_ZEROES, command::TRIM] {
        assert_eq!(client.ask(Request::new(command, 0, 4096), &[]).error, errno::EPERM);
    }
    assert_eq!(client.read(0, 4096), [0x31; 4096]);
    client.disconnect();
    server.stop();
    assert_same("the file", &fs::read(&disk).unwrap(), &before);
}

/// A server's refusal of an image in use. Who looks for its holder gives up after a moment, so on a busy machine not each
/// names it.
fn refusal_naming(image: &Path, holder: &str) -> String {
    let serve = Serve::image(image).format("qcow2");
    for _ in 0..30 {
        let refusal = serve.clone().start_refused();
        if refusal.stderr.contains(holder) {
            return refusal.stderr;
        }
    }
    serve.start_refused().stderr
}

/// The image that qemu-io has open for writing is refused, its backing file too, and neither is touched. Once qemu-io is
/// gone both are free.
#[test]
fn images_in_use_are_not_written() {
    let folder = scratch("in-use");
    let folder = folder.path();
    make(folder, "");
    qemu_img(folder, "create -f qcow2 -b disk -F qcow2 overlay");
    let mut holder = tool("qemu-io");
    holder.current_dir(folder).args(["-f", "qcow2", "overlay"]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut holder = holder.spawn().unwrap();
    let pid = holder.id().to_string();
    // It has the image when it has done something with it.
    holder.stdin.as_mut().unwrap().write_all(b"read -P 0x31 0 512\n").unwrap();
    let mut said = BufReader::new(holder.stdout.take().unwrap());
    let mut line = String::new();
    while !line.contains("read 512/512") {
        assert!(said.read_line(&mut line).unwrap() > 0, "qemu-io is gone: {line}");
    }
    for image in ["overlay", "disk"] {
        let refusal = refusal_naming(&folder.join(image), &pid);
        for hint in ["Failed to get", "lock", "qemu-io", &pid, image] {
            assert!(refusal.contains(hint), "{image}: no {hint:?} in {refusal}");
        }
    }
    holder.stdin.take().unwrap().write_all(b"quit\n").unwrap();
    assert!(holder.wait().unwrap().success());
    let server = Serve::image(folder.join("overlay")).format("qcow2").start();
    // The backing file is in use now, for reading: nobody may write to it.
    let refusal = refusal_naming(&folder.join("disk"), "(nbd-img)");
    assert!(refusal.contains("(nbd-img)") && refusal.contains("lock"), "{refusal}");
    Serve::image(folder.join("disk")).format("qcow2").read_only().start().stop();
    server.stop();
    Serve::image(folder.join("disk")).format("qcow2").start().stop();
}

/// An image with lazy refcounts that QEMU left open: its refcounts are wrong and it says so.
#[test]
fn a_dirty_image_is_repaired_when_it_is_opened_for_writing() {
    for options in
        ["lazy_refcounts=on", "lazy_refcounts=on,cluster_size=4k", "lazy_refcounts=on,refcount_bits=1"]
    {
        let (folder, disk, expected) = make_dirty(options);
        let server = Serve::image(&disk).format("qcow2").start();
        let mut client = Client::unix(server.socket(), "", Wishes::STRUCTURED);
        assert_same("the export", &client.read_all(), &expected);
        client.disconnect();
        server.stop();
        assert!(!qcow2::is_marked_dirty_or_corrupt(&disk), "{options}: still dirty after the repair");
        qcow2::check_clean(folder.path(), "disk");

        let server = Serve::image(&disk).format("qcow2").start();
        let mut client = Client::unix(server.socket(), "", Wishes::STRUCTURED);
        let data = Rng::fixed(9).bytes(3 << 20);
        client.write(2 << 20, &data);
        client.flush();
        // Lazy refcounts or not: what is flushed is consistent, and nobody has to repair it.
        assert!(!qcow2::is_marked_dirty_or_corrupt(&disk), "{options}: dirty in use");
        let mut server = server;
        server.signal(rustix::process::Signal::KILL);
        server.wait(Duration::from_secs(20));
        let mut expected = expected;
        expected[2 << 20..5 << 20].copy_from_slice(&data);
        qcow2::check(folder.path(), "disk");
        assert_same("after a kill", &qcow2::content(folder.path(), "disk", None), &expected);
    }
}

/// An image that a crash of QEMU's left dirty, and what it holds.
fn make_dirty(options: &str) -> (tempfile::TempDir, PathBuf, Vec<u8>) {
    let folder = scratch("dirty");
    let disk = folder.path().join("disk");
    qemu_img(folder.path(), &format!("create -f qcow2 -o {options} disk 8M"));
    let mut crash = tool("qemu-io");
    crash.current_dir(folder.path()).args(["-f", "qcow2"]);
    crash.args([
        "-c",
        "write -P 0x21 0 3M",
        "-c",
        "write -P 0x22 5M 100k",
        "-c",
        "flush",
        "-c",
        "abort",
        "disk",
    ]);
    assert!(!output(&mut crash).status.success(), "qemu-io was to crash");
    assert!(qcow2::is_marked_dirty_or_corrupt(&disk), "{options}: not dirty");
    let mut expected = vec![0; 8 << 20];
    expected[..3 << 20].fill(0x21);
    expected[5 << 20..(5 << 20) + (100 << 10)].fill(0x22);
    (folder, disk, expected)
}

/// Read-only, a dirty image is served as it is and stays dirty.
#[test]
fn a_dirty_image_is_not_repaired_when_it_is_opened_for_reading() {
    let (_folder, disk, expected) = make_dirty("lazy_refcounts=on");
    let before = fs::read(&disk).unwrap();
    let server = Serve::image(&disk).format("qcow2").read_only().start();
    let mut client = Client::unix(server.socket(), "", Wishes::STRUCTURED);
    assert_same("the export", &client.read_all(), &expected);
    client.disconnect();
    server.stop();
    assert_same("the file", &fs::read(&disk).unwrap(), &before);
}

/// Served and not written to, an image is the same to the byte.
#[test]
fn an_image_that_is_only_opened_does_not_change() {
    let folder = scratch("untouched");
    make(folder.path(), "-o lazy_refcounts=on");
    let disk = folder.path().join("disk");
    let before = fs::read(&disk).unwrap();
    let server = Serve::image(&disk).format("qcow2").start();
    let mut client = Client::unix(server.socket(), "", Wishes::STRUCTURED);
    assert_eq!(client.read(0, 4096), [0x31; 4096]);
    client.flush();
    client.disconnect();
    server.stop();
    assert_same("the file", &fs::read(&disk).unwrap(), &before);
}

/// Zeroes over the whole of an empty image of 8 TiB, in the largest requests there are: there is nothing to write down.
#[test]
fn zeroes_over_an_empty_image_cost_nothing() {
    let folder = scratch("instant-zero");
    let disk = folder.path().join("disk");
    qemu_img(folder.path(), "create -f qcow2 disk 8T");
    let before = fs::metadata(&disk).unwrap();
    let server = Serve::image(&disk).format("qcow2").start();
    let mut client = Client::unix(server.socket(), "", Wishes::STRUCTURED);
    let size = client.size;
    assert_eq!(size, 8 << 40);
    for flags in [0, command_flag::FUA, command_flag::FAST_ZERO] {
        let begin = Instant::now();
        zero_all(&mut client, size, flags);
        eprintln!("flags {flags}: {:?}", begin.elapsed());
    }
    client.flush();
    let after = fs::metadata(&disk).unwrap();
    assert_eq!((after.len(), after.blocks()), (before.len(), before.blocks()), "something was written");
    // It is a disk like any other.
    client.write(size - 4096, &[7; 4096]);
    assert_eq!(client.read(size - 8192, 8192), [[0; 4096], [7; 4096]].concat());
    client.disconnect();
    server.stop();
    qcow2::check_clean(folder.path(), "disk");
}

fn zero_all(client: &mut Client, end: u64, flags: u16) {
    const STEP: u64 = (4 << 30) - 65_536;
    let mut at = 0;
    while at < end || client.in_flight() > 0 {
        while at < end && client.in_flight() < 16 {
            let len = STEP.min(end - at);
            let request = Request::new(command::WRITE_ZEROES, at, usize::try_from(len).unwrap());
            client.send(request.flags(flags), &[]).unwrap();
            at += len;
        }
        let reply = client.reply().unwrap();
        assert_eq!(reply.error, 0, "{}", reply.text);
    }
}
