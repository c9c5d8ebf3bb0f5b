//! LIST_META_CONTEXT and SET_META_CONTEXT: which contexts an export has, and which of them BLOCK_STATUS will tell.

use super::{Context, Fields, Outcome, protocol_str};
use crate::nbd::negotiate::{AgreedContext, Selection, State};
use crate::nbd::wire;

/// LIST: a query that ends with a colon stands for all names that start so; no query stands for all.
pub(super) fn answer_list(state: &State, data: &[u8], context: &mut Context<'_>) -> Outcome {
    let question = match Question::parse(data) {
        Ok(question) => question,
        Err(text) => return context.invalid(text),
    };
    let info = match context.find(state, question.export) {
        Ok(info) => info,
        Err(refusal) => return context.refused(question.export, &refusal),
    };
    for name in &info.contexts {
        let wanted = |query: &&str| name == query || (query.ends_with(':') && name.starts_with(query));
        if question.queries.is_empty() || question.queries.iter().any(wanted) {
            // The id means nothing in a list; the protocol asks for zero.
            tell(0, name, context);
        }
    }
    context.ack()
}

/// SET: replaces the earlier selection, also when it fails. Only whole names select; a name that is asked for
/// twice is selected once.
pub(super) fn answer_set(state: &mut State, data: &[u8], context: &mut Context<'_>) -> Outcome {
    state.selection = None;
    if !state.form.is_chunked() {
        return context.invalid("SET_META_CONTEXT needs structured replies or extended headers first");
    }
    let question = match Question::parse(data) {
        Ok(question) => question,
        Err(text) => return context.invalid(text),
    };
    let info = match context.find(state, question.export) {
        Ok(info) => info,
        Err(refusal) => return context.refused(question.export, &refusal),
    };
    let mut contexts = Vec::new();
    for (id, name) in (1..).zip(info.contexts) {
        if question.queries.contains(&name.as_str()) {
            tell(id, &name, context);
            contexts.push(AgreedContext { id, name });
        }
    }
    state.selection = Some(Selection { export: info.name, contexts });
    context.ack()
}

fn tell(id: u32, name: &str, context: &mut Context<'_>) {
    context.reply(wire::REP_META_CONTEXT, &[&id.to_be_bytes(), name.as_bytes()]);
}

/// The data of both options.
struct Question<'a> {
    export: &'a str,
    queries: Vec<&'a str>,
}

impl<'a> Question<'a> {
    fn parse(data: &'a [u8]) -> Result<Self, &'static str> {
        const LENGTHS: &str = "the lengths in this option do not add up";
        let mut fields = Fields(data);
        let export = protocol_str(fields.counted().ok_or(LENGTHS)?)?;
        let query_count = fields.u32().ok_or(LENGTHS)?;
        // Not reserved ahead: the count is the client's, the data behind it is what bounds the list.
        let mut queries = Vec::new();
        for _ in 0..query_count {
            queries.push(protocol_str(fields.counted().ok_or(LENGTHS)?)?);
        }
        if fields.is_empty() { Ok(Self { export, queries }) } else { Err(LENGTHS) }
    }
}
