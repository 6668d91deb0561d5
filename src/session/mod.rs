//! Runs sessions with the broker one after another: connect, serve, back off, repeat. Only this module subscribes again
//! after a disconnect.
//!
//! Runs on one thread, and blocks it only to read the files of the URL and of TLS. Messages go into the inbox, as does a notice of every gap.

mod backoff;
mod broadcaster;
mod connector;
mod drop_reporter;
mod enable_events;
mod maintenance;
mod pace;
mod reader;
mod witness;

use std::convert::Infallible;
use std::error::Error;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, watch};
use tokio::time::{sleep, timeout};

use crate::broker::{BrokerError, BrokerHandle, EventReceiver};
use crate::config::{BrokerUrl, Config};
use crate::inbox::{Ack, Inbox, IngestMessage, WorkerStarts};
use crate::observability::{BrokerStatus, Health, LogThrottle, SelfMetrics};

use backoff::Backoff;
use connector::Connector;
use drop_reporter::DropReporter;
use maintenance::Maintenance;
use reader::Reader;

/// A subscription that lasted this long was healthy: the next attempt starts with the initial backoff.
const HEALTHY_SESSION_THRESHOLD: Duration = Duration::from_secs(60);
/// How often the session reports that its thread runs.
const TICK: Duration = Duration::from_secs(5);
/// How long to wait for a connection to close, and at shutdown for a connection attempt to finish.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// Connects to the broker, and runs a session on each connection until it ends.
#[derive(Debug)]
pub struct SessionLoop {
    /// The current configuration.
    pub config: watch::Receiver<Arc<Config>>,
    /// The inbox of the ingest loop.
    pub inbox: Inbox,
    /// Acknowledgments from the ingest loop and the store.
    pub acks_rx: mpsc::UnboundedReceiver<Ack>,
    /// Workers that start, from the ingest loop.
    pub starts_rx: watch::Receiver<WorkerStarts>,
    /// True once the exporter is shutting down.
    pub stop_rx: watch::Receiver<bool>,
    /// The exporter's own metrics.
    pub self_metrics: Arc<SelfMetrics>,
    /// The state behind `/healthz`.
    pub health: Arc<Health>,
}

/// How a subscription ended.
#[derive(Debug)]
struct SessionEnd {
    /// `None` if the exporter is shutting down.
    error: Option<BrokerError>,
    /// Whether any message was received.
    received: bool,
    lasted: Duration,
    at: Instant,
}

impl SessionEnd {
    fn was_healthy(&self) -> bool {
        self.received || self.lasted >= HEALTHY_SESSION_THRESHOLD
    }
}

impl SessionLoop {
    /// Runs until the exporter stops.
    pub async fn run(mut self) {
        let (inbox, health) = (self.inbox.clone(), Arc::clone(&self.health));
        let mut drop_reporter = DropReporter::new(&inbox);
        tokio::select! {
            () = self.run_sessions() => {}
            never = drop_reporter.run() => match never {},
            never = report_liveness(&health) => match never {},
        }
        drop_reporter.report();
        self.health.set_broker(BrokerStatus::Stopped);
        self.self_metrics.connected.set(0);
    }

    async fn run_sessions(&mut self) {
        let mut stop_rx = self.stop_rx.clone();
        let mut backoff = Backoff::default();
        let (mut connect_log, mut disconnect_log) = (LogThrottle::default(), LogThrottle::default());
        let (mut number, mut disconnected_at) = (0, None);
        let mut connector = Connector::default();
        let health = Arc::clone(&self.health);
        while !is_stopped(&stop_rx) {
            let started = Instant::now();
            let config = Arc::clone(&self.config.borrow());
            let connected = tokio::select! {
                connected = connector.connect_any(&config, &mut connect_log, &health) => connected,
                // An attempt in progress gets CLOSE_TIMEOUT to finish, so that the broker sees a proper close.
                () = sleep_after_shutdown(&mut stop_rx, CLOSE_TIMEOUT) => return,
            };
            // The time that an attempt took counts toward the backoff.
            let mut waited = started.elapsed();
            if let Some((url, receiver, broker)) = connected {
                number += 1;
                self.subscribed(&url, &receiver, number, disconnected_at.take());
                let end = self.run_session(receiver, broker, number, (&url, &mut disconnect_log)).await;
                disconnected_at = Some(end.at);
                waited = Duration::ZERO;
                if end.was_healthy() {
                    backoff.reset();
                    connect_log = LogThrottle::default();
                }
            }
            let delay = backoff.next(self.config.borrow().broker.reconnect_backoff_max);
            tokio::select! {
                () = sleep(delay.saturating_sub(waited)) => {}
                _ = stop_rx.wait_for(|stop| *stop) => {}
            }
        }
    }

    fn subscribed(&self, url: &BrokerUrl, receiver: &EventReceiver, number: u64, disconnected_at: Option<Instant>) {
        tracing::info!(broker = %url, "subscribed to {}", receiver.describe());
        self.health.set_subscribed(format!("{} at {url}", receiver.describe()));
        if let Some(since) = disconnected_at {
            self.self_metrics.reconnects.inc();
            self.self_metrics.disconnected_seconds.inc_by(since.elapsed().as_secs_f64());
        }
        self.self_metrics.connected.set(1);
        self.inbox.send(IngestMessage::Connected {
            session: number,
            queue: receiver.named_queue().cloned(),
            disconnect_cause: receiver.disconnect_cause(),
        });
    }

