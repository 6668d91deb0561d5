//! Tries the broker's URLs in turn.

use std::collections::VecDeque;

use super::warn_throttled;
use crate::broker::{self, BrokerError, BrokerHandle, ConnectionHistory, EventReceiver};
use crate::config::{BrokerUrl, Config};
use crate::observability::{BrokerStatus, Health, LogThrottle};

/// Connects, and remembers what earlier connections have shown.
#[derive(Debug, Default)]
pub(super) struct Connector {
    history: ConnectionHistory,
    last_url: Option<BrokerUrl>,
}

impl Connector {
    /// Tries each URL once, that of the last session at the end. With several URLs, a Redis replica is used only if no
    /// server is a master.
    pub(super) async fn connect_any(
        &mut self,
        config: &Config,
        log: &mut LogThrottle,
        health: &Health,
    ) -> Option<(BrokerUrl, EventReceiver, BrokerHandle)> {
        let urls = match config.broker.urls() {
            Ok(urls) => urls,
            Err(error) => {
                health.record_broker_error(error.to_string());
                warn_throttled(log, "failed to read broker URL; retrying", None, &error);
                return None;
            }
        };
        let on_standby = || {
            tracing::warn!("another consumer is consuming from broker.amqp.queue; on standby until it is gone");
            health.set_broker(BrokerStatus::Standby);
        };
        let accept_replica = urls.len() == 1;
        let mut attempts: VecDeque<_> =
            rotated(&urls, self.last_url.as_ref()).map(|url| (url, accept_replica)).collect();
        while let Some((url, accept_replica)) = attempts.pop_front() {
            tracing::debug!(broker = %url, "connecting to broker");
            match broker::connect(url, &urls, config, &self.history, accept_replica, &on_standby).await {
                Ok((receiver, broker)) => {
                    self.last_url = Some(url.clone());
                    return Some((url.clone(), receiver, broker));
                }
                Err(BrokerError::Replica) if !accept_replica && !self.history.has_seen_master() => {
                    attempts.push_back((url, true));
                }
                Err(error) => {
                    health.set_broker(BrokerStatus::Connecting);
                    health.record_broker_error(error.to_string());
                    warn_throttled(log, "failed to connect to broker; retrying", Some(url), &error);
                }
            }
        }
        None
    }
}

/// The URLs in their order, beginning after `last`.
fn rotated<'u>(urls: &'u [BrokerUrl], last: Option<&BrokerUrl>) -> impl Iterator<Item = &'u BrokerUrl> {
    let first = urls.iter().position(|url| Some(url) == last).map_or(0, |position| position + 1);
    urls[first..].iter().chain(&urls[..first])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_url_of_the_last_session_is_tried_last() {
        let urls: Vec<BrokerUrl> = ["redis://a", "redis://b", "redis://c"].map(|url| url.parse().unwrap()).into();
        let hosts = |last: Option<&BrokerUrl>| rotated(&urls, last).map(ToString::to_string).collect::<Vec<_>>();
        let [a, b, c] = [0, 1, 2].map(|index| urls[index].to_string());
        assert_eq!(hosts(None), [&*a, &b, &c]);
        assert_eq!(hosts(Some(&urls[0])), [&*b, &c, &a]);
        assert_eq!(hosts(Some(&urls[2])), [&*a, &b, &c]);
        assert_eq!(hosts(Some(&"redis://gone".parse().unwrap())), [&*a, &b, &c]);
    }
}
