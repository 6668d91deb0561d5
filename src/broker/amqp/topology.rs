//! What the exporter declares on `RabbitMQ`: Celery's event exchange, and a queue bound to it.

use std::time::Duration;

use lapin::options::{ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions};
use lapin::protocol::AMQPSoftError;
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::{Channel, Connection, ExchangeKind};
use uuid::Uuid;

use super::{is_soft_error, to_broker_error};
use crate::broker::{BrokerError, QueueStats};
use crate::config::Config;

const PASSIVE: QueueDeclareOptions =
    QueueDeclareOptions { passive: true, durable: false, exclusive: false, auto_delete: false, nowait: false };

#[derive(Clone, Debug)]
pub(super) struct Topology {
    pub(super) exchange: ShortString,
    pub(super) queue: ShortString,
    /// A named queue, which keeps collecting while the exporter is disconnected.
    pub(super) is_durable: bool,
    /// A named queue existed before this session.
    pub(super) existed: bool,
    /// The type of the queue, if it was declared with one.
    pub(super) queue_type: Option<&'static str>,
    /// The user may not declare the exchange, so it must exist.
    declare_passively: bool,
    arguments: FieldTable,
}

impl Topology {
    /// Declares the exchanges and the queue, and binds them. Returns the channel for the consumer. A refusal closes its
    /// channel, so each attempt has a separate one.
    pub(super) async fn declare(connection: &Connection, config: &Config) -> Result<(Self, Channel), BrokerError> {
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
            let channel = connection.create_channel().await.map_err(to_broker_error)?;
            topology.existed = topology.stats(&channel).await.is_ok();
        }
        let channel = topology.declare_queue(connection).await?;
        topology.bind_all(&channel).await?;
        Ok((topology, channel))
    }

    /// Declares the queue. A named queue is a classic one, unless it exists with another type, for example the default
    /// type of its virtual host.
    async fn declare_queue(&mut self, connection: &Connection) -> Result<Channel, BrokerError> {
        let exclusive = !self.is_durable;
        let options = QueueDeclareOptions {
            durable: self.is_durable,
            exclusive,
            auto_delete: exclusive,
            ..QueueDeclareOptions::default()
        };
        let types: &[Option<&'static str>] = if exclusive { &[None] } else { &[Some("classic"), Some("quorum"), None] };
        let mut refusals = Vec::new();
        for queue_type in types {
            let mut arguments = self.arguments.clone();
            if let Some(queue_type) = queue_type {
                arguments.insert("x-queue-type".into(), AMQPValue::LongString((*queue_type).into()));
            }
            let channel = connection.create_channel().await.map_err(to_broker_error)?;
            match channel.queue_declare(self.queue.clone(), options, arguments).await {
                Ok(_) => {
                    self.queue_type = *queue_type;
                    return Ok(channel);
                }
                Err(error) if is_soft_error(&error, &AMQPSoftError::PRECONDITIONFAILED) => refusals.push(error),
                Err(error) => return Err(to_broker_error(error)),
            }
        }
        Err(self.explain(&refusals))
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
            existed: false,
            queue_type: None,
            declare_passively: false,
            arguments,
        }
    }

    /// Declares the exchanges again, and binds them to the queue, which is not created again: only a new session may do
    /// that, because it is a gap.
    pub(super) async fn redeclare(&self, channel: &Channel) -> Result<QueueStats, BrokerError> {
        self.declare_exchange(channel).await.map_err(to_broker_error)?;
        self.bind_all(channel).await?;
        self.stats(channel).await
    }

    async fn bind_all(&self, channel: &Channel) -> Result<(), BrokerError> {
        self.bind(channel, self.exchange.clone(), "#".into()).await.map_err(to_broker_error)?;
        self.declare_witness_exchange(channel).await.map_err(|error| self.explain_witness(error))
    }

    /// The queue's statistics.
    pub(super) async fn stats(&self, channel: &Channel) -> Result<QueueStats, BrokerError> {
        let declared = channel.queue_declare(self.queue.clone(), PASSIVE, FieldTable::default()).await;
        let queue = declared.map_err(to_broker_error)?;
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
        let refusals = [AMQPSoftError::ACCESSREFUSED, AMQPSoftError::PRECONDITIONFAILED];
        if !refusals.iter().any(|code| is_soft_error(&error, code)) {
            return to_broker_error(error);
        }
        let queue = &self.queue;
        to_broker_error(error).context(&format!(
            "exchange {queue}: the user needs configure, write and read permission for exchanges named like the queue, \
             and no other exchange may have this name"
        ))
    }

    /// A queue keeps the arguments that it was created with until it is deleted.
    fn explain(&self, refusals: &[lapin::Error]) -> BrokerError {
        let queue = &self.queue;
        // If more than the type differs, another refusal names the other argument.
        let named = refusals.iter().map(ToString::to_string).find(|refusal| !refusal.contains("x-queue-type"));
        let refusal = named.or_else(|| refusals.first().map(ToString::to_string)).unwrap_or_default();
        BrokerError::Refused(format!(
            "queue {queue} exists with different arguments; restore the broker.amqp settings or delete the queue \
             and its messages (rabbitmqctl delete_queue -p VHOST {queue}): {refusal}"
        ))
    }
}

fn milliseconds(duration: Duration) -> AMQPValue {
    AMQPValue::LongLongInt(i64::try_from(duration.as_millis()).unwrap_or(i64::MAX))
}
