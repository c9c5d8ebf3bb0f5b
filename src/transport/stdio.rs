//! A client at stdin and stdout, as inetd, ssh and libnbd's `nbd_connect_command` bring one.
//!
//! Mostly both are one socket, which is served as any other. Two pipes are joined to one by two threads that copy:
//! sessions know sockets only, and whoever speaks through pipes has a slower process at the other end.

use std::fs::File;
use std::io::{self, IsTerminal, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::Duration;

use rustix::fs::{FileType, Stat, fstat};
use rustix::stdio::{dup2_stderr, dup2_stdin, dup2_stdout};

use super::inherited::{Arrival, InheritedSocket};
use super::stream::Stream;

/// Copied at a time. Our choice: what the larger pipes and sockets hold.
const COPY_LEN: usize = 256 << 10;

/// What was at stdin and stdout.
#[derive(Debug)]
pub struct Taken {
    /// The client, or where clients come from: inetd's "wait" services get a listening socket.
    pub socket: InheritedSocket,
    /// What carries replies to a pipe.
    pub relay: Option<Relay>,
}

/// Copies what a session sends to a pipe.
#[derive(Debug)]
pub struct Relay(Receiver<()>);

impl Relay {
    /// Waits until all that was sent has been copied, or for so long.
    pub fn finish(self, patience: Duration) {
        // The sender only ever goes away.
        let _ = self.0.recv_timeout(patience);
    }
}

/// Takes over stdin and stdout, in whose places /dev/null stays, so that nothing else that reads or writes there can
/// get into the client's bytes; also stderr, where that is the client's socket too. Connections begin with TLS if
/// `tls_first`.
pub fn take(tls_first: bool) -> io::Result<Taken> {
    let (input, output, errors) = (io::stdin(), io::stdout(), io::stderr());
    if input.is_terminal() || output.is_terminal() {
        return Err(unfit("stdin or stdout is a terminal"));
    }
    let (in_stat, out_stat) = (fstat(&input)?, fstat(&output)?);
    let (incoming, outgoing) = (duplicate(input.as_fd())?, duplicate(output.as_fd())?);
    let null = File::options().read(true).write(true).open("/dev/null")?;
    if same(&fstat(&errors)?, &in_stat) {
        dup2_stderr(&null)?;
    }
    dup2_stdin(&null)?;
    dup2_stdout(&null)?;
    join((incoming, &in_stat), (outgoing, &out_stat), tls_first)
}

fn join(
    (incoming, in_stat): (OwnedFd, &Stat),
    (outgoing, out_stat): (OwnedFd, &Stat),
    tls_first: bool,
) -> io::Result<Taken> {
    let kinds = [in_stat, out_stat].map(|stat| FileType::from_raw_mode(stat.st_mode));
    if kinds[0] == FileType::Socket && (same(in_stat, out_stat) || is_listening(&incoming)) {
        return Ok(Taken { socket: InheritedSocket::of(incoming, tls_first)?, relay: None });
    }
    if kinds.iter().any(|kind| !matches!(kind, FileType::Socket | FileType::Fifo)) {
        return Err(unfit("stdin and stdout are neither a socket nor two pipes"));
    }
    let (here, there) = UnixStream::pair()?;
    let relay = relay(incoming, outgoing, there)?;
    here.set_nonblocking(true)?;
    let arrival = Arrival { stream: Stream::Unix(here), peer: "stdio".to_owned(), tls_first };
    Ok(Taken { socket: InheritedSocket::Connected(arrival), relay: Some(relay) })
}

/// Copies both ways between `socket` and two descriptors, until either side ends.
fn relay(incoming: OwnedFd, outgoing: OwnedFd, socket: UnixStream) -> io::Result<Relay> {
    let (mut from, mut to_session) = (File::from(incoming), socket.try_clone()?);
    thread::Builder::new().name("stdin".to_owned()).spawn(move || {
        // An error is an end as well: the session sees it as one.
        let _ = copy(&mut from, &mut to_session);
        let _ = to_session.shutdown(Shutdown::Write);
    })?;
    let (mut from_session, mut to) = (socket, File::from(outgoing));
    let (done, finished) = channel();
    thread::Builder::new().name("stdout".to_owned()).spawn(move || {
        let _ = copy(&mut from_session, &mut to);
        // Nobody reads any more, or nothing comes any more.
        let _ = from_session.shutdown(Shutdown::Both);
        drop(to);
        drop(done);
    })?;
    Ok(Relay(finished))
}

/// Copies to the end. Not [`io::copy`]: it would use splice(2), which keeps a pipe locked while it waits for a socket,
/// so that the pipe's other end could neither be read nor closed.
fn copy(from: &mut impl Read, to: &mut impl Write) -> io::Result<()> {
    let mut buf = vec![0; COPY_LEN];
    loop {
        match from.read(&mut buf) {
            Ok(0) => return Ok(()),
            Ok(got) => to.write_all(buf.get(..got).unwrap_or_default())?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

fn duplicate(fd: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    fd.try_clone_to_owned()
}

fn same(one: &Stat, other: &Stat) -> bool {
    (one.st_dev, one.st_ino) == (other.st_dev, other.st_ino)
}

fn is_listening(socket: &OwnedFd) -> bool {
    rustix::net::sockopt::socket_acceptconn(socket).unwrap_or(false)
}

fn unfit(what: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidInput,
        format!("{what}; it is for a client that has started the server, by ssh, inetd or libnbd"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{PipeReader, PipeWriter, Read, Write, pipe};

    fn joined(incoming: impl Into<OwnedFd>, outgoing: impl Into<OwnedFd>) -> io::Result<Taken> {
        let (incoming, outgoing) = (incoming.into(), outgoing.into());
        let (in_stat, out_stat) = (fstat(&incoming).unwrap(), fstat(&outgoing).unwrap());
        join((incoming, &in_stat), (outgoing, &out_stat), false)
    }

    /// A session's end, and a client's two.
    fn piped() -> (UnixStream, Relay, PipeWriter, PipeReader) {
        let ((incoming, to), (from, outgoing)) = (pipe().unwrap(), pipe().unwrap());
        let Taken { socket, relay } = joined(incoming, outgoing).unwrap();
        let InheritedSocket::Connected(Arrival { stream: Stream::Unix(session), .. }) = socket else {
            panic!("no connection")
        };
        session.set_nonblocking(false).unwrap();
        (session, relay.unwrap(), to, from)
    }

    #[test]
    fn two_pipes_become_one_connection() {
        let (mut session, relay, mut to, mut from) = piped();
        to.write_all(b"request").unwrap();
        let mut bytes = [0; 7];
        session.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"request");
        session.write_all(b"reply").unwrap();
        // The server ends, and still its last words arrive.
        drop(session);
        relay.finish(Duration::from_secs(60));
        let mut all = Vec::new();
        from.read_to_end(&mut all).unwrap();
        assert_eq!(all, b"reply");
    }

    #[test]
    fn a_client_that_says_no_more_may_still_listen() {
        let (mut session, _relay, to, mut from) = piped();
        drop(to);
        assert_eq!(session.read(&mut [0; 1]).unwrap(), 0);
        session.write_all(b"late").unwrap();
        let mut bytes = [0; 4];
        from.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"late");
    }

    #[test]
    fn a_client_that_does_not_read_any_more_ends_the_session() {
        let (mut session, _relay, _to, from) = piped();
        drop(from);
        // The first write finds out that nobody reads.
        let _ = session.write_all(&[0; 4096]);
        assert_eq!(session.read(&mut [0; 1]).unwrap(), 0);
    }

    #[test]
    fn one_socket_is_served_as_it_is() {
        let (one, _client) = UnixStream::pair().unwrap();
        let taken = joined(one.try_clone().unwrap(), one).unwrap();
        assert!(taken.relay.is_none() && matches!(taken.socket, InheritedSocket::Connected(_)));
    }

    #[test]
    fn files_are_no_clients() {
        let null = || File::open("/dev/null").unwrap();
        let error = joined(null(), null()).unwrap_err().to_string();
        assert!(error.contains("neither a socket nor two pipes"), "{error}");
    }
}
