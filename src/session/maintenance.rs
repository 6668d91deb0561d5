//! Maintains a subscription: broadcasts, acknowledgments, queue checks, liveness checks.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, watch};
use tokio::time::{sleep, timeout};

use super::warn_throttled;
use crate::broker::{BrokerError, BrokerHandle, QueueStats};
use crate::celery::Broadcast;
use crate::config::Config;
use crate::inbox::{Ack, Inbox, IngestMessage, LIVENESS_CHECK_INTERVAL};
use crate::observability::{Health, LogThrottle, WarningSource};

/// Above this queue depth, received events lag behind, so worker timeouts are paused.
const BACKLOG_THRESHOLD: u32 = 1000;
/// The longest time between two checks of the queue and the exchange.
const MAX_QUEUE_CHECK_INTERVAL: Duration = Duration::from_secs(5);
/// The shortest time between two `heartbeat` broadcasts, because every worker answers each one.
const MIN_HEARTBEAT_INTERVAL: Duration = Duration::from_millis(200);
/// In percent of `broker.amqp.queue_max_bytes`. At the limit, the broker drops the oldest messages without notice.
const QUEUE_FULL_WARN_PERCENT: u64 = 80;
const SHARED_QUEUE: &str = "another consumer is consuming from broker.amqp.queue, so each exporter counts only a part; \
                            stop the other consumer, or give each exporter a separate queue";
const NEVER: Duration = Duration::from_secs(365 * 86_400);

pub(super) struct Maintenance<'s> {
    pub(super) broker: &'s BrokerHandle,
    pub(super) config: watch::Receiver<Arc<Config>>,
    pub(super) acks_rx: &'s mut mpsc::UnboundedReceiver<Ack>,
    pub(super) inbox: &'s Inbox,
    pub(super) health: &'s Health,
    /// The session's number, which its acknowledgments carry.
    pub(super) session: u64,
}

impl Maintenance<'_> {
    /// Ends only with the connection. Its tasks do not wait for each other.
    pub(super) async fn run(self) -> BrokerError {
        let Self { broker, config, acks_rx, inbox, health, session } = self;
        let queue = QueueCheck {
            inbox,
            health,
            log: LogThrottle::default(),
            has_backlog: false,
            unchecked_depth: broker.initial_queue_depth(),
        };
        tokio::select! {
            error = acknowledge(broker, acks_rx, session) => error,
            error = maintain_queue(broker, config.clone(), queue) => error,
            error = broadcast_heartbeats(broker, config) => error,
            error = check_liveness(broker, inbox) => error,
            error = broker.wait_for_failover() => error,
        }
    }
}

async fn acknowledge(broker: &BrokerHandle, acks_rx: &mut mpsc::UnboundedReceiver<Ack>, session: u64) -> BrokerError {
    let mut acknowledged = 0;
    loop {
        let Some(mut last) = acks_rx.recv().await else {
            // The ingest loop has ended: there is nothing more to acknowledge.
            return std::future::pending().await;
        };
        while let Ok(later) = acks_rx.try_recv() {
            last = later;
        }
        // Two threads send acknowledgments. The broker refuses a tag that is lower than one before it.
        if last.session == session && last.tag.0 > acknowledged {
            acknowledged = last.tag.0;
            if let Err(error) = broker.acknowledge(last.tag).await {
                return error;
            }
        }
    }
}

