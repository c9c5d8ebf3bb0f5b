//! What a server needs of memory: little when nobody wants anything, and never more than its budget.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[allow(dead_code)]
mod support;

use std::fs::{self, File};
use std::thread;
use std::time::{Duration, Instant};

use support::client::{Client, Request, Wishes};
use support::proc;
use support::server::Serve;
use support::wire::{command, command_flag};

const IDLE_SERVER_LEN_MAX: u64 = 20 << 20;
const IDLE_CONNECTION_LEN_MAX: u64 = 128 << 10;
const LOADED_SERVER_LEN_MAX: u64 = 512 << 20;

const CONNECTIONS: usize = 100;
const WRITE_LEN: usize = 32 << 20;
/// Of each connection, one behind the other without waiting. `NBD_IMG_MEMORY_WRITES` asks for more of them.
const WRITES: usize = 2;

#[test]
fn an_idle_server_and_its_idle_connections_are_small() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.img");
    fs::write(&path, vec![5; 8 << 20]).unwrap();
    let server = Serve::image(&path).format("raw").start();
    // The first connections start the export's threads, which is not what further ones cost.
    let mut open: Vec<Client> = (0..8).map(|_| Client::unix(server.socket(), "", Wishes::SIMPLE)).collect();
    let alone = settled_len(server.pid(), IDLE_SERVER_LEN_MAX);
    assert!(alone < IDLE_SERVER_LEN_MAX, "an idle server has {alone} bytes");
    let more = 100;
    for _ in 0..more {
        let mut client = Client::unix(server.socket(), "", Wishes::SIMPLE);
        // They have worked, with the buffers that this takes.
        client.write(0, &[1; 64 << 10]);
        client.read(0, 1 << 20);
        open.push(client);
    }
    let wanted = alone + more * IDLE_CONNECTION_LEN_MAX;
    let crowded = settled_len(server.pid(), wanted);
    assert!(crowded < wanted, "{more} idle connections cost {} bytes each", (crowded - alone) / more);
    drop(open);
    server.stop();
}

/// Resident memory, once it is below `wanted` or has had time to be.
fn settled_len(pid: u32, wanted: u64) -> u64 {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let len = proc::resident_len(pid);
        if len < wanted || Instant::now() > deadline {
            return len;
        }
        thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn many_large_writes_at_once_stay_within_the_budget() {
    // In memory: the disk is not what this is about.
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = folder.path().join("disk.img");
    File::create(&path).unwrap().set_len(2 * WRITE_LEN as u64).unwrap();
    // A server that asks for more than this gets no memory, and ends.
    let script = format!("ulimit -d {}; exec \"$@\"", LOADED_SERVER_LEN_MAX >> 10);
    let mut server = Serve::image(&path).format("raw").wrapper(&["sh", "-c", &script, "sh"]).start();
    let writes = support::count("NBD_IMG_MEMORY_WRITES", WRITES);
    let payload = vec![0x5a; WRITE_LEN];
    let (payload, socket) = (&payload, server.socket());
    thread::scope(|scope| {
        for index in 0..CONNECTIONS {
            scope.spawn(move || {
                let mut client = Client::unix(socket, "", Wishes::SIMPLE);
                // They wait for each other's memory, on a slow machine for long.
                client.stream().set_patience(Some(Duration::from_secs(600))).unwrap();
                let offset = (index % 2 * WRITE_LEN) as u64;
                // Half of them are durable: those are never written in place, but held until they are.
                let flags = if index % 4 < 2 { command_flag::FUA } else { 0 };
                let request = Request::new(command::WRITE, offset, WRITE_LEN).flags(flags);
                for _ in 0..writes {
                    let cookie = client.register(request);
                    client.stream().write_all(&request.bytes(cookie)).unwrap();
                    client.stream().write_all(payload).unwrap();
                }
                for _ in 0..writes {
                    let reply = client.reply().unwrap();
                    assert_eq!(reply.error, 0, "{}", reply.text);
                }
                client.disconnect();
            });
        }
    });
    server.assert_alive();
    let peak = proc::peak_len(server.pid());
    assert!(peak < LOADED_SERVER_LEN_MAX, "the server had {peak} bytes at its peak");
    server.stop();
    assert!(fs::read(&path).unwrap().iter().all(|byte| *byte == 0x5a));
}
