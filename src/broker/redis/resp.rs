//! A connection to a Redis server or a Sentinel in RESP, Redis' protocol, with or without TLS.

use std::io;
use std::net::SocketAddr;
use std::ops::Range;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::net::UnixStream;

use super::read_buffer::ReadBuffer;
use crate::broker::net::{CoalescingSocket, UsedAddresses, happy_eyeballs};
use crate::broker::{BrokerError, ConnectionHistory};
use crate::config::broker_url::Address;
use crate::config::{BrokerUrl, Config, Secret};
use crate::tls::TlsConfig;

/// Maximum number of bytes in a reply.
const MAX_REPLY: usize = 64 << 10;

pub(super) trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// How to connect and authenticate to a server.
#[derive(Clone)]
pub(super) struct ConnectOptions {
    pub(super) username: Option<String>,
    pub(super) password: Option<Secret>,
    pub(super) tls: Option<TlsConfig>,
    /// `broker.connect_timeout`, of which the TLS handshake may take a share.
    pub(super) timeout: Duration,
    pub(super) addresses: UsedAddresses,
}

impl ConnectOptions {
    /// The options of the server at `url`.
    pub(super) fn new(url: &BrokerUrl, config: &Config, tls: Option<&TlsConfig>, history: &ConnectionHistory) -> Self {
        Self {
            username: url.username.clone(),
            password: url.password.clone(),
            tls: tls.cloned(),
            timeout: config.broker.connect_timeout,
            addresses: history.addresses.clone(),
        }
    }

    /// Connects and authenticates.
    pub(super) async fn open(&self, address: &Address) -> Result<Connection, BrokerError> {
        let mut connection = self.connect(address).await.map_err(|error| BrokerError::from(&error))?;
        if let Some(password) = &self.password {
            let user = self.username.as_deref();
            let command: Vec<&str> = ["AUTH"].into_iter().chain(user).chain([password.expose()]).collect();
            connection.request(&command).await.map_err(|error| error.redact(password.expose()))?;
        }
        Ok(connection)
    }

    async fn connect(&self, address: &Address) -> io::Result<Connection> {
        match address {
            Address::Tcp { host, port } => {
                let stream = happy_eyeballs::connect(host, *port, &self.addresses).await?;
                let peer = stream.peer_addr()?;
                let stream = CoalescingSocket::new(stream);
                let stream: Box<dyn Stream> = match &self.tls {
                    Some(tls) => Box::new(tls.handshake(host, stream, self.timeout).await?),
                    None => Box::new(stream),
                };
                Ok(Connection { peer: Some(peer), unanswered_tls: self.tls.clone(), ..Connection::new(stream) })
            }
            Address::Unix(path) => {
                Ok(Connection::new(Box::new(CoalescingSocket::new(UnixStream::connect(path).await?))))
            }
        }
    }
}

/// An open connection, and the bytes received on it that are not parsed yet.
pub(super) struct Connection {
    stream: Box<dyn Stream>,
    pub(super) buffer: ReadBuffer,
    /// The TCP address of the server: a name may have several.
    pub(super) peer: Option<SocketAddr>,
    /// TLS, until the server has sent something.
    unanswered_tls: Option<TlsConfig>,
}

impl Connection {
    pub(super) fn new(stream: Box<dyn Stream>) -> Self {
        Self { stream, buffer: ReadBuffer::default(), peer: None, unanswered_tls: None }
    }

    /// Sends a command and waits for its reply. Returns the first four strings of it.
    pub(super) async fn request(&mut self, command: &[&str]) -> Result<Vec<String>, BrokerError> {
        self.send(command).await?;
        loop {
            if let Scan::Complete(frame) = Frame::scan(self.buffer.bytes())? {
                let strings = frame.strings().iter();
                let strings: Vec<String> = strings.map(|range| text(self.buffer.bytes(), range)).collect();
                self.buffer.skip(frame.length);
                return match frame.kind {
                    b'-' => {
                        Err(BrokerError::Refused(format!("{}: {}", command[0], strip_arguments(&strings.concat()))))
                    }
                    _ => Ok(strings),
                };
            }
            if self.buffer.bytes().len() > MAX_REPLY {
                return Err(protocol_error());
            }
            self.read().await?;
        }
    }

