//! Clients that break the protocol, lie, flood, or do nothing: bad input ends at most its own connection, what the
//! protocol wants answered is answered with the stream still in step, and memory stays bounded.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[allow(dead_code)]
mod support;

use std::collections::HashMap;
use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use support::client::{Client, Request, Wishes, go_data, greet, is_hangup, option_bytes, read_option_reply};
use support::rng::Rng;
use support::server::{Serve, Server};
use support::wire::{self, command, command_flag, errno, option, option_reply};
use support::{assert_same, proc};

const DISK_LEN: usize = 8 << 20;

/// A raw disk of random bytes, writable, and its content.
fn start(test: &str) -> (tempfile::TempDir, Server, Vec<u8>) {
    let folder = support::scratch(test);
    let disk = folder.path().join("disk");
    let content = Rng::fixed(21).bytes(DISK_LEN);
    fs::write(&disk, &content).unwrap();
    let server = Serve::image(&disk).format("raw").start();
    (folder, server, content)
}

/// The descriptors of a server that has served on each of its threads.
fn descriptors_when_warm(server: &Server) -> usize {
    let mut clients: Vec<_> = (0..8).map(|_| Client::unix(server.socket(), "", Wishes::STRUCTURED)).collect();
    for client in &mut clients {
        client.read(0, 512); // so that it has reached its thread, and the thread has all that it opens
    }
    let while_connected = proc::descriptors_but_rings(server.pid());
    clients.into_iter().for_each(Client::disconnect);
    let begin = Instant::now();
    while proc::descriptors_but_rings(server.pid()) + 8 > while_connected {
        assert!(
            begin.elapsed() < Duration::from_secs(20),
            "{while_connected} descriptors do not go down by 8"
        );
        thread::sleep(Duration::from_millis(20));
    }
    proc::descriptors_but_rings(server.pid())
}

#[track_caller]
fn assert_serves(server: &mut Server, content: &[u8]) {
    server.assert_alive();
    let mut client = Client::unix(server.socket(), "", Wishes::STRUCTURED);
    assert_same("a well-behaved client", &client.read(4096, 65536), &content[4096..4096 + 65536]);
    client.disconnect();
}

/// The bytes of a client that negotiates all there is and then reads once.
fn honest_bytes() -> Vec<u8> {
    let mut bytes = 3_u32.to_be_bytes().to_vec();
    bytes.extend(option_bytes(option::STRUCTURED_REPLY, &[]));
    bytes.extend(option_bytes(option::LIST, &[]));
    bytes.extend(option_bytes(option::GO, &go_data("")));
    bytes.extend(Request::new(command::READ, 4096, 512).bytes(77));
    bytes
}

#[test]
fn a_handshake_may_end_anywhere() {
    let (_folder, mut server, content) = start("handshake-end");
    assert_serves(&mut server, &content);
    let before = descriptors_when_warm(&server);
    let bytes = honest_bytes();
    for cut in 0..=bytes.len() {
        let mut stream = UnixStream::connect(server.socket()).unwrap();
        stream.write_all(&bytes[..cut]).unwrap();
        if cut % 2 == 0 {
            let _ = stream.read(&mut [0; 1]); // a part of the greeting read, the rest thrown away: a reset
        }
    }
    wait_for_descriptors(&server, before);
    assert_serves(&mut server, &content);
    server.stop();
}

#[test]
fn a_handshake_may_come_byte_by_byte() {
    let (_folder, server, content) = start("handshake-bytes");
    for len in [1, 2, 3, 7] {
        let mut stream = greet(server.socket());
        for piece in honest_bytes().chunks(len) {
            stream.write_all(piece).unwrap();
            thread::sleep(Duration::from_micros(200));
        }
        assert_eq!(read_option_reply(&mut stream, option::STRUCTURED_REPLY).unwrap().0, option_reply::ACK);
        for last in [option::LIST, option::GO] {
            while read_option_reply(&mut stream, last).unwrap().0 != option_reply::ACK {}
        }
        let mut reply = vec![0; 20 + 8 + 512];
        stream.read_exact(&mut reply).unwrap();
        assert_eq!(reply[..4], wire::STRUCTURED_REPLY_MAGIC.to_be_bytes());
        assert_same("the read", &reply[28..], &content[4096..4608]);
    }
    server.stop();
}

