//! A disk image against a vector of bytes, for any driver: random operations, and after each one the
//! image has to be what the vector is.
//!
//! Operations come in the two ways in which the program uses a driver: by the blocking calls, and by
//! plans whose pieces are carried out by hand as a session does it.

use std::ops::ControlFlow;

use nbd_img_formats::driver::Status;
use nbd_img_formats::plan::MapMode;
use nbd_img_formats::storage::TryRead;
use nbd_img_formats::sync::Arc;
use nbd_img_formats::{
    BlockDriver, Durability, ErrorKind, GuestRange, Place, Provision, ReadPlan, StatusQuery, WritePlan,
    ZeroRequest,
};

use super::random::Random;
use super::session;

/// Closes a driver and opens its image again.
pub type Reopen<'a> = &'a mut dyn FnMut(Arc<dyn BlockDriver>) -> Arc<dyn BlockDriver>;

/// What is to be tested.
pub struct Model<'a> {
    /// Printed with the seed.
    pub name: &'a str,
    /// What the disk holds at first.
    pub content: Vec<u8>,
    /// Longest range of an operation.
    pub len_max: u64,
    /// What a discarded byte may read as, besides what it was.
    pub discarded: &'a [u8],
    /// Closes the driver, if it is to be reopened now and then, and opens it again.
    pub reopen: Option<Reopen<'a>>,
}

/// How many operations: `NBD_IMG_MODEL_OPS`, or enough for a few seconds.
pub fn operations() -> u64 {
    match std::env::var("NBD_IMG_MODEL_OPS") {
        Ok(text) => text.parse().unwrap(),
        Err(_) => 1000,
    }
}

/// Does random operations on `driver` and compares. Images that cannot be written are only read.
pub fn run(driver: Arc<dyn BlockDriver>, model: Model<'_>) -> Arc<dyn BlockDriver> {
    run_operations(driver, model, operations())
}

/// The same with so many operations.
pub fn run_operations(
    mut driver: Arc<dyn BlockDriver>,
    mut model: Model<'_>,
    operations: u64,
) -> Arc<dyn BlockDriver> {
    let mut random = Random::new(Random::seed(model.name));
    let size = model.content.len() as u64;
    assert_eq!(driver.size(), size);
    let writable = driver.facts().writable;
    for number in 0..operations {
        let range = random_range(&mut random, size, model.len_max);
        let step = if writable { random.below(22) } else { random.below(10) };
        match step {
            0..=2 => check_read(&*driver, &model.content, range),
            3..=4 => check_plan(&*driver, &model.content, range, &mut random),
            5..=6 => check_status(&*driver, &model.content, range),
            7 => driver.cache(range).unwrap(),
            8 => check_bounds(&*driver, size, &mut random),
            9 => check_refusals(&*driver, writable, range),
            10..=13 => write(&*driver, &mut model.content, range, &mut random),
            14..=16 => write_by_plan(&*driver, &mut model.content, range, &mut random),
            17..=19 => zero(&*driver, &mut model.content, range, &mut random),
            20 => discard(&*driver, &mut model, range, &mut random),
            _ => driver.flush().unwrap(),
        }
        if number % 1000 == 999 {
            check_all(&*driver, &model.content);
            if let Some(reopen) = &mut model.reopen {
                driver = reopen(driver);
                check_all(&*driver, &model.content);
            }
        }
    }
    check_all(&*driver, &model.content);
    driver
}

/// Does random operations from several threads, each on bytes of its own: those of every `threads`-th
/// stripe of `stripe_len` bytes, so that with odd stripes they meet in every block.
pub fn run_concurrently(driver: &Arc<dyn BlockDriver>, name: &str, threads: u64, stripe_len: u64) {
    let seed = Random::seed(name);
    let stripes = driver.size() / stripe_len;
    std::thread::scope(|scope| {
        for thread in 0..threads {
            scope.spawn(move || {
                let mut random = Random::new(seed ^ (thread << 56));
                let mut content = vec![None; stripes as usize];
                for _ in 0..operations() / threads {
                    let stripe = random.below(stripes / threads) * threads + thread;
                    let own = content[stripe as usize].get_or_insert_with(|| {
                        let mut own = vec![0; stripe_len as usize];
                        driver.pread(stripe * stripe_len, &mut own).unwrap();
                        own
                    });
                    change_stripe(&**driver, own, stripe * stripe_len, &mut random);
                }
                for (stripe, own) in content.iter().enumerate() {
                    let Some(own) = own else { continue };
                    let mut got = vec![0; own.len()];
                    driver.pread(stripe as u64 * stripe_len, &mut got).unwrap();
                    assert_same(&got, own, stripe as u64 * stripe_len);
                }
            });
        }
    });
}

