//! Options of block nodes as a flat list with dotted keys: what `--image-opts` writes so, and JSON after its objects
//! have been unfolded.

use std::collections::BTreeMap;
use std::fmt;

use super::values;

/// A value at a leaf.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Scalar {
    /// JSON's null.
    Null,
    /// A text, or a number or a switch written as one.
    Text(String),
}

impl fmt::Display for Scalar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Scalar::Null => f.write_str("null"),
            Scalar::Text(text) => f.write_str(text),
        }
    }
}

/// Dotted keys and their values.
pub type Flat = BTreeMap<String, Scalar>;

/// The options in `text`, written as `--image-opts` has them. A first field without `=` is a node's name.
pub fn from_list(text: &str) -> Result<Flat, String> {
    let first = text.split(',').next().unwrap_or_default();
    if !first.contains('=') {
        return Err(no_such_node(first));
    }
    let pairs = values::key_values(text, None);
    Ok(pairs.into_iter().map(|(key, value)| (key, Scalar::Text(value))).collect())
}

/// The options in `text`, which is what follows `json:`.
pub fn from_json(text: &str) -> Result<Flat, String> {
    match serde_json::from_str(text) {
        Ok(serde_json::Value::Object(map)) => Ok(flatten(map)),
        Ok(_) => Err("Invalid JSON object given".to_owned()),
        Err(error) => Err(format!("Could not parse the JSON options: JSON parse error, {error}")),
    }
}

/// Unfolds nested objects and arrays.
pub fn flatten(map: serde_json::Map<String, serde_json::Value>) -> Flat {
    let mut flat = Flat::new();
    for (key, value) in map {
        unfold(key, value, &mut flat);
    }
    flat
}

fn unfold(key: String, value: serde_json::Value, flat: &mut Flat) {
    let scalar = match value {
        serde_json::Value::Null => Scalar::Null,
        serde_json::Value::Bool(on) => Scalar::Text(if on { "on" } else { "off" }.to_owned()),
        serde_json::Value::Number(number) => Scalar::Text(number.to_string()),
        serde_json::Value::String(text) => Scalar::Text(text),
        serde_json::Value::Array(items) => {
            for (at, item) in items.into_iter().enumerate() {
                unfold(format!("{key}.{at}"), item, flat);
            }
            return;
        }
        serde_json::Value::Object(map) => {
            for (inner, item) in map {
                unfold(format!("{key}.{inner}"), item, flat);
            }
            return;
        }
    };
    flat.insert(key, scalar);
}

/// Takes the options of the child `name` out of `flat`, without the name and its dot.
pub fn take_child(flat: &mut Flat, name: &str) -> Flat {
    let prefix = format!("{name}.");
    let mut child = Flat::new();
    let keys: Vec<String> = flat.keys().filter(|key| key.starts_with(&prefix)).cloned().collect();
    for key in keys {
        if let (Some(value), Some(rest)) = (flat.remove(&key), key.strip_prefix(&prefix)) {
            child.insert(rest.to_owned(), value);
        }
    }
    child
}

/// Where an option names a node that was defined elsewhere: nothing can define one here.
pub fn no_such_node(name: &str) -> String {
    format!("Cannot find device='{name}' nor node-name='{name}'")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_and_json_come_to_the_same() {
        let list =
            from_list("driver=qcow2,file.driver=file,file.filename=a,,b,file.cache.direct=on").unwrap();
        let json = from_json(
            r#"{"driver":"qcow2","file.driver":"file","file":{"filename":"a,b","cache":{"direct":true}}}"#,
        )
        .unwrap();
        assert_eq!(list, json);
        let mut rest = json;
        let child = take_child(&mut rest, "file");
        assert_eq!(child.keys().collect::<Vec<_>>(), ["cache.direct", "driver", "filename"]);
        assert_eq!(rest.keys().collect::<Vec<_>>(), ["driver"]);
    }

    #[test]
    fn leaves() {
        let flat = from_json(r#"{"a":null,"b":5,"c":[1,{"d":false}]}"#).unwrap();
        let shown: Vec<_> = flat.iter().map(|(key, value)| format!("{key}={value}")).collect();
        assert_eq!(shown, ["a=null", "b=5", "c.0=1", "c.1.d=off"]);
    }

    #[test]
    fn mistakes() {
        assert_eq!(from_list("foo").unwrap_err(), "Cannot find device='foo' nor node-name='foo'");
        assert_eq!(from_json("[]").unwrap_err(), "Invalid JSON object given");
        assert!(from_json("{").unwrap_err().starts_with("Could not parse the JSON options"));
    }
}
