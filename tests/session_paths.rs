//! The ways of a request through a session that a fast disk and plenty of memory never show: waiting reads and writes,
//! budgets that are used up, requests larger than any buffer, failures in the middle of a reply, clients that go.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[allow(dead_code)]
mod support;

use std::time::{Duration, Instant};

use support::assert_same;
use support::client::{Client, Request, Wishes, is_hangup};
use support::in_process::{Disk, InProcess};
use support::rng::Rng;
use support::wire::{command, command_flag};

const DISK_LEN: usize = 40 << 20;

fn content() -> Vec<u8> {
    Rng::fixed(7).bytes(DISK_LEN)
}

/// Lengths around every limit of the way: floor, slice, batch, receive buffer, largest payload.
const LENGTHS: [usize; 12] = [
    1,
    4096,
    (128 << 10) + 1,
    256 << 10,
    (256 << 10) + 513,
    (1 << 20) - 16,
    1 << 20,
    (2 << 20) - 16,
    (2 << 20) + 7,
    4 << 20,
    (4 << 20) + 1,
    32 << 20,
];

#[test]
fn reads_of_every_length_are_right_with_and_without_memory() {
    let content = content();
    for budget_len in [0, 1 << 20, 256 << 20] {
        let server = InProcess::serve(Disk::new(&content), budget_len);
        for (wishes, flags) in
            [(Wishes::SIMPLE, 0), (Wishes::STRUCTURED, 0), (Wishes::STRUCTURED, command_flag::DF)]
        {
            let mut client = Client::unix(server.socket(), "", wishes);
            for len in LENGTHS {
                let offset = (DISK_LEN - len) as u64 / 2;
                let reply = client.ask(Request::new(command::READ, offset, len).flags(flags), &[]);
                assert_eq!(reply.error, 0, "{}", reply.text);
                assert_same("a read", &reply.data, &content[offset as usize..][..len]);
            }
            client.disconnect();
        }
        server.assert_clean();
    }
}

#[test]
fn writes_of_every_length_are_right_with_and_without_memory() {
    for budget_len in [0, 1 << 20, 256 << 20] {
        let mut shadow = content();
        let server = InProcess::serve(Disk::new(&shadow), budget_len);
        let mut rng = Rng::fixed(9);
        let mut client = Client::unix(server.socket(), "", Wishes::STRUCTURED);
        for (index, len) in LENGTHS.into_iter().enumerate() {
            let offset = (DISK_LEN - len) as u64 / 3;
            let data = rng.bytes(len);
            let flags = if index % 2 == 0 { command_flag::FUA } else { 0 };
            let reply = client.ask(Request::new(command::WRITE, offset, len).flags(flags), &data);
            assert_eq!(reply.error, 0, "{}", reply.text);
            shadow[offset as usize..][..len].copy_from_slice(&data);
        }
        assert_same("the disk", &client.read_all(), &shadow);
        client.disconnect();
        server.assert_clean();
    }
}

#[test]
fn many_large_writes_on_many_connections_share_a_small_budget() {
    const CONNECTIONS: usize = 12;
    const WRITES: usize = 4;
    const LEN: usize = 8 << 20;
    let server = InProcess::serve(Disk::new(&vec![0; CONNECTIONS * LEN]), 16 << 20);
    std::thread::scope(|scope| {
        for index in 0..CONNECTIONS {
            let socket = server.socket();
            scope.spawn(move || {
                let mut client = Client::unix(socket, "", Wishes::SIMPLE);
                let data = vec![index as u8 + 1; LEN];
                for _ in 0..WRITES {
                    client.send(Request::new(command::WRITE, (index * LEN) as u64, LEN), &data).unwrap();
                }
                for _ in 0..WRITES {
                    assert_eq!(client.reply().unwrap().error, 0);
                }
                assert_same("a connection's part", &client.read((index * LEN) as u64, LEN), &data);
                client.disconnect();
            });
        }
    });
    server.assert_clean();
}

