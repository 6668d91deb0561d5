//! Celery events, borrowed from the message that contains them (`celery.events.event.Event`).
//! Decoding is pure, and an invalid event does not affect the other events of its message.

mod decode;
#[cfg(test)]
mod tests;

use std::borrow::Cow;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::de::DeserializeSeed;

pub use decode::{decode, decode_slow_path};

use super::json::{self, FieldSeed};

/// The kind of an event, derived from its `type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "Celery's own names")]
#[non_exhaustive]
pub enum EventKind {
    TaskSent,
    TaskReceived,
    TaskStarted,
    TaskSucceeded,
    TaskFailed,
    TaskRetried,
    TaskRevoked,
    TaskRejected,
    /// Sent by Celery 5.1 and later.
    TaskCancelled,
    /// A `task-…` event that Celery does not define. User code may send one.
    TaskCustom,
    WorkerOnline,
    WorkerHeartbeat,
    WorkerOffline,
    /// A `worker-…` event that Celery does not define.
    WorkerCustom,
    /// An event of any other group. It is not counted, as in Flower, and shows only that its sender is alive.
    Other,
}

impl EventKind {
    /// The number of kinds.
    pub(crate) const COUNT: usize = Self::Other as usize + 1;

    /// The kind for a `type`, for example `task-received`.
    #[must_use]
    pub fn from_type(event_type: &str) -> Self {
        match event_type {
            "task-sent" => Self::TaskSent,
            "task-received" => Self::TaskReceived,
            "task-started" => Self::TaskStarted,
            "task-succeeded" => Self::TaskSucceeded,
            "task-failed" => Self::TaskFailed,
            "task-retried" => Self::TaskRetried,
            "task-revoked" => Self::TaskRevoked,
            "task-rejected" => Self::TaskRejected,
            "task-cancelled" => Self::TaskCancelled,
            "worker-online" => Self::WorkerOnline,
            "worker-heartbeat" => Self::WorkerHeartbeat,
            "worker-offline" => Self::WorkerOffline,
            _ if event_type.starts_with("task-") => Self::TaskCustom,
            _ if event_type.starts_with("worker-") => Self::WorkerCustom,
            _ => Self::Other,
        }
    }

    /// Whether the event is about a task.
    #[must_use]
    pub const fn is_task(self) -> bool {
        (self as u8) <= (Self::TaskCustom as u8)
    }

    /// Whether the kind stands for several types.
    pub(crate) const fn is_custom(self) -> bool {
        matches!(self, Self::TaskCustom | Self::WorkerCustom | Self::Other)
    }

    /// Whether the event is about the worker that sent it.
    #[must_use]
    pub const fn is_worker(self) -> bool {
        matches!(self, Self::WorkerOnline | Self::WorkerHeartbeat | Self::WorkerOffline | Self::WorkerCustom)
    }
}

/// The `eta` of a task event. An eta that is null or empty replaces an earlier one. An absent eta does not.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub enum Eta<'a> {
    /// The event has no `eta` field.
    #[default]
    Absent,
    /// The field is null or empty.
    None,
    /// A date and time as Celery wrote it, in ISO 8601.
    At(Cow<'a, str>),
}

/// One event. Fields of an unexpected type read as absent. Numbers are finite.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Event<'a> {
    /// The kind, derived from `type`.
    pub kind: EventKind,
    /// `type`, for example `task-received`.
    pub event_type: Cow<'a, str>,
    /// The sender: a worker's node name, or `gen<pid>@host` of a client.
    pub hostname: Cow<'a, str>,
    /// Unix time in seconds, by the sender's clock. Only worker events may lack it.
    pub(crate) timestamp: Option<f64>,
    /// The task's ID. Every task event has one, and it is empty on other events without a `uuid`.
    pub uuid: Cow<'a, str>,
    /// The task's name, if the event has one that is not empty.
    pub name: Option<Cow<'a, str>>,
    /// When the task is to run.
    pub eta: Eta<'a>,
    /// The runtime in seconds, on `task-succeeded`.
    pub(crate) runtime: Option<f64>,
    /// The number of retries so far, on `task-sent` and `task-received`.
    pub retries: Option<u32>,
    /// Whether the running task was terminated, on `task-revoked`.
    pub terminated: bool,
    /// The number of tasks that the worker is executing.
    pub active: Option<f64>,
    /// The number of tasks that the worker has accepted since it started.
    pub processed: Option<f64>,
    /// The heartbeat interval in seconds.
    pub(crate) freq: Option<f64>,
    /// The load average of the worker's host over 1, 5 and 15 minutes.
    pub loadavg: Option<[f64; 3]>,
    /// The worker's software, for example `py-celery`.
    pub sw_ident: Option<Cow<'a, str>>,
    /// The version of that software.
    pub sw_ver: Option<Cow<'a, str>>,
    /// The worker's operating system.
    pub sw_sys: Option<Cow<'a, str>>,
    raw: Option<&'a [u8]>,
}

