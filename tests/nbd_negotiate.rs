//! Negotiation by the tables of the protocol: greeting, client flags, each option with what a client may send and
//! what it must not, and that the stream is in step after every error (S1 to S12 of the known failures of others).

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::wildcard_enum_match_arm)] // Tests fail loudly.

mod nbd_support;

use nbd_img::nbd::export_info::TransmissionFlags;
use nbd_img::nbd::negotiate::{CloseReason, INPUT_MAX_LEN, Negotiation, NegotiationConfig, Next};
use nbd_img::nbd::reply::ReplyForm;
use nbd_support::*;

/// The only reply to one option of a modern client, after which GO has to work on the same stream.
fn reply_in_step(bytes: Vec<u8>) -> OptionReply {
    let run = run(&Exports::new(), &client(MODERN, &[bytes, go("disk")]));
    agreed(&run);
    let mut replies = replies(&run.out);
    let rest: Vec<_> = replies.split_off(1).iter().map(|reply| (reply.option, reply.kind)).collect();
    assert_eq!(rest, [(7, INFO), (7, INFO), (7, ACK)]);
    replies.remove(0)
}

#[track_caller]
fn assert_error_in_step(number: u32, data: &[u8], kind: u32) {
    let reply = reply_in_step(option(number, data));
    assert_eq!((reply.option, reply.kind), (number, kind), "option {number}, {} bytes", data.len());
}

#[test]
fn greeting_is_fixed_newstyle_without_zeroes() {
    let run = run(&Exports::new(), &[]);
    assert_eq!(run.out, b"NBDMAGICIHAVEOPT\0\x03");
    assert_eq!(run.next, Next::NeedMore);
}

#[test]
fn unknown_client_flags_close() {
    for flags in [4, 8, 0x8000_0000, 0xffff_ffff, 7, u32::from_be_bytes(*b"GET ")] {
        let run = run(&Exports::new(), &client(flags, &[go("disk")]));
        assert_eq!(*closed(&run), CloseReason::UnknownClientFlags(flags));
        assert_eq!(run.out.len(), 18);
    }
}

#[test]
fn tls_client_hello_on_the_plain_port_closes() {
    let run = run(&Exports::new(), &[0x16, 0x03, 0x01, 0x02, 0x00, 0x01]);
    assert!(matches!(closed(&run), CloseReason::UnknownClientFlags(_)));
}

#[test]
fn client_without_fixed_newstyle_only_has_export_name() {
    for number in [2, 3, 5, 6, 7, 8, 9, 10, 11, 99] {
        for flags in [0, 2] {
            let run = run(&Exports::new(), &client(flags, &[option(number, b"")]));
            assert_eq!(*closed(&run), CloseReason::NotFixedNewstyle { option: number });
            assert_eq!(run.out.len(), 18);
        }
    }
    let run = run(&Exports::new(), &client(0, &[option(1, b"disk")]));
    assert_eq!(agreed(&run).info.name, "disk");
}

#[test]
fn export_name_sends_zeroes_unless_they_were_declined() {
    for (flags, zeroes) in [(0, 124), (1, 124), (2, 0), (3, 0)] {
        let run = run(&Exports::new(), &client(flags, &[option(1, b"disk"), request(0, 2, 0, 0, 0)]));
        let answer = &run.out[18..];
        assert_eq!(be64(answer), 1 << 30);
        // Everything that the tests' export offers, without DF.
        assert_eq!(be16(&answer[8..]), 0x0d6d);
        assert_eq!(answer[10..], vec![0; zeroes]);
        assert_eq!(run.left, request(0, 2, 0, 0, 0), "the pipelined request is the session's");
        let agreed = agreed(&run);
        assert_eq!(
            (agreed.form.is_chunked(), agreed.block_size_asked, agreed.no_zeroes),
            (false, false, zeroes == 0)
        );
        assert!(agreed.contexts.is_empty());
    }
}

#[test]
fn export_name_after_structured_replies_keeps_them() {
    let options = [option(8, b""), option(10, &meta_data("", &["base:allocation"])), option(1, b"disk")];
    let run = run(&Exports::new(), &client(MODERN, &options));
    let agreed = agreed(&run);
    assert_eq!(agreed.form, ReplyForm::Structured);
    assert_eq!(agreed.contexts.len(), 1, "the default export and its name are one export");
    let (_, rest) = replies_then_rest(&run.out);
    assert_eq!(be16(&rest[8..]), 0x0ded);
}

