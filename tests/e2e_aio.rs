//! What waits for the disk, by io_uring and by threads: the same content either way, with and without the page cache, and
//! where the kernel refuses io_uring, as in containers.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[allow(dead_code)]
mod support;

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use support::assert_same;
use support::client::{Client, Request, Wishes};
use support::rng::Rng;
use support::server::{Serve, Server};
use support::tools::qemu_img;
use support::wire::{command, command_flag};

const DISK_LEN: usize = 16 << 20;

/// Options of strace with which the kernel seems to refuse to make a ring.
const NO_RING: [&str; 9] = [
    "strace",
    "-D",
    "-f",
    "-q",
    "-e",
    "trace=io_uring_setup",
    "-e",
    "inject=io_uring_setup:error=EPERM",
    "-o",
];

#[test]
fn every_engine_serves_the_same_content() {
    for aio in ["io_uring", "threads", "auto"] {
        for cache in ["none", "directsync", "writeback"] {
            for format in ["raw", "qcow2"] {
                let test = format!("aio-{aio}-{cache}-{format}");
                let folder = support::scratch(&test);
                let (disk, mut content) = make(folder.path(), format);
                let server = Serve::image(&disk)
                    .format(format)
                    .args(&["--aio", aio, "--cache", cache])
                    .qemu_args(&[&format!("--cache={cache}")])
                    .start();
                exercise(&server, &mut content, &mut Rng::new(&test));
                let uses_ring = has_ring(&server);
                server.stop();
                assert_same(&test, &written(folder.path(), format, &disk), &content);
                if support::is_nbd_img() && cache != "writeback" {
                    assert_eq!(uses_ring, aio != "threads", "{test}");
                }
            }
        }
    }
}

#[test]
fn threads_do_the_work_where_io_uring_is_refused() {
    for format in ["raw", "qcow2"] {
        let folder = support::scratch("aio-refused");
        let (disk, mut content) = make(folder.path(), format);
        let trace = folder.path().join("trace");
        let wrapper = [&NO_RING[..], &[trace.to_str().unwrap(), "--"]].concat();
        let server = Serve::image(&disk).format(format).wrapper(&wrapper).args(&["--cache", "none"]).start();
        exercise(&server, &mut content, &mut Rng::new("aio-refused"));
        assert!(!has_ring(&server));
        server.stop();
        assert!(fs::read_to_string(&trace).unwrap().contains("INJECTED"), "nobody asked for a ring");
        assert_same("what was written", &written(folder.path(), format, &disk), &content);
    }
}

#[test]
fn io_uring_that_cannot_be_had_is_a_refusal_to_start() {
    let folder = support::scratch("aio-required");
    let (disk, _) = make(folder.path(), "raw");
    let trace = folder.path().join("trace");
    let wrapper = [&NO_RING[..], &[trace.to_str().unwrap(), "--"]].concat();
    let refusal =
        Serve::image(&disk).format("raw").wrapper(&wrapper).args(&["--aio", "io_uring"]).start_refused();
    for part in ["--aio io_uring", "--aio auto", "not permitted"] {
        assert!(refusal.stderr.contains(part), "{part}: {}", refusal.stderr);
    }
}

#[test]
fn cold_reads_are_right_by_every_engine() {
    for aio in ["io_uring", "threads"] {
        for format in ["raw", "mmap-raw", "qcow2"] {
            let folder = support::scratch("aio-cold");
            let (disk, content) = make(folder.path(), format);
            let server = Serve::image(&disk).format(format).args(&["--aio", aio]).read_only().start();
            for wishes in [Wishes::SIMPLE, Wishes::STRUCTURED] {
                let file = File::open(&disk).unwrap();
                file.sync_all().unwrap();
                rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
                let mut client = Client::unix(server.socket(), "", wishes);
                let mut rng = Rng::fixed(11);
                read_some(&mut client, &content, &mut rng, 400);
                assert_same("the disk", &client.read_all(), &content);
                client.disconnect();
            }
            server.stop();
        }
    }
}

#[test]
fn each_thread_has_one_ring_however_many_clients_it_serves() {
    let folder = support::scratch("aio-rings");
    let (disk, content) = make(folder.path(), "qcow2");
    let server = Serve::image(&disk)
        .format("qcow2")
        .args(&["--aio", "io_uring", "--cache", "none"])
        .read_only()
        .start();
    let threads = std::thread::available_parallelism().unwrap().get();
    let mut clients: Vec<_> =
        (0..4 * threads).map(|_| Client::unix(server.socket(), "", Wishes::SIMPLE)).collect();
    for (index, client) in clients.iter_mut().enumerate() {
        assert_same("a read", &client.read(index as u64 * 4096, 4096), &content[index * 4096..][..4096]);
    }
    if support::is_nbd_img() {
        assert_eq!(ring_count(&server), threads);
    }
    clients.into_iter().for_each(Client::disconnect);
    server.stop();
}

