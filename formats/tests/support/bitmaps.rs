//! What dirty bitmaps of an image say, and images with some.

use super::image::{Bitmap, Image, OFFSET_MASK};
use super::maker::{self, Maker};
use super::reader;
use super::scene::{CLUSTER, SIZE, Scene};

/// So many bytes of the disk have their bits in one cluster, where a bit stands for 512 of them.
pub const SPAN: u64 = CLUSTER * 8 * 512;

/// What a bitmap is, to compare.
pub type Told = (String, u32, u32, Vec<bool>);

/// Fails unless the bitmaps have as many clusters of bits as the disk needs, and zeroes behind its end.
pub fn told(image: &Image<'_>) -> Result<Vec<Told>, String> {
    let told = |bitmap: &Bitmap| {
        let name = bitmap.name.clone();
        check_shape(image, bitmap).map_err(|what| format!("bitmap {name}: {what}"))?;
        Ok((name, bitmap.flags, bitmap.granularity_bits, image.dirty_granules(bitmap)))
    };
    image.bitmaps.iter().map(told).collect()
}

/// What they tell, whatever shape they have.
pub fn bits_of(image: &Image<'_>) -> Vec<Told> {
    let told = |bitmap: &Bitmap| {
        (bitmap.name.clone(), bitmap.flags, bitmap.granularity_bits, image.dirty_granules(bitmap))
    };
    image.bitmaps.iter().map(told).collect()
}

fn check_shape(image: &Image<'_>, bitmap: &Bitmap) -> Result<(), String> {
    let cluster_len = image.cluster_len();
    let bits = image.size.div_ceil(1 << bitmap.granularity_bits);
    if bitmap.table_entries != bits.div_ceil(8).div_ceil(cluster_len) {
        return Err(format!("{} clusters for {bits} bits", bitmap.table_entries));
    }
    let last = image.bytes.be64(bitmap.table_at + (bitmap.table_entries - 1) * 8);
    let rest = bits - (bitmap.table_entries - 1) * cluster_len * 8;
    let mut bytes = vec![if last & 1 == 1 { 0xff } else { 0_u8 }; cluster_len as usize];
    if last & OFFSET_MASK != 0 {
        image.bytes.fill(&mut bytes, last & OFFSET_MASK);
    }
    let set = |bit: u64| bytes[(bit / 8) as usize] >> (bit % 8) & 1 == 1;
    match (rest..cluster_len * 8).find(|bit| set(*bit)) {
        Some(bit) => Err(format!("bit {bit} of the last cluster is set, of which {rest} are the disk's")),
        None => Ok(()),
    }
}

/// The same bitmaps of a disk of another size: what is new is clean.
pub fn of_size(told: &[Told], size: u64) -> Vec<Told> {
    let resized = |(name, flags, granularity_bits, bits): &Told| {
        let mut bits = bits.clone();
        bits.resize(size.div_ceil(1 << granularity_bits) as usize, false);
        (name.clone(), *flags, *granularity_bits, bits)
    };
    told.iter().map(resized).collect()
}

/// Bits in one and in two clusters, some of them all ones, of enabled bitmaps and one that is not.
pub fn marked(name: &'static str, options: &str, data_file: bool) -> Scene {
    let size = SPAN + SIZE;
    let make = if data_file { Maker::with_data_file } else { Maker::new };
    let maker = make(&format!("cluster_size=512,{options}"), size);
    let path = maker.path();
    let bitmap = |args: &[&str], name: &str| {
        maker::run("qemu-img", &[&["bitmap"], args, &[maker::text(&path), name]].concat());
    };
    let write = |at: u64, len: u64| _ = maker.write(at, &vec![7; len as usize], false);
    // Bits, and hardly any clusters.
    let zero = |at: u64, len: u64| _ = maker.io(&[format!("write -q -z -u {at} {len}")]);
    bitmap(&["--add", "-g", "512"], "fine");
    bitmap(&["--add", "-g", "512"], "off");
    bitmap(&["--add", "-g", "65536"], "coarse");
    zero(0, SPAN);
    write(SPAN - 70 * CLUSTER, 90 * CLUSTER);
    write(3 * CLUSTER, 40 * CLUSTER);
    write(size - 3 * CLUSTER, 3 * CLUSTER);
    bitmap(&["--disable"], "off");
    write(SPAN + 7 * CLUSTER, CLUSTER);
    bitmap(&["--add", "-g", "1024"], "empty");
    assert_eq!(maker.check().0, 0);
    let (image, data) = (maker.bytes(), maker.data_bytes());
    let mut scene = Scene::empty(name, "refcount_bits=16");
    scene.content =
        reader::read_files(&image, data.as_ref().unwrap_or(&image), reader::Disk::Active, &[]).unwrap();
    (scene.image, scene.data) = (image, data);
    scene
}

/// With its bitmaps, but for the one that is in use.
pub fn unused(scene: Scene) -> Scene {
    let mut scene = scene.with_bitmaps();
    let maker = Maker::of(&scene.image);
    maker::run("qemu-img", &["bitmap", "--remove", maker::text(&maker.path()), "stale"]);
    scene.image = maker.bytes();
    scene
}
