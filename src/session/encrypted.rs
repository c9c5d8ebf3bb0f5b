//! What TLS adds to a session's sending and receiving: bytes that are encrypted and not sent, or decrypted and not
//! received.

use std::io;

use tokio::io::Interest;

use super::end::End;
use super::engine::Session;
use crate::transport::Stream;
use crate::transport::tls::TlsStream;

impl Session {
    /// Sends what TLS has encrypted and the socket has not taken yet.
    pub(super) async fn send_encrypted(&mut self) -> Result<(), End> {
        while self.socket.get_ref().tls().is_some_and(TlsStream::wants_send) {
            let push_out = |socket: &Stream| socket.tls().map_or(Ok(()), TlsStream::push_out);
            match self.socket.try_io(Interest::WRITABLE, push_out) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.wait_writable().await?,
                Err(error) => return Err(End::Socket(error)),
            }
        }
        Ok(())
    }

    /// Receives under TLS, without asking first whether the socket is readable: what is decrypted already does not
    /// make it so. Nothing if there is no TLS, or nothing to receive now.
    pub(super) fn receive_decrypted(&mut self) -> Option<Result<usize, End>> {
        self.socket.get_ref().tls()?;
        match self.input.receive(self.socket.get_ref()) {
            Ok(0) => Some(Err(End::Eof)),
            Ok(got) => Some(Ok(got)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => None,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => None,
            Err(error) => Some(Err(End::Socket(error))),
        }
    }
}
