//! What the kernel says of a running server.

use std::fs;

/// The number of descriptors that `pid` holds open.
pub fn descriptors(pid: u32) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count()
}

/// What they are.
pub fn descriptor_targets(pid: u32) -> Vec<String> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    entries.filter_map(|entry| Some(fs::read_link(entry.ok()?.path()).ok()?.display().to_string())).collect()
}

/// Their number without rings: a thread makes its own when it first has to wait for the disk, and keeps it.
pub fn descriptors_but_rings(pid: u32) -> usize {
    descriptor_targets(pid).iter().filter(|target| !target.contains("io_uring")).count()
}

/// Resident memory of `pid` in bytes.
pub fn resident_len(pid: u32) -> u64 {
    status_field(pid, "VmRSS:") * 1024
}

/// The most resident memory that `pid` has had, in bytes.
pub fn peak_len(pid: u32) -> u64 {
    status_field(pid, "VmHWM:") * 1024
}

/// The number of threads of `pid`.
pub fn threads(pid: u32) -> u64 {
    status_field(pid, "Threads:")
}

fn status_field(pid: u32, name: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with(name)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}
