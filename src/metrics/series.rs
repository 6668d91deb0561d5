//! The series of the six families, keyed by label set.
//!
//! The families with the labels worker and task share one [`TaskSeries`] per label set. The families with the label
//! worker alone share one [`WorkerSeries`]. A label set is found by the ids of its interned names, so that no two label
//! sets collide, and its text is escaped once, when it is created.

use std::sync::Arc;

use foldhash::fast::RandomState;
use hashbrown::HashMap;
use slab::Slab;
use smallvec::SmallVec;

use super::DirtySet;
use super::event_count::EventCount;
use super::exemplars::ExemplarTable;
use super::histogram::{Histogram, bucket_of};
use super::keys::{SeriesKey, TaskName, WorkerKey, to_u32};
use super::label_escaping::{OTHER, append_escaped};
use super::options::SeriesOptions;
use super::series_clock::SeriesClock;
use super::worker_groups::GroupMembers;
use crate::celery::{EventKind, TaskId, truncate_label};

/// Maximum number of distinct event types. Further ones are counted under type `(other)`.
pub const MAX_EVENT_TYPES: usize = 64;

/// The table of all series of the six families.
#[derive(Debug)]
pub struct SeriesTable {
    pub(super) bounds: Arc<[f64]>,
    /// The resolution of native histograms. `None`: there are none.
    pub(super) native_schema: Option<i8>,
    /// `None`: exemplars are off.
    pub(super) exemplars: Option<ExemplarTable>,
    pub(super) event_types: EventTypes,
    pub(super) workers: Slab<WorkerSeries>,
    pub(super) label_sets: Slab<TaskSeries>,
    pub(super) index: HashMap<(WorkerKey, u32), SeriesKey, RandomState>,
    max_label_sets: usize,
    limit_warned: bool,
    /// Incremented for every worker and label set that is added. A snapshot leaves out those added after its start.
    pub(super) generation: u64,
    /// Label sets that changed since the last save.
    pub(super) dirty: DirtySet,
    pub(super) clock: SeriesClock,
    pub(super) groups: GroupMembers,
}

#[derive(Debug)]
pub(super) struct WorkerSeries {
    /// [`SeriesTable::generation`] when it was added.
    pub(super) generation: u64,
    pub(super) labels: Arc<str>,
    pub(super) online: Option<bool>,
    pub(super) executing: Option<f64>,
    hostname: Arc<str>,
    task_series: Vec<SeriesKey>,
    /// When its last counter or histogram was created, in milliseconds since the epoch.
    last_created: u64,
    /// The series of task `(other)`. They are not in the index, whose keys are interned names.
    pub(super) other: Option<SeriesKey>,
}

#[derive(Debug)]
pub(super) struct TaskSeries {
    /// [`SeriesTable::generation`] when it was added.
    pub(super) generation: u64,
    pub(super) worker: WorkerKey,
    /// `task="…",worker="…"`; `split` is the byte index of the comma.
    pub(super) labels: Arc<str>,
    pub(super) split: u32,
    /// A finished task sends three or four types. They are in place, so that counting one needs no other cache line.
    pub(super) events: SmallVec<[EventCount; 4]>,
    pub(super) runtime: Option<Histogram>,
    pub(super) prefetch_time: Option<f64>,
    pub(super) prefetched: Option<u32>,
    /// The id of the task name; `None` for task `(other)`.
    pub(super) task: Option<u32>,
}

impl SeriesTable {
    /// Creates an empty table.
    #[must_use]
    pub fn new(options: &SeriesOptions) -> Self {
        let mut table = Self {
            bounds: options.bounds.as_slice().into(),
            native_schema: options.native_schema,
            exemplars: options.exemplars.then(ExemplarTable::default),
            event_types: EventTypes::default(),
            workers: Slab::new(),
            label_sets: Slab::new(),
            index: HashMap::default(),
            max_label_sets: options.max_label_sets,
            limit_warned: false,
            generation: 0,
            dirty: DirtySet::default(),
            clock: SeriesClock::new(options.zero_first),
            groups: GroupMembers::default(),
        };
        if let Some(groups) = &options.worker_groups {
            let keys = groups.names().iter().map(|name| table.add_worker(name)).collect();
            table.groups = GroupMembers::new(groups.clone(), keys);
        }
        table
    }