impl<'a> Event<'a> {
    /// When the event was sent, by the sender's clock. Only worker events may lack it.
    #[must_use]
    pub fn timestamp(&self) -> Option<SystemTime> {
        self.timestamp.and_then(system_time)
    }

    /// The runtime, on `task-succeeded`.
    #[must_use]
    pub fn runtime(&self) -> Option<Duration> {
        Duration::try_from_secs_f64(self.runtime?).ok()
    }

    /// The worker's heartbeat interval.
    #[must_use]
    pub fn freq(&self) -> Option<Duration> {
        Duration::try_from_secs_f64(self.freq?).ok()
    }

    /// A field of the event by name, as JSON text. `None` if the event does not have it.
    ///
    /// Each call parses the event's text again. It is meant for the few events that an observer is interested in.
    #[must_use]
    pub fn field(&self, name: &str) -> Option<String> {
        self.value(name).map(|value| value.to_string())
    }

    /// Also `None` if the event's text was not kept.
    fn value(&self, name: &str) -> Option<serde_json::Value> {
        let raw = self.raw?;
        let read = FieldSeed::new(name).deserialize(&mut serde_json::Deserializer::from_slice(raw));
        // Decoding does not validate the values that it skips, so one of them may not be valid JSON.
        let read = read.or_else(|_| {
            let sanitized = json::sanitize(raw);
            FieldSeed::new(name).deserialize(&mut serde_json::Deserializer::from_str(&sanitized))
        });
        read.ok()?
    }

    /// The Python repr of the positional arguments, on `task-sent` and `task-received`.
    #[must_use]
    pub fn args(&self) -> Option<String> {
        self.text("args")
    }

    /// The Python repr of the keyword arguments, on `task-sent` and `task-received`.
    #[must_use]
    pub fn kwargs(&self) -> Option<String> {
        self.text("kwargs")
    }

    /// The Python repr of the result, on `task-succeeded`.
    #[must_use]
    pub fn result(&self) -> Option<String> {
        self.text("result")
    }

    /// The Python repr of the exception, on `task-failed` and `task-retried`.
    #[must_use]
    pub fn exception(&self) -> Option<String> {
        self.text("exception")
    }

    /// The traceback, on `task-failed` and `task-retried`.
    #[must_use]
    pub fn traceback(&self) -> Option<String> {
        self.text("traceback")
    }

    /// A field of the event by name, if it is a string. See [`Event::field`].
    #[must_use]
    pub fn text(&self, name: &str) -> Option<String> {
        match self.value(name)? {
            serde_json::Value::String(text) => Some(text),
            _ => None,
        }
    }

    /// The event's JSON text, if it was kept. The exporter keeps it if there is an observer.
    #[must_use]
    pub fn raw(&self) -> Option<&'a [u8]> {
        self.raw
    }
}

/// A Unix time in seconds. `None` if it is out of range.
pub(crate) fn system_time(seconds: f64) -> Option<SystemTime> {
    let distance = Duration::try_from_secs_f64(seconds.abs()).ok()?;
    if seconds < 0.0 { UNIX_EPOCH.checked_sub(distance) } else { UNIX_EPOCH.checked_add(distance) }
}
