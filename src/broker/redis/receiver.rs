//! The receiving half: a connection in subscribed state.

use std::fmt;
use std::ops::Range;

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::{Instant, timeout, timeout_at};

use super::channels::Channels;
use super::dedup::DedupWindow;
use super::ping::{Found, Ping};
use super::read_buffer::READ_SIZE;
use super::resp::{Connection, Frame, Scan, protocol_error};
use crate::broker::{BrokerError, RESPONSE_TIMEOUT, witness_interval};
use crate::celery::DecodeError;
use crate::config::broker_url::Address;
use crate::config::{BrokerUrl, Config};
use crate::inbox::{Batch, Encoding, Message};
use crate::observability::GapCause;

/// Maximum number of messages in one batch.
const MAX_BATCH: usize = 1024;
/// Bytes of an oversized message that are kept for the log.
const SAMPLE_LEN: usize = 64;

pub struct EventReceiver {
    connection: Connection,
    message_max_bytes: usize,
    /// Bytes of an oversized message that have not arrived yet.
    bytes_to_discard: usize,
    last_byte: Instant,
    ping: Ping,
    /// See [`crate::broker::EventReceiver::disconnect_cause`].
    pub(in crate::broker) disconnect_cause: GapCause,
    channels: Channels,
    /// The master that the Sentinels named.
    master: Option<Address>,
    /// Only with `sentinel_fanout_compat`.
    dedup: Option<DedupWindow>,
}

impl fmt::Debug for EventReceiver {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.debug_struct("EventReceiver").field("channels", &self.channels).finish_non_exhaustive()
    }
}

impl EventReceiver {
    /// Subscribes on database 0 of the server at the other end of a stream.
    pub(in crate::broker) async fn from_stream(
        stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
        config: &Config,
    ) -> Result<Self, BrokerError> {
        Self::subscribe(Connection::new(Box::new(stream)), config, &BrokerUrl::default(), None).await
    }

    /// Subscribes. When it returns `Ok`, the server has confirmed the subscription.
    pub(super) async fn subscribe(
        mut connection: Connection,
        config: &Config,
        url: &BrokerUrl,
        master: Option<Address>,
    ) -> Result<Self, BrokerError> {
        let channels = Channels::new(config, url);
        let command = channels.command();
        let reply = connection.request(&command).await?;
        match reply.as_slice() {
            [verb, name, ..] if verb.eq_ignore_ascii_case(command[0]) && name == command[1] => {}
            _ => return Err(BrokerError::Refused(format!("{}: unexpected reply {reply:?}", command[0]))),
        }
        Ok(Self {
            connection,
            message_max_bytes: config.events.message_max_bytes,
            bytes_to_discard: 0,
            last_byte: Instant::now(),
            ping: Ping::new(witness_interval(config)),
            disconnect_cause: GapCause::Disconnected,
            master,
            dedup: (channels.names().len() > 1).then(DedupWindow::default),
            channels,
        })
    }

    pub(in crate::broker) fn describe(&self) -> String {
        let noun = if matches!(self.channels, Channels::Patterns(_)) { "channels" } else { "channel" };
        let names = self.channels.names().join(" and ");
        match &self.master {
            Some(master) => format!("{noun} {names} of the master at {master}"),
            None => format!("{noun} {names}"),
        }
    }

    pub(in crate::broker) async fn next(&mut self) -> Result<Batch, BrokerError> {
        loop {
            let mut messages = self.parse()?;
            if messages.is_empty() {
                self.read_or_ping().await?;
                continue;
            }
            if let Some(dedup) = &mut self.dedup {
                messages.retain(|message| message.is_witness() || dedup.is_new(&message.bytes));
            }
            if !messages.is_empty() {
                return Ok(Batch::new(messages, None));
            }
        }
    }

    /// Sends a PING if one is due, and waits for bytes until the next one is. While the server does not reply, any bytes
    /// show that it responds.
    async fn read_or_ping(&mut self) -> Result<(), BrokerError> {
        let timed_out = || Err(BrokerError::Timeout(RESPONSE_TIMEOUT));
        if let Some(number) = self.ping.begin() {
            let command = ["PING", &number];
            timeout(RESPONSE_TIMEOUT, self.connection.send(&command)).await.unwrap_or_else(|_| timed_out())?;
        }
        let sent = self.ping.sent.map(Instant::from_std);
        let deadline = sent.map_or(self.ping.due, |sent| self.last_byte.max(sent) + RESPONSE_TIMEOUT);
        match timeout_at(deadline, self.read()).await {
            Ok(read) => read,
            Err(_) if sent.is_some() => timed_out(),
            Err(_) => Ok(()),
        }
    }

