//! Images by QEMU with one of everything, in all widths, and random damage to them.

use super::image::{Bytes, Image, OFFSET_MASK};
use super::maker::Maker;
use super::random::Random;

/// One of everything, by the options that it was created with.
pub fn images() -> Vec<(&'static str, Maker)> {
    let mut images = Vec::new();
    let mut add = |options: &'static str, cluster: u64, snapshot: bool, compressed: bool| {
        let maker = Maker::new(options, cluster * 300 + 512);
        maker.io(&[
            format!("write -q -P 1 0 {}", cluster * 70),
            format!("write -q -P 2 {} {}", cluster * 90, cluster * 3),
            format!("discard -q {} {}", cluster * 10, cluster),
        ]);
        if compressed {
            maker.io(&[format!("write -q -c -P 9 {} {cluster}", cluster * 100)]);
            maker.io(&[format!("write -q -c -P 8 {} {cluster}", cluster * 101)]);
        }
        if snapshot {
            maker.snapshot("one");
            maker.io(&[format!("write -q -P 3 {} {}", cluster * 5, cluster * 2)]);
            maker.snapshot("two").io(&["write -q -P 4 0 512"]);
        }
        if !options.contains("compat=v2") {
            maker.io(&[format!("write -q -z {} {}", cluster * 20, cluster * 3)]);
            maker.io(&[format!("write -q -z -u {} {}", cluster * 30, cluster * 2)]);
        }
        images.push((options, maker));
    };
    add("cluster_size=512", 512, true, true);
    add("cluster_size=512,refcount_bits=64", 512, true, true);
    add("cluster_size=1k,refcount_bits=1", 1024, false, false);
    add("cluster_size=512,refcount_bits=2", 512, true, false);
    add("cluster_size=4k,refcount_bits=4,compression_type=zstd", 4096, true, true);
    add("cluster_size=512,refcount_bits=8,compat=v3,lazy_refcounts=on", 512, true, true);
    add("cluster_size=4k,refcount_bits=32", 4096, false, true);
    add("cluster_size=512,compat=v2", 512, true, true);
    add("cluster_size=64k", 65536, true, true);
    add("cluster_size=2M", 2 << 20, false, false);
    add("cluster_size=16k,extended_l2=on", 16384, true, true);
    images
}

/// Changes one or two bytes of the metadata.
pub fn poke(bytes: &mut [u8], random: &mut Random) -> String {
    let owned = bytes.to_vec();
    let image = Image::parse(&owned).unwrap();
    let l1 = owned.table(image.l1_at, image.l1_entries);
    let l2s: Vec<_> = l1.iter().map(|entry| entry & OFFSET_MASK).filter(|at| *at != 0).collect();
    let blocks: Vec<_> = image.refcount_table.iter().copied().filter(|at| *at != 0).collect();
    let mut said = String::new();
    for _ in 0..1 + random.below(2) {
        let cluster = image.cluster_len();
        // Where something is written, rather than in the empty parts.
        let at = match random.below(9) {
            0 => image.l1_at + random.below(image.l1_entries * 8),
            1..=3 => random.pick(&l2s) + random.below(cluster),
            4 => random.pick(&l2s) + random.below(64 * 8),
            5 | 6 => random.pick(&blocks) + random.below(cluster),
            7 => random.pick(&blocks) + random.below(16),
            _ => image.table_at + random.below(blocks.len() as u64 * 8),
        };
        let old = bytes[at as usize];
        let new = match random.below(4) {
            0 => 0,
            1 => old.wrapping_add(1),
            2 => old ^ (1 << random.below(8)),
            _ => old ^ 0x80,
        };
        bytes[at as usize] = new;
        said += &format!("{at:#x}: {old:#x} -> {new:#x}; ");
    }
    said
}
