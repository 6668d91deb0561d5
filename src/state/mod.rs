//! Tracks the workers and tasks of a Celery deployment by their events, and updates the metric series.
//! It is pure and bounded: the caller passes the time in, every table has a limit, and nothing blocks or does I/O.
//!
//! The rules follow Celery's `celery.events.state` and Flower's `flower/events.py`. docs/migration.md lists the intended
//! differences. A task holds at most one prefetch entry, and each prefetched-tasks gauge is the number of entries that
//! were counted under its label set and still exist.

mod info;
mod interner;
mod persist;
mod starting;
mod tasks;
mod transitions;
mod worker_changes;
mod worker_events;
mod workers;

use std::time::Duration;

use interner::{NameId, NameInterner};
use starting::StartingWorkers;
use tasks::{EvictedTask, Task, Tasks};
use worker_changes::WorkerChanges;
use workers::{Presence, Worker, Workers};

pub use info::{TaskInfo, WorkerInfo};
pub use persist::{Corrupt, Delta, FORMAT, RecordBatch, Restorer};
pub use tasks::TaskState;
pub use workers::WorkerId;

use crate::celery::event::Eta;
use crate::celery::{Event, EventKind, TaskId, truncate_label};
use crate::metrics::{OTHER, SeriesKey, SeriesOptions, SeriesTable, TaskName, WorkerKey};
use crate::observability::WorkerCounts;

/// The bounds of a [`State`].
#[derive(Clone, Debug)]
pub struct Limits {
    /// Maximum number of tracked hostnames. If none can be evicted, new ones are counted under worker `(other)`.
    pub max_workers: usize,
    /// Maximum number of tracked tasks. Finished ones are evicted first.
    pub max_tasks: usize,
    /// The bounds of the series, and what they contain.
    pub series: SeriesOptions,
}

/// Timeouts counted from a worker's last event. `None` disables one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Timeouts {
    /// After this long, the worker is marked offline.
    pub worker_timeout: Option<Duration>,
    /// After this long, the worker's series are removed.
    pub purge_offline_workers: Option<Duration>,
    /// The same for a worker that sent `worker-offline`.
    pub purge_stopped_workers: Option<Duration>,
}

/// When and how an event arrived.
#[derive(Clone, Copy, Debug)]
pub struct Arrival {
    /// By the clock that times workers out.
    pub at: Duration,
    /// Whether newer events of the same worker may have arrived before it. A worker event that is older than one of
    /// them has no effect. Otherwise the timestamps in worker events do not matter, because a host's clock may step.
    pub may_be_late: bool,
}

impl Arrival {
    /// An event that arrives after all older events.
    #[must_use]
    pub const fn in_order(at: Duration) -> Self {
        Self { at, may_be_late: false }
    }
}

/// How long `processed` must rise without a task event before the worker is reported as sending none.
const NO_TASK_EVENTS_WARNING_DELAY: Duration = Duration::from_secs(60);

/// The workers, tasks and series of a Celery deployment.
#[derive(Debug)]
pub struct State {
    names: NameInterner,
    workers: Workers,
    tasks: Tasks,
    series: SeriesTable,
    /// Worker `(other)`, which has counters and histograms but no gauges.
    other: Option<WorkerKey>,
    warned_full: bool,
    warned_unfinished: bool,
    worker_changes: WorkerChanges,
    starting_workers: StartingWorkers,
    /// The next save contains every record, not only the dirty ones.
    require_full_save: bool,
}

/// The sender of an event: a tracked hostname by its slot, or one beyond the limit.
#[derive(Clone, Copy, Debug)]
enum Source {
    Known(usize),
    Other,
}

impl State {
    /// Creates an empty state.
    #[must_use]
    pub fn new(limits: &Limits) -> Self {
        Self {
            names: NameInterner::default(),
            workers: Workers::new(limits.max_workers),
            tasks: Tasks::new(limits.max_tasks),
            series: SeriesTable::new(&limits.series),
            other: None,
            warned_full: false,
            warned_unfinished: false,
            worker_changes: WorkerChanges::default(),
            starting_workers: StartingWorkers::default(),
            require_full_save: false,
        }
    }

    /// Sets the time of start timestamps, in milliseconds since the epoch.
    pub fn set_time(&mut self, now: u64) {
        self.series.set_time(now);
    }

    /// The series of the six families.
    #[must_use]
    pub fn series(&self) -> &SeriesTable {
        &self.series
    }

    /// Number of tracked workers and clients.
    #[must_use]
    pub fn worker_count(&self) -> usize {
        self.workers.len()
    }

    /// Number of tracked tasks.
    #[must_use]
    pub fn task_count(&self) -> usize {
        self.tasks.len()
    }

    /// Number of interned task names, including the empty one.
    #[must_use]
    pub fn name_count(&self) -> usize {
        self.names.len()
    }

    /// Applies an event.
    pub fn apply(&mut self, event: &Event, arrival: Arrival) {
        if event.kind.is_task() {
            self.apply_task(event, arrival);
        } else if event.kind.is_worker() {
            self.apply_worker(event, arrival);
        } else if let Some(slot) = self.workers.find(&event.hostname) {
            self.workers[slot].last_seen = arrival.at;
        }
    }

