//! The log of changes: what a crash may undo, and what it must not. Crash tests stand on these rules.

#![allow(clippy::unwrap_used)] // Helpers of tests are not told apart from a program's code.

use std::collections::BTreeSet;

use nbd_img_formats::storage::{
    Change, Durability, Fate, FileId, Log, MemoryOptions, MemoryStorage, POISON, RecordingStorage,
    SparseBytes, Storage,
};
use nbd_img_formats::sync::Arc;
use nbd_img_formats::{HostOffset, HostRange, Provision};

fn attach(log: &Arc<Log>, len: u64) -> Arc<RecordingStorage> {
    log.attach(MemoryStorage::new(len).unwrap()).unwrap()
}

fn write(storage: &dyn Storage, at: u64, byte: u8, len: usize, durability: Durability) {
    storage.pwrite(&vec![byte; len], HostOffset(at), durability).unwrap();
}

fn range(at: u64, len: u64) -> HostRange {
    HostRange::new(HostOffset(at), len).unwrap()
}

fn byte(content: &SparseBytes, at: u64) -> u8 {
    let mut byte = [0];
    content.read(&mut byte, at);
    byte[0]
}

#[test]
fn replaying_every_prefix_gives_what_the_file_was() {
    let log = Log::new();
    let file = attach(&log, 10_000);
    let mut states = vec![SparseBytes::load(&*file).unwrap()];
    let steps: [&dyn Fn(); 6] = [
        &|| write(&*file, 100, 1, 5000, Durability::Later),
        &|| file.zero(range(4000, 600), Provision::Unmap, false).unwrap(),
        &|| file.set_len(4200).unwrap(),
        &|| file.zero(range(4100, 9000), Provision::Allocate, false).unwrap(),
        &|| file.discard(range(0, 300)).unwrap(),
        &|| write(&*file, 20_000, 7, 1, Durability::Fua),
    ];
    for step in steps {
        step();
        states.push(SparseBytes::load(&*file).unwrap());
    }
    assert_eq!(log.len(), 6);
    for (cut, state) in states.iter().enumerate() {
        assert!(log.replay(FileId(0), cut) == *state, "after {cut} changes");
    }
}

#[test]
fn only_a_sync_that_began_later_keeps_a_write() {
    let log = Log::new();
    let file = attach(&log, 0);
    write(&*file, 0, 1, 10, Durability::Later); // 0
    write(&*file, 10, 2, 10, Durability::Fua); // 1
    write(&*file, 20, 3, 10, Durability::Later); // 2
    file.sync().unwrap(); // 3
    write(&*file, 30, 4, 10, Durability::Later); // 4
    assert_eq!(log.unsynced(1), [0]);
    assert_eq!(log.unsynced(2), [0]);
    assert_eq!(log.unsynced(3), [0, 2]);
    // The sync has begun; whether it has ended shows only with the next record.
    assert_eq!(log.unsynced(4), Vec::<usize>::new());
    assert_eq!(log.unsynced(5), [4]);
    let crashed = log.after_crash(FileId(0), 3, |_, _| Fate::Lost);
    assert_eq!((crashed.len(), byte(&crashed, 5), byte(&crashed, 15)), (20, 0, 2));
}

#[test]
fn a_sync_of_one_file_says_nothing_about_another() {
    let log = Log::new();
    let (first, second) = (attach(&log, 0), attach(&log, 0));
    assert_eq!((first.file(), second.file()), (FileId(0), FileId(1)));
    write(&*first, 0, 1, 10, Durability::Later);
    write(&*second, 0, 2, 10, Durability::Later);
    second.sync().unwrap();
    log.mark("here");
    assert_eq!(log.unsynced(log.len()), [0]);
    assert_eq!(log.records()[3].change, Change::Mark("here".to_owned()));
}

#[test]
fn a_write_that_is_under_way_during_a_sync_is_not_covered() {
    /// Syncs the file while a write to it is under way.
    struct SyncInWrite(Arc<RecordingStorage>);
    let log = Log::new();
    let inner = attach(&log, 0);
    let meddling = SyncInWrite(Arc::clone(&inner));
    std::thread::scope(|scope| {
        // The other order of begin and end: many tries, and in each the rule must hold.
        for _ in 0..200 {
            scope.spawn(|| write(&*inner, 0, 1, 4096, Durability::Later));
            scope.spawn(|| meddling.0.sync().unwrap());
        }
    });
    let records = log.records();
    let unsynced: BTreeSet<usize> = log.unsynced(records.len()).into_iter().collect();
    for (number, record) in records.iter().enumerate() {
        let ended = record.ended.unwrap();
        let covered = records.iter().enumerate().any(|(sync, r)| r.change == Change::Sync && sync >= ended);
        let is_write = record.change != Change::Sync;
        assert_eq!(unsynced.contains(&number), is_write && !covered, "record {number}");
    }
}

#[test]
fn fates_leave_whole_sectors() {
    let log = Log::new();
    let file = attach(&log, 4096);
    write(&*file, 100, 9, 2000, Durability::Later);
    let crashed = log.after_crash(FileId(0), 1, |_, _| Fate::Prefix(2));
    assert_eq!([99, 100, 1023, 1024].map(|at| byte(&crashed, at)), [0, 9, 9, 0]);
    let mut kinds = BTreeSet::new();
    for seed in 0..64 {
        let crashed = log.after_crash(FileId(0), 1, |_, _| Fate::Scattered(seed));
        let sectors: Vec<bool> =
            (0..5).map(|sector| byte(&crashed, (sector * 512).clamp(100, 2099)) == 9).collect();
        for at in 100..2100 {
            assert_eq!(byte(&crashed, at) == 9, sectors[at as usize / 512]);
        }
        kinds.insert(sectors);
    }
    assert!(kinds.len() > 16, "{} of 32 combinations", kinds.len());
}

#[test]
fn failures_stay_in_doubt_and_refusals_did_not_happen() {
    let log = Log::new();
    let inner = MemoryStorage::with(MemoryOptions { len: 4096, grows: false, poisoned: true }).unwrap();
    let file = log.attach(inner).unwrap();
    assert!(file.pwrite(&[1; 10], HostOffset(4090), Durability::Fua).is_err());
    file.sync().unwrap();
    assert_eq!(log.unsynced(log.len()), [0], "nobody knows what a failed write did");
    file.discard(range(0, 4096)).unwrap();
    assert_eq!(byte(&log.replay(FileId(0), log.len()), 0), POISON);
}

#[test]
fn a_state_can_be_opened_as_a_storage() {
    let log = Log::new();
    let file = attach(&log, 0);
    write(&*file, 9000, 5, 100, Durability::Later);
    file.set_len(50_000).unwrap();
    let copy = MemoryStorage::new(0).unwrap();
    log.replay(FileId(0), 2).store(&*copy).unwrap();
    let read = |storage: &dyn Storage| {
        let mut buf = vec![1; 60_000];
        let len = storage.pread(&mut buf, HostOffset(0)).unwrap();
        buf.truncate(len);
        buf
    };
    assert_eq!(read(&*copy).len(), 50_000);
    assert!(read(&*copy) == read(&*file));
}
