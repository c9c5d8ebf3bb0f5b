//! The server's exports as the protocol asks for them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::access::{AccessRules, Right};
use super::clients::Clients;
use crate::export::Export;
use crate::nbd::export_info::{ExportDirectory, ExportInfo, ExportSummary, Refusal, TransmissionFlags};
use crate::session::Shards;
use crate::transport::Peer;

/// All exports with the threads that serve them. Fixed while the server runs.
pub struct Exports {
    served: Vec<(Arc<Export>, Arc<Shards>)>,
    access: AccessRules,
    clients: Arc<Clients>,
    draining: AtomicBool,
}

impl Exports {
    /// The exports in the order to list them.
    pub fn new(
        served: Vec<(Arc<Export>, Arc<Shards>)>,
        access: AccessRules,
        clients: Arc<Clients>,
    ) -> Exports {
        Exports { served, access, clients, draining: AtomicBool::new(false) }
    }

    /// From now on clients are told that the server is going down.
    pub fn drain(&self) {
        self.draining.store(true, Ordering::Relaxed);
    }

    /// The threads of all exports.
    pub fn shards(&self) -> impl Iterator<Item = &Arc<Shards>> {
        self.served.iter().map(|(_, shards)| shards)
    }

    /// The threads of the export of this canonical name.
    pub fn shards_of(&self, name: &str) -> Option<&Arc<Shards>> {
        self.served.iter().find(|(export, _)| export.name() == name).map(|(_, shards)| shards)
    }

    /// The threads of the export that the operator means: the named one, or the only one. The error is for him.
    pub fn only_or_named(&self, name: Option<&str>) -> Result<&Arc<Shards>, String> {
        match (name, self.served.as_slice()) {
            (Some(name), _) => self.shards_of(name).ok_or_else(|| {
                format!("there is no export of the name '{}' (--export)", name.escape_debug())
            }),
            (None, [(_, only)]) => Ok(only),
            (None, _) => Err("the server has several exports; say which one (--export NAME)".to_owned()),
        }
    }

    /// The exports as `peer` sees them, by what is known of it now.
    pub fn seen_by(&self, peer: &Peer) -> Directory<'_> {
        let right = |export: &Export| self.access.right(export.name(), peer);
        let visible = self.served.iter().filter_map(|(export, _)| Some((export, right(export)?)));
        Directory { exports: self, visible: visible.collect(), peer: peer.to_string() }
    }
}

/// The exports seen from one connection. What it may not see is not in here, so that nothing can tell it from what does
/// not exist.
pub struct Directory<'a> {
    exports: &'a Exports,
    visible: Vec<(&'a Arc<Export>, Right)>,
    peer: String,
}

impl Directory<'_> {
    /// The export that `name` means: the empty name is also that of an only export.
    fn find_visible(&self, name: &str) -> Option<(&Arc<Export>, Right)> {
        let named = self.visible.iter().find(|(export, _)| export.name() == name);
        let only = match self.visible.as_slice() {
            [only] if name.is_empty() => Some(only),
            [..] => None,
        };
        named.or(only).copied()
    }

    /// For the log only.
    fn note_unknown(&self, name: &str) {
        if self.exports.shards_of(name).is_some() {
            self.exports.clients.note_denied(&self.peer, name);
        }
    }
}

impl ExportDirectory for Directory<'_> {
    fn list(&self) -> Vec<ExportSummary> {
        let summary = |export: &Export| ExportSummary {
            name: export.name().to_owned(),
            description: export.description().to_owned(),
            tls_required: export.tls_required(),
        };
        self.visible.iter().map(|(export, _)| summary(export)).collect()
    }

    fn find(&self, name: &str) -> Result<ExportInfo, Refusal> {
        let Some((export, right)) = self.find_visible(name) else {
            self.note_unknown(name);
            return Err(Refusal::Unknown);
        };
        let clients = &self.exports.clients;
        if clients.is_full() {
            clients.note_refused(&self.peer);
            let max = clients.sessions_max();
            return Err(Refusal::Policy(format!(
                "the server has its {max} clients (--max-connections); try later"
            )));
        }
        let mut info = export.info();
        match right {
            Right::Read => info.flags |= TransmissionFlags::READ_ONLY,
            Right::Write => {}
        }
        Ok(info)
    }

    fn draining(&self) -> bool {
        self.exports.draining.load(Ordering::Relaxed)
    }
}
