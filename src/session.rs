//! The session with the broker: connect, run, back off, again. The only place that reconnects.
//!
//! What comes in goes to the ingest loop as [`Arrival`]s, with markers for every gap. The queue between is bounded in
//! bytes: `RabbitMQ` is made to wait when it is full, what Redis sends meanwhile is dropped and counted.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::time::{sleep, timeout};

use crate::broker::{self, AckToken, Batch, Control, Error, Subscription};
use crate::celery::Broadcast;
use crate::quiet::Quiet;
use crate::settings::{BrokerUrl, Settings};
use crate::telemetry::{BrokerStatus, Health, Telemetry};

/// What the ingest loop takes from the queue.
#[derive(Debug)]
pub enum Arrival {
    /// Subscribed.
    Connected {
        /// The session's number, for its acknowledgements.
        session: u64,
        /// What the messages are taken from: the same as before if nothing is missing.
        source: Option<Arc<str>>,
    },
    /// Messages, and the room they take in the queue.
    Batch(Batch, Room),
    /// Messages were dropped here.
    Dropped,
    /// Whether many messages wait at the broker.
    Behind(bool),
    /// The broker has answered.
    Pulse(Instant),
    /// The subscription is gone.
    Disconnected,
    /// Nothing: look at the other queue.
    Nudge,
    /// Everything before is taken: end.
    Stop,
}

/// Room in the queue, given back when dropped.
#[derive(Debug)]
pub struct Room {
    _permit: OwnedSemaphorePermit,
}

/// A batch of session `session` is done with.
#[derive(Clone, Copy, Debug)]
pub struct Ack {
    /// Which session it came in on.
    pub session: u64,
    /// What to acknowledge.
    pub token: AckToken,
}

/// What the session works with.
#[derive(Debug)]
pub struct Session {
    /// The settings in force; live ones may change.
    pub settings: watch::Receiver<Arc<Settings>>,
    /// To the ingest loop.
    pub arrivals: Sender<Arrival>,
    /// From the ingest loop.
    pub acks: mpsc::UnboundedReceiver<Ack>,
    /// Set to stop.
    pub stop: watch::Receiver<bool>,
    /// The exporter's own counters.
    pub telemetry: Arc<Telemetry>,
    /// For `/healthz`.
    pub health: Arc<Health>,
}

/// How often the broker is asked for a sign of life.
pub const PULSE: Duration = Duration::from_millis(500);
/// A session that was subscribed for so long was a healthy one.
const HEALTHY_AFTER: Duration = Duration::from_secs(60);
const FIRST_PAUSE: Duration = Duration::from_millis(250);
/// How long is waited for a connection to be made or closed in good order.
const PATIENCE: Duration = Duration::from_secs(1);
/// More messages than this waiting at the broker: what we hear is old news.
const MANY_WAITING: u32 = 1000;
/// Between two looks at our queue, and at what it hangs on, at the most.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// Every worker answers a `heartbeat`: however short its timeout, it is not asked more often.
const HEARTBEAT_PAUSE: Duration = Duration::from_millis(200);
/// How soon, and how often after that, the log tells of dropped messages.
const DROPS_TOLD_AFTER: Duration = Duration::from_secs(1);
const DROPS_TOLD_EVERY: Duration = Duration::from_secs(59);
/// Of `broker.amqp.queue_max_bytes`, in tenths: about there the broker drops the oldest messages. It does not say so.
const NEARLY_FULL: u64 = 8;
const FOR_EVER: Duration = Duration::from_secs(365 * 86_400);

impl Session {
    /// Runs until it is told to stop.
    pub async fn run(mut self) {
        let room = Arc::new(Semaphore::new(capacity(&self.settings.borrow())));
        let (telemetry, health) = (Arc::clone(&self.telemetry), Arc::clone(&self.health));
        let mut drops = Drops { telemetry: &telemetry, told: 0 };
        tokio::select! {
            () = self.connect_until_stopped(&room) => {}
            never = drops.tell_now_and_then() => match never {},
            never = keep_turning(&health) => match never {},
        }
        drops.tell();
        self.health.set_broker(BrokerStatus::Stopped);
        self.telemetry.connected.set(0);
    }

