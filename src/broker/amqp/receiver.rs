//! The receiving half: a consumer of the exporter's queue.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::{FutureExt, StreamExt};
use lapin::Consumer;
use lapin::message::Delivery;
use lapin::types::{AMQPValue, ShortString};

use super::to_broker_error;
use super::topology::Topology;
use super::witness::Witnesses;
use crate::broker::BrokerError;
use crate::celery::envelope::DecodeFailure;
use crate::celery::{DecodeError, envelope};
use crate::config::{BrokerUrl, Config};
use crate::inbox::{Batch, DeliveryTag, Encoding, Message, NamedQueue};

/// Messages and bytes of one batch, approximately.
const MAX_BATCH: usize = 1024;
const MAX_BATCH_BYTES: usize = 1 << 20;

pub struct EventReceiver {
    consumer: Consumer,
    witnesses: Arc<Witnesses>,
    message_max_bytes: usize,
    max_batch_bytes: usize,
    exchange: String,
    queue: String,
    /// See [`crate::broker::EventReceiver::named_queue`].
    pub(in crate::broker) named_queue: Option<NamedQueue>,
    /// How the subscription ended, returned after the last messages.
    error: Option<BrokerError>,
}

impl fmt::Debug for EventReceiver {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.debug_struct("EventReceiver").field("queue", &self.queue).finish_non_exhaustive()
    }
}

impl EventReceiver {
    pub(super) fn new(
        consumer: Consumer,
        topology: &Topology,
        url: &BrokerUrl,
        config: &Config,
        witnesses: Arc<Witnesses>,
    ) -> Self {
        Self {
            consumer,
            witnesses,
            message_max_bytes: config.events.message_max_bytes,
            max_batch_bytes: MAX_BATCH_BYTES.min(config.events.buffer_max_bytes),
            exchange: topology.exchange.to_string(),
            queue: topology.queue.to_string(),
            named_queue: topology.is_durable.then(|| NamedQueue {
                name: format!("{} {}", url.vhost, topology.queue).into(),
                existed: topology.existed,
                heartbeat: config.broker.amqp.heartbeat,
            }),
            error: None,
        }
    }

    pub(in crate::broker) fn describe(&self) -> String {
        format!("queue {} bound to exchange {}", self.queue, self.exchange)
    }

    pub(in crate::broker) async fn next(&mut self) -> Result<Batch, BrokerError> {
        if let Some(error) = self.error.take() {
            return Err(error);
        }
        let first = self.consumer.next().await;
        let mut deliveries = vec![delivery(first)?];
        let mut bytes = deliveries[0].data.len();
        while deliveries.len() < MAX_BATCH
            && bytes < self.max_batch_bytes
            && let Some(next) = self.consumer.next().now_or_never()
        {
            match delivery(next) {
                Ok(delivery) => {
                    bytes += delivery.data.len();
                    deliveries.push(delivery);
                }
                Err(error) => {
                    self.error = Some(error);
                    break;
                }
            }
        }
        let ack = deliveries.last().map(|delivery| DeliveryTag(delivery.delivery_tag));
        let messages = deliveries.into_iter().map(|delivery| self.message(delivery)).collect();
        Ok(Batch::new(messages, ack))
    }

    fn message(&self, delivery: Delivery) -> Message {
        if let Some(message) = self.witnesses.classify(&delivery) {
            return message;
        }
        let encoding = match validate(&delivery, self.message_max_bytes) {
            Ok(()) => Encoding::RawBody,
            Err(failure) => Encoding::Undecodable(failure),
        };
        Message { bytes: Bytes::from(delivery.data), encoding, redelivered: delivery.redelivered }
    }
}

fn delivery(next: Option<lapin::Result<Delivery>>) -> Result<Delivery, BrokerError> {
    match next {
        Some(delivery) => delivery.map_err(to_broker_error),
        None => Err(BrokerError::Disconnected("consumer cancelled (queue deleted)".to_owned())),
    }
}

fn validate(delivery: &Delivery, message_max_bytes: usize) -> Result<(), DecodeFailure> {
    if delivery.data.len() > message_max_bytes {
        return Err(DecodeError::TooLarge.into());
    }
    let properties = &delivery.properties;
    let compression = match properties.headers().as_ref().and_then(|headers| headers.inner().get("compression")) {
        None | Some(AMQPValue::Void) => None,
        Some(AMQPValue::LongString(name)) => Some(String::from_utf8_lossy(name.as_bytes())),
        Some(_) => Some(Cow::Borrowed("")),
    };
    let content_type = properties.content_type().as_ref().map(ShortString::as_str);
    envelope::check_content(content_type, compression.as_deref())
}
