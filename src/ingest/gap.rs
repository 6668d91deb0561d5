//! Gaps in the stream of events, and an estimate of what they contained.

use std::time::{Duration, Instant, SystemTime};

use crate::observability::{GapCause, LossSummary};

/// The time constant of the mean rate.
const WINDOW: Duration = Duration::from_secs(60);

/// The recent mean rate of events.
#[derive(Debug)]
pub(super) struct EventRate {
    per_second: Option<f64>,
    events: u64,
    since: Instant,
}

impl EventRate {
    pub(super) fn new(now: Instant) -> Self {
        Self { per_second: None, events: 0, since: now }
    }

    pub(super) fn record(&mut self, events: u64) {
        self.events += events;
    }

    /// Takes the events since the last call into the mean.
    pub(super) fn update(&mut self, now: Instant) {
        let seconds = now.saturating_duration_since(self.since).as_secs_f64();
        if seconds < 1.0 {
            return;
        }
        let rate = self.events as f64 / seconds;
        let weight = 1.0 - (-seconds / WINDOW.as_secs_f64()).exp();
        self.per_second = Some(self.per_second.map_or(rate, |mean| mean + (rate - mean) * weight));
        (self.events, self.since) = (0, now);
    }

    /// Leaves out the time since the last call, because there was no subscription.
    pub(super) fn skip(&mut self, now: Instant) {
        (self.events, self.since) = (0, now);
    }
}

/// Events that are or may be missing.
#[derive(Clone, Copy, Debug)]
pub(super) struct Gap {
    pub(super) cause: GapCause,
    /// The time without a subscription.
    pub(super) unsubscribed: Option<Duration>,
    /// The number of messages, if it is known.
    pub(super) messages: usize,
    pub(super) approximate_events: Option<u64>,
}

impl Gap {
    pub(super) fn new(cause: GapCause) -> Self {
        Self { cause, unsubscribed: None, messages: 0, approximate_events: None }
    }

    /// The same with the number of events, as far as the rate before it allows an estimate.
    pub(super) fn with_estimate(self, rate: &EventRate) -> Self {
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "neither is negative")]
        let by_rate = |unsubscribed: Duration| Some((unsubscribed.as_secs_f64() * rate.per_second?).round() as u64);
        let known = (self.messages > 0).then_some(self.messages as u64);
        Self { approximate_events: known.or_else(|| self.unsubscribed.and_then(by_rate)), ..self }
    }

    /// Messages that do not fit into the buffer are logged with their number by the session.
    pub(super) fn log(&self) {
        let Self { cause, unsubscribed, approximate_events, .. } = self;
        let (cause, seconds) = (cause.as_str(), unsubscribed.map(|time| time.as_secs_f64()));
        match self.cause {
            GapCause::BufferFull => {}
            GapCause::Disconnected | GapCause::RedisOutputLimit | GapCause::Restart => {
                tracing::warn!(cause, seconds, approximate_events, "events were missed while disconnected");
            }
            GapCause::ContinuityUnknown => {
                tracing::warn!(
                    cause,
                    seconds,
                    "events may have been missed: the last position in the queue is unknown"
                );
            }
            GapCause::QueueOverflow | GapCause::QueueRecreated => {
                tracing::warn!(cause, seconds, "events were missed: the queue lost messages");
            }
        }
    }

    pub(super) fn summary(&self) -> LossSummary {
        LossSummary {
            cause: self.cause,
            count: 1,
            last: SystemTime::now(),
            seconds: self.unsubscribed.unwrap_or_default().as_secs_f64(),
            events: self.approximate_events.unwrap_or_default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn the_number_of_missed_events_follows_from_the_rate_before() {
        let start = Instant::now();
        let mut rate = EventRate::new(start);
        let gap = Gap { unsubscribed: Some(SECOND * 10), ..Gap::new(GapCause::Disconnected) };
        assert_eq!(gap.with_estimate(&rate).approximate_events, None);
        for second in 1..=10 {
            rate.record(100);
            rate.update(start + SECOND * second);
        }
        rate.skip(start + SECOND * 1000);
        assert_eq!(gap.with_estimate(&rate).approximate_events, Some(1000));
        assert_eq!(Gap::new(GapCause::Disconnected).with_estimate(&rate).approximate_events, None);
        let dropped = Gap { messages: 7, ..Gap::new(GapCause::BufferFull) };
        assert_eq!(dropped.with_estimate(&rate).approximate_events, Some(7));
    }

    #[test]
    fn the_rate_follows_a_change_within_minutes() {
        let start = Instant::now();
        let mut rate = EventRate::new(start);
        for second in 1..=400 {
            rate.record(if second <= 100 { 1000 } else { 10 });
            rate.update(start + SECOND * second);
        }
        assert!(rate.per_second.is_some_and(|rate| (10.0..20.0).contains(&rate)), "{rate:?}");
    }
}
