//! A quick reader for JSON as Python writes it, in front of `serde_json`.
//!
//! It reads a part of JSON and nothing else: printable ASCII, blanks where Python's `json` puts them, no
//! text with escapes where the text is asked for. Whatever else it meets is [`Unusual`] and is left to `serde_json`, which
//! alone decides what is JSON and what is not. Where this reader comes to an end, it has read what `serde_json` would
//! have read (the fuzz targets `event` and `envelope` hold them against each other).

use std::borrow::Cow;

use super::json::{Scalar, Values};

/// Not what is read here: valid or not, that is for `serde_json` to say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Unusual;

/// Lists and objects within each other that are skipped.
const MAX_DEPTH: usize = 8;

/// The text, if it is printable ASCII throughout: so a string in it needs no look at its characters.
pub(crate) fn plain(text: &[u8]) -> Option<&str> {
    let is_plain = |piece: &[u8]| piece.iter().fold(true, |plain, byte| plain & (b' '..=b'~').contains(byte));
    // A whole piece at a time is what the compiler makes SIMD of.
    text.chunks(64).all(is_plain).then(|| str::from_utf8(text).ok())?
}

/// A place in plain text.
pub(crate) struct Scanner<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> Scanner<'a> {
    /// At the beginning of `text`, which is [`plain`].
    pub(crate) fn new(text: &'a str) -> Self {
        Self { text, at: 0 }
    }

    /// Bytes read.
    pub(crate) fn position(&self) -> usize {
        self.at
    }

    fn peek(&self) -> Option<u8> {
        self.text.as_bytes().get(self.at).copied()
    }

    #[inline]
    fn expect(&mut self, literal: &str) -> Result<(), Unusual> {
        if !self.text.as_bytes()[self.at..].starts_with(literal.as_bytes()) {
            return Err(Unusual);
        }
        self.at += literal.len();
        Ok(())
    }

    /// Reads an object; `member` is called with each key and has to take the value.
    pub(crate) fn object(
        &mut self,
        member: impl FnMut(&'a [u8], &mut Self) -> Result<(), Unusual>,
    ) -> Result<(), Unusual> {
        self.expect("{")?;
        if self.peek() == Some(b'}') {
            self.at += 1;
            return Ok(());
        }
        self.members(member)
    }

    /// Reads the rest of an object of which a member has been read.
    pub(crate) fn more_members(
        &mut self,
        member: impl FnMut(&'a [u8], &mut Self) -> Result<(), Unusual>,
    ) -> Result<(), Unusual> {
        if self.goes_on(b'}')? { self.members(member) } else { Ok(()) }
    }

    fn members(&mut self, mut member: impl FnMut(&'a [u8], &mut Self) -> Result<(), Unusual>) -> Result<(), Unusual> {
        loop {
            self.expect("\"")?;
            let key = self.text_to_quote()?;
            self.expect(": ")?;
            member(key, self)?;
            if !self.goes_on(b'}')? {
                return Ok(());
            }
        }
    }

    /// Takes the comma before a further element or member, or the bracket that ends them.
    #[inline]
    fn goes_on(&mut self, end: u8) -> Result<bool, Unusual> {
        match self.peek() {
            Some(b',') => self.expect(", ").map(|()| true),
            Some(byte) if byte == end => {
                self.at += 1;
                Ok(false)
            }
            _ => Err(Unusual),
        }
    }

    /// Text without escapes, whose opening quote has been taken.
    #[inline]
    fn text_to_quote(&mut self) -> Result<&'a [u8], Unusual> {
        let rest = &self.text.as_bytes()[self.at..];
        match quote_or_escape(rest) {
            Some(end) if rest[end] == b'"' => {
                self.at += end + 1;
                Ok(&rest[..end])
            }
            _ => Err(Unusual),
        }
    }

    /// Goes behind text whose opening quote has been taken.
    #[inline]
    fn skip_text(&mut self) -> Result<(), Unusual> {
        loop {
            let rest = &self.text.as_bytes()[self.at..];
            let end = quote_or_escape(rest).ok_or(Unusual)?;
            self.at += end + 1;
            if rest[end] == b'"' {
                return Ok(());
            }
            self.at += match rest[end + 1..] {
                [b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't', ..] => 1,
                [b'u', a, b, c, d, ..] if [a, b, c, d].iter().all(u8::is_ascii_hexdigit) => 5,
                _ => return Err(Unusual),
            };
        }
    }

    /// Takes digits, at least one; how many.
    #[inline]
    fn digits(&mut self) -> Result<usize, Unusual> {
        let rest = &self.text.as_bytes()[self.at..];
        let count = rest.iter().take_while(|byte| byte.is_ascii_digit()).count();
        self.at += count;
        if count == 0 { Err(Unusual) } else { Ok(count) }
    }

    /// Goes behind a number.
    #[inline]
    fn skip_number(&mut self) -> Result<(), Unusual> {
        self.at += usize::from(self.peek() == Some(b'-'));
        let leads_with_zero = self.peek() == Some(b'0');
        if self.digits()? > 1 && leads_with_zero {
            return Err(Unusual);
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

    fn number(&mut self) -> Result<f64, Unusual> {
        let start = self.at;
        self.skip_number()?;
        match self.text[start..self.at].parse::<f64>() {
            Ok(number) if number.is_finite() => Ok(number),
            _ => Err(Unusual),
        }
    }

    fn skip_value(&mut self, depth: usize) -> Result<(), Unusual> {
        match self.peek() {
            Some(b'"') => {
                self.at += 1;
                self.skip_text()
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
                    if !self.goes_on(b']')? {
                        return Ok(());
                    }
                }
            }
            _ => Err(Unusual),
        }
    }
}

/// Where the next quote or backslash is, found eight bytes at a time.
#[inline]
fn quote_or_escape(text: &[u8]) -> Option<usize> {
    const ONES: u64 = u64::from_ne_bytes([0x01; 8]);
    const HIGH: u64 = u64::from_ne_bytes([0x80; 8]);
    let mut rest = text;
    while let Some((eight, more)) = rest.split_first_chunk() {
        let word = u64::from_le_bytes(*eight);
        // A byte below 0x80 that is not zero gets its high bit when 0x7f is added.
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

impl<'a> Values<'a> for Scanner<'a> {
    type Error = Unusual;

    #[inline]
    fn scalar(&mut self) -> Result<Scalar<'a>, Unusual> {
        match self.peek() {
            Some(b'"') => {
                self.at += 1;
                let start = self.at;
                let length = self.text_to_quote()?.len();
                Ok(Scalar::Text(Cow::Borrowed(&self.text[start..start + length])))
            }
            Some(b'-' | b'0'..=b'9') => self.number().map(Scalar::Number),
            Some(b'n') => self.expect("null").map(|()| Scalar::Null),
            Some(b't') => self.expect("true").map(|()| Scalar::Bool(true)),
            Some(b'f') => self.expect("false").map(|()| Scalar::Bool(false)),
            _ => Err(Unusual),
        }
    }

    fn three_numbers(&mut self) -> Result<Option<[f64; 3]>, Unusual> {
        let mut numbers = [0.0; 3];
        for (before, number) in ["[", ", ", ", "].into_iter().zip(&mut numbers) {
            self.expect(before)?;
            *number = self.number()?;
        }
        self.expect("]")?;
        Ok(Some(numbers))
    }

    fn member(&mut self, name: &str) -> Result<Option<Scalar<'a>>, Unusual> {
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
    fn skip(&mut self) -> Result<(), Unusual> {
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
    fn what_is_plain() {
        assert_eq!(plain(b"{\"a\": 1}~"), Some("{\"a\": 1}~"));
        for text in ["\u{e9}", "a\n", "\u{7f}", "\0", &format!("{}\t", "x".repeat(200))] {
            assert_eq!(plain(text.as_bytes()), None, "{text:?}");
        }
    }

    #[test]
    fn what_is_skipped_is_json() {
        for text in [
            r#""""#,
            r#""short""#,
            r#""a text of more than eight \"bytes\", \\ \u00e9 \n""#,
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
    fn values_that_are_asked_for() {
        let scalar = |text| Scanner::new(text).scalar();
        assert_eq!(scalar("\"a\","), Ok(Scalar::Text("a".into())));
        assert_eq!(scalar("1763820000.1234567}"), Ok(Scalar::Number(1_763_820_000.123_456_7)));
        assert_eq!(scalar("18446744073709551616"), Ok(Scalar::Number(18_446_744_073_709_551_616.0)));
        assert_eq!(scalar("null"), Ok(Scalar::Null));
        for text in [r#""\n""#, "[]", "{}", "1e999", "-Infinity"] {
            assert_eq!(scalar(text), Err(Unusual), "{text}");
        }
        assert_eq!(Scanner::new("[0.5, 1, 2e0]").three_numbers(), Ok(Some([0.5, 1.0, 2.0])));
        for text in ["[0.5, 1]", "[0.5, 1, 2, 3]", "[0.5, 1, null]", "null"] {
            assert_eq!(Scanner::new(text).three_numbers(), Err(Unusual), "{text}");
        }
        assert_eq!(Scanner::new(r#"{"a": 1, "b": {}, "a": 2}"#).member("a"), Ok(Some(Scalar::Number(2.0))));
        assert_eq!(Scanner::new(r#"{"b": []}"#).member("a"), Ok(None));
        assert_eq!(Scanner::new("null").member("a"), Ok(None));
        assert_eq!(Scanner::new("5").member("a"), Err(Unusual));
    }
}
