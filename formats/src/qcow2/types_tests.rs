//! Tests of [`types`](super).

use super::*;

fn plain(cluster_bits: u32) -> Geometry {
    Geometry::new(cluster_bits, false, 3, DataFile::Internal)
}

#[test]
fn tables_cover_what_the_specification_says() {
    assert_eq!(plain(16).l2_coverage_len(), 512 << 20);
    assert_eq!(plain(9).l2_coverage_len(), 32 << 10);
    assert_eq!(plain(21).l2_coverage_len(), 512 << 30);
    assert_eq!(plain(21).slice_coverage_len(), 16 << 30);
    let extended = Geometry::new(16, true, 3, DataFile::Internal);
    assert_eq!(extended.l2_coverage_len(), 256 << 20);
    assert_eq!(extended.subcluster_len(), 2048);
    assert_eq!(plain(16).l1_entries_for(0), 0);
    assert_eq!(plain(16).l1_entries_for((512 << 20) + 1), 2);
}

#[test]
fn slices_number_the_guest_disk_without_gaps() {
    let geometry = plain(20);
    let coverage = geometry.slice_coverage_len();
    assert_eq!(geometry.slice_of(coverage * 17 - 1), SliceNumber(16));
    assert_eq!(geometry.slice_offset_in_table(SliceNumber(16)), 0);
    assert_eq!(geometry.slice_offset_in_table(SliceNumber(17)), 64 << 10);
    let last = geometry.cluster_of(coverage * 17 - 1);
    assert_eq!(geometry.index_in_slice(last), 8191);
}

#[test]
fn standard_entries() {
    let g = plain(16);
    let decode = |raw| g.decode_l2(raw, 0, GuestCluster(0));
    assert_eq!(decode(0), Ok(L2Entry::Unallocated));
    assert_eq!(decode(L2_COPIED), Ok(L2Entry::Unallocated));
    assert_eq!(decode(1), Ok(L2Entry::Zero { host: None }));
    assert_eq!(decode(L2_COPIED | 0x50000), Ok(L2Entry::Data { host: HostCluster(0x50000), copied: true }));
    assert_eq!(decode(0x50001), Ok(L2Entry::Zero { host: Some(HostCluster(0x50000)) }));
    assert_eq!(decode(0x50200), Err(EntryFault::Misaligned));
    assert_eq!(decode(0x50002), Err(EntryFault::ReservedBits));
    // The two pokes of QEMU's iotest 080.
    assert_eq!(decode(0xbfff_ffff_ffff_0000), Err(EntryFault::ReservedBits));
    assert_eq!(
        decode(0x8000_00ff_ffff_0000),
        Ok(L2Entry::Data { host: HostCluster(0xff_ffff_0000), copied: true })
    );
    let v2 = Geometry::new(16, false, 2, DataFile::Internal);
    assert_eq!(v2.decode_l2(1, 0, GuestCluster(0)), Err(EntryFault::ZeroFlagInVersion2));
}

#[test]
fn compressed_descriptors_split_by_cluster_length() {
    for bits in CLUSTER_BITS_MIN..=CLUSTER_BITS_MAX {
        let offset_bits = 62 - (bits - 8);
        let raw = L2_COMPRESSED | 3 << offset_bits.min(60) | 0x1234;
        let Ok(L2Entry::Compressed(blob)) = plain(bits).decode_l2(raw, 0, GuestCluster(0)) else {
            // At 512 bytes one bit is left for the sectors, so 3 << 60 reaches into the offset.
            assert_eq!(bits, 9);
            continue;
        };
        assert_eq!(blob.at, HostOffset(0x1234));
        assert_eq!(blob.len_max, 4 * 512 - 0x34);
    }
    let largest = plain(21).decode_l2(L2_COMPRESSED | ((1 << 62) - (1 << 49)), 0, GuestCluster(0));
    assert_eq!(largest, Ok(L2Entry::Compressed(Blob { at: HostOffset(0), len_max: 4 << 20 })));
}

#[test]
fn external_data_files_use_offset_zero() {
    let external = Geometry::new(16, false, 3, DataFile::External);
    let entry = external.decode_l2(L2_COPIED, 0, GuestCluster(0));
    assert_eq!(entry, Ok(L2Entry::Data { host: HostCluster(0), copied: true }));
    let overwritable = |geometry: Geometry, raw: u64, cluster: u64| {
        geometry.overwritable(EntryWords { raw, bitmap: 0 }, GuestCluster(cluster), ALL_UNITS)
    };
    assert_eq!(overwritable(external, L2_COPIED, 0), Some(HostCluster(0)));
    assert_eq!(overwritable(external, 0, 0), None);
    assert_eq!(external.decode_l2(0, 0, GuestCluster(0)), Ok(L2Entry::Unallocated));
    for data_file in [DataFile::External, DataFile::ExternalRaw] {
        let geometry = Geometry::new(16, false, 3, data_file);
        for raw in [L2_COPIED, 0x40000, L2_COPIED | 0x60000] {
            let fault = Err(EntryFault::NotTheGuestOffset);
            assert_eq!(geometry.decode_l2(raw, 0, GuestCluster(5)), fault, "{raw:#x}");
            assert_eq!(overwritable(geometry, raw, 5), None);
        }
        assert_eq!(overwritable(geometry, 0x50000, 5), Some(HostCluster(0x50000)));
    }
    let fault = external.decode_l2(L2_COMPRESSED, 0, GuestCluster(0));
    assert_eq!(fault, Err(EntryFault::CompressedWithDataFile));
}

