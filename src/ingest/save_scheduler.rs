//! Decides when the state is saved. Acknowledgments that must wait for a save go to the store with it; all others are
//! sent at once.

use std::time::{Duration, Instant};

use tokio::sync::mpsc;

use super::redelivery::RedeliveryFilter;
use crate::config::Config;
use crate::inbox::{Ack, ReplyFn};
use crate::state::State;
use crate::store::{QueuePosition, Save, SaveError, StoreHandle};

/// A save that takes longer is a warning.
const SLOW_SAVE: Duration = Duration::from_secs(5);
/// A save that takes longer counts as failing: messages do not wait for it.
const HUNG_SAVE: Duration = Duration::from_secs(30);
/// On a quiet queue, the time between two saves whose only purpose is to acknowledge witnesses. It is shorter than any
/// `consumer_timeout` of `RabbitMQ`.
const WITNESS_SAVE_INTERVAL: Duration = Duration::from_secs(10);

/// Submits saves to the store, with the acknowledgment for the messages that were processed since the last one.
pub(super) struct SaveScheduler {
    store: Option<StoreHandle>,
    acks_tx: mpsc::UnboundedSender<Ack>,
    /// A named queue outlives the exporter: its messages are acknowledged once their effect is on disk.
    ack_after_save: bool,
    /// A save is due immediately once this many messages are processed, before the broker waits for acknowledgments.
    save_threshold: usize,
    /// Time between two saves. `None` saves only on request and at shutdown.
    interval: Option<Duration>,
    messages: usize,
    /// Whether any message was more than a witness.
    has_events: bool,
    ack: Option<Ack>,
    /// The save that is submitted and not yet on disk.
    in_flight: Option<InFlight>,
    replies: Vec<ReplyFn<Result<(), SaveError>>>,
    last_submitted: Instant,
    /// When the oldest change that is not submitted was noticed.
    changed_at: Option<Instant>,
}

struct InFlight {
    submitted: Instant,
    due: Instant,
    ack: Option<Ack>,
}

impl SaveScheduler {
    pub(super) fn new(store: Option<StoreHandle>, acks_tx: mpsc::UnboundedSender<Ack>, config: &Config) -> Self {
        let amqp = &config.broker.amqp;
        Self {
            ack_after_save: store.is_some() && amqp.queue.is_some(),
            store,
            acks_tx,
            save_threshold: (usize::from(amqp.effective_prefetch_count()) / 2).max(1),
            interval: config.state.state_save_interval,
            messages: 0,
            has_events: false,
            ack: None,
            in_flight: None,
            replies: Vec::new(),
            last_submitted: Instant::now(),
            changed_at: None,
        }
    }

    /// Records that messages were processed, whether any was more than a witness, and the acknowledgment for them.
    pub(super) fn record(&mut self, messages: usize, has_events: bool, ack: Option<Ack>) {
        self.messages += messages;
        self.has_events |= has_events;
        self.ack = ack.or(self.ack);
        if !self.ack_after_save {
            self.acknowledge();
        }
    }

    fn acknowledge(&mut self) {
        if let Some(ack) = self.ack.take() {
            // If the session has ended, the broker requeues the messages.
            let _ = self.acks_tx.send(ack);
        }
    }

    fn is_failing(&self) -> bool {
        self.store.as_ref().is_some_and(|store| store.status.is_failing()) || self.is_taking(HUNG_SAVE)
    }

    /// Whether the save in flight has taken longer than `limit`.
    fn is_taking(&self, limit: Duration) -> bool {
        let is_saving = self.store.as_ref().is_some_and(|store| store.status.is_busy() && !store.status.is_failing());
        is_saving && self.in_flight.as_ref().is_some_and(|save| save.submitted.elapsed() > limit)
    }