fn change_stripe(driver: &dyn BlockDriver, own: &mut [u8], at: u64, random: &mut Random) {
    let range = random_range(random, own.len() as u64, own.len() as u64);
    let inside = range.offset() as usize..range.end() as usize;
    let guest = GuestRange::new(at + range.offset(), range.len()).unwrap();
    match random.below(8) {
        0..=4 => {
            let bytes = random.bytes(range.len());
            driver.pwrite(guest.offset(), &bytes, durability(random, 50)).unwrap();
            own[inside].copy_from_slice(&bytes);
        }
        5 => {
            let provision = random.pick(&[Provision::Unmap, Provision::Keep, Provision::Allocate]);
            let request = ZeroRequest { provision, fast: false, durability: Durability::Later };
            driver.write_zeroes(guest, request).unwrap();
            own[inside].fill(0);
        }
        _ => {
            let mut got = vec![0; range.len() as usize];
            driver.pread(guest.offset(), &mut got).unwrap();
            assert_same(&got, &own[inside], guest.offset());
        }
    }
}

fn random_range(random: &mut Random, size: u64, len_max: u64) -> GuestRange {
    let unit = random.pick(&[1, 1, 512, 4096, 65536]);
    let offset = match random.below(10) {
        0 => 0,
        1 => size.saturating_sub(random.below(1200)),
        _ => random.below(size) / unit * unit,
    };
    let len = match random.below(4) {
        0 => random.below(600),
        1 => random.below(len_max + 1),
        _ => (random.below(len_max / unit + 1)) * unit,
    };
    GuestRange::new(offset, len.min(size - offset)).unwrap()
}

fn durability(random: &mut Random, one_in: u64) -> Durability {
    if random.below(one_in) == 0 { Durability::Fua } else { Durability::Later }
}

fn part(content: &[u8], range: GuestRange) -> &[u8] {
    &content[range.offset() as usize..range.end() as usize]
}

fn assert_same(got: &[u8], expected: &[u8], at: u64) {
    // By far faster in a debug build than byte by byte.
    if got == expected {
        return;
    }
    if let Some(index) = got.iter().zip(expected).position(|(got, expected)| got != expected) {
        let (is, should) = (got[index], expected[index]);
        panic!("byte {} (range from {at}) is {is:#x} instead of {should:#x}", at + index as u64);
    }
    assert_eq!(got.len(), expected.len());
}

fn check_all(driver: &dyn BlockDriver, content: &[u8]) {
    let all = GuestRange::new(0, content.len() as u64).unwrap();
    check_read(driver, content, all);
    check_status(driver, content, all);
}

fn check_read(driver: &dyn BlockDriver, content: &[u8], range: GuestRange) {
    let mut got = vec![0x5a; range.len() as usize];
    driver.pread(range.offset(), &mut got).unwrap();
    assert_same(&got, part(content, range), range.offset());
}

/// Reads by a plan, in place as far as that goes, the way a session does.
fn check_plan(driver: &dyn BlockDriver, content: &[u8], range: GuestRange, random: &mut Random) {
    let mode = random.pick(&[MapMode::Try, MapMode::Wait, MapMode::Holes]);
    let mut plan = ReadPlan::default();
    driver.map_read(range, mode, &mut plan).unwrap();
    assert_eq!(plan.pieces.covered_len(), range.len());
    let mut got = vec![0x5a; range.len() as usize];
    let mut done = 0;
    for piece in plan.pieces.iter() {
        let buf = &mut got[done..done + piece.len as usize];
        match piece.place {
            Place::Zero { .. } => buf.fill(0),
            Place::Slow(_) => session::read_slow(driver, range.offset() + done as u64, buf).unwrap(),
            Place::Data { storage, at } => {
                let storage = &driver.storages()[usize::from(storage.0)];
                let have = match storage.try_pread(buf, at).unwrap() {
                    TryRead::Done(len) => {
                        assert_eq!(len, buf.len(), "data reaches behind the end of the file");
                        len
                    }
                    TryRead::WouldWait(len) => len,
                };
                let rest = &mut buf[have..];
                let got = storage.pread(rest, at.checked_add(have as u64).unwrap()).unwrap();
                assert_eq!(got, rest.len());
            }
        }
        done += piece.len as usize;
    }
    assert_same(&got, part(content, range), range.offset());
}

/// The status covers the range, and never calls zero what is not.
fn check_status(driver: &dyn BlockDriver, content: &[u8], range: GuestRange) {
    let mut at = range.offset();
    driver
        .status(StatusQuery::Allocation, range, &mut |len, status| {
            assert!(len > 0);
            let Status::Allocation { hole, zero } = status else { panic!("{status:?} for an allocation") };
            let bytes = part(content, GuestRange::new(at, len).unwrap());
            assert!(!zero || *bytes == vec![0; bytes.len()], "zero from {at}, {len} bytes");
            assert!(!hole || zero, "a hole that is not said to be zero");
            at += len;
            ControlFlow::Continue(())
        })
        .unwrap();
    assert_eq!(at, range.end());
}

