//! Who may do what: `--access` rules, and what they come to for one connection.
//!
//! A rule grants; nothing takes away. Where no rule was written everybody may do what the export allows.

mod network;
mod rule;

use std::collections::HashMap;

pub use self::rule::{Right, Rule, Who};
use crate::transport::Peer;

/// The rules of all exports.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AccessRules {
    /// For exports without rules of their own.
    pub general: Vec<Rule>,
    /// For the exports of these names, instead of the general ones.
    pub own: HashMap<String, Vec<Rule>>,
}

impl AccessRules {
    /// What `peer` may do with the export of this name; nothing is not even to know of it.
    pub fn right(&self, export: &str, peer: &Peer) -> Option<Right> {
        let rules = self.own.get(export).unwrap_or(&self.general);
        if rules.is_empty() {
            return Some(Right::Write);
        }
        rules.iter().filter(|rule| rule.who.is(peer)).map(|rule| rule.right).max()
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = &Rule> {
        self.own.values().flatten().chain(&self.general)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transport::peer::Identity;
    use std::os::unix::net::UnixStream;

    fn peer(psk: Option<&str>) -> Peer {
        let (here, _there) = UnixStream::pair().unwrap();
        let mut peer = Peer::of(&here, String::new());
        peer.identify(psk.map(|name| Identity::Psk(name.to_owned())));
        peer
    }

    fn rules(texts: &[&str]) -> Vec<Rule> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn without_a_rule_everybody_may_write() {
        assert_eq!(AccessRules::default().right("a", &peer(None)), Some(Right::Write));
    }

    #[test]
    fn the_best_rule_counts_and_without_one_there_is_nothing() {
        let access = AccessRules {
            general: rules(&["read:psk=reader", "write:psk=writer", "read:psk=writer"]),
            own: HashMap::from([("own".to_owned(), rules(&["read:anyone"]))]),
        };
        for (psk, general, own) in [
            (None, None, Some(Right::Read)),
            (Some("stranger"), None, Some(Right::Read)),
            (Some("reader"), Some(Right::Read), Some(Right::Read)),
            (Some("writer"), Some(Right::Write), Some(Right::Read)),
        ] {
            assert_eq!(access.right("any", &peer(psk)), general, "{psk:?}");
            assert_eq!(access.right("own", &peer(psk)), own, "{psk:?}");
        }
        assert_eq!(access.iter().count(), 4);
    }
}
