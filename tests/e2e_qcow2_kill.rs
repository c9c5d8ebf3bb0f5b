//! The server is killed while 8 clients write: the image is never worse than leaky, what was flushed is there, and
//! nothing is there that nobody wrote at that place.
//!
//! `NBD_IMG_KILLS=200 cargo test --test e2e_qcow2_kill` kills more often than CI does.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[allow(dead_code)]
mod support;

use std::collections::HashMap;
use std::fs;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use support::assert_same;
use support::client::{Client, Request, Wishes, is_hangup};
use support::journal::{self, Journal, SECTOR_LEN, Value};
use support::qcow2::{self, Health};
use support::rng::Rng;
use support::server::{Serve, Server};
use support::tools::qemu_img;
use support::wire::{command, command_flag};

const CLIENTS: usize = 8;

/// The first half of the disk is dealt out in stripes of so many sectors: less than most clusters, and odd, so that
/// several clients fight for each cluster.
const STRIPE: usize = 23;

/// Kills in a row that one image lives through before a new one is made.
const LIVES: usize = 3;

/// An image that is written until the server dies.
struct Kind {
    name: &'static str,
    disk_len: usize,
    /// Arguments of qemu-img, one command each; `source` is the raw disk with the first content.
    made_by: &'static [&'static str],
    /// The image has a snapshot of the first content.
    snapshot: bool,
    /// It has dirty bitmaps: `on`, which is enabled, and `off`, which is not.
    bitmaps: bool,
    cache: &'static str,
    /// Flags that qemu-nbd does not have.
    own: &'static [&'static str],
}

const KIND: Kind = Kind {
    name: "",
    disk_len: 12 << 20,
    made_by: &[],
    snapshot: false,
    bitmaps: false,
    cache: "--cache=writeback",
    own: &[],
};

const KINDS: [Kind; 14] = [
    Kind { name: "64k", made_by: &["convert -f raw -O qcow2 source disk"], ..KIND },
    Kind {
        name: "compressing",
        made_by: &["create -f qcow2 -o cluster_size=4k -b source -F raw disk"],
        own: &["--compress=zlib"],
        ..KIND
    },
    Kind {
        name: "data-file",
        made_by: &["create -f qcow2 -o cluster_size=4k,data_file=data -b source -F raw disk"],
        ..KIND
    },
    Kind {
        name: "raw-data-file",
        made_by: &["convert -f raw -O qcow2 -o data_file=data,data_file_raw=on source disk"],
        ..KIND
    },
    Kind {
        name: "overlay-4k",
        made_by: &["create -f qcow2 -o cluster_size=4k -b source -F raw disk"],
        ..KIND
    },
    Kind {
        name: "subclusters",
        made_by: &["create -f qcow2 -o cluster_size=16k,extended_l2=on -b source -F raw disk"],
        ..KIND
    },
    Kind {
        name: "bitmaps",
        made_by: &[
            "create -f qcow2 -o cluster_size=4k -b source -F raw disk",
            "bitmap --add --disable disk off",
            "bitmap --add -g 512 disk on",
        ],
        bitmaps: true,
        ..KIND
    },
    Kind {
        name: "snapshot",
        made_by: &["convert -f raw -O qcow2 -o cluster_size=16k source disk", "snapshot -c first disk"],
        snapshot: true,
        ..KIND
    },
    Kind {
        name: "2m",
        disk_len: 64 << 20,
        made_by: &["create -f qcow2 -o cluster_size=2M -b source -F raw disk"],
        ..KIND
    },
    Kind { name: "empty-512", made_by: &["create -f qcow2 -o cluster_size=512 disk 12M"], ..KIND },
    Kind {
        name: "compressed-snapshot",
        made_by: &["convert -c -f raw -O qcow2 source disk", "snapshot -c first disk"],
        snapshot: true,
        ..KIND
    },
    Kind {
        name: "compressing-snapshot",
        made_by: &[
            "convert -c -f raw -O qcow2 -o compression_type=zstd,cluster_size=1k source disk",
            "snapshot -c first disk",
        ],
        snapshot: true,
        cache: "--cache=none",
        own: &["--compress=zstd"],
        ..KIND
    },
    Kind { name: "v2", made_by: &["create -f qcow2 -o compat=0.10 -b source -F raw disk"], ..KIND },
    Kind {
        name: "direct-overlay",
        made_by: &["create -f qcow2 -b source -F raw disk"],
        cache: "--cache=none",
        ..KIND
    },
];

