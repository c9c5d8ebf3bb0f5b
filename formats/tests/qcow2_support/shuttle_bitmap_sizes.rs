//! Another size for a disk with dirty bitmaps, against writes that mark, statuses, bits that go into the file, and the
//! close.

use std::ops::ControlFlow;

use nbd_img_formats::driver::Status;
use nbd_img_formats::storage::Fate;
use nbd_img_formats::sync::{Arc, thread};
use nbd_img_formats::{BlockDriver, GuestRange, StatusQuery};
use shuttle::rand::Rng;

use crate::shuttle_recorded::Recorded;
use crate::shuttle_scenarios::{explore_on, file_of, join, write};
use crate::support::bitmaps::{Told, bits_of, of_size, told, unused};
use crate::support::checker;
use crate::support::crash::IMAGE;
use crate::support::image::Image;
use crate::support::scene::{CLUSTER, SIZE, Scene};

const LARGER: u64 = SIZE + 11 * CLUSTER;
const SMALLER: u64 = SIZE - 37 * CLUSTER;

fn explore_both(scenario: fn(Recorded)) {
    let scene = || unused(Scene::mixed("sizes of bitmaps", "refcount_bits=16", None, false));
    explore_on(Arc::new(scene()), Recorded::new, scenario);
    explore_on(Arc::new(scene().spilled()), Recorded::new, scenario);
}

fn initial(recorded: &Recorded) -> Vec<Told> {
    bits_of(&Image::parse(&recorded.stage.scene.image).unwrap())
}

fn mark(told: &mut [Told], at: u64, len: u64) {
    for (_, flags, granularity_bits, bits) in told {
        if *flags == 2 {
            bits[(at >> *granularity_bits) as usize..=((at + len - 1) >> *granularity_bits) as usize]
                .fill(true);
        }
    }
}

/// The closed image is one of a disk of this size, with these bitmaps; a crash leaves them in use, or as they were at first
/// or are now.
fn assert_closed(recorded: &Recorded, size: u64, expected: &[Told]) {
    let file = file_of(&*recorded.stage.storage);
    let report = checker::check(&file).unwrap();
    assert!(report.is_clean(), "{report}");
    let image = Image::parse(&file).unwrap();
    assert_eq!(image.size, size);
    let now = told(&image).unwrap();
    let differs = now.iter().zip(expected).find(|(now, expected)| now != expected);
    assert!(now == expected, "{:?} tells something else", differs.map(|(now, _)| &now.0));
    let first = initial(recorded);
    for _ in 0..3 {
        let log = &recorded.disk.log;
        let cut = shuttle::rand::thread_rng().gen_range(0..=log.len());
        let left = log.after_crash(IMAGE, cut, |_, _| match shuttle::rand::thread_rng().gen_range(0..3) {
            0 => Fate::Kept,
            1 => Fate::Lost,
            _ => Fate::Scattered(shuttle::rand::thread_rng().r#gen()),
        });
        let report = checker::check(&left).unwrap();
        assert!(report.is_sound(), "{report}");
        let image = Image::parse(&left).unwrap();
        assert!([SIZE, LARGER, SMALLER].contains(&image.size));
        for bitmap in bits_of(&image).iter().filter(|bitmap| bitmap.1 & 1 == 0) {
            assert!(first.contains(bitmap) || now.contains(bitmap), "after a crash {} lies", bitmap.0);
        }
    }
}

fn is_dirty(driver: &dyn BlockDriver, at: u64) -> bool {
    let mut dirty = false;
    let visit = &mut |_: u64, status| {
        dirty |= status == Status::Bitmap { dirty: true };
        ControlFlow::Continue(())
    };
    driver.status(StatusQuery::Bitmap("on"), GuestRange::new(at, CLUSTER).unwrap(), visit).unwrap();
    dirty
}

/// Marks within the cluster of bits that the old end is in are not lost to another size, be it larger, or smaller for a
/// while; what a shorter disk had more does not come back.
fn resize_against_marks(recorded: Recorded, sizes: &'static [u64]) {
    let end = SIZE - CLUSTER;
    write(&*recorded.stage.driver, end, CLUSTER, 9);
    let mut expected = initial(&recorded);
    mark(&mut expected, end, CLUSTER);
    let places = [10u64, 140].map(|cluster| cluster * CLUSTER);
    let writers = places.map(|at| {
        recorded.stage.spawn(move |driver| {
            write(driver, at, CLUSTER, 3);
            assert!(is_dirty(driver, at), "{at} was written");
            write(driver, at + 4 * CLUSTER, CLUSTER, 4);
        })
    });
    let resizer = recorded.stage.spawn(move |driver| {
        for size in sizes {
            let grows = *size > driver.size();
            driver.resize(*size).unwrap();
            assert!(!grows || !is_dirty(driver, *size - CLUSTER), "what is new is dirty");
        }
        write(driver, driver.size() - CLUSTER, CLUSTER, 5);
        assert!(is_dirty(driver, driver.size() - CLUSTER));
    });
    join(writers);
    resizer.join().unwrap();
    for size in sizes {
        expected = of_size(&expected, *size);
    }
    let size = *sizes.last().unwrap();
    for at in places.iter().flat_map(|at| [*at, at + 4 * CLUSTER]).chain([size - CLUSTER]) {
        mark(&mut expected, at, CLUSTER);
    }
    recorded.stage.driver.close().unwrap();
    assert_closed(&recorded, size, &expected);
}

#[test]
fn a_longer_disk_against_marks() {
    explore_both(|recorded| resize_against_marks(recorded, &[LARGER]));
}

#[test]
fn a_disk_that_is_shorter_for_a_while_against_marks() {
    explore_both(|recorded| resize_against_marks(recorded, &[SMALLER, SIZE]));
}

/// The tables that a close stores are those of the disk that the header tells, however far another size has come.
fn resize_against_close(recorded: Recorded, size: u64) {
    write(&*recorded.stage.driver, 12 * CLUSTER, CLUSTER, 1);
    let mut expected = initial(&recorded);
    mark(&mut expected, 12 * CLUSTER, CLUSTER);
    let driver = Arc::clone(&recorded.stage.driver);
    let resizer = thread::spawn(move || driver.resize(size).is_ok());
    let closer = recorded.stage.spawn(|driver| driver.close().unwrap());
    let resized = resizer.join().unwrap();
    closer.join().unwrap();
    let size = if resized { size } else { SIZE };
    assert_closed(&recorded, size, &of_size(&expected, size));
}

#[test]
fn a_longer_disk_against_close() {
    explore_both(|recorded| resize_against_close(recorded, LARGER));
}

#[test]
fn a_shorter_disk_against_close() {
    explore_both(|recorded| resize_against_close(recorded, SMALLER));
}
