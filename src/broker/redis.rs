//! Redis pub/sub, and what speaks its protocol.
//!
//! The subscription reads frames with fred's own codec, one layer below its client: that client hands messages out on a
//! channel that drops them when its reader is slow, and shows neither the server's confirmation of a subscription nor
//! its refusal. Broadcasts go through a fred client on a connection of their own.

use std::fmt;
use std::io;
use std::ops::Range;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use fred::clients::Client;
use fred::error::ErrorKind;
use fred::interfaces::{ClientLike, PubsubInterface};
use fred::types::RespVersion;
use fred::types::config::{Config, ConnectionConfig, PerformanceConfig, Server, ServerConfig};
use redis_protocol::resp2::decode::decode_range;
use redis_protocol::resp2::types::RangeFrame;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::Mutex;
use tokio::time::{Instant, timeout, timeout_at};
use tokio_rustls::TlsConnector;
use uuid::Uuid;

use super::{Batch, Error, Message, Wire};
use crate::celery::{Broadcast, Reject};
use crate::settings::url::Address;
use crate::settings::{BrokerUrl, FanoutPrefix, Settings};
use crate::tls;

/// A quiet server is asked for a sign of life after this long.
const PING_AFTER: Duration = Duration::from_secs(5);
/// A server from which no byte has come for this long is given up.
const SILENCE: Duration = Duration::from_secs(15);
/// Room for reading: below what allocators take from the system at each call.
const READ_SIZE: usize = 64 << 10;
/// Messages of one batch at most.
const MAX_BATCH: usize = 1024;
/// What a message's frame may hold beside its payload.
const MAX_FRAME_HEAD: usize = 16 << 10;

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// The receiving half: a connection in subscribed state.
pub struct Subscription {
    stream: Box<dyn Stream>,
    buffer: BytesMut,
    max_message: usize,
    /// Bytes of an oversized message that are still to come and to be thrown away.
    skip: usize,
    last_byte: Instant,
    pinged: bool,
    channel: Channel,
}

impl fmt::Debug for Subscription {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.debug_struct("Subscription").field("channel", &self.channel).finish_non_exhaustive()
    }
}

/// What is subscribed to: a pattern, or without kombu's `fanout_patterns` the channel itself.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Channel {
    Pattern(String),
    Plain(String),
}

/// The name of a fanout exchange on Redis (`kombu.transport.redis`): `/{db}.` before it unless set otherwise.
fn fanout_name(settings: &Settings, url: &BrokerUrl, exchange: &str) -> String {
    let redis = &settings.broker.redis;
    let prefix = match &redis.fanout_prefix {
        FanoutPrefix::On => format!("/{}.", url.db),
        FanoutPrefix::Custom(text) => text.replace("{db}", &url.db.to_string()),
        FanoutPrefix::Off => String::new(),
    };
    format!("{}{prefix}{exchange}", redis.global_keyprefix)
}

impl Channel {
    fn of(settings: &Settings, url: &BrokerUrl) -> Self {
        let name = fanout_name(settings, url, &settings.events.exchange);
        if !settings.broker.redis.fanout_patterns {
            return Self::Plain(name);
        }
        let escaped: String = name
            .chars()
            .flat_map(|character| {
                let special = matches!(character, '*' | '?' | '[' | ']' | '\\');
                special.then_some('\\').into_iter().chain([character])
            })
            .collect();
        Self::Pattern(format!("{escaped}/*"))
    }

    fn command(&self) -> [&str; 2] {
        match self {
            Self::Pattern(pattern) => ["PSUBSCRIBE", pattern],
            Self::Plain(name) => ["SUBSCRIBE", name],
        }
    }
}

/// Connects both halves.
pub(super) async fn connect(
    url: &BrokerUrl,
    settings: &Settings,
    tls: Option<&tls::Client>,
) -> Result<(Subscription, Control), Error> {
    let mut subscription = Subscription {
        stream: open(&url.address, tls, settings.broker.connect_timeout).await.map_err(|error| Error::from(&error))?,
        buffer: BytesMut::with_capacity(READ_SIZE),
        max_message: settings.events.max_message,
        skip: 0,
        last_byte: Instant::now(),
        pinged: false,
        channel: Channel::of(settings, url),
    };
    if let Some(password) = &url.password {
        let user = url.username.as_deref();
        let command: Vec<&str> = ["AUTH"].into_iter().chain(user).chain([password.expose()]).collect();
        subscription.request(&command).await?;
    }
    let channel = subscription.channel.clone();
    subscription.request(&channel.command()).await?;
    let pidbox = fanout_name(settings, url, &format!("{}.pidbox", settings.events.control_exchange));
    let control = Control {
        config: client_config(url, tls),
        limit: settings.broker.connect_timeout,
        exchange: format!("{}.pidbox", settings.events.control_exchange),
        channel: pidbox,
        client: Mutex::new(None),
    };
    Ok((subscription, control))
}

