//! The fast path: a parser for the JSON that Python writes, tried before `serde_json`.
//!
//! It accepts a subset of JSON: UTF-8 with spaces exactly where Python's `json` module puts them, and no escapes in the
//! strings that are read. Any other input is a [`Fallback`] and is parsed by `serde_json`, which alone decides what is
//! valid JSON. If the fast path succeeds, its result is the same as that of `serde_json`. The fuzz targets `event` and
//! `envelope` compare the two.

#![allow(
    clippy::inline_always,
    reason = "without calls, and with constants for names, reading a member takes half the time"
)]

use std::borrow::Cow;

use wide::u8x16;

use super::numbers::{decimal, decimal_length, digit_count};
use super::{Scalar, ValueReader};

/// The input is outside the subset. `serde_json` decides whether it is valid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fallback;

/// The depth of nested lists and objects that are skipped. Deeper values are left to `serde_json`.
const MAX_DEPTH: usize = 8;

/// Reads a text from its start to its end. What is rarely needed is in functions that take a copy, so that the compiler can
/// keep the position in registers.
#[derive(Clone, Copy)]
pub(crate) struct Scanner<'a> {
    /// What has not been consumed yet.
    rest: &'a str,
}

impl<'a> Scanner<'a> {
    pub(crate) fn new(text: &'a str) -> Self {
        Self { rest: text }
    }

    /// What has not been consumed yet.
    pub(crate) fn rest(&self) -> &'a str {
        self.rest
    }

    #[inline]
    fn peek(&self) -> Option<u8> {
        self.rest.as_bytes().first().copied()
    }

    /// Consumes a literal if it is next.
    #[inline(always)]
    pub(crate) fn consume(&mut self, literal: &str) -> bool {
        let after = self.rest.strip_prefix(literal);
        self.rest = after.unwrap_or(self.rest);
        after.is_some()
    }

    #[inline(always)]
    fn expect(&mut self, literal: &str) -> Result<(), Fallback> {
        if self.consume(literal) { Ok(()) } else { Err(Fallback) }
    }

    /// Reads an object. `member` is called with each key and must consume the value.
    pub(crate) fn object(
        &mut self,
        member: impl FnMut(&'a [u8], &mut Self) -> Result<(), Fallback>,
    ) -> Result<(), Fallback> {
        self.expect("{")?;
        if self.consume("}") { Ok(()) } else { self.members(member) }
    }

    /// Reads the remaining members of an object, after at least one member has been read.
    pub(crate) fn remaining_members(
        &mut self,
        member: impl FnMut(&'a [u8], &mut Self) -> Result<(), Fallback>,
    ) -> Result<(), Fallback> {
        if self.has_next("}")? { self.members(member) } else { Ok(()) }
    }

    fn members(&mut self, mut member: impl FnMut(&'a [u8], &mut Self) -> Result<(), Fallback>) -> Result<(), Fallback> {
        loop {
            self.expect("\"")?;
            let key = self.string()?.as_bytes();
            self.expect(": ")?;
            member(key, self)?;
            if !self.has_next("}")? {
                return Ok(());
            }
        }
    }

    /// Consumes the comma before the next element or member, or the closing bracket `end`. Returns whether there is a
    /// next one.
    #[inline(always)]
    fn has_next(&mut self, end: &str) -> Result<bool, Fallback> {
        if self.consume(end) { Ok(false) } else { self.expect(", ").map(|()| true) }
    }

    /// Consumes the bytes before the next quote, backslash or control character.
    #[inline(always)]
    fn plain_text(&mut self) -> &'a str {
        let (text, rest) = self.rest.split_at(plain_text_length(self.rest.as_bytes()));
        self.rest = rest;
        text
    }

    /// Reads a string without escapes, after its opening quote.
    #[inline(always)]
    fn string(&mut self) -> Result<&'a str, Fallback> {
        let text = self.plain_text();
        self.expect("\"").map(|()| text)
    }

    /// Skips a string, after its opening quote.
    #[inline(always)]
    pub(crate) fn skip_string(&mut self) -> Result<(), Fallback> {
        self.plain_text();
        if !self.consume("\"") {
            *self = self.past_escapes()?;
        }
        Ok(())
    }

    /// The position after a string whose next character is an escape.
    #[inline(never)]
    fn past_escapes(mut self) -> Result<Self, Fallback> {
        loop {
            let length = match self.rest.as_bytes() {
                [b'\\', b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't', ..] => 2,
                [b'\\', b'u', a, b, c, d, ..] if [a, b, c, d].iter().all(|byte| byte.is_ascii_hexdigit()) => 6,
                _ => return Err(Fallback),
            };
            self.rest = &self.rest[length..];
            self.plain_text();
            if self.consume("\"") {
                return Ok(self);
            }
        }
    }

    /// Skips a number.
    #[inline(always)]
    fn skip_number(&mut self) -> Result<(), Fallback> {
        match decimal_length(self.rest.as_bytes()) {
            Some(length) => self.rest = &self.rest[length..],
            None => *self = self.past_number()?,
        }
        Ok(())
    }

    /// The position after a number in any notation.
    #[inline(never)]
    fn past_number(mut self) -> Result<Self, Fallback> {
        self.consume("-");
        let leads_with_zero = self.peek() == Some(b'0');
        if self.digits()? > 1 && leads_with_zero {
            return Err(Fallback);
        }
        if self.consume(".") {
            self.digits()?;
        }
        if self.consume("e") || self.consume("E") {
            let _ = self.consume("+") || self.consume("-");
            self.digits()?;
        }
        Ok(self)
    }

    /// Consumes at least one digit. Returns the number of digits.
    fn digits(&mut self) -> Result<usize, Fallback> {
        let count = digit_count(self.rest.as_bytes());
        self.rest = &self.rest[count..];
        if count == 0 { Err(Fallback) } else { Ok(count) }
    }

    #[inline(always)]
    fn read_number(&mut self) -> Result<f64, Fallback> {
        let bytes = self.rest.as_bytes();
        let (number, length) = match bytes {
            [digit @ b'0'..=b'9', b',', ..] => (f64::from(digit - b'0'), 1),
            _ => decimal(bytes).map_or_else(|| self.read_unusual_number(), Ok)?,
        };
        self.rest = &self.rest[length..];
        Ok(number)
    }

    /// The next number in any notation, and its length.
    #[inline(never)]
    fn read_unusual_number(self) -> Result<(f64, usize), Fallback> {
        let length = self.rest.len() - self.past_number()?.rest.len();
        match self.rest[..length].parse::<f64>() {
            Ok(number) if number.is_finite() => Ok((number, length)),
            _ => Err(Fallback),
        }
    }

    /// The position after any value.
    #[inline(never)]
    fn past_value(mut self, depth: usize) -> Result<Self, Fallback> {
        match self.peek() {
            Some(b'"') => {
                self.expect("\"")?;
                self.skip_string()?;
            }
            Some(b'-' | b'0'..=b'9') => self.skip_number()?,
            Some(b'n') => self.expect("null")?,
            Some(b't') => self.expect("true")?,
            Some(b'f') => self.expect("false")?,
            Some(b'{') if depth > 0 => self.object(|_, scanner| {
                *scanner = scanner.past_value(depth - 1)?;
                Ok(())
            })?,
            Some(b'[') if depth > 0 => {
                self.expect("[")?;
                let mut has_next = !self.consume("]");
                while has_next {
                    self = self.past_value(depth - 1)?;
                    has_next = self.has_next("]")?;
                }
            }
            _ => return Err(Fallback),
        }
        Ok(self)
    }
}

