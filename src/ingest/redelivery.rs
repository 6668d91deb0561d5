//! Messages whose acknowledgment may not have reached the broker: it delivers them again after a disconnect.

use std::collections::{HashMap, VecDeque};

use xxhash_rust::xxh3::xxh3_64;

use crate::config::Config;
use crate::inbox::{Encoding, Message};

/// How many messages are remembered: none without a named queue, because any other queue ends with its connection.
#[must_use]
pub fn redelivery_window(config: &Config) -> usize {
    let amqp = &config.broker.amqp;
    if amqp.queue.is_some() { 2 * usize::from(amqp.effective_prefetch_count()) } else { 0 }
}

/// Hashes of the last messages of a named queue. At most one prefetch window is unacknowledged, and acknowledgments may
/// be under way, so every message that can be redelivered is among the last two windows.
#[derive(Debug, Default)]
pub(super) struct RedeliveryFilter {
    capacity: usize,
    order: VecDeque<u64>,
    /// How many of the newest hashes are not saved. `None` without a store.
    unsaved: Option<usize>,
    counts: HashMap<u64, u32, foldhash::fast::RandomState>,
}

impl RedeliveryFilter {
    pub(super) fn new(config: &Config) -> Self {
        Self { capacity: redelivery_window(config), ..Self::default() }
    }

    /// Starts with the saved hashes, oldest first, and tracks from now on which are not saved.
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

    /// The message's hash, and whether it was processed before. If not, it is remembered. `None` without a named queue.
    pub(super) fn check(&mut self, message: &Message) -> Option<(u64, bool)> {
        // Redis, whose messages have an envelope, delivers none again.
        if self.capacity == 0 || message.encoding == Encoding::KombuEnvelope {
            return None;
        }
        // XXH3 is specified, so a saved hash keeps its meaning across versions and machines.
        let hash = xxh3_64(&message.bytes);
        if message.redelivered && self.counts.contains_key(&hash) {
            return Some((hash, true));
        }
        self.remember(hash);
        if let Some(unsaved) = &mut self.unsaved {
            *unsaved += 1;
        }
        Some((hash, false))
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

    fn filter(prefetch_count: u16) -> RedeliveryFilter {
        let mut config = Config::default();
        config.broker.amqp.queue = Some("q".to_owned());
        config.broker.amqp.prefetch_count = Some(prefetch_count);
        RedeliveryFilter::new(&config)
    }

    fn message(body: usize, redelivered: bool) -> Message {
        Message { bytes: body.to_string().into(), encoding: Encoding::RawBody, redelivered }
    }

    fn is_duplicate(filter: &mut RedeliveryFilter, message: &Message) -> bool {
        filter.check(message).is_some_and(|(_, is_duplicate)| is_duplicate)
    }

    #[test]
    fn only_a_redelivered_message_that_was_processed_is_a_duplicate() {
        let mut filter = filter(10);
        assert!(!is_duplicate(&mut filter, &message(1, false)));
        assert!(!is_duplicate(&mut filter, &message(1, false)), "a second message with the same body");
        assert!(is_duplicate(&mut filter, &message(1, true)));
        assert!(is_duplicate(&mut filter, &message(1, true)), "redelivered twice");
        assert!(!is_duplicate(&mut filter, &message(2, true)), "delivered before, but not processed");
    }

    #[test]
    fn memory_is_bounded_by_two_prefetch_windows() {
        let mut filter = filter(10);
        for body in 0..1000 {
            assert!(!is_duplicate(&mut filter, &message(body, false)));
        }
        assert_eq!((filter.order.len(), filter.counts.len()), (20, 20));
        assert!(is_duplicate(&mut filter, &message(980, true)));
        assert!(!is_duplicate(&mut filter, &message(979, true)));
    }

    #[test]
    fn nothing_is_remembered_without_a_named_queue() {
        let mut unnamed = RedeliveryFilter::new(&Config::default());
        assert!(!is_duplicate(&mut unnamed, &message(1, false)));
        assert!(!is_duplicate(&mut unnamed, &message(1, true)));
        let mut redis = filter(10);
        assert_eq!(redis.check(&Message { encoding: Encoding::KombuEnvelope, ..message(1, false) }), None);
        assert!(redis.order.is_empty());
    }

    #[test]
    fn saved_hashes_are_those_of_the_specification() {
        // The reference implementation's XXH3_64bits of these bytes: a saved file depends on them.
        assert_eq!(xxh3_64(b""), 0x2d06_8005_38d3_94c2);
        assert_eq!(xxh3_64(b"a"), 0xe6c6_32b6_1e96_4e1f);
    }
}
