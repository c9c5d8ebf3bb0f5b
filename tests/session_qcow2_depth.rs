//! Eight connections with 32 requests in flight each on a qcow2 overlay whose tables do not fit into the cache: what each
//! reads is what it wrote, and in the end QEMU finds the same and a clean image.
//!
//! `NBD_IMG_DEPTH_REQUESTS` says how many requests a connection makes.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[allow(dead_code)]
mod support;

use std::collections::{HashMap, HashSet};
use std::fs;
use std::thread;

use nbd_img::session::Times;
use nbd_img_formats::Format;
use nbd_img_formats::open::{OpenOptions, open};
use support::client::{Client, Request, Wishes};
use support::in_process::InProcess;
use support::rng::Rng;
use support::tools::qemu_img;
use support::wire::{command, command_flag};
use support::{assert_same, qcow2};

const CLIENTS: usize = 8;
const DEPTH: usize = 32;

/// The disk is dealt out in units of this many bytes, in turn: no multiple of a cluster, so that neighbours meet in each.
const UNIT_LEN: usize = 1536;
const UNITS: usize = 16 << 10;

#[test]
fn eight_connections_at_depth_32_over_a_tiny_cache() {
    for (name, options) in [
        ("depth-4k", "cluster_size=4k"),
        ("depth-512", "cluster_size=512,refcount_bits=64"),
        ("depth-64k", "cluster_size=64k"),
    ] {
        overlay_at_depth(name, options);
    }
}

fn overlay_at_depth(name: &str, options: &str) {
    let folder = support::scratch(name);
    let folder = folder.path();
    let mut rng = Rng::new(name);
    let source = rng.bytes(UNITS * UNIT_LEN);
    fs::write(folder.join("source"), &source).unwrap();
    qemu_img(folder, &format!("create -f qcow2 -o {options} -b source -F raw disk"));
    // Room for two slices of a table.
    let tiny = OpenOptions {
        format: Some(Format::Qcow2),
        writable: true,
        table_cache_len: 0,
        ..OpenOptions::default()
    };
    let driver = open(&folder.join("disk"), &tiny).unwrap().driver;
    let server = InProcess::serve_driver(driver.clone(), 64 << 20, Times::default());
    let mut content = source.clone();
    let parts: Vec<Part<'_>> = thread::scope(|scope| {
        let clients: Vec<_> = (0..CLIENTS)
            .map(|number| {
                let part = Part::new(&server, number, &source, rng.fork());
                scope.spawn(|| part.run())
            })
            .collect();
        clients.into_iter().map(|client| client.join().unwrap()).collect()
    });
    for (unit, bytes) in parts.into_iter().flat_map(|part| part.written) {
        content[unit * UNIT_LEN..][..UNIT_LEN].copy_from_slice(&bytes);
    }
    let mut reader = Client::unix(server.socket(), "", Wishes::STRUCTURED);
    assert_same(&format!("{name}: the export"), &reader.read_all(), &content);
    reader.disconnect();
    server.assert_clean();
    driver.close().unwrap();
    qcow2::check_clean(folder, "disk");
    assert_same(&format!("{name}: as QEMU reads it"), &qcow2::content(folder, "disk", None), &content);
    assert_same("what lies below", &fs::read(folder.join("source")).unwrap(), &source);
}

/// One connection and the units that are its own.
struct Part<'a> {
    client: Client,
    number: usize,
    source: &'a [u8],
    rng: Rng,
    /// What the units hold that are not as in the source any more.
    written: HashMap<usize, Vec<u8>>,
    /// By cookie: the unit, and what its reply has to bring.
    sent: HashMap<u64, (usize, Option<Vec<u8>>)>,
    busy: HashSet<usize>,
}

impl<'a> Part<'a> {
    fn new(server: &InProcess, number: usize, source: &'a [u8], rng: Rng) -> Self {
        let wishes = if number.is_multiple_of(2) { Wishes::SIMPLE } else { Wishes::STRUCTURED };
        let client = Client::unix(server.socket(), "", wishes);
        let (written, sent) = (HashMap::new(), HashMap::new());
        Self { client, number, source, rng, written, sent, busy: HashSet::new() }
    }

    fn run(mut self) -> Self {
        for _ in 0..support::count("NBD_IMG_DEPTH_REQUESTS", 1500) {
            while self.client.in_flight() >= DEPTH {
                self.receive();
            }
            self.submit();
        }
        while self.client.in_flight() > 0 {
            self.receive();
        }
        self
    }

    fn submit(&mut self) {
        let limit = (UNITS / CLIENTS) as u64;
        let unit = loop {
            let unit = usize::try_from(self.rng.below(limit)).unwrap() * CLIENTS + self.number;
            if self.busy.insert(unit) {
                break unit;
            }
        };
        let offset = (unit * UNIT_LEN) as u64;
        let fua = if self.rng.one_in(200) { command_flag::FUA } else { 0 };
        let (command, payload, expected) = match self.rng.below(16) {
            0..8 => (command::WRITE, self.rng.bytes(UNIT_LEN), None),
            8 | 9 => (command::WRITE_ZEROES, Vec::new(), None),
            _ => (command::READ, Vec::new(), Some(self.held(unit))),
        };
        match command {
            command::WRITE => drop(self.written.insert(unit, payload.clone())),
            command::WRITE_ZEROES => drop(self.written.insert(unit, vec![0; UNIT_LEN])),
            _ => {}
        }
        let flags = if command == command::READ { 0 } else { fua };
        let request = Request::new(command, offset, UNIT_LEN).flags(flags);
        let cookie = self.client.send(request, &payload).unwrap();
        self.sent.insert(cookie, (unit, expected));
    }

    fn held(&self, unit: usize) -> Vec<u8> {
        let source = || self.source[unit * UNIT_LEN..][..UNIT_LEN].to_vec();
        self.written.get(&unit).cloned().unwrap_or_else(source)
    }

    fn receive(&mut self) {
        let reply = self.client.reply().unwrap();
        let (unit, expected) = self.sent.remove(&reply.cookie).unwrap();
        assert_eq!(reply.error, 0, "unit {unit}: {}", reply.text);
        if let Some(expected) = expected {
            assert_same(&format!("unit {unit}"), &reply.data, &expected);
        }
        self.busy.remove(&unit);
    }
}
