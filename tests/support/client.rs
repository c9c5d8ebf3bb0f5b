//! An NBD client of our own: blocking, small, and free to misbehave. It shares nothing with the code under test. It
//! checks every reply against the protocol: cookies that it sent, chunks that lie inside the request, do not overlap
//! and cover it, one DONE. Anything else fails the test.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

#[path = "client/partial.rs"]
mod partial;

use partial::Partial;

use super::wire::{self, chunk, command, command_flag, info, option, option_reply};

/// A reply that takes longer hangs.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// What a connection runs on.
pub trait Transport: Read + Write + Send {
    fn set_patience(&self, patience: Option<Duration>) -> io::Result<()>;
    fn duplicate(&self) -> io::Result<Box<dyn Transport>>;
}

impl Transport for UnixStream {
    fn duplicate(&self) -> io::Result<Box<dyn Transport>> {
        Ok(Box::new(self.try_clone()?))
    }

    fn set_patience(&self, patience: Option<Duration>) -> io::Result<()> {
        self.set_read_timeout(patience)?;
        self.set_write_timeout(patience)
    }
}

impl Transport for TcpStream {
    fn duplicate(&self) -> io::Result<Box<dyn Transport>> {
        Ok(Box::new(self.try_clone()?))
    }

    fn set_patience(&self, patience: Option<Duration>) -> io::Result<()> {
        self.set_read_timeout(patience)?;
        self.set_write_timeout(patience)
    }
}

/// What to negotiate.
#[derive(Clone, Copy, Debug)]
pub struct Wishes {
    pub structured: bool,
    pub extended: bool,
    /// Metadata contexts, all of which the server has to have.
    pub contexts: &'static [&'static str],
}

impl Wishes {
    pub const SIMPLE: Self = Self { structured: false, extended: false, contexts: &[] };
    pub const STRUCTURED: Self = Self { structured: true, ..Self::SIMPLE };
    pub const ALLOCATION: Self = Self { contexts: &["base:allocation"], ..Self::STRUCTURED };
    pub const EXTENDED: Self =
        Self { extended: true, contexts: &["base:allocation", "qemu:allocation-depth"], ..Self::SIMPLE };
}

/// A request's header, as it goes over the wire.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    pub flags: u16,
    pub command: u16,
    pub offset: u64,
    pub len: u64,
}

impl Request {
    pub fn new(command: u16, offset: u64, len: usize) -> Self {
        Self { flags: 0, command, offset, len: len as u64 }
    }

    pub fn flags(self, flags: u16) -> Self {
        Self { flags, ..self }
    }

    pub fn bytes(&self, cookie: u64) -> Vec<u8> {
        let mut bytes = wire::REQUEST_MAGIC.to_be_bytes().to_vec();
        bytes.extend(self.flags.to_be_bytes());
        bytes.extend(self.command.to_be_bytes());
        bytes.extend(cookie.to_be_bytes());
        bytes.extend(self.offset.to_be_bytes());
        bytes.extend(u32::try_from(self.len).unwrap().to_be_bytes());
        bytes
    }

    /// The same as an extended header, as it is: a payload has to be in the flags.
    pub fn extended_bytes(&self, cookie: u64) -> Vec<u8> {
        let mut bytes = wire::EXTENDED_REQUEST_MAGIC.to_be_bytes().to_vec();
        bytes.extend(self.flags.to_be_bytes());
        bytes.extend(self.command.to_be_bytes());
        bytes.extend(cookie.to_be_bytes());
        bytes.extend(self.offset.to_be_bytes());
        bytes.extend(self.len.to_be_bytes());
        bytes
    }
}

/// A complete reply.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reply {
    pub cookie: u64,
    /// 0, or the error number on the wire.
    pub error: u32,
    /// The text that came with it, if any.
    pub text: String,
    /// Where a read failed, if it says so.
    pub error_offset: Option<u64>,
    /// What was read.
    pub data: Vec<u8>,
    /// Lengths and states of a block status, by the first context that it tells.
    pub extents: Vec<(u64, u32)>,
    /// The same by all its contexts, with their ids.
    pub contexts: Vec<(u32, Vec<(u64, u32)>)>,
    /// How many chunks the reply had (1 for a simple one).
    pub chunks: usize,
}

/// One connection in transmission.
pub struct Client {
    stream: Box<dyn Transport>,
    structured: bool,
    extended: bool,
    /// The ids of the contexts that were wished for, in that order.
    pub context_ids: Vec<u32>,
    pub size: u64,
    pub flags: u16,
    /// Minimum, preferred and maximum block size, if the server told.
    pub block_sizes: Option<(u32, u32, u32)>,
    next_cookie: u64,
    sent: HashMap<u64, Request>,
    partial: HashMap<u64, Partial>,
}

