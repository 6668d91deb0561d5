//! Messages that arrive under two names with `sentinel_fanout_compat`, and must be processed once.

use std::collections::{HashSet, VecDeque};
use std::hash::{BuildHasher, RandomState};

use crate::celery::envelope;

/// As many messages as kombu remembers.
const DEDUP_WINDOW_LEN: usize = 1000;

/// The delivery tags of the last messages.
#[derive(Default)]
pub(super) struct DedupWindow {
    order: VecDeque<u64>,
    hashes: HashSet<u64>,
    hasher: RandomState,
}

impl DedupWindow {
    /// Whether the message is not in the window. A message without a tag is always new.
    pub(super) fn is_new(&mut self, payload: &[u8]) -> bool {
        let Some(tag) = envelope::delivery_tag(payload) else { return true };
        let hash = self.hasher.hash_one(tag);
        if !self.hashes.insert(hash) {
            return false;
        }
        self.order.push_back(hash);
        if self.order.len() > DEDUP_WINDOW_LEN
            && let Some(oldest) = self.order.pop_front()
        {
            self.hashes.remove(&oldest);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_within_the_window_is_processed_once() {
        let mut window = DedupWindow::default();
        let message = |tag: usize| format!(r#"{{"body": "", "properties": {{"delivery_tag": "{tag}"}}}}"#).into_bytes();
        assert!((0..=DEDUP_WINDOW_LEN).all(|tag| window.is_new(&message(tag))));
        assert!((1..=DEDUP_WINDOW_LEN).all(|tag| !window.is_new(&message(tag))));
        assert!(window.is_new(&message(0)), "outside of the window by now");
        for untagged in [&b"{}"[..], b"[]", b"no JSON", br#"{"properties": null}"#, br#"{"properties": {}}"#] {
            assert!(window.is_new(untagged) && window.is_new(untagged));
        }
    }
}
