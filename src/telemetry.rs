//! What the exporter says about itself: `flower_exporter_*` behind `metrics.self_metrics`, and the facts of `/healthz`.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use prometheus::core::{Atomic, GenericCounter, GenericGauge};
use prometheus::process_collector::ProcessCollector;
use prometheus::proto::MetricFamily;
use prometheus::{Counter, Gauge, IntCounter, IntCounterVec, IntGauge, Opts, Registry};

use crate::celery::Reject;

/// How long the ingest loop may stand still with work waiting before it counts as stuck.
const STUCK_AFTER: Duration = Duration::from_secs(30);

const SHARED_QUEUE: &str = "another consumer takes events from our queue, so that each counts a part: stop it, or give \
                            each exporter a broker.amqp.queue of its own";

/// The exporter's own metrics, in a registry of their own.
#[derive(Debug)]
pub struct Telemetry {
    registry: Registry,
    rejected: [IntCounter; Reject::ALL.len()],
    /// Messages read from the broker.
    pub messages: IntCounter,
    /// Bytes of those messages.
    pub message_bytes: IntCounter,
    /// Events read from messages, counted or not.
    pub events: IntCounter,
    /// Messages that a named queue handed out again, and that were counted before.
    pub redelivered: IntCounter,
    /// Messages dropped because `events.max_backlog` was reached.
    pub dropped: IntCounter,
    /// Connections that broke while we listened.
    pub cutoffs: IntCounter,
    /// Seconds without a subscription after the first one.
    pub blind_seconds: Counter,
    /// Subscriptions after the first one.
    pub reconnects: IntCounter,
    /// Panics of the observer.
    pub observer_panics: IntCounter,
    /// 1 while subscribed.
    pub connected: IntGauge,
    /// Bytes of messages that wait to be processed.
    pub backlog_bytes: IntGauge,
    /// Seconds since the oldest change that is not on disk.
    pub save_age: Gauge,
    /// Seconds that the last save took.
    pub save_duration: Gauge,
    /// Saves that failed.
    pub save_failures: IntCounter,
    /// Our clock minus the timestamp of the last event, in seconds.
    pub event_lag: Gauge,
    /// Tasks held.
    pub tasks: IntGauge,
    /// Workers and clients held.
    pub workers: IntGauge,
    /// (worker, task) pairs held.
    pub label_pairs: IntGauge,
}

impl Telemetry {
    /// Registers everything.
    ///
    /// # Errors
    /// Only if two of the names below were the same, which a test would show.
    pub fn new() -> Result<Self, prometheus::Error> {
        let registry = Registry::new();
        let reasons = IntCounterVec::new(
            Opts::new("flower_exporter_rejected_total", "Messages and events that could not be counted, by reason."),
            &["reason"],
        )?;
        let info = IntGauge::with_opts(
            Opts::new("flower_exporter_build_info", "The exporter's version, and the commit it was built from.")
                .const_label("version", env!("CARGO_PKG_VERSION"))
                .const_label("revision", env!("FLOWER_EXPORTER_REVISION")),
        )?;
        info.set(1);
        registry.register(Box::new(reasons.clone()))?;
        registry.register(Box::new(info))?;
        registry.register(Box::new(ProcessCollector::for_self()))?;
        Ok(Self {
            rejected: Reject::ALL.map(|reason| reasons.with_label_values(&[reason.as_str()])),
            messages: counter(&registry, "messages_total", "Messages read from the broker.")?,
            message_bytes: counter(&registry, "message_bytes_total", "Bytes of the messages read from the broker.")?,
            events: counter(&registry, "events_total", "Events read from messages, counted or not.")?,
            redelivered: counter(
                &registry,
                "redelivered_messages_total",
                "Messages handed out again that were counted before, and are not counted twice.",
            )?,
            dropped: counter(
                &registry,
                "dropped_messages_total",
                "Messages dropped because events.max_backlog was reached.",
            )?,
            cutoffs: counter(&registry, "cutoffs_total", "Connections that broke while the exporter listened.")?,
            blind_seconds: counter(
                &registry,
                "blind_seconds_total",
                "Seconds without a subscription after the first one.",
            )?,
            reconnects: counter(&registry, "reconnects_total", "Subscriptions after the first one.")?,
            observer_panics: counter(&registry, "observer_panics_total", "Panics of an embedding program's observer.")?,
            connected: gauge(&registry, "connected", "1 while subscribed to the broker's events.")?,
            backlog_bytes: gauge(&registry, "backlog_bytes", "Bytes of messages that wait to be processed.")?,
            save_age: gauge(
                &registry,
                "state_save_age_seconds",
                "How long there has been a change that is not saved; 0 without state.persistent.",
            )?,
            save_duration: gauge(&registry, "state_save_duration_seconds", "How long the last save took.")?,
            save_failures: counter(&registry, "state_save_failures_total", "Saves of the state that failed.")?,
            event_lag: gauge(
                &registry,
                "event_lag_seconds",
                "The exporter's clock minus the timestamp of the last event.",
            )?,
            tasks: gauge(&registry, "tasks", "Tasks held in memory.")?,
            workers: gauge(&registry, "workers", "Workers and clients held in memory.")?,
            label_pairs: gauge(&registry, "label_pairs", "Pairs of worker and task held in memory.")?,
            registry,
        })
    }

