//! `RabbitMQ`, by lapin: a consumer with prefetch, acknowledged many at a time, and channels beside it for the rest.

mod runtime;
mod topology;

use std::borrow::Cow;
use std::fmt;
use std::io;
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::time::Duration;

use async_compat::Compat;
use bytes::Bytes;
use futures_util::{FutureExt, StreamExt};
use lapin::message::Delivery;
use lapin::options::{
    BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions, ConfirmSelectOptions,
    ExchangeDeclareOptions,
};
use lapin::protocol::{AMQPErrorKind, AMQPSoftError};
use lapin::tcp::RustlsConnector;
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::uri::{AMQPAuthority, AMQPQueryString, AMQPScheme, AMQPUri, AMQPUserInfo};
use lapin::{AsyncTcpStream, BasicProperties, Channel, Connection, ConnectionProperties, Consumer, ExchangeKind};
use tokio::net::TcpStream;
use tokio::sync::Mutex;
use tokio::time::timeout;

use topology::Topology;

use super::dial::dial;
use super::pace::Paced;
use super::{AckToken, Batch, Error, Message, SILENCE, Standing, Wire};
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
    source: Option<String>,
    /// How it ended, told after the last messages.
    failed: Option<Error>,
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
    prefetch: u16,
    /// With a question that is not answered: three heartbeats at least, since lapin bears two.
    patience: Duration,
    /// See [`super::Control::found_waiting`].
    pub(super) found_waiting: u32,
    _leash: Leash,
}

impl fmt::Debug for Control {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.debug_struct("Control").field("pidbox", &self.pidbox).finish_non_exhaustive()
    }
}

pub(super) async fn connect(
    url: &BrokerUrl,
    settings: &Settings,
    tls: Option<&tls::Client>,
) -> Result<(Subscription, Control), Error> {
    let (connection, leash) = open(url, settings, tls).await?;
    let topology = Topology::find(&connection, settings).await?;
    let consuming = connection.create_channel().await.map_err(failed)?;
    let found_waiting = topology.declare(&consuming).await?.waiting;
    let prefetch = settings.broker.amqp.effective_prefetch();
    consuming.basic_qos(prefetch, BasicQosOptions { global: false }).await.map_err(failed)?;
    let options = BasicConsumeOptions { exclusive: !topology.keeps_collecting, ..BasicConsumeOptions::default() };
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
        source: topology.mark.as_ref().map(|mark| format!("{}/{} {} {mark}", url.address, url.vhost, topology.queue)),
        failed: None,
    };
    let pidbox = format!("{}.pidbox", settings.events.control_exchange);
    let publishing = Mutex::new(None);
    let patience = (settings.broker.amqp.heartbeat * 3).max(SILENCE);
    let control = Control {
        connection,
        consuming,
        publishing,
        topology,
        pidbox,
        prefetch,
        patience,
        found_waiting,
        _leash: leash,
    };
    Ok((subscription, control))
}

/// Makes the connection on a socket of our own. A connection that lapin has begun and we have given up would keep its
/// thread and its socket for as long as the other side is silent; the [`Leash`] cuts it.
async fn open(url: &BrokerUrl, settings: &Settings, tls: Option<&tls::Client>) -> Result<(Connection, Leash), Error> {
    let name = concat!(env!("CARGO_PKG_NAME"), " ", env!("CARGO_PKG_VERSION"));
    let properties = ConnectionProperties::default().with_connection_name(name.into());
    let uri = uri(url, settings);
    let AMQPAuthority { host, port, .. } = &uri.authority;
    let socket = dial(host, *port).await.map_err(|error| Error::from(&error))?;
    let leash = Leash::on(&socket).map_err(|error| Error::from(&error))?;
    let socket = std::sync::Mutex::new(Some(socket));
    let (connector, limit) = (tls.map(|tls| RustlsConnector::from(tls.config())), settings.broker.connect_timeout);
    let connect = async move |uri: AMQPUri, _| {
        let socket = socket.lock().ok().and_then(|mut socket| socket.take());
        let socket = socket.ok_or_else(|| io::Error::other("the connection is not made twice"))?;
        let stream = AsyncTcpStream::Plain(Compat::new(Paced::new(socket)));
        match &connector {
            None => Ok(stream),
            Some(connector) => {
                let name = tls::server_name(&uri.authority.host);
                Ok(tls::within(limit, stream.into_rustls(connector, name)).await?)
            }
        }
    };
    let connection = Connection::connector(uri, runtime::paced(), connect, properties).await.map_err(failed)?;
    Ok((connection, leash))
}

