//! What the end-to-end tests share: a server that is started and stopped, the programs they need, images made by QEMU,
//! an NBD client of our own that may misbehave, and random numbers with a printed seed. Nothing in here knows the code
//! of nbd-img: it is seen from outside, as its users see it.

pub mod certificates;
pub mod client;
pub mod front;
pub mod fuse;
pub mod images;
pub mod in_process;
pub mod journal;
pub mod migration;
pub mod proc;
pub mod qcow2;
pub mod qmp;
pub mod rng;
pub mod served;
pub mod server;
pub mod tls;
pub mod tls_rig;
pub mod tools;
pub mod wire;
pub mod writers;

use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// A new folder on the file system of the build, which is a disk (unlike /tmp on many machines): O_DIRECT and holes
/// work there. It goes away when it is dropped.
pub fn scratch(name: &str) -> tempfile::TempDir {
    tempfile::Builder::new().prefix(name).tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

/// Looks again and again, for half a minute.
#[track_caller]
pub fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !is_so() {
        assert!(begin.elapsed() < Duration::from_secs(30), "{what}: not in time");
        sleep(Duration::from_millis(10));
    }
}

/// A file of `testdata/`.
pub fn testdata(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata").join(name)
}

/// Whether this run has the rigs drive QEMU's servers instead of nbd-img (see [`server::Peer`]): then a test leaves out
/// what only nbd-img promises, and says so.
pub fn is_nbd_img() -> bool {
    server::Peer::of_this_run() == server::Peer::NbdImg
}

/// More descriptors for this process than most shells give: tests that hold a crowd have both its ends in mind.
pub fn raise_file_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let maximum = getrlimit(Resource::Nofile).maximum;
    let current = maximum.map_or(Some(8192), |max| Some(max.min(8192)));
    setrlimit(Resource::Nofile, Rlimit { current, maximum }).unwrap();
}

/// How often a test repeats something: `default` in CI, or what the environment variable `name` says.
pub fn count(name: &str, default: usize) -> usize {
    std::env::var(name).map_or(default, |n| n.parse().unwrap_or_else(|_| panic!("{name} is no number: {n}")))
}

/// Fails at the first byte that differs, and says where, instead of printing two disks.
#[track_caller]
pub fn assert_same(what: &str, found: &[u8], expected: &[u8]) {
    assert_eq!(found.len(), expected.len(), "{what}: the length differs");
    if found == expected {
        return;
    }
    let differs = |(a, b): (&u8, &u8)| a != b;
    let first = found.iter().zip(expected).position(differs).unwrap();
    let count = found.iter().zip(expected).filter(|&(a, b)| a != b).count();
    panic!(
        "{what}: {count} bytes differ, the first at {first:#x}: found {:02x?}, expected {:02x?}",
        &found[first..(first + 16).min(found.len())],
        &expected[first..(first + 16).min(expected.len())]
    );
}
