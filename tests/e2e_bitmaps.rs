//! Persistent dirty bitmaps of qcow2 images, served as metadata contexts: every granularity, with and without extended
//! headers, through backing chains and behind offsets, tells what qemu-nbd tells of the same image. What cannot be
//! told is refused by name when the server starts.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[allow(dead_code)]
mod support;

use std::fs;
use std::path::Path;

use serde_json::Value;
use support::client::{Client, Request, Wishes};
use support::proc;
use support::rng::Rng;
use support::server::{Peer, Serve, Server};
use support::tools::{qemu_img, qemu_io, run, tool};
use support::wire;

/// Granularities that QEMU makes, as powers of two.
const GRANULARITY_BITS: std::ops::RangeInclusive<u32> = 9..=31;
/// A disk of more than two of the largest granules; no multiple of any but the smallest.
const DISK_LEN: u64 = 5 * (1 << 30) + 7 * 512;

fn context(bitmap: &str) -> String {
    format!("qemu:dirty-bitmap:{bitmap}")
}

/// Wishes live as long as the test: a few names.
fn wishes(bitmaps: &[String], extended: bool) -> Wishes {
    let names: Vec<&'static str> = bitmaps.iter().map(|name| &*context(name).leak()).collect();
    Wishes { structured: true, extended, contexts: names.leak() }
}

/// What the server says of the whole export, by wish: runs of equal flags.
fn maps(server: &Server, wishes: Wishes, step: u64) -> Vec<Vec<(u64, u32)>> {
    let mut client = Client::unix(server.socket(), "", wishes);
    let ids = client.context_ids.clone();
    let mut maps = vec![Vec::new(); ids.len()];
    for (map, id) in maps.iter_mut().zip(ids) {
        let mut at = 0;
        while at < client.size {
            let len = usize::try_from((client.size - at).min(step)).unwrap();
            let reply = client.ask(Request::new(wire::command::BLOCK_STATUS, at, len), &[]);
            assert_eq!(reply.error, 0, "{}", reply.text);
            assert_eq!(reply.contexts.len(), client.context_ids.len());
            let (_, extents) = reply.contexts.iter().find(|(told, _)| *told == id).unwrap();
            for &(len, flags) in extents {
                let len = len.min(client.size - at);
                push(map, len, flags);
                at += len;
            }
        }
    }
    client.disconnect();
    maps
}

fn push(map: &mut Vec<(u64, u32)>, len: u64, flags: u32) {
    match map.last_mut() {
        Some((last, same)) if *same == flags => *last += len,
        _ => map.push((len, flags)),
    }
}

fn serve(image: &Path, bitmaps: &[String], peer: Peer, args: &[&str]) -> Server {
    let ours: Vec<String> = bitmaps.iter().map(|name| format!("--bitmap={name}")).collect();
    let texts: Vec<&str> = ours.iter().map(String::as_str).chain(args.iter().copied()).collect();
    Serve::image(image).format("qcow2").read_only().args(&texts).qemu_args(&texts).peer(peer).start()
}

/// Both servers tell the same of all bitmaps, in both forms, asked for all at once and bit by bit.
fn same_as_qemu(image: &Path, bitmaps: &[String]) -> Vec<Vec<(u64, u32)>> {
    let theirs = serve(image, bitmaps, Peer::QemuNbd, &[]);
    let expected = maps(&theirs, wishes(bitmaps, false), 1 << 30);
    theirs.stop();
    let ours = serve(image, bitmaps, Peer::NbdImg, &[]);
    for (extended, step) in [(false, 1 << 30), (true, 1 << 40), (true, 500 << 20)] {
        let found = maps(&ours, wishes(bitmaps, extended), step);
        for ((name, found), expected) in bitmaps.iter().zip(&found).zip(&expected) {
            assert!(found == expected, "{name}, extended {extended}: {found:?}\n{expected:?}");
        }
    }
    ours.stop();
    expected
}

