//! Escapes label values.

/// The label value for everything beyond a limit.
pub const OTHER: &str = "(other)";

/// Appends `name="value"`, with the escapes that the text format and `OpenMetrics` both require.
pub(super) fn append_escaped(out: &mut String, name: &str, value: &str) {
    out.push_str(name);
    out.push_str("=\"");
    for character in value.chars() {
        match character {
            '\\' => out.push_str("\\\\"),
            '"' => out.push_str("\\\""),
            '\n' => out.push_str("\\n"),
            other => out.push(other),
        }
    }
    out.push('"');
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backslashes_quotes_and_newlines_are_escaped() {
        let mut text = String::new();
        append_escaped(&mut text, "task", "a\\b\"c\nd é");
        assert_eq!(text, r#"task="a\\b\"c\nd é""#);
    }
}
