//! Sends witnesses through the broker: messages of the exporter that travel the path of the events. On Redis, the
//! receiver itself does, by PING on its connection. The log calls a witness a probe message.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::time::sleep;

use super::warn_throttled;
use crate::broker::{BrokerHandle, witness_interval};
use crate::config::Config;
use crate::observability::{Health, LogThrottle};

/// The shortest pause after a witness has come back.
const MIN_PAUSE: Duration = Duration::from_millis(500);
/// A witness that takes longer indicates a problem.
const EXPECTED_WITHIN: Duration = Duration::from_secs(2);

/// Sends witnesses one after another, each after the one before has come back or is considered lost.
pub(super) async fn send_witnesses(
    broker: &BrokerHandle,
    config_rx: watch::Receiver<Arc<Config>>,
    health: &Health,
) -> Infallible {
    let mut log = LogThrottle::default();
    loop {
        let started = Instant::now();
        let sending = broker.send_witness();
        tokio::pin!(sending);
        let sent = tokio::select! {
            sent = &mut sending => sent,
            () = sleep(EXPECTED_WITHIN) => {
                health.set_event_path_problem(broker.blocked_reason().map(|reason| reason.to_string()));
                sending.await
            }
        };
        health.set_event_path_problem(None);
        if let Err(error) = sent {
            health.set_event_path_problem(Some(format!("failed to send a probe message: {error}")));
            warn_throttled(&mut log, "failed to send a probe message to the exporter's queue", None, &error);
        }
        let interval = witness_interval(&config_rx.borrow());
        sleep(interval.saturating_sub(started.elapsed()).max(MIN_PAUSE)).await;
    }
}
