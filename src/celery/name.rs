//! Names from the wire are kept up to a bound.

use std::borrow::Cow;

/// Bytes of a name that are kept.
const MAX_BYTES: usize = 256;

/// A name as it is used in labels: one longer than 256 bytes is cut there, on a character boundary, and ends in `…`.
#[must_use]
pub fn cut(text: &str) -> Cow<'_, str> {
    if text.len() <= MAX_BYTES {
        return Cow::Borrowed(text);
    }
    Cow::Owned(format!("{}…", &text[..text.floor_char_boundary(MAX_BYTES)]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_cut_on_a_character_boundary() {
        assert_eq!(cut("short"), "short");
        assert_eq!(cut(&"x".repeat(256)), "x".repeat(256));
        assert_eq!(cut(&"x".repeat(257)), format!("{}…", "x".repeat(256)));
        assert_eq!(cut(&"é".repeat(200)), format!("{}…", "é".repeat(128)));
        assert_eq!(cut(&format!("x{}", "é".repeat(200))), format!("x{}…", "é".repeat(127)));
    }
}
