//! EXTENDED_HEADERS: this server speaks compact headers only, and says so as a server that never heard of it.

use super::{Context, Outcome};
use crate::nbd::wire;

pub(super) fn answer(context: &mut Context<'_>) -> Outcome {
    context.error(wire::REP_ERR_UNSUP, "extended headers are not supported")
}
