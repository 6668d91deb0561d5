//! The state behind `/healthz`. Written by the session, the ingest loop and the store; read by HTTP.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use super::losses::{LossSummary, Losses};

/// Why the clock is paused without a subscription.
pub(crate) const NOT_SUBSCRIBED: &str = "not subscribed to the broker";
/// A loop that has not run for this long is stalled.
const STALL_LIMIT: Duration = Duration::from_secs(30);

/// The state of the session with the broker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum BrokerStatus {
    /// Not subscribed; connecting.
    Connecting,
    /// Another exporter consumes the named queue. This one takes over once that is gone.
    Standby,
    /// The server has confirmed the subscription.
    Connected,
    /// The exporter is stopping or has stopped.
    Stopped,
}

impl BrokerStatus {
    /// The value of `broker.state` in `/healthz`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Connecting => "connecting",
            Self::Standby => "standby",
            Self::Connected => "connected",
            Self::Stopped => "stopped",
        }
    }
}

/// The exporter's health. No method blocks for longer than a lock is held.
#[derive(Debug)]
pub struct Health {
    started: Instant,
    state: Mutex<HealthState>,
    /// In milliseconds since `started`; 0 for never.
    last_event: AtomicU64,
    /// In milliseconds since `started`; 0 for never.
    last_ingest_tick: AtomicU64,
    /// In milliseconds since `started`; 0 for never.
    last_session_tick: AtomicU64,
    queued_batches: AtomicUsize,
    failed: AtomicBool,
}

/// The component that a warning comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WarningSource {
    /// The ingest loop.
    Ingest,
    /// The queue at the broker.
    Queue,
    /// Broadcasts to the workers.
    Broadcast,
    /// The store.
    Store,
    /// The web configuration file.
    Web,
    /// The log.
    #[cfg_attr(not(feature = "cli"), allow(dead_code, reason = "only the daemon writes the log"))]
    Log,
}

/// The session with the broker, for `/healthz`.
#[derive(Clone, Debug)]
pub(crate) struct BrokerReport {
    pub(crate) status: BrokerStatus,
    /// When this status began.
    pub(crate) since: SystemTime,
    /// The last error of a connection, without secrets, and its time.
    pub(crate) last_error: Option<(String, SystemTime)>,
    /// The subscription in the broker's terms, while there is one.
    pub(crate) subscription: Option<String>,
}

/// The clock that times workers out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ClockStatus {
    Running,
    Paused { since: SystemTime, reason: String },
}

/// How many workers are online and offline.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WorkerCounts {
    /// Workers that have sent `worker-online` or a heartbeat, and have neither gone offline nor timed out since.
    pub online: usize,
    /// All others.
    pub offline: usize,
}

/// The saved state.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SavedStateStatus {
    pub(crate) is_failing: bool,
    pub(crate) last_save: Option<SystemTime>,
}

#[derive(Debug)]
struct HealthState {
    broker: BrokerReport,
    clock: ClockStatus,
    workers: WorkerCounts,
    losses: Losses,
    /// `None` without `state.persistent`.
    saved_state: Option<SavedStateStatus>,
    /// By [`WarningSource`].
    warnings: [Vec<String>; 6],
    /// Why events may not arrive although there is a subscription, if that is known.
    event_path_problem: Option<String>,
}

impl Default for Health {
    fn default() -> Self {
        Self {
            started: Instant::now(),
            state: Mutex::new(HealthState {
                broker: BrokerReport {
                    status: BrokerStatus::Connecting,
                    since: SystemTime::now(),
                    last_error: None,
                    subscription: None,
                },
                clock: ClockStatus::Paused { since: SystemTime::now(), reason: NOT_SUBSCRIBED.to_owned() },
                workers: WorkerCounts::default(),
                losses: Losses::default(),
                saved_state: None,
                warnings: [const { Vec::new() }; 6],
                event_path_problem: None,
            }),
            last_event: AtomicU64::new(0),
            last_ingest_tick: AtomicU64::new(0),
            last_session_tick: AtomicU64::new(0),
            queued_batches: AtomicUsize::new(0),
            failed: AtomicBool::new(false),
        }
    }
}

