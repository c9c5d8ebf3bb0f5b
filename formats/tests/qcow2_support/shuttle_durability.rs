//! What is durable when a flush or a close answers, under the interleavings that shuttle chooses: all that was
//! written is recorded, and lost in part.

use nbd_img_formats::BlockDriver;
use nbd_img_formats::State;
use nbd_img_formats::storage::{CallClass, Fault};
use nbd_img_formats::sync::{Arc, thread};
use shuttle::rand::Rng;

use crate::shuttle_recorded::{Disk, Recorded};
use crate::shuttle_scenarios::{LATER, explore_on, join, overlay, plain, write};
use crate::support::scene::CLUSTER;
use crate::support::units::painted;

/// Where a thread of these scenes writes: a table that is there, one that is shared, one that is not there.
fn place(number: u64) -> u64 {
    (42 + number * 50) * CLUSTER + 64
}

fn written(number: u64) -> Vec<u8> {
    painted(place(number), 128, number as u32 + 1)
}

/// Writes and flushes; whether both succeeded. If so, it is durable.
fn write_and_flush(driver: &dyn BlockDriver, disk: &Disk, number: u64) -> bool {
    let wrote = driver.pwrite(place(number), &written(number), LATER);
    let done = wrote.and_then(|()| driver.flush()).is_ok();
    if done {
        disk.assert_durable(place(number), &written(number));
    }
    done
}

/// A close against flushes of which one begins before it and one at any time: what either of them or the close
/// answers for is durable, and nobody waits for ever.
#[test]
fn close_against_flush() {
    explore_on(overlay(), Recorded::new, |Recorded { stage, disk }| {
        write(&*stage.driver, place(0), 128, 1);
        let early = disk.clone();
        let flusher = stage.spawn(move |driver| {
            if driver.flush().is_ok() {
                early.assert_durable(place(0), &written(0));
            }
        });
        let late = disk.clone();
        let writer = stage.spawn(move |driver| {
            write_and_flush(driver, &late, 1);
            // The image may be closed by now; it must say so or have nothing to do.
            let _ = driver.flush();
        });
        let closing = disk.clone();
        let closer = stage.spawn(move |driver| {
            driver.close().unwrap();
            closing.assert_durable(place(0), &written(0));
        });
        join([flusher, writer, closer]);
        assert_eq!(stage.driver.state(), State::Closed);
        disk.assert_durable(place(0), &written(0));
        disk.assert_sound();
        assert!(stage.driver.pwrite(place(2), &written(2), LATER).is_err(), "written after the close");
    });
}

/// The same while one of the first syncs fails: whoever was answered well is right, and not everybody was.
#[test]
fn close_against_a_failing_flush() {
    explore_on(overlay(), Recorded::new, failing_flush);
}

fn failing_flush(Recorded { stage, disk }: Recorded) {
    let call = shuttle::rand::thread_rng().gen_range(0..3);
    write(&*stage.driver, place(0), 128, 1);
    let syncs = stage.faults.count(CallClass::Sync);
    stage.faults.arm(Fault { class: Some(CallClass::Sync), ..Fault::at(call) });
    let threads = [1u64, 2].map(|number| {
        let (driver, disk) = (Arc::clone(&stage.driver), disk.clone());
        thread::spawn(move || write_and_flush(&*driver, &disk, number))
    });
    let driver = Arc::clone(&stage.driver);
    let closer = thread::spawn(move || driver.close().is_ok());
    let flushed = threads.map(|thread| thread.join().unwrap());
    let closed = closer.join().unwrap();
    if stage.faults.count(CallClass::Sync) > syncs + call {
        // A close of an image that has failed says nothing new: then a flush has said it.
        assert!(flushed != [true, true] || !closed, "nobody was told");
    } else {
        assert!(closed);
        disk.assert_durable(place(0), &written(0));
    }
    assert_eq!(stage.driver.state(), State::Closed);
    let driver = &stage.driver;
    assert!(driver.pwrite(place(0), &[1; 64], LATER).is_err(), "written after the close");
    disk.assert_sound();
}

/// So many clusters at once that one commit has several new refcount blocks, while others flush.
#[test]
fn several_refcount_blocks_in_a_commit() {
    explore_on(plain(), Recorded::new, |Recorded { stage, disk }| {
        let blocks = disk.refcount_blocks();
        // A block of 512 bytes describes 64 clusters; these are 144, and three tables.
        let writers = [(32u64, 32u64), (80, 48), (128, 64)].map(|(first, count)| {
            stage.spawn(move |driver| write(driver, first * CLUSTER, count * CLUSTER, first as u32))
        });
        let flushing = disk.clone();
        let flusher = stage.spawn(move |driver| {
            write(driver, 20 * CLUSTER, CLUSTER, 9);
            driver.flush().unwrap();
            flushing.assert_durable(20 * CLUSTER, &painted(20 * CLUSTER, CLUSTER, 9));
        });
        join(writers);
        flusher.join().unwrap();
        stage.driver.flush().unwrap();
        for (first, count) in [(32, 32), (80, 48), (128, 64)] {
            let content = painted(first * CLUSTER, count * CLUSTER, first as u32);
            disk.assert_durable(first * CLUSTER, &content);
        }
        assert!(
            disk.refcount_blocks() >= blocks + 2,
            "{blocks} blocks have become {}",
            disk.refcount_blocks()
        );
        disk.assert_sound();
        let content = painted(128 * CLUSTER, 64 * CLUSTER, 128);
        stage.finish(128 * CLUSTER, &content);
    });
}
