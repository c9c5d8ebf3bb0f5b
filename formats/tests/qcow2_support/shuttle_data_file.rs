//! Images whose data lies in a file of its own: the order of both files' syncs, and places that are given up and
//! taken again.

use nbd_img_formats::State;
use nbd_img_formats::storage::{CallClass, Fault};
use nbd_img_formats::sync::{Arc, thread};
use nbd_img_formats::{BlockDriver, GuestRange, Provision, ZeroRequest};
use shuttle::rand::Rng;

use crate::shuttle_recorded::{Disk, Recorded};
use crate::shuttle_scenarios::{LATER, explore_on, join, write};
use crate::support::scene::{CLUSTER, SIZE, Scene};
use crate::support::session;
use crate::support::units::{Writer, painted};

fn plain() -> Arc<Scene> {
    Arc::new(Scene::external("data file", "refcount_bits=64", None))
}

fn overlay() -> Arc<Scene> {
    Arc::new(Scene::external("data file of an overlay", "refcount_bits=16", Some(150 * CLUSTER)))
}

fn raw() -> Arc<Scene> {
    Arc::new(Scene::external("raw data file", "data_file_raw=on", None))
}

fn subclusters() -> Arc<Scene> {
    Arc::new(Scene::external("subclusters in a data file", "cluster_size=16k,extended_l2=on", None))
}

fn write_and_flush(driver: &dyn BlockDriver, disk: &Disk, (at, len, writer): (u64, u64, Writer)) {
    write(driver, at, len, writer);
    driver.flush().unwrap();
    disk.assert_durable(at, &painted(at, len, writer));
}

/// Into an entry that is there, one that is not, a table that is not: what a flush answers for is in both files,
/// and whatever a crash loses of either, no entry leads to what nobody wrote there.
fn writes_and_flushes(recorded: Recorded) {
    let changes = [(2 * CLUSTER, 512, 1), (34 * CLUSTER + 64, 192, 2), (131 * CLUSTER, 640, 3)];
    let threads = changes.map(|change| {
        let disk = recorded.disk.clone();
        recorded.stage.spawn(move |driver| write_and_flush(driver, &disk, change))
    });
    join(threads);
    recorded.disk.assert_possible(&changes);
    recorded.stage.driver.close().unwrap();
    let disk = recorded.stage.closed();
    for (at, len, writer) in changes {
        assert!(
            disk[at as usize..(at + len) as usize] == painted(at, len, writer),
            "lost by the close: {at}"
        );
    }
}

#[test]
fn writes_against_flushes() {
    for scene in [plain(), overlay(), raw(), subclusters()] {
        explore_on(scene, Recorded::new, writes_and_flushes);
    }
}

/// A place that is given up is punched when that is durable, while others write to it and to its neighbours.
#[test]
fn a_place_given_up_against_writes_to_it() {
    for scene in [plain(), overlay(), subclusters()] {
        explore_on(scene, Recorded::new, |recorded| {
            let small = recorded.disk.scene.table_span() < SIZE;
            let (at, whole) = if small { (3 * CLUSTER, CLUSTER) } else { (0, 32 * CLUSTER) };
            let giver = recorded.stage.spawn(move |driver| {
                let range = GuestRange::new(at, whole).unwrap();
                let request = ZeroRequest { provision: Provision::Unmap, fast: false, durability: LATER };
                session::zero(driver, range, request).unwrap();
                driver.make_durable().unwrap();
                driver.tidy();
            });
            let part = at + 128;
            let writers = [(part, 128, 1), (part + 128, 64, 2)].map(|change| {
                recorded.stage.spawn(move |driver| {
                    let (at, len, writer) = change;
                    session::write(driver, at, &painted(at, len, writer), LATER).unwrap();
                    driver.make_durable().unwrap();
                    driver.tidy();
                    write(driver, at, len, writer);
                })
            });
            giver.join().unwrap();
            join(writers);
            let mut expected = recorded.stage.scene.content[at as usize..(at + whole) as usize].to_vec();
            let mut got = vec![0; whole as usize];
            recorded.stage.driver.pread(at, &mut got).unwrap();
            // Zeroed before or between them, or before both; the last write of each comes after its first.
            let zeroed = got[64..128].iter().all(|byte| *byte == 0);
            assert!(zeroed, "what was zeroed is there again");
            expected.fill(0);
            for (inside, len, writer) in [(128u64, 128u64, 1), (256, 64, 2)] {
                let range = inside as usize..(inside + len) as usize;
                let written = painted(at + inside, len, writer);
                let lost = got[range.clone()].iter().all(|byte| *byte == 0);
                assert!(lost || got[range.clone()] == written, "neither zeroes nor what was written");
                expected[range.clone()].copy_from_slice(&got[range]);
            }
            assert!(got == expected, "more than that has changed");
            recorded.disk.assert_possible(&[(at, whole, 0), (part, 128, 1), (part + 128, 64, 2)]);
            recorded.stage.driver.flush().unwrap();
            recorded.disk.assert_durable(at, &got);
            recorded.stage.finish(at, &got);
        });
    }
}

