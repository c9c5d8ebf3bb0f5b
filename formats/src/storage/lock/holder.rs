//! Who holds a lock on a file, for the text of a refusal. A best effort with bounded work: the kernel
//! does not tell the owner of such a lock, so the open files of all processes that we may look into
//! are searched for it. Nothing is decided by what is found here.

use std::fmt;
use std::fs;
use std::os::fd::BorrowedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::{Duration, Instant};

/// Longest search. Our choice: an error text may cost this much, not more.
const SEARCH_TIME_MAX: Duration = Duration::from_millis(200);

/// A process.
pub(super) struct Holder {
    pid: u32,
    command: String,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "process {} ({})", self.pid, self.command.escape_debug())
    }
}

/// The first other open file, of this process or another, that has a lock on the file behind `file`.
pub(super) fn find(file: BorrowedFd<'_>) -> Option<Holder> {
    let stat = rustix::fs::fstat(file).ok()?;
    let inode = format!(
        "{:02x}:{:02x}:{}",
        rustix::fs::major(stat.st_dev),
        rustix::fs::minor(stat.st_dev),
        stat.st_ino
    );
    let end = Instant::now() + SEARCH_TIME_MAX;
    for process in fs::read_dir("/proc").ok()?.flatten() {
        if Instant::now() > end {
            return None;
        }
        let Some(pid) = process.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        if holds_lock(&process.path(), &inode) {
            return Some(Holder { pid, command: command_of(&process.path()) });
        }
    }
    None
}

/// Whether an open file of the process has a lock on `inode`. Our own description has none any more
/// when this is asked.
fn holds_lock(process: &Path, inode: &str) -> bool {
    let Ok(files) = fs::read_dir(process.join("fdinfo")) else { return false };
    files.flatten().any(|file| {
        // As `lock:\t1: OFDLCK  ADVISORY  READ -1 fe:00:1234 100 101`, proc_pid_fdinfo(5).
        fs::read_to_string(file.path()).is_ok_and(|text| {
            text.lines()
                .filter_map(|line| line.strip_prefix("lock:"))
                .any(|line| line.split_ascii_whitespace().any(|word| word == inode))
        })
    })
}

fn command_of(process: &Path) -> String {
    let line = fs::read(process.join("cmdline")).unwrap_or_default();
    let program = line.split(|byte| *byte == 0).next().unwrap_or_default();
    let name = Path::new(std::ffi::OsStr::from_bytes(program)).file_name().unwrap_or_default();
    name.to_string_lossy().into_owned()
}
