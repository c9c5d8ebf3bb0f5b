//! Reads of a qcow2 image whose tables are not in memory: nobody waits for them but who has to, and whatever comes of it, all
//! requests are answered.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[allow(dead_code)]
mod support;

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use nbd_img::session::Times;
use nbd_img_formats::qcow2::{Caches, Header, ImageNumber, Parts, Qcow2Driver, WriteOptions};
use nbd_img_formats::raw::{RawDriver, RawOptions};
use nbd_img_formats::storage::MemoryStorage;
use nbd_img_formats::{BlockDriver, Format, Storage};
use support::client::{Client, Request, Wishes, is_hangup};
use support::in_process::{Disk, InProcess};
use support::tools::{qemu_img, qemu_io};
use support::wire::{chunk, command};
use support::{assert_same, scratch, wait_until};

const CLUSTER_LEN: u64 = 4 << 10;

/// Bytes of the disk that an L2 table of so short clusters tells of.
const TABLE_COVERS: u64 = CLUSTER_LEN / 8 * CLUSTER_LEN;
const DISK_LEN: u64 = 256 << 20;

/// An image as qemu-img makes it, with something written to it.
struct Image(Vec<u8>);

impl Image {
    fn new(folder: &Path, options: &str, writes: &[&str]) -> Self {
        qemu_img(
            folder,
            &format!("create -q -f qcow2 -o cluster_size={CLUSTER_LEN} {options} disk {DISK_LEN}"),
        );
        qemu_io(folder, "qcow2", "disk", writes);
        Self(std::fs::read(folder.join("disk")).unwrap())
    }

    /// Where in the file the entry for a cluster lies.
    fn entry(&self, offset: u64) -> u64 {
        let table = pointer(&self.0, u64_at(&self.0, 40) + offset / TABLE_COVERS * 8);
        assert!(table > 0, "there is no table for {offset:#x}");
        table + offset % TABLE_COVERS / CLUSTER_LEN * 8
    }

    /// Where in the file a cluster of data lies.
    fn data(&self, offset: u64) -> u64 {
        pointer(&self.0, self.entry(offset))
    }
}

fn u64_at(bytes: &[u8], at: u64) -> u64 {
    u64::from_be_bytes(bytes[at as usize..][..8].try_into().unwrap())
}

/// What an entry of a table leads to, its flags apart.
fn pointer(bytes: &[u8], at: u64) -> u64 {
    u64_at(bytes, at) & 0x00ff_ffff_ffff_fe00
}

fn open(
    image: &Arc<Disk>,
    backing: Option<Arc<dyn BlockDriver>>,
    write: Option<WriteOptions>,
) -> Arc<dyn BlockDriver> {
    let image: Arc<dyn Storage> = Arc::clone(image) as _;
    let header = Header::load(&image).unwrap();
    let caches = Caches::new(1 << 20, 1 << 20, [&header]).unwrap();
    let (number, data_file, snapshot) = (ImageNumber(0), None, None);
    Qcow2Driver::open(Parts { image, header, data_file, backing, number, caches, snapshot, write }).unwrap()
}

/// A client, and its socket.
fn connect(server: &InProcess) -> (Client, UnixStream) {
    let stream = UnixStream::connect(server.socket()).unwrap();
    let socket = stream.try_clone().unwrap();
    (Client::over(Box::new(stream), "", Wishes::STRUCTURED), socket)
}

/// A read whose tables came while another one waited for memory was forgotten when the client sent no more.
#[test]
fn what_arrives_while_another_waits_for_memory_is_answered_to_who_only_sends_no_more() {
    let folder = scratch("cold-half-closed");
    let image =
        Image::new(folder.path(), "", &["write -P 1 0 512k", "write -P 2 64M 512k", "write -P 3 128M 512k"]);
    let disk = Disk::new(&image.0);
    // Enough for the buffer of the large read's reply, and then not for the read.
    let server = InProcess::serve_driver(open(&disk, None, None), 512 << 10, Times::default());
    let (mut client, socket) = connect(&server);
    client.read(0, 512);
    let held = [image.data(64 << 10), image.entry(64 << 20), image.entry(128 << 20)];
    held.iter().for_each(|at| disk.hold(*at));
    let reads = [(64 << 10, 128 << 10), (64 << 20, 300 << 10), (128 << 20, 100 << 10)];
    let cookies =
        reads.map(|(offset, len)| client.send(Request::new(command::READ, offset, len), &[]).unwrap());
    socket.shutdown(Shutdown::Write).unwrap();
    wait_until("all three wait", || disk.held_up() == 3);
    // The order makes the fault; if it comes otherwise on a busy machine, all is well, too.
    for (at, left) in [(held[1], 2), (held[2], 1), (held[0], 0)] {
        disk.let_go(at);
        wait_until("it goes on", || disk.held_up() == left);
        std::thread::sleep(Duration::from_millis(200));
    }
    for _ in reads {
        let reply = client.reply().unwrap();
        assert_eq!(reply.error, 0, "{}", reply.text);
        let index = cookies.iter().position(|cookie| *cookie == reply.cookie).unwrap();
        assert_same("a read", &reply.data, &vec![index as u8 + 1; reads[index].1]);
    }
    assert!(is_hangup(&client.reply().unwrap_err()));
    server.assert_clean();
}