#[test]
fn blobs_come_back_from_their_entries() {
    for bits in CLUSTER_BITS_MIN..=CLUSTER_BITS_MAX {
        let (geometry, cluster_len) = (plain(bits), 1u64 << bits);
        let last = (1u64 << (62 - (bits - 8)).min(56)) - 1;
        for at in [1, 511, 512, 513, 0x12_3456, last - 511, last] {
            for len in [1, 2, 511, cluster_len / 2, cluster_len - 1] {
                let blob = Blob::holding(HostOffset(at), len);
                let EntryWords { raw, bitmap } = geometry.encode_blob(blob).unwrap();
                let decoded = geometry.decode_l2(raw, bitmap, GuestCluster(7));
                assert_eq!(decoded, Ok(L2Entry::Compressed(blob)), "{bits} {at} {len}");
                assert!(blob.len_max >= len && blob.len_max < len + 512);
                assert!(!geometry.is_owned(raw));
            }
        }
        assert_eq!(geometry.encode_blob(Blob::holding(HostOffset(last + 1), 1)), None);
        assert_eq!(geometry.encode_blob(Blob::holding(HostOffset(0), 2 * cluster_len + 1)), None);
    }
}

#[test]
fn subclusters_run() {
    let g = Geometry::new(16, true, 3, DataFile::Internal);
    let Ok(L2Entry::Split { host: Some(_), subclusters }) =
        g.decode_l2(0x50000, 0x0000_00f0_8000_000f, GuestCluster(0))
    else {
        panic!("the entry is good")
    };
    assert_eq!(subclusters.run_from(0), (Subcluster::Data, 4));
    assert_eq!(subclusters.run_from(5), (Subcluster::Zero, 3));
    assert_eq!(subclusters.run_from(8), (Subcluster::Unallocated, 23));
    assert_eq!(subclusters.run_from(31), (Subcluster::Data, 1));
    assert_eq!(g.decode_l2(0x50000, 1 << 32 | 1, GuestCluster(0)), Err(EntryFault::BadSubclusters));
    assert_eq!(g.decode_l2(0, 1, GuestCluster(0)), Err(EntryFault::BadSubclusters));
    assert_eq!(g.decode_l2(0x50001, 0, GuestCluster(0)), Err(EntryFault::ReservedBits));
}

#[test]
fn units_of_a_cluster() {
    let split = Geometry::new(14, true, 3, DataFile::Internal);
    assert_eq!((split.unit_len(), plain(14).unit_len()), (512, 16384));
    for (within, len, units) in [
        (0, 1, 1),
        (0, 512, 1),
        (511, 2, 3),
        (512, 512, 2),
        (16383, 1, 1 << 31),
        (0, 16384, ALL_UNITS),
        (15872, 512, 1 << 31),
        (100, 16000, ALL_UNITS),
        (600, 15784, ALL_UNITS & !1),
    ] {
        assert_eq!(split.units(within, len), units, "{within} {len}");
        assert_eq!(plain(14).units(within, len), ALL_UNITS);
    }
}

#[test]
fn subclusters_in_place() {
    let g = Geometry::new(16, true, 3, DataFile::Internal);
    let host = HostCluster(0x50000);
    let entry =
        |allocated: u64, zero: u64| EntryWords { raw: 0x50000 | L2_COPIED, bitmap: zero << 32 | allocated };
    let cluster = GuestCluster(3);
    assert_eq!(g.overwritable(entry(0b1110, 0b1), cluster, 0b0110), Some(host));
    assert_eq!(g.overwritable(entry(0b1110, 0b1), cluster, 0b0111), None);
    assert_eq!(g.overwritable(EntryWords { raw: 0x50000, ..entry(0b1110, 0) }, cluster, 0b0110), None);
    let old = g.decode_l2(0x50000 | L2_COPIED, 0b1 << 32 | 0b1110, cluster).unwrap();
    assert_eq!(g.encode_mapped(old, host, 0b10001), entry(0b11111, 0));
    let elsewhere = HostCluster(0x60000);
    let moved = EntryWords { raw: 0x60000 | L2_COPIED, bitmap: 0b1 << 32 | 0b11110 };
    assert_eq!(g.encode_mapped(old, elsewhere, 0b11110), moved);
    assert_eq!(g.encode_zero(None), EntryWords { raw: 0, bitmap: 0xffff_ffff_0000_0000 });
}
