//! However a client ends, and wherever in its bytes, nothing of it stays: no memory, no descriptor, no slot, no lock. And
//! a client that only stops sending still gets the replies to all that it had asked.
//!
//! A client that is killed is one whose kernel closes its sockets, with or without unread replies: so that is what the
//! tests do at every byte; real programs are killed in a test of their own.
//!
//! Under TLS each place has one kind of end; with `NBD_IMG_ENDS_STEP=1` it has all.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[allow(dead_code)]
mod support;

use std::fs;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use rustls::{ClientConfig, ClientConnection, StreamOwned};
use support::certificates::{Authority, CLIENT, SERVER, client_folder, server_folder};
use support::client::{Client, Request, Wishes, go_data, option_bytes};
use support::rng::Rng;
use support::server::{Serve, Server};
use support::tools::{qemu_img, tool};
use support::wire::{self, chunk, command, command_flag, option, option_reply};
use support::{assert_same, proc, tls};

const DISK_LEN: usize = 4 << 20;
const PATIENCE: Duration = Duration::from_secs(60);
/// Fewer slots than sessions that are ended: one that is lost is missed soon.
const SLOTS: &str = "8";
/// What may stay of all connections together (allocators keep some pages), and of each: less than anything that a session,
/// a TLS connection or a request consists of, for as many as there are here.
const NOISE_LEN: usize = 4 << 20;
const LEFT_LEN_MAX: usize = 256;

/// A writable qcow2 image, served on a Unix socket and on TCP, with TLS for whoever wants it.
struct Scene {
    server: Server,
    address: SocketAddr,
    image: PathBuf,
    /// Of clients with certificates.
    tls: Option<Arc<ClientConfig>>,
    descriptors: usize,
    folder: tempfile::TempDir,
}

impl Scene {
    fn new(test: &str) -> Self {
        let folder = support::scratch(test);
        let authority = Authority::new("the CA of the tests");
        let (certs, client) = (folder.path().join("server"), folder.path().join("client"));
        server_folder(&certs, &authority, SERVER);
        client_folder(&client, &authority, CLIENT, &authority.cert);
        let tls = tls::config(&client, rustls::ALL_VERSIONS);
        Self::serve(folder, &["--tls-dir", certs.to_str().unwrap()], Some(tls))
    }

    /// TLS with pre-shared keys.
    fn with_keys(test: &str) -> Self {
        let folder = support::scratch(test);
        let keys = folder.path().join("keys");
        fs::write(&keys, "alice:e151eaf1cd90a45fb0bc0ec5ee57e441\n").unwrap();
        Self::serve(folder, &["--tls-psk", keys.to_str().unwrap()], None)
    }

    fn serve(folder: tempfile::TempDir, args: &[&str], tls: Option<Arc<ClientConfig>>) -> Self {
        qemu_img(folder.path(), "create -q -f qcow2 disk.qcow2 4M");
        let image = folder.path().join("disk.qcow2");
        let common = ["--tls", "optional", "--max-connections", SLOTS, "--listen", "127.0.0.1:0"];
        let server = Serve::image(&image).format("qcow2").args(&common).args(args).start();
        let address = server.tcp_address();
        let mut scene = Scene { server, address, image, tls, descriptors: 0, folder };
        scene.descriptors = scene.descriptors_when_warm();
        scene
    }

    fn open_count(&self) -> usize {
        proc::descriptors_but_rings(self.server.pid())
    }

    /// Each thread of an export keeps what it has opened.
    fn descriptors_when_warm(&self) -> usize {
        let cores = thread::available_parallelism().unwrap().get();
        // Each thread has at most one of them, if they are there at the same time.
        let slots = SLOTS.parse().unwrap();
        let mut clients: Vec<_> = (0..cores.min(slots)).map(|_| self.client()).collect();
        clients.iter_mut().for_each(|client| drop(client.read(0, 512)));
        clients.into_iter().for_each(Client::disconnect);
        self.client_slot();
        end_unix(self, &session().0, End::HalfClose);
        let begin = Instant::now();
        let mut last = self.open_count();
        // Until two looks agree: the last of them has to be gone.
        loop {
            thread::sleep(Duration::from_millis(200));
            let now = self.open_count();
            if now == last || begin.elapsed() > PATIENCE {
                return now;
            }
            last = now;
        }
    }

