//! The exporter's own metrics, `flower_exporter_*`, served with `metrics.self_metrics`.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use prometheus::core::{Atomic, Collector, GenericCounter, GenericGauge};
use prometheus::proto::MetricFamily;
use prometheus::{Counter, Gauge, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, Opts, Registry};

use crate::celery::DecodeError;

/// Without events for this long, their lag is unknown.
const EVENT_LAG_KEPT: Duration = Duration::from_secs(60);
/// Upper bounds of `scrape_duration_seconds`, in seconds.
const SCRAPE_BUCKETS: [f64; 9] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1.0];

/// Why events are or may be missing: the `cause` label of `flower_exporter_gaps_total`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GapCause {
    /// Messages did not fit into `events.buffer_max_bytes`.
    BufferFull,
    /// There was no subscription for a while, and no named queue collected events in the meantime.
    Disconnected,
    /// Redis disconnected a client, probably the exporter, because its output buffer limit was reached. Detected on Redis 7.2 and later.
    RedisOutputLimit,
    /// The queue lost messages: by its limit, TTL, a purge, or to another client.
    QueueOverflow,
    /// The named queue is a new one, or lost all its messages.
    QueueRecreated,
    /// It is unknown whether the named queue lost messages.
    ContinuityUnknown,
    /// The exporter was not running, and no named queue collected events in the meantime.
    Restart,
}

/// A part of the configuration that is loaded again on its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConfigPart {
    /// The settings.
    Settings,
    /// The web configuration file.
    Web,
}

impl GapCause {
    const ALL: [Self; 7] = [
        Self::BufferFull,
        Self::Disconnected,
        Self::RedisOutputLimit,
        Self::QueueOverflow,
        Self::QueueRecreated,
        Self::ContinuityUnknown,
        Self::Restart,
    ];

    /// The cause as a label value.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::BufferFull => "buffer_full",
            Self::Disconnected => "disconnected",
            Self::RedisOutputLimit => "redis_output_limit",
            Self::QueueOverflow => "queue_overflow",
            Self::QueueRecreated => "queue_recreated",
            Self::ContinuityUnknown => "continuity_unknown",
            Self::Restart => "restart",
        }
    }
}

/// The exporter's own metrics, in a separate registry.
#[derive(Debug)]
pub struct SelfMetrics {
    registry: Registry,
    invalid: [IntCounter; DecodeError::ALL.len()],
    gaps: [IntCounter; GapCause::ALL.len()],
    /// Messages received from the broker.
    pub received_messages: IntCounter,
    /// Bytes of those messages.
    pub received_bytes: IntCounter,
    /// Events decoded from messages, including those that `events.hostnames` leaves out.
    pub decoded_events: IntCounter,
    /// Messages of a named queue that were delivered and counted before.
    pub duplicates: IntCounter,
    /// Messages dropped because the buffer was full.
    pub dropped: IntCounter,
    /// Subscriptions that broke.
    pub disconnects: IntCounter,
    /// Seconds without a subscription after the first one, added when each outage ends.
    pub disconnected_seconds: Counter,
    /// Subscriptions after the first one.
    pub reconnects: IntCounter,
    /// Log lines that could not be written.
    pub lost_log_lines: IntCounter,
    /// Panics of the observer.
    pub observer_panics: IntCounter,
    /// Seconds in which the clock that times workers out did not run.
    pub worker_clock_paused_seconds: Counter,
    /// 1 while subscribed.
    pub connected: IntGauge,
    /// Bytes of messages in the buffer.
    pub buffer_bytes: IntGauge,
    /// The buffer's limit in bytes.
    pub buffer_limit_bytes: IntGauge,
    /// Seconds since the save of the oldest unsaved change was due.
    pub oldest_unsaved_change: Gauge,
    /// Seconds that the last save took.
    pub last_save_duration: Gauge,
    /// Failed attempts to open or write the state file.
    pub save_failures: IntCounter,
    /// The exporter's clock minus the timestamp of the last event, in seconds. Not in the registry.
    pub event_lag: Gauge,
    /// Tasks in memory.
    pub tracked_tasks: IntGauge,
    /// Workers and clients in memory.
    pub tracked_workers: IntGauge,
    /// (worker, task) label sets in memory.
    pub tracked_label_sets: IntGauge,
    /// Seconds from a request for `/metrics` to the end of its response.
    pub scrape_duration: Histogram,
    last_reload_successful: IntGauge,
    last_reload_success_timestamp: Gauge,
    /// By [`ConfigPart`].
    is_part_invalid: [AtomicBool; 2],
}

