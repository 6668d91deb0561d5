//! The time that start timestamps are taken from, and how long a new series shows zero.

use std::time::Duration;

/// In milliseconds since the epoch, passed in by the caller.
#[derive(Debug, Default)]
pub(super) struct SeriesClock {
    /// The first time that was set: series that are older were restored.
    started: Option<u64>,
    now: u64,
    /// `metrics.zero_first`.
    zero_first: u64,
}

impl SeriesClock {
    pub(super) fn new(zero_first: Duration) -> Self {
        Self { zero_first: u64::try_from(zero_first.as_millis()).unwrap_or(u64::MAX >> 8), ..Self::default() }
    }

    pub(super) fn now(&self) -> u64 {
        self.now
    }

    /// Sets the time. Returns whether it is the first one.
    pub(super) fn set(&mut self, now: u64) -> bool {
        self.now = now.max(self.now);
        self.started.replace(self.started.unwrap_or(self.now)).is_none()
    }

    pub(super) fn started(&self) -> u64 {
        self.started.unwrap_or_default()
    }

    /// The start timestamp of a series that is created now: just before the event that has arrived.
    pub(super) fn created(&self) -> u64 {
        self.now.saturating_sub(1)
    }

    /// Whether a series shows zero, because an event of this process created it a short time ago.
    #[inline]
    pub(super) fn is_zero(&self, created: u64) -> bool {
        self.zero_first > 0 && self.now < created + self.zero_first && created + 1 >= self.started()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_series_shows_zero_for_a_time_and_a_restored_one_does_not() {
        let mut clock = SeriesClock::default();
        assert!(clock.set(1000) && !clock.set(1100));
        assert!(!clock.is_zero(clock.created()), "off");
        let mut clock = SeriesClock::new(Duration::from_millis(500));
        assert!(clock.set(1000) && !clock.set(1100));
        let created = clock.created();
        assert_eq!(created, 1099);
        assert!(clock.is_zero(created));
        assert!(!clock.is_zero(998), "restored");
        clock.set(1598);
        assert!(clock.is_zero(created));
        clock.set(1599);
        assert!(!clock.is_zero(created));
        clock.set(1200);
        assert!(!clock.is_zero(created), "time does not go back");
    }
}
