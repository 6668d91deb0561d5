//! The clock by which workers grow old.

use std::time::{Duration, Instant};

use crate::session::PULSE;

/// How often the clock moves, and timeouts are looked at.
pub(super) const TICK: Duration = Duration::from_millis(200);

/// Without a sign of life from the broker for so long, what we do not hear says nothing about the workers.
const DEAF_AFTER: Duration = PULSE.saturating_mul(3);

/// A clock that runs while we listen and have caught up with what waited for us: an outage or a backlog makes nobody
/// old. It moves at every tick.
#[derive(Debug)]
pub(super) struct Attention {
    pub(super) elapsed: Duration,
    pub(super) last_tick: Instant,
    pub(super) listening: bool,
    pub(super) behind: bool,
    pub(super) caught_up: bool,
    /// The broker's last sign of life.
    pub(super) pulse: Instant,
}

impl Attention {
    pub(super) fn new() -> Self {
        Self {
            elapsed: Duration::ZERO,
            last_tick: Instant::now(),
            listening: false,
            behind: false,
            caught_up: false,
            pulse: Instant::now(),
        }
    }

    pub(super) fn tick(&mut self, now: Instant) {
        let passed = now - self.last_tick;
        self.last_tick = now;
        let deaf = now.saturating_duration_since(self.pulse) > DEAF_AFTER;
        if self.listening && !deaf && !self.behind && self.caught_up {
            // A longer pause than this was not spent listening: the process stood still.
            self.elapsed += passed.min(TICK * 5);
        }
        self.caught_up = false;
    }

    /// The time of an event that came in since the last tick: at the latest the next one.
    pub(super) fn hearing(&self) -> Duration {
        self.elapsed + TICK
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_runs_only_while_we_listen_and_have_caught_up() {
        let mut clock = Attention::new();
        let mut now = clock.last_tick;
        let mut tick = |clock: &mut Attention, caught_up: bool, passed: Duration| {
            now += passed;
            clock.caught_up = caught_up;
            clock.pulse = now;
            clock.tick(now);
        };
        tick(&mut clock, true, TICK);
        assert_eq!(clock.elapsed, Duration::ZERO, "not listening yet");
        clock.listening = true;
        tick(&mut clock, true, TICK);
        assert_eq!((clock.elapsed, clock.hearing()), (TICK, TICK * 2));
        tick(&mut clock, false, TICK);
        assert_eq!(clock.elapsed, TICK, "a backlog of our own");
        clock.caught_up = true;
        clock.pulse = clock.last_tick;
        clock.tick(clock.last_tick + DEAF_AFTER + TICK);
        assert_eq!(clock.elapsed, TICK, "the broker is silent");
        clock.behind = true;
        tick(&mut clock, true, TICK);
        assert_eq!(clock.elapsed, TICK, "a backlog at the broker");
        clock.behind = false;
        tick(&mut clock, true, Duration::from_secs(3600));
        assert_eq!(clock.elapsed, TICK * 6, "the process stood still");
    }
}
