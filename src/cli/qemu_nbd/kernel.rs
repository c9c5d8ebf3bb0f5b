//! `--connect` and `--disconnect`: a device of the kernel's NBD client, by generic netlink (the kernel's
//! include/uapi/linux/nbd-netlink.h and genetlink.h).

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;

use socket2::{Domain, Protocol, Socket, Type};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::client::{Dialogue, ExportDetails, Next, Purpose};

/// `NETLINK_GENERIC`.
const NETLINK_GENERIC: i32 = 16;
/// `NLMSG_ERROR`, which also acknowledges.
const NLMSG_ERROR: u16 = 2;
/// `NLM_F_REQUEST | NLM_F_ACK`.
const REQUEST_AND_ACK: u16 = 1 | 4;
/// `GENL_ID_CTRL`, `CTRL_CMD_GETFAMILY`, and its attributes for a family's number and name.
const GENL_ID_CTRL: u16 = 0x10;
const CTRL_CMD_GETFAMILY: u8 = 3;
const CTRL_ATTR_FAMILY_ID: u16 = 1;
const CTRL_ATTR_FAMILY_NAME: u16 = 2;
/// The family of the NBD client, as a C string.
const FAMILY: &[u8] = b"nbd\0";
/// `NBD_CMD_*`.
const NBD_CMD_CONNECT: u8 = 1;
const NBD_CMD_DISCONNECT: u8 = 2;
/// `NBD_ATTR_*`.
const NBD_ATTR_INDEX: u16 = 1;
const NBD_ATTR_SIZE_BYTES: u16 = 2;
const NBD_ATTR_BLOCK_SIZE_BYTES: u16 = 3;
const NBD_ATTR_SERVER_FLAGS: u16 = 5;
const NBD_ATTR_SOCKETS: u16 = 7;
/// `NBD_SOCK_ITEM` and, in it, `NBD_SOCK_FD`.
const NBD_SOCK_ITEM: u16 = 1;
const NBD_SOCK_FD: u16 = 1;
/// `NLA_F_NESTED`.
const NESTED: u16 = 1 << 15;
/// Room for an answer of the kernel. Our choice: a page is more than any has.
const ANSWER_LEN: usize = 8192;
/// Sector size of a device whose server names none.
const SECTOR_LEN: u32 = 512;

/// struct nlmsghdr and struct genlmsghdr behind it.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Header {
    len: u32,
    kind: u16,
    flags: u16,
    sequence: u32,
    port: u32,
    command: u8,
    version: u8,
    reserved: u16,
}

/// struct nlmsghdr and the number of struct nlmsgerr behind it.
#[derive(Clone, Copy, FromBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Failure {
    _header: [u32; 4],
    error: i32,
}

/// struct nlattr.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Attribute {
    len: u16,
    kind: u16,
}

/// A device, found to be one before anything else is done.
#[derive(Debug)]
pub struct Device {
    index: u32,
}

impl Device {
    /// The device at `path`. `action` begins the text of an error.
    pub fn find(path: &Path, action: &str) -> Result<Device, String> {
        let fail = |why: &dyn std::fmt::Display| format!("{action} {}: {why}", path.display());
        let real = fs::canonicalize(path).map_err(|error| fail(&describe(&error)))?;
        OpenOptions::new().read(true).write(true).open(&real).map_err(|error| fail(&describe(&error)))?;
        let name = real.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let index = name.strip_prefix("nbd").and_then(|number| number.parse().ok());
        index
            .map(|index| Device { index })
            .ok_or_else(|| fail(&"not a device of the kernel's NBD client (/dev/nbdN)"))
    }

    /// Has the kernel end what it has connected.
    pub fn disconnect(&self) -> Result<(), String> {
        Netlink::open()?.nbd(NBD_CMD_DISCONNECT, &attribute(NBD_ATTR_INDEX, self.index.as_bytes()))
    }

