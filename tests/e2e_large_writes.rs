//! A stream of large writes, of which a worker carries out some, to a server that is told to end in its middle: what it answered is
//! in the image, over Unix sockets and TCP.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[allow(dead_code)]
mod support;

use std::fs;
use std::io::Write;
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use rustix::process::Signal;
use support::client::{Client, Request, Transport, Wishes};
use support::rng::Rng;
use support::server::{Serve, Server};
use support::tools::qemu_img;
use support::wire::{command, errno};

const MIB: usize = 1 << 20;
/// More than the server has carried out when it is told to end.
const WRITES: usize = 512;
/// So many are answered before that: by then a session has tried what a worker makes of them, and does so again, or has it go
/// on.
const ANSWERED_MIN: usize = 28;
/// So many more each time: in a trial every second such part is a worker's.
const ANSWERED_MORE: usize = 16;

#[test]
fn raw_over_a_unix_socket() {
    ends_in_the_middle("large-writes-raw-unix", "raw", over_unix);
}

#[test]
fn raw_over_tcp() {
    ends_in_the_middle("large-writes-raw-tcp", "raw", over_tcp);
}

#[test]
fn qcow2_over_a_unix_socket() {
    ends_in_the_middle("large-writes-qcow2-unix", "qcow2", over_unix);
}

#[test]
fn qcow2_over_tcp() {
    ends_in_the_middle("large-writes-qcow2-tcp", "qcow2", over_tcp);
}

/// A connection, and a second handle to send by. (Where the first is dropped the other keeps it open.)
type Connection = (Box<dyn Transport>, Box<dyn Sender>);

trait Sender: Write + Send {
    fn give_up(&self);
}

impl Sender for UnixStream {
    fn give_up(&self) {
        // It may have been closed by the server.
        let _ = self.shutdown(Shutdown::Both);
    }
}

impl Sender for TcpStream {
    fn give_up(&self) {
        let _ = self.shutdown(Shutdown::Both);
    }
}

fn over_unix(server: &Server) -> Connection {
    let stream = UnixStream::connect(server.socket()).unwrap();
    (Box::new(stream.try_clone().unwrap()), Box::new(stream))
}

fn over_tcp(server: &Server) -> Connection {
    let stream = TcpStream::connect(server.tcp_address()).unwrap();
    stream.set_nodelay(true).unwrap();
    (Box::new(stream.try_clone().unwrap()), Box::new(stream))
}

fn ends_in_the_middle(test: &str, format: &str, connect: fn(&Server) -> Connection) {
    // A busy machine may bring the signal when all has been answered, and each write long after the one before it.
    assert!(
        (0..6).any(|chance| {
            did_end_in_the_middle(test, format, connect, ANSWERED_MIN + chance * ANSWERED_MORE)
        }),
        "it never ended in the middle of what workers write"
    );
}

/// Whether a worker wrote and some of the writes were not answered; those that were are in the image.
fn did_end_in_the_middle(
    test: &str,
    format: &str,
    connect: fn(&Server) -> Connection,
    answered_min: usize,
) -> bool {
    let folder = support::scratch(test);
    let folder = folder.path();
    qemu_img(folder, &format!("create -q -f {format} image {}M", WRITES));
    let mut server =
        Serve::image(folder.join("image")).format(format).args(&["--listen", "127.0.0.1:0"]).start();
    let (stream, mut sender) = connect(&server);
    let mut client = Client::over(stream, "", Wishes::SIMPLE);
    let noise = Rng::fixed(7).bytes(MIB + (WRITES << 10));
    let requests: Vec<(u64, Vec<u8>)> = (0..WRITES)
        .map(|index| {
            let request = Request::new(command::WRITE, (index * MIB) as u64, MIB);
            let cookie = client.register(request);
            (cookie, client.header(request, cookie))
        })
        .collect();

    let mut written = Vec::new();
    let worked = std::thread::scope(|scope| {
        let headers = requests.iter().map(|(_, header)| header).enumerate();
        let noise = &noise;
        scope.spawn(move || {
            for (index, header) in headers {
                // The server hangs up before it has taken all.
                if sender.write_all(header).is_err() || sender.write_all(content(noise, index)).is_err() {
                    break;
                }
            }
            sender.give_up();
        });
        let mut worked = false;
        while let Ok(reply) = client.reply() {
            if reply.error == errno::ESHUTDOWN {
                continue;
            }
            assert_eq!(reply.error, 0, "{}", reply.text);
            written.push(requests.iter().position(|(cookie, _)| *cookie == reply.cookie).unwrap());
            if written.len() == answered_min {
                worked = has_writing_worker(server.pid());
                server.signal(Signal::TERM);
            }
        }
        worked
    });
    let status = server.wait(Duration::from_secs(30));
    assert!(status.success(), "{status}: {}", server.stderr());
    if format == "qcow2" {
        qemu_img(folder, "check -q image");
    }
    qemu_img(folder, &format!("convert -f {format} -O raw image found"));
    let found = fs::read(folder.join("found")).unwrap();
    let was_a_test = worked && written.len() < WRITES;
    for index in written {
        let part = &found[index * MIB..][..MIB];
        assert!(part == content(&noise, index), "write {index} was answered and is not in the image");
    }
    was_a_test
}

/// What is written as number `index`: everywhere something else.
fn content(noise: &[u8], index: usize) -> &[u8] {
    &noise[index << 10..][..MIB]
}

/// Whether a thread is there of those that write; nothing else here would have one started where there is io_uring.
fn has_writing_worker(pid: u32) -> bool {
    let threads = fs::read_dir(Path::new("/proc").join(pid.to_string()).join("task")).unwrap();
    // One that ends meanwhile has no name any more.
    threads
        .flatten()
        .any(|task| fs::read_to_string(task.path().join("comm")).is_ok_and(|name| name.starts_with("W-")))
}
