//! `--object TYPE,id=ID,...`: the definitions that other options refer to by their id.

use std::fs;
use std::path::{Path, PathBuf};

use super::values;

/// What was defined.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Object {
    /// The name that other options use.
    pub id: String,
    /// What it is.
    pub kind: Kind,
}

/// Which side of a connection credentials are for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Endpoint {
    /// Who listens.
    Server,
    /// Who connects.
    Client,
}

/// The types of objects.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Kind {
    /// `tls-creds-x509`: certificates in a folder.
    X509 {
        /// The folder.
        dir: PathBuf,
        /// For whom.
        endpoint: Endpoint,
        /// Whether the other side needs a certificate of the CA.
        verify_peer: bool,
    },
    /// `tls-creds-psk`: keys in a folder.
    Psk {
        /// The folder, which has a file `keys.psk`.
        dir: PathBuf,
        /// For whom.
        endpoint: Endpoint,
        /// Whose key a client uses.
        username: String,
    },
    /// `tls-creds-anon`: encryption without any proof of who the other side is.
    Anonymous,
    /// `authz-simple`: one name is let in.
    AuthzSimple {
        /// The name.
        identity: String,
    },
    /// `authz-list`: these names are let in.
    AuthzList {
        /// The names.
        names: Vec<String>,
    },
    /// `authz-list-file`: rules in a file.
    AuthzListFile {
        /// The file.
        filename: PathBuf,
        /// That it is read only once has been said.
        is_said: bool,
    },
    /// `secret`: a password.
    Secret,
    /// Taken and not used: what it tunes is not there to be tuned.
    Ignored,
}

/// The types, for `--object help` and its errors.
const TYPES: [&str; 10] = [
    "authz-list",
    "authz-list-file",
    "authz-simple",
    "iothread",
    "secret",
    "throttle-group",
    "tls-cipher-suites",
    "tls-creds-anon",
    "tls-creds-psk",
    "tls-creds-x509",
];

/// The answer to `--object help`.
pub fn help() -> String {
    let mut text = "Types of objects:\n".to_owned();
    for name in TYPES {
        text += &format!("  {name}\n");
    }
    text
}

/// Parses one definition, written as a list or as JSON.
pub fn parse(text: &str) -> Result<Object, String> {
    let pairs =
        if text.starts_with('{') { from_json(text)? } else { values::key_values(text, Some("qom-type")) };
    let mut fields = Fields { pairs };
    let type_name = fields.needed("qom-type")?;
    if !TYPES.contains(&type_name.as_str()) {
        return Err(format!("Parameter 'qom-type' does not accept value '{type_name}'"));
    }
    let id = fields.needed("id")?;
    let kind = match type_name.as_str() {
        "tls-creds-x509" => x509(&mut fields)?,
        "tls-creds-psk" => {
            let (dir, endpoint) = (fields.needed("dir")?.into(), fields.endpoint()?);
            let username = fields.take("username").unwrap_or_else(|| "qemu".to_owned());
            fields.drop(&["priority", "verify-peer"]);
            Kind::Psk { dir, endpoint, username }
        }
        "tls-creds-anon" => {
            fields.endpoint()?;
            fields.drop(&["dir", "priority", "verify-peer"]);
            Kind::Anonymous
        }
        "authz-simple" => Kind::AuthzSimple { identity: fields.needed("identity")? },
        "authz-list" => {
            let rules = fields.take_all(|key| key == "policy" || key.starts_with("rules."));
            Kind::AuthzList { names: names_of(rules)? }
        }
        "authz-list-file" => {
            let is_said = says_no_refresh(fields.take("refresh"))?;
            Kind::AuthzListFile { filename: fields.needed("filename")?.into(), is_said }
        }
        "secret" => {
            fields.drop(&["data", "file", "format", "keyid", "iv"]);
            Kind::Secret
        }
        _ => {
            fields.pairs.clear();
            Kind::Ignored
        }
    };
    match fields.pairs.first() {
        Some((unknown, _)) => Err(format!("Parameter '{unknown}' is unexpected")),
        None => Ok(Object { id, kind }),
    }
}

