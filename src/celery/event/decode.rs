//! Decodes message bodies into events.

use std::borrow::Cow;

use serde_json::value::RawValue;

use super::{Eta, Event, EventKind};
use crate::celery::DecodeError;
use crate::celery::json::fast_json::{Fallback, Scanner};
use crate::celery::json::{self, Members, Object, Scalar, ValueReader};

/// Decodes a message body, which is one event or a list of events, and calls `each` with every event in order. An
/// invalid element is passed to `each` as an error and does not affect the others.
///
/// With `keep_raw`, each event keeps a reference to its JSON text, which [`Event::field`] requires.
pub fn decode(body: &[u8], keep_raw: bool, each: impl FnMut(Result<&Event<'_>, DecodeError>)) {
    let text = body.trim_ascii_start();
    decode_list(text, simdutf8::basic::from_utf8(text).ok(), keep_raw, each);
}

/// [`decode`] without the fast path. Tests and fuzz targets compare the two.
#[doc(hidden)]
pub fn decode_slow_path(body: &[u8], keep_raw: bool, each: impl FnMut(Result<&Event<'_>, DecodeError>)) {
    decode_list(body.trim_ascii_start(), None, keep_raw, each);
}

/// `utf8` is `text` again if it is UTF-8 and the fast path may be tried.
fn decode_list(text: &[u8], utf8: Option<&str>, keep_raw: bool, mut each: impl FnMut(Result<&Event<'_>, DecodeError>)) {
    let Some(list) = text.strip_prefix(b"[") else {
        let mut draft = Draft::default();
        return match utf8.and_then(|utf8| draft.scan(utf8)) {
            Some(length) if length == text.len() => each(draft.finish(keep_raw.then_some(text))),
            _ => decode_element(text, keep_raw, &mut each),
        };
    };
    let utf8 = utf8.and_then(|utf8| utf8.strip_prefix('['));
    json::for_each_element(list, |start| {
        let mut draft = Draft::default();
        if let Some(length) = utf8.and_then(|utf8| draft.scan(utf8.get(start..)?))
            && let end = start + length
            && matches!(list.get(end), Some(b',' | b']'))
        {
            each(draft.finish(keep_raw.then_some(&list[start..end])));
            return end;
        }
        let end = start + json::element_length(&list[start..]);
        decode_element(&list[start..end], keep_raw, &mut each);
        end
    });
}

#[cold]
fn decode_element(text: &[u8], keep_raw: bool, each: &mut impl FnMut(Result<&Event<'_>, DecodeError>)) {
    if let Ok(Object(mut draft)) = serde_json::from_slice::<Object<Draft>>(text) {
        return each(draft.finish(keep_raw.then_some(text)));
    }
    let sanitized = json::sanitize(text);
    match serde_json::from_str::<Object<Draft>>(&sanitized) {
        Ok(Object(mut draft)) => each(draft.finish(keep_raw.then_some(sanitized.as_bytes()))),
        Err(_) if serde_json::from_str::<&RawValue>(&sanitized).is_ok() => each(Err(DecodeError::NotAnEvent)),
        Err(_) => each(Err(DecodeError::Json)),
    }
}

/// An event that is read member by member. The object may turn out not to be an event.
pub(super) struct Draft<'a> {
    event: Event<'a>,
    has_type: bool,
    has_hostname: bool,
    has_uuid: bool,
}

impl Default for Draft<'_> {
    fn default() -> Self {
        let event = Event {
            kind: EventKind::Other,
            event_type: Cow::Borrowed(""),
            hostname: Cow::Borrowed(""),
            timestamp: None,
            uuid: Cow::Borrowed(""),
            name: None,
            eta: Eta::Absent,
            runtime: None,
            retries: None,
            terminated: false,
            active: None,
            processed: None,
            freq: None,
            loadavg: None,
            sw_ident: None,
            sw_ver: None,
            sw_sys: None,
            raw: None,
        };
        Self { event, has_type: false, has_hostname: false, has_uuid: false }
    }
}

impl<'a> Draft<'a> {
    /// The event, if the mandatory fields are present.
    fn finish(&mut self, raw: Option<&'a [u8]>) -> Result<&Event<'a>, DecodeError> {
        if !self.has_type {
            return Err(DecodeError::NoType);
        }
        let kind = EventKind::from_type(&self.event.event_type);
        if !self.has_hostname {
            return Err(DecodeError::NoHostname);
        }
        if self.event.timestamp.is_none() && !kind.is_worker() {
            return Err(DecodeError::NoTimestamp);
        }
        if !self.has_uuid && kind.is_task() {
            return Err(DecodeError::NoUuid);
        }
        self.event.kind = kind;
        self.event.raw = raw;
        Ok(&self.event)
    }

    /// Reads the object at the start of `text` on the fast path. Returns its length in bytes, or `None` if the fast path
    /// cannot read it.
    pub(super) fn scan(&mut self, text: &'a str) -> Option<usize> {
        let mut scanner = Scanner::new(text);
        let is_usual = self.scan_usual_members(&mut scanner).ok()?;
        if !(is_usual && scanner.consume("}")) {
            scanner = self.scan_members(scanner, is_usual).ok()?;
        }
        Some(text.len() - scanner.rest().len())
    }

    /// Reads the members, or those that are left, whatever they are.
    #[inline(never)]
    fn scan_members(&mut self, mut scanner: Scanner<'a>, is_any_read: bool) -> Result<Scanner<'a>, Fallback> {
        let member = |key: &[u8], values: &mut Scanner<'a>| self.read_member(key, values);
        if is_any_read {
            scanner.remaining_members(member)?;
        } else {
            scanner.object(member)?;
        }
        Ok(scanner)
    }

    /// Reads the members in the order in which Celery writes them, up to the first one that differs. Comparing with the
    /// name that is expected next is cheaper than finding its end and what it means. Returns whether there is at least
    /// one member.
    #[inline(always)]
    #[allow(clippy::inline_always, reason = "one function calls it, for every event")]
    pub(super) fn scan_usual_members(&mut self, scanner: &mut Scanner<'a>) -> Result<bool, Fallback> {
        /// Reads a member if it is next. Returns whether it was.
        macro_rules! read {
            ($name:literal) => {{
                let is_next = scanner.consume(concat!(", \"", $name, "\": "));
                if is_next {
                    self.read_member($name.as_bytes(), scanner)?;
                }
                is_next
            }};
        }
        /// Reads each member if it is next.
        macro_rules! read_each {
            ($($name:literal),+) => {$( let _ = read!($name); )+};
        }
        if !scanner.consume("{\"hostname\": ") {
            return Ok(false);
        }
        self.read_member(b"hostname", scanner)?;
        // Most hosts are in UTC.
        if scanner.consume(", \"utcoffset\": 0.0, \"pid\": ") {
            scanner.skip()?;
        } else {
            read_each!("utcoffset", "pid");
        }
        read_each!("clock");
        if read!("uuid") {
            read_each!("root_id", "parent_id");
            if read!("name") {
                read_each!("args", "kwargs", "root_id", "parent_id", "retries", "eta", "expires");
                read_each!("queue", "exchange", "routing_key");
            } else if read!("result") {
                read_each!("runtime");
            } else if read!("exception") {
                read_each!("traceback");
            }
        } else {
            read_each!("freq", "active", "processed", "loadavg", "sw_ident", "sw_ver", "sw_sys");
        }
        read_each!("timestamp", "type");
        Ok(true)
    }
}

impl<'a> Members<'a> for Draft<'a> {
    const EXPECTED: &'static str = "an event";

    #[inline(always)]
    #[allow(clippy::inline_always, reason = "only the code for the key is left where it is a literal")]
    fn read_member<V: ValueReader<'a>>(&mut self, key: &[u8], values: &mut V) -> Result<(), V::Error> {
        let Self { event, .. } = self;
        match key {
            b"type" => self.has_type = set_text(&mut event.event_type, values.text()?),
            b"hostname" => self.has_hostname = set_text(&mut event.hostname, values.text()?),
            b"uuid" => self.has_uuid = set_text(&mut event.uuid, values.text()?),
            b"name" => event.name = values.text()?.filter(|name| !name.is_empty()),
            b"eta" => event.eta = values.text()?.filter(|eta| !eta.is_empty()).map_or(Eta::None, Eta::At),
            b"sw_ident" => event.sw_ident = values.text()?,
            b"sw_ver" => event.sw_ver = values.text()?,
            b"sw_sys" => event.sw_sys = values.text()?,
            b"timestamp" => event.timestamp = values.number()?,
            b"runtime" => event.runtime = values.number()?,
            b"retries" => event.retries = values.number()?.and_then(exact_u32),
            b"terminated" => event.terminated = matches!(values.scalar()?, Scalar::Bool(true)),
            b"active" => event.active = values.number()?,
            b"processed" => event.processed = values.number()?,
            b"freq" => event.freq = values.number()?,
            b"loadavg" => event.loadavg = values.three_numbers()?,
            _ => values.skip()?,
        }
        Ok(())
    }
}

/// Sets a mandatory field. Returns whether it is present.
#[inline(always)]
#[allow(clippy::inline_always, reason = "as above")]
fn set_text<'a>(field: &mut Cow<'a, str>, text: Option<Cow<'a, str>>) -> bool {
    let is_present = text.is_some();
    *field = text.unwrap_or_default();
    is_present
}

/// `number` as an integer if the conversion is exact. `-0.0` is not exact.
fn exact_u32(number: f64) -> Option<u32> {
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "checked by the round trip")]
    let integer = number as u32;
    (f64::from(integer).total_cmp(&number).is_eq()).then_some(integer)
}
