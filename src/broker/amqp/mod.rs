//! `RabbitMQ`, through lapin, over two connections. One consumes, acknowledges and declares. The other publishes:
//! while an alarm lasts, `RabbitMQ` reads nothing from a connection that has published.

mod connection;
mod handle;
mod publisher;
mod receiver;
mod runtime;
mod topology;
mod witness;

use std::sync::Arc;
use std::time::Duration;

use lapin::options::{BasicConsumeOptions, BasicQosOptions};
use lapin::protocol::{AMQPErrorKind, AMQPSoftError};
use lapin::types::{FieldTable, ShortString};

pub use handle::BrokerHandle;
pub use receiver::EventReceiver;

use connection::Target;
use publisher::Publisher;
use topology::Topology;
use witness::Witnesses;

use super::{BrokerError, ConnectionHistory, RESPONSE_TIMEOUT};
use crate::config::{BrokerUrl, Config};
use crate::tls::TlsConfig;

/// Connects, declares and consumes.
pub(super) async fn connect(
    url: &BrokerUrl,
    config: &Config,
    tls: Option<&TlsConfig>,
    history: &ConnectionHistory,
) -> Result<(EventReceiver, BrokerHandle), BrokerError> {
    let (connection, shutdown_on_drop) = connection::open(url, config, tls, Target::Host(&history.addresses)).await?;
    let topology = Topology::prepare(&connection, config).await?;
    let consumer_channel = connection.create_channel().await.map_err(to_broker_error)?;
    let initial_queue_depth = topology.declare(&consumer_channel).await?.queued;
    let prefetch_count = config.broker.amqp.effective_prefetch_count();
    consumer_channel.basic_qos(prefetch_count, BasicQosOptions { global: false }).await.map_err(to_broker_error)?;
    let options = BasicConsumeOptions { exclusive: !topology.is_durable, ..BasicConsumeOptions::default() };
    let consumer = consumer_channel
        .basic_consume(topology.queue.clone(), ShortString::default(), options, FieldTable::default())
        .await
        .map_err(to_broker_error)?;
    let witnesses = Arc::new(Witnesses::new(&topology.queue));
    let receiver = EventReceiver::new(consumer, &topology, url, config, Arc::clone(&witnesses));
    let publisher = Publisher::new(url, config, tls, shutdown_on_drop.peer()?);
    let handle = BrokerHandle {
        connection,
        consumer_channel,
        topology,
        publisher,
        witnesses,
        response_timeout: response_timeout(config),
        initial_queue_depth,
        _shutdown_on_drop: shutdown_on_drop,
    };
    Ok((receiver, handle))
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