    /// The worker or group whose label sets count the tasks of a hostname.
    #[must_use]
    pub fn group_of(&self, hostname: &str) -> Option<WorkerKey> {
        self.groups.find(hostname)
    }

    /// Sets the time, in milliseconds since the epoch. It does not go back. The first call makes all series that were
    /// restored older than this.
    pub fn set_time(&mut self, now: u64) {
        if self.clock.set(now) {
            let newest = self.clock.started().saturating_sub(2);
            for (_, series) in &mut self.label_sets {
                series.events.iter_mut().for_each(|event| event.set_created(event.created().min(newest)));
                if let Some(histogram) = &mut series.runtime {
                    histogram.created = histogram.created.min(newest);
                }
            }
        }
    }

    /// Whether a series of the worker still shows zero.
    #[must_use]
    pub fn shows_zero(&self, worker: WorkerKey) -> bool {
        self.clock.is_zero(self.workers[worker.0 as usize].last_created)
    }

    /// Number of (worker, task) label sets.
    #[must_use]
    pub fn label_set_count(&self) -> usize {
        self.label_sets.len()
    }

    /// Adds a worker, without any series.
    pub fn add_worker(&mut self, hostname: &str) -> WorkerKey {
        let mut labels = String::with_capacity(hostname.len() + 10);
        append_escaped(&mut labels, "worker", hostname);
        self.generation += 1;
        let worker = WorkerSeries {
            generation: self.generation,
            labels: labels.into(),
            hostname: hostname.into(),
            online: None,
            executing: None,
            task_series: Vec::new(),
            last_created: 0,
            other: None,
        };
        WorkerKey(to_u32(self.workers.insert(worker)))
    }

    /// Removes the worker's series from all six families. `release` is called with each task name that they retained.
    /// The label sets of its group stay, without what the worker contributed to their gauges.
    pub fn remove_worker(&mut self, worker: WorkerKey, mut release: impl FnMut(u32)) {
        self.reset_prefetched(worker);
        self.reset_prefetch_times(worker);
        self.groups.remove(worker);
        for key in self.workers.remove(worker.0 as usize).task_series {
            self.dirty.mark(key.to_u32());
            if let Some(exemplars) = &mut self.exemplars {
                exemplars.remove(key);
            }
            if let Some(task) = self.label_sets.remove(key.index()).task {
                self.index.remove(&(worker, task));
                release(task);
            }
        }
    }

    /// The key of a label set, if it is present.
    #[inline]
    #[must_use]
    pub fn find_task_series(&self, worker: WorkerKey, task: u32) -> Option<SeriesKey> {
        self.index.get(&(worker, task)).copied()
    }

    /// Adds a label set that [`SeriesTable::find_task_series`] does not find. Returns its key, and whether it retains
    /// the task name. At the limit, the key is that of the worker's task `(other)`, which retains no name.
    pub fn add_task_series(&mut self, worker: WorkerKey, task: TaskName) -> (SeriesKey, bool) {
        if self.label_sets.len() < self.max_label_sets && task.text != OTHER {
            let key = self.create_task_series(worker, task.text, Some(task.id));
            self.index.insert((worker, task.id), key);
            return (key, true);
        }
        if task.text != OTHER {
            self.warn_limit();
        }
        let other = self.workers[worker.0 as usize].other;
        (other.unwrap_or_else(|| self.create_task_series(worker, OTHER, None)), false)
    }

    pub(super) fn create_task_series(&mut self, worker_key: WorkerKey, text: &str, task: Option<u32>) -> SeriesKey {
        self.generation += 1;
        let worker = &mut self.workers[worker_key.0 as usize];
        let mut labels = String::with_capacity(text.len() + worker.hostname.len() + 20);
        append_escaped(&mut labels, "task", text);
        let split = to_u32(labels.len());
        labels.push(',');
        append_escaped(&mut labels, "worker", &worker.hostname);
        let key = SeriesKey::from_index(self.label_sets.insert(TaskSeries {
            generation: self.generation,
            worker: worker_key,
            labels: labels.into(),
            split,
            events: SmallVec::new(),
            runtime: None,
            prefetch_time: None,
            prefetched: None,
            task,
        }));
        self.dirty.mark(key.to_u32());
        worker.task_series.push(key);
        if task.is_none() {
            worker.other = Some(key);
        }
        key
    }

