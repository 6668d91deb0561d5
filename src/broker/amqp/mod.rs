//! `RabbitMQ`, through lapin, over two connections. One consumes, acknowledges and declares. The other publishes:
//! while an alarm lasts, `RabbitMQ` reads nothing from a connection that has published.

mod connection;
mod handle;
mod login;
mod publisher;
mod receiver;
mod runtime;
mod topology;
mod witness;

use std::sync::Arc;
use std::time::{Duration, Instant};

use lapin::options::{BasicConsumeOptions, BasicQosOptions};
use lapin::protocol::{AMQPErrorKind, AMQPSoftError};
use lapin::types::{FieldTable, ShortString};
use lapin::{Channel, Connection, Consumer};
use tokio::time::{sleep, timeout};

pub use handle::BrokerHandle;
pub use receiver::EventReceiver;

use connection::Target;
use login::Login;
use publisher::Publisher;
use topology::Topology;
use witness::Witnesses;

use super::{BrokerError, ConnectionHistory, QueueStats, RESPONSE_TIMEOUT};
use crate::config::{BrokerUrl, Config};
use crate::tls::TlsConfig;

/// How often a named queue is checked until it has no consumer.
const CONSUMER_POLL_INTERVAL: Duration = Duration::from_millis(200);
/// The same while another exporter has the queue.
const STANDBY_POLL_INTERVAL: Duration = Duration::from_secs(1);
/// Added to three heartbeats: a consumer that lasts longer is not the dead connection of the last session.
const STANDBY_MARGIN: Duration = Duration::from_secs(5);

/// Connects, declares and consumes. Each step takes at most `broker.connect_timeout`; between them, it waits until a
/// named queue has no other consumer.
pub(super) async fn connect(
    url: &BrokerUrl,
    config: &Config,
    tls: Option<&TlsConfig>,
    history: &ConnectionHistory,
    on_standby: &dyn Fn(),
) -> Result<(EventReceiver, BrokerHandle), BrokerError> {
    let limit = config.broker.connect_timeout;
    let began = Instant::now();
    let login = Login { url, config, tls };
    let opening = connection::open(url, config, tls, Target::Host(&history.addresses));
    let (connection, shutdown_on_drop) = login.run(opening).await?;
    let declaring = Topology::declare(&connection, config);
    let declared = timeout(limit.saturating_sub(began.elapsed()), declaring).await;
    let (topology, channel) = declared.unwrap_or(Err(BrokerError::Timeout(limit)))?;
    let subscription = Subscription { connection: &connection, topology: &topology, config };
    let (channel, consumer, initial_queue_depth) = if topology.is_durable {
        subscription.wait_and_consume(channel, on_standby).await?
    } else {
        let queued = subscription.stats(&channel).await?.queued;
        let consumer = subscription.consume(&channel).await??;
        (channel, consumer, queued)
    };
    let witnesses = Arc::new(Witnesses::new(&topology.queue));
    let receiver = EventReceiver::new(consumer, &topology, url, config, Arc::clone(&witnesses));
    let publisher = Publisher::new(url, config, tls, shutdown_on_drop.peer()?);
    let handle = BrokerHandle {
        connection,
        consumer_channel: channel,
        topology,
        publisher,
        witnesses,
        response_timeout: response_timeout(config),
        initial_queue_depth,
        _shutdown_on_drop: shutdown_on_drop,
    };
    Ok((receiver, handle))
}

/// What is needed to consume from the queue.
struct Subscription<'s> {
    connection: &'s Connection,
    topology: &'s Topology,
    config: &'s Config,
}

impl Subscription<'_> {
    /// Waits until the queue has no consumer, and consumes. Until the broker notices that the connection of the last
    /// session is dead, it holds the messages of that consumer back, and newer ones would overtake them. Returns the
    /// number of messages that are queued.
    async fn wait_and_consume(
        &self,
        mut channel: Channel,
        on_standby: &dyn Fn(),
    ) -> Result<(Channel, Consumer, u32), BrokerError> {
        let started = Instant::now();
        let standby_after = self.config.broker.amqp.heartbeat * 3 + STANDBY_MARGIN;
        let mut is_standby = false;
        loop {
            let stats = self.stats(&channel).await?;
            if stats.consumers == 0 {
                match self.consume(&channel).await? {
                    // A quorum queue ignores that a consumer is exclusive.
                    Ok(consumer) if self.stats(&channel).await?.consumers <= 1 => {
                        return Ok((channel, consumer, stats.queued));
                    }
                    Ok(_) => channel = self.reopen(&channel).await?,
                    Err(error) => {
                        channel = self.reopen(&channel).await?;
                        if self.stats(&channel).await?.consumers == 0 {
                            return Err(error);
                        }
                    }
                }
            }
            if !is_standby && started.elapsed() > standby_after {
                is_standby = true;
                on_standby();
            }
            let interval = if is_standby { STANDBY_POLL_INTERVAL } else { CONSUMER_POLL_INTERVAL };
            sleep(interval.mul_f64(0.5 + fastrand::f64())).await;
        }
    }

    async fn stats(&self, channel: &Channel) -> Result<QueueStats, BrokerError> {
        self.within_limit(self.topology.stats(channel)).await?
    }

    /// The result of requests to the broker, which must respond to all of them within `broker.connect_timeout`.
    async fn within_limit<T>(&self, requests: impl Future<Output = T>) -> Result<T, BrokerError> {
        let limit = self.config.broker.connect_timeout;
        timeout(limit, requests).await.map_err(|_| BrokerError::Timeout(limit))
    }

    /// Another channel, without a consumer.
    async fn reopen(&self, channel: &Channel) -> Result<Channel, BrokerError> {
        self.within_limit(async {
            // The server has closed it if it refused the consumer.
            let _ = channel.close(200, "the queue has another consumer".into()).await;
            self.connection.create_channel().await.map_err(to_broker_error)
        })
        .await?
    }

    /// The inner error is the server's refusal.
    async fn consume(&self, channel: &Channel) -> Result<Result<Consumer, BrokerError>, BrokerError> {
        let prefetch_count = self.config.broker.amqp.effective_prefetch_count();
        let options = BasicConsumeOptions { exclusive: true, ..BasicConsumeOptions::default() };
        let (queue, tag) = (self.topology.queue.clone(), ShortString::default());
        self.within_limit(async {
            channel.basic_qos(prefetch_count, BasicQosOptions { global: false }).await.map_err(to_broker_error)?;
            channel.basic_consume(queue, tag, options, FieldTable::default()).await.map_err(to_broker_error)
        })
        .await
    }
}

/// How long the broker may take to respond: at least three heartbeats, because lapin tolerates two.
fn response_timeout(config: &Config) -> Duration {
    (config.broker.amqp.heartbeat * 3).max(RESPONSE_TIMEOUT)
}

/// Whether the server refused with this reply code.
fn is_soft_error(error: &lapin::Error, code: &AMQPSoftError) -> bool {
    matches!(error.kind(), lapin::ErrorKind::ProtocolError(refusal)
        if refusal.kind() == &AMQPErrorKind::Soft(code.clone()))
}

#[allow(clippy::needless_pass_by_value, reason = "for map_err")]
fn to_broker_error(error: lapin::Error) -> BrokerError {
    match error.kind() {
        lapin::ErrorKind::ProtocolError(refusal) => BrokerError::Refused(refusal.to_string()),
        lapin::ErrorKind::IOError(error) => BrokerError::from(&**error),
        _ => BrokerError::Disconnected(error.to_string()),
    }
}
