//! Explains why a login failed. lapin does not report which login methods the server offers, and `RabbitMQ` does not
//! reply to a method that it does not offer.

use std::pin::pin;
use std::time::Instant;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::timeout;

use crate::broker::BrokerError;
use crate::broker::net::{UsedAddresses, happy_eyeballs};
use crate::config::broker_url::Address;
use crate::config::{BrokerUrl, Config};
use crate::tls::TlsConfig;

/// The header that a client sends first: AMQP 0-9-1.
const PROTOCOL_HEADER: &[u8] = b"AMQP\x00\x00\x09\x01";
/// Class and method of `connection.start`.
const CONNECTION_START: &[u8] = b"\x00\x0a\x00\x0a";
/// The largest `connection.start` that is read, in bytes.
const MAX_START: usize = 64 << 10;

/// An attempt to log in.
pub(super) struct Login<'l> {
    pub(super) url: &'l BrokerUrl,
    pub(super) config: &'l Config,
    pub(super) tls: Option<&'l TlsConfig>,
}

impl Login<'_> {
    /// The result of `opening`, which must come within `broker.connect_timeout`. A second connection asks the server for
    /// the reason if `opening` takes more than half of this time, or if the server has asked for a client certificate
    /// and then closed the connection. Other closed connections get none: a server that is in trouble should not get
    /// twice as many.
    pub(super) async fn run<T>(&self, opening: impl Future<Output = Result<T, BrokerError>>) -> Result<T, BrokerError> {
        let (limit, began) = (self.config.broker.connect_timeout, Instant::now());
        let mut opening = pin!(opening);
        match timeout(limit / 2, &mut opening).await {
            Ok(Err(error @ BrokerError::Disconnected(_))) if self.tls.is_some_and(|tls| tls.hint().is_some()) => {
                let left = limit.saturating_sub(began.elapsed());
                Err(timeout(left, self.explain(error.clone())).await.unwrap_or(error))
            }
            Ok(opened) => opened,
            Err(_) => tokio::select! {
                opened = timeout(limit.saturating_sub(limit / 2), opening) => {
                    opened.unwrap_or(Err(BrokerError::Timeout(limit)))
                }
                error = self.wait_for_mismatch() => Err(error),
            },
        }
    }

    /// The reason why the server closed the connection.
    async fn explain(&self, error: BrokerError) -> BrokerError {
        match (self.offered_methods().await, error, self.tls.and_then(TlsConfig::hint)) {
            (Ok(offered), error, _) => self.mismatch(&offered).unwrap_or(error),
            (Err(_), BrokerError::Disconnected(reason), Some(hint)) => BrokerError::Tls(format!("{reason}: {hint}")),
            (Err(_), error, _) => error,
        }
    }

    /// Returns only if the server does not offer the login method.
    async fn wait_for_mismatch(&self) -> BrokerError {
        match self.offered_methods().await.ok().and_then(|offered| self.mismatch(&offered)) {
            Some(error) => error,
            None => std::future::pending().await,
        }
    }

    fn mismatch(&self, offered: &str) -> Option<BrokerError> {
        let method = self.config.broker.amqp.login_method.to_string();
        let is_offered = offered.split(' ').any(|offered| offered == method);
        (!is_offered).then(|| {
            BrokerError::Refused(format!(
                "the server does not offer login method {method} (broker.amqp.login_method, or login_method in the URL); \
                 it offers {offered}"
            ))
        })
    }

    /// The names of the methods, separated by spaces.
    async fn offered_methods(&self) -> Result<String, BrokerError> {
        let Address::Tcp { host, port } = &self.url.address else { return Err(invalid()) };
        let connecting = async {
            // The attempts of the session remember which addresses they have used. This one does not count.
            let stream = happy_eyeballs::connect(host, *port, &UsedAddresses::default()).await?;
            match self.tls {
                None => read_start(stream).await,
                Some(tls) => read_start(tls.handshake(host, stream, self.config.broker.connect_timeout).await?).await,
            }
        };
        let start = connecting.await.map_err(|error| BrokerError::from(&error))?;
        methods(&start).ok_or_else(invalid)
    }
}

fn invalid() -> BrokerError {
    BrokerError::Disconnected("invalid AMQP reply (is this RabbitMQ?)".to_owned())
}

/// Reads the payload of the server's first frame.
async fn read_start(mut stream: impl AsyncRead + AsyncWrite + Unpin) -> std::io::Result<Vec<u8>> {
    stream.write_all(PROTOCOL_HEADER).await?;
    stream.flush().await?;
    // Type, channel and size of the frame.
    let (_, _, size) = (stream.read_u8().await?, stream.read_u16().await?, stream.read_u32().await?);
    let mut payload = vec![0; MAX_START.min(size as usize)];
    stream.read_exact(&mut payload).await?;
    Ok(payload)
}

/// The login methods in a `connection.start`: the first string after the version and the server's properties.
fn methods(start: &[u8]) -> Option<String> {
    let (_version, rest) = start.strip_prefix(CONNECTION_START)?.split_at_checked(2)?;
    let (_properties, rest) = split_long(rest)?;
    let (methods, _) = split_long(rest)?;
    let is_plausible = methods.len() <= 256 && methods.iter().all(|byte| byte.is_ascii_graphic() || *byte == b' ');
    is_plausible.then(|| String::from_utf8_lossy(methods).into_owned())
}

/// A text or table with its length in front, and what follows.
fn split_long(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = bytes.split_first_chunk::<4>()?;
    rest.split_at_checked(u32::from_be_bytes(*length) as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn methods_follow_the_properties() {
        let start = b"\x00\x0a\x00\x0a\x00\x09\x00\x00\x00\x03abc\x00\x00\x00\x0ePLAIN EXTERNAL\x00\x00\x00\x05en_US";
        assert_eq!(methods(start).unwrap(), "PLAIN EXTERNAL");
    }

    #[test]
    fn other_frames_have_no_methods() {
        for start in [
            &b""[..],
            b"\x00\x0a\x00\x0a\x00",
            b"\x00\x0a\x00\x0b\x00\x09\x00\x00\x00\x00\x00\x00\x00\x00",
            b"\x00\x0a\x00\x0a\x00\x09\xff\xff\xff\xffabc",
            b"\x00\x0a\x00\x0a\x00\x09\x00\x00\x00\x00\x00\x00\x00\x02\x1b[",
        ] {
            assert_eq!(methods(start), None, "{start:?}");
        }
    }
}
