//! Redis pub/sub, and what speaks its protocol.
//!
//! The subscription reads frames itself: fred's client hands messages out on a channel that drops them when its reader is
//! slow, shows neither the server's confirmation of a subscription nor its refusal, and knows no bound for a message.
//! Broadcasts go through a fred client on a connection of their own: a PUBLISH must not wait behind a burst.

mod resp;
mod sentinel;

use std::collections::{HashSet, VecDeque};
use std::fmt;
use std::hash::{BuildHasher, RandomState};
use std::net::SocketAddr;
use std::ops::Range;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use fred::clients::Client;
use fred::error::ErrorKind;
use fred::interfaces::{ClientLike, PubsubInterface};
use fred::types::config::{Config, ConnectionConfig, PerformanceConfig, Server, ServerConfig};
use fred::types::{ConnectHandle, CustomCommand, RespVersion, Value};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{Mutex, Notify};
use tokio::time::{Instant, timeout, timeout_at};
use tokio_rustls::TlsConnector;
use uuid::Uuid;

use resp::{Access, Connection, Frame, READ_SIZE, Scan, complaint, foreign, text};
use sentinel::Sentinels;

use super::{Batch, Error, Message, SILENCE, Wire};
use crate::celery::{Broadcast, Reject, envelope};
use crate::settings::url::{Address, Transport};
use crate::settings::{BrokerUrl, FanoutPrefix, Settings};
use crate::tls;

/// A quiet server is asked for a sign of life after this long.
const PING_AFTER: Duration = Duration::from_secs(5);
/// Messages of one batch at most.
const MAX_BATCH: usize = 1024;
/// Bytes that are kept of a message that is too large.
const SAMPLE: usize = 64;

/// Messages remembered where each comes in under two names, as many as kombu remembers.
const REMEMBERED: usize = 1000;

/// The receiving half: a connection in subscribed state.
pub struct Subscription {
    connection: Connection,
    max_message: usize,
    /// Bytes of an oversized message that are still to come and to be thrown away.
    skip: usize,
    last_byte: Instant,
    pinged: bool,
    channels: Channels,
    /// Where the Sentinels have led us.
    master: Option<Address>,
    /// With `sentinel_fanout_compat` only.
    seen: Option<Seen>,
}

impl fmt::Debug for Subscription {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.debug_struct("Subscription").field("channels", &self.channels).finish_non_exhaustive()
    }
}

/// What is subscribed to: patterns, or without kombu's `fanout_patterns` the channels themselves.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Channels {
    Patterns(Vec<String>),
    Plain(Vec<String>),
}

/// The names of a fanout exchange on Redis (`kombu.transport.redis`): one, with `/{db}.` before it unless set otherwise.
/// With `sentinel_fanout_compat` also the one that kombu before 5.4 has on Sentinel, braces and all.
fn fanout_names(settings: &Settings, url: &BrokerUrl, exchange: &str) -> Vec<String> {
    let redis = &settings.broker.redis;
    let template = match &redis.fanout_prefix {
        FanoutPrefix::On => "/{db}.",
        FanoutPrefix::Custom(text) => text,
        FanoutPrefix::Off => "",
    };
    let prefix = template.replace("{db}", &url.db.to_string());
    let mut prefixes = vec![prefix.as_str()];
    if redis.sentinel_fanout_compat && prefix != template {
        prefixes.push(template);
    }
    prefixes.into_iter().map(|prefix| format!("{}{prefix}{exchange}", redis.global_keyprefix)).collect()
}

impl Channels {
    fn of(settings: &Settings, url: &BrokerUrl) -> Self {
        let names = fanout_names(settings, url, &settings.events.exchange);
        if !settings.broker.redis.fanout_patterns {
            return Self::Plain(names);
        }
        Self::Patterns(names.iter().map(|name| format!("{}/*", escaped(name))).collect())
    }

    fn names(&self) -> &[String] {
        match self {
            Self::Patterns(names) | Self::Plain(names) => names,
        }
    }

    /// One command for all: its answers come before any message.
    fn command(&self) -> Vec<&str> {
        let verb = if matches!(self, Self::Patterns(_)) { "PSUBSCRIBE" } else { "SUBSCRIBE" };
        [verb].into_iter().chain(self.names().iter().map(String::as_str)).collect()
    }
}

fn escaped(name: &str) -> String {
    let escape = |character| matches!(character, '*' | '?' | '[' | ']' | '\\').then_some('\\');
    name.chars().flat_map(|character| escape(character).into_iter().chain([character])).collect()
}