    /// Waits until a slot is free, as it is only a moment after its last holder's end.
    fn client_slot(&self) {
        let begin = Instant::now();
        while !self.has_slot() {
            assert!(begin.elapsed() < PATIENCE, "no slot is free");
            thread::sleep(Duration::from_millis(1));
        }
    }

    fn client(&self) -> Client {
        self.client_slot();
        Client::unix(self.server.socket(), "", Wishes::STRUCTURED)
    }

    fn has_slot(&self) -> bool {
        let mut stream = support::client::greet(self.server.socket());
        stream.write_all(&3_u32.to_be_bytes()).unwrap();
        stream.write_all(&option_bytes(option::INFO, &go_data(""))).unwrap();
        let (kind, _) = support::client::read_option_reply(&mut stream, option::INFO).unwrap();
        kind != option_reply::ERR_POLICY
    }

    /// Nobody is connected any more, and all that was opened for them is closed.
    #[track_caller]
    fn assert_nothing_stays(&self) {
        let begin = Instant::now();
        while self.open_count() > self.descriptors {
            let open = proc::descriptor_targets(self.server.pid());
            assert!(begin.elapsed() < PATIENCE, "{open:?}, {} before", self.descriptors);
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// All is as if nobody had ever been there but for what they wrote: every place can be written and flushed, the image
    /// is free at the end, and in order.
    #[track_caller]
    fn finish(mut self) {
        self.server.assert_alive();
        self.assert_nothing_stays();
        let content = Rng::new("the last").bytes(DISK_LEN);
        let mut client = self.client();
        assert_eq!(client.ask(Request::new(command::WRITE, 0, DISK_LEN), &content).error, 0);
        assert_eq!(client.ask(Request::new(command::FLUSH, 0, 0), &[]).error, 0);
        assert_same("the disk", &client.read_all(), &content);
        client.disconnect();
        self.server.stop();
        qemu_img(self.folder.path(), "check -q disk.qcow2");
        let again = Serve::image(&self.image).format("qcow2").start();
        assert_same("the disk again", &Client::unix(again.socket(), "", Wishes::SIMPLE).read_all(), &content);
        again.stop();
    }
}

/// All that a client says in a session that ends by itself, and behind which of its bytes each request ends.
fn session() -> (Vec<u8>, Vec<usize>) {
    let mut bytes = 3_u32.to_be_bytes().to_vec();
    let mut behind_requests = Vec::new();
    bytes.extend(option_bytes(option::STRUCTURED_REPLY, &[]));
    let query = b"base:allocation";
    let mut contexts = vec![0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, query.len() as u8];
    contexts.extend(query);
    bytes.extend(option_bytes(option::SET_META_CONTEXT, &contexts));
    bytes.extend(option_bytes(option::GO, &go_data("")));
    let requests = [
        Request::new(command::WRITE, 65_536, 512),
        Request::new(command::READ, 0, 1024),
        Request::new(command::WRITE, 200_000, 100).flags(command_flag::FUA),
        Request::new(command::BLOCK_STATUS, 0, DISK_LEN),
        Request::new(command::WRITE_ZEROES, 65_536, 131_072),
        Request::new(command::TRIM, 0, 65_536),
        Request::new(command::FLUSH, 0, 0),
        Request::new(command::READ, 65_536, 2048),
    ];
    for (cookie, request) in requests.iter().enumerate() {
        bytes.extend(request.bytes(cookie as u64));
        if request.command == command::WRITE {
            bytes.resize(bytes.len() + request.len as usize, cookie as u8 + 1);
        }
        behind_requests.push(bytes.len());
    }
    bytes.extend(Request::new(command::DISC, 0, 0).bytes(99));
    (bytes, behind_requests)
}

/// How a client ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// It closes, or is killed; replies may be unread.
    Close,
    /// It says that no more comes, and listens to the end.
    HalfClose,
    /// It reads what is there, and then closes.
    ReadAndClose,
}

/// The first of them warms up.
const PASSES: usize = 3;

const ENDS: [End; 3] = [End::Close, End::HalfClose, End::ReadAndClose];

/// The cookies whose replies are complete in what a client received; panics at anything else than whole option replies
/// and whole chunks.
fn answered(mut received: &[u8]) -> Vec<u64> {
    let mut take = |len: usize| {
        let (taken, rest) = received.split_at_checked(len).expect("a reply is cut");
        received = rest;
        (taken.to_vec(), rest.is_empty())
    };
    let be32 = |bytes: &[u8]| u32::from_be_bytes(bytes.try_into().unwrap());
    let mut done = Vec::new();
    let (_, mut over) = take(18);
    while !over {
        let (magic, _) = take(4);
        if be32(&magic) == wire::STRUCTURED_REPLY_MAGIC {
            let (header, behind) = take(16);
            let len = be32(&header[12..]) as usize;
            over = if len > 0 { take(len).1 } else { behind };
            assert!(u16::from_be_bytes([header[2], header[3]]) < chunk::ERROR, "an error");
            if header[1] & 1 != 0 {
                done.push(u64::from_be_bytes(header[4..12].try_into().unwrap()));
            }
        } else {
            assert_eq!(magic, wire::OPTION_REPLY_MAGIC.to_be_bytes()[..4]);
            let (header, behind) = take(16);
            let len = be32(&header[12..]) as usize;
            over = if len > 0 { take(len).1 } else { behind };
        }
    }
    done.sort_unstable();
    done
}

/// One client that sends `bytes` and ends so. Gives what it received if it listened to the end.
fn end_unix(scene: &Scene, bytes: &[u8], end: End) -> Option<Vec<u8>> {
    let mut stream = UnixStream::connect(scene.server.socket()).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    // The server may have refused it: its slots are few.
    let sent = stream.write_all(bytes);
    match end {
        End::Close => None,
        End::HalfClose => {
            sent.unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
            let mut all = Vec::new();
            stream.read_to_end(&mut all).unwrap();
            Some(all)
        }
        End::ReadAndClose => {
            let _ = stream.read(&mut [0; 100]);
            None
        }
    }
}

#[test]
fn a_plain_session_may_end_behind_each_byte() {
    let scene = Scene::new("ends-plain");
    let (bytes, behind_requests) = session();
    let pass = |_| {
        for cut in 0..=bytes.len() {
            for end in ENDS {
                scene.client_slot();
                let Some(received) = end_unix(&scene, &bytes[..cut], end) else { continue };
                let asked = behind_requests.iter().filter(|&&behind| behind <= cut).count() as u64;
                let expected: Vec<u64> = (0..asked).collect();
                assert_eq!(answered(&received), expected, "behind byte {cut}");
            }
        }
    };
    assert_no_growth(&scene, 2 * ENDS.len() * bytes.len(), pass);
    scene.finish();
}

/// Runs `pass` once so that all is warm, then twice, which is `connections` of them: their memory must not stay.
#[track_caller]
fn assert_no_growth(scene: &Scene, connections: usize, pass: impl Fn(usize)) {
    pass(0);
    scene.assert_nothing_stays();
    let before = proc::resident_len(scene.server.pid());
    (1..PASSES).for_each(pass);
    scene.assert_nothing_stays();
    let left = proc::resident_len(scene.server.pid()).saturating_sub(before) as usize;
    println!("{connections} connections left {left} bytes of memory");
    assert!(
        left < NOISE_LEN || left / connections < LEFT_LEN_MAX,
        "{left} bytes stay of {connections} connections"
    );
}

/// With a linger time of zero the kernel sends RST instead of FIN.
fn reset(stream: &TcpStream) {
    socket2::SockRef::from(stream).set_linger(Some(Duration::ZERO)).unwrap();
}

#[test]
fn a_tcp_session_may_be_reset_behind_each_byte() {
    let scene = Scene::new("ends-reset");
    let (bytes, _) = session();
    for cut in 0..=bytes.len() {
        let mut stream = TcpStream::connect(scene.address).unwrap();
        reset(&stream);
        // It may be refused when the one before has not ended yet: that is an end like any other.
        let _ = stream.write_all(&bytes[..cut]);
        if cut % 2 == 0 {
            let _ = stream.read(&mut [0; 64]);
        }
    }
    scene.finish();
}

/// Passes on what rustls writes, up to a number of bytes.
struct Cut {
    stream: UnixStream,
    left: usize,
}

impl Read for Cut {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        // Whoever has come to its end does not wait for an answer to what it could not say.
        if self.left == 0 { Err(io::ErrorKind::BrokenPipe.into()) } else { self.stream.read(buf) }
    }
}

