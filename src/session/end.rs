//! Why sessions end, and what the log says of it.

use std::io;

use nbd_img_formats::Error;

/// Why a session ended.
#[derive(Debug)]
pub enum End {
    /// The client said so.
    Disconnect,
    /// The server is shutting down.
    Drained,
    /// The client has gone without a word.
    Eof,
    /// The socket failed.
    Socket(io::Error),
    /// What the client sent is not a request.
    BadMagic,
    /// A refused write whose payload is too long to be read for nothing.
    Oversize,
    /// A request was left unfinished for too long.
    Stalled,
    /// A read failed after its reply had begun; only closing tells the client.
    BrokenReply(Error),
}

impl End {
    /// Whether what the client still sends is answered (with an error) while its last requests are worked on.
    pub(super) fn answers_requests(&self) -> bool {
        match self {
            End::Drained => true,
            End::Disconnect
            | End::Eof
            | End::Socket(_)
            | End::BadMagic
            | End::Oversize
            | End::Stalled
            | End::BrokenReply(_) => false,
        }
    }

    /// Whether it was the server that ended the connection, with replies that may still be on their way.
    pub(super) fn is_the_servers(&self) -> bool {
        match self {
            End::Drained | End::BadMagic | End::Oversize | End::BrokenReply(_) => true,
            End::Disconnect | End::Eof | End::Socket(_) | End::Stalled => false,
        }
    }

    /// Writes the one line of the log about it.
    pub(super) fn log(&self, export: &str, peer: &str) {
        let export = export.escape_debug();
        match self {
            End::Disconnect | End::Drained => {
                tracing::info!(%export, %peer, end = ?self, "connection closed")
            }
            End::Eof => {
                tracing::info!(%export, %peer, "connection closed by the client without a disconnect")
            }
            End::Socket(error) => tracing::info!(%export, %peer, %error, "connection lost"),
            End::BadMagic | End::Oversize | End::Stalled | End::BrokenReply(_) => {
                tracing::warn!(%export, %peer, end = ?self, "connection closed by the server");
            }
        }
    }
}
