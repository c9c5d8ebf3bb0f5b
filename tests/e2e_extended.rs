//! Extended headers on a running server: lengths beyond 4 GiB, the payload of a block status, and what breaks the
//! protocol; by our own client and by QEMU's, which uses them whenever a server has them.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[allow(dead_code)]
mod support;

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use support::assert_same;
use support::client::{Client, Request, Wishes};
use support::rng::Rng;
use support::server::{Serve, Server};
use support::tools::{qemu_img, run, tool};
use support::wire::{command, command_flag, errno, transmission};

const GIB: u64 = 1 << 30;
/// Longer than any length of 32 bits.
const LONG: u64 = 6 * GIB;

fn long(command: u16, offset: u64, len: u64) -> Request {
    Request { flags: 0, command, offset, len }
}

#[track_caller]
fn assert_done(client: &mut Client, request: Request) {
    let reply = client.ask(request, &[]);
    assert_eq!(reply.error, 0, "{request:?}: {}", reply.text);
}

fn sparse(folder: &Path, format: &str) -> Server {
    let disk = folder.join("disk");
    qemu_img(folder, &format!("create -q -f {format} disk {LONG}"));
    Serve::image(disk).format(format).start()
}

/// Zeroes, trims, read-ahead and status of 6 GiB in one request each, on a disk with data at both ends.
#[test]
fn one_request_is_longer_than_4_gib() {
    for format in ["raw", "qcow2"] {
        let folder = support::scratch("extended-long");
        let server = sparse(folder.path(), format);
        let mut client = Client::unix(server.socket(), "", Wishes::EXTENDED);
        assert_ne!(client.flags & transmission::BLOCK_STATUS_PAYLOAD, 0);
        for request in [
            long(command::TRIM, 0, LONG),
            long(command::WRITE_ZEROES, 0, LONG).flags(command_flag::FAST_ZERO),
            long(command::WRITE_ZEROES, 65_536, LONG - 65_536),
        ] {
            client.write(0, &[0x11; 65_536]);
            client.write(LONG - 65_536, &[0x22; 65_536]);
            assert_done(&mut client, long(command::CACHE, 0, LONG));
            let full = client.ask(long(command::BLOCK_STATUS, 0, LONG), &[]);
            assert_eq!(full.error, 0, "{}", full.text);
            assert_eq!(
                full.extents,
                [(65_536, 0), (LONG - 131_072, 3), (65_536, 0)],
                "{format}: one hole of more than 4 GiB between the data"
            );
            assert_done(&mut client, request);
            let end = client.read(LONG - 65_536, 65_536);
            assert!(end.iter().all(|byte| *byte == 0), "{format}: {request:?} did not reach the end");
            let begin = client.read(0, 65_536);
            assert_eq!(begin.iter().all(|byte| *byte == 0), request.offset == 0);
        }
        let one = long(command::BLOCK_STATUS, 65_536, 5 * GIB).flags(command_flag::REQ_ONE);
        assert_eq!(client.ask(one, &[]).extents, [(5 * GIB, 3)]);
        for (request, error) in [
            (long(command::WRITE_ZEROES, 0, LONG + 512), errno::ENOSPC),
            (long(command::TRIM, 512, LONG), errno::EINVAL),
            (long(command::BLOCK_STATUS, 0, u64::MAX), errno::EINVAL),
            (long(command::READ, 0, (1 << 32) + 512), errno::EINVAL),
            (long(command::READ, 0, (32 << 20) + 1), errno::EINVAL),
            (long(99, 0, 512), errno::EINVAL),
        ] {
            assert_eq!(client.ask(request, &[]).error, error, "{request:?}");
        }
        client.disconnect();
        server.stop();
        let disk = folder.path().join("disk");
        assert!(disk.metadata().unwrap().blocks() * 512 < 16 << 20, "{format}: the disk stayed sparse");
    }
}

