//! What an idle connection costs: nothing. A file of its own, because it counts how often the threads of this process
//! wake up.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[allow(dead_code)]
mod support;

use std::fs;
use std::time::Duration;

use support::client::{Client, Wishes, one_of_each_thread};
use support::in_process::{Disk, InProcess};
use support::server::Serve;
use support::{proc, wait_until};

/// How often the shards' threads have gone to sleep so far.
fn sleeps() -> u64 {
    let mut sum = 0;
    for task in fs::read_dir("/proc/self/task").unwrap() {
        let folder = task.unwrap().path();
        // Threads end while this looks at them.
        let Ok(name) = fs::read_to_string(folder.join("comm")) else { continue };
        let Ok(status) = fs::read_to_string(folder.join("status")) else { continue };
        let line = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
        if name.starts_with("s0-") || name.starts_with("s1-") {
            sum += line.unwrap().trim().parse::<u64>().unwrap();
        }
    }
    sum
}

/// What nobody could see by the times that threads go to sleep: one that never does.
#[test]
fn an_idle_server_has_no_processor() {
    let folder = support::scratch("idle");
    let disk = folder.path().join("disk");
    fs::write(&disk, vec![7; 1 << 20]).unwrap();
    let server = Serve::image(&disk).format("raw").start();
    let mut clients = one_of_each_thread(server.socket());
    for client in &mut clients {
        client.write(0, &[1; 64 << 10]);
        client.flush();
    }
    // On a busy machine the last sweeps may come late, but not for ever.
    let mut had = Vec::new();
    while had.len() < 5 && had.last().is_none_or(|ticks| *ticks > 3) {
        let before = proc::cpu_ticks(server.pid());
        std::thread::sleep(Duration::from_secs(3));
        had.push(proc::cpu_ticks(server.pid()) - before);
    }
    assert!(
        had.last().is_some_and(|ticks| *ticks <= 3),
        "idle for 3 s it had {had:?} hundredths of a second"
    );
    for mut client in clients {
        assert_eq!(client.read(0, 512), [1; 512]);
        client.disconnect();
    }
    server.stop();
}

#[test]
fn an_idle_server_sleeps() {
    let server = InProcess::serve(Disk::new(&vec![7; 1 << 20]), 64 << 20);
    let mut clients: Vec<Client> =
        (0..4).map(|_| Client::unix(server.socket(), "", Wishes::STRUCTURED)).collect();
    for client in &mut clients {
        client.write(0, &vec![1; 512 << 10]);
        client.read(0, 512 << 10);
    }
    wait_until("the sweeps give the buffers back", || server.budget.left_len() == server.budget_len);
    assert!(sleeps() > 0, "the shards' threads are called something else now");
    // On a busy machine the last sweeps may come late, but not for ever.
    let mut woken = Vec::new();
    while woken.len() < 5 && woken.last().is_none_or(|times| *times > 2) {
        let before = sleeps();
        std::thread::sleep(Duration::from_secs(3));
        woken.push(sleeps() - before);
    }
    assert!(woken.last().is_some_and(|times| *times <= 2), "idle shards woke up {woken:?} times in 3 s");
    for mut client in clients {
        assert_eq!(client.read(0, 4096), vec![1; 4096]);
        client.disconnect();
    }
    server.assert_clean();
}