/// Broadcasts `enable_events` for new workers every `events.enable_interval`, and checks exchange and queue at least
/// every five seconds.
async fn maintain_queue(
    broker: &BrokerHandle,
    mut config_rx: watch::Receiver<Arc<Config>>,
    mut queue: QueueCheck<'_>,
) -> BrokerError {
    let mut broadcast_log = LogThrottle::default();
    let mut enabled_at: Option<Instant> = None;
    loop {
        let stats = match broker.redeclare().await {
            Ok(stats) => stats,
            Err(error) => return error,
        };
        let config = Arc::clone(&config_rx.borrow_and_update());
        queue.check(stats, &config);
        let (events, connect_timeout) = (&config.events, config.broker.connect_timeout);
        let due_in = |at: Instant| events.enable_interval.saturating_sub(at.elapsed());
        if events.enable_events && enabled_at.is_none_or(|at| due_in(at).is_zero()) {
            broadcast(broker, Broadcast::EnableEvents, connect_timeout, &mut broadcast_log).await;
            enabled_at = Some(Instant::now());
        }
        let rest = enabled_at.filter(|_| events.enable_events).map_or(events.enable_interval, due_in);
        sleep_until_changed(rest.min(MAX_QUEUE_CHECK_INTERVAL), &mut config_rx, |now| {
            (now.events.enable_events, now.events.enable_interval) != (events.enable_events, events.enable_interval)
        })
        .await;
    }
}

/// Warns about queue statistics that need the operator's attention.
struct QueueCheck<'s> {
    inbox: &'s Inbox,
    health: &'s Health,
    log: LogThrottle,
    has_backlog: bool,
    /// Messages that were queued when the session began, until the size of a message is known.
    unchecked_depth: u32,
}

impl QueueCheck<'_> {
    fn check(&mut self, stats: QueueStats, config: &Config) {
        let is_shared = stats.consumers > 1;
        self.health
            .set_warnings(WarningSource::Queue, is_shared.then(|| SHARED_QUEUE.to_owned()).into_iter().collect());
        let has_backlog = stats.queued > BACKLOG_THRESHOLD;
        if has_backlog != self.has_backlog {
            self.inbox.send(IngestMessage::BrokerBacklog(has_backlog));
            self.has_backlog = has_backlog;
        }
        let queued = stats.queued.max(std::mem::take(&mut self.unchecked_depth));
        let Some(message_size) = self.inbox.mean_message_size() else {
            self.unchecked_depth = queued;
            return;
        };
        if is_nearly_full(queued, message_size, config.broker.amqp.queue_max_bytes)
            && let Some(suppressed) = self.log.check("full")
        {
            tracing::warn!(
                queued,
                suppressed,
                "RabbitMQ queue is near broker.amqp.queue_max_bytes; the oldest events will be dropped"
            );
        }
    }
}

fn is_nearly_full(queued: u32, message_size: u64, max_bytes: u64) -> bool {
    queued > 0 && message_size * u64::from(queued) >= max_bytes / 100 * QUEUE_FULL_WARN_PERCENT
}

/// Asks the broker to respond. Worker timeouts are paused while it does not and no messages arrive.
async fn check_liveness(broker: &BrokerHandle, inbox: &Inbox) -> BrokerError {
    let mut log = LogThrottle::default();
    loop {
        let asked = Instant::now();
        match broker.check_liveness().await {
            Ok(()) => inbox.send(IngestMessage::BrokerAlive(asked)),
            Err(timeout @ BrokerError::Timeout(_)) => return timeout,
            // The subscription itself reports whether it has ended.
            Err(error) => warn_throttled(&mut log, "broker not responding; worker timeouts paused", None, &error),
        }
        sleep(LIVENESS_CHECK_INTERVAL).await;
    }
}

/// Broadcasts `heartbeat` on connecting and then every `worker_timeout / 3`. Workers that run without heartbeats
/// respond, so that they stay online.
async fn broadcast_heartbeats(broker: &BrokerHandle, mut config_rx: watch::Receiver<Arc<Config>>) -> BrokerError {
    let mut log = LogThrottle::default();
    let mut first = true;
    loop {
        let config = Arc::clone(&config_rx.borrow_and_update());
        let (enabled, timeout) = (config.events.enable_events, config.state.worker_timeout);
        if enabled && (first || timeout.is_some()) {
            broadcast(broker, Broadcast::Heartbeat, config.broker.connect_timeout, &mut log).await;
        }
        first = false;
        let changed = |now: &Config| (now.events.enable_events, now.state.worker_timeout) != (enabled, timeout);
        let interval = timeout.map_or(NEVER, |timeout| (timeout / 3).max(MIN_HEARTBEAT_INTERVAL));
        sleep_until_changed(interval, &mut config_rx, changed).await;
    }
}

