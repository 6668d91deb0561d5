//! Redis Sentinel: which server is the master, and whether it still is.
//!
//! A demoted master keeps running as a replica and would accept the subscription and the broadcasts. So the server
//! itself is asked for its role, and the Sentinels are asked for another master continuously.

use std::time::Duration;

use tokio::time::sleep;

use super::resp::{ConnectOptions, Connection};
use crate::broker::BrokerError;
use crate::broker::error::within;
use crate::config::broker_url::Address;

/// The time between two requests to a Sentinel, and the timeout of each.
const POLL_INTERVAL: Duration = Duration::from_secs(1);

/// The Sentinels of one set, and the master that they monitor.
pub(super) struct Sentinels {
    /// In the order in which they are asked.
    pub(super) members: Vec<Address>,
    /// The name under which they monitor the master.
    pub(super) name: String,
    /// Options of connections to the Sentinels.
    pub(super) options: ConnectOptions,
    /// Options of connections to the servers that they monitor.
    pub(super) server: ConnectOptions,
}

impl Sentinels {
    /// Asks the first member, and connects to the master.
    pub(super) async fn master(&self) -> Result<(Address, Connection), BrokerError> {
        let mut sentinel = self.options.open(&self.members[0]).await?;
        let master = self.master_address(&mut sentinel).await?;
        match self.connect(&master).await {
            Ok(connection) => Ok((master, connection)),
            Err(error) => Err(error.context(&format!("the master {} at {master}", self.name))),
        }
    }

    async fn master_address(&self, sentinel: &mut Connection) -> Result<Address, BrokerError> {
        let reply = sentinel.request(&["SENTINEL", "GET-MASTER-ADDR-BY-NAME", &self.name]).await?;
        let [host, port] = reply.as_slice() else {
            let name = &self.name;
            let reason = format!("Sentinel has no master named \"{name}\"; check broker.redis.master_name");
            return Err(BrokerError::Refused(reason));
        };
        let invalid = |_| BrokerError::Disconnected(format!("the Sentinel returned an invalid port {port:?}"));
        Ok(Address::Tcp { host: host.clone(), port: port.parse().map_err(invalid)? })
    }

    async fn connect(&self, master: &Address) -> Result<Connection, BrokerError> {
        let mut connection = self.server.open(master).await?;
        match connection.request(&["ROLE"]).await?.first().map(String::as_str) {
            Some("master") => Ok(connection),
            role => Err(BrokerError::Disconnected(format!("its role is {}", role.unwrap_or("unknown")))),
        }
    }

    /// Returns once there is another master than `master`. Sentinels that do not respond change nothing.
    pub(super) async fn wait_for_failover(&self, master: &Address) -> BrokerError {
        for member in self.members.iter().cycle() {
            if let Ok(new) = self.poll_member(member, master).await {
                let name = &self.name;
                return BrokerError::Disconnected(format!("the master {name} moved from {master} to {new}"));
            }
            sleep(POLL_INTERVAL).await;
        }
        std::future::pending().await
    }

    /// Returns the new master once `member` names one that accepts connections, or an error once it does not respond.
    async fn poll_member(&self, member: &Address, master: &Address) -> Result<Address, BrokerError> {
        let mut sentinel = within(POLL_INTERVAL, self.options.open(member)).await?;
        loop {
            let named = within(POLL_INTERVAL, self.master_address(&mut sentinel)).await?;
            if named != *master && within(POLL_INTERVAL, self.connect(&named)).await.is_ok() {
                return Ok(named);
            }
            sleep(POLL_INTERVAL).await;
        }
    }
}
