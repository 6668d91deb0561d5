//! The time of day for start timestamps. It advances evenly: a step of the system's clock does not change the order of
//! two timestamps.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

#[derive(Debug)]
pub(super) struct WallClock {
    began: Instant,
    /// In milliseconds since the epoch.
    began_at: u128,
}

impl WallClock {
    pub(super) fn new() -> Self {
        let began_at = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
        Self { began: Instant::now(), began_at }
    }

    /// Milliseconds since the epoch at a moment since the start.
    pub(super) fn millis(&self, at: Instant) -> u64 {
        let elapsed = at.saturating_duration_since(self.began).as_millis();
        u64::try_from(self.began_at + elapsed).unwrap_or(u64::MAX)
    }
}
