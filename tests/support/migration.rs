//! A storage migration into an export: QEMU's mirror job moves the disk of a running guest while the guest writes.

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;

use super::client::{Client, Request, Wishes};
use super::qmp::Monitor;
use super::rng::Rng;
use super::server::Server;
use super::wire::command;

pub const DISK_LEN: usize = 48 << 20;

/// More writes than this make a move one of a disk that is written to.
const ENOUGH: usize = 10;

/// The disk of a running guest moves into the export of `server`, as in a migration without shared storage: the guest (a
/// client of the storage daemon) writes before, during and after the switch. Gives what the export must hold.
pub fn mirror(folder: &Path, server: &Server, mut rng: Rng, copy_mode: &str) -> Vec<u8> {
    let mut shadow = rng.bytes(DISK_LEN);
    shadow[10 << 20..20 << 20].fill(0);
    fs::write(folder.join("source"), &shadow).unwrap();
    let mut daemon = start_daemon(folder, server);

    let (over, writes) = (AtomicBool::new(false), AtomicUsize::new(0));
    let guest = Client::unix(&folder.join("guest.sock"), "disk", Wishes::STRUCTURED);
    let (mut guest, mut shadow) = thread::scope(|scope| {
        let writer = scope.spawn(|| write_until(guest, shadow, rng, &over, &writes));
        daemon.execute(
            "blockdev-mirror",
            &json!({ "job-id": "move", "device": "source", "target": "target", "sync": "full", "copy-mode": copy_mode,
                "buf-size": 1 << 20 }),
        );
        daemon.wait_for("BLOCK_JOB_READY");
        let ready = Instant::now();
        while writes.load(Ordering::Relaxed) <= ENOUGH && ready.elapsed() < Duration::from_secs(30) {
            thread::sleep(Duration::from_millis(1));
        }
        daemon.execute("block-job-complete", &json!({ "device": "move" }));
        let end = daemon.wait_for("BLOCK_JOB_COMPLETED");
        over.store(true, Ordering::Relaxed);
        assert!(end.get("error").is_none(), "the mirror failed: {end}");
        assert_eq!(end["offset"], end["len"], "{end}");
        writer.join().unwrap()
    });
    // The guest's disk is the export now: what it reads and writes from here on comes to it through QEMU.
    guest.write(123_456, b"after the move");
    shadow[123_456..123_470].copy_from_slice(b"after the move");
    guest.flush();
    shadow
}

fn start_daemon(folder: &Path, server: &Server) -> Monitor {
    let socket = server.socket().display();
    let args = [
        "--blockdev",
        "driver=file,node-name=source,filename=source",
        "--blockdev",
        &format!("driver=nbd,node-name=target,server.type=unix,server.path={socket},export="),
        "--nbd-server",
        "addr.type=unix,addr.path=guest.sock",
        "--export",
        "type=nbd,id=guest,node-name=source,name=disk,writable=on",
    ];
    Monitor::storage_daemon(folder, &args)
}

/// Writes and zeroes until told to stop, and counts that; gives back what the disk must hold.
fn write_until(
    mut guest: Client,
    mut shadow: Vec<u8>,
    mut rng: Rng,
    over: &AtomicBool,
    writes: &AtomicUsize,
) -> (Client, Vec<u8>) {
    while !over.load(Ordering::Relaxed) {
        let len = usize::try_from(rng.in_range(1..100_000)).unwrap();
        let at = usize::try_from(rng.below((DISK_LEN - len) as u64)).unwrap();
        if rng.one_in(4) {
            shadow[at..at + len].fill(0);
            let reply = guest.ask(Request::new(command::WRITE_ZEROES, at as u64, len), &[]);
            assert_eq!(reply.error, 0, "{}", reply.text);
        } else {
            let data = rng.bytes(len);
            guest.write(at as u64, &data);
            shadow[at..at + len].copy_from_slice(&data);
        }
        writes.fetch_add(1, Ordering::Relaxed);
    }
    let writes = writes.load(Ordering::Relaxed);
    assert!(writes > ENOUGH, "only {writes} writes during the move: it proves nothing");
    (guest, shadow)
}