    async fn read(&mut self) -> Result<(), BrokerError> {
        self.connection.read().await?;
        self.last_byte = Instant::now();
        let discarded = self.bytes_to_discard.min(self.connection.buffer.bytes().len());
        self.connection.buffer.skip(discarded);
        self.bytes_to_discard -= discarded;
        Ok(())
    }

    /// Takes every complete message out of the buffer, and the first bytes of an oversized one. The reply to a PING is a
    /// witness among them. Returns an error after the messages that precede it.
    fn parse(&mut self) -> Result<Vec<Message>, BrokerError> {
        let mut found: Vec<Found> = Vec::new();
        let (mut parsed, mut oversized) = (0, None);
        while found.len() < MAX_BATCH {
            let rest = &self.connection.buffer.bytes()[parsed..];
            let step = match Frame::scan(rest) {
                Ok(Scan::Complete(frame)) => self.ping.classify(&frame, rest).map(|found| (found, frame.length)),
                Ok(Scan::Partial(string)) => {
                    let is_oversized = |string: &Range<usize>| {
                        string.len() > self.message_max_bytes && string.start + SAMPLE_LEN <= rest.len()
                    };
                    oversized = string.filter(is_oversized);
                    // A frame has a channel and a payload, and neither is too large.
                    if oversized.is_some() || rest.len() <= 2 * self.message_max_bytes + READ_SIZE {
                        break;
                    }
                    Err(protocol_error())
                }
                Err(error) => Err(error),
            };
            match step {
                Ok((item, length)) => {
                    found.extend(item.map(|item| item.shifted_by(parsed)));
                    parsed += length;
                }
                Err(_) if !found.is_empty() => break,
                Err(error) => return Err(error),
            }
        }
        let taken = self.connection.buffer.take(parsed).map_err(|error| BrokerError::from(&error))?;
        let to_message = |found| match found {
            Found::Payload(range) => self.message(taken.slice(range)),
            Found::Witness(sent) => Message::witness(sent),
        };
        let mut messages: Vec<Message> = found.into_iter().map(to_message).collect();
        messages.extend(oversized.map(|string| self.discard_oversized(&string)));
        Ok(messages)
    }

    fn message(&self, bytes: Bytes) -> Message {
        let too_large = bytes.len() > self.message_max_bytes;
        let encoding =
            if too_large { Encoding::Undecodable(DecodeError::TooLarge.into()) } else { Encoding::KombuEnvelope };
        Message { bytes, encoding, redelivered: false }
    }

    /// Discards the rest of an oversized message.
    fn discard_oversized(&mut self, string: &Range<usize>) -> Message {
        let buffer = &mut self.connection.buffer;
        let bytes = Bytes::copy_from_slice(&buffer.bytes()[string.start..string.start + SAMPLE_LEN]);
        let arrived = buffer.bytes().len().min(string.end + 2);
        self.bytes_to_discard = string.end + 2 - arrived;
        buffer.skip(arrived);
        Message { bytes, encoding: Encoding::Undecodable(DecodeError::TooLarge.into()), redelivered: false }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncWriteExt, DuplexStream, duplex};

    use super::*;

    /// A receiver, and a server that has confirmed its subscription and sent these bytes.
    async fn subscribed(sent: &[u8]) -> (EventReceiver, DuplexStream) {
        let (client, mut server) = duplex(1 << 16);
        server.write_all(b"*3\r\n$10\r\npsubscribe\r\n$13\r\n/0.celeryev/*\r\n:1\r\n").await.unwrap();
        let receiver = EventReceiver::from_stream(client, &Config::default()).await.unwrap();
        server.write_all(sent).await.unwrap();
        (receiver, server)
    }

    #[tokio::test]
    async fn messages_before_an_error_are_received() {
        let message = "*4\r\n$8\r\npmessage\r\n$1\r\n*\r\n$1\r\nc\r\n$2\r\n{}\r\n";
        for (error, expected) in [("-ERR bye\r\n", "ERR bye"), ("garbage", "invalid RESP reply")] {
            let (mut receiver, _server) = subscribed(format!("{message}{message}{error}").as_bytes()).await;
            assert_eq!(receiver.next().await.unwrap().messages.len(), 2);
            let end = receiver.next().await.unwrap_err().to_string();
            assert!(end.starts_with(expected), "{end}");
        }
    }

    #[tokio::test]
    async fn an_endless_array_ends_the_subscription() {
        let (mut receiver, mut server) = subscribed(b"*4096\r\n").await;
        let max = receiver.message_max_bytes;
        let string = format!("${max}\r\n{}\r\n", "x".repeat(max));
        let endless = async { while server.write_all(string.as_bytes()).await.is_ok() {} };
        tokio::select! {
            () = endless => unreachable!("the receiver is still there"),
            end = receiver.next() => assert!(end.unwrap_err().to_string().contains("RESP")),
        }
        assert!(receiver.connection.buffer.bytes().len() < 4 * max);
    }
}
