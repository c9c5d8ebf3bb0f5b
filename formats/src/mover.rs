//! The one blocking implementation of pread, pwrite and block status, over the plans of any driver.
//!
//! It translates nothing itself: what a byte's place is, only `map_read` and `prepare_write` say.

use std::ops::ControlFlow;

use crate::address::{GuestRange, HostOffset};
use crate::driver::{BlockDriver, State, Status, StatusQuery, StatusVisitor};
use crate::error::{Error, ErrorKind, Result};
use crate::plan::{MapMode, Piece, Place, ReadPlan, SlowReason, StorageId, WritePlan};
use crate::storage::{Durability, Storage};
use crate::sync::Arc;

/// Bytes that the first plan of a status enumeration covers; each one covers twice as many as the one
/// before, so that a visitor who soon has enough does not pay for a whole disk. Our choice.
const STATUS_STEP_LEN: u64 = 1 << 22;

/// Most bytes that one plan of a status enumeration covers: bounds the pieces held at a time when the
/// image is fragmented (10 MiB where every cluster of 512 bytes is one). Our choice.
const STATUS_STEP_LEN_MAX: u64 = 128 << 20;

/// The part of a range at `offset` with `len` bytes, checked against the size of the disk.
pub fn checked_range<D: BlockDriver + ?Sized>(driver: &D, offset: u64, len: u64) -> Result<GuestRange> {
    let size = driver.size();
    match GuestRange::new(offset, len) {
        Some(range) if range.end() <= size => Ok(range),
        _ => Err(Error::new(
            ErrorKind::OutOfBounds,
            format!("{len} bytes reach beyond the disk of {size} bytes"),
        )
        .with_offset(offset)),
    }
}

/// Fails unless the image can be written now.
pub fn check_writable<D: BlockDriver + ?Sized>(driver: &D) -> Result<()> {
    if !driver.facts().writable {
        return Err(Error::new(ErrorKind::ReadOnly, "the image was opened read-only"));
    }
    match driver.state() {
        State::Live => Ok(()),
        State::Failed => {
            Err(Error::new(ErrorKind::Failed, "an earlier failure has made the image read-only"))
        }
        State::Closed => Err(Error::new(ErrorKind::Failed, "the image has been closed")),
    }
}

/// See [`BlockDriver::pread`].
pub fn read<D: BlockDriver + ?Sized>(driver: &D, offset: u64, buf: &mut [u8]) -> Result<()> {
    let mut plan = ReadPlan::default();
    let range = checked_range(driver, offset, buf.len() as u64)?;
    if range.is_empty() {
        return Ok(());
    }
    driver.map_read(range, MapMode::Wait, &mut plan)?;
    let mut rest = buf;
    let mut at = offset;
    for piece in plan.pieces.iter() {
        let (part, behind) = split_mut(rest, piece.len)?;
        rest = behind;
        read_piece(driver, piece, at, part)?;
        at += piece.len;
    }
    if rest.is_empty() { Ok(()) } else { Err(gap(at)) }
}

fn read_piece<D: BlockDriver + ?Sized>(driver: &D, piece: &Piece, at: u64, part: &mut [u8]) -> Result<()> {
    match piece.place {
        Place::Data { storage, at: host } => read_exact(storage_of(driver, storage)?, host, part),
        Place::Zero { .. } => {
            part.fill(0);
            Ok(())
        }
        Place::Slow(SlowReason::Compressed | SlowReason::ColdTable | SlowReason::Allocate) => {
            driver.read_slow(at, part)
        }
    }
}

/// Fills `buf` from the storage; its end inside the range is an error of the file, never zeroes.
pub fn read_exact(storage: &Arc<dyn Storage>, at: HostOffset, buf: &mut [u8]) -> Result<()> {
    let got = storage.pread(buf, at).map_err(|e| storage_error(storage, "cannot read", at, e))?;
    if got == buf.len() { Ok(()) } else { Err(short_read(storage, at, got)) }
}

/// The error of a storage that ends inside of what its image says is data.
pub fn short_read(storage: &Arc<dyn Storage>, at: HostOffset, got: usize) -> Error {
    Error::new(ErrorKind::Io, "the file ends inside of the image's data: it is truncated or has shrunk")
        .with_path(&storage.facts().path)
        .with_offset(at.0.saturating_add(got as u64))
}

/// An error of a call on `storage` at `at`.
pub fn storage_error(
    storage: &Arc<dyn Storage>,
    what: &'static str,
    at: HostOffset,
    source: std::io::Error,
) -> Error {
    Error::io(what, source).with_path(&storage.facts().path).with_offset(at.0)
}

