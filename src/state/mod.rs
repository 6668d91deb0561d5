//! The cluster as its events tell it: workers, tasks, and the series they move. Bounded, and pure: time is passed in.
//!
//! The rules follow Celery's `celery.events.state` and Flower's `flower/events.py`, and differ from them on purpose
//! where the README's table says so. Prefetched tasks are a set: each task holds at most one entry, and each
//! gauge is the number of entries that were counted under it and are still there.

mod names;
mod prefetch;
mod saved;
mod tasks;
mod workers;

use std::time::Duration;

use names::{NameId, Names};
use tasks::{Task, TaskId, Tasks};
use workers::{Mute, Presence, Workers};

pub use saved::{Changes, Corrupt, FORMAT, Restoring, Rows};
pub use tasks::{TaskState, TaskView};
pub use workers::{WorkerId, WorkerView};

use crate::celery::event::Eta;
use crate::celery::{Event, EventKind, cut};
use crate::metrics::{OTHER, PairId, Series, TaskLabel, WorkerRow};

/// The bounds of a [`State`].
#[derive(Clone, Debug)]
pub struct Limits {
    /// Hostnames held; further ones are recorded under worker `(other)` if none can give way.
    pub max_workers: usize,
    /// Tasks held; finished ones give way first.
    pub max_tasks: usize,
    /// (worker, task) pairs before `(other)`.
    pub max_label_pairs: usize,
    /// Upper bounds of the runtime histogram in seconds, ascending, without `+Inf`.
    pub buckets: Vec<f64>,
}

/// How long silence is borne. `None` is for ever.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Timeouts {
    /// Nothing heard: the worker is offline.
    pub worker_timeout: Option<Duration>,
    /// Nothing heard: its series are removed.
    pub purge_offline_workers: Option<Duration>,
}

/// How long `processed` must have been rising without a task event before a worker is called mute.
const MUTE_AFTER: Duration = Duration::from_secs(60);

/// Everything that is known of the cluster.
#[derive(Debug)]
pub struct State {
    names: Names,
    workers: Workers,
    tasks: Tasks,
    series: Series,
    /// The row of worker `(other)`, which has totals and no gauges.
    other: Option<WorkerRow>,
    said_full: bool,
    /// All rows are to be saved, not only those that are marked.
    save_all: bool,
}

/// Who sent an event: a worker we hold, or one of those beyond the bound.
#[derive(Clone, Copy, Debug)]
enum Sender {
    Known(usize),
    Other,
}

impl State {
    /// An empty state.
    #[must_use]
    pub fn new(limits: &Limits) -> Self {
        Self {
            names: Names::default(),
            workers: Workers::new(limits.max_workers),
            tasks: Tasks::new(limits.max_tasks),
            series: Series::new(&limits.buckets, limits.max_label_pairs),
            other: None,
            said_full: false,
            save_all: false,
        }
    }

    /// The series of the six families.
    #[must_use]
    pub fn series(&self) -> &Series {
        &self.series
    }

    /// How many workers and clients are held.
    #[must_use]
    pub fn worker_count(&self) -> usize {
        self.workers.len()
    }

    /// How many tasks are held.
    #[must_use]
    pub fn task_count(&self) -> usize {
        self.tasks.len()
    }

    /// How many task names are held.
    #[must_use]
    pub fn name_count(&self) -> usize {
        self.names.len()
    }

    /// Takes an event into account. `now` is a clock that only ever rises and runs only while we listen.
    pub fn apply(&mut self, event: &Event, now: Duration) {
        if event.kind.is_task() {
            self.apply_task(event, now);
        } else if event.kind.is_worker() {
            self.apply_worker(event, now);
        } else if let Some(slot) = self.workers.find(&event.hostname) {
            self.workers[slot].heard = now;
        }
    }

    /// Learns what other workers' events of a task depend on, and counts nothing: for events that
    /// `events.hostnames` leaves out.
    pub fn learn_name(&mut self, event: &Event) {
        if event.kind.is_task() && event.kind != EventKind::TaskCustom {
            let slot = self.task(&event.uuid);
            self.learn_task(slot, event);
            self.tasks.relist(slot);
        }
    }