#[test]
fn a_slow_read_is_overtaken_by_the_others() {
    let content = content();
    let disk = Disk::new(&content);
    disk.hold(0);
    let server = InProcess::serve(disk.clone(), 256 << 20);
    let mut client = Client::unix(server.socket(), "", Wishes::STRUCTURED);
    let slow = client.send(Request::new(command::READ, 0, 65536), &[]).unwrap();
    let mut others = Vec::new();
    for index in 1..64_u64 {
        others.push(client.send(Request::new(command::READ, index * 65536, 65536), &[]).unwrap());
    }
    for _ in 0..others.len() {
        let reply = client.reply().unwrap_or_else(|e| panic!("the slow read holds up others: {e}"));
        assert_ne!(reply.cookie, slow, "an answer before there was one");
        let index = others.iter().position(|cookie| *cookie == reply.cookie).unwrap() + 1;
        assert_same("a fast read", &reply.data, &content[index * 65536..][..65536]);
    }
    disk.let_go(0);
    let last = client.reply().unwrap();
    assert_eq!(last.cookie, slow);
    assert_same("the slow read", &last.data, &content[..65536]);
    client.disconnect();
    server.assert_clean();
}

#[test]
fn a_failure_inside_a_large_read_is_an_error_or_a_hang_up_but_never_data() {
    let content = content();
    let disk = Disk::new(&content);
    disk.fails_from.store(20 << 20, std::sync::atomic::Ordering::Relaxed);
    let server = InProcess::serve(disk, 256 << 20);
    // In chunks it can be told, and the stream stays in step.
    let mut client = Client::unix(server.socket(), "", Wishes::STRUCTURED);
    let reply = client.ask(Request::new(command::READ, 1 << 20, 32 << 20), &[]);
    assert_eq!(reply.error, libc::EIO as u32);
    assert!(!reply.text.is_empty());
    assert_same("what follows", &client.read(4096, 4096), &content[4096..8192]);
    // In one chunk it is filled up, and told where that begins: at the slice that failed.
    let whole = Request::new(command::READ, 1 << 20, 32 << 20).flags(command_flag::DF);
    let reply = client.ask(whole, &[]);
    assert_eq!(reply.error, libc::EIO as u32);
    let good = usize::try_from(reply.error_offset.unwrap()).unwrap();
    assert!(good > (1 << 20) && good <= 20 << 20, "{good}");
    assert_same("what was there", &reply.data[..good - (1 << 20)], &content[1 << 20..good]);
    assert_same("what follows", &client.read(4096, 4096), &content[4096..8192]);
    client.disconnect();
    // Small reads fail whole in both framings.
    let mut client = Client::unix(server.socket(), "", Wishes::SIMPLE);
    assert_eq!(client.ask(Request::new(command::READ, 20 << 20, 4096), &[]).error, libc::EIO as u32);
    // A header that is out cannot be taken back: the connection ends before the length is reached.
    client.send(Request::new(command::READ, 1 << 20, 32 << 20), &[]).unwrap();
    assert!(is_hangup(&client.reply().unwrap_err()));
    server.assert_clean();
}

#[test]
fn what_is_sent_from_the_file_is_what_is_read() {
    let content = content();
    let server = InProcess::serve(Disk::sending(&content), 256 << 20);
    for (wishes, flags) in
        [(Wishes::SIMPLE, 0), (Wishes::STRUCTURED, 0), (Wishes::STRUCTURED, command_flag::DF)]
    {
        let mut client = Client::unix(server.socket(), "", wishes);
        let mut sent = Vec::new();
        for len in LENGTHS {
            let offset = (DISK_LEN - len) as u64 / 2;
            let request = Request::new(command::READ, offset, len).flags(flags);
            sent.push((client.send(request, &[]).unwrap(), offset as usize, len));
        }
        for _ in LENGTHS {
            let reply = client.reply().unwrap();
            assert_eq!(reply.error, 0, "{}", reply.text);
            let (_, offset, len) = *sent.iter().find(|(cookie, ..)| *cookie == reply.cookie).unwrap();
            assert_same("a read", &reply.data, &content[offset..][..len]);
        }
        client.disconnect();
    }
    server.assert_clean();
}

#[test]
fn a_file_that_ends_while_it_is_sent_is_an_error_or_a_hang_up_but_never_data() {
    let content = content();
    let disk = Disk::sending(&content);
    disk.fails_from.store(20 << 20, std::sync::atomic::Ordering::Relaxed);
    let server = InProcess::serve(disk, 256 << 20);
    for flags in [0, command_flag::DF] {
        let mut client = Client::unix(server.socket(), "", Wishes::STRUCTURED);
        let request = Request::new(command::READ, (20 << 20) - 70_000, 1 << 20).flags(flags);
        let reply = client.ask(request, &[]);
        assert_eq!(reply.error, libc::EIO as u32);
        assert!(reply.text.contains("truncated"), "{}", reply.text);
        assert_eq!(reply.error_offset, Some(20 << 20));
        assert_same("what was there", &reply.data[..70_000], &content[(20 << 20) - 70_000..20 << 20]);
        assert_same("what follows", &client.read(1 << 20, 1 << 20), &content[1 << 20..2 << 20]);
        client.disconnect();
    }
    let mut client = Client::unix(server.socket(), "", Wishes::SIMPLE);
    client.send(Request::new(command::READ, (20 << 20) - 70_000, 1 << 20), &[]).unwrap();
    assert!(is_hangup(&client.reply().unwrap_err()));
    server.assert_clean();
}

