//! Writing: what 16 clients write at once is what is read afterwards and what is in the file; fio verifies its own
//! checksums; qemu-img and nbdcopy copy into an export, and what is sparse stays sparse.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[allow(dead_code)]
mod support;

use std::fs::{self, File};
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::thread;

use support::assert_same;
use support::client::{Client, Request, Wishes};
use support::rng::Rng;
use support::server::{Peer, Serve, Server};
use support::tools::{run, tool};
use support::wire::{command, command_flag, transmission};

const WRITERS: u64 = 16;

/// Of each writer's part. Odd, so that neighbours share sectors, pages and blocks of the file system at the seams.
const PART_LEN: u64 = (3 << 20) + 777;

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
    let size = (WRITERS * PART_LEN).next_multiple_of(512);
    let mut shadow = rng.bytes(usize::try_from(size / 2).unwrap());
    fs::write(&disk, &shadow).unwrap();
    shadow.resize(usize::try_from(size).unwrap(), 0);
    File::options().write(true).open(&disk).unwrap().set_len(size).unwrap();

    let cache: Vec<String> = args.chunks(2).map(|pair| pair.join("=")).collect();
    let cache: Vec<&str> = cache.iter().map(String::as_str).collect();
    let server = Serve::image(&disk).format(format).args(args).qemu_args(&cache).start();
    let rounds = support::count("NBD_IMG_WRITE_ROUNDS", 60);
    thread::scope(|scope| {
        for (i, part) in shadow.chunks_mut(usize::try_from(PART_LEN).unwrap()).enumerate() {
            let (rng, server) = (rng.fork(), &server);
            let wishes = if i % 2 == 0 { Wishes::SIMPLE } else { Wishes::STRUCTURED };
            scope.spawn(move || Writer::new(server, wishes, i as u64 * PART_LEN, part, rng).run(rounds));
        }
    });
    let mut reader = Client::unix(server.socket(), "", Wishes::STRUCTURED);
    assert_same("the export after all writers", &reader.read_all(), &shadow);
    reader.flush();
    reader.disconnect();
    server.stop();
    assert_same("the file after the end", &fs::read(&disk).unwrap(), &shadow);
}

/// One client that owns a part of the disk and remembers what is in it.
struct Writer<'a> {
    client: Client,
    start: u64,
    shadow: &'a mut [u8],
    rng: Rng,
    /// The minimum block size.
    block_len: u64,
}

impl<'a> Writer<'a> {
    fn new(server: &Server, wishes: Wishes, start: u64, shadow: &'a mut [u8], rng: Rng) -> Self {
        let client = Client::unix(server.socket(), "", wishes);
        let block_len = client.block_sizes.map_or(1, |(minimum, ..)| minimum.into());
        Self { client, start, shadow, rng, block_len }
    }

    fn run(mut self, rounds: usize) {
        for round in 0..rounds {
            let batch = self.batch();
            // In flight together, and disjoint: the order in which they are done must not matter.
            for range in &batch {
                self.submit(range.clone());
            }
            self.gather();
            if let Some(range) = batch.first().filter(|_| round % 3 == 0) {
                self.check(range.clone());
            }
            if self.rng.one_in(8) {
                self.client.flush();
            }
        }
        self.client.disconnect();
    }

    /// Up to 8 ranges that do not touch each other's bytes, of 512 B to 1 MiB, aligned or not.
    fn batch(&mut self) -> Vec<Range<usize>> {
        let mut batch: Vec<Range<usize>> = Vec::new();
        for _ in 0..=self.rng.below(8) {
            let limit = 1 << self.rng.in_range(10..21);
            let (mut start, mut len) = (self.rng.below(PART_LEN), self.rng.in_range(512..limit));
            // Aligned on the disk, not in the part; never below what the server can do.
            let align = if self.rng.one_in(2) { 4096 } else { self.block_len };
            start = (self.start + start).next_multiple_of(align) - self.start;
            len = len.next_multiple_of(align);
            let end = usize::try_from(start + len).unwrap().min(self.shadow.len());
            let end = end - usize::try_from((self.start + end as u64) % self.block_len).unwrap();
            let start = usize::try_from(start).unwrap();
            if start < end && batch.iter().all(|other| end <= other.start || other.end <= start) {
                batch.push(start..end);
            }
        }
        batch
    }

    fn submit(&mut self, range: Range<usize>) {
        let offset = self.start + range.start as u64;
        let fua = if self.rng.one_in(20) { command_flag::FUA } else { 0 };
        match self.rng.below(10) {
            0..6 => {
                let data = self.rng.bytes(range.len());
                self.shadow[range.clone()].copy_from_slice(&data);
                let request = Request::new(command::WRITE, offset, data.len()).flags(fua);
                self.client.send(request, &data).unwrap();
            }
            6 | 7 => {
                let no_hole = if self.rng.one_in(2) { command_flag::NO_HOLE } else { 0 };
                self.shadow[range.clone()].fill(0);
                let request = Request::new(command::WRITE_ZEROES, offset, range.len());
                self.client.send(request.flags(fua | no_hole), &[]).unwrap();
            }
            8 => self.trim(range, fua),
            _ => drop(self.client.send(Request::new(command::FLUSH, 0, 0), &[]).unwrap()),
        }
    }

    /// The content after a trim is anybody's guess within it (and nowhere else): so it is written over afterwards.
    fn trim(&mut self, range: Range<usize>, flags: u16) {
        self.gather();
        let offset = self.start + range.start as u64;
        let reply = self.client.ask(Request::new(command::TRIM, offset, range.len()).flags(flags), &[]);
        assert_eq!(reply.error, 0, "trim {range:?}: {}", reply.text);
        let found = self.client.read(offset, range.len());
        let unknown = found.iter().zip(&self.shadow[range.clone()]).all(|(&a, &b)| a == 0 || a == b);
        assert!(unknown, "after the trim of {range:?} there are bytes that nobody wrote");
        self.shadow[range].copy_from_slice(&found);
    }

    fn gather(&mut self) {
        while self.client.in_flight() > 0 {
            let reply = self.client.reply().unwrap();
            assert_eq!(reply.error, 0, "{}", reply.text);
        }
    }

    fn check(&mut self, range: Range<usize>) {
        let found = self.client.read(self.start + range.start as u64, range.len());
        assert_same(&format!("{range:?} at {:#x}", self.start), &found, &self.shadow[range]);
    }
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
    let out = run(tool("fio").current_dir(folder.path()).args([
        "--name=verify",
        "--ioengine=nbd",
        &format!("--uri={}", server.uri("")),
        "--rw=randwrite",
        &format!("--bsrange={sizes}"),
        "--iodepth=32",
        "--size=32M",
        "--verify=crc32c",
        "--do_verify=1",
        "--verify_fatal=1",
        "--verify_backlog=64",
        "--thread",
    ]));
    let text = String::from_utf8_lossy(&out);
    assert!(text.contains("err= 0") && text.contains("READ:") && text.contains("WRITE:"), "{text}");
    server.stop();
}

/// 64 MiB, of which some 5 are data: a part of each is kept by a copy that is worth its name.
fn sparse_source(path: &Path) -> Vec<u8> {
    let file = File::create_new(path).unwrap();
    file.set_len(64 << 20).unwrap();
    let mut rng = Rng::fixed(5);
    for at in [0, 9_000_000, 20_000_001, 50 << 20, (64 << 20) - (1 << 20)] {
        file.write_all_at(&rng.bytes(1 << 20), at).unwrap();
    }
    fs::read(path).unwrap()
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