/// Connects both halves.
pub(super) async fn connect(
    url: &BrokerUrl,
    all: &[BrokerUrl],
    settings: &Settings,
    tls: Option<&tls::Client>,
) -> Result<(Subscription, Control), Error> {
    let limit = settings.broker.connect_timeout;
    let access = Access { username: url.username.clone(), password: url.password.clone(), tls: tls.cloned(), limit };
    let (address, connection, sentinels) = if url.transport == Transport::Sentinel {
        let sentinels = sentinels(url, all, settings, access);
        let (master, connection) = sentinels.master().await?;
        (master, connection, Some(sentinels))
    } else {
        (url.address.clone(), access.open(&url.address).await?, None)
    };
    let master = sentinels.is_some().then(|| address.clone());
    let peer = connection.peer;
    let subscription = Subscription::start(connection, settings, url, master).await?;
    let exchange = format!("{}.pidbox", settings.events.control_exchange);
    let control = Control {
        config: client_config(url, &address, peer, tls),
        limit,
        channels: fanout_names(settings, url, &exchange),
        exchange,
        client: Mutex::new(None),
        role: Mutex::new(Role::Unknown),
        demoted: Notify::new(),
        address,
        sentinels,
    };
    Ok((subscription, control))
}

/// Subscribes, and sees that the server confirms it.
async fn subscribe(connection: &mut Connection, channels: &Channels) -> Result<(), Error> {
    let command = channels.command();
    let answer = connection.request(&command).await?;
    match answer.as_slice() {
        [verb, name, ..] if verb.eq_ignore_ascii_case(command[0]) && name == command[1] => Ok(()),
        _ => Err(Error::Refused(format!("{}: the server answers {answer:?}", command[0]))),
    }
}

/// The whole set, beginning with the one at `url`. The `ssl_*` parameters of a URL are about the master, as in kombu.
fn sentinels(url: &BrokerUrl, all: &[BrokerUrl], settings: &Settings, server: Access) -> Sentinels {
    let redis = &settings.broker.redis;
    let others = all.iter().map(|url| url.address.clone()).filter(|address| *address != url.address);
    Sentinels {
        members: [url.address.clone()].into_iter().chain(others).collect(),
        name: redis.master_name.clone().unwrap_or_default(),
        access: Access {
            username: redis.sentinel_username.clone(),
            password: redis.sentinel_password.clone(),
            tls: server.tls.clone().filter(|_| settings.broker.tls.enabled == Some(true)),
            limit: server.limit,
        },
        server,
    }
}

/// The messages that came in last, by their delivery tags.
#[derive(Default)]
struct Seen {
    order: VecDeque<u64>,
    hashes: HashSet<u64>,
    hasher: RandomState,
}

impl Seen {
    /// Whether this message has not come in before. One without a tag never has.
    fn is_new(&mut self, payload: &[u8]) -> bool {
        let Some(tag) = envelope::delivery_tag(payload) else { return true };
        let hash = self.hasher.hash_one(tag);
        if !self.hashes.insert(hash) {
            return false;
        }
        self.order.push_back(hash);
        if self.order.len() > REMEMBERED
            && let Some(oldest) = self.order.pop_front()
        {
            self.hashes.remove(&oldest);
        }
        true
    }
}

impl Subscription {
    /// Subscribes on database 0 of the server at the other end of a stream.
    pub(super) async fn over(
        stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
        settings: &Settings,
    ) -> Result<Self, Error> {
        Self::start(Connection::new(Box::new(stream)), settings, &BrokerUrl::default(), None).await
    }

    /// Subscribes; when it returns, the server has confirmed it.
    async fn start(
        mut connection: Connection,
        settings: &Settings,
        url: &BrokerUrl,
        master: Option<Address>,
    ) -> Result<Self, Error> {
        let channels = Channels::of(settings, url);
        subscribe(&mut connection, &channels).await?;
        Ok(Self {
            connection,
            max_message: settings.events.max_message,
            skip: 0,
            last_byte: Instant::now(),
            pinged: false,
            master,
            seen: (channels.names().len() > 1).then(Seen::default),
            channels,
        })
    }

    pub(super) fn describe(&self) -> String {
        let noun = if matches!(self.channels, Channels::Patterns(_)) { "channels" } else { "channel" };
        let names = self.channels.names().join(" and ");
        match &self.master {
            Some(master) => format!("{noun} {names} of the master at {master}"),
            None => format!("{noun} {names}"),
        }
    }

