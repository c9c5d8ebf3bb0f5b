//! EXPORT_NAME: the oldest way to choose an export. It is answered without a header, and has no way to fail but
//! to close.

use super::{Context, Outcome, protocol_str, refusal_text};
use crate::nbd::negotiate::{Agreed, CloseReason, State};
use crate::nbd::wire;

pub(super) fn answer(state: &State, data: &[u8], context: &mut Context<'_>) -> Outcome {
    let name = match protocol_str(data) {
        Ok(name) => name,
        Err(text) => return Outcome::Close(CloseReason::ExportNameRefused(text.to_owned())),
    };
    let mut info = match context.exports.find(name) {
        Ok(info) => info,
        Err(refusal) => {
            return Outcome::Close(CloseReason::ExportNameRefused(refusal_text(name, &refusal)));
        }
    };
    info.flags = info.wire_flags(state.structured);
    context.out.extend_from_slice(&info.size.to_be_bytes());
    context.out.extend_from_slice(&info.flags.bits().to_be_bytes());
    if !state.no_zeroes {
        context.out.extend_from_slice(&[0; wire::EXPORT_NAME_ZEROES_LEN]);
    }
    Outcome::Transmission(Box::new(Agreed {
        export: name.to_owned(),
        contexts: state.contexts_for(&info.name),
        info,
        structured: state.structured,
        block_size_asked: false,
        no_zeroes: state.no_zeroes,
    }))
}
