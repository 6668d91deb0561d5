//! kombu's envelope: the JSON object around every message on Redis (`kombu.transport.virtual`).

use std::borrow::Cow;
use std::fmt;

use base64_simd::{Out, STANDARD};
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};

use super::json::{Key, Members, Scalar, Values};
use super::scan::{self, Scanner};
use super::{Reject, cut};

/// Opens an envelope and returns the message's body, the JSON of its events.
///
/// `content-type` alone chooses the decoder; a message without one is taken for JSON. `buffer` is reused from call to
/// call for bodies in base64.
///
/// # Errors
/// [`Reject::Envelope`], [`Reject::ContentType`], [`Reject::Compression`] or [`Reject::Base64`].
pub fn open<'a>(payload: &'a [u8], buffer: &'a mut Vec<u8>) -> Result<Cow<'a, [u8]>, Refusal> {
    if let Some(length) = open_usual(payload, buffer)? {
        return Ok(Cow::Borrowed(&buffer[..length]));
    }
    let envelope: Envelope = serde_json::from_slice(payload).map_err(|_| Reject::Envelope)?;
    check_content(envelope.content_type.as_deref(), envelope.compression.as_deref())?;
    match envelope.body.ok_or(Reject::Envelope)? {
        body if envelope.base64 => Ok(decode_base64(body.as_bytes(), buffer).map(Cow::Borrowed)?),
        Cow::Borrowed(body) => Ok(Cow::Borrowed(body.as_bytes())),
        Cow::Owned(body) => Ok(Cow::Owned(body.into_bytes())),
    }
}

/// Opens an envelope as kombu writes it: a body in base64 first, which need not be read as JSON since base64 has neither
/// quotes nor escapes. Returns how much of `buffer` the body takes, or `None` for any other envelope.
fn open_usual(payload: &[u8], buffer: &mut Vec<u8>) -> Result<Option<usize>, Refusal> {
    let Some((body, Envelope { has_body: false, base64: true, content_type, compression, .. })) = scan(payload) else {
        return Ok(None);
    };
    check_content(content_type.as_deref(), compression.as_deref())?;
    Ok(decode_base64(body, buffer).ok().map(<[u8]>::len))
}

/// The text of the body, and what the rest of the envelope says.
fn scan(payload: &[u8]) -> Option<(&[u8], Envelope<'_>)> {
    let text = payload.strip_prefix(br#"{"body": ""#)?;
    let (body, rest) = text.split_at(memchr::memchr(b'"', text)?);
    let rest = scan::plain(&rest[1..])?;
    let (mut scanner, mut envelope) = (Scanner::new(rest), Envelope::default());
    scanner.more_members(|key, values| envelope.read(key, values)).ok()?;
    (scanner.position() == rest.len()).then_some((body, envelope))
}

/// What tells this message from all others; `None` where it has no tag.
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

/// Whether a message's properties allow to read its body: JSON, not compressed. The same rule on both brokers.
///
/// # Errors
/// [`Reject::ContentType`] or [`Reject::Compression`].
pub fn check_content(content_type: Option<&str>, compression: Option<&str>) -> Result<(), Refusal> {
    if let Some(name) = content_type.filter(|name| !matches!(*name, "application/json" | "json")) {
        return Err(Refusal { reason: Reject::ContentType, name: Some(cut(name).into()) });
    }
    if let Some(name) = compression {
        return Err(Refusal { reason: Reject::Compression, name: Some(cut(name).into()) });
    }
    Ok(())
}

/// Why a message is refused, and by which name where its properties name something.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// What it is counted under.
    pub reason: Reject,
    /// The content type or compression that is not read here, bounded.
    pub name: Option<Box<str>>,
}

impl From<Reject> for Refusal {
    fn from(reason: Reject) -> Self {
        Self { reason, name: None }
    }
}

fn decode_base64<'a>(text: &[u8], buffer: &'a mut Vec<u8>) -> Result<&'a [u8], Reject> {
    let length = STANDARD.estimated_decoded_length(text.len());
    if buffer.len() < length {
        buffer.resize(length, 0);
    }
    let decoded = STANDARD.decode(text, Out::from_slice(&mut buffer[..length])).map_err(|_| Reject::Base64)?;
    Ok(decoded)
}

