//! Encoders of replies: simple headers and structured chunks.
//!
//! Each either appends to a buffer (`push_*`) or fills header room that was reserved in front of data that is
//! being read (`*_header`). None allocates beyond the growth of the buffer. What order chunks come in, and that
//! they cover the request, is the session's duty.

use zerocopy::IntoBytes;
use zerocopy::byteorder::big_endian::{U32, U64};

use super::errno::NbdError;
use super::text::protocol_text;
use super::wire::{self, ChunkHeader, OffsetDataHeader, OffsetHoleChunk, SimpleReplyHeader, StatusExtent};

/// Length of a simple reply's header; the data of a READ follows it.
pub const SIMPLE_HEADER_LEN: usize = size_of::<SimpleReplyHeader>();
/// Length of a chunk's header.
pub const CHUNK_HEADER_LEN: usize = size_of::<ChunkHeader>();
/// Room in front of the data of an OFFSET_DATA chunk: chunk header and offset.
pub const OFFSET_DATA_HEADER_LEN: usize = size_of::<OffsetDataHeader>();
/// Length of a whole OFFSET_HOLE chunk.
pub const OFFSET_HOLE_LEN: usize = size_of::<OffsetHoleChunk>();

/// Where a chunk stands in its reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// More chunks of the same reply follow.
    More,
    /// The last one: nothing of this reply can fail any more.
    Last,
}

/// The header of a simple reply.
#[inline]
pub fn simple_header(error: Option<NbdError>, cookie: u64) -> [u8; SIMPLE_HEADER_LEN] {
    let header = SimpleReplyHeader {
        magic: U32::new(wire::SIMPLE_REPLY_MAGIC),
        error: U32::new(error.map_or(0, NbdError::wire)),
        cookie: U64::new(cookie),
    };
    zerocopy::transmute!(header)
}

/// The header of an OFFSET_DATA chunk whose `data_len` bytes, at least one and at most a payload, follow.
/// `offset` is within the export.
#[inline]
pub fn offset_data_header(
    cookie: u64,
    offset: u64,
    data_len: u32,
    place: Place,
) -> [u8; OFFSET_DATA_HEADER_LEN] {
    let header = OffsetDataHeader {
        chunk: chunk_header(wire::REPLY_TYPE_OFFSET_DATA, cookie, data_len.saturating_add(8), place),
        offset: U64::new(offset),
    };
    zerocopy::transmute!(header)
}

/// Appends a simple reply's header.
#[inline]
pub fn push_simple(out: &mut Vec<u8>, error: Option<NbdError>, cookie: u64) {
    out.extend_from_slice(&simple_header(error, cookie));
}

/// Appends a NONE chunk, which always ends its reply.
#[inline]
pub fn push_none(out: &mut Vec<u8>, cookie: u64) {
    push_chunk_header(out, wire::REPLY_TYPE_NONE, cookie, 0, Place::Last);
}

/// Appends success without data: a NONE chunk, or a simple reply.
#[inline]
pub fn push_success(out: &mut Vec<u8>, structured: bool, cookie: u64) {
    if structured { push_none(out, cookie) } else { push_simple(out, None, cookie) }
}

/// A whole OFFSET_HOLE chunk: `hole_len` zeroes, at least one, at `offset` of the export.
#[inline]
pub fn offset_hole(cookie: u64, offset: u64, hole_len: u32, place: Place) -> [u8; OFFSET_HOLE_LEN] {
    let chunk = OffsetHoleChunk {
        chunk: chunk_header(wire::REPLY_TYPE_OFFSET_HOLE, cookie, 12, place),
        offset: U64::new(offset),
        hole_len: U32::new(hole_len),
    };
    zerocopy::transmute!(chunk)
}

/// Appends an OFFSET_HOLE chunk.
#[inline]
pub fn push_offset_hole(out: &mut Vec<u8>, cookie: u64, offset: u64, hole_len: u32, place: Place) {
    out.extend_from_slice(&offset_hole(cookie, offset, hole_len, place));
}

/// Appends a BLOCK_STATUS chunk of one context. `extents` is never empty, and at most
/// [`super::block_status::EXTENTS_MAX`] long.
pub fn push_block_status(
    out: &mut Vec<u8>,
    cookie: u64,
    context: u32,
    extents: &[StatusExtent],
    place: Place,
) {
    let extents = &extents[..extents.len().min(super::block_status::EXTENTS_MAX)];
    let payload_len = u32::try_from(size_of::<U32>() + size_of_val(extents)).unwrap_or(u32::MAX);
    push_chunk_header(out, wire::REPLY_TYPE_BLOCK_STATUS, cookie, payload_len, place);
    out.extend_from_slice(&context.to_be_bytes());
    out.extend_from_slice(extents.as_bytes());
}

/// Appends an ERROR chunk; `text` is cut at the protocol's limit.
pub fn push_error(out: &mut Vec<u8>, cookie: u64, error: NbdError, text: &str, place: Place) {
    push_error_chunk(out, cookie, error, text, None, place);
}

/// Appends an ERROR_OFFSET chunk: the error was met at `offset` of the export, which lies in the request.
pub fn push_error_offset(
    out: &mut Vec<u8>,
    cookie: u64,
    error: NbdError,
    text: &str,
    offset: u64,
    place: Place,
) {
    push_error_chunk(out, cookie, error, text, Some(offset), place);
}

/// Appends the whole reply to a request that failed before any of its content was sent.
pub fn push_failure(out: &mut Vec<u8>, structured: bool, cookie: u64, error: NbdError, text: &str) {
    if structured {
        push_error(out, cookie, error, text, Place::Last);
    } else {
        push_simple(out, Some(error), cookie);
    }
}

fn push_error_chunk(
    out: &mut Vec<u8>,
    cookie: u64,
    error: NbdError,
    text: &str,
    offset: Option<u64>,
    place: Place,
) {
    let text = protocol_text(text);
    // protocol_text keeps the text below 4096 bytes, so neither fallback is ever taken.
    let text_len = u16::try_from(text.len()).unwrap_or(u16::MAX);
    let (chunk_type, offset_len) = match offset {
        Some(_) => (wire::REPLY_TYPE_ERROR_OFFSET, 8),
        None => (wire::REPLY_TYPE_ERROR, 0),
    };
    push_chunk_header(out, chunk_type, cookie, 6 + u32::from(text_len) + offset_len, place);
    out.extend_from_slice(&error.wire().to_be_bytes());
    out.extend_from_slice(&text_len.to_be_bytes());
    out.extend_from_slice(text.as_bytes());
    if let Some(offset) = offset {
        out.extend_from_slice(&offset.to_be_bytes());
    }
}

fn push_chunk_header(out: &mut Vec<u8>, chunk_type: u16, cookie: u64, payload_len: u32, place: Place) {
    out.extend_from_slice(chunk_header(chunk_type, cookie, payload_len, place).as_bytes());
}

fn chunk_header(chunk_type: u16, cookie: u64, payload_len: u32, place: Place) -> ChunkHeader {
    let flags = match place {
        Place::More => 0,
        Place::Last => wire::REPLY_FLAG_DONE,
    };
    ChunkHeader {
        magic: U32::new(wire::STRUCTURED_REPLY_MAGIC),
        flags: flags.into(),
        chunk_type: chunk_type.into(),
        cookie: U64::new(cookie),
        len: U32::new(payload_len),
    }
}
