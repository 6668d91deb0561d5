//! What worker events change: `worker-online`, heartbeats, `worker-offline`.

use std::time::Duration;

use super::workers::{Presence, TaskEventBaseline};
use super::{Arrival, Source, State};
use crate::celery::{Event, EventKind};

impl State {
    pub(super) fn apply_worker(&mut self, event: &Event, arrival: Arrival) {
        if arrival.may_be_late && self.is_outdated(event) {
            return;
        }
        let was_offline = self.workers.find(&event.hostname).is_some_and(|slot| self.workers[slot].is_offline());
        let Source::Known(slot) = self.source(event, true, arrival) else { return };
        let worker = &mut self.workers[slot];
        let key = worker.key;
        let decreased = matches!((worker.processed, event.processed), (Some(before), Some(after)) if after < before);
        let restarted = event.kind == EventKind::WorkerOnline || decreased;
        worker.update(event);
        let active = event.active.filter(|active| *active >= 0.0);
        match event.kind {
            EventKind::WorkerOnline | EventKind::WorkerHeartbeat => {
                if was_offline {
                    self.worker_changes.came_back(&worker.hostname);
                }
                worker.presence = Presence::Online;
                self.series.set_online(key, true);
                if event.kind == EventKind::WorkerOnline && !arrival.may_be_late {
                    self.starting_workers.record_start(worker, arrival.at);
                }
                if restarted {
                    worker.idle_at = worker.idle_at.max(event.timestamp.unwrap_or_default());
                    self.clear_prefetched(slot);
                    self.series.reset_prefetch_times(key);
                }
            }
            EventKind::WorkerOffline => {
                if worker.presence != Presence::Offline {
                    self.worker_changes.went_offline(&worker.hostname);
                }
                self.workers.mark_offline(slot);
                self.series.set_worker_offline(key, active);
                self.clear_prefetched(slot);
            }
            _ => {}
        }
        if let (EventKind::WorkerHeartbeat, Some(active)) = (event.kind, active) {
            self.series.set_executing(key, active);
            if active == 0.0
                && let Some(time) = event.timestamp
            {
                self.finish_runs(slot, time);
            }
            self.track_missing_task_events(slot, arrival.at);
        }
    }

    /// Whether a worker event is older than the last event of its worker, by the worker's clock.
    fn is_outdated(&mut self, event: &Event) -> bool {
        let slot = self.workers.find(&event.hostname);
        slot.zip(event.timestamp).is_some_and(|(slot, time)| time < self.workers[slot].last_timestamp)
    }

    /// Resets the baseline at a heartbeat, unless `processed` has risen since the baseline without a task event.
    fn track_missing_task_events(&mut self, slot: usize, now: Duration) {
        let worker = &mut self.workers[slot];
        if worker.task_events_missing_since().is_none() {
            worker.task_event_baseline = worker.processed.map(|processed| TaskEventBaseline { since: now, processed });
        }
    }
}
