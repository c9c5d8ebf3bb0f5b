//! Who is connected: sessions up to a limit, and connections in negotiation up to another one.
//!
//! The two are apart because a session holds a slot that somebody negotiated for, while anybody can hold
//! a connection open and say nothing: of those the oldest gives way.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::task::AbortHandle;

use super::rare::Rare;

/// Everybody who is connected. Permits come back from the shards' threads, so it is shared and locked.
pub struct Clients {
    sessions_max: usize,
    handshakes_max: usize,
    full_waits: bool,
    state: Mutex<State>,
    gone: Notify,
    room: Notify,
    rare: RareEvents,
}

#[derive(Default)]
struct State {
    sessions: usize,
    /// There has been one.
    had_session: bool,
    handshakes: BTreeMap<u64, AbortHandle>,
    next_id: u64,
}

/// What strangers can cause.
#[derive(Default)]
struct RareEvents {
    refused: Rare,
    denied: Rare,
    evicted: Rare,
    no_export: Rare,
    not_served: Rare,
}

impl Clients {
    /// Nobody yet. Both limits are at least 1. `full_waits` is whether [`room`](Self::room) waits.
    pub fn new(sessions_max: u32, handshakes_max: usize, full_waits: bool) -> Arc<Clients> {
        Arc::new(Clients {
            sessions_max: usize::try_from(sessions_max).unwrap_or(usize::MAX),
            handshakes_max,
            full_waits,
            state: Mutex::default(),
            gone: Notify::new(),
            room: Notify::new(),
            rare: RareEvents::default(),
        })
    }

    /// Sessions at this moment.
    pub fn sessions(&self) -> usize {
        self.state.lock().sessions
    }

    /// Most sessions.
    pub fn sessions_max(&self) -> usize {
        self.sessions_max
    }

    /// Whether another session would be refused.
    pub fn is_full(&self) -> bool {
        self.sessions() >= self.sessions_max
    }

    /// Makes room for a connection that is about to negotiate, and gives it its number.
    pub fn begin_handshake(self: &Arc<Self>) -> Handshake {
        let id = {
            let mut state = self.state.lock();
            state.next_id += 1;
            state.next_id
        };
        while self.state.lock().handshakes.len() >= self.handshakes_max {
            if !self.evict_oldest() {
                break;
            }
        }
        Handshake { clients: Arc::clone(self), id }
    }

    /// Says how to end the handshake of number `id`.
    pub fn register_handshake(&self, id: u64, task: AbortHandle) {
        self.state.lock().handshakes.insert(id, task);
    }

    /// Ends the oldest connection in negotiation; false if there is none.
    pub fn evict_oldest(&self) -> bool {
        let Some((_, task)) = self.state.lock().handshakes.pop_first() else {
            return false;
        };
        task.abort();
        if let Some(count) = self.rare.evicted.note(Instant::now()) {
            tracing::warn!(
                count,
                max = self.handshakes_max,
                "too many connections do not negotiate: the oldest is closed"
            );
        }
        true
    }

    /// Ends all connections in negotiation.
    pub fn end_handshakes(&self) {
        for task in std::mem::take(&mut self.state.lock().handshakes).into_values() {
            task.abort();
        }
    }

    /// Takes a slot for a session, if one is free, and logs it (the session logs its end). The slot is free
    /// again when the permit is dropped, on whatever thread.
    pub fn admit(self: &Arc<Self>, peer: &str, export: &str) -> Option<Permit> {
        {
            let mut state = self.state.lock();
            if state.sessions >= self.sessions_max {
                return None;
            }
            state.sessions += 1;
            state.had_session = true;
        }
        tracing::info!(%peer, export = %export.escape_debug(), "connection opened");
        Some(Permit(Arc::clone(self)))
    }

    /// Waits until a session ends and leaves none; where clients wait for each other, also nobody who negotiates.
    pub async fn last_gone(&self) {
        loop {
            self.gone.notified().await;
            let state = self.state.lock();
            let negotiating = self.full_waits && !state.handshakes.is_empty();
            if state.sessions == 0 && state.had_session && !negotiating {
                return;
            }
        }
    }

    /// Returns at once, or, where clients wait for each other, when another connection may be accepted: all
    /// that there are, also those in negotiation, hold a slot then.
    pub async fn room(&self) {
        if !self.full_waits {
            return;
        }
        while self.connections() >= self.sessions_max {
            self.room.notified().await;
        }
        // What has become free may be more than this caller takes, and it was woken instead of another.
        self.room.notify_one();
    }

    fn connections(&self) -> usize {
        let state = self.state.lock();
        state.sessions + state.handshakes.len()
    }

    /// Waits until nobody is connected: neither in a session nor in negotiation. One task may wait, by this or by
    /// [`last_gone`](Self::last_gone).
    pub async fn all_gone(&self) {
        loop {
            {
                let state = self.state.lock();
                if state.sessions == 0 && state.handshakes.is_empty() {
                    return;
                }
            }
            self.gone.notified().await;
        }
    }

    /// Counts a client that was refused because all slots are taken.
    pub fn note_refused(&self, peer: &str) {
        tracing::debug!(%peer, "refused: all slots are taken");
        if let Some(count) = self.rare.refused.note(Instant::now()) {
            tracing::warn!(
                count,
                max = self.sessions_max,
                "clients refused; raise --max-connections to let more in"
            );
        }
    }

