//! The keys of workers and label sets in the table of series.

use std::num::NonZeroU32;

/// Identifies a worker's series. Valid until the worker is removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct WorkerKey(pub(super) u32);

impl WorkerKey {
    /// The key in saved records.
    #[must_use]
    pub fn to_u32(self) -> u32 {
        self.0
    }
}

/// Identifies the series of a (worker, task) label set. Valid until the worker is removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SeriesKey(NonZeroU32);

impl SeriesKey {
    /// The key of a slab index. It stores the index plus one, so that an `Option` of a key, of which every task has
    /// two, takes no more space.
    pub(super) fn from_index(index: usize) -> Self {
        Self(NonZeroU32::MIN.saturating_add(to_u32(index)))
    }

    pub(super) fn index(self) -> usize {
        self.to_u32() as usize
    }

    /// The key of its saved record.
    #[must_use]
    pub fn to_u32(self) -> u32 {
        self.0.get() - 1
    }
}

/// An interned task name with its text.
#[derive(Clone, Copy, Debug)]
pub struct TaskName<'a> {
    /// Identifies the text while at least one label set retains the name.
    pub id: u32,
    /// The text, not escaped.
    pub text: &'a str,
}

#[allow(clippy::cast_possible_truncation, reason = "series, events and label texts are bounded far below 2^32")]
pub(super) fn to_u32(index: usize) -> u32 {
    index as u32
}
