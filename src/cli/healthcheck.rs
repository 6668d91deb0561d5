//! `--healthcheck`: queries `/healthz` of the running exporter, with its own certificate if clients need one.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, bail};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::Request;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::config::{self, Overrides};
use crate::http::{Identity, WebConfig};
use crate::tls::{PemFile, TlsConfig, TlsOptions};

const TIMEOUT: Duration = Duration::from_secs(5);
const MAX_BODY: usize = 64 << 10;

/// Prints the response. Only what the connection needs is read from the configuration, so that a mistake in a file that
/// the running exporter has not read does not make it unhealthy.
///
/// # Errors
/// Returns an error if the exporter does not respond, or responds with an error status.
pub(super) async fn run(overrides: &Overrides) -> anyhow::Result<()> {
    let http = config::load_probe(overrides)?;
    let address = connect_address(http.listen);
    let web_config = WebConfig::load(http.web_config_file.as_deref())?;
    let url = format!("{}://{address}/healthz", web_config.scheme());
    let Ok(response) = timeout(TIMEOUT, query(address, web_config.identity())).await else {
        bail!("{url} did not respond within {} s", TIMEOUT.as_secs());
    };
    let (status, body) = response?;
    println!("{}", String::from_utf8_lossy(&body).trim_end());
    if !status.is_success() {
        bail!("{url} responded with {status}");
    }
    Ok(())
}

type Answer = (hyper::StatusCode, bytes::Bytes);

async fn query(address: SocketAddr, identity: Option<&Identity>) -> anyhow::Result<Answer> {
    let stream = TcpStream::connect(address).await.with_context(|| format!("failed to connect to {address}"))?;
    let Some(identity) = identity else { return request(stream, address).await };
    let tls = TlsConfig::new(&tls_options(identity))?;
    let answer = async { request(tls.handshake("localhost", stream, TIMEOUT).await?, address).await }.await;
    if identity.requires_client_certificate {
        return answer.context(
            "the server requires a client certificate, and may not accept its own: issue \
             tls_server_config.cert_file from client_ca_file and for client authentication, or probe the TCP port",
        );
    }
    answer
}

/// The server's own certificate is also the client's. The server is on this host, so its certificate is not verified.
fn tls_options(identity: &Identity) -> TlsOptions {
    let file = |setting, path: &Path| {
        identity.requires_client_certificate.then(|| PemFile {
            setting,
            display: config::printable_path(path),
            path: path.to_owned(),
        })
    };
    TlsOptions {
        ca_file: None,
        ca_path: None,
        ca_data: None,
        cert_file: file("tls_server_config.cert_file", &identity.cert_file),
        key_file: file("tls_server_config.key_file", &identity.key_file),
        check_hostname: false,
        verify: false,
    }
}

async fn request(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    address: SocketAddr,
) -> anyhow::Result<Answer> {
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
