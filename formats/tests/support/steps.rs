//! Sequences of operations on a [`Scene`], and carrying them out.

use nbd_img_formats::{BlockDriver, Durability, GuestRange, Provision, Result, ZeroRequest};

use super::random::Random;
use super::scene::{CLUSTER, SIZE};
use super::session;
use super::units::{UNIT_LEN, Writer, painted};

/// A kind of operation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// One whole cluster, or a few.
    WriteCluster,
    /// Less than a cluster, or parts of two.
    WritePart,
    /// Part of a compressed cluster.
    OverwriteCompressed,
    Zero,
    ZeroUnmap,
    ZeroAllocate,
    Discard,
    Flush,
    FuaWrite,
    /// Into what a snapshot shares.
    WriteShared,
    /// Where there is no L2 table yet: the L1 table gets an entry. (It never gets longer: it is as long as
    /// the disk needs from the beginning.)
    NewTable,
    /// So many clusters that new refcount blocks are needed.
    Grow,
}

/// All kinds.
pub const KINDS: [Kind; 12] = [
    Kind::WriteCluster,
    Kind::WritePart,
    Kind::OverwriteCompressed,
    Kind::Zero,
    Kind::ZeroUnmap,
    Kind::ZeroAllocate,
    Kind::Discard,
    Kind::Flush,
    Kind::FuaWrite,
    Kind::WriteShared,
    Kind::NewTable,
    Kind::Grow,
];

/// Every sequence of one, two and three kinds.
pub fn sequences() -> Vec<Vec<Kind>> {
    let ones: Vec<_> = KINDS.iter().map(|kind| vec![*kind]).collect();
    let longer = |shorter: &[Vec<Kind>]| -> Vec<Vec<Kind>> {
        let with = |first: &Vec<Kind>| KINDS.map(|kind| [first.as_slice(), &[kind]].concat());
        shorter.iter().flat_map(with).collect()
    };
    let twos = longer(&ones);
    let threes = longer(&twos);
    [ones, twos, threes].concat()
}

/// Clusters at which something changes, so that a few operations meet.
const INTERESTING: [u64; 12] = [2, 3, 16, 17, 24, 27, 28, 31, 40, 41, 70, 130];

/// What a step does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Action {
    Write(Durability),
    Zero(Provision),
    Discard,
    Flush,
}

/// One operation.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    pub action: Action,
    pub at: u64,
    pub len: u64,
    /// In the two ways in which a session or a worker writes.
    pub by_plan: bool,
}

impl Step {
    /// A step of this kind, somewhere.
    pub fn random(kind: Kind, random: &mut Random) -> Step {
        let write = Action::Write(Durability::Later);
        let unit = UNIT_LEN as u64;
        let cluster = random.pick(&INTERESTING) * CLUSTER;
        let (clusters_at, clusters_len) = (cluster, (1 + random.below(3)) * CLUSTER);
        let inside = random.below(CLUSTER / unit) * unit;
        let part = (cluster + inside, (1 + random.below(8)) * unit);
        let (action, (at, len)) = match kind {
            Kind::WriteCluster => (write, (clusters_at, clusters_len)),
            Kind::WritePart => (write, part),
            Kind::OverwriteCompressed => (write, ((16 + random.below(3)) * CLUSTER + inside, part.1)),
            Kind::Zero => {
                (Action::Zero(Provision::Keep), zero_range(random, clusters_at, clusters_len, part))
            }
            Kind::ZeroUnmap => {
                (Action::Zero(Provision::Unmap), zero_range(random, clusters_at, clusters_len, part))
            }
            Kind::ZeroAllocate => {
                (Action::Zero(Provision::Allocate), zero_range(random, clusters_at, clusters_len, part))
            }
            Kind::Discard => (Action::Discard, (clusters_at, clusters_len * (1 + random.below(8)))),
            Kind::Flush => (Action::Flush, (0, 0)),
            Kind::FuaWrite if random.below(2) == 0 => (Action::Write(Durability::Fua), part),
            Kind::FuaWrite => (Action::Write(Durability::Fua), (clusters_at, CLUSTER)),
            Kind::WriteShared => (write, ((64 + random.below(5)) * CLUSTER + inside, part.1)),
            Kind::NewTable => (write, ((128 + random.below(60)) * CLUSTER + inside, part.1)),
            Kind::Grow => {
                let from = if random.below(2) == 0 { 128 } else { 32 };
                (write, (from * CLUSTER, (20 + random.below(45)) * CLUSTER))
            }
        };
        Step { action, at, len: len.min(SIZE - at), by_plan: random.below(2) == 0 }
    }

    /// The numbers of the units in its range.
    pub fn units(&self) -> std::ops::Range<usize> {
        let from = self.at as usize / UNIT_LEN;
        from..from + self.len as usize / UNIT_LEN
    }

    /// Whether it changes something that the L2 table with this number maps, which are of `span` bytes.
    pub fn touches(&self, table: usize, span: u64) -> bool {
        let (from, to) = (self.at / span, (self.at + self.len).div_ceil(span));
        self.action != Action::Flush && (from..to).contains(&(table as u64))
    }

    /// Whether it is durable on return.
    pub fn is_fua(&self) -> bool {
        self.action == Action::Write(Durability::Fua)
    }

    /// Does it as the operation `writer`.
    pub fn carry_out(&self, driver: &dyn BlockDriver, writer: Writer) -> Result<()> {
        let range = GuestRange::new(self.at, self.len).unwrap();
        match self.action {
            Action::Write(durability) => {
                let bytes = painted(self.at, self.len, writer);
                if self.by_plan {
                    session::write(driver, self.at, &bytes, durability)
                } else {
                    driver.pwrite(self.at, &bytes, durability)
                }
            }
            Action::Zero(provision) => {
                let request = ZeroRequest { provision, fast: false, durability: Durability::Later };
                if self.by_plan {
                    session::zero(driver, range, request)
                } else {
                    driver.write_zeroes(range, request)
                }
            }
            Action::Discard if self.by_plan => session::discard(driver, range, Durability::Later),
            Action::Discard => driver.discard(range, Durability::Later),
            // What the one before has left for later is done first: the steps between have it pending.
            Action::Flush if self.by_plan => {
                driver.tidy();
                driver.make_durable()
            }
            Action::Flush => driver.flush(),
        }
    }
}

fn zero_range(random: &mut Random, at: u64, len: u64, part: (u64, u64)) -> (u64, u64) {
    match random.below(4) {
        0 => part,
        // Begins and ends inside of clusters, with whole ones between.
        1 => (at + UNIT_LEN as u64, len + CLUSTER),
        _ => (at, len),
    }
}

/// All bytes of the disk as the driver reads them.
pub fn read_all(driver: &dyn BlockDriver) -> Result<Vec<u8>> {
    let mut content = vec![0; driver.size() as usize];
    driver.pread(0, &mut content)?;
    Ok(content)
}