    /// Hands `stream`, on which `export` was agreed, to the kernel.
    fn connect(&self, stream: &UnixStream, export: &ExportDetails) -> Result<(), String> {
        let block_len = export.blocks.map_or(SECTOR_LEN, |(min, _, _)| min.max(SECTOR_LEN));
        // The kernel keeps the socket; the number is only looked at during the call.
        let fd = attribute(NBD_SOCK_FD, u32::try_from(stream.as_raw_fd()).unwrap_or(u32::MAX).as_bytes());
        let sockets = attribute(NBD_SOCK_ITEM | NESTED, &fd);
        let attributes = [
            attribute(NBD_ATTR_INDEX, self.index.as_bytes()),
            attribute(NBD_ATTR_SIZE_BYTES, export.size.as_bytes()),
            attribute(NBD_ATTR_BLOCK_SIZE_BYTES, u64::from(block_len).as_bytes()),
            attribute(NBD_ATTR_SERVER_FLAGS, u64::from(export.flags).as_bytes()),
            attribute(NBD_ATTR_SOCKETS | NESTED, &sockets),
        ];
        Netlink::open()?.nbd(NBD_CMD_CONNECT, &attributes.concat())
    }
}

/// Becomes the client of the server that will listen at `socket` once `ready` says so, and hands the connection to
/// the kernel. Returns whether it did: a server that does not come to listen says why itself. To be run on a thread of
/// its own; the connection lives on in the kernel.
pub fn attach(device: &Device, socket: &Path, mut ready: File) -> Result<bool, String> {
    let mut line = [0_u8; 1];
    match ready.read(&mut line) {
        Ok(1..) => {}
        Ok(0) | Err(_) => return Ok(false),
    }
    let lost = |error: io::Error| format!("Failed to connect to {}: {error}", socket.display());
    let mut stream = UnixStream::connect(socket).map_err(lost)?;
    let export = agree(&mut stream, lost)?;
    device.connect(&stream, &export).map(|()| true)
}

fn agree(stream: &mut UnixStream, lost: impl Fn(io::Error) -> String) -> Result<ExportDetails, String> {
    use std::io::Write;
    let mut dialogue = Dialogue::new(Purpose::Go, false);
    let (mut input, mut output) = (Vec::new(), Vec::new());
    loop {
        let next = dialogue.step(&mut input, &mut output)?;
        stream.write_all(&output).map_err(&lost)?;
        output.clear();
        if next == Next::Done {
            return dialogue.exports.pop().ok_or_else(|| "the server has no export".to_owned());
        }
        let mut received = [0_u8; 4096];
        match stream.read(&mut received).map_err(&lost)? {
            0 => return Err(lost(io::ErrorKind::UnexpectedEof.into())),
            len => input.extend_from_slice(received.get(..len).unwrap_or_default()),
        }
    }
}

struct Netlink {
    socket: Socket,
}

impl Netlink {
    fn open() -> Result<Netlink, String> {
        let socket =
            Socket::new(Domain::from(libc::AF_NETLINK), Type::RAW, Some(Protocol::from(NETLINK_GENERIC)));
        socket
            .map(|socket| Netlink { socket })
            .map_err(|error| format!("cannot talk to the kernel by netlink: {}", describe(&error)))
    }

    /// Sends a command to the NBD client.
    fn nbd(&self, command: u8, attributes: &[u8]) -> Result<(), String> {
        let missing = |error: io::Error| {
            format!("the kernel has no NBD client (modprobe nbd loads it): {}", describe(&error))
        };
        let name = attribute(CTRL_ATTR_FAMILY_NAME, FAMILY);
        let answer = self.call(GENL_ID_CTRL, CTRL_CMD_GETFAMILY, &name).map_err(missing)?;
        let family = find(&answer, CTRL_ATTR_FAMILY_ID).and_then(|data| u16::read_from_bytes(data).ok());
        let family = family.ok_or("the kernel does not tell the number of its NBD client")?;
        let refused = |error: io::Error| {
            let what = if command == NBD_CMD_CONNECT { "connect" } else { "disconnect" };
            format!("the kernel cannot {what} the device: {}", describe(&error))
        };
        self.call(family, command, attributes).map(drop).map_err(refused)
    }

