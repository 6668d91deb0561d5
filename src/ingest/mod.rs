//! The hot loop: it alone owns the state. It decodes messages in place, applies each event, and between batches hands
//! out copies of its numbers, never for longer than a millisecond at a time.

mod ask;
mod attention;
mod recent;
mod saving;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError};
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::{mpsc, watch};

use attention::{Attention, TICK};

use recent::Recent;
use saving::Saving;

pub use ask::{Asker, Query, Reply};
pub use recent::recent_messages;

use crate::broker::{Batch, Message, Wire};
use crate::celery::envelope::Refusal;
use crate::celery::{Event, envelope, event};
use crate::metrics::{Copying, Snapshot};
use crate::quiet::Quiet;
use crate::session::{Ack, Arrival};
use crate::settings::Settings;
use crate::state::{State, Timeouts};
use crate::store::{Handle, Restored};
use crate::telemetry::{Health, Telemetry};

/// Called with every event, on the ingest thread, after the state has taken it. It must not block: the loop waits for
/// it. When it panics that is logged and counted, and it is called again for the next event.
pub type Observer = Box<dyn FnMut(&Event<'_>) + Send>;

/// How long copying may hold up events at a time.
pub const SLICE: Duration = Duration::from_millis(1);
/// Bytes of the buffer that are kept from message to message.
const KEPT: usize = 1 << 20;
/// Nothing heard for this long after connecting is worth a warning.
const QUIET_START: Duration = Duration::from_secs(60);

/// What the loop works with.
pub struct Ingest {
    /// From the session.
    pub arrivals: Receiver<Arrival>,
    /// From HTTP and the embedding program.
    pub queries: Receiver<Query>,
    /// To the session.
    pub acks: mpsc::UnboundedSender<Ack>,
    /// The settings in force; live ones may change.
    pub settings: watch::Receiver<Arc<Settings>>,
    /// The embedding program's ears.
    pub observers: Vec<Observer>,
    /// The exporter's own counters.
    pub telemetry: Arc<Telemetry>,
    /// For `/healthz`.
    pub health: Arc<Health>,
}

impl Ingest {
    /// Runs until [`Arrival::Stop`], from the state that was `restored`, saving it to `store` if there is one.
    pub fn run(self, restored: Restored, store: Option<Handle>) {
        let settings = Arc::clone(&self.settings.borrow());
        let mut work = Work::new(self, &settings, restored, store);
        while work.turn() {}
        work.saving.hand_over(&mut work.state, &mut work.recent, work.source.as_ref());
    }
}

struct Work {
    io: Ingest,
    state: State,
    saving: Saving,
    /// The queue that the last messages came from.
    source: Option<Arc<str>>,
    settings: Arc<Settings>,
    attention: Attention,
    session: u64,
    connected_at: Option<Duration>,
    heard_since_connect: bool,
    copying: Option<(Copying, Vec<Reply<Arc<Snapshot>>>)>,
    base64: Vec<u8>,
    recent: Recent,
    quiet: Quiet,
}

impl Work {
    fn new(io: Ingest, settings: &Arc<Settings>, restored: Restored, store: Option<Handle>) -> Self {
        let Restored { state, recent: hashes, source } = restored;
        let mut recent = Recent::new(settings);
        if store.is_some() {
            recent.restore(hashes);
        }
        Self {
            settings: Arc::clone(settings),
            saving: Saving::new(store, io.acks.clone(), settings),
            io,
            state,
            source,
            attention: Attention::new(),
            session: 0,
            connected_at: None,
            heard_since_connect: false,
            copying: None,
            base64: Vec::new(),
            recent,
            quiet: Quiet::default(),
        }
    }

    /// One round: what has arrived, a slice of what was asked, the clock. Whether to go on.
    fn turn(&mut self) -> bool {
        let arrival = match self.io.arrivals.try_recv() {
            Err(TryRecvError::Empty) => self.wait(),
            Ok(arrival) => Ok(arrival),
            Err(TryRecvError::Disconnected) => Err(RecvTimeoutError::Disconnected),
        };
        match arrival {
            Ok(Arrival::Stop) | Err(RecvTimeoutError::Disconnected) => return false,
            Ok(arrival) => self.take(arrival),
            Err(RecvTimeoutError::Timeout) => {}
        }
        self.saving.proceed(&mut self.state, &mut self.recent, self.source.as_ref());
        self.io.telemetry.save_age.set(self.saving.age(&self.state).as_secs_f64());
        self.answer();
        if self.attention.last_tick.elapsed() >= TICK {
            self.tick();
        }
        self.io.health.turned();
        true
    }

    /// The queue is empty: everything that came in has been taken.
    fn wait(&mut self) -> Result<Arrival, RecvTimeoutError> {
        self.attention.caught_up = true;
        let patience = if self.copying.is_some() {
            Duration::ZERO
        } else {
            let tick = TICK.saturating_sub(self.attention.last_tick.elapsed());
            self.saving.due(&self.state).map_or(tick, |due| due.min(tick))
        };
        self.io.arrivals.recv_timeout(patience)
    }

    fn take(&mut self, arrival: Arrival) {
        match arrival {
            Arrival::Connected { session, source } => {
                let continues = source.is_some() && self.source == source;
                if !continues && session > 1 {
                    tracing::info!("events sent in the meantime are missing");
                }
                self.source = source;
                self.session = session;
                self.attention.listening = true;
                self.attention.behind = false;
                self.attention.pulse = Instant::now();
                self.connected_at = Some(self.attention.elapsed);
                self.heard_since_connect = false;
                if !continues {
                    self.state.gap();
                }
            }
            Arrival::Disconnected => {
                self.attention.listening = false;
                self.connected_at = None;
            }
            Arrival::Behind(behind) => self.attention.behind = behind,
            Arrival::Pulse(at) => self.attention.pulse = at,
            Arrival::Dropped => self.state.gap(),
            Arrival::Batch(batch, room) => {
                self.heard_since_connect = true;
                self.attention.pulse = self.attention.pulse.max(batch.arrived);
                self.batch(&batch);
                drop(room);
            }
            Arrival::Nudge | Arrival::Stop => {}
        }
    }

    fn batch(&mut self, batch: &Batch) {
        for message in &batch.messages {
            self.message(message);
        }
        let ack = batch.ack.map(|token| Ack { session: self.session, token });
        self.saving.took(batch.messages.len(), ack);
        #[allow(clippy::cast_possible_wrap, reason = "bounded by max_backlog")]
        self.io.telemetry.backlog_bytes.sub(batch.bytes as i64);
        self.io.health.processed();
    }

    fn message(&mut self, message: &Message) {
        if self.recent.is_again(message) {
            self.io.telemetry.redelivered.inc();
            return;
        }
        let mut base64 = std::mem::take(&mut self.base64);
        let body = match &message.wire {
            Wire::Envelope => envelope::open(&message.bytes, &mut base64),
            Wire::Body => Ok(message.bytes.as_ref().into()),
            Wire::Refused(refusal) => Err(refusal.clone()),
        };
        match body {
            Ok(body) => self.events(&body),
            Err(refusal) => self.reject(&refusal, &message.bytes),
        }
        // One huge message must not cost its size for ever.
        self.base64 = if base64.len() > KEPT { Vec::new() } else { base64 };
    }

    fn events(&mut self, body: &[u8]) {
        let mut count = 0;
        let mut last = None;
        let now = self.attention.hearing();
        let settings = Arc::clone(&self.settings);
        event::decode(body, !self.io.observers.is_empty(), |event| {
            count += 1;
            match event {
                Ok(event) => {
                    last = event.timestamp.or(last);
                    if settings.events.hostnames.as_ref().is_none_or(|names| names.matches(&event.hostname)) {
                        self.state.apply(&event, now);
                    } else {
                        self.state.learn_name(&event);
                    }
                    self.observe(&event);
                }
                Err(reason) => self.reject(&reason.into(), body),
            }
        });
        self.io.telemetry.events.inc_by(count);
        if let Some(timestamp) = last {
            self.io.health.heard_event();
            self.io.telemetry.event_lag.set(unix_now() - timestamp);
        }
    }

    fn observe(&mut self, event: &Event) {
        for observer in &mut self.io.observers {
            if catch_unwind(AssertUnwindSafe(|| observer(event))).is_err() {
                self.io.telemetry.observer_panics.inc();
                if let Some(kept_back) = self.quiet.speak("panic") {
                    tracing::error!(kept_back, event = &*event.name_of_type, "the observer panicked");
                }
            }
        }
    }

    fn reject(&mut self, refusal: &Refusal, bytes: &[u8]) {
        self.io.telemetry.rejected(refusal.reason).inc();
        if let Some(kept_back) = self.quiet.speak(refusal.reason.as_str()) {
            let beginning = bytes[..bytes.len().min(64)].escape_ascii();
            let (reason, name) = (refusal.reason.as_str(), refusal.name.as_deref());
            tracing::warn!(reason, name, %beginning, kept_back, "a message or event is skipped");
        }
    }

    /// Answers what was asked, and goes on copying for at most [`SLICE`].
    fn answer(&mut self) {
        while let Ok(query) = self.io.queries.try_recv() {
            match query {
                Query::Snapshot(reply) => {
                    let (_, replies) =
                        self.copying.get_or_insert_with(|| (Copying::start(self.state.series()), Vec::new()));
                    replies.push(reply);
                }
                Query::Workers(reply) => reply(self.state.workers(self.attention.hearing())),
                Query::Task(uuid, reply) => reply(self.state.find_task(&uuid)),
                Query::Tasks { start, count, reply } => reply(self.state.tasks(start, count)),
                Query::Save(reply) => self.saving.ask(reply),
            }
        }
        self.copy();
    }

    fn copy(&mut self) {
        let Some((mut copying, replies)) = self.copying.take() else { return };
        let series = self.state.series();
        if !copying.proceed_for(series, SLICE) {
            self.copying = Some((copying, replies));
            return;
        }
        let snapshot = Arc::new(copying.finish(series));
        for reply in replies {
            reply(Arc::clone(&snapshot));
        }
    }

    fn tick(&mut self) {
        self.attention.tick(Instant::now());
        if self.io.settings.has_changed().unwrap_or(false) {
            self.settings = Arc::clone(&self.io.settings.borrow_and_update());
        }
        self.state.sweep(&timeouts(&self.settings), self.attention.elapsed);
        self.warn();
        #[allow(clippy::cast_possible_wrap, reason = "bounded by the settings")]
        {
            self.io.telemetry.tasks.set(self.state.task_count() as i64);
            self.io.telemetry.workers.set(self.state.worker_count() as i64);
            self.io.telemetry.label_pairs.set(self.state.series().pair_count() as i64);
        }
    }

    /// What the operator should know, in `/healthz` as long as it lasts and in the log when it begins.
    fn warn(&mut self) {
        let mut warnings: Vec<String> = self
            .state
            .mute_workers(self.attention.elapsed)
            .into_iter()
            .take(10)
            .map(|hostname| {
                let hostname = hostname.escape_debug();
                format!(
                    "{hostname} processes tasks but sends no task events: start it with -E, set worker_send_task_events, or \
                     leave events.enable_events on and let it read its control queue"
                )
            })
            .collect();
        let quiet = self.connected_at.is_some_and(|since| self.attention.elapsed.saturating_sub(since) >= QUIET_START);
        if quiet && !self.heard_since_connect {
            warnings.push(
                "nothing heard since connecting: check that workers run on this broker, database or virtual host, that \
                 events.exchange and broker.redis.* match Celery's settings, and that events.enable_events is on or \
                 the workers run with -E"
                    .to_owned(),
            );
        }
        self.io.health.set_warnings(warnings);
    }
}

fn timeouts(settings: &Settings) -> Timeouts {
    Timeouts {
        worker_timeout: settings.state.worker_timeout,
        purge_offline_workers: settings.state.purge_offline_workers,
    }
}

fn unix_now() -> f64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}
