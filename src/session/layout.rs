//! How a read's reply is laid out: which runs become which chunks, and what stands before each.
//!
//! Pure arithmetic over the runs of a plan; the bytes are put behind the headers elsewhere.

use nbd_img_formats::{Error, ErrorKind, Place, ReadPlan};
use smallvec::SmallVec;

use super::replies::OutBuf;
use crate::nbd::reply::{self, ReplyTo};

/// Shorter runs of zeroes are sent as data: a chunk of their own costs more than they do. The smallest cluster of any
/// format (qcow2), so what is shorter was cut by the request itself.
const HOLE_LEN_MIN: usize = 512;

/// The longest that stands before a chunk's bytes, or instead of them.
pub(super) const CHUNK_HEADER_LEN_MAX: usize = reply::HEAD_LEN_MAX;

/// What a buffer costs beside its bytes: their alignment to a page.
const BUFFER_COST_LEN: u64 = 4096;

/// A run of the reply: its length, and whether it is all zeroes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) len: usize,
    pub(super) zero: bool,
}

impl Run {
    /// Whether it is sent as a chunk without data.
    pub(super) fn is_hole(&self, framing: Framing) -> bool {
        framing == Framing::Chunks && self.zero && self.len >= HOLE_LEN_MIN
    }
}

/// As many in place as a plan has.
pub(super) type Runs = SmallVec<[Run; 4]>;

/// How a reply is framed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Framing {
    /// One header, then all bytes.
    Simple,
    /// Chunks of data and holes.
    Chunks,
    /// One chunk with all bytes (DF).
    OneChunk,
    /// Bytes only: the header has been sent before.
    Bare,
}

/// A chunk of a reply: these runs, from this offset in the request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Chunk {
    pub(super) first_run: usize,
    pub(super) end_run: usize,
    pub(super) at: u64,
    pub(super) len: usize,
    pub(super) hole: bool,
    last: bool,
}

/// The runs of a plan, in order.
pub(super) fn runs_of(plan: &ReadPlan) -> Runs {
    plan.pieces
        .iter()
        .map(|piece| Run {
            len: usize::try_from(piece.len).unwrap_or(usize::MAX),
            zero: matches!(piece.place, Place::Zero { .. }),
        })
        .collect()
}

/// Whether the pieces that have to be waited for are so short that a buffer for each of them costs more
/// than their bytes, as in an image of 512-byte clusters that lie about: memory is counted by the bytes.
pub(super) fn is_crumbs(plan: &ReadPlan) -> bool {
    let awaited = plan.pieces.iter().filter(|piece| !matches!(piece.place, Place::Zero { .. }));
    let (count, len) = awaited.fold((0u64, 0u64), |(count, len), piece| (count + 1, len + piece.len));
    count > 1 && count * BUFFER_COST_LEN > len
}

/// Room that the framed runs take at most.
pub(super) fn framed_len(runs: &[Run], framing: Framing) -> usize {
    let headers = match framing {
        Framing::Simple | Framing::OneChunk => CHUNK_HEADER_LEN_MAX,
        Framing::Chunks => chunks(runs, framing).count() * CHUNK_HEADER_LEN_MAX,
        Framing::Bare => 0,
    };
    let bytes: usize =
        chunks(runs, framing).filter(|chunk| !chunk.hole).fold(0, |sum, chunk| sum.saturating_add(chunk.len));
    bytes.saturating_add(headers)
}

/// Groups runs into the chunks of a reply. Everything but `Chunks` is one chunk.
pub(super) fn chunks(runs: &[Run], framing: Framing) -> impl Iterator<Item = Chunk> + '_ {
    let is_hole = move |run: &Run| run.is_hole(framing);
    let mut next = 0;
    let mut at = 0u64;
    std::iter::from_fn(move || {
        let first = runs.get(next)?;
        let hole = is_hole(first);
        let behind = runs.get(next + 1..).unwrap_or_default();
        let more = if hole { 0 } else { behind.iter().take_while(|run| !is_hole(run)).count() };
        let end_run = next + 1 + more;
        let len = runs.get(next..end_run).unwrap_or_default().iter().map(|run| run.len).sum();
        let chunk = Chunk { first_run: next, end_run, at, len, hole, last: end_run == runs.len() };
        next = end_run;
        at += len as u64;
        Some(chunk)
    })
}

/// Puts what stands before a chunk's bytes (for a hole: all of it); returns whether there was room.
/// `offset` is the client's offset of the first run; `last` whether these runs end the reply.
pub(super) fn put_header(
    out: &mut OutBuf,
    to: ReplyTo,
    offset: u64,
    framing: Framing,
    last: bool,
    chunk: &Chunk,
) -> bool {
    let place = if last && chunk.last { reply::Place::Last } else { reply::Place::More };
    let len = u32::try_from(chunk.len).unwrap_or(u32::MAX);
    match framing {
        Framing::Bare => true,
        Framing::Simple => out.put(&reply::simple(None, to.cookie)),
        Framing::OneChunk | Framing::Chunks if chunk.hole => {
            out.put(&reply::offset_hole(to, offset + chunk.at, len, place))
        }
        Framing::OneChunk | Framing::Chunks => {
            out.put(&reply::offset_data(to, offset + chunk.at, len, place))
        }
    }
}

/// A defect of the session, not of the image: room was promised and is not there.
pub(super) fn no_room() -> Error {
    Error::new(ErrorKind::Io, "the reply did not fit into its buffer; this is a defect of the server")
}

#[cfg(test)]
mod tests {
    use super::*;
    use nbd_img_formats::HostOffset;
    use nbd_img_formats::plan::{Piece, StorageId};

    fn run(len: usize, zero: bool) -> Run {
        Run { len, zero }
    }

    #[test]
    fn chunks_cover_the_runs_and_only_the_last_is_last() {
        let runs = [run(512, false), run(511, true), run(512, true), run(4096, false), run(100, false)];
        let got: Vec<Chunk> = chunks(&runs, Framing::Chunks).collect();
        assert_eq!(
            got.iter().map(|c| (c.at, c.len, c.hole, c.last)).collect::<Vec<_>>(),
            [(0, 1023, false, false), (1023, 512, true, false), (1535, 4196, false, true),]
        );
        for framing in [Framing::Simple, Framing::OneChunk, Framing::Bare] {
            let got: Vec<Chunk> = chunks(&runs, framing).collect();
            assert_eq!(got.len(), 1);
            assert_eq!((got[0].len, got[0].hole, got[0].last), (5731, false, true));
        }
    }

    #[test]
    fn many_short_pieces_are_crumbs_and_few_or_long_ones_are_not() {
        let plan = |lens: &[u64]| {
            let mut plan = ReadPlan::default();
            for (index, len) in lens.iter().enumerate() {
                // Never contiguous.
                let at = HostOffset((index as u64 * 3) << 20);
                plan.pieces.push(Piece {
                    len: *len,
                    place: Place::Data { storage: StorageId(0), at },
                    depth: 1,
                });
            }
            plan
        };
        assert!(!is_crumbs(&plan(&[512])));
        assert!(is_crumbs(&plan(&[512, 512])));
        assert!(is_crumbs(&plan(&[512; 4096])));
        assert!(!is_crumbs(&plan(&[4096; 16])));
        assert!(!is_crumbs(&plan(&[65536, 512])));
    }
}