fn x509(fields: &mut Fields) -> Result<Kind, String> {
    let endpoint = fields.endpoint()?;
    let verify_peer = fields.switch("verify-peer")?.unwrap_or(true);
    fields.switch("sanity-check")?;
    if fields.take("passwordid").is_some() {
        return Err("tls-creds-x509: passwordid is not supported; give the key without a password".to_owned());
    }
    // Written in GnuTLS's own language; TLS 1.2 and 1.3 are offered whatever it says.
    fields.drop(&["priority"]);
    let dir = fields.take("dir").ok_or("Missing 'dir' property value")?.into();
    Ok(Kind::X509 { dir, endpoint, verify_peer })
}

/// QEMU reads the file again whenever it has changed, unless it is told not to. Here somebody whose name was taken out
/// would still be let in, so nobody is to count on it. Returns whether it was told.
fn says_no_refresh(refresh: Option<String>) -> Result<bool, String> {
    match refresh {
        None => Ok(false),
        Some(value) => match values::switch(&value) {
            Some(false) => Ok(true),
            Some(true) => {
                Err("authz-list-file: refresh=on is not possible, the file is read once; give refresh=off"
                    .to_owned())
            }
            None => Err(format!("Parameter 'refresh' expects 'on' or 'off', not '{value}'")),
        },
    }
}

/// The names in a file of `authz-list-file`, which has the rules in JSON.
pub fn names_in_file(path: &Path) -> Result<Vec<String>, String> {
    let about = |error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
    let text = fs::read_to_string(path).map_err(|error| about(&error))?;
    names_of(from_json(&text).map_err(|error| about(&error))?).map_err(|error| about(&error))
}

/// The names that a list of rules lets in. Only lists that let in names and nobody else can be had: an order of rules
/// that allow and deny, or patterns, are not what the server's own rules say.
fn names_of(pairs: Vec<(String, String)>) -> Result<Vec<String>, String> {
    let mut names = Vec::new();
    for (key, value) in pairs {
        let field = key.rsplit('.').next().unwrap_or_default();
        match (key.as_str(), field, value.as_str()) {
            (_, "match", _) => names.push(value),
            ("policy", _, "deny") | (_, "format", "exact") => {}
            (rule, "policy", "allow") if rule != "policy" => {}
            (_, "policy" | "format", _) => {
                return Err(format!(
                    "authz-list: {key}={value} is not supported; list the names to be let in, by policy=deny and rules \
                     with policy=allow and format=exact"
                ));
            }
            _ => return Err(format!("Parameter '{key}' is unexpected")),
        }
    }
    Ok(names)
}

struct Fields {
    pairs: Vec<(String, String)>,
}

impl Fields {
    /// The value of `key`, of which the last counts; it is gone from the rest.
    fn take(&mut self, key: &str) -> Option<String> {
        self.take_all(|other| other == key).pop().map(|(_, value)| value)
    }

    fn take_all(&mut self, wanted: impl Fn(&str) -> bool) -> Vec<(String, String)> {
        let (taken, rest) = std::mem::take(&mut self.pairs).into_iter().partition(|(key, _)| wanted(key));
        self.pairs = rest;
        taken
    }

    fn needed(&mut self, key: &str) -> Result<String, String> {
        self.take(key).ok_or_else(|| format!("Parameter '{key}' is missing"))
    }

    fn drop(&mut self, keys: &[&str]) {
        self.take_all(|key| keys.contains(&key));
    }

    fn switch(&mut self, key: &str) -> Result<Option<bool>, String> {
        match self.take(key) {
            None => Ok(None),
            Some(text) => match values::switch(&text) {
                Some(on) => Ok(Some(on)),
                None => Err(format!("Parameter '{key}' expects 'on' or 'off'")),
            },
        }
    }

    fn endpoint(&mut self) -> Result<Endpoint, String> {
        match self.take("endpoint").as_deref() {
            None | Some("client") => Ok(Endpoint::Client),
            Some("server") => Ok(Endpoint::Server),
            Some(other) => Err(format!("Parameter 'endpoint' does not accept value '{other}'")),
        }
    }
}