    /// The counter of a reason.
    #[must_use]
    pub fn rejected(&self, reason: Reject) -> &IntCounter {
        &self.rejected[reason.index()]
    }

    /// Everything, for the exposition.
    #[must_use]
    pub fn gather(&self) -> Vec<MetricFamily> {
        self.registry.gather()
    }
}

fn counter<P: Atomic + 'static>(
    registry: &Registry,
    name: &str,
    help: &str,
) -> Result<GenericCounter<P>, prometheus::Error> {
    let counter = GenericCounter::with_opts(Opts::new(format!("flower_exporter_{name}"), help))?;
    registry.register(Box::new(counter.clone()))?;
    Ok(counter)
}

fn gauge<P: Atomic + 'static>(
    registry: &Registry,
    name: &str,
    help: &str,
) -> Result<GenericGauge<P>, prometheus::Error> {
    let gauge = GenericGauge::with_opts(Opts::new(format!("flower_exporter_{name}"), help))?;
    registry.register(Box::new(gauge.clone()))?;
    Ok(gauge)
}

/// Where the session with the broker stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BrokerStatus {
    /// Not subscribed, trying.
    Connecting,
    /// Subscribed: the server has confirmed it.
    Connected,
    /// Stopping.
    Stopped,
}

impl BrokerStatus {
    /// As `/healthz` shows it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Connecting => "connecting",
            Self::Connected => "connected",
            Self::Stopped => "stopped",
        }
    }
}

/// What `/healthz` answers from. Written by session and ingest loop, read by HTTP; nothing is waited for.
#[derive(Debug)]
pub struct Health {
    started: Instant,
    facts: Mutex<Facts>,
    /// Milliseconds after `started`, 0 for never.
    last_event: AtomicU64,
    last_turn: AtomicU64,
    last_session_turn: AtomicU64,
    waiting: AtomicUsize,
    dead: AtomicBool,
}

#[derive(Debug)]
struct Facts {
    broker: BrokerStatus,
    warnings: Vec<String>,
    other_consumers: u32,
    unsaved: Option<String>,
}

impl Default for Health {
    fn default() -> Self {
        Self {
            started: Instant::now(),
            facts: Mutex::new(Facts {
                broker: BrokerStatus::Connecting,
                warnings: Vec::new(),
                other_consumers: 0,
                unsaved: None,
            }),
            last_event: AtomicU64::new(0),
            last_turn: AtomicU64::new(0),
            last_session_turn: AtomicU64::new(0),
            waiting: AtomicUsize::new(0),
            dead: AtomicBool::new(false),
        }
    }
}

