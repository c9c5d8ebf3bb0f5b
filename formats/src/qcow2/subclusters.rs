//! The state of a cluster's subclusters, in images with extended L2 entries: values and their encoding.
//!
//! What may be done with them is decided elsewhere.

use super::types::EntryFault;

/// Subclusters in a cluster of an image with extended L2 entries (specification, "Extended L2 entries").
pub const SUBCLUSTERS: u32 = 32;

/// Every subcluster of a cluster, and the one unit of a cluster that has none.
pub const ALL_UNITS: u32 = u32::MAX;

/// An L2 entry as it stands in its table: the word of its cluster, and that of its subclusters, 0 where there
/// are none.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct EntryWords {
    /// The cluster.
    pub raw: u64,
    /// The subclusters.
    pub bitmap: u64,
}

/// The state of the 32 subclusters of a cluster; never both allocated and zero.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Subclusters {
    allocated: u32,
    zero: u32,
}

/// What a subcluster is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Subcluster {
    /// In the backing file.
    Unallocated,
    /// Zeroes.
    Zero,
    /// In its cluster.
    Data,
}

impl EntryWords {
    /// Neither a cluster nor zeroes.
    pub const NONE: EntryWords = EntryWords { raw: 0, bitmap: 0 };
}

impl Subclusters {
    /// Neither data nor zeroes.
    pub const NONE: Subclusters = Subclusters { allocated: 0, zero: 0 };
    /// Zeroes, all of them.
    pub const ZEROES: Subclusters = Subclusters { allocated: 0, zero: ALL_UNITS };

    /// Those that are data.
    pub fn allocated(self) -> u32 {
        self.allocated
    }

    /// Those that are zeroes.
    pub fn zero(self) -> u32 {
        self.zero
    }

    /// The same with these as zeroes.
    #[must_use]
    pub fn with_zeroes(self, units: u32) -> Self {
        Subclusters { allocated: self.allocated & !units, zero: self.zero | units }
    }

    /// The same with these as data.
    #[must_use]
    pub fn with_data(self, units: u32) -> Self {
        Subclusters { allocated: self.allocated | units, zero: self.zero & !units }
    }

    /// The same without any data.
    #[must_use]
    pub fn without_data(self) -> Self {
        Subclusters { allocated: 0, ..self }
    }

    /// As it stands in a table (specification: allocated in the lower half).
    pub fn encode(self) -> u64 {
        u64::from(self.zero) << SUBCLUSTERS | u64::from(self.allocated)
    }

    /// Checks and decodes what stands in a table.
    pub fn decode(bitmap: u64, has_cluster: bool) -> Result<Self, EntryFault> {
        let [b0, b1, b2, b3, b4, b5, b6, b7] = bitmap.to_le_bytes();
        let allocated = u32::from_le_bytes([b0, b1, b2, b3]);
        let zero = u32::from_le_bytes([b4, b5, b6, b7]);
        if allocated & zero != 0 || (allocated != 0 && !has_cluster) {
            return Err(EntryFault::BadSubclusters);
        }
        Ok(Subclusters { allocated, zero })
    }

    /// What subcluster `index` is, and how many from it on are the same.
    pub fn run_from(self, index: u32) -> (Subcluster, u32) {
        let (kind, mask) = if self.allocated >> index & 1 == 1 {
            (Subcluster::Data, self.allocated)
        } else if self.zero >> index & 1 == 1 {
            (Subcluster::Zero, self.zero)
        } else {
            (Subcluster::Unallocated, !(self.allocated | self.zero))
        };
        (kind, (mask >> index).trailing_ones().min(SUBCLUSTERS - index))
    }
}