#[test]
fn reads_and_writes_are_what_they_are_with_compact_headers() {
    const LEN: usize = 8 << 20;
    let folder = support::scratch("extended-mixed");
    qemu_img(folder.path(), &format!("create -q -f qcow2 disk {LEN}"));
    let server = Serve::image(folder.path().join("disk")).format("qcow2").start();
    let mut extended = Client::unix(server.socket(), "", Wishes::EXTENDED);
    let mut compact = Client::unix(server.socket(), "", Wishes::ALLOCATION);
    let mut rng = Rng::new("extended-mixed");
    let mut shadow = vec![0; LEN];
    for round in 0..200 {
        let at = usize::try_from(rng.below(LEN as u64 / 512)).unwrap() * 512;
        let len = usize::try_from(rng.in_range(1..600) * 512).unwrap().min(LEN - at);
        let data = rng.bytes(len);
        let writer = if round % 2 == 0 { &mut extended } else { &mut compact };
        writer.write(at as u64, &data);
        shadow[at..at + len].copy_from_slice(&data);
        let reader = if round % 3 == 0 { &mut extended } else { &mut compact };
        assert_same("a range", &reader.read(at as u64, len), &shadow[at..at + len]);
    }
    let df = Request::new(command::READ, 0, 1 << 20).flags(command_flag::DF);
    let reply = extended.ask(df, &[]);
    assert_eq!((reply.error, reply.chunks), (0, 1));
    assert_same("in one chunk", &reply.data, &shadow[..1 << 20]);
    assert_same("by extended headers", &extended.read_all(), &shadow);
    assert_same("by compact headers", &compact.read_all(), &shadow);
    let whole = Request::new(command::BLOCK_STATUS, 0, LEN);
    let (wide, narrow) = (extended.ask(whole, &[]), compact.ask(whole, &[]));
    assert_eq!(wide.extents, narrow.extents);
    assert_eq!(wide.contexts.len(), 2);
    extended.flush();
    extended.disconnect();
    compact.disconnect();
    server.stop();
}

fn status_payload(len: u64, ids: &[u32]) -> Vec<u8> {
    let mut payload = len.to_be_bytes().to_vec();
    payload.extend(ids.iter().flat_map(|id| id.to_be_bytes()));
    payload
}

/// A request with a payload that the header announces.
fn with_payload(client: &mut Client, command: u16, payload: &[u8]) -> support::client::Reply {
    let request = long(command, 0, payload.len() as u64).flags(command_flag::PAYLOAD_LEN);
    client.ask(request, payload)
}

#[test]
fn block_status_payload_picks_contexts_and_stays_in_step() {
    let folder = support::scratch("extended-payload");
    let server = sparse(folder.path(), "qcow2");
    let mut client = Client::unix(server.socket(), "", Wishes::EXTENDED);
    let [allocation, depth] = client.context_ids[..] else { panic!("two contexts") };
    client.write(0, &[1; 65_536]);
    for (ids, expected) in [
        (&[allocation][..], vec![(allocation, vec![(65_536, 0), (LONG - 65_536, 3)])]),
        (&[depth], vec![(depth, vec![(65_536, 1), (LONG - 65_536, 0)])]),
    ] {
        let reply = with_payload(&mut client, command::BLOCK_STATUS, &status_payload(LONG, ids));
        assert_eq!((reply.error, &reply.contexts), (0, &expected), "{}", reply.text);
    }
    let both = with_payload(&mut client, command::BLOCK_STATUS, &status_payload(LONG, &[depth, allocation]));
    assert_eq!(both.contexts.len(), 2);
    for payload in [
        status_payload(LONG, &[]),
        status_payload(LONG, &[77]),
        status_payload(LONG, &[depth, depth]),
        status_payload(0, &[depth]),
        status_payload(LONG + 512, &[depth]),
        vec![1; 5],
        vec![0; 4096],
    ] {
        let reply = with_payload(&mut client, command::BLOCK_STATUS, &payload);
        assert_eq!(reply.error, errno::EINVAL, "{payload:?}");
        assert_eq!(client.read(0, 512), [1; 512], "in step");
    }
    for command in [command::READ, command::TRIM, command::FLUSH, command::WRITE_ZEROES, command::CACHE, 99] {
        assert_eq!(with_payload(&mut client, command, &[0x25; 700]).error, errno::EINVAL, "{command}");
        assert_eq!(client.read(0, 512), [1; 512], "in step");
    }
    client.disconnect();
    server.stop();
}