/// Tells the log of the warnings that are new.
fn announce(before: &[String], warnings: &[String]) {
    for warning in warnings.iter().filter(|warning| !before.contains(warning)) {
        tracing::warn!("{warning}");
    }
}

impl Health {
    fn facts(&self) -> MutexGuard<'_, Facts> {
        self.facts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn milliseconds(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX).max(1)
    }

    /// The session's state changed.
    pub fn set_broker(&self, status: BrokerStatus) {
        self.facts().broker = status;
    }

    /// Where the session stands.
    #[must_use]
    pub fn broker(&self) -> BrokerStatus {
        self.facts().broker
    }

    /// Replaces the warnings of the ingest loop.
    pub fn set_warnings(&self, warnings: Vec<String>) {
        let before = self.facts().warnings.clone();
        announce(&before, &warnings);
        self.facts().warnings = warnings;
    }

    /// So many other consumers take events from our queue.
    pub fn set_other_consumers(&self, count: u32) {
        let before = self.facts().other_consumers;
        if count > 0 && before == 0 {
            tracing::warn!(count, "{SHARED_QUEUE}");
        }
        self.facts().other_consumers = count;
    }

    /// Why the state cannot be saved, if so.
    pub fn set_unsaved(&self, warning: Option<String>) {
        let before = self.facts().unsaved.clone();
        announce(before.as_slice(), warning.as_slice());
        self.facts().unsaved = warning;
    }

    /// What the operator should look at. Each was in the log before it is here.
    #[must_use]
    pub fn warnings(&self) -> Vec<String> {
        let facts = self.facts();
        let shared = (facts.other_consumers > 0).then(|| SHARED_QUEUE.to_owned());
        facts.warnings.iter().cloned().chain(shared).chain(facts.unsaved.clone()).collect()
    }

    /// A batch of events was processed.
    pub fn heard_event(&self) {
        self.last_event.store(self.milliseconds(), Ordering::Relaxed);
    }

    /// How long ago the last event was processed.
    #[must_use]
    pub fn since_last_event(&self) -> Option<Duration> {
        match self.last_event.load(Ordering::Relaxed) {
            0 => None,
            _ => Some(self.since(&self.last_event)),
        }
    }

    /// The ingest loop has gone round.
    pub fn turned(&self) {
        self.last_turn.store(self.milliseconds(), Ordering::Relaxed);
    }

    /// The broker's session has gone round, or waits for something.
    pub fn session_turned(&self) {
        self.last_session_turn.store(self.milliseconds(), Ordering::Relaxed);
    }

    /// A batch was put on the queue.
    pub fn queued(&self) {
        self.waiting.fetch_add(1, Ordering::Relaxed);
    }

    /// A batch was taken from the queue and processed.
    pub fn processed(&self) {
        self.waiting.fetch_sub(1, Ordering::Relaxed);
    }

    /// A part of the pipeline has ended that should run.
    pub fn died(&self) {
        self.dead.store(true, Ordering::Relaxed);
    }

    /// Whether events can still be processed.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        let stuck = self.waiting.load(Ordering::Relaxed) > 0 && self.since(&self.last_turn) > STUCK_AFTER;
        let deaf = self.broker() != BrokerStatus::Stopped && self.since(&self.last_session_turn) > STUCK_AFTER;
        !stuck && !deaf && !self.dead.load(Ordering::Relaxed)
    }

    /// Whether all parts run, and both loops have gone round that recently: they do several times a second.
    #[must_use]
    pub fn has_turned_within(&self, limit: Duration) -> bool {
        let since = self.since(&self.last_turn).max(self.since(&self.last_session_turn));
        since < limit && !self.dead.load(Ordering::Relaxed)
    }

    fn since(&self, moment: &AtomicU64) -> Duration {
        Duration::from_millis(self.milliseconds().saturating_sub(moment.load(Ordering::Relaxed)))
    }
}
