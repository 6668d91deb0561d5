//! Celery events, borrowed from the message that contains them (`celery.events.event.Event`).
//! Decoding is pure, and an invalid event does not affect the other events of its message.

#[cfg(test)]
mod tests;

use std::borrow::Cow;
use std::fmt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::de::{Deserialize, DeserializeSeed, Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

use super::DecodeError;
use super::json::fast_json::{self, Scanner};
use super::json::{self, FieldSeed, Key, Scalar, SerdeReader, ValueReader};

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

/// Decodes a message body, which is one event or a list of events, and calls `each` with every event in order. An
/// invalid element is passed to `each` as an error and does not affect the others.
///
/// With `keep_raw`, each event keeps a reference to its JSON text, which [`Event::field`] requires.
pub fn decode(body: &[u8], keep_raw: bool, each: impl FnMut(Result<Event<'_>, DecodeError>)) {
    let text = body.trim_ascii_start();
    decode_list(text, fast_json::printable_ascii(text), keep_raw, each);
}

/// [`decode`] without the fast path. Tests and fuzz targets compare the two.
#[doc(hidden)]
pub fn decode_slow_path(body: &[u8], keep_raw: bool, each: impl FnMut(Result<Event<'_>, DecodeError>)) {
    decode_list(body.trim_ascii_start(), None, keep_raw, each);
}

/// `ascii` is `text` again if it is printable ASCII and the fast path may be tried.
fn decode_list(text: &[u8], ascii: Option<&str>, keep_raw: bool, mut each: impl FnMut(Result<Event<'_>, DecodeError>)) {
    let scan = |start: usize| ascii.and_then(|ascii| Fields::scan(&ascii[start..]));
    let Some(list) = text.strip_prefix(b"[") else {
        return match scan(0) {
            Some((fields, length)) if length == text.len() => each(fields.into_event(keep_raw.then_some(text))),
            _ => decode_element(text, keep_raw, &mut each),
        };
    };
    json::for_each_element(list, |start| match scan(start + 1) {
        Some((fields, length)) if matches!(list.get(start + length), Some(b',' | b']')) => {
            let end = start + length;
            each(fields.into_event(keep_raw.then_some(&list[start..end])));
            end
        }
        _ => {
            let end = start + json::element_length(&list[start..]);
            decode_element(&list[start..end], keep_raw, &mut each);
            end
        }
    });
}

fn decode_element(text: &[u8], keep_raw: bool, each: &mut impl FnMut(Result<Event<'_>, DecodeError>)) {
    if let Ok(fields) = serde_json::from_slice::<Fields>(text) {
        return each(fields.into_event(keep_raw.then_some(text)));
    }
    let sanitized = json::sanitize(text);
    match serde_json::from_str::<Fields>(&sanitized) {
        Ok(fields) => each(fields.into_event(keep_raw.then_some(sanitized.as_bytes()))),
        Err(_) if serde_json::from_str::<&RawValue>(&sanitized).is_ok() => each(Err(DecodeError::NotAnEvent)),
        Err(_) => each(Err(DecodeError::Json)),
    }
}

/// The fields of an object that may not be an event.
#[derive(Default)]
struct Fields<'a> {
    event_type: Option<Cow<'a, str>>,
    hostname: Option<Cow<'a, str>>,
    timestamp: Option<f64>,
    uuid: Option<Cow<'a, str>>,
    name: Option<Cow<'a, str>>,
    eta: Eta<'a>,
    runtime: Option<f64>,
    retries: Option<u32>,
    terminated: bool,
    active: Option<f64>,
    processed: Option<f64>,
    freq: Option<f64>,
    loadavg: Option<[f64; 3]>,
    sw_ident: Option<Cow<'a, str>>,
    sw_ver: Option<Cow<'a, str>>,
    sw_sys: Option<Cow<'a, str>>,
}

impl<'a> Fields<'a> {
    /// Checks that the mandatory fields are present.
    fn into_event<'r>(self, raw: Option<&'r [u8]>) -> Result<Event<'r>, DecodeError>
    where
        'a: 'r,
    {
        let event_type = self.event_type.ok_or(DecodeError::NoType)?;
        let kind = EventKind::from_type(&event_type);
        let hostname = self.hostname.ok_or(DecodeError::NoHostname)?;
        if self.timestamp.is_none() && !kind.is_worker() {
            return Err(DecodeError::NoTimestamp);
        }
        if self.uuid.is_none() && kind.is_task() {
            return Err(DecodeError::NoUuid);
        }
        Ok(Event {
            kind,
            event_type,
            hostname,
            timestamp: self.timestamp,
            uuid: self.uuid.unwrap_or_default(),
            name: self.name,
            eta: self.eta,
            runtime: self.runtime,
            retries: self.retries,
            terminated: self.terminated,
            active: self.active,
            processed: self.processed,
            freq: self.freq,
            loadavg: self.loadavg,
            sw_ident: self.sw_ident,
            sw_ver: self.sw_ver,
            sw_sys: self.sw_sys,
            raw,
        })
    }
}

impl<'de> Deserialize<'de> for Fields<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct FieldsVisitor;

        impl<'de> Visitor<'de> for FieldsVisitor {
            type Value = Fields<'de>;

            fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
                formatter.write_str("an event")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut fields = Fields::default();
                while let Some(Key(key)) = map.next_key()? {
                    fields.read_member(key.as_bytes(), &mut SerdeReader(&mut map))?;
                }
                Ok(fields)
            }
        }

        deserializer.deserialize_map(FieldsVisitor)
    }
}

impl<'a> Fields<'a> {
    /// Reads the object at the start of `text` on the fast path. Returns its fields and its length in bytes, or `None`
    /// if the fast path cannot read it.
    fn scan(text: &'a str) -> Option<(Self, usize)> {
        let (mut scanner, mut fields) = (Scanner::new(text), Self::default());
        scanner.object(|key, values| fields.read_member(key, values)).ok()?;
        Some((fields, scanner.position()))
    }

    #[inline]
    fn read_member<V: ValueReader<'a>>(&mut self, key: &[u8], values: &mut V) -> Result<(), V::Error> {
        let mut text = || values.scalar().map(Scalar::into_text);
        match key {
            b"type" => self.event_type = text()?,
            b"hostname" => self.hostname = text()?,
            b"uuid" => self.uuid = text()?,
            b"name" => self.name = text()?.filter(|name| !name.is_empty()),
            b"eta" => self.eta = text()?.filter(|eta| !eta.is_empty()).map_or(Eta::None, Eta::At),
            b"sw_ident" => self.sw_ident = text()?,
            b"sw_ver" => self.sw_ver = text()?,
            b"sw_sys" => self.sw_sys = text()?,
            b"timestamp" => self.timestamp = values.scalar()?.as_number(),
            b"runtime" => self.runtime = values.scalar()?.as_number(),
            b"retries" => self.retries = values.scalar()?.as_number().and_then(exact_u32),
            b"terminated" => self.terminated = matches!(values.scalar()?, Scalar::Bool(true)),
            b"active" => self.active = values.scalar()?.as_number(),
            b"processed" => self.processed = values.scalar()?.as_number(),
            b"freq" => self.freq = values.scalar()?.as_number(),
            b"loadavg" => self.loadavg = values.three_numbers()?,
            _ => values.skip()?,
        }
        Ok(())
    }
}

/// `number` as an integer if the conversion is exact. `-0.0` is not exact.
fn exact_u32(number: f64) -> Option<u32> {
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "checked by the round trip")]
    let integer = number as u32;
    (f64::from(integer).total_cmp(&number).is_eq()).then_some(integer)
}