    async fn connect_until_stopped(&mut self, room: &Arc<Semaphore>) {
        let mut stop = self.stop.clone();
        let mut pause = Duration::ZERO;
        let (mut complaint, mut losses) = (Quiet::default(), Quiet::default());
        let (mut number, mut blind_since) = (0, None);
        while !is_stopped(&stop) {
            let tried = Instant::now();
            let connected = tokio::select! {
                connected = self.try_all(&mut complaint) => connected,
                // A connection is not dropped half made, unless it takes long: lapin's thread would be left with it.
                () = stopped_for(&mut stop, PATIENCE) => return,
            };
            // An attempt that took long has been its own pause.
            let mut rested = tried.elapsed();
            if let Some((url, subscription, control)) = connected {
                number += 1;
                self.subscribed(&url, &subscription, number, blind_since.take());
                let began = Instant::now();
                let (healthy, end) = self.listen(&url, subscription, control, room, number, &mut losses).await;
                blind_since = Some(end);
                rested = Duration::ZERO;
                if healthy || began.elapsed() >= HEALTHY_AFTER {
                    pause = Duration::ZERO;
                    complaint = Quiet::default();
                }
            }
            pause = (pause * 2).max(FIRST_PAUSE).min(self.settings.borrow().broker.reconnect_max);
            let rest = pause.mul_f64(0.5 + fastrand::f64() / 2.0).saturating_sub(rested);
            tokio::select! {
                () = sleep(rest) => {}
                _ = stop.wait_for(|stop| *stop) => {}
            }
        }
    }

    /// Tries each broker once.
    async fn try_all(&self, complaint: &mut Quiet) -> Option<(BrokerUrl, Subscription, Control)> {
        let settings = Arc::clone(&self.settings.borrow());
        let urls = match settings.broker.urls() {
            Ok(urls) => urls,
            Err(error) => {
                complain(complaint, "the broker's URL cannot be read, trying again", None, &error);
                return None;
            }
        };
        for url in urls.iter() {
            tracing::debug!(broker = %url, "connecting");
            match broker::connect(url, &urls, &settings).await {
                Ok((subscription, control)) => return Some((url.clone(), subscription, control)),
                Err(error) => complain(complaint, "cannot connect to the broker, trying again", Some(url), &error),
            }
        }
        None
    }

    fn subscribed(&self, url: &BrokerUrl, subscription: &Subscription, number: u64, blind_since: Option<Instant>) {
        tracing::info!(broker = %url, "listening for events on {}", subscription.describe());
        if let Some(since) = blind_since {
            let blind = since.elapsed().as_secs_f64();
            self.telemetry.reconnects.inc();
            self.telemetry.blind_seconds.inc_by(blind);
        }
        self.telemetry.connected.set(1);
        self.send(Arrival::Connected { session: number, source: subscription.source().map(Arc::from) });
        self.health.set_broker(BrokerStatus::Connected);
    }

    /// Works on one subscription until it ends. Whether any message came, and when it ended.
    async fn listen(
        &mut self,
        url: &BrokerUrl,
        subscription: Subscription,
        control: Control,
        room: &Arc<Semaphore>,
        number: u64,
        losses: &mut Quiet,
    ) -> (bool, Instant) {
        let mut heard = false;
        let reader = Reader {
            subscription,
            arrivals: &self.arrivals,
            room,
            capacity: capacity(&self.settings.borrow()),
            telemetry: &self.telemetry,
            health: &self.health,
            heard: &mut heard,
            gap: false,
        };
        let mut stop = self.stop.clone();
        let ticker = Ticker {
            control: &control,
            settings: self.settings.clone(),
            acks: &mut self.acks,
            telemetry: &self.telemetry,
            health: &self.health,
            number,
        };
        let error = tokio::select! {
            error = reader.run() => Some(error),
            error = ticker.run(&self.arrivals) => Some(error),
            _ = stop.wait_for(|stop| *stop) => None,
        };
        if let Some(error) = error {
            self.telemetry.cutoffs.inc();
            complain(losses, "the connection to the broker is lost, trying again", Some(url), &error);
        }
        let end = Instant::now();
        self.health.set_broker(BrokerStatus::Connecting);
        self.telemetry.connected.set(0);
        self.send(Arrival::Disconnected);
        // The answer is of no use; what counts is that the other side was told.
        let _ = timeout(PATIENCE, control.close()).await;
        (heard, end)
    }