#[test]
fn strangers_are_no_trouble() {
    let (_folder, mut server, content) = start("strangers");
    assert_serves(&mut server, &content);
    let (before, mut rng) = (descriptors_when_warm(&server), Rng::new("strangers"));
    for round in 0..400 {
        let mut stream = UnixStream::connect(server.socket()).unwrap();
        let bytes = match round % 5 {
            0 => b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n".to_vec(),
            1 => [&[0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3][..], &rng.bytes(507)].concat(), // TLS ClientHello
            2 => rng.bytes(1 << (round % 14)),
            3 => [&3_u32.to_be_bytes()[..], &rng.bytes(300)].concat(),
            _ => Vec::new(),
        };
        // It may have been closed already.
        let _ = stream.write_all(&bytes);
    }
    wait_for_descriptors(&server, before);
    assert_serves(&mut server, &content);
    server.stop();
}

#[test]
fn bad_options_keep_the_stream_in_step() {
    let (_folder, mut server, content) = start("options");
    let name_longer_than_data = [&100_u32.to_be_bytes()[..], b"abc"].concat();
    let cases: [(&str, u32, Vec<u8>, &[u32]); 8] = [
        ("unknown", 0x4711, b"data".to_vec(), &[option_reply::ERR_UNSUP]),
        ("list with data", option::LIST, vec![1; 9], &[option_reply::ERR_INVALID]),
        ("structured with data", option::STRUCTURED_REPLY, vec![1], &[option_reply::ERR_INVALID]),
        ("go, cut short", option::GO, vec![0, 0], &[option_reply::ERR_INVALID]),
        ("go, name past the data", option::GO, name_longer_than_data.clone(), &[option_reply::ERR_INVALID]),
        ("info, name past the data", option::INFO, name_longer_than_data, &[option_reply::ERR_INVALID]),
        ("go, unknown", option::GO, go_data("no such export"), &[option_reply::ERR_UNKNOWN]),
        (
            "go, unknown, 4096 bytes",
            option::GO,
            go_data(&"\u{10348}".repeat(1024)),
            &[option_reply::ERR_UNKNOWN, option_reply::ERR_TOO_BIG, option_reply::ERR_INVALID],
        ),
    ];
    let mut stream = greet(server.socket());
    stream.write_all(&3_u32.to_be_bytes()).unwrap();
    for (what, option, data, expected) in cases {
        stream.write_all(&option_bytes(option, &data)).unwrap();
        let (kind, text) = read_option_reply(&mut stream, option).unwrap();
        assert!(expected.contains(&kind), "{what}: {kind:#x}");
        assert!(text.len() <= 4096, "{what}: a text of {} bytes", text.len());
    }
    stream.write_all(&option_bytes(option::GO, &go_data(""))).unwrap();
    while read_option_reply(&mut stream, option::GO).unwrap().0 != option_reply::ACK {}
    stream.write_all(&Request::new(command::READ, 512, 512).bytes(5)).unwrap();
    let mut reply = vec![0; 16 + 512];
    stream.read_exact(&mut reply).unwrap();
    assert_same("the read after it all", &reply[16..], &content[512..1024]);
    assert_serves(&mut server, &content);
    server.stop();
}

