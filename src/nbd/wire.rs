//! Numbers and layouts of the NBD protocol, by the protocol's own names (doc/proto.md of the reference
//! implementation, with its extended-header extension). No logic lives here.

use zerocopy::byteorder::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// TCP port that IANA gave to NBD.
pub const DEFAULT_PORT: u16 = 10_809;

/// First eight bytes of the greeting.
pub const NBDMAGIC: u64 = 0x4e42_444d_4147_4943;
/// Second magic of the newstyle greeting, and first field of each option.
pub const IHAVEOPT: u64 = 0x4948_4156_454f_5054;
/// Second magic of the oldstyle greeting (`cliserv_magic`).
pub const CLISERV_MAGIC: u64 = 0x0000_4202_8186_1253;
/// First field of each option reply.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// First field of a compact request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// First field of a simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// First field of a structured reply chunk.
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
/// First field of an extended request, which takes the place of the compact one once extended headers are agreed.
pub const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
/// First field of an extended reply.
pub const EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;

/// Handshake flag: options other than EXPORT_NAME, and replies to them.
pub const FLAG_FIXED_NEWSTYLE: u16 = 1 << 0;
/// Handshake flag: the client may ask to leave out the zeroes after EXPORT_NAME.
pub const FLAG_NO_ZEROES: u16 = 1 << 1;
/// Client's answer to [`FLAG_FIXED_NEWSTYLE`].
pub const FLAG_C_FIXED_NEWSTYLE: u32 = 1 << 0;
/// Client's answer to [`FLAG_NO_ZEROES`].
pub const FLAG_C_NO_ZEROES: u32 = 1 << 1;

/// Zeroes that follow the answer to EXPORT_NAME unless both sides agreed to leave them out, and always the oldstyle
/// greeting.
pub const EXPORT_NAME_ZEROES_LEN: usize = 124;

/// Longest string of the protocol (names, descriptions, error texts) in bytes.
pub const STRING_MAX_LEN: usize = 4096;

/// Choose an export; answered without a reply header.
pub const OPT_EXPORT_NAME: u32 = 1;
/// End the negotiation.
pub const OPT_ABORT: u32 = 2;
/// List the exports.
pub const OPT_LIST: u32 = 3;
/// Turn the connection into TLS.
pub const OPT_STARTTLS: u32 = 5;
/// Ask about an export.
pub const OPT_INFO: u32 = 6;
/// Choose an export and start transmission.
pub const OPT_GO: u32 = 7;
/// Agree on structured replies.
pub const OPT_STRUCTURED_REPLY: u32 = 8;
/// List the metadata contexts of an export.
pub const OPT_LIST_META_CONTEXT: u32 = 9;
/// Select metadata contexts of an export.
pub const OPT_SET_META_CONTEXT: u32 = 10;
/// Agree on extended headers.
pub const OPT_EXTENDED_HEADERS: u32 = 11;

/// The option is done.
pub const REP_ACK: u32 = 1;
/// One export of a list.
pub const REP_SERVER: u32 = 2;
/// One piece of information on an export.
pub const REP_INFO: u32 = 3;
/// One metadata context.
pub const REP_META_CONTEXT: u32 = 4;
/// Bit that tells errors from other option replies.
pub const REP_FLAG_ERROR: u32 = 1 << 31;
/// The option is not known to this server.
pub const REP_ERR_UNSUP: u32 = REP_FLAG_ERROR | 1;
/// The option is known, but forbidden.
pub const REP_ERR_POLICY: u32 = REP_FLAG_ERROR | 2;
/// The option's data, or its moment, is wrong.
pub const REP_ERR_INVALID: u32 = REP_FLAG_ERROR | 3;
/// The option is not supported on this platform, or in this build.
pub const REP_ERR_PLATFORM: u32 = REP_FLAG_ERROR | 4;
/// The option needs TLS first.
pub const REP_ERR_TLS_REQD: u32 = REP_FLAG_ERROR | 5;
/// There is no such export.
pub const REP_ERR_UNKNOWN: u32 = REP_FLAG_ERROR | 6;
/// The server is going down.
pub const REP_ERR_SHUTDOWN: u32 = REP_FLAG_ERROR | 7;
/// The client has to ask for block sizes.
pub const REP_ERR_BLOCK_SIZE_REQD: u32 = REP_FLAG_ERROR | 8;
/// The option asks for more than the server gives.
pub const REP_ERR_TOO_BIG: u32 = REP_FLAG_ERROR | 9;
/// The option does not go with extended headers.
pub const REP_ERR_EXT_HEADER_REQD: u32 = REP_FLAG_ERROR | 10;

/// Info: size and transmission flags.
pub const INFO_EXPORT: u16 = 0;
/// Info: canonical name.
pub const INFO_NAME: u16 = 1;
/// Info: description.
pub const INFO_DESCRIPTION: u16 = 2;
/// Info: block sizes.
pub const INFO_BLOCK_SIZE: u16 = 3;

/// Payload limit that a client may count on when no sizes were agreed, and the one we advertise: 32 MiB.
pub const DEFAULT_PAYLOAD_MAX_LEN: u32 = 32 * 1024 * 1024;

/// Request: read data.
pub const CMD_READ: u16 = 0;
/// Request: write data.
pub const CMD_WRITE: u16 = 1;
/// Request: end the session; has no reply.
pub const CMD_DISC: u16 = 2;
/// Request: make completed writes durable.
pub const CMD_FLUSH: u16 = 3;
/// Request: the content is no longer needed.
pub const CMD_TRIM: u16 = 4;
/// Request: read ahead.
pub const CMD_CACHE: u16 = 5;
/// Request: write zeroes without a payload.
pub const CMD_WRITE_ZEROES: u16 = 6;
/// Request: extents of the agreed metadata contexts.
pub const CMD_BLOCK_STATUS: u16 = 7;

