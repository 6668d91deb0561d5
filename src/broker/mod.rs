//! The transports, one module each, behind one small interface: connect, next batch, broadcast, acknowledge.
//!
//! A connection has two halves. The [`EventReceiver`] yields what is received. The [`BrokerHandle`] sends broadcasts
//! and acknowledgments and maintains the subscription, so that neither half waits for the other. Nothing here
//! subscribes again after a failure: the session does.

mod amqp;
mod error;
mod history;
mod net;
mod output_limit;
mod redis;
mod tls_options;

use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};

use crate::celery::Broadcast;
use crate::config::broker_url::Transport;
use crate::config::{BrokerUrl, Config};
use crate::inbox::{Batch, DeliveryTag, NamedQueue};
use crate::observability::GapCause;
use crate::tls::TlsConfig;

pub use error::{BrokerConfigError, BrokerError};
pub use history::ConnectionHistory;

use error::within;
use tls_options::tls_options;

/// The connection ends if the broker does not respond to a request for this long.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(15);

const MIN_WITNESS_INTERVAL: Duration = Duration::from_secs(1);
/// Many exporters, for example one in each pod, must not load the broker.
const MAX_WITNESS_INTERVAL: Duration = Duration::from_secs(5);

/// The time between two witnesses: a second with a named queue, otherwise a tenth of `state.worker_timeout`, from one
/// to five seconds.
#[must_use]
pub fn witness_interval(config: &Config) -> Duration {
    if config.broker.amqp.queue.is_some() {
        return MIN_WITNESS_INTERVAL;
    }
    let (min, max) = (MIN_WITNESS_INTERVAL, MAX_WITNESS_INTERVAL);
    config.state.worker_timeout.map_or(max, |timeout| (timeout / 10).clamp(min, max))
}

/// Statistics of the exporter's queue at the broker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueStats {
    /// Messages that are ready for delivery.
    pub queued: u32,
    /// Consumers of the queue. Two or more split the events among them.
    pub consumers: u32,
}

/// The half that receives.
#[derive(Debug)]
pub enum EventReceiver {
    /// A subscribed Redis connection.
    Redis(Box<redis::EventReceiver>),
    /// A consumer on `RabbitMQ`.
    Amqp(Box<amqp::EventReceiver>),
}

impl EventReceiver {
    /// Subscribes on database 0 of the Redis server at the other end of a stream. For the fuzz targets.
    ///
    /// # Errors
    /// Returns an error if the server does not confirm the subscription.
    #[doc(hidden)]
    pub async fn redis_from_stream(
        stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
        config: &Config,
    ) -> Result<Self, BrokerError> {
        Ok(Self::Redis(Box::new(redis::EventReceiver::from_stream(stream, config).await?)))
    }

    /// The next messages: all that are available, up to about a thousand. Cancelling loses nothing.
    ///
    /// # Errors
    /// Returns an error if the connection has ended.
    pub async fn next(&mut self) -> Result<Batch, BrokerError> {
        match self {
            Self::Redis(redis) => redis.next().await,
            Self::Amqp(amqp) => amqp.next().await,
        }
    }

    /// Whether the broker keeps messages that are not read. If not, messages that do not fit into the buffer must be
    /// dropped.
    #[must_use]
    pub fn supports_backpressure(&self) -> bool {
        matches!(self, Self::Amqp(_))
    }

    /// The named queue. `None` if the broker keeps nothing while the exporter is disconnected.
    #[must_use]
    pub fn named_queue(&self) -> Option<&NamedQueue> {
        match self {
            Self::Redis(_) => None,
            Self::Amqp(amqp) => amqp.named_queue.as_ref(),
        }
    }

    /// Why the session before ended, as far as the broker shows it.
    #[must_use]
    pub fn disconnect_cause(&self) -> GapCause {
        match self {
            Self::Redis(redis) => redis.disconnect_cause,
            Self::Amqp(_) => GapCause::Disconnected,
        }
    }

    /// The subscription's source in the broker's terms: channels, or queue and exchange.
    #[must_use]
    pub fn describe(&self) -> String {
        match self {
            Self::Redis(redis) => redis.describe(),
            Self::Amqp(amqp) => amqp.describe(),
        }
    }
}

/// The half that sends.
#[derive(Debug)]
pub enum BrokerHandle {
    /// A separate Redis client: a PUBLISH must not wait behind a burst.
    Redis(Box<redis::BrokerHandle>),
    /// Two `RabbitMQ` connections: the consumer's, and one for publishing.
    Amqp(Box<amqp::BrokerHandle>),
}

impl BrokerHandle {
    /// Sends a command to all workers.
    ///
    /// # Errors
    /// Returns an error if the command could not be sent. A later command may succeed.
    pub async fn broadcast(&self, command: Broadcast) -> Result<(), BrokerError> {
        match self {
            Self::Redis(redis) => Box::pin(redis.broadcast(command)).await,
            Self::Amqp(amqp) => Box::pin(amqp.broadcast(command)).await,
        }
    }

    /// Acknowledges all messages before this one, and this one too if the queue is not a named one: there, the newest
    /// message is kept to show that nothing was lost.
    ///
    /// # Errors
    /// Returns an error if the connection has ended.
    pub async fn acknowledge(&self, tag: DeliveryTag) -> Result<(), BrokerError> {
        match self {
            Self::Redis(_) => Ok(()),
            Self::Amqp(amqp) => amqp.acknowledge(tag).await,
        }
    }