/// Payloads that nobody should wait for end the connection, and nothing is written.
#[test]
fn what_breaks_the_framing_ends_the_connection() {
    let folder = support::scratch("extended-broken");
    let mut server = sparse(folder.path(), "raw");
    for (what, flags, command, len) in [
        ("a payload beyond the largest", command_flag::PAYLOAD_LEN, command::WRITE, (32 << 20) + 1),
        ("one that is not announced", 0, command::WRITE, 1 << 32),
        ("a payload beyond all bounds", command_flag::PAYLOAD_LEN, command::TRIM, u64::MAX),
    ] {
        let mut client = Client::unix(server.socket(), "", Wishes::EXTENDED);
        let request = long(command, 0, len).flags(flags);
        let cookie = client.register(request);
        client.stream().write_all(&request.extended_bytes(cookie)).unwrap();
        // Bytes that would be a write if they were taken for requests.
        let decoy = long(command::WRITE, 0, 512).flags(command_flag::PAYLOAD_LEN).extended_bytes(1);
        let _ = client.stream().write_all(&[decoy, vec![0xcc; 512]].concat());
        let mut rest = Vec::new();
        // A reset, where bytes were left unread, is an end too.
        let _ = client.stream().read_to_end(&mut rest);
        assert!(rest.is_empty(), "{what}: {rest:?}");
        server.assert_alive();
        let mut client = Client::unix(server.socket(), "", Wishes::EXTENDED);
        assert_eq!(client.read(0, 512), [0; 512], "{what}: nothing was written");
        client.disconnect();
    }
    server.stop();
}

/// QEMU writes (without announcing the payload), zeroes more than 4 GiB at once, maps, converts and compares.
#[test]
fn qemu_works_through_extended_headers() {
    let folder = support::scratch("extended-qemu");
    let server = sparse(folder.path(), "qcow2");
    let out =
        run(tool("qemu-io").args(["-f", "raw", "--trace", "nbd_send_request"]).arg(server.uri("")).args([
            "-c",
            "write -P 7 1M 1M",
            "-c",
            "write -n -u -z 2M 5G",
            "-c",
            "discard 3M 1G",
            "-c",
            "read -P 7 1M 1M",
            "-c",
            "flush",
            "-c",
            "map",
        ]));
    let text = String::from_utf8(out).unwrap();
    assert!(!text.contains("Pattern verification failed") && !text.contains("failed:"), "{text}");
    let map = run(tool("qemu-img").args(["map", "--output=json", "-f", "raw"]).arg(server.uri("")));
    let map: serde_json::Value = serde_json::from_slice(&map).unwrap();
    let lens: Vec<_> = map.as_array().unwrap().iter().map(|e| e["length"].as_u64().unwrap()).collect();
    assert!(lens.iter().any(|len| *len > 1 << 32), "an extent of more than 32 bits: {map}");
    let copy = folder.path().join("copy");
    File::create(&copy).unwrap();
    run(tool("qemu-img").args(["convert", "-f", "raw", "-O", "raw"]).arg(server.uri("")).arg(&copy));
    run(tool("qemu-img").args(["compare", "-f", "raw", "-F", "raw"]).arg(server.uri("")).arg(&copy));
    server.stop();
    assert!(copy.metadata().unwrap().blocks() * 512 < 8 << 20);
}
