//! kombu's envelope: the body is what a plain reading of the JSON finds, whatever the buffer held before.

use std::borrow::Cow;

use flower_exporter::celery::envelope::{self, Refusal};
use flower_exporter::celery::{Reject, event};
use serde_json::{Map, Value};

/// One input.
///
/// # Panics
/// On a finding.
pub fn run(payload: &[u8]) {
    let (mut empty, mut used) = (Vec::new(), vec![b'x'; 100]);
    let opened = envelope::open(payload, &mut empty);
    assert_eq!(opened, envelope::open(payload, &mut used), "it depends on what came before");
    if let Err(Refusal { name: Some(name), .. }) = &opened {
        assert!(name.len() < 300);
    }
    let opened = opened.map_err(|refusal| refusal.reason);
    // A key that is there twice may be refused for its first value already.
    if opened != Err(Reject::Envelope)
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

fn body_of(tree: &Value) -> Result<Cow<'_, [u8]>, Reject> {
    let envelope = tree.as_object().ok_or(Reject::Envelope)?;
    let text = |name: &str| envelope.get(name).and_then(Value::as_str);
    let (headers, properties) = (object(envelope, "headers")?, object(envelope, "properties")?);
    if !matches!(text("content-type"), None | Some("application/json" | "json")) {
        return Err(Reject::ContentType);
    }
    if headers.and_then(|headers| headers.get("compression")).is_some_and(|compression| !compression.is_null()) {
        return Err(Reject::Compression);
    }
    let body = text("body").ok_or(Reject::Envelope)?;
    match properties.and_then(|properties| properties.get("body_encoding")) {
        Some(Value::String(encoding)) if encoding == "base64" => base64(body).map(Cow::Owned).ok_or(Reject::Base64),
        _ => Ok(Cow::Borrowed(body.as_bytes())),
    }
}

fn object<'a>(envelope: &'a Map<String, Value>, name: &str) -> Result<Option<&'a Map<String, Value>>, Reject> {
    match envelope.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(inner) => inner.as_object().map(Some).ok_or(Reject::Envelope),
    }
}

/// RFC 4648, padded, without bits that stand for nothing.
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