impl Write for Cut {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        if self.left == 0 {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let sent = self.stream.write(&buf[..buf.len().min(self.left)])?;
        self.left -= sent;
        Ok(sent)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A session under TLS of which only the first `cut` bytes on the wire behind STARTTLS are sent; gives how many of them
/// there were.
fn end_tls(scene: &Scene, bytes: &[u8], cut: usize, end: End) -> usize {
    let stream = tls::starttls(scene.server.socket());
    let connection =
        ClientConnection::new(scene.tls.clone().unwrap(), "localhost".try_into().unwrap()).unwrap();
    let mut stream = StreamOwned::new(connection, Cut { stream, left: cut });
    let talk = |stream: &mut StreamOwned<ClientConnection, Cut>| -> io::Result<()> {
        // Behind STARTTLS come the options.
        stream.write_all(&bytes[4..])?;
        stream.flush()?;
        if end != End::Close {
            // Each end of the session by itself, or by its having been cut.
            stream.read_to_end(&mut Vec::new())?;
        }
        Ok(())
    };
    let talked = talk(&mut stream);
    let Cut { stream: mut socket, left } = stream.sock;
    match end {
        End::HalfClose => {
            // The server may have closed already.
            let _ = socket.shutdown(Shutdown::Write);
            socket.set_read_timeout(Some(PATIENCE)).unwrap();
            match socket.read_to_end(&mut Vec::new()) {
                Err(error) if error.kind() != io::ErrorKind::ConnectionReset => panic!("not closed: {error}"),
                Ok(_) | Err(_) => {}
            }
        }
        End::Close => drop(socket),
        End::ReadAndClose => {
            socket.set_nonblocking(true).unwrap();
            let _ = socket.read(&mut [0; 100]);
        }
    }
    if left > 0 && end == End::HalfClose {
        talked.expect("a whole session ends well");
    }
    cut - left
}

#[test]
fn a_session_under_tls_may_end_behind_each_byte() {
    let scene = Scene::new("ends-tls");
    let (bytes, _) = session();
    let whole = end_tls(&scene, &bytes, usize::MAX, End::HalfClose);
    let step = support::count("NBD_IMG_ENDS_STEP", PASSES);
    let pass = |round: usize| {
        for cut in (round % step..=whole).step_by(step) {
            scene.client_slot();
            end_tls(&scene, &bytes, cut, ENDS[(cut / step + round) % ENDS.len()]);
        }
    };
    println!("{whole} bytes under TLS");
    assert_no_growth(&scene, 2 * whole / step, pass);
    scene.finish();
}

/// Real programs, killed at random moments of a copy.
#[test]
fn programs_that_are_killed_leave_nothing() {
    let scene = Scene::new("ends-kill");
    kill_copies(&scene, &scene.server.uri(""), 30);
    scene.finish();
}

/// The same under TLS with pre-shared keys, which is OpenSSL's on the server's side.
#[test]
fn programs_with_keys_that_are_killed_leave_nothing() {
    let scene = Scene::with_keys("ends-kill-keys");
    let keys = scene.folder.path().join("keys");
    let socket = scene.server.socket().display();
    let uri = format!("nbds+unix://alice@/?socket={socket}&tls-psk-file={}", keys.display());
    // A connection of OpenSSL's is some 40 KiB.
    assert_no_growth(&scene, 2 * 100, |_| kill_copies(&scene, &uri, 100));
    scene.finish();
}

fn kill_copies(scene: &Scene, uri: &str, kills: usize) {
    let source = scene.folder.path().join("source");
    let mut rng = Rng::new("kills");
    fs::write(&source, rng.bytes(DISK_LEN)).unwrap();
    for round in 0..kills {
        scene.client_slot();
        let mut program = tool("nbdcopy");
        let (from, to): (&Path, &Path) = match round % 2 {
            0 => (&source, Path::new(uri)),
            _ => (Path::new(uri), Path::new("null:")),
        };
        let mut child = program.arg(from).arg(to).stderr(Stdio::null()).spawn().unwrap();
        thread::sleep(Duration::from_micros(rng.below(30_000)));
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
