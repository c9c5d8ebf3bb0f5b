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
    let mut negotiation =
        Negotiation::new(NegotiationConfig { tls: TlsMode::Optional, tls_up: false, oldstyle: false });
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

/// An export that is only to be had under TLS, beside one that is not: each option that names it wants TLS first, and
/// LIST does not show it.
#[test]
fn one_export_may_need_tls() {
    let mut exports = Exports::new();
    exports.exports[1].tls_required = true;
    let ask = || [option(6, &info_data("snap", &[])), option(9, &meta_data("snap", &[])), option(3, b"")];
    let mut input = client(MODERN, &[option(8, b"")]);
    input.extend(ask().concat());
    input.extend(option(10, &meta_data("snap", &["base:allocation"])));
    input.extend(go("snap"));
    input.extend(option(5, b""));
    input.extend(ask().concat());
    input.extend(go("snap"));
    let run1 = run_pieces(TlsMode::Optional, &exports, [&input[..]]);
    let seen = kinds(&run1.out);
    let before = [
        (8, ACK),
        (6, TLS_REQD),
        (9, TLS_REQD),
        (3, SERVER),
        (3, ACK),
        (10, TLS_REQD),
        (7, TLS_REQD),
        (5, ACK),
    ];
    assert_eq!(seen[..8], before);
    assert_eq!(seen.iter().filter(|kind| **kind == (3, SERVER)).count(), 1 + 2, "both are listed under TLS");
    assert_eq!(agreed(&run1).info.name, "snap");
    let by_name = client(MODERN, &[option(1, b"snap")]);
    closed(&run_pieces(TlsMode::Optional, &exports, [&by_name[..]]));
    agreed(&run_pieces(TlsMode::Optional, &exports, [&client(MODERN, &[go("disk")])[..]]));
}

/// A listener that speaks TLS from the first byte: nothing is left to turn to.
#[test]
fn tls_from_the_first_byte_needs_no_starttls() {
    let exports = Exports::new();
    let mut negotiation =
        Negotiation::new(NegotiationConfig { tls: TlsMode::Required, tls_up: true, oldstyle: false });
    let mut out = Vec::new();
    negotiation.greeting(&mut out);
    let step = negotiation.step(&client(MODERN, &[option(5, b""), go("disk")]), &exports, &mut out);
    assert!(matches!(step.next, Next::Transmission(_)));
    assert_eq!(kinds(&out)[0], (5, INVALID));
}