/// An image with a bitmap of every granularity, and writes that end at no boundary.
fn every_granularity(folder: &Path) -> Vec<String> {
    qemu_img(folder, &format!("create -f qcow2 disk {DISK_LEN}"));
    let names: Vec<String> = GRANULARITY_BITS.map(|bits| format!("g{bits}")).collect();
    for (bits, name) in GRANULARITY_BITS.zip(&names) {
        qemu_img(folder, &format!("bitmap --add -g {} disk {name}", 1_u64 << bits));
    }
    let mut rng = Rng::fixed(17);
    let mut commands = vec!["write 0 512".to_owned(), format!("write {} 512", DISK_LEN - 512)];
    for _ in 0..60 {
        let len = rng.in_range(1..200) * 512;
        let at = rng.below((DISK_LEN - len) / 512) * 512;
        let verb = ["write", "write -z", "discard"][usize::try_from(rng.below(3)).unwrap()];
        commands.push(format!("{verb} {at} {len}"));
    }
    let texts: Vec<&str> = commands.iter().map(String::as_str).collect();
    qemu_io(folder, "qcow2", "disk", &texts);
    names
}

#[test]
fn every_granularity_is_told_as_qemu_tells_it() {
    let folder = support::scratch("bitmaps");
    let names = every_granularity(folder.path());
    let image = folder.path().join("disk");
    let told = same_as_qemu(&image, &names);
    assert!(told[0].len() > 100 && told.last().unwrap().len() <= 3, "{} runs", told[0].len());
    // An export that begins and ends inside of granules. (QEMU finds no bitmap behind an offset.)
    let (offset, len) = (1_049_088, 3 * (1 << 30) + 512);
    let args = [format!("--offset={offset}"), format!("--size={len}")];
    let server = serve(&image, &names, Peer::NbdImg, &args.each_ref().map(String::as_str));
    let found = maps(&server, wishes(&names, true), 1 << 40);
    for ((name, found), told) in names.iter().zip(&found).zip(&told) {
        assert_eq!(*found, cut(told, offset, len), "{name}");
    }
    server.stop();
}

/// The part of a map.
fn cut(map: &[(u64, u32)], offset: u64, len: u64) -> Vec<(u64, u32)> {
    let mut part = Vec::new();
    let mut at = 0;
    for &(run, flags) in map {
        let (from, to) = (at.max(offset), (at + run).min(offset + len));
        at += run;
        if from < to {
            part.push((to - from, flags));
        }
    }
    part
}

/// Clusters of 512 bytes need tables of many clusters; those of 2 MiB hold more than a disk's worth.
#[test]
fn every_length_of_cluster_is_told_as_qemu_tells_it() {
    for cluster in ["512", "4k", "2M"] {
        let folder = support::scratch("bitmap-clusters");
        qemu_img(folder.path(), &format!("create -f qcow2 -o cluster_size={cluster} disk 300000000"));
        qemu_img(folder.path(), "bitmap --add -g 512 disk fine");
        qemu_io(folder.path(), "qcow2", "disk", &["write 1k 3k", "write 131072k 1k", "write -z 100M 150M"]);
        qemu_img(folder.path(), "bitmap --add -g 512 disk later");
        qemu_img(folder.path(), "bitmap --add --disable -g 64k disk both");
        qemu_io(folder.path(), "qcow2", "disk", &["write 299999488 512", "write 9M 100k"]);
        qemu_img(folder.path(), "bitmap --merge fine --merge later disk both");
        qemu_img(folder.path(), "bitmap --disable disk fine");
        let names = ["fine", "later", "both"].map(str::to_owned);
        let told = same_as_qemu(&folder.path().join("disk"), &names);
        assert!(told.iter().all(|map| map.len() >= 4), "{cluster}: {told:?}");
    }
}

