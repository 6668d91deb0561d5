//! kombu's envelope: the body equals what a plain JSON parse finds, independently of the previous buffer content.

use std::borrow::Cow;

use flower_exporter::celery::envelope::{self, DecodeFailure};
use flower_exporter::celery::{DecodeError, event};
use serde::de::IgnoredAny;
use serde_json::{Map, Value};

/// Runs one input.
///
/// # Panics
/// Panics on a finding.
pub fn run(payload: &[u8]) {
    let (mut empty, mut used) = (Vec::new(), vec![b'x'; 100]);
    let opened = envelope::open(payload, &mut empty);
    assert_eq!(opened, envelope::open(payload, &mut used), "the result depends on the buffer content");
    if let Err(DecodeFailure { value: Some(name), .. }) = &opened {
        assert!(name.len() < 300);
    }
    let opened = opened.map_err(|failure| failure.reason);
    if serde_json::from_slice::<IgnoredAny>(payload).is_err() {
        assert_eq!(opened, Err(DecodeError::Envelope), "it is not JSON");
    }
    // With a duplicate key, the envelope may be rejected for the first value, which a plain parse ignores.
    if opened != Err(DecodeError::Envelope)
        && let Ok(tree) = serde_json::from_slice(payload)
    {
        assert_eq!(opened, body_of(&tree));
    }
    if let Some(tag) = envelope::delivery_tag(payload) {
        assert!(tag.len() <= payload.len());
    }
    if let Ok(body) = opened {
        event::decode(&body, false, |_| ());
    }
}

fn body_of(tree: &Value) -> Result<Cow<'_, [u8]>, DecodeError> {
    let envelope = tree.as_object().ok_or(DecodeError::Envelope)?;
    let text = |name: &str| envelope.get(name).and_then(Value::as_str);
    let (headers, properties) = (object(envelope, "headers")?, object(envelope, "properties")?);
    if !matches!(text("content-type"), None | Some("application/json" | "json")) {
        return Err(DecodeError::ContentType);
    }
    if headers.and_then(|headers| headers.get("compression")).is_some_and(|compression| !compression.is_null()) {
        return Err(DecodeError::Compression);
    }
    let body = text("body").ok_or(DecodeError::Envelope)?;
    match properties.and_then(|properties| properties.get("body_encoding")) {
        Some(Value::String(encoding)) if encoding == "base64" => {
            base64(body).map(Cow::Owned).ok_or(DecodeError::Base64)
        }
        _ => Ok(Cow::Borrowed(body.as_bytes())),
    }
}

fn object<'a>(envelope: &'a Map<String, Value>, name: &str) -> Result<Option<&'a Map<String, Value>>, DecodeError> {
    match envelope.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(inner) => inner.as_object().map(Some).ok_or(DecodeError::Envelope),
    }
}

/// RFC 4648 with padding. Trailing bits must be zero.
fn base64(text: &str) -> Option<Vec<u8>> {
    const LETTERS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let digits = text.strip_suffix("==").or_else(|| text.strip_suffix('=')).unwrap_or(text);
    let (mut bytes, mut bits, mut count) = (Vec::new(), 0_u32, 0);
    for digit in digits.bytes() {
        bits = bits << 6 | u32::try_from(LETTERS.iter().position(|letter| *letter == digit)?).ok()?;
        count += 6;
        if count >= 8 {
            count -= 8;
            bytes.push(u8::try_from(bits >> count).ok()?);
            bits &= (1 << count) - 1;
        }
    }
    (text.len().is_multiple_of(4) && count < 6 && bits == 0).then_some(bytes)
}
