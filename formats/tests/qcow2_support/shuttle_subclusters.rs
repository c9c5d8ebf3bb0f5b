//! Subclusters of one cluster that are written, copied, zeroed and discarded at once. A subcluster is 512 bytes, a
//! cluster 32 of them.

use nbd_img_formats::plan::MapMode;
use nbd_img_formats::sync::Arc;
use nbd_img_formats::{BlockDriver, GuestRange, Provision, ReadPlan, ZeroRequest};

use crate::shuttle_recorded::Recorded;
use crate::shuttle_scenarios::{LATER, explore_on, join, write};
use crate::support::scene::{CLUSTER, Scene};
use crate::support::session;
use crate::support::units::{Writer, painted};

/// Subclusters of a cluster.
const UNITS: u64 = 32;

fn overlay() -> Arc<Scene> {
    Arc::new(Scene::extended("subclusters of an overlay", "refcount_bits=16", Some(150 * CLUSTER), true))
}

fn alone() -> Arc<Scene> {
    Arc::new(Scene::extended("subclusters", "refcount_bits=64", None, true))
}

/// One change of a scene.
#[derive(Clone, Copy)]
enum Change {
    Write { at: u64, len: u64, writer: Writer, by_plan: bool },
    Zero { at: u64, len: u64, provision: Provision },
    Discard { at: u64, len: u64 },
}

impl Change {
    fn carry_out(self, driver: &dyn BlockDriver) {
        match self {
            Change::Write { at, len, writer, by_plan: true } => {
                session::write(driver, at, &painted(at, len, writer), LATER).unwrap();
            }
            Change::Write { at, len, writer, by_plan: false } => write(driver, at, len, writer),
            Change::Zero { at, len, provision } => {
                let request = ZeroRequest { provision, fast: false, durability: LATER };
                session::zero(driver, GuestRange::new(at, len).unwrap(), request).unwrap();
            }
            Change::Discard { at, len } => {
                session::discard(driver, GuestRange::new(at, len).unwrap(), LATER).unwrap();
            }
        }
    }

    fn range(self) -> (u64, u64, Writer) {
        match self {
            Change::Write { at, len, writer, .. } => (at, len, writer),
            Change::Zero { at, len, .. } | Change::Discard { at, len } => (at, len, 0),
        }
    }

    /// What it makes of a disk.
    fn apply(self, disk: &mut [u8]) {
        let (at, len, writer) = self.range();
        disk[at as usize..(at + len) as usize].copy_from_slice(&painted(at, len, writer));
    }
}

/// All changes at once, and a flush: the disk is as if they had come one after the other, in any order.
fn all_at_once<const N: usize>(recorded: Recorded, changes: [Change; N]) {
    let threads = changes.map(|change| {
        recorded.stage.spawn(move |driver| {
            change.carry_out(driver);
        })
    });
    let flusher = recorded.stage.spawn(|driver| driver.flush().unwrap());
    join(threads);
    flusher.join().unwrap();
    let content = &recorded.stage.scene.content;
    let mut got = vec![0; content.len()];
    recorded.stage.driver.pread(0, &mut got).unwrap();
    let is_one_of_the_orders = |seen: &[u8]| {
        orders((0..N).collect()).into_iter().any(|order| {
            let mut disk = content.clone();
            order.into_iter().for_each(|index| changes[index].apply(&mut disk));
            disk == seen
        })
    };
    assert!(is_one_of_the_orders(&got), "the disk is as no order of the changes makes it");
    recorded.disk.assert_possible(&changes.map(Change::range));
    recorded.stage.driver.flush().unwrap();
    assert!(recorded.disk.after_loss() == got, "lost after a flush");
    recorded.stage.finish(0, &got);
}

/// Every order of some numbers.
fn orders(numbers: Vec<usize>) -> Vec<Vec<usize>> {
    if numbers.len() < 2 {
        return vec![numbers];
    }
    let first = |index: usize| {
        let mut rest = numbers.clone();
        let number = rest.remove(index);
        orders(rest).into_iter().map(move |rest| [vec![number], rest].concat())
    };
    (0..numbers.len()).flat_map(first).collect()
}

fn part(subcluster: u64, inside: u64, len: u64, writer: Writer, by_plan: bool) -> Change {
    Change::Write { at: subcluster * CLUSTER + inside, len, writer, by_plan }
}

fn zero(subcluster: u64, count: u64, provision: Provision) -> Change {
    Change::Zero { at: subcluster * CLUSTER, len: count * CLUSTER, provision }
}

/// Two halves of one subcluster and a part of its neighbour, in a cluster of which nothing is there; the rest of
/// each comes from below, or is zeroes.
#[test]
fn parts_of_a_new_cluster() {
    for scene in [overlay(), alone()] {
        explore_on(scene, Recorded::new, |recorded| {
            let at = 3 * UNITS + 5;
            let halves = [part(at, 64, 128, 1, false), part(at, 320, 128, 2, true)];
            all_at_once(recorded, [halves[0], halves[1], part(at + 1, 0, 64, 3, false)]);
        });
    }
}

/// The same in a cluster that is there: a part of a subcluster that is data is overwritten in place, while what is
/// written to the rest of it goes on into one that has to be filled up; a plan claims a whole one.
#[test]
fn parts_of_a_cluster_that_is_there() {
    for scene in [overlay(), alone()] {
        explore_on(scene, Recorded::new, |recorded| {
            let over_the_edge = part(15, 64, 512, 1, false);
            all_at_once(recorded, [over_the_edge, part(15, 0, 64, 2, true), part(18, 0, CLUSTER, 3, true)]);
        });
    }
}