#[test]
fn clients_of_others_see_the_bitmap() {
    let folder = support::scratch("bitmap-clients");
    qemu_img(folder.path(), "create -f qcow2 disk 100M");
    qemu_img(folder.path(), "bitmap --add disk b0");
    qemu_io(folder.path(), "qcow2", "disk", &["write 1M 64k", "write 10M 1M"]);
    let server = serve(&folder.path().join("disk"), &["b0".to_owned()], Peer::NbdImg, &[]);
    let map = "--map=qemu:dirty-bitmap:b0";
    let map: Value =
        serde_json::from_slice(&run(tool("nbdinfo").args([map, "--json"]).arg(server.uri("")))).unwrap();
    let extents: Vec<_> =
        map.as_array().unwrap().iter().map(|e| (e["offset"].clone(), e["type"].clone())).collect();
    let starts = [(0, 0), (1 << 20, 1), ((1 << 20) + 65536, 0), (10 << 20, 1), (11 << 20, 0)];
    assert_eq!(extents, starts.map(|(at, kind)| (Value::from(at), Value::from(kind))));
    // QEMU's client shows dirty parts as data that is not there.
    let options = format!(
        "driver=nbd,server.type=unix,server.path={},x-dirty-bitmap={}",
        server.socket().display(),
        context("b0")
    );
    let map = run(tool("qemu-img").args(["map", "--output=json", "--image-opts", &options]));
    let map: Value = serde_json::from_slice(&map).unwrap();
    let dirty: Vec<u64> = map
        .as_array()
        .unwrap()
        .iter()
        .filter(|extent| extent["data"] == false)
        .map(|extent| extent["start"].as_u64().unwrap())
        .collect();
    assert_eq!(dirty, [1 << 20, 10 << 20]);
    let listed = run(tool("nbdinfo").args(["--list", "--json"]).arg(server.uri("")));
    let listed: Value = serde_json::from_slice(&listed).unwrap();
    let contexts = &listed["exports"][0]["contexts"];
    let expected = ["base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:b0"];
    assert_eq!(*contexts, serde_json::json!(expected));
    server.stop();
}

/// The first image from the top that has a bitmap of the name is meant; behind its end nothing is dirty.
#[test]
fn bitmaps_are_found_through_the_chain() {
    let folder = support::scratch("bitmap-chain");
    let path = folder.path();
    qemu_img(path, "create -f qcow2 base 10M");
    for name in ["both", "below"] {
        qemu_img(path, &format!("bitmap --add base {name}"));
    }
    qemu_io(path, "qcow2", "base", &["write 1M 64k", "write 10436608 48k"]);
    qemu_img(path, "create -f qcow2 -b base -F qcow2 middle 20M");
    qemu_img(path, "create -f qcow2 -b middle -F qcow2 disk 30M");
    qemu_img(path, "bitmap --add disk both");
    qemu_io(path, "qcow2", "disk", &["write 25M 64k"]);
    let names = ["both", "below"].map(str::to_owned);
    let told = same_as_qemu(&path.join("disk"), &names);
    assert_eq!(told[0], [(25 << 20, 0), (65536, 1), ((5 << 20) - 65536, 0)]);
    assert_eq!(told[1].len(), 5, "{told:?}");
    assert_eq!(told[1].last().unwrap().1, 0, "{told:?}");
}

/// One bitmap in each of two exports, by keys; a writable overlay tells what its base has recorded.
#[test]
fn bitmaps_of_several_exports() {
    let folder = support::scratch("bitmap-exports");
    let path = folder.path();
    qemu_img(path, "create -f qcow2 base 10M");
    for name in ["x", "y,z"] {
        run(tool("qemu-img").current_dir(path).args(["bitmap", "--add", "base", name]));
    }
    qemu_io(path, "qcow2", "base", &["write 1M 64k"]);
    qemu_img(path, "create -f qcow2 -b base -F qcow2 disk");
    let base = format!("name=base,file={}/base,read-only,bitmap=x,bitmap=y,,z", path.display());
    let disk = format!("name=disk,file={}/disk,bitmap=x", path.display());
    let server = Serve::exports(Vec::new()).args(&["--export", &base, "--export", &disk]).start();
    for (export, bitmaps) in [("base", vec!["x", "y,z"]), ("disk", vec!["x"])] {
        let bitmaps: Vec<String> = bitmaps.into_iter().map(str::to_owned).collect();
        let mut client = Client::unix(server.socket(), export, wishes(&bitmaps, false));
        if export == "disk" {
            client.write(5 << 20, &[1; 65536]);
        }
        let reply = client.ask(Request::new(wire::command::BLOCK_STATUS, 0, 10 << 20), &[]);
        assert_eq!(reply.contexts.len(), bitmaps.len());
        for (_, extents) in reply.contexts {
            assert_eq!(extents, [(1 << 20, 0), (65536, 1), ((9 << 20) - 65536, 0)]);
        }
        client.disconnect();
    }
    server.stop();
}

