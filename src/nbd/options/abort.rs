//! ABORT: acknowledge, then close; data, which there should be none of, does not matter.

use super::{Context, Outcome};
use crate::nbd::negotiate::CloseReason;

pub(super) fn answer(context: &mut Context<'_>) -> Outcome {
    context.ack();
    Outcome::Close(CloseReason::Aborted)
}