    /// Sends one message and waits until it is acknowledged; gives the attributes of the answer before that, if any.
    fn call(&self, kind: u16, command: u8, attributes: &[u8]) -> io::Result<Vec<u8>> {
        let len = u32::try_from(size_of::<Header>() + attributes.len()).unwrap_or(u32::MAX);
        let header = Header {
            len,
            kind,
            flags: REQUEST_AND_ACK,
            sequence: 1,
            port: 0,
            command,
            version: 1,
            reserved: 0,
        };
        self.socket.send(&[header.as_bytes(), attributes].concat())?;
        let mut answer = Vec::new();
        loop {
            let mut buffer = [0_u8; ANSWER_LEN];
            let received = (&self.socket).read(&mut buffer)?;
            let mut rest = buffer.get(..received).unwrap_or_default();
            if rest.is_empty() {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            while let Some((message, behind)) = split_message(rest) {
                rest = behind;
                match acknowledged(message) {
                    Some(0) => return Ok(answer),
                    Some(error) => return Err(io::Error::from_raw_os_error(-error)),
                    None => answer = message.get(size_of::<Header>()..).unwrap_or_default().to_vec(),
                }
            }
        }
    }
}

/// The first message of `bytes` and what is behind it.
fn split_message(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (len, _) = u32::read_from_prefix(bytes).ok()?;
    let len = usize::try_from(len).ok().filter(|len| *len >= size_of::<[u32; 4]>())?;
    Some((bytes.get(..len)?, bytes.get(padded(len)..).unwrap_or_default()))
}

/// The number in a message that ends a call.
fn acknowledged(message: &[u8]) -> Option<i32> {
    let kind = u16::read_from_prefix(message.get(4..)?).ok()?.0;
    (kind == NLMSG_ERROR)
        .then(|| Failure::read_from_prefix(message).map_or(-libc::EPROTO, |(failure, _)| failure.error))
}

/// The data of the attribute `kind`.
fn find(mut attributes: &[u8], kind: u16) -> Option<&[u8]> {
    loop {
        let (header, _) = Attribute::read_from_prefix(attributes).ok()?;
        let len = usize::from(header.len);
        let data = attributes.get(size_of::<Attribute>()..len)?;
        if header.kind == kind {
            return Some(data);
        }
        attributes = attributes.get(padded(len)..)?;
    }
}

/// An attribute with its padding.
fn attribute(kind: u16, data: &[u8]) -> Vec<u8> {
    let len = size_of::<Attribute>() + data.len();
    let header = Attribute { len: u16::try_from(len).unwrap_or(u16::MAX), kind };
    let mut bytes = header.as_bytes().to_vec();
    bytes.extend_from_slice(data);
    bytes.resize(padded(len), 0);
    bytes
}

fn padded(len: usize) -> usize {
    len.next_multiple_of(4)
}

/// The error as the C library writes it.
fn describe(error: &io::Error) -> String {
    let text = error.to_string();
    text.split(" (os error").next().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_padded_and_found() {
        let bytes = [attribute(1, &[1]), attribute(2, &[2, 3]), attribute(3, 7_u32.as_bytes())].concat();
        assert_eq!(bytes.len(), 24);
        assert_eq!(find(&bytes, 2), Some([2, 3].as_slice()));
        assert_eq!(find(&bytes, 3), Some(7_u32.as_bytes()));
        assert_eq!((find(&bytes, 4), find(&bytes[..2], 1), find(&[0, 0, 1, 0], 1)), (None, None, None));
    }

    #[test]
    fn answers_are_told_apart() {
        let failure = |error: i32| {
            let header = Header {
                len: 20,
                kind: NLMSG_ERROR,
                flags: 0,
                sequence: 1,
                port: 0,
                command: 0,
                version: 0,
                reserved: 0,
            };
            [&header.as_bytes()[..16], error.as_bytes()].concat()
        };
        let both = [failure(-libc::ENOENT), failure(0)].concat();
        let (first, rest) = split_message(&both).unwrap();
        assert_eq!(acknowledged(first), Some(-libc::ENOENT));
        assert_eq!(acknowledged(rest), Some(0));
        assert!(split_message(&both[..7]).is_none() && split_message(&[0; 16]).is_none());
    }

    #[test]
    fn a_server_that_does_not_come_to_listen_has_no_client() {
        let (ready, listening) = rustix::pipe::pipe().unwrap();
        drop(listening);
        let socket = Path::new("/dev/nbd-does-not-exist");
        assert_eq!(attach(&Device { index: 0 }, socket, File::from(ready)), Ok(false));
    }

    #[test]
    fn what_is_no_device() {
        let error = Device::find(Path::new("/dev/nbd-does-not-exist"), "Cannot open").unwrap_err();
        assert_eq!(error, "Cannot open /dev/nbd-does-not-exist: No such file or directory");
        assert!(Device::find(Path::new("/dev/null"), "Cannot open").unwrap_err().contains("/dev/nbdN"));
    }
}
