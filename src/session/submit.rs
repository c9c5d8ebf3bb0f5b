//! Submitting to storages in batches: what a session submits is held until there are as many operations
//! as pay, or until the session has no more work or waits for something.
//!
//! How many pay was measured, on one virtual disk: see the constants.

use std::convert::Infallible;
use std::rc::Rc;
use std::sync::Arc;

use nbd_img_formats::Storage;
use nbd_img_formats::storage::{Operation, OperationKind};

use super::shard::Shard;

/// Reads past the page cache that are submitted together. More of them come back together, and the disk
/// idles while all are answered (prototype: 1.2 x against 0.9 x the best peer).
const DIRECT_READS_MAX: usize = 1;

/// Reads that have missed the page cache (four gave 1.24 x what one by one gave, at 0.64 of the processor
/// time).
const COLD_READS_MAX: usize = 4;

/// Writes that are submitted together (prototype: 0.69 x what the file itself gives, against 0.44 x one by
/// one; later runs on a slower disk showed no difference but in processor time).
const WRITES_MAX: usize = 4;

/// Operations that wait for company: all for one storage.
#[derive(Default)]
pub struct Held {
    storage: Option<Arc<dyn Storage>>,
    operations: Vec<Operation>,
}

impl Shard {
    /// Submits an operation; its answer comes to the queue. It may be held back until the caller waits.
    pub fn submit(&self, storage: &Arc<dyn Storage>, operation: Operation) {
        let enough = match operation.kind {
            OperationKind::Read if storage.facts().direct => DIRECT_READS_MAX,
            OperationKind::Read => COLD_READS_MAX,
            OperationKind::Write(_) | OperationKind::Sync => WRITES_MAX,
        };
        if self.held.borrow().storage.as_ref().is_some_and(|held| !Arc::ptr_eq(held, storage)) {
            self.submit_held();
        }
        let count = {
            let mut held = self.held.borrow_mut();
            held.storage.get_or_insert_with(|| Arc::clone(storage));
            held.operations.push(operation);
            held.operations.len()
        };
        if count >= enough {
            self.submit_held();
        } else if count == 1 {
            self.held_some.notify_one();
        }
    }

    /// Submits what is held.
    pub fn submit_held(&self) {
        let mut held = self.held.borrow_mut();
        let Held { storage, operations } = &mut *held;
        if let Some(storage) = storage.take() {
            storage.submit(operations, &self.queue);
        }
    }

    /// Submits what sessions have left held, whenever they wait for something; for ever.
    pub async fn submit_leftovers(self: Rc<Self>) -> Infallible {
        loop {
            self.held_some.notified().await;
            self.submit_held();
        }
    }
}
