//! The sending half. It owns the connection: dropping it closes everything.

use std::fmt;
use std::time::Duration;

use lapin::options::{
    BasicAckOptions, BasicPublishOptions, BasicQosOptions, ConfirmSelectOptions, ExchangeDeclareOptions,
};
use lapin::protocol::AMQPSoftError;
use lapin::types::{FieldTable, ShortString};
use lapin::{BasicProperties, Channel, Connection, ExchangeKind};
use tokio::sync::Mutex;
use tokio::time::timeout;

use super::connection::ShutdownOnDrop;
use super::topology::Topology;
use super::{is_soft_error, response_timeout, to_broker_error};
use crate::broker::{BrokerError, QueueStats};
use crate::celery::Broadcast;
use crate::config::Config;
use crate::inbox::DeliveryTag;

pub struct BrokerHandle {
    connection: Connection,
    consumer_channel: Channel,
    publish_channel: Mutex<Option<Channel>>,
    topology: Topology,
    pidbox: String,
    prefetch_count: u16,
    response_timeout: Duration,
    /// See [`crate::broker::BrokerHandle::initial_queue_depth`].
    pub(in crate::broker) initial_queue_depth: u32,
    _shutdown_on_drop: ShutdownOnDrop,
}

impl fmt::Debug for BrokerHandle {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.debug_struct("BrokerHandle").field("pidbox", &self.pidbox).finish_non_exhaustive()
    }
}

impl BrokerHandle {
    pub(super) fn new(
        connection: Connection,
        consumer_channel: Channel,
        topology: Topology,
        config: &Config,
        initial_queue_depth: u32,
        shutdown_on_drop: ShutdownOnDrop,
    ) -> Self {
        Self {
            connection,
            consumer_channel,
            publish_channel: Mutex::new(None),
            topology,
            pidbox: format!("{}.pidbox", config.events.control_exchange),
            prefetch_count: config.broker.amqp.effective_prefetch_count(),
            response_timeout: response_timeout(config),
            initial_queue_depth,
            _shutdown_on_drop: shutdown_on_drop,
        }
    }

    pub(in crate::broker) async fn broadcast(&self, command: Broadcast) -> Result<(), BrokerError> {
        self.blocked_reason().map_or(Ok(()), Err)?;
        let mut open_channel = self.publish_channel.lock().await;
        let channel = match open_channel.take() {
            Some(channel) if channel.status().connected() => channel,
            _ => self.open_publish_channel().await?,
        };
        let published = self.publish(&channel, command).await;
        if published.is_ok() {
            *open_channel = Some(channel);
        }
        published
    }

    /// Declares the exchange first: it is transient, and publishing to a missing one closes the channel. A user who may
    /// not declare it may still publish to it.
    async fn open_publish_channel(&self) -> Result<Channel, BrokerError> {
        for passive in [false, true] {
            let channel = self.connection.create_channel().await.map_err(to_broker_error)?;
            let options = ExchangeDeclareOptions { passive, ..ExchangeDeclareOptions::default() };
            let declared = channel
                .exchange_declare(self.pidbox.as_str().into(), ExchangeKind::Fanout, options, FieldTable::default())
                .await;
            match declared {
                Ok(()) => {
                    // With publisher confirms, the server reports a refusal.
                    channel.confirm_select(ConfirmSelectOptions::default()).await.map_err(to_broker_error)?;
                    return Ok(channel);
                }
                Err(error) if is_soft_error(&error, &AMQPSoftError::ACCESSREFUSED) && !passive => {}
                Err(error) => return Err(to_broker_error(error)),
            }
        }
        unreachable!("the second iteration returns")
    }

    async fn publish(&self, channel: &Channel, command: Broadcast) -> Result<(), BrokerError> {
        let properties = BasicProperties::default()
            .with_content_type("application/json".into())
            .with_content_encoding("utf-8".into())
            .with_delivery_mode(1);
        let body = command.body();
        let options = BasicPublishOptions::default();
        let exchange: ShortString = self.pidbox.as_str().into();
        let confirmation = channel
            .basic_publish(exchange, ShortString::default(), options, body.as_bytes(), properties)
            .await
            .map_err(to_broker_error)?;
        confirmation.await.map_err(to_broker_error)?;
        Ok(())
    }

    /// Makes a request that changes nothing: it sets the current prefetch count again. lapin's own
    /// heartbeats only detect missing bytes.
    pub(in crate::broker) async fn check_liveness(&self) -> Result<(), BrokerError> {
        self.blocked_reason().map_or(Ok(()), Err)?;
        let request = self.consumer_channel.basic_qos(self.prefetch_count, BasicQosOptions { global: false });
        match timeout(self.response_timeout, request).await {
            Ok(response) => response.map_err(to_broker_error),
            Err(_) => Err(self.blocked_reason().unwrap_or(BrokerError::Timeout(self.response_timeout))),
        }
    }

    /// While an alarm lasts, the server reads nothing from a connection that has published. No request is answered, and
    /// the workers' events do not arrive.
    pub(in crate::broker) fn blocked_reason(&self) -> Option<BrokerError> {
        let alarm = "RabbitMQ alarm: publishers are blocked (memory or disk); see rabbitmq-diagnostics alarms";
        self.connection.status().blocked().then(|| BrokerError::Refused(alarm.to_owned()))
    }

    pub(in crate::broker) async fn close(&self) {
        // The connection ends either way.
        let _ = self.connection.close(200, "exporter is closing the connection".into()).await;
    }

    pub(in crate::broker) async fn acknowledge(&self, tag: DeliveryTag) -> Result<(), BrokerError> {
        self.consumer_channel.basic_ack(tag.0, BasicAckOptions { multiple: true }).await.map_err(to_broker_error)
    }

    pub(in crate::broker) async fn redeclare(&self) -> Result<QueueStats, BrokerError> {
        self.topology.redeclare(&self.consumer_channel).await
    }
}
