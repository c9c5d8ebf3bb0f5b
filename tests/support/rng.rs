//! Random numbers of which every run prints the seed: `NBD_IMG_SEED=N cargo test ...` repeats a run.

use std::ops::Range;
use std::time::{SystemTime, UNIX_EPOCH};

/// SplitMix64 (Steele, Lea, Flood 2014): small, and good enough to pick offsets and sizes.
pub struct Rng(u64);

impl Rng {
    /// Seeded by NBD_IMG_SEED; without it by the clock, but in CI (the variable `CI`) by the test's name, so that a
    /// change is judged by itself. The seed is printed; cargo shows it when the test fails.
    pub fn new(test: &str) -> Self {
        let clock = || {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
            now.as_secs() ^ u64::from(now.subsec_nanos())
        };
        let name =
            || test.bytes().fold(1, |seed: u64, byte| seed.wrapping_mul(31).wrapping_add(u64::from(byte)));
        let seed = match (std::env::var("NBD_IMG_SEED"), std::env::var_os("CI")) {
            (Ok(text), _) => text.parse().unwrap(),
            (Err(_), Some(_)) => name(),
            (Err(_), None) => clock(),
        };
        eprintln!("{test}: NBD_IMG_SEED={seed}");
        Self(seed)
    }

    /// One that always gives the same numbers.
    pub fn fixed(seed: u64) -> Self {
        Self(seed)
    }

    /// Another one, for another thread.
    pub fn fork(&mut self) -> Self {
        Self(self.u64())
    }

    pub fn u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        self.u64() % limit
    }

    /// A number of `range`.
    pub fn in_range(&mut self, range: Range<u64>) -> u64 {
        range.start + self.below(range.end - range.start)
    }

    /// True once in `n` times.
    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(len + 8);
        while bytes.len() < len {
            bytes.extend_from_slice(&self.u64().to_le_bytes());
        }
        bytes.truncate(len);
        bytes
    }
}
