//! The AMQP connection, on a socket that the exporter opens.

use std::io;
use std::net::{Shutdown, SocketAddr};
use std::os::fd::AsFd;

use async_compat::Compat;
use lapin::tcp::RustlsConnector;
use lapin::uri::{AMQPAuthority, AMQPQueryString, AMQPScheme, AMQPUri, AMQPUserInfo, SASLMechanism};
use lapin::{AsyncTcpStream, Connection, ConnectionProperties};
use tokio::net::TcpStream;

use super::{runtime, to_broker_error};
use crate::broker::BrokerError;
use crate::broker::net::{CoalescingSocket, UsedAddresses, happy_eyeballs};
use crate::config::broker_url::Address;
use crate::config::{BrokerUrl, Config, LoginMethod};
use crate::tls::{self, TlsConfig};

/// The frame size of a connection that sends small messages only. lapin allocates 64 frames for each connection, which is
/// 8 MiB with the size that `RabbitMQ` offers, and accepts none below this one.
const SMALL_FRAME_MAX: u32 = 8192;

/// Where to connect to.
pub(super) enum Target<'t> {
    /// The host of the URL, whose addresses are tried in this order.
    Host(&'t UsedAddresses),
    /// The address of another connection of the session.
    Address(SocketAddr),
}

/// Connects. lapin keeps the thread and the socket of an abandoned attempt until the server responds:
/// [`ShutdownOnDrop`] ends them.
pub(super) async fn open(
    url: &BrokerUrl,
    config: &Config,
    tls: Option<&TlsConfig>,
    target: Target<'_>,
) -> Result<(Connection, ShutdownOnDrop), BrokerError> {
    let (name, frame_max) = match target {
        Target::Host(_) => (concat!(env!("CARGO_PKG_NAME"), " ", env!("CARGO_PKG_VERSION")), None),
        Target::Address(_) => {
            (concat!(env!("CARGO_PKG_NAME"), " ", env!("CARGO_PKG_VERSION"), " (publisher)"), Some(SMALL_FRAME_MAX))
        }
    };
    let properties = ConnectionProperties::default().with_connection_name(name.into());
    let uri = uri(url, config, frame_max);
    let AMQPAuthority { host, port, .. } = &uri.authority;
    let connecting = async {
        match target {
            Target::Host(used) => happy_eyeballs::connect(host, *port, used).await,
            Target::Address(address) => {
                let stream = TcpStream::connect(address).await?;
                stream.set_nodelay(true)?;
                Ok(stream)
            }
        }
    };
    let socket = connecting.await.map_err(|error| BrokerError::from(&error))?;
    let shutdown_on_drop = ShutdownOnDrop::new(&socket).map_err(|error| BrokerError::from(&error))?;
    let socket = std::sync::Mutex::new(Some(socket));
    let (connector, limit) = (tls.map(|tls| RustlsConnector::from(tls.config())), config.broker.connect_timeout);
    let connect = async move |uri: AMQPUri, _| {
        let socket = socket.lock().ok().and_then(|mut socket| socket.take());
        let socket = socket.ok_or_else(|| io::Error::other("lapin connected twice"))?;
        let stream = AsyncTcpStream::Plain(Compat::new(CoalescingSocket::new(socket)));
        match &connector {
            None => Ok(stream),
            Some(connector) => {
                let name = tls::server_name(&uri.authority.host);
                Ok(tls::with_handshake_timeout(limit, stream.into_rustls(connector, name)).await?)
            }
        }
    };
    let connection = Connection::connector(uri, runtime::coalescing_runtime(), connect, properties)
        .await
        .map_err(to_broker_error)?;
    Ok((connection, shutdown_on_drop))
}

/// Shuts a socket down when dropped, even if another owner still holds it.
pub(super) struct ShutdownOnDrop(std::net::TcpStream);

impl ShutdownOnDrop {
    fn new(socket: &TcpStream) -> io::Result<Self> {
        Ok(Self(socket.as_fd().try_clone_to_owned()?.into()))
    }

    /// The address of the server.
    pub(super) fn peer(&self) -> Result<SocketAddr, BrokerError> {
        self.0.peer_addr().map_err(|error| BrokerError::from(&error))
    }
}

impl Drop for ShutdownOnDrop {
    fn drop(&mut self) {
        // It may be shut down already.
        let _ = self.0.shutdown(Shutdown::Both);
    }
}

fn uri(url: &BrokerUrl, config: &Config, frame_max: Option<u32>) -> AMQPUri {
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
            frame_max,
            heartbeat: u16::try_from(config.broker.amqp.heartbeat.as_secs()).ok(),
            auth_mechanism: Some(match config.broker.amqp.login_method {
                LoginMethod::Plain => SASLMechanism::Plain,
                LoginMethod::AmqPlain => SASLMechanism::AMQPlain,
                LoginMethod::External => SASLMechanism::External,
            }),
            ..AMQPQueryString::default()
        },
    }
}
