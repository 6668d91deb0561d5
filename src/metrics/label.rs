//! Label values: bounded, escaped once, written as Flower writes them.

use std::fmt::Write;

/// What series beyond the bounds are recorded under.
pub const OTHER: &str = "(other)";

/// Appends `name="value"`, escaped as the text format and `OpenMetrics` both ask for.
pub(super) fn append(out: &mut String, name: &str, value: &str) {
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

/// A histogram's upper bound as `prometheus_client` writes it in `le` (`floatToGoString`): `1.0`, `0.075`, `1e+06`.
pub(super) fn bound(value: f64) -> String {
    if value.is_infinite() {
        return if value > 0.0 { "+Inf".to_owned() } else { "-Inf".to_owned() };
    }
    let scientific = format!("{:e}", value.abs());
    let (mantissa, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let digits = mantissa.replace('.', "");
    let exponent: i32 = exponent.parse().unwrap_or_default();
    let mut text = String::from(if value < 0.0 { "-" } else { "" });
    let small_exponent = exponent < -4;
    // Python's repr turns to exponents below 1e-4 and from 1e16; its client from 1e6 on, for positive numbers.
    if small_exponent || exponent >= if value > 0.0 { 6 } else { 16 } {
        let sign = if small_exponent { '-' } else { '+' };
        let (first, rest) = digits.split_at(1);
        let point = if rest.is_empty() { "" } else { "." };
        let _ = write!(text, "{first}{point}{rest}e{sign}{:02}", exponent.abs());
    } else {
        let _ = write!(text, "{:?}", value.abs());
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_read_as_python_writes_them() {
        // prometheus_client.utils.floatToGoString of each.
        for (value, text) in [
            (0.005, "0.005"),
            (0.075, "0.075"),
            (1.0, "1.0"),
            (7.5, "7.5"),
            (10.0, "10.0"),
            (-1.0, "-1.0"),
            (100_000.0, "100000.0"),
            (1_000_000.0, "1e+06"),
            (1_234_567.5, "1.2345675e+06"),
            (0.0001, "0.0001"),
            (0.00001, "1e-05"),
            (f64::INFINITY, "+Inf"),
        ] {
            assert_eq!(bound(value), text);
        }
    }

    #[test]
    fn label_values_are_escaped() {
        let mut text = String::new();
        append(&mut text, "task", "a\\b\"c\nd é");
        assert_eq!(text, r#"task="a\\b\"c\nd é""#);
    }
}
