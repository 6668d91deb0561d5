//! The count of one event type of a label set, with the start timestamp of its series.

use serde::{Deserialize, Serialize};

/// The event type id is in the highest byte, so that the start timestamp takes no additional memory.
const ID_SHIFT: u32 = 56;
const CREATED_MASK: u64 = (1 << ID_SHIFT) - 1;

/// Saved as event type id, start timestamp and count.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "(u8, u64, u64)", into = "(u8, u64, u64)")]
pub(super) struct EventCount {
    tag: u64,
    pub(super) count: u64,
}

impl EventCount {
    /// A series that starts at `created`, in milliseconds since the epoch.
    pub(super) fn new(id: u8, created: u64, count: u64) -> Self {
        Self { tag: u64::from(id) << ID_SHIFT | (created & CREATED_MASK), count }
    }

    #[inline]
    pub(super) fn id(self) -> u8 {
        (self.tag >> ID_SHIFT) as u8
    }

    /// In milliseconds since the epoch.
    pub(super) fn created(self) -> u64 {
        self.tag & CREATED_MASK
    }

    pub(super) fn set_created(&mut self, created: u64) {
        *self = Self::new(self.id(), created, self.count);
    }
}

impl From<(u8, u64, u64)> for EventCount {
    fn from((id, created, count): (u8, u64, u64)) -> Self {
        Self::new(id, created, count)
    }
}

impl From<EventCount> for (u8, u64, u64) {
    fn from(event: EventCount) -> Self {
        (event.id(), event.created(), event.count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn id_start_and_count_are_independent() {
        for (id, created, count) in [(0, 0, 1), (65, 1_764_000_000_123, u64::MAX), (255, CREATED_MASK, 0)] {
            let mut event = EventCount::new(id, created, count);
            assert_eq!((event.id(), event.created(), event.count), (id, created, count));
            event.set_created(7);
            assert_eq!(<(u8, u64, u64)>::from(event), (id, 7, count));
        }
        assert_eq!(size_of::<EventCount>(), 16);
    }
}
