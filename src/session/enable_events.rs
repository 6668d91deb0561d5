//! Broadcasts `enable_events`, so that workers that run without `-E` send task events: at each interval, and in a burst
//! after a worker has started. A worker reads broadcasts only some moments after its `worker-online`, and runs its first
//! tasks before that.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::time::sleep_until;

use super::broadcaster::Broadcaster;
use crate::celery::Broadcast;
use crate::config::Config;
use crate::inbox::WorkerStarts;
use crate::observability::WarningSource;

/// How long a burst lasts after the last worker has started.
const BURST: Duration = Duration::from_secs(6);
/// The delay after the first broadcast of a burst. It doubles with each one.
const FIRST_DELAY: Duration = Duration::from_millis(25);
/// Maximum number of broadcasts per second, however many workers start.
const MAX_PER_SECOND: usize = 10;

/// Runs until the session ends.
pub(super) async fn enable_events(
    mut broadcaster: Broadcaster<'_>,
    mut config_rx: watch::Receiver<Arc<Config>>,
    mut starts_rx: watch::Receiver<WorkerStarts>,
) -> Infallible {
    let mut schedule = Schedule::default();
    loop {
        let config = Arc::clone(&config_rx.borrow_and_update());
        schedule.record_starts(*starts_rx.borrow_and_update());
        if config.events.enable_events {
            let due = schedule.due(config.events.enable_interval);
            if due.is_none_or(|due| due <= Instant::now()) {
                broadcaster.broadcast(Broadcast::EnableEvents, &config).await;
                schedule.record_broadcast(Instant::now());
            }
        } else {
            broadcaster.health.set_warnings(WarningSource::Broadcast, Vec::new());
        }
        let due = schedule.due(config.events.enable_interval).filter(|_| config.events.enable_events);
        tokio::select! {
            () = sleep_until_or_forever(due) => {}
            changed = config_rx.changed() => wait_if_closed(changed.is_err()).await,
            changed = starts_rx.changed() => wait_if_closed(changed.is_err()).await,
        }
    }
}

async fn sleep_until_or_forever(due: Option<Instant>) {
    match due {
        Some(due) => sleep_until(due.into()).await,
        None => std::future::pending().await,
    }
}

/// The sender of a closed channel has ended, and so will the session.
async fn wait_if_closed(is_closed: bool) {
    if is_closed {
        std::future::pending::<()>().await;
    }
}

/// When the next broadcast is due.
#[derive(Debug, Default)]
struct Schedule {
    /// The times of the last broadcasts, at most `MAX_PER_SECOND`.
    sent: VecDeque<Instant>,
    burst: Option<Burst>,
    /// The start of a worker that the burst answers.
    answered: Option<Instant>,
}

#[derive(Debug)]
struct Burst {
    ends: Instant,
    next: Instant,
    delay: Duration,
}

impl Schedule {
    /// Begins a burst if a worker has started, and ends it if all workers send task events.
    fn record_starts(&mut self, starts: WorkerStarts) {
        match starts.last {
            None => self.burst = None,
            Some(last) if self.answered != Some(last) => {
                self.answered = Some(last);
                self.burst = Some(Burst { ends: last + BURST, next: last, delay: FIRST_DELAY });
            }
            Some(_) => {}
        }
    }

    fn record_broadcast(&mut self, now: Instant) {
        self.sent.truncate(MAX_PER_SECOND - 1);
        self.sent.push_front(now);
        if let Some(burst) = &mut self.burst {
            burst.next = now + burst.delay;
            burst.delay *= 2;
        }
        self.burst.take_if(|burst| burst.next >= burst.ends);
    }

    /// `None` if a broadcast is due because there was none.
    fn due(&self, interval: Duration) -> Option<Instant> {
        let last = *self.sent.front()?;
        let due = self.burst.as_ref().map_or(last + interval, |burst| burst.next.min(last + interval));
        let allowed = self.sent.get(MAX_PER_SECOND - 1).map(|tenth| *tenth + Duration::from_secs(1));
        Some(allowed.map_or(due, |allowed| due.max(allowed)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INTERVAL: Duration = Duration::from_secs(5);

    /// The broadcasts of the first ten seconds, in milliseconds. `starts` are the times at which workers start.
    fn broadcasts(starts: &[u64], all_enabled_at: Option<u64>) -> Vec<u64> {
        let began = Instant::now();
        let at = |millis| began + Duration::from_millis(millis);
        let mut schedule = Schedule::default();
        let mut sent = Vec::new();
        for now in 0..10_000 {
            let last = starts.iter().rev().find(|start| **start <= now).map(|start| at(*start));
            let last = last.filter(|_| all_enabled_at.is_none_or(|enabled| now < enabled));
            schedule.record_starts(WorkerStarts { last });
            if schedule.due(INTERVAL).is_none_or(|due| due <= at(now)) {
                schedule.record_broadcast(at(now));
                sent.push(now);
            }
        }
        sent
    }

    #[test]
    fn without_starts_the_interval_counts() {
        assert_eq!(broadcasts(&[], None), [0, 5000]);
    }

    #[test]
    fn a_start_is_answered_at_once_and_with_doubling_delays_for_six_seconds() {
        assert_eq!(broadcasts(&[1000], None), [0, 1000, 1025, 1075, 1175, 1375, 1775, 2575, 4175, 9175]);
    }

    #[test]
    fn the_burst_ends_when_all_workers_send_task_events() {
        assert_eq!(broadcasts(&[1000], Some(1250)), [0, 1000, 1025, 1075, 1175, 6175]);
    }

    #[test]
    fn a_burst_ends_although_the_worker_stays_idle() {
        let began = Instant::now();
        let mut schedule = Schedule::default();
        for second in 0..10_000 {
            schedule.record_starts(WorkerStarts { last: Some(began) });
            schedule.record_broadcast(began + Duration::from_secs(second));
        }
        assert!(schedule.burst.is_none());
    }

    #[test]
    fn many_starts_cause_at_most_ten_broadcasts_per_second() {
        let starts: Vec<u64> = (1000..3000).step_by(7).collect();
        let sent = broadcasts(&starts, None);
        assert!(sent.windows(MAX_PER_SECOND + 1).all(|eleven| eleven[MAX_PER_SECOND] - eleven[0] >= 1000), "{sent:?}");
        assert!(sent.iter().filter(|at| (1000..3000).contains(*at)).count() >= 19, "{sent:?}");
    }
}
