//! The kombu envelope: the JSON object around every message on Redis (`kombu.transport.virtual`).

use std::borrow::Cow;

use base64_turbo::STANDARD;

use super::json::fast_json::Scanner;
use super::json::{Members, Object, Scalar, ValueReader};
use super::{DecodeError, truncate_label};

/// Opens an envelope and returns the message body, the JSON text of its events.
///
/// Only `content-type` decides how the body is decoded. A message without one is decoded as JSON. `buffer` holds
/// decoded base64 bodies. It grows as needed, and callers reuse it to avoid allocations.
///
/// # Errors
/// Returns an error if the message is invalid: [`DecodeError::Envelope`], [`DecodeError::ContentType`],
/// [`DecodeError::Compression`] or [`DecodeError::Base64`].
pub fn open<'a>(payload: &'a [u8], buffer: &'a mut Vec<u8>) -> Result<Cow<'a, [u8]>, DecodeFailure> {
    if let Some(length) = open_fast_path(payload, buffer)? {
        return Ok(Cow::Borrowed(&buffer[..length]));
    }
    let Object(envelope): Object<Envelope> = serde_json::from_slice(payload).map_err(|_| DecodeError::Envelope)?;
    check_content(envelope.content_type.as_deref(), envelope.compression.as_deref())?;
    match envelope.body.ok_or(DecodeError::Envelope)? {
        body if envelope.base64 => Ok(decode_base64(body.as_bytes(), buffer).map(Cow::Borrowed)?),
        Cow::Borrowed(body) => Ok(Cow::Borrowed(body.as_bytes())),
        Cow::Owned(body) => Ok(Cow::Owned(body.into_bytes())),
    }
}

/// Opens an envelope that has kombu's own layout: the first member is a body in base64. That body need not be parsed as
/// JSON, because base64 contains neither quotes nor escapes.
///
/// Returns the length of the body in `buffer`, in bytes, or `None` if the envelope has another
/// layout or invalid base64.
fn open_fast_path(payload: &[u8], buffer: &mut Vec<u8>) -> Result<Option<usize>, DecodeFailure> {
    let Some((body, rest)) = split_body(payload) else { return Ok(None) };
    if !is_usual(rest) {
        let Some(Envelope { has_body: false, base64: true, content_type, compression, .. }) = scan(rest) else {
            return Ok(None);
        };
        // What is not base64 may not even be a string in JSON. Then the envelope is invalid, whatever its content type.
        let Ok(body) = decode_base64(body, buffer) else { return Ok(None) };
        check_content(content_type.as_deref(), compression.as_deref())?;
        return Ok(Some(body.len()));
    }
    Ok(decode_base64(body, buffer).ok().map(<[u8]>::len))
}

/// Splits the envelope into the body's text and the text of the remaining members. Returns `None` if the body is not
/// first.
fn split_body(payload: &[u8]) -> Option<(&[u8], &str)> {
    let text = payload.strip_prefix(br#"{"body": ""#)?;
    let (body, rest) = text.split_at(memchr::memchr(b'"', text)?);
    Some((body, simdutf8::basic::from_utf8(&rest[1..]).ok()?))
}

/// Whether the members after the body are the ones that kombu writes for an event: they declare an uncompressed JSON body
/// in base64.
fn is_usual(rest: &str) -> bool {
    let mut scanner = Scanner::new(rest);
    let mut text_after = |literal| scanner.consume(literal) && scanner.skip_string().is_ok();
    text_after(r#", "content-encoding": "utf-8", "content-type": "application/json", "headers": {"hostname": ""#)
        && text_after(r#"}, "properties": {"delivery_mode": 1, "delivery_info": {"exchange": ""#)
        && text_after(r#", "routing_key": ""#)
        && text_after(r#"}, "priority": 0, "body_encoding": "base64", "delivery_tag": ""#)
        && scanner.rest() == "}}"
}

/// Reads the members after the body. Returns `None` if the fast path cannot.
fn scan(rest: &str) -> Option<Envelope<'_>> {
    let (mut scanner, mut envelope) = (Scanner::new(rest), Envelope::default());
    scanner.remaining_members(|key, values| envelope.read_member(key, values)).ok()?;
    scanner.rest().is_empty().then_some(envelope)
}

/// The delivery tag: a UUID that identifies the message. `None` if the envelope has no tag.
#[must_use]
pub fn delivery_tag(payload: &[u8]) -> Option<String> {
    #[derive(serde::Deserialize)]
    struct Tagged {
        properties: Properties,
    }
    #[derive(serde::Deserialize)]
    struct Properties {
        delivery_tag: String,
    }
    serde_json::from_slice(payload).ok().map(|tagged: Tagged| tagged.properties.delivery_tag)
}

/// Checks that a message's properties declare an uncompressed JSON body. The same rule applies to both brokers.
///
/// # Errors
/// Returns an error if the body has another content type ([`DecodeError::ContentType`]) or is compressed
/// ([`DecodeError::Compression`]).
pub fn check_content(content_type: Option<&str>, compression: Option<&str>) -> Result<(), DecodeFailure> {
    if let Some(name) = content_type.filter(|name| !matches!(*name, "application/json" | "json")) {
        return Err(DecodeFailure { reason: DecodeError::ContentType, value: Some(truncate_label(name).into()) });
    }
    if let Some(name) = compression {
        return Err(DecodeFailure { reason: DecodeError::Compression, value: Some(truncate_label(name).into()) });
    }
    Ok(())
}

/// Why a message is invalid, with the property value that makes it so.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DecodeFailure {
    /// The reason that it is counted under.
    pub reason: DecodeError,
    /// The unsupported content type or compression, truncated like a label. `None` for other reasons.
    pub value: Option<Box<str>>,
}

impl From<DecodeError> for DecodeFailure {
    fn from(reason: DecodeError) -> Self {
        Self { reason, value: None }
    }
}

fn decode_base64<'a>(text: &[u8], buffer: &'a mut Vec<u8>) -> Result<&'a [u8], DecodeError> {
    let max_length = STANDARD.decoded_len_estimate(text.len());
    if buffer.len() < max_length {
        buffer.resize(max_length, 0);
    }
    let length = STANDARD.decode_slice(text, buffer).map_err(|_| DecodeError::Base64)?;
    Ok(&buffer[..length])
}

#[derive(Default)]
struct Envelope<'a> {
    has_body: bool,
    body: Option<Cow<'a, str>>,
    content_type: Option<Cow<'a, str>>,
    compression: Option<Cow<'a, str>>,
    base64: bool,
}

