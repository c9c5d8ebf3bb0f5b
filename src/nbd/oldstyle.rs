//! The oldstyle negotiation: the server tells what it has, and transmission begins. The client has no say, so there is
//! one export, no option, and no way to refuse but to close before anything is sent.

use zerocopy::IntoBytes;
use zerocopy::byteorder::big_endian::{U32, U64};

use super::export_info::{ExportDirectory, Refusal};
use super::negotiate::{Agreed, CloseReason, State};
use super::options::{Outcome, refusal_text};
use super::wire;

/// Appends all that the server has to say of the default export.
pub(super) fn begin(state: &State, exports: &dyn ExportDirectory, out: &mut Vec<u8>) -> Outcome {
    let found = if exports.draining() { Err(Refusal::Shutdown) } else { exports.find("") };
    let info = match found {
        Ok(info) if info.tls_required && !state.tls_up => Err(Refusal::TlsRequired),
        found => found,
    };
    let agreed: Box<Agreed> = match info {
        Ok(info) => state.agree("", info, false),
        Err(refusal) => {
            return Outcome::Close(CloseReason::OldstyleRefused(refusal_text("", &refusal)));
        }
    };
    let greeting = wire::OldstyleGreeting {
        init_passwd: U64::new(wire::NBDMAGIC),
        magic: U64::new(wire::CLISERV_MAGIC),
        size: U64::new(agreed.info.size),
        flags: U32::new(agreed.info.flags.bits().into()),
    };
    out.extend_from_slice(greeting.as_bytes());
    out.extend_from_slice(&[0; wire::EXPORT_NAME_ZEROES_LEN]);
    Outcome::Transmission(agreed)
}
