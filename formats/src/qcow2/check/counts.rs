//! [`Counts`]: how often each cluster of a window of the file is used, counted by many threads.
//!
//! A window bounds the memory, whatever length a file claims; whoever has more clusters than it holds
//! walks the tables once for each window.

use crate::qcow2::types::HostIndex;
use crate::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// Clusters of a window: 128 MiB of counts, or 2 TiB of a file with clusters of 64 KiB. Our choice.
pub const WINDOW_CLUSTERS: u64 = 32 << 20;

/// Clusters with consecutive numbers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Window {
    /// The first.
    pub first: u64,
    /// Behind the last.
    pub end: u64,
}

/// How often each cluster of a window is used.
pub struct Counts {
    window: Window,
    counts: Box<[AtomicU32]>,
}

/// Of which clusters of a window the refcount in the file is 1.
pub struct Singles {
    window: Window,
    bits: Box<[AtomicU64]>,
}

impl Window {
    /// The windows of up to `len` clusters that cover all from 0 to before `end`.
    pub fn all(end: u64, len: u64) -> impl Iterator<Item = Window> {
        (0..end.div_ceil(len)).map(move |n| Window { first: n * len, end: ((n + 1) * len).min(end) })
    }

    /// Where in the window the cluster is.
    fn place(self, index: HostIndex) -> Option<usize> {
        let inside = (self.first..self.end).contains(&index.0);
        if inside { usize::try_from(index.0 - self.first).ok() } else { None }
    }

    fn len(self) -> usize {
        usize::try_from(self.end.saturating_sub(self.first)).unwrap_or(0)
    }
}

impl Counts {
    /// Nothing is used yet.
    pub fn new(window: Window) -> Self {
        Counts { window, counts: (0..window.len()).map(|_| AtomicU32::new(0)).collect() }
    }

    /// The clusters that are counted here.
    pub fn window(&self) -> Window {
        self.window
    }

    /// `times` more uses of each of `len` clusters from `first`; what lies outside of the window is not noted.
    pub fn add(&self, first: HostIndex, len: u64, times: u64) {
        let times = u32::try_from(times).unwrap_or(u32::MAX);
        let from = first.0.max(self.window.first);
        for index in from..first.0.saturating_add(len).min(self.window.end) {
            let place = self.window.place(HostIndex(index));
            if let Some(count) = place.and_then(|place| self.counts.get(place)) {
                let add = |count: u32| Some(count.saturating_add(times));
                // The update is never refused.
                let _ = count.fetch_update(Ordering::Relaxed, Ordering::Relaxed, add);
            }
        }
    }

    /// How often the cluster is used; 0 outside of the window.
    pub fn get(&self, index: HostIndex) -> u64 {
        let count = self.window.place(index).and_then(|place| self.counts.get(place));
        count.map_or(0, |count| u64::from(count.load(Ordering::Relaxed)))
    }
}

impl Singles {
    /// None is.
    pub fn new(window: Window) -> Self {
        Singles { window, bits: (0..window.len().div_ceil(64)).map(|_| AtomicU64::new(0)).collect() }
    }

    /// The cluster's refcount is 1.
    pub fn set(&self, index: HostIndex) {
        if let Some((word, bit)) = self.bit(index) {
            word.fetch_or(bit, Ordering::Relaxed);
        }
    }

    /// Whether the cluster's refcount is 1; `None` outside of the window.
    pub fn get(&self, index: HostIndex) -> Option<bool> {
        self.bit(index).map(|(word, bit)| word.load(Ordering::Relaxed) & bit != 0)
    }

    fn bit(&self, index: HostIndex) -> Option<(&AtomicU64, u64)> {
        let place = self.window.place(index)?;
        self.bits.get(place / 64).map(|word| (word, 1 << (place % 64)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_cover_all_and_count_their_own() {
        let windows: Vec<_> = Window::all(10, 4).collect();
        assert_eq!(windows.len(), 3);
        for window in windows {
            let counts = Counts::new(window);
            counts.add(HostIndex(2), 7, 3);
            counts.add(HostIndex(8), u64::MAX, u64::MAX);
            for index in 0..20 {
                let wanted = match index {
                    _ if !(window.first..window.end).contains(&index) => 0,
                    2..8 => 3,
                    8 | 9 => u64::from(u32::MAX),
                    _ => 0,
                };
                assert_eq!(counts.get(HostIndex(index)), wanted, "{window:?} {index}");
            }
        }
        assert_eq!(Window::all(0, 4).count(), 0);
    }

    #[test]
    fn singles_know_their_window() {
        let singles = Singles::new(Window { first: 100, end: 300 });
        singles.set(HostIndex(163));
        singles.set(HostIndex(300));
        let there: Vec<_> = (0..400).filter_map(|i| singles.get(HostIndex(i)).map(|set| (i, set))).collect();
        assert_eq!((there.first(), there.last()), (Some(&(100, false)), Some(&(299, false))));
        assert_eq!(there.iter().filter(|(_, set)| *set).collect::<Vec<_>>(), [&(163, true)]);
    }
}
