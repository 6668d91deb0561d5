//! The saved form of the series: one record per (worker, task) label set.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};
use smallvec::SmallVec;

use super::event_count::EventCount;
use super::histogram::Histogram;
use super::keys::{SeriesKey, WorkerKey, to_u32};
use super::label_escaping::OTHER;
use super::native::NativeBuckets;
use super::series::{MAX_EVENT_TYPES, SeriesTable};
use crate::celery::truncate_label;

/// The saved series of a label set.
#[derive(Debug, Serialize, Deserialize)]
pub struct SavedTaskSeries<'a> {
    /// The saved key of its worker.
    pub worker: u32,
    /// The task name; `None` for task `(other)`.
    #[serde(borrow)]
    pub task: Option<Cow<'a, str>>,
    events: Cow<'a, [EventCount]>,
    runtime: Option<SavedHistogram<'a>>,
    prefetch_time: Option<f64>,
    prefetched: Option<u32>,
    /// The saved key of the member of a group that set the prefetch time last.
    pub prefetch_time_writer: Option<u32>,
}

/// The saved runtime histogram of a label set.
#[derive(Debug, Serialize, Deserialize)]
struct SavedHistogram<'a> {
    /// Not cumulative.
    counts: Cow<'a, [u64]>,
    /// In seconds.
    sum: f64,
    /// The start timestamp in milliseconds since the epoch.
    created: u64,
    native: Option<Cow<'a, NativeBuckets>>,
}

/// The saved gauges of a worker.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct SavedGauges {
    online: Option<bool>,
    executing: Option<f64>,
}

impl SeriesTable {
    /// Starts to track which label sets change.
    pub fn track_changes(&mut self) {
        self.dirty.enable();
    }

    /// Marks all label sets as changed.
    pub fn mark_all_dirty(&mut self) {
        let Self { label_sets, dirty, .. } = self;
        label_sets.iter().for_each(|(index, _)| dirty.mark(to_u32(index)));
    }

    /// Whether any label set changed since the last [`SeriesTable::take_changes`].
    #[must_use]
    pub fn has_changes(&self) -> bool {
        !self.dirty.is_empty()
    }

    /// The saved keys of the label sets that changed or were removed.
    pub fn take_changes(&mut self) -> Vec<u32> {
        self.dirty.take()
    }

    /// The saved form of a label set, or `None` if it was removed. `name` returns a task name by its id.
    pub fn task_series_record<'a>(&'a self, key: u32, name: impl Fn(u32) -> &'a str) -> Option<SavedTaskSeries<'a>> {
        let series = self.label_sets.get(key as usize)?;
        Some(SavedTaskSeries {
            worker: series.worker.0,
            task: series.task.map(|id| Cow::Borrowed(name(id))),
            events: Cow::Borrowed(&series.events),
            runtime: series.runtime.as_ref().map(|histogram| SavedHistogram {
                counts: Cow::Borrowed(&histogram.counts),
                sum: histogram.sum,
                created: histogram.created,
                native: histogram.native.as_deref().map(Cow::Borrowed),
            }),
            prefetch_time: series.prefetch_time,
            prefetched: series.prefetched,
            prefetch_time_writer: self.groups.writer(SeriesKey::from_index(key as usize)).map(WorkerKey::to_u32),
        })
    }

    /// The saved form of a worker's gauges.
    #[must_use]
    pub fn gauges_record(&self, worker: WorkerKey) -> SavedGauges {
        let worker = &self.workers[worker.0 as usize];
        SavedGauges { online: worker.online, executing: worker.executing }
    }

    /// The upper bounds of the histograms in seconds.
    #[must_use]
    pub fn bounds(&self) -> &[f64] {
        &self.bounds
    }

    /// Whether histograms have native buckets.
    #[must_use]
    pub fn has_native_histograms(&self) -> bool {
        self.native_schema.is_some()
    }

    /// The event types seen, in the order of their ids.
    #[must_use]
    pub fn event_types(&self) -> Vec<&str> {
        let mut types: Vec<_> = self.event_types.ids.iter().collect();
        types.sort_unstable_by_key(|(_, id)| **id);
        types.into_iter().map(|(name, _)| &**name).collect()
    }

