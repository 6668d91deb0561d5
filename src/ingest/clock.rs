//! The clock that times workers out. It advances only to the send time of the last witness that came back on the path
//! of the events, in its place among them: until then, every event that was sent earlier has been applied. A backlog, a
//! full window, a blocked or frozen broker and an outage therefore time no worker out.

use std::time::{Duration, Instant};

/// The longest time between two iterations of the ingest loop. It is longer than the time between two witnesses of a
/// named queue, which also wake the loop.
pub(super) const TICK: Duration = Duration::from_millis(1500);
/// An iteration that took longer means that the process was stopped, or that the loop was busy.
const MAX_ITERATION: Duration = TICK.saturating_mul(2);
/// Without a witness for this long, the clock counts as paused. It is longer than the longest time between two of them.
pub(super) const PAUSED_AFTER: Duration = Duration::from_secs(8);

#[derive(Debug)]
pub(super) struct WorkerClock {
    elapsed: Duration,
    /// The moment that `elapsed` corresponds to: the send time of the last witness, or the start of the session.
    /// `None` while not subscribed.
    reference: Option<Instant>,
    /// Messages were dropped since the last witness, so events of live workers may be missing.
    has_gap: bool,
    last_iteration: Instant,
    /// Paused time is counted up to here.
    counted_until: Instant,
    /// Paused time that is not counted yet: that of dropped messages, and that in which the process was stopped.
    uncounted: Duration,
}