/// A disk of random content with a hole, and what it holds.
fn make(folder: &Path, format: &str) -> (PathBuf, Vec<u8>) {
    let raw = folder.join("raw");
    let mut content = Rng::fixed(2).bytes(DISK_LEN);
    content[5 << 20..7 << 20].fill(0);
    fs::write(&raw, &content).unwrap();
    if format != "qcow2" {
        return (raw, content);
    }
    qemu_img(folder, "convert -f raw -O qcow2 raw disk");
    (folder.join("disk"), content)
}

/// The guest's view of the image, by QEMU.
fn written(folder: &Path, format: &str, disk: &Path) -> Vec<u8> {
    if format == "qcow2" {
        qemu_img(folder, "check -q -f qcow2 disk");
        qemu_img(folder, "convert -f qcow2 -O raw disk after");
        return fs::read(folder.join("after")).unwrap();
    }
    fs::read(disk).unwrap()
}

/// Reads and writes from two clients at a time, of lengths and offsets that fit blocks and that do not.
fn exercise(server: &Server, content: &mut [u8], rng: &mut Rng) {
    std::thread::scope(|scope| {
        for half in content.chunks_mut(DISK_LEN / 2).enumerate() {
            let (mut rng, socket) = (rng.fork(), server.socket());
            scope.spawn(move || {
                let (index, half) = half;
                let mut client = Client::unix(socket, "", Wishes::STRUCTURED);
                for _ in 0..10 {
                    write_some(&mut client, index * DISK_LEN / 2, half, &mut rng);
                    client.flush();
                    let at = index * DISK_LEN / 2;
                    let len = 1 << 20;
                    assert_same("the first MiB", &client.read(at as u64, len), &half[..len]);
                }
                client.disconnect();
            });
        }
    });
    let mut client = Client::unix(server.socket(), "", Wishes::SIMPLE);
    read_some(&mut client, content, rng, 300);
    assert_same("the disk", &client.read_all(), content);
    client.disconnect();
}

/// 24 writes at a time, each in a stretch of its own, of which every third is durable at once.
fn write_some(client: &mut Client, base: usize, half: &mut [u8], rng: &mut Rng) {
    const WRITES: usize = 24;
    let stretch = half.len() / WRITES;
    for index in 0..WRITES {
        let (at, len) = some_range(stretch, rng);
        let at = index * stretch / 4096 * 4096 + at;
        let bytes = rng.bytes(len);
        half[at..at + len].copy_from_slice(&bytes);
        let flags = if index % 3 == 0 { command_flag::FUA } else { 0 };
        client.send(Request::new(command::WRITE, (base + at) as u64, len).flags(flags), &bytes).unwrap();
    }
    for _ in 0..WRITES {
        let reply = client.reply().unwrap();
        assert_eq!(reply.error, 0, "{}", reply.text);
    }
}

fn read_some(client: &mut Client, content: &[u8], rng: &mut Rng, count: usize) {
    let mut asked = Vec::new();
    for round in 0..count {
        let (at, len) = some_range(content.len(), rng);
        asked.push((client.send(Request::new(command::READ, at as u64, len), &[]).unwrap(), at, len));
        if asked.len() == 32 || round + 1 == count {
            while !asked.is_empty() {
                let reply = client.reply().unwrap();
                assert_eq!(reply.error, 0, "{}", reply.text);
                let index = asked.iter().position(|(cookie, ..)| *cookie == reply.cookie).unwrap();
                let (_, at, len) = asked.swap_remove(index);
                assert_same("a read", &reply.data, &content[at..at + len]);
            }
        }
    }
}

/// A range within `limit` bytes: half of them whole blocks of 4096, the others whole sectors.
fn some_range(limit: usize, rng: &mut Rng) -> (usize, usize) {
    let unit = if rng.one_in(2) { 4096 } else { 512 };
    let units = limit / unit - 8;
    let len = usize::try_from(rng.in_range(1..17)).unwrap().min(units / 2);
    let at = usize::try_from(rng.below((units - len) as u64)).unwrap();
    (at * unit, len * unit)
}

/// Whether the server has an io_uring.
fn has_ring(server: &Server) -> bool {
    ring_count(server) > 0
}

fn ring_count(server: &Server) -> usize {
    let folder = format!("/proc/{}/fd", server.pid());
    let is_ring = |entry: &fs::DirEntry| {
        fs::read_link(entry.path()).is_ok_and(|link| link.to_string_lossy().contains("io_uring"))
    };
    fs::read_dir(folder).unwrap().filter(|entry| entry.as_ref().is_ok_and(is_ring)).count()
}
