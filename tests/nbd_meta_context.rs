//! LIST_META_CONTEXT and SET_META_CONTEXT: what matches, what selects, and what a selection is worth in the end.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::wildcard_enum_match_arm)] // Tests fail loudly.

mod nbd_support;

use nbd_support::*;

fn listed(queries: &[&str]) -> Vec<String> {
    let run = run(&Exports::new(), &client(MODERN, &[option(9, &meta_data("snap", queries))]));
    let mut replies = replies(&run.out);
    assert_eq!(replies.pop().unwrap().kind, ACK);
    let name = |reply: OptionReply| {
        assert_eq!((reply.kind, be32(&reply.data)), (META, 0));
        String::from_utf8(reply.data[4..].to_vec()).unwrap()
    };
    replies.into_iter().map(name).collect()
}

#[test]
fn list_meta_context_matches_names_and_wildcards() {
    let (base, b0, b1) = ("base:allocation", "qemu:dirty-bitmap:b0", "qemu:dirty-bitmap:b1");
    assert_eq!(listed(&[]), [base, b0, b1]);
    assert_eq!(listed(&["base:"]), [base]);
    assert_eq!(listed(&["qemu:"]), [b0, b1]);
    assert_eq!(listed(&["qemu:dirty-bitmap:"]), [b0, b1]);
    assert_eq!(listed(&[b1, "base:", b1, "qemu:"]), [base, b0, b1]);
    assert_eq!(listed(&[b0]), [b0]);
    let none = ["base:none", "base", "bas", "", ":", "x-other:", "qemu:dirty-bitmap:b", "base:allocation:"];
    assert_eq!(listed(&none), [""; 0]);
}

/// Id and name of a context.
type Selected = (u32, String);

/// The kinds of replies, and what was selected in the end.
fn set_then_go(options: &[Vec<u8>]) -> (Vec<(u32, u32)>, Vec<Selected>) {
    let run = run(&Exports::new(), &client(MODERN, options));
    let contexts = agreed(&run).contexts.iter().map(|c| (c.id, c.name.clone())).collect();
    (kinds(&run.out), contexts)
}

fn set(export: &str, queries: &[&str]) -> Vec<u8> {
    option(10, &meta_data(export, queries))
}

#[test]
fn set_meta_context_selects_each_name_once() {
    let queries = ["base:allocation", "qemu:dirty-bitmap:b1", "base:allocation", "x-none:", "base:unheard"];
    let run = run(&Exports::new(), &client(MODERN, &[option(8, b""), set("snap", &queries), go("snap")]));
    let selected: Vec<_> = replies(&run.out)
        .into_iter()
        .filter(|reply| reply.kind == META)
        .map(|reply| (be32(&reply.data), String::from_utf8(reply.data[4..].to_vec()).unwrap()))
        .collect();
    let kept: Vec<_> = agreed(&run).contexts.iter().map(|c| (c.id, c.name.clone())).collect();
    assert_eq!(selected, kept);
    assert_eq!(kept.len(), 2);
    assert_ne!(kept[0].0, kept[1].0);
}

#[test]
fn set_meta_context_takes_no_wildcards_and_no_query_selects_nothing() {
    for queries in [&[][..], &["base:"], &["qemu:"], &["qemu:dirty-bitmap:"], &["", ":"], &["base"]] {
        let (kinds, contexts) = set_then_go(&[option(8, b""), set("snap", queries), go("snap")]);
        assert_eq!(kinds[..2], [(8, ACK), (10, ACK)]);
        assert!(contexts.is_empty());
    }
}

#[test]
fn set_meta_context_needs_structured_replies() {
    let (kinds, contexts) = set_then_go(&[set("disk", &["base:allocation"]), option(8, b""), go("disk")]);
    assert_eq!(kinds[..2], [(10, INVALID), (8, ACK)]);
    assert!(contexts.is_empty());
}

#[test]
fn set_meta_context_that_fails_clears_the_selection() {
    let good = || set("disk", &["base:allocation"]);
    let mut cut = meta_data("disk", &["base:allocation"]);
    cut.pop();
    let mut long = meta_data("disk", &["base:allocation"]);
    long.push(0);
    let huge_count = [counted(b"disk"), u32::MAX.to_be_bytes().to_vec()].concat();
    let huge_query = [counted(b"disk"), vec![0, 0, 0, 1], u32::MAX.to_be_bytes().to_vec()].concat();
    let bad_query = [counted(b"disk"), vec![0, 0, 0, 1], counted(b"base:\0")].concat();
    let bad = [
        (set("nothing", &["base:allocation"]), UNKNOWN),
        (set("forbidden", &["base:allocation"]), POLICY),
        (option(10, b""), INVALID),
        (option(10, &cut), INVALID),
        (option(10, &long), INVALID),
        (option(10, &huge_count), INVALID),
        (option(10, &huge_query), INVALID),
        (option(10, &bad_query), INVALID),
        (set("disk", &["base:none"]), ACK),
    ];
    for (bad, kind) in bad {
        let (kinds, contexts) = set_then_go(&[option(8, b""), good(), bad.clone(), go("disk")]);
        assert_eq!(kinds[3], (10, kind));
        assert!(contexts.is_empty(), "{kind:#x} kept the selection");
        let (_, contexts) = set_then_go(&[option(8, b""), bad, good(), go("disk")]);
        assert_eq!(contexts, [(1, "base:allocation".to_owned())]);
    }
}

#[test]
fn selection_is_only_valid_for_its_export() {
    let sr = || option(8, b"");
    let (_, contexts) = set_then_go(&[sr(), set("disk", &["base:allocation"]), go("snap")]);
    assert!(contexts.is_empty());
    let (_, contexts) = set_then_go(&[sr(), set("disk", &["base:allocation"]), go("nothing"), go("disk")]);
    assert_eq!(contexts.len(), 1, "a GO that fails leaves the selection");
    let info = option(6, &info_data("snap", &[]));
    let (_, contexts) = set_then_go(&[sr(), set("disk", &["base:allocation"]), info, go("disk")]);
    assert_eq!(contexts.len(), 1, "INFO on another export leaves the selection");
    let list = option(9, &meta_data("snap", &[]));
    let (_, contexts) = set_then_go(&[sr(), set("disk", &["base:allocation"]), list, go("disk")]);
    assert_eq!(contexts.len(), 1, "LIST_META_CONTEXT leaves the selection");
}