    pub(super) async fn next(&mut self) -> Result<Batch, Error> {
        loop {
            let mut messages = self.parse()?;
            if messages.is_empty() {
                self.read_or_ping().await?;
                continue;
            }
            if let Some(seen) = &mut self.seen {
                messages.retain(|message| seen.is_new(&message.bytes));
            }
            if !messages.is_empty() {
                return Ok(Batch::new(messages, None));
            }
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
                timeout(rest, self.connection.send(&["PING"])).await.unwrap_or(Err(Error::Silent(SILENCE)))
            }
        }
    }

    async fn read(&mut self) -> Result<(), Error> {
        self.connection.read().await?;
        self.last_byte = Instant::now();
        self.pinged = false;
        let skipped = self.skip.min(self.connection.buffer.len());
        let _ = self.connection.buffer.split_to(skipped);
        self.skip -= skipped;
        Ok(())
    }

    /// Takes every whole message out of the buffer, and the beginning of one that is too large. An error waits for the
    /// messages before it to be taken.
    fn parse(&mut self) -> Result<Vec<Message>, Error> {
        let mut found: Vec<Range<usize>> = Vec::new();
        let (mut parsed, mut oversized) = (0, None);
        while found.len() < MAX_BATCH {
            let rest = &self.connection.buffer[parsed..];
            let step = match Frame::scan(rest) {
                Ok(Scan::Whole(frame)) => payload(&frame, rest).map(|text| (text, frame.length)),
                Ok(Scan::Partial(text)) => {
                    oversized = text.filter(|text| text.len() > self.max_message && text.start + SAMPLE <= rest.len());
                    // No message is larger: of its channel and its payload, neither is too large.
                    if oversized.is_some() || rest.len() <= 2 * self.max_message + READ_SIZE {
                        break;
                    }
                    Err(foreign())
                }
                Err(error) => Err(error),
            };
            match step {
                Ok((text, length)) => {
                    found.extend(text.map(|text| parsed + text.start..parsed + text.end));
                    parsed += length;
                }
                Err(_) if !found.is_empty() => break,
                Err(error) => return Err(error),
            }
        }
        let taken = self.connection.buffer.split_to(parsed);
        // Few bytes are not to keep a whole buffer.
        let taken = if parsed < READ_SIZE / 4 { Bytes::copy_from_slice(&taken) } else { taken.freeze() };
        let mut messages: Vec<Message> = found.into_iter().map(|range| self.message(taken.slice(range))).collect();
        messages.extend(oversized.map(|text| self.skip_oversized(&text)));
        Ok(messages)
    }

    fn message(&self, bytes: Bytes) -> Message {
        let too_large = bytes.len() > self.max_message;
        let wire = if too_large { Wire::Refused(Reject::TooLarge.into()) } else { Wire::Envelope };
        Message { bytes, wire, redelivered: false }
    }

    /// What is still to come of a message that is too large is not kept.
    fn skip_oversized(&mut self, text: &Range<usize>) -> Message {
        let buffer = &mut self.connection.buffer;
        let beginning = Bytes::copy_from_slice(&buffer[text.start..text.start + SAMPLE]);
        let here = buffer.len().min(text.end + 2);
        self.skip = text.end + 2 - here;
        *buffer = BytesMut::from(&buffer[here..]);
        Message { bytes: beginning, wire: Wire::Refused(Reject::TooLarge.into()), redelivered: false }
    }
}

/// Where a frame's payload is, if it is a message.
fn payload(frame: &Frame, buffer: &[u8]) -> Result<Option<Range<usize>>, Error> {
    match (frame.kind, frame.texts()) {
        (b'-', [refusal, ..]) => Err(Error::Refused(text(buffer, refusal))),
        (b'*', [kind, _, _, payload]) if buffer[kind.clone()] == *b"pmessage" => Ok(Some(payload.clone())),
        (b'*', [kind, _, payload]) if buffer[kind.clone()] == *b"message" => Ok(Some(payload.clone())),
        _ => Ok(None),
    }
}

/// The sending half: a fred client, connected when it is first needed and again after it broke.
pub struct Control {
    config: Config,
    limit: Duration,
    exchange: String,
    channels: Vec<String>,
    client: Mutex<Option<Kept>>,
    role: Mutex<Role>,
    demoted: Notify,
    address: Address,
    sentinels: Option<Sentinels>,
}

