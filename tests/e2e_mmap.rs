//! mmap-raw: a file that becomes shorter while its pages are on their way to a client has an end that the client can tell
//! from data, and other requests go on.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[allow(dead_code)]
mod support;

use std::fs::{self, File};
use std::path::Path;
use std::thread;
use std::time::Duration;

use support::certificates::{Authority, CLIENT, SERVER, client_folder, server_folder};
use support::client::{Client, Request, Wishes, is_hangup};
use support::rng::Rng;
use support::server::Serve;
use support::wire::{command, command_flag};
use support::{assert_same, tls};

const DISK_LEN: usize = 32 << 20;

/// Behind what a socket's buffers hold, so that it has not been sent when it goes.
const CUT: usize = 24 << 20;

/// Asks for the whole disk, lets the server send what fits into the socket, and cuts the file then.
fn ask_and_cut(client: &mut Client, disk: &Path, flags: u16) {
    client.send(Request::new(command::READ, 0, DISK_LEN).flags(flags), &[]).unwrap();
    thread::sleep(Duration::from_millis(300));
    File::options().write(true).open(disk).unwrap().set_len(CUT as u64).unwrap();
}

#[test]
fn pages_that_go_while_they_are_sent_are_told_apart_from_data() {
    for format in ["mmap-raw", "raw"] {
        let folder = support::scratch("mmap-lost");
        let disk = folder.path().join("disk");
        let content = Rng::fixed(4).bytes(DISK_LEN);
        fs::write(&disk, &content).unwrap();
        let server = Serve::image(&disk).format(format).read_only().start();
        lose_pages(format, &disk, &content, &|wishes| Client::unix(server.socket(), "", wishes));
        server.stop();
    }
}

/// Under TLS the bytes come out of the mapping itself, where a page that is gone is a signal; in plain text pages of that many
/// bytes go to the socket by the file.
#[test]
fn pages_that_go_while_they_are_encrypted_are_told_apart_from_data() {
    for format in ["mmap-raw", "raw"] {
        let folder = support::scratch("mmap-lost-tls");
        let (disk, certs, own) =
            (folder.path().join("disk"), folder.path().join("s"), folder.path().join("c"));
        let authority = Authority::new("the CA of the tests");
        server_folder(&certs, &authority, SERVER);
        client_folder(&own, &authority, CLIENT, &authority.cert);
        let content = Rng::fixed(5).bytes(DISK_LEN);
        fs::write(&disk, &content).unwrap();
        let args = ["--tls-dir", certs.to_str().unwrap()];
        let server = Serve::image(&disk).format(format).read_only().args(&args).start();
        let client = |wishes| tls::client(server.socket(), &own, rustls::ALL_VERSIONS, wishes);
        lose_pages(format, &disk, &content, &client);
        server.stop();
    }
}

fn lose_pages(format: &str, disk: &Path, content: &[u8], connect: &dyn Fn(Wishes) -> Client) {
    for flags in [0, command_flag::DF] {
        fs::write(disk, content).unwrap();
        let mut client = connect(Wishes::STRUCTURED);
        ask_and_cut(&mut client, disk, flags);
        let reply = client.reply().unwrap();
        assert_eq!(reply.error, libc::EIO as u32, "{format}");
        // With chunks the rest is not announced any more; in one chunk it is filled up.
        let end = reply.error_offset.map_or(CUT, |offset| usize::try_from(offset).unwrap());
        assert!(reply.error_offset.is_some() || flags == 0, "{format}: no offset");
        assert!(end <= CUT && end > 0, "{format}: {end}");
        assert_same("what is left", &client.read(4096, 65536), &content[4096..4096 + 65536]);
        let gone = client.ask(Request::new(command::READ, CUT as u64, 4096), &[]);
        assert_eq!(gone.error, libc::EIO as u32, "{format}");
        client.disconnect();
    }
    fs::write(disk, content).unwrap();
    let mut client = connect(Wishes::SIMPLE);
    ask_and_cut(&mut client, disk, 0);
    assert!(is_hangup(&client.reply().unwrap_err()), "{format}");
    let mut client = connect(Wishes::SIMPLE);
    assert_same("what is left", &client.read(4096, 65536), &content[4096..4096 + 65536]);
    client.disconnect();
}
