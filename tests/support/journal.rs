//! What a disk may hold after its server was killed: each client writes its intent down before it sends a request, and
//! what was answered and flushed. All in sectors; what a sector holds tells who wrote it, when and where.

use std::ops::Range;

pub const SECTOR_LEN: usize = 512;

/// Content of a sector: 0 is zeroes, everything else the number of a request.
pub type Value = u64;

/// Fills sectors from `first` on with what the request `value` writes there.
pub fn fill(value: Value, first: usize, bytes: &mut [u8]) {
    for (i, sector) in bytes.chunks_mut(SECTOR_LEN).enumerate() {
        sector.copy_from_slice(&sector_of(value, first + i));
    }
}

fn sector_of(value: Value, sector: usize) -> [u8; SECTOR_LEN] {
    let mut content = [0; SECTOR_LEN];
    if value != 0 {
        for word in content.chunks_mut(16) {
            word[..8].copy_from_slice(&value.to_le_bytes());
            word[8..].copy_from_slice(&(sector as u64).to_le_bytes());
        }
    }
    content
}

/// Whose value a sector of the disk holds; none if it is torn, or was written for another place.
pub fn value_of(content: &[u8], sector: usize) -> Option<Value> {
    let value = Value::from_le_bytes(content[..8].try_into().unwrap());
    (content == sector_of(value, sector)).then_some(value)
}

/// One change that a client intended.
#[derive(Clone, Copy, Debug)]
struct Intent {
    /// Counts all requests of the client.
    request: u64,
    value: Value,
    /// A trim: the sector becomes zeroes or stays as it is.
    may_stay: bool,
}

/// The sectors of one client, from the last that is certain on.
pub struct Journal {
    /// The sectors, by their number on the disk.
    sectors: Vec<usize>,
    /// For each, oldest first; never empty, and the first is never a trim.
    intents: Vec<Vec<Intent>>,
    next_request: u64,
}

impl Journal {
    /// Of `sectors`, which hold `values` (durably) when the server starts.
    pub fn new(sectors: Vec<usize>, values: impl Iterator<Item = Value>) -> Self {
        let intents = values.map(|value| vec![Intent { request: 0, value, may_stay: false }]).collect();
        let journal = Self { sectors, intents, next_request: 1 };
        assert_eq!(journal.sectors.len(), journal.intents.len());
        journal
    }

    pub fn len(&self) -> usize {
        self.sectors.len()
    }

    /// The number on the disk of the sector at `index`.
    pub fn sector(&self, index: usize) -> usize {
        self.sectors[index]
    }

    /// Notes that the sectors at the indices of `range` are about to become `value`, or zeroes or stay for a trim. Gives
    /// the request's number.
    pub fn intend(&mut self, range: Range<usize>, value: Value, may_stay: bool) -> u64 {
        let request = self.next_request;
        self.next_request += 1;
        for intents in &mut self.intents[range] {
            intents.push(Intent { request, value, may_stay });
        }
        request
    }

    /// Notes that everything in `range` up to `request` is durable: a flush was answered that was sent after the replies to
    /// all of them, or the request itself had FUA.
    pub fn settle(&mut self, range: Range<usize>, request: u64) {
        for intents in &mut self.intents[range] {
            let certain = intents.iter().rposition(|intent| intent.request <= request && !intent.may_stay);
            intents.drain(..certain.unwrap_or(0));
        }
    }

    /// The number of the last request.
    pub fn last(&self) -> u64 {
        self.next_request - 1
    }

    /// How many sectors may hold more than one value.
    pub fn open(&self) -> usize {
        self.intents.iter().filter(|intents| intents.len() > 1).count()
    }

    /// The first sector of `disk` that holds what it must not, described.
    pub fn find_fault(&self, disk: &[u8]) -> Option<String> {
        self.sectors.iter().zip(&self.intents).find_map(|(&sector, intents)| {
            let content = &disk[sector * SECTOR_LEN..][..SECTOR_LEN];
            let found = value_of(content, sector);
            let allowed = found.is_some_and(|found| intents.iter().any(|intent| intent.value == found));
            let start = &content[..16];
            (!allowed)
                .then(|| format!("sector {sector} holds {found:x?} ({start:02x?}...), allowed: {intents:x?}"))
        })
    }
}
