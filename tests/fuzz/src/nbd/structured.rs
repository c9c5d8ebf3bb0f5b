//! Targets `nbd_options` and `nbd_requests`: the input chooses options and requests that are well formed but for one
//! number now and then, so that it gets behind their headers at once. What they come to goes to the targets of bytes.

use super::transmission::rules;
use super::{handshake, transmission};
use crate::nbd_support::{IHAVEOPT, MODERN};
use nbd_img::nbd::reply::ReplyForm;

/// Names of exports: all that the tests' directory tells apart, and some that are no names.
const NAMES: [&[u8]; 8] =
    [b"", b"disk", b"snap", b"forbidden", b"leaving", b"no such", b"\xff\xfe", &[b'n'; 4097]];
/// Queries for metadata contexts, and some that are none.
const QUERIES: [&[u8]; 10] = [
    b"",
    b"base:",
    b"base:allocation",
    b"base:other",
    b"qemu:",
    b"qemu:allocation-depth",
    b"qemu:dirty-bitmap:",
    b"qemu:dirty-bitmap:b1",
    b"x-other:any",
    b"no colon",
];
/// Numbers of the options (protocol), two that nobody has among them.
const OPTIONS: [u32; 12] = [1, 2, 3, 5, 6, 7, 8, 9, 10, 11, 4, 77];
/// Lengths of requests, if they are not those of a block or two.
const LENGTHS: [u64; 8] = [0, 1, 511, 32 << 20, (32 << 20) + 1, u32::MAX as u64, 1 << 32, u64::MAX];

/// Negotiates by the options that the input chooses.
pub fn options(input: &[u8]) {
    let Some((head, rest)) = input.split_first_chunk::<4>() else { return };
    let mut choices = Choices(rest);
    let mut bytes = head.to_vec();
    let flags = if choices.seldom() { u32::from(choices.next()) } else { MODERN };
    bytes.extend(flags.to_be_bytes());
    while !choices.0.is_empty() {
        let option = OPTIONS[choices.below(OPTIONS.len())];
        let payload = payload(option, &mut choices);
        let len = choices.perhaps_wrong(payload.len() as u32);
        bytes.extend(IHAVEOPT.to_be_bytes());
        bytes.extend(option.to_be_bytes());
        bytes.extend(len.to_be_bytes());
        bytes.extend(payload);
    }
    handshake::run(&bytes);
}

fn payload(option: u32, choices: &mut Choices<'_>) -> Vec<u8> {
    let mut payload = Vec::new();
    match option {
        1 => payload.extend(NAMES[choices.below(NAMES.len())]),
        6 | 7 => {
            choices.push_text(&NAMES, &mut payload);
            let count = choices.below(6) as u16;
            let told = if choices.seldom() { count ^ u16::from(choices.next()) } else { count };
            payload.extend(told.to_be_bytes());
            for _ in 0..count {
                payload.extend((choices.below(6) as u16).to_be_bytes());
            }
        }
        9 | 10 => {
            choices.push_text(&NAMES, &mut payload);
            let count = choices.below(5) as u32;
            payload.extend(choices.perhaps_wrong(count).to_be_bytes());
            for _ in 0..count {
                choices.push_text(&QUERIES, &mut payload);
            }
        }
        _ if choices.seldom() => payload.resize(choices.below(40), choices.next()),
        _ => {}
    }
    payload
}

/// Serves the requests that the input chooses.
pub fn requests(input: &[u8]) {
    let Some((head, rest)) = input.split_first_chunk::<7>() else { return };
    let rules = rules([head[0], head[1], head[2], head[3]]);
    let extended = rules.form == ReplyForm::Extended;
    let mut choices = Choices(rest);
    let mut bytes = head.to_vec();
    while !choices.0.is_empty() {
        let command = choices.below(9) as u16;
        let mut flags = if choices.seldom() { u16::from(choices.next()) } else { 0 };
        let carries = command == 1 || (extended && command == 7 && choices.next() & 1 != 0);
        if extended && carries && !choices.seldom() {
            flags |= 1 << 5;
        }
        let near = u64::from(choices.next()) * 512;
        let offset = if choices.seldom() { rules.size.wrapping_sub(near) } else { near };
        let len = match (command, carries) {
            (7, true) => 12,
            _ if choices.seldom() => LENGTHS[choices.below(LENGTHS.len())],
            _ => u64::from(choices.next() & 3) * 512,
        };
        let magic: u32 = if extended { 0x21e4_1c71 } else { 0x2560_9513 };
        bytes.extend(magic.to_be_bytes());
        bytes.extend(flags.to_be_bytes());
        bytes.extend(command.to_be_bytes());
        bytes.extend(u64::from(choices.next()).to_be_bytes());
        bytes.extend(offset.to_be_bytes());
        match extended {
            true => bytes.extend(len.to_be_bytes()),
            false => bytes.extend((len as u32).to_be_bytes()),
        }
        if carries && command == 7 {
            bytes.extend(u64::from(choices.next()).to_be_bytes());
            bytes.extend((choices.below(3) as u32).to_be_bytes());
        } else if carries {
            // A longer payload ends with the input.
            bytes.resize(bytes.len() + len.min(2048) as usize, 0x5a);
        }
    }
    transmission::run(&bytes);
}

/// Choices made by the bytes of the input; 0 for all when they are at an end.
struct Choices<'a>(&'a [u8]);

impl Choices<'_> {
    fn next(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    fn below(&mut self, end: usize) -> usize {
        usize::from(self.next()) % end
    }

    /// One time in eight.
    fn seldom(&mut self) -> bool {
        self.next() & 7 == 7
    }

    /// The number, but for one time in eight.
    fn perhaps_wrong(&mut self, number: u32) -> u32 {
        match self.seldom() {
            true => number.wrapping_add(u32::from(self.next())).wrapping_sub(100),
            false => number,
        }
    }

    fn push_text(&mut self, texts: &[&[u8]], to: &mut Vec<u8>) {
        let text = texts[self.below(texts.len())];
        to.extend(self.perhaps_wrong(text.len() as u32).to_be_bytes());
        to.extend(text);
    }
}
