//! Connects to a host that may have several addresses, some of which may not respond (RFC 8305, "Happy Eyeballs").

use std::io;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::net::{TcpStream, lookup_host};
use tokio::time::timeout;

use super::UsedAddresses;

/// The time before the next address is tried in parallel (RFC 8305, "Connection Attempt Delay").
const CONNECTION_ATTEMPT_DELAY: Duration = Duration::from_millis(250);

/// The first connection that is established, with `TCP_NODELAY` set. Addresses that were used before are tried last.
///
/// There is no timeout: callers must limit the attempt, because an address may never respond.
///
/// # Errors
/// Returns an error if the host cannot be resolved or every address has failed: the error of the last one.
pub(in crate::broker) async fn connect(host: &str, port: u16, used: &UsedAddresses) -> io::Result<TcpStream> {
    let mut attempts = FuturesUnordered::new();
    let mut last_error = io::Error::new(io::ErrorKind::NotFound, "host resolved to no addresses");
    let mut addresses = used.order(lookup_host((host, port)).await?).into_iter();
    loop {
        let next = addresses.next();
        let delay = if next.is_some() { CONNECTION_ATTEMPT_DELAY } else { Duration::MAX };
        attempts.extend(next.map(TcpStream::connect));
        match timeout(delay, attempts.next()).await {
            Ok(Some(Ok(stream))) => {
                stream.set_nodelay(true)?;
                used.record(stream.peer_addr()?);
                return Ok(stream);
            }
            Ok(Some(Err(error))) => last_error = error,
            Ok(None) => return Err(last_error),
            Err(_) => {}
        }
    }
}
