//! Sends witnesses through the broker: messages of the exporter that travel the path of the events. On Redis, the
//! receiver itself does, by PING on its connection.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::time::sleep;

use super::warn_throttled;
use crate::broker::BrokerHandle;
use crate::config::Config;
use crate::observability::{Health, LogThrottle};

const MIN_INTERVAL: Duration = Duration::from_secs(1);
/// Many exporters, for example one in each pod, must not load the broker.
const MAX_INTERVAL: Duration = Duration::from_secs(5);
/// A witness that takes longer indicates a problem.
const EXPECTED_WITHIN: Duration = Duration::from_secs(2);

/// Sends witnesses one after another, each after the one before has come back.
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
            health.set_event_path_problem(Some(format!("failed to send a witness: {error}")));
            warn_throttled(&mut log, "failed to send a witness to the exporter's queue", None, &error);
        }
        let interval = interval(&config_rx.borrow());
        sleep(interval.saturating_sub(started.elapsed()).max(MIN_INTERVAL / 2)).await;
    }
}

/// The time between two witnesses: a second with a named queue, otherwise a tenth of `state.worker_timeout`.
fn interval(config: &Config) -> Duration {
    if config.broker.amqp.queue.is_some() {
        return MIN_INTERVAL;
    }
    config.state.worker_timeout.map_or(MAX_INTERVAL, |timeout| (timeout / 10).clamp(MIN_INTERVAL, MAX_INTERVAL))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn witnesses_are_sent_every_one_to_five_seconds() {
        let mut config = Config::default();
        for (timeout, expected) in [(None, 5), (Some(1), 1), (Some(30), 3), (Some(60), 5), (Some(600), 5)] {
            config.state.worker_timeout = timeout.map(Duration::from_secs);
            assert_eq!(interval(&config), Duration::from_secs(expected));
        }
        config.broker.amqp.queue = Some("q".to_owned());
        assert_eq!(interval(&config), Duration::from_secs(1));
    }
}
