//! A Celery event, borrowed from the message it came in (`celery.events.event.Event`).

use std::borrow::Cow;
use std::fmt;

use serde::de::{Deserialize, DeserializeSeed, Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

use super::Reject;
use super::json::{self, Key, Member, Members, Scalar, Values};
use super::scan::{self, Scanner};

/// What kind of event it is, by its `type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "Celery's own names")]
pub enum EventKind {
    TaskSent,
    TaskReceived,
    TaskStarted,
    TaskSucceeded,
    TaskFailed,
    TaskRetried,
    TaskRevoked,
    TaskRejected,
    /// Celery 5.1 and later.
    TaskCancelled,
    /// A `task-…` event that the user's own code sends.
    TaskCustom,
    WorkerOnline,
    WorkerHeartbeat,
    WorkerOffline,
    /// A `worker-…` event that Celery does not define.
    WorkerCustom,
    /// Any other group: ignored, as in Flower.
    Foreign,
}

impl EventKind {
    /// The kind of an event by its `type`, for example `task-received`.
    #[must_use]
    pub fn of(name: &str) -> Self {
        match name {
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
            _ if name.starts_with("task-") => Self::TaskCustom,
            _ if name.starts_with("worker-") => Self::WorkerCustom,
            _ => Self::Foreign,
        }
    }

    /// Whether the event is about a task.
    #[must_use]
    pub const fn is_task(self) -> bool {
        (self as u8) <= (Self::TaskCustom as u8)
    }

    /// Whether the event is a worker's word about itself.
    #[must_use]
    pub const fn is_worker(self) -> bool {
        matches!(self, Self::WorkerOnline | Self::WorkerHeartbeat | Self::WorkerOffline | Self::WorkerCustom)
    }
}

/// The `eta` of a task event. An eta that is null or empty is no eta, but it replaces one that was known.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Eta<'a> {
    /// The event does not speak of it.
    #[default]
    Absent,
    /// Null or empty.
    None,
    /// A date and time as Celery wrote it (ISO 8601).
    At(Cow<'a, str>),
}

/// One event. Fields of a wrong type read as absent; numbers are finite.
#[derive(Clone, Debug)]
pub struct Event<'a> {
    /// The kind, by `type`.
    pub kind: EventKind,
    /// `type`, for example `task-received`.
    pub name_of_type: Cow<'a, str>,
    /// The sender: a worker's node name, or `gen<pid>@host` of a client.
    pub hostname: Cow<'a, str>,
    /// Unix seconds by the sender's clock; absent on some worker events only.
    pub timestamp: Option<f64>,
    /// The task's id; always there on task events.
    pub uuid: Cow<'a, str>,
    /// The task's name, where the event carries one that is not empty.
    pub name: Option<Cow<'a, str>>,
    /// When the task is to run.
    pub eta: Eta<'a>,
    /// Seconds the task ran, of `task-succeeded`.
    pub runtime: Option<f64>,
    /// How often the task was retried, of `task-sent` and `task-received`.
    pub retries: Option<u32>,
    /// Of `task-revoked`: the running task was terminated.
    pub terminated: bool,
    /// Tasks a worker is executing.
    pub active: Option<f64>,
    /// Tasks a worker has accepted since its start.
    pub processed: Option<f64>,
    /// Seconds between two heartbeats.
    pub freq: Option<f64>,
    /// The load average of the worker's machine over 1, 5 and 15 minutes.
    pub loadavg: Option<[f64; 3]>,
    /// The worker's software: `py-celery`.
    pub sw_ident: Option<Cow<'a, str>>,
    /// The worker's version of it.
    pub sw_ver: Option<Cow<'a, str>>,
    /// The worker's operating system.
    pub sw_sys: Option<Cow<'a, str>>,
    raw: Option<&'a [u8]>,
}

impl<'a> Event<'a> {
    /// Any field of the event by its name, as JSON. Absent where the event does not have it.
    ///
    /// Reads the event's text again at each call: meant for observers, not for every event of a busy cluster.
    #[must_use]
    pub fn field(&self, name: &str) -> Option<serde_json::Value> {
        let raw = self.raw?;
        let read = Member::of(name).deserialize(&mut serde_json::Deserializer::from_slice(raw));
        // What was skipped when the event was read may be what JSON forbids.
        let read = read.or_else(|_| {
            let mended = json::mend(raw);
            Member::of(name).deserialize(&mut serde_json::Deserializer::from_str(&mended))
        });
        read.ok()?
    }

    /// The Python repr of the positional arguments, of `task-sent` and `task-received`.
    #[must_use]
    pub fn args(&self) -> Option<String> {
        self.text("args")
    }

