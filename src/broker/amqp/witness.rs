//! The witness on `RabbitMQ`: a message through the exporter's queue, where it keeps its place among the events.
//!
//! It goes through a fanout exchange with the queue's name, to which only that queue is bound. The permissions for the
//! queue therefore cover it, and no other consumer receives it.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use lapin::message::Delivery;
use lapin::types::ShortString;
use tokio::sync::Notify;
use tokio::time::timeout;
use uuid::Uuid;

use super::publisher::Publisher;
use crate::broker::BrokerError;

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
    /// The numbers and send times of those that have not come back.
    outstanding: VecDeque<(u64, Instant)>,
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
    pub(super) async fn send(&self, publisher: &Publisher) -> Result<(), BrokerError> {
        let number = self.begin(Instant::now());
        let sent = publisher.publish_witness(&self.exchange, &format!("{}-{number}", self.session)).await;
        if sent.is_err() {
            self.state().outstanding.retain(|(outstanding, _)| *outstanding != number);
        }
        sent?;
        let returned = async {
            while self.state().outstanding.iter().any(|(outstanding, _)| *outstanding == number) {
                self.returned.notified().await;
            }
        };
        // Either way, the next one is sent.
        let _ = timeout(RESEND_AFTER, returned).await;
        Ok(())
    }

    fn begin(&self, now: Instant) -> u64 {
        let mut state = self.state();
        state.last_number += 1;
        let number = state.last_number;
        if state.outstanding.len() >= MAX_OUTSTANDING {
            state.outstanding.pop_front();
        }
        state.outstanding.push_back((number, now));
        number
    }

    /// The send time of a delivery that is a witness of this session and has not come back before.
    pub(super) fn take_returned(&self, delivery: &Delivery) -> Option<Instant> {
        if delivery.exchange != self.exchange {
            return None;
        }
        self.take_id(delivery.properties.message_id().as_ref()?.as_str())
    }

    fn take_id(&self, id: &str) -> Option<Instant> {
        let number: u64 = id.strip_prefix(&self.session)?.strip_prefix('-')?.parse().ok()?;
        let mut state = self.state();
        let position = state.outstanding.iter().position(|(outstanding, _)| *outstanding == number)?;
        // Earlier ones are lost, because the queue keeps the order.
        let (_, sent) = state.outstanding.drain(..=position).next_back()?;
        self.returned.notify_one();
        Some(sent)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_witness_comes_back_once_and_earlier_ones_are_lost() {
        let witnesses = Witnesses::new(&"q".into());
        let start = Instant::now();
        let id = |number: u64| format!("{}-{number}", witnesses.session);
        for seconds in 0..3 {
            witnesses.begin(start + Duration::from_secs(seconds));
        }
        assert_eq!(witnesses.take_id(&id(2)), Some(start + Duration::from_secs(1)));
        assert_eq!(witnesses.take_id(&id(2)), None, "redelivered");
        assert_eq!(witnesses.take_id(&id(1)), None, "out of order");
        assert_eq!(witnesses.take_id(&id(3)), Some(start + Duration::from_secs(2)));
        for invalid in ["", "3", &id(4), &format!("{}-x", witnesses.session), &format!("{}-1", Uuid::new_v4())] {
            assert_eq!(witnesses.take_id(invalid), None, "{invalid}");
        }
    }

    #[test]
    fn memory_is_bounded() {
        let witnesses = Witnesses::new(&"q".into());
        for _ in 0..1000 {
            witnesses.begin(Instant::now());
        }
        assert_eq!(witnesses.state().outstanding.len(), MAX_OUTSTANDING);
    }
}
