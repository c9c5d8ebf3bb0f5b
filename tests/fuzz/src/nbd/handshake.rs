//! Target `nbd_handshake`: what a client sends before an export is agreed, cut into pieces anywhere.
//!
//! The first byte chooses the kind of server, the next three where the input is cut. In pieces it has to give the
//! same as in one; what the server says is read by the tests' own reader, which panics at whatever breaks a rule.

use nbd_img::nbd::negotiate::{INPUT_MAX_LEN, Next, TlsMode};

use crate::nbd_support::{Exports, Run, replies_then_rest, run_pieces};

/// Negotiates with the input, all at once and piece by piece.
pub fn run(input: &[u8]) {
    let [kind, cuts @ ..] = input else { return };
    let Some((cuts, input)) = cuts.split_first_chunk::<3>() else { return };
    let tls = match kind & 3 {
        0 | 1 => TlsMode::Off,
        2 => TlsMode::Optional,
        _ => TlsMode::Required,
    };
    let exports = Exports { draining: kind & 0x1c == 0x1c, ..Exports::new() };
    let whole = run_pieces(tls, &exports, [input]);
    check(&whole, input.len());
    assert_eq!(run_pieces(tls, &exports, pieces(input, *cuts)), whole);
    if input.len() < 200 {
        assert_eq!(run_pieces(tls, &exports, input.chunks(1)), whole);
    }
}

fn check(run: &Run, input_len: usize) {
    let (replies, rest) = replies_then_rest(&run.out);
    // EXPORT_NAME is answered by 10 bytes, and 124 zeroes unless they were declined.
    let export_name = matches!(run.next, Next::Transmission(_)) && [10, 134].contains(&rest.len());
    assert!(rest.is_empty() || export_name, "{} bytes that are no reply", rest.len());
    // An option has a header of 16 bytes, and at most a few replies.
    assert!(replies.len() <= 8 * (1 + input_len / 16) + input_len, "{} replies", replies.len());
    match &run.next {
        Next::NeedMore => assert!(run.left.len() < INPUT_MAX_LEN),
        Next::Transmission(agreed) => {
            assert!(agreed.form.is_chunked() || agreed.contexts.is_empty());
            let mut ids: Vec<u32> = agreed.contexts.iter().map(|context| context.id).collect();
            ids.sort_unstable();
            ids.dedup();
            assert!(ids.len() == agreed.contexts.len() && !ids.contains(&0));
        }
        Next::Close { reason } => {
            let text = reason.to_string();
            assert!(text.len() < 1000 && !text.chars().any(char::is_control), "{text}");
        }
        Next::Flush | Next::StartTls => panic!("no end: {:?}", run.next),
    }
}

/// The input cut in up to four.
pub(super) fn pieces(input: &[u8], cuts: [u8; 3]) -> Vec<&[u8]> {
    let mut rest = input;
    let mut pieces = Vec::new();
    for cut in cuts {
        let (piece, behind) = rest.split_at(usize::from(cut).min(rest.len()));
        pieces.push(piece);
        rest = behind;
    }
    pieces.push(rest);
    pieces
}
