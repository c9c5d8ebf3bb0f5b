//! Log lines that others can cause as often as they like: a port scan, a health check or a script that
//! sends signals must not fill the log.

use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// At most one line per this time. Our choice: a minute, as monitoring looks.
const PAUSE: Duration = Duration::from_secs(60);

/// Counts events of one kind and says when to write a line about them.
#[derive(Debug, Default)]
pub struct Rare {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    last: Option<Instant>,
    unsaid: u64,
}

impl Rare {
    /// Counts one event. `Some(count)` asks for a line now, about `count` events since the last line.
    pub fn note(&self, now: Instant) -> Option<u64> {
        let mut state = self.state.lock();
        state.unsaid = state.unsaid.saturating_add(1);
        if state.last.is_some_and(|last| now.saturating_duration_since(last) < PAUSE) {
            return None;
        }
        state.last = Some(now);
        Some(std::mem::take(&mut state.unsaid))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_is_told_at_once_and_the_rest_once_a_minute() {
        let rare = Rare::default();
        let start = Instant::now();
        assert_eq!(rare.note(start), Some(1));
        for second in 1..60 {
            assert_eq!(rare.note(start + Duration::from_secs(second)), None);
        }
        assert_eq!(rare.note(start + PAUSE), Some(60));
        assert_eq!(rare.note(start + PAUSE), None);
    }
}