    fn send(&self, arrival: Arrival) {
        send(&self.arrivals, arrival);
    }
}

/// Bytes in the queue. A semaphore hands out at most 2^32 - 1 permits at a time, and holds 2^61.
fn capacity(settings: &Settings) -> usize {
    settings.events.max_backlog.min(u32::MAX as usize)
}

/// The ingest loop outlives the session, unless it has died: then [`Health`] says so and there is nothing to add.
fn send(arrivals: &Sender<Arrival>, arrival: Arrival) {
    let _ = arrivals.send(arrival);
}

fn complain(complaint: &mut Quiet, what: &str, broker: Option<&BrokerUrl>, error: &dyn std::error::Error) {
    let broker = broker.map(ToString::to_string);
    let topic = format!("{what} {broker:?} {error}");
    if let Some(kept_back) = complaint.speak(&topic) {
        tracing::warn!(broker, %error, kept_back, "{what}");
    } else {
        tracing::debug!(broker, %error, "{what}");
    }
}

/// An exporter that was dropped without a word has nothing more to say: that is a stop, too.
fn is_stopped(stop: &watch::Receiver<bool>) -> bool {
    *stop.borrow() || stop.has_changed().is_err()
}

/// Ends so long after the stop.
async fn stopped_for(stop: &mut watch::Receiver<bool>, duration: Duration) {
    // An error is a stop, too: see `is_stopped`.
    let _ = stop.wait_for(|stop| *stop).await;
    sleep(duration).await;
}

/// Moves messages from the subscription to the queue.
struct Reader<'s> {
    subscription: Subscription,
    arrivals: &'s Sender<Arrival>,
    room: &'s Arc<Semaphore>,
    capacity: usize,
    telemetry: &'s Telemetry,
    health: &'s Health,
    heard: &'s mut bool,
    /// Messages were dropped since the last that was taken.
    gap: bool,
}

impl Reader<'_> {
    async fn run(mut self) -> Error {
        loop {
            let batch = match self.subscription.next().await {
                Ok(batch) => batch,
                Err(error) => return error,
            };
            *self.heard = true;
            self.telemetry.messages.inc_by(batch.messages.len() as u64);
            self.telemetry.message_bytes.inc_by(batch.bytes as u64);
            let Some((batch, room)) = self.make_room(batch).await else { continue };
            #[allow(clippy::cast_possible_wrap, reason = "bounded by max_backlog")]
            self.telemetry.backlog_bytes.add(batch.bytes as i64);
            self.health.queued();
            send(self.arrivals, Arrival::Batch(batch, room));
        }
    }

    /// Waits for room if the broker can wait, else drops what does not fit: all but one message beyond the bound.
    async fn make_room(&mut self, mut batch: Batch) -> Option<(Batch, Room)> {
        let gap = std::mem::take(&mut self.gap);
        let waits = self.subscription.can_wait();
        if !waits {
            self.drop_beyond(&mut batch);
        }
        if batch.messages.is_empty() {
            self.gap = true;
            return None;
        }
        if gap {
            send(self.arrivals, Arrival::Dropped);
        }
        let wanted = if waits { u32::try_from(batch.bytes.min(self.capacity)).unwrap_or(u32::MAX) } else { 0 };
        let permit = Arc::clone(self.room).acquire_many_owned(wanted).await.ok()?;
        Some((batch, Room { _permit: permit }))
    }

    fn drop_beyond(&mut self, batch: &mut Batch) {
        let queued = usize::try_from(self.telemetry.backlog_bytes.get()).unwrap_or(0);
        let available = self.capacity.saturating_sub(queued);
        let mut taken = 0;
        let fitting = batch.messages.iter().take_while(|message| {
            let fits = taken < available;
            taken += message.bytes.len();
            fits
        });
        let fitting = fitting.count();
        let count = (batch.messages.len() - fitting) as u64;
        if count > 0 {
            batch.truncate(fitting);
            self.telemetry.dropped.inc_by(count);
            // The gap is behind what still fitted: told before the next batch.
            self.gap = true;
        }
    }
}

