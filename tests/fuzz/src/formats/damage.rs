//! Changes of an image's metadata: what a broken program, a failing disk or an enemy leaves.

use arbitrary::{Result, Unstructured};

use super::small::Small;

/// Most changes of one image.
const CHANGES_MAX: u8 = 4;
/// Words at the edges of what fields can say.
const WORDS: [u64; 16] = [
    0,
    1,
    2,
    512,
    0x1ff,
    0x7fff_ffff,
    0xffff_ffff,
    0x1_0000_0000,
    0x4000_0000_0000_0000,
    0x4000_0000_0000_0200,
    0x7fff_ffff_ffff_fe00,
    0x8000_0000_0000_0000,
    0x8000_0000_0000_0001,
    0x00ff_ffff_ffff_fe00,
    0x80ff_ffff_ffff_fe00,
    u64::MAX,
];

/// A copy of the image with as many changes as the input asks for. Most inputs ask for some.
pub fn damaged(image: &Small, u: &mut Unstructured<'_>) -> Result<Vec<u8>> {
    let mut bytes = image.bytes.clone();
    for _ in 0..u.int_in_range(0..=CHANGES_MAX)? {
        change(image, &mut bytes, u)?;
    }
    Ok(bytes)
}

fn change(image: &Small, bytes: &mut Vec<u8>, u: &mut Unstructured<'_>) -> Result<()> {
    let place = *u.choose(&image.places)?;
    let inside = usize::from(u.arbitrary::<u16>()?) % place.len;
    let (at, value): (_, u8) = (place.at + inside, u.arbitrary()?);
    let (word_at, half_at) = (at & !7, at & !3);
    match u.int_in_range(0..=8)? {
        0 => poke(bytes, at, &[value]),
        1 => {
            let old = bytes.get(at).copied().unwrap_or(0);
            poke(bytes, at, &[old ^ 1 << (value & 7)]);
        }
        2 => poke(bytes, word_at, &WORDS[usize::from(value & 15)].to_be_bytes()),
        3 => poke(bytes, half_at, &WORDS[usize::from(value & 15)].to_be_bytes()[4..]),
        4 | 5 => {
            // An entry that leads to some cluster of the file, or close behind it.
            let clusters = image.bytes.len() as u64 / image.shape.cluster_len() + 4;
            let flags = [1 << 63, 0, 1 << 63 | 1, 1, 1 << 62, 1 << 63 | 1 << 62, 1 << 56, 1 << 63 | 2];
            let entry = u64::from(u.arbitrary::<u8>()?) % clusters * image.shape.cluster_len();
            poke(bytes, word_at, &(entry | flags[usize::from(value & 7)]).to_be_bytes());
        }
        6 => {
            let from = *u.choose(&image.places)?;
            let from = (from.at + usize::from(value) * 8 % from.len) & !7;
            let word: Vec<u8> = bytes.get(from..from + 8).unwrap_or(&[0; 8]).to_vec();
            poke(bytes, word_at, &word);
        }
        7 => poke(bytes, half_at, &u.arbitrary::<u32>()?.to_be_bytes()),
        _ => {
            let sectors = usize::from(value) % (bytes.len() / 512 + 4);
            bytes.resize(sectors * 512, 0);
        }
    }
    Ok(())
}

/// Writes as much of `with` as the file has room for.
fn poke(bytes: &mut [u8], at: usize, with: &[u8]) {
    for (index, byte) in with.iter().enumerate() {
        if let Some(place) = bytes.get_mut(at + index) {
            *place = *byte;
        }
    }
}