    /// Serves one subscription until it ends.
    async fn run_session(
        &mut self,
        receiver: EventReceiver,
        broker: BrokerHandle,
        number: u64,
        (url, disconnect_log): (&BrokerUrl, &mut LogThrottle),
    ) -> SessionEnd {
        let began = Instant::now();
        let mut any_received = false;
        let reader = Reader { receiver, inbox: &self.inbox, received: &mut any_received };
        let maintenance = Maintenance {
            broker: &broker,
            url,
            config: self.config.clone(),
            acks_rx: &mut self.acks_rx,
            starts_rx: self.starts_rx.clone(),
            inbox: &self.inbox,
            health: &self.health,
            session: number,
        };
        let mut stop_rx = self.stop_rx.clone();
        let error = tokio::select! {
            error = reader.run() => Some(error),
            error = maintenance.run() => Some(error),
            _ = stop_rx.wait_for(|stop| *stop) => None,
        };
        let end = SessionEnd { error, received: any_received, lasted: began.elapsed(), at: Instant::now() };
        if let Some(error) = &end.error {
            self.self_metrics.disconnects.inc();
            self.health.record_broker_error(error.to_string());
            warn_throttled(disconnect_log, "lost connection to broker; reconnecting", Some(url), error);
        }
        self.health.set_broker(BrokerStatus::Connecting);
        self.self_metrics.connected.set(0);
        self.inbox.send(IngestMessage::Disconnected);
        // The broker's answer does not matter. Sending the request does.
        let _ = timeout(CLOSE_TIMEOUT, broker.close()).await;
        end
    }
}

/// Reports that the session's thread runs.
async fn report_liveness(health: &Health) -> Infallible {
    loop {
        health.session_tick();
        sleep(TICK).await;
    }
}

/// A dropped exporter closes the channel, which is also a stop.
fn is_stopped(stop_rx: &watch::Receiver<bool>) -> bool {
    *stop_rx.borrow() || stop_rx.has_changed().is_err()
}

/// Returns once `duration` has passed since shutdown was requested.
async fn sleep_after_shutdown(stop_rx: &mut watch::Receiver<bool>, duration: Duration) {
    // An error is also a stop: see `is_stopped`.
    let _ = stop_rx.wait_for(|stop| *stop).await;
    sleep(duration).await;
}

/// Warns at most once a minute per combination of message, broker and error. The others are logged at debug level.
fn warn_throttled(log: &mut LogThrottle, message: &str, broker: Option<&BrokerUrl>, error: &dyn Error) {
    let broker = broker.map(ToString::to_string);
    if let Some(suppressed) = log.check(&format!("{message} {broker:?} {error}")) {
        tracing::warn!(broker, %error, suppressed, "{message}");
    } else {
        tracing::debug!(broker, %error, "{message}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn end(received: bool, seconds: u64) -> SessionEnd {
        SessionEnd { error: None, received, lasted: Duration::from_secs(seconds), at: Instant::now() }
    }

    #[test]
    fn a_session_is_healthy_once_it_received_a_message_or_lasted_a_minute() {
        assert!(!end(false, 59).was_healthy());
        assert!(end(true, 0).was_healthy());
        assert!(end(false, 60).was_healthy());
    }

    fn session(url: &str) -> (SessionLoop, watch::Sender<bool>, std::sync::mpsc::Receiver<IngestMessage>) {
        let mut config = Config::default();
        config.broker.url = url.parse().unwrap();
        let (stop_tx, stop_rx) = watch::channel(false);
        let (self_metrics, health) = (Arc::new(SelfMetrics::new().unwrap()), Arc::new(Health::default()));
        let (inbox, inbox_rx) = Inbox::new(1 << 20, Arc::clone(&self_metrics), Arc::clone(&health));
        let (_, config) = watch::channel(Arc::new(config));
        let (_, acks_rx) = mpsc::unbounded_channel();
        let (_, starts_rx) = watch::channel(WorkerStarts::default());
        (SessionLoop { config, inbox, acks_rx, starts_rx, stop_rx, self_metrics, health }, stop_tx, inbox_rx)
    }

    #[tokio::test]
    async fn a_stop_ends_the_session_while_the_broker_is_unreachable() {
        // A port that was free a moment ago.
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let (session, stop_tx, inbox_rx) = session(&format!("redis://127.0.0.1:{port}/0"));
        let health = Arc::clone(&session.health);
        assert_eq!(health.broker(), BrokerStatus::Connecting);
        let running = session.run();
        let stop = async {
            sleep(Duration::from_millis(50)).await;
            stop_tx.send(true).unwrap();
        };
        tokio::join!(running, stop);
        assert_eq!(health.broker(), BrokerStatus::Stopped);
        assert!(inbox_rx.try_recv().is_err(), "nothing was received");
    }
}
