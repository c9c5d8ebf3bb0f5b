//! New images: whatever the options, what is made is clean, and until it is whole it is no image.

#![allow(clippy::unwrap_used)] // Helpers of tests are not told apart from a program's code.

mod support;

use nbd_img_formats::qcow2::{self, Compression, CreateOptions, Header, Preallocation};
use nbd_img_formats::storage::{Fate, Fault, Faults, FileId, Log, MemoryOptions, MemoryStorage, Storage};
use nbd_img_formats::sync::Arc;
use support::checker;
use support::crash::content_of;
use support::image::Image;
use support::maker;
use support::random::Random;

fn random_options(random: &mut Random) -> CreateOptions {
    let cluster_len = 512 << random.below(9);
    let preallocation = random.pick(&[
        Preallocation::Off,
        Preallocation::Metadata,
        Preallocation::Falloc,
        Preallocation::Full,
    ]);
    let version = if random.below(4) == 0 { 2 } else { 3 };
    let options = CreateOptions {
        virtual_size: random.below((cluster_len * 500).min(6 << 20)),
        version,
        cluster_len,
        preallocation,
        ..CreateOptions::default()
    };
    if version == 2 {
        return options;
    }
    CreateOptions {
        refcount_bits: 1 << random.below(7),
        lazy_refcounts: random.below(2) == 0,
        extended_l2: cluster_len >= 16384 && random.below(2) == 0,
        compression: random.pick(&[Compression::Zlib, Compression::Zstd]),
        ..options
    }
}

#[test]
fn images_of_all_options_are_clean() {
    let mut random = Random::new(Random::seed("new images"));
    for number in 0..200 {
        let options = random_options(&mut random);
        let memory: Arc<dyn Storage> = MemoryStorage::new(0).unwrap();
        qcow2::create(&memory, None, &options).unwrap_or_else(|e| panic!("{options:?}: {e}"));
        let report = checker::check_storage(&*memory).unwrap();
        assert!(report.is_clean(), "{options:?}:\n{report}");
        let header = Header::load(&memory).unwrap();
        assert_eq!(header.virtual_size, options.virtual_size.next_multiple_of(512), "{options:?}");
        if number % 10 == 0 {
            let bytes = content_of(&nbd_img_formats::storage::SparseBytes::load(&*memory).unwrap());
            let (code, said) = maker::qemu_check(&bytes);
            assert_eq!(code, 0, "{options:?}: {said}");
        }
    }
}

#[test]
fn it_is_no_image_before_it_is_whole() {
    let mut random = Random::new(Random::seed("crashes while images are made"));
    let mut images = 0;
    for round in 0..60 {
        let options = random_options(&mut random);
        // A device has an old image on it.
        let old = maker::Maker::new("cluster_size=512", 100 << 10).bytes();
        let memory = if round % 2 == 0 {
            MemoryStorage::new(0).unwrap()
        } else {
            let device = MemoryOptions { len: 8 << 20, grows: false, poisoned: true };
            MemoryStorage::with(device).unwrap()
        };
        if round % 2 == 1 {
            let at = nbd_img_formats::HostOffset(0);
            memory.pwrite(&old, at, nbd_img_formats::Durability::Later).unwrap();
        }
        let options = match round % 2 {
            0 => options,
            _ => CreateOptions { preallocation: Preallocation::Off, ..options },
        };
        let log = Log::new();
        let storage: Arc<dyn Storage> = log.attach(memory).unwrap();
        qcow2::create(&storage, None, &options).unwrap();
        for _ in 0..20 {
            let cut = random.below(log.len() as u64 + 1) as usize;
            let bytes = log.after_crash(FileId(0), cut, |_, _| match random.below(2) {
                0 => Fate::Kept,
                _ => Fate::Lost,
            });
            if Image::parse(&bytes).is_err() {
                continue;
            }
            // The new one, or on a device still the old one.
            let report = checker::check(&bytes).unwrap();
            assert!(report.is_clean(), "{options:?}, cut {cut} of {}:\n{report}", log.len());
            images += 1;
        }
    }
    assert!(images > 20, "{images}");
}

#[test]
fn a_call_that_fails_is_told_and_leaves_no_image() {
    let mut random = Random::new(Random::seed("faults while images are made"));
    for _ in 0..30 {
        let options = random_options(&mut random);
        for call in 0.. {
            let memory = MemoryStorage::new(0).unwrap();
            let faults = Faults::new();
            let storage: Arc<dyn Storage> = faults.attach(memory.clone());
            faults.arm(Fault { errno: libc::ENOSPC, ..Fault::at(call) });
            let made = qcow2::create(&storage, None, &options);
            if made.is_ok() {
                assert!(call > 5, "{options:?}: hardly a call");
                break;
            }
            let bytes = content_of(&nbd_img_formats::storage::SparseBytes::load(&*memory).unwrap());
            let whole = Image::parse(&bytes).is_ok();
            // Only the last sync may fail with the whole image written.
            assert!(!whole || checker::check(&bytes).unwrap().is_clean(), "{options:?}, call {call}");
        }
    }
}