/// One writes over the edge of a subcluster that is data into one that has to be filled up, again and again; another
/// one overwrites a part of each. What is data is never written back from a copy, so neither loses anything.
#[test]
fn overwrites_against_copies() {
    explore_on(overlay(), Recorded::new, |recorded| {
        let mine = |subcluster: u64| (subcluster * CLUSTER + 64, 64, 1);
        let edge = |subcluster: u64| (subcluster * CLUSTER + 128, CLUSTER - 64, 2);
        let first =
            recorded.stage.spawn(move |driver| (15..21).for_each(|n| write_and_look(driver, mine(n))));
        let second =
            recorded.stage.spawn(move |driver| (15..21).for_each(|n| write_and_look(driver, edge(n))));
        join([first, second]);
        let mut expected = recorded.stage.scene.content.clone();
        for (at, len, writer) in (15..21).flat_map(|n| [mine(n), edge(n)]) {
            expected[at as usize..(at + len) as usize].copy_from_slice(&painted(at, len, writer));
        }
        recorded.stage.finish(0, &expected);
    });
}

fn write_and_look(driver: &dyn BlockDriver, (at, len, writer): (u64, u64, Writer)) {
    write(driver, at, len, writer);
    let mut got = vec![0; len as usize];
    driver.pread(at, &mut got).unwrap();
    assert!(got == painted(at, len, writer), "what was written at {at} has gone");
}

/// A cluster that a snapshot shares moves for one of them, with all of its data; the others go to the new place.
#[test]
fn parts_of_a_shared_cluster() {
    for scene in [overlay(), alone()] {
        explore_on(scene, Recorded::new, |recorded| {
            let parts = [part(66, 64, 128, 1, false), part(66, 256, 64, 2, true)];
            all_at_once(recorded, [parts[0], parts[1], part(85, 128, 64, 3, false)]);
        });
    }
}

/// A compressed cluster becomes data as a whole for one of them, and is zeroed in part.
#[test]
fn parts_of_a_compressed_cluster() {
    for scene in [overlay(), alone()] {
        explore_on(scene, Recorded::new, |recorded| {
            let parts = [part(40, 64, 128, 1, false), part(50, 0, CLUSTER, 2, true)];
            all_at_once(recorded, [parts[0], parts[1], zero(39, 2, Provision::Unmap)]);
        });
    }
}

/// Subclusters that are being copied are zeroed meanwhile.
#[test]
fn copy_on_write_against_zeroes() {
    for scene in [overlay(), alone()] {
        explore_on(scene, Recorded::new, |recorded| {
            let zeroes = [zero(16, 8, Provision::Unmap), zero(14, 4, Provision::Keep)];
            all_at_once(recorded, [part(17, 64, 128, 1, false), zeroes[0], zeroes[1]]);
        });
    }
}

/// The cluster is given up as a whole while parts of it are written.
#[test]
fn writes_against_a_discard() {
    for scene in [overlay(), alone()] {
        explore_on(scene, Recorded::new, |recorded| {
            let discard = Change::Discard { at: 0, len: UNITS * CLUSTER };
            let writes = [part(20, 64, 128, 1, false), part(3, 0, CLUSTER, 2, true)];
            all_at_once(recorded, [writes[0], discard, writes[1]]);
        });
    }
}

/// The same, zeroed with room and without.
#[test]
fn writes_against_zeroes_of_the_cluster() {
    for provision in [Provision::Unmap, Provision::Allocate] {
        let scenario = match provision {
            Provision::Allocate => |recorded| zero_all(recorded, Provision::Allocate),
            Provision::Unmap | Provision::Keep => |recorded| zero_all(recorded, Provision::Unmap),
        };
        explore_on(overlay(), Recorded::new, scenario);
    }
}

fn zero_all(recorded: Recorded, provision: Provision) {
    let writes = [part(20, 64, 128, 1, false), part(3, 0, CLUSTER, 2, true)];
    all_at_once(recorded, [writes[0], zero(0, UNITS, provision), writes[1]]);
}

/// Whoever looks while the words of an entry change one after the other sees what was there or what comes.
#[test]
fn looks_at_entries_that_change() {
    explore_on(overlay(), Recorded::new, |recorded| {
        let at = (3 * UNITS + 7) * CLUSTER;
        let first = recorded.stage.scene.content[at as usize..(at + CLUSTER) as usize].to_vec();
        let readers = [MapMode::Wait, MapMode::Try].map(|mode| {
            let first = first.clone();
            recorded.stage.spawn(move |driver| {
                for _ in 0..12 {
                    let mut plan = ReadPlan::default();
                    driver.map_read(GuestRange::new(at, CLUSTER).unwrap(), mode, &mut plan).unwrap();
                    assert_eq!(plan.pieces.covered_len(), CLUSTER);
                    let mut seen = vec![0; CLUSTER as usize];
                    driver.pread(at, &mut seen).unwrap();
                    let known = [
                        first.clone(),
                        painted(at, CLUSTER, 0),
                        painted(at, CLUSTER, 1),
                        painted(at, CLUSTER, 2),
                    ];
                    assert!(known.contains(&seen), "what was never there is read");
                }
            })
        });
        let writer = recorded.stage.spawn(move |driver| {
            let cluster = GuestRange::new(3 * UNITS * CLUSTER, UNITS * CLUSTER).unwrap();
            for _ in 0..3 {
                write(driver, at, CLUSTER, 1);
                session::discard(driver, cluster, LATER).unwrap();
            }
            write(driver, at, CLUSTER, 2);
        });
        join(readers);
        writer.join().unwrap();
        recorded.stage.finish(at, &painted(at, CLUSTER, 2));
    });
}