async fn broadcast(broker: &BrokerHandle, command: Broadcast, connect_timeout: Duration, log: &mut LogThrottle) {
    let sent = timeout(connect_timeout, broker.broadcast(command)).await;
    match sent.unwrap_or_else(|_| Err(broker.blocked_reason().unwrap_or(BrokerError::Timeout(connect_timeout)))) {
        Ok(()) => tracing::trace!(command = command.method(), "broadcast sent"),
        Err(error) => {
            warn_throttled(log, &format!("failed to broadcast {} to workers", command.method()), None, &error);
        }
    }
}

/// Sleeps until the time has passed or the configuration has changed.
async fn sleep_until_changed(
    duration: Duration,
    config_rx: &mut watch::Receiver<Arc<Config>>,
    changed: impl Fn(&Config) -> bool,
) {
    tokio::select! {
        () = sleep(duration) => {}
        changed = config_rx.wait_for(|config| changed(config)) => {
            if changed.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::Receiver;

    use super::*;
    use crate::inbox::{Batch, Encoding, Message};
    use crate::observability::SelfMetrics;

    #[test]
    fn a_queue_is_nearly_full_from_80_percent_on() {
        assert!(!is_nearly_full(0, 1000, 0));
        assert!(!is_nearly_full(79, 1, 100));
        assert!(is_nearly_full(80, 1, 100));
    }

    struct Fixture {
        health: Arc<Health>,
        inbox: Inbox,
        inbox_rx: Receiver<IngestMessage>,
    }

    impl Fixture {
        fn new() -> Self {
            let health = Arc::new(Health::default());
            let (inbox, inbox_rx) = Inbox::new(1 << 20, SelfMetrics::new().unwrap().into(), Arc::clone(&health));
            Self { health, inbox, inbox_rx }
        }

        fn queue_check(&self, unchecked_depth: u32) -> QueueCheck<'_> {
            QueueCheck {
                inbox: &self.inbox,
                health: &self.health,
                log: LogThrottle::default(),
                has_backlog: false,
                unchecked_depth,
            }
        }
    }

    #[test]
    fn the_ingest_loop_is_notified_of_the_beginning_and_the_end_of_a_backlog() {
        let fixture = Fixture::new();
        let mut check = fixture.queue_check(0);
        for queued in [0, BACKLOG_THRESHOLD + 1, BACKLOG_THRESHOLD + 2, 0] {
            check.check(QueueStats { queued, consumers: 1 }, &Config::default());
        }
        let sent: Vec<_> = fixture.inbox_rx.try_iter().map(|message| format!("{message:?}")).collect();
        assert_eq!(sent, ["BrokerBacklog(true)", "BrokerBacklog(false)"]);
    }

    #[test]
    fn the_initial_depth_is_checked_once_a_message_was_received() {
        let fixture = Fixture::new();
        let mut check = fixture.queue_check(500);
        check.check(QueueStats { queued: 0, consumers: 1 }, &Config::default());
        assert_eq!(check.unchecked_depth, 500, "the size of a message is not known yet");
        let message = Message { bytes: "0123456789".into(), encoding: Encoding::RawBody, redelivered: false };
        drop(fixture.inbox.truncate_to_capacity(&mut Batch::new(vec![message], None)));
        check.check(QueueStats { queued: 0, consumers: 1 }, &Config::default());
        assert_eq!(check.unchecked_depth, 0);
    }

    #[test]
    fn other_consumers_of_the_queue_are_a_warning_while_they_last() {
        let fixture = Fixture::new();
        let mut check = fixture.queue_check(0);
        check.check(QueueStats { queued: 0, consumers: 2 }, &Config::default());
        assert_eq!(fixture.health.warnings().len(), 1);
        check.check(QueueStats { queued: 0, consumers: 1 }, &Config::default());
        assert_eq!(fixture.health.warnings().len(), 0);
    }
}
