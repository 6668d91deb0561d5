//! The series of the six families, as the ingest loop moves them.
//!
//! Families with the labels worker and task share one row a pair, those with worker alone one row a worker. A row is
//! found by interned ids, so the key is the real label tuple; its label text is escaped once, when it is made.

use std::num::NonZeroU32;
use std::sync::Arc;

use foldhash::fast::RandomState;
use hashbrown::HashMap;
use slab::Slab;

use super::histogram::Histogram;
use super::label::{self, OTHER};
use crate::celery::{EventKind, cut};
use crate::marks::Marks;

/// Distinct event types before `(other)`.
pub const MAX_TYPES: usize = 64;

/// The row of a worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct WorkerRow(pub(super) u32);

/// The row of a (worker, task) pair. Valid as long as its worker's row is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PairId(NonZeroU32);

impl PairId {
    /// By its place in the slab. One more is stored, so that an `Option` of it takes no more room: tasks have two.
    fn of(place: usize) -> Self {
        Self(NonZeroU32::MIN.saturating_add(small(place)))
    }

    pub(super) fn place(self) -> usize {
        self.number() as usize
    }

    /// What it is called where the state is saved.
    #[must_use]
    pub fn number(self) -> u32 {
        self.0.get() - 1
    }
}

/// A task name as the state's table knows it, together with its text.
#[derive(Clone, Copy, Debug)]
pub struct TaskLabel<'a> {
    /// The same id for the same text, as long as a pair holds it.
    pub id: u32,
    /// The text, not escaped.
    pub text: &'a str,
}

/// Every series of the six families.
#[derive(Debug)]
pub struct Series {
    pub(super) bounds: Arc<[f64]>,
    pub(super) types: Types,
    pub(super) workers: Slab<Worker>,
    pub(super) pairs: Slab<Pair>,
    pub(super) index: HashMap<(WorkerRow, u32), PairId, RandomState>,
    max_pairs: usize,
    capped: bool,
    /// How many rows have ever been made.
    pub(super) made: u64,
    /// Pairs that changed since the last save.
    pub(super) marks: Marks,
}

#[derive(Debug)]
pub(super) struct Worker {
    /// Its number among the rows ever made.
    pub(super) number: u64,
    pub(super) label: Arc<str>,
    pub(super) online: Option<bool>,
    pub(super) executing: Option<f64>,
    text: Arc<str>,
    pairs: Vec<PairId>,
    /// The pair under task `(other)`, kept out of the index, which knows names of tasks only.
    pub(super) other: Option<PairId>,
}

#[derive(Debug)]
pub(super) struct Pair {
    /// Its number among the rows ever made.
    pub(super) number: u64,
    pub(super) worker: WorkerRow,
    /// `task="…",worker="…"`; `split` is where the comma stands.
    pub(super) label: Arc<str>,
    pub(super) split: u32,
    pub(super) events: Vec<(u8, u64)>,
    pub(super) runtime: Option<Box<Histogram>>,
    pub(super) prefetch_time: Option<f64>,
    pub(super) prefetched: Option<u32>,
    /// Its task's name, by the id the state's table knows it by; none for task `(other)`.
    pub(super) task: Option<u32>,
}

impl Series {
    /// `bounds`: the runtime histogram's upper bounds in seconds, ascending, without `+Inf`. Past `max_pairs` pairs, new
    /// ones are recorded under the task `(other)` of their worker.
    #[must_use]
    pub fn new(bounds: &[f64], max_pairs: usize) -> Self {
        Self {
            bounds: bounds.into(),
            types: Types::default(),
            workers: Slab::new(),
            pairs: Slab::new(),
            index: HashMap::default(),
            max_pairs,
            capped: false,
            made: 0,
            marks: Marks::default(),
        }
    }

    /// How many (worker, task) pairs there are.
    #[must_use]
    pub fn pair_count(&self) -> usize {
        self.pairs.len()
    }

    /// A row for a worker whose hostname is `text`, without any series yet.
    pub fn add_worker(&mut self, text: &str) -> WorkerRow {
        let mut label = String::with_capacity(text.len() + 10);
        label::append(&mut label, "worker", text);
        self.made += 1;
        let worker = Worker {
            number: self.made,
            label: label.into(),
            text: text.into(),
            online: None,
            executing: None,
            pairs: Vec::new(),
            other: None,
        };
        WorkerRow(small(self.workers.insert(worker)))
    }