    /// The Python repr of the keyword arguments, of `task-sent` and `task-received`.
    #[must_use]
    pub fn kwargs(&self) -> Option<String> {
        self.text("kwargs")
    }

    /// The Python repr of the result, of `task-succeeded`.
    #[must_use]
    pub fn result(&self) -> Option<String> {
        self.text("result")
    }

    /// The Python repr of the exception, of `task-failed` and `task-retried`.
    #[must_use]
    pub fn exception(&self) -> Option<String> {
        self.text("exception")
    }

    /// The traceback as text, of `task-failed` and `task-retried`.
    #[must_use]
    pub fn traceback(&self) -> Option<String> {
        self.text("traceback")
    }

    /// Any field of the event that is text.
    #[must_use]
    pub fn text(&self, name: &str) -> Option<String> {
        match self.field(name)? {
            serde_json::Value::String(text) => Some(text),
            _ => None,
        }
    }

    /// The event's own JSON text, as far as it is kept (it is whenever there is an observer).
    #[must_use]
    pub fn raw(&self) -> Option<&'a [u8]> {
        self.raw
    }
}

/// Reads every event of a message body, one object or a list of them, and hands each to `each`, in order. An element
/// that cannot be read costs itself alone.
///
/// With `keep_raw` the events know their own JSON text, so that [`Event::field`] works.
pub fn decode(body: &[u8], keep_raw: bool, each: impl FnMut(Result<Event<'_>, Reject>)) {
    let text = body.trim_ascii_start();
    decode_list(text, scan::plain(text), keep_raw, each);
}

/// [`decode`] without the quick reader, which is held against this one.
#[doc(hidden)]
pub fn decode_by_serde(body: &[u8], keep_raw: bool, each: impl FnMut(Result<Event<'_>, Reject>)) {
    decode_list(body.trim_ascii_start(), None, keep_raw, each);
}

/// `plain` is the text once more, if the quick reader may be tried on it.
fn decode_list(text: &[u8], plain: Option<&str>, keep_raw: bool, mut each: impl FnMut(Result<Event<'_>, Reject>)) {
    let scan = |start: usize| plain.and_then(|plain| Fields::scan(&plain[start..]));
    let Some(list) = text.strip_prefix(b"[") else {
        return match scan(0) {
            Some((fields, length)) if length == text.len() => each(fields.check(keep_raw.then_some(text))),
            _ => decode_element(text, keep_raw, &mut each),
        };
    };
    json::elements(list, |start| match scan(start + 1) {
        Some((fields, length)) if matches!(list.get(start + length), Some(b',' | b']')) => {
            let end = start + length;
            each(fields.check(keep_raw.then_some(&list[start..end])));
            end
        }
        _ => {
            let end = start + json::element_length(&list[start..]);
            decode_element(&list[start..end], keep_raw, &mut each);
            end
        }
    });
}

fn decode_element(text: &[u8], keep_raw: bool, each: &mut impl FnMut(Result<Event<'_>, Reject>)) {
    if let Ok(fields) = serde_json::from_slice::<Fields>(text) {
        return each(fields.check(keep_raw.then_some(text)));
    }
    let mended = json::mend(text);
    match serde_json::from_str::<Fields>(&mended) {
        Ok(fields) => each(fields.check(keep_raw.then_some(mended.as_bytes()))),
        Err(_) if serde_json::from_str::<&RawValue>(&mended).is_ok() => each(Err(Reject::NotAnEvent)),
        Err(_) => each(Err(Reject::Json)),
    }
}

/// The fields as they come, before it is known whether they make an event.
#[derive(Default)]
struct Fields<'a> {
    name_of_type: Option<Cow<'a, str>>,
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
    fn check<'r>(self, raw: Option<&'r [u8]>) -> Result<Event<'r>, Reject>
    where
        'a: 'r,
    {
        let name_of_type = self.name_of_type.ok_or(Reject::NoType)?;
        let kind = EventKind::of(&name_of_type);
        let hostname = self.hostname.ok_or(Reject::NoHostname)?;
        if self.timestamp.is_none() && !kind.is_worker() {
            return Err(Reject::NoTimestamp);
        }
        if self.uuid.is_none() && kind.is_task() {
            return Err(Reject::NoUuid);
        }
        Ok(Event {
            kind,
            name_of_type,
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
                    fields.read(key.as_bytes(), &mut Members(&mut map))?;
                }
                Ok(fields)
            }
        }

        deserializer.deserialize_map(FieldsVisitor)
    }
}

impl<'a> Fields<'a> {
    /// The fields of the object that `text` begins with, and its length, if the quick reader can read it.
    fn scan(text: &'a str) -> Option<(Self, usize)> {
        let (mut scanner, mut fields) = (Scanner::new(text), Self::default());
        scanner.object(|key, values| fields.read(key, values)).ok()?;
        Some((fields, scanner.position()))
    }

    #[inline]
    fn read<V: Values<'a>>(&mut self, key: &[u8], values: &mut V) -> Result<(), V::Error> {
        let mut text = || values.scalar().map(Scalar::text);
        match key {
            b"type" => self.name_of_type = text()?,
            b"hostname" => self.hostname = text()?,
            b"uuid" => self.uuid = text()?,
            b"name" => self.name = text()?.filter(|name| !name.is_empty()),
            b"eta" => self.eta = text()?.filter(|eta| !eta.is_empty()).map_or(Eta::None, Eta::At),
            b"sw_ident" => self.sw_ident = text()?,
            b"sw_ver" => self.sw_ver = text()?,
            b"sw_sys" => self.sw_sys = text()?,
            b"timestamp" => self.timestamp = values.scalar()?.number(),
            b"runtime" => self.runtime = values.scalar()?.number(),
            b"retries" => self.retries = values.scalar()?.number().and_then(whole),
            b"terminated" => self.terminated = matches!(values.scalar()?, Scalar::Bool(true)),
            b"active" => self.active = values.scalar()?.number(),
            b"processed" => self.processed = values.scalar()?.number(),
            b"freq" => self.freq = values.scalar()?.number(),
            b"loadavg" => self.loadavg = values.three_numbers()?,
            _ => values.skip()?,
        }
        Ok(())
    }
}

