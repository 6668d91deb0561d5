//! The replication role of a Redis server. Events also arrive from a replica, but broadcasts there reach no worker,
//! because workers subscribe to the master.

use std::time::Duration;

use fred::clients::Client;
use fred::interfaces::ClientLike;
use fred::types::{CustomCommand, Value};
use tokio::sync::{Mutex, Notify};
use tokio::time::{sleep, timeout};

use super::resp::{ConnectOptions, Connection};
use crate::broker::{BrokerError, ConnectionHistory, tls_config};
use crate::config::broker_url::Address;
use crate::config::{BrokerUrl, Config};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    Master,
    Replica,
    /// ROLE failed, for example because the user may not run it.
    Unknown,
}

impl Role {
    /// Asks the server on a connection that is not subscribed.
    pub(super) async fn request(connection: &mut Connection) -> Result<Self, BrokerError> {
        match connection.request(&["ROLE"]).await {
            Ok(reply) => Ok(Self::from_name(reply.first().map(String::as_str))),
            Err(BrokerError::Refused(_)) => Ok(Self::Unknown),
            Err(error) => Err(error),
        }
    }

    async fn request_with(client: &Client) -> Self {
        let command = CustomCommand::new_static("ROLE", None, false);
        let reply: Result<Vec<Value>, _> = client.custom(command, Vec::<String>::new()).await;
        Self::from_name(reply.ok().as_ref().and_then(|reply| reply.first()).and_then(Value::as_str).as_deref())
    }

    fn from_name(name: Option<&str>) -> Self {
        match name {
            Some("master") => Self::Master,
            Some("slave") => Self::Replica,
            _ => Self::Unknown,
        }
    }
}

/// The role of the server that the session is connected to.
pub(super) struct ServerRole {
    role: Mutex<Role>,
    demoted: Notify,
    history: ConnectionHistory,
}

impl ServerRole {
    pub(super) fn new(role: Role, history: &ConnectionHistory) -> Self {
        Self { role: Mutex::new(role), demoted: Notify::new(), history: history.clone() }
    }

    /// Checks the role after a broadcast, if the number of subscribers that it reached indicates that the role has
    /// changed.
    pub(super) async fn check(&self, client: &Client, receivers: i64) {
        let mut role = self.role.lock().await;
        let may_have_changed = match *role {
            Role::Master => receivers == 0,
            Role::Replica => receivers > 0,
            Role::Unknown => false,
        };
        if !may_have_changed {
            return;
        }
        let now = Role::request_with(client).await;
        match (*role, now) {
            // The request failed: the next broadcast repeats it.
            (_, Role::Unknown) => return,
            (Role::Master, Role::Replica) => self.demoted.notify_one(),
            (_, Role::Master) => self.history.record_master(),
            _ => {}
        }
        *role = now;
    }

    /// Returns once the server has become a replica.
    pub(super) async fn wait_for_demotion(&self) -> BrokerError {
        self.demoted.notified().await;
        BrokerError::Disconnected("server demoted to replica".to_owned())
    }
}

/// The servers at the other URLs, while the session is connected to a replica.
#[derive(Default)]
pub(super) struct OtherServers {
    servers: Vec<(Address, ConnectOptions)>,
    interval: Duration,
}

impl OtherServers {
    pub(super) fn new(
        url: &BrokerUrl,
        all: &[BrokerUrl],
        config: &Config,
        history: &ConnectionHistory,
    ) -> Result<Self, BrokerError> {
        let servers = all.iter().filter(|other| other.address != url.address).map(|other| {
            let tls = tls_config(other, config)?;
            Ok((other.address.clone(), ConnectOptions::new(other, config, tls.as_ref(), history)))
        });
        Ok(Self { servers: servers.collect::<Result<_, BrokerError>>()?, interval: config.events.enable_interval })
    }

    /// Returns once one of them is a master.
    pub(super) async fn wait_for_master(&self) -> BrokerError {
        if self.servers.is_empty() {
            return std::future::pending().await;
        }
        loop {
            sleep(self.interval).await;
            for (address, options) in &self.servers {
                let role = async { Role::request(&mut options.open(address).await?).await };
                if let Ok(Ok(Role::Master)) = timeout(options.timeout, role).await {
                    return BrokerError::Disconnected(format!("server is a replica, and {address} is the master"));
                }
            }
        }
    }
}
