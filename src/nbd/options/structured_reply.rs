//! STRUCTURED_REPLY: replies in chunks, with texts and holes.

use super::{Context, Outcome};
use crate::nbd::negotiate::State;
use crate::nbd::reply::ReplyForm;
use crate::nbd::wire;

pub(super) fn answer(state: &mut State, data: &[u8], context: &mut Context<'_>) -> Outcome {
    match state.form {
        ReplyForm::Extended => context.error(
            wire::REP_ERR_EXT_HEADER_REQD,
            "extended headers were agreed, whose replies come in chunks anyway",
        ),
        ReplyForm::Simple | ReplyForm::Structured if !data.is_empty() => {
            context.invalid("STRUCTURED_REPLY takes no data")
        }
        ReplyForm::Structured => context.invalid("structured replies were agreed already"),
        ReplyForm::Simple => {
            state.form = ReplyForm::Structured;
            context.ack()
        }
    }
}
