//! Maintains a subscription: broadcasts, acknowledgments, queue checks, liveness checks.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::time::sleep;

use super::broadcaster::Broadcaster;
use super::enable_events::enable_events;
use super::witness::send_witnesses;
use crate::broker::{BrokerError, BrokerHandle, QueueStats};
use crate::celery::Broadcast;
use crate::config::{BrokerUrl, Config};
use crate::inbox::{Ack, Inbox, WorkerStarts};
use crate::observability::{Health, LogThrottle, WarningSource};

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
    pub(super) url: &'s BrokerUrl,
    pub(super) config: watch::Receiver<Arc<Config>>,
    pub(super) acks_rx: &'s mut mpsc::UnboundedReceiver<Ack>,
    pub(super) starts_rx: watch::Receiver<WorkerStarts>,
    pub(super) inbox: &'s Inbox,
    pub(super) health: &'s Health,
    /// The session's number, which its acknowledgments carry.
    pub(super) session: u64,
}

impl Maintenance<'_> {
    /// Ends when the connection fails or another server must be used. Its tasks do not wait for each other.
    pub(super) async fn run(self) -> BrokerError {
        let Self { broker, url, config, acks_rx, starts_rx, inbox, health, session } = self;
        let broadcaster = || Broadcaster::new(broker, url, health);
        let queue =
            QueueCheck { inbox, health, log: LogThrottle::default(), unchecked_depth: broker.initial_queue_depth() };
        tokio::select! {
            error = acknowledge(broker, acks_rx, session) => error,
            error = check_queue(broker, config.clone(), queue) => error,
            never = enable_events(broadcaster(), config.clone(), starts_rx) => match never {},
            never = broadcast_heartbeats(broadcaster(), config.clone()) => match never {},
            never = send_witnesses(broker, config, health) => match never {},
            error = broker.wait_for_failover() => error,
        }
    }
}

async fn acknowledge(broker: &BrokerHandle, acks_rx: &mut mpsc::UnboundedReceiver<Ack>, session: u64) -> BrokerError {
    let mut acknowledged = 0;
    loop {
        let Some(first) = acks_rx.recv().await else {
            // The ingest loop has ended: there is nothing more to acknowledge.
            return std::future::pending().await;
        };
        // Two threads send acknowledgments, some of earlier sessions. The broker refuses a tag that is lower than one
        // before it.
        let others = std::iter::from_fn(|| acks_rx.try_recv().ok());
        let highest = [first].into_iter().chain(others).filter(|ack| ack.session == session).map(|ack| ack.tag).max();
        if let Some(tag) = highest.filter(|tag| tag.0 > acknowledged) {
            acknowledged = tag.0;
            if let Err(error) = broker.acknowledge(tag).await {
                return error;
            }
        }
    }
}

/// Checks exchange and queue at least every five seconds, and at every `events.enable_interval`.
async fn check_queue(
    broker: &BrokerHandle,
    config_rx: watch::Receiver<Arc<Config>>,
    mut queue: QueueCheck<'_>,
) -> BrokerError {
    queue.health.set_warnings(WarningSource::Queue, Vec::new());
    if !broker.has_queue() {
        return std::future::pending().await;
    }
    loop {
        match broker.redeclare().await {
            Ok(stats) => queue.check(stats, &config_rx.borrow()),
            Err(error) => return error,
        }
        let interval = config_rx.borrow().events.enable_interval;
        sleep(interval.min(MAX_QUEUE_CHECK_INTERVAL)).await;
    }
}

/// Warns about queue statistics that need the operator's attention.
struct QueueCheck<'s> {
    inbox: &'s Inbox,
    health: &'s Health,
    log: LogThrottle,
    /// Messages that were queued when the session began, until the size of a message is known.
    unchecked_depth: u32,
}

impl QueueCheck<'_> {
    fn check(&mut self, stats: QueueStats, config: &Config) {
        let is_shared = stats.consumers > 1;
        self.health
            .set_warnings(WarningSource::Queue, is_shared.then(|| SHARED_QUEUE.to_owned()).into_iter().collect());
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

/// Broadcasts `heartbeat` on connecting and then every `worker_timeout / 3`. Workers that run without heartbeats
/// respond, so that they stay online.
async fn broadcast_heartbeats(
    mut broadcaster: Broadcaster<'_>,
    mut config_rx: watch::Receiver<Arc<Config>>,
) -> Infallible {
    let mut first = true;
    loop {
        let config = Arc::clone(&config_rx.borrow_and_update());
        let (enabled, timeout) = (config.events.enable_events, config.state.worker_timeout);
        if enabled && (first || timeout.is_some()) {
            broadcaster.broadcast(Broadcast::Heartbeat, &config).await;
        }
        first = false;
        let changed = |now: &Config| (now.events.enable_events, now.state.worker_timeout) != (enabled, timeout);
        let interval = timeout.map_or(NEVER, |timeout| (timeout / 3).max(MIN_HEARTBEAT_INTERVAL));
        sleep_until_changed(interval, &mut config_rx, changed).await;
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
    }

    impl Fixture {
        fn new() -> Self {
            let health = Arc::new(Health::default());
            let (inbox, _) = Inbox::new(1 << 20, SelfMetrics::new().unwrap().into(), Arc::clone(&health));
            Self { health, inbox }
        }

        fn queue_check(&self, unchecked_depth: u32) -> QueueCheck<'_> {
            QueueCheck { inbox: &self.inbox, health: &self.health, log: LogThrottle::default(), unchecked_depth }
        }
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