    /// Counts a question for an export that is there, but not for this client.
    pub fn note_denied(&self, peer: &str, export: &str) {
        let export = export.escape_debug();
        tracing::debug!(%peer, %export, "no --access rule lets it see this export");
        if let Some(count) = self.rare.denied.note(Instant::now()) {
            tracing::warn!(count, %peer, %export, "clients asked for exports that no --access rule lets them see");
        }
    }

    /// Counts a client that got a slot, and for whom the image could not be made ready.
    pub fn note_not_served(&self, peer: &str, error: &nbd_img_formats::Error) {
        tracing::debug!(%peer, %error, "refused: the image cannot be made ready for it");
        if let Some(count) = self.rare.not_served.note(Instant::now()) {
            tracing::error!(count, %error, "clients refused: the image cannot be made ready for them");
        }
    }

    /// Counts a connection that ended before it had an export: a port scan, a health check, a client
    /// that only lists.
    pub fn note_no_export(&self, peer: &str, why: &str) {
        tracing::debug!(%peer, why, "connection ended before it chose an export");
        if let Some(count) = self.rare.no_export.note(Instant::now()) {
            tracing::info!(count, %peer, why, "connections ended before they chose an export");
        }
    }
}

/// A connection in negotiation; dropping it takes it off the list.
pub struct Handshake {
    clients: Arc<Clients>,
    id: u64,
}

impl Handshake {
    /// Its number: a later one is larger.
    pub fn id(&self) -> u64 {
        self.id
    }
}

impl Drop for Handshake {
    fn drop(&mut self) {
        self.clients.state.lock().handshakes.remove(&self.id);
        self.clients.room.notify_one();
        self.clients.gone.notify_one();
    }
}

/// A session's slot.
pub struct Permit(Arc<Clients>);

impl Drop for Permit {
    fn drop(&mut self) {
        {
            let mut state = self.0.state.lock();
            state.sessions = state.sessions.saturating_sub(1);
        }
        self.0.gone.notify_one();
        self.0.room.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::pending;

    #[test]
    fn slots_are_counted_and_come_back() {
        let clients = Clients::new(2, 10, false);
        let first = clients.admit("a", "").unwrap();
        let _second = clients.admit("b", "").unwrap();
        assert!(clients.is_full() && clients.admit("c", "").is_none());
        drop(first);
        assert!(!clients.is_full() && clients.admit("c", "").is_some());
    }

    #[tokio::test]
    async fn the_oldest_handshake_gives_way() {
        let clients = Clients::new(1, 2, false);
        let mut tasks = Vec::new();
        for _ in 0..3 {
            let handshake = clients.begin_handshake();
            let id = handshake.id();
            let task = tokio::spawn(async move {
                let _handshake = handshake;
                pending::<()>().await;
            });
            clients.register_handshake(id, task.abort_handle());
            tasks.push(task);
        }
        assert!(tasks.remove(0).await.unwrap_err().is_cancelled());
        tokio::task::yield_now().await;
        assert!(tasks.iter().all(|task| !task.is_finished()));
        clients.end_handshakes();
        for task in tasks {
            assert!(task.await.unwrap_err().is_cancelled());
        }
    }

    #[tokio::test]
    async fn the_last_to_go_is_noticed() {
        let clients = Clients::new(2, 2, false);
        let (first, second) = (clients.admit("a", "").unwrap(), clients.admit("b", "").unwrap());
        let waiting = tokio::spawn({
            let clients = Arc::clone(&clients);
            async move { clients.last_gone().await }
        });
        drop(first);
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        drop(second);
        waiting.await.unwrap();
    }

    #[tokio::test]
    async fn whoever_waits_gets_the_next_slot() {
        let clients = Clients::new(1, 2, true);
        clients.room().await;
        let handshake = clients.begin_handshake();
        clients.register_handshake(handshake.id(), tokio::spawn(pending::<()>()).abort_handle());
        let waiting = tokio::spawn({
            let clients = Arc::clone(&clients);
            async move { clients.room().await }
        });
        let permit = clients.admit("a", "").unwrap();
        drop(handshake);
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        drop(permit);
        waiting.await.unwrap();
    }

    #[tokio::test]
    async fn a_slot_that_the_first_does_not_take_is_the_seconds() {
        let clients = Clients::new(1, 2, true);
        let permit = clients.admit("a", "").unwrap();
        let waiting: Vec<_> = (0..3)
            .map(|_| {
                let clients = Arc::clone(&clients);
                tokio::spawn(async move { clients.room().await })
            })
            .collect();
        tokio::task::yield_now().await;
        drop(permit);
        for waiting in waiting {
            waiting.await.unwrap();
        }
    }

    #[tokio::test]
    async fn who_negotiates_is_there_but_not_the_last_to_go() {
        for all in [true, false] {
            let clients = Clients::new(2, 2, false);
            let handshake = clients.begin_handshake();
            clients.register_handshake(handshake.id(), tokio::spawn(async {}).abort_handle());
            let waiting = tokio::spawn({
                let clients = Arc::clone(&clients);
                async move { if all { clients.all_gone().await } else { clients.last_gone().await } }
            });
            tokio::task::yield_now().await;
            assert!(!waiting.is_finished());
            drop(handshake);
            if !all {
                tokio::task::yield_now().await;
                assert!(!waiting.is_finished(), "nobody had a session");
                drop(clients.admit("a", ""));
            }
            waiting.await.unwrap();
        }
    }
}
