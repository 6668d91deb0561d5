//! Celery's wire format: kombu envelopes, events and control broadcasts.
//! Every function is pure: no I/O, no clock, no logging, no shared state.
//!
//! [`envelope`] opens the JSON object that kombu wraps around a message on Redis. [`event`] decodes the events in a
//! message body. [`control`] encodes the broadcasts that workers execute. A message or event that cannot be decoded is
//! invalid, and [`DecodeError`] is the reason.

pub mod control;
pub mod envelope;
pub mod event;
mod json;
mod task_id;
mod truncate;

pub use control::Broadcast;
pub use event::{Event, EventKind};
pub use task_id::TaskId;
pub use truncate::truncate_label;

/// Why a message, or one event of a message, is invalid. [`as_str`](Self::as_str) is the `reason` label of
/// `flower_exporter_invalid_messages_total`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DecodeError {
    /// The message is larger than `events.message_max_bytes`.
    TooLarge,
    /// On Redis: not the JSON object that kombu wraps around every message.
    Envelope,
    /// The `content-type` is not JSON but, for example, pickle, YAML or msgpack.
    ContentType,
    /// The message has a `compression` header, which Celery never sets on events.
    Compression,
    /// The body is declared as base64 but is not.
    Base64,
    /// The body, or one element of its array, is not JSON.
    Json,
    /// The body is JSON, but neither an object nor an array of objects.
    NotAnEvent,
    /// The event has no `type`, or one that is not a string.
    NoType,
    /// The event has no `hostname`, or one that is not a string.
    NoHostname,
    /// The event has no numeric `timestamp`. Only `worker-…` events may lack it.
    NoTimestamp,
    /// The event is a `task-…` event without a `uuid`.
    NoUuid,
}

impl DecodeError {
    /// Every reason, in the order of [`DecodeError::index`].
    pub const ALL: [Self; 11] = [
        Self::TooLarge,
        Self::Envelope,
        Self::ContentType,
        Self::Compression,
        Self::Base64,
        Self::Json,
        Self::NotAnEvent,
        Self::NoType,
        Self::NoHostname,
        Self::NoTimestamp,
        Self::NoUuid,
    ];

    /// The position in [`DecodeError::ALL`].
    #[must_use]
    pub const fn index(self) -> usize {
        self as usize
    }

    /// The reason as a label value.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::TooLarge => "too_large",
            Self::Envelope => "envelope",
            Self::ContentType => "content_type",
            Self::Compression => "compression",
            Self::Base64 => "base64",
            Self::Json => "json",
            Self::NotAnEvent => "not_an_event",
            Self::NoType => "no_type",
            Self::NoHostname => "no_hostname",
            Self::NoTimestamp => "no_timestamp",
            Self::NoUuid => "no_uuid",
        }
    }
}