    /// Warns while a save takes long.
    pub(super) fn warning(&self) -> Option<&'static str> {
        if self.is_taking(HUNG_SAVE) {
            Some(
                "a save of the state has been hanging for more than 30 s; events since the last save would not survive a restart",
            )
        } else if self.is_taking(SLOW_SAVE) {
            Some("a save of the state is taking more than 5 s: check the disk of state.db")
        } else {
            None
        }
    }

    /// Requests a save now.
    pub(super) fn request(&mut self, reply: ReplyFn<Result<(), SaveError>>) {
        self.replies.push(reply);
    }

    /// The time until the next save is due. `None` if there is nothing to save, or if the store is busy.
    pub(super) fn due_in(&self, state: &State) -> Option<Duration> {
        let store = self.store.as_ref()?;
        if store.status.is_busy() {
            return None;
        }
        let broker_waits = self.ack.is_some() && self.messages >= self.save_threshold;
        // A store that failed and is idle again needs a full save.
        if !self.replies.is_empty() || broker_waits || store.status.is_failing() {
            return Some(Duration::ZERO);
        }
        let interval = if state.has_changes() || self.has_events {
            self.interval?
        } else {
            self.ack.and(self.interval)?.max(WITNESS_SAVE_INTERVAL)
        };
        Some(interval.saturating_sub(self.last_submitted.elapsed()))
    }

    /// Submits a save if one is due.
    pub(super) fn poll(&mut self, state: &mut State, filter: &mut RedeliveryFilter, position: Option<&QueuePosition>) {
        if self.is_failing() {
            // Messages must not wait for a disk that cannot be written.
            let in_flight = self.in_flight.as_mut().and_then(|save| save.ack.take());
            self.ack = self.ack.or(in_flight);
            self.acknowledge();
        }
        let refusal = match &self.store {
            None => Some(SaveError::NotPersistent),
            Some(store) if store.status.is_failing() && store.status.is_busy() => Some(SaveError::Retrying),
            Some(_) => None,
        };
        if let Some(refusal) = refusal {
            self.replies.drain(..).for_each(|reply| reply(Err(refusal.clone())));
        } else if self.due_in(state) == Some(Duration::ZERO) {
            self.submit(state, filter, position);
        }
    }

    /// Submits everything that is not saved, whether a save is due or not.
    pub(super) fn submit(
        &mut self,
        state: &mut State,
        filter: &mut RedeliveryFilter,
        position: Option<&QueuePosition>,
    ) {
        let Some(store) = &self.store else { return };
        if store.status.is_failing() {
            state.require_full_save();
        }
        let (delta, ack) = (state.take_changes(), self.ack.take());
        let message_hashes = filter.take_unsaved(delta.is_full);
        store.save(Save {
            delta,
            message_hashes,
            position: position.cloned(),
            ack,
            replies: std::mem::take(&mut self.replies),
        });
        let now = Instant::now();
        let due = self.in_flight.as_ref().map(|save| save.due).or(self.pending_due()).unwrap_or(now);
        self.in_flight = Some(InFlight { submitted: now, due, ack });
        (self.messages, self.has_events) = (0, false);
        self.last_submitted = now;
        self.changed_at = None;
    }

    /// When the save of the oldest pending change is due.
    fn pending_due(&self) -> Option<Instant> {
        Some((self.last_submitted + self.interval?).max(self.changed_at?))
    }

    /// Takes note of new changes and finished saves. Returns how long a save that is not on disk has been due.
    pub(super) fn update_overdue(&mut self, state: &State) -> Duration {
        let Some(store) = &self.store else { return Duration::ZERO };
        if !store.status.is_busy() && !store.status.is_failing() {
            self.in_flight = None;
        }
        if self.changed_at.is_none() && state.has_changes() {
            self.changed_at = Some(Instant::now());
        }
        let due = self.in_flight.as_ref().map(|save| save.due).or_else(|| self.pending_due());
        due.map_or(Duration::ZERO, |due| Instant::now().saturating_duration_since(due))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::mpsc::{Receiver, channel};

    use super::*;
    use crate::metrics::SeriesOptions;
    use crate::state::Limits;
    use crate::store::StoreStatus;

    struct Fixture {
        scheduler: SaveScheduler,
        saves_rx: Receiver<Save>,
        acks_rx: mpsc::UnboundedReceiver<Ack>,
        status: Arc<StoreStatus>,
        state: State,
        filter: RedeliveryFilter,
    }

    impl Fixture {
        /// The scheduler of a new state, whose first save is a full one.
        fn new(interval: Option<Duration>, queue: Option<&str>) -> Self {
            let mut config = Config::default();
            config.state.state_save_interval = interval;
            config.broker.amqp.queue = queue.map(str::to_owned);
            let ((saves_tx, saves_rx), (acks_tx, acks_rx)) = (channel(), mpsc::unbounded_channel());
            let status = Arc::new(StoreStatus::default());
            let mut state = State::new(&Limits {
                max_workers: 9,
                max_tasks: 9,
                series: SeriesOptions { max_label_sets: 9, bounds: vec![1.0], ..SeriesOptions::default() },
            });
            state.track_changes();
            let store = StoreHandle::new(saves_tx, Arc::clone(&status));
            let scheduler = SaveScheduler::new(Some(store), acks_tx, &config);
            Self { scheduler, saves_rx, acks_rx, status, state, filter: RedeliveryFilter::new(&config) }
        }

        fn poll(&mut self) -> Option<Save> {
            self.scheduler.poll(&mut self.state, &mut self.filter, None);
            self.saves_rx.try_recv().ok()
        }
    }

    fn ack(tag: u64) -> Ack {
        Ack { session: 1, tag: crate::inbox::DeliveryTag(tag) }
    }

    #[test]
    fn changes_are_saved_once_per_interval() {
        let mut fixture = Fixture::new(Some(Duration::ZERO), None);
        assert!(fixture.poll().is_some_and(|save| save.delta.is_full));
        assert!(fixture.poll().is_none(), "the store is busy");
        fixture.status.set_idle();
        assert!(fixture.poll().is_none(), "nothing has changed");
        let mut later = Fixture::new(Some(Duration::from_secs(3600)), None);
        assert!(later.poll().is_none(), "not due yet");
        assert!(later.scheduler.update_overdue(&later.state).is_zero());
    }

    #[test]
    fn without_an_interval_only_requests_are_saved() {
        let mut fixture = Fixture::new(None, None);
        assert!(fixture.poll().is_none());
        assert!(fixture.scheduler.update_overdue(&fixture.state).is_zero());
        fixture.scheduler.request(Box::new(|result| assert!(result.is_ok())));
        assert!(fixture.poll().is_some());
    }

    #[test]
    fn messages_of_a_named_queue_are_acknowledged_with_the_save() {
        let mut fixture = Fixture::new(Some(Duration::ZERO), Some("q"));
        fixture.scheduler.record(1, true, Some(ack(7)));
        assert!(fixture.acks_rx.try_recv().is_err());
        assert_eq!(fixture.poll().and_then(|save| save.ack).map(|ack| ack.tag.0), Some(7));
        let mut without = Fixture::new(Some(Duration::ZERO), None);
        without.scheduler.record(1, true, Some(ack(7)));
        assert_eq!(without.acks_rx.try_recv().map(|ack| ack.tag.0), Ok(7));
    }

    #[test]
    fn a_witness_alone_is_saved_less_often() {
        let mut fixture = Fixture::new(Some(Duration::ZERO), Some("q"));
        assert!(fixture.poll().is_some());
        fixture.status.set_idle();
        fixture.scheduler.record(1, false, Some(ack(7)));
        assert!(fixture.poll().is_none());
        fixture.scheduler.last_submitted = Instant::now().checked_sub(WITNESS_SAVE_INTERVAL).unwrap();
        assert_eq!(fixture.poll().and_then(|save| save.ack).map(|ack| ack.tag.0), Some(7));
    }

    #[test]
    fn messages_do_not_wait_for_a_save_that_hangs() {
        let mut fixture = Fixture::new(Some(Duration::ZERO), Some("q"));
        fixture.scheduler.record(1, true, Some(ack(7)));
        assert!(fixture.poll().is_some() && fixture.scheduler.warning().is_none());
        let age = |fixture: &mut Fixture, age: Duration| {
            fixture.scheduler.in_flight.as_mut().unwrap().submitted = Instant::now().checked_sub(age).unwrap();
            fixture.poll();
            (fixture.scheduler.warning().is_some(), fixture.acks_rx.try_recv().map(|ack| ack.tag.0).ok())
        };
        assert_eq!(age(&mut fixture, SLOW_SAVE * 2), (true, None));
        assert_eq!(age(&mut fixture, HUNG_SAVE * 2), (true, Some(7)));
        fixture.scheduler.record(1, true, Some(ack(8)));
        assert_eq!(age(&mut fixture, HUNG_SAVE * 2), (true, Some(8)));
        fixture.status.set_idle();
        assert!(fixture.scheduler.warning().is_none());
    }

    #[test]
    fn a_save_that_is_not_on_disk_is_overdue() {
        let mut fixture = Fixture::new(Some(Duration::ZERO), None);
        assert!(fixture.poll().is_some());
        std::thread::sleep(Duration::from_millis(2));
        assert!(!fixture.scheduler.update_overdue(&fixture.state).is_zero());
        fixture.status.set_idle();
        assert!(fixture.scheduler.update_overdue(&fixture.state).is_zero());
    }
}
