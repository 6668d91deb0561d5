//! A TCP connection to a name that may stand for several addresses, not all of which answer.

use std::io;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::net::{TcpStream, lookup_host};
use tokio::time::timeout;

/// So long an address is waited for before the next one is tried beside it (RFC 8305, "Connection Attempt Delay").
const NEXT_AFTER: Duration = Duration::from_millis(250);

/// The first connection that comes about, with small packets sent at once.
///
/// # Errors
/// The last one, once every address has failed: one that never answers is waited for without end.
pub(super) async fn dial(host: &str, port: u16) -> io::Result<TcpStream> {
    let mut attempts = FuturesUnordered::new();
    let mut failure = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    let mut addresses = lookup_host((host, port)).await?;
    loop {
        let next = addresses.next();
        let patience = if next.is_some() { NEXT_AFTER } else { Duration::MAX };
        attempts.extend(next.map(TcpStream::connect));
        match timeout(patience, attempts.next()).await {
            Ok(Some(Ok(stream))) => {
                stream.set_nodelay(true)?;
                return Ok(stream);
            }
            Ok(Some(Err(error))) => failure = error,
            Ok(None) => return Err(failure),
            Err(_) => {}
        }
    }
}
