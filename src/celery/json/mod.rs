//! Lenient JSON: reads single values of any type, and repairs Python's deviations from JSON.
//! Every function is pure and tolerates any input, however deeply nested.

pub(crate) mod fast_json;
mod numbers;

use std::borrow::Cow;
use std::fmt;
use std::marker::PhantomData;

use serde::de::{Deserialize, DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;

/// A JSON value in as much detail as an event's fields need. A field of an unexpected type is not an error: it reads as
/// absent.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Scalar<'a> {
    Null,
    Bool(bool),
    Number(f64),
    Text(Cow<'a, str>),
    /// An array or an object.
    Other,
}

impl<'a> Scalar<'a> {
    #[inline]
    pub(crate) fn into_text(self) -> Option<Cow<'a, str>> {
        match self {
            Self::Text(text) => Some(text),
            _ => None,
        }
    }

    #[inline]
    pub(crate) fn as_number(&self) -> Option<f64> {
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

/// Reads the values of an object's members in sequence. The fast path and `serde_json` implement it, so that both share
/// the code that assigns fields. Each method consumes one value.
pub(crate) trait ValueReader<'a> {
    /// Why a value cannot be read.
    type Error;

    /// Reads any value.
    fn scalar(&mut self) -> Result<Scalar<'a>, Self::Error>;

    /// Reads a string. Any other value reads as `None`.
    #[inline(always)]
    #[allow(clippy::inline_always, reason = "on the fast path, a call would cost more than reading the string")]
    fn text(&mut self) -> Result<Option<Cow<'a, str>>, Self::Error> {
        self.scalar().map(Scalar::into_text)
    }

    /// Reads a number. Any other value reads as `None`.
    #[inline]
    fn number(&mut self) -> Result<Option<f64>, Self::Error> {
        self.scalar().map(|value| value.as_number())
    }

    /// Reads an array of exactly three numbers. Any other value reads as `None`.
    fn three_numbers(&mut self) -> Result<Option<[f64; 3]>, Self::Error>;

    /// Reads one member of an object. `None` if the object lacks that member, or if null stands in
    /// place of the object.
    fn member(&mut self, name: &str) -> Result<Option<Scalar<'a>>, Self::Error>;

    /// Skips any value.
    fn skip(&mut self) -> Result<(), Self::Error>;
}

/// An object that is read member by member, by the fast path or by `serde_json`.
pub(crate) trait Members<'a>: Default {
    /// What an error says was expected.
    const EXPECTED: &'static str;

    /// Reads the value of a member.
    fn read_member<V: ValueReader<'a>>(&mut self, key: &[u8], values: &mut V) -> Result<(), V::Error>;
}

/// Reads such an object with `serde_json`.
pub(crate) struct Object<T>(pub(crate) T);

impl<'de, T: Members<'de>> Deserialize<'de> for Object<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(ObjectVisitor(PhantomData))
    }
}

struct ObjectVisitor<T>(PhantomData<T>);

impl<'de, T: Members<'de>> Visitor<'de> for ObjectVisitor<T> {
    type Value = Object<T>;

    fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.write_str(T::EXPECTED)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut object = T::default();
        while let Some(Key(key)) = map.next_key()? {
            object.read_member(key.as_bytes(), &mut SerdeReader(&mut map))?;
        }
        Ok(Object(object))
    }
}

/// Reads values with `serde_json`.
struct SerdeReader<'m, A>(&'m mut A);

impl<'de, A: MapAccess<'de>> ValueReader<'de> for SerdeReader<'_, A> {
    type Error = A::Error;

    fn scalar(&mut self) -> Result<Scalar<'de>, A::Error> {
        self.0.next_value()
    }

    fn three_numbers(&mut self) -> Result<Option<[f64; 3]>, A::Error> {
        self.0.next_value::<&RawValue>().map(|list| serde_json::from_str(list.get()).ok())
    }

    fn member(&mut self, name: &str) -> Result<Option<Scalar<'de>>, A::Error> {
        self.0.next_value_seed(FieldSeed::new(name))
    }

    fn skip(&mut self) -> Result<(), A::Error> {
        self.0.next_value::<IgnoredAny>().map(drop)
    }
}

/// Reads one member of an object. If the member occurs twice, the last one wins, as in Python. `None` if the object
/// lacks the member, or if null stands in place of the object.
pub(crate) struct FieldSeed<'n, T>(&'n str, PhantomData<T>);

impl<'n, T> FieldSeed<'n, T> {
    pub(crate) fn new(name: &'n str) -> Self {
        Self(name, PhantomData)
    }
}

