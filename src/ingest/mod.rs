//! The ingest loop: the sole owner of the state. It decodes messages in place and applies each event.
//!
//! Runs on a separate thread and waits only for its inbox. Between two batches it answers queries, copies
//! snapshots for a millisecond at a time, and submits saves. It does no I/O.

mod clock;
mod continuity;
mod gap;
mod handle;
mod queries;
mod redelivery;
mod save_scheduler;
mod wall_clock;

use std::borrow::Cow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tokio::sync::{mpsc, watch};

use clock::{TICK, WorkerClock};
use continuity::Continuity;
use gap::{EventRate, Gap};
use redelivery::RedeliveryFilter;
use save_scheduler::SaveScheduler;
use wall_clock::WallClock;

pub use handle::{IngestHandle, Query};
pub use queries::COPY_BUDGET;
pub use redelivery::redelivery_window;

use crate::celery::envelope::DecodeFailure;
use crate::celery::{Event, envelope, event};
use crate::config::Config;
use crate::inbox::{Ack, Batch, Encoding, IngestMessage, Message, NamedQueue, ReplyFn, Witness, WorkerStarts};
use crate::metrics::{Snapshot, SnapshotBuilder};
use crate::observability::{GapCause, Health, LogThrottle, NOT_SUBSCRIBED, SelfMetrics, WarningSource};
use crate::state::{Arrival, State, Timeouts};
use crate::store::{Restored, StoreHandle};

