//! What servers get wrong, row by row: each of these was met in a server that people use, or is a rule of the protocol
//! that is easily missed. Requests are sent in all three forms (simple, structured, extended).
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[allow(dead_code)]
mod support;

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use support::client::{Client, Request, Wishes, go_data, greet, is_hangup, option_bytes, read_option_reply};
use support::in_process::{Disk, InProcess};
use support::rng::Rng;
use support::server::{Serve, Server};
use support::wire::{self, command, command_flag, errno, option, option_reply, transmission};
use support::{assert_same, wait_until};

const DISK_LEN: usize = 80 << 20;
const END: u64 = DISK_LEN as u64;
const FORMS: [Wishes; 3] = [Wishes::SIMPLE, Wishes::ALLOCATION, Wishes::EXTENDED];

fn start(test: &str, args: &[&str]) -> (tempfile::TempDir, Server, Vec<u8>) {
    let folder = support::scratch(test);
    let disk = folder.path().join("disk");
    let content = Rng::fixed(5).bytes(DISK_LEN);
    fs::write(&disk, &content).unwrap();
    let server = Serve::image(&disk).format("raw").args(args).start();
    (folder, server, content)
}

/// A row: what it is, the request, its payload, and the error that it has to get.
type Row = (&'static str, Request, usize, u32);

fn rows(form: Wishes) -> Vec<Row> {
    let ask = |command, offset, len: usize| Request::new(command, offset, len);
    let (fua, df) = (command_flag::FUA, command_flag::DF);
    let chunked = form.structured || form.extended;
    let mut rows = vec![
        ("write beyond the end", ask(command::WRITE, END - 512, 1024), 1024, errno::ENOSPC),
        ("write behind the end", ask(command::WRITE, END, 512), 512, errno::ENOSPC),
        ("zeroes beyond the end", ask(command::WRITE_ZEROES, END - 512, 1024), 0, errno::ENOSPC),
        ("read beyond the end", ask(command::READ, END - 512, 1024), 0, errno::EINVAL),
        ("trim beyond the end", ask(command::TRIM, END - 512, 1024), 0, errno::EINVAL),
        ("cache beyond the end", ask(command::CACHE, END - 512, 1024), 0, errno::EINVAL),
        ("status beyond the end", ask(command::BLOCK_STATUS, END - 512, 1024), 0, errno::EINVAL),
        ("read that wraps", ask(command::READ, u64::MAX - 511, 1024), 0, errno::EINVAL),
        ("write that wraps", ask(command::WRITE, u64::MAX - 511, 1024), 1024, errno::ENOSPC),
        ("zeroes that wrap", ask(command::WRITE_ZEROES, u64::MAX - 511, 1024), 0, errno::ENOSPC),
        ("oversize read", ask(command::READ, 0, 33 << 20), 0, errno::EINVAL),
        ("the largest read", ask(command::READ, 512, 32 << 20), 0, 0),
        ("zero-length read", ask(command::READ, 4096, 0), 0, 0),
        ("zero-length write", ask(command::WRITE, 4096, 0), 0, 0),
        ("zero-length trim", ask(command::TRIM, 4096, 0), 0, 0),
        ("zero-length zeroes", ask(command::WRITE_ZEROES, 4096, 0), 0, 0),
        ("zero-length status", ask(command::BLOCK_STATUS, 4096, 0), 0, errno::EINVAL),
        ("flush with offset and length", ask(command::FLUSH, 4096, 4096), 0, 0),
        ("flush with offset and length beyond all bounds", ask(command::FLUSH, u64::MAX, 4096), 0, 0),
        ("FUA on a read", ask(command::READ, 0, 4096).flags(fua), 0, 0),
        ("FUA on a flush", ask(command::FLUSH, 0, 0).flags(fua), 0, 0),
        ("FUA on a cache", ask(command::CACHE, 0, 4096).flags(fua), 0, 0),
        ("NO_HOLE on a read", ask(command::READ, 0, 512).flags(command_flag::NO_HOLE), 0, errno::EINVAL),
        ("NO_HOLE on a write", ask(command::WRITE, 0, 512).flags(command_flag::NO_HOLE), 512, errno::EINVAL),
        ("DF on a read", ask(command::READ, 0, 65_536).flags(df), 0, if chunked { 0 } else { errno::EINVAL }),
        ("DF on a flush", ask(command::FLUSH, 0, 0).flags(df), 0, errno::EINVAL),
        ("REQ_ONE on a read", ask(command::READ, 0, 512).flags(command_flag::REQ_ONE), 0, errno::EINVAL),
        ("FAST_ZERO on a trim", ask(command::TRIM, 0, 512).flags(command_flag::FAST_ZERO), 0, errno::EINVAL),
        ("an unknown flag", ask(command::READ, 0, 512).flags(1 << 15), 0, errno::EINVAL),
        ("an unknown command", ask(99, 0, 512), 0, errno::EINVAL),
        ("resize", ask(8, 0, 0), 0, errno::EINVAL),
    ];
    if !form.extended {
        rows.push((
            "oversize write",
            ask(command::WRITE, 0, (32 << 20) + 512),
            (32 << 20) + 512,
            errno::EINVAL,
        ));
        let announced = ask(command::WRITE, 0, 512).flags(command_flag::PAYLOAD_LEN);
        rows.push(("PAYLOAD_LEN that was not agreed", announced, 512, errno::EINVAL));
    }
    if form.contexts.is_empty() {
        rows.retain(|(_, request, ..)| request.command != command::BLOCK_STATUS);
        rows.push(("status without contexts", ask(command::BLOCK_STATUS, 0, 512), 0, errno::EINVAL));
    } else {
        let fua_status = ask(command::BLOCK_STATUS, 0, 4096).flags(fua);
        rows.push(("FUA on a status", fua_status, 0, 0));
    }
    rows
}

#[test]
fn requests_get_the_error_of_the_book() {
    let (_folder, server, content) = start("book-requests", &[]);
    for form in FORMS {
        let mut client = Client::unix(server.socket(), "", form);
        for (what, request, payload_len, expected) in rows(form) {
            let reply = client.ask(request, &vec![0xbb; payload_len]);
            assert_eq!(reply.error, expected, "{what} {form:?}: {}", reply.text);
            let chunked = form.structured || form.extended;
            assert!(expected == 0 || !chunked || !reply.text.is_empty(), "{what}: no text");
            assert_same(what, &client.read(65_536, 512), &content[65_536..66_048]);
        }
        assert_same("nothing was changed", &client.read_all(), &content);
        client.disconnect();
    }
    server.stop();
}

#[test]
fn a_read_only_export_permits_no_change() {
    let (_folder, server, content) = start("book-read-only", &["--read-only"]);
    for form in FORMS {
        let mut client = Client::unix(server.socket(), "", form);
        assert_ne!(client.flags & transmission::READ_ONLY, 0);
        assert_eq!(client.flags & (transmission::SEND_TRIM | transmission::SEND_WRITE_ZEROES), 0);
        for (command, payload_len) in [(command::WRITE, 4096), (command::TRIM, 0), (command::WRITE_ZEROES, 0)]
        {
            for (offset, len) in [(0, 4096), (END, 4096), (0, 0)] {
                let payload = vec![0xcc; if len == 0 { 0 } else { payload_len }];
                let reply = client.ask(Request::new(command, offset, len), &payload);
                assert_eq!(reply.error, errno::EPERM, "{command} {form:?}");
            }
        }
        assert_eq!(client.ask(Request::new(command::FLUSH, 0, 0), &[]).error, 0);
        assert_same("the disk", &client.read(0, 4096), &content[..4096]);
        client.disconnect();
    }
    server.stop();
}

/// nbdkit on NFS zeroed 64 MiB of longer requests and left the rest.
#[test]
fn long_zeroes_reach_their_end() {
    let (_folder, server, content) = start("book-zeroes", &[]);
    let mut client = Client::unix(server.socket(), "", Wishes::STRUCTURED);
    let len = DISK_LEN - 8192;
    let zeroes = Request::new(command::WRITE_ZEROES, 4096, len).flags(command_flag::NO_HOLE);
    assert_eq!(client.ask(zeroes, &[]).error, 0);
    let mut expected = content.clone();
    expected[4096..4096 + len].fill(0);
    assert_same("the disk", &client.read_all(), &expected);
    client.disconnect();
    server.stop();
}

#[test]
fn a_file_of_an_odd_size() {
    let folder = support::scratch("book-odd");
    let disk = folder.path().join("disk");
    fs::write(&disk, [0x5a; 1000]).unwrap();
    for (args, size) in [(&[][..], 1024), (&["--exact-size"][..], 1000)] {
        let server = Serve::image(&disk).format("raw").read_only().args(args).start();
        for form in [Wishes::SIMPLE, Wishes::ALLOCATION, Wishes::EXTENDED] {
            let mut client = Client::unix(server.socket(), "", form);
            assert_eq!(client.size, size);
            let mut expected = vec![0x5a; 1000];
            expected.resize(usize::try_from(size).unwrap(), 0);
            assert_same("the disk", &client.read_all(), &expected);
            if !form.contexts.is_empty() {
                let status = client.ask(Request::new(command::BLOCK_STATUS, 0, expected.len()), &[]);
                assert_eq!(status.extents.iter().map(|(len, _)| len).sum::<u64>(), size, "not past the end");
            }
            client.disconnect();
        }
        server.stop();
    }
}

fn ask(stream: &mut UnixStream, option: u32, data: &[u8]) -> u32 {
    stream.write_all(&option_bytes(option, data)).unwrap();
    loop {
        let (kind, data) = read_option_reply(stream, option).unwrap();
        assert!(data.len() <= 4096 + 8, "an option reply of {} bytes", data.len());
        if !matches!(kind, option_reply::SERVER | option_reply::INFO | option_reply::META_CONTEXT) {
            return kind;
        }
    }
}

fn assert_hangs_up(stream: &mut UnixStream) {
    let mut rest = Vec::new();
    match stream.read_to_end(&mut rest) {
        Ok(_) => assert!(rest.is_empty(), "{rest:?}"),
        Err(error) => assert!(is_hangup(&error), "{error}"),
    }
}

fn fixed(server: &Server) -> UnixStream {
    let mut stream = greet(server.socket());
    stream.write_all(&3_u32.to_be_bytes()).unwrap();
    stream
}

#[test]
fn options_get_the_answer_of_the_book() {
    let (_folder, server, _) = start("book-options", &[]);
    let named = |name: &[u8]| [&u32::try_from(name.len()).unwrap().to_be_bytes()[..], name, &[0, 0]].concat();
    let table: [(&str, u32, Vec<u8>, u32); 9] = [
        ("GO with 2 bytes", option::GO, vec![0, 0], option_reply::ERR_INVALID),
        ("a name with NUL", option::GO, named(b"a\0b"), option_reply::ERR_INVALID),
        ("a name of 5000 bytes", option::GO, named(&[b'x'; 5000]), option_reply::ERR_INVALID),
        ("an unknown name", option::GO, named(b"nothing"), option_reply::ERR_UNKNOWN),
        ("STARTTLS without TLS", option::STARTTLS, vec![], option_reply::ERR_POLICY),
        ("LIST with data", option::LIST, vec![1], option_reply::ERR_INVALID),
        (
            "contexts without structured replies",
            option::SET_META_CONTEXT,
            vec![0; 8],
            option_reply::ERR_INVALID,
        ),
        ("PEEK_EXPORT", 4, vec![], option_reply::ERR_UNSUP),
        ("unknown", 0x4711, vec![7; 100], option_reply::ERR_UNSUP),
    ];
    let mut stream = fixed(&server);
    for (what, option, data, expected) in &table {
        assert_eq!(ask(&mut stream, *option, data), *expected, "{what}");
    }
    for number in 100..300 {
        assert_eq!(ask(&mut stream, number, b"data"), option_reply::ERR_UNSUP);
    }
    assert_eq!(ask(&mut stream, option::ABORT, b"data"), option_reply::ACK, "ABORT is acknowledged");
    assert_hangs_up(&mut stream);
    server.stop();
}

#[test]
fn clients_that_cannot_be_served_are_hung_up_on() {
    let (_folder, server, _) = start("book-hang-up", &[]);
    for flags in [4_u32, 0x8000_0003, u32::MAX] {
        let mut stream = greet(server.socket());
        stream.write_all(&flags.to_be_bytes()).unwrap();
        assert_hangs_up(&mut stream);
    }
    for option in [option::LIST, option::GO, 99] {
        let mut stream = fixed(&server);
        let header = [option.to_be_bytes(), (40_u32 << 20).to_be_bytes()].concat();
        stream.write_all(&[&wire::OPTION_MAGIC.to_be_bytes()[..], &header].concat()).unwrap();
        assert_hangs_up(&mut stream);
    }
    for form in FORMS {
        let mut client = Client::unix(server.socket(), "", form);
        client.stream().write_all(&[0x12, 0x56, 0x09, 0x53]).unwrap();
        let mut rest = Vec::new();
        let _ = client.stream().read_to_end(&mut rest);
        assert!(rest.is_empty(), "no answer to what is no request");
    }
    server.stop();
}

/// The same question gets one answer, whoever asks it twice.
#[test]
fn a_context_is_selected_once() {
    let (_folder, server, _) = start("book-contexts", &[]);
    let mut stream = fixed(&server);
    assert_eq!(ask(&mut stream, option::STRUCTURED_REPLY, &[]), option_reply::ACK);
    let query = [&15_u32.to_be_bytes()[..], b"base:allocation"].concat();
    let data = [&0_u32.to_be_bytes()[..], &3_u32.to_be_bytes(), &query, &query, &query].concat();
    stream.write_all(&option_bytes(option::SET_META_CONTEXT, &data)).unwrap();
    let first = read_option_reply(&mut stream, option::SET_META_CONTEXT).unwrap();
    assert_eq!((first.0, &first.1[4..]), (option_reply::META_CONTEXT, &b"base:allocation"[..]));
    assert_eq!(read_option_reply(&mut stream, option::SET_META_CONTEXT).unwrap().0, option_reply::ACK);
    assert_eq!(ask(&mut stream, option::GO, &go_data("")), option_reply::ACK);
    server.stop();
}

/// What was in flight is finished; what comes behind it is told; then the connection ends.
#[test]
fn a_draining_server_answers_with_eshutdown() {
    for form in [Wishes::SIMPLE, Wishes::STRUCTURED, Wishes { contexts: &[], ..Wishes::EXTENDED }] {
        let disk = Disk::new(&vec![7; 1 << 20]);
        let server = InProcess::serve(disk.clone(), 64 << 20);
        let mut client = Client::unix(server.socket(), "", form);
        client.read(4096, 4096);
        disk.hold(0);
        let slow = client.send(Request::new(command::READ, 0, 4096), &[]).unwrap();
        wait_until("the read is under way", || disk.held_up() == 1);
        server.shards.drain();
        // The connection's thread hears of it a moment later.
        wait_until("it drains", || {
            client.ask(Request::new(command::READ, 4096, 4096), &[]).error == errno::ESHUTDOWN
        });
        let late = [
            client.send(Request::new(command::READ, 4096, 4096), &[]).unwrap(),
            client.send(Request::new(command::WRITE, 0, 4096), &[1; 4096]).unwrap(),
            client.send(Request::new(command::FLUSH, 0, 0), &[]).unwrap(),
        ];
        let replies = late.map(|_| client.reply().unwrap());
        assert!(replies.iter().all(|reply| reply.error == errno::ESHUTDOWN), "{form:?}: {replies:?}");
        assert!(late.iter().all(|cookie| replies.iter().any(|reply| reply.cookie == *cookie)));
        disk.let_go(0);
        let last = client.reply().unwrap();
        assert_eq!((last.cookie, last.error), (slow, 0), "{form:?}");
        let mut rest = Vec::new();
        assert_eq!(client.stream().read_to_end(&mut rest).unwrap(), 0, "then the connection ends");
        server.assert_clean();
    }
}

/// The server waits for a client that stands still; meanwhile others hear that it goes down.
#[test]
fn a_draining_server_tells_those_who_negotiate() {
    let folder = support::scratch("book-drain");
    let disk = folder.path().join("disk");
    File::create_new(&disk).unwrap().set_len(64 << 20).unwrap();
    let mut server = Serve::image(&disk).format("raw").args(&["--drain-timeout", "60"]).start();
    let mut negotiating = fixed(&server);
    assert_eq!(ask(&mut negotiating, option::LIST, &[]), option_reply::ACK);
    // Replies that nobody reads keep a session from its end.
    let mut deaf = Client::unix(server.socket(), "", Wishes::SIMPLE);
    for at in 0..4 {
        deaf.send(Request::new(command::READ, at << 20, 16 << 20), &[]).unwrap();
    }
    // The first answer is on its way: its header is here.
    deaf.stream().read_exact(&mut [0; 16]).unwrap();
    server.signal(rustix::process::Signal::TERM);
    wait_until("it drains", || {
        ask(&mut negotiating, option::INFO, &go_data("")) == option_reply::ERR_SHUTDOWN
    });
    assert_eq!(ask(&mut negotiating, option::GO, &go_data("")), option_reply::ERR_SHUTDOWN);
    assert_eq!(ask(&mut negotiating, option::ABORT, &[]), option_reply::ACK);
    drop(deaf);
    assert!(server.wait(Duration::from_secs(70)).success());
}

/// GO without a word about block sizes, as old clients do; then a read and a write by hand.
struct Unasked(UnixStream);

impl Unasked {
    fn connect(server: &Server) -> Self {
        let mut stream = fixed(server);
        // A name of no bytes and no information requests.
        assert_eq!(ask(&mut stream, option::GO, &[0; 6]), option_reply::ACK);
        Self(stream)
    }

    fn ask(&mut self, request: Request, payload: &[u8], reply_len: usize) -> Vec<u8> {
        self.0.write_all(&[request.bytes(9), payload.to_vec()].concat()).unwrap();
        let mut reply = vec![0; 16 + reply_len];
        self.0.read_exact(&mut reply).unwrap();
        assert_eq!(reply[4..8], [0; 4], "{request:?}");
        reply.split_off(16)
    }
}

/// Of the image `none` and `directsync` have a descriptor that goes past the page cache; the others have none.
#[test]
fn caches_are_passed_by_whom_they_should() {
    for format in ["raw", "qcow2"] {
        for (cache, direct) in
            [("none", true), ("directsync", true), ("writeback", false), ("writethrough", false)]
        {
            let folder = support::scratch("book-direct");
            support::tools::qemu_img(folder.path(), &format!("create -q -f {format} disk 1M"));
            let disk = folder.path().join("disk");
            let server = Serve::image(&disk).format(format).args(&["--cache", cache]).start();
            let mut client = Client::unix(server.socket(), "", Wishes::STRUCTURED);
            client.write(0, &[7; 4096]);
            client.flush();
            let flags = support::proc::open_flags(server.pid(), &disk);
            assert!(!flags.is_empty(), "{format} {cache}: it has not opened the image");
            let is_direct = flags.iter().any(|flags| flags & libc::O_DIRECT != 0);
            assert_eq!(is_direct, direct, "{format} {cache}: {flags:?}");
            client.disconnect();
            server.stop();
        }
    }
}

/// The minimum is what the image needs (1, or a block with O_DIRECT on raw), the rules between the sizes hold, and
/// whoever did not ask is served whatever the alignment.
#[test]
fn block_sizes_are_true_and_bind_only_who_asked() {
    for (format, cache) in [("raw", "writeback"), ("raw", "none"), ("qcow2", "writeback"), ("qcow2", "none")]
    {
        let folder = support::scratch("book-blocks");
        support::tools::qemu_img(folder.path(), &format!("create -q -f {format} disk 1M"));
        let server =
            Serve::image(folder.path().join("disk")).format(format).args(&["--cache", cache]).start();
        let mut asking = Client::unix(server.socket(), "", Wishes::STRUCTURED);
        let (minimum, preferred, payload) = asking.block_sizes.unwrap();
        let what = format!("{format} {cache}: {minimum} {preferred} {payload}");
        assert!(minimum.is_power_of_two() && minimum <= 65_536, "{what}");
        assert!(preferred.is_power_of_two() && preferred >= minimum.max(512), "{what}");
        assert!(payload >= preferred.max(1 << 20), "{what}");
        assert_eq!(minimum > 1, format == "raw" && cache == "none", "{what}");
        assert_eq!(asking.size % u64::from(minimum), 0, "{what}");
        let mut shadow = vec![0; 1 << 20];
        let mut unasked = Unasked::connect(&server);
        for (at, len) in [(1, 1), (511, 2), (4095, 4098), (70_001, 12_345), ((1 << 20) - 3, 3)] {
            let data: Vec<u8> = (0..len).map(|i| (i * 7 + at) as u8 | 1).collect();
            unasked.ask(Request::new(command::WRITE, at as u64, len), &data, 0);
            shadow[at..at + len].copy_from_slice(&data);
            assert_same(&what, &unasked.ask(Request::new(command::READ, at as u64, len), &[], len), &data);
        }
        unasked.ask(Request::new(command::WRITE_ZEROES, 70_100, 333), &[], 0);
        shadow[70_100..70_433].fill(0);
        unasked.ask(Request::new(command::FLUSH, 0, 0), &[], 0);
        assert_same(&what, &asking.read_all(), &shadow);
        if minimum > 1 {
            let odd = asking.ask(Request::new(command::WRITE, 1, 1), &[0xee]);
            assert_eq!(odd.error, errno::EINVAL, "{what}: who asked keeps to it");
            assert_same(&what, &asking.read_all(), &shadow);
        }
        asking.disconnect();
        server.stop();
    }
}
