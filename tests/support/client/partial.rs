//! A reply as its chunks come in: each has to lie inside the request, overlap no other, and all of them together have
//! to cover it.

use super::super::wire::{chunk, command};
use super::{Reply, Request};

/// A reply of which parts are still to come.
pub struct Partial {
    reply: Reply,
    covered: Vec<(u64, u64)>,
}

impl Partial {
    pub fn new(cookie: u64, request: Request) -> Self {
        let len = if request.command == command::READ { request.len as usize } else { 0 };
        // Poison: bytes that no chunk covers must not look like zeroes.
        let reply = Reply { cookie, data: vec![0xa5; len], ..Reply::default() };
        Self { reply, covered: Vec::new() }
    }

    pub fn add(&mut self, request: Request, kind: u16, body: &[u8]) {
        self.reply.chunks += 1;
        let u32_at = |at: usize| u32::from_be_bytes(body[at..at + 4].try_into().unwrap());
        let u64_at = |at: usize| u64::from_be_bytes(body[at..at + 8].try_into().unwrap());
        match kind {
            chunk::NONE => assert!(body.is_empty()),
            chunk::OFFSET_DATA => self.fill(request, u64_at(0), &body[8..]),
            chunk::OFFSET_HOLE => self.fill(request, u64_at(0), &vec![0; u32_at(8) as usize]),
            chunk::BLOCK_STATUS => {
                assert_eq!((body.len() - 4) % 8, 0);
                let extents = (4..body.len()).step_by(8).map(|at| (u32_at(at).into(), u32_at(at + 4)));
                self.tell(u32_at(0), extents.collect());
            }
            chunk::BLOCK_STATUS_EXT => {
                assert_eq!(body.len(), 8 + 16 * u32_at(4) as usize);
                let extents = (8..body.len())
                    .step_by(16)
                    .map(|at| (u64_at(at), u32::try_from(u64_at(at + 8)).unwrap()));
                self.tell(u32_at(0), extents.collect());
            }
            chunk::ERROR | chunk::ERROR_OFFSET => {
                self.reply.error = u32_at(0);
                let text_len = usize::from(u16::from_be_bytes(body[4..6].try_into().unwrap()));
                self.reply.text = String::from_utf8(body[6..6 + text_len].to_vec()).unwrap();
                assert_ne!(self.reply.error, 0);
                self.reply.error_offset = (kind == chunk::ERROR_OFFSET).then(|| u64_at(6 + text_len));
            }
            other => panic!("a chunk of type {other}"),
        }
    }

    fn tell(&mut self, context: u32, extents: Vec<(u64, u32)>) {
        assert!(!self.reply.contexts.iter().any(|(told, _)| *told == context), "context {context} twice");
        if self.reply.contexts.is_empty() {
            self.reply.extents.clone_from(&extents);
        }
        self.reply.contexts.push((context, extents));
    }

    fn fill(&mut self, request: Request, offset: u64, data: &[u8]) {
        assert_eq!(request.command, command::READ);
        assert!(!data.is_empty(), "an empty chunk");
        let end = offset + data.len() as u64;
        assert!(
            offset >= request.offset && end <= request.offset + request.len,
            "a chunk {offset:#x}..{end:#x} outside {request:?}"
        );
        assert!(!self.covered.iter().any(|&(a, b)| offset < b && a < end), "chunks overlap at {offset:#x}");
        self.covered.push((offset, end));
        let at = usize::try_from(offset - request.offset).unwrap();
        self.reply.data[at..at + data.len()].copy_from_slice(data);
    }

    pub fn finish(self, request: Request) -> Reply {
        if request.command == command::READ && self.reply.error == 0 {
            let covered: u64 = self.covered.iter().map(|(a, b)| b - a).sum();
            assert_eq!(covered, request.len, "chunks do not cover {request:?}");
        }
        self.reply
    }
}
