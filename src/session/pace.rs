//! Lets the ingest loop keep up with the reader in a burst.
//!
//! Redis cannot wait, so events must be read as they arrive, into the buffer. But a burst costs less if it is read at the
//! pace of the ingest loop: the same few blocks of memory are used again while the processor's caches still hold them. For a
//! moment, events can wait in the socket and in the server, which closes a connection that is far behind.

use std::time::{Duration, Instant};

use crate::inbox::Inbox;

/// How long the reader may wait at once. A server that publishes a gigabyte per second is then 20 MB ahead; the usual limit
/// of its output buffer is 32 MB (`client-output-buffer-limit pubsub`).
const LONGEST: Duration = Duration::from_millis(20);
/// The reader may wait again for the time since the last wait, divided by this. Reading takes much less time than
/// processing, so it still keeps up with the server.
const REFILL: u32 = 2;
/// The reader does not wait for less than this.
const SHORTEST: Duration = Duration::from_millis(1);

pub(super) struct Pace {
    /// How long the reader may wait now, at most [`LONGEST`].
    allowance: Duration,
    /// When the allowance was brought up to date.
    updated: Instant,
}

impl Pace {
    pub(super) fn new() -> Self {
        Self { allowance: LONGEST, updated: Instant::now() }
    }

    /// Waits until the ingest loop has processed most of what was received, or until the allowance is used up.
    pub(super) async fn wait(&mut self, inbox: &Inbox) {
        if !inbox.is_behind() {
            return;
        }
        let now = Instant::now();
        self.allowance = LONGEST.min(self.allowance + (now - self.updated) / REFILL);
        self.updated = now;
        if self.allowance >= SHORTEST {
            let _ = tokio::time::timeout(self.allowance, inbox.caught_up()).await;
            self.updated = Instant::now();
            self.allowance = self.allowance.saturating_sub(self.updated - now);
        }
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

    #[tokio::test]
    async fn the_reader_waits_until_the_ingest_loop_has_caught_up() {
        let (inbox, mut pace) = (inbox(), Pace::new());
        let first = receive(&inbox, 1 << 20);
        assert!(pace.wait(&inbox).now_or_never().is_some(), "it is not far behind");
        let second = receive(&inbox, 1 << 20);
        let mut waiting = Box::pin(pace.wait(&inbox));
        assert!(waiting.as_mut().now_or_never().is_none());
        drop(first);
        assert!(waiting.as_mut().now_or_never().is_none());
        drop(second);
        assert!(waiting.now_or_never().is_some());
    }

    #[tokio::test]
    async fn the_reader_waits_no_longer_than_its_allowance() {
        let (inbox, mut pace) = (inbox(), Pace::new());
        let _permit = receive(&inbox, 4 << 20);
        // The ingest loop does nothing.
        pace.wait(&inbox).await;
        assert!(pace.allowance < SHORTEST);
        pace.updated = Instant::now();
        assert!(pace.wait(&inbox).now_or_never().is_some());
        pace.updated -= LONGEST * REFILL;
        assert!(pace.wait(&inbox).now_or_never().is_none(), "later, it may wait again");
        assert!(pace.allowance <= LONGEST);
    }
}
