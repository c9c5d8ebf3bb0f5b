//! Writes that record into dirty bitmaps, against each other, against commits and against the close.

use nbd_img_formats::storage::{CallClass, Fault, POISON};
use nbd_img_formats::sync::{Arc, thread};
use nbd_img_formats::{BlockDriver, GuestRange, Provision, Result, ZeroRequest};
use shuttle::rand::Rng;

use crate::shuttle_recorded::Recorded;
use crate::shuttle_scenarios::{LATER, explore_on, file_of, join, write};
use crate::support::checker;
use crate::support::image::Image;
use crate::support::scene::{CLUSTER, Scene};
use crate::support::session;
use crate::support::units::{Writer, painted};

/// An image with an enabled bitmap of granules of two clusters, one that is disabled and one that is in use.
fn bitmaps() -> Arc<Scene> {
    Arc::new(Scene::mixed("bitmaps", "refcount_bits=16", None, false).with_bitmaps())
}

/// The same, and one that is empty; new bits are stored before the next write.
fn spilled() -> Arc<Scene> {
    Arc::new(Scene::mixed("spilled bitmaps", "refcount_bits=16", None, false).with_bitmaps().spilled())
}

/// The scenario with bits that stay in memory until the close, and with bits that do not.
fn explore_both(scenario: fn(Recorded)) {
    explore_on(bitmaps(), Recorded::new, scenario);
    explore_on(spilled(), Recorded::new, scenario);
}

/// The bits of enabled bitmaps are those that they had and those of `changes`, and they may be used. The others
/// are as they were.
fn assert_recorded(recorded: &Recorded, changes: &[(u64, u64)]) {
    let file = file_of(&recorded.stage.storage);
    let (before, now) = (Image::parse(&recorded.stage.scene.image).unwrap(), Image::parse(&file).unwrap());
    assert_eq!(before.bitmaps.len(), now.bitmaps.len(), "bitmaps after a close");
    for (old, bitmap) in before.bitmaps.iter().zip(&now.bitmaps) {
        let mut expected = before.dirty_granules(old);
        if old.flags == 2 {
            for (at, len) in changes {
                let granule = |at: u64| (at >> old.granularity_bits) as usize;
                expected[granule(*at)..=granule(at + len - 1)].fill(true);
            }
        }
        assert_eq!(bitmap.flags, old.flags, "flags of {} after a close", old.name);
        assert!(now.dirty_granules(bitmap) == expected, "bits of {}", old.name);
    }
}

/// Every granule that the disk has changed in is told of, and the bitmap may be used.
fn assert_told(recorded: &Recorded) {
    let file = file_of(&recorded.stage.storage);
    let image = Image::parse(&file).unwrap();
    let flags: Vec<_> = image.bitmaps.iter().map(|bitmap| bitmap.flags).take(3).collect();
    assert_eq!(flags, [0, 2, 3], "flags after a close");
    assert!(image.bitmaps.iter().skip(3).all(|bitmap| bitmap.flags == 2), "flags of new ones after a close");
    recorded.stage.scene.check_bitmaps(&file, &recorded.stage.closed()).unwrap();
}

fn zero(driver: &dyn BlockDriver, at: u64, len: u64) -> Result<()> {
    let request = ZeroRequest { provision: Provision::Unmap, fast: false, durability: LATER };
    session::zero(driver, GuestRange::new(at, len).unwrap(), request)
}

/// In one granule, in two of one word, in two words: at the close every bit is there, and whenever a crash comes
/// before it, the file says that the bitmap is in use or tells of what has changed.
#[test]
fn marks_against_marks_in_one_page() {
    explore_both(|recorded| {
        let places = [(10u64, 2), (11, 1), (12, 3), (130, 2)];
        let threads = places.map(|(cluster, count)| {
            recorded.stage.spawn(move |driver| {
                write(driver, cluster * CLUSTER, count * CLUSTER, cluster as Writer);
            })
        });
        join(threads);
        recorded.stage.driver.close().unwrap();
        assert_recorded(&recorded, &places.map(|(cluster, count)| (cluster * CLUSTER, count * CLUSTER)));
        let changes = places.map(|(at, count)| (at * CLUSTER, count * CLUSTER, at as Writer));
        recorded.disk.assert_possible(&changes);
    });
}

/// A write, a zeroing and a discard against flushes: what a flush answers for is there, and told of.
#[test]
fn marks_against_commits() {
    explore_both(|recorded| {
        let disk = recorded.disk.clone();
        let writer = recorded.stage.spawn(move |driver| {
            write(driver, 12 * CLUSTER, CLUSTER, 1);
            driver.flush().unwrap();
            disk.assert_durable(12 * CLUSTER, &painted(12 * CLUSTER, CLUSTER, 1));
        });
        let disk = recorded.disk.clone();
        let zeroer = recorded.stage.spawn(move |driver| {
            zero(driver, 2 * CLUSTER, 2 * CLUSTER).unwrap();
            driver.make_durable().unwrap();
            disk.assert_durable(2 * CLUSTER, &[0; 2 * CLUSTER as usize]);
            driver.tidy();
        });
        let discarder = recorded.stage.spawn(move |driver| {
            session::discard(driver, GuestRange::new(6 * CLUSTER, CLUSTER).unwrap(), LATER).unwrap();
            driver.flush().unwrap();
        });
        join([writer, zeroer, discarder]);
        recorded.stage.driver.close().unwrap();
        assert_recorded(&recorded, &[(12 * CLUSTER, 512), (2 * CLUSTER, 1024), (6 * CLUSTER, 512)]);
        let (zeroed, gone) = ((2 * CLUSTER, 2 * CLUSTER, 0), (6 * CLUSTER, CLUSTER, 0));
        recorded.disk.assert_possible(&[(12 * CLUSTER, CLUSTER, 1), zeroed, gone]);
    });
}