#[test]
fn export_name_that_fails_closes_without_a_word() {
    let long = "n".repeat(4097);
    for name in [&b"nothing"[..], b"forbidden", b"leaving", b"di\0sk", b"\xff\xfe", long.as_bytes()] {
        let run = run(&Exports::new(), &client(MODERN, &[option(1, name), go("disk")]));
        assert!(matches!(closed(&run), CloseReason::ExportNameRefused(_)));
        assert_eq!(run.out.len(), 18);
    }
}

#[test]
fn empty_name_is_the_default_export() {
    let by_go = run(&Exports::new(), &client(MODERN, &[go("")]));
    assert_eq!(agreed(&by_go).info.name, "disk");
    assert_eq!(agreed(&by_go).export, "");
    let by_name = run(&Exports::new(), &client(MODERN, &[option(1, b"")]));
    assert_eq!(agreed(&by_name).info.name, "disk");
    let none = Exports { exports: vec![], draining: false };
    assert_eq!(kinds(&run(&none, &client(MODERN, &[go("")])).out), [(7, UNKNOWN)]);
    closed(&run(&none, &client(MODERN, &[option(1, b"")])));
}

#[test]
fn abort_is_acknowledged_with_and_without_data() {
    for data in [&b""[..], b"x", &[7; 65536]] {
        let run = run(&Exports::new(), &client(MODERN, &[option(2, data), go("disk")]));
        assert_eq!(kinds(&run.out), [(2, ACK)]);
        assert_eq!(*closed(&run), CloseReason::Aborted);
    }
}

#[test]
fn list_tells_names_and_descriptions() {
    let run = run(&Exports::new(), &client(MODERN, &[option(3, b"")]));
    let replies = replies(&run.out);
    let mut disk = counted(b"disk");
    disk.extend(b"the disk of the tests");
    assert_eq!(replies[0], OptionReply { option: 3, kind: SERVER, data: disk });
    assert_eq!(replies[1], OptionReply { option: 3, kind: SERVER, data: counted(b"snap") });
    assert_eq!(replies[2], OptionReply { option: 3, kind: ACK, data: vec![] });
    assert_eq!(replies.len(), 3);
}

#[test]
fn list_with_data_is_invalid_and_the_data_is_consumed() {
    assert_error_in_step(3, b"x", INVALID);
    assert_error_in_step(3, &option(3, b""), INVALID);
}

#[test]
fn list_twice_and_of_no_exports() {
    let none = Exports { exports: vec![], draining: false };
    let run = run(&none, &client(MODERN, &[option(3, b""), option(3, b"")]));
    assert_eq!(kinds(&run.out), [(3, ACK), (3, ACK)]);
}

