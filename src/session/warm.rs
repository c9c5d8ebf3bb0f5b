//! The warm path: a small read of one piece, or a small write, that waits for nobody, which most requests are, from its
//! header to its reply in one go.
//!
//! What such a request costs outside of the kernel is code that has to be fetched again behind each system call: every
//! request that took the way of all others spent a sixth of its time there. So this way is short, and what turns out to have
//! to wait, or to be out of the ordinary, goes on in [`read`](super::read) and [`write`](super::write), which do the same for
//! the client. Nothing may be decided differently here.

use nbd_img_formats::mover::{short_read, storage_error};
use nbd_img_formats::plan::MapMode;
use nbd_img_formats::storage::{InPlace, TryRead};
use nbd_img_formats::{Durability, Error, GuestRange, Piece, Place};

use super::end::End;
use super::engine::Session;
use super::layout::{CHUNK_HEADER_LEN_MAX, Framing, no_room};
use crate::export::DetectZeroes;
use crate::nbd::reply;
use crate::nbd::request::{Command, CommandFlags, Request};

/// Longest request that goes this way. Larger ones may be sent uncopied, asked for the file system's holes, or given to a
/// worker (from 32 KiB on), and for them what is saved here does not matter.
const WARM_LEN_MAX: u64 = 16 << 10;

/// What has come of a request here.
pub(super) enum Warm {
    /// It is answered.
    Served,
    /// It is begun, and this is what is left to do.
    Begun(Rest),
    /// Nothing: it is not for this way.
    Other,
}

/// What is left to do of a request that turned out not to be warm.
pub(super) enum Rest {
    /// A read whose plan is not of one piece of data, or for whose reply the batch has no room.
    ReadPlanned(GuestRange, Framing),
    /// A read, planned and noted, whose bytes are not in memory.
    ReadWaits(GuestRange, Framing),
    /// A write that waits for more than its storage. Nothing was written.
    WriteWaits(GuestRange),
    /// To say why.
    Failed(Error),
}

impl Session {
    /// Serves the request whose header is at the head of the input, if it is one for this way. The input is as it was
    /// unless it is [served](Warm::Served).
    pub(super) fn serve_warm(&mut self, request: &Request) -> Warm {
        if request.len == 0 || request.len > WARM_LEN_MAX {
            return Warm::Other;
        }
        let warm = match request.command {
            Command::Read => self.read_warm(request),
            Command::Write => self.write_warm(request),
            Command::Disconnect
            | Command::Flush
            | Command::Trim
            | Command::Cache
            | Command::WriteZeroes
            | Command::BlockStatus
            | Command::Unknown(_) => Warm::Other,
        };
        if let Warm::Served = warm {
            self.input.consume(self.rules.form.request_header_len() + request.payload_len as usize);
        }
        warm
    }

    fn read_warm(&mut self, request: &Request) -> Warm {
        let export = &self.cell.export;
        let (reads, driver) = (export.in_place().reads, export.driver());
        if reads == InPlace::Never {
            return Warm::Other;
        }
        let Ok(range) = export.range(request.offset, request.len) else { return Warm::Other };
        if driver.map_read(range, MapMode::Try, &mut self.read_plan).is_err() {
            self.read_plan.reset();
            return Warm::Other;
        }
        let framing = self.framing(request);
        let (storage, at) = match self.read_plan.pieces[..] {
            [Piece { len, place: Place::Data { storage, at }, .. }] if len == request.len => (storage, at),
            _ => return Warm::Begun(Rest::ReadPlanned(range, framing)),
        };
        let Some(storage) = driver.storages().get(usize::from(storage.0)) else {
            return Warm::Begun(Rest::ReadPlanned(range, framing));
        };
        let (len, mark) = (request.len as usize, self.out.mark());
        if !self.out.make_room_for(CHUNK_HEADER_LEN_MAX + len) {
            return Warm::Begun(Rest::ReadPlanned(range, framing));
        }
        let to = self.reply_to(request);
        let head = match framing {
            Framing::Simple => reply::simple(None, to.cookie),
            Framing::Chunks | Framing::OneChunk | Framing::Bare => {
                reply::offset_data(to, request.offset, len as u32, reply::Place::Last)
            }
        };
        let room = if self.out.put(&head) { self.out.room(len) } else { None };
        let failure = match room.map(|room| storage.try_pread(room, at)) {
            Some(Ok(TryRead::Done(got))) if got == len => {
                self.out.push(len);
                self.read_plan.reset();
                self.note_small_read(range);
                return Warm::Served;
            }
            Some(Ok(TryRead::WouldWait(_))) => {
                self.out.cut_back(mark);
                self.note_small_read(range);
                return Warm::Begun(Rest::ReadWaits(range, framing));
            }
            Some(Ok(TryRead::Done(got))) => short_read(storage, at, got),
            Some(Err(error)) => storage_error(storage, "cannot read", at, error),
            None => no_room(),
        };
        self.out.cut_back(mark);
        self.read_plan.reset();
        Warm::Begun(Rest::Failed(failure))
    }

    /// As for every other read without compressed pieces that cannot be sent.
    fn note_small_read(&mut self, range: GuestRange) {
        self.ahead.note(range);
        self.read_ahead();
        self.uncopied.disturb();
    }

    fn write_warm(&mut self, request: &Request) -> Warm {
        let header_len = self.rules.form.request_header_len();
        let export = &self.cell.export;
        if self.input.len() < header_len + request.len as usize
            || export.durability(request.flags.contains(CommandFlags::FUA)) != Durability::Later
            || export.detect_zeroes() != DetectZeroes::Off
            || !self.writes_in_place()
            || !self.out.make_room_for(CHUNK_HEADER_LEN_MAX)
        {
            return Warm::Other;
        }
        let Ok(range) = self.cell.export.range(request.offset, request.len) else { return Warm::Other };
        match self.write_in_place(range, header_len) {
            Some(Ok(())) => {
                if self.out.put(&reply::success(self.reply_to(request))) {
                    Warm::Served
                } else {
                    Warm::Begun(Rest::Failed(no_room()))
                }
            }
            Some(Err(error)) => Warm::Begun(Rest::Failed(error)),
            None => Warm::Begun(Rest::WriteWaits(range)),
        }
    }

    /// Does what is left to do of a request that was begun here.
    pub(super) async fn serve_rest(&mut self, request: Request, rest: Rest) -> Result<(), End> {
        self.input.consume(self.rules.form.request_header_len());
        match rest {
            Rest::ReadPlanned(range, framing) => self.read_planned(request, range, framing, None).await?,
            Rest::ReadWaits(range, framing) => {
                self.read_ahead_of_miss();
                self.submit_read(request, range, framing).await?;
            }
            Rest::WriteWaits(range) => self.hand_write_on(request, range, Durability::Later).await?,
            Rest::Failed(error) => self.reply_error(&request, &error).await?,
        }
        self.input.consume(request.payload_len as usize);
        Ok(())
    }
}
