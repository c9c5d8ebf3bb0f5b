//! QEMU's block layer as a server that stays: images are given to it and taken away again, and everything
//! is done to them over NBD.

use std::path::Path;

use serde_json::json;

use crate::peer::client::{Client, Request, Wishes};
use crate::peer::qmp::Monitor;
use crate::peer::wire::{STATE_HOLE, STATE_ZERO, command, command_flag};
use crate::support::maker::text;
use crate::{Operation, Seen, joined};

/// A running qemu-storage-daemon.
pub struct Daemon {
    folder: tempfile::TempDir,
    monitor: Monitor,
}

impl Daemon {
    /// One without images.
    pub fn start() -> Self {
        let folder = tempfile::tempdir_in("/dev/shm").unwrap();
        let server = ["--nbd-server", "addr.type=unix,addr.path=nbd.sock"];
        let monitor = Monitor::storage_daemon(folder.path(), &server);
        Daemon { folder, monitor }
    }

    /// Does the operations one after the other: what QEMU sees before and after them.
    pub fn carry_out(&mut self, operations: &[Operation], image: &Path) -> [Seen; 2] {
        self.with_image(image, true, |client| {
            let before = see(client);
            for operation in operations {
                let (request, payload) = request(*operation);
                let reply = client.ask(request, &payload);
                assert_eq!(reply.error, 0, "{operation:?}: {}", reply.text);
            }
            [before, see(client)]
        })
    }

    /// What QEMU sees in an image.
    pub fn read(&mut self, image: &Path) -> Seen {
        self.with_image(image, false, see)
    }

    fn with_image<T>(&mut self, image: &Path, writable: bool, work: impl FnOnce(&mut Client) -> T) -> T {
        // What QEMU leaves after a crash is not the matter here, so it need not sync.
        let (file, cache) = (text(image), json!({ "no-flush": true }));
        let file = json!({ "driver": "file", "filename": file, "aio": "io_uring", "cache": cache });
        let node = json!({ "driver": "qcow2", "node-name": "image", "discard": "unmap", "file": file,
            "read-only": !writable });
        self.monitor.execute("blockdev-add", &node);
        let export = json!({ "type": "nbd", "id": "export", "node-name": "image", "name": "image",
            "writable": writable });
        self.monitor.execute("block-export-add", &export);
        let mut client = Client::unix(&self.folder.path().join("nbd.sock"), "image", Wishes::ALLOCATION);
        let result = work(&mut client);
        client.disconnect();
        self.monitor.execute("block-export-del", &json!({ "id": "export", "mode": "hard" }));
        self.monitor.wait_for("BLOCK_EXPORT_DELETED");
        self.monitor.execute("blockdev-del", &json!({ "node-name": "image" }));
        result
    }
}

fn request(operation: Operation) -> (Request, Vec<u8>) {
    match operation {
        Operation::Write { byte, at, len, fua } => {
            let flags = if fua { command_flag::FUA } else { 0 };
            (Request::new(command::WRITE, at, len as usize).flags(flags), vec![byte; len as usize])
        }
        Operation::Zero { at, len, unmap } => {
            let flags = if unmap { 0 } else { command_flag::NO_HOLE };
            (Request::new(command::WRITE_ZEROES, at, len as usize).flags(flags), Vec::new())
        }
        Operation::Discard { at, len } => (Request::new(command::TRIM, at, len as usize), Vec::new()),
        Operation::Flush => (Request::new(command::FLUSH, 0, 0), Vec::new()),
    }
}

fn see(client: &mut Client) -> Seen {
    let (mut extents, mut at) = (Vec::new(), 0);
    while at < client.size {
        let request = Request::new(command::BLOCK_STATUS, at, (client.size - at) as usize);
        let reply = client.ask(request, &[]);
        assert_eq!(reply.error, 0, "block status: {}", reply.text);
        for (len, state) in reply.extents {
            // What is data according to the image may be a hole of its file: that is not the image's doing.
            extents.push((at, len, state == STATE_HOLE | STATE_ZERO));
            at += len;
        }
    }
    Seen { content: client.read_all(), zeroes: joined(extents) }
}