async fn open(address: &Address, tls: Option<&tls::Client>, limit: Duration) -> io::Result<Box<dyn Stream>> {
    match address {
        Address::Tcp { host, port } => {
            let stream = TcpStream::connect((host.as_str(), *port)).await?;
            stream.set_nodelay(true)?;
            match tls {
                Some(tls) => Ok(Box::new(tls.handshake(host, stream, limit).await?)),
                None => Ok(Box::new(stream)),
            }
        }
        Address::Unix(path) => Ok(Box::new(UnixStream::connect(path).await?)),
    }
}

impl Subscription {
    pub(super) fn describe(&self) -> String {
        match &self.channel {
            Channel::Pattern(pattern) => format!("channels {pattern}"),
            Channel::Plain(name) => format!("channel {name}"),
        }
    }

    /// Sends a command and waits for its answer.
    async fn request(&mut self, command: &[&str]) -> Result<(), Error> {
        self.write(command).await.map_err(|error| Error::from(&error))?;
        loop {
            if let Some((frame, length)) = decode(&self.buffer)? {
                let head = self.buffer.split_to(length).freeze();
                return match frame {
                    RangeFrame::Error((start, end)) => {
                        Err(Error::Refused(format!("{}: {}", command[0], text(&head[start..end]))))
                    }
                    _ => Ok(()),
                };
            }
            self.read().await?;
        }
    }

    async fn write(&mut self, command: &[&str]) -> io::Result<()> {
        self.stream.write_all(&encode(command)).await?;
        self.stream.flush().await
    }

    pub(super) async fn next(&mut self) -> Result<Batch, Error> {
        loop {
            let messages = self.parse()?;
            if !messages.is_empty() {
                return Ok(Batch::new(messages, None));
            }
            self.read_or_ping().await?;
        }
    }

    /// Waits for bytes, and asks a quiet server for some. A PING needs no answer of its own: any byte will do.
    async fn read_or_ping(&mut self) -> Result<(), Error> {
        let patience = if self.pinged { SILENCE } else { PING_AFTER };
        match timeout_at(self.last_byte + patience, self.read()).await {
            Ok(read) => read,
            Err(_) if self.pinged => Err(Error::Silent(SILENCE)),
            Err(_) => {
                self.pinged = true;
                let rest = SILENCE.saturating_sub(PING_AFTER);
                match timeout(rest, self.write(&["PING"])).await {
                    Ok(written) => written.map_err(|error| Error::from(&error)),
                    Err(_) => Err(Error::Silent(SILENCE)),
                }
            }
        }
    }

    async fn read(&mut self) -> Result<(), Error> {
        // Doubling keeps the copying of a large message's beginning linear.
        self.buffer.reserve(READ_SIZE.max(self.buffer.len()));
        let read = self.stream.read_buf(&mut self.buffer).await.map_err(|error| Error::from(&error))?;
        if read == 0 {
            return Err(Error::Lost("the server closed the connection".to_owned()));
        }
        self.last_byte = Instant::now();
        self.pinged = false;
        let skipped = self.skip.min(self.buffer.len());
        let _ = self.buffer.split_to(skipped);
        self.skip -= skipped;
        Ok(())
    }

    /// Takes every whole message out of the buffer.
    fn parse(&mut self) -> Result<Vec<Message>, Error> {
        let mut found: Vec<Range<usize>> = Vec::new();
        let mut parsed = 0;
        while found.len() < MAX_BATCH
            && let Some((frame, length)) = decode(&self.buffer[parsed..])?
        {
            let payload = payload(&frame, &self.buffer[parsed..])?;
            found.extend(payload.map(|range| parsed + range.start..parsed + range.end));
            parsed += length;
        }
        let whole = self.buffer.split_to(parsed).freeze();
        let mut messages: Vec<Message> = found.into_iter().map(|range| self.message(whole.slice(range))).collect();
        if self.buffer.len() > self.max_message + MAX_FRAME_HEAD {
            messages.push(self.skip_oversized()?);
        }
        Ok(messages)
    }

