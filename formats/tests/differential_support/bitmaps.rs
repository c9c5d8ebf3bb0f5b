//! Scripts over images with dirty bitmaps: QEMU and the driver record the same, each goes on where the other one has
//! stored, and both leave bitmaps that may be used.

use std::fmt::Debug;
use std::path::Path;

use crate::daemon::Daemon;
use crate::support::image::Image;
use crate::support::maker;
use crate::support::random::Random;
use crate::{Kind, Pair, run_on, scripts};

const KINDS: [Kind; 7] = [
    with_bitmaps("cluster_size=512", 512, false),
    with_bitmaps("cluster_size=512,refcount_bits=64", 512, true),
    with_bitmaps("cluster_size=4k", 4096, true),
    with_bitmaps("cluster_size=16k,extended_l2=on,refcount_bits=1", 16384, true),
    with_bitmaps("cluster_size=512,data_file=DATA", 512, true),
    with_bitmaps("cluster_size=4k,data_file=DATA,data_file_raw=on", 4096, false),
    with_bitmaps("cluster_size=64k", 65536, false),
];

/// One script in so many is over an image with bitmaps.
const SHARE: u64 = 20;

const fn with_bitmaps(options: &'static str, cluster: u64, backing: bool) -> Kind {
    Kind { options, cluster, backing, bitmaps: true, share: 0 }
}

/// Adds bitmaps of three granularities, one of which has recorded something and is disabled.
pub fn add(image: &str) {
    let add = |granularity: &str, name: &str| {
        maker::run("qemu-img", &["bitmap", "--add", "-g", granularity, image, name]);
    };
    add("1k", "off");
    maker::run("qemu-io", &["-f", "qcow2", "-c", "write -q -P 3 9k 2k", image]);
    maker::run("qemu-img", &["bitmap", "--disable", image, "off"]);
    add("512", "fine");
    add("64k", "coarse");
}

/// Both files have the same bitmaps with the same bits, and none of them is in use.
pub fn assert_same(theirs: &Path, ours: &Path, said: &dyn Debug) {
    let [theirs, ours] = [theirs, ours].map(|path| stored(path, said));
    assert_eq!(theirs.len(), 3, "{said:?}: QEMU's bitmaps");
    for (theirs, ours) in theirs.iter().zip(&ours) {
        let differs = theirs.bits.iter().zip(&ours.bits).position(|(theirs, ours)| theirs != ours);
        let (theirs, ours) = ((&theirs.name, theirs.flags), (&ours.name, ours.flags));
        assert_eq!(theirs, ours, "{said:?}");
        assert_eq!(differs, None, "{said:?}: granule of {}", ours.0);
    }
    assert_eq!(theirs.len(), ours.len(), "{said:?}");
}

struct Stored {
    name: String,
    flags: u32,
    bits: Vec<bool>,
}

fn stored(path: &Path, said: &dyn Debug) -> Vec<Stored> {
    let bytes = std::fs::read(path).unwrap();
    let image = Image::parse(&bytes).unwrap();
    let mut bitmaps: Vec<_> = image
        .bitmaps
        .iter()
        .map(|bitmap| Stored {
            name: bitmap.name.clone(),
            flags: bitmap.flags,
            bits: image.dirty_granules(bitmap),
        })
        .collect();
    assert!(bitmaps.iter().all(|bitmap| bitmap.flags & 1 == 0), "{said:?}: in use in {}", path.display());
    bitmaps.sort_by(|one, other| one.name.cmp(&other.name));
    bitmaps
}

#[test]
fn scripts_record_the_same() {
    let seed = Random::seed("differential, bitmaps");
    let mut daemon = Daemon::start();
    let count = (scripts() / SHARE).max(KINDS.len() as u64);
    let each = count.div_ceil(KINDS.len() as u64);
    for (index, kind) in KINDS.iter().enumerate() {
        let first = index as u64 * each;
        let mut random = Random::new(seed.wrapping_add(first));
        let pair = Pair::new(kind, &mut random);
        for number in first..first + each {
            run_on(&mut daemon, &pair, &mut Random::new(seed.wrapping_add(number)), number);
        }
    }
}
