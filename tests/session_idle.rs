//! What an idle connection costs: nothing. A file of its own, because it counts how often the threads of this process
//! wake up.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[allow(dead_code)]
mod support;

use std::fs;
use std::time::Duration;

use support::client::{Client, Wishes};
use support::in_process::{Disk, InProcess};
use support::wait_until;

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
