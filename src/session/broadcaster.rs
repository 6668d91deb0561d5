//! Sends broadcasts to the workers, and reports failures.

use tokio::time::timeout;

use super::warn_throttled;
use crate::broker::{BrokerError, BrokerHandle};
use crate::celery::Broadcast;
use crate::config::{BrokerUrl, Config};
use crate::observability::{Health, LogThrottle, WarningSource};

/// Sends broadcasts. A failure does not end the session, because events still arrive. It is a warning until the next
/// broadcast succeeds.
pub(super) struct Broadcaster<'s> {
    broker: &'s BrokerHandle,
    url: &'s BrokerUrl,
    pub(super) health: &'s Health,
    log: LogThrottle,
}

impl<'s> Broadcaster<'s> {
    pub(super) fn new(broker: &'s BrokerHandle, url: &'s BrokerUrl, health: &'s Health) -> Self {
        Self { broker, url, health, log: LogThrottle::default() }
    }

    pub(super) async fn broadcast(&mut self, command: Broadcast, config: &Config) {
        let limit = config.broker.connect_timeout_for(self.url);
        let sent = timeout(limit, self.broker.broadcast(command)).await;
        match sent.unwrap_or_else(|_| Err(self.broker.blocked_reason().unwrap_or(BrokerError::Timeout(limit)))) {
            Ok(()) => {
                tracing::trace!(command = command.method(), "broadcast sent");
                self.health.set_warnings(WarningSource::Broadcast, Vec::new());
            }
            Err(error) => {
                let message = format!("failed to broadcast {} to workers", command.method());
                warn_throttled(&mut self.log, &message, None, &error);
                self.health.set_unlogged_warnings(WarningSource::Broadcast, vec![format!("{message}: {error}")]);
            }
        }
    }
}