#[test]
fn lengths_that_lie_cost_no_memory() {
    let (_folder, mut server, content) = start("lengths");
    assert_serves(&mut server, &content);
    let before = proc::resident_len(server.pid());
    let mut open = Vec::new();
    for option in (0..=16).chain([0x4711, u32::MAX]) {
        for len in [u32::MAX, 1 << 31, (32 << 20) + 1] {
            let mut stream = greet(server.socket());
            stream.write_all(&3_u32.to_be_bytes()).unwrap();
            stream.write_all(&wire::OPTION_MAGIC.to_be_bytes()).unwrap();
            stream.write_all(&[option.to_be_bytes(), len.to_be_bytes()].concat()).unwrap();
            open.push(stream);
        }
    }
    // Writes that are announced and never come.
    let mut writers = Vec::new();
    for _ in 0..16 {
        let mut client = Client::unix(server.socket(), "", Wishes::SIMPLE);
        client.send(Request::new(command::WRITE, 4 << 20, 4 << 20), &[1; 100]).unwrap();
        writers.push(client);
    }
    thread::sleep(Duration::from_millis(300));
    assert_serves(&mut server, &content);
    let grown = proc::resident_len(server.pid()).saturating_sub(before);
    assert!(grown < 64 << 20, "{grown} bytes more for payloads that never came");
    drop((open, writers));
    server.stop();
}

#[test]
fn bad_requests_get_their_error_and_the_stream_goes_on() {
    let (_folder, server, content) = start("requests");
    for wishes in [Wishes::SIMPLE, Wishes::STRUCTURED] {
        let mut client = Client::unix(server.socket(), "", wishes);
        for (what, request, payload_len, expected) in bad_requests(wishes) {
            let reply = client.ask(request, &vec![0xbb; payload_len]);
            // QEMU says EINVAL wherever the protocol would rather have ENOSPC.
            let good = reply.error == expected || (!support::is_nbd_img() && reply.error == errno::EINVAL);
            assert!(good, "{what} {wishes:?}: error {} {}, not {expected}", reply.error, reply.text);
            assert_same(what, &client.read(65536, 4096), &content[65536..65536 + 4096]);
        }
        assert_same("nothing was changed", &client.read_all(), &content);
        client.disconnect();
    }
    server.stop();
}

fn bad_requests(wishes: Wishes) -> Vec<(&'static str, Request, usize, u32)> {
    let end = DISK_LEN as u64;
    let request = |command, offset, len| Request::new(command, offset, len);
    let mut cases = vec![
        ("unknown command", request(99, 0, 0), 0, errno::EINVAL),
        ("unknown flag", request(command::READ, 0, 512).flags(1 << 15), 0, errno::EINVAL),
        ("unknown flag on a write", request(command::WRITE, 0, 512).flags(1 << 14), 512, errno::EINVAL),
        ("NO_HOLE on a read", request(command::READ, 0, 512).flags(command_flag::NO_HOLE), 0, errno::EINVAL),
        ("read across the end", request(command::READ, end - 512, 1024), 0, errno::EINVAL),
        ("read behind the end", request(command::READ, end + (1 << 40), 512), 0, errno::EINVAL),
        ("read that wraps", request(command::READ, u64::MAX - 511, 1024), 0, errno::EINVAL),
        ("write across the end", request(command::WRITE, end - 512, 1024), 1024, errno::ENOSPC),
        ("write that wraps", request(command::WRITE, u64::MAX - 511, 1024), 1024, errno::ENOSPC),
        ("long write behind the end", request(command::WRITE, end, 4 << 20), 4 << 20, errno::ENOSPC),
        ("zeroes across the end", request(command::WRITE_ZEROES, end - 512, 1024), 0, errno::ENOSPC),
        ("trim across the end", request(command::TRIM, end - 512, 1024), 0, errno::EINVAL),
        ("oversize read", request(command::READ, 0, (32 << 20) + 1), 0, errno::EINVAL),
        ("status without a context", request(command::BLOCK_STATUS, 0, 512), 0, errno::EINVAL),
    ];
    if !wishes.structured {
        let df = request(command::READ, 0, 512).flags(command_flag::DF);
        cases.push(("DF without structured replies", df, 0, errno::EINVAL));
    }
    cases
}

#[test]
fn empty_requests_are_harmless() {
    let (_folder, server, content) = start("empty");
    let mut client = Client::unix(server.socket(), "", Wishes::STRUCTURED);
    for command in [command::READ, command::WRITE, command::TRIM, command::WRITE_ZEROES, command::CACHE] {
        // The protocol leaves open what the answer is, but there must be one.
        let reply = client.ask(Request::new(command, 4096, 0), &[]);
        assert!(reply.error == 0 || reply.error == errno::EINVAL, "command {command}: {reply:?}");
    }
    assert_same("the disk", &client.read_all(), &content);
    client.disconnect();
    server.stop();
}