    /// Removes the worker's series from all six families. `released` is told each task name its pairs held.
    pub fn remove_worker(&mut self, row: WorkerRow, mut released: impl FnMut(u32)) {
        for id in self.workers.remove(row.0 as usize).pairs {
            self.marks.mark(id.number());
            if let Some(task) = self.pairs.remove(id.place()).task {
                self.index.remove(&(row, task));
                released(task);
            }
        }
    }

    /// The row of a pair, if it has one of its own.
    #[inline]
    #[must_use]
    pub fn find_pair(&self, row: WorkerRow, task: u32) -> Option<PairId> {
        self.index.get(&(row, task)).copied()
    }

    /// A row for a pair that [`Series::find_pair`] does not know, and whether it holds the task's name: beyond the bound
    /// it is the worker's row under task `(other)`.
    pub fn add_pair(&mut self, row: WorkerRow, task: TaskLabel) -> (PairId, bool) {
        if self.pairs.len() < self.max_pairs && task.text != OTHER {
            let pair = self.make_pair(row, task.text, Some(task.id));
            self.index.insert((row, task.id), pair);
            return (pair, true);
        }
        if task.text != OTHER {
            self.warn_capped();
        }
        let pair = self.workers[row.0 as usize].other.unwrap_or_else(|| self.make_pair(row, OTHER, None));
        (pair, false)
    }

    pub(super) fn make_pair(&mut self, row: WorkerRow, text: &str, task: Option<u32>) -> PairId {
        self.made += 1;
        let worker = &mut self.workers[row.0 as usize];
        let mut label = String::with_capacity(text.len() + worker.text.len() + 20);
        label::append(&mut label, "task", text);
        let split = small(label.len());
        label.push(',');
        label::append(&mut label, "worker", &worker.text);
        let id = PairId::of(self.pairs.insert(Pair {
            number: self.made,
            worker: row,
            label: label.into(),
            split,
            events: Vec::new(),
            runtime: None,
            prefetch_time: None,
            prefetched: None,
            task,
        }));
        self.marks.mark(id.number());
        worker.pairs.push(id);
        if task.is_none() {
            worker.other = Some(id);
        }
        id
    }

    fn warn_capped(&mut self) {
        if !std::mem::replace(&mut self.capped, true) {
            tracing::warn!(
                max_label_pairs = self.max_pairs,
                "the (worker, task) pairs reached metrics.max_label_pairs: new ones are recorded under task {OTHER}"
            );
        }
    }

    #[inline]
    fn pair_mut(&mut self, pair: PairId) -> &mut Pair {
        self.marks.mark(pair.number());
        &mut self.pairs[pair.place()]
    }

    /// Counts one event.
    #[inline]
    pub fn count_event(&mut self, pair: PairId, kind: EventKind, name_of_type: &str) {
        let id = self.types.id(kind, name_of_type);
        let events = &mut self.pair_mut(pair).events;
        match events.iter_mut().find(|(known, _)| *known == id) {
            Some((_, count)) => *count += 1,
            None => events.push((id, 1)),
        }
    }

    /// Observes a task's runtime in seconds.
    pub fn observe_runtime(&mut self, pair: PairId, seconds: f64) {
        self.marks.mark(pair.number());
        let histogram = &mut self.pairs[pair.place()].runtime;
        histogram.get_or_insert_with(|| Box::new(Histogram::new(&self.bounds))).observe(&self.bounds, seconds);
    }

    /// Sets the prefetch time in seconds.
    pub fn set_prefetch_time(&mut self, pair: PairId, seconds: f64) {
        self.pair_mut(pair).prefetch_time = Some(seconds);
    }

    /// Makes the prefetch-time series appear, at 0, unless it is there.
    pub fn touch_prefetch_time(&mut self, pair: PairId) {
        self.pair_mut(pair).prefetch_time.get_or_insert(0.0);
    }

    /// Makes the prefetched-tasks series appear, at 0, unless it is there.
    pub fn touch_prefetched(&mut self, pair: PairId) {
        self.pair_mut(pair).prefetched.get_or_insert(0);
    }