/// Tells that this thread is not stuck.
async fn keep_turning(health: &Health) -> Infallible {
    loop {
        health.session_turned();
        sleep(PULSE).await;
    }
}

/// Tells of messages that were dropped: soon, then once a minute, and at the end.
struct Drops<'s> {
    telemetry: &'s Telemetry,
    told: u64,
}

impl Drops<'_> {
    async fn tell_now_and_then(&mut self) -> Infallible {
        loop {
            sleep(DROPS_TOLD_AFTER).await;
            if self.tell() {
                sleep(DROPS_TOLD_EVERY).await;
            }
        }
    }

    /// Whether there was something to tell.
    fn tell(&mut self) -> bool {
        let total = self.telemetry.dropped.get();
        let dropped = total - self.told;
        if dropped > 0 {
            tracing::warn!(
                dropped,
                dropped_total = total,
                "events come in faster than they are processed: events.max_backlog is reached and messages are dropped"
            );
            self.told = total;
        }
        dropped > 0
    }
}

/// Broadcasts, acknowledges, and looks after the subscription.
struct Ticker<'s> {
    control: &'s Control,
    settings: watch::Receiver<Arc<Settings>>,
    acks: &'s mut mpsc::UnboundedReceiver<Ack>,
    telemetry: &'s Telemetry,
    health: &'s Health,
    number: u64,
}

impl Ticker<'_> {
    /// Ends only with the connection. Broadcasts and acknowledgements do not wait for each other.
    async fn run(self, arrivals: &Sender<Arrival>) -> Error {
        let Self { control, settings, acks, telemetry, health, number } = self;
        tokio::select! {
            error = acknowledge(control, acks, number) => error,
            error = look_after(control, settings.clone(), arrivals, (telemetry, health)) => error,
            error = heartbeats(control, settings) => error,
            error = pulse(control, arrivals) => error,
            error = control.moved() => error,
        }
    }
}

async fn acknowledge(control: &Control, acks: &mut mpsc::UnboundedReceiver<Ack>, number: u64) -> Error {
    let mut acknowledged = 0;
    loop {
        let Some(mut last) = acks.recv().await else {
            // The ingest loop has ended: nothing will be acknowledged any more.
            return std::future::pending().await;
        };
        while let Ok(later) = acks.try_recv() {
            last = later;
        }
        // Two threads send them, and an old one after a newer one would be an error to the broker.
        if last.session == number && last.token.0 > acknowledged {
            acknowledged = last.token.0;
            if let Err(error) = control.acknowledge(last.token).await {
                return error;
            }
        }
    }
}

