//! Strings of clients and of ours, made fit for the wire and for logs.

use super::wire;

/// Characters of a client's string that are shown in a message. A name may have 4096 bytes, a whole message too,
/// so a message must never carry a name in full.
const SHOWN_CHARS: usize = 80;

/// A client's string for a message: in quotes, control characters escaped, cut after 80 characters.
pub fn quoted(text: &str) -> String {
    let mut shown = String::from("\"");
    for (index, character) in text.chars().enumerate() {
        if index == SHOWN_CHARS {
            shown.push_str("...");
            break;
        }
        shown.extend(character.escape_debug());
    }
    shown.push('"');
    shown
}

/// The longest start of `text` that has at most `max_len` bytes and ends at a character.
pub fn truncated(text: &str, max_len: usize) -> &str {
    &text[..text.floor_char_boundary(max_len)]
}

/// A text of ours as the protocol can carry it: without NUL, at most [`wire::STRING_MAX_LEN`] bytes.
pub(crate) fn protocol_text(text: &str) -> &str {
    let text = text.split('\0').next().unwrap_or_default();
    truncated(text, wire::STRING_MAX_LEN)
}