/// Called with every event, on the ingest thread, after the state has applied it. It must not block, because the loop
/// waits for it. A panic is logged and counted, and the observer is called again for the next event.
pub type Observer = Box<dyn FnMut(&Event<'_>) + Send>;

/// Bytes of the base64 buffer that are kept from message to message.
const MAX_RETAINED_BUFFER: usize = 1 << 20;
/// A warning is logged if no message arrives for this long after connecting.
const NO_EVENTS_WARNING_DELAY: Duration = Duration::from_secs(60);
/// How many of the broker's heartbeats pass until it notices that the previous connection is dead. lapin and `RabbitMQ`
/// tolerate two missing ones.
const HEARTBEATS_UNTIL_ORDERED: u32 = 3;
/// Maximum number of workers that warnings name at a time.
const MAX_WARNED_WORKERS: usize = 10;
/// How many bytes of an invalid message are logged.
const PAYLOAD_PREFIX_LEN: usize = 64;

/// The ingest loop's inputs and outputs.
pub struct Ingest {
    /// The receiving side of the inbox.
    pub inbox_rx: Receiver<IngestMessage>,
    /// Queries from HTTP and the embedding program.
    pub queries_rx: Receiver<Query>,
    /// Acknowledgments to the session.
    pub acks_tx: mpsc::UnboundedSender<Ack>,
    /// Workers that start, to the session.
    pub starts_tx: watch::Sender<WorkerStarts>,
    /// The current configuration.
    pub config: watch::Receiver<Arc<Config>>,
    /// The embedding program's observers.
    pub observers: Vec<Observer>,
    /// The exporter's own metrics.
    pub self_metrics: Arc<SelfMetrics>,
    /// The state behind `/healthz`.
    pub health: Arc<Health>,
}

impl Ingest {
    /// Runs until [`IngestMessage::Stop`], beginning with the state that was restored. With a store, the state is
    /// saved.
    pub fn run(self, restored: Restored, store: Option<StoreHandle>) {
        let config = Arc::clone(&self.config.borrow());
        let mut ingest = IngestLoop::new(self, &config, restored, store);
        while ingest.run_once() {}
        ingest.save_scheduler.submit(&mut ingest.state, &mut ingest.redelivery_filter, ingest.continuity.position());
    }
}

/// What a batch contained.
#[derive(Clone, Copy, Default)]
struct Decoded {
    events: u64,
    /// Of the last event that has one.
    last_timestamp: Option<f64>,
}

struct IngestLoop {
    context: Ingest,
    state: State,
    save_scheduler: SaveScheduler,
    continuity: Continuity,
    /// Whether the state was restored and no session has connected since.
    is_restored: bool,
    config: Arc<Config>,
    clock: WorkerClock,
    wall_clock: WallClock,
    last_tick: Instant,
    session: u64,
    connected_at: Option<Duration>,
    /// When the subscription ended, or when the restored state was saved.
    unsubscribed_since: Option<SystemTime>,
    rate: EventRate,
    received_since_connect: bool,
    /// Until then, the broker may deliver messages of a named queue out of order. The session waits until the previous
    /// consumer is gone, but quorum queues and other versions of `RabbitMQ` may requeue its messages later.
    reordered_until: Option<Instant>,
    snapshot: Option<(SnapshotBuilder, Vec<ReplyFn<Arc<Snapshot>>>)>,
    base64: Vec<u8>,
    redelivery_filter: RedeliveryFilter,
    log_throttle: LogThrottle,
}

impl IngestLoop {
    fn new(context: Ingest, config: &Arc<Config>, restored: Restored, store: Option<StoreHandle>) -> Self {
        let Restored { state, message_hashes, position, is_new, saved_at } = restored;
        let mut redelivery_filter = RedeliveryFilter::new(config);
        if store.is_some() {
            redelivery_filter.restore(message_hashes);
        }
        Self {
            config: Arc::clone(config),
            save_scheduler: SaveScheduler::new(store, context.acks_tx.clone(), config),
            context,
            state,
            continuity: Continuity::new(position),
            is_restored: !is_new,
            clock: WorkerClock::new(Instant::now()),
            wall_clock: WallClock::new(),
            last_tick: Instant::now(),
            session: 0,
            connected_at: None,
            unsubscribed_since: saved_at,
            rate: EventRate::new(Instant::now()),
            received_since_connect: false,
            reordered_until: None,
            snapshot: None,
            base64: Vec::new(),
            redelivery_filter,
            log_throttle: LogThrottle::default(),
        }
    }

    /// One round: a message, a step of a snapshot, a save if one is due, the clock. Returns whether to continue.
    fn run_once(&mut self) -> bool {
        let message = match self.context.inbox_rx.try_recv() {
            Err(TryRecvError::Empty) => self.wait(),
            Ok(message) => Ok(message),
            Err(TryRecvError::Disconnected) => Err(RecvTimeoutError::Disconnected),
        };
        match message {
            Ok(IngestMessage::Stop) | Err(RecvTimeoutError::Disconnected) => return false,
            Ok(message) => self.handle(message),
            Err(RecvTimeoutError::Timeout) => {}
        }
        self.save_scheduler.poll(&mut self.state, &mut self.redelivery_filter, self.continuity.position());
        self.context
            .self_metrics
            .oldest_unsaved_change
            .set(self.save_scheduler.update_overdue(&self.state).as_secs_f64());
        self.answer_queries();
        let now = Instant::now();
        self.clock.iterate(now);
        if now - self.last_tick >= TICK {
            self.tick(now);
        }
        self.context.health.ingest_tick();
        true
    }

    /// Waits for a message, the next tick or a due save.
    fn wait(&mut self) -> Result<IngestMessage, RecvTimeoutError> {
        let timeout = if self.snapshot.is_some() {
            Duration::ZERO
        } else {
            let tick = TICK.saturating_sub(self.last_tick.elapsed());
            self.save_scheduler.due_in(&self.state).map_or(tick, |due_in| due_in.min(tick))
        };
        self.context.inbox_rx.recv_timeout(timeout)
    }

    fn handle(&mut self, message: IngestMessage) {
        match message {
            IngestMessage::Connected { session, queue, disconnect_cause } => {
                self.connected(session, queue.as_ref(), disconnect_cause);
            }
            IngestMessage::Disconnected => {
                self.clock.stop(Instant::now());
                self.unsubscribed_since = Some(SystemTime::now());
                self.connected_at = None;
            }
            IngestMessage::Gap(messages) => {
                self.clock.record_gap();
                self.record_gap(Gap { messages, ..Gap::new(GapCause::BufferFull) });
            }
            IngestMessage::Batch(batch, permit) => {
                self.process_batch(&batch);
                drop(permit);
            }
            IngestMessage::Wake | IngestMessage::Stop => {}
        }
    }

    fn connected(&mut self, session: u64, queue: Option<&NamedQueue>, disconnect_cause: GapCause) {
        let is_restored = std::mem::take(&mut self.is_restored);
        let cause = if let Some(queue) = queue {
            self.continuity.start(queue, session > 1 || is_restored)
        } else {
            self.continuity.start_without_queue();
            let before_first = is_restored.then_some(GapCause::Restart);
            if session > 1 { Some(disconnect_cause) } else { before_first }
        };
        let unsubscribed = self.unsubscribed_since.take().map(|since| since.elapsed().unwrap_or_default());
        if let Some(cause) = cause {
            self.record_gap(Gap { unsubscribed, ..Gap::new(cause) });
        }
        self.session = session;
        self.clock.start(Instant::now());
        self.connected_at = Some(self.clock.elapsed());
        self.received_since_connect = false;
        self.reordered_until = queue.map(|queue| Instant::now() + queue.heartbeat * HEARTBEATS_UNTIL_ORDERED);
    }

    /// Counts and reports a gap, and clears what is unknown after it.
    fn record_gap(&mut self, gap: Gap) {
        let gap = gap.with_estimate(&self.rate);
        self.context.self_metrics.record_gap(gap.cause);
        self.context.health.record_loss(&gap.summary());
        gap.log();
        self.state.record_gap();
    }

    fn process_batch(&mut self, batch: &Batch) {
        self.state.set_time(self.wall_clock.millis(batch.arrived));
        let is_reordered = self.reordered_until.is_some_and(|until| batch.arrived < until);
        let mut decoded = Decoded::default();
        for message in &batch.messages {
            if let Encoding::Witness(witness) = message.encoding {
                self.process_witness(witness);
                self.record_delivery(message);
                continue;
            }
            let is_duplicate = self.record_delivery(message);
            self.received_since_connect = true;
            if is_duplicate {
                self.context.self_metrics.duplicates.inc();
                continue;
            }
            let may_be_late = message.redelivered || is_reordered;
            self.process_message(message, Arrival { at: self.clock.time_at(batch.arrived), may_be_late }, &mut decoded);
        }
        self.record_decoded(decoded);
        if let Some(any_starting) = self.state.starting_workers().take_change() {
            self.context.starts_tx.send_replace(WorkerStarts { last: any_starting.then(Instant::now) });
        }
        let ack = batch.ack.map(|tag| Ack { session: self.session, tag });
        self.save_scheduler.record(batch.messages.len(), batch.payload_count() > 0, ack);
    }

    /// Takes note of a delivery from a named queue. Returns whether it was processed before.
    fn record_delivery(&mut self, message: &Message) -> bool {
        let Some((hash, is_duplicate)) = self.redelivery_filter.check(message) else { return false };
        if let Some(cause) = self.continuity.record_delivery(hash, is_duplicate) {
            let payload_prefix = &*payload_prefix(&message.bytes);
            let (redelivered, witness) = (message.redelivered, message.is_witness());
            tracing::debug!(payload_prefix, redelivered, witness, "another message came before the newest saved one");
            self.record_gap(Gap::new(cause));
        }
        is_duplicate
    }

    /// If it is of this session, every event that was sent before it has been applied, so workers can time out.
    fn process_witness(&mut self, witness: Witness) {
        let Some(sent) = witness.sent else { return };
        if let Some(cause) = self.continuity.record_witness(witness.is_after_gap) {
            self.clock.record_gap();
            self.record_gap(Gap::new(cause));
        }
        self.clock.advance(sent);
        self.state.expire(&timeouts(&self.config), self.clock.elapsed());
        self.tick(Instant::now());
    }

    /// Records what a batch contained. Reading the clock for every message would take longer than decoding an event.
    fn record_decoded(&mut self, decoded: Decoded) {
        self.context.self_metrics.decoded_events.inc_by(decoded.events);
        self.rate.record(decoded.events);
        if let Some(timestamp) = decoded.last_timestamp {
            self.context.health.record_event();
            self.context.self_metrics.event_lag.set(unix_now() - timestamp);
        }
    }

    fn process_message(&mut self, message: &Message, arrival: Arrival, decoded: &mut Decoded) {
        let mut base64 = std::mem::take(&mut self.base64);
        let body = match &message.encoding {
            Encoding::KombuEnvelope => envelope::open(&message.bytes, &mut base64),
            Encoding::RawBody => Ok(message.bytes.as_ref().into()),
            Encoding::Undecodable(failure) => Err(failure.clone()),
            Encoding::Witness(_) => return,
        };
        match body {
            Ok(body) => self.process_events(&body, arrival, decoded),
            Err(failure) => self.skip_invalid(&failure, &message.bytes),
        }
        // One huge message must not keep a huge buffer allocated.
        self.base64 = if base64.len() > MAX_RETAINED_BUFFER { Vec::new() } else { base64 };
    }

    fn process_events(&mut self, body: &[u8], arrival: Arrival, decoded: &mut Decoded) {
        let config = Arc::clone(&self.config);
        event::decode(body, !self.context.observers.is_empty(), |event| match event {
            Ok(event) => {
                decoded.events += 1;
                decoded.last_timestamp = event.timestamp.or(decoded.last_timestamp);
                if config.events.hostnames.as_ref().is_none_or(|names| names.matches(&event.hostname)) {
                    self.state.apply(event, arrival);
                } else {
                    self.state.learn_metadata(event);
                }
                self.observe(event);
            }
            Err(reason) => self.skip_invalid(&reason.into(), body),
        });
    }

    fn observe(&mut self, event: &Event) {
        for observer in &mut self.context.observers {
            if catch_unwind(AssertUnwindSafe(|| observer(event))).is_err() {
                self.context.self_metrics.observer_panics.inc();
                if let Some(suppressed) = self.log_throttle.check("panic") {
                    tracing::error!(suppressed, event = &*event.event_type, "observer panicked");
                }
            }
        }
    }

    fn skip_invalid(&mut self, failure: &DecodeFailure, bytes: &[u8]) {
        self.context.self_metrics.invalid(failure.reason).inc();
        if let Some(suppressed) = self.log_throttle.check(failure.reason.as_str()) {
            let payload_prefix = &*payload_prefix(bytes);
            let (reason, value) = (failure.reason.as_str(), failure.value.as_deref());
            tracing::warn!(reason, value, payload_prefix, suppressed, "skipped invalid message");
        }
    }

    /// Why no worker can time out now.
    fn clock_paused_reason(&self) -> Option<String> {
        if self.connected_at.is_none() {
            return Some(NOT_SUBSCRIBED.to_owned());
        }
        if !self.clock.is_overdue(Instant::now()) {
            return None;
        }
        Some(self.context.health.event_path_problem().unwrap_or_else(|| "broker not responding".to_owned()))
    }

    fn tick(&mut self, now: Instant) {
        self.last_tick = now;
        if self.connected_at.is_some() {
            self.rate.update(now);
        } else {
            self.rate.skip(now);
        }
        self.state.take_worker_changes().log();
        self.context.health.set_workers(self.state.worker_counts());
        let paused = self.clock.take_paused(now);
        self.context.self_metrics.worker_clock_paused_seconds.inc_by(paused.as_secs_f64());
        if self.context.config.has_changed().unwrap_or(false) {
            self.config = Arc::clone(&self.context.config.borrow_and_update());
        }
        self.update_warnings();
    }

    /// Updates the gauges that a scrape of the exporter's own metrics shows next.
    #[allow(clippy::cast_possible_wrap, reason = "bounded by the configuration")]
    fn update_gauges(&self) {
        let self_metrics = &self.context.self_metrics;
        self_metrics.tracked_tasks.set(self.state.task_count() as i64);
        self_metrics.tracked_workers.set(self.state.worker_count() as i64);
        self_metrics.tracked_label_sets.set(self.state.series().label_set_count() as i64);
    }

    /// Lasting conditions are in `/healthz` while they last, and in the log when they begin.
    fn update_warnings(&self) {
        let silent = self.state.workers_without_task_events(self.clock.elapsed());
        let mut warnings: Vec<String> =
            silent.iter().take(MAX_WARNED_WORKERS).map(|hostname| no_task_events_warning(hostname)).collect();
        let is_overdue =
            self.connected_at.is_some_and(|at| self.clock.elapsed().saturating_sub(at) >= NO_EVENTS_WARNING_DELAY);
        if is_overdue && !self.received_since_connect {
            warnings.push(
                "no messages received since connecting: check that workers run on this broker, database or virtual host, \
                 that events.exchange and broker.redis.* match Celery's settings, and that events.enable_events is on or \
                 the workers run with -E"
                    .to_owned(),
            );
        }
        warnings.extend(self.save_scheduler.warning().map(str::to_owned));
        let paused = self.clock_paused_reason();
        if let Some(reason) = paused.as_ref().filter(|_| self.connected_at.is_some()) {
            warnings.push(format!("{reason}; worker timeouts paused"));
        }
        self.context.health.set_clock_paused(paused);
        self.context.health.set_warnings(WarningSource::Ingest, warnings);
    }
}

fn no_task_events_warning(hostname: &str) -> String {
    format!(
        "worker {} processes tasks but sends no task events; start it with -E or enable remote control",
        hostname.escape_debug()
    )
}

/// The beginning of a message, for the log.
fn payload_prefix(bytes: &[u8]) -> Cow<'_, str> {
    String::from_utf8_lossy(&bytes[..bytes.len().min(PAYLOAD_PREFIX_LEN)])
}

fn timeouts(config: &Config) -> Timeouts {
    Timeouts {
        worker_timeout: config.state.worker_timeout,
        purge_offline_workers: config.state.purge_offline_workers,
        purge_stopped_workers: config.state.effective_purge_stopped(),
    }
}

fn unix_now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}
