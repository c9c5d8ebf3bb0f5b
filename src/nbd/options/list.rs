//! LIST: the names and descriptions of the exports that this connection may see.

use super::{Context, Outcome};
use crate::nbd::export_info::is_protocol_string;
use crate::nbd::negotiate::State;
use crate::nbd::text::protocol_text;
use crate::nbd::wire;

pub(super) fn answer(state: &State, data: &[u8], context: &mut Context<'_>) -> Outcome {
    if !data.is_empty() {
        return context.invalid("LIST takes no data");
    }
    for export in context.exports.list() {
        if !is_protocol_string(&export.name) || (export.tls_required && !state.tls_up) {
            continue;
        }
        let Ok(name_len) = u32::try_from(export.name.len()) else {
            continue;
        };
        let description = protocol_text(&export.description).as_bytes();
        context.reply(wire::REP_SERVER, &[&name_len.to_be_bytes(), export.name.as_bytes(), description]);
    }
    context.ack()
}
