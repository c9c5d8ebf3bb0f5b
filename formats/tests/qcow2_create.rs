//! New images: whatever the options, what is made is clean, and until it is whole it is no image.

#![allow(clippy::unwrap_used)] // Helpers of tests are not told apart from a program's code.

mod support;

use nbd_img_formats::qcow2::{
    self, Compression, CreateOptions, DataFileName, Header, Preallocation, WriteOptions,
};
use nbd_img_formats::storage::{Fate, Fault, Faults, FileId, Log, MemoryOptions, MemoryStorage, Storage};
use nbd_img_formats::sync::Arc;
use nbd_img_formats::{BlockDriver, Durability, ErrorKind, HostOffset};
use support::checker;
use support::crash::content_of;
use support::image::Image;
use support::maker;
use support::random::Random;
use support::scene::open_parts;
use support::wrapped::{NeverClosed, Wrapped};

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
            let at = HostOffset(0);
            memory.pwrite(&old, at, Durability::Later).unwrap();
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

/// In an external data file a cluster lies at its offset on the disk, and entries name offsets below 2^56.
#[test]
fn a_disk_with_a_data_file_ends_where_entries_do() {
    const MOST: u64 = 1 << 56;
    let file = || -> Arc<dyn Storage> { Wrapped::new(MemoryStorage::new(0).unwrap(), NeverClosed) };
    let options = |virtual_size, data_file| CreateOptions {
        virtual_size,
        cluster_len: 2 << 20,
        data_file,
        ..CreateOptions::default()
    };
    let name = Some(DataFileName { name: b"data".to_vec(), raw: false });
    let (image, data) = (file(), file());
    qcow2::create(&image, Some(&data), &options(MOST, name.clone())).unwrap();
    let last = MOST - 512;
    let open = |write| open_parts(image.clone(), Some(data.clone()), None, write, 1 << 20);
    let driver = open(Some(WriteOptions::default())).unwrap();
    driver.pwrite(last, &[7; 512], Durability::Fua).unwrap();
    driver.close().unwrap();
    // Whoever made it longer did not ask.
    image.pwrite(&(MOST + 512).to_be_bytes(), HostOffset(24), Durability::Later).unwrap();
    let entries = u32::try_from(MOST >> 39).unwrap() + 1;
    image.pwrite(&entries.to_be_bytes(), HostOffset(36), Durability::Later).unwrap();
    let error = open(Some(WriteOptions::default())).err().unwrap();
    assert!(error.kind() == ErrorKind::Unsupported && error.to_string().contains("64 PiB"), "{error}");
    let driver = open(None).unwrap();
    let mut read = [0; 512];
    driver.pread(last, &mut read).unwrap();
    assert_eq!(read, [7; 512]);
    let error = options(MOST + 512, name).check().unwrap_err();
    assert!(error.kind() == ErrorKind::InvalidInput && error.to_string().contains("64 PiB"), "{error}");
    options(MOST + 512, None).check().unwrap();
}