impl SelfMetrics {
    /// Registers all metrics.
    ///
    /// # Errors
    /// Returns an error if two metrics have the same name, which a test would show.
    #[allow(clippy::too_many_lines, reason = "one line or two per metric")]
    pub fn new() -> Result<Self, prometheus::Error> {
        let registry = Registry::new();
        let registrar = Registrar { registry: &registry };
        let invalid = registrar.vec(
            "invalid_messages_total",
            "Messages and events that could not be decoded, by reason.",
            "reason",
        )?;
        let gaps = registrar.vec(
            "gaps_total",
            "Number of times that events were or may have been missed, by cause.",
            "cause",
        )?;
        let info = IntGauge::with_opts(
            Opts::new("flower_exporter_build_info", "The exporter's version, and the commit it was built from.")
                .const_label("version", env!("CARGO_PKG_VERSION"))
                .const_label("revision", env!("FLOWER_EXPORTER_REVISION")),
        )?;
        info.set(1);
        registry.register(Box::new(info))?;
        #[cfg(target_os = "linux")]
        registry.register(Box::new(prometheus::process_collector::ProcessCollector::for_self()))?;
        let scrape_duration = Histogram::with_opts(
            HistogramOpts::new(
                "flower_exporter_scrape_duration_seconds",
                "Time from a request for /metrics to the end of its response.",
            )
            .buckets(SCRAPE_BUCKETS.to_vec()),
        )?;
        registry.register(Box::new(scrape_duration.clone()))?;
        let metrics = Self {
            invalid: DecodeError::ALL.map(|reason| invalid.with_label_values(&[reason.as_str()])),
            gaps: GapCause::ALL.map(|cause| gaps.with_label_values(&[cause.as_str()])),
            received_messages: registrar.counter("received_messages_total", "Messages received from the broker.")?,
            received_bytes: registrar
                .counter("received_bytes_total", "Bytes of the messages received from the broker.")?,
            decoded_events: registrar
                .counter("decoded_events_total", "Decoded events, including those that events.hostnames leaves out.")?,
            duplicates: registrar.counter(
                "duplicate_messages_total",
                "Messages that the broker delivered again although they were counted; not counted twice.",
            )?,
            dropped: registrar.counter("dropped_messages_total", "Messages dropped because the buffer was full.")?,
            disconnects: registrar.counter("broker_disconnects_total", "Subscriptions that broke.")?,
            disconnected_seconds: registrar.counter(
                "broker_disconnected_seconds_total",
                "Seconds without a subscription after the first one, added when each outage ends.",
            )?,
            reconnects: registrar.counter("broker_reconnects_total", "Subscriptions after the first one.")?,
            lost_log_lines: registrar.counter(
                "lost_log_lines_total",
                "Log lines that could not be written, because standard error was closed or not read.",
            )?,
            observer_panics: registrar
                .counter("observer_panics_total", "Panics of an observer; always 0 in the daemon.")?,
            worker_clock_paused_seconds: registrar.counter(
                "worker_clock_paused_seconds_total",
                "Seconds in which no worker could time out, because events might not have arrived.",
            )?,
            connected: registrar.gauge("broker_connected", "1 while subscribed to the broker's events.")?,
            buffer_bytes: registrar.gauge("buffer_bytes", "Bytes of messages in the buffer.")?,
            buffer_limit_bytes: registrar
                .gauge("buffer_limit_bytes", "Limit of the buffer: events.buffer_max_bytes.")?,
            oldest_unsaved_change: registrar.gauge(
                "state_oldest_unsaved_change_seconds",
                "Time since the save of the oldest unsaved change was due; 0 without state.persistent.",
            )?,
            last_save_duration: registrar.gauge("state_last_save_duration_seconds", "Time that the last save took.")?,
            save_failures: registrar
                .counter("state_save_failures_total", "Failed attempts to open or write the state file.")?,
            event_lag: Gauge::new(
                "flower_exporter_event_lag_seconds",
                "The exporter's clock minus the timestamp of the last event; absent after a minute without events.",
            )?,
            tracked_tasks: registrar.gauge("tracked_tasks", "Tasks in memory.")?,
            tracked_workers: registrar.gauge("tracked_workers", "Workers and clients in memory.")?,
            tracked_label_sets: registrar.gauge("tracked_label_sets", "Label sets of worker and task in memory.")?,
            scrape_duration,
            last_reload_successful: registrar
                .gauge("config_last_reload_successful", "1 if the last load of the configuration succeeded.")?,
            last_reload_success_timestamp: registrar.gauge(
                "config_last_reload_success_timestamp_seconds",
                "Unix time of the last successful load of the configuration.",
            )?,

            is_part_invalid: Default::default(),
            registry,
        };
        metrics.record_reload(ConfigPart::Settings, true);
        Ok(metrics)
    }

