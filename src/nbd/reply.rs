//! Encoders of replies, in the three forms that can be agreed: simple, structured and extended.
//!
//! Each either appends to a buffer (`push_*`) or gives a reply's [`Head`], behind which its data is put if it has any.
//! None allocates beyond the growth of the buffer. What order chunks come in, and that they cover the request, is
//! the session's duty.

use std::ops::Deref;

use zerocopy::IntoBytes;
use zerocopy::byteorder::big_endian::{U32, U64};

use super::block_status::{EXTENTS_MAX, Extent};
use super::errno::NbdError;
use super::request::{EXTENDED_REQUEST_HEADER_LEN, REQUEST_HEADER_LEN, Request};
use super::text::protocol_text;
use super::wire::{self, ChunkHeader, ExtendedChunkHeader, SimpleReplyHeader};

/// The longest [`Head`]: an extended chunk header with the offset and the length of a hole.
pub const HEAD_LEN_MAX: usize = size_of::<ExtendedChunkHeader>() + HOLE_LEN;
/// Payload of an OFFSET_HOLE chunk: offset and length.
const HOLE_LEN: usize = size_of::<U64>() + size_of::<U32>();

/// How a session frames its messages. Requests are compact, but for the last.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ReplyForm {
    /// One header, and the data of a READ.
    #[default]
    Simple,
    /// Chunks, with texts and holes.
    Structured,
    /// Chunks with 64-bit lengths, and such requests.
    Extended,
}

impl ReplyForm {
    /// Whether replies come in chunks.
    pub fn is_chunked(self) -> bool {
        match self {
            ReplyForm::Simple => false,
            ReplyForm::Structured | ReplyForm::Extended => true,
        }
    }

    /// Length of a request's header.
    #[inline]
    pub fn request_header_len(self) -> usize {
        match self {
            ReplyForm::Simple | ReplyForm::Structured => REQUEST_HEADER_LEN,
            ReplyForm::Extended => EXTENDED_REQUEST_HEADER_LEN,
        }
    }
}

/// What a reply repeats of its request, and in which form.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReplyTo {
    /// The session's form.
    pub form: ReplyForm,
    /// The request's mark.
    pub cookie: u64,
    /// The request's offset.
    pub offset: u64,
}

impl ReplyTo {
    /// A reply to `request`.
    #[inline]
    pub fn new(form: ReplyForm, request: &Request) -> Self {
        Self { form, cookie: request.cookie, offset: request.offset }
    }
}

/// Where a chunk stands in its reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// More chunks of the same reply follow.
    More,
    /// The last one: nothing of this reply can fail any more.
    Last,
}

/// What stands before the data of a reply, or is all of it.
#[derive(Clone, Copy, Debug)]
pub struct Head {
    bytes: [u8; HEAD_LEN_MAX],
    len: usize,
}

impl Head {
    #[inline]
    fn new(bytes: &[u8]) -> Self {
        Self { bytes: [0; HEAD_LEN_MAX], len: 0 }.with(bytes)
    }

    /// With more bytes behind it; the longest sum is [`HEAD_LEN_MAX`].
    #[inline]
    fn with(mut self, more: &[u8]) -> Self {
        if let Some(room) = self.bytes.get_mut(self.len..self.len + more.len()) {
            room.copy_from_slice(more);
            self.len += more.len();
        }
        self
    }
}

impl Deref for Head {
    type Target = [u8];

