//! The witness on `RabbitMQ`: a message through the exporter's queue, where it keeps its place among the events.
//!
//! It goes through a fanout exchange with the queue's name, to which only that queue is bound. The permissions for the
//! queue therefore cover it, and no other consumer receives it.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use lapin::Channel;
use lapin::message::Delivery;
use lapin::types::ShortString;
use tokio::sync::Notify;
use tokio::time::timeout;
use uuid::Uuid;

use super::publisher::{Publisher, WITNESS_BODY};
use super::topology::Topology;
use crate::broker::BrokerError;
use crate::inbox::{Encoding, Message, Witness};

/// A witness that has not come back for this long may have been dropped with the oldest messages of a full queue, so
/// another one is sent.
const RESEND_AFTER: Duration = Duration::from_secs(15);
/// Maximum number of witnesses whose send time is kept.
const MAX_OUTSTANDING: usize = 64;

/// The witnesses of one session.
pub(super) struct Witnesses {
    exchange: ShortString,
    /// Distinguishes them from those of another session or exporter.
    session: String,
    state: Mutex<State>,
    returned: Notify,
}

#[derive(Default)]
struct State {
    last_number: u64,
    /// Those that have not come back.
    outstanding: VecDeque<Outstanding>,
    /// Deliveries of this session.
    delivered: u64,
    /// The queue has refused a witness, so it may have refused events.
    was_refused: bool,
}

struct Outstanding {
    number: u64,
    sent: Instant,
    /// [`State::delivered`] before the queue was asked for the number of its messages.
    delivered: u64,
    /// The number of messages that were ready for delivery then. All of them must be delivered before the witness.
    ready: u32,
}

impl Witnesses {
    pub(super) fn new(queue: &ShortString) -> Self {
        Self {
            exchange: queue.clone(),
            session: Uuid::new_v4().to_string(),
            state: Mutex::new(State::default()),
            returned: Notify::new(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends a witness, and returns once it or a later one has come back, or after [`RESEND_AFTER`].
    pub(super) async fn send(
        &self,
        publisher: &Publisher,
        topology: &Topology,
        consumer_channel: &Channel,
    ) -> Result<(), BrokerError> {
        let delivered = self.state().delivered;
        // A quorum queue of RabbitMQ 4.3 was seen to deliver a witness before three of 859 messages that it had counted.
        let ready =
            if topology.queue_type == Some("quorum") { 0 } else { topology.stats(consumer_channel).await?.queued };
        let number = self.begin(Instant::now(), delivered, ready);
        let accepted = publisher.publish_witness(&self.exchange, &format!("{}-{number}", self.session)).await;
        if !matches!(accepted, Ok(true)) {
            let mut state = self.state();
            state.outstanding.retain(|outstanding| outstanding.number != number);
            state.was_refused |= accepted.is_ok();
        }
        if !accepted? {
            return Err(BrokerError::Refused("the queue refuses messages (reject-publish)".to_owned()));
        }
        let returned = async {
            while self.state().outstanding.iter().any(|outstanding| outstanding.number == number) {
                self.returned.notified().await;
            }
        };
        // Either way, the next one is sent.
        let _ = timeout(RESEND_AFTER, returned).await;
        Ok(())
    }

    fn begin(&self, sent: Instant, delivered: u64, ready: u32) -> u64 {
        let mut state = self.state();
        state.last_number += 1;
        let number = state.last_number;
        if state.outstanding.len() >= MAX_OUTSTANDING {
            state.outstanding.pop_front();
        }
        state.outstanding.push_back(Outstanding { number, sent, delivered, ready });
        number
    }

    /// Takes note of a delivery. Returns the message if it is a witness of any session or exporter.
    pub(super) fn classify(&self, delivery: &Delivery) -> Option<Message> {
        let id = delivery.properties.message_id().as_ref().filter(|_| is_witness(delivery, &self.exchange));
        let witness = id.map(|id| self.take(id.as_str()));
        self.state().delivered += 1;
        let bytes = Bytes::copy_from_slice(id?.as_str().as_bytes());
        Some(Message { bytes, encoding: Encoding::Witness(witness?), redelivered: delivery.redelivered })
    }

    fn take(&self, id: &str) -> Witness {
        self.take_own(id).unwrap_or(Witness { sent: None, is_after_gap: false })
    }

    fn take_own(&self, id: &str) -> Option<Witness> {
        let number: u64 = id.strip_prefix(&self.session)?.strip_prefix('-')?.parse().ok()?;
        let mut state = self.state();
        let position = state.outstanding.iter().position(|outstanding| outstanding.number == number)?;
        // Earlier ones are lost, because the queue keeps the order.
        let Outstanding { sent, delivered, ready, .. } = state.outstanding.drain(..=position).next_back()?;
        let were_dropped = state.delivered - delivered < u64::from(ready);
        let is_after_gap = std::mem::take(&mut state.was_refused) || position > 0 || were_dropped;
        self.returned.notify_one();
        Some(Witness { sent: Some(sent), is_after_gap })
    }
}

/// Anything else in the exchange is read like an event.
fn is_witness(delivery: &Delivery, exchange: &ShortString) -> bool {
    delivery.exchange == *exchange && delivery.data == WITNESS_BODY
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn returned(sent: Instant, is_after_gap: bool) -> Witness {
        Witness { sent: Some(sent), is_after_gap }
    }

    #[test]
    fn a_witness_comes_back_once_and_a_skipped_one_is_a_gap() {
        let witnesses = Witnesses::new(&"q".into());
        let start = Instant::now();
        let id = |number: u64| format!("{}-{number}", witnesses.session);
        for seconds in 0..4 {
            witnesses.begin(start + SECOND * seconds, 0, 0);
        }
        assert_eq!(witnesses.take(&id(1)), returned(start, false));
        assert_eq!(witnesses.take(&id(3)), returned(start + SECOND * 2, true));
        for number in [1, 2, 3] {
            assert_eq!(witnesses.take(&id(number)).sent, None, "{number} again");
        }
        assert_eq!(witnesses.take(&id(4)), returned(start + SECOND * 3, false));
        for foreign in ["", "3", &id(5), &format!("{}-x", witnesses.session), &format!("{}-1", Uuid::new_v4())] {
            assert_eq!(witnesses.take(foreign).sent, None, "{foreign}");
        }
    }

    #[test]
    fn fewer_deliveries_than_ready_messages_are_a_gap() {
        let witnesses = Witnesses::new(&"q".into());
        let start = Instant::now();
        for (number, delivered, is_after_gap) in [(1, 10, false), (2, 9, true), (3, 11, false)] {
            let before = witnesses.state().delivered;
            witnesses.begin(start, before, 10);
            witnesses.state().delivered += delivered;
            assert_eq!(witnesses.take(&format!("{}-{number}", witnesses.session)), returned(start, is_after_gap));
        }
    }

    #[test]
    fn a_refused_witness_is_a_gap_before_the_next_one() {
        let witnesses = Witnesses::new(&"q".into());
        let start = Instant::now();
        witnesses.state().was_refused = true;
        for (number, is_after_gap) in [(1, true), (2, false)] {
            witnesses.begin(start, 0, 0);
            assert_eq!(witnesses.take(&format!("{}-{number}", witnesses.session)), returned(start, is_after_gap));
        }
    }

    #[test]
    fn memory_is_bounded() {
        let witnesses = Witnesses::new(&"q".into());
        for _ in 0..1000 {
            witnesses.begin(Instant::now(), 0, 0);
        }
        assert_eq!(witnesses.state().outstanding.len(), MAX_OUTSTANDING);
    }
}
