//! Sockets between virtual machines and their host (vsock(7)), which no network sees.

use std::fs::File;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io;

use rustix::ioctl::{Getter, ioctl, opcode};
use socket2::{Domain, SockAddr, Socket, Type};

use super::listener::BACKLOG;

/// All of this machine's context ids (VMADDR_CID_ANY of vsock(7)).
const CID_ANY: u32 = u32::MAX;
/// From here on ports are free to use (LAST_RESERVED_PORT of the kernel is 1023).
const PORT_FREE_MIN: u32 = 1024;
/// Up to here libnbd takes a port out of a URI; the kernel's own choice (VMADDR_PORT_ANY) is beyond it half the time.
const PORT_URI_MAX: u32 = i32::MAX as u32;
/// How many ports are tried when any will do. Our choice: two thousand million are there.
const PORT_TRIES: u32 = 16;
/// This machine, by loopback (VMADDR_CID_LOCAL).
const CID_LOCAL: u32 = 1;
/// IOCTL_VM_SOCKETS_GET_LOCAL_CID of linux/vm_sockets.h.
const GET_LOCAL_CID: rustix::ioctl::Opcode = opcode::none(7, 0xb9);

/// Listens on a port, by one context id or by all; port 0 takes any free one.
pub fn listen(cid: Option<u32>, port: u32) -> io::Result<Socket> {
    let socket = Socket::new(Domain::VSOCK, Type::STREAM, None).map_err(|error| match error.raw_os_error() {
        Some(libc::EAFNOSUPPORT) => io::Error::new(
            io::ErrorKind::Unsupported,
            "this kernel has no vsock sockets; on a host of virtual machines load the module vhost_vsock, inside of \
             one give it a vsock device",
        ),
        Some(_) | None => error,
    })?;
    bind(&socket, cid.unwrap_or(CID_ANY), port).map_err(|error| explain(error, cid, port))?;
    socket.listen(BACKLOG)?;
    Ok(socket)
}

fn bind(socket: &Socket, cid: u32, port: u32) -> io::Result<()> {
    if port != 0 {
        return socket.bind(&SockAddr::vsock(cid, port));
    }
    let mut result = Ok(());
    for _ in 0..PORT_TRIES {
        result = socket.bind(&SockAddr::vsock(cid, any_port()));
        if !result.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::AddrInUse) {
            break;
        }
    }
    result
}

/// A random one.
fn any_port() -> u32 {
    let random = RandomState::new().build_hasher().finish() % u64::from(PORT_URI_MAX - PORT_FREE_MIN + 1);
    // Below 2^31, so it fits.
    PORT_FREE_MIN + u32::try_from(random).unwrap_or(0)
}

fn explain(error: io::Error, cid: Option<u32>, port: u32) -> io::Error {
    let text = match (error.raw_os_error(), cid) {
        (Some(libc::EADDRNOTAVAIL), Some(cid)) => {
            let own = own_cid().map_or_else(String::new, |own| format!(" (which is {own})"));
            format!("{cid} is not a context id of this machine{own}; vsock:{port} takes any")
        }
        (Some(libc::EADDRINUSE), _) => format!("another program listens on vsock port {port}"),
        (Some(libc::EACCES), _) => {
            format!("vsock port {port} is reserved; ports from 1024 up are free to use")
        }
        (Some(_) | None, _) => return error,
    };
    io::Error::new(error.kind(), text)
}

/// By which context id clients reach what listens on `cid`.
pub fn cid_for_clients(cid: u32) -> u32 {
    // Without a device the kernel knows no other way than loopback.
    if cid == CID_ANY { own_cid().unwrap_or(CID_LOCAL) } else { cid }
}

/// The context id of this machine: 2 on a host, the one that the host has chosen inside of a virtual machine.
fn own_cid() -> Option<u32> {
    let device = File::open("/dev/vsock").ok()?;
    // SAFETY: this request writes one unsigned int through its pointer, and does nothing else.
    let cid = unsafe { ioctl(device, Getter::<GET_LOCAL_CID, u32>::new()) }.ok()?;
    (cid != CID_ANY).then_some(cid)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_are_told_apart() {
        for (errno, cid, hint) in [
            (libc::EADDRNOTAVAIL, Some(77), "77 is not a context id of this machine"),
            (libc::EADDRINUSE, None, "another program listens on vsock port 5"),
            (libc::EACCES, None, "reserved"),
            (libc::EPERM, None, "Operation not permitted"),
        ] {
            let text = explain(io::Error::from_raw_os_error(errno), cid, 5).to_string();
            assert!(text.contains(hint), "{text}");
        }
    }

    #[test]
    fn any_port_is_one_that_uris_can_tell() {
        let ports: Vec<u32> = (0..1000).map(|_| any_port()).collect();
        assert!(ports.iter().all(|port| (1024..=0x7fff_ffff).contains(port)));
        assert!(ports.windows(2).any(|two| two[0] != two[1]));
    }
}