    /// Learns the name, eta and retries of a task without counting the event. Meant for events that `events.hostnames`
    /// leaves out: the events of other workers about the same task need this metadata.
    pub fn learn_metadata(&mut self, event: &Event) {
        if event.kind.is_task() && event.kind != EventKind::TaskCustom {
            let slot = self.task_slot(&event.uuid);
            self.update_task(slot, event);
            self.tasks.move_to_list(slot);
        }
    }

    fn apply_task(&mut self, event: &Event, arrival: Arrival) {
        let is_client = event.kind == EventKind::TaskSent;
        let source = self.source(event, !is_client, arrival);
        let slot = self.task_slot(&event.uuid);
        self.tasks.get_mut(slot).is_counted = true;
        if event.kind != EventKind::TaskCustom {
            self.update_task(slot, event);
        }
        let key = self.series_key(source, slot, event);
        self.series.count_event(key, event.kind, &event.event_type);
        if event.kind == EventKind::TaskCustom {
            self.tasks.move_to_list(slot);
            return;
        }
        let runtime = event.runtime.filter(|seconds| *seconds > 0.0);
        if let Some(seconds) = runtime {
            self.series.observe_runtime(key, seconds);
        }
        self.series.keep_exemplar(key, event.kind, &self.tasks.get(slot).id, runtime);
        if let Source::Known(worker) = source {
            self.apply_transition(slot, worker, key, event);
        }
        self.tasks.move_to_list(slot);
    }

    /// Finds or adds the sender of an event, and records that it is alive.
    #[inline]
    fn source(&mut self, event: &Event, is_worker: bool, arrival: Arrival) -> Source {
        if event.hostname == OTHER {
            return Source::Other;
        }
        let Some(slot) = self.workers.find(&event.hostname).or_else(|| self.add_worker(&event.hostname, arrival.at))
        else {
            self.warn_full();
            return Source::Other;
        };
        let worker = &mut self.workers[slot];
        worker.record_event(event.timestamp, arrival);
        if is_worker && worker.presence == Presence::Client {
            worker.presence = Presence::Unconfirmed;
        }
        worker.count(event.kind, &event.event_type);
        if event.kind.is_task() {
            worker.task_event_baseline = None;
            if worker.starting_group != 0 {
                self.starting_workers.record_task_event(worker);
            }
        }
        Source::Known(slot)
    }

    fn add_worker(&mut self, hostname: &str, now: Duration) -> Option<usize> {
        if self.workers.is_full() {
            let candidate = self.workers.eviction_candidate()?;
            self.remove_worker(candidate);
        }
        let label = truncate_label(hostname);
        let key = self.series.add_worker(&label);
        let counted_as = self.series.group_of(&label).unwrap_or(key);
        Some(self.workers.add(hostname, key, counted_as, now))
    }

    fn remove_worker(&mut self, slot: usize) {
        let worker = self.workers.remove(slot);
        let Self { series, names, .. } = self;
        series.remove_worker(worker.key, |name| names.release(NameId(name)));
    }

    /// The slot of a task. Adding a new task to a full table evicts another one.
    fn task_slot(&mut self, uuid: &str) -> u32 {
        let id = TaskId::new(uuid);
        if let Some(slot) = self.tasks.find(&id) {
            self.tasks.dirty.mark(slot);
            return slot;
        }
        let (slot, evicted) = self.tasks.add(id, self.tasks.eviction_candidate());
        self.tasks.dirty.mark(slot);
        if let Some(evicted) = evicted {
            self.warn_unfinished(&evicted);
            self.forget_task(&evicted);
        }
        slot
    }

    fn warn_unfinished(&mut self, evicted: &EvictedTask) {
        if evicted.is_unfinished && !std::mem::replace(&mut self.warned_unfinished, true) {
            let max_tasks = self.tasks.max;
            tracing::warn!(max_tasks, "state.max_tasks reached; later events of evicted tasks have no task name");
        }
    }

    fn forget_task(&mut self, task: &EvictedTask) {
        self.release_entry(task.entry);
        self.finish_run(task.run);
        self.names.release(task.name);
    }

    /// Updates name, eta and retries with the values in the event. A missing name, or `name: null`, keeps the known
    /// name.
    fn update_task(&mut self, slot: u32, event: &Event) {
        let task = self.tasks.get_mut(slot);
        if let Some(name) = &event.name
            && self.names.text(task.name) != &**name
        {
            let replaced = std::mem::replace(&mut task.name, self.names.intern(name));
            self.names.release(replaced);
        }
        match &event.eta {
            Eta::Absent => {}
            Eta::None => task.eta = None,
            Eta::At(eta) => task.eta = Some(Box::new(truncate_label(eta).into())),
        }
        task.retries = event.retries.unwrap_or(task.retries);
    }

