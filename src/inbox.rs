//! The inbox of the ingest loop: a buffer that is bounded in bytes, its messages, and the handle to send into it.
//!
//! The session, the store and HTTP send into it. It alone enforces the limit: `RabbitMQ` waits for room
//! ([`Inbox::reserve`]); Redis cannot wait, so messages that do not fit are dropped ([`Inbox::truncate_to_capacity`]).
//! It does not depend on any broker.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::Notify;

use crate::celery::envelope::DecodeFailure;
use crate::observability::{GapCause, Health, SelfMetrics};

/// The ingest loop is behind if more bytes than this are in the buffer, and has caught up if at most half of them are.
const BEHIND: usize = 1 << 20;
const CAUGHT_UP: usize = BEHIND / 2;

/// How a message's bytes are encoded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Encoding {
    /// kombu's JSON envelope around the body.
    KombuEnvelope,
    /// The body itself.
    RawBody,
    /// It cannot be decoded. `bytes` holds the message or its beginning, for the log.
    Undecodable(DecodeFailure),
    /// There is no payload: the message is a witness, and its bytes are its ID, if it has one.
    Witness(Witness),
}

/// A message that an exporter sent on the path of the events. Every event that the broker received earlier comes before
/// it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Witness {
    /// When it was sent. `None` if it is of an earlier session or of another exporter.
    pub sent: Option<Instant>,
    /// Whether the broker dropped messages between the witness before and this one.
    pub is_after_gap: bool,
}

/// What the session must know about workers that start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WorkerStarts {
    /// When the last worker started. `None` if every worker that started lately has sent a task event.
    pub last: Option<Instant>,
}

/// A queue that keeps its messages between two sessions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedQueue {
    /// Its virtual host and name.
    pub name: Arc<str>,
    /// Whether it existed before the session.
    pub existed: bool,
    /// The heartbeat interval of the connection.
    pub heartbeat: Duration,
}

/// One message of the broker. It holds one event or a list of events.
#[derive(Clone, Debug)]
pub struct Message {
    /// The payload as received.
    pub bytes: Bytes,
    /// How to decode the payload.
    pub encoding: Encoding,
    /// Whether the broker has delivered it before (AMQP's `redelivered`).
    pub redelivered: bool,
}

impl Message {
    /// A witness of this session, without an ID.
    #[must_use]
    pub fn witness(sent: Instant) -> Self {
        let witness = Witness { sent: Some(sent), is_after_gap: false };
        Self { bytes: Bytes::new(), encoding: Encoding::Witness(witness), redelivered: false }
    }

    /// Whether it is a witness, and no message of a worker or client.
    #[must_use]
    pub fn is_witness(&self) -> bool {
        matches!(self.encoding, Encoding::Witness(_))
    }
}

/// AMQP's delivery tag. Acknowledging it acknowledges every message up to it on its channel (`multiple`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct DeliveryTag(pub u64);

/// Messages that were received together.
#[derive(Clone, Debug)]
pub struct Batch {
    /// In order of arrival.
    pub messages: Vec<Message>,
    /// The size of all messages.
    pub bytes: usize,
    /// When the batch was received.
    pub arrived: Instant,
    /// The tag to acknowledge once the batch is processed. `None` on Redis.
    pub ack: Option<DeliveryTag>,
}

impl Batch {
    /// A batch that arrives now.
    #[must_use]
    pub fn new(messages: Vec<Message>, ack: Option<DeliveryTag>) -> Self {
        let bytes = size_of_all(&messages);
        Self { messages, bytes, arrived: Instant::now(), ack }
    }

    /// How many messages with a payload it has. Witnesses have none.
    #[must_use]
    pub fn payload_count(&self) -> usize {
        self.messages.iter().filter(|message| !message.is_witness()).count()
    }

    /// Keeps the first `count` messages.
    fn truncate(&mut self, count: usize) {
        self.messages.truncate(count);
        self.bytes = size_of_all(&self.messages);
    }
}

fn size_of_all(messages: &[Message]) -> usize {
    messages.iter().map(|message| message.bytes.len()).sum()
}

/// An acknowledgment for one session's connection.
#[derive(Clone, Copy, Debug)]
pub struct Ack {
    /// The number of the session that received the batch.
    pub session: u64,
    /// What to acknowledge.
    pub tag: DeliveryTag,
}

/// Receives the result of a request.
pub type ReplyFn<T> = Box<dyn FnOnce(T) + Send>;

/// What the ingest loop receives.
#[derive(Debug)]
pub enum IngestMessage {
    /// A session is subscribed.
    Connected {
        /// The session's number, for its acknowledgments.
        session: u64,
        /// The named queue. `None` if the broker keeps nothing between two sessions.
        queue: Option<NamedQueue>,
        /// Why events are missing if there was a session before and there is no named queue.
        disconnect_cause: GapCause,
    },
    /// Messages, and the room they take up in the buffer.
    Batch(Batch, BufferPermit),
    /// This many messages were dropped at this point.
    Gap(usize),
    /// The subscription has ended.
    Disconnected,
    /// Wakes the loop, which then checks its queries and the store.
    Wake,
    /// The loop processes everything sent before this message and ends.
    Stop,
}