    fn apply_task(&mut self, event: &Event, now: Duration) {
        let is_client = event.kind == EventKind::TaskSent;
        let sender = self.sender(event, !is_client, now);
        let slot = self.task(&event.uuid);
        self.tasks.get_mut(slot).is_ours = true;
        if event.kind != EventKind::TaskCustom {
            self.learn_task(slot, event);
        }
        let pair = self.pair(sender, slot, event);
        self.series.count_event(pair, event.kind, &event.name_of_type);
        if event.kind == EventKind::TaskCustom {
            self.tasks.relist(slot);
            return;
        }
        if let Some(seconds) = event.runtime.filter(|seconds| *seconds > 0.0) {
            self.series.observe_runtime(pair, seconds);
        }
        if let Sender::Known(worker) = sender {
            self.move_task(slot, worker, pair, event);
        }
        self.tasks.relist(slot);
    }

    /// The sender of an event, heard now.
    #[inline]
    fn sender(&mut self, event: &Event, is_worker: bool, now: Duration) -> Sender {
        if event.hostname == OTHER {
            return Sender::Other;
        }
        let Some(slot) = self.workers.find(&event.hostname).or_else(|| self.add_worker(&event.hostname, now)) else {
            self.warn_full();
            return Sender::Other;
        };
        let worker = &mut self.workers[slot];
        worker.heard = now;
        worker.lost = false;
        if is_worker && worker.presence == Presence::Client {
            worker.presence = Presence::Worker;
        }
        worker.count(&event.name_of_type);
        if event.kind.is_task() {
            worker.mute = None;
        }
        Sender::Known(slot)
    }

    fn add_worker(&mut self, hostname: &str, now: Duration) -> Option<usize> {
        if self.workers.is_full() {
            let victim = self.workers.victim()?;
            self.remove_worker(victim);
        }
        let row = self.series.add_worker(&cut(hostname));
        Some(self.workers.add(hostname, row, now))
    }

    fn remove_worker(&mut self, slot: usize) {
        let worker = self.workers.remove(slot);
        let Self { series, names, .. } = self;
        series.remove_worker(worker.row, |name| names.release(NameId(name)));
    }

    /// The slot of a task; a new one may cost the oldest finished one its place.
    fn task(&mut self, uuid: &str) -> u32 {
        let id = TaskId::of(uuid);
        if let Some(slot) = self.tasks.find(&id) {
            self.tasks.marks.mark(slot);
            return slot;
        }
        let (slot, gone) = self.tasks.add(id, self.tasks.victim());
        self.tasks.marks.mark(slot);
        if let Some(gone) = gone {
            self.forget_task(&gone);
        }
        slot
    }

    fn forget_task(&mut self, task: &Task) {
        self.drop_entry(task.entry);
        self.close_run(task.run);
        self.names.release(task.name);
    }

    /// Name, eta and retries of a task, as far as the event tells them. `name: null` tells no name.
    fn learn_task(&mut self, slot: u32, event: &Event) {
        let task = self.tasks.get_mut(slot);
        if let Some(name) = &event.name
            && self.names.text(task.name) != &**name
        {
            let forgotten = std::mem::replace(&mut task.name, self.names.hold_text(name));
            self.names.release(forgotten);
        }
        match &event.eta {
            Eta::Absent => {}
            Eta::None => task.eta = None,
            Eta::At(eta) => task.eta = Some(Box::new(cut(eta).into())),
        }
        task.retries = event.retries.unwrap_or(task.retries);
    }

    /// The pair an event is counted under: the event's own name, else the remembered one.
    fn pair(&mut self, sender: Sender, slot: u32, event: &Event) -> PairId {
        let row = match sender {
            Sender::Known(worker) => self.workers[worker].row,
            Sender::Other => self.other_row(),
        };
        let remembered = self.tasks.get(slot).name;
        // All but user-defined events have just taught their name.
        let foreign = match &event.name {
            Some(name) if event.kind == EventKind::TaskCustom => Some(self.names.hold_text(name)),
            _ => None,
        };
        let name = foreign.unwrap_or(remembered);
        let pair = self.pair_of(row, name);
        if let Some(name) = foreign {
            self.names.release(name);
        }
        pair
    }

    fn pair_of(&mut self, row: WorkerRow, name: NameId) -> PairId {
        let Self { series, names, .. } = self;
        if let Some(pair) = series.find_pair(row, name.0) {
            return pair;
        }
        let (pair, held) = series.add_pair(row, TaskLabel { id: name.0, text: names.text(name) });
        if held {
            names.hold(name);
        }
        pair
    }

    fn other_row(&mut self) -> WorkerRow {
        *self.other.get_or_insert_with(|| self.series.add_worker(OTHER))
    }

    fn warn_full(&mut self) {
        if !std::mem::replace(&mut self.said_full, true) {
            tracing::warn!("the hostnames reached state.max_workers: new ones are recorded under worker {OTHER}");
        }
    }

