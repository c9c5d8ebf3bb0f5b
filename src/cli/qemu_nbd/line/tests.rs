//! Options by themselves: spellings, numbers, mistakes.

use super::*;

fn parsed(line: &[&str]) -> Result<Line, String> {
    let args: Vec<OsString> = line.iter().map(OsString::from).collect();
    match parse(&args).map_err(|complaint| complaint.text)? {
        Parsed::Line(line) => Ok(*line),
        Parsed::Help | Parsed::Version | Parsed::Answer(_) => panic!("{line:?} is answered"),
    }
}

#[test]
fn both_spellings_of_every_option() {
    for spec in OPTIONS {
        assert!(OPTIONS.iter().filter(|other| other.long == spec.long).count() == 1, "{}", spec.long);
        let Some(short) = spec.short else { continue };
        let letter = format!("-{}", char::from(short));
        let value = if matches!(spec.id, Id::Offset | Id::Shared) { "7" } else { "value" };
        let outcome = |name: &str| {
            let mut args = vec![OsString::from(name)];
            args.extend((spec.takes == Takes::Value).then(|| OsString::from(value)));
            parse(&args)
        };
        assert_eq!(outcome(&letter), outcome(&format!("--{}", spec.long)), "{letter}");
    }
}

#[test]
fn numbers() {
    assert_eq!(parsed(&["-e 2", "-o", "0x200"]).map(|line| (line.shared, line.offset)), Ok((2, 512)));
    assert_eq!(parsed(&["-e", "0"]).map(|line| line.shared), Ok(0));
    for (line, want) in [
        (["-e", "x"], "Invalid shared device number 'x'"),
        (["-e", "-1"], "Invalid shared device number '-1'"),
        (["-e", "99999999999"], "Invalid shared device number '99999999999'"),
        (["-o", "1M"], "Invalid offset '1M'"),
        (["-o", "-1"], "Invalid offset '-1'"),
        (["--handshake-limit", "4294967296"], "Invalid handshake limit '4294967296'"),
    ] {
        assert_eq!(parsed(&line), Err(want.to_owned()));
    }
}

#[test]
fn snapshots() {
    for (text, want) in [("a", "a"), ("snapshot.id=3", "3"), ("snapshot.name=a,,b", "a,b")] {
        assert_eq!(parsed(&["-l", text]).map(|line| line.load_snapshot), Ok(Some(want.to_owned())));
    }
    assert!(parsed(&["-l", "snapshot.foo=1"]).unwrap_err().contains("snapshot param"));
}

#[test]
fn mistakes_in_the_words_that_callers_know() {
    let long = "x".repeat(4097);
    for (line, want) in [
        (vec!["--cache=foo"], "Invalid cache mode `foo'"),
        (vec!["-n", "--cache=none"], "-n and --cache can only be specified once"),
        (vec!["--aio=foo"], "Invalid aio mode 'foo'"),
        (vec!["--aio=native", "--aio=native"], "--aio can only be specified once"),
        (vec!["--discard=foo"], "Invalid discard mode `foo'"),
        (vec!["--discard=on", "--discard=off"], "--discard can only be specified once"),
        (vec!["--detect-zeroes=ON"], "Failed to parse detect_zeroes mode: invalid parameter value: ON"),
        (vec!["--object", "foo,id=x"], "Parameter 'qom-type' does not accept value 'foo'"),
        (vec!["-e", "x", "--nope"], "Invalid shared device number 'x'"),
        (vec!["-e", "2", "--nope"], "unrecognized option '--nope'"),
    ] {
        assert_eq!(parsed(&line), Err(want.to_owned()), "{line:?}");
    }
    assert!(parsed(&["--detect-zeroes=unmap", "--discard=unmap"]).unwrap_err().contains("discard operation"));
    assert!(parsed(&["-x", &long]).unwrap_err().ends_with("too long"));
}

#[test]
fn what_ends_the_parsing() {
    for (line, want) in [
        (["--shar=2", "--vers", "--nope"], Parsed::Version),
        (["-h", "x", "y"], Parsed::Help),
        (["-T", "help", "y"], Parsed::Answer(String::new())),
        (["--object", "help", "y"], Parsed::Answer(objects::help())),
    ] {
        assert_eq!(parse(&line.map(OsString::from)), Ok(want), "{line:?}");
    }
}
