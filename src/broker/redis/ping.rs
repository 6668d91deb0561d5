//! The witness on Redis: a PING on the subscribed connection. Its reply arrives after every message that was published
//! before the server processed the PING.

use std::ops::Range;
use std::time::Duration;

use tokio::time::Instant;

use super::resp::{Frame, text};
use crate::broker::BrokerError;

/// What a frame contains for the ingest loop.
#[derive(Debug, PartialEq)]
pub(super) enum Found {
    /// The position of a message's payload.
    Payload(Range<usize>),
    /// The reply to the PING that was sent at this time.
    Witness(std::time::Instant),
}

impl Found {
    /// Moves the position by `bytes`.
    pub(super) fn shifted_by(self, bytes: usize) -> Self {
        match self {
            Self::Payload(range) => Self::Payload(bytes + range.start..bytes + range.end),
            witness @ Self::Witness(_) => witness,
        }
    }
}

/// The PINGs of one connection. At most one has no reply.
#[derive(Debug)]
pub(super) struct Ping {
    interval: Duration,
    number: u64,
    /// When the PING without a reply was sent.
    pub(super) sent: Option<std::time::Instant>,
    /// When the next one is due, once this one has its reply.
    pub(super) due: Instant,
}

impl Ping {
    /// `interval` is the time between two PINGs.
    pub(super) fn new(interval: Duration) -> Self {
        Self { interval, number: 0, sent: None, due: Instant::now() }
    }

    /// The number of the PING to send now, if one is due.
    pub(super) fn begin(&mut self) -> Option<String> {
        let now = Instant::now();
        if self.sent.is_some() || now < self.due {
            return None;
        }
        self.number += 1;
        (self.sent, self.due) = (Some(now.into_std()), now + self.interval);
        Some(self.number.to_string())
    }

    /// Classifies a frame. NOPERM and MISCONF (Redis cannot write its data) arrive in the place of the reply, so they
    /// count as one. A server that is busy with a script or loads its data does not show
    /// that it delivers: the PING is sent again.
    ///
    /// # Errors
    /// Returns an error if the server refuses anything else.
    pub(super) fn classify(&mut self, frame: &Frame, buffer: &[u8]) -> Result<Option<Found>, BrokerError> {
        match (frame.kind, frame.strings()) {
            (b'*', [kind, _, _, payload]) if buffer[kind.clone()] == *b"pmessage" => {
                Ok(Some(Found::Payload(payload.clone())))
            }
            (b'*', [kind, _, payload]) if buffer[kind.clone()] == *b"message" => {
                Ok(Some(Found::Payload(payload.clone())))
            }
            (b'*', [kind, number]) if buffer[kind.clone()].eq_ignore_ascii_case(b"pong") => {
                let is_expected = buffer[number.clone()] == *self.number.to_string().as_bytes();
                Ok(is_expected.then(|| self.sent.take()).flatten().map(Found::Witness))
            }
            (b'-', [error, ..]) => self.refused(&text(buffer, error)),
            _ => Ok(None),
        }
    }

    fn refused(&mut self, error: &str) -> Result<Option<Found>, BrokerError> {
        match error.split(' ').next() {
            _ if self.sent.is_none() => Err(BrokerError::Refused(error.to_owned())),
            Some("NOPERM" | "MISCONF") => Ok(self.sent.take().map(Found::Witness)),
            Some("BUSY" | "LOADING" | "MASTERDOWN") => {
                self.sent = None;
                Ok(None)
            }
            _ => Err(BrokerError::Refused(error.to_owned())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::resp::Scan;
    use super::*;

    const INTERVAL: Duration = Duration::from_secs(1);

    fn classify(ping: &mut Ping, buffer: &str) -> Result<Option<Found>, String> {
        let Scan::Complete(frame) = Frame::scan(buffer.as_bytes()).unwrap() else { panic!("{buffer:?} is partial") };
        ping.classify(&frame, buffer.as_bytes()).map_err(|error| error.to_string())
    }

    #[tokio::test(start_paused = true)]
    async fn one_ping_per_interval_is_sent_after_the_reply_to_the_last_one() {
        let mut ping = Ping::new(INTERVAL);
        assert_eq!(ping.begin().as_deref(), Some("1"));
        tokio::time::advance(INTERVAL * 5).await;
        assert_eq!(ping.begin(), None, "it has no reply");
        let sent = ping.sent.unwrap();
        assert_eq!(classify(&mut ping, "*2\r\n$4\r\npong\r\n$1\r\n1\r\n"), Ok(Some(Found::Witness(sent))));
        assert_eq!(ping.begin().as_deref(), Some("2"));
    }

    #[test]
    fn only_the_expected_reply_is_a_witness() {
        let mut ping = Ping::new(INTERVAL);
        let reply = "*2\r\n$4\r\npong\r\n$1\r\n1\r\n";
        assert_eq!(classify(&mut ping, reply), Ok(None), "nothing was sent");
        ping.begin();
        for other in ["*2\r\n$4\r\npong\r\n$1\r\n2\r\n", "*2\r\n$4\r\npong\r\n$0\r\n\r\n", "+PONG\r\n"] {
            assert_eq!(classify(&mut ping, other), Ok(None), "{other:?}");
        }
        assert!(matches!(classify(&mut ping, reply), Ok(Some(Found::Witness(_)))));
        assert_eq!(classify(&mut ping, reply), Ok(None), "a second reply");
    }

    #[test]
    fn a_refused_ping_is_a_witness_unless_the_server_is_busy() {
        let mut ping = Ping::new(INTERVAL);
        assert!(classify(&mut ping, "-NOPERM no\r\n").is_err(), "nothing was sent");
        ping.begin();
        assert!(matches!(classify(&mut ping, "-NOPERM no\r\n"), Ok(Some(Found::Witness(_)))));
        ping.due = Instant::now();
        ping.begin();
        assert!(matches!(classify(&mut ping, "-MISCONF disk\r\n"), Ok(Some(Found::Witness(_)))));
        ping.due = Instant::now();
        ping.begin();
        assert_eq!(classify(&mut ping, "-BUSY script\r\n"), Ok(None));
        ping.due = Instant::now();
        assert!(ping.begin().is_some(), "it is sent again");
        assert_eq!(classify(&mut ping, "-ERR bye\r\n"), Err("ERR bye".to_owned()));
    }

    #[test]
    fn payloads_are_those_of_both_kinds_of_subscription() {
        let mut ping = Ping::new(INTERVAL);
        let pmessage = "*4\r\n$8\r\npmessage\r\n$1\r\n*\r\n$1\r\nc\r\n$2\r\n{}\r\n";
        let found = classify(&mut ping, pmessage).unwrap().unwrap();
        let start = pmessage.find("{}").unwrap();
        assert_eq!(found.shifted_by(10), Found::Payload(start + 10..start + 12));
        assert!(matches!(classify(&mut ping, "*3\r\n$7\r\nmessage\r\n$1\r\nc\r\n$2\r\n{}\r\n"), Ok(Some(_))));
        assert_eq!(classify(&mut ping, "*3\r\n$9\r\nsubscribe\r\n$1\r\nx\r\n:1\r\n"), Ok(None));
    }
}