    fn apply_worker(&mut self, event: &Event, now: Duration) {
        let Sender::Known(slot) = self.sender(event, true, now) else { return };
        let worker = &mut self.workers[slot];
        let row = worker.row;
        let fallen = matches!((worker.processed, event.processed), (Some(before), Some(after)) if after < before);
        let restarted = event.kind == EventKind::WorkerOnline || fallen;
        worker.learn(event);
        let active = event.active.filter(|active| *active >= 0.0);
        match event.kind {
            EventKind::WorkerOnline | EventKind::WorkerHeartbeat => {
                worker.presence = Presence::Online;
                self.series.set_online(row, true);
                if restarted {
                    self.empty_set(slot);
                    self.series.zero_prefetch_times(row);
                }
            }
            EventKind::WorkerOffline => {
                self.workers.leave(slot);
                self.series.say_goodbye(row, active);
                self.empty_set(slot);
            }
            _ => {}
        }
        if let (EventKind::WorkerHeartbeat, Some(active)) = (event.kind, active) {
            self.series.set_executing(row, active);
            if active == 0.0 && std::mem::take(&mut self.workers[slot].doubtful) {
                // What ran before the gap has ended in it.
                self.series.zero_prefetch_times(row);
            }
            self.watch_mute(slot, now);
        }
    }

    /// Remembers since when a worker's `processed` rises without a task event.
    fn watch_mute(&mut self, slot: usize, now: Duration) {
        let worker = &mut self.workers[slot];
        let rising = matches!((&worker.mute, worker.processed), (Some(mute), Some(now)) if now > mute.processed);
        if !rising {
            worker.mute = worker.processed.map(|processed| Mute { since: now, processed });
        }
    }

    /// The hostnames of the workers that have processed tasks for a minute without sending an event of one.
    #[must_use]
    pub fn mute_workers(&self, now: Duration) -> Vec<String> {
        let is_mute = |worker: &&workers::Worker| {
            matches!((&worker.mute, worker.processed), (Some(mute), Some(processed))
                if processed > mute.processed && now.saturating_sub(mute.since) >= MUTE_AFTER)
        };
        self.workers.iter().filter(is_mute).map(|worker| worker.hostname.to_string()).collect()
    }

    /// Applies the timeouts. To be called a few times a second with the same clock as the events.
    pub fn sweep(&mut self, timeouts: &Timeouts, now: Duration) {
        for slot in timeouts.worker_timeout.map_or_else(Vec::new, |timeout| self.workers.silent(timeout, now)) {
            self.workers.lose(slot);
            let worker = &self.workers[slot];
            if worker.presence != Presence::Offline {
                tracing::info!(worker = &*worker.hostname, "nothing heard from a worker for its timeout: offline");
            }
            let row = worker.row;
            self.empty_set(slot);
            self.series.lose_worker(row);
        }
        let old = |age| self.workers.older_than(age, timeouts.worker_timeout, now);
        for slot in timeouts.purge_offline_workers.map_or_else(Vec::new, old) {
            tracing::debug!(worker = &*self.workers[slot].hostname, "purged");
            self.remove_worker(slot);
        }
    }

    /// Events are known to be missing: every set of prefetched tasks starts empty.
    pub fn gap(&mut self) {
        for slot in self.workers.doubt() {
            self.empty_set(slot);
        }
    }

    /// All workers, and no clients.
    #[must_use]
    pub fn workers(&self, now: Duration) -> Vec<WorkerView> {
        self.workers
            .iter()
            .filter(|worker| worker.presence != Presence::Client)
            .map(|worker| WorkerView::of(worker, now))
            .collect()
    }

    /// One task by its id.
    #[must_use]
    pub fn find_task(&self, uuid: &str) -> Option<TaskView> {
        self.tasks.find(&TaskId::of(uuid)).map(|slot| self.view(self.tasks.get(slot)))
    }

    /// The tasks from place `start` on, at most `count`: for reading all of them in slices. In no particular order; a
    /// task that comes or goes between two slices is in them or not.
    #[must_use]
    pub fn tasks(&self, start: usize, count: usize) -> Vec<TaskView> {
        self.tasks.iter_from(start).take(count).map(|task| self.view(task)).collect()
    }

    fn view(&self, task: &Task) -> TaskView {
        let worker = self.workers.by_id(task.worker).map(|worker| &*worker.hostname);
        TaskView::of(task, self.names.text(task.name), worker)
    }
}

#[cfg(test)]
mod tests;