/// Connects to a Unix socket and reads the server's greeting. Then options can be sent, or bytes of any kind.
pub fn greet(socket: &Path) -> UnixStream {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.set_patience(Some(PATIENCE)).unwrap();
    read_greeting(&mut stream);
    stream
}

pub fn read_greeting(stream: &mut (impl Read + ?Sized)) {
    assert_eq!(read_u64(stream).unwrap(), wire::MAGIC);
    assert_eq!(read_u64(stream).unwrap(), wire::OPTION_MAGIC);
    let flags = read_u16(stream).unwrap();
    assert_eq!(flags & 3, wire::FLAG_FIXED_NEWSTYLE | wire::FLAG_NO_ZEROES);
}

/// One option with its data.
pub fn option_bytes(option: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = wire::OPTION_MAGIC.to_be_bytes().to_vec();
    bytes.extend(option.to_be_bytes());
    bytes.extend(u32::try_from(data.len()).unwrap().to_be_bytes());
    bytes.extend(data);
    bytes
}

/// The data of GO and INFO for `name`, wanting the block sizes.
pub fn go_data(name: &str) -> Vec<u8> {
    let mut data = u32::try_from(name.len()).unwrap().to_be_bytes().to_vec();
    data.extend(name.as_bytes());
    data.extend(1_u16.to_be_bytes());
    data.extend(info::BLOCK_SIZE.to_be_bytes());
    data
}

/// One reply to `option`: its type and data.
pub fn read_option_reply(stream: &mut (impl Read + ?Sized), option: u32) -> io::Result<(u32, Vec<u8>)> {
    assert_eq!(read_u64(stream)?, wire::OPTION_REPLY_MAGIC);
    assert_eq!(read_u32(stream)?, option);
    let kind = read_u32(stream)?;
    let len = read_u32(stream)?;
    assert!(len <= 64 << 10, "an option reply of {len} bytes");
    Ok((kind, read_bytes(stream, len as usize)?))
}

/// Clients that are connected at the same time, one for each thread that an export may have (there are as many as cores),
/// and have read something: each thread has opened what it keeps.
pub fn one_of_each_thread(socket: &Path) -> Vec<Client> {
    let cores = std::thread::available_parallelism().unwrap().get();
    let mut clients: Vec<_> = (0..cores).map(|_| Client::unix(socket, "", Wishes::SIMPLE)).collect();
    for client in &mut clients {
        client.read(0, 512);
    }
    clients
}

impl Client {
    pub fn unix(socket: &Path, export: &str, wishes: Wishes) -> Self {
        let stream = UnixStream::connect(socket).unwrap_or_else(|e| panic!("{}: {e}", socket.display()));
        Self::negotiate(Box::new(stream), export, wishes)
    }

    pub fn tcp(stream: TcpStream, export: &str, wishes: Wishes) -> Self {
        stream.set_nodelay(true).unwrap();
        Self::negotiate(Box::new(stream), export, wishes)
    }

    /// Over a connection that nothing was received on yet.
    pub fn over(stream: Box<dyn Transport>, export: &str, wishes: Wishes) -> Self {
        Self::negotiate(stream, export, wishes)
    }

    fn negotiate(mut stream: Box<dyn Transport>, export: &str, wishes: Wishes) -> Self {
        stream.set_patience(Some(PATIENCE)).unwrap();
        read_greeting(&mut stream);
        let flags = u32::from(wire::FLAG_FIXED_NEWSTYLE | wire::FLAG_NO_ZEROES);
        stream.write_all(&flags.to_be_bytes()).unwrap();
        Self::ask_for(stream, export, wishes)
    }

    /// Goes on behind the client flags, as on a connection that has turned to TLS.
    pub fn ask_for(stream: Box<dyn Transport>, export: &str, wishes: Wishes) -> Self {
        let mut client = Self {
            stream,
            structured: wishes.structured || wishes.extended,
            extended: wishes.extended,
            context_ids: Vec::new(),
            size: 0,
            flags: 0,
            block_sizes: None,
            next_cookie: 1,
            sent: HashMap::new(),
            partial: HashMap::new(),
        };
        if wishes.structured {
            client.stream.write_all(&option_bytes(option::STRUCTURED_REPLY, &[])).unwrap();
            let (kind, _) = read_option_reply(&mut client.stream, option::STRUCTURED_REPLY).unwrap();
            assert_eq!(kind, option_reply::ACK);
        }
        if wishes.extended {
            client.stream.write_all(&option_bytes(option::EXTENDED_HEADERS, &[])).unwrap();
            let (kind, _) = read_option_reply(&mut client.stream, option::EXTENDED_HEADERS).unwrap();
            assert_eq!(kind, option_reply::ACK);
        }
        if !wishes.contexts.is_empty() {
            client.want_contexts(export, wishes.contexts);
        }
        client.go(export);
        client
    }