#[test]
fn killed_servers_lose_nothing() {
    let mut rng = Rng::new("kill");
    let (mut totals, mut leaky) = (Tally::default(), 0);
    let kills = support::count("NBD_IMG_KILLS", 42);
    let mut image: Option<Image> = None;
    for round in 0..kills {
        if round % LIVES == 0 {
            image = Some(Image::make(&KINDS[round / LIVES % KINDS.len()], &mut rng));
        }
        let image = image.as_mut().unwrap();
        let tally = image.kill_once(&mut rng, &totals.lacks(round + 1));
        leaky += usize::from(image.verify(tally.replies > 0) == Health::Leaks);
        totals.add(&tally);
    }
    eprintln!("{kills} kills, {leaky} leaky images: {totals:?}");
    // A run in which nothing was under way would prove nothing.
    let lacks = totals.lacks(kills);
    assert_eq!((lacks.replies, lacks.flushes), (0, 0), "{totals:?}");
    assert!(totals.open > kills * 100 && totals.in_flight > kills, "{totals:?}");
}

/// What the clients of one or more servers came to before these died.
#[derive(Debug, Default)]
struct Tally {
    replies: usize,
    flushes: usize,
    in_flight: usize,
    /// Sectors that may hold more than one value.
    open: usize,
}

impl Tally {
    fn add(&mut self, other: &Self) {
        self.replies += other.replies;
        self.flushes += other.flushes;
        self.in_flight += other.in_flight;
        self.open += other.open;
    }

    /// How many replies and flushes are missing for `kills` kills to have been in the middle of something.
    fn lacks(&self, kills: usize) -> Self {
        let lack = |wanted: usize, had: usize| (wanted + 1).saturating_sub(had);
        let (replies, flushes) = (lack(kills * 50, self.replies), lack(kills * 4, self.flushes));
        Self { replies, flushes, ..Self::default() }
    }
}

/// What the clients of a server have come to so far.
#[derive(Default)]
struct Progress {
    replies: AtomicUsize,
    flushes: AtomicUsize,
}

impl Progress {
    fn is_behind(&self, wanted: &Tally) -> bool {
        self.replies.load(Ordering::Relaxed) < wanted.replies
            || self.flushes.load(Ordering::Relaxed) < wanted.flushes
    }
}

struct Image {
    kind: &'static Kind,
    folder: tempfile::TempDir,
    /// What `source` holds.
    first: Vec<u8>,
    /// What the disk held when it was last looked at.
    content: Vec<u8>,
    journals: Vec<Journal>,
    next_value: Value,
}

impl Image {
    fn make(kind: &'static Kind, rng: &mut Rng) -> Self {
        let folder = support::scratch(&format!("kill-{}", kind.name));
        let mut first = vec![0; kind.disk_len];
        // Data at two thirds of the places, as values of nobody's requests.
        for (i, chunk) in first.chunks_mut(150 * SECTOR_LEN).enumerate() {
            if !rng.one_in(3) {
                journal::fill(u64::MAX, i * 150, chunk);
            }
        }
        fs::write(folder.path().join("source"), &first).unwrap();
        for command in kind.made_by {
            qemu_img(folder.path(), command);
        }
        let content = qcow2::content(folder.path(), "disk", None);
        Self { kind, folder, first, content, journals: Vec::new(), next_value: 1 }
    }

    /// Serves the image to writing clients and kills the server, on a slow machine not before they have come to what is
    /// `wanted`.
    fn kill_once(&mut self, rng: &mut Rng, wanted: &Tally) -> Tally {
        let server = Serve::image(self.folder.path().join("disk")).format("qcow2");
        let mut server =
            server.args(&[self.kind.cache]).args(self.kind.own).qemu_args(&[self.kind.cache]).start();
        let parts = (0..CLIENTS).map(|client| sectors_of(client, self.kind.disk_len / SECTOR_LEN));
        let value = |sector: usize| {
            journal::value_of(&self.content[sector * SECTOR_LEN..][..SECTOR_LEN], sector).unwrap()
        };
        let journals: Vec<Journal> =
            parts.map(|part| Journal::new(part.clone(), part.into_iter().map(value))).collect();
        let progress = Progress::default();
        let mut writers: Vec<Writer> = journals
            .into_iter()
            .map(|journal| {
                self.next_value += 1 << 32;
                Writer::new(&server, journal, rng.fork(), self.next_value, &progress)
            })
            .collect();
        thread::scope(|scope| {
            for writer in &mut writers {
                scope.spawn(|| writer.run());
            }
            thread::sleep(Duration::from_millis(rng.in_range(50..600)));
            let begin = Instant::now();
            while progress.is_behind(wanted) && begin.elapsed() < Duration::from_secs(30) {
                thread::sleep(Duration::from_millis(1));
            }
            server.signal(Signal::KILL);
            server.wait(Duration::from_secs(30));
        });
        qcow2::wait_until_let_go(self.folder.path(), "disk");
        let tally = Tally {
            replies: progress.replies.load(Ordering::Relaxed),
            flushes: progress.flushes.load(Ordering::Relaxed),
            in_flight: writers.iter().map(|writer| writer.client.in_flight()).sum(),
            open: writers.iter().map(|writer| writer.journal.open()).sum(),
        };
        self.journals = writers.into_iter().map(|writer| writer.journal).collect();
        tally
    }

