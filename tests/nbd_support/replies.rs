//! An independent reader of the server's side of the transmission phase. It panics at whatever breaks a rule.

use std::collections::HashMap;

/// A reply, or a chunk of one, as it is on the wire.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Item {
    Simple { cookie: u64, error: u32, data: Vec<u8> },
    None { cookie: u64 },
    Data { cookie: u64, offset: u64, data: Vec<u8>, done: bool },
    Hole { cookie: u64, offset: u64, len: u32, done: bool },
    Status { cookie: u64, context: u32, extents: Vec<(u64, u64)>, done: bool },
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
            0x668e_33ef => read_chunk(&mut stream, None),
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

/// Reads a whole stream of extended replies: the echoed offset of each, and what it says. There are no others then.
pub fn read_extended_stream(bytes: &[u8]) -> Vec<(u64, Item)> {
    let mut stream = Stream(bytes);
    let mut items = Vec::new();
    while !stream.0.is_empty() {
        assert_eq!(stream.u32(), 0x6e8a_278c, "only extended replies");
        let mut echoed = 0;
        let item = read_chunk(&mut stream, Some(&mut echoed));
        items.push((echoed, item));
    }
    items
}

/// What follows the magic number; `echoed` takes the request's offset, and is there for extended chunks.
fn read_chunk(stream: &mut Stream<'_>, echoed: Option<&mut u64>) -> Item {
    let flags = stream.number(2);
    let kind = stream.number(2);
    let cookie = stream.number(8);
    let extended = echoed.is_some();
    if let Some(echoed) = echoed {
        *echoed = stream.number(8);
    }
    let len = usize::try_from(stream.number(if extended { 8 } else { 4 })).unwrap();
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
        5 if !extended => {
            assert!(len >= 12 && (len - 4) % 8 == 0);
            let context = payload.u32();
            let extents: Vec<_> =
                (0..(len - 4) / 8).map(|_| (payload.number(4), payload.number(4))).collect();
            assert!(extents.iter().all(|(len, _)| *len > 0));
            Item::Status { cookie, context, extents, done }
        }
        6 if extended => {
            assert!(len >= 24 && (len - 8) % 16 == 0);
            let context = payload.u32();
            assert_eq!(payload.number(4), (len as u64 - 8) / 16);
            let extents: Vec<_> =
                (0..(len - 8) / 16).map(|_| (payload.number(8), payload.number(8))).collect();
            assert!(extents.iter().all(|(_, flags)| flags >> 32 == 0), "flags of 32-bit contexts");
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
