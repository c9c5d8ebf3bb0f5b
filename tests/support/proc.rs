//! What the kernel says of a running server.

use std::fs;
use std::path::Path;

/// The number of descriptors that `pid` holds open.
pub fn descriptors(pid: u32) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count()
}

/// Their numbers.
pub fn descriptor_numbers(pid: u32) -> Vec<u64> {
    let names = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().map(|entry| entry.unwrap().file_name());
    names.map(|name| name.to_str().unwrap().parse().unwrap()).collect()
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

/// The processor time that `pid` has had, all of its threads together, in ticks of a hundredth of a second (proc(5): the
/// fields utime and stime, the 12th and 13th behind the name).
pub fn cpu_ticks(pid: u32) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let (_, fields) = stat.rsplit_once(')').unwrap();
    fields.split_whitespace().skip(11).take(2).map(|ticks| ticks.parse::<u64>().unwrap()).sum()
}

/// The flags (open(2)) of each descriptor that `pid` has of the file at `path`.
pub fn open_flags(pid: u32, path: &Path) -> Vec<i32> {
    let flags = |entry: fs::DirEntry| {
        (fs::read_link(entry.path()).ok()? == path).then_some(())?;
        let info = fs::read_to_string(format!("/proc/{pid}/fdinfo/{}", entry.file_name().display())).ok()?;
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:"))?;
        i32::from_str_radix(flags.trim(), 8).ok()
    };
    fs::read_dir(format!("/proc/{pid}/fd")).unwrap().filter_map(|entry| flags(entry.ok()?)).collect()
}

fn status_field(pid: u32, name: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with(name)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}