#[test]
fn what_cannot_be_told_is_refused_by_name() {
    let folder = support::scratch("bitmap-refusals");
    let path = folder.path();
    qemu_img(path, "create -f raw raw 1M");
    qemu_img(path, "create -f qcow2 disk 1M");
    qemu_img(path, "snapshot -c past disk");
    for name in ["one", "two"] {
        qemu_img(path, &format!("bitmap --add disk {name}"));
    }
    let refused = |file: &str, args: &[&str], hints: &[&str]| {
        let refusal = Serve::image(path.join(file)).read_only().peer(Peer::NbdImg).args(args).start_refused();
        for hint in hints {
            assert!(refusal.stderr.contains(hint), "{args:?}: {}", refusal.stderr);
        }
    };
    refused("raw", &["--bitmap", "x", "--format", "raw"], &["'x'", "--bitmap", "none"]);
    refused("disk", &["--bitmap", "one", "--bitmap", "x"], &["'x'", "'one', 'two'"]);
    refused("disk", &["--bitmap", "one", "--load-snapshot", "past"], &["--load-snapshot"]);
    refused("disk", &["--bitmap", ""], &["--bitmap"]);
    // Somebody has begun to write, and was not there at the end.
    let mut bytes = fs::read(path.join("disk")).unwrap();
    let name = bytes.windows(3).rposition(|three| three == b"two").unwrap();
    bytes[name - 24 + 15] |= 1;
    fs::write(path.join("disk"), bytes).unwrap();
    refused("disk", &["--bitmap", "two"], &["'two'", "bitmap remove", "full backup"]);
    let server = serve(&path.join("disk"), &["one".to_owned()], Peer::NbdImg, &[]);
    server.stop();
}

/// Of an image with bitmaps `fine` and `usual` that record.
fn recorded(folder: &Path) -> Vec<String> {
    qemu_img(folder, "create -f qcow2 disk 64M");
    qemu_img(folder, "bitmap --add -g 512 disk fine");
    qemu_img(folder, "bitmap --add disk usual");
    ["fine", "usual"].map(str::to_owned).to_vec()
}

/// Writes, zeroes and trims here and there, and gives what the server told of it in the end.
fn write_around(image: &Path, bitmaps: &[String], seed: u64) -> Vec<Vec<(u64, u32)>> {
    let flags: Vec<String> = bitmaps.iter().map(|name| format!("--bitmap={name}")).collect();
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    let server = Serve::image(image).format("qcow2").args(&flags).peer(Peer::NbdImg).start();
    let mut client = Client::unix(server.socket(), "", Wishes::STRUCTURED);
    let mut rng = Rng::fixed(seed);
    for round in 0..40 {
        let len = rng.in_range(1..200_000);
        let at = rng.below((64 << 20) - len);
        match round % 4 {
            0 => {
                let request = Request::new(wire::command::TRIM, at, usize::try_from(len).unwrap());
                assert_eq!(client.ask(request, &[]).error, 0);
            }
            1 => {
                let request = Request::new(wire::command::WRITE_ZEROES, at, usize::try_from(len).unwrap());
                assert_eq!(client.ask(request, &[]).error, 0);
            }
            2 => client.write(at / 512 * 512, &vec![7; 512]),
            _ => client.write(at, &vec![9; usize::try_from(len).unwrap()]),
        }
    }
    client.disconnect();
    let told = maps(&server, wishes(bitmaps, true), 1 << 40);
    server.stop();
    told
}