    fn want_contexts(&mut self, export: &str, contexts: &[&str]) {
        let mut data = u32::try_from(export.len()).unwrap().to_be_bytes().to_vec();
        data.extend(export.as_bytes());
        data.extend(u32::try_from(contexts.len()).unwrap().to_be_bytes());
        for context in contexts {
            data.extend(u32::try_from(context.len()).unwrap().to_be_bytes());
            data.extend(context.as_bytes());
        }
        self.stream.write_all(&option_bytes(option::SET_META_CONTEXT, &data)).unwrap();
        // The order of the answers is the server's.
        let mut granted = HashMap::new();
        for _ in contexts {
            let (kind, data) = read_option_reply(&mut self.stream, option::SET_META_CONTEXT).unwrap();
            assert_eq!(kind, option_reply::META_CONTEXT, "only {granted:?} of {contexts:?} were granted");
            let id = u32::from_be_bytes(data[..4].try_into().unwrap());
            granted.insert(String::from_utf8(data[4..].to_vec()).unwrap(), id);
        }
        self.context_ids = contexts.iter().map(|context| granted[*context]).collect();
        let (kind, _) = read_option_reply(&mut self.stream, option::SET_META_CONTEXT).unwrap();
        assert_eq!(kind, option_reply::ACK);
    }

    fn go(&mut self, export: &str) {
        self.stream.write_all(&option_bytes(option::GO, &go_data(export))).unwrap();
        loop {
            let (kind, data) = read_option_reply(&mut self.stream, option::GO).unwrap();
            if kind == option_reply::ACK {
                break;
            }
            assert_eq!(kind, option_reply::INFO, "GO {export:?}: {}", String::from_utf8_lossy(&data));
            let number = |at: usize| u32::from_be_bytes(data[at..at + 4].try_into().unwrap());
            match u16::from_be_bytes(data[..2].try_into().unwrap()) {
                info::EXPORT => {
                    self.size = u64::from_be_bytes(data[2..10].try_into().unwrap());
                    self.flags = u16::from_be_bytes(data[10..12].try_into().unwrap());
                }
                info::BLOCK_SIZE => self.block_sizes = Some((number(2), number(6), number(10))),
                _ => {}
            }
        }
    }

    pub fn stream(&mut self) -> &mut dyn Transport {
        &mut *self.stream
    }

    /// How many requests have not been answered.
    pub fn in_flight(&self) -> usize {
        self.sent.len()
    }

    /// Sends a request without waiting; gives its cookie.
    pub fn send(&mut self, request: Request, payload: &[u8]) -> io::Result<u64> {
        let cookie = self.register(request);
        let mut bytes = self.header(request, cookie);
        bytes.extend(payload);
        self.stream.write_all(&bytes)?;
        Ok(cookie)
    }

    /// A request's header in the form that was agreed. A write's payload is announced where it has to be.
    pub fn header(&self, request: Request, cookie: u64) -> Vec<u8> {
        if !self.extended {
            return request.bytes(cookie);
        }
        let announced = if request.command == command::WRITE { command_flag::PAYLOAD_LEN } else { 0 };
        request.flags(request.flags | announced).extended_bytes(cookie)
    }

    /// Gives a request a cookie and expects its reply; the caller sends it.
    pub fn register(&mut self, request: Request) -> u64 {
        // Cookies that look like no counter: a server has no business reading anything into them.
        self.next_cookie = self.next_cookie.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(1);
        self.sent.insert(self.next_cookie, request);
        self.next_cookie
    }

    /// The next complete reply, to whichever request.
    pub fn reply(&mut self) -> io::Result<Reply> {
        loop {
            let magic = read_u32(&mut self.stream)?;
            match magic {
                wire::SIMPLE_REPLY_MAGIC => return self.simple_reply(),
                wire::STRUCTURED_REPLY_MAGIC | wire::EXTENDED_REPLY_MAGIC
                    if magic_of(self.extended) != magic =>
                {
                    panic!("a chunk of the form that was not agreed")
                }
                wire::STRUCTURED_REPLY_MAGIC | wire::EXTENDED_REPLY_MAGIC => {
                    if let Some(reply) = self.chunk()? {
                        return Ok(reply);
                    }
                }
                magic => panic!("a reply begins with {magic:#x}: the stream is out of step"),
            }
        }
    }

    /// One request and its reply, with nothing else in flight.
    pub fn ask(&mut self, request: Request, payload: &[u8]) -> Reply {
        let cookie = self.send(request, payload).unwrap();
        let reply = self.reply().unwrap_or_else(|e| panic!("no reply to {request:?}: {e}"));
        assert_eq!(reply.cookie, cookie);
        reply
    }

