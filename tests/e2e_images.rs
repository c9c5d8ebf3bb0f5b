//! What clients read from images of every kind is what `qemu-img convert` makes of the file: for qemu-img, nbdcopy,
//! libnbd and a client of our own. Block status never calls zero what is not, and calls zero all that QEMU calls zero.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[allow(dead_code)]
mod support;

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use serde_json::Value;
use support::client::{Client, Request, Wishes};
use support::images::{self, Case};
use support::rng::Rng;
use support::server::{Serve, Server};
use support::tools::{python_nbd, run, tool};
use support::{assert_same, wire};

/// Images at a time: the clients of one wait for its server half of the time.
const WORKERS: usize = 3;

#[test]
fn clients_read_what_qemu_img_reads() {
    assert!(images::CASES.len() >= 40);
    let folder = support::scratch("images");
    images::make_sources(folder.path());
    let (next, failed) = (AtomicUsize::new(0), std::sync::Mutex::new(Vec::new()));
    thread::scope(|scope| {
        for _ in 0..WORKERS {
            scope.spawn(|| {
                while let Some(case) = images::CASES.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if catch_unwind(AssertUnwindSafe(|| check(case, folder.path()))).is_err() {
                        failed.lock().unwrap().push(case.name);
                    }
                }
            });
        }
    });
    let failed = failed.into_inner().unwrap();
    assert!(failed.is_empty(), "{} of {} images: {failed:?}", failed.len(), images::CASES.len());
}

fn check(case: &Case, folder: &Path) {
    if !support::is_nbd_img() && !case.args.is_empty() && case.qemu_args.is_empty() {
        eprintln!("{}: qemu-nbd has no option for it", case.name);
        return;
    }
    let own = images::make(case, folder);
    let expected = images::expected(case, &own);
    let mut serve =
        Serve::image(own.join("disk")).folder(&own).read_only().args(case.args).qemu_args(case.qemu_args);
    if case.stated {
        serve = serve.format(case.format);
    }
    let server = serve.start();
    own_client_reads(case, &server, &expected);
    nbdcopy_reads(case, &server, &own, &expected);
    qemu_img_reads(case, &server, &own, &expected);
    libnbd_reads(case, &server, &own);
    block_status_is_true(case, &server, &own, &expected);
    server.stop();
    fs::remove_dir_all(own).unwrap();
}

fn own_client_reads(case: &Case, server: &Server, expected: &[u8]) {
    for wishes in [Wishes::SIMPLE, Wishes::STRUCTURED] {
        let mut client = Client::unix(server.socket(), "", wishes);
        assert_eq!(client.size, expected.len() as u64, "{}: size", case.name);
        assert_ne!(client.flags & wire::transmission::READ_ONLY, 0);
        assert_same(&format!("{} {wishes:?}", case.name), &client.read_all(), expected);
        let mut rng = Rng::fixed(7);
        for _ in 0..50 {
            let offset = rng.below(client.size);
            let len = rng.in_range(1..300_000).min(client.size - offset);
            let (start, len) = (usize::try_from(offset).unwrap(), usize::try_from(len).unwrap());
            let what = format!("{} {wishes:?} {len} bytes at {offset:#x}", case.name);
            assert_same(&what, &client.read(offset, len), &expected[start..start + len]);
        }
        client.disconnect();
    }
}

fn nbdcopy_reads(case: &Case, server: &Server, own: &Path, expected: &[u8]) {
    let copy = own.join("nbdcopy.raw");
    run(tool("nbdcopy").arg(server.uri("")).arg(&copy));
    assert_same(&format!("{}: nbdcopy", case.name), &fs::read(copy).unwrap(), expected);
}

fn qemu_img_reads(case: &Case, server: &Server, own: &Path, expected: &[u8]) {
    let copy = own.join("qemu-img.raw");
    run(tool("qemu-img").args(["convert", "-f", "raw", "-O", "raw"]).arg(server.uri("")).arg(&copy));
    assert_same(&format!("{}: qemu-img", case.name), &fs::read(copy).unwrap(), expected);
}

