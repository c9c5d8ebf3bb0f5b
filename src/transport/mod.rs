//! Sockets: where the server listens, and the byte streams that clients open.
//!
//! Nothing in here knows NBD beyond the form of its URIs, and nothing in here waits: streams and
//! listeners are non-blocking, and whoever uses them brings the event loop.
//!
//! | module | what is in it |
//! |---|---|
//! | [`address`] | `--listen ADDRESS`, parsed and resolved |
//! | [`listener`] | a listening socket |
//! | [`inherited`] | a socket that the starter has opened, listening or connected |
//! | [`activation`] | taking those by their number |
//! | [`stdio`] | a client at stdin and stdout |
//! | [`registration`] | both under tokio's event loop |
//! | [`stream`] | one client's connection |
//! | [`spare`] | receiving into memory that was not used yet |
//! | [`unread`] | what waits in a connection |
//! | [`peer`] | who is at the other end |
//! | [`certificate`] | whom a certificate names |
//! | [`distinguished_name`] | its subject in words |
//! | [`tcp`] | what TCP connections are told to do |
//! | [`tls`] | the same under TLS |
//! | [`unix`] | Unix sockets as files: stale ones, live ones, mode and owner, removal |
//! | [`owner`] | users and groups by name |
//! | [`vsock`] | sockets between virtual machines and their host |
//! | [`uri`] | what a client is told to connect to |

pub mod activation;
pub mod address;
pub mod certificate;
pub mod distinguished_name;
pub mod inherited;
pub mod listener;
pub mod owner;
pub mod peer;
pub mod registration;
pub mod spare;
pub mod stdio;
pub mod stream;
pub mod tcp;
pub mod tls;
pub mod unix;
pub mod unread;
pub mod uri;
pub mod vsock;

pub use address::{Address, Place};
pub use inherited::{Arrival, InheritedSocket};
pub use listener::Listener;
pub use peer::Peer;
pub use stream::Stream;
