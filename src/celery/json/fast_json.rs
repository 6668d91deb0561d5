//! The fast path: a parser for the JSON that Python writes, tried before `serde_json`.
//!
//! It accepts a subset of JSON: printable ASCII, with spaces exactly where Python's `json` module puts them, and no
//! escapes in the strings that are read. Any other input is a [`Fallback`] and is parsed by `serde_json`, which alone
//! decides what is valid JSON. If the fast path succeeds, its result is the same as that of `serde_json`. The fuzz
//! targets `event` and `envelope` compare the two.

use std::borrow::Cow;

use super::{Scalar, ValueReader};

/// The input is outside the subset. `serde_json` decides whether it is valid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fallback;

/// The depth of nested lists and objects that are skipped. Deeper values are left to `serde_json`.
const MAX_DEPTH: usize = 8;

/// `text` as a string if every byte is printable ASCII. The strings in it then need no check for control characters or
/// UTF-8.
pub(crate) fn printable_ascii(text: &[u8]) -> Option<&str> {
    let is_printable =
        |chunk: &[u8]| chunk.iter().fold(true, |printable, byte| printable & (b' '..=b'~').contains(byte));
    // The compiler vectorizes a fold over a chunk without an early exit.
    text.chunks(64).all(is_printable).then(|| str::from_utf8(text).ok())?
}

/// A position in printable ASCII text.
pub(crate) struct Scanner<'a> {
    text: &'a str,
    /// Bytes consumed so far.
    at: usize,
}

impl<'a> Scanner<'a> {
    /// Starts at the beginning of `text`, which must be [`printable_ascii`].
    pub(crate) fn new(text: &'a str) -> Self {
        Self { text, at: 0 }
    }

    /// Bytes consumed so far.
    pub(crate) fn position(&self) -> usize {
        self.at
    }

    fn peek(&self) -> Option<u8> {
        self.text.as_bytes().get(self.at).copied()
    }

    #[inline]
    fn expect(&mut self, literal: &str) -> Result<(), Fallback> {
        if !self.text.as_bytes()[self.at..].starts_with(literal.as_bytes()) {
            return Err(Fallback);
        }
        self.at += literal.len();
        Ok(())
    }