/// Reads in the order of a shuffle, 16 in flight, odd sizes, over every byte.
fn libnbd_reads(case: &Case, server: &Server, own: &Path) {
    const SCRIPT: &str = r"
import nbd, random, sys
uri, path = sys.argv[1], sys.argv[2]
expected = open(path, 'rb').read()
h = nbd.NBD()
h.set_strict_mode(h.get_strict_mode() & ~nbd.STRICT_ALIGN)
h.connect_uri(uri)
assert h.get_size() == len(expected), (h.get_size(), len(expected))
random.seed(3)
ranges, at = [], 0
while at < len(expected):
    length = min(random.choice([1, 511, 512, 4096, 65536, 65537, 200001]), len(expected) - at)
    ranges.append((at, length))
    at += length
random.shuffle(ranges)
found, wrong = bytearray(len(expected)), []
while ranges or h.aio_in_flight() > 0:
    while ranges and h.aio_in_flight() < 16:
        offset, length = ranges.pop()
        buffer = nbd.Buffer(length)
        def done(error, offset=offset, length=length, buffer=buffer):
            value = getattr(error, 'value', error)
            data = bytes(buffer.to_bytearray())
            if value or data != expected[offset:offset + length]:
                wrong.append((offset, length, value))
            return 1
        h.aio_pread(buffer, offset, done)
    h.poll(-1)
assert not wrong, wrong[:5]
h.shutdown()
print('same')
";
    let out = run(python_nbd(SCRIPT).arg(server.uri("")).arg(own.join("expected.raw")));
    assert_eq!(out, b"same\n", "{}", case.name);
}

fn block_status_is_true(case: &Case, server: &Server, own: &Path, expected: &[u8]) {
    let map = run(tool("nbdinfo").args(["--map", "--json"]).arg(server.uri("")));
    let map: Value = serde_json::from_slice(&map).unwrap();
    let mut zero = vec![false; expected.len()];
    let mut end = 0;
    for extent in map.as_array().unwrap() {
        let (start, len) = (number(&extent["offset"]), number(&extent["length"]));
        assert_eq!(start, end, "{}: the map has a gap", case.name);
        end = start + len;
        if number(&extent["type"]) & wire::STATE_ZERO as usize != 0 {
            zero[start..end].fill(true);
            let wrong = expected[start..end].iter().position(|&byte| byte != 0);
            assert_eq!(wrong, None, "{}: {extent} is not all zero", case.name);
        }
    }
    assert_eq!(end, expected.len(), "{}: the map ends early", case.name);
    if !case.reference.contains("-l ") {
        // qemu-img map cannot look into a snapshot.
        all_that_qemu_calls_zero(case, own, &zero);
    }
    status_of_random_ranges(case, server, &zero);
}

fn all_that_qemu_calls_zero(case: &Case, own: &Path, zero: &[bool]) {
    let words = case.reference.split(' ');
    let map = run(tool("qemu-img").current_dir(own).args(["map", "--output=json"]).args(words));
    let map: Value = serde_json::from_slice(&map).unwrap();
    for extent in map.as_array().unwrap().iter().filter(|extent| extent["zero"] == true) {
        let start = number(&extent["start"]);
        let end = (start + number(&extent["length"])).min(zero.len());
        let missed = zero[start..end].iter().position(|&zero| !zero).map(|at| start + at);
        assert_eq!(missed, None, "{}: QEMU calls {extent} zero, and we do not", case.name);
    }
}

/// A status asked anywhere agrees with the one of the whole disk and keeps the protocol's rules.
fn status_of_random_ranges(case: &Case, server: &Server, zero: &[bool]) {
    let mut client = Client::unix(server.socket(), "", Wishes::ALLOCATION);
    let mut rng = Rng::fixed(11);
    let align = client.block_sizes.map_or(512, |(minimum, ..)| u64::from(minimum));
    for round in 0..40 {
        let offset = rng.below(client.size) / align * align;
        let len = (rng.in_range(1..2_000_000).div_ceil(align) * align).min(client.size - offset);
        let flags = if round % 2 == 0 { wire::command_flag::REQ_ONE } else { 0 };
        let len = usize::try_from(len).unwrap();
        let reply = client.ask(Request::new(wire::command::BLOCK_STATUS, offset, len).flags(flags), &[]);
        let what = format!("{}: status of {len} at {offset:#x}", case.name);
        assert_eq!(reply.error, 0, "{what}: {}", reply.text);
        assert!(!reply.extents.is_empty(), "{what}");
        let last = reply.extents.len() - 1;
        let mut at = usize::try_from(offset).unwrap();
        let end = at + len;
        for (i, &(extent_len, state)) in reply.extents.iter().enumerate() {
            assert!(extent_len > 0 && at < end, "{what}: {:?}", reply.extents);
            let next = at + extent_len as usize;
            assert!(next <= end || (i == last && flags == 0), "{what}: {:?}", reply.extents);
            let claim = state & wire::STATE_ZERO != 0;
            let differs = zero[at..next.min(zero.len())].iter().any(|&zero| zero != claim);
            assert!(!differs, "{what}: {at:#x}..{next:#x} zero={claim}, and the map says otherwise");
            at = next;
        }
        assert!(flags == 0 || reply.extents.len() == 1, "{what}: REQ_ONE");
    }
    client.disconnect();
}

fn number(value: &Value) -> usize {
    usize::try_from(value.as_u64().unwrap()).unwrap()
}