impl<'de, T: Deserialize<'de>> DeserializeSeed<'de> for FieldSeed<'_, T> {
    type Value = Option<T>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de, T: Deserialize<'de>> Visitor<'de> for FieldSeed<'_, T> {
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

/// An object key. Borrowed unless it contains escapes.
struct Key<'a>(Cow<'a, str>);

impl<'de> Deserialize<'de> for Key<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match Scalar::deserialize(deserializer)? {
            Scalar::Text(text) => Ok(Self(text)),
            _ => Ok(Self(Cow::Borrowed(""))),
        }
    }
}

/// Visits the elements of a JSON array. `text` starts after the opening bracket, and the array may be truncated.
/// `visit` is called with the offset at which an element begins, and returns the offset at which it ends.
pub(crate) fn for_each_element(text: &[u8], mut visit: impl FnMut(usize) -> usize) {
    let mut at = 0;
    loop {
        while text.get(at).is_some_and(u8::is_ascii_whitespace) {
            at += 1;
        }
        if at >= text.len() || text[at] == b']' {
            return;
        }
        let end = visit(at);
        at = end + usize::from(text.get(end) == Some(&b','));
    }
}

/// The length of the element at the start of `text`, in bytes, without the comma or bracket that ends it.
///
/// Only brackets and quotes are considered, so that an element that is not valid JSON does not invalidate the elements
/// after it.
pub(crate) fn element_length(text: &[u8]) -> usize {
    let (mut depth, mut in_string, mut escaped) = (0_usize, false, false);
    for (at, byte) in text.iter().enumerate() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            _ if in_string => {}
            b'[' | b'{' => depth += 1,
            b',' | b']' if depth == 0 => return at,
            b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    text.len()
}

/// Replaces what Python's `json` module writes and JSON forbids: `NaN`, `±Infinity` and numbers that overflow an `f64`
/// become `null`. Lone surrogates and bytes that are not UTF-8 become U+FFFD.
pub(crate) fn sanitize(text: &[u8]) -> String {
    let text = String::from_utf8_lossy(text);
    let mut sanitized = String::with_capacity(text.len());
    let (mut rest, mut in_string) = (text.as_ref(), false);
    while let Some(first) = rest.chars().next() {
        let (replacement, consumed) =
            if in_string { sanitize_in_string(rest, first) } else { sanitize_outside_string(rest, first) };
        if consumed == 1 && first == '"' {
            in_string = !in_string;
        }
        sanitized.push_str(replacement);
        rest = &rest[consumed..];
    }
    sanitized
}

/// Sanitizes the next token outside a string. Returns the replacement and the number of bytes of `rest` that it
/// replaces.
fn sanitize_outside_string(rest: &str, first: char) -> (&str, usize) {
    for token in ["NaN", "Infinity", "-Infinity"] {
        if rest.starts_with(token) {
            return ("null", token.len());
        }
    }
    if first == '-' || first.is_ascii_digit() {
        let is_numeric = |byte: u8| matches!(byte, b'0'..=b'9' | b'+' | b'-' | b'.' | b'e' | b'E');
        let end = rest.bytes().position(|byte| !is_numeric(byte)).unwrap_or(rest.len());
        let is_infinite = rest[..end].parse::<f64>().is_ok_and(f64::is_infinite);
        return (if is_infinite { "null" } else { &rest[..end] }, end);
    }
    (&rest[..first.len_utf8()], first.len_utf8())
}

/// Sanitizes the next character or escape in a string. Returns the same as [`sanitize_outside_string`].
fn sanitize_in_string(rest: &str, first: char) -> (&str, usize) {
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
        for_each_element(text.as_bytes(), |start| {
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
        assert_eq!(split("}, 1}2, 3"), ["}", "1}2", "3"], "an unmatched closing brace");
    }

    #[test]
    fn sanitize_replaces_only_what_json_forbids() {
        for (python, json) in [
            (r#"{"a": NaN, "b": -Infinity, "c": [Infinity]}"#, r#"{"a": null, "b": null, "c": [null]}"#),
            ("[1e999, -1e999, 1e308, -7]", "[null, null, 1e308, -7]"),
            (r#"{"a": "NaN \"Infinity\""}"#, r#"{"a": "NaN \"Infinity\""}"#),
            (r#"{"a": "\ud800x\ude00"}"#, r#"{"a": "\ufffdx\ufffd"}"#),
            (r#"{"a": "\ud83d\ude00 \\ud800"}"#, r#"{"a": "\ud83d\ude00 \\ud800"}"#),
            ("{\"a\": \"é\\", "{\"a\": \"é\\"),
        ] {
            assert_eq!(sanitize(python.as_bytes()), json);
        }
        assert_eq!(sanitize(b"\"\xff\""), "\"\u{fffd}\"");
    }
}