#[test]
fn a_disconnect_waits_for_what_is_in_flight() {
    let disk = Disk::new(&content());
    disk.first_read_ms.store(300, std::sync::atomic::Ordering::Relaxed);
    let server = InProcess::serve(disk, 256 << 20);
    let mut client = Client::unix(server.socket(), "", Wishes::SIMPLE);
    let cookie = client.send(Request::new(command::READ, 0, 4096), &[]).unwrap();
    let goodbye = Request::new(command::DISC, 0, 0).bytes(0);
    client.stream().write_all(&goodbye).unwrap();
    assert_eq!(client.reply().unwrap().cookie, cookie);
    assert!(is_hangup(&client.reply().unwrap_err()));
    server.assert_clean();
}

#[test]
fn a_drain_answers_what_was_received_and_takes_no_more() {
    let disk = Disk::new(&content());
    disk.first_read_ms.store(300, std::sync::atomic::Ordering::Relaxed);
    let server = InProcess::serve(disk, 256 << 20);
    let mut busy = Client::unix(server.socket(), "", Wishes::SIMPLE);
    let mut idle = Client::unix(server.socket(), "", Wishes::SIMPLE);
    idle.read(4096, 4096);
    let cookie = busy.send(Request::new(command::READ, 0, 4096), &[]).unwrap();
    std::thread::sleep(Duration::from_millis(100));
    server.shards.drain();
    assert_eq!(busy.reply().unwrap().cookie, cookie);
    assert!(is_hangup(&busy.reply().unwrap_err()));
    assert!(is_hangup(&idle.reply().unwrap_err()));
    server.assert_clean();
}

#[test]
fn a_drain_answers_what_the_socket_holds() {
    let server = InProcess::serve(Disk::new(&content()), 64 << 20);
    let mut clients: Vec<Client> =
        (0..16).map(|_| Client::unix(server.socket(), "", Wishes::SIMPLE)).collect();
    for client in &mut clients {
        client.read(4096, 4096);
    }
    // The sessions have had no time to look at these.
    for client in &mut clients {
        client.send(Request::new(command::READ, 4096, 4096), &[]).unwrap();
    }
    server.shards.drain();
    for mut client in clients {
        client.reply().unwrap();
        assert!(is_hangup(&client.reply().unwrap_err()));
    }
    server.assert_clean();
}

#[test]
fn clients_that_go_in_mid_request_leave_nothing_behind() {
    let server = InProcess::serve(Disk::new(&content()), 64 << 20);
    let mut rng = Rng::new("clients_that_go");
    for _ in 0..support::count("NBD_IMG_RESETS", 300) {
        let mut client = Client::unix(server.socket(), "", Wishes::STRUCTURED);
        for _ in 0..rng.in_range(1..8) {
            let len = rng.in_range(1..2 << 20) as usize;
            let offset = rng.below((DISK_LEN - len) as u64);
            if rng.one_in(2) {
                client.send(Request::new(command::READ, offset, len), &[]).unwrap();
            } else {
                let request = Request::new(command::WRITE, offset, len);
                let mut bytes = request.bytes(1);
                bytes.extend(vec![0xaa; len]);
                bytes.truncate(rng.in_range(1..bytes.len() as u64) as usize);
                client.stream().write_all(&bytes).unwrap();
                break;
            }
        }
        drop(client);
    }
    server.assert_clean();
}

#[test]
fn an_idle_connection_gives_its_memory_back() {
    let server = InProcess::serve(Disk::new(&content()), 64 << 20);
    let mut client = Client::unix(server.socket(), "", Wishes::SIMPLE);
    client.write(0, &vec![1; 3 << 20]);
    client.read(0, 1 << 20);
    let deadline = Instant::now() + Duration::from_secs(10);
    while server.budget.left_len() != server.budget_len {
        assert!(
            Instant::now() < deadline,
            "{} bytes are still leased",
            server.budget_len - server.budget.left_len()
        );
        std::thread::sleep(Duration::from_millis(50));
    }
    // And it still works.
    assert_eq!(client.read(0, 4096), vec![1; 4096]);
    client.disconnect();
    server.assert_clean();
}

