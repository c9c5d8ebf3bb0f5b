//! The one table from the operating system's errors to the protocol's.

use std::fmt;

use super::request::{Command, CommandFlags};

/// An error of the transmission phase, with its wire value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum NbdError {
    /// Not permitted: the export is read-only.
    Eperm = 1,
    /// Input or output failed.
    Eio = 5,
    /// No memory. The protocol asks servers to avoid it.
    Enomem = 12,
    /// The request is wrong.
    Einval = 22,
    /// No space, or beyond the end for a write.
    Enospc = 28,
    /// Too large: only for READ with DF.
    Eoverflow = 75,
    /// Not supported: only for WRITE_ZEROES with FAST_ZERO.
    Enotsup = 95,
    /// The server is going down.
    Eshutdown = 108,
}

impl NbdError {
    /// The value on the wire.
    pub const fn wire(self) -> u32 {
        self as u32
    }

    /// The protocol's error for an `errno` that a request met. EOVERFLOW and ENOTSUP only leave for the commands
    /// that the protocol allows them for; elsewhere, as anything that is not in the table, they become EINVAL.
    pub fn from_os(os_errno: i32, command: Command, flags: CommandFlags) -> Self {
        match os_errno {
            libc::EPERM | libc::EACCES | libc::EROFS => Self::Eperm,
            libc::ENOMEM => Self::Enomem,
            libc::ENOSPC | libc::EDQUOT | libc::EFBIG => Self::Enospc,
            libc::EOVERFLOW if command == Command::Read && flags.contains(CommandFlags::DF) => {
                Self::Eoverflow
            }
            libc::EOPNOTSUPP
                if command == Command::WriteZeroes && flags.contains(CommandFlags::FAST_ZERO) =>
            {
                Self::Enotsup
            }
            libc::ESHUTDOWN => Self::Eshutdown,
            os_errno if is_medium_failure(os_errno) => Self::Eio,
            _ => Self::Einval,
        }
    }

    /// The protocol's error for a range that reaches beyond the end of the export.
    pub fn out_of_bounds(command: Command) -> Self {
        match command {
            Command::Write | Command::WriteZeroes => Self::Enospc,
            Command::Read
            | Command::Disconnect
            | Command::Flush
            | Command::Trim
            | Command::Cache
            | Command::BlockStatus
            | Command::Unknown(_) => Self::Einval,
        }
    }
}

impl fmt::Display for NbdError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Eperm => "EPERM",
            Self::Eio => "EIO",
            Self::Enomem => "ENOMEM",
            Self::Einval => "EINVAL",
            Self::Enospc => "ENOSPC",
            Self::Eoverflow => "EOVERFLOW",
            Self::Enotsup => "ENOTSUP",
            Self::Eshutdown => "ESHUTDOWN",
        })
    }
}

/// Errors by which Linux says that a disk, a file system or the way to it failed. Our choice: the protocol knows
/// only EIO for them, and EINVAL would tell a guest that its request was at fault.
fn is_medium_failure(os_errno: i32) -> bool {
    matches!(
        os_errno,
        libc::EIO
            | libc::ENXIO
            | libc::ENODEV
            | libc::ENODATA
            | libc::ETIME
            | libc::ETIMEDOUT
            | libc::EREMOTEIO
            | libc::EILSEQ
            | libc::EBADMSG
            | libc::EUCLEAN
            | libc::ESTALE
            | libc::ENOLINK
            | libc::ENOMEDIUM
            | libc::EHOSTDOWN
            | libc::EHOSTUNREACH
            | libc::ENETDOWN
            | libc::ENETUNREACH
            | libc::ECONNRESET
            | libc::ECONNABORTED
            | libc::ENOTCONN
            | libc::EPIPE
            | libc::EFAULT
            | libc::EBADF
    )
}