    fn message(&self, bytes: Bytes) -> Message {
        let too_large = bytes.len() > self.max_message;
        let wire = if too_large { Wire::Refused(Reject::TooLarge.into()) } else { Wire::Envelope };
        Message { bytes, wire, redelivered: false }
    }

    /// The buffer holds more than the largest message and no whole frame: what is still to come of it is not kept.
    fn skip_oversized(&mut self) -> Result<Message, Error> {
        let extent = oversized(&self.buffer)
            .ok_or_else(|| Error::Lost("the server sent something that is no message".to_owned()))?;
        let beginning = Bytes::copy_from_slice(&self.buffer[extent.start..extent.start + 64]);
        let frame_end = extent.end + 2;
        let here = frame_end.min(self.buffer.len());
        self.skip = frame_end - here;
        self.buffer = BytesMut::from(&self.buffer[here..]);
        Ok(Message { bytes: beginning, wire: Wire::Refused(Reject::TooLarge.into()), redelivered: false })
    }
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

fn decode(buffer: &[u8]) -> Result<Option<(RangeFrame, usize)>, Error> {
    decode_range(buffer).map_err(|error| Error::Lost(format!("the server's answer is not understood: {error}")))
}

/// Where a frame's payload is, if it is a message.
fn payload(frame: &RangeFrame, buffer: &[u8]) -> Result<Option<Range<usize>>, Error> {
    let parts = match frame {
        RangeFrame::Array(parts) => parts,
        RangeFrame::Error((start, end)) => return Err(Error::Refused(text(&buffer[*start..*end]))),
        _ => return Ok(None),
    };
    let part = |index: usize| match parts.get(index) {
        Some(RangeFrame::BulkString((start, end))) => Some(*start..*end),
        _ => None,
    };
    Ok(match part(0).map(|kind| &buffer[kind]) {
        Some(b"pmessage") => part(3),
        Some(b"message") => part(2),
        _ => None,
    })
}

/// Where the payload of the unfinished message at the start of `buffer` will be.
fn oversized(buffer: &[u8]) -> Option<Range<usize>> {
    let (parts, mut at) = number(buffer, 0, b'*')?;
    for _ in 1..parts.min(4) {
        let (length, start) = number(buffer, at, b'$')?;
        at = start.checked_add(length)?.checked_add(2)?;
    }
    let (length, start) = number(buffer, at, b'$')?;
    (start + 64 <= buffer.len()).then_some(start..start.checked_add(length)?)
}

/// The number behind `mark` at `at`, and where the line after it starts.
fn number(buffer: &[u8], at: usize, mark: u8) -> Option<(usize, usize)> {
    let line = buffer.get(at..)?.strip_prefix(&[mark])?;
    let end = line.iter().take(20).position(|byte| *byte == b'\r')?;
    let number = std::str::from_utf8(&line[..end]).ok()?.parse().ok()?;
    Some((number, at + 1 + end + 2))
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// The sending half: a fred client, connected when it is first needed and again after it broke.
pub struct Control {
    config: Config,
    limit: Duration,
    exchange: String,
    channel: String,
    client: Mutex<Option<Kept>>,
}

struct Kept {
    client: Client,
    ready: bool,
}

impl fmt::Debug for Control {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.debug_struct("Control").field("channel", &self.channel).finish_non_exhaustive()
    }
}

fn client_config(url: &BrokerUrl, tls: Option<&tls::Client>) -> Config {
    let server = match &url.address {
        Address::Tcp { host, port } => {
            let tls_server_name = Some(tls::server_name(host).into());
            ServerConfig::Centralized { server: Server { host: host.into(), port: *port, tls_server_name } }
        }
        Address::Unix(path) => ServerConfig::Unix { path: path.clone() },
    };
    Config {
        server,
        username: url.username.clone(),
        password: url.password.as_ref().map(|password| password.expose().to_owned()),
        version: RespVersion::RESP2,
        fail_fast: true,
        tls: tls.map(|tls| TlsConnector::from(tls.config()).into()),
        ..Config::default()
    }
}

impl Control {
    pub(super) async fn broadcast(&self, command: Broadcast) -> Result<(), Error> {
        let envelope = command.envelope(&self.exchange, &Uuid::new_v4().to_string());
        let client = self.client().await?;
        let published: Result<i64, _> = client.publish(self.channel.as_str(), envelope).await;
        self.answered(published, &format!("PUBLISH {}", self.channel)).await
    }