/// See [`BlockDriver::pwrite`].
pub fn write<D: BlockDriver + ?Sized>(
    driver: &D,
    offset: u64,
    buf: &[u8],
    durability: Durability,
) -> Result<()> {
    check_writable(driver)?;
    let range = checked_range(driver, offset, buf.len() as u64)?;
    if range.is_empty() {
        return if durability.is_fua() { driver.make_durable() } else { Ok(()) };
    }
    let mut plan = WritePlan::default();
    driver.prepare_write(range, MapMode::Wait, &mut plan)?;
    let in_place = durability.is_fua() && plan.durable_in_place;
    let written =
        write_pieces(driver, &plan, buf, offset, if in_place { durability } else { Durability::Later });
    let slow = plan.pieces.iter().any(|piece| matches!(piece.place, Place::Slow(_)));
    let finished = driver.finish_write(&mut plan, written.is_ok());
    written?;
    finished?;
    if durability.is_fua() && (!in_place || slow) { driver.make_durable() } else { Ok(()) }
}

fn write_pieces<D: BlockDriver + ?Sized>(
    driver: &D,
    plan: &WritePlan,
    buf: &[u8],
    offset: u64,
    durability: Durability,
) -> Result<()> {
    let mut rest = buf;
    let mut at = offset;
    for piece in plan.pieces.iter() {
        let len = usize::try_from(piece.len).map_err(|_| gap(at))?;
        let (part, behind) = rest.split_at_checked(len).ok_or_else(|| gap(at))?;
        rest = behind;
        match piece.place {
            Place::Data { storage, at: host } => {
                let storage = storage_of(driver, storage)?;
                storage
                    .pwrite(part, host, durability)
                    .map_err(|e| storage_error(storage, "cannot write", host, e))?;
            }
            Place::Slow(_) => driver.write_slow(at, part)?,
            Place::Zero { .. } => return Err(gap(at)),
        }
        at += piece.len;
    }
    if rest.is_empty() { Ok(()) } else { Err(gap(at)) }
}

/// See [`BlockDriver::status`]. Dirty bitmaps are not in a plan: drivers that have some answer those
/// queries themselves and come here for the rest.
pub fn status<D: BlockDriver + ?Sized>(
    driver: &D,
    query: StatusQuery<'_>,
    range: GuestRange,
    visitor: StatusVisitor<'_>,
) -> Result<()> {
    checked_range(driver, range.offset(), range.len())?;
    let mut plan = ReadPlan::default();
    let mut rest = range;
    let mut step_len = STATUS_STEP_LEN;
    let mut pending: Option<(u64, Status)> = None;
    while !rest.is_empty() {
        let step = rest.prefix(step_len);
        step_len = (step_len * 2).min(STATUS_STEP_LEN_MAX);
        driver.map_read(step, MapMode::Holes, &mut plan)?;
        for piece in plan.pieces.iter() {
            let status = status_of(piece, query)?;
            match &mut pending {
                Some((len, last)) if *last == status => *len += piece.len,
                _ => {
                    if let Some((len, last)) = pending.replace((piece.len, status))
                        && visitor(len, last) == ControlFlow::Break(())
                    {
                        return Ok(());
                    }
                }
            }
        }
        rest = rest.skip(step.len());
    }
    if let Some((len, last)) = pending {
        let _ = visitor(len, last);
    }
    Ok(())
}

fn status_of(piece: &Piece, query: StatusQuery<'_>) -> Result<Status> {
    match query {
        StatusQuery::Depth => Ok(Status::Depth(piece.depth)),
        StatusQuery::Allocation => Ok(match piece.place {
            Place::Zero { allocated } => Status::Allocation { hole: !allocated, zero: true },
            Place::Data { .. } | Place::Slow(_) => Status::Allocation { hole: false, zero: false },
        }),
        StatusQuery::Bitmap(name) => Err(Error::new(
            ErrorKind::InvalidInput,
            format!("no bitmap '{}' was offered", name.escape_debug()),
        )),
    }
}

fn storage_of<D: BlockDriver + ?Sized>(driver: &D, id: StorageId) -> Result<&Arc<dyn Storage>> {
    driver
        .storages()
        .get(usize::from(id.0))
        .ok_or_else(|| Error::new(ErrorKind::Corrupt, "a plan names a storage that the driver does not have"))
}

fn split_mut(buf: &mut [u8], len: u64) -> Result<(&mut [u8], &mut [u8])> {
    let len = usize::try_from(len).unwrap_or(usize::MAX);
    if len > buf.len() {
        return Err(gap(0));
    }
    Ok(buf.split_at_mut(len))
}

/// The error for a plan that does not cover its range: a defect of a driver, never of an image.
fn gap(at: u64) -> Error {
    Error::new(ErrorKind::Corrupt, "the driver's plan does not cover the range").with_offset(at)
}