impl WorkerClock {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            elapsed: Duration::ZERO,
            reference: None,
            has_gap: false,
            last_iteration: now,
            counted_until: now,
            uncounted: Duration::ZERO,
        }
    }

    /// The time up to which every worker's events have been applied.
    pub(super) fn elapsed(&self) -> Duration {
        self.elapsed
    }

    /// The clock's time at a moment after the last witness, if the clock is not paused now.
    pub(super) fn time_at(&self, at: Instant) -> Duration {
        self.reference.map_or(self.elapsed, |reference| self.elapsed + at.saturating_duration_since(reference))
    }

    /// Continues with a new session. The time without a subscription does not count.
    pub(super) fn start(&mut self, now: Instant) {
        self.uncounted += now.saturating_duration_since(self.counted_until);
        self.counted_until = self.counted_until.max(now);
        (self.reference, self.has_gap) = (Some(now), false);
    }

    /// Ends a session. The time since its last witness does not count.
    pub(super) fn stop(&mut self, now: Instant) {
        if let Some(reference) = self.reference.take() {
            let not_overdue_until = now.min(reference + PAUSED_AFTER);
            self.uncounted += not_overdue_until.saturating_duration_since(self.counted_until.max(reference));
            self.counted_until = self.counted_until.max(not_overdue_until);
        }
    }

    /// Records that messages were dropped. The time from the last witness to the next one does not count.
    pub(super) fn record_gap(&mut self) {
        self.has_gap = true;
    }

    /// Advances to the send time of a witness that has come back.
    pub(super) fn advance(&mut self, sent: Instant) {
        if let Some(reference) = &mut self.reference {
            if std::mem::take(&mut self.has_gap) {
                self.uncounted += sent.saturating_duration_since(self.counted_until.max(*reference));
            } else {
                self.elapsed += sent.saturating_duration_since(*reference);
            }
            *reference = sent.max(*reference);
        }
    }

    /// Takes note of an iteration of the loop. The time in which the process was stopped does not count.
    pub(super) fn iterate(&mut self, now: Instant) {
        let iteration = now.saturating_duration_since(self.last_iteration);
        self.last_iteration = now;
        if let Some(reference) = self.reference.as_mut().filter(|_| iteration > MAX_ITERATION) {
            let stopped = iteration.saturating_sub(TICK);
            *reference = now.min(*reference + stopped);
            self.uncounted += stopped;
        }
    }

    /// The paused time since the last call.
    pub(super) fn take_paused(&mut self, now: Instant) -> Duration {
        let paused_at = self.reference.map_or(self.counted_until, |reference| reference + PAUSED_AFTER);
        let from = paused_at.max(self.counted_until);
        // While the witness is not overdue, the time since the last one may still turn out to be paused.
        if now > from {
            self.counted_until = now;
        }
        now.saturating_duration_since(from) + std::mem::take(&mut self.uncounted)
    }

    /// Whether the session's last witness is overdue.
    pub(super) fn is_overdue(&self, now: Instant) -> bool {
        self.reference.is_some_and(|reference| now.saturating_duration_since(reference) > PAUSED_AFTER)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// A clock in a session that began at the returned moment.
    fn started() -> (WorkerClock, Instant) {
        let start = Instant::now();
        let mut clock = WorkerClock::new(start);
        clock.start(start);
        (clock, start)
    }

    #[test]
    fn the_clock_advances_to_the_send_time_of_each_witness() {
        let (mut clock, start) = started();
        assert_eq!(clock.time_at(start + SECOND * 9), SECOND * 9);
        assert_eq!(clock.elapsed(), Duration::ZERO, "no witness has come back");
        clock.advance(start + SECOND * 2);
        assert_eq!((clock.elapsed(), clock.time_at(start + SECOND * 3)), (SECOND * 2, SECOND * 3));
        clock.advance(start + SECOND);
        assert_eq!(clock.elapsed(), SECOND * 2, "witnesses out of order");
    }

    #[test]
    fn the_time_without_a_subscription_does_not_count() {
        let (mut clock, start) = started();
        clock.advance(start + SECOND);
        clock.stop(start + SECOND * 2);
        clock.advance(start + SECOND * 50);
        assert_eq!(clock.time_at(start + SECOND * 50), SECOND);
        clock.start(start + SECOND * 60);
        clock.advance(start + SECOND * 61);
        assert_eq!(clock.elapsed(), SECOND * 2);
    }

    #[test]
    fn the_time_in_which_messages_were_dropped_does_not_count() {
        let (mut clock, start) = started();
        clock.record_gap();
        clock.advance(start + SECOND * 60);
        assert_eq!(clock.elapsed(), Duration::ZERO);
        clock.advance(start + SECOND * 61);
        assert_eq!(clock.elapsed(), SECOND);
        assert_eq!(clock.take_paused(start + SECOND * 61), SECOND * 60);
    }

    #[test]
    fn the_time_in_which_the_process_was_stopped_does_not_count() {
        let (mut clock, start) = started();
        clock.iterate(start + TICK);
        clock.iterate(start + TICK + SECOND * 100);
        clock.advance(start + TICK + SECOND * 100);
        assert_eq!(clock.elapsed(), TICK * 2);
        clock.advance(start + TICK + SECOND * 101);
        assert_eq!(clock.elapsed(), TICK * 2 + SECOND);
        assert_eq!(clock.take_paused(start + TICK + SECOND * 101), Duration::from_millis(98_500));
    }

    #[test]
    fn paused_time_is_counted_once() {
        let (mut clock, start) = started();
        let paused_at = start + PAUSED_AFTER;
        assert_eq!(clock.take_paused(paused_at), Duration::ZERO);
        assert!(!clock.is_overdue(paused_at));
        assert_eq!(clock.take_paused(paused_at + SECOND), SECOND);
        assert_eq!(clock.take_paused(paused_at + SECOND * 3), SECOND * 2);
        assert!(clock.is_overdue(paused_at + SECOND * 3));
        clock.advance(paused_at + SECOND * 3);
        assert_eq!(clock.take_paused(paused_at + SECOND * 4), Duration::ZERO);
        clock.stop(paused_at + SECOND * 5);
        assert_eq!(clock.take_paused(paused_at + SECOND * 7), SECOND * 4, "since the last witness");
        clock.start(paused_at + SECOND * 8);
        assert_eq!(clock.take_paused(paused_at + SECOND * 9), SECOND, "until the next subscription");
    }

    #[test]
    fn the_end_of_a_session_without_a_witness_is_counted() {
        let (mut clock, start) = started();
        for session in 0..10 {
            let start = start + SECOND * 5 * session;
            clock.start(start);
            clock.advance(start + SECOND);
            let while_subscribed: Duration = (1..=4).map(|second| clock.take_paused(start + SECOND * second)).sum();
            clock.stop(start + SECOND * 4);
            let paused = while_subscribed + clock.take_paused(start + SECOND * 5);
            assert_eq!(paused, SECOND * 4, "all but the second until the witness");
        }
        assert_eq!(clock.elapsed(), SECOND * 10);
    }
}