#[test]
fn a_hole_fits_into_a_batch_that_is_nearly_full() {
    let mut content = content();
    content[1 << 20..][..64 << 10].fill(0);
    let disk = Disk::cold(&content);
    disk.answers_at_once.store(true, std::sync::atomic::Ordering::Relaxed);
    let server = InProcess::serve(disk, 64 << 20);
    let mut client = Client::unix(server.socket(), "", Wishes::STRUCTURED);
    let zero = client.ask(Request::new(command::WRITE_ZEROES, 1 << 20, 64 << 10), &[]);
    assert_eq!(zero.error, 0);
    client.disconnect();
    // Around the 64 KiB that a batch has at first: headers of data have 28 bytes, of holes 32.
    for rest in (0..80).step_by(4) {
        let mut client = Client::unix(server.socket(), "", Wishes::STRUCTURED);
        let len = (64 << 10) - 28 - rest;
        let first = Request::new(command::READ, 0, len);
        let second = Request::new(command::READ, 1 << 20, 68 << 10);
        let cookies = [client.register(first), client.register(second)];
        let both = [first.bytes(cookies[0]), second.bytes(cookies[1])].concat();
        client.stream().write_all(&both).unwrap();
        for _ in cookies {
            let reply = client.reply().unwrap();
            let (offset, len) = if reply.cookie == cookies[0] { (0, len) } else { (1 << 20, 68 << 10) };
            assert_eq!(reply.error, 0, "{}", reply.text);
            assert_eq!(reply.chunks, 1 + usize::from(offset > 0), "the second has a hole");
            assert_same("a read", &reply.data, &content[offset..][..len]);
        }
        client.disconnect();
    }
    server.assert_clean();
}

#[test]
fn answers_do_not_wait_for_the_payload_of_a_streamed_write() {
    let disk = Disk::new(&content());
    disk.first_read_ms.store(100, std::sync::atomic::Ordering::Relaxed);
    let server = InProcess::serve(disk, 64 << 20);
    let mut client = Client::unix(server.socket(), "", Wishes::SIMPLE);
    // One is answered at once and one while the write is under way, which is larger than any buffer.
    let at_once = Request::new(command::READ, 0, 0);
    let slow = Request::new(command::READ, 0, 4096);
    let write = Request::new(command::WRITE, 0, 8 << 20);
    let cookies = [at_once, slow, write].map(|request| client.register(request));
    let all = [at_once.bytes(cookies[0]), slow.bytes(cookies[1]), write.bytes(cookies[2])].concat();
    client.stream().write_all(&all).unwrap();
    assert_eq!(client.reply().unwrap().cookie, cookies[0]);
    assert_eq!(client.reply().unwrap().cookie, cookies[1]);
    client.stream().write_all(&vec![1; 8 << 20]).unwrap();
    assert_eq!(client.reply().unwrap().cookie, cookies[2]);
    client.disconnect();
    server.assert_clean();
}

#[test]
fn block_status_of_a_fragmented_disk_keeps_to_the_memory_there_is() {
    const RUNS: usize = DISK_LEN / 512;
    for budget_len in [0, 3 << 20, 64 << 20] {
        let disk = Disk::new(&content());
        disk.runs_of.store(512, std::sync::atomic::Ordering::Relaxed);
        let server = InProcess::serve(disk, budget_len);
        let mut client = Client::unix(server.socket(), "", Wishes::ALLOCATION);
        let (mut at, mut runs, mut answers) = (0, 0, 0);
        while at < DISK_LEN {
            let reply = client.ask(Request::new(command::BLOCK_STATUS, at as u64, DISK_LEN - at), &[]);
            assert_eq!(reply.error, 0, "{}", reply.text);
            assert!(reply.extents.iter().all(|(len, _)| *len == 512));
            runs += reply.extents.len();
            at += reply.extents.len() * 512;
            answers += 1;
        }
        assert_eq!(runs, RUNS);
        // 16 bytes for each: 1.25 MiB, or what fits into the 256 KiB that everybody has.
        assert_eq!(answers, if budget_len == 0 { RUNS.div_ceil(16384) } else { 1 });
        for _ in 0..6 {
            client.send(Request::new(command::BLOCK_STATUS, 0, DISK_LEN), &[]).unwrap();
        }
        for _ in 0..6 {
            assert_eq!(client.reply().unwrap().error, 0);
        }
        client.disconnect();
        server.assert_clean();
    }
}