    /// One more prefetched task.
    pub fn add_prefetched(&mut self, pair: PairId) {
        *self.pair_mut(pair).prefetched.get_or_insert(0) += 1;
    }

    /// One prefetched task less; only for one that was added and not emptied since.
    pub fn remove_prefetched(&mut self, pair: PairId) {
        if let Some(count) = &mut self.pair_mut(pair).prefetched {
            *count = count.saturating_sub(1);
        }
    }

    /// Sets the worker's prefetched-tasks gauges to 0, as far as they exist.
    pub fn empty_prefetched(&mut self, row: WorkerRow) {
        for pair in &self.workers[row.0 as usize].pairs {
            if let Some(count @ 1..) = &mut self.pairs[pair.place()].prefetched {
                *count = 0;
                self.marks.mark(pair.number());
            }
        }
    }

    /// Sets the worker's prefetch-time gauges to 0, as far as they exist.
    pub fn zero_prefetch_times(&mut self, row: WorkerRow) {
        for pair in &self.workers[row.0 as usize].pairs {
            if let Some(seconds) = self.pairs[pair.place()].prefetch_time.as_mut().filter(|seconds| **seconds != 0.0) {
                *seconds = 0.0;
                self.marks.mark(pair.number());
            }
        }
    }

    /// Sets the worker's online status.
    pub fn set_online(&mut self, row: WorkerRow, online: bool) {
        self.workers[row.0 as usize].online = Some(online);
    }

    /// Sets the number of tasks the worker executes.
    pub fn set_executing(&mut self, row: WorkerRow, tasks: f64) {
        self.workers[row.0 as usize].executing = Some(tasks);
    }

    /// The worker says goodbye: offline, with what it still executes, where that series exists.
    pub fn say_goodbye(&mut self, row: WorkerRow, executing: Option<f64>) {
        let worker = &mut self.workers[row.0 as usize];
        worker.online = Some(false);
        if let (Some(gauge), Some(tasks)) = (&mut worker.executing, executing) {
            *gauge = tasks;
        }
    }

    /// The worker is not heard any more: its gauges go to 0, as far as they exist.
    pub fn lose_worker(&mut self, row: WorkerRow) {
        let worker = &mut self.workers[row.0 as usize];
        worker.online = worker.online.map(|_| false);
        worker.executing = worker.executing.map(|_| 0.0);
        self.empty_prefetched(row);
        self.zero_prefetch_times(row);
    }
}

/// The event types seen, by small ids.
#[derive(Debug, Default)]
pub(super) struct Types {
    /// `type="…"`, by id.
    pub(super) labels: Vec<Arc<str>>,
    pub(super) ids: HashMap<Box<str>, u8, RandomState>,
    known: [Option<u8>; EventKind::TaskCustom as usize],
}

impl Types {
    #[inline]
    fn id(&mut self, kind: EventKind, name: &str) -> u8 {
        match self.known.get(kind as usize) {
            Some(Some(id)) => *id,
            _ => self.find(kind, name),
        }
    }

    fn find(&mut self, kind: EventKind, name: &str) -> u8 {
        let name = cut(name);
        let id = match self.ids.get(&*name) {
            Some(id) => *id,
            None if self.labels.len() < MAX_TYPES => self.add(&name),
            None => self.other(),
        };
        if let Some(known) = self.known.get_mut(kind as usize) {
            *known = Some(id);
        }
        id
    }

    fn other(&mut self) -> u8 {
        self.ids.get(OTHER).copied().unwrap_or_else(|| {
            tracing::warn!("more than {MAX_TYPES} event types: new ones are recorded under type {OTHER}");
            self.add(OTHER)
        })
    }

    pub(super) fn add(&mut self, name: &str) -> u8 {
        let mut label = String::new();
        label::append(&mut label, "type", name);
        #[allow(clippy::cast_possible_truncation, reason = "at most 65 types")]
        let id = self.labels.len() as u8;
        self.labels.push(label.into());
        self.ids.insert(name.into(), id);
        id
    }
}

#[allow(clippy::cast_possible_truncation, reason = "rows, events and label texts are bounded far below 2^32")]
pub(super) fn small(number: usize) -> u32 {
    number as u32
}