/// The sending side of the inbox. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Inbox {
    messages: Sender<IngestMessage>,
    buffer: Arc<Buffer>,
}

#[derive(Debug)]
struct Buffer {
    limit: usize,
    bytes: AtomicUsize,
    freed: Notify,
    caught_up: Notify,
    dropped: Notify,
    received_messages: AtomicU64,
    received_bytes: AtomicU64,
    dropped_messages: AtomicU64,
    self_metrics: Arc<SelfMetrics>,
    health: Arc<Health>,
}

impl Inbox {
    /// An inbox whose buffer holds `limit` bytes of messages (`events.buffer_max_bytes`), and its receiving side.
    #[must_use]
    pub fn new(limit: usize, self_metrics: Arc<SelfMetrics>, health: Arc<Health>) -> (Self, Receiver<IngestMessage>) {
        let (messages, receiver) = channel();
        self_metrics.buffer_limit_bytes.set(i64::try_from(limit).unwrap_or(i64::MAX));
        let buffer = Buffer {
            limit,
            bytes: AtomicUsize::new(0),
            freed: Notify::new(),
            caught_up: Notify::new(),
            dropped: Notify::new(),
            received_messages: AtomicU64::new(0),
            received_bytes: AtomicU64::new(0),
            dropped_messages: AtomicU64::new(0),
            self_metrics,
            health,
        };
        (Self { messages, buffer: Arc::new(buffer) }, receiver)
    }

    /// Sends a message that takes up no room in the buffer.
    pub fn send(&self, message: IngestMessage) {
        // The ingest loop outlives the senders. If it has failed, `Health` reports that.
        let _ = self.messages.send(message);
    }

    /// Sends a batch with the room that was reserved for it.
    pub fn send_batch(&self, batch: Batch, permit: BufferPermit) {
        self.send(IngestMessage::Batch(batch, permit));
    }

    /// Waits until the batch fits, or until the buffer is empty, because a batch may be larger than the buffer. For one
    /// caller at a time. Cancellation reserves nothing.
    pub async fn reserve(&self, batch: &Batch) -> BufferPermit {
        self.buffer.record_received(batch);
        loop {
            let freed = self.buffer.freed.notified();
            if self.buffer.used() == 0 || self.buffer.used() + batch.bytes <= self.buffer.limit {
                return BufferPermit::new(&self.buffer, batch.bytes);
            }
            freed.await;
        }
    }

    /// Drops the messages beyond the limit. The message that reaches the limit is kept.
    /// Returns the room for the rest, and how many messages were dropped.
    pub fn truncate_to_capacity(&self, batch: &mut Batch) -> (BufferPermit, usize) {
        self.buffer.record_received(batch);
        let available = self.buffer.limit.saturating_sub(self.buffer.used());
        let mut used = 0;
        let fits = |message: &&Message| {
            let has_room = used < available;
            used += message.bytes.len();
            has_room
        };
        let received = batch.payload_count();
        let kept = batch.messages.iter().take_while(fits).count();
        batch.truncate(kept);
        let dropped = received - batch.payload_count();
        if dropped > 0 {
            self.buffer.record_dropped(dropped as u64);
        }
        (BufferPermit::new(&self.buffer, batch.bytes), dropped)
    }

    /// Whether so much is in the buffer that the ingest loop should catch up.
    #[must_use]
    pub fn is_behind(&self) -> bool {
        self.buffer.used() > BEHIND
    }

    /// Waits until little is in the buffer. For one caller at a time.
    pub async fn caught_up(&self) {
        while self.buffer.used() > CAUGHT_UP {
            self.buffer.caught_up.notified().await;
        }
    }

    /// Waits until messages are dropped. For one caller at a time.
    pub async fn messages_dropped(&self) {
        self.buffer.dropped.notified().await;
    }

    /// How many messages were dropped so far.
    #[must_use]
    pub fn dropped_messages(&self) -> u64 {
        self.buffer.dropped_messages.load(Ordering::Relaxed)
    }

    /// The mean size of the messages so far, in bytes. `None` before the first one.
    #[must_use]
    pub fn mean_message_size(&self) -> Option<u64> {
        let [bytes, messages] =
            [&self.buffer.received_bytes, &self.buffer.received_messages].map(|total| total.load(Ordering::Relaxed));
        bytes.checked_div(messages)
    }
}

impl Buffer {
    fn used(&self) -> usize {
        self.bytes.load(Ordering::Acquire)
    }

