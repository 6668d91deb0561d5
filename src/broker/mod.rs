//! The transports, one module each, behind one small interface: connect, next batch, broadcast, acknowledge.
//!
//! A connection has two halves. The [`Subscription`] hands out what comes in; the [`Control`] half sends broadcasts and
//! acknowledgements and looks after the subscription, so that neither waits for the other.

mod amqp;
mod dial;
mod pace;
mod redis;

use std::io;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite};

use crate::celery::Broadcast;
use crate::celery::envelope::Refusal;
use crate::settings::url::Transport;
use crate::settings::{self, BrokerUrl, Settings};
use crate::tls;

/// A broker that says nothing for this long, though it was asked, is given up.
const SILENCE: Duration = Duration::from_secs(15);

/// How a message's bytes are to be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wire {
    /// kombu's envelope around the body.
    Envelope,
    /// The body itself.
    Body,
    /// Not at all; the bytes are the beginning of it, for the log.
    Refused(Refusal),
}

/// One message of the broker, holding one event or a list of them.
#[derive(Clone, Debug)]
pub struct Message {
    /// What came in.
    pub bytes: Bytes,
    /// How to read it.
    pub wire: Wire,
    /// The broker has handed it out before.
    pub redelivered: bool,
}

/// How our queue stands at the broker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Standing {
    /// Messages that wait there.
    pub waiting: u32,
    /// Consumers that share it; more than one splits the events.
    pub consumers: u32,
}

/// Acknowledges everything up to it on the connection it came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AckToken(pub u64);

/// Messages that came in together.
#[derive(Clone, Debug)]
pub struct Batch {
    /// In the order they came.
    pub messages: Vec<Message>,
    /// The size of them all.
    pub bytes: usize,
    /// When they came in, by our clock.
    pub arrived: Instant,
    /// To be given back once the batch is processed, where the broker waits for it.
    pub ack: Option<AckToken>,
}

impl Batch {
    fn new(messages: Vec<Message>, ack: Option<AckToken>) -> Self {
        let bytes = messages.iter().map(|message| message.bytes.len()).sum();
        Self { messages, bytes, arrived: Instant::now(), ack }
    }

    /// Keeps the first `count` messages.
    pub fn truncate(&mut self, count: usize) {
        self.messages.truncate(count);
        self.bytes = self.messages.iter().map(|message| message.bytes.len()).sum();
    }
}

/// Why no connection can be made with these settings, told in one line.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The URLs, or what contradicts them.
    #[error("{0}")]
    Url(#[from] settings::Error),
    /// A file that TLS needs.
    #[error("{0}")]
    Tls(#[from] tls::Error),
}

/// Why a connection could not be made or came to its end. The text is fit for the log and names no secret.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// The server refused: credentials, permissions, a declaration that differs.
    #[error("{0}")]
    Refused(String),
    /// The connection could not be made or broke.
    #[error("{0}")]
    Lost(String),
    /// TLS could not be agreed on.
    #[error("TLS: {0}")]
    Tls(String),
    /// No answer in time.
    #[error("no answer from the broker for {} s", .0.as_secs_f64())]
    Silent(Duration),
}

impl Error {
    /// The same without a secret that the other side has repeated.
    fn without(self, secret: &str) -> Self {
        match self {
            Self::Refused(problem) if !secret.is_empty() => Self::Refused(problem.replace(secret, "***")),
            other => other,
        }
    }

    /// The same, said of `subject`.
    fn of(self, subject: &str) -> Self {
        match self {
            Self::Refused(problem) => Self::Refused(format!("{subject}: {problem}")),
            Self::Lost(problem) => Self::Lost(format!("{subject}: {problem}")),
            Self::Tls(problem) => Self::Tls(format!("{subject}: {problem}")),
            silent @ Self::Silent(_) => silent,
        }
    }
}

impl From<&io::Error> for Error {
    fn from(error: &io::Error) -> Self {
        tls::explain(error).map_or_else(|| Self::Lost(error.to_string()), Self::Tls)
    }
}

/// The half that receives.
#[derive(Debug)]
pub enum Subscription {
    /// A subscribed Redis connection.
    Redis(Box<redis::Subscription>),
    /// A consumer on `RabbitMQ`.
    Amqp(Box<amqp::Subscription>),
}

impl Subscription {
    /// Subscribes on database 0 of the Redis server at the other end of a stream. For the fuzz targets.
    ///
    /// # Errors
    /// It does not confirm that.
    #[doc(hidden)]
    pub async fn redis_over(
        stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
        settings: &Settings,
    ) -> Result<Self, Error> {
        Ok(Self::Redis(Box::new(redis::Subscription::over(stream, settings).await?)))
    }

    /// The next messages, everything that is ready up to about a thousand. Cancelling loses nothing.
    ///
    /// # Errors
    /// The connection has come to its end.
    pub async fn next(&mut self) -> Result<Batch, Error> {
        match self {
            Self::Redis(redis) => redis.next().await,
            Self::Amqp(amqp) => amqp.next().await,
        }
    }

    /// Whether the broker keeps what we do not read: if not, what does not fit our queue must be dropped.
    #[must_use]
    pub fn can_wait(&self) -> bool {
        matches!(self, Self::Amqp(_))
    }

    /// What the broker has collected for us, by a name that is the same as long as nothing is missing from it. None where
    /// it collects nothing while we are away.
    #[must_use]
    pub fn source(&self) -> Option<&str> {
        match self {
            Self::Redis(_) => None,
            Self::Amqp(amqp) => amqp.source(),
        }
    }