/// Shuts a socket down when dropped, whoever else holds it.
struct Leash(std::net::TcpStream);

impl Leash {
    fn on(socket: &TcpStream) -> io::Result<Self> {
        Ok(Self(socket.as_fd().try_clone_to_owned()?.into()))
    }
}

impl Drop for Leash {
    fn drop(&mut self) {
        // It may be down already.
        let _ = self.0.shutdown(Shutdown::Both);
    }
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

/// Whether the server refused for this reason.
fn is(error: &lapin::Error, reason: &AMQPSoftError) -> bool {
    matches!(error.kind(), lapin::ErrorKind::ProtocolError(refusal)
        if refusal.kind() == &AMQPErrorKind::Soft(reason.clone()))
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

    /// See [`super::Subscription::source`].
    pub(super) fn source(&self) -> Option<&str> {
        self.source.as_deref()
    }

    pub(super) async fn next(&mut self) -> Result<Batch, Error> {
        if let Some(error) = self.failed.take() {
            return Err(error);
        }
        let first = self.consumer.next().await;
        let mut deliveries = vec![Self::delivery(first)?];
        let mut bytes = deliveries[0].data.len();
        while deliveries.len() < MAX_BATCH
            && bytes < self.max_batch_bytes
            && let Some(next) = self.consumer.next().now_or_never()
        {
            match Self::delivery(next) {
                Ok(delivery) => {
                    bytes += delivery.data.len();
                    deliveries.push(delivery);
                }
                Err(error) => {
                    self.failed = Some(error);
                    break;
                }
            }
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
        self.hindrance().map_or(Ok(()), Err)?;
        let mut kept = self.publishing.lock().await;
        let channel = match kept.take() {
            Some(channel) if channel.status().connected() => channel,
            _ => self.publishing_channel().await?,
        };
        let published = self.publish(&channel, command).await;
        if published.is_ok() {
            *kept = Some(channel);
        }
        published
    }

    /// Declares the exchange first: it is transient, and publishing to one that is gone closes the channel. A user who
    /// may not declare it may still publish to it.
    async fn publishing_channel(&self) -> Result<Channel, Error> {
        for passive in [false, true] {
            let channel = self.connection.create_channel().await.map_err(failed)?;
            let options = ExchangeDeclareOptions { passive, ..ExchangeDeclareOptions::default() };
            let declared = channel
                .exchange_declare(self.pidbox.as_str().into(), ExchangeKind::Fanout, options, FieldTable::default())
                .await;
            match declared {
                Ok(()) => {
                    // With confirmations, a refusal comes back as an answer.
                    channel.confirm_select(ConfirmSelectOptions::default()).await.map_err(failed)?;
                    return Ok(channel);
                }
                Err(error) if is(&error, &AMQPSoftError::ACCESSREFUSED) && !passive => {}
                Err(error) => return Err(failed(error)),
            }
        }
        unreachable!("the second round returns")
    }

    async fn publish(&self, channel: &Channel, command: Broadcast) -> Result<(), Error> {
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
            .map_err(failed)?;
        confirmation.await.map_err(failed)?;
        Ok(())
    }

    /// Any question that changes nothing: here, the prefetch that is set already. lapin itself only looks for bytes.
    pub(super) async fn pulse(&self) -> Result<(), Error> {
        self.hindrance().map_or(Ok(()), Err)?;
        let question = self.consuming.basic_qos(self.prefetch, BasicQosOptions { global: false });
        match timeout(self.patience, question).await {
            Ok(answer) => answer.map_err(failed),
            Err(_) => Err(self.hindrance().unwrap_or(Error::Silent(self.patience))),
        }
    }

    /// A connection that has published is not read from any more while an alarm lasts, so that nothing on it is answered.
    /// Nor do the workers' events come in then.
    pub(super) fn hindrance(&self) -> Option<Error> {
        let alarm = "RabbitMQ is short of memory or disk, and blocks all that publish: see rabbitmq-diagnostics alarms";
        self.connection.status().blocked().then(|| Error::Refused(alarm.to_owned()))
    }

    pub(super) async fn close(&self) {
        // It ends either way.
        let _ = self.connection.close(200, "bye".into()).await;
    }

    pub(super) async fn acknowledge(&self, token: AckToken) -> Result<(), Error> {
        self.consuming.basic_ack(token.0, BasicAckOptions { multiple: true }).await.map_err(failed)
    }

    pub(super) async fn refresh(&self) -> Result<Standing, Error> {
        self.topology.refresh(&self.consuming).await
    }
}
