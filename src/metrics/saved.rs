//! The series as they are saved and restored: one record a (worker, task) pair.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};

use super::histogram::Histogram;
use super::label::OTHER;
use super::series::{MAX_TYPES, PairId, Series, WorkerRow, small};
use crate::celery::cut;

/// One pair's numbers.
#[derive(Debug, Serialize, Deserialize)]
pub struct SavedPair<'a> {
    /// The row of its worker.
    pub worker: u32,
    /// The task's name; none for task `(other)`.
    #[serde(borrow)]
    pub task: Option<Cow<'a, str>>,
    /// Type id, count.
    events: Cow<'a, [(u8, u64)]>,
    /// Counts by bucket, not cumulated, and the sum.
    runtime: Option<(Cow<'a, [u64]>, f64)>,
    prefetch_time: Option<f64>,
    prefetched: Option<u32>,
}

/// One worker's gauges.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct SavedGauges {
    online: Option<bool>,
    executing: Option<f64>,
}

impl WorkerRow {
    /// As it is saved.
    #[must_use]
    pub fn number(self) -> u32 {
        self.0
    }
}

impl Series {
    /// From now on, remembers which pairs changed.
    pub fn keep_marks(&mut self) {
        self.marks.start();
    }

    /// Marks all pairs as changed.
    pub fn mark_all(&mut self) {
        let Self { pairs, marks, .. } = self;
        pairs.iter().for_each(|(pair, _)| marks.mark(small(pair)));
    }

    /// Whether any pair changed since the last [`Series::take_marks`].
    #[must_use]
    pub fn has_marks(&self) -> bool {
        !self.marks.is_empty()
    }

    /// The numbers of the pairs that changed or are gone.
    pub fn take_marks(&mut self) -> Vec<u32> {
        self.marks.take()
    }

    /// A pair as it is saved; none if it is gone. `name` gives a task's name by its id.
    pub fn save_pair<'a>(&'a self, number: u32, name: impl Fn(u32) -> &'a str) -> Option<SavedPair<'a>> {
        let pair = self.pairs.get(number as usize)?;
        Some(SavedPair {
            worker: pair.worker.0,
            task: pair.task.map(|id| Cow::Borrowed(name(id))),
            events: Cow::Borrowed(&pair.events),
            runtime: pair.runtime.as_deref().map(|histogram| (Cow::Borrowed(&*histogram.counts), histogram.sum)),
            prefetch_time: pair.prefetch_time,
            prefetched: pair.prefetched,
        })
    }

    /// A worker's gauges as they are saved.
    #[must_use]
    pub fn save_gauges(&self, row: WorkerRow) -> SavedGauges {
        let worker = &self.workers[row.0 as usize];
        SavedGauges { online: worker.online, executing: worker.executing }
    }

    /// The upper bounds of the histograms.
    #[must_use]
    pub fn bounds(&self) -> &[f64] {
        &self.bounds
    }

    /// The event types seen, in the order of their ids.
    #[must_use]
    pub fn types(&self) -> Vec<&str> {
        let mut types: Vec<_> = self.types.ids.iter().collect();
        types.sort_unstable_by_key(|(_, id)| **id);
        types.into_iter().map(|(name, _)| &**name).collect()
    }

    /// Takes over the event types, into an empty table. `None` if they cannot be from one.
    pub fn restore_types(&mut self, types: &[Cow<str>]) -> Option<()> {
        if types.len() > MAX_TYPES + 1 {
            return None;
        }
        for (place, name) in types.iter().enumerate() {
            let id = self.types.add(&cut(name));
            if usize::from(id) != place || self.types.ids.len() != place + 1 {
                return None;
            }
        }
        Some(())
    }

    /// Takes over a worker's gauges. `None` if they cannot be.
    pub fn restore_gauges(&mut self, row: WorkerRow, saved: SavedGauges) -> Option<()> {
        let worker = &mut self.workers[row.0 as usize];
        if saved.executing.is_some_and(|tasks| !is_gauge(tasks)) {
            return None;
        }
        (worker.online, worker.executing) = (saved.online, saved.executing);
        Some(())
    }

    /// Takes over a pair of the worker in `row`, whose task's name is known by `id`. The histogram is left out unless
    /// `same_bounds`. `None` if the pair is there already, or its numbers cannot be.
    pub fn restore_pair(
        &mut self,
        row: WorkerRow,
        id: Option<u32>,
        saved: SavedPair,
        same_bounds: bool,
    ) -> Option<PairId> {
        let types = self.types.labels.len();
        let histogram = saved.runtime.filter(|_| same_bounds);
        let mut seen = [false; MAX_TYPES + 1];
        let is_sane = saved
            .events
            .iter()
            .all(|(id, _)| usize::from(*id) < types && !std::mem::replace(&mut seen[usize::from(*id)], true))
            && saved.prefetch_time.is_none_or(is_gauge)
            && histogram.as_ref().is_none_or(|(counts, sum)| counts.len() == self.bounds.len() + 1 && is_gauge(*sum));
        if !is_sane {
            return None;
        }
        let pair = match (id, saved.task) {
            (Some(id), Some(text)) if text != OTHER && self.find_pair(row, id).is_none() => {
                let pair = self.make_pair(row, &cut(&text), Some(id));
                self.index.insert((row, id), pair);
                pair
            }
            (None, None) if self.workers[row.0 as usize].other.is_none() => self.make_pair(row, OTHER, None),
            _ => return None,
        };
        let restored = &mut self.pairs[pair.place()];
        restored.events = saved.events.into_owned();
        restored.runtime = histogram.map(|(counts, sum)| Box::new(Histogram { counts: counts.into(), sum }));
        restored.prefetch_time = saved.prefetch_time;
        restored.prefetched = saved.prefetched;
        Some(pair)
    }
}

/// Sums of finite numbers overflow to infinity.
fn is_gauge(value: f64) -> bool {
    value >= 0.0
}