fn from_json(text: &str) -> Result<Vec<(String, String)>, String> {
    let value: serde_json::Value =
        serde_json::from_str(text).map_err(|error| format!("--object: JSON parse error, {error}"))?;
    let serde_json::Value::Object(map) = value else {
        return Err("--object: Invalid JSON object given".to_owned());
    };
    Ok(super::tree::flatten(map).into_iter().map(|(key, scalar)| (key, scalar.to_string())).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn definitions() {
        let x509 = Kind::X509 { dir: "/d,x".into(), endpoint: Endpoint::Server, verify_peer: false };
        for (text, id, want) in [
            ("tls-creds-x509,id=tls0,endpoint=server,dir=/d,,x,verify-peer=false", "tls0", x509.clone()),
            (
                r#"{"qom-type":"tls-creds-x509","id":"a","dir":"/d,x","endpoint":"server","verify-peer":false}"#,
                "a",
                x509,
            ),
            (
                "tls-creds-psk,id=p,endpoint=server,dir=/k",
                "p",
                Kind::Psk { dir: "/k".into(), endpoint: Endpoint::Server, username: "qemu".into() },
            ),
            ("tls-creds-anon,id=a,endpoint=server", "a", Kind::Anonymous),
            ("authz-simple,id=z,identity=CN=x,,O=y", "z", Kind::AuthzSimple { identity: "CN=x,O=y".into() }),
            (
                "authz-list-file,id=z,filename=/f,refresh=off",
                "z",
                Kind::AuthzListFile { filename: "/f".into(), is_said: true },
            ),
            ("secret,id=s,data=x", "s", Kind::Secret),
            ("throttle-group,id=t,x-bps-total=5", "t", Kind::Ignored),
            ("iothread,id=t", "t", Kind::Ignored),
        ] {
            assert_eq!(parse(text), Ok(Object { id: id.to_owned(), kind: want }), "{text}");
        }
    }

    #[test]
    fn mistakes() {
        for (text, want) in [
            ("foo,id=x", "Parameter 'qom-type' does not accept value 'foo'"),
            ("id=x", "Parameter 'qom-type' is missing"),
            ("tls-creds-x509", "Parameter 'id' is missing"),
            ("tls-creds-x509,id=x", "Missing 'dir' property value"),
            ("tls-creds-x509,id=x,dir=/d,foo=1", "Parameter 'foo' is unexpected"),
            ("tls-creds-x509,id=x,dir=/d,endpoint=both", "Parameter 'endpoint' does not accept value 'both'"),
            ("authz-simple,id=x", "Parameter 'identity' is missing"),
            (
                "authz-list-file,id=z,filename=/f,refresh=on",
                "authz-list-file: refresh=on is not possible, the file is read once; give refresh=off",
            ),
        ] {
            assert_eq!(parse(text), Err(want.to_owned()), "{text}");
        }
        assert!(parse("{").unwrap_err().contains("JSON parse error"));
    }

    #[test]
    fn lists_of_names() {
        let list = "authz-list,id=z,policy=deny,rules.0.match=CN=a,,O=b,rules.0.policy=allow,rules.0.format=exact,\
                    rules.1.match=c,rules.1.policy=allow";
        let names = vec!["CN=a,O=b".to_owned(), "c".to_owned()];
        assert_eq!(parse(list).map(|object| object.kind), Ok(Kind::AuthzList { names: names.clone() }));
        let file = tempfile::NamedTempFile::new().unwrap();
        let json = r#"{"policy":"deny","rules":[{"match":"CN=a,O=b","policy":"allow"},{"match":"c","policy":"allow"}]}"#;
        fs::write(file.path(), json).unwrap();
        assert_eq!(names_in_file(file.path()), Ok(names));
        for text in
            ["policy=allow", "rules.0.match=a,rules.0.policy=deny", "rules.0.match=*,rules.0.format=glob"]
        {
            let error = parse(&format!("authz-list,id=z,{text}")).unwrap_err();
            assert!(error.contains("not supported"), "{text}: {error}");
        }
    }
}