fn check_bounds(driver: &dyn BlockDriver, size: u64, random: &mut Random) {
    let offset = random.pick(&[size, size - 1, size + 1, u64::MAX - 4096, size.saturating_sub(100)]);
    let error = driver.pread(offset, &mut [0; 200]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::OutOfBounds, "{error}");
    let mut plan = ReadPlan::default();
    let range = GuestRange::new(offset, 200).unwrap();
    assert_eq!(driver.map_read(range, MapMode::Wait, &mut plan).unwrap_err().kind(), ErrorKind::OutOfBounds);
    if driver.facts().writable {
        let error = driver.pwrite(offset, &[0; 200], Durability::Later).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::OutOfBounds, "{error}");
        let request =
            ZeroRequest { provision: Provision::Allocate, fast: false, durability: Durability::Later };
        assert_eq!(driver.write_zeroes(range, request).unwrap_err().kind(), ErrorKind::OutOfBounds);
        assert_eq!(driver.discard(range, Durability::Later).unwrap_err().kind(), ErrorKind::OutOfBounds);
    }
}

/// An image that cannot be written says so, and does nothing.
fn check_refusals(driver: &dyn BlockDriver, writable: bool, range: GuestRange) {
    if writable {
        return;
    }
    let bytes = vec![1; range.len() as usize];
    let request = ZeroRequest { provision: Provision::Unmap, fast: false, durability: Durability::Later };
    let mut plan = WritePlan::default();
    let refusals = [
        driver.pwrite(range.offset(), &bytes, Durability::Later),
        driver.write_zeroes(range, request),
        driver.discard(range, Durability::Later),
        driver.prepare_write(range, MapMode::Wait, &mut plan),
    ];
    for refusal in refusals {
        assert_eq!(refusal.unwrap_err().kind(), ErrorKind::ReadOnly);
    }
}

/// Bytes to write: such as nothing makes shorter, or a few over and over. None of them is zero.
fn some_bytes(random: &mut Random, len: u64) -> Vec<u8> {
    if random.below(2) == 0 {
        return random.bytes(len);
    }
    let few = random.below(24) + 1;
    let mut bytes = random.bytes(few).repeat(len.div_ceil(few) as usize);
    bytes.truncate(len as usize);
    bytes
}

fn write(driver: &dyn BlockDriver, content: &mut [u8], range: GuestRange, random: &mut Random) {
    let bytes = some_bytes(random, range.len());
    driver.pwrite(range.offset(), &bytes, durability(random, 100)).unwrap();
    content[range.offset() as usize..range.end() as usize].copy_from_slice(&bytes);
}

/// Writes by a plan, the way a session does.
fn write_by_plan(driver: &dyn BlockDriver, content: &mut [u8], range: GuestRange, random: &mut Random) {
    let bytes = some_bytes(random, range.len());
    let mut plan = WritePlan::default();
    driver.prepare_write(range, random.pick(&[MapMode::Try, MapMode::Wait]), &mut plan).unwrap();
    assert_eq!(plan.pieces.covered_len(), range.len());
    let mut done = 0;
    let mut slow = Vec::new();
    for piece in plan.pieces.iter() {
        let bytes = &bytes[done..done + piece.len as usize];
        match piece.place {
            Place::Data { storage, at } => {
                let storage = &driver.storages()[usize::from(storage.0)];
                storage.pwrite(bytes, at, Durability::Later).unwrap();
            }
            Place::Slow(_) => slow.push((range.offset() + done as u64, bytes)),
            Place::Zero { .. } => panic!("a write plan has no zeroes"),
        }
        done += piece.len as usize;
    }
    for (at, bytes) in slow {
        driver.write_slow(at, bytes).unwrap();
    }
    driver.finish_write(&mut plan, true).unwrap();
    content[range.offset() as usize..range.end() as usize].copy_from_slice(&bytes);
}

fn zero(driver: &dyn BlockDriver, content: &mut [u8], range: GuestRange, random: &mut Random) {
    let request = ZeroRequest {
        provision: random.pick(&[Provision::Unmap, Provision::Keep, Provision::Allocate]),
        fast: random.below(3) == 0,
        durability: durability(random, 100),
    };
    match driver.write_zeroes(range, request) {
        Ok(()) => content[range.offset() as usize..range.end() as usize].fill(0),
        // Then nothing has changed, which the next comparison shows.
        Err(error) => assert!(request.fast && error.kind() == ErrorKind::WouldBeSlow, "{error}"),
    }
    check_read(driver, content, range);
}

/// Discarded bytes are as they were, or what the model allows; the image decides.
fn discard(driver: &dyn BlockDriver, model: &mut Model<'_>, range: GuestRange, random: &mut Random) {
    driver.discard(range, durability(random, 100)).unwrap();
    let mut got = vec![0x5a; range.len() as usize];
    driver.pread(range.offset(), &mut got).unwrap();
    let content = &mut model.content[range.offset() as usize..range.end() as usize];
    if *content == *got {
        return;
    }
    for (index, (old, new)) in content.iter_mut().zip(&got).enumerate() {
        let allowed = old == new || model.discarded.contains(new);
        assert!(allowed, "discarded byte {} became {new:#x}", range.offset() + index as u64);
        *old = *new;
    }
}
