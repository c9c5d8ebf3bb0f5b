//! BLOCK_STATUS: the agreed metadata contexts, or those of them that the request picks, each asked of the
//! driver on a worker and answered in a chunk of its own.

use std::ops::ControlFlow;
use std::sync::Arc;

use nbd_img_formats::driver::Status;
use nbd_img_formats::storage::IoBuf;
use nbd_img_formats::sync::Mutex;
use nbd_img_formats::workers::Lane;
use nbd_img_formats::{BlockDriver, GuestRange, Result, StatusQuery};

use super::budget::FLOOR_LEN;
use super::end::End;
use super::engine::Session;
use super::pending::{StatusAnswer, Work};
use super::write::Admission;
use crate::nbd::block_status::{Builder, EXTENTS_MAX, Progress};
use crate::nbd::negotiate::AgreedContext;
use crate::nbd::request::{CommandFlags, Request, status_payload};
use crate::nbd::{reply, wire};

/// Bytes that a run of a block status takes until it is sent.
const RUN_LEN: usize = size_of::<(u64, u32)>();

impl Session {
    /// Starts a block status whose payload picks contexts; returns whether the payload was there.
    pub(super) async fn start_picked_status(&mut self, request: Request) -> std::result::Result<bool, End> {
        let header_len = self.rules.form.request_header_len();
        // A few bytes: `check` has refused one that is longer than the ids of all contexts.
        let total = header_len + request.payload_len as usize;
        if self.input.len() < total {
            self.input.make_room_for(total);
            return Ok(false);
        }
        let payload = self.input.bytes().get(header_len..total).unwrap_or_default();
        let picked = status_payload(&request, payload, &self.rules, &self.contexts);
        self.input.consume(total);
        match picked {
            Ok((request, ids)) => self.start_block_status(request, Some(ids)).await?,
            Err(reject) => self.reply_failure(&request, reject.errno, reject.text).await?,
        }
        Ok(true)
    }

    /// Asks the driver about all agreed contexts, or about those with these ids.
    pub(super) async fn start_block_status(
        &mut self,
        request: Request,
        ids: Option<Vec<u32>>,
    ) -> std::result::Result<(), End> {
        let Some(range) = self.range_or_reply(&request).await? else { return Ok(()) };
        let picked = |context: &&AgreedContext| ids.as_ref().is_none_or(|ids| ids.contains(&context.id));
        let contexts: Vec<AgreedContext> = self.contexts.iter().filter(picked).cloned().collect();
        let mut runs_max = if request.flags.contains(CommandFlags::REQ_ONE) { 1 } else { EXTENTS_MAX };
        // No run is shorter than a sector, but for the last one.
        runs_max = runs_max.min(usize::try_from(request.len / 512 + 1).unwrap_or(usize::MAX));
        let Admission(lease) = match self.admit(runs_max * contexts.len() * RUN_LEN).await? {
            Some(admission) => admission,
            None => {
                // The client asks for the rest again.
                runs_max = (FLOOR_LEN / RUN_LEN / contexts.len()).max(1);
                Admission(None)
            }
        };
        let answers = Arc::new(Mutex::new(Vec::new()));
        let held_len = runs_max * contexts.len() * RUN_LEN;
        let work = Work::Status { answers: Arc::clone(&answers) };
        let token = self.insert_call(request, work, held_len, lease);
        self.shard.call(&self.cell.export, Lane::Read, token, IoBuf::default(), move |driver, _| {
            for context in &contexts {
                let runs = runs(driver, query(&context.name), range, runs_max)?;
                answers.lock().push(StatusAnswer { context: context.id, runs });
            }
            Ok(0)
        });
        Ok(())
    }

    /// The chunks of a block status, one for each context.
    pub(super) async fn reply_status(
        &mut self,
        request: &Request,
        answers: Vec<StatusAnswer>,
    ) -> std::result::Result<(), End> {
        let to = self.reply_to(request);
        self.scratch.clear();
        let last = answers.len().saturating_sub(1);
        // Each answer goes when it is encoded, which takes no more bytes: the request's lease is for either.
        for (index, answer) in answers.into_iter().enumerate() {
            let mut builder = Builder::new(request, &self.rules);
            if self.contexts.iter().any(|context| context.id == answer.context && is_bitmap(&context.name)) {
                builder = builder.of_dirty_bitmap();
            }
            for (len, flags) in &answer.runs {
                if builder.push(*len, *flags) == Progress::Full {
                    break;
                }
            }
            let place = if index == last { reply::Place::Last } else { reply::Place::More };
            reply::push_block_status(&mut self.scratch, to, answer.context, &builder.finish(), place);
        }
        let put = self.put_scratch().await;
        if self.scratch.capacity() > FLOOR_LEN {
            self.scratch = Vec::new();
        }
        put
    }
}

fn is_bitmap(context: &str) -> bool {
    context.starts_with(wire::DIRTY_BITMAP_PREFIX)
}

/// What a context asks of the driver. Only names that the export offers come here.
fn query(context: &str) -> StatusQuery<'_> {
    match context.strip_prefix(wire::DIRTY_BITMAP_PREFIX) {
        Some(bitmap) => StatusQuery::Bitmap(bitmap),
        None if context == wire::ALLOCATION_DEPTH => StatusQuery::Depth,
        None => StatusQuery::Allocation,
    }
}

/// Consecutive runs of the range with their protocol flags, at most `runs_max`.
fn runs(
    driver: &Arc<dyn BlockDriver>,
    query: StatusQuery<'_>,
    range: GuestRange,
    runs_max: usize,
) -> Result<Vec<(u64, u32)>> {
    let mut runs = Vec::new();
    driver.status(query, range, &mut |len, status| {
        runs.push((len, flags(status)));
        if runs.len() < runs_max { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    })?;
    Ok(runs)
}

fn flags(status: Status) -> u32 {
    match status {
        Status::Allocation { hole, zero } => {
            (if hole { wire::STATE_HOLE } else { 0 }) | (if zero { wire::STATE_ZERO } else { 0 })
        }
        Status::Depth(depth) => depth,
        Status::Bitmap { dirty } => {
            if dirty {
                wire::STATE_DIRTY
            } else {
                0
            }
        }
    }
}