/// Parts of a place with old content that no entry leads to: one fills the rest of it, for all of them.
#[test]
fn parts_of_a_place_with_old_content() {
    for scene in [plain(), overlay()] {
        explore_on(scene, Recorded::new, |recorded| {
            let at = 40 * CLUSTER;
            let parts = [(at + 64, 64, 1), (at + 192, 64, 2), (at + CLUSTER, 128, 3)];
            let threads = parts.map(|(at, len, writer)| {
                recorded.stage.spawn(move |driver| {
                    session::write(driver, at, &painted(at, len, writer), LATER).unwrap();
                })
            });
            let flusher = recorded.stage.spawn(|driver| driver.flush().unwrap());
            join(threads);
            flusher.join().unwrap();
            let mut expected = recorded.stage.scene.content.clone();
            for (at, len, writer) in parts {
                expected[at as usize..(at + len) as usize].copy_from_slice(&painted(at, len, writer));
            }
            recorded.disk.assert_possible(&parts);
            recorded.stage.finish(0, &expected);
        });
    }
}

/// Zeroes and discards are done in a raw data file itself, beside writes: at the end both views are the same.
#[test]
fn zeroes_in_a_raw_data_file_against_writes() {
    explore_on(raw(), Recorded::new, |recorded| {
        let at = 26 * CLUSTER;
        let zeroer = recorded.stage.spawn(move |driver| {
            let request = ZeroRequest { provision: Provision::Keep, fast: false, durability: LATER };
            session::zero(driver, GuestRange::new(at, 4 * CLUSTER).unwrap(), request).unwrap();
            driver.flush().unwrap();
        });
        let writer = recorded.stage.spawn(move |driver| write(driver, at + 64, 1024, 1));
        let disk = recorded.disk.clone();
        let other =
            recorded.stage.spawn(move |driver| write_and_flush(driver, &disk, (140 * CLUSTER, 64, 2)));
        join([zeroer, writer, other]);
        recorded.disk.assert_possible(&[(at, 4 * CLUSTER, 0), (at + 64, 1024, 1), (140 * CLUSTER, 64, 2)]);
        let content = painted(140 * CLUSTER, 64, 2);
        recorded.stage.finish(140 * CLUSTER, &content);
    });
}

/// A sync of one of the files fails under flushes: whoever was answered well is right, not everybody was, and
/// nothing is written any more.
#[test]
fn a_failing_sync_of_either_file() {
    for scene in [plain(), overlay()] {
        explore_on(scene, Recorded::new, |recorded| {
            let call = shuttle::rand::thread_rng().gen_range(0..3);
            recorded.stage.faults.arm(Fault { class: Some(CallClass::Sync), ..Fault::at(call) });
            let changes = [(34 * CLUSTER, 512, 1), (131 * CLUSTER, 128, 2)];
            let threads = changes.map(|(at, len, writer)| {
                let (driver, disk) = (Arc::clone(&recorded.stage.driver), recorded.disk.clone());
                thread::spawn(move || {
                    let wrote = driver.pwrite(at, &painted(at, len, writer), LATER);
                    let done = wrote.and_then(|()| driver.flush()).is_ok();
                    if done {
                        disk.assert_durable(at, &painted(at, len, writer));
                    }
                    done
                })
            });
            let flushed = threads.map(|thread| thread.join().unwrap());
            assert!(recorded.stage.faults.fired() > 0 && flushed != [true, true], "nobody was told");
            assert_eq!(recorded.stage.driver.state(), State::Failed);
            assert!(recorded.stage.driver.flush().is_err(), "flushed after a failure");
            let _ = recorded.stage.driver.close();
            recorded.disk.assert_possible(&changes);
        });
    }
}
