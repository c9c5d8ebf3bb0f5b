//! Tests of [`super`] that need what is private there.

use super::*;

#[test]
fn a_write_under_way_keeps_the_lock_beyond_the_close() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let options = FileOptions { writable: true, direct: false, lock: LockMode::Writer };
    let first = FileStorage::open(file.path(), &options).unwrap();
    let writing = first.begin_change().unwrap();
    first.close().unwrap();
    assert!(first.pwrite(b"late", HostOffset(0), Durability::Later).is_err());
    let second = FileStorage::open(file.path(), &options).map(drop);
    assert_eq!(second.unwrap_err().kind(), ErrorKind::Locked);
    drop(writing);
    drop(first);
    FileStorage::open(file.path(), &options).unwrap();
}
