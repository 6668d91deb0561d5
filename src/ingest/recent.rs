//! The messages whose acknowledgement may not have reached the broker: it hands them out again after a cut.

use std::collections::VecDeque;
use std::hash::BuildHasher;

use foldhash::quality::FixedState;
use hashbrown::HashMap;

use crate::broker::Message;
use crate::settings::Settings;

/// How many messages are remembered: none unless the queue has a name, since any other goes with its connection.
#[must_use]
pub fn recent_messages(settings: &Settings) -> usize {
    let amqp = &settings.broker.amqp;
    if amqp.queue.is_some() { 2 * usize::from(amqp.effective_prefetch()) } else { 0 }
}

/// Hashes of the last bodies taken from a named queue. The broker has no more than a prefetch window out, so with
/// acknowledgements under way what it can hand out again is among the last two windows.
#[derive(Debug, Default)]
pub(super) struct Recent {
    capacity: usize,
    order: VecDeque<u64>,
    /// How many of the newest are not saved; none are kept count of unless there is a store.
    unsaved: Option<usize>,
    counts: HashMap<u64, u32, FixedState>,
}

impl Recent {
    pub(super) fn new(settings: &Settings) -> Self {
        Self { capacity: recent_messages(settings), ..Self::default() }
    }

    /// Takes over the hashes that were saved, the oldest first, and remembers from now on which are not.
    pub(super) fn restore(&mut self, hashes: Vec<u64>) {
        if self.capacity > 0 {
            // The window may have been larger when they were saved.
            self.capacity = self.capacity.max(hashes.len());
        }
        for hash in hashes {
            self.remember(hash);
        }
        self.unsaved = Some(0);
    }

    /// The hashes that are not saved yet, or `all`.
    pub(super) fn take_unsaved(&mut self, all: bool) -> Vec<u64> {
        let count = if all { self.order.len() } else { self.unsaved.unwrap_or(0).min(self.order.len()) };
        self.unsaved = self.unsaved.map(|_| 0);
        self.order.range(self.order.len() - count..).copied().collect()
    }

    /// Whether the message has been taken before. If not, it is remembered.
    pub(super) fn is_again(&mut self, message: &Message) -> bool {
        if self.capacity == 0 {
            return false;
        }
        let hash = self.counts.hasher().hash_one(&*message.bytes);
        if message.redelivered && self.counts.contains_key(&hash) {
            return true;
        }
        self.remember(hash);
        if let Some(unsaved) = &mut self.unsaved {
            *unsaved += 1;
        }
        false
    }

    fn remember(&mut self, hash: u64) {
        if self.capacity == 0 {
            return;
        }
        *self.counts.entry(hash).or_insert(0) += 1;
        self.order.push_back(hash);
        if self.order.len() > self.capacity
            && let Some(oldest) = self.order.pop_front()
            && let Some(count) = self.counts.get_mut(&oldest)
        {
            *count -= 1;
            if *count == 0 {
                self.counts.remove(&oldest);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::broker::Wire;

    fn recent(prefetch: u16) -> Recent {
        let mut settings = Settings::default();
        settings.broker.amqp.queue = Some("q".to_owned());
        settings.broker.amqp.prefetch = Some(prefetch);
        Recent::new(&settings)
    }

    fn message(body: usize, redelivered: bool) -> Message {
        Message { bytes: body.to_string().into(), wire: Wire::Body, redelivered }
    }

    #[test]
    fn only_what_is_redelivered_and_known_is_taken_for_known() {
        let mut recent = recent(10);
        assert!(!recent.is_again(&message(1, false)));
        assert!(!recent.is_again(&message(1, false)), "a second message that is equal");
        assert!(recent.is_again(&message(1, true)));
        assert!(recent.is_again(&message(1, true)), "redelivered twice");
        assert!(!recent.is_again(&message(2, true)), "delivered before, but never taken");
    }

    #[test]
    fn it_is_bounded() {
        let mut recent = recent(10);
        for body in 0..1000 {
            assert!(!recent.is_again(&message(body, false)));
        }
        assert_eq!((recent.order.len(), recent.counts.len()), (20, 20));
        assert!(recent.is_again(&message(980, true)));
        assert!(!recent.is_again(&message(979, true)));
    }

    #[test]
    fn a_queue_without_a_name_needs_no_memory() {
        let mut recent = Recent::new(&Settings::default());
        assert!(!recent.is_again(&message(1, false)));
        assert!(!recent.is_again(&message(1, true)));
    }
}
