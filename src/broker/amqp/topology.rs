//! What the exporter declares on `RabbitMQ`: Celery's event exchange, and a queue bound to it.

use std::time::Duration;

use lapin::options::{
    BasicAckOptions, BasicGetOptions, BasicNackOptions, BasicPublishOptions, ConfirmSelectOptions,
    ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions,
};
use lapin::protocol::AMQPSoftError;
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::{BasicProperties, Channel, Connection, ExchangeKind};
use uuid::Uuid;

use super::{is_soft_error, to_broker_error};
use crate::broker::{BrokerError, QueueStats};
use crate::config::Config;

/// Long, because the continuity marker must outlive the queue.
const CONTINUITY_MARKER_EXPIRES: Duration = Duration::from_secs(30 * 86_400);
const PASSIVE: QueueDeclareOptions =
    QueueDeclareOptions { passive: true, durable: false, exclusive: false, auto_delete: false, nowait: false };

#[derive(Clone, Debug)]
pub(super) struct Topology {
    pub(super) exchange: ShortString,
    pub(super) queue: ShortString,
    /// A named queue, which keeps collecting while the exporter is disconnected.
    pub(super) is_durable: bool,
    /// Identifies the queue's contents. `None` without a named queue, or without permission for the marker.
    pub(super) continuity_marker: Option<String>,
    /// The user may not declare the exchange, so it must exist.
    declare_passively: bool,
    arguments: FieldTable,
}

impl Topology {
    /// Declares the event exchange, and finds or writes the continuity marker of a named queue. A refusal closes the
    /// channel, so the parts use separate ones.
    pub(super) async fn prepare(connection: &Connection, config: &Config) -> Result<Self, BrokerError> {
        let mut topology = Self::new(config);
        let channel = connection.create_channel().await.map_err(to_broker_error)?;
        match topology.declare_exchange(&channel).await {
            Ok(()) => {}
            Err(error) if is_soft_error(&error, &AMQPSoftError::ACCESSREFUSED) => {
                tracing::debug!("no permission to declare the event exchange; it must exist");
                topology.declare_passively = true;
            }
            Err(error) => return Err(to_broker_error(error)),
        }
        if topology.is_durable {
            topology.continuity_marker = topology.find_or_write_continuity_marker(connection).await?;
        }
        Ok(topology)
    }

    /// The continuity marker is a transient message, like the events, in a second queue. A restart of the broker keeps
    /// both queues and drops the messages of both. If the marker or the named queue is missing, a new marker is
    /// written.
    async fn find_or_write_continuity_marker(&self, connection: &Connection) -> Result<Option<String>, BrokerError> {
        let channel = connection.create_channel().await.map_err(to_broker_error)?;
        let found = channel.queue_declare(self.queue.clone(), PASSIVE, FieldTable::default()).await.is_ok();
        let channel = connection.create_channel().await.map_err(to_broker_error)?;
        let marker = async {
            self.declare_continuity_marker(&channel).await?;
            match channel.basic_get(self.continuity_marker_name(), BasicGetOptions { no_ack: false }).await? {
                Some(message) if found => {
                    message.nack(BasicNackOptions { requeue: true, ..BasicNackOptions::default() }).await?;
                    Ok(String::from_utf8_lossy(&message.data).into_owned())
                }
                Some(message) => {
                    message.ack(BasicAckOptions::default()).await?;
                    self.write_continuity_marker(&channel).await
                }
                None => self.write_continuity_marker(&channel).await,
            }
        };
        match marker.await {
            Ok(marker) => Ok(Some(marker)),
            Err(error) if is_soft_error(&error, &AMQPSoftError::ACCESSREFUSED) => {
                tracing::warn!(
                    queue = %self.continuity_marker_name(),
                    "no permission for the continuity marker; every reconnect counts as a gap"
                );
                Ok(None)
            }
            Err(error) => Err(to_broker_error(error)),
        }
    }

    fn continuity_marker_name(&self) -> ShortString {
        format!("{}.mark", self.queue).into()
    }

    /// Declares an exchange and a queue with the marker's name. They expire after a month without use.
    async fn declare_continuity_marker(&self, channel: &Channel) -> lapin::Result<()> {
        let exchange = ExchangeDeclareOptions { durable: true, auto_delete: true, ..ExchangeDeclareOptions::default() };
        channel
            .exchange_declare(self.continuity_marker_name(), ExchangeKind::Fanout, exchange, FieldTable::default())
            .await?;
        let mut arguments = FieldTable::default();
        arguments.insert("x-expires".into(), milliseconds(CONTINUITY_MARKER_EXPIRES));
        arguments.insert("x-max-length".into(), AMQPValue::LongInt(1));
        let queue = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
        channel.queue_declare(self.continuity_marker_name(), queue, arguments).await?;
        let (name, none) = (self.continuity_marker_name(), ShortString::default());
        channel.queue_bind(name.clone(), name, none, QueueBindOptions::default(), FieldTable::default()).await
    }