    /// What a stranger finds in the image that was left behind, which somebody has `changed` for sure.
    fn verify(&mut self, changed: bool) -> Health {
        let folder = self.folder.path();
        let health = qcow2::check(folder, "disk");
        self.content = qcow2::content(folder, "disk", None);
        for journal in &self.journals {
            if let Some(fault) = journal.find_fault(&self.content) {
                panic!("{}: {fault}", self.kind.name);
            }
        }
        if self.kind.snapshot {
            assert_same("the snapshot", &qcow2::content(folder, "disk", Some("first")), &self.first);
        }
        assert_same("what lies below", &fs::read(folder.join("source")).unwrap(), &self.first);
        if self.kind.bitmaps {
            self.renew_bitmap(changed);
        }
        health
    }

    /// The bitmap that recorded does not pretend to tell of everything, the other one is as it was. QEMU takes the
    /// first one away, which leaves nothing wrong behind, and the next life has a new one.
    fn renew_bitmap(&self, changed: bool) {
        let folder = self.folder.path();
        let flags = qcow2::bitmap_flags(folder, "disk");
        let [(off, off_flags), (on, on_flags)] = &flags[..] else { panic!("{flags:?}") };
        assert!(off == "off" && off_flags.is_empty() && on == "on", "{flags:?}");
        assert!(on_flags[..] == ["auto", "in-use"] || !changed && on_flags[..] == ["auto"], "{flags:?}");
        qemu_img(folder, "bitmap --remove disk on");
        qcow2::check(folder, "disk");
        qemu_img(folder, "bitmap --add -g 512 disk on");
    }
}

/// Which of a disk's sectors are `client`'s: stripes in the first half, a run in the second.
fn sectors_of(client: usize, disk: usize) -> Vec<usize> {
    let half = disk / 2;
    let run = half / CLIENTS;
    let striped = (0..half).filter(|sector| sector / STRIPE % CLIENTS == client);
    striped.chain(half + client * run..half + (client + 1) * run).collect()
}

/// A client that keeps a journal until its server dies.
struct Writer<'a> {
    client: Client,
    journal: Journal,
    rng: Rng,
    value: Value,
    /// Requests in flight by cookie: where they write, their number in the journal, whether their reply makes them durable.
    sent: HashMap<u64, (Range<usize>, u64, bool)>,
    progress: &'a Progress,
}

impl<'a> Writer<'a> {
    fn new(server: &Server, journal: Journal, rng: Rng, value: Value, progress: &'a Progress) -> Self {
        let client = Client::unix(server.socket(), "", Wishes::SIMPLE);
        Self { client, journal, rng, value, sent: HashMap::new(), progress }
    }

    fn run(&mut self) {
        loop {
            if let Err(error) = self.round() {
                assert!(is_hangup(&error), "{error}");
                return;
            }
        }
    }

