//! A copy of the numbers, taken in slices between batches of events.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::series::{Pair, Series, Worker, small};

/// Rows copied between two looks at the clock.
const ROWS: usize = 256;

/// What one scrape shows: copied numbers, and shared texts that were escaped when their series were made.
#[derive(Debug)]
pub struct Snapshot {
    pub(super) bounds: Arc<[f64]>,
    pub(super) types: Vec<Arc<str>>,
    pub(super) workers: Vec<WorkerSample>,
    pub(super) pairs: Vec<PairSample>,
    /// The pairs' events one after the other: type id, count.
    pub(super) events: Vec<(u8, u64)>,
    /// The pairs' histograms one after the other: `bounds.len() + 1` counts each, not cumulated.
    pub(super) buckets: Vec<u64>,
    pub(super) sums: Vec<f64>,
}

#[derive(Debug)]
pub(super) struct WorkerSample {
    pub(super) label: Arc<str>,
    pub(super) online: Option<bool>,
    pub(super) executing: Option<f64>,
}

#[derive(Debug)]
pub(super) struct PairSample {
    pub(super) label: Arc<str>,
    pub(super) split: u32,
    /// Where its events end in [`Snapshot::events`]; they begin where those of the pair before end.
    pub(super) events_end: u32,
    /// Its place in [`Snapshot::sums`].
    pub(super) runtime: Option<u32>,
    pub(super) prefetch_time: Option<f64>,
    pub(super) prefetched: Option<u32>,
}

impl Snapshot {
    /// The events of the pair at `index`: type id, count.
    pub(super) fn events_of(&self, index: usize) -> &[(u8, u64)] {
        let start = if index == 0 { 0 } else { self.pairs[index - 1].events_end as usize };
        &self.events[start..self.pairs[index].events_end as usize]
    }

    /// The bucket counts and the sum of a histogram.
    pub(super) fn histogram(&self, place: u32) -> (&[u64], f64) {
        let (place, width) = (place as usize, self.bounds.len() + 1);
        (&self.buckets[place * width..(place + 1) * width], self.sums[place])
    }
}

/// A copy under way. Series that go between two slices are in it or not, those that come are not: one that goes and
/// comes back would be in it twice. Each row is copied whole.
#[derive(Debug)]
pub struct Copying {
    snapshot: Snapshot,
    next_worker: usize,
    next_pair: usize,
    /// Rows made later are left out.
    made: u64,
}

impl Copying {
    /// Starts a copy.
    #[must_use]
    pub fn start(series: &Series) -> Self {
        let snapshot = Snapshot {
            bounds: Arc::clone(&series.bounds),
            types: Vec::new(),
            workers: Vec::with_capacity(series.workers.len()),
            pairs: Vec::with_capacity(series.pairs.len()),
            events: Vec::with_capacity(series.pairs.len() * 4),
            buckets: Vec::new(),
            sums: Vec::new(),
        };
        Self { snapshot, next_worker: 0, next_pair: 0, made: series.made }
    }

    /// Copies at most `rows` rows more. Whether all are copied.
    pub fn proceed(&mut self, series: &Series, rows: usize) -> bool {
        let end = (self.next_worker + rows).min(series.workers.capacity());
        let left = rows - (end - self.next_worker);
        for slot in self.next_worker..end {
            if let Some(worker) = series.workers.get(slot).filter(|worker| worker.number <= self.made) {
                self.snapshot.workers.push(WorkerSample::of(worker));
            }
        }
        self.next_worker = end;
        let end = (self.next_pair + left).min(series.pairs.capacity());
        for slot in self.next_pair..end {
            if let Some(pair) = series.pairs.get(slot).filter(|pair| pair.number <= self.made) {
                self.snapshot.push_pair(pair);
            }
        }
        self.next_pair = end;
        self.next_worker >= series.workers.capacity() && self.next_pair >= series.pairs.capacity()
    }

    /// Goes on for about so long. Whether all are copied.
    pub fn proceed_for(&mut self, series: &Series, limit: Duration) -> bool {
        let began = Instant::now();
        while !self.proceed(series, ROWS) {
            if began.elapsed() >= limit {
                return false;
            }
        }
        true
    }

    /// The finished copy.
    #[must_use]
    pub fn finish(mut self, series: &Series) -> Snapshot {
        self.snapshot.types.clone_from(&series.types.labels);
        self.snapshot
    }
}

impl Snapshot {
    fn push_pair(&mut self, pair: &Pair) {
        self.events.extend_from_slice(&pair.events);
        let runtime = pair.runtime.as_ref().map(|histogram| {
            self.buckets.extend_from_slice(&histogram.counts);
            self.sums.push(histogram.sum);
            small(self.sums.len() - 1)
        });
        self.pairs.push(PairSample {
            label: Arc::clone(&pair.label),
            split: pair.split,
            events_end: small(self.events.len()),
            runtime,
            prefetch_time: pair.prefetch_time,
            prefetched: pair.prefetched,
        });
    }
}

impl WorkerSample {
    fn of(worker: &Worker) -> Self {
        Self { label: Arc::clone(&worker.label), online: worker.online, executing: worker.executing }
    }
}