#[test]
fn long_lists_are_handed_out_in_portions() {
    let exports = Exports {
        exports: (0..2000).map(|n| export(&format!("export-{n:04}"), 512)).collect(),
        draining: false,
    };
    let lists = vec![option(3, b""); 50];
    let input = client(MODERN, &lists);
    let mut negotiation = Negotiation::new(NegotiationConfig::default());
    let (mut out, mut consumed, mut flushes, mut largest, mut total) = (Vec::new(), 0, 0, 0, 0);
    loop {
        let step = negotiation.step(&input[consumed..], &exports, &mut out);
        consumed += step.consumed;
        largest = largest.max(out.len());
        total += out.len();
        out.clear();
        match step.next {
            Next::Flush => flushes += 1,
            Next::NeedMore => break,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!((consumed, flushes), (input.len(), 50));
    assert!(largest < total / 40, "{largest} of {total} bytes at once");
}

#[test]
fn unknown_options_are_skipped_and_unsupported() {
    for number in [0, 4, 12, 16, 99, 0x8000_0001, u32::MAX] {
        assert_error_in_step(number, b"", UNSUP);
        assert_error_in_step(number, &option(2, b""), UNSUP);
        assert_error_in_step(number, &[0x55; 65536], UNSUP);
    }
}

#[test]
fn thousands_of_unknown_options_are_answered() {
    let mut options = vec![option(4711, b"abc"); 5000];
    options.push(go("disk"));
    let run = run(&Exports::new(), &client(MODERN, &options));
    agreed(&run);
    assert_eq!(replies(&run.out).len(), 5003);
}

#[test]
fn options_without_end_are_cut_off() {
    let options = vec![option(8, b"x"); 65_537];
    let run = run(&Exports::new(), &client(MODERN, &options));
    assert_eq!(*closed(&run), CloseReason::TooManyOptions);
    assert_eq!(replies(&run.out).len(), 65_536);
}

#[test]
fn wrong_option_magic_closes() {
    let mut bytes = client(MODERN, &[option(8, b"")]);
    bytes.extend(b"GET / HTTP/1.1\r\n\r\n");
    let run = run(&Exports::new(), &bytes);
    assert_eq!(kinds(&run.out), [(8, ACK)]);
    assert!(matches!(closed(&run), CloseReason::BadOptionMagic(_)));
}

/// The flags of "disk" by what was agreed.
const FORMS: [(ReplyForm, u16); 3] =
    [(ReplyForm::Simple, 0x0d6d), (ReplyForm::Structured, 0x0ded), (ReplyForm::Extended, 0x0ded)];

#[test]
fn info_and_go_say_the_same() {
    for infos in [&[][..], &[0], &[1], &[2], &[3], &[0, 1, 2, 3], &[3, 3, 1, 1], &[4, 77, 65535, 3]] {
        for (form, flags) in FORMS {
            let data = info_data("disk", infos);
            let mut options = vec![option(6, &data), option(7, &data)];
            if form != ReplyForm::Simple {
                options.insert(0, option(if form == ReplyForm::Structured { 8 } else { 11 }, b""));
            }
            let run = run(&Exports::new(), &client(MODERN, &options));
            let mut replies = replies(&run.out);
            replies.drain(..usize::from(form != ReplyForm::Simple));
            let (info, go) = replies.split_at(replies.len() / 2);
            let told = |replies: &[OptionReply]| -> Vec<(u32, Vec<u8>)> {
                replies.iter().map(|reply| (reply.kind, reply.data.clone())).collect()
            };
            assert_eq!(told(info), told(go));
            assert_eq!(info.last().unwrap().kind, ACK);
            assert_eq!(info[0].data[..2], [0, 0], "INFO_EXPORT comes, asked for or not");
            assert_eq!(be64(&info[0].data[2..]), 1 << 30);
            assert_eq!(be16(&info[0].data[10..]), flags);
            assert_eq!(agreed(&run).info.flags.bits(), be16(&info[0].data[10..]));
            assert_eq!(agreed(&run).block_size_asked, infos.contains(&3));
        }
    }
}

#[test]
fn info_tells_what_was_asked_for() {
    let run = run(&Exports::new(), &client(MODERN, &[option(6, &info_data("", &[1, 2, 3]))]));
    let told: Vec<_> = replies(&run.out).into_iter().map(|reply| reply.data).collect();
    assert_eq!(told[1], b"\0\x01disk", "the canonical name of the default export");
    assert_eq!(told[2], b"\0\x02the disk of the tests");
    let mut sizes = vec![0, 3];
    for size in [1_u32, 4096, 32 << 20] {
        sizes.extend(size.to_be_bytes());
    }
    assert_eq!(told[3], sizes);
    assert_eq!(told.len(), 5);
}

#[test]
fn empty_description_is_not_told() {
    let run = run(&Exports::new(), &client(MODERN, &[option(6, &info_data("snap", &[2]))]));
    let told: Vec<_> = replies(&run.out).iter().map(|r| (r.kind, r.data.get(..2).map(be16))).collect();
    assert_eq!(told, [(INFO, Some(0)), (INFO, Some(3)), (ACK, None)]);
}

#[test]
fn read_only_export_does_not_offer_writes() {
    let run = run(&Exports::new(), &client(MODERN, &[option(8, b""), go("snap")]));
    let flags = agreed(&run).info.flags;
    assert_eq!(flags.bits(), 0x058f);
    assert!(!flags.contains(TransmissionFlags::SEND_FAST_ZERO));
}

#[test]
fn fast_zero_is_not_offered_without_write_zeroes() {
    let mut exports = Exports::new();
    exports.exports[0].flags.remove(TransmissionFlags::SEND_WRITE_ZEROES);
    let run = run(&exports, &client(MODERN, &[go("disk")]));
    assert!(!agreed(&run).info.flags.contains(TransmissionFlags::SEND_FAST_ZERO));
}

#[test]
fn refusals_have_their_replies_and_the_session_lives() {
    for number in [6, 7, 9] {
        for (name, kind) in [("nothing", UNKNOWN), ("forbidden", POLICY), ("leaving", SHUTDOWN)] {
            let data = if number == 9 { meta_data(name, &[]) } else { info_data(name, &[]) };
            assert_error_in_step(number, &data, kind);
        }
    }
    assert_eq!(reply_in_step(option(6, &info_data("forbidden", &[]))).data, b"not for you");
}

#[test]
fn info_and_go_with_wrong_lengths_are_invalid() {
    let mut with_tail = info_data("disk", &[3]);
    with_tail.push(0);
    let mut short_list = info_data("disk", &[3, 3]);
    short_list.truncate(short_list.len() - 1);
    for number in [6, 7] {
        for data in
            [&b""[..], b"\0", b"\0\0", b"\0\0\0\0", b"\0\0\0\0\0", b"\0\0\0\x01\0\0", &with_tail, &short_list]
        {
            assert_error_in_step(number, data, INVALID);
        }
    }
}

/// S6, CVE-2022-26495 and its kin: the name's length against the option's.
#[test]
fn name_lengths_never_lead_out_of_the_option() {
    let claims =
        [0, 1, 255, 256, 257, 3000, 4096, 4097, (1 << 31) - 1, 1 << 31, u32::MAX - 5, u32::MAX - 1, u32::MAX];
    for number in [6, 7, 9, 10] {
        for claim in claims {
            for len in [0_usize, 3, 4, 5, 6, 10, 261, 262, 4101, 4102, 4104] {
                let mut data = vec![b'n'; len];
                let shown = claim.to_be_bytes();
                let take = len.min(4);
                data[..take].copy_from_slice(&shown[..take]);
                let reply = reply_in_step(option(number, &data));
                assert_eq!((reply.option, reply.kind), (number, INVALID), "name {claim}, option {len}");
            }
        }
    }
}

#[test]
fn names_of_every_permitted_length_are_looked_up() {
    for len in [1, 255, 256, 257, 3000, 4095, 4096] {
        assert_error_in_step(6, &info_data(&"x".repeat(len), &[]), UNKNOWN);
        assert_error_in_step(9, &meta_data(&"x".repeat(len), &[]), UNKNOWN);
    }
    assert_error_in_step(6, &info_data(&"x".repeat(4097), &[]), INVALID);
    assert_error_in_step(9, &meta_data(&"x".repeat(4097), &[]), INVALID);
}

#[test]
fn names_that_are_no_protocol_strings_are_invalid() {
    for name in [&b"a\0"[..], b"\0", b"\xff", b"\xc3", b"\xed\xa0\x80"] {
        let mut data = counted(name);
        data.extend([0, 0]);
        assert_error_in_step(7, &data, INVALID);
    }
}

/// S12, CVE-2020-10761: the answer quotes a name as long as a whole message.
#[test]
fn messages_quote_long_names_in_part() {
    for name in ["n".repeat(4096), "\u{1f600}".repeat(1024), "\u{1}\n\u{1b}[31m".repeat(500)] {
        let reply = reply_in_step(option(7, &info_data(&name, &[])));
        assert_eq!(reply.kind, UNKNOWN);
        assert!(reply.data.len() < 1024);
        let text = String::from_utf8(reply.data).unwrap();
        assert!(!text.contains(char::is_control), "{text:?}");
        assert!(text.contains("..."), "{text}");
    }
}

/// S11, CVE-2017-15119: lengths beyond the cap end the connection before the data is waited for.
#[test]
fn option_lengths_beyond_the_cap_close_at_once() {
    for number in (0..=16).chain([99, u32::MAX]) {
        let cap = if number == 6 || number == 7 { 160 * 1024 } else { 64 * 1024 };
        for len in [cap + 1, 40 << 20, 1 << 31, u32::MAX] {
            let run = run(&Exports::new(), &client(MODERN, &[option_claiming(number, len, b"")]));
            assert_eq!(*closed(&run), CloseReason::OptionTooLong { option: number, len });
            assert_eq!(run.out.len(), 18);
        }
        let at_cap = client(MODERN, &[option_claiming(number, cap, b"")]);
        assert_eq!(run(&Exports::new(), &at_cap).next, Next::NeedMore);
    }
}

#[test]
fn the_longest_legal_go_is_served() {
    let mut exports = Exports::new();
    exports.exports[0].name = "d".repeat(4096);
    let option = option(7, &info_data(&"d".repeat(4096), &vec![3; 65535]));
    assert!(option.len() <= INPUT_MAX_LEN);
    agreed(&run(&exports, &client(MODERN, &[option])));
}

#[test]
fn structured_replies_are_agreed_once_and_without_data() {
    let options = [option(8, b"x"), option(8, b""), option(8, b""), go("disk")];
    let run = run(&Exports::new(), &client(MODERN, &options));
    assert_eq!(kinds(&run.out)[..3], [(8, INVALID), (8, ACK), (8, INVALID)]);
    assert_eq!(agreed(&run).form, ReplyForm::Structured);
}

#[test]
fn refused_structured_replies_leave_simple_ones() {
    let run = run(&Exports::new(), &client(MODERN, &[option(8, b"x"), go("disk")]));
    assert_eq!(agreed(&run).form, ReplyForm::Simple);
    assert!(!agreed(&run).info.flags.contains(TransmissionFlags::SEND_DF));
}

#[test]
fn extended_headers_are_agreed_once_without_data_and_win() {
    let options = [
        option(11, b"x"),
        option(8, b""),
        option(10, &meta_data("disk", &["base:allocation"])),
        option(11, b""),
        option(11, b""),
        option(8, b""),
        option(8, b"x"),
        go("disk"),
    ];
    let run = run(&Exports::new(), &client(MODERN, &options));
    let expected = [
        (11, INVALID),
        (8, ACK),
        (10, META),
        (10, ACK),
        (11, ACK),
        (11, INVALID),
        (8, EXT_HEADER_REQD),
        (8, EXT_HEADER_REQD),
    ];
    assert_eq!(kinds(&run.out)[..8], expected);
    assert_eq!((agreed(&run).form, agreed(&run).contexts.len()), (ReplyForm::Extended, 1));
}

#[test]
fn payloads_of_block_status_are_offered_with_extended_headers_and_contexts_only() {
    let set = || option(10, &meta_data("disk", &["base:allocation"]));
    for (options, offered) in [
        (vec![option(11, b""), set()], true),
        (vec![option(11, b"")], false),
        (vec![option(8, b""), set()], false),
        (vec![option(11, b""), option(10, &meta_data("snap", &["base:allocation"]))], false),
    ] {
        let mut options = options;
        options.extend([option(6, &info_data("disk", &[])), go("disk")]);
        let run = run(&Exports::new(), &client(MODERN, &options));
        assert_eq!(agreed(&run).info.flags.contains(TransmissionFlags::BLOCK_STATUS_PAYLOAD), offered);
        let shown: Vec<_> = replies(&run.out)
            .into_iter()
            .filter(|reply| reply.kind == INFO && reply.data[..2] == [0, 0])
            .map(|reply| be16(&reply.data[10..]) & 0x1000 != 0)
            .collect();
        assert_eq!(shown, [offered, offered]);
    }
}

#[test]
fn export_name_after_extended_headers_closes() {
    let run = run(&Exports::new(), &client(MODERN, &[option(11, b""), option(1, b"disk")]));
    assert!(matches!(closed(&run), CloseReason::ExportNameRefused(_)));
}

#[test]
fn draining_server_says_so_and_lets_clients_abort() {
    let exports = Exports { draining: true, ..Exports::new() };
    let mut options: Vec<_> = [3, 5, 6, 7, 8, 9, 10, 11, 99].map(|number| option(number, b"")).into();
    options.push(option(2, b""));
    let run1 = run(&exports, &client(MODERN, &options));
    let (last, others) = kinds(&run1.out).split_last().map(|(l, o)| (*l, o.to_vec())).unwrap();
    assert!(others.iter().all(|(_, kind)| *kind == SHUTDOWN));
    assert_eq!((others.len(), last), (9, (2, ACK)));
    assert!(matches!(
        closed(&run(&exports, &client(MODERN, &[option(1, b"disk")]))),
        CloseReason::ExportNameRefused(_)
    ));
}

#[test]
fn names_that_cannot_be_sent_are_left_out_of_the_list() {
    let mut exports = Exports::new();
    exports.exports[0].name = "x".repeat(4097);
    exports.exports[1].name = "a\0b".into();
    exports.exports.push(export("good", 1));
    exports.exports[2].description = "\u{1f600}".repeat(2000);
    let run = run(&exports, &client(MODERN, &[option(3, b"")]));
    let replies = replies(&run.out);
    assert_eq!(replies.len(), 2);
    assert_eq!(replies[0].data.len(), 4 + 4 + 4096);
}

#[test]
fn requests_behind_go_stay_with_the_caller() {
    let tail = [request(0, 0, 1, 0, 512), request(0, 2, 2, 0, 0)].concat();
    let run = run(&Exports::new(), &client(MODERN, &[go("disk"), tail.clone()]));
    agreed(&run);
    assert_eq!(run.left, tail);
}

#[test]
fn a_step_after_the_end_is_answered_with_the_end() {
    let mut negotiation = Negotiation::new(NegotiationConfig::default());
    let exports = Exports::new();
    let mut out = Vec::new();
    negotiation.step(&client(MODERN, &[option(2, b"")]), &exports, &mut out);
    out.clear();
    let step = negotiation.step(&go("disk"), &exports, &mut out);
    assert_eq!(step.consumed, 0);
    assert_eq!(step.next, Next::Close { reason: CloseReason::AlreadyOver });
    assert!(out.is_empty());
}