#[test]
fn an_oversize_write_is_drained_or_cut_off() {
    let (_folder, mut server, content) = start("oversize");
    for len in [(32 << 20) + 1, 64 << 20] {
        let mut client = Client::unix(server.socket(), "", Wishes::SIMPLE);
        match client.send(Request::new(command::WRITE, 0, len), &vec![0xcc; len]) {
            Ok(_) => match client.reply() {
                Ok(reply) => {
                    assert!([errno::EINVAL, errno::ENOSPC].contains(&reply.error), "{reply:?}");
                    assert_same("in step", &client.read(0, 512), &content[..512]);
                }
                Err(e) => assert!(is_hangup(&e), "{e}"),
            },
            Err(e) => assert!(is_hangup(&e), "{e}"),
        }
        assert_serves(&mut server, &content);
    }
    server.stop();
}

#[test]
fn a_wrong_magic_ends_the_connection() {
    let (_folder, mut server, content) = start("magic");
    let mut client = Client::unix(server.socket(), "", Wishes::SIMPLE);
    let mut bytes = Request::new(command::READ, 0, 512).bytes(1);
    bytes[0] ^= 0xff;
    client.stream().write_all(&bytes).unwrap();
    let mut rest = Vec::new();
    match client.stream().read_to_end(&mut rest) {
        Ok(_) => assert!(rest.len() <= 16, "{} bytes after a wrong magic", rest.len()),
        Err(e) => assert_eq!(e.kind(), ErrorKind::ConnectionReset),
    }
    assert_serves(&mut server, &content);
    server.stop();
}

/// 64 requests of 64 KiB in one piece, in small pieces, and in every mixture of reads and writes.
#[test]
fn storms_are_answered_by_cookie() {
    let (_folder, server, mut content) = start("storm");
    let mut rng = Rng::new("storm");
    let mut out_of_order = 0;
    for round in 0..20 {
        let wishes = if round % 2 == 0 { Wishes::SIMPLE } else { Wishes::STRUCTURED };
        let mut client = Client::unix(server.socket(), "", wishes);
        let (mut bytes, mut reads, mut order) = (Vec::new(), HashMap::new(), Vec::new());
        // The blocks in a random order, each once: no two requests meet.
        let mut blocks: Vec<usize> = (0..DISK_LEN >> 16).collect();
        for i in (1..blocks.len()).rev() {
            blocks.swap(i, usize::try_from(rng.below(i as u64 + 1)).unwrap());
        }
        for &block in &blocks[..64] {
            let range = block << 16..(block + 1) << 16;
            let write = rng.one_in(2);
            let command = if write { command::WRITE } else { command::READ };
            let request = Request::new(command, range.start as u64, 1 << 16);
            let cookie = client.register(request);
            order.push(cookie);
            bytes.extend(request.bytes(cookie));
            if write {
                let data = rng.bytes(1 << 16);
                bytes.extend(&data);
                content[range].copy_from_slice(&data);
            } else {
                reads.insert(cookie, range);
            }
        }
        out_of_order += storm(&mut client, &bytes, round, &order, &reads, &content);
        client.disconnect();
    }
    eprintln!("{out_of_order} of {} replies came out of order", 20 * 64);
    let mut client = Client::unix(server.socket(), "", Wishes::STRUCTURED);
    assert_same("the disk after the storms", &client.read_all(), &content);
    client.disconnect();
    server.stop();
}

