//! The connection that publishes broadcasts and witnesses, with confirms. It is made on first use and again after a
//! failure. While an alarm lasts, it is blocked at its first publish.

use std::net::SocketAddr;

use lapin::options::{BasicPublishOptions, ConfirmSelectOptions, ExchangeDeclareOptions};
use lapin::protocol::AMQPSoftError;
use lapin::types::{FieldTable, ShortString};
use lapin::{BasicProperties, Channel, Confirmation, Connection, ExchangeKind};
use tokio::sync::Mutex;

use super::connection::{self, ShutdownOnDrop, Target};
use super::{is_soft_error, to_broker_error};
use crate::broker::BrokerError;
use crate::broker::error::within;
use crate::celery::Broadcast;
use crate::config::{BrokerUrl, Config};
use crate::tls::TlsConfig;

/// The body of a witness: an exporter that does not know witnesses reads an empty list of events.
pub(super) const WITNESS_BODY: &[u8] = b"[]";

pub(super) struct Publisher {
    url: BrokerUrl,
    config: Config,
    tls: Option<TlsConfig>,
    /// The consumer's server: a name may have several addresses.
    server: SocketAddr,
    pidbox: String,
    open: Mutex<Option<Open>>,
}

struct Open {
    connection: Connection,
    broadcasts: Option<Channel>,
    witnesses: Option<Channel>,
    _shutdown_on_drop: ShutdownOnDrop,
}

impl Publisher {
    pub(super) fn new(url: &BrokerUrl, config: &Config, tls: Option<&TlsConfig>, server: SocketAddr) -> Self {
        Self {
            url: url.clone(),
            config: config.clone(),
            tls: tls.cloned(),
            server,
            pidbox: format!("{}.pidbox", config.events.control_exchange),
            open: Mutex::new(None),
        }
    }

    pub(super) async fn broadcast(&self, command: Broadcast) -> Result<(), BrokerError> {
        self.blocked_reason().map_or(Ok(()), Err)?;
        let channel = self.broadcast_channel().await?;
        let properties = BasicProperties::default()
            .with_content_type("application/json".into())
            .with_content_encoding("utf-8".into())
            .with_delivery_mode(1);
        let accepted = publish(&channel, self.pidbox.as_str().into(), command.body().as_bytes(), properties).await?;
        if accepted {
            Ok(())
        } else {
            Err(BrokerError::Refused("a queue refuses messages (reject-publish)".to_owned()))
        }
    }

    /// Publishes a witness to an exchange. Returns whether the queue has accepted it. It is transient, like events: a
    /// persistent one would survive a restart in which the events around it are lost.
    pub(super) async fn publish_witness(&self, exchange: &ShortString, id: &str) -> Result<bool, BrokerError> {
        let channel = self.witness_channel().await?;
        let properties = BasicProperties::default()
            .with_content_type("application/json".into())
            .with_content_encoding("utf-8".into())
            .with_delivery_mode(1)
            .with_message_id(id.into());
        publish(&channel, exchange.clone(), WITNESS_BODY, properties).await
    }

    async fn broadcast_channel(&self) -> Result<Channel, BrokerError> {
        self.within_limit(self.open_broadcasts()).await
    }

    async fn witness_channel(&self) -> Result<Channel, BrokerError> {
        self.within_limit(self.open_witnesses()).await
    }

    async fn within_limit<T>(&self, opening: impl Future<Output = Result<T, BrokerError>>) -> Result<T, BrokerError> {
        within(self.config.broker.connect_timeout, opening).await
    }

    async fn open_broadcasts(&self) -> Result<Channel, BrokerError> {
        let mut open = self.open.lock().await;
        let open = self.ensure_open(&mut open).await?;
        if let Some(channel) = open.broadcasts.as_ref().filter(|channel| channel.status().connected()) {
            return Ok(channel.clone());
        }
        let channel = self.open_broadcast_channel(&open.connection).await?;
        Ok(open.broadcasts.insert(channel).clone())
    }

    async fn open_witnesses(&self) -> Result<Channel, BrokerError> {
        let mut open = self.open.lock().await;
        let open = self.ensure_open(&mut open).await?;
        if let Some(channel) = open.witnesses.as_ref().filter(|channel| channel.status().connected()) {
            return Ok(channel.clone());
        }
        let channel = open.connection.create_channel().await.map_err(to_broker_error)?;
        channel.confirm_select(ConfirmSelectOptions::default()).await.map_err(to_broker_error)?;
        Ok(open.witnesses.insert(channel).clone())
    }

    async fn ensure_open<'o>(&self, open: &'o mut Option<Open>) -> Result<&'o mut Open, BrokerError> {
        if !open.as_ref().is_some_and(|open| open.connection.status().connected()) {
            let target = Target::Address(self.server);
            let connected = connection::open(&self.url, &self.config, self.tls.as_ref(), target).await;
            let (connection, shutdown_on_drop) =
                connected.map_err(|error| error.context("second connection (for publishing)"))?;
            *open = Some(Open { connection, broadcasts: None, witnesses: None, _shutdown_on_drop: shutdown_on_drop });
        }
        open.as_mut().ok_or_else(|| BrokerError::Disconnected("the second connection is closed".to_owned()))
    }

    /// Declares the exchange first: it is transient, and publishing to a missing one closes the channel. A user who may
    /// not declare it may still publish to it.
    async fn open_broadcast_channel(&self, connection: &Connection) -> Result<Channel, BrokerError> {
        for passive in [false, true] {
            let channel = connection.create_channel().await.map_err(to_broker_error)?;
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

    /// Why the server does not read from this connection, if that is known.
    pub(super) fn blocked_reason(&self) -> Option<BrokerError> {
        let alarm = "RabbitMQ alarm: publishers are blocked (memory or disk); see rabbitmq-diagnostics alarms";
        let open = self.open.try_lock().ok()?;
        let is_blocked = open.as_ref().is_some_and(|open| open.connection.status().blocked());
        is_blocked.then(|| BrokerError::Refused(alarm.to_owned()))
    }

    pub(super) async fn close(&self) {
        if let Some(open) = self.open.lock().await.take() {
            // The connection ends either way.
            let _ = open.connection.close(200, "exporter is closing the connection".into()).await;
        }
    }
}

/// Publishes a message. Returns whether the server has accepted it.
async fn publish(
    channel: &Channel,
    exchange: ShortString,
    body: &[u8],
    properties: BasicProperties,
) -> Result<bool, BrokerError> {
    let options = BasicPublishOptions::default();
    let published = channel.basic_publish(exchange, ShortString::default(), options, body, properties).await;
    let confirmation = published.map_err(to_broker_error)?.await.map_err(to_broker_error)?;
    Ok(!matches!(confirmation, Confirmation::Nack(_)))
}
