//! What a session does: writes by a plan that waits for nothing, its pieces carried out by hand, and
//! what is slow given to the blocking call; zeroes at once where they can be; flushes that leave cleaning up
//! for later.

use nbd_img_formats::plan::MapMode;
use nbd_img_formats::storage::TryRead;
use nbd_img_formats::{
    BlockDriver, Durability, Effort, Error, GuestRange, Place, ReadPlan, Result, WritePlan, ZeroRequest,
};

/// As `pwrite`, by a plan.
pub fn write(driver: &dyn BlockDriver, offset: u64, bytes: &[u8], durability: Durability) -> Result<()> {
    let range = GuestRange::new(offset, bytes.len() as u64).unwrap();
    let mut plan = WritePlan::default();
    driver.prepare_write(range, MapMode::Try, &mut plan)?;
    assert_eq!(plan.pieces.covered_len(), range.len());
    let in_place = durability.is_fua() && plan.durable_in_place;
    let mut slow = Vec::new();
    let mut done = 0;
    let mut written = Ok(());
    for piece in plan.pieces.iter() {
        let part = &bytes[done..done + piece.len as usize];
        match piece.place {
            Place::Data { storage, at } => {
                let storage = &driver.storages()[usize::from(storage.0)];
                let how = if in_place { Durability::Fua } else { Durability::Later };
                written = written.and(storage.pwrite(part, at, how));
            }
            Place::Slow(_) => slow.push((offset + done as u64, part)),
            Place::Zero { .. } => panic!("a write plan has no zeroes"),
        }
        done += piece.len as usize;
    }
    let finished = driver.finish_write(&mut plan, written.is_ok());
    written.map_err(|e| Error::io("cannot write", e))?;
    finished?;
    for (at, part) in &slow {
        driver.write_slow(*at, part)?;
    }
    if durability.is_fua() && (!in_place || !slow.is_empty()) { driver.make_durable() } else { Ok(()) }
}

/// As `write_zeroes`.
pub fn zero(driver: &dyn BlockDriver, range: GuestRange, request: ZeroRequest) -> Result<()> {
    if driver.try_write_zeroes(range, request)? { Ok(()) } else { driver.write_zeroes(range, request) }
}

/// As `discard`.
pub fn discard(driver: &dyn BlockDriver, range: GuestRange, durability: Durability) -> Result<()> {
    if driver.try_discard(range, durability)? { Ok(()) } else { driver.discard(range, durability) }
}

/// As `pread`, by a plan.
pub fn read(driver: &dyn BlockDriver, offset: u64, buf: &mut [u8]) -> Result<()> {
    let range = GuestRange::new(offset, buf.len() as u64).unwrap();
    let mut plan = ReadPlan::default();
    driver.map_read(range, MapMode::Try, &mut plan)?;
    assert_eq!(plan.pieces.covered_len(), range.len());
    let mut done = 0;
    for piece in plan.pieces.iter() {
        let part = &mut buf[done..done + piece.len as usize];
        match piece.place {
            Place::Zero { .. } => part.fill(0),
            Place::Slow(_) => read_slow(driver, offset + done as u64, part)?,
            Place::Data { storage, at } => {
                let storage = &driver.storages()[usize::from(storage.0)];
                match storage.try_pread(part, at).map_err(|e| Error::io("cannot read", e))? {
                    TryRead::Done(len) => assert_eq!(len, part.len(), "data behind the end of the file"),
                    TryRead::WouldWait(_) => panic!("memory never waits"),
                }
            }
        }
        done += piece.len as usize;
    }
    Ok(())
}

/// A slow piece: what is decompressed already, what can be without waiting, or what has to be waited for.
pub fn read_slow(driver: &dyn BlockDriver, offset: u64, buf: &mut [u8]) -> Result<()> {
    if driver.try_read_slow(offset, buf)? {
        return Ok(());
    }
    let range = GuestRange::new(offset, buf.len() as u64).unwrap();
    if driver.warm(range, Effort::Compute)? && driver.try_read_slow(offset, buf)? {
        return Ok(());
    }
    driver.read_slow(offset, buf)
}