    /// The counter of invalid messages with this reason.
    #[must_use]
    pub fn invalid(&self, reason: DecodeError) -> &IntCounter {
        &self.invalid[reason.index()]
    }

    /// Counts a gap.
    pub fn record_gap(&self, cause: GapCause) {
        self.gaps[cause as usize].inc();
    }

    /// Records whether a part of the configuration could be loaded. The last load was successful if that of every part
    /// was.
    pub fn record_reload(&self, part: ConfigPart, successful: bool) {
        self.is_part_invalid[part as usize].store(!successful, Ordering::Relaxed);
        let is_any_invalid = self.is_part_invalid.iter().any(|is_invalid| is_invalid.load(Ordering::Relaxed));
        self.last_reload_successful.set(i64::from(!is_any_invalid));
        if !is_any_invalid {
            self.last_reload_success_timestamp.set(unix_now());
        }
    }

    /// All families, for the exposition, by name. The lag of the last event is left out if that was long ago.
    #[must_use]
    pub fn gather(&self, since_last_event: Option<Duration>) -> Vec<MetricFamily> {
        let mut families = self.registry.gather();
        if since_last_event.is_some_and(|since| since < EVENT_LAG_KEPT) {
            families.extend(self.event_lag.collect());
            families.sort_by(|one, other| one.name().cmp(other.name()));
        }
        families
    }
}

fn unix_now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

/// Registers metrics whose names begin with `flower_exporter_`.
struct Registrar<'r> {
    registry: &'r Registry,
}

impl Registrar<'_> {
    fn counter<P: Atomic + 'static>(&self, name: &str, help: &str) -> Result<GenericCounter<P>, prometheus::Error> {
        let counter = GenericCounter::with_opts(Opts::new(format!("flower_exporter_{name}"), help))?;
        self.registry.register(Box::new(counter.clone()))?;
        Ok(counter)
    }

    fn gauge<P: Atomic + 'static>(&self, name: &str, help: &str) -> Result<GenericGauge<P>, prometheus::Error> {
        let gauge = GenericGauge::with_opts(Opts::new(format!("flower_exporter_{name}"), help))?;
        self.registry.register(Box::new(gauge.clone()))?;
        Ok(gauge)
    }

    fn vec(&self, name: &str, help: &str, label: &str) -> Result<IntCounterVec, prometheus::Error> {
        let counter_vec = IntCounterVec::new(Opts::new(format!("flower_exporter_{name}"), help), &[label])?;
        self.registry.register(Box::new(counter_vec.clone()))?;
        Ok(counter_vec)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(metrics: &SelfMetrics, name: &str) -> f64 {
        let families = metrics.gather(None);
        let family = families.iter().find(|family| family.name() == name).expect(name);
        family.get_metric().iter().map(|metric| metric.get_counter().get_value() + metric.get_gauge().get_value()).sum()
    }

    #[test]
    fn every_gap_cause_has_its_counter() {
        let metrics = SelfMetrics::new().unwrap();
        for (number, cause) in GapCause::ALL.into_iter().enumerate() {
            assert_eq!(cause as usize, number);
            metrics.record_gap(cause);
        }
        assert!((value(&metrics, "flower_exporter_gaps_total") - 7.0).abs() < f64::EPSILON);
    }

    #[test]
    fn a_failed_reload_keeps_the_time_of_the_last_success() {
        let metrics = SelfMetrics::new().unwrap();
        let name = "flower_exporter_config_last_reload_success_timestamp_seconds";
        let loaded = value(&metrics, name);
        assert!(loaded > 1.7e9);
        metrics.record_reload(ConfigPart::Settings, false);
        assert!(value(&metrics, "flower_exporter_config_last_reload_successful").abs() < f64::EPSILON);
        assert!((value(&metrics, name) - loaded).abs() < f64::EPSILON);
    }
}
