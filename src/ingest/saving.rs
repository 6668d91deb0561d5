//! When the state is handed to the store, and what goes with it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;

use super::Reply;
use super::recent::Recent;
use crate::session::Ack;
use crate::settings::Settings;
use crate::state::State;
use crate::store::{Handle, Save};

/// The time between two saves, if there is anything to save.
const EVERY: Duration = Duration::from_millis(250);

/// The messages that were processed since the last save.
pub(super) struct Saving {
    store: Option<Handle>,
    acks: mpsc::UnboundedSender<Ack>,
    /// The queue outlives us: what it hands out is acknowledged once it is on disk.
    acknowledges_late: bool,
    /// So many messages are worth a save at once, lest the broker wait.
    many: usize,
    messages: usize,
    ack: Option<Ack>,
    replies: Vec<Reply<Result<(), String>>>,
    last: Instant,
    /// Since when there is a change that is not handed over, and one that is handed over and not on disk.
    changed: Option<Instant>,
    handed_over: Option<Instant>,
}

impl Saving {
    pub(super) fn new(store: Option<Handle>, acks: mpsc::UnboundedSender<Ack>, settings: &Settings) -> Self {
        let amqp = &settings.broker.amqp;
        Self {
            acknowledges_late: store.is_some() && amqp.queue.is_some(),
            store,
            acks,
            many: (usize::from(amqp.effective_prefetch()) / 2).max(1),
            messages: 0,
            ack: None,
            replies: Vec::new(),
            last: Instant::now(),
            changed: None,
            handed_over: None,
        }
    }

    /// Messages were processed.
    pub(super) fn took(&mut self, messages: usize, ack: Option<Ack>) {
        self.messages += messages;
        self.ack = ack.or(self.ack);
        if !self.acknowledges_late {
            self.acknowledge();
        }
    }

    fn acknowledge(&mut self) {
        if let Some(ack) = self.ack.take() {
            // The session may be over already: then the broker knows better than we do.
            let _ = self.acks.send(ack);
        }
    }

    fn is_failing(&self) -> bool {
        self.store.as_ref().is_some_and(|store| store.status.is_failing())
    }

    /// Somebody wants the state saved now.
    pub(super) fn ask(&mut self, reply: Reply<Result<(), String>>) {
        self.replies.push(reply);
    }

    /// How long until the next save is due; `None` if there is nothing to save.
    pub(super) fn due(&self, state: &State) -> Option<Duration> {
        let store = self.store.as_ref()?;
        if store.status.is_busy() {
            return None;
        }
        // What the last save held is not on disk if it failed, and the store has hope again.
        let waits = self.ack.is_some() && self.messages >= self.many;
        if !self.replies.is_empty() || waits || store.status.is_failing() {
            return Some(Duration::ZERO);
        }
        (state.has_changes() || self.ack.is_some()).then(|| EVERY.saturating_sub(self.last.elapsed()))
    }

    /// Hands over what is due.
    pub(super) fn proceed(&mut self, state: &mut State, recent: &mut Recent, source: Option<&Arc<str>>) {
        if self.is_failing() {
            self.acknowledge();
        }
        let refusal = match &self.store {
            None => Some("state.persistent is off"),
            Some(store) if store.status.is_failing() && store.status.is_busy() => Some("it failed, and is tried again"),
            Some(_) => None,
        };
        if let Some(refusal) = refusal {
            self.replies.drain(..).for_each(|reply| reply(Err(refusal.to_owned())));
        } else if self.due(state) == Some(Duration::ZERO) {
            self.hand_over(state, recent, source);
        }
    }

    /// Hands over all there is, whether it is due or not: the last save.
    pub(super) fn hand_over(&mut self, state: &mut State, recent: &mut Recent, source: Option<&Arc<str>>) {
        let Some(store) = &self.store else { return };
        if store.status.is_failing() {
            state.save_all();
        }
        let changes = state.take_changes();
        let hashes = recent.take_unsaved(changes.whole);
        store.save(Save {
            changes,
            recent: hashes,
            source: source.cloned(),
            ack: self.ack.take(),
            replies: std::mem::take(&mut self.replies),
        });
        self.messages = 0;
        self.last = Instant::now();
        self.handed_over = self.handed_over.or(self.changed.take()).or(Some(self.last));
    }

    /// For how long there has been a change that is not on disk.
    pub(super) fn age(&mut self, state: &State) -> Duration {
        let Some(store) = &self.store else { return Duration::ZERO };
        if !store.status.is_busy() && !store.status.is_failing() {
            self.handed_over = None;
        }
        if self.changed.is_none() && state.has_changes() {
            self.changed = Some(Instant::now());
        }
        self.handed_over.or(self.changed).map_or(Duration::ZERO, |since| since.elapsed())
    }
}
