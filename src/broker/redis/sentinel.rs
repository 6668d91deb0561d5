//! Redis Sentinel: who the master is, and whether it still is.
//!
//! A master that lost its office may go on as a replica, and would take our subscription and our broadcasts as if nothing
//! had happened. So the server itself is asked for its role, and the Sentinels for another master all the time.

use std::time::Duration;

use tokio::time::{sleep, timeout};

use super::Error;
use super::resp::{Access, Connection};
use crate::settings::url::Address;

/// Between two questions to a Sentinel, and the time for its answer.
const ASK_EVERY: Duration = Duration::from_secs(1);

/// The Sentinels of one set, and the master that they watch.
pub(super) struct Sentinels {
    /// The one to begin with first.
    pub(super) members: Vec<Address>,
    /// What they call the master.
    pub(super) name: String,
    /// To the Sentinels.
    pub(super) access: Access,
    /// To the servers that they watch.
    pub(super) server: Access,
}

impl Sentinels {
    /// Asks the first member, and connects to the master.
    pub(super) async fn master(&self) -> Result<(Address, Connection), Error> {
        let mut sentinel = self.access.open(&self.members[0]).await?;
        let master = self.ask(&mut sentinel).await?;
        match self.connect(&master).await {
            Ok(connection) => Ok((master, connection)),
            Err(error) => Err(error.of(&format!("the master {} at {master}", self.name))),
        }
    }

    async fn ask(&self, sentinel: &mut Connection) -> Result<Address, Error> {
        let answer = sentinel.request(&["SENTINEL", "GET-MASTER-ADDR-BY-NAME", &self.name]).await?;
        let [host, port] = answer.as_slice() else {
            let name = &self.name;
            let problem = format!("the Sentinel knows no master named \"{name}\": see broker.redis.master_name");
            return Err(Error::Refused(problem));
        };
        let port = port.parse().map_err(|_| Error::Lost(format!("the Sentinel names a port {port:?}")))?;
        Ok(Address::Tcp { host: host.clone(), port })
    }

    async fn connect(&self, master: &Address) -> Result<Connection, Error> {
        let mut connection = self.server.open(master).await?;
        match connection.request(&["ROLE"]).await?.first().map(String::as_str) {
            Some("master") => Ok(connection),
            role => Err(Error::Lost(format!("its role is {}", role.unwrap_or("unknown")))),
        }
    }

    /// Ends once there is another master than `master`. Sentinels that do not answer change nothing.
    pub(super) async fn moved(&self, master: &Address) -> Error {
        for member in self.members.iter().cycle() {
            if let Ok(new) = self.watch(member, master).await {
                return Error::Lost(format!("the master {} is at {new} now, no longer at {master}", self.name));
            }
            sleep(ASK_EVERY).await;
        }
        std::future::pending().await
    }

    /// The new master, once `member` names one that is; or that it cannot be asked any more.
    async fn watch(&self, member: &Address, master: &Address) -> Result<Address, Error> {
        let mut sentinel = soon(self.access.open(member)).await?;
        loop {
            let named = soon(self.ask(&mut sentinel)).await?;
            if named != *master && soon(self.connect(&named)).await.is_ok() {
                return Ok(named);
            }
            sleep(ASK_EVERY).await;
        }
    }
}

async fn soon<T>(answer: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    timeout(ASK_EVERY, answer).await.unwrap_or(Err(Error::Silent(ASK_EVERY)))
}