/// What the server says it is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Role {
    Unknown,
    Master,
    Replica,
    /// It may not be asked.
    Hidden,
}

struct Kept {
    client: Client,
    /// The task that serves it: without it, commands would wait until they time out.
    connection: ConnectHandle,
}

impl Kept {
    fn is_connected(&self) -> bool {
        self.client.is_connected() && !self.connection.is_finished()
    }
}

impl Drop for Kept {
    /// A fred client that is merely dropped keeps its connection, and one that is told to quit before its task has begun
    /// connects nevertheless.
    fn drop(&mut self) {
        self.connection.abort();
    }
}

impl fmt::Debug for Control {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.debug_struct("Control").field("channels", &self.channels).finish_non_exhaustive()
    }
}

/// To the server that the subscription has found.
fn client_config(url: &BrokerUrl, address: &Address, peer: Option<SocketAddr>, tls: Option<&tls::Client>) -> Config {
    let server = match address {
        Address::Tcp { host, port } => {
            let tls_server_name = Some(tls::server_name(host).into());
            let host = peer.map_or_else(|| host.clone(), |peer| peer.ip().to_string()).into();
            ServerConfig::Centralized { server: Server { host, port: *port, tls_server_name } }
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
        let mut receivers = 0;
        for channel in &self.channels {
            let published: Result<i64, _> = client.publish(channel.as_str(), envelope.as_str()).await;
            receivers += self.answered(published, &format!("PUBLISH {channel}")).await?;
        }
        if self.sentinels.is_none() {
            self.look_for_demotion(&client, receivers).await;
        }
        Ok(())
    }

    /// What a replica publishes reaches its own subscribers alone, and workers are those of their master. One that was a
    /// replica from the beginning is somebody's choice.
    async fn look_for_demotion(&self, client: &Client, receivers: i64) {
        let mut role = self.role.lock().await;
        let now = match *role {
            _ if receivers > 0 => Role::Master,
            Role::Unknown | Role::Master => role_of(client).await,
            Role::Replica | Role::Hidden => return,
        };
        if (*role, now) == (Role::Master, Role::Replica) {
            self.demoted.notify_one();
        }
        *role = now;
    }

    /// A server that refuses the PING has answered it, too.
    pub(super) async fn pulse(&self) -> Result<(), Error> {
        let client = self.client().await?;
        let answer: Result<String, _> = client.ping(None).await;
        match answer {
            Err(error) if matches!(error.kind(), ErrorKind::Auth | ErrorKind::Unknown | ErrorKind::Protocol) => Ok(()),
            answer => self.answered(answer, "PING").await.map(|_| ()),
        }
    }

    async fn answered<T>(&self, answer: Result<T, fred::error::Error>, what: &str) -> Result<T, Error> {
        match answer {
            Ok(answer) => Ok(answer),
            Err(error) => {
                self.close().await;
                Err(refused(&error, what))
            }
        }
    }

    /// Ends once the Sentinels know another master, or the server is a replica and was none before: events still come
    /// from it, but what we publish reaches no worker.
    pub(super) async fn moved(&self) -> Error {
        if let Some(sentinels) = &self.sentinels {
            return sentinels.moved(&self.address).await;
        }
        self.demoted.notified().await;
        Error::Lost("the server has become a replica".to_owned())
    }

    pub(super) async fn close(&self) {
        *self.client.lock().await = None;
    }

    /// The client, connected. It is kept before it is connected, so that one given up on the way is closed.
    async fn client(&self) -> Result<Client, Error> {
        let mut kept = self.client.lock().await;
        if let Some(kept) = kept.as_ref().filter(|kept| kept.is_connected()) {
            return Ok(kept.client.clone());
        }
        let client = self.new_client();
        // The task cannot be done before it is waited for: this thread alone runs both.
        *kept = Some(Kept { client: client.clone(), connection: client.connect() });
        client.wait_for_connect().await.map_err(|error| refused(&error, "a second connection, for broadcasts"))?;
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

async fn role_of(client: &Client) -> Role {
    let question = CustomCommand::new_static("ROLE", None, false);
    let answer: Result<Vec<Value>, _> = client.custom(question, Vec::<String>::new()).await;
    match answer.unwrap_or_default().first().and_then(Value::as_str).as_deref() {
        Some("master") => Role::Master,
        Some("slave") => Role::Replica,
        _ => Role::Hidden,
    }
}

fn refused(error: &fred::error::Error, what: &str) -> Error {
    Error::Refused(format!("{what}: {}", complaint(error.details())))
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncWriteExt, DuplexStream, duplex};

    use super::*;

    fn channels(url: &str, change: impl FnOnce(&mut Settings)) -> Channels {
        let mut settings = Settings::default();
        change(&mut settings);
        let urls: crate::settings::BrokerUrls = url.parse().unwrap();
        Channels::of(&settings, urls.iter().next().unwrap())
    }

    #[test]
    fn channels_are_named_as_kombu_names_them() {
        let pattern = |text: &str| Channels::Patterns(vec![text.to_owned()]);
        assert_eq!(channels("redis://h", |_| ()), pattern("/0.celeryev/*"));
        assert_eq!(
            channels("redis://h/3", |s| s.broker.redis.global_keyprefix = "a*".into()),
            pattern(r"a\*/3.celeryev/*")
        );
        let custom = FanoutPrefix::Custom("x{db}[y]".to_owned());
        assert_eq!(channels("redis://h/7", |s| s.broker.redis.fanout_prefix = custom), pattern(r"x7\[y\]celeryev/*"));
        assert_eq!(channels("redis://h", |s| s.broker.redis.fanout_prefix = FanoutPrefix::Off), pattern("celeryev/*"));
        assert_eq!(
            channels("redis://h/1", |s| s.broker.redis.fanout_patterns = false),
            Channels::Plain(vec!["/1.celeryev".to_owned()])
        );
    }

    #[test]
    fn compat_adds_the_name_of_old_kombu() {
        let named = |prefix| {
            channels("sentinel://h/2", |settings| {
                settings.broker.redis.sentinel_fanout_compat = true;
                settings.broker.redis.fanout_prefix = prefix;
            })
        };
        assert_eq!(named(FanoutPrefix::On).names(), ["/2.celeryev/*", "/{db}.celeryev/*"]);
        assert_eq!(named(FanoutPrefix::Custom("x.".to_owned())).names(), ["x.celeryev/*"]);
    }

    /// What the server says after it has confirmed the subscription.
    async fn subscribed(said: &[u8]) -> (Subscription, DuplexStream) {
        let (client, mut server) = duplex(1 << 16);
        server.write_all(b"*3\r\n$10\r\npsubscribe\r\n$13\r\n/0.celeryev/*\r\n:1\r\n").await.unwrap();
        let subscription = Subscription::over(client, &Settings::default()).await.unwrap();
        server.write_all(said).await.unwrap();
        (subscription, server)
    }

    #[tokio::test]
    async fn an_error_waits_for_the_messages_before_it() {
        let message = "*4\r\n$8\r\npmessage\r\n$1\r\n*\r\n$1\r\nc\r\n$2\r\n{}\r\n";
        for (error, told) in [("-ERR bye\r\n", "ERR bye"), ("garbage", "the answer is not in Redis' protocol")] {
            let (mut subscription, _server) = subscribed(format!("{message}{message}{error}").as_bytes()).await;
            assert_eq!(subscription.next().await.unwrap().messages.len(), 2);
            let end = subscription.next().await.unwrap_err().to_string();
            assert!(end.starts_with(told), "{end}");
        }
    }

    #[tokio::test]
    async fn an_endless_array_is_given_up() {
        let (mut subscription, mut server) = subscribed(b"*4096\r\n").await;
        let max = subscription.max_message;
        let text = format!("${max}\r\n{}\r\n", "x".repeat(max));
        let endless = async { while server.write_all(text.as_bytes()).await.is_ok() {} };
        tokio::select! {
            () = endless => unreachable!("the subscription is still there"),
            end = subscription.next() => assert!(end.unwrap_err().to_string().contains("protocol")),
        }
        assert!(subscription.connection.buffer.len() < 4 * max);
    }

    #[test]
    fn the_last_thousand_messages_are_told_apart() {
        let mut seen = Seen::default();
        let message = |tag: usize| format!(r#"{{"body": "", "properties": {{"delivery_tag": "{tag}"}}}}"#).into_bytes();
        assert!((0..=REMEMBERED).all(|tag| seen.is_new(&message(tag))));
        assert!((1..=REMEMBERED).all(|tag| !seen.is_new(&message(tag))));
        assert!(seen.is_new(&message(0)), "forgotten by now");
        for untagged in [&b"{}"[..], b"[]", b"no JSON", br#"{"properties": null}"#, br#"{"properties": {}}"#] {
            assert!(seen.is_new(untagged) && seen.is_new(untagged));
        }
    }
}
