//! An independent reader of the server's side of the transmission phase. It panics at whatever breaks a rule.

use std::collections::HashMap;

/// A reply, or a chunk of one, as it is on the wire.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Item {
    Simple { cookie: u64, error: u32, data: Vec<u8> },
    None { cookie: u64 },
    Data { cookie: u64, offset: u64, data: Vec<u8>, done: bool },
    Hole { cookie: u64, offset: u64, len: u32, done: bool },
    Status { cookie: u64, context: u32, extents: Vec<(u32, u32)>, done: bool },
    Error { cookie: u64, error: u32, text: String, offset: Option<u64>, done: bool },
}

/// Takes bytes off a stream.
struct Stream<'a>(&'a [u8]);

impl<'a> Stream<'a> {
    fn take(&mut self, len: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at_checked(len).expect("the stream ends in a reply");
        self.0 = rest;
        taken
    }

    fn number(&mut self, len: usize) -> u64 {
        self.take(len).iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
    }

    fn u32(&mut self) -> u32 {
        u32::try_from(self.number(4)).unwrap()
    }
}

/// Reads a whole stream of replies. `reads` are the lengths of successful simple READs by cookie.
pub fn read_stream(bytes: &[u8], reads: &HashMap<u64, usize>) -> Vec<Item> {
    let mut stream = Stream(bytes);
    let mut items = Vec::new();
    while !stream.0.is_empty() {
        items.push(match stream.u32() {
            0x6744_6698 => read_simple(&mut stream, reads),
            0x668e_33ef => read_chunk(&mut stream),
            magic => panic!("out of step: {magic:#x}"),
        });
    }
    items
}

fn read_simple(stream: &mut Stream<'_>, reads: &HashMap<u64, usize>) -> Item {
    let error = stream.u32();
    let cookie = stream.number(8);
    let len = if error == 0 { reads.get(&cookie).copied().unwrap_or(0) } else { 0 };
    Item::Simple { cookie, error, data: stream.take(len).to_vec() }
}

fn read_chunk(stream: &mut Stream<'_>) -> Item {
    let flags = stream.number(2);
    let kind = stream.number(2);
    let cookie = stream.number(8);
    let len = usize::try_from(stream.number(4)).unwrap();
    assert!(flags <= 1);
    let done = flags == 1;
    let mut payload = Stream(stream.take(len));
    let item = match kind {
        0 => {
            assert!(done && len == 0);
            Item::None { cookie }
        }
        1 => {
            assert!(len >= 9);
            Item::Data { cookie, offset: payload.number(8), data: payload.take(len - 8).to_vec(), done }
        }
        2 => {
            assert_eq!(len, 12);
            let (offset, hole_len) = (payload.number(8), payload.u32());
            assert!(hole_len > 0);
            Item::Hole { cookie, offset, len: hole_len, done }
        }
        5 => {
            assert!(len >= 12 && (len - 4) % 8 == 0);
            let context = payload.u32();
            let extents: Vec<_> = (0..(len - 4) / 8).map(|_| (payload.u32(), payload.u32())).collect();
            assert!(extents.iter().all(|(len, _)| *len > 0));
            Item::Status { cookie, context, extents, done }
        }
        0x8001 | 0x8002 => {
            let error = payload.u32();
            assert_ne!(error, 0);
            let text_len = usize::try_from(payload.number(2)).unwrap();
            assert!(text_len <= 4096);
            let text = String::from_utf8(payload.take(text_len).to_vec()).unwrap();
            assert!(!text.contains('\0'));
            let offset = (kind == 0x8002).then(|| payload.number(8));
            Item::Error { cookie, error, text, offset, done }
        }
        other => panic!("chunk type {other:#x}"),
    };
    assert!(payload.0.is_empty(), "{} bytes too many in a chunk", payload.0.len());
    item
}