    fn record_received(&self, batch: &Batch) {
        let messages = batch.payload_count() as u64;
        let received = batch.messages.iter().filter(|message| !message.is_witness());
        let bytes: usize = received.map(|message| message.bytes.len()).sum();
        let bytes = bytes as u64;
        self.received_messages.fetch_add(messages, Ordering::Relaxed);
        self.received_bytes.fetch_add(bytes, Ordering::Relaxed);
        self.self_metrics.received_messages.inc_by(messages);
        self.self_metrics.received_bytes.inc_by(bytes);
    }

    fn record_dropped(&self, messages: u64) {
        self.dropped_messages.fetch_add(messages, Ordering::Relaxed);
        self.self_metrics.dropped.inc_by(messages);
        self.dropped.notify_one();
    }

    #[allow(clippy::cast_possible_wrap, reason = "bounded by events.buffer_max_bytes and one message")]
    fn report(&self, bytes: usize) {
        self.self_metrics.buffer_bytes.set(bytes as i64);
    }
}

/// Room in the buffer for one batch, given back when dropped.
#[derive(Debug)]
pub struct BufferPermit {
    buffer: Arc<Buffer>,
    bytes: usize,
}

impl BufferPermit {
    fn new(buffer: &Arc<Buffer>, bytes: usize) -> Self {
        let before = buffer.bytes.fetch_add(bytes, Ordering::AcqRel);
        buffer.report(before + bytes);
        buffer.health.batch_enqueued();
        Self { buffer: Arc::clone(buffer), bytes }
    }
}

impl Drop for BufferPermit {
    fn drop(&mut self) {
        let before = self.buffer.bytes.fetch_sub(self.bytes, Ordering::AcqRel);
        self.buffer.report(before - self.bytes);
        self.buffer.health.batch_processed();
        self.buffer.freed.notify_one();
        if before > CAUGHT_UP && before - self.bytes <= CAUGHT_UP {
            self.buffer.caught_up.notify_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    fn inbox(limit: usize) -> (Inbox, Receiver<IngestMessage>) {
        let self_metrics = SelfMetrics::new().unwrap();
        Inbox::new(limit, self_metrics.into(), Health::default().into())
    }

    fn batch(sizes: &[usize]) -> Batch {
        let message =
            |size: &usize| Message { bytes: vec![0; *size].into(), encoding: Encoding::RawBody, redelivered: false };
        Batch::new(sizes.iter().map(message).collect(), None)
    }

    #[test]
    fn reserve_waits_until_the_batch_fits() {
        let (inbox, _receiver) = inbox(100);
        let first = inbox.reserve(&batch(&[60])).now_or_never().unwrap();
        let second = batch(&[50]);
        let mut waiting = Box::pin(inbox.reserve(&second));
        assert!(waiting.as_mut().now_or_never().is_none(), "60 of 100 bytes are in use");
        drop(first);
        drop(waiting.now_or_never().expect("the buffer is empty"));
        assert_eq!(inbox.buffer.used(), 0);
    }

    #[test]
    fn reserve_admits_a_batch_larger_than_the_buffer_when_it_is_empty() {
        let (inbox, _receiver) = inbox(100);
        let large = inbox.reserve(&batch(&[500])).now_or_never().unwrap();
        assert!(inbox.reserve(&batch(&[1])).now_or_never().is_none());
        drop(large);
        assert!(inbox.reserve(&batch(&[1])).now_or_never().is_some());
    }

    #[test]
    fn truncation_exceeds_the_limit_by_one_message_at_most() {
        let (inbox, _receiver) = inbox(100);
        let mut first = batch(&[40, 40, 40, 40]);
        let (permit, dropped) = inbox.truncate_to_capacity(&mut first);
        assert_eq!((first.messages.len(), first.bytes, dropped), (3, 120, 1));
        let mut second = batch(&[1, 1]);
        let (_empty_permit, dropped) = inbox.truncate_to_capacity(&mut second);
        assert_eq!((second.messages.len(), dropped), (0, 2), "the buffer is full");
        drop(permit);
        let mut third = batch(&[1, 1]);
        assert_eq!(inbox.truncate_to_capacity(&mut third).1, 0);
    }

    #[test]
    fn the_gauges_show_the_bytes_in_the_buffer_and_its_limit() {
        let self_metrics = Arc::new(SelfMetrics::new().unwrap());
        let (inbox, receiver) = Inbox::new(100, Arc::clone(&self_metrics), Health::default().into());
        let batch = batch(&[30, 12]);
        let permit = inbox.reserve(&batch).now_or_never().unwrap();
        inbox.send_batch(batch, permit);
        assert_eq!((self_metrics.buffer_bytes.get(), self_metrics.buffer_limit_bytes.get()), (42, 100));
        drop(receiver.recv().unwrap());
        assert_eq!(self_metrics.buffer_bytes.get(), 0);
    }
}
