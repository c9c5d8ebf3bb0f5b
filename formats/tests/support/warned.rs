//! [`Warned`]: whether somebody was warned of something, in the log.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::subscriber::{DefaultGuard, Subscriber, set_default};
use tracing::{Event, Level, Metadata};

/// Listens, until it is dropped, for a warning of this thread.
pub struct Warned {
    heard: Arc<AtomicBool>,
    _listening: DefaultGuard,
}

struct Listener {
    text: &'static str,
    heard: Arc<AtomicBool>,
}

impl Warned {
    /// For one that begins like this.
    pub fn of(text: &'static str) -> Self {
        let heard = Arc::new(AtomicBool::new(false));
        let _listening = set_default(Listener { text, heard: Arc::clone(&heard) });
        Warned { heard, _listening }
    }

    pub fn heard(&self) -> bool {
        self.heard.load(Ordering::Relaxed)
    }
}

impl Visit for &Listener {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == "message" && format!("{value:?}").starts_with(self.text) {
            self.heard.store(true, Ordering::Relaxed);
        }
    }
}

impl Subscriber for Listener {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() <= Level::WARN
    }

    fn event(&self, event: &Event<'_>) {
        event.record(&mut &*self);
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}
