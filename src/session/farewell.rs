//! The end of a connection by the server: what the client was answered has to reach it.
//!
//! A TCP socket that is closed while bytes of the client wait in it, or that gets some afterwards, resets the connection,
//! and the kernel throws away what it had still to send (RFC 2525, 2.17). A client that keeps many requests in flight
//! has nearly always sent more by then.

use std::net::Shutdown;
use std::time::Duration;

use rustix::net::{RecvFlags, recv};
use tokio::time::{Instant, sleep};

use super::engine::Session;
use crate::transport::Stream;
use crate::transport::unread::outgoing_len;

/// How long a client that is hung up on may take without any of its replies arriving, and for all of them. Our choice:
/// the longest ways on earth with one retransmission, and a send buffer of the kernel's over a slow line.
const PROGRESS_TIME: Duration = Duration::from_secs(1);
const FAREWELL_TIME: Duration = Duration::from_secs(30);

/// How often it is looked whether they have. Our choice.
const LOOK_TIME: Duration = Duration::from_millis(2);

/// Receives that throw away what the client still sends, between two looks: a limit for one that never stops.
const RECEIVES_MAX: u32 = 64;

impl Session {
    /// Sends no more, and waits until the client's kernel has what was sent, as long as it takes some of it.
    pub(super) async fn see_replies_off(&self) {
        let socket = self.socket.get_ref();
        if socket.is_unix() || socket.shut_down(Shutdown::Write).is_err() {
            return;
        }
        let begin = Instant::now();
        let (mut least, mut progress) = (u64::MAX, begin);
        // A socket that cannot tell is not waited for.
        while let Ok(left @ 1..) = outgoing_len(socket) {
            if left < least {
                (least, progress) = (left, Instant::now());
            }
            if progress.elapsed() > PROGRESS_TIME || begin.elapsed() > FAREWELL_TIME {
                return;
            }
            throw_away_input(socket);
            sleep(LOOK_TIME).await;
        }
    }
}

fn throw_away_input(socket: &Stream) {
    let mut bytes = [0; 16 << 10];
    for _ in 0..RECEIVES_MAX {
        match recv(socket, &mut bytes, RecvFlags::empty()) {
            Ok((got, _)) if got > 0 => {}
            Ok(_) | Err(_) => return,
        }
    }
}
