//! INFO and GO: facts of an export, and, for GO, the choice of it. Both say the same to the same question.

use super::{Context, Fields, Outcome, protocol_str};
use crate::nbd::export_info::ExportInfo;
use crate::nbd::negotiate::{Agreed, State};
use crate::nbd::text::protocol_text;
use crate::nbd::wire;

pub(super) fn answer_info(state: &State, data: &[u8], context: &mut Context<'_>) -> Outcome {
    match tell(state, data, context) {
        Ok(_) => context.ack(),
        Err(answered) => answered,
    }
}

pub(super) fn answer_go(state: &State, data: &[u8], context: &mut Context<'_>) -> Outcome {
    match tell(state, data, context) {
        Ok(agreed) => {
            context.ack();
            Outcome::Transmission(agreed)
        }
        Err(answered) => answered,
    }
}

/// Sends the information replies, without the final ACK; an error is answered already.
fn tell(state: &State, data: &[u8], context: &mut Context<'_>) -> Result<Box<Agreed>, Outcome> {
    let question = Question::parse(data).map_err(|text| context.invalid(text))?;
    let info =
        context.find(state, question.name).map_err(|refusal| context.refused(question.name, &refusal))?;
    let agreed = state.agree(question.name, info, question.block_size_asked);
    let info = &agreed.info;
    tell_export(info, context);
    if question.name_asked {
        tell_text(wire::INFO_NAME, &info.name, context);
    }
    if question.description_asked && !info.description.is_empty() {
        tell_text(wire::INFO_DESCRIPTION, &info.description, context);
    }
    // Sent unasked too, as QEMU does: a client that did not ask ignores it or gains by it.
    tell_block_size(info, context);
    Ok(agreed)
}

fn tell_export(info: &ExportInfo, context: &mut Context<'_>) {
    context.reply(
        wire::REP_INFO,
        &[&wire::INFO_EXPORT.to_be_bytes(), &info.size.to_be_bytes(), &info.flags.bits().to_be_bytes()],
    );
}

fn tell_text(info_type: u16, text: &str, context: &mut Context<'_>) {
    context.reply(wire::REP_INFO, &[&info_type.to_be_bytes(), protocol_text(text).as_bytes()]);
}

fn tell_block_size(info: &ExportInfo, context: &mut Context<'_>) {
    context.reply(
        wire::REP_INFO,
        &[
            &wire::INFO_BLOCK_SIZE.to_be_bytes(),
            &info.block_min_len.to_be_bytes(),
            &info.block_preferred_len.to_be_bytes(),
            &info.payload_max_len.to_be_bytes(),
        ],
    );
}

/// The data of INFO and GO.
struct Question<'a> {
    name: &'a str,
    name_asked: bool,
    description_asked: bool,
    block_size_asked: bool,
}

impl<'a> Question<'a> {
    /// Information requests that are not known are skipped, as the protocol demands.
    fn parse(data: &'a [u8]) -> Result<Self, &'static str> {
        const LENGTHS: &str = "the lengths in this option do not add up";
        let mut fields = Fields(data);
        let name = protocol_str(fields.counted().ok_or(LENGTHS)?)?;
        let request_count = fields.u16().ok_or(LENGTHS)?;
        let mut question =
            Self { name, name_asked: false, description_asked: false, block_size_asked: false };
        for _ in 0..request_count {
            match fields.u16().ok_or(LENGTHS)? {
                wire::INFO_NAME => question.name_asked = true,
                wire::INFO_DESCRIPTION => question.description_asked = true,
                wire::INFO_BLOCK_SIZE => question.block_size_asked = true,
                _ => {}
            }
        }
        if fields.is_empty() { Ok(question) } else { Err(LENGTHS) }
    }
}
