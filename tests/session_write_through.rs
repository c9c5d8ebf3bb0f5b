//! With `writethrough` and `directsync` what is answered is durable: a crash right behind a reply, in which everything is
//! lost that was not synced, leaves all of it. With `writeback` it does not, so that the test can tell.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[allow(dead_code)]
mod support;

use std::sync::Arc;

use nbd_img::export::{CacheMode, ExportSpec};
use nbd_img::session::Times;
use nbd_img_formats::raw::{RawDriver, RawOptions};
use nbd_img_formats::storage::{Fate, FileId, Log, MemoryStorage};
use nbd_img_formats::{BlockDriver, Format, Storage};
use support::client::{Client, Request, Wishes};
use support::in_process::{InProcess, open_qcow2};
use support::rng::Rng;
use support::tools::qemu_img;
use support::wire::{command, command_flag};

const DISK_LEN: usize = 1 << 20;
const REQUESTS: usize = 60;

/// The file of a new image with something in it.
fn image(format: Format, content: &[u8]) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("raw"), content).unwrap();
    // Small clusters, so that there are many tables.
    let options = if format == Format::Qcow2 { "-o cluster_size=4k" } else { "" };
    qemu_img(folder.path(), &format!("convert -f raw -O {format} {options} raw made"));
    std::fs::read(folder.path().join("made")).unwrap()
}

fn open(format: Format, storage: Arc<dyn Storage>, writable: bool) -> Arc<dyn BlockDriver> {
    if format == Format::Raw {
        let options =
            RawOptions { exact_size: false, discard: true, format: Format::Raw, refuse_magic: None };
        return RawDriver::open(storage, options).unwrap();
    }
    open_qcow2(storage, writable)
}

/// What a crash now leaves of the disk.
fn left(format: Format, log: &Log) -> Vec<u8> {
    let bytes = log.after_crash(FileId(0), log.len(), |_, _| Fate::Lost);
    let mut file = vec![0; bytes.len() as usize];
    bytes.read(&mut file, 0);
    let driver = open(format, MemoryStorage::copy_of(&file).unwrap(), false);
    let mut content = vec![0; DISK_LEN];
    driver.pread(0, &mut content).unwrap();
    content
}

/// Changes an image; gives after how many replies a crash would have lost something that was answered.
fn losses(format: Format, cache: CacheMode) -> usize {
    let mut rng = Rng::fixed(77);
    // Half of it is there before.
    let mut content = [rng.bytes(DISK_LEN / 2), vec![0; DISK_LEN / 2]].concat();
    let log = Log::new();
    let storage = log.attach(MemoryStorage::copy_of(&image(format, &content)).unwrap()).unwrap();
    let spec = ExportSpec { cache, ..ExportSpec::default() };
    let server = InProcess::serve_as(&spec, open(format, storage, true), 64 << 20, Times::default());
    let mut client = Client::unix(server.socket(), "", Wishes::STRUCTURED);
    let mut losses = 0;
    for number in 0..REQUESTS {
        let at = rng.below(DISK_LEN as u64 / 512 - 1) as usize * 512;
        let len = (rng.below(64) as usize + 1) * 512;
        let range = at..(at + len).min(DISK_LEN);
        let request = |kind| Request::new(kind, at as u64, range.len());
        match number % 4 {
            0 | 1 => {
                content[range.clone()].copy_from_slice(&rng.bytes(range.len()));
                let written = content[range.clone()].to_vec();
                assert_eq!(client.ask(request(command::WRITE), &written).error, 0);
            }
            2 => {
                let flags = if rng.below(2) == 0 { command_flag::NO_HOLE } else { 0 };
                content[range.clone()].fill(0);
                assert_eq!(client.ask(request(command::WRITE_ZEROES).flags(flags), &[]).error, 0);
            }
            _ => {
                assert_eq!(client.ask(request(command::TRIM), &[]).error, 0);
                // What it reads as is the server's choice, but it stays that.
                content[range.clone()].copy_from_slice(&client.read(at as u64, range.len()));
            }
        }
        losses += usize::from(left(format, &log) != content);
    }
    client.disconnect();
    server.assert_clean();
    losses
}

#[test]
fn what_is_answered_survives_a_crash() {
    for format in [Format::Raw, Format::Qcow2] {
        for cache in [CacheMode::Writethrough, CacheMode::Directsync] {
            assert_eq!(losses(format, cache), 0, "{format} {cache:?}");
        }
        assert!(losses(format, CacheMode::Writeback) > REQUESTS / 2, "{format}: nothing can be lost");
    }
}
