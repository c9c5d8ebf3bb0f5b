//! Tests of `tables`.

use super::super::types::DataFile;
use super::*;

fn slice(geometry: Geometry, word: u64) -> TableSlice {
    TableSlice::of_words(std::iter::repeat_n(word, 64), geometry)
}

fn here() -> Result<HostOffset> {
    Ok(HostOffset(0))
}

fn key(slice: u64) -> SliceKey {
    SliceKey { image: ImageNumber(0), slice: SliceNumber(slice) }
}

#[test]
fn budget_holds_and_what_is_used_stays() {
    let geometry = Geometry::new(9, false, 3, DataFile::Internal);
    let cache = TableCache::new(0, geometry.slice_len());
    for round in 1..50 {
        cache.get_or_load(key(0), here, |_| Ok(slice(geometry, 0))).unwrap();
        cache.get_or_load(key(round), here, |_| Ok(slice(geometry, 1))).unwrap();
        let kept: usize = cache.sets.iter().map(|set| set.read().slots.len()).sum();
        assert!(kept <= 2);
    }
    // Slice 0 was in use all the time, so only the others were read anew.
    assert_eq!(cache.loads(), 50);
}

#[test]
fn a_budget_for_a_disk_holds_the_disk() {
    let cache = TableCache::new(32 << 20, 64 << 10);
    let geometry = Geometry::new(9, false, 3, DataFile::Internal);
    for _ in 0..3 {
        for number in 0..512 {
            cache.get_or_load(key(number), here, |_| Ok(slice(geometry, 0))).unwrap();
        }
    }
    assert_eq!(cache.loads(), 512);
}

#[test]
fn a_failed_load_leaves_nothing_behind() {
    let geometry = Geometry::new(9, false, 3, DataFile::Internal);
    let cache = TableCache::new(0, 512);
    let failed = cache.get_or_load(key(0), here, |_| Err(Error::new(ErrorKind::Io, "as the test wants")));
    assert!(failed.is_err());
    assert!(cache.get(key(0)).is_none());
    assert!(cache.get_or_load(key(0), here, |_| Ok(slice(geometry, 0))).is_ok());
}

/// A load that takes so long that the table was copied, changed, written and dropped meanwhile.
#[test]
fn a_table_that_moves_while_it_is_read_is_read_anew() {
    let geometry = Geometry::new(9, false, 3, DataFile::Internal);
    let cache = TableCache::new(0, geometry.slice_len());
    let place = AtomicU64::new(512);
    let locate = || Ok(HostOffset(place.load(Ordering::SeqCst)));
    let load = |at: HostOffset| {
        if at == HostOffset(512) {
            let moved = cache.hold_or_insert(key(0), Arc::new(slice(geometry, 1024)));
            place.store(1024, Ordering::SeqCst);
            moved.release();
            for other in 1..50 {
                cache.get_or_load(key(other), here, |_| Ok(slice(geometry, 0))).unwrap();
            }
            assert!(cache.get(key(0)).is_none(), "it is to be dropped here");
        }
        Ok(slice(geometry, at.0))
    };
    assert_eq!(cache.get_or_load(key(0), locate, load).unwrap().raw(0), 1024);
}

#[test]
fn a_table_that_becomes_longer_keeps_what_it_has() {
    let storage: Arc<dyn Storage> = crate::storage::MemoryStorage::new(4096).unwrap();
    let geometry = Geometry::new(9, false, 3, DataFile::Internal);
    let location = TableLocation { at: HostOffset(0), entries: 3 };
    let table = L1Table::load(&storage, location, geometry, 3 * geometry.l2_coverage_len()).unwrap();
    table.set(3, 1);
    assert_eq!((table.len(), table.raw(3)), (3, 0), "there is none of that number");
    table.set(2, 30);
    for (needed, number) in [(3, 2), (4, 3), (100, 99), (5000, 4999), (4000, 3999), (100_000, 99_999)] {
        table.grow(needed);
        assert!(table.len() >= needed);
        table.set(number, number as u64 + 28);
    }
    for number in [2, 3, 99, 3999, 4999, 99_999] {
        assert_eq!(table.raw(number), number as u64 + 28);
    }
    assert_eq!((table.raw(0), table.raw(4), table.raw(table.len())), (0, 0, 0));
}