    async fn write_continuity_marker(&self, channel: &Channel) -> lapin::Result<String> {
        let marker = Uuid::new_v4().to_string();
        channel.confirm_select(ConfirmSelectOptions::default()).await?;
        let (exchange, key, options) =
            (self.continuity_marker_name(), ShortString::default(), BasicPublishOptions::default());
        // Transient, like events.
        let properties = BasicProperties::default().with_delivery_mode(1);
        channel.basic_publish(exchange, key, options, marker.as_bytes(), properties).await?.await?;
        Ok(marker)
    }

    fn new(config: &Config) -> Self {
        let amqp = &config.broker.amqp;
        let mut arguments = FieldTable::default();
        arguments.insert("x-expires".into(), milliseconds(amqp.effective_expires()));
        let bytes = i64::try_from(amqp.queue_max_bytes).unwrap_or(i64::MAX);
        arguments.insert("x-max-length-bytes".into(), AMQPValue::LongLongInt(bytes));
        if let Some(ttl) = amqp.message_ttl {
            arguments.insert("x-message-ttl".into(), milliseconds(ttl));
        }
        // An unnamed queue is named as Flower and Celery's event receiver name theirs, so that the same permissions
        // fit.
        let generated = || format!("{}.{}", config.events.exchange, Uuid::new_v4());
        Self {
            exchange: config.events.exchange.as_str().into(),
            queue: amqp.queue.clone().unwrap_or_else(generated).into(),
            is_durable: amqp.queue.is_some(),
            continuity_marker: None,
            declare_passively: false,
            arguments,
        }
    }

    /// Declares and binds exchange and queue. Nothing changes if they exist.
    pub(super) async fn declare(&self, channel: &Channel) -> Result<QueueStats, BrokerError> {
        let exclusive = !self.is_durable;
        let options = QueueDeclareOptions {
            durable: self.is_durable,
            exclusive,
            auto_delete: exclusive,
            ..QueueDeclareOptions::default()
        };
        self.declare_with(channel, options).await
    }

    /// The same for a queue that is being consumed. A named queue that was deleted is not created again here: only a
    /// reconnect may, because it writes a new marker.
    pub(super) async fn redeclare(&self, channel: &Channel) -> Result<QueueStats, BrokerError> {
        if !self.is_durable {
            return self.declare(channel).await;
        }
        if self.continuity_marker.is_some() {
            self.declare_continuity_marker(channel).await.map_err(to_broker_error)?;
        }
        self.declare_with(channel, PASSIVE).await
    }

    async fn declare_with(&self, channel: &Channel, options: QueueDeclareOptions) -> Result<QueueStats, BrokerError> {
        self.declare_exchange(channel).await.map_err(to_broker_error)?;
        let declared = channel.queue_declare(self.queue.clone(), options, self.arguments.clone()).await;
        let queue = declared.map_err(|error| self.explain(error))?;
        self.bind(channel, self.exchange.clone(), "#".into()).await.map_err(to_broker_error)?;
        self.declare_witness_exchange(channel).await.map_err(|error| self.explain_witness(error))?;
        Ok(QueueStats { queued: queue.message_count(), consumers: queue.consumer_count() })
    }

    async fn declare_exchange(&self, channel: &Channel) -> lapin::Result<()> {
        let options = ExchangeDeclareOptions {
            durable: true,
            passive: self.declare_passively,
            ..ExchangeDeclareOptions::default()
        };
        channel.exchange_declare(self.exchange.clone(), ExchangeKind::Topic, options, FieldTable::default()).await
    }

    /// See [`super::witness`]. It is deleted with the queue.
    async fn declare_witness_exchange(&self, channel: &Channel) -> lapin::Result<()> {
        let options = ExchangeDeclareOptions { auto_delete: true, ..ExchangeDeclareOptions::default() };
        channel.exchange_declare(self.queue.clone(), ExchangeKind::Fanout, options, FieldTable::default()).await?;
        self.bind(channel, self.queue.clone(), ShortString::default()).await
    }

    async fn bind(&self, channel: &Channel, exchange: ShortString, key: ShortString) -> lapin::Result<()> {
        channel.queue_bind(self.queue.clone(), exchange, key, QueueBindOptions::default(), FieldTable::default()).await
    }

    fn explain_witness(&self, error: lapin::Error) -> BrokerError {
        let queue = &self.queue;
        to_broker_error(error).context(&format!(
            "exchange {queue}: the user needs configure, write and read permission for exchanges named like the queue, \
             and no other exchange may have this name"
        ))
    }

    /// A queue keeps the arguments that it was created with until it is deleted.
    fn explain(&self, error: lapin::Error) -> BrokerError {
        if !is_soft_error(&error, &AMQPSoftError::PRECONDITIONFAILED) {
            return to_broker_error(error);
        }
        let queue = &self.queue;
        BrokerError::Refused(format!(
            "queue {queue} exists with different arguments; restore the broker.amqp settings or delete the queue \
             and its messages (rabbitmqctl delete_queue -p VHOST {queue}): {error}"
        ))
    }
}

fn milliseconds(duration: Duration) -> AMQPValue {
    AMQPValue::LongLongInt(i64::try_from(duration.as_millis()).unwrap_or(i64::MAX))
}