    /// Some requests at once that do not touch each other, perhaps a flush among them, and their replies.
    fn round(&mut self) -> io::Result<()> {
        let mut busy: Vec<Range<usize>> = Vec::new();
        for _ in 0..=self.rng.below(8) {
            let range = self.range();
            if busy.iter().all(|other| range.end <= other.start || other.end <= range.start) {
                busy.push(range.clone());
                self.submit(range)?;
            }
        }
        while !self.sent.is_empty() {
            self.receive()?;
        }
        if self.rng.one_in(3) {
            let request = self.journal.last();
            let reply = self.ask_flush()?;
            assert_eq!(reply, 0, "flush");
            self.journal.settle(0..self.journal.len(), request);
            self.progress.flushes.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Sectors that lie together on the disk and are this client's, by their indices in the journal. Some are all of a
    /// stripe or a whole aligned 64 KiB.
    fn range(&mut self) -> Range<usize> {
        let index = |rng: &mut Rng, limit: usize| usize::try_from(rng.below(limit as u64)).unwrap();
        let mut start = index(&mut self.rng, self.journal.len());
        let len = match self.rng.below(4) {
            0 => 1 + index(&mut self.rng, 8),
            1 => 128,
            2 => 8 * (1 + index(&mut self.rng, 16)),
            _ => 1 + index(&mut self.rng, 512),
        };
        if self.rng.one_in(2) {
            let align = if len == 128 { 128 } else { 8 };
            start -= (self.journal.sector(start) % align).min(start);
        }
        let first = self.journal.sector(start);
        let together =
            |at: &usize| *at < self.journal.len() && self.journal.sector(*at) == first + (at - start);
        let end = (start + 1..start + len).take_while(together).last().unwrap_or(start) + 1;
        start..end
    }

    fn submit(&mut self, range: Range<usize>) -> io::Result<()> {
        let first = self.journal.sector(range.start);
        let (offset, len) = ((first * SECTOR_LEN) as u64, range.len() * SECTOR_LEN);
        let fua = self.rng.one_in(12);
        let mut flags = if fua { command_flag::FUA } else { 0 };
        let (command, payload) = match self.rng.below(8) {
            0..6 => {
                self.value += 1;
                let mut data = vec![0; len];
                journal::fill(self.value, first, &mut data);
                (command::WRITE, data)
            }
            6 => {
                flags |= if self.rng.one_in(2) { command_flag::NO_HOLE } else { 0 };
                (command::WRITE_ZEROES, Vec::new())
            }
            _ => (command::TRIM, Vec::new()),
        };
        let value = if command == command::WRITE { self.value } else { 0 };
        let number = self.journal.intend(range.clone(), value, command == command::TRIM);
        let cookie = self.client.send(Request::new(command, offset, len).flags(flags), &payload)?;
        // After a trim that left things as they were, these are no more durable than before.
        self.sent.insert(cookie, (range, number, fua && command != command::TRIM));
        Ok(())
    }

    fn receive(&mut self) -> io::Result<()> {
        let reply = self.client.reply()?;
        let (range, number, fua) = self.sent.remove(&reply.cookie).unwrap();
        assert_eq!(reply.error, 0, "{range:?}: {}", reply.text);
        self.progress.replies.fetch_add(1, Ordering::Relaxed);
        if fua {
            self.journal.settle(range, number);
        }
        Ok(())
    }

    fn ask_flush(&mut self) -> io::Result<u32> {
        self.client.send(Request::new(command::FLUSH, 0, 0), &[])?;
        self.client.reply().map(|reply| reply.error)
    }
}

/// The rig itself: a journal that accepts everything would pass every kill.
#[test]
fn the_journal_notices_what_is_wrong() {
    let mut disk = vec![0; 4 * SECTOR_LEN];
    journal::fill(7, 0, &mut disk[..2 * SECTOR_LEN]);
    let mut journal = Journal::new(vec![0, 1, 2, 3], [7, 7, 0, 0].into_iter());
    assert_eq!(journal.find_fault(&disk), None);
    let first = journal.intend(0..2, 8, false);
    assert_eq!(journal.find_fault(&disk), None, "old, not flushed");
    let trim = journal.intend(0..1, 0, true);
    journal.settle(0..4, first);
    assert!(journal.find_fault(&disk).unwrap().starts_with("sector 0 "), "a flushed write is lost");
    journal::fill(8, 1, &mut disk[SECTOR_LEN..2 * SECTOR_LEN]);
    disk[..SECTOR_LEN].fill(0);
    assert_eq!(journal.find_fault(&disk), None, "trimmed");
    journal.settle(0..4, trim);
    journal::fill(8, 0, &mut disk[..SECTOR_LEN]);
    assert_eq!(journal.find_fault(&disk), None, "a trim may leave what was there");
    disk[SECTOR_LEN - 1] ^= 1;
    assert!(journal.find_fault(&disk).unwrap().starts_with("sector 0 "), "torn");
    journal::fill(8, 1, &mut disk[..SECTOR_LEN]);
    assert!(journal.find_fault(&disk).unwrap().starts_with("sector 0 "), "written for another place");
    journal::fill(8, 0, &mut disk[..SECTOR_LEN]);
    journal::fill(9, 3, &mut disk[3 * SECTOR_LEN..]);
    assert!(journal.find_fault(&disk).unwrap().starts_with("sector 3 "), "nobody's");
}
