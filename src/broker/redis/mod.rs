//! Redis pub/sub.
//!
//! The receiver parses RESP itself: fred's client hands messages out through a channel that drops them when its reader
//! is slow, does not expose the server's confirmation of a subscription or its refusal, and does not bound a message.
//! Broadcasts use a fred client on a separate connection, because a PUBLISH must not wait behind a burst.

mod channels;
mod dedup;
mod handle;
mod ping;
mod read_buffer;
mod receiver;
mod resp;
mod role;
mod sentinel;

pub use handle::BrokerHandle;
pub use receiver::EventReceiver;

use handle::Failover;
use resp::{ConnectOptions, Connection};
use role::{OtherServers, Role, ServerRole};
use sentinel::Sentinels;

use super::output_limit::OutputLimitDisconnects;
use super::{BrokerError, ConnectionHistory};
use crate::config::broker_url::Transport;
use crate::config::{BrokerUrl, Config};
use crate::observability::GapCause;
use crate::tls::TlsConfig;

/// Connects both halves.
pub(super) async fn connect(
    url: &BrokerUrl,
    all: &[BrokerUrl],
    config: &Config,
    tls: Option<&TlsConfig>,
    history: &ConnectionHistory,
    accept_replica: bool,
) -> Result<(EventReceiver, BrokerHandle), BrokerError> {
    let options = ConnectOptions::new(url, config, tls, history);
    let (address, mut connection, sentinels) = if url.transport == Transport::Sentinel {
        let sentinels = sentinels(url, all, config, options);
        let (master, connection) = sentinels.master().await?;
        (master, connection, Some(sentinels))
    } else {
        (url.address.clone(), options.open(&url.address).await?, None)
    };
    let role = if sentinels.is_some() { Role::Master } else { Role::request(&mut connection).await? };
    match role {
        Role::Master => history.record_master(),
        Role::Replica if !accept_replica || history.has_seen_master() => return Err(BrokerError::Replica),
        Role::Replica | Role::Unknown => {}
    }
    check_database(&mut connection, url.db).await?;
    let master = sentinels.is_some().then(|| address.clone());
    let peer = connection.peer;
    let disconnects = output_limit_disconnects(&mut connection).await?;
    let mut receiver = EventReceiver::subscribe(connection, config, url, master).await?;
    if history.output_limit_was_reached(disconnects) {
        receiver.disconnect_cause = GapCause::RedisOutputLimit;
    }
    let client_config = handle::client_config(url, &address, peer, tls);
    let others =
        if role == Role::Replica { OtherServers::new(url, all, config, history)? } else { OtherServers::default() };
    let sentinels = sentinels.map(|sentinels| (sentinels, address));
    let failover = Failover { role: ServerRole::new(role, history), others, sentinels };
    let handle = BrokerHandle::new(config, url, client_config, failover);
    Ok((receiver, handle))
}

/// Fails if the server does not have the database: then no worker can use it. A user who may not ask is no error.
async fn check_database(connection: &mut Connection, db: u32) -> Result<(), BrokerError> {
    if db == 0 {
        return Ok(());
    }
    match connection.request(&["SELECT", &db.to_string()]).await {
        Err(BrokerError::Refused(reason)) if reason.contains("out of range") => Err(BrokerError::Refused(format!(
            "the server has no database {db}: use the number in Celery's broker URL ({reason})"
        ))),
        Ok(_) | Err(BrokerError::Refused(_)) => Ok(()),
        Err(error) => Err(error),
    }
}

/// How many clients the server has disconnected because they lagged, if it reports this and the user may ask.
async fn output_limit_disconnects(connection: &mut Connection) -> Result<Option<OutputLimitDisconnects>, BrokerError> {
    match connection.request(&["INFO", "server", "stats"]).await {
        Ok(reply) => Ok(reply.first().and_then(|info| OutputLimitDisconnects::parse(info))),
        Err(BrokerError::Refused(_)) => Ok(None),
        Err(error) => Err(error),
    }
}

/// The Sentinels of the set, beginning with the member at `url`. As in kombu, the `ssl_*` parameters of a URL apply to
/// the master.
fn sentinels(url: &BrokerUrl, all: &[BrokerUrl], config: &Config, server: ConnectOptions) -> Sentinels {
    let redis = &config.broker.redis;
    let others = all.iter().map(|url| url.address.clone()).filter(|address| *address != url.address);
    Sentinels {
        members: [url.address.clone()].into_iter().chain(others).collect(),
        name: redis.master_name.clone().unwrap_or_default(),
        options: ConnectOptions {
            username: redis.sentinel_username.clone(),
            password: redis.sentinel_password.clone(),
            tls: server.tls.clone().filter(|_| config.broker.tls.enabled == Some(true)),
            timeout: server.timeout,
            addresses: server.addresses.clone(),
        },
        server,
    }
}