    fn warn_limit(&mut self) {
        if !std::mem::replace(&mut self.limit_warned, true) {
            tracing::warn!(
                max_label_sets = self.max_label_sets,
                "metrics.max_label_sets reached; new label sets are counted under task {OTHER}"
            );
        }
    }

    #[inline]
    fn task_series_mut(&mut self, key: SeriesKey) -> &mut TaskSeries {
        self.dirty.mark(key.to_u32());
        &mut self.label_sets[key.index()]
    }

    /// Counts one event.
    #[inline]
    pub fn count_event(&mut self, key: SeriesKey, kind: EventKind, event_type: &str) {
        let id = self.event_types.id(kind, event_type);
        let series = self.task_series_mut(key);
        match series.events.iter_mut().find(|event| event.id() == id) {
            Some(event) => event.count += 1,
            None => self.create_event_count(key, id),
        }
    }

    #[cold]
    fn create_event_count(&mut self, key: SeriesKey, id: u8) {
        let created = self.clock.created();
        let series = &mut self.label_sets[key.index()];
        series.events.push(EventCount::new(id, created, 1));
        self.workers[series.worker.0 as usize].last_created = created;
    }

    /// Observes a task's runtime in seconds.
    pub fn observe_runtime(&mut self, key: SeriesKey, seconds: f64) {
        self.dirty.mark(key.to_u32());
        let series = &mut self.label_sets[key.index()];
        let histogram = series.runtime.get_or_insert_with(|| {
            let created = self.clock.created();
            self.workers[series.worker.0 as usize].last_created = created;
            Histogram::new(&self.bounds, self.native_schema, created)
        });
        histogram.observe(&self.bounds, seconds);
    }

    /// Keeps a task as the exemplar of its runtime, and, if it failed, of the failures.
    #[inline]
    pub fn keep_exemplar(&mut self, key: SeriesKey, kind: EventKind, id: &TaskId, runtime: Option<f64>) {
        let Some(exemplars) = &mut self.exemplars else { return };
        let now = self.clock.now();
        if kind == EventKind::TaskFailed {
            exemplars.set_failed(key, id, now);
        }
        if let Some(seconds) = runtime {
            exemplars.set_bucket(key, bucket_of(&self.bounds, seconds), id, seconds, now);
        }
    }

    /// Sets the prefetch time in seconds. `worker` started the task.
    pub fn set_prefetch_time(&mut self, key: SeriesKey, worker: WorkerKey, seconds: f64) {
        let series = self.task_series_mut(key);
        series.prefetch_time = Some(seconds);
        if series.worker != worker {
            self.groups.set_writer(worker, key);
        }
    }

    /// Sets the prefetch time to 0 at the end of a run, unless another member of the worker's group has set it since.
    pub fn end_prefetch_time(&mut self, key: SeriesKey, worker: WorkerKey) {
        if self.label_sets[key.index()].worker == worker || self.groups.take_writer(worker, key) {
            self.task_series_mut(key).prefetch_time = Some(0.0);
        }
    }

    /// Creates the prefetch-time series at 0, unless it exists.
    pub fn ensure_prefetch_time(&mut self, key: SeriesKey) {
        self.task_series_mut(key).prefetch_time.get_or_insert(0.0);
    }

    /// Creates the prefetched-tasks series at 0, unless it exists.
    pub fn ensure_prefetched(&mut self, key: SeriesKey) {
        self.task_series_mut(key).prefetched.get_or_insert(0);
    }

    /// Adds one prefetched task of a worker.
    pub fn add_prefetched(&mut self, key: SeriesKey, worker: WorkerKey) {
        let series = self.task_series_mut(key);
        *series.prefetched.get_or_insert(0) += 1;
        if series.worker != worker {
            self.groups.add_prefetched(worker, key);
        }
    }

    /// Subtracts one prefetched task. Call it only for a task that was added and not reset since.
    pub fn remove_prefetched(&mut self, key: SeriesKey, worker: WorkerKey) {
        self.subtract_prefetched(key, 1);
        if self.label_sets[key.index()].worker != worker {
            self.groups.remove_prefetched(worker, key);
        }
    }

