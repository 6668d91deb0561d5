//! Reading single JSON values without caring for their type, and mending what Python writes and JSON forbids.

use std::borrow::Cow;
use std::fmt;
use std::marker::PhantomData;

use serde::de::{Deserialize, DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;

/// A JSON value as far as the events' fields need it: a field of another type than expected is no error, it is
/// simply not the value that was asked for.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Scalar<'a> {
    Null,
    Bool(bool),
    Number(f64),
    Text(Cow<'a, str>),
    /// A list or an object.
    Other,
}

impl<'a> Scalar<'a> {
    pub(crate) fn text(self) -> Option<Cow<'a, str>> {
        match self {
            Self::Text(text) => Some(text),
            _ => None,
        }
    }

    pub(crate) fn number(&self) -> Option<f64> {
        match *self {
            Self::Number(number) => Some(number),
            _ => None,
        }
    }
}

impl<'de> Deserialize<'de> for Scalar<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ScalarVisitor)
    }
}

/// The values of an object's members, one after the other: what `serde_json` and [`super::scan`] read alike.
pub(crate) trait Values<'a> {
    /// Why it cannot be read.
    type Error;

    fn scalar(&mut self) -> Result<Scalar<'a>, Self::Error>;

    /// A list of exactly three numbers; anything else reads as absent.
    fn three_numbers(&mut self) -> Result<Option<[f64; 3]>, Self::Error>;

    /// One member of an object by its name; none where the object lacks it or there is null instead.
    fn member(&mut self, name: &str) -> Result<Option<Scalar<'a>>, Self::Error>;

    fn skip(&mut self) -> Result<(), Self::Error>;
}

/// The values as `serde_json` reads them.
pub(crate) struct Members<'m, A>(pub(crate) &'m mut A);

impl<'de, A: MapAccess<'de>> Values<'de> for Members<'_, A> {
    type Error = A::Error;

    fn scalar(&mut self) -> Result<Scalar<'de>, A::Error> {
        self.0.next_value()
    }

    fn three_numbers(&mut self) -> Result<Option<[f64; 3]>, A::Error> {
        self.0.next_value::<&RawValue>().map(|list| serde_json::from_str(list.get()).ok())
    }

    fn member(&mut self, name: &str) -> Result<Option<Scalar<'de>>, A::Error> {
        self.0.next_value_seed(Member::of(name))
    }

    fn skip(&mut self) -> Result<(), A::Error> {
        self.0.next_value::<IgnoredAny>().map(drop)
    }
}

/// Reads one member of an object by its name, the last one where it is there twice (as Python reads it); none where the
/// object lacks it or there is null instead.
pub(crate) struct Member<'n, T>(&'n str, PhantomData<T>);

impl<'n, T> Member<'n, T> {
    pub(crate) fn of(name: &'n str) -> Self {
        Self(name, PhantomData)
    }
}

impl<'de, T: Deserialize<'de>> DeserializeSeed<'de> for Member<'_, T> {
    type Value = Option<T>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de, T: Deserialize<'de>> Visitor<'de> for Member<'_, T> {
    type Value = Option<T>;

    fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str("an object or null")
    }

    fn visit_unit<E>(self) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut found = None;
        while let Some(Key(key)) = map.next_key()? {
            if key == self.0 {
                found = Some(map.next_value()?);
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        Ok(found)
    }
}

struct ScalarVisitor;

impl<'de> Visitor<'de> for ScalarVisitor {
    type Value = Scalar<'de>;

    fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str("any JSON value")
    }

    fn visit_unit<E>(self) -> Result<Self::Value, E> {
        Ok(Scalar::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Self::Value, E> {
        Ok(Scalar::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Self::Value, E> {
        Ok(Scalar::Number(value as f64))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Self::Value, E> {
        Ok(Scalar::Number(value as f64))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Self::Value, E> {
        Ok(Scalar::Number(value))
    }

    fn visit_borrowed_str<E>(self, value: &'de str) -> Result<Self::Value, E> {
        Ok(Scalar::Text(Cow::Borrowed(value)))
    }

    fn visit_str<E>(self, value: &str) -> Result<Self::Value, E> {
        Ok(Scalar::Text(Cow::Owned(value.to_owned())))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
        while seq.next_element::<IgnoredAny>()?.is_some() {}
        Ok(Scalar::Other)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok(Scalar::Other)
    }
}

/// An object key; borrowed unless it is written with escapes.
pub(crate) struct Key<'a>(pub(crate) Cow<'a, str>);

impl<'de> Deserialize<'de> for Key<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match Scalar::deserialize(deserializer)? {
            Scalar::Text(text) => Ok(Self(text)),
            _ => Ok(Self(Cow::Borrowed(""))),
        }
    }
}

/// Visits the elements of a JSON list. `text` is what follows the opening bracket; the list may lack its end. `take` is
/// called where an element begins, and returns how far it reaches.
pub(crate) fn elements(text: &[u8], mut take: impl FnMut(usize) -> usize) {
    let mut at = 0;
    loop {
        while text.get(at).is_some_and(u8::is_ascii_whitespace) {
            at += 1;
        }
        if at >= text.len() || text[at] == b']' {
            return;
        }
        let end = take(at);
        at = end + usize::from(text.get(end) == Some(&b','));
    }
}

/// How far the element at the start of `text` reaches: to the comma or bracket that ends it, found by brackets and quotes
/// alone, so that an element which is no JSON costs only itself.
pub(crate) fn element_length(text: &[u8]) -> usize {
    let (mut depth, mut in_text, mut escaped) = (0_usize, false, false);
    for (at, byte) in text.iter().enumerate() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_text => escaped = true,
            b'"' => in_text = !in_text,
            _ if in_text => {}
            b'[' | b'{' => depth += 1,
            b',' | b']' if depth == 0 => return at,
            b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    text.len()
}

/// `text` with what Python's `json` writes and JSON forbids replaced: `NaN` and `±Infinity` (and numbers that are
/// as good as that) by `null`, lone surrogates
/// by U+FFFD, bytes that are not UTF-8 by the same.
pub(crate) fn mend(text: &[u8]) -> String {
    let text = String::from_utf8_lossy(text);
    let mut mended = String::with_capacity(text.len());
    let (mut rest, mut in_text) = (text.as_ref(), false);
    while let Some(first) = rest.chars().next() {
        let (replacement, taken) = if in_text { mend_text(rest, first) } else { mend_value(rest, first) };
        if taken == 1 && first == '"' {
            in_text = !in_text;
        }
        mended.push_str(replacement);
        rest = &rest[taken..];
    }
    mended
}

/// One step outside of a string: what to write, and how many bytes of `rest` that stands for.
fn mend_value(rest: &str, first: char) -> (&str, usize) {
    for token in ["NaN", "Infinity", "-Infinity"] {
        if rest.starts_with(token) {
            return ("null", token.len());
        }
    }
    if first == '-' || first.is_ascii_digit() {
        let number = |byte: u8| matches!(byte, b'0'..=b'9' | b'+' | b'-' | b'.' | b'e' | b'E');
        let end = rest.bytes().position(|byte| !number(byte)).unwrap_or(rest.len());
        let is_infinite = rest[..end].parse::<f64>().is_ok_and(f64::is_infinite);
        return (if is_infinite { "null" } else { &rest[..end] }, end);
    }
    (&rest[..first.len_utf8()], first.len_utf8())
}

/// One step inside of a string.
fn mend_text(rest: &str, first: char) -> (&str, usize) {
    if first != '\\' {
        return (&rest[..first.len_utf8()], first.len_utf8());
    }
    let second = rest[1..].chars().next().map_or(0, char::len_utf8);
    match utf16_escape(rest) {
        Some(0xD800..=0xDBFF) if matches!(utf16_escape(&rest[6..]), Some(0xDC00..=0xDFFF)) => (&rest[..12], 12),
        Some(0xD800..=0xDFFF) => ("\\ufffd", 6),
        _ => (&rest[..=second], 1 + second),
    }
}

/// The code unit of a `\uXXXX` escape at the start of `text`.
fn utf16_escape(text: &str) -> Option<u16> {
    let digits = text.strip_prefix("\\u")?.get(..4)?;
    digits.bytes().all(|b| b.is_ascii_hexdigit()).then(|| u16::from_str_radix(digits, 16).ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split(text: &str) -> Vec<&str> {
        let mut found = Vec::new();
        elements(text.as_bytes(), |start| {
            let end = start + element_length(&text.as_bytes()[start..]);
            found.push(&text[start..end]);
            end
        });
        found
    }

    #[test]
    fn elements_split_at_top_level_commas_only() {
        assert_eq!(split(r#"{"a":[1,2]}, "x,\"]" ,3]"#), [r#"{"a":[1,2]}"#, r#""x,\"]" "#, "3"]);
        assert_eq!(split("]"), Vec::<&str>::new());
        assert_eq!(split("{\"a\":1}, {\"b\":"), ["{\"a\":1}", "{\"b\":"]);
        assert_eq!(split("1,,2]"), ["1", "", "2"]);
        assert_eq!(split("}, 1}2, 3"), ["}", "1}2", "3"], "a brace that closes nothing");
    }

    #[test]
    fn mend_replaces_what_json_forbids_and_nothing_else() {
        for (python, json) in [
            (r#"{"a": NaN, "b": -Infinity, "c": [Infinity]}"#, r#"{"a": null, "b": null, "c": [null]}"#),
            ("[1e999, -1e999, 1e308, -7]", "[null, null, 1e308, -7]"),
            (r#"{"a": "NaN \"Infinity\""}"#, r#"{"a": "NaN \"Infinity\""}"#),
            (r#"{"a": "\ud800x\ude00"}"#, r#"{"a": "\ufffdx\ufffd"}"#),
            (r#"{"a": "\ud83d\ude00 \\ud800"}"#, r#"{"a": "\ud83d\ude00 \\ud800"}"#),
            ("{\"a\": \"é\\", "{\"a\": \"é\\"),
        ] {
            assert_eq!(mend(python.as_bytes()), json);
        }
        assert_eq!(mend(b"\"\xff\""), "\"\u{fffd}\"");
    }
}
