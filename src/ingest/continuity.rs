//! Whether a named queue still holds what it held when the exporter left it.
//!
//! The newest message whose effect is saved is not acknowledged, so it is still in the queue, and the broker delivers it
//! again before everything newer. If a newer message or a witness comes first, messages were lost: by the queue's limit
//! or TTL, by a purge or a restart of the broker, or to another consumer.

use crate::inbox::NamedQueue;
use crate::observability::GapCause;
use crate::store::QueuePosition;

#[derive(Debug, Default)]
pub(super) struct Continuity {
    /// The newest message that was processed.
    position: Option<QueuePosition>,
    search: Option<Search>,
    /// A gap was found since the last witness, so that the same loss is not reported twice.
    has_gap: bool,
}

/// The search for the newest message that was processed before, at the beginning of a session.
#[derive(Debug)]
struct Search {
    any_delivered: bool,
}

impl Continuity {
    pub(super) fn new(position: Option<QueuePosition>) -> Self {
        Self { position, ..Self::default() }
    }

    pub(super) fn position(&self) -> Option<&QueuePosition> {
        self.position.as_ref()
    }

    /// Begins a session on a named queue. Returns the gap that is known before the first delivery. `has_state` is
    /// whether anything was counted before.
    pub(super) fn start(&mut self, queue: &NamedQueue, has_state: bool) -> Option<GapCause> {
        (self.search, self.has_gap) = (None, false);
        let position = self.position.take_if(|position| position.queue == queue.name && position.message.is_some());
        let cause = match &position {
            Some(_) if queue.existed => None,
            Some(_) => Some(GapCause::QueueRecreated),
            None => has_state.then_some(GapCause::ContinuityUnknown),
        };
        self.position = match position.filter(|_| cause.is_none()) {
            Some(position) => {
                self.search = Some(Search { any_delivered: false });
                Some(position)
            }
            None => Some(QueuePosition { queue: queue.name.clone(), message: None }),
        };
        cause
    }

    /// Begins a session on a queue or channel that keeps nothing between two sessions.
    pub(super) fn start_without_queue(&mut self) {
        *self = Self::default();
    }

    /// Takes note of a delivery before its effect is applied. Returns the gap before it.
    pub(super) fn record_delivery(&mut self, hash: u64, is_duplicate: bool) -> Option<GapCause> {
        let position = self.position.as_mut()?;
        let Some(search) = &mut self.search else {
            position.message = Some(hash);
            return None;
        };
        search.any_delivered = true;
        if position.message == Some(hash) {
            self.search = None;
        } else if !is_duplicate {
            position.message = Some(hash);
            (self.search, self.has_gap) = (None, true);
            return Some(GapCause::QueueOverflow);
        }
        None
    }

    /// Takes note of a witness of this session. `was_preceded_by_gap` is whether the broker dropped messages since the
    /// one before. Returns the gap.
    pub(super) fn record_witness(&mut self, was_preceded_by_gap: bool) -> Option<GapCause> {
        let was_reported = std::mem::take(&mut self.has_gap);
        match self.search.take() {
            Some(Search { any_delivered: false }) => Some(GapCause::QueueRecreated),
            Some(Search { any_delivered: true }) => Some(GapCause::QueueOverflow),
            None => (was_preceded_by_gap && !was_reported).then_some(GapCause::QueueOverflow),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn queue(name: &str, existed: bool) -> NamedQueue {
        NamedQueue { name: name.into(), existed, heartbeat: Duration::from_secs(10) }
    }

    /// Message 5 of queue `q` was the newest one.
    fn continuity() -> Continuity {
        Continuity::new(Some(QueuePosition { queue: "q".into(), message: Some(5) }))
    }

    #[test]
    fn the_newest_message_comes_again_after_older_ones_if_nothing_was_lost() {
        let mut continuity = continuity();
        assert_eq!(continuity.start(&queue("q", true), true), None);
        assert_eq!(continuity.record_delivery(4, true), None);
        assert_eq!(continuity.position().unwrap().message, Some(5));
        assert_eq!(continuity.record_delivery(5, true), None);
        assert_eq!(continuity.record_delivery(6, false), None);
        assert_eq!(continuity.position().unwrap().message, Some(6));
        assert_eq!(continuity.record_witness(false), None);
    }

    #[test]
    fn a_newer_message_first_is_one_gap_before_it() {
        let mut continuity = continuity();
        continuity.start(&queue("q", true), true);
        assert_eq!(continuity.record_delivery(7, false), Some(GapCause::QueueOverflow));
        assert_eq!(continuity.record_delivery(8, false), None);
        assert_eq!(continuity.record_witness(true), None, "reported already");
        assert_eq!(continuity.record_witness(true), Some(GapCause::QueueOverflow), "dropped while connected");
    }

    #[test]
    fn a_witness_first_is_a_gap() {
        for (delivered, expected) in [(None, GapCause::QueueRecreated), (Some(4), GapCause::QueueOverflow)] {
            let mut continuity = continuity();
            continuity.start(&queue("q", true), true);
            delivered.map(|hash| continuity.record_delivery(hash, true));
            assert_eq!(continuity.record_witness(true), Some(expected));
        }
    }

    #[test]
    fn an_unknown_position_is_a_gap_unless_nothing_was_counted() {
        assert_eq!(continuity().start(&queue("q", false), true), Some(GapCause::QueueRecreated));
        assert_eq!(continuity().start(&queue("other", true), true), Some(GapCause::ContinuityUnknown));
        let mut new = Continuity::default();
        assert_eq!(new.start(&queue("q", true), false), None);
        assert_eq!(new.record_delivery(1, false), None);
        assert_eq!(new.position().unwrap().message, Some(1));
        assert_eq!(new.start(&queue("q", true), true), None, "the position is known now");
    }

    #[test]
    fn an_interrupted_search_continues_in_the_next_session() {
        let mut continuity = continuity();
        continuity.start(&queue("q", true), true);
        continuity.record_delivery(4, true);
        assert_eq!(continuity.start(&queue("q", true), true), None);
        assert_eq!(continuity.record_delivery(5, true), None);
        assert_eq!(continuity.record_witness(false), None);
    }
}