    /// The entries of `metrics.worker_groups`.
    #[must_use]
    pub fn worker_groups(&self) -> &[String] {
        self.groups.entries()
    }

    /// The keys of the groups.
    pub fn group_keys(&self) -> impl Iterator<Item = WorkerKey> {
        self.groups.keys().iter().copied()
    }

    /// Restores that `worker` set the prefetch time of its group last.
    pub fn restore_prefetch_time_writer(&mut self, key: SeriesKey, worker: WorkerKey) {
        self.groups.set_writer(worker, key);
    }

    /// Restores that `worker` has prefetched one of the tasks that a label set of its group contains.
    pub fn restore_prefetched(&mut self, key: SeriesKey, worker: WorkerKey) {
        if self.label_sets[key.index()].worker != worker {
            self.groups.add_prefetched(worker, key);
        }
    }

    /// Restores the event types into an empty table. Returns `None` if they are too many or not distinct.
    pub fn restore_event_types(&mut self, types: &[Cow<str>]) -> Option<()> {
        if types.len() > MAX_EVENT_TYPES + 1 {
            return None;
        }
        for (index, name) in types.iter().enumerate() {
            let id = self.event_types.add(&truncate_label(name));
            if usize::from(id) != index || self.event_types.ids.len() != index + 1 {
                return None;
            }
        }
        Some(())
    }

    /// Restores a worker's gauges. Returns `None` if a value is invalid.
    pub fn restore_gauges(&mut self, worker: WorkerKey, saved: SavedGauges) -> Option<()> {
        let worker = &mut self.workers[worker.0 as usize];
        if saved.executing.is_some_and(|tasks| !is_valid(tasks)) {
            return None;
        }
        (worker.online, worker.executing) = (saved.online, saved.executing);
        Some(())
    }

    /// Restores a label set of `worker`, whose task name has the id `task`. The histogram is left out unless
    /// `same_histograms`. Returns `None` if the label set is already present or a value is invalid.
    pub fn restore_task_series(
        &mut self,
        worker: WorkerKey,
        task: Option<u32>,
        saved: SavedTaskSeries,
        same_histograms: bool,
    ) -> Option<SeriesKey> {
        let types = self.event_types.labels.len();
        let histogram = match saved.runtime.filter(|_| same_histograms) {
            Some(histogram) => Some(self.restore_histogram(histogram)?),
            None => None,
        };
        let mut seen = [false; MAX_EVENT_TYPES + 1];
        let are_values_valid = saved
            .events
            .iter()
            .map(|event| usize::from(event.id()))
            .all(|id| id < types && !std::mem::replace(&mut seen[id], true))
            && saved.prefetch_time.is_none_or(is_valid);
        if !are_values_valid {
            return None;
        }
        let key = match (task, saved.task) {
            (Some(id), Some(text)) if text != OTHER && self.find_task_series(worker, id).is_none() => {
                let key = self.create_task_series(worker, &truncate_label(&text), Some(id));
                self.index.insert((worker, id), key);
                key
            }
            (None, None) if self.workers[worker.0 as usize].other.is_none() => {
                self.create_task_series(worker, OTHER, None)
            }
            _ => return None,
        };
        let series = &mut self.label_sets[key.index()];
        series.events = SmallVec::from_slice(&saved.events);
        series.runtime = histogram;
        series.prefetch_time = saved.prefetch_time;
        series.prefetched = saved.prefetched;
        Some(key)
    }

    /// `None` if a value is invalid.
    fn restore_histogram(&self, saved: SavedHistogram) -> Option<Histogram> {
        let SavedHistogram { counts, sum, created, native } = saved;
        let observations = counts.iter().try_fold(0, |total: u64, count| total.checked_add(*count))?;
        let native = match (self.native_schema, native.map(Cow::into_owned)) {
            (None, _) => None,
            (Some(schema), native) => Some(Box::new(native?.restore(schema, observations)?)),
        };
        let is_valid = counts.len() == self.bounds.len() + 1 && is_valid(sum);
        is_valid.then(|| Histogram { counts: counts.into(), sum, created, native })
    }
}

/// Whether a value is not negative and not NaN. Infinity is valid, because a sum of finite values can overflow to it.
fn is_valid(value: f64) -> bool {
    value >= 0.0
}
