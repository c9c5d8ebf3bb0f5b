//! STARTTLS as far as it goes without a TLS stack: what is let through before it, and that nothing outlives it.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::wildcard_enum_match_arm)] // Tests fail loudly.

mod nbd_support;

use nbd_img::nbd::negotiate::{CloseReason, Negotiation, NegotiationConfig, Next, TlsMode};
use nbd_img::nbd::reply::ReplyForm;
use nbd_support::*;

#[test]
fn starttls_without_tls_is_refused_by_policy() {
    let exports = Exports::new();
    let run = run(&exports, &client(MODERN, &[option(5, b""), option(5, b"x"), go("disk")]));
    assert_eq!(kinds(&run.out)[..2], [(5, POLICY), (5, INVALID)]);
    agreed(&run);
}

/// S15, CVE-2021-3716: nothing of the plain text survives STARTTLS.
#[test]
fn tls_forgets_what_was_agreed_in_plain_text() {
    let exports = Exports::new();
    let input = client(
        MODERN,
        &[option(8, b""), option(10, &meta_data("disk", &["base:allocation"])), option(5, b""), go("disk")],
    );
    let mut negotiation = Negotiation::new(NegotiationConfig { tls: TlsMode::Optional });
    let mut out = Vec::new();
    negotiation.greeting(&mut out);
    let step = negotiation.step(&input, &exports, &mut out);
    assert_eq!(step.next, Next::StartTls);
    assert_eq!(
        input[step.consumed..],
        go("disk"),
        "injected plain text is left for the TLS stack to choke on"
    );
    assert_eq!(kinds(&out), [(8, ACK), (10, META), (10, ACK), (5, ACK)]);
    // Without the handshake nothing goes on.
    let premature = negotiation.step(&go("disk"), &exports, &mut out);
    assert_eq!(premature.next, Next::Close { reason: CloseReason::AlreadyOver });
    negotiation.tls_established();
    let secret = [option(5, b""), option(8, b""), go("disk")].concat();
    let Next::Transmission(agreed) = negotiation.step(&secret, &exports, &mut out).next else {
        panic!("no transmission");
    };
    assert!(agreed.form == ReplyForm::Structured && agreed.no_zeroes && agreed.contexts.is_empty());
    assert_eq!(kinds(&out)[4..6], [(5, INVALID), (8, ACK)], "structured replies were forgotten");
}

#[test]
fn required_tls_lets_nothing_but_starttls_and_abort_through() {
    let exports = Exports::new();
    let options: Vec<_> = [3, 6, 7, 8, 9, 10, 11, 99].map(|number| option(number, b"")).into();
    let mut input = client(MODERN, &options);
    input.extend(option(5, b"x"));
    input.extend(option(2, b""));
    let run = run_pieces(TlsMode::Required, &exports, [&input[..]]);
    let seen = kinds(&run.out);
    assert!(seen[..8].iter().all(|(_, kind)| *kind == TLS_REQD));
    assert_eq!(seen[8..], [(5, INVALID), (2, ACK)]);
    let run = run_pieces(TlsMode::Required, &exports, [&client(MODERN, &[option(1, b"disk")])[..]]);
    closed(&run);
    let run = run_pieces(TlsMode::Required, &exports, [&client(MODERN, &[option(5, b""), go("disk")])[..]]);
    agreed(&run);
}
