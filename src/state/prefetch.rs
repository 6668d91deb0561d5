//! How a task moves from received to started to its end, and what that does to the gauges.
//!
//! Seen on real workers, with a retry countdown of 0 or with `replace()`: `started, received of the next run, retried,
//! started, succeeded`, all of one uuid. So an end closes the run first and leaves the next run's entry alone.

use super::State;
use super::tasks::{Entry, Run, TaskState};
use super::workers::{Presence, Worker, WorkerId};
use crate::celery::{Event, EventKind};
use crate::metrics::PairId;

impl State {
    /// Applies a built-in task event of a known sender.
    pub(super) fn move_task(&mut self, slot: u32, sender: usize, pair: PairId, event: &Event) {
        let time = event.timestamp.unwrap_or_default();
        let worker = self.workers[sender].id;
        if event.kind != EventKind::TaskSent {
            self.tasks.get_mut(slot).worker = worker;
        }
        match event.kind {
            EventKind::TaskSent => self.tasks.get_mut(slot).sent = time,
            EventKind::TaskReceived => self.receive(slot, sender, pair, time),
            EventKind::TaskStarted => self.start(slot, worker, pair, time),
            EventKind::TaskSucceeded => self.end(slot, sender, TaskState::Succeeded, event),
            EventKind::TaskFailed => self.end(slot, sender, TaskState::Failed, event),
            EventKind::TaskRetried => self.end(slot, sender, TaskState::Retried, event),
            EventKind::TaskRevoked => self.end(slot, sender, TaskState::Revoked, event),
            EventKind::TaskRejected => self.end(slot, sender, TaskState::Rejected, event),
            EventKind::TaskCancelled => self.end(slot, sender, TaskState::Cancelled, event),
            _ => {}
        }
        self.show_series(slot, pair, event.kind);
    }

    fn receive(&mut self, slot: u32, sender: usize, pair: PairId, time: f64) {
        let Worker { id: worker, epoch, presence, .. } = self.workers[sender];
        let gone = presence == Presence::Offline;
        let task = self.tasks.get_mut(slot);
        task.state = task.state.after(TaskState::Received);
        if task.started_by == worker && time <= task.started {
            // Late news of a run that has begun. Flower shows a series for it all the same.
            if task.received == 0.0 {
                task.received = time;
            }
            return;
        }
        (task.received, task.received_by) = (time, worker);
        let entry = (task.eta.is_none() && !gone).then_some(Entry { worker, epoch, pair });
        let moved = std::mem::replace(&mut task.entry, entry);
        self.drop_entry(moved);
        if entry.is_some() {
            self.workers[sender].holds = true;
            self.series.add_prefetched(pair);
        }
    }

    fn start(&mut self, slot: u32, worker: WorkerId, pair: PairId, time: f64) {
        let task = self.tasks.get_mut(slot);
        task.state = task.state.after(TaskState::Started);
        (task.started, task.started_by) = (time, worker);
        let closed = task.entry.take_if(|entry| entry.worker == worker);
        let measured = task.eta.is_none() && task.received_by == worker && task.received != 0.0;
        let waited = (time - task.received).max(0.0);
        let run = Run { worker, pair: measured.then_some(pair) };
        let replaced = task.run.replace(run);
        self.drop_entry(closed);
        self.close_run(replaced);
        if measured {
            self.series.set_prefetch_time(pair, waited);
        }
    }

    /// The end of a run, or of the wait for one, told by the worker that holds the task.
    fn end(&mut self, slot: u32, sender: usize, state: TaskState, event: &Event) {
        let (worker, epoch) = (self.workers[sender].id, self.workers[sender].epoch);
        let task = self.tasks.get_mut(slot);
        task.state = task.state.after(state);
        task.ended = event.timestamp.unwrap_or_default();
        task.runtime = event.runtime.filter(|seconds| *seconds >= 0.0).unwrap_or(task.runtime);
        let holds_entry = task.entry.is_some_and(|entry| entry.worker == worker && entry.epoch == epoch);
        let holds_run = task.run.is_some_and(|run| run.worker == worker);
        let never_ran = state == TaskState::Revoked && !event.terminated;
        if holds_run && !(never_ran && holds_entry) {
            let run = task.run.take();
            self.close_run(run);
        } else if holds_entry {
            let entry = task.entry.take();
            self.drop_entry(entry);
        }
    }

    /// Lets the series appear that Flower would have touched, at 0 unless they are there
    /// (`PrometheusMetrics.observe_task`).
    fn show_series(&mut self, slot: u32, pair: PairId, kind: EventKind) {
        let task = self.tasks.get(slot);
        if task.eta.is_some() || task.received == 0.0 {
            return;
        }
        let started = task.started != 0.0;
        match kind {
            EventKind::TaskReceived => self.series.touch_prefetched(pair),
            EventKind::TaskStarted if started => {
                self.series.touch_prefetched(pair);
                self.series.touch_prefetch_time(pair);
            }
            EventKind::TaskSucceeded | EventKind::TaskFailed if started => self.series.touch_prefetch_time(pair),
            EventKind::TaskRevoked | EventKind::TaskRejected if !started => self.series.touch_prefetched(pair),
            _ => {}
        }
    }

    /// An entry leaves its set, under the name it came with, unless the set was emptied since.
    pub(super) fn drop_entry(&mut self, entry: Option<Entry>) {
        if let Some(entry) = entry
            && self.workers.by_id(entry.worker).is_some_and(|worker| worker.epoch == entry.epoch)
        {
            self.series.remove_prefetched(entry.pair);
        }
    }

    /// A run is over: the prefetch time it set goes to 0.
    pub(super) fn close_run(&mut self, run: Option<Run>) {
        if let Some(Run { worker, pair: Some(pair) }) = run
            && self.workers.by_id(worker).is_some()
        {
            self.series.set_prefetch_time(pair, 0.0);
        }
    }

    /// Every entry of a worker is gone at once.
    pub(super) fn empty_set(&mut self, slot: usize) {
        let worker = &mut self.workers[slot];
        if std::mem::take(&mut worker.holds) {
            worker.epoch = worker.epoch.wrapping_add(1);
            self.series.empty_prefetched(worker.row);
        }
    }
}
