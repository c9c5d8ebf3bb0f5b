//! EXTENDED_HEADERS: requests and replies with 64-bit lengths. It needs no structured replies first, and wins over
//! them; what contexts were selected stays so.

use super::{Context, Outcome};
use crate::nbd::negotiate::State;
use crate::nbd::reply::ReplyForm;

pub(super) fn answer(state: &mut State, data: &[u8], context: &mut Context<'_>) -> Outcome {
    if !data.is_empty() {
        return context.invalid("EXTENDED_HEADERS takes no data");
    }
    if state.form == ReplyForm::Extended {
        return context.invalid("extended headers were agreed already");
    }
    state.form = ReplyForm::Extended;
    context.ack()
}
