//! `RabbitMQ`, by lapin: a consumer with prefetch, acknowledged many at a time, and channels beside it for the rest.

use std::borrow::Cow;
use std::fmt;
use std::time::Duration;

use bytes::Bytes;
use futures_util::{FutureExt, StreamExt};
use lapin::message::Delivery;
use lapin::options::{
    BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions, ExchangeDeclareOptions,
    QueueBindOptions, QueueDeclareOptions,
};
use lapin::tcp::RustlsConnector;
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::uri::{AMQPAuthority, AMQPQueryString, AMQPScheme, AMQPUri, AMQPUserInfo};
use lapin::{AsyncTcpStream, BasicProperties, Channel, Connection, ConnectionProperties, Consumer, ExchangeKind};
use tokio::sync::Mutex;
use uuid::Uuid;

use super::{AckToken, Batch, Error, Message, Wire};
use crate::celery::envelope::Refusal;
use crate::celery::{Broadcast, Reject, envelope};
use crate::settings::url::Address;
use crate::settings::{BrokerUrl, Settings};
use crate::tls;

/// Messages and bytes of one batch, about.
const MAX_BATCH: usize = 1024;
const MAX_BATCH_BYTES: usize = 1 << 20;

/// The receiving half.
pub struct Subscription {
    consumer: Consumer,
    max_message: usize,
    max_batch_bytes: usize,
    exchange: String,
    queue: String,
}

impl fmt::Debug for Subscription {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.debug_struct("Subscription").field("queue", &self.queue).finish_non_exhaustive()
    }
}

/// The sending half. It owns the connection: with it everything closes.
pub struct Control {
    connection: Connection,
    consuming: Channel,
    publishing: Mutex<Option<Channel>>,
    topology: Topology,
    pidbox: String,
}

impl fmt::Debug for Control {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.debug_struct("Control").field("pidbox", &self.pidbox).finish_non_exhaustive()
    }
}

/// What we declare: Celery's event exchange, and a queue of our own bound to it.
#[derive(Clone, Debug)]
struct Topology {
    exchange: ShortString,
    queue: ShortString,
    arguments: FieldTable,
}

pub(super) async fn connect(
    url: &BrokerUrl,
    settings: &Settings,
    tls: Option<&tls::Client>,
) -> Result<(Subscription, Control), Error> {
    let name = concat!(env!("CARGO_PKG_NAME"), " ", env!("CARGO_PKG_VERSION"));
    let properties = ConnectionProperties::default().with_connection_name(name.into());
    let uri = uri(url, settings);
    let connection = match tls {
        None => Connection::connect_uri(uri, properties).await,
        Some(tls) => connect_by_tls(uri, properties, tls, settings.broker.connect_timeout).await,
    };
    let connection = connection.map_err(failed)?;
    let consuming = connection.create_channel().await.map_err(failed)?;
    let topology = Topology::of(settings);
    topology.declare(&consuming).await?;
    let prefetch = settings.broker.amqp.effective_prefetch();
    consuming.basic_qos(prefetch, BasicQosOptions { global: false }).await.map_err(failed)?;
    let options = BasicConsumeOptions { exclusive: true, ..BasicConsumeOptions::default() };
    let consumer = consuming
        .basic_consume(topology.queue.clone(), ShortString::default(), options, FieldTable::default())
        .await
        .map_err(failed)?;
    let subscription = Subscription {
        consumer,
        max_message: settings.events.max_message,
        max_batch_bytes: MAX_BATCH_BYTES.min(settings.events.max_backlog),
        exchange: topology.exchange.to_string(),
        queue: topology.queue.to_string(),
    };
    let pidbox = format!("{}.pidbox", settings.events.control_exchange);
    Ok((subscription, Control { connection, consuming, publishing: Mutex::new(None), topology, pidbox }))
}

async fn connect_by_tls(
    uri: AMQPUri,
    properties: ConnectionProperties,
    tls: &tls::Client,
    limit: Duration,
) -> lapin::Result<Connection> {
    let connector = RustlsConnector::from(tls.config());
    let runtime = lapin::runtime::default_runtime()?;
    let connect = Connection::connector(
        uri,
        runtime,
        async move |uri, runtime| {
            let AMQPAuthority { host, port, .. } = uri.authority;
            let addresses = runtime.to_socket_addrs((host.clone(), port));
            let stream = AsyncTcpStream::connect(&runtime, addresses).await?;
            Ok(tls::within(limit, stream.into_rustls(&connector, tls::server_name(&host))).await?)
        },
        properties,
    );
    connect.await
}

fn uri(url: &BrokerUrl, settings: &Settings) -> AMQPUri {
    let (host, port) = match &url.address {
        Address::Tcp { host, port } => (host.clone(), *port),
        Address::Unix(path) => (path.display().to_string(), 0),
    };
    let password = url.password.as_ref().map_or_else(String::new, |password| password.expose().to_owned());
    AMQPUri {
        scheme: AMQPScheme::AMQP,
        authority: AMQPAuthority {
            userinfo: AMQPUserInfo { username: url.username.clone().unwrap_or_default(), password },
            host,
            port,
        },
        vhost: url.vhost.clone(),
        query: AMQPQueryString {
            heartbeat: u16::try_from(settings.broker.amqp.heartbeat.as_secs()).ok(),
            ..AMQPQueryString::default()
        },
    }
}

