//! The losses of the last 15 minutes, by cause. Memory is bounded: they are summed per minute.

use std::collections::VecDeque;
use std::time::{Duration, Instant, SystemTime};

use super::GapCause;

/// How long a loss is kept.
const KEPT: Duration = Duration::from_secs(15 * 60);
const SLOT: Duration = Duration::from_secs(60);

/// The losses with one cause.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct LossSummary {
    pub(crate) cause: GapCause,
    pub(crate) count: u64,
    /// When the last one was found.
    pub(crate) last: SystemTime,
    /// The time without a subscription.
    pub(crate) seconds: f64,
    /// The approximate number of events, as far as it is known.
    pub(crate) events: u64,
}

impl LossSummary {
    fn add(&mut self, other: &Self) {
        self.count += other.count;
        self.last = self.last.max(other.last);
        self.seconds += other.seconds;
        self.events += other.events;
    }
}

#[derive(Debug, Default)]
pub(super) struct Losses {
    /// The beginning of each slot and a sum, oldest first. A slot has at most one sum per cause.
    slots: VecDeque<(Instant, LossSummary)>,
}

impl Losses {
    pub(super) fn record(&mut self, now: Instant, loss: &LossSummary) {
        self.forget_old(now);
        let is_same = |(at, sum): &&mut (Instant, LossSummary)| {
            sum.cause == loss.cause && now.saturating_duration_since(*at) < SLOT
        };
        match self.slots.iter_mut().rev().find(is_same) {
            Some((_, sum)) => sum.add(loss),
            None => self.slots.push_back((now, loss.clone())),
        }
    }

    /// One sum for each cause, in the order of the first loss.
    pub(super) fn summaries(&mut self, now: Instant) -> Vec<LossSummary> {
        self.forget_old(now);
        let mut summaries: Vec<LossSummary> = Vec::new();
        for (_, sum) in &self.slots {
            match summaries.iter_mut().find(|summary| summary.cause == sum.cause) {
                Some(summary) => summary.add(sum),
                None => summaries.push(sum.clone()),
            }
        }
        summaries
    }

    fn forget_old(&mut self, now: Instant) {
        while self.slots.front().is_some_and(|(at, _)| now.saturating_duration_since(*at) > KEPT) {
            self.slots.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn loss(cause: GapCause, seconds: f64) -> LossSummary {
        LossSummary { cause, count: 1, last: SystemTime::UNIX_EPOCH, seconds, events: 10 }
    }

    #[test]
    fn losses_are_summed_by_cause_and_kept_for_15_minutes() {
        let (mut losses, start) = (Losses::default(), Instant::now());
        losses.record(start, &loss(GapCause::BufferFull, 0.0));
        losses.record(start + SLOT * 2, &loss(GapCause::Disconnected, 1.5));
        losses.record(start + SLOT * 5, &loss(GapCause::Disconnected, 2.0));
        let [buffer_full, disconnected] = &losses.summaries(start + KEPT)[..] else { panic!("{losses:?}") };
        assert_eq!((buffer_full.count, disconnected.count), (1, 2));
        assert_eq!((disconnected.seconds, disconnected.events), (3.5, 20));
        let left = losses.summaries(start + KEPT + SLOT * 3);
        assert_eq!(left.iter().map(|sum| (sum.cause, sum.count)).collect::<Vec<_>>(), [(GapCause::Disconnected, 1)]);
        assert!(losses.summaries(start + KEPT * 2).is_empty());
    }

    #[test]
    fn memory_is_bounded() {
        let (mut losses, start) = (Losses::default(), Instant::now());
        for number in 0..100_000 {
            losses.record(start + SLOT / 1000 * number, &loss(GapCause::BufferFull, 0.0));
        }
        assert!(losses.slots.len() <= 20);
    }
}