    fn subtract_prefetched(&mut self, key: SeriesKey, tasks: u32) {
        if let Some(count) = &mut self.task_series_mut(key).prefetched {
            *count = count.saturating_sub(tasks);
        }
    }

    /// Subtracts all prefetched tasks of the worker.
    pub fn reset_prefetched(&mut self, worker: WorkerKey) {
        for key in &self.workers[worker.0 as usize].task_series {
            if let Some(count @ 1..) = &mut self.label_sets[key.index()].prefetched {
                *count = 0;
                self.dirty.mark(key.to_u32());
            }
        }
        for (key, tasks) in self.groups.take_prefetched(worker) {
            self.subtract_prefetched(key, tasks);
        }
    }

    /// Sets the prefetch times that the worker set to 0, unless another member of its group has set them since.
    pub fn reset_prefetch_times(&mut self, worker: WorkerKey) {
        for key in &self.workers[worker.0 as usize].task_series {
            let prefetch_time = &mut self.label_sets[key.index()].prefetch_time;
            if prefetch_time.is_some_and(|seconds| seconds != 0.0) {
                *prefetch_time = Some(0.0);
                self.dirty.mark(key.to_u32());
            }
        }
        for key in self.groups.take_written(worker) {
            self.task_series_mut(key).prefetch_time = Some(0.0);
        }
    }

    /// Sets the worker's online status.
    pub fn set_online(&mut self, worker: WorkerKey, online: bool) {
        self.workers[worker.0 as usize].online = Some(online);
    }

    /// Sets the number of tasks the worker executes.
    pub fn set_executing(&mut self, worker: WorkerKey, tasks: f64) {
        self.workers[worker.0 as usize].executing = Some(tasks);
    }

    /// Marks the worker offline after its shutdown. Updates the number of tasks it executes, if that series exists.
    pub fn set_worker_offline(&mut self, worker: WorkerKey, executing: Option<f64>) {
        let worker = &mut self.workers[worker.0 as usize];
        worker.online = Some(false);
        if let (Some(gauge), Some(tasks)) = (&mut worker.executing, executing) {
            *gauge = tasks;
        }
    }

    /// Sets the existing gauges of a worker that has timed out to 0.
    pub fn set_worker_timed_out(&mut self, worker_key: WorkerKey) {
        let worker = &mut self.workers[worker_key.0 as usize];
        worker.online = worker.online.map(|_| false);
        worker.executing = worker.executing.map(|_| 0.0);
        self.reset_prefetched(worker_key);
        self.reset_prefetch_times(worker_key);
    }
}

/// The event types seen, each with an id of one byte.
#[derive(Debug, Default)]
pub(super) struct EventTypes {
    /// `type="…"`, by id.
    pub(super) labels: Vec<Arc<str>>,
    pub(super) ids: HashMap<Box<str>, u8, RandomState>,
    /// The ids of the built-in types, so that their names need no lookup.
    built_in: [Option<u8>; EventKind::TaskCustom as usize],
}

impl EventTypes {
    #[inline]
    fn id(&mut self, kind: EventKind, name: &str) -> u8 {
        match self.built_in.get(kind as usize) {
            Some(Some(id)) => *id,
            _ => self.find_or_add(kind, name),
        }
    }

    fn find_or_add(&mut self, kind: EventKind, name: &str) -> u8 {
        let name = truncate_label(name);
        let id = match self.ids.get(&*name) {
            Some(id) => *id,
            None if self.labels.len() < MAX_EVENT_TYPES => self.add(&name),
            None => self.other(),
        };
        if let Some(built_in) = self.built_in.get_mut(kind as usize) {
            *built_in = Some(id);
        }
        id
    }

    fn other(&mut self) -> u8 {
        self.ids.get(OTHER).copied().unwrap_or_else(|| {
            tracing::warn!("more than {MAX_EVENT_TYPES} event types; new ones are counted under type {OTHER}");
            self.add(OTHER)
        })
    }

    pub(super) fn add(&mut self, name: &str) -> u8 {
        let mut label = String::new();
        append_escaped(&mut label, "type", name);
        #[allow(clippy::cast_possible_truncation, reason = "at most 65 types")]
        let id = self.labels.len() as u8;
        self.labels.push(label.into());
        self.ids.insert(name.into(), id);
        id
    }
}