    /// The label set that an event is counted under. The task is the name in the event, or else the known name.
    fn series_key(&mut self, source: Source, slot: u32, event: &Event) -> SeriesKey {
        let worker = match source {
            Source::Known(worker) => self.workers[worker].counted_as,
            Source::Other => {
                let group = self.series.group_of(&truncate_label(&event.hostname));
                group.unwrap_or_else(|| self.other_worker())
            }
        };
        let known = self.tasks.get(slot).name;
        // `update_task` has already stored the name of every event that is not user-defined.
        let custom = match &event.name {
            Some(name) if event.kind == EventKind::TaskCustom => Some(self.names.intern(name)),
            _ => None,
        };
        let key = self.ensure_task_series(worker, custom.unwrap_or(known));
        if let Some(name) = custom {
            self.names.release(name);
        }
        key
    }

    fn ensure_task_series(&mut self, worker: WorkerKey, name: NameId) -> SeriesKey {
        let Self { series, names, .. } = self;
        if let Some(key) = series.find_task_series(worker, name.0) {
            return key;
        }
        let (key, retains_name) = series.add_task_series(worker, TaskName { id: name.0, text: names.text(name) });
        if retains_name {
            names.retain(name);
        }
        key
    }

    fn other_worker(&mut self) -> WorkerKey {
        *self.other.get_or_insert_with(|| self.series.add_worker(OTHER))
    }

    fn warn_full(&mut self) {
        if !std::mem::replace(&mut self.warned_full, true) {
            tracing::warn!(
                max_workers = self.workers.max,
                "state.max_workers reached; new hostnames are counted under worker {OTHER}"
            );
        }
    }

    /// The hostnames of workers that have processed tasks for a minute without sending a task event.
    #[must_use]
    pub fn workers_without_task_events(&self, now: Duration) -> Vec<String> {
        let is_overdue = |since| now.saturating_sub(since) >= NO_TASK_EVENTS_WARNING_DELAY;
        let sends_none = |worker: &&Worker| worker.task_events_missing_since().is_some_and(is_overdue);
        self.workers.iter().filter(sends_none).map(|worker| worker.hostname.to_string()).collect()
    }

    /// Applies the timeouts. Call this when the clock that [`State::apply`] uses has advanced.
    pub fn expire(&mut self, timeouts: &Timeouts, now: Duration) {
        for slot in timeouts.worker_timeout.map_or_else(Vec::new, |timeout| self.workers.newly_timed_out(timeout, now))
        {
            self.workers.mark_timed_out(slot);
            let worker = &self.workers[slot];
            if worker.presence != Presence::Offline {
                self.worker_changes.timed_out(&worker.hostname);
            }
            let key = worker.key;
            self.clear_prefetched(slot);
            self.series.set_worker_timed_out(key);
        }
        for slot in self.workers.purgeable(timeouts, now) {
            if self.series.shows_zero(self.workers[slot].key) {
                continue;
            }
            tracing::debug!(worker = &*self.workers[slot].hostname, "worker purged");
            self.remove_worker(slot);
        }
    }

    /// The changes of the workers' presence since the last call, for the log.
    pub fn take_worker_changes(&mut self) -> WorkerChanges {
        std::mem::take(&mut self.worker_changes)
    }

    /// Workers that have started and have not sent a task event since.
    pub fn starting_workers(&mut self) -> &mut StartingWorkers {
        &mut self.starting_workers
    }

    /// How many workers are online, and how many are not.
    #[must_use]
    pub fn worker_counts(&self) -> WorkerCounts {
        let mut counts = WorkerCounts::default();
        for worker in self.workers.iter().filter(|worker| worker.presence != Presence::Client) {
            if worker.presence == Presence::Online {
                counts.online += 1;
            } else {
                counts.offline += 1;
            }
        }
        counts
    }

    /// Records that events are missing. The prefetched tasks of every worker are cleared.
    pub fn record_gap(&mut self) {
        for slot in self.workers.forget_baselines() {
            self.clear_prefetched(slot);
        }
    }

    /// All workers, without the clients.
    #[must_use]
    pub fn workers(&self, now: Duration) -> Vec<WorkerInfo> {
        self.workers
            .iter()
            .filter(|worker| worker.presence != Presence::Client)
            .map(|worker| WorkerInfo::new(worker, now))
            .collect()
    }

    /// The task with this id.
    #[must_use]
    pub fn find_task(&self, uuid: &str) -> Option<TaskInfo> {
        self.tasks.find(&TaskId::new(uuid)).map(|slot| self.task_info(self.tasks.get(slot)))
    }

    /// At most `count` tasks from index `start`, in no particular order. Callers read all tasks in several calls; a
    /// task that is added or evicted between two calls may or may not be included.
    #[must_use]
    pub fn tasks(&self, start: usize, count: usize) -> Vec<TaskInfo> {
        self.tasks.iter_from(start).take(count).map(|task| self.task_info(task)).collect()
    }

    fn task_info(&self, task: &Task) -> TaskInfo {
        let worker = self.workers.by_id(task.worker).map(|worker| &*worker.hostname);
        TaskInfo::new(task, self.names.text(task.name), worker)
    }
}

#[cfg(test)]
mod tests;
