//! A bar on the terminal that says how far something is.

use std::io::{self, IsTerminal, Write};
use std::sync::atomic::{AtomicU32, Ordering};

/// Cells of the bar.
const WIDTH: usize = 40;

/// Draws on stderr if that is a terminal, and nothing else. Cleared when it goes.
pub struct Bar {
    what: &'static str,
    is_shown: bool,
    drawn: AtomicU32,
}

impl Bar {
    /// A bar for `what`; `is_wanted` says whether a person is to see it.
    pub fn new(what: &'static str, is_wanted: bool) -> Self {
        Bar { what, is_shown: is_wanted && io::stderr().is_terminal(), drawn: AtomicU32::new(u32::MAX) }
    }

    /// So many parts of 1000 are done. May be called from several threads.
    pub fn set(&self, permille: u32) {
        // Drawn a hundred times at most.
        let percent = permille.min(1000) / 10;
        if self.is_shown && self.drawn.swap(percent, Ordering::Relaxed) != percent {
            let text = draw(self.what, percent);
            // Nothing depends on what a person sees.
            let _ = io::stderr().write_all(text.as_bytes());
        }
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        if self.is_shown {
            // Back to the start of the line, which is cleared.
            let _ = io::stderr().write_all(b"\r\x1b[K");
        }
    }
}

fn draw(what: &str, percent: u32) -> String {
    let full = WIDTH * usize::try_from(percent).unwrap_or(0) / 100;
    format!("\r{what} [{}{}] {percent:>3} %", "#".repeat(full), " ".repeat(WIDTH - full))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars() {
        for (percent, cells) in [(0, 0), (50, 20), (99, 39), (100, 40)] {
            let bar = draw("checking", percent);
            assert_eq!(bar.matches('#').count(), cells, "{bar}");
            assert_eq!(bar.len(), "\rchecking [] 100 %".len() + WIDTH, "{bar}");
        }
    }
}