    pub(super) async fn send(&mut self, command: &[&str]) -> Result<(), BrokerError> {
        let sending = async {
            self.stream.write_all(&encode(command)).await?;
            self.stream.flush().await
        };
        sending.await.map_err(|error| self.explain(BrokerError::from(&error)))
    }

    /// Waits for bytes. Cancelling loses nothing.
    pub(super) async fn read(&mut self) -> Result<(), BrokerError> {
        match self.buffer.read_from(&mut *self.stream).await {
            Ok(0) => Err(self.explain(BrokerError::Disconnected("the server closed the connection".to_owned()))),
            Ok(_) => {
                self.unanswered_tls = None;
                Ok(())
            }
            Err(error) => Err(self.explain(BrokerError::from(&error))),
        }
    }

    /// Adds that the server asked for a client certificate, if it has sent nothing else.
    fn explain(&self, error: BrokerError) -> BrokerError {
        match (error, self.unanswered_tls.as_ref().and_then(TlsConfig::hint)) {
            (BrokerError::Disconnected(reason), Some(hint)) => BrokerError::Tls(format!("{reason}: {hint}")),
            (error, _) => error,
        }
    }
}

/// An error reply without the arguments that a server echoes back for an unknown command: they may contain a password.
pub(super) fn strip_arguments(text: &str) -> &str {
    text.split_once(", with args").map_or(text, |(reason, _)| reason)
}

fn encode(command: &[&str]) -> Vec<u8> {
    let mut frame = format!("*{}\r\n", command.len());
    for word in command {
        for piece in ["$", &word.len().to_string(), "\r\n", word, "\r\n"] {
            frame.push_str(piece);
        }
    }
    frame.into_bytes()
}

/// A complete frame: its type, and its first strings. Nested arrays are flattened.
///
/// Parsed in a loop and bounded. redis-protocol's decoder, which fred uses, recurses: a server that nests arrays can
/// make it overflow the stack.
#[derive(Debug, PartialEq)]
pub(super) struct Frame {
    /// The first byte: `*` for an array, `-` for an error.
    pub(super) kind: u8,
    strings: [Range<usize>; 4],
    count: usize,
    /// In bytes.
    pub(super) length: usize,
}

/// The frame at the start of a buffer.
#[derive(Debug, PartialEq)]
pub(super) enum Scan {
    Complete(Frame),
    /// An incomplete frame, and the position of the bulk string in which it breaks off.
    Partial(Option<Range<usize>>),
}

/// Maximum number of elements in a frame, nested ones included: enough for the reply to ROLE.
const MAX_ELEMENTS: usize = 4096;
/// Maximum number of bytes in a line: only errors and simple strings are long.
const MAX_LINE: usize = 4096;

impl Frame {
    /// The positions of its first strings, at most four.
    pub(super) fn strings(&self) -> &[Range<usize>] {
        &self.strings[..self.count]
    }

    pub(super) fn scan(buffer: &[u8]) -> Result<Scan, BrokerError> {
        let mut frame = Self { kind: 0, strings: [const { 0..0 }; 4], count: 0, length: 0 };
        let (mut pending, mut elements) = (1, 0);
        while pending > 0 {
            let Some((kind, line)) = line(buffer, frame.length)? else { return Ok(Scan::Partial(None)) };
            if elements == 0 {
                frame.kind = kind;
            }
            (pending, elements) = (pending - 1, elements + 1);
            frame.length = line.end + 2;
            match kind {
                b'+' | b'-' | b':' => frame.add(line),
                b'*' => {
                    pending = length(&buffer[line])?.unwrap_or(0).checked_add(pending).ok_or_else(protocol_error)?;
                }
                b'$' => {
                    if let Some(size) = length(&buffer[line])? {
                        let text = frame.length..frame.length.checked_add(size).ok_or_else(protocol_error)?;
                        frame.length = text.end.checked_add(2).ok_or_else(protocol_error)?;
                        if buffer.len() < frame.length {
                            return Ok(Scan::Partial(Some(text)));
                        }
                        frame.add(text);
                    }
                }
                _ => return Err(protocol_error()),
            }
            if pending > MAX_ELEMENTS || elements > MAX_ELEMENTS {
                return Err(protocol_error());
            }
        }
        Ok(Scan::Complete(frame))
    }

