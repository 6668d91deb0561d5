//! `--healthcheck`: queries `/healthz` of the running exporter.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, bail};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::Request;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::config::{self, Overrides};

const TIMEOUT: Duration = Duration::from_secs(5);
const MAX_BODY: usize = 64 << 10;

/// Prints the response. Only the address is read from the configuration, so that a mistake in a file that the running
/// exporter has not read does not make it unhealthy.
///
/// # Errors
/// Returns an error if the exporter does not respond, or responds with an error status.
pub(super) async fn run(overrides: &Overrides) -> anyhow::Result<()> {
    let address = connect_address(config::load_listen_address(overrides)?);
    let Ok(response) = timeout(TIMEOUT, query(address)).await else {
        bail!("http://{address}/healthz did not respond within {} s", TIMEOUT.as_secs());
    };
    let (status, body) = response?;
    println!("{}", String::from_utf8_lossy(&body).trim_end());
    if !status.is_success() {
        bail!("http://{address}/healthz responded with {status}");
    }
    Ok(())
}

async fn query(address: SocketAddr) -> anyhow::Result<(hyper::StatusCode, bytes::Bytes)> {
    let stream = TcpStream::connect(address).await.with_context(|| format!("failed to connect to {address}"))?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    let request = Request::get("/healthz").header("host", address.to_string()).body(Empty::<bytes::Bytes>::new())?;
    let response = sender.send_request(request).await?;
    let status = response.status();
    let body = Limited::new(response.into_body(), MAX_BODY).collect().await.map_err(anyhow::Error::from_boxed)?;
    Ok((status, body.to_bytes()))
}

/// The address at which this host reaches a socket that listens on all addresses.
fn connect_address(listen: SocketAddr) -> SocketAddr {
    let ip = match listen.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(ip) if ip.is_unspecified() => IpAddr::V6(Ipv6Addr::LOCALHOST),
        ip => ip,
    };
    SocketAddr::new(ip, listen.port())
}