/// Writes in all their ways against a close, some of them the first change at all: each is in the file and told of,
/// or has failed; the bitmap may be used in any case, as nothing has gone wrong.
fn against_close(recorded: Recorded, before: &[(u64, u64, Writer)]) {
    for (at, len, writer) in before {
        write(&*recorded.stage.driver, *at, *len, *writer);
    }
    let write = |at: u64, writer: Writer, by_plan: bool| {
        let driver = Arc::clone(&recorded.stage.driver);
        thread::spawn(move || {
            let bytes = painted(at, CLUSTER, writer);
            match by_plan {
                true => session::write(&*driver, at, &bytes, LATER).is_ok(),
                false => driver.pwrite(at, &bytes, LATER).is_ok(),
            }
        })
    };
    // The same bit for two of them, which one sets for both; one that was set before.
    let places = [(10 * CLUSTER, 1, true), (11 * CLUSTER, 2, false), (3 * CLUSTER, 3, true)];
    let writers = places.map(|(at, writer, by_plan)| write(at, writer, by_plan));
    let closer = recorded.stage.spawn(|driver| driver.close().unwrap());
    let written = writers.map(|writer| writer.join().unwrap());
    closer.join().unwrap();
    assert_told(&recorded);
    let disk = recorded.stage.closed();
    for ((at, writer, _), written) in places.into_iter().zip(written) {
        let there = disk[at as usize..(at + CLUSTER) as usize] == painted(at, CLUSTER, writer);
        assert!(there || !written, "a write of {at} was answered and is not there");
    }
    let changes = places.map(|(at, writer, _)| (at, CLUSTER, writer));
    recorded.disk.assert_possible(&[&changes[..], before].concat());
}

#[test]
fn first_marks_against_close() {
    explore_both(|recorded| against_close(recorded, &[]));
}

#[test]
fn later_marks_against_close() {
    explore_both(|recorded| {
        against_close(recorded, &[(130 * CLUSTER, CLUSTER, 9)]);
    });
}

/// What a status says while others write: a bit of what was written before it is never missing.
#[test]
fn a_status_against_marks() {
    explore_both(|recorded| {
        let threads = [20u64, 22].map(|cluster| {
            recorded.stage.spawn(move |driver| {
                write(driver, cluster * CLUSTER, CLUSTER, 4);
                assert!(is_dirty(driver, cluster * CLUSTER), "{cluster} was written and is not dirty");
            })
        });
        join(threads);
        assert!(!is_dirty(&*recorded.stage.driver, 26 * CLUSTER));
        recorded.stage.driver.close().unwrap();
        assert_recorded(&recorded, &[(20 * CLUSTER, CLUSTER), (22 * CLUSTER, CLUSTER)]);
    });
}

/// Storing bits fails while others mark some, and asks for room; in the end all are there.
#[test]
fn marks_against_spills_that_fail() {
    explore_on(spilled(), Recorded::new, |recorded| {
        // Where nothing is, so that only marks, and storing them, write anything.
        let places = [140u64, 142, 144].map(|cluster| GuestRange::new(cluster * CLUSTER, CLUSTER).unwrap());
        session::discard(&*recorded.stage.driver, places[0], LATER).unwrap();
        let fault = Fault { class: Some(CallClass::Write), sticky: true, ..Fault::at(0) };
        recorded.stage.faults.arm(fault);
        let threads = [1, 2].map(|place| {
            recorded.stage.spawn(move |driver| {
                session::discard(driver, places[place], LATER).unwrap();
                assert!(places[..1].iter().all(|place| is_dirty(driver, place.offset())), "a bit is lost");
                session::discard(driver, places[0], LATER).unwrap();
            })
        });
        let faults = Arc::clone(&recorded.stage.faults);
        let healer = thread::spawn(move || faults.disarm());
        join(threads);
        healer.join().unwrap();
        recorded.stage.driver.close().unwrap();
        assert_recorded(&recorded, &places.map(|place| (place.offset(), place.len())));
    });
}

