//! Options in the way of getopt_long(3): clusters of short ones, abbreviations of long ones, options after operands,
//! values in the next argument or in the same. It knows no option by itself, and what a value means is not looked at.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

/// What follows an option.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Takes {
    /// Nothing.
    Nothing,
    /// A value.
    Value,
}

/// One option of a program.
#[derive(Clone, Copy, Debug)]
pub struct OptionSpec<I> {
    /// What it is called in the program.
    pub id: I,
    /// Its letter, if it has one.
    pub short: Option<u8>,
    /// Its name, without the dashes.
    pub long: &'static str,
    /// What follows.
    pub takes: Takes,
}

/// A command line in its parts, in the order in which they were written.
#[derive(PartialEq, Eq, Debug)]
pub struct Parts<I> {
    /// The options; the value is empty for those that take none.
    pub options: Vec<(I, OsString)>,
    /// Everything else.
    pub operands: Vec<OsString>,
}

/// What cannot be parsed, in the words of the C library, after the options that could.
#[derive(PartialEq, Eq, Debug)]
pub struct Broken<I> {
    /// The options before the mistake: one of them may end the program before it comes to light.
    pub before: Vec<(I, OsString)>,
    /// What is wrong.
    pub text: String,
}

/// Parses the arguments behind the program's name. `permute` is whether options may come after operands.
pub fn parse<I: Copy + PartialEq>(
    specs: &[OptionSpec<I>],
    args: &[OsString],
    permute: bool,
) -> Result<Parts<I>, Broken<I>> {
    let mut parts = Parts { options: Vec::new(), operands: Vec::new() };
    let mut rest = args.iter();
    while let Some(arg) = rest.next() {
        let bytes = arg.as_bytes();
        let parsed = if bytes == b"--" {
            parts.operands.extend(rest.by_ref().cloned());
            Ok(())
        } else if let Some(long) = bytes.strip_prefix(b"--") {
            parse_long(specs, long, &mut rest, &mut parts.options)
        } else if bytes.len() > 1 && bytes.starts_with(b"-") {
            parse_cluster(specs, &bytes[1..], &mut rest, &mut parts.options)
        } else {
            parts.operands.push(arg.clone());
            if !permute {
                parts.operands.extend(rest.by_ref().cloned());
            }
            Ok(())
        };
        if let Err(text) = parsed {
            return Err(Broken { before: parts.options, text });
        }
    }
    Ok(parts)
}

type Rest<'a> = std::slice::Iter<'a, OsString>;

/// `name` or `name=value`.
fn parse_long<I: Copy + PartialEq>(
    specs: &[OptionSpec<I>],
    text: &[u8],
    rest: &mut Rest<'_>,
    options: &mut Vec<(I, OsString)>,
) -> Result<(), String> {
    let (name, value) = match text.iter().position(|&byte| byte == b'=') {
        Some(at) => (&text[..at], Some(&text[at + 1..])),
        None => (text, None),
    };
    let spec = find_long(specs, name, text)?;
    let value = match (spec.takes, value) {
        (Takes::Nothing, None) => OsString::new(),
        (Takes::Nothing, Some(_)) => {
            return Err(format!("option '--{}' doesn't allow an argument", spec.long));
        }
        (Takes::Value, Some(value)) => owned(value),
        (Takes::Value, None) => {
            rest.next().cloned().ok_or_else(|| format!("option '--{}' requires an argument", spec.long))?
        }
    };
    options.push((spec.id, value));
    Ok(())
}

/// The option of this name, or the only one whose name begins so.
fn find_long<'a, I: Copy + PartialEq>(
    specs: &'a [OptionSpec<I>],
    name: &[u8],
    text: &[u8],
) -> Result<&'a OptionSpec<I>, String> {
    if let Some(exact) = specs.iter().find(|spec| spec.long.as_bytes() == name) {
        return Ok(exact);
    }
    let matching: Vec<_> = specs.iter().filter(|spec| spec.long.as_bytes().starts_with(name)).collect();
    match matching.as_slice() {
        [] => Err(format!("unrecognized option '--{}'", lossy(text))),
        [only] => Ok(only),
        [_, _, ..] => {
            let names: Vec<_> = matching.iter().map(|spec| format!("'--{}'", spec.long)).collect();
            Err(format!("option '--{}' is ambiguous; possibilities: {}", lossy(text), names.join(" ")))
        }
    }
}

