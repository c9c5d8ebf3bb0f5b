//! EXPORT_NAME: the oldest way to choose an export. It is answered without a header, and has no way to fail but
//! to close.

use super::{Context, Outcome, protocol_str, refusal_text};
use crate::nbd::negotiate::{CloseReason, State};
use crate::nbd::reply::ReplyForm;
use crate::nbd::wire;

pub(super) fn answer(state: &State, data: &[u8], context: &mut Context<'_>) -> Outcome {
    let name = match protocol_str(data) {
        Ok(name) => name,
        Err(text) => return Outcome::Close(CloseReason::ExportNameRefused(text.to_owned())),
    };
    if state.form == ReplyForm::Extended {
        let text = "extended headers were agreed, and only GO starts them".to_owned();
        return Outcome::Close(CloseReason::ExportNameRefused(text));
    }
    let info = match context.find(state, name) {
        Ok(info) => info,
        Err(refusal) => {
            return Outcome::Close(CloseReason::ExportNameRefused(refusal_text(name, &refusal)));
        }
    };
    let agreed = state.agree(name, info, false);
    context.out.extend_from_slice(&agreed.info.size.to_be_bytes());
    context.out.extend_from_slice(&agreed.info.flags.bits().to_be_bytes());
    if !state.no_zeroes {
        context.out.extend_from_slice(&[0; wire::EXPORT_NAME_ZEROES_LEN]);
    }
    Outcome::Transmission(agreed)
}
