//! Clusters that are written compressed, under the interleavings that shuttle chooses: blobs of several writes in
//! one cluster of the file, which is let go and used again under them.

use nbd_img_formats::sync::Arc;
use nbd_img_formats::{BlockDriver, GuestRange, Provision, ZeroRequest};

use crate::shuttle_scenarios::{LATER, Stage, explore_on, join, plain, write};
use crate::support::scene::{CLUSTER, Scene};
use crate::support::units::painted;

/// Clusters of 1 KiB: two writes share one of the file.
const LARGER: u64 = 2 * CLUSTER;

fn larger() -> Arc<Scene> {
    let scene = Scene::empty("larger clusters", "refcount_bits=16,cluster_size=1k");
    Arc::new(Scene { compress: true, ..scene })
}

fn explore(scene: Arc<Scene>, scenario: fn(Stage)) {
    explore_on(scene, |scene| Stage::over(scene, |storage| storage), scenario);
}

fn read(driver: &dyn BlockDriver, at: u64, len: u64) -> Vec<u8> {
    let mut got = vec![0; len as usize];
    driver.pread(at, &mut got).unwrap();
    got
}

fn zero(driver: &dyn BlockDriver, at: u64, len: u64) {
    let request = ZeroRequest { provision: Provision::Unmap, fast: false, durability: LATER };
    driver.write_zeroes(GuestRange::new(at, len).unwrap(), request).unwrap();
}

/// Two writes pack blobs into one cluster, and a commit comes in between.
#[test]
fn writes_that_pack_into_one_cluster() {
    explore(larger(), |stage| {
        let at = [8, 9, 40].map(|number| number * LARGER);
        let writers = at.map(|at| {
            stage.spawn(move |driver| {
                write(driver, at, LARGER, 1);
                assert!(read(driver, at, LARGER) == painted(at, LARGER, 1));
                driver.flush().unwrap();
            })
        });
        join(writers);
        assert!(read(&*stage.driver, at[2], LARGER) == painted(at[2], LARGER, 1));
        stage.finish(at[0], &painted(at[0], 2 * LARGER, 1));
    });
}

/// The only blob of a cluster goes, and the cluster with it, while another write packs one there.
#[test]
fn a_packed_cluster_is_let_go_under_a_write() {
    explore(larger(), |stage| {
        let at = [8, 9].map(|number| number * LARGER);
        write(&*stage.driver, at[0], LARGER, 1);
        stage.driver.flush().unwrap();
        let freer = stage.spawn(move |driver| {
            zero(driver, at[0], LARGER);
            driver.flush().unwrap();
            driver.flush().unwrap();
            write(driver, 40 * LARGER, LARGER, 3);
        });
        let writer = stage.spawn(move |driver| {
            write(driver, at[1], LARGER, 2);
            driver.flush().unwrap();
        });
        let reader = stage.spawn(move |driver| {
            let got = read(driver, at[0], LARGER);
            assert!(got == painted(at[0], LARGER, 0) || got == painted(at[0], LARGER, 1), "a reused blob");
        });
        join([freer, writer, reader]);
        assert!(read(&*stage.driver, 40 * LARGER, LARGER) == painted(40 * LARGER, LARGER, 3));
        stage.finish(at[1], &painted(at[1], LARGER, 2));
    });
}

/// A cluster is written compressed again and again, each time into what the last but one has left, under reads.
#[test]
fn rewrites_against_reads() {
    explore(larger(), |stage| {
        let at = 8 * LARGER;
        let writer = stage.spawn(move |driver| {
            for number in 1..=4 {
                write(driver, at, LARGER, number);
                driver.flush().unwrap();
            }
        });
        let readers = [0, 1].map(|_| {
            stage.spawn(move |driver| {
                let mut last = 0;
                for _ in 0..3 {
                    let got = read(driver, at, LARGER);
                    let writer = (0..=4).find(|writer| got == painted(at, LARGER, *writer));
                    let writer = writer.unwrap_or_else(|| panic!("nobody has written {:x?}", &got[..8]));
                    assert!(writer >= last, "{writer} after {last}");
                    last = writer;
                }
            })
        });
        writer.join().unwrap();
        join(readers);
        stage.finish(at, &painted(at, LARGER, 4));
    });
}

/// A compressed write of a cluster against one of a part of it, and a discard: some order of the three.
#[test]
fn a_compressed_write_against_a_part_and_a_discard() {
    let scene = plain();
    let scene = Scene { compress: true, ..Arc::into_inner(scene).unwrap() };
    explore(Arc::new(scene), |stage| {
        // One that is compressed, and one that is data.
        for at in [18 * CLUSTER, 3 * CLUSTER] {
            let whole = stage.spawn(move |driver| write(driver, at, CLUSTER, 1));
            let part = stage.spawn(move |driver| write(driver, at + 64, 64, 2));
            let discard = stage.spawn(move |driver| {
                driver.discard(GuestRange::new(at, CLUSTER).unwrap(), LATER).unwrap();
                driver.flush().unwrap();
            });
            join([whole, part, discard]);
            let got = read(&*stage.driver, at, CLUSTER);
            let [of_part, rest] = [&got[64..128], &got[128..]];
            let first = (rest == painted(at + 128, CLUSTER - 128, 1), rest.iter().all(|byte| *byte == 0));
            assert!(first.0 || first.1, "the rest is neither written nor discarded");
            let known = [0, 1, 2].iter().any(|writer| of_part == painted(at + 64, 64, *writer));
            assert!(known && got[..64] == *if first.0 { painted(at, 64, 1) } else { vec![0; 64] });
        }
        let untouched = stage.scene.content[..CLUSTER as usize].to_vec();
        stage.finish(0, &untouched);
    });
}