/// Chunk flag: last chunk of this reply.
pub const REPLY_FLAG_DONE: u16 = 1 << 0;
/// Chunk: nothing to say; always the last.
pub const REPLY_TYPE_NONE: u16 = 0;
/// Chunk: data at an offset.
pub const REPLY_TYPE_OFFSET_DATA: u16 = 1;
/// Chunk: zeroes at an offset.
pub const REPLY_TYPE_OFFSET_HOLE: u16 = 2;
/// Chunk: extents of one metadata context.
pub const REPLY_TYPE_BLOCK_STATUS: u16 = 5;
/// Chunk: extents of one metadata context, in 64 bits; only with extended headers, and then the only kind.
pub const REPLY_TYPE_BLOCK_STATUS_EXT: u16 = 6;
/// Chunk: an error.
pub const REPLY_TYPE_ERROR: u16 = (1 << 15) | 1;
/// Chunk: an error at an offset.
pub const REPLY_TYPE_ERROR_OFFSET: u16 = (1 << 15) | 2;

/// Name of the context that tells holes and zeroes.
pub const BASE_ALLOCATION: &str = "base:allocation";
/// `base:allocation`: nothing is stored here.
pub const STATE_HOLE: u32 = 1 << 0;
/// `base:allocation`: reads as zeroes.
pub const STATE_ZERO: u32 = 1 << 1;
/// Name of the context that tells in which image of the backing chain a run lies.
pub const ALLOCATION_DEPTH: &str = "qemu:allocation-depth";
/// Start of the names of the contexts that tell a dirty bitmap; the bitmap's name follows.
pub const DIRTY_BITMAP_PREFIX: &str = "qemu:dirty-bitmap:";
/// `qemu:dirty-bitmap:`: the run is marked.
pub const STATE_DIRTY: u32 = 1 << 0;

/// The greeting.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Greeting {
    /// [`NBDMAGIC`].
    pub init_passwd: U64,
    /// [`IHAVEOPT`].
    pub magic: U64,
    /// Handshake flags.
    pub flags: U16,
}

/// The oldstyle greeting, in front of its zeroes.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct OldstyleGreeting {
    /// [`NBDMAGIC`].
    pub init_passwd: U64,
    /// [`CLISERV_MAGIC`].
    pub magic: U64,
    /// Length of the export in bytes.
    pub size: U64,
    /// Transmission flags in the lower half; the upper is for handshake flags, of which oldstyle has none.
    pub flags: U32,
}

/// Header of an option.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct OptionHeader {
    /// [`IHAVEOPT`].
    pub magic: U64,
    /// `OPT_*`.
    pub option: U32,
    /// Length of the data behind it.
    pub len: U32,
}

/// Header of an option reply.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct OptionReplyHeader {
    /// [`OPTION_REPLY_MAGIC`].
    pub magic: U64,
    /// The option that is answered.
    pub option: U32,
    /// `REP_*`.
    pub reply_type: U32,
    /// Length of the data behind it.
    pub len: U32,
}

/// Compact request header.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RequestHeader {
    /// [`REQUEST_MAGIC`].
    pub magic: U32,
    /// Command flags.
    pub flags: U16,
    /// `CMD_*`.
    pub command: U16,
    /// The client's mark for the reply.
    pub cookie: U64,
    /// Where, in the export.
    pub offset: U64,
    /// How much.
    pub len: U32,
}

/// Extended request header.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ExtendedRequestHeader {
    /// [`EXTENDED_REQUEST_MAGIC`].
    pub magic: U32,
    /// Command flags.
    pub flags: U16,
    /// `CMD_*`.
    pub command: U16,
    /// The client's mark for the reply.
    pub cookie: U64,
    /// Where, in the export.
    pub offset: U64,
    /// Length of the payload behind it if the flags say so, else how much.
    pub len: U64,
}

/// Header of a simple reply.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct SimpleReplyHeader {
    /// [`SIMPLE_REPLY_MAGIC`].
    pub magic: U32,
    /// 0 or an error.
    pub error: U32,
    /// The request's cookie.
    pub cookie: U64,
}

/// Header of a structured reply chunk.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ChunkHeader {
    /// [`STRUCTURED_REPLY_MAGIC`].
    pub magic: U32,
    /// `REPLY_FLAG_*`.
    pub flags: U16,
    /// `REPLY_TYPE_*`.
    pub chunk_type: U16,
    /// The request's cookie.
    pub cookie: U64,
    /// Length of the payload behind it.
    pub len: U32,
}

/// Header of an extended reply chunk.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ExtendedChunkHeader {
    /// [`EXTENDED_REPLY_MAGIC`].
    pub magic: U32,
    /// `REPLY_FLAG_*`.
    pub flags: U16,
    /// `REPLY_TYPE_*`.
    pub chunk_type: U16,
    /// The request's cookie.
    pub cookie: U64,
    /// The request's offset, whatever the chunk is about.
    pub offset: U64,
    /// Length of the payload behind it.
    pub len: U64,
}

/// One extent of a BLOCK_STATUS chunk.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct StatusExtent {
    /// Length of the extent.
    pub len: U32,
    /// Flags, by the context.
    pub flags: U32,
}

/// One extent of a BLOCK_STATUS_EXT chunk.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ExtendedExtent {
    /// Length of the extent.
    pub len: U64,
    /// Flags, by the context; the upper half is zero for contexts of 32 bits.
    pub flags: U64,
}
