//! What TCP connections are told to do: send at once, and give up on a peer that does not answer.
//!
//! A machine that vanishes says nothing. Without these limits its connection would keep its slot for ever while it is
//! idle, and for a quarter of an hour while replies are on their way (tcp_retries2 of tcp(7)).

use std::net::TcpStream;
use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};

/// How long a connection may be silent before the kernel asks whether the peer's machine is still there, and the
/// pause between two questions. Our choice: often enough for firewalls that forget silent connections, some of them
/// after two minutes.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(60);
const KEEPALIVE_PAUSE: Duration = Duration::from_secs(15);

/// Prepares a connection whose peer may leave things unanswered for so long. Zero leaves that to the kernel, which lets
/// a peer stand still for ever as long as its machine is there.
///
/// A connection without these options works too, and one that is gone already fails here first: so nothing is made of
/// an error.
pub fn prepare(stream: &TcpStream, peer_timeout: Duration) {
    let _ = stream.set_nodelay(true);
    let socket = SockRef::from(stream);
    let (idle, pause) = if peer_timeout.is_zero() {
        (KEEPALIVE_IDLE, KEEPALIVE_PAUSE)
    } else {
        // The kernel counts in whole seconds, and looks at the time that is up only when it asks.
        let second = Duration::from_secs(1);
        (KEEPALIVE_IDLE.min(peer_timeout / 2).max(second), KEEPALIVE_PAUSE.min(peer_timeout / 8).max(second))
    };
    let _ = socket.set_tcp_keepalive(&TcpKeepalive::new().with_time(idle).with_interval(pause));
    if !peer_timeout.is_zero() {
        // Counts for replies that the peer's kernel does not acknowledge or has no room for, and takes the place of
        // the number of questions.
        let _ = socket.set_tcp_user_timeout(Some(peer_timeout));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    fn prepared(peer_timeout: Duration) -> TcpStream {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let _client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (stream, _) = listener.accept().unwrap();
        prepare(&stream, peer_timeout);
        stream
    }

    #[test]
    fn a_silent_peer_is_asked_and_given_up() {
        for (timeout, idle, pause) in [(300, 60, 15), (60, 30, 7), (2, 1, 1), (0, 60, 15)] {
            let stream = prepared(Duration::from_secs(timeout));
            let socket = SockRef::from(&stream);
            assert!(stream.nodelay().unwrap() && socket.keepalive().unwrap());
            assert_eq!(socket.tcp_keepalive_time().unwrap().as_secs(), idle, "{timeout}");
            assert_eq!(socket.tcp_keepalive_interval().unwrap().as_secs(), pause, "{timeout}");
            assert_eq!(socket.tcp_user_timeout().unwrap().unwrap_or_default().as_secs(), timeout);
        }
    }
}
