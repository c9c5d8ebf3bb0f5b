#![allow(clippy::unwrap_used)] // Helpers of tests are not told apart from a program's code.

use super::*;
use crate::error::{Error, ErrorKind};
use std::sync::mpsc;

const MIB: u64 = 1 << 20;

fn place(image: u16, at: u64, len_max: u64) -> BlobPlace {
    BlobPlace::new(ImageNumber(image), Blob { at: HostOffset(at), len_max })
}

fn fill(cache: &ClusterCache, place: BlobPlace, len: u64, byte: u8) -> Cluster {
    let make = |cluster: &mut [u8]| {
        cluster.fill(byte);
        Ok(())
    };
    cache.get_or_make(place, len, make).unwrap()
}

#[test]
fn what_is_kept_is_bounded_in_bytes_and_the_oldest_goes_first() {
    let cache = ClusterCache::new(16 * MIB);
    let get = |number: u64| fill(&cache, place(0, number * MIB, 512), 2 * MIB, number as u8);
    (0..20).for_each(|number| drop(get(number)));
    // One less than fits: the blob had its room, too.
    (13..20).for_each(|number| assert!(get(number).iter().all(|byte| *byte == number as u8)));
    assert_eq!(cache.made(), 20);
    let state = cache.state.lock();
    assert_eq!((state.len, state.making), (state.clusters.len() * 2 * MIB as usize, 0));
    assert!(state.len <= 16 * MIB as usize);
    assert_eq!(state.places.len(), state.clusters.len());
    drop(state);
    get(0);
    assert_eq!(cache.made(), 21);
}

#[test]
fn without_a_budget_nothing_is_kept_and_everything_is_made() {
    let cache = ClusterCache::new(0);
    for byte in 0..3 {
        assert!(fill(&cache, place(0, 0, 512), 4096, byte).iter().all(|b| *b == byte));
    }
    assert_eq!((cache.made(), cache.state.lock().len), (3, 0));
}

#[test]
fn what_is_made_at_a_time_is_bounded_too() {
    let cache = Arc::new(ClusterCache::new(3 * MIB));
    let (begun, has_begun) = mpsc::channel();
    std::thread::scope(|scope| {
        for number in 0..8 {
            let (cache, begun) = (Arc::clone(&cache), begun.clone());
            scope.spawn(move || {
                let make = |_: &mut [u8]| {
                    let state = cache.state.lock();
                    begun.send((state.len, state.making)).unwrap();
                    Ok(())
                };
                cache.get_or_make(place(0, number * MIB, MIB / 2), MIB, make).unwrap();
            });
        }
    });
    drop(begun);
    let seen: Vec<_> = has_begun.iter().collect();
    assert_eq!(seen.len(), 8);
    assert!(seen.iter().all(|(len, making)| *len <= 3 * MIB as usize && *making <= 2), "{seen:?}");
}

#[test]
fn forgetting_takes_what_has_a_byte_in_the_range_and_nothing_else() {
    let cache = ClusterCache::new(MIB);
    let places = [
        place(0, 1000, 24),
        place(0, 1020, 512),
        place(0, 1500, 1000),
        place(0, 3000, 96),
        place(0, 4096, 512),
    ];
    let other = place(1, 2048, 512);
    for (byte, place) in places.into_iter().chain([other]).enumerate() {
        fill(&cache, place, 4096, byte as u8);
    }
    cache.forget(ImageNumber(0), HostRange::new(HostOffset(1024), 3072).unwrap());
    let there = |place| cache.get(place).is_some();
    assert_eq!(places.map(there), [true, false, false, false, true]);
    assert!(there(other));
    assert_eq!(cache.state.lock().len, 3 * 4096);
    assert_eq!(fill(&cache, places[1], 4096, 77)[0], 77);
}

#[test]
fn failures_and_broken_off_attempts_keep_nothing_and_give_their_room_back() {
    let cache = ClusterCache::new(MIB);
    let at = place(0, 0, 512);
    let failed = cache.get_or_make(at, 4096, |_| Err(Error::new(ErrorKind::Corrupt, "as the test wants")));
    assert_eq!(failed.unwrap_err().kind(), ErrorKind::Corrupt);
    assert!(cache.try_get_or_make(at, 4096, |_| Ok(false)).unwrap().is_none());
    let panics =
        std::panic::AssertUnwindSafe(|| cache.get_or_make(at, 4096, |_| panic!("as the test wants")));
    assert!(std::panic::catch_unwind(panics).is_err());
    let state = cache.state.lock();
    assert_eq!((state.len, state.making, state.clusters.len()), (0, 0, 0));
    drop(state);
    assert_eq!(fill(&cache, at, 4096, 3)[0], 3);
}

#[test]
fn who_waits_for_an_attempt_that_is_broken_off_makes_it_himself() {
    let cache = Arc::new(ClusterCache::new(MIB));
    let at = place(0, 0, 512);
    let (begun, has_begun) = mpsc::channel();
    let (go, may_go) = mpsc::channel::<()>();
    std::thread::scope(|scope| {
        let tries = Arc::clone(&cache);
        scope.spawn(move || {
            let outcome = tries.try_get_or_make(at, 4096, |_| {
                begun.send(()).unwrap();
                may_go.recv().unwrap();
                Ok(false)
            });
            assert!(outcome.unwrap().is_none());
        });
        has_begun.recv().unwrap();
        assert!(cache.is_under_way(at));
        let waits = Arc::clone(&cache);
        scope.spawn(move || assert_eq!(fill(&waits, at, 4096, 9)[0], 9));
        go.send(()).unwrap();
    });
}
