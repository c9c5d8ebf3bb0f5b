//! STARTTLS: acknowledge and hand over to the TLS handshake, where TLS is configured.

use super::{Context, Outcome};
use crate::nbd::negotiate::{State, TlsMode};
use crate::nbd::wire;

pub(super) fn answer(state: &State, data: &[u8], context: &mut Context<'_>) -> Outcome {
    if !data.is_empty() {
        return context.invalid("STARTTLS takes no data");
    }
    if state.tls_up {
        return context.invalid("TLS is up already");
    }
    match state.tls {
        TlsMode::Off => context.error(wire::REP_ERR_POLICY, "TLS is not configured on this server"),
        TlsMode::Optional | TlsMode::Required => {
            context.ack();
            Outcome::StartTls
        }
    }
}
