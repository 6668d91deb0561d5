//! The delay between two connection attempts: doubled after each failure, with jitter, up to a maximum.

use std::time::Duration;

const INITIAL_BACKOFF: Duration = Duration::from_millis(250);

/// Doubles from a quarter of a second up to `broker.reconnect_backoff_max`.
#[derive(Debug, Default)]
pub(super) struct Backoff {
    delay: Duration,
}

impl Backoff {
    /// The delay before the next attempt, from half of the current backoff to all of it.
    pub(super) fn next(&mut self, max: Duration) -> Duration {
        self.delay = (self.delay * 2).max(INITIAL_BACKOFF).min(max);
        self.delay.mul_f64(0.5 + fastrand::f64() / 2.0)
    }

    /// Starts from the initial delay again.
    pub(super) fn reset(&mut self) {
        self.delay = Duration::ZERO;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_delay_doubles_up_to_the_maximum_and_starts_again_after_a_reset() {
        let (mut backoff, max) = (Backoff::default(), Duration::from_secs(1));
        for milliseconds in [250, 500, 1000, 1000] {
            let (delay, upper) = (backoff.next(max), Duration::from_millis(milliseconds));
            assert!((upper / 2..=upper).contains(&delay), "{delay:?}");
        }
        backoff.reset();
        assert!(backoff.next(max) <= INITIAL_BACKOFF);
    }

    #[test]
    fn a_maximum_below_the_initial_delay_is_kept() {
        let max = Duration::from_millis(100);
        assert!(Backoff::default().next(max) <= max);
    }
}