fn whole(number: f64) -> Option<u32> {
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "checked by the round trip")]
    let whole = number as u32;
    (f64::from(whole).total_cmp(&number).is_eq()).then_some(whole)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(body: &str, keep_raw: bool) -> Vec<Result<String, Reject>> {
        let mut seen = Vec::new();
        decode(body.as_bytes(), keep_raw, |event| {
            seen.push(event.map(|event| format!("{} {}", event.uuid, event.hostname)));
        });
        seen
    }

    fn one(body: &str, check: impl FnOnce(&Event)) {
        let mut check = Some(check);
        decode(body.as_bytes(), true, |event| check.take().unwrap()(&event.unwrap()));
        assert!(check.is_none());
    }

    const GOOD: &str = r#"{"type": "task-received", "hostname": "w", "timestamp": 1, "uuid": "a"}"#;

    #[test]
    fn one_bad_element_costs_itself_alone() {
        let ok = || Ok("a w".to_owned());
        for keep_raw in [false, true] {
            let batch = format!("[{GOOD}, {{\"x\": nonsense}}, 5, {GOOD},{GOOD}]");
            assert_eq!(read(&batch, keep_raw), [ok(), Err(Reject::Json), Err(Reject::NotAnEvent), ok(), ok()]);
            assert_eq!(read(&format!("[{GOOD}, {{\"type\": "), keep_raw), [ok(), Err(Reject::Json)]);
            assert_eq!(read(GOOD, keep_raw), [ok()]);
            assert_eq!(read("[]", keep_raw), []);
            assert_eq!(read(&format!("[5}}, }}, {GOOD}]"), keep_raw), [Err(Reject::Json), Err(Reject::Json), ok()]);
        }
    }

    /// What Python writes of a received and a succeeded task and of a heartbeat.
    const PYTHON: &str = concat!(
        r#"[{"hostname": "celery@w1", "utcoffset": 0, "pid": 77, "clock": 12, "uuid": "0b6a3b4e-9d3f-4a53-93a1", "#,
        r#""name": "shop.add", "args": "('it\\'s', \"\u00e9\")", "kwargs": "{}", "root_id": null, "retries": 1, "eta": null, "#,
        r#""timestamp": 1763820000.1234567, "type": "task-received"}, {"hostname": "w", "uuid": "a", "result": "[1, 2]", "#,
        r#""runtime": 8.8e-05, "timestamp": 1763820000.5, "type": "task-succeeded"}, {"hostname": "w", "freq": 2.0, "#,
        r#""active": 0, "processed": 3, "loadavg": [0.5, 0.25, 1], "sw_ident": "py-celery", "timestamp": -0.0, "#,
        r#""x": [[], {"a": {}}], "type": "worker-heartbeat"}]"#
    );

    fn told(decode: impl FnOnce(&mut dyn FnMut(Result<Event<'_>, Reject>))) -> Vec<String> {
        let mut seen = Vec::new();
        decode(&mut |event| seen.push(format!("{event:?}")));
        seen
    }

    #[test]
    fn what_python_writes_is_read_by_the_quick_reader() {
        let mut rest = &PYTHON[1..];
        for _ in 0..3 {
            let (_, length) = Fields::scan(rest).unwrap();
            rest = rest[length..].trim_start_matches([',', ' ']);
        }
        assert_eq!(rest, "]");
    }

    proptest::proptest! {
        /// Both readers agree on what Python writes, and on what comes out when that is damaged.
        #[test]
        fn the_quick_reader_agrees_with_serde(
            damage in proptest::collection::vec((0..PYTHON.len(), proptest::sample::select(&b"\"\\{}[],: 0-.e1nu\x00\x80\n"[..])), 0..4),
            cut in 0..PYTHON.len() * 2,
            keep_raw: bool,
        ) {
            let mut body = PYTHON.as_bytes().to_vec();
            for (at, byte) in damage {
                body[at] = byte;
            }
            body.truncate(cut.max(1));
            let quick = told(|each| decode(&body, keep_raw, each));
            let slow = told(|each| decode_by_serde(&body, keep_raw, each));
            proptest::prop_assert_eq!(quick, slow);
        }
    }

    #[test]
    fn what_an_event_must_have() {
        for (body, expected) in [
            ("", Reject::Json),
            ("5", Reject::NotAnEvent),
            (r#"{"hostname": "w", "timestamp": 1}"#, Reject::NoType),
            (r#"{"type": 1, "hostname": "w", "timestamp": 1}"#, Reject::NoType),
            (r#"{"type": "task-x", "hostname": null, "timestamp": 1}"#, Reject::NoHostname),
            (r#"{"type": "task-x", "hostname": "w", "timestamp": "1"}"#, Reject::NoTimestamp),
            (r#"{"type": "task-x", "hostname": "w", "timestamp": true}"#, Reject::NoTimestamp),
            (r#"{"type": "task-x", "hostname": "w", "timestamp": NaN}"#, Reject::NoTimestamp),
            (r#"{"type": "task-x", "hostname": "w", "timestamp": 1}"#, Reject::NoUuid),
        ] {
            assert_eq!(read(body, false), [Err(expected)], "{body}");
        }
        assert_eq!(read(r#"{"type": "worker-online", "hostname": "w"}"#, false), [Ok(" w".to_owned())]);
    }

    #[test]
    fn fields_of_a_wrong_type_read_as_absent() {
        one(
            r#"{"type": "task-succeeded", "hostname": "w", "timestamp": 1e0, "uuid": "a", "name": 5, "eta": "",
                "runtime": "2", "retries": -1, "loadavg": [1, 2], "active": true, "terminated": 1, "name": null}"#,
            |event| {
                assert_eq!((event.name.as_deref(), &event.eta, event.runtime), (None, &Eta::None, None));
                assert_eq!((event.retries, event.loadavg, event.active, event.terminated), (None, None, None, false));
            },
        );
    }

    #[test]
    fn every_field_is_there_for_who_asks() {
        one(
            r#"{"type": "task-failed", "hostname": "w", "timestamp": 1.5, "uuid": "a", "exception": "E('\ud800')",
                "traceback": "Traceback…", "pid": 7, "extra": {"x": NaN}, "retries": 3, "eta": "2026-01-01T00:00:00"}"#,
            |event| {
                assert_eq!(event.exception().as_deref(), Some("E('\u{fffd}')"));
                assert_eq!(event.traceback().as_deref(), Some("Traceback…"));
                assert_eq!(event.field("pid"), Some(7.into()));
                assert_eq!(event.field("nothing"), None);
                assert_eq!((event.retries, &event.eta), (Some(3), &Eta::At("2026-01-01T00:00:00".into())));
            },
        );
        let body = r#"{"type": "task-failed", "hostname": "w", "timestamp": 1, "uuid": "a", "exception": "\ud800"}"#;
        one(body, |event| assert_eq!(event.exception().as_deref(), Some("\u{fffd}")));
    }

    #[test]
    fn depth_is_no_danger() {
        let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
        let batch = format!(
            r#"[{{"type": "task-x", "hostname": "w", "timestamp": 1, "uuid": "a", "args": {deep}}},{deep},{GOOD}]"#
        );
        let ok = || Ok("a w".to_owned());
        assert_eq!(read(&batch, false), [ok(), Err(Reject::NotAnEvent), ok()]);
        assert_eq!(read(&deep, false), [Err(Reject::NotAnEvent)]);
    }
}