    /// Reads an object. `member` is called with each key and must consume the value.
    pub(crate) fn object(
        &mut self,
        member: impl FnMut(&'a [u8], &mut Self) -> Result<(), Fallback>,
    ) -> Result<(), Fallback> {
        self.expect("{")?;
        if self.peek() == Some(b'}') {
            self.at += 1;
            return Ok(());
        }
        self.members(member)
    }

    /// Reads the remaining members of an object, after at least one member has been read.
    pub(crate) fn remaining_members(
        &mut self,
        member: impl FnMut(&'a [u8], &mut Self) -> Result<(), Fallback>,
    ) -> Result<(), Fallback> {
        if self.has_next(b'}')? { self.members(member) } else { Ok(()) }
    }

    fn members(&mut self, mut member: impl FnMut(&'a [u8], &mut Self) -> Result<(), Fallback>) -> Result<(), Fallback> {
        loop {
            self.expect("\"")?;
            let key = self.string()?;
            self.expect(": ")?;
            member(key, self)?;
            if !self.has_next(b'}')? {
                return Ok(());
            }
        }
    }

    /// Consumes the comma before the next element or member, or the closing bracket `end`. Returns whether there is a
    /// next one.
    #[inline]
    fn has_next(&mut self, end: u8) -> Result<bool, Fallback> {
        match self.peek() {
            Some(b',') => self.expect(", ").map(|()| true),
            Some(byte) if byte == end => {
                self.at += 1;
                Ok(false)
            }
            _ => Err(Fallback),
        }
    }

    /// Reads a string without escapes, after its opening quote.
    #[inline]
    fn string(&mut self) -> Result<&'a [u8], Fallback> {
        let rest = &self.text.as_bytes()[self.at..];
        match quote_or_escape(rest) {
            Some(end) if rest[end] == b'"' => {
                self.at += end + 1;
                Ok(&rest[..end])
            }
            _ => Err(Fallback),
        }
    }

    /// Skips a string, after its opening quote.
    #[inline]
    fn skip_string(&mut self) -> Result<(), Fallback> {
        loop {
            let rest = &self.text.as_bytes()[self.at..];
            let end = quote_or_escape(rest).ok_or(Fallback)?;
            self.at += end + 1;
            if rest[end] == b'"' {
                return Ok(());
            }
            self.at += match rest[end + 1..] {
                [b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't', ..] => 1,
                [b'u', a, b, c, d, ..] if [a, b, c, d].iter().all(u8::is_ascii_hexdigit) => 5,
                _ => return Err(Fallback),
            };
        }
    }

    /// Consumes at least one digit. Returns the number of digits.
    #[inline]
    fn digits(&mut self) -> Result<usize, Fallback> {
        let rest = &self.text.as_bytes()[self.at..];
        let count = rest.iter().take_while(|byte| byte.is_ascii_digit()).count();
        self.at += count;
        if count == 0 { Err(Fallback) } else { Ok(count) }
    }

    /// Skips a number.
    #[inline]
    fn skip_number(&mut self) -> Result<(), Fallback> {
        self.at += usize::from(self.peek() == Some(b'-'));
        let leads_with_zero = self.peek() == Some(b'0');
        if self.digits()? > 1 && leads_with_zero {
            return Err(Fallback);
        }
        if self.peek() == Some(b'.') {
            self.at += 1;
            self.digits()?;
        }
        if let Some(b'e' | b'E') = self.peek() {
            self.at += 1;
            self.at += usize::from(matches!(self.peek(), Some(b'+' | b'-')));
            self.digits()?;
        }
        Ok(())
    }

    fn number(&mut self) -> Result<f64, Fallback> {
        let start = self.at;
        self.skip_number()?;
        match self.text[start..self.at].parse::<f64>() {
            Ok(number) if number.is_finite() => Ok(number),
            _ => Err(Fallback),
        }
    }

    fn skip_value(&mut self, depth: usize) -> Result<(), Fallback> {
        match self.peek() {
            Some(b'"') => {
                self.at += 1;
                self.skip_string()
            }
            Some(b'-' | b'0'..=b'9') => self.skip_number(),
            Some(b'n') => self.expect("null"),
            Some(b't') => self.expect("true"),
            Some(b'f') => self.expect("false"),
            Some(b'{') if depth > 0 => self.object(|_, scanner| scanner.skip_value(depth - 1)),
            Some(b'[') if depth > 0 => {
                self.at += 1;
                if self.peek() == Some(b']') {
                    self.at += 1;
                    return Ok(());
                }
                loop {
                    self.skip_value(depth - 1)?;
                    if !self.has_next(b']')? {
                        return Ok(());
                    }
                }
            }
            _ => Err(Fallback),
        }
    }
}

/// The offset of the next quote or backslash. Examines eight bytes at a time.
#[inline]
fn quote_or_escape(text: &[u8]) -> Option<usize> {
    const ONES: u64 = u64::from_ne_bytes([0x01; 8]);
    const HIGH: u64 = u64::from_ne_bytes([0x80; 8]);
    let mut rest = text;
    while let Some((eight, more)) = rest.split_first_chunk() {
        let word = u64::from_le_bytes(*eight);
        // Adding 0x7f to a byte below 0x80 sets its high bit unless the byte is zero, that is, unless it matches.
        let differs = |byte: u8| (word ^ (ONES * u64::from(byte))).wrapping_add(HIGH - ONES);
        let found = !(differs(b'"') & differs(b'\\')) & HIGH;
        if found != 0 {
            return Some(text.len() - rest.len() + found.trailing_zeros() as usize / 8);
        }
        rest = more;
    }
    let end = rest.iter().position(|byte| matches!(byte, b'"' | b'\\'))?;
    Some(text.len() - rest.len() + end)
}

impl<'a> ValueReader<'a> for Scanner<'a> {
    type Error = Fallback;

    #[inline]
    fn scalar(&mut self) -> Result<Scalar<'a>, Fallback> {
        match self.peek() {
            Some(b'"') => {
                self.at += 1;
                let start = self.at;
                let length = self.string()?.len();
                Ok(Scalar::Text(Cow::Borrowed(&self.text[start..start + length])))
            }
            Some(b'-' | b'0'..=b'9') => self.number().map(Scalar::Number),
            Some(b'n') => self.expect("null").map(|()| Scalar::Null),
            Some(b't') => self.expect("true").map(|()| Scalar::Bool(true)),
            Some(b'f') => self.expect("false").map(|()| Scalar::Bool(false)),
            _ => Err(Fallback),
        }
    }

    fn three_numbers(&mut self) -> Result<Option<[f64; 3]>, Fallback> {
        let mut numbers = [0.0; 3];
        for (prefix, number) in ["[", ", ", ", "].into_iter().zip(&mut numbers) {
            self.expect(prefix)?;
            *number = self.number()?;
        }
        self.expect("]")?;
        Ok(Some(numbers))
    }

    fn member(&mut self, name: &str) -> Result<Option<Scalar<'a>>, Fallback> {
        if self.peek() == Some(b'n') {
            return self.expect("null").map(|()| None);
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

    #[inline]
    fn skip(&mut self) -> Result<(), Fallback> {
        self.skip_value(MAX_DEPTH)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn skips(text: &str) -> bool {
        let mut scanner = Scanner::new(text);
        scanner.skip() == Ok(()) && scanner.position() == text.len()
    }

    #[test]
    fn printable_ascii_excludes_control_characters_and_utf8() {
        assert_eq!(printable_ascii(b"{\"a\": 1}~"), Some("{\"a\": 1}~"));
        for text in ["\u{e9}", "a\n", "\u{7f}", "\0", &format!("{}\t", "x".repeat(200))] {
            assert_eq!(printable_ascii(text.as_bytes()), None, "{text:?}");
        }
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
}
