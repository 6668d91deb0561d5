//! What Celery puts on the wire, as pure functions: no I/O, no clock.
//!
//! [`envelope`] opens the JSON object that kombu wraps around a message on Redis, [`event`] reads the events in a
//! message body, [`control`] writes the broadcasts that workers obey. Everything that does not fit becomes a
//! [`Reject`], the reason it is counted under.

pub mod control;
pub mod envelope;
pub mod event;
mod json;
mod name;
mod scan;

pub use control::Broadcast;
pub use event::{Event, EventKind};
pub use name::cut;

/// Why a message, or one event of a batch, was not counted. The names are the `reason` label of
/// `flower_exporter_rejected_total`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reject {
    /// The message is larger than `events.max_message`.
    TooLarge,
    /// On Redis: not the JSON object that kombu wraps around every message.
    Envelope,
    /// The body is not JSON by its `content-type`: pickle, yaml and msgpack are refused by name.
    ContentType,
    /// A `compression` header: Celery never sets it on events.
    Compression,
    /// The body claims to be base64 and is not.
    Base64,
    /// The body, or one element of a batch, is not JSON.
    Json,
    /// JSON, but neither an object nor a list of objects.
    NotAnEvent,
    /// No `type`, or one that is not text.
    NoType,
    /// No `hostname`, or one that is not text.
    NoHostname,
    /// No numeric `timestamp`; only `worker-…` events may lack it.
    NoTimestamp,
    /// A `task-…` event without a `uuid`.
    NoUuid,
}

impl Reject {
    /// Every reason, in the order of [`Reject::index`].
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

    /// The position in [`Reject::ALL`].
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