/// Every `events.enable_interval`: `enable_events` for workers that have come since, and a look at the topology.
async fn look_after(
    control: &Control,
    mut settings: watch::Receiver<Arc<Settings>>,
    arrivals: &Sender<Arrival>,
    (telemetry, health): (&Telemetry, &Health),
) -> Error {
    let mut complaint = Quiet::default();
    let mut was_behind = false;
    let mut unjudged = control.found_waiting();
    let mut enabled_at: Option<Instant> = None;
    loop {
        let standing = match control.refresh().await {
            Ok(standing) => standing,
            Err(error) => return error,
        };
        health.set_other_consumers(standing.consumers.saturating_sub(1));
        let is_behind = standing.waiting > MANY_WAITING;
        if is_behind != was_behind {
            send(arrivals, Arrival::Behind(is_behind));
            was_behind = is_behind;
        }
        let now = Arc::clone(&settings.borrow_and_update());
        // What waited when we came is judged once we have seen a message.
        let waiting = standing.waiting.max(std::mem::take(&mut unjudged));
        if telemetry.messages.get() == 0 {
            unjudged = waiting;
        }
        if is_nearly_full(waiting, telemetry, &now)
            && let Some(kept_back) = complaint.speak("full")
        {
            tracing::warn!(
                waiting,
                kept_back,
                "our queue at RabbitMQ is full, or nearly: beyond broker.amqp.queue_max_bytes it drops the oldest events"
            );
        }
        let (events, limit) = (&now.events, now.broker.connect_timeout);
        if events.enable_events && enabled_at.is_none_or(|at| at.elapsed() >= events.enable_interval) {
            broadcast(control, Broadcast::EnableEvents, limit, &mut complaint).await;
            enabled_at = Some(Instant::now());
        }
        let rest = match enabled_at {
            Some(at) if events.enable_events => events.enable_interval.saturating_sub(at.elapsed()),
            _ => events.enable_interval,
        };
        pause(rest.min(LOOK_EVERY), &mut settings, |now| {
            (now.events.enable_events, now.events.enable_interval) != (events.enable_events, events.enable_interval)
        })
        .await;
    }
}

/// By the mean size of the messages so far.
fn is_nearly_full(waiting: u32, telemetry: &Telemetry, settings: &Settings) -> bool {
    let (messages, bytes) = (telemetry.messages.get(), telemetry.message_bytes.get());
    let mean = bytes.checked_div(messages).unwrap_or(0);
    mean * u64::from(waiting) >= settings.broker.amqp.queue_max_bytes / 10 * NEARLY_FULL && waiting > 0
}

/// Asks the broker for a sign of life: while it gives none, silence of the workers means nothing.
async fn pulse(control: &Control, arrivals: &Sender<Arrival>) -> Error {
    let mut complaint = Quiet::default();
    loop {
        let asked = Instant::now();
        match control.pulse().await {
            Ok(()) => send(arrivals, Arrival::Pulse(asked)),
            Err(silent @ Error::Silent(_)) => return silent,
            // Whether the subscription has suffered is for the subscription to say.
            Err(error) => {
                complain(&mut complaint, "no sign of life from the broker: no worker is timed out", None, &error);
            }
        }
        sleep(PULSE).await;
    }
}

/// On connecting, and every third of `state.worker_timeout`: so that workers that send no heartbeats are heard.
async fn heartbeats(control: &Control, mut settings: watch::Receiver<Arc<Settings>>) -> Error {
    let mut complaint = Quiet::default();
    let mut first = true;
    loop {
        let now = Arc::clone(&settings.borrow_and_update());
        let (enabled, timeout) = (now.events.enable_events, now.state.worker_timeout);
        if enabled && (first || timeout.is_some()) {
            broadcast(control, Broadcast::Heartbeat, now.broker.connect_timeout, &mut complaint).await;
        }
        first = false;
        let changed = |now: &Settings| (now.events.enable_events, now.state.worker_timeout) != (enabled, timeout);
        pause(timeout.map_or(FOR_EVER, |timeout| (timeout / 3).max(HEARTBEAT_PAUSE)), &mut settings, changed).await;
    }
}

async fn broadcast(control: &Control, command: Broadcast, limit: Duration, complaint: &mut Quiet) {
    let sent = timeout(limit, control.broadcast(command)).await;
    match sent.unwrap_or_else(|_| Err(control.hindrance().unwrap_or(Error::Silent(limit)))) {
        Ok(()) => tracing::trace!(command = command.method(), "broadcast"),
        Err(error) => {
            let what = format!("the broadcast of {} to the workers failed", command.method());
            complain(complaint, &what, None, &error);
        }
    }
}

/// Waits, but not on when the settings have `changed` meanwhile.
async fn pause(duration: Duration, settings: &mut watch::Receiver<Arc<Settings>>, changed: impl Fn(&Settings) -> bool) {
    tokio::select! {
        () = sleep(duration) => {}
        changed = settings.wait_for(|now| changed(now)) => {
            if changed.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }
}
