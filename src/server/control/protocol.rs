//! What goes over the control socket: the operator's tool asks with a line of JSON, the server answers with one.
//! Bytes in, values out; no socket.
//!
//! `{"version":1,"command":"resize","export":"a","size":{"more":1048576},"shrink":false}` is answered by
//! `{"version":1,"resized":{"from":1,"to":2,"export":2}}` or `{"version":1,"error":"why not"}`.

use nbd_img_formats::open::SizeChange;
use serde::{Deserialize, Serialize};

use crate::export::Resized;

/// The version that this program speaks.
pub const VERSION: u32 = 1;

/// Longest line without its end, in bytes: the longest name of an export with every byte escaped, and some more. Our
/// choice.
pub const LINE_LEN_MAX: usize = 32 << 10;

/// What is asked.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Request {
    /// Another size for a disk.
    Resize {
        /// The export's name; the only one if there is none.
        export: Option<String>,
        /// The size, or none for the one that the file or device has by now.
        change: Option<SizeChange>,
        /// Whether it may be a smaller one.
        shrink: bool,
    },
}

#[derive(Deserialize)]
struct Versioned {
    version: u32,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RequestLine {
    version: u32,
    command: CommandName,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    export: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    size: Option<Size>,
    #[serde(default)]
    shrink: bool,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum CommandName {
    Resize,
}

/// In bytes.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Size {
    To(u64),
    More(u64),
    Less(u64),
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct AnswerLine {
    version: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    resized: Option<ResizedLine>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

/// In bytes.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ResizedLine {
    from: u64,
    to: u64,
    export: u64,
}

impl Request {
    /// The line for this request, with its end.
    pub fn to_line(&self) -> String {
        let Request::Resize { export, change, shrink } = self;
        let size = change.map(|change| match change {
            SizeChange::To(size) => Size::To(size),
            SizeChange::More(more) => Size::More(more),
            SizeChange::Less(less) => Size::Less(less),
        });
        let (command, export) = (CommandName::Resize, export.clone());
        line_of(&RequestLine { version: VERSION, command, export, size, shrink: *shrink })
    }

    /// The request of a line without its end; the error is for whoever sent it.
    pub fn parse(line: &[u8]) -> Result<Request, String> {
        let line: RequestLine = parse(line)?;
        let change = line.size.map(|size| match size {
            Size::To(size) => SizeChange::To(size),
            Size::More(more) => SizeChange::More(more),
            Size::Less(less) => SizeChange::Less(less),
        });
        match line.command {
            CommandName::Resize => Ok(Request::Resize { export: line.export, change, shrink: line.shrink }),
        }
    }
}

/// The line for an answer, with its end.
pub fn answer_line(answer: &Result<Resized, String>) -> String {
    let (resized, error) = match answer {
        Ok(Resized { from, to, export }) => {
            (Some(ResizedLine { from: *from, to: *to, export: *export }), None)
        }
        Err(text) => (None, Some(text.clone())),
    };
    line_of(&AnswerLine { version: VERSION, resized, error })
}

/// The answer of a line without its end. Inside is what the server says, outside that it makes no sense.
pub fn parse_answer(line: &[u8]) -> Result<Result<Resized, String>, String> {
    let line: AnswerLine = parse(line)?;
    match (line.resized, line.error) {
        (Some(ResizedLine { from, to, export }), None) => Ok(Ok(Resized { from, to, export })),
        (None, Some(text)) => Ok(Err(text)),
        (Some(_), Some(_)) | (None, None) => Err("neither a result nor an error".to_owned()),
    }
}

fn parse<'a, T: Deserialize<'a>>(line: &'a [u8]) -> Result<T, String> {
    let wrong = |error: serde_json::Error| format!("this is no line of the control protocol: {error}");
    // First, since other versions have other fields.
    let Versioned { version } = serde_json::from_slice(line).map_err(wrong)?;
    if version != VERSION {
        return Err(format!("version {version} of the control protocol is not spoken here, only {VERSION}"));
    }
    serde_json::from_slice(line).map_err(wrong)
}

fn line_of(value: &impl Serialize) -> String {
    // Numbers, strings and fixed names always have a form in JSON.
    let mut line = serde_json::to_string(value).unwrap_or_default();
    line.push('\n');
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_come_back_as_they_were() {
        for change in
            [None, Some(SizeChange::To(5)), Some(SizeChange::More(0)), Some(SizeChange::Less(u64::MAX))]
        {
            for export in [None, Some(String::new()), Some("\u{1}\n\"ä".repeat(100))] {
                let request = Request::Resize { export, change, shrink: change.is_none() };
                let line = request.to_line();
                assert_eq!(line.find('\n'), Some(line.len() - 1), "{line}");
                assert_eq!(Request::parse(line.trim_end().as_bytes()), Ok(request));
            }
        }
        let longest = Request::Resize { export: Some("\u{1}".repeat(4096)), change: None, shrink: true };
        assert!(longest.to_line().len() <= LINE_LEN_MAX);
    }

    #[test]
    fn answers_come_back_as_they_were() {
        for answer in [Ok(Resized { from: 1, to: u64::MAX, export: 0 }), Err("a \"b\"\nc".to_owned())] {
            assert_eq!(parse_answer(answer_line(&answer).trim_end().as_bytes()), Ok(answer));
        }
        for line in [
            "{\"version\":1}",
            "{\"version\":1,\"error\":\"\",\"resized\":{\"from\":1,\"to\":1,\"export\":1}}",
        ] {
            assert!(parse_answer(line.as_bytes()).is_err(), "{line}");
        }
    }

    #[test]
    fn every_line_that_is_not_a_request_is_an_error() {
        for (line, hint) in [
            (&b""[..], "no line of the control protocol"),
            (b"resize", "no line"),
            (b"\xff\xfe", "no line"),
            (b"[1]", "no line"),
            (b"{}", "version"),
            (b"{\"version\":-1}", "no line"),
            (b"{\"version\":1e99}", "no line"),
            (b"{\"version\":2,\"whatever\":[]}", "version 2 of the control protocol is not spoken"),
            (b"{\"version\":1}", "command"),
            (b"{\"version\":1,\"command\":\"format\"}", "resize"),
            (b"{\"version\":1,\"command\":\"resize\",\"sise\":1}", "sise"),
            (b"{\"version\":1,\"command\":\"resize\",\"size\":1}", "no line"),
            (b"{\"version\":1,\"command\":\"resize\",\"size\":{\"to\":-1}}", "no line"),
            (b"{\"version\":1,\"command\":\"resize\",\"size\":{\"to\":1,\"more\":1}}", "no line"),
            (b"{\"version\":1,\"command\":\"resize\",\"size\":{\"to\":18446744073709551616}}", "no line"),
            (b"{\"version\":1,\"version\":1,\"command\":\"resize\"}", "duplicate"),
            (b"{\"version\":1,\"command\":\"resize\",\"shrink\":\"yes\"}", "no line"),
            (b"{\"version\":1,\"command\":\"resize\"} x", "trailing"),
            (b"{\"version\":1,\"command\":\"resize\"", "no line"),
        ] {
            let error = Request::parse(line).unwrap_err();
            assert!(error.contains(hint), "{}: {error}", String::from_utf8_lossy(line));
        }
        let deep = [b"{\"version\":".as_slice(), &b"[".repeat(LINE_LEN_MAX)].concat();
        assert!(Request::parse(&deep).is_err());
    }
}
