//! [`RunSet`]: a set of host clusters, kept as runs, of a bounded size.

use std::collections::BTreeMap;

use super::super::types::HostIndex;

/// Most runs in a set: about 100 MiB of memory. What does not fit is left out, and whoever puts it in has
/// to find it again otherwise. Our choice.
const RUNS_MAX: usize = 1 << 20;

/// A set of clusters.
pub struct RunSet {
    /// Length by first cluster; runs neither touch nor overlap.
    runs: BTreeMap<u64, u64>,
    runs_max: usize,
    len: u64,
}

impl Default for RunSet {
    fn default() -> Self {
        RunSet::bounded(RUNS_MAX)
    }
}

impl RunSet {
    /// An empty set of at most `runs_max` runs.
    pub fn bounded(runs_max: usize) -> Self {
        RunSet { runs: BTreeMap::new(), runs_max, len: 0 }
    }

    /// Adds `len` clusters, none of which is in the set. `false`: there is no room for them, and they are
    /// left out.
    #[must_use]
    pub fn insert(&mut self, first: HostIndex, len: u64) -> bool {
        if len == 0 {
            return true;
        }
        let (mut start, mut end) = (first.0, first.0 + len);
        if let Some((before, before_len)) = self.runs.range(..start).next_back().map(|(s, l)| (*s, *l))
            && before + before_len >= start
        {
            start = before;
            end = end.max(before + before_len);
        }
        while let Some((next, next_len)) = self.runs.range(start..=end).next().map(|(s, l)| (*s, *l)) {
            self.runs.remove(&next);
            end = end.max(next + next_len);
            self.len -= next_len;
        }
        // One that touches another has taken its place.
        if self.runs.len() >= self.runs_max {
            return false;
        }
        self.runs.insert(start, end - start);
        self.len += end - start;
        true
    }

    /// Takes a cluster out of the set; returns whether it was there.
    pub fn remove(&mut self, index: HostIndex) -> bool {
        let run = self.runs.range(..=index.0).next_back().map(|(start, len)| (*start, *len));
        let Some((start, len)) = run.filter(|(start, len)| index.0 < start + len) else { return false };
        match index.0 - start {
            0 => self.runs.remove(&start),
            before => self.runs.insert(start, before),
        };
        // One run may become two: the limit is for what is put in.
        let behind = start + len - index.0 - 1;
        if behind > 0 {
            self.runs.insert(index.0 + 1, behind);
        }
        self.len -= 1;
        true
    }

    /// Takes the first cluster out of the set.
    pub fn pop(&mut self) -> Option<HostIndex> {
        let (start, len) = self.runs.pop_first()?;
        if len > 1 {
            self.runs.insert(start + 1, len - 1);
        }
        self.len -= 1;
        Some(HostIndex(start))
    }

    /// Whether the cluster is in the set.
    pub fn contains(&self, index: HostIndex) -> bool {
        let run = self.runs.range(..=index.0).next_back();
        run.is_some_and(|(start, len)| index.0 < start + len)
    }

    /// The first cluster of the set.
    pub fn first(&self) -> Option<HostIndex> {
        self.runs.first_key_value().map(|(start, _)| HostIndex(*start))
    }

    /// How many clusters there are.
    #[cfg(test)]
    fn len(&self) -> u64 {
        self.len
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_join_and_come_out_in_order() {
        let mut set = RunSet::default();
        for first in [10, 30, 20, 12, 11] {
            assert!(set.insert(HostIndex(first), 1));
        }
        assert!(set.insert(HostIndex(13), 7));
        assert_eq!(set.runs.len(), 2);
        assert_eq!(set.len(), 12);
        let all: Vec<u64> = std::iter::from_fn(|| set.pop()).map(|index| index.0).collect();
        assert_eq!(all, (10..=20).chain([30]).collect::<Vec<_>>());
        assert_eq!(set.len(), 0);
    }

    #[test]
    fn what_is_removed_is_gone_and_nothing_else() {
        let mut set = RunSet::default();
        assert!(set.insert(HostIndex(10), 5));
        for (index, there) in [(9, false), (15, false), (12, true), (12, false), (10, true), (14, true)] {
            assert_eq!(set.remove(HostIndex(index)), there, "{index}");
        }
        assert_eq!(set.len(), 2);
        let left: Vec<u64> = std::iter::from_fn(|| set.pop()).map(|index| index.0).collect();
        assert_eq!(left, [11, 13]);
    }

    #[test]
    fn a_full_set_takes_what_touches_and_says_what_it_does_not_take() {
        let mut set = RunSet::bounded(2);
        assert!(set.insert(HostIndex(10), 1) && set.insert(HostIndex(20), 1));
        assert!(!set.insert(HostIndex(30), 1));
        assert!(set.insert(HostIndex(11), 2) && set.insert(HostIndex(19), 1));
        assert_eq!((set.len(), set.contains(HostIndex(30))), (5, false));
    }
}