/// `abc`, of which the last may take the rest of the argument or the next one.
fn parse_cluster<I: Copy + PartialEq>(
    specs: &[OptionSpec<I>],
    letters: &[u8],
    rest: &mut Rest<'_>,
    options: &mut Vec<(I, OsString)>,
) -> Result<(), String> {
    for (at, &letter) in letters.iter().enumerate() {
        let spec = specs
            .iter()
            .find(|spec| spec.short == Some(letter))
            .ok_or_else(|| format!("invalid option -- '{}'", lossy(&[letter])))?;
        if spec.takes == Takes::Nothing {
            options.push((spec.id, OsString::new()));
            continue;
        }
        let value = match &letters[at + 1..] {
            [] => rest
                .next()
                .cloned()
                .ok_or_else(|| format!("option requires an argument -- '{}'", char::from(letter)))?,
            value => owned(value),
        };
        options.push((spec.id, value));
        break;
    }
    Ok(())
}

fn owned(bytes: &[u8]) -> OsString {
    OsString::from_vec(bytes.to_vec())
}

fn lossy(bytes: &[u8]) -> String {
    OsStr::from_bytes(bytes).to_string_lossy().escape_debug().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SPECS: [OptionSpec<char>; 5] = [
        OptionSpec { id: 'p', short: Some(b'p'), long: "port", takes: Takes::Value },
        OptionSpec { id: 's', short: Some(b's'), long: "snapshot", takes: Takes::Nothing },
        OptionSpec { id: 'k', short: Some(b'k'), long: "socket", takes: Takes::Value },
        OptionSpec { id: 't', short: Some(b't'), long: "persistent", takes: Takes::Nothing },
        OptionSpec { id: 'f', short: None, long: "fork", takes: Takes::Nothing },
    ];

    fn parsed(line: &[&str], permute: bool) -> Result<String, String> {
        let args: Vec<OsString> = line.iter().map(OsString::from).collect();
        let parts = parse(&SPECS, &args, permute).map_err(|broken| broken.text)?;
        let options = parts.options.iter().map(|(id, value)| format!("{id}({})", value.to_string_lossy()));
        let operands = parts.operands.iter().map(|operand| operand.to_string_lossy().into_owned());
        Ok(options.chain(operands).collect::<Vec<_>>().join(" "))
    }

    #[test]
    fn every_way_to_write_an_option() {
        for (line, want) in [
            (vec!["-p", "1", "x"], "p(1) x"),
            (vec!["-p1", "x"], "p(1) x"),
            (vec!["-p 1", "x"], "p( 1) x"),
            (vec!["-tsp1"], "t() s() p(1)"),
            (vec!["--port=1", "--port", "2"], "p(1) p(2)"),
            (vec!["--po=1", "--per"], "p(1) t()"),
            (vec!["--port="], "p()"),
            (vec!["x", "-t", "y"], "t() x y"),
            (vec!["-t", "--", "-s", "--fork"], "t() -s --fork"),
            (vec!["-k", "--", "x"], "k(--) x"),
            (vec!["-"], "-"),
            (vec!["-p", "-t"], "p(-t)"),
        ] {
            assert_eq!(parsed(&line, true).as_deref(), Ok(want), "{line:?}");
        }
        assert_eq!(parsed(&["-t", "x", "-s"], false).as_deref(), Ok("t() x -s"));
    }

    #[test]
    fn mistakes_in_the_words_of_the_c_library() {
        for (line, want) in [
            (vec!["--nope=1"], "unrecognized option '--nope=1'"),
            (vec!["-q"], "invalid option -- 'q'"),
            (vec!["-tp"], "option requires an argument -- 'p'"),
            (vec!["--socket"], "option '--socket' requires an argument"),
            (vec!["--fork=1"], "option '--fork' doesn't allow an argument"),
            (vec!["--s=1"], "option '--s=1' is ambiguous; possibilities: '--snapshot' '--socket'"),
        ] {
            assert_eq!(parsed(&line, true), Err(want.to_owned()), "{line:?}");
        }
    }

    #[test]
    fn what_came_before_a_mistake_is_kept() {
        let args = ["-t", "x", "--nope"].map(OsString::from);
        let broken = parse(&SPECS, &args, true).unwrap_err();
        assert_eq!(broken.before, [('t', OsString::new())]);
    }
}
