//! Bounds the length of names from the wire.

use std::borrow::Cow;

/// The longest name that is kept whole, in bytes.
const MAX_BYTES: usize = 256;

/// A name as a label value. A name longer than 256 bytes is truncated to at most 256 bytes, on a character boundary,
/// and `…` is appended.
#[must_use]
pub fn truncate_label(text: &str) -> Cow<'_, str> {
    if text.len() <= MAX_BYTES {
        return Cow::Borrowed(text);
    }
    Cow::Owned(format!("{}…", &text[..text.floor_char_boundary(MAX_BYTES)]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_names_are_truncated_on_a_character_boundary() {
        assert_eq!(truncate_label("short"), "short");
        assert_eq!(truncate_label(&"x".repeat(256)), "x".repeat(256));
        assert_eq!(truncate_label(&"x".repeat(257)), format!("{}…", "x".repeat(256)));
        assert_eq!(truncate_label(&"é".repeat(200)), format!("{}…", "é".repeat(128)));
        assert_eq!(truncate_label(&format!("x{}", "é".repeat(200))), format!("x{}…", "é".repeat(127)));
    }
}
