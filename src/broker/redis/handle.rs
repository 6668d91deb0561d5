//! The sending half: a fred client, connected on first use and again after a failure.

use std::fmt;
use std::net::SocketAddr;
use std::time::Duration;

use fred::clients::Client;
use fred::error::ErrorKind;
use fred::interfaces::{ClientLike, PubsubInterface};
use fred::types::config::{Config as ClientConfig, ConnectionConfig, PerformanceConfig, Server, ServerConfig};
use fred::types::{ConnectHandle, RespVersion};
use tokio::sync::Mutex;
use tokio_rustls::TlsConnector;
use uuid::Uuid;

use super::channels::fanout_names;
use super::resp::strip_arguments;
use super::role::{OtherServers, ServerRole};
use super::sentinel::Sentinels;
use crate::broker::BrokerError;
use crate::celery::Broadcast;
use crate::config::broker_url::Address;
use crate::config::{BrokerUrl, Config};
use crate::tls::{self, TlsConfig};

pub struct BrokerHandle {
    client_config: ClientConfig,
    timeout: Duration,
    exchange: String,
    channels: Vec<String>,
    client: Mutex<Option<ConnectedClient>>,
    failover: Failover,
}

/// What shows that another server must be used.
pub(super) struct Failover {
    pub(super) role: ServerRole,
    pub(super) others: OtherServers,
    /// The Sentinels, and the master that they named.
    pub(super) sentinels: Option<(Sentinels, Address)>,
}

struct ConnectedClient {
    client: Client,
    /// The task that drives the client. Without it, commands would wait until they time out.
    connection: ConnectHandle,
}

impl ConnectedClient {
    fn is_connected(&self) -> bool {
        self.client.is_connected() && !self.connection.is_finished()
    }
}

impl Drop for ConnectedClient {
    /// A dropped fred client keeps its connection, and one that quits before its task has started still
    /// connects.
    fn drop(&mut self) {
        self.connection.abort();
    }
}

impl fmt::Debug for BrokerHandle {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.debug_struct("BrokerHandle").field("channels", &self.channels).finish_non_exhaustive()
    }
}

/// A configuration for the server that the receiver is connected to: a name may have several addresses.
pub(super) fn client_config(
    url: &BrokerUrl,
    address: &Address,
    peer: Option<SocketAddr>,
    tls: Option<&TlsConfig>,
) -> ClientConfig {
    let server = match address {
        Address::Tcp { host, port } => {
            let tls_server_name = Some(tls::server_name(host).into());
            let host = peer.map_or_else(|| host.clone(), |peer| peer.ip().to_string()).into();
            ServerConfig::Centralized { server: Server { host, port: *port, tls_server_name } }
        }
        Address::Unix(path) => ServerConfig::Unix { path: path.clone() },
    };
    ClientConfig {
        server,
        username: url.username.clone(),
        password: url.password.as_ref().map(|password| password.expose().to_owned()),
        version: RespVersion::RESP2,
        fail_fast: true,
        tls: tls.map(|tls| TlsConnector::from(tls.config()).into()),
        ..ClientConfig::default()
    }
}

impl BrokerHandle {
    pub(super) fn new(config: &Config, url: &BrokerUrl, client_config: ClientConfig, failover: Failover) -> Self {
        let exchange = format!("{}.pidbox", config.events.control_exchange);
        Self {
            client_config,
            timeout: config.broker.connect_timeout,
            channels: fanout_names(config, url, &exchange),
            exchange,
            client: Mutex::new(None),
            failover,
        }
    }

    pub(in crate::broker) async fn broadcast(&self, command: Broadcast) -> Result<(), BrokerError> {
        let envelope = command.envelope(&self.exchange, &Uuid::new_v4().to_string());
        let client = self.client().await?;
        let mut receivers = 0;
        for channel in &self.channels {
            let published: Result<i64, _> = client.publish(channel.as_str(), envelope.as_str()).await;
            receivers += self.reset_on_error(published, &format!("PUBLISH {channel}")).await?;
        }
        if self.failover.sentinels.is_none() {
            self.failover.role.check(&client, receivers).await;
        }
        Ok(())
    }

    async fn reset_on_error<T>(&self, reply: Result<T, fred::error::Error>, command: &str) -> Result<T, BrokerError> {
        match reply {
            Ok(reply) => Ok(reply),
            Err(error) => {
                self.close().await;
                Err(to_broker_error(&error, command))
            }
        }
    }

    /// Returns once the Sentinels report another master, once the master has become a replica, or, on a replica, once
    /// the server at another URL is a master.
    pub(in crate::broker) async fn wait_for_failover(&self) -> BrokerError {
        let Failover { role, others, sentinels } = &self.failover;
        if let Some((sentinels, master)) = sentinels {
            return sentinels.wait_for_failover(master).await;
        }
        tokio::select! {
            error = role.wait_for_demotion() => error,
            error = others.wait_for_master() => error,
        }
    }

    pub(in crate::broker) async fn close(&self) {
        *self.client.lock().await = None;
    }

    /// The connected client. It is stored before it is connected, so that an abandoned attempt is closed.
    async fn client(&self) -> Result<Client, BrokerError> {
        let mut connected = self.client.lock().await;
        if let Some(connected) = connected.as_ref().filter(|connected| connected.is_connected()) {
            return Ok(connected.client.clone());
        }
        let client = self.new_client();
        // The connection task first runs during the next await, because this thread runs both: its result is not
        // missed.
        *connected = Some(ConnectedClient { client: client.clone(), connection: client.connect() });
        client
            .wait_for_connect()
            .await
            .map_err(|error| to_broker_error(&error, "second connection (for broadcasts)"))?;
        Ok(client)
    }

    fn new_client(&self) -> Client {
        let performance = PerformanceConfig { default_command_timeout: self.timeout, ..PerformanceConfig::default() };
        let connection = ConnectionConfig {
            connection_timeout: self.timeout,
            internal_command_timeout: self.timeout,
            max_command_attempts: 1,
            ..ConnectionConfig::default()
        };
        Client::new(self.client_config.clone(), Some(performance), Some(connection), None)
    }
}

fn to_broker_error(error: &fred::error::Error, command: &str) -> BrokerError {
    let reason = format!("{command}: {}", strip_arguments(error.details()));
    match error.kind() {
        ErrorKind::Tls => BrokerError::Tls(reason),
        ErrorKind::IO | ErrorKind::Timeout | ErrorKind::Canceled => BrokerError::Disconnected(reason),
        _ => BrokerError::Refused(reason),
    }
}
