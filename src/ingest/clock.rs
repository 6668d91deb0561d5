//! The clock that times workers out.

use std::time::{Duration, Instant};

use crate::inbox::LIVENESS_CHECK_INTERVAL;

/// How often the clock advances and timeouts are checked.
pub(super) const TICK: Duration = Duration::from_millis(200);

/// If the broker has not responded for this long, missing events do not indicate that a worker is offline.
const BROKER_SILENCE_LIMIT: Duration = LIVENESS_CHECK_INTERVAL.saturating_mul(3);

/// A clock that runs only while the exporter is subscribed and has processed what was queued for it. An outage or a
/// backlog therefore times no worker out. It advances at every tick.
#[derive(Debug)]
pub(super) struct ListeningClock {
    pub(super) elapsed: Duration,
    pub(super) last_tick: Instant,
    pub(super) is_listening: bool,
    pub(super) broker_backlogged: bool,
    /// Whether the inbox was empty at least once since the last tick.
    pub(super) drained: bool,
    pub(super) broker_last_seen: Instant,
}

impl ListeningClock {
    pub(super) fn new() -> Self {
        Self {
            elapsed: Duration::ZERO,
            last_tick: Instant::now(),
            is_listening: false,
            broker_backlogged: false,
            drained: false,
            broker_last_seen: Instant::now(),
        }
    }

    /// Advances the clock. Returns for how long it was paused.
    pub(super) fn tick(&mut self, now: Instant) -> Duration {
        let passed = now - self.last_tick;
        self.last_tick = now;
        let broker_silent = now.saturating_duration_since(self.broker_last_seen) > BROKER_SILENCE_LIMIT;
        let runs = self.is_listening && !broker_silent && !self.broker_backlogged && self.drained;
        self.drained = false;
        // A longer pause means that the process was suspended.
        let advanced = if runs { passed.min(TICK * 5) } else { Duration::ZERO };
        self.elapsed += advanced;
        passed.saturating_sub(advanced)
    }

    /// The time of an event that arrives now: that of the next tick, which is never too early.
    pub(super) fn event_time(&self) -> Duration {
        self.elapsed + TICK
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_clock_runs_only_while_subscribed_and_without_a_backlog() {
        let mut clock = ListeningClock::new();
        let mut now = clock.last_tick;
        let mut tick = |clock: &mut ListeningClock, drained: bool, passed: Duration| {
            now += passed;
            clock.drained = drained;
            clock.broker_last_seen = now;
            clock.tick(now)
        };
        assert_eq!(tick(&mut clock, true, TICK), TICK);
        assert_eq!(clock.elapsed, Duration::ZERO, "not subscribed yet");
        clock.is_listening = true;
        assert_eq!(tick(&mut clock, true, TICK), Duration::ZERO);
        assert_eq!((clock.elapsed, clock.event_time()), (TICK, TICK * 2));
        tick(&mut clock, false, TICK);
        assert_eq!(clock.elapsed, TICK, "a backlog in the inbox");
        clock.drained = true;
        clock.broker_last_seen = clock.last_tick;
        clock.tick(clock.last_tick + BROKER_SILENCE_LIMIT + TICK);
        assert_eq!(clock.elapsed, TICK, "the broker does not respond");
        clock.broker_backlogged = true;
        tick(&mut clock, true, TICK);
        assert_eq!(clock.elapsed, TICK, "a backlog at the broker");
        clock.broker_backlogged = false;
        tick(&mut clock, true, Duration::from_secs(3600));
        assert_eq!(clock.elapsed, TICK * 6, "the process was stopped");
    }
}
