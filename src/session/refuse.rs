//! Requests that are refused: their payload is read off, so that the stream stays in step, then they are answered.

use super::end::End;
use super::engine::Session;
use crate::nbd::errno::NbdError;
use crate::nbd::request::{DRAIN_MAX_LEN, Disposition, Reject, Request};

/// A refused request whose payload is being read off.
pub(super) struct Refused {
    request: Request,
    reject: Reject,
    left: usize,
}

impl Session {
    pub(super) fn refuse(&mut self, request: Request, reject: Reject) -> Result<(), End> {
        let left = match reject.payload {
            Disposition::Nothing => 0,
            Disposition::Drain { len } => len as usize,
            Disposition::HangUp => return Err(End::Oversize),
        };
        self.input.consume(self.rules.form.request_header_len());
        self.refused = Some(Refused { request, reject, left });
        Ok(())
    }

    /// Throws the payload of a refused request away and then answers it. Returns whether that is done.
    pub(super) async fn read_off_refused(&mut self) -> Result<bool, End> {
        let Some(refused) = &mut self.refused else { return Ok(true) };
        let len = refused.left.min(self.input.len());
        self.input.consume(len);
        refused.left -= len;
        if refused.left > 0 {
            return Ok(false);
        }
        let (request, reject) = (refused.request, refused.reject);
        self.refused = None;
        tracing::debug!(?request, text = reject.text, "request refused");
        self.reply_failure(&request, reject.errno, reject.text).await?;
        Ok(true)
    }
}

/// The answer to what comes while the server waits for the last requests before it ends.
pub(super) fn shutdown(request: &Request) -> Reject {
    let payload = match request.payload_len {
        0 => Disposition::Nothing,
        len if len <= DRAIN_MAX_LEN => Disposition::Drain { len },
        _ => Disposition::HangUp,
    };
    Reject { errno: NbdError::Eshutdown, text: "the server is going down", payload }
}