/// Asking what lies below for holes read this image's tables on the session's thread.
#[test]
fn nobody_waits_for_the_tables_of_a_read_that_could_be_sparse() {
    let folder = scratch("cold-sparse");
    std::fs::File::create(folder.path().join("base")).unwrap().set_len(DISK_LEN).unwrap();
    let image = Image::new(folder.path(), "-b base -F raw", &["write -P 1 0 64k"]);
    let disk = Disk::cold(&image.0);
    let below = MemoryStorage::copy_of(&vec![7; DISK_LEN as usize]).unwrap();
    let raw = RawOptions { exact_size: false, discard: true, format: Format::Raw, refuse_magic: None };
    let driver = open(&disk, Some(RawDriver::open(below, raw).unwrap()), None);
    assert!(driver.facts().holes_in_storage);
    let server = InProcess::serve_driver(driver, 64 << 20, Times::default());
    let (mut client, _) = connect(&server);
    disk.hold(image.entry(0));
    let cold = client.send(Request::new(command::READ, 0, 256 << 10), &[]).unwrap();
    wait_until("it waits", || disk.held_up() == 1);
    let warm = client.send(Request::new(command::READ, 200 << 20, 4096), &[]).unwrap();
    let reply = client.reply().unwrap();
    assert_eq!((reply.cookie, reply.data), (warm, vec![7; 4096]));
    disk.let_go(image.entry(0));
    let reply = client.reply().unwrap();
    assert_eq!((reply.cookie, reply.error), (cold, 0));
    assert_same("the cold read", &reply.data, &[vec![1; 64 << 10], vec![7; 192 << 10]].concat());
    client.disconnect();
    server.assert_clean();
}

/// A read whose tables came while a client still sent the payload of a large write was answered after the write.
#[test]
fn what_arrives_does_not_wait_for_the_payload_of_a_streamed_write() {
    let folder = scratch("cold-write");
    let image = Image::new(folder.path(), "", &["write -P 1 0 64k", "write -P 2 64M 1M"]);
    let disk = Disk::new(&image.0);
    let driver = open(&disk, None, Some(WriteOptions::default()));
    let server = InProcess::serve_driver(driver, 64 << 20, Times::default());
    let (mut client, mut socket) = connect(&server);
    disk.hold(image.entry(64 << 20));
    let read = Request::new(command::READ, 64 << 20, 100 << 10);
    let write = Request::new(command::WRITE, 0, 8 << 20);
    let cookies = [read, write].map(|request| client.register(request));
    socket.write_all(&[read.bytes(cookies[0]), write.bytes(cookies[1])].concat()).unwrap();
    wait_until("it waits", || disk.held_up() == 1);
    disk.let_go(image.entry(64 << 20));
    let reply = client.reply().unwrap();
    assert_eq!((reply.cookie, reply.data), (cookies[0], vec![2; 100 << 10]));
    socket.write_all(&vec![3; 8 << 20]).unwrap();
    assert_eq!(client.reply().unwrap().cookie, cookies[1]);
    client.disconnect();
    server.assert_clean();
}

/// A read that may turn out to be streamed waits for its tables beside the others, too, and tells holes as one.
#[test]
fn nobody_waits_for_the_tables_of_a_read_that_is_too_long_for_a_batch() {
    const LEN: u64 = 16 << 20;
    let folder = scratch("cold-streamed");
    let image = Image::new(folder.path(), "", &["write -P 1 0 64k", "write -z 24M 16M"]);
    let disk = Disk::new(&image.0);
    // Written, so that nothing of it can be sent from the file.
    let driver = open(&disk, None, Some(WriteOptions::default()));
    let server = InProcess::serve_driver(driver, 64 << 20, Times::default());
    let (mut client, mut socket) = connect(&server);
    disk.hold(image.entry(32 << 20));
    client.send(Request::new(command::READ, 24 << 20, LEN as usize), &[]).unwrap();
    wait_until("it waits", || disk.held_up() == 1);
    let other = client.send(Request::new(command::READ, 0, 4096), &[]).unwrap();
    let reply = client.reply().unwrap();
    assert_eq!((reply.cookie, reply.data), (other, vec![1; 4096]));
    disk.let_go(image.entry(32 << 20));
    let mut hole = [0; 32];
    socket.read_exact(&mut hole).unwrap();
    assert_eq!(u16::from_be_bytes([hole[6], hole[7]]), chunk::OFFSET_HOLE);
    assert_eq!(u64_at(&hole, 20), 24 << 20);
    assert_eq!(u64::from(u32::from_be_bytes(hole[28..].try_into().unwrap())), LEN);
    drop((client, socket));
    server.assert_clean();
}