/// QEMU reads what we have recorded, and goes on with it; then we do, and so on (iotest 165).
#[test]
fn writers_take_turns_with_qemu() {
    let folder = support::scratch("bitmap-turns");
    let path = folder.path();
    let names = recorded(path);
    let image = path.join("disk");
    let mut before = Vec::new();
    for round in 0..3 {
        let told = write_around(&image, &names, round);
        qemu_img(path, "check disk");
        assert_eq!(same_as_qemu(&image, &names), told, "what was told while it was served is what is stored");
        assert!(told[0].len() > before.len(), "bits are added");
        qemu_io(path, "qcow2", "disk", &[&format!("write {}k 3k", 50_000 + round * 100)]);
        before = told[0].clone();
    }
    let info: Value = serde_json::from_slice(&qemu_img(path, "info --output=json disk")).unwrap();
    let bitmaps = info["format-specific"]["data"]["bitmaps"].as_array().unwrap();
    assert!(bitmaps.iter().all(|bitmap| bitmap["flags"] == serde_json::json!(["auto"])), "{bitmaps:?}");
}

/// 64 TiB at 64 KiB have 128 MiB of bits, in 32,768 pages. Whoever changes the disk in each of them makes the server
/// no larger than the few megabytes that it holds of them, and QEMU finds every bit.
#[test]
fn bits_of_a_large_disk_do_not_stay_in_memory() {
    const PAGES: u64 = 32768;
    const PAGE: u64 = (64 << 40) / PAGES;
    let folder = support::scratch("bitmap-large");
    let path = folder.path();
    qemu_img(path, "create -f qcow2 disk 64T");
    qemu_img(path, "bitmap --add -g 64k disk on");
    let (image, names) = (path.join("disk"), ["on".to_owned()]);
    let server = Serve::image(&image).format("qcow2").args(&["--bitmap=on"]).peer(Peer::NbdImg).start();
    let mut client = Client::unix(server.socket(), "", Wishes::STRUCTURED);
    let before = proc::resident_len(server.pid());
    let mut rng = Rng::fixed(64);
    for page in 0..PAGES {
        let at = page * PAGE + rng.below(PAGE / 512) * 512;
        assert_eq!(client.ask(Request::new(wire::command::TRIM, at, 512), &[]).error, 0);
    }
    let grown = proc::resident_len(server.pid()).saturating_sub(before);
    assert!(grown < 64 << 20, "the server has grown by {grown} bytes");
    client.disconnect();
    let step = (4 << 30) - (64 << 10);
    let told = maps(&server, wishes(&names, false), step);
    server.stop();
    let dirty: u64 = told[0].iter().filter(|(_, flags)| *flags == 1).map(|(len, _)| len).sum();
    assert_eq!(dirty, PAGES * (64 << 10));
    let theirs = serve(&image, &names, Peer::QemuNbd, &[]);
    assert!(maps(&theirs, wishes(&names, false), step) == told, "QEMU finds other bits");
    theirs.stop();
    qemu_img(path, "check disk");
}

/// A killed server's bitmaps are inconsistent to QEMU, which keeps the image and can remove them.
#[test]
fn a_killed_server_leaves_bitmaps_in_use() {
    let folder = support::scratch("bitmap-killed");
    let path = folder.path();
    recorded(path);
    let mut server = Serve::image(path.join("disk")).format("qcow2").peer(Peer::NbdImg).start();
    let mut client = Client::unix(server.socket(), "", Wishes::STRUCTURED);
    client.write(0, &[1; 4096]);
    client.flush();
    server.signal(rustix::process::Signal::KILL);
    server.wait(std::time::Duration::from_secs(30));
    let info: Value = serde_json::from_slice(&qemu_img(path, "info --output=json disk")).unwrap();
    for bitmap in info["format-specific"]["data"]["bitmaps"].as_array().unwrap() {
        assert_eq!(bitmap["flags"], serde_json::json!(["in-use", "auto"]), "{bitmap}");
    }
    qemu_img(path, "check disk");
    // It is written on; the bitmaps stay what they are.
    let server = Serve::image(path.join("disk")).format("qcow2").peer(Peer::NbdImg).start();
    let mut client = Client::unix(server.socket(), "", Wishes::STRUCTURED);
    client.write(1 << 20, &[2; 4096]);
    client.disconnect();
    server.stop();
    qemu_img(path, "bitmap --remove disk fine");
    qemu_img(path, "bitmap --remove disk usual");
    qemu_img(path, "check disk");
}
