//! The transitions of a task from received to started to its end, and their effect on the gauges.
//!
//! With a retry countdown of 0 or with `replace()`, real workers send this order for one uuid: `started`, `received` of
//! the next run, `retried`, `started`, `succeeded`. A final event therefore ends the run and keeps the entry of the
//! next run.

use super::State;
use super::tasks::{OpenRun, PrefetchEntry, Run, TaskState};
use super::workers::{Presence, Worker};
use crate::celery::{Event, EventKind};
use crate::metrics::SeriesKey;

impl State {
    /// Applies a built-in task event of a tracked sender.
    pub(super) fn apply_transition(&mut self, slot: u32, sender: usize, key: SeriesKey, event: &Event) {
        let time = event.timestamp.unwrap_or_default();
        let worker = self.workers[sender].id;
        if event.kind != EventKind::TaskSent {
            self.tasks.get_mut(slot).worker = worker;
        }
        match event.kind {
            EventKind::TaskSent => self.tasks.get_mut(slot).sent = time,
            EventKind::TaskReceived => self.receive(slot, sender, key, time),
            EventKind::TaskStarted => self.start(slot, sender, key, time),
            EventKind::TaskSucceeded => self.end(slot, sender, TaskState::Succeeded, event),
            EventKind::TaskFailed => self.end(slot, sender, TaskState::Failed, event),
            EventKind::TaskRetried => self.end(slot, sender, TaskState::Retried, event),
            EventKind::TaskRevoked => self.end(slot, sender, TaskState::Revoked, event),
            EventKind::TaskRejected => self.end(slot, sender, TaskState::Rejected, event),
            EventKind::TaskCancelled => self.end(slot, sender, TaskState::Cancelled, event),
            _ => {}
        }
        self.ensure_series(slot, key, event.kind);
    }

    fn receive(&mut self, slot: u32, sender: usize, key: SeriesKey, time: f64) {
        let Worker { id: worker, epoch, presence, .. } = self.workers[sender];
        let is_offline = presence == Presence::Offline;
        let task = self.tasks.get_mut(slot);
        task.state = task.state.after(TaskState::Received);
        if task.started_by == worker && time <= task.started {
            // A late event of a run that has started. Flower creates a series for it nevertheless, so the time is kept.
            if task.received == 0.0 {
                task.received = time;
            }
            return;
        }
        (task.received, task.received_by) = (time, worker);
        let entry = (task.eta.is_none() && !is_offline).then_some(PrefetchEntry { worker, epoch, key });
        let replaced = std::mem::replace(&mut task.entry, entry);
        self.release_entry(replaced);
        if entry.is_some() {
            let worker = &mut self.workers[sender];
            worker.may_hold_prefetched = true;
            self.series.add_prefetched(key, worker.key);
        }
    }

    fn start(&mut self, slot: u32, sender: usize, key: SeriesKey, time: f64) {
        let worker = self.workers[sender].id;
        let task = self.tasks.get_mut(slot);
        task.state = task.state.after(TaskState::Started);
        if task.ended_by == worker && time <= task.ended {
            // A late event of a run that has ended.
            if task.run.is_none() {
                (task.started, task.started_by) = (time, worker);
            }
            return;
        }
        let replaced = task.open_run();
        (task.started, task.started_by) = (time, worker);
        let entry = task.entry.take_if(|entry| entry.worker == worker);
        let is_measured = task.eta.is_none() && task.received_by == worker && task.received != 0.0;
        let waited = (time - task.received).max(0.0);
        task.run = Some(Run { key: is_measured.then_some(key) });
        self.release_entry(entry);
        self.finish_run(replaced);
        if is_measured {
            let worker = &mut self.workers[sender];
            worker.record_start(time);
            self.series.set_prefetch_time(key, worker.key, waited);
        }
    }

    /// Applies an event that ends a run, or the wait for one. Any worker's event updates the task, but only the worker
    /// that holds the run or the prefetch entry can end it.
    fn end(&mut self, slot: u32, sender: usize, state: TaskState, event: &Event) {
        let (worker, epoch) = (self.workers[sender].id, self.workers[sender].epoch);
        let task = self.tasks.get_mut(slot);
        task.state = task.state.after(state);
        (task.ended, task.ended_by) = (event.timestamp.unwrap_or_default(), worker);
        task.runtime = event.runtime.filter(|seconds| *seconds >= 0.0).unwrap_or(task.runtime);
        let holds_entry = task.entry.is_some_and(|entry| entry.worker == worker && entry.epoch == epoch);
        let holds_run = task.run.is_some() && task.started_by == worker;
        let never_ran = state == TaskState::Revoked && !event.terminated;
        if holds_run && !(never_ran && holds_entry) {
            let run = task.open_run();
            task.run = None;
            self.finish_run(run);
        } else if holds_entry {
            let entry = task.entry.take();
            self.release_entry(entry);
        }
    }

    /// Creates the series that Flower would have touched (`PrometheusMetrics.observe_task`), at 0 unless they exist.
    fn ensure_series(&mut self, slot: u32, key: SeriesKey, kind: EventKind) {
        let task = self.tasks.get(slot);
        if task.eta.is_some() || task.received == 0.0 {
            return;
        }
        let started = task.started != 0.0;
        match kind {
            EventKind::TaskReceived => self.series.ensure_prefetched(key),
            EventKind::TaskStarted if started => {
                self.series.ensure_prefetched(key);
                self.series.ensure_prefetch_time(key);
            }
            EventKind::TaskSucceeded | EventKind::TaskFailed if started => self.series.ensure_prefetch_time(key),
            EventKind::TaskRevoked | EventKind::TaskRejected if !started => self.series.ensure_prefetched(key),
            _ => {}
        }
    }

    /// Subtracts a prefetch entry from the label set it was counted under, unless the worker's entries were cleared
    /// since.
    pub(super) fn release_entry(&mut self, entry: Option<PrefetchEntry>) {
        if let Some(entry) = entry
            && let Some(worker) = self.workers.by_id(entry.worker)
            && worker.epoch == entry.epoch
        {
            self.series.remove_prefetched(entry.key, worker.key);
        }
    }

    /// Zeroes the prefetch time that a run set, unless the worker has been idle since.
    pub(super) fn finish_run(&mut self, run: Option<OpenRun>) {
        if let Some(OpenRun { worker, started, key: Some(key) }) = run
            && let Some(worker) = self.workers.by_id(worker)
            && !worker.was_idle_after(started)
        {
            self.series.end_prefetch_time(key, worker.key);
        }
    }

    /// Ends all runs of a worker that reports at `time` that it executes nothing: some have no final event, for example
    /// after `raise Ignore()`, or their final event is missing.
    pub(super) fn finish_runs(&mut self, worker: usize, time: f64) {
        if self.workers[worker].end_runs(time) {
            self.series.reset_prefetch_times(self.workers[worker].key);
        }
    }

    /// Clears all prefetch entries of a worker by starting a new epoch.
    pub(super) fn clear_prefetched(&mut self, slot: usize) {
        let worker = &mut self.workers[slot];
        if std::mem::take(&mut worker.may_hold_prefetched) {
            worker.epoch = worker.epoch.wrapping_add(1);
            self.series.reset_prefetched(worker.key);
        }
    }
}