    #[track_caller]
    pub fn read(&mut self, offset: u64, len: usize) -> Vec<u8> {
        let reply = self.ask(Request::new(command::READ, offset, len), &[]);
        assert_eq!(reply.error, 0, "read of {len} at {offset:#x}: {}", reply.text);
        reply.data
    }

    #[track_caller]
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        let reply = self.ask(Request::new(command::WRITE, offset, data.len()), data);
        assert_eq!(reply.error, 0, "write of {} at {offset:#x}: {}", data.len(), reply.text);
    }

    #[track_caller]
    pub fn flush(&mut self) {
        assert_eq!(self.ask(Request::new(command::FLUSH, 0, 0), &[]).error, 0, "flush");
    }

    /// The whole export, in reads of 1 MiB.
    pub fn read_all(&mut self) -> Vec<u8> {
        let mut content = Vec::new();
        while (content.len() as u64) < self.size {
            let len = (self.size - content.len() as u64).min(1 << 20);
            content.extend(self.read(content.len() as u64, usize::try_from(len).unwrap()));
        }
        content
    }

    /// Says goodbye; the server then closes.
    pub fn disconnect(mut self) {
        let request = Request::new(command::DISC, 0, 0);
        self.stream.write_all(&self.header(request, 0)).unwrap();
        let mut rest = Vec::new();
        self.stream.read_to_end(&mut rest).unwrap();
        assert!(rest.is_empty(), "bytes after the goodbye: {rest:?}");
    }

    fn simple_reply(&mut self) -> io::Result<Reply> {
        assert!(!self.extended, "a simple reply after extended headers were agreed");
        let error = read_u32(&mut self.stream)?;
        let cookie = read_u64(&mut self.stream)?;
        let request = self.answered(cookie);
        assert!(
            !(self.structured && request.command == command::READ && error == 0),
            "a simple reply to a read after structured replies were agreed"
        );
        let mut reply = Reply { cookie, error, chunks: 1, ..Reply::default() };
        if request.command == command::READ && error == 0 {
            reply.data = read_bytes(&mut self.stream, request.len as usize)?;
        }
        Ok(reply)
    }

    #[track_caller]
    fn answered(&mut self, cookie: u64) -> Request {
        self.sent.remove(&cookie).unwrap_or_else(|| panic!("a reply to {cookie:#x}, which was not asked"))
    }

    /// One chunk of a structured reply; the whole reply when it was the last.
    fn chunk(&mut self) -> io::Result<Option<Reply>> {
        assert!(self.structured, "a structured reply that was not agreed");
        let flags = read_u16(&mut self.stream)?;
        let kind = read_u16(&mut self.stream)?;
        let cookie = read_u64(&mut self.stream)?;
        let request = *self.sent.get(&cookie).unwrap_or_else(|| panic!("a chunk for {cookie:#x}, not asked"));
        let len = if self.extended {
            assert_eq!(read_u64(&mut self.stream)?, request.offset, "the offset of {request:?} comes back");
            read_u64(&mut self.stream)?
        } else {
            read_u32(&mut self.stream)?.into()
        };
        assert!(len <= (64 << 20), "a chunk of {len} bytes");
        let body = read_bytes(&mut self.stream, len as usize)?;
        let status = if self.extended { chunk::BLOCK_STATUS } else { chunk::BLOCK_STATUS_EXT };
        assert_ne!(kind, status, "a block status of the other form");
        let partial = self.partial.entry(cookie).or_insert_with(|| Partial::new(cookie, request));
        partial.add(request, kind, &body);
        if flags & chunk::DONE == 0 {
            return Ok(None);
        }
        self.answered(cookie);
        Ok(Some(self.partial.remove(&cookie).unwrap().finish(request)))
    }
}

fn magic_of(extended: bool) -> u32 {
    if extended { wire::EXTENDED_REPLY_MAGIC } else { wire::STRUCTURED_REPLY_MAGIC }
}

/// True for an error that says: the server has closed this connection.
pub fn is_hangup(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, UnexpectedEof};
    matches!(error.kind(), BrokenPipe | ConnectionAborted | ConnectionReset | UnexpectedEof)
}

fn read_bytes(stream: &mut (impl Read + ?Sized), len: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; len];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn read_u16(stream: &mut (impl Read + ?Sized)) -> io::Result<u16> {
    let mut bytes = [0; 2];
    stream.read_exact(&mut bytes).map(|()| u16::from_be_bytes(bytes))
}

fn read_u32(stream: &mut (impl Read + ?Sized)) -> io::Result<u32> {
    let mut bytes = [0; 4];
    stream.read_exact(&mut bytes).map(|()| u32::from_be_bytes(bytes))
}

fn read_u64(stream: &mut (impl Read + ?Sized)) -> io::Result<u64> {
    let mut bytes = [0; 8];
    stream.read_exact(&mut bytes).map(|()| u64::from_be_bytes(bytes))
}
