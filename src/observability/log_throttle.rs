//! A throttle for log lines that would repeat: each is logged at most once a minute.

use std::collections::HashMap;
use std::time::{Duration, Instant};

const INTERVAL: Duration = Duration::from_secs(60);
/// Maximum number of keys in memory. When they are reached, all are removed, so that memory stays bounded.
const MAX_KEYS: usize = 64;

/// Tracks which lines were logged recently.
#[derive(Debug, Default)]
pub struct LogThrottle {
    logged: HashMap<String, (Instant, u64)>,
}

impl LogThrottle {
    /// Whether to log the line with this key now. If so, returns how many were suppressed since the last one.
    pub fn check(&mut self, key: &str) -> Option<u64> {
        if let Some((at, suppressed)) = self.logged.get_mut(key) {
            if at.elapsed() < INTERVAL {
                *suppressed += 1;
                return None;
            }
            *at = Instant::now();
            return Some(std::mem::take(suppressed));
        }
        if self.logged.len() >= MAX_KEYS {
            self.logged.clear();
        }
        self.logged.insert(key.to_owned(), (Instant::now(), 0));
        Some(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_key_is_logged_once_and_memory_is_bounded() {
        let mut throttle = LogThrottle::default();
        assert_eq!(["a", "a", "b", "a"].map(|key| throttle.check(key)), [Some(0), None, Some(0), None]);
        for number in 0..1000 {
            throttle.check(&number.to_string());
        }
        assert!(throttle.logged.len() <= MAX_KEYS);
    }
}