/// Sends `bytes` in pieces that depend on the round and checks every reply; gives how many came out of order.
fn storm(
    client: &mut Client,
    bytes: &[u8],
    round: usize,
    order: &[u64],
    reads: &HashMap<u64, std::ops::Range<usize>>,
    content: &[u8],
) -> usize {
    let piece = [usize::MAX, 100_003, 4096, 1000][round % 4].min(bytes.len());
    let mut out_of_order = 0;
    let mut sender = client.stream().duplicate().unwrap();
    thread::scope(|scope| {
        // Beside the reading: a server may want its answers read before it takes more.
        scope.spawn(move || bytes.chunks(piece).for_each(|part| sender.write_all(part).unwrap()));
        for &expected in order {
            let reply = client.reply().unwrap();
            assert_eq!(reply.error, 0, "{}", reply.text);
            out_of_order += usize::from(reply.cookie != expected);
            match reads.get(&reply.cookie) {
                Some(range) => assert_same(&format!("{range:?}"), &reply.data, &content[range.clone()]),
                None => assert!(reply.data.is_empty()),
            }
        }
    });
    assert_eq!(client.in_flight(), 0);
    out_of_order
}

/// A client that asks and asks and never reads the answers gets no more memory than its share, and nobody waits for it.
#[test]
fn a_client_that_does_not_read_is_on_its_own() {
    let (_folder, mut server, content) = start("deaf");
    assert_serves(&mut server, &content);
    let before = proc::resident_len(server.pid());
    let mut deaf = Vec::new();
    for _ in 0..4 {
        let mut client = Client::unix(server.socket(), "", Wishes::SIMPLE);
        client.stream().set_patience(Some(Duration::from_millis(200))).unwrap();
        let request = Request::new(command::READ, 0, 1 << 20);
        // Until the server stops taking requests, or a GiB has been asked for.
        let taken = (0..1000).take_while(|_| client.send(request, &[]).is_ok()).count();
        assert!(taken >= 1);
        deaf.push(client);
    }
    // Who waits for them waits until they are given up, which is after a minute.
    let begin = Instant::now();
    assert_serves(&mut server, &content);
    assert!(begin.elapsed() < Duration::from_secs(30), "another client waited {:?}", begin.elapsed());
    let grown = proc::resident_len(server.pid()).saturating_sub(before);
    assert!(grown < 256 << 20, "{grown} bytes more for answers that nobody reads");
    drop(deaf);
    assert_serves(&mut server, &content);
    server.stop();
}

#[track_caller]
fn wait_for_descriptors(server: &Server, limit: usize) {
    let begin = Instant::now();
    while proc::descriptors_but_rings(server.pid()) > limit {
        let open = proc::descriptors_but_rings(server.pid());
        assert!(begin.elapsed() < Duration::from_secs(20), "{open} descriptors, before {limit}");
        thread::sleep(Duration::from_millis(20));
    }
}

/// It sends options that are cheap to send and dear to answer as fast as they are taken, and reads every answer: it never
/// has to be waited for.
#[test]
fn a_flood_of_options_holds_up_nobodys_handshake() {
    let (_folder, mut server, content) = start("option-flood");
    let mut queries = vec![0; 64 << 10];
    let count = (queries.len() / 4 - 2) as u32;
    queries[4..8].copy_from_slice(&count.to_be_bytes()); // of the export "", each of them empty
    let option = option_bytes(option::LIST_META_CONTEXT, &queries);
    let mut flood = greet(server.socket());
    flood.write_all(&3_u32.to_be_bytes()).unwrap();
    flood.write_all(&option_bytes(option::STRUCTURED_REPLY, &[])).unwrap();
    assert_eq!(read_option_reply(&mut flood, option::STRUCTURED_REPLY).unwrap().0, option_reply::ACK);
    let mut answers = flood.try_clone().unwrap();
    let reader = thread::spawn(move || std::io::copy(&mut answers, &mut std::io::sink()));
    let mut writer = flood.try_clone().unwrap();
    let writer = thread::spawn(move || (0..4000).map_while(|_| writer.write_all(&option).ok()).count());
    thread::sleep(Duration::from_millis(100));
    for _ in 0..3 {
        let begin = Instant::now();
        assert_serves(&mut server, &content);
        assert!(begin.elapsed() < Duration::from_secs(5), "a handshake took {:?}", begin.elapsed());
        assert!(!writer.is_finished(), "the flood was over before");
    }
    flood.shutdown(std::net::Shutdown::Both).unwrap();
    writer.join().unwrap();
    let _ = reader.join().unwrap();
}
