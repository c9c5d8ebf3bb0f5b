//! The one error type of the crate: a kind for programs, a path, an offset and a source for people.
//!
//! A format adds texts here, never variants: what a caller can do about an error is the same for all.

use std::borrow::Cow;
use std::error::Error as StdError;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// `Result` with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// What went wrong, as far as a program has to tell it apart.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The operating system refused; the errno says how.
    Io,
    /// Not an image of the format it was opened as.
    InvalidFormat,
    /// A valid image that uses what this program does not have.
    Unsupported,
    /// The image contradicts itself.
    Corrupt,
    /// The range reaches beyond the end of the guest's disk.
    OutOfBounds,
    /// A write to an image that was opened read-only.
    ReadOnly,
    /// No room: the file system, the device or the quota is full.
    NoSpace,
    /// Somebody else holds the image.
    Locked,
    /// The operator's policy does not allow it (a backing file elsewhere, a probed format, ...).
    Denied,
    /// The caller asked for something that makes no sense.
    InvalidInput,
    /// A zeroing that was asked to be fast would be slow; nothing was changed.
    WouldBeSlow,
    /// An earlier failure has made the image unwritable for good.
    Failed,
}

/// An error, with what is needed to find its cause.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    what: Cow<'static, str>,
    path: Option<PathBuf>,
    offset: Option<u64>,
    source: Option<Box<dyn StdError + Send + Sync>>,
    errno: Option<i32>,
}

impl Error {
    /// An error of `kind`; `what` is one clause that says what was wrong and, where a flag helps, which.
    pub fn new(kind: ErrorKind, what: impl Into<Cow<'static, str>>) -> Self {
        Error { kind, what: what.into(), path: None, offset: None, source: None, errno: None }
    }

    /// An error of the operating system while doing `what`. Its errno is kept; a lack of space gets
    /// its own kind.
    pub fn io(what: impl Into<Cow<'static, str>>, source: io::Error) -> Self {
        let errno = source.raw_os_error();
        let kind = match errno {
            Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG) => ErrorKind::NoSpace,
            Some(libc::EROFS) => ErrorKind::ReadOnly,
            _ => ErrorKind::Io,
        };
        Error { errno, source: Some(Box::new(source)), ..Error::new(kind, what) }
    }

    /// The same error, saying which file it is about.
    #[must_use]
    pub fn with_path(mut self, path: impl AsRef<Path>) -> Self {
        self.path.get_or_insert_with(|| path.as_ref().to_owned());
        self
    }

    /// The same error, saying at which byte offset (of the file, or of the disk: `what` tells).
    #[must_use]
    pub fn with_offset(mut self, offset: u64) -> Self {
        self.offset.get_or_insert(offset);
        self
    }

    /// The same error with the error that caused it.
    #[must_use]
    pub fn with_source(mut self, source: impl StdError + Send + Sync + 'static) -> Self {
        self.source = Some(Box::new(source));
        self
    }

    /// What kind of error it is.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The file it is about, if one is known.
    pub fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }

    /// The offset it is about, if one is known.
    pub fn offset(&self) -> Option<u64> {
        self.offset
    }

    /// The same error, for somebody else who waits for the same thing.
    #[must_use]
    pub fn again(&self) -> Self {
        Error {
            kind: self.kind,
            what: self.what.clone(),
            path: self.path.clone(),
            offset: self.offset,
            source: self.source.as_ref().map(|source| source.to_string().into()),
            errno: self.errno,
        }
    }

    /// The errno that a system call would have failed with. Never 0.
    pub fn errno(&self) -> i32 {
        if let Some(errno) = self.errno {
            return errno;
        }
        match self.kind {
            ErrorKind::Io | ErrorKind::Corrupt | ErrorKind::InvalidFormat | ErrorKind::Failed => libc::EIO,
            ErrorKind::Unsupported => libc::ENOSYS,
            ErrorKind::OutOfBounds | ErrorKind::InvalidInput => libc::EINVAL,
            ErrorKind::ReadOnly => libc::EROFS,
            ErrorKind::NoSpace => libc::ENOSPC,
            ErrorKind::Locked => libc::EAGAIN,
            ErrorKind::Denied => libc::EPERM,
            ErrorKind::WouldBeSlow => libc::EOPNOTSUPP,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(path) = &self.path {
            write!(f, "{}: ", path.to_string_lossy().escape_debug())?;
        }
        f.write_str(&self.what)?;
        if let Some(offset) = self.offset {
            write!(f, " (at offset {offset:#x})")?;
        }
        match &self.source {
            Some(source) => write!(f, ": {source}"),
            None => Ok(()),
        }
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        // `Display` already ends with the source's own text, so a reporter that walks the chain
        // starts below it.
        self.source.as_deref().and_then(|source| source.source())
    }
}
