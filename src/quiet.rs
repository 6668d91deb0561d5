//! Log lines that would otherwise repeat: each topic speaks at most once a minute, and says what it kept to itself.

use std::time::{Duration, Instant};

const PAUSE: Duration = Duration::from_secs(60);

/// One topic of the log.
#[derive(Debug, Default)]
pub struct Quiet {
    last: Option<Instant>,
    kept: u64,
}

impl Quiet {
    /// Whether to speak now; if so, how many lines were kept back since the last one.
    pub fn speak(&mut self) -> Option<u64> {
        if self.last.is_some_and(|last| last.elapsed() < PAUSE) {
            self.kept += 1;
            return None;
        }
        self.last = Some(Instant::now());
        Some(std::mem::take(&mut self.kept))
    }
}
