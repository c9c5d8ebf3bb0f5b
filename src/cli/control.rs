//! Asking a server at its control socket.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use super::Error;
use crate::export::Resized;
use crate::server::control::protocol::{LINE_LEN_MAX, Request, parse_answer};

/// Asks the server at `socket` and waits for what it says, as long as that takes.
pub fn ask(socket: &Path, request: &Request) -> Result<Resized, Error> {
    let fail =
        |what: &str| Error::Control(format!("--control {}: {what}", socket.to_string_lossy().escape_debug()));
    let line = converse(socket, request).map_err(|error| {
        if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) {
            fail("no server is there; start it with nbd-img serve --control PATH")
        } else {
            fail(&error.to_string())
        }
    })?;
    let answer =
        parse_answer(&line).map_err(|why| fail(&format!("what is there answers otherwise: {why}")))?;
    answer.map_err(|text| fail(&text))
}

/// Sends the request and returns the line that comes back, without its end.
fn converse(socket: &Path, request: &Request) -> io::Result<Vec<u8>> {
    let mut stream = UnixStream::connect(socket)?;
    stream.write_all(request.to_line().as_bytes())?;
    let mut line = Vec::new();
    BufReader::new(stream.take(LINE_LEN_MAX as u64 + 1)).read_until(b'\n', &mut line)?;
    if line.pop() == Some(b'\n') {
        return Ok(line);
    }
    Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the server has hung up without a whole answer"))
}
