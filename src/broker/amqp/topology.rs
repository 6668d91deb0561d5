//! What is declared on `RabbitMQ`: Celery's event exchange, and a queue bound to it.

use std::time::Duration;

use lapin::options::{ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions};
use lapin::protocol::AMQPSoftError;
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::{Channel, Connection, ExchangeKind};
use uuid::Uuid;

use super::{Error, failed, is};
use crate::broker::Standing;
use crate::settings::Settings;

#[derive(Clone, Debug)]
pub(super) struct Topology {
    pub(super) exchange: ShortString,
    pub(super) queue: ShortString,
    /// A durable queue with a name of its own, which goes on collecting while we are away.
    pub(super) keeps_collecting: bool,
    /// It was there before us.
    pub(super) continues: bool,
    /// We may not declare the exchange, only see that it is there.
    passive: bool,
    arguments: FieldTable,
}

impl Topology {
    /// Looks at what is there and what we may do. Each refusal closes a channel, so each question has its own.
    pub(super) async fn find(connection: &Connection, settings: &Settings) -> Result<Self, Error> {
        let mut topology = Self::of(settings);
        let channel = connection.create_channel().await.map_err(failed)?;
        match topology.declare_exchange(&channel).await {
            Ok(()) => {}
            Err(error) if is(&error, &AMQPSoftError::ACCESSREFUSED) => {
                tracing::debug!("no right to declare the event exchange: it has to be there");
                topology.passive = true;
            }
            Err(error) => return Err(failed(error)),
        }
        if topology.keeps_collecting {
            let channel = connection.create_channel().await.map_err(failed)?;
            let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
            let found = channel.queue_declare(topology.queue.clone(), passive, FieldTable::default()).await;
            topology.continues = found.is_ok() && topology.is_marked(connection).await?;
        }
        Ok(topology)
    }

    /// A durable queue is still there after a restart of the broker, and what it held is gone. The mark is not there any
    /// more: an exchange that is not durable, and goes with the queue.
    fn mark(&self) -> ShortString {
        format!("{}.since-boot", self.queue).into()
    }

    async fn is_marked(&self, connection: &Connection) -> Result<bool, Error> {
        let channel = connection.create_channel().await.map_err(failed)?;
        let passive = ExchangeDeclareOptions { passive: true, ..ExchangeDeclareOptions::default() };
        let found = channel.exchange_declare(self.mark(), ExchangeKind::Fanout, passive, FieldTable::default()).await;
        match found {
            Ok(()) => Ok(true),
            Err(error) if is(&error, &AMQPSoftError::NOTFOUND) => Ok(false),
            Err(error) => Err(failed(error)),
        }
    }

    /// Marks the queue. A user who may not declare the mark will find each connection to be after a restart.
    pub(super) async fn set_mark(&self, connection: &Connection) -> Result<(), Error> {
        if !self.keeps_collecting {
            return Ok(());
        }
        let channel = connection.create_channel().await.map_err(failed)?;
        let options = ExchangeDeclareOptions { auto_delete: true, ..ExchangeDeclareOptions::default() };
        let declaring = async {
            channel.exchange_declare(self.mark(), ExchangeKind::Fanout, options, FieldTable::default()).await?;
            let (queue, mark, key) = (self.queue.clone(), self.mark(), ShortString::default());
            channel.queue_bind(queue, mark, key, QueueBindOptions::default(), FieldTable::default()).await
        };
        match declaring.await {
            Err(error) if is(&error, &AMQPSoftError::ACCESSREFUSED) => {
                tracing::warn!(
                    exchange = %self.mark(),
                    "no right to declare an exchange beside the queue: each time we connect, events are taken to be missing"
                );
                Ok(())
            }
            declared => declared.map_err(failed),
        }
    }

    fn of(settings: &Settings) -> Self {
        let amqp = &settings.broker.amqp;
        let mut arguments = FieldTable::default();
        arguments.insert("x-expires".into(), milliseconds(amqp.effective_expires()));
        let bytes = i64::try_from(amqp.queue_max_bytes).unwrap_or(i64::MAX);
        arguments.insert("x-max-length-bytes".into(), AMQPValue::LongLongInt(bytes));
        if let Some(ttl) = amqp.queue_ttl {
            arguments.insert("x-message-ttl".into(), milliseconds(ttl));
        }
        // Without a name: as Flower's and Celery's own event receivers name theirs, so that their permissions fit.
        let own = || format!("{}.{}", settings.events.exchange, Uuid::new_v4());
        Self {
            exchange: settings.events.exchange.as_str().into(),
            queue: amqp.queue.clone().unwrap_or_else(own).into(),
            keeps_collecting: amqp.queue.is_some(),
            continues: false,
            passive: false,
            arguments,
        }
    }

    /// Declares exchange and queue and binds them; harmless where they are.
    pub(super) async fn declare(&self, channel: &Channel) -> Result<Standing, Error> {
        self.declare_exchange(channel).await.map_err(failed)?;
        let exclusive = !self.keeps_collecting;
        let options = QueueDeclareOptions {
            durable: self.keeps_collecting,
            exclusive,
            auto_delete: exclusive,
            ..QueueDeclareOptions::default()
        };
        let declared = channel.queue_declare(self.queue.clone(), options, self.arguments.clone()).await;
        let queue = declared.map_err(|error| self.explain(error))?;
        let (queue_name, exchange, all) = (self.queue.clone(), self.exchange.clone(), "#".into());
        channel
            .queue_bind(queue_name, exchange, all, QueueBindOptions::default(), FieldTable::default())
            .await
            .map_err(failed)?;
        Ok(Standing { waiting: queue.message_count(), consumers: queue.consumer_count() })
    }

    async fn declare_exchange(&self, channel: &Channel) -> lapin::Result<()> {
        let options =
            ExchangeDeclareOptions { durable: true, passive: self.passive, ..ExchangeDeclareOptions::default() };
        channel.exchange_declare(self.exchange.clone(), ExchangeKind::Topic, options, FieldTable::default()).await
    }

    /// A queue that was declared with other arguments stays as it is until it is deleted.
    fn explain(&self, error: lapin::Error) -> Error {
        if !is(&error, &AMQPSoftError::PRECONDITIONFAILED) {
            return failed(error);
        }
        let queue = &self.queue;
        Error::Refused(format!(
            "queue {queue} exists with other arguments: set broker.amqp.queue_* back to what they were, or delete it \
             (rabbitmqctl delete_queue {queue}) and lose what it holds ({error})"
        ))
    }
}

fn milliseconds(duration: Duration) -> AMQPValue {
    AMQPValue::LongLongInt(i64::try_from(duration.as_millis()).unwrap_or(i64::MAX))
}