impl Health {
    fn state(&self) -> MutexGuard<'_, HealthState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn milliseconds(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX).max(1)
    }

    /// Sets the state of the session.
    pub(crate) fn set_broker(&self, status: BrokerStatus) {
        let broker = &mut self.state().broker;
        if broker.status != status {
            (broker.status, broker.since) = (status, SystemTime::now());
            broker.subscription = None;
        }
    }

    /// Sets the state of the session to connected, with this subscription.
    pub(crate) fn set_subscribed(&self, subscription: String) {
        self.set_broker(BrokerStatus::Connected);
        self.state().broker.subscription = Some(subscription);
    }

    /// Records why a connection failed or ended.
    pub(crate) fn record_broker_error(&self, error: String) {
        self.state().broker.last_error = Some((error, SystemTime::now()));
    }

    /// The state of the session.
    #[must_use]
    pub fn broker(&self) -> BrokerStatus {
        self.state().broker.status
    }

    pub(crate) fn broker_report(&self) -> BrokerReport {
        self.state().broker.clone()
    }

    /// Sets why the clock that times workers out is paused, or that it runs.
    pub(crate) fn set_clock_paused(&self, reason: Option<String>) {
        let clock = &mut self.state().clock;
        *clock = match (reason, &clock) {
            (None, _) => ClockStatus::Running,
            (Some(reason), ClockStatus::Paused { since, .. }) => ClockStatus::Paused { since: *since, reason },
            (Some(reason), ClockStatus::Running) => ClockStatus::Paused { since: SystemTime::now(), reason },
        };
    }

    pub(crate) fn clock(&self) -> ClockStatus {
        self.state().clock.clone()
    }

    pub(crate) fn set_workers(&self, workers: WorkerCounts) {
        self.state().workers = workers;
    }

    pub(crate) fn workers(&self) -> WorkerCounts {
        self.state().workers
    }

    pub(crate) fn record_loss(&self, loss: &LossSummary) {
        self.state().losses.record(Instant::now(), loss);
    }

    /// The losses of the last 15 minutes, by cause.
    pub(crate) fn losses(&self) -> Vec<LossSummary> {
        self.state().losses.summaries(Instant::now())
    }

    /// Records that the state is saved, and when it was saved last.
    pub(crate) fn record_save(&self, last_save: Option<SystemTime>) {
        self.state().saved_state = Some(SavedStateStatus { is_failing: false, last_save });
    }

    /// The saved state. `None` without `state.persistent`.
    pub(crate) fn saved_state(&self) -> Option<SavedStateStatus> {
        let state = self.state();
        let is_failing = !state.warnings[WarningSource::Store as usize].is_empty();
        state.saved_state.map(|saved| SavedStateStatus { is_failing, ..saved })
    }

    pub(crate) fn uptime(&self) -> Duration {
        self.started.elapsed()
    }

    /// Replaces the warnings of a component, and logs those that are new.
    pub(crate) fn set_warnings(&self, source: WarningSource, warnings: Vec<String>) {
        let before = self.state().warnings[source as usize].clone();
        for warning in warnings.iter().filter(|warning| !before.contains(warning)) {
            tracing::warn!("{warning}");
        }
        self.set_unlogged_warnings(source, warnings);
    }

    /// Replaces the warnings of a component, which has logged them itself.
    pub(crate) fn set_unlogged_warnings(&self, source: WarningSource, warnings: Vec<String>) {
        self.state().warnings[source as usize] = warnings;
    }

    /// Sets why events may not arrive although there is a subscription, or clears it.
    pub(crate) fn set_event_path_problem(&self, problem: Option<String>) {
        self.state().event_path_problem = problem;
    }

    /// Why events may not arrive although there is a subscription, if that is known.
    pub(crate) fn event_path_problem(&self) -> Option<String> {
        self.state().event_path_problem.clone()
    }

    /// Ongoing conditions that need the operator's attention.
    #[must_use]
    pub fn warnings(&self) -> Vec<String> {
        self.state().warnings.concat()
    }

    /// Records that events were processed.
    pub(crate) fn record_event(&self) {
        self.last_event.store(self.milliseconds(), Ordering::Relaxed);
    }

    /// Time since the last event was processed. `None` before the first one.
    #[must_use]
    pub fn since_last_event(&self) -> Option<Duration> {
        match self.last_event.load(Ordering::Relaxed) {
            0 => None,
            _ => Some(self.since(&self.last_event)),
        }
    }

    /// Records that the ingest loop runs.
    pub(crate) fn ingest_tick(&self) {
        self.last_ingest_tick.store(self.milliseconds(), Ordering::Relaxed);
    }

    /// Records that the session's thread runs.
    pub(crate) fn session_tick(&self) {
        self.last_session_tick.store(self.milliseconds(), Ordering::Relaxed);
    }

    /// Records that a batch was put into the inbox.
    pub(crate) fn batch_enqueued(&self) {
        self.queued_batches.fetch_add(1, Ordering::Relaxed);
    }

    /// Records that a batch was processed.
    pub(crate) fn batch_processed(&self) {
        self.queued_batches.fetch_sub(1, Ordering::Relaxed);
    }

    /// Records that a component ended although it should run.
    pub(crate) fn mark_failed(&self) {
        self.failed.store(true, Ordering::Relaxed);
    }

    /// Whether events can still be processed. If not, `/healthz` returns 503.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        self.failure_reason().is_none()
    }

    /// Why events cannot be processed any more.
    pub(crate) fn failure_reason(&self) -> Option<String> {
        let has_work = self.queued_batches.load(Ordering::Relaxed) > 0;
        let is_stopped = self.broker() == BrokerStatus::Stopped;
        let reason = if self.failed.load(Ordering::Relaxed) {
            "a component has failed: see the log"
        } else if has_work && self.since(&self.last_ingest_tick) > STALL_LIMIT {
            "the ingest loop has not run for 30 s with work waiting"
        } else if !is_stopped && self.since(&self.last_session_tick) > STALL_LIMIT {
            "the session loop has not run for 30 s"
        } else {
            return None;
        };
        Some(reason.to_owned())
    }

    /// Whether every component runs, and the session loop and the ingest loop ran within `limit`. They run at least
    /// every five seconds.
    #[must_use]
    #[cfg_attr(not(feature = "cli"), allow(dead_code, reason = "only the daemon has a watchdog"))]
    pub(crate) fn has_ticked_within(&self, limit: Duration) -> bool {
        let since = self.since(&self.last_ingest_tick).max(self.since(&self.last_session_tick));
        since < limit && !self.failed.load(Ordering::Relaxed)
    }

    fn since(&self, moment: &AtomicU64) -> Duration {
        Duration::from_millis(self.milliseconds().saturating_sub(moment.load(Ordering::Relaxed)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Health of an exporter that was started this long ago.
    fn started(ago: Duration) -> Health {
        Health { started: Instant::now().checked_sub(ago).unwrap(), ..Health::default() }
    }

    #[test]
    fn a_stalled_ingest_loop_is_unhealthy_only_while_there_is_work() {
        let health = started(STALL_LIMIT * 2);
        health.session_tick();
        assert!(health.is_alive(), "the ingest loop has nothing to do");
        health.batch_enqueued();
        assert!(!health.is_alive());
        health.ingest_tick();
        assert!(health.is_alive());
    }

    #[test]
    fn a_stalled_session_is_unhealthy_until_the_exporter_stops() {
        let health = started(STALL_LIMIT * 2);
        assert!(!health.is_alive());
        health.set_broker(BrokerStatus::Stopped);
        assert!(health.is_alive());
    }

    #[test]
    fn a_failed_component_is_unhealthy() {
        let health = Health::default();
        assert!(health.is_alive());
        health.mark_failed();
        assert!(!health.is_alive() && !health.has_ticked_within(STALL_LIMIT));
    }

    #[test]
    fn both_loops_must_have_ticked() {
        let health = started(STALL_LIMIT);
        health.ingest_tick();
        assert!(!health.has_ticked_within(STALL_LIMIT / 2));
        health.session_tick();
        assert!(health.has_ticked_within(STALL_LIMIT / 2));
    }

    #[test]
    fn warnings_of_all_components_are_listed_while_they_last() {
        use WarningSource::{Ingest, Queue, Store};
        let health = Health::default();
        for source in [Store, Ingest, Queue] {
            health.set_warnings(source, vec![format!("{source:?}")]);
        }
        assert_eq!(health.warnings(), ["Ingest", "Queue", "Store"]);
        for source in [Store, Ingest, Queue] {
            health.set_warnings(source, Vec::new());
        }
        assert!(health.warnings().is_empty());
    }
}