impl<'a> Members<'a> for Envelope<'a> {
    const EXPECTED: &'static str = "a kombu envelope";

    fn read_member<V: ValueReader<'a>>(&mut self, key: &[u8], values: &mut V) -> Result<(), V::Error> {
        match key {
            b"body" => {
                self.has_body = true;
                self.body = values.scalar()?.into_text();
            }
            b"content-type" => self.content_type = values.scalar()?.into_text(),
            b"headers" => {
                self.compression = match values.member("compression")? {
                    None | Some(Scalar::Null) => None,
                    Some(name) => Some(name.into_text().unwrap_or_default()),
                };
            }
            b"properties" => {
                let encoding = values.member("body_encoding")?;
                self.base64 = matches!(encoding, Some(Scalar::Text(text)) if text == "base64");
            }
            _ => values.skip()?,
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn body_of(payload: &str) -> Result<String, DecodeError> {
        let mut buffer = vec![b'x'; 3];
        let body = open(payload.as_bytes(), &mut buffer).map_err(|failure| failure.reason)?;
        Ok(String::from_utf8_lossy(&body).into_owned())
    }

    #[test]
    fn base64_and_text_bodies_open_with_keys_in_any_order() {
        let base64 = r#"{"properties": {"delivery_tag": "x", "body_encoding": "base64", "delivery_info": {}},
            "headers": {"hostname": "w"}, "content-encoding": "utf-8", "content-type": "application/json",
            "body": "eyJhIjogMX0="}"#;
        assert_eq!(body_of(base64).as_deref(), Ok(r#"{"a": 1}"#));
        let text = r#"{"body": "{\"a\": \"\\ud800\"}", "content-type": "application/json", "properties": null}"#;
        assert_eq!(body_of(text).as_deref(), Ok(r#"{"a": "\ud800"}"#));
        assert_eq!(body_of(r#"{"body": "[]", "headers": {"compression": null}}"#).as_deref(), Ok("[]"));
    }

    #[test]
    fn fast_path_agrees_with_serde() {
        let open_body_first = |body: &str, more: &str| {
            body_of(&format!(r#"{{"body": "{body}", "properties": {{"body_encoding": "base64"}}{more}}}"#))
        };
        assert_eq!(open_body_first("eyJhIjogMX0=", "").as_deref(), Ok(r#"{"a": 1}"#));
        assert_eq!(open_body_first("eyJhIjogMX0=", r#", "body": "e30=""#).as_deref(), Ok("{}"), "the last body wins");
        assert_eq!(open_body_first(r"e30\u003d", "").as_deref(), Ok("{}"), "an escape falls back to serde");
        for (body, more, reason) in [
            ("eyJhIjogMX0=", r#", "body": null"#, DecodeError::Envelope),
            ("eyJhIjogMX0=", ",", DecodeError::Envelope),
            ("eyJhIjogMX0", "", DecodeError::Base64),
            (r#"e30=\""#, "", DecodeError::Base64),
            (r"e30=\", r#", "content-type": "text/plain""#, DecodeError::Envelope),
            ("e30=", r#", "content-type": "text/plain""#, DecodeError::ContentType),
            ("e30=", r#", "headers": {"compression": "zstd"}"#, DecodeError::Compression),
        ] {
            assert_eq!(open_body_first(body, more), Err(reason), "{body} {more}");
        }
    }

    #[test]
    fn invalid_messages_have_a_reason() {
        for (payload, reason) in [
            ("", DecodeError::Envelope),
            ("[]", DecodeError::Envelope),
            ("{}", DecodeError::Envelope),
            (r#"{"body": 5}"#, DecodeError::Envelope),
            (r#"{"body": "{}", "properties": 5}"#, DecodeError::Envelope),
            (r#"{"body": "{}", "content-type": "application/x-python-serialize"}"#, DecodeError::ContentType),
            (r#"{"body": "{}", "headers": {"compression": "application/x-gzip"}}"#, DecodeError::Compression),
            (r#"{"body": "{}", "properties": {"body_encoding": "base64"}}"#, DecodeError::Base64),
        ] {
            assert_eq!(body_of(payload), Err(reason), "{payload}");
        }
    }
}