    /// A server that refuses the PING has answered it, too.
    pub(super) async fn pulse(&self) -> Result<(), Error> {
        let client = self.client().await?;
        let answer: Result<String, _> = client.ping(None).await;
        match answer {
            Err(error) if matches!(error.kind(), ErrorKind::Auth | ErrorKind::Unknown | ErrorKind::Protocol) => Ok(()),
            answer => self.answered(answer, "PING").await,
        }
    }

    async fn answered<T>(&self, answer: Result<T, fred::error::Error>, what: &str) -> Result<(), Error> {
        match answer {
            Ok(_) => Ok(()),
            Err(error) => {
                self.close().await;
                Err(refused(&error, what))
            }
        }
    }

    /// A fred client that is merely dropped keeps its connection.
    pub(super) async fn close(&self) {
        if let Some(kept) = self.client.lock().await.take() {
            // It ends either way.
            let _ = kept.client.quit().await;
        }
    }

    /// The client, connected. It is kept before it is connected, so that one given up on the way can be closed.
    async fn client(&self) -> Result<Client, Error> {
        let mut kept = self.client.lock().await;
        if let Some(kept) = kept.as_ref().filter(|kept| kept.ready) {
            return Ok(kept.client.clone());
        }
        if let Some(kept) = kept.take() {
            let _ = kept.client.quit().await;
        }
        let client = self.new_client();
        *kept = Some(Kept { client: client.clone(), ready: false });
        client.init().await.map_err(|error| refused(&error, "a second connection, for broadcasts"))?;
        *kept = Some(Kept { client: client.clone(), ready: true });
        Ok(client)
    }

    fn new_client(&self) -> Client {
        let performance = PerformanceConfig { default_command_timeout: self.limit, ..PerformanceConfig::default() };
        let connection = ConnectionConfig {
            connection_timeout: self.limit,
            internal_command_timeout: self.limit,
            max_command_attempts: 1,
            ..ConnectionConfig::default()
        };
        Client::new(self.config.clone(), Some(performance), Some(connection), None)
    }
}

fn refused(error: &fred::error::Error, what: &str) -> Error {
    Error::Refused(format!("{what}: {}", error.details()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn channel(url: &str, change: impl FnOnce(&mut Settings)) -> Channel {
        let mut settings = Settings::default();
        change(&mut settings);
        let urls: crate::settings::BrokerUrls = url.parse().unwrap();
        Channel::of(&settings, urls.iter().next().unwrap())
    }

    #[test]
    fn channels_are_named_as_kombu_names_them() {
        let pattern = |text: &str| Channel::Pattern(text.to_owned());
        assert_eq!(channel("redis://h", |_| ()), pattern("/0.celeryev/*"));
        assert_eq!(
            channel("redis://h/3", |s| s.broker.redis.global_keyprefix = "a*".into()),
            pattern(r"a\*/3.celeryev/*")
        );
        let custom = FanoutPrefix::Custom("x{db}[y]".to_owned());
        assert_eq!(channel("redis://h/7", |s| s.broker.redis.fanout_prefix = custom), pattern(r"x7\[y\]celeryev/*"));
        assert_eq!(channel("redis://h", |s| s.broker.redis.fanout_prefix = FanoutPrefix::Off), pattern("celeryev/*"));
        assert_eq!(
            channel("redis://h/1", |s| s.broker.redis.fanout_patterns = false),
            Channel::Plain("/1.celeryev".to_owned())
        );
    }

    #[test]
    fn the_payload_of_an_unfinished_message_is_found() {
        let head = "*4\r\n$8\r\npmessage\r\n$2\r\n/*\r\n$3\r\n/ab\r\n$1000000\r\n";
        let buffer = format!("{head}{}", "x".repeat(100));
        assert_eq!(oversized(buffer.as_bytes()), Some(head.len()..head.len() + 1_000_000));
        assert_eq!(oversized(b"$1000000\r\nxxxx"), None);
        assert_eq!(oversized(b"*4\r\n$8"), None);
        assert_eq!(oversized(b"*4\r\n$99999999999999999999\r\n"), None);
    }
}
