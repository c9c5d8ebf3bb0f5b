//! Load for writable exports, of any format: clients that write at random, each to a part of the disk, and remember what
//! they wrote; fio's own verification; a sparse disk to copy.

use std::fs::{self, File};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::thread;

use super::assert_same;
use super::client::{Client, Request, Wishes};
use super::rng::Rng;
use super::server::Server;
use super::tools::{run, tool};
use super::wire::{command, command_flag, errno, transmission};

const WRITERS: u64 = 16;

/// Of each writer's part. Odd, so that neighbours share sectors, pages and blocks of the file system at the seams.
const PART_LEN: u64 = (3 << 20) + 777;

/// Of the disk that they share.
pub const DISK_LEN: u64 = (WRITERS * PART_LEN).next_multiple_of(512);

/// Writes for `rounds` rounds from 16 clients at once; `shadow` is what the disk holds, before and after.
pub fn write_all_parts(server: &Server, shadow: &mut [u8], rng: &mut Rng, rounds: usize) {
    thread::scope(|scope| {
        for (i, part) in shadow.chunks_mut(usize::try_from(PART_LEN).unwrap()).enumerate() {
            let rng = rng.fork();
            let wishes = if i % 2 == 0 { Wishes::SIMPLE } else { Wishes::STRUCTURED };
            scope.spawn(move || Writer::new(server, wishes, i as u64 * PART_LEN, part, rng).run(rounds));
        }
    });
}

/// fio writes blocks of `sizes` at random over 32 MiB, reads them back and compares its checksums.
pub fn fio_verifies(folder: &Path, server: &Server, sizes: &str) {
    let out = run(tool("fio").current_dir(folder).args([
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
}

/// 64 MiB, of which some 5 are data: a part of each is kept by a copy that is worth its name.
pub fn sparse_source(path: &Path) -> Vec<u8> {
    let file = File::create_new(path).unwrap();
    file.set_len(64 << 20).unwrap();
    let mut rng = Rng::fixed(5);
    for at in [0, 9_000_000, 20_000_001, 50 << 20, (64 << 20) - (1 << 20)] {
        file.write_all_at(&rng.bytes(1 << 20), at).unwrap();
    }
    fs::read(path).unwrap()
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
        match self.rng.below(11) {
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
            9 => self.fast_zero(range, fua),
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

    /// Zeroes if that is faster than writing them, and nothing at all if not.
    fn fast_zero(&mut self, range: Range<usize>, flags: u16) {
        if self.client.flags & transmission::SEND_FAST_ZERO == 0 {
            return;
        }
        self.gather();
        let offset = self.start + range.start as u64;
        let request = Request::new(command::WRITE_ZEROES, offset, range.len());
        let reply = self.client.ask(request.flags(flags | command_flag::FAST_ZERO), &[]);
        match reply.error {
            0 => self.shadow[range].fill(0),
            errno::ENOTSUP => self.check(range),
            _ => panic!("fast zero of {range:?}: {}", reply.text),
        }
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