/// Statuses while bits go into the file, to a cluster of their own and into the one that is there.
#[test]
fn a_status_against_spills() {
    explore_on(spilled(), Recorded::new, |recorded| {
        let spiller = recorded.stage.spawn(|driver| {
            for cluster in [140u64, 150, 160] {
                write(driver, cluster * CLUSTER, CLUSTER, 4);
                assert!(is_dirty(driver, cluster * CLUSTER), "{cluster} was written and is not dirty");
            }
        });
        let asker = recorded.stage.spawn(|driver| {
            let mut seen = [false; 3];
            for _ in 0..3 {
                for (number, cluster) in [140u64, 150, 160].into_iter().enumerate() {
                    let dirty = is_dirty(driver, cluster * CLUSTER);
                    assert!(dirty || !seen[number], "{cluster} was dirty");
                    seen[number] = dirty;
                }
            }
        });
        join([spiller, asker]);
        recorded.stage.driver.close().unwrap();
        assert_recorded(&recorded, &[140u64, 150, 160].map(|cluster| (cluster * CLUSTER, CLUSTER)));
    });
}

/// While an image is closed, with or without success, a status tells of every mark, or fails.
fn status_against_close(recorded: Recorded, fails: bool) {
    // Their bits in `new` are clear in what poisons clusters that are let go.
    let places = [138u64, 141, 146].map(|cluster| cluster * CLUSTER);
    assert!([138, 141, 146].iter().all(|bit| POISON >> (bit % 8) & 1 == 0));
    for at in places {
        let range = GuestRange::new(at, CLUSTER).unwrap();
        session::discard(&*recorded.stage.driver, range, LATER).unwrap();
    }
    if fails {
        let call = shuttle::rand::thread_rng().gen_range(0..6);
        recorded.stage.faults.arm(Fault { class: Some(CallClass::Write), ..Fault::at(call) });
    }
    let closer = recorded.stage.spawn(move |driver| assert!(driver.close().is_ok() || fails));
    // Until it is closed, but not for ever: a schedule may prefer who asks.
    let asker = recorded.stage.spawn(move |driver| {
        for (at, name) in (0..40).map(|number| (places[number % 3], ["on", "new"][number % 2])) {
            match ask(driver, name, at) {
                Ok(told) => assert!(told, "{at} was marked in {name}"),
                Err(_) => break,
            }
        }
    });
    join([closer, asker]);
    recorded.stage.faults.disarm();
    if !fails {
        return assert_told(&recorded);
    }
    // The bitmaps are in use, unless it was another call that has failed.
    let file = file_of(&recorded.stage.storage);
    let report = checker::check(&file).unwrap();
    assert!(report.is_sound(), "{report}");
    let disk = recorded.stage.scene.read(&file).unwrap();
    recorded.stage.scene.check_bitmaps(&file, &disk).unwrap();
}

#[test]
fn a_status_against_close() {
    explore_on(spilled(), Recorded::new, |recorded| status_against_close(recorded, false));
}

#[test]
fn a_status_against_a_close_that_fails() {
    explore_on(spilled(), Recorded::new, |recorded| status_against_close(recorded, true));
}

/// Two close at the same time, and a write may fail for either: the bitmaps are stored, or somebody is told.
#[test]
fn closes_against_each_other() {
    explore_both(|recorded| {
        write(&*recorded.stage.driver, 12 * CLUSTER, CLUSTER, 1);
        let call = shuttle::rand::thread_rng().gen_range(0..16);
        recorded.stage.faults.arm(Fault { class: Some(CallClass::Write), ..Fault::at(call) });
        let closers = [0, 1].map(|_| {
            let driver = Arc::clone(&recorded.stage.driver);
            thread::spawn(move || driver.close().is_ok())
        });
        let told = closers.map(|closer| closer.join().unwrap());
        recorded.stage.faults.disarm();
        let file = file_of(&*recorded.stage.storage);
        let report = checker::check(&file).unwrap();
        assert!(report.is_sound(), "{report}");
        let disk = recorded.stage.scene.read(&file).unwrap();
        recorded.stage.scene.check_bitmaps(&file, &disk).unwrap();
        let image = Image::parse(&file).unwrap();
        let stored = image.bitmaps.iter().all(|bitmap| bitmap.flags != 3 || bitmap.name == "stale");
        assert!(stored || told != [true; 2], "the bitmaps are not stored, and nobody was told");
    });
}

/// In `on`, and in `new` if there is that: it is finer, and has no other marks.
fn is_dirty(driver: &dyn BlockDriver, at: u64) -> bool {
    is_dirty_in(driver, "on", at) && (!driver.offer_bitmap("new").unwrap() || is_dirty_in(driver, "new", at))
}

fn is_dirty_in(driver: &dyn BlockDriver, name: &str, at: u64) -> bool {
    ask(driver, name, at).unwrap()
}

fn ask(driver: &dyn BlockDriver, name: &str, at: u64) -> Result<bool> {
    use nbd_img_formats::StatusQuery;
    use nbd_img_formats::driver::Status;
    use std::ops::ControlFlow;
    let mut dirty = false;
    let range = GuestRange::new(at, CLUSTER).unwrap();
    let visit = &mut |_: u64, status| {
        dirty |= status == Status::Bitmap { dirty: true };
        ControlFlow::Continue(())
    };
    driver.status(StatusQuery::Bitmap(name), range, visit)?;
    Ok(dirty)
}
