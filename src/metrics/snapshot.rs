//! A copy of the series' values for one scrape, taken in short steps between batches of events.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::event_count::EventCount;
use super::exemplars::Exemplars;
use super::keys::{SeriesKey, to_u32};
use super::native::NativeBuckets;
use super::series::{SeriesTable, TaskSeries, WorkerSeries};
use super::series_clock::SeriesClock;

/// Series copied between two checks of the clock.
const STEP: usize = 256;

/// The values of one scrape, with the label texts that were escaped when their series were created.
#[derive(Debug)]
pub struct Snapshot {
    pub(super) bounds: Arc<[f64]>,
    /// `type="…"`, by event type id.
    pub(super) event_types: Vec<Arc<str>>,
    pub(super) workers: Vec<WorkerValues>,
    pub(super) task_series: Vec<TaskValues>,
    /// The event counts of all label sets, concatenated.
    pub(super) events: Vec<EventCount>,
    /// The histograms of all label sets, concatenated: `bounds.len() + 1` non-cumulative counts each.
    pub(super) buckets: Vec<u64>,
    /// The sums of these histograms in seconds, and their start timestamps in milliseconds since the epoch.
    pub(super) sums: Vec<(f64, u64)>,
    /// The native buckets of these histograms, if native histograms are on.
    pub(super) native: Vec<NativeBuckets>,
    /// The exemplars of each label set, if exemplars are on.
    pub(super) exemplars: Vec<Option<Exemplars>>,
    /// When the exporter started, in milliseconds since the epoch.
    pub(super) started: u64,
}

#[derive(Debug)]
pub(super) struct WorkerValues {
    pub(super) labels: Arc<str>,
    pub(super) online: Option<bool>,
    pub(super) executing: Option<f64>,
}

#[derive(Debug)]
pub(super) struct TaskValues {
    pub(super) labels: Arc<str>,
    pub(super) split: u32,
    /// End of its part of [`Snapshot::events`], which starts where the previous part ends.
    pub(super) events_end: u32,
    /// Index of its histogram in [`Snapshot::sums`].
    pub(super) runtime: Option<u32>,
    pub(super) prefetch_time: Option<f64>,
    pub(super) prefetched: Option<u32>,
}

impl Snapshot {
    /// The event counts of the label set at `index`.
    pub(super) fn task_events(&self, index: usize) -> &[EventCount] {
        let start = if index == 0 { 0 } else { self.task_series[index - 1].events_end as usize };
        &self.events[start..self.task_series[index].events_end as usize]
    }

    /// The bucket counts, the sum and the start timestamp of the histogram at `index`.
    pub(super) fn histogram(&self, index: u32) -> (&[u64], f64, u64) {
        let (index, width) = (index as usize, self.bounds.len() + 1);
        let (sum, created) = self.sums[index];
        (&self.buckets[index * width..(index + 1) * width], sum, created)
    }

    /// The exemplars of the label set at `index`.
    pub(super) fn exemplars(&self, index: usize) -> Option<&Exemplars> {
        self.exemplars.get(index)?.as_ref()
    }

    fn push(&mut self, series: &TaskSeries, clock: &SeriesClock) {
        let shown = |event: &EventCount| {
            if clock.is_zero(event.created()) { EventCount::new(event.id(), event.created(), 0) } else { *event }
        };
        self.events.extend(series.events.iter().map(shown));
        let runtime = series.runtime.as_ref().map(|histogram| {
            if clock.is_zero(histogram.created) {
                self.buckets.extend(histogram.counts.iter().map(|_| 0));
                self.sums.push((0.0, histogram.created));
                self.native.extend(histogram.native.as_deref().map(|native| NativeBuckets::new(native.schema)));
            } else {
                self.buckets.extend_from_slice(&histogram.counts);
                self.sums.push((histogram.sum, histogram.created));
                self.native.extend(histogram.native.as_deref().cloned());
            }
            to_u32(self.sums.len() - 1)
        });
        self.task_series.push(TaskValues {
            labels: Arc::clone(&series.labels),
            split: series.split,
            events_end: to_u32(self.events.len()),
            runtime,
            prefetch_time: series.prefetch_time,
            prefetched: series.prefetched,
        });
    }
}

impl WorkerValues {
    fn new(worker: &WorkerSeries) -> Self {
        Self { labels: Arc::clone(&worker.labels), online: worker.online, executing: worker.executing }
    }
}

/// Copies the series in steps. Series that are removed between two steps may or may not be included. Series that are
/// added after the start are not, because a worker that is removed and returns would otherwise be included twice. The
/// values of one label set are copied together.
#[derive(Debug)]
pub struct SnapshotBuilder {
    snapshot: Snapshot,
    next_worker: usize,
    next_task_series: usize,
    /// [`SeriesTable::generation`] at the start.
    generation: u64,
}

impl SnapshotBuilder {
    /// Starts a snapshot.
    #[must_use]
    pub fn new(series: &SeriesTable) -> Self {
        let snapshot = Snapshot {
            bounds: Arc::clone(&series.bounds),
            event_types: Vec::new(),
            workers: Vec::with_capacity(series.workers.len()),
            task_series: Vec::with_capacity(series.label_sets.len()),
            events: Vec::with_capacity(series.label_sets.len() * 4),
            buckets: Vec::new(),
            sums: Vec::new(),
            native: Vec::new(),
            exemplars: Vec::new(),
            started: series.clock.started(),
        };
        Self { snapshot, next_worker: 0, next_task_series: 0, generation: series.generation }
    }

    /// Visits at most `count` more slots. Returns whether the copy is complete.
    pub fn step(&mut self, series: &SeriesTable, count: usize) -> bool {
        let end = (self.next_worker + count).min(series.workers.capacity());
        let rest = count - (end - self.next_worker);
        for slot in self.next_worker..end {
            if let Some(worker) = series.workers.get(slot).filter(|worker| worker.generation <= self.generation) {
                self.snapshot.workers.push(WorkerValues::new(worker));
            }
        }
        self.next_worker = end;
        let end = (self.next_task_series + rest).min(series.label_sets.capacity());
        for slot in self.next_task_series..end {
            if let Some(row) = series.label_sets.get(slot).filter(|row| row.generation <= self.generation) {
                self.snapshot.push(row, &series.clock);
                if let Some(exemplars) = &series.exemplars {
                    self.snapshot.exemplars.push(exemplars.get(SeriesKey::from_index(slot)).cloned());
                }
            }
        }
        self.next_task_series = end;
        self.next_worker >= series.workers.capacity() && self.next_task_series >= series.label_sets.capacity()
    }

    /// Takes steps until the copy is complete or about `budget` has passed. Returns whether the copy is complete.
    pub fn step_for(&mut self, series: &SeriesTable, budget: Duration) -> bool {
        let started = Instant::now();
        while !self.step(series, STEP) {
            if started.elapsed() >= budget {
                return false;
            }
        }
        true
    }

    /// Returns the snapshot. Call it after the last step.
    #[must_use]
    pub fn finish(mut self, series: &SeriesTable) -> Snapshot {
        self.snapshot.event_types.clone_from(&series.event_types.labels);
        self.snapshot
    }
}