impl Topology {
    fn of(settings: &Settings) -> Self {
        let amqp = &settings.broker.amqp;
        let mut arguments = FieldTable::default();
        arguments.insert("x-expires".into(), milliseconds(amqp.effective_expires()));
        let bytes = i64::try_from(amqp.queue_max_bytes).unwrap_or(i64::MAX);
        arguments.insert("x-max-length-bytes".into(), AMQPValue::LongLongInt(bytes));
        if let Some(ttl) = amqp.queue_ttl {
            arguments.insert("x-message-ttl".into(), milliseconds(ttl));
        }
        Self {
            exchange: settings.events.exchange.as_str().into(),
            // As Flower's and Celery's own event receivers name theirs, so that their permissions fit.
            queue: format!("{}.{}", settings.events.exchange, Uuid::new_v4()).into(),
            arguments,
        }
    }

    /// Declares exchange and queue and binds them; harmless where they are. Returns the messages that wait.
    async fn declare(&self, channel: &Channel) -> Result<u64, Error> {
        let durable = ExchangeDeclareOptions { durable: true, ..ExchangeDeclareOptions::default() };
        channel
            .exchange_declare(self.exchange.clone(), ExchangeKind::Topic, durable, FieldTable::default())
            .await
            .map_err(failed)?;
        let own = QueueDeclareOptions { exclusive: true, auto_delete: true, ..QueueDeclareOptions::default() };
        let queue = channel.queue_declare(self.queue.clone(), own, self.arguments.clone()).await.map_err(failed)?;
        channel
            .queue_bind(
                self.queue.clone(),
                self.exchange.clone(),
                "#".into(),
                QueueBindOptions::default(),
                FieldTable::default(),
            )
            .await
            .map_err(failed)?;
        Ok(u64::from(queue.message_count()))
    }
}

fn milliseconds(duration: Duration) -> AMQPValue {
    AMQPValue::LongLongInt(i64::try_from(duration.as_millis()).unwrap_or(i64::MAX))
}

#[allow(clippy::needless_pass_by_value, reason = "for map_err")]
fn failed(error: lapin::Error) -> Error {
    match error.kind() {
        lapin::ErrorKind::ProtocolError(refusal) => Error::Refused(refusal.to_string()),
        lapin::ErrorKind::IOError(error) => Error::from(&**error),
        _ => Error::Lost(error.to_string()),
    }
}

impl Subscription {
    pub(super) fn describe(&self) -> String {
        format!("queue {} bound to exchange {}", self.queue, self.exchange)
    }

    pub(super) async fn next(&mut self) -> Result<Batch, Error> {
        let first = self.consumer.next().await;
        let mut deliveries = vec![Self::delivery(first)?];
        let mut bytes = deliveries[0].data.len();
        while deliveries.len() < MAX_BATCH
            && bytes < self.max_batch_bytes
            && let Some(Some(Ok(delivery))) = self.consumer.next().now_or_never()
        {
            bytes += delivery.data.len();
            deliveries.push(delivery);
        }
        let ack = deliveries.last().map(|delivery| AckToken(delivery.delivery_tag));
        let messages = deliveries.into_iter().map(|delivery| self.message(delivery)).collect();
        Ok(Batch::new(messages, ack))
    }

    fn delivery(next: Option<lapin::Result<Delivery>>) -> Result<Delivery, Error> {
        match next {
            Some(delivery) => delivery.map_err(failed),
            None => Err(Error::Lost("the consumer was cancelled: the queue is gone".to_owned())),
        }
    }

    fn message(&self, delivery: Delivery) -> Message {
        let wire = match check(&delivery, self.max_message) {
            Ok(()) => Wire::Body,
            Err(refusal) => Wire::Refused(refusal),
        };
        Message { bytes: Bytes::from(delivery.data), wire, redelivered: delivery.redelivered }
    }
}

fn check(delivery: &Delivery, max_message: usize) -> Result<(), Refusal> {
    if delivery.data.len() > max_message {
        return Err(Reject::TooLarge.into());
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

impl Control {
    pub(super) async fn broadcast(&self, command: Broadcast) -> Result<(), Error> {
        let mut kept = self.publishing.lock().await;
        let channel = match kept.take() {
            Some(channel) if channel.status().connected() => channel,
            _ => self.connection.create_channel().await.map_err(failed)?,
        };
        self.publish(&channel, command).await?;
        *kept = Some(channel);
        Ok(())
    }

    /// Declares the exchange first: it is transient, and publishing to one that is gone closes the channel.
    async fn publish(&self, channel: &Channel, command: Broadcast) -> Result<(), Error> {
        let pidbox: ShortString = self.pidbox.as_str().into();
        channel
            .exchange_declare(
                pidbox.clone(),
                ExchangeKind::Fanout,
                ExchangeDeclareOptions::default(),
                FieldTable::default(),
            )
            .await
            .map_err(failed)?;
        let properties = BasicProperties::default()
            .with_content_type("application/json".into())
            .with_content_encoding("utf-8".into())
            .with_delivery_mode(1);
        let body = command.body();
        channel
            .basic_publish(pidbox, ShortString::default(), BasicPublishOptions::default(), body.as_bytes(), properties)
            .await
            .map_err(failed)?;
        Ok(())
    }

    pub(super) async fn acknowledge(&self, token: AckToken) -> Result<(), Error> {
        self.consuming.basic_ack(token.0, BasicAckOptions { multiple: true }).await.map_err(failed)
    }

    pub(super) async fn refresh(&self) -> Result<u64, Error> {
        self.topology.declare(&self.consuming).await
    }
}
