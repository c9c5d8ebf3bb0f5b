//! STRUCTURED_REPLY: replies in chunks, with texts and holes.

use super::{Context, Outcome};
use crate::nbd::negotiate::State;

pub(super) fn answer(state: &mut State, data: &[u8], context: &mut Context<'_>) -> Outcome {
    if !data.is_empty() {
        return context.invalid("STRUCTURED_REPLY takes no data");
    }
    if state.structured {
        return context.invalid("structured replies were agreed already");
    }
    state.structured = true;
    context.ack()
}
