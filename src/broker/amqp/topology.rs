//! What is declared on `RabbitMQ`: Celery's event exchange, and a queue bound to it.

use std::time::Duration;

use lapin::options::{
    BasicAckOptions, BasicGetOptions, BasicNackOptions, BasicPublishOptions, ConfirmSelectOptions,
    ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions,
};
use lapin::protocol::AMQPSoftError;
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::{BasicProperties, Channel, Connection, ExchangeKind};
use uuid::Uuid;

use super::{Error, failed, is};
use crate::broker::Standing;
use crate::settings::Settings;

/// Long, since the mark has to outlive the queue.
const MARK_EXPIRES: Duration = Duration::from_secs(30 * 86_400);
const PASSIVE: QueueDeclareOptions =
    QueueDeclareOptions { passive: true, durable: false, exclusive: false, auto_delete: false, nowait: false };

#[derive(Clone, Debug)]
pub(super) struct Topology {
    pub(super) exchange: ShortString,
    pub(super) queue: ShortString,
    /// A durable queue with a name of its own, which goes on collecting while we are away.
    pub(super) keeps_collecting: bool,
    /// What its contents are told by; none where nothing is kept, or that cannot be known.
    pub(super) mark: Option<String>,
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
            topology.mark = topology.find_mark(connection).await?;
        }
        Ok(topology)
    }

    /// What tells the contents of the queue from those of another time: a message like those it holds, in a queue beside it.
    /// A restart of the broker leaves both queues, and takes the messages of both. A new mark is written where there
    /// is none, or no queue.
    async fn find_mark(&self, connection: &Connection) -> Result<Option<String>, Error> {
        let channel = connection.create_channel().await.map_err(failed)?;
        let found = channel.queue_declare(self.queue.clone(), PASSIVE, FieldTable::default()).await.is_ok();
        let channel = connection.create_channel().await.map_err(failed)?;
        let mark = async {
            self.declare_mark(&channel).await?;
            match channel.basic_get(self.mark_name(), BasicGetOptions { no_ack: false }).await? {
                Some(message) if found => {
                    message.nack(BasicNackOptions { requeue: true, ..BasicNackOptions::default() }).await?;
                    Ok(String::from_utf8_lossy(&message.data).into_owned())
                }
                Some(message) => {
                    message.ack(BasicAckOptions::default()).await?;
                    self.write_mark(&channel).await
                }
                None => self.write_mark(&channel).await,
            }
        };
        match mark.await {
            Ok(mark) => Ok(Some(mark)),
            Err(error) if is(&error, &AMQPSoftError::ACCESSREFUSED) => {
                tracing::warn!(
                    mark = %self.mark_name(),
                    "no right to a mark beside the queue: each time we connect, events are taken to be missing"
                );
                Ok(None)
            }
            Err(error) => Err(failed(error)),
        }
    }

    fn mark_name(&self) -> ShortString {
        format!("{}.mark", self.queue).into()
    }

    /// An exchange and a queue of the mark's name. They go when they were not looked at for a month.
    async fn declare_mark(&self, channel: &Channel) -> lapin::Result<()> {
        let exchange = ExchangeDeclareOptions { durable: true, auto_delete: true, ..ExchangeDeclareOptions::default() };
        channel.exchange_declare(self.mark_name(), ExchangeKind::Fanout, exchange, FieldTable::default()).await?;
        let mut arguments = FieldTable::default();
        arguments.insert("x-expires".into(), milliseconds(MARK_EXPIRES));
        arguments.insert("x-max-length".into(), AMQPValue::LongInt(1));
        let queue = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
        channel.queue_declare(self.mark_name(), queue, arguments).await?;
        let (name, none) = (self.mark_name(), ShortString::default());
        channel.queue_bind(name.clone(), name, none, QueueBindOptions::default(), FieldTable::default()).await
    }

    async fn write_mark(&self, channel: &Channel) -> lapin::Result<String> {
        let mark = Uuid::new_v4().to_string();
        channel.confirm_select(ConfirmSelectOptions::default()).await?;
        let (exchange, key, options) = (self.mark_name(), ShortString::default(), BasicPublishOptions::default());
        // Transient, as events are.
        let properties = BasicProperties::default().with_delivery_mode(1);
        channel.basic_publish(exchange, key, options, mark.as_bytes(), properties).await?.await?;
        Ok(mark)
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
            mark: None,
            passive: false,
            arguments,
        }
    }

    /// Declares exchange and queue and binds them; harmless where they are.
    pub(super) async fn declare(&self, channel: &Channel) -> Result<Standing, Error> {
        let exclusive = !self.keeps_collecting;
        let options = QueueDeclareOptions {
            durable: self.keeps_collecting,
            exclusive,
            auto_delete: exclusive,
            ..QueueDeclareOptions::default()
        };
        self.declare_with(channel, options).await
    }

    /// The same while we listen. A named queue that is gone must not be made anew before its mark is.
    pub(super) async fn refresh(&self, channel: &Channel) -> Result<Standing, Error> {
        if !self.keeps_collecting {
            return self.declare(channel).await;
        }
        if self.mark.is_some() {
            self.declare_mark(channel).await.map_err(failed)?;
        }
        self.declare_with(channel, PASSIVE).await
    }

    async fn declare_with(&self, channel: &Channel, options: QueueDeclareOptions) -> Result<Standing, Error> {
        self.declare_exchange(channel).await.map_err(failed)?;
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
             (rabbitmqctl delete_queue -p VHOST {queue}) and lose what it holds ({error})"
        ))
    }
}

fn milliseconds(duration: Duration) -> AMQPValue {
    AMQPValue::LongLongInt(i64::try_from(duration.as_millis()).unwrap_or(i64::MAX))
}
