//! Lets the ingest loop keep up with the reader at the beginning of a burst.
//!
//! Redis cannot wait, so a burst is read as fast as it arrives, into the buffer. But a short burst costs less if it is read
//! at the pace of the ingest loop: the same few blocks of memory are used again while the processor's caches still hold
//! them. For a moment, the burst can wait in the socket and in the server, which closes a connection that is far behind.

use std::time::{Duration, Instant};

use crate::inbox::Inbox;

/// How long a burst may be read at the pace of the ingest loop. A server that publishes a gigabyte per second is then 20 MB
/// ahead; the usual limit of its output buffer is 32 MB (`client-output-buffer-limit pubsub`).
const LONGEST: Duration = Duration::from_millis(20);
/// A burst has ended if nothing arrives for this long.
const QUIET: Duration = Duration::from_millis(1);

pub(super) struct Pace {
    /// When the burst began.
    burst_began: Instant,
    /// Since when the reader has been waiting for bytes.
    waiting_since: Instant,
}

impl Pace {
    pub(super) fn new() -> Self {
        let now = Instant::now();
        Self { burst_began: now, waiting_since: now }
    }

    /// Waits until the ingest loop has processed most of what was received, unless the burst has lasted too long.
    /// `arrived` is when the last batch was received.
    pub(super) async fn wait(&mut self, inbox: &Inbox, arrived: Instant) {
        if arrived.saturating_duration_since(self.waiting_since) > QUIET {
            self.burst_began = arrived;
        }
        let deadline = self.burst_began + LONGEST;
        if inbox.is_behind() && arrived < deadline {
            let _ = tokio::time::timeout_at(deadline.into(), inbox.caught_up()).await;
        }
        self.waiting_since = Instant::now();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use futures_util::FutureExt;

    use super::*;
    use crate::inbox::{Batch, BufferPermit, Encoding, Message};
    use crate::observability::{Health, SelfMetrics};

    fn inbox() -> Inbox {
        Inbox::new(1 << 30, SelfMetrics::new().unwrap().into(), Arc::new(Health::default())).0
    }

    fn receive(inbox: &Inbox, bytes: usize) -> BufferPermit {
        let message = Message { bytes: vec![0; bytes].into(), encoding: Encoding::RawBody, redelivered: false };
        inbox.truncate_to_capacity(&mut Batch::new(vec![message], None)).0
    }

    #[tokio::test(start_paused = true)]
    async fn the_reader_waits_until_the_ingest_loop_has_caught_up() {
        let (inbox, mut pace) = (inbox(), Pace::new());
        let first = receive(&inbox, 1 << 20);
        assert!(pace.wait(&inbox, Instant::now()).now_or_never().is_some(), "it is not far behind");
        let second = receive(&inbox, 1 << 20);
        let mut waiting = Box::pin(pace.wait(&inbox, Instant::now()));
        assert!(waiting.as_mut().now_or_never().is_none());
        drop(first);
        assert!(waiting.as_mut().now_or_never().is_none());
        drop(second);
        assert!(waiting.now_or_never().is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn a_long_burst_is_read_without_waiting() {
        let (inbox, began) = (inbox(), Instant::now());
        let arrived = began + LONGEST;
        let _permit = receive(&inbox, 4 << 20);
        let mut pace = Pace { burst_began: began, waiting_since: arrived };
        assert!(pace.wait(&inbox, arrived).now_or_never().is_some(), "the same burst");
        let mut pace = Pace { burst_began: began, waiting_since: began };
        assert!(pace.wait(&inbox, arrived).now_or_never().is_none(), "another burst");
        // The ingest loop does nothing, and the reader waits no longer than it may.
        pace.wait(&inbox, arrived).await;
    }
}
