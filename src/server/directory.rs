//! The server's exports as the protocol asks for them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::clients::Clients;
use crate::export::Export;
use crate::nbd::export_info::{ExportDirectory, ExportInfo, ExportSummary, Refusal};
use crate::session::Shards;

/// All exports with the threads that serve them. Fixed while the server runs.
pub struct Exports {
    served: Vec<(Arc<Export>, Arc<Shards>)>,
    clients: Arc<Clients>,
    draining: AtomicBool,
}

impl Exports {
    /// The exports in the order to list them.
    pub fn new(served: Vec<(Arc<Export>, Arc<Shards>)>, clients: Arc<Clients>) -> Exports {
        Exports { served, clients, draining: AtomicBool::new(false) }
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

    /// The exports as `peer` sees them.
    pub fn seen_by<'a>(&'a self, peer: &'a str) -> Directory<'a> {
        Directory { exports: self, peer }
    }

    /// The export that `name` means: the empty name is also that of an only export.
    fn find(&self, name: &str) -> Option<&Arc<Export>> {
        let named = self.served.iter().find(|(export, _)| export.name() == name);
        let only = match self.served.as_slice() {
            [only] if name.is_empty() => Some(only),
            [..] => None,
        };
        named.or(only).map(|(export, _)| export)
    }
}

/// The exports seen from one connection.
pub struct Directory<'a> {
    exports: &'a Exports,
    peer: &'a str,
}

impl ExportDirectory for Directory<'_> {
    fn list(&self) -> Vec<ExportSummary> {
        let summary = |export: &Arc<Export>| ExportSummary {
            name: export.name().to_owned(),
            description: export.description().to_owned(),
            tls_required: export.tls_required(),
        };
        self.exports.served.iter().map(|(export, _)| summary(export)).collect()
    }

    fn find(&self, name: &str) -> Result<ExportInfo, Refusal> {
        let export = self.exports.find(name).ok_or(Refusal::Unknown)?;
        let clients = &self.exports.clients;
        if clients.is_full() {
            clients.note_refused(self.peer);
            let max = clients.sessions_max();
            return Err(Refusal::Policy(format!(
                "the server has its {max} clients (--max-connections); try later"
            )));
        }
        Ok(export.info())
    }

    fn draining(&self) -> bool {
        self.exports.draining.load(Ordering::Relaxed)
    }
}
