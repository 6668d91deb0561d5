//! Workers that have started and have not sent a task event since. Those that run without `-E` send none until they have
//! received `enable_events`.

use std::time::Duration;

use super::workers::Worker;

/// Workers that start within this time of each other belong together. Afterwards, a worker without a task event is
/// taken to be idle.
const TOGETHER: Duration = Duration::from_secs(6);

/// How many workers of the latest group have not sent a task event.
#[derive(Debug, Default)]
pub struct StartingWorkers {
    /// The number of the group, from 1.
    group: u32,
    count: usize,
    last_start: Duration,
    has_changed: bool,
}

impl StartingWorkers {
    /// Records `worker-online`.
    pub(super) fn record_start(&mut self, worker: &mut Worker, now: Duration) {
        if self.count == 0 || now.saturating_sub(self.last_start) > TOGETHER {
            self.group = self.group.wrapping_add(1).max(1);
            self.count = 0;
        }
        if worker.starting_group != self.group {
            worker.starting_group = self.group;
            self.count += 1;
        }
        self.last_start = now;
        self.has_changed = true;
    }

    /// Records the first task event of a worker that has started.
    #[cold]
    pub(super) fn record_task_event(&mut self, worker: &mut Worker) {
        if worker.starting_group == self.group && self.count > 0 {
            self.count -= 1;
            self.has_changed |= self.count == 0;
        }
        worker.starting_group = 0;
    }

    /// Whether any worker of the latest group has not sent a task event yet. `None` if nothing has changed since the
    /// last call.
    pub fn take_change(&mut self) -> Option<bool> {
        std::mem::take(&mut self.has_changed).then_some(self.count > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::{SeriesOptions, SeriesTable};
    use crate::state::workers::WorkerId;

    const SECOND: Duration = Duration::from_secs(1);

    fn worker() -> Worker {
        let key = SeriesTable::new(&SeriesOptions::default()).add_worker("w");
        Worker::new(WorkerId::NONE, "w", key, key, Duration::ZERO)
    }

    #[test]
    fn a_group_is_done_when_each_worker_has_sent_a_task_event() {
        let (mut starting, mut a, mut b) = (StartingWorkers::default(), worker(), worker());
        starting.record_start(&mut a, SECOND);
        assert_eq!(starting.take_change(), Some(true));
        starting.record_start(&mut b, SECOND * 2);
        starting.record_start(&mut b, SECOND * 3);
        assert_eq!((starting.take_change(), starting.take_change()), (Some(true), None));
        starting.record_task_event(&mut a);
        assert_eq!(starting.take_change(), None);
        starting.record_task_event(&mut b);
        assert_eq!(starting.take_change(), Some(false));
    }

    #[test]
    fn an_idle_worker_of_an_earlier_group_keeps_no_later_group_open() {
        let (mut starting, mut idle, mut busy) = (StartingWorkers::default(), worker(), worker());
        starting.record_start(&mut idle, SECOND);
        starting.record_start(&mut busy, SECOND * 10);
        assert_eq!(starting.take_change(), Some(true));
        starting.record_task_event(&mut busy);
        assert_eq!(starting.take_change(), Some(false));
        starting.record_task_event(&mut idle);
        assert_eq!(starting.take_change(), None);
    }
}