/// The number of bytes before the next quote, backslash or control character, or before the end of the text.
#[inline(always)]
fn plain_text_length(text: &[u8]) -> usize {
    let (two, space, backslash) = (u8x16::splat(2), u8x16::splat(b' '), u8x16::splat(b'\\'));
    let mut rest = text;
    while let Some((sixteen, more)) = rest.split_first_chunk() {
        let bytes = u8x16::new(*sixteen);
        // This exchanges the quote, 0x22, and the space, 0x20. Then exactly the quote and the control characters are at
        // most a space.
        let exchanged = bytes ^ two;
        let found = (exchanged.min(space).simd_eq(exchanged) | bytes.simd_eq(backslash)).to_bitmask();
        if found != 0 {
            return text.len() - rest.len() + found.trailing_zeros() as usize;
        }
        rest = more;
    }
    text.len() - rest.len() + short_plain_text_length(rest)
}

/// The same for the last bytes of a text.
#[inline(never)]
fn short_plain_text_length(text: &[u8]) -> usize {
    let is_special = |byte: &u8| matches!(byte, b'"' | b'\\' | 0..=0x1f);
    text.iter().position(is_special).unwrap_or(text.len())
}

impl<'a> ValueReader<'a> for Scanner<'a> {
    type Error = Fallback;

    #[inline(always)]
    fn scalar(&mut self) -> Result<Scalar<'a>, Fallback> {
        if self.consume("\"") {
            return self.string().map(|text| Scalar::Text(Cow::Borrowed(text)));
        }
        match self.peek() {
            Some(b'-' | b'0'..=b'9') => self.read_number().map(Scalar::Number),
            Some(b'n') => self.expect("null").map(|()| Scalar::Null),
            Some(b't') => self.expect("true").map(|()| Scalar::Bool(true)),
            Some(b'f') => self.expect("false").map(|()| Scalar::Bool(false)),
            _ => Err(Fallback),
        }
    }

    #[inline(always)]
    fn number(&mut self) -> Result<Option<f64>, Fallback> {
        match self.peek() {
            Some(b'0'..=b'9') => self.read_number().map(Some),
            _ => self.scalar().map(|value| value.as_number()),
        }
    }

    fn three_numbers(&mut self) -> Result<Option<[f64; 3]>, Fallback> {
        let mut numbers = [0.0; 3];
        for (prefix, number) in ["[", ", ", ", "].into_iter().zip(&mut numbers) {
            self.expect(prefix)?;
            *number = self.read_number()?;
        }
        self.expect("]")?;
        Ok(Some(numbers))
    }

    fn member(&mut self, name: &str) -> Result<Option<Scalar<'a>>, Fallback> {
        if self.consume("null") {
            return Ok(None);
        }
        let mut found = None;
        self.object(|key, scanner| {
            if key == name.as_bytes() {
                found = Some(scanner.scalar()?);
                return Ok(());
            }
            scanner.skip()
        })?;
        Ok(found)
    }

    #[inline(always)]
    fn skip(&mut self) -> Result<(), Fallback> {
        if self.consume("\"") {
            return self.skip_string();
        }
        match self.peek() {
            Some(b'0'..=b'9') => self.skip_number(),
            Some(b'n') => self.expect("null"),
            _ => {
                *self = self.past_value(MAX_DEPTH)?;
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn skips(text: &str) -> bool {
        let mut scanner = Scanner::new(text);
        scanner.skip() == Ok(()) && scanner.rest().is_empty()
    }

    #[test]
    fn only_values_in_the_subset_are_skipped() {
        for text in [
            r#""""#,
            r#""short""#,
            r#""more than eight bytes, with escapes \"x\", \\ \u00e9 \n""#,
            "0",
            "-0.5e-07",
            "12.25E+3",
            "null",
            "true",
            "false",
            "[]",
            "{}",
            r#"[1, "x", [2, {"a": [], "b": null}]]"#,
        ] {
            assert!(skips(text), "{text}");
        }
        for text in [
            "",
            "\"",
            r#""\x""#,
            r#""\u12g4""#,
            r#""\"#,
            "01",
            "-",
            "1.",
            ".5",
            "1e",
            "+1",
            "NaN",
            "nul",
            "[1,2]",
            "[1, ]",
            "{\"a\":1}",
            "{1: 2}",
            "[1",
            &format!("{}{}", "[".repeat(MAX_DEPTH + 1), "]".repeat(MAX_DEPTH + 1)),
        ] {
            assert!(!skips(text), "{text}");
        }
    }

    #[test]
    fn values_outside_the_subset_fall_back() {
        let scalar = |text| Scanner::new(text).scalar();
        assert_eq!(scalar("\"a\","), Ok(Scalar::Text("a".into())));
        assert_eq!(scalar("1763820000.1234567}"), Ok(Scalar::Number(1_763_820_000.123_456_7)));
        assert_eq!(scalar("18446744073709551616"), Ok(Scalar::Number(18_446_744_073_709_551_616.0)));
        assert_eq!(scalar("null"), Ok(Scalar::Null));
        for text in [r#""\n""#, "[]", "{}", "1e999", "-Infinity"] {
            assert_eq!(scalar(text), Err(Fallback), "{text}");
        }
        assert_eq!(Scanner::new("[0.5, 1, 2e0]").three_numbers(), Ok(Some([0.5, 1.0, 2.0])));
        for text in ["[0.5, 1]", "[0.5, 1, 2, 3]", "[0.5, 1, null]", "null"] {
            assert_eq!(Scanner::new(text).three_numbers(), Err(Fallback), "{text}");
        }
        assert_eq!(Scanner::new(r#"{"a": 1, "b": {}, "a": 2}"#).member("a"), Ok(Some(Scalar::Number(2.0))));
        assert_eq!(Scanner::new(r#"{"b": []}"#).member("a"), Ok(None));
        assert_eq!(Scanner::new("null").member("a"), Ok(None));
        assert_eq!(Scanner::new("5").member("a"), Err(Fallback));
    }

    proptest::proptest! {
        /// Every notation of a number reads as `parse` and `serde_json` read it, wherever the text ends.
        #[test]
        fn numbers_are_the_nearest_ones(
            text in "(-?(0|[1-9][0-9]{0,20}|[0-9]{0,3}|1[0-9]{9})(\\.[0-9]{0,19})?([eE][+-]?[0-9]{0,3})?)",
            after in proptest::sample::select(&["", ",", "}", ", \"clock\": 12345678"][..]),
        ) {
            let whole = format!("{text}{after}");
            let mut scanner = Scanner::new(&whole);
            let number = scanner.read_number();
            let expected: Option<f64> = serde_json::from_str(&text).ok();
            proptest::prop_assert_eq!(number.ok().map(f64::to_bits), expected.map(f64::to_bits));
            if let Some(expected) = expected {
                proptest::prop_assert_eq!(expected.to_bits(), text.parse::<f64>().unwrap().to_bits());
                proptest::prop_assert_eq!(scanner.rest(), after);
            }
        }

        #[test]
        fn plain_text_ends_at_the_first_byte_that_json_escapes(text in "[ -~\u{7f}-\u{2ff}\\x00-\\x1f]{0,3}[a-z]{0,40}[ -~\\x00-\\x1f]{0,3}") {
            let expected = text.bytes().position(|byte| byte < b' ' || matches!(byte, b'"' | b'\\'));
            proptest::prop_assert_eq!(plain_text_length(text.as_bytes()), expected.unwrap_or(text.len()));
        }
    }
}