    fn add(&mut self, text: Range<usize>) {
        if let Some(slot) = self.strings.get_mut(self.count) {
            *slot = text;
            self.count += 1;
        }
    }
}

pub(super) fn protocol_error() -> BrokerError {
    BrokerError::Disconnected("invalid RESP reply (is this Redis?)".to_owned())
}

/// The line at `start`: its first byte, and the range of the rest.
fn line(buffer: &[u8], start: usize) -> Result<Option<(u8, Range<usize>)>, BrokerError> {
    let rest = &buffer[start.min(buffer.len())..];
    let Some(kind) = rest.first() else { return Ok(None) };
    match rest.iter().take(MAX_LINE).position(|byte| *byte == b'\n') {
        Some(end) if end >= 2 && rest[end - 1] == b'\r' => Ok(Some((*kind, start + 1..start + end - 1))),
        None if rest.len() < MAX_LINE && b"+-:*$".contains(kind) => Ok(None),
        _ => Err(protocol_error()),
    }
}

/// A number of bytes or elements; `None` for null, which is -1.
fn length(line: &[u8]) -> Result<Option<usize>, BrokerError> {
    if line == b"-1" {
        return Ok(None);
    }
    let append = |number: usize, byte: &u8| {
        let digit = byte.is_ascii_digit().then(|| usize::from(byte - b'0'))?;
        number.checked_mul(10)?.checked_add(digit)
    };
    let number = line.iter().try_fold(0, append).filter(|_| !line.is_empty());
    number.map(Some).ok_or_else(protocol_error)
}

/// The bytes in `range` as text.
pub(super) fn text(buffer: &[u8], range: &Range<usize>) -> String {
    String::from_utf8_lossy(&buffer[range.clone()]).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strings(buffer: &str) -> Vec<&str> {
        match Frame::scan(buffer.as_bytes()).unwrap() {
            Scan::Complete(frame) => frame.strings().iter().map(|range| &buffer[range.clone()]).collect(),
            Scan::Partial(_) => panic!("partial: {buffer:?}"),
        }
    }

    #[test]
    fn whole_frames() {
        assert_eq!(strings("+OK\r\n"), ["OK"]);
        assert_eq!(strings("-NOPERM no\r\n"), ["NOPERM no"]);
        assert_eq!(strings("*-1\r\n"), Vec::<&str>::new());
        assert_eq!(strings("*3\r\n$9\r\nsubscribe\r\n$1\r\nx\r\n:1\r\nrest"), ["subscribe", "x", "1"]);
        assert_eq!(strings("*3\r\n$6\r\nmaster\r\n:0\r\n*1\r\n*2\r\n$1\r\nh\r\n$-1\r\n"), ["master", "0", "h"]);
        assert_eq!(strings("*2\r\n$4\r\npong\r\n$0\r\n\r\n"), ["pong", ""]);
    }

    #[test]
    fn every_beginning_is_partial() {
        let whole = "*4\r\n$8\r\npmessage\r\n$2\r\n/*\r\n$3\r\n/ab\r\n$10\r\n0123456789\r\n";
        for end in 0..whole.len() {
            assert!(matches!(Frame::scan(&whole.as_bytes()[..end]), Ok(Scan::Partial(_))), "{end}");
        }
        let text = whole.find("0123").unwrap();
        assert_eq!(Frame::scan(&whole.as_bytes()[..text + 3]).unwrap(), Scan::Partial(Some(text..text + 10)));
    }

    #[test]
    fn a_server_other_than_redis_is_rejected() {
        let nested = "*1\r\n".repeat(1_000_000);
        let wide = format!("*1000000\r\n{}", ":1\r\n".repeat(10));
        let endless = format!("+{}", "x".repeat(MAX_LINE));
        for buffer in ["AMQP\0\0", "HTTP/1.1 400\r\n", "*x\r\n", "$99999999999999999999\r\n", &nested, &wide, &endless]
        {
            assert!(Frame::scan(buffer.as_bytes()).is_err(), "{buffer:.40}");
        }
        assert!(Frame::scan(format!("${}\r\n", usize::MAX).as_bytes()).is_err());
        assert!(Frame::scan(format!("*2\r\n*{}\r\n", usize::MAX).as_bytes()).is_err());
    }
}