    /// What is listened on, in the broker's own words.
    #[must_use]
    pub fn describe(&self) -> String {
        match self {
            Self::Redis(redis) => redis.describe(),
            Self::Amqp(amqp) => amqp.describe(),
        }
    }
}

/// The half that sends.
#[derive(Debug)]
pub enum Control {
    /// A Redis client of its own: a PUBLISH must not wait behind a burst.
    Redis(Box<redis::Control>),
    /// Channels beside the consumer's.
    Amqp(Box<amqp::Control>),
}

impl Control {
    /// Sends a command to all workers.
    ///
    /// # Errors
    /// It could not be sent; the next one may well be.
    pub async fn broadcast(&self, command: Broadcast) -> Result<(), Error> {
        match self {
            Self::Redis(redis) => Box::pin(redis.broadcast(command)).await,
            Self::Amqp(amqp) => amqp.broadcast(command).await,
        }
    }

    /// Acknowledges a batch and all before it.
    ///
    /// # Errors
    /// The connection has come to its end.
    pub async fn acknowledge(&self, token: AckToken) -> Result<(), Error> {
        match self {
            Self::Redis(_) => Ok(()),
            Self::Amqp(amqp) => amqp.acknowledge(token).await,
        }
    }

    /// Asks the broker for a sign of life; returns when it has answered.
    ///
    /// # Errors
    /// It has not. [`Error::Silent`] where that is the end of the connection, the subscription's too.
    pub async fn pulse(&self) -> Result<(), Error> {
        match self {
            // fred's futures are large.
            Self::Redis(redis) => Box::pin(redis.pulse()).await,
            Self::Amqp(amqp) => amqp.pulse().await,
        }
    }

    /// Messages that waited for us when we came.
    #[must_use]
    pub fn found_waiting(&self) -> u32 {
        match self {
            Self::Redis(_) => 0,
            Self::Amqp(amqp) => amqp.found_waiting,
        }
    }

    /// Why no answer comes though the connection is sound, where that is known.
    #[must_use]
    pub fn hindrance(&self) -> Option<Error> {
        match self {
            Self::Redis(_) => None,
            Self::Amqp(amqp) => amqp.hindrance(),
        }
    }

    /// Takes leave of the broker.
    pub async fn close(&self) {
        match self {
            Self::Redis(redis) => Box::pin(redis.close()).await,
            Self::Amqp(amqp) => amqp.close().await,
        }
    }

    /// Ends once the broker is no longer the one to listen to: when Redis Sentinel knows another master, or a Redis that
    /// was one has become a replica. Never elsewhere.
    pub async fn moved(&self) -> Error {
        match self {
            Self::Redis(redis) => Box::pin(redis.moved()).await,
            Self::Amqp(_) => std::future::pending().await,
        }
    }

    /// Makes sure that what the subscription hangs on is still there, and tells how the queue stands. Nobody tells a
    /// consumer that the exchange it was bound to is gone.
    ///
    /// # Errors
    /// The connection has come to its end.
    pub async fn refresh(&self) -> Result<Standing, Error> {
        match self {
            Self::Redis(_) => Ok(Standing { waiting: 0, consumers: 1 }),
            Self::Amqp(amqp) => amqp.refresh().await,
        }
    }
}

/// Finds mistakes in the settings that only a look at their files can find, and warns of what is let in by them.
///
/// # Errors
/// The first mistake.
pub fn check(settings: &Settings) -> Result<(), StartError> {
    let mut verified = true;
    for url in settings.broker.urls()?.iter().filter(|url| settings.broker.tls_for(url)) {
        verified &= tls::Client::new(url, &settings.broker.tls)?.verifies();
    }
    if !verified {
        tracing::warn!("the broker's certificate is not verified: anyone can pose as the broker");
    }
    Ok(())
}

/// Connects to the broker at `url`, one of `all`, and subscribes; when it returns, the server has confirmed the subscription.
///
/// # Errors
/// Within `broker.connect_timeout`.
pub async fn connect(
    url: &BrokerUrl,
    all: &[BrokerUrl],
    settings: &Settings,
) -> Result<(Subscription, Control), Error> {
    let limit = settings.broker.connect_timeout;
    let tls = if settings.broker.tls_for(url) {
        Some(tls::Client::new(url, &settings.broker.tls).map_err(|error| Error::Tls(error.to_string()))?)
    } else {
        None
    };
    let connecting = async {
        match url.transport {
            Transport::Amqp => {
                let (subscription, control) = amqp::connect(url, settings, tls.as_ref()).await?;
                Ok((Subscription::Amqp(Box::new(subscription)), Control::Amqp(Box::new(control))))
            }
            Transport::Redis | Transport::Sentinel => {
                let (subscription, control) = redis::connect(url, all, settings, tls.as_ref()).await?;
                Ok((Subscription::Redis(Box::new(subscription)), Control::Redis(Box::new(control))))
            }
        }
    };
    match tokio::time::timeout(limit, connecting).await.unwrap_or(Err(Error::Silent(limit))) {
        Err(Error::Lost(problem)) if let Some(hint) = tls.as_ref().and_then(tls::Client::hint) => {
            Err(Error::Tls(format!("{problem}: {hint}")))
        }
        connected => connected,
    }
}
