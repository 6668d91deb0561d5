//! Moves messages from the broker into the inbox.

use super::pace::Pace;
use crate::broker::{BrokerError, EventReceiver};
use crate::inbox::{Batch, BufferPermit, Inbox, IngestMessage};

/// Reads one subscription until it ends.
pub(super) struct Reader<'s> {
    pub(super) receiver: EventReceiver,
    pub(super) inbox: &'s Inbox,
    /// Set once a message was received.
    pub(super) received: &'s mut bool,
}

impl Reader<'_> {
    pub(super) async fn run(mut self) -> BrokerError {
        let (mut gap, mut pace) = (0, Pace::new());
        loop {
            let batch = match self.receiver.next().await {
                Ok(batch) => batch,
                Err(error) => {
                    self.report(gap);
                    return error;
                }
            };
            *self.received |= batch.payload_count() > 0;
            let (batch, permit, dropped) = self.reserve_or_drop(batch).await;
            if !batch.messages.is_empty() {
                self.report(std::mem::take(&mut gap));
                self.inbox.send_batch(batch, permit);
            }
            // The gap follows the messages that still fit: it is reported before the next ones.
            gap += dropped;
            if !self.receiver.supports_backpressure() {
                pace.wait(self.inbox).await;
            }
        }
    }

    fn report(&self, gap: usize) {
        if gap > 0 {
            self.inbox.send(IngestMessage::Gap(gap));
        }
    }

    /// Waits for room if the broker keeps unread messages. Otherwise drops messages that do not fit.
    async fn reserve_or_drop(&self, mut batch: Batch) -> (Batch, BufferPermit, usize) {
        if self.receiver.supports_backpressure() {
            let permit = self.inbox.reserve(&batch).await;
            return (batch, permit, 0);
        }
        let (permit, dropped) = self.inbox.truncate_to_capacity(&mut batch);
        (batch, permit, dropped)
    }
}