#[derive(Default)]
struct Envelope<'a> {
    has_body: bool,
    body: Option<Cow<'a, str>>,
    content_type: Option<Cow<'a, str>>,
    compression: Option<Cow<'a, str>>,
    base64: bool,
}

impl<'a> Envelope<'a> {
    fn read<V: Values<'a>>(&mut self, key: &[u8], values: &mut V) -> Result<(), V::Error> {
        match key {
            b"body" => {
                self.has_body = true;
                self.body = values.scalar()?.text();
            }
            b"content-type" => self.content_type = values.scalar()?.text(),
            b"headers" => {
                self.compression = match values.member("compression")? {
                    None | Some(Scalar::Null) => None,
                    Some(name) => Some(name.text().unwrap_or_default()),
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

impl<'de> Deserialize<'de> for Envelope<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct EnvelopeVisitor;

        impl<'de> Visitor<'de> for EnvelopeVisitor {
            type Value = Envelope<'de>;

            fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
                formatter.write_str("kombu's envelope")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut envelope = Envelope::default();
                while let Some(Key(key)) = map.next_key()? {
                    envelope.read(key.as_bytes(), &mut Members(&mut map))?;
                }
                Ok(envelope)
            }
        }

        deserializer.deserialize_map(EnvelopeVisitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn body_of(payload: &str) -> Result<String, Reject> {
        let mut buffer = vec![b'x'; 3];
        let body = open(payload.as_bytes(), &mut buffer).map_err(|refusal| refusal.reason)?;
        Ok(String::from_utf8_lossy(&body).into_owned())
    }

    #[test]
    fn bodies_in_base64_and_as_text_with_keys_in_any_order() {
        let base64 = r#"{"properties": {"delivery_tag": "x", "body_encoding": "base64", "delivery_info": {}},
            "headers": {"hostname": "w"}, "content-encoding": "utf-8", "content-type": "application/json",
            "body": "eyJhIjogMX0="}"#;
        assert_eq!(body_of(base64).as_deref(), Ok(r#"{"a": 1}"#));
        let text = r#"{"body": "{\"a\": \"\\ud800\"}", "content-type": "application/json", "properties": null}"#;
        assert_eq!(body_of(text).as_deref(), Ok(r#"{"a": "\ud800"}"#));
        assert_eq!(body_of(r#"{"body": "[]", "headers": {"compression": null}}"#).as_deref(), Ok("[]"));
    }

    #[test]
    fn the_usual_order_is_read_as_any_other() {
        let usual = |body: &str, more: &str| {
            body_of(&format!(r#"{{"body": "{body}", "properties": {{"body_encoding": "base64"}}{more}}}"#))
        };
        assert_eq!(usual("eyJhIjogMX0=", "").as_deref(), Ok(r#"{"a": 1}"#));
        assert_eq!(usual("eyJhIjogMX0=", r#", "body": "e30=""#).as_deref(), Ok("{}"), "the last one wins");
        assert_eq!(usual(r"e30\u003d", "").as_deref(), Ok("{}"), "escaped, for no reason");
        for (body, more, reason) in [
            ("eyJhIjogMX0=", r#", "body": null"#, Reject::Envelope),
            ("eyJhIjogMX0=", ",", Reject::Envelope),
            ("eyJhIjogMX0", "", Reject::Base64),
            (r#"e30=\""#, "", Reject::Base64),
            ("e30=", r#", "content-type": "text/plain""#, Reject::ContentType),
            ("e30=", r#", "headers": {"compression": "zstd"}"#, Reject::Compression),
        ] {
            assert_eq!(usual(body, more), Err(reason), "{body} {more}");
        }
    }

    #[test]
    fn what_cannot_be_read_is_named() {
        for (payload, reason) in [
            ("", Reject::Envelope),
            ("[]", Reject::Envelope),
            ("{}", Reject::Envelope),
            (r#"{"body": 5}"#, Reject::Envelope),
            (r#"{"body": "{}", "properties": 5}"#, Reject::Envelope),
            (r#"{"body": "{}", "content-type": "application/x-python-serialize"}"#, Reject::ContentType),
            (r#"{"body": "{}", "headers": {"compression": "application/x-gzip"}}"#, Reject::Compression),
            (r#"{"body": "{}", "properties": {"body_encoding": "base64"}}"#, Reject::Base64),
        ] {
            assert_eq!(body_of(payload), Err(reason), "{payload}");
        }
    }
}