    /// Sends a witness to the exporter's queue. Returns once it or a later one has come back, or after 15 s, because it
    /// may be lost. On Redis it never returns: the receiver sends witnesses.
    ///
    /// # Errors
    /// Returns an error if the witness could not be published. A later one may succeed.
    pub async fn send_witness(&self) -> Result<(), BrokerError> {
        match self {
            Self::Redis(_) => std::future::pending().await,
            Self::Amqp(amqp) => Box::pin(amqp.send_witness()).await,
        }
    }

    /// Whether there is a queue to check.
    #[must_use]
    pub fn has_queue(&self) -> bool {
        matches!(self, Self::Amqp(_))
    }

    /// Messages that were queued when the connection was made.
    #[must_use]
    pub fn initial_queue_depth(&self) -> u32 {
        match self {
            Self::Redis(_) => 0,
            Self::Amqp(amqp) => amqp.initial_queue_depth,
        }
    }

    /// Why the broker does not respond although the connection is intact, if that is known.
    #[must_use]
    pub fn blocked_reason(&self) -> Option<BrokerError> {
        match self {
            Self::Redis(_) => None,
            Self::Amqp(amqp) => amqp.blocked_reason(),
        }
    }

    /// Closes the connection properly.
    pub async fn close(&self) {
        match self {
            Self::Redis(redis) => Box::pin(redis.close()).await,
            Self::Amqp(amqp) => amqp.close().await,
        }
    }

    /// Returns once another server must be used: Redis Sentinel reports another master, or the Redis master became a
    /// replica. On `RabbitMQ`, never.
    pub async fn wait_for_failover(&self) -> BrokerError {
        match self {
            Self::Redis(redis) => Box::pin(redis.wait_for_failover()).await,
            Self::Amqp(_) => std::future::pending().await,
        }
    }

    /// Declares the exchanges and bindings again, and returns the queue's statistics. A consumer is not notified when
    /// the exchange is deleted.
    ///
    /// # Errors
    /// Returns an error if the connection has ended.
    pub async fn redeclare(&self) -> Result<QueueStats, BrokerError> {
        match self {
            Self::Redis(_) => Ok(QueueStats { queued: 0, consumers: 1 }),
            Self::Amqp(amqp) => amqp.redeclare().await,
        }
    }
}

/// Checks the URLs and the files that they need, and warns if verification is turned off.
///
/// # Errors
/// Returns an error if a URL or a TLS file cannot be used: the first one found.
pub fn validate(config: &Config) -> Result<(), BrokerConfigError> {
    let mut verified = true;
    for url in config.broker.urls()?.iter().filter(|url| config.broker.tls_for(url)) {
        verified &= TlsConfig::new(&tls_options(url, &config.broker.tls))?.verifies();
    }
    if !verified {
        tracing::warn!("broker certificate is not verified; anyone can impersonate the broker");
    }
    Ok(())
}

/// Connects to the broker at `url`, one of `all`, and subscribes. When it returns `Ok`, the server has confirmed the
/// subscription. `accept_replica` is false if another server may be the Redis master. `on_standby` is called if another
/// exporter consumes the named queue: then it waits until that one is gone.
///
/// # Errors
/// Returns an error if a step takes longer than `broker.connect_timeout`. [`BrokerError::Replica`] means that the
/// server is a replica, and that this is not accepted, or that the session has seen a master.
pub async fn connect(
    url: &BrokerUrl,
    all: &[BrokerUrl],
    config: &Config,
    history: &ConnectionHistory,
    accept_replica: bool,
    on_standby: &dyn Fn(),
) -> Result<(EventReceiver, BrokerHandle), BrokerError> {
    let config = &config.for_url(url);
    let limit = config.broker.connect_timeout;
    for parameter in &url.parameters_without_effect {
        tracing::debug!(broker = %url, parameter, "this parameter of the broker URL has no effect");
    }
    let tls = tls_config(url, config)?;
    let connecting = async {
        match url.transport {
            Transport::Amqp => {
                let (receiver, handle) = amqp::connect(url, config, tls.as_ref(), history, on_standby).await?;
                Ok((EventReceiver::Amqp(Box::new(receiver)), BrokerHandle::Amqp(Box::new(handle))))
            }
            Transport::Redis | Transport::Sentinel => {
                let connecting = redis::connect(url, all, config, tls.as_ref(), history, accept_replica);
                let (receiver, handle) = within(limit, connecting).await?;
                Ok((EventReceiver::Redis(Box::new(receiver)), BrokerHandle::Redis(Box::new(handle))))
            }
        }
    };
    connecting.await
}

/// TLS for connections to the broker at `url`, if it is on.
fn tls_config(url: &BrokerUrl, config: &Config) -> Result<Option<TlsConfig>, BrokerError> {
    if !config.broker.tls_for(url) {
        return Ok(None);
    }
    let tls = TlsConfig::new(&tls_options(url, &config.broker.tls));
    tls.map(Some).map_err(|error| BrokerError::Tls(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn witnesses_are_sent_every_one_to_five_seconds() {
        let mut config = Config::default();
        for (timeout, expected) in [(None, 5), (Some(1), 1), (Some(30), 3), (Some(60), 5), (Some(600), 5)] {
            config.state.worker_timeout = timeout.map(Duration::from_secs);
            assert_eq!(witness_interval(&config), Duration::from_secs(expected));
        }
        config.broker.amqp.queue = Some("q".to_owned());
        assert_eq!(witness_interval(&config), Duration::from_secs(1));
    }
}