    #[inline]
    fn deref(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

/// The header of a simple reply; the data of a READ follows it.
#[inline]
pub fn simple(error: Option<NbdError>, cookie: u64) -> Head {
    let header = SimpleReplyHeader {
        magic: U32::new(wire::SIMPLE_REPLY_MAGIC),
        error: U32::new(error.map_or(0, NbdError::wire)),
        cookie: U64::new(cookie),
    };
    Head::new(header.as_bytes())
}

/// The head of an OFFSET_DATA chunk whose `data_len` bytes, at least one and at most a payload, follow.
/// `offset` is within the export.
#[inline]
pub fn offset_data(to: ReplyTo, offset: u64, data_len: u32, place: Place) -> Head {
    let payload_len = data_len.saturating_add(8);
    chunk(to, wire::REPLY_TYPE_OFFSET_DATA, payload_len, place).with(&offset.to_be_bytes())
}

/// A whole OFFSET_HOLE chunk: `hole_len` zeroes, at least one, at `offset` of the export.
#[inline]
pub fn offset_hole(to: ReplyTo, offset: u64, hole_len: u32, place: Place) -> Head {
    chunk(to, wire::REPLY_TYPE_OFFSET_HOLE, HOLE_LEN as u32, place)
        .with(&offset.to_be_bytes())
        .with(&hole_len.to_be_bytes())
}

/// Success without data: a NONE chunk, or a simple reply.
#[inline]
pub fn success(to: ReplyTo) -> Head {
    if to.form.is_chunked() {
        chunk(to, wire::REPLY_TYPE_NONE, 0, Place::Last)
    } else {
        simple(None, to.cookie)
    }
}

/// Appends the whole reply to a request that failed before any of its content was sent.
pub fn push_failure(out: &mut Vec<u8>, to: ReplyTo, error: NbdError, text: &str) {
    if to.form.is_chunked() {
        push_error(out, to, error, text, Place::Last);
    } else {
        out.extend_from_slice(&simple(Some(error), to.cookie));
    }
}

/// Appends a chunk with the extents of one context: BLOCK_STATUS, or BLOCK_STATUS_EXT with extended headers.
/// `extents` is never empty, at most [`EXTENTS_MAX`] long, and its lengths fit the form.
pub fn push_block_status(out: &mut Vec<u8>, to: ReplyTo, context: u32, extents: &[Extent], place: Place) {
    let extents = &extents[..extents.len().min(EXTENTS_MAX)];
    let count = extents.len() as u32;
    match to.form {
        ReplyForm::Simple | ReplyForm::Structured => {
            let payload_len = 4 + 8 * count;
            out.extend_from_slice(&chunk(to, wire::REPLY_TYPE_BLOCK_STATUS, payload_len, place));
            out.extend_from_slice(&context.to_be_bytes());
            for extent in extents {
                // The builder keeps extents below 4 GiB where they have to be.
                let len = U32::new(u32::try_from(extent.len).unwrap_or(u32::MAX));
                let extent = wire::StatusExtent { len, flags: U32::new(extent.flags) };
                out.extend_from_slice(extent.as_bytes());
            }
        }
        ReplyForm::Extended => {
            let payload_len = 8 + 16 * count;
            out.extend_from_slice(&chunk(to, wire::REPLY_TYPE_BLOCK_STATUS_EXT, payload_len, place));
            out.extend_from_slice(&context.to_be_bytes());
            out.extend_from_slice(&count.to_be_bytes());
            for extent in extents {
                let flags = U64::new(extent.flags.into());
                let extent = wire::ExtendedExtent { len: U64::new(extent.len), flags };
                out.extend_from_slice(extent.as_bytes());
            }
        }
    }
}

/// Appends an ERROR chunk; `text` is cut at the protocol's limit.
pub fn push_error(out: &mut Vec<u8>, to: ReplyTo, error: NbdError, text: &str, place: Place) {
    push_error_chunk(out, to, error, text, None, place);
}

/// Appends an ERROR_OFFSET chunk: the error was met at `offset` of the export, which lies in the request.
pub fn push_error_offset(
    out: &mut Vec<u8>,
    to: ReplyTo,
    error: NbdError,
    text: &str,
    offset: u64,
    place: Place,
) {
    push_error_chunk(out, to, error, text, Some(offset), place);
}

fn push_error_chunk(
    out: &mut Vec<u8>,
    to: ReplyTo,
    error: NbdError,
    text: &str,
    offset: Option<u64>,
    place: Place,
) {
    let text = protocol_text(text);
    // protocol_text keeps the text below 4096 bytes, so the fallback is never taken.
    let text_len = u16::try_from(text.len()).unwrap_or(u16::MAX);
    let (chunk_type, offset_len) = match offset {
        Some(_) => (wire::REPLY_TYPE_ERROR_OFFSET, 8),
        None => (wire::REPLY_TYPE_ERROR, 0),
    };
    out.extend_from_slice(&chunk(to, chunk_type, 6 + u32::from(text_len) + offset_len, place));
    out.extend_from_slice(&error.wire().to_be_bytes());
    out.extend_from_slice(&text_len.to_be_bytes());
    out.extend_from_slice(text.as_bytes());
    if let Some(offset) = offset {
        out.extend_from_slice(&offset.to_be_bytes());
    }
}

#[inline]
fn chunk(to: ReplyTo, chunk_type: u16, payload_len: u32, place: Place) -> Head {
    let flags = match place {
        Place::More => 0,
        Place::Last => wire::REPLY_FLAG_DONE,
    };
    match to.form {
        ReplyForm::Simple | ReplyForm::Structured => {
            let header = ChunkHeader {
                magic: U32::new(wire::STRUCTURED_REPLY_MAGIC),
                flags: flags.into(),
                chunk_type: chunk_type.into(),
                cookie: U64::new(to.cookie),
                len: U32::new(payload_len),
            };
            Head::new(header.as_bytes())
        }
        ReplyForm::Extended => {
            let header = ExtendedChunkHeader {
                magic: U32::new(wire::EXTENDED_REPLY_MAGIC),
                flags: flags.into(),
                chunk_type: chunk_type.into(),
                cookie: U64::new(to.cookie),
                offset: U64::new(to.offset),
                len: U64::new(payload_len.into()),
            };
            Head::new(header.as_bytes())
        }
    }
}
