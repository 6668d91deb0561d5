//! Bucket bounds (`le`) in the notation of Python's `prometheus_client`.

use std::fmt::Write;

/// Formats a bucket's upper bound as `prometheus_client` does (`floatToGoString`): `1.0`, `0.075`, `1e+06`.
pub(super) fn format_le(value: f64) -> String {
    if value.is_infinite() {
        return if value > 0.0 { "+Inf".to_owned() } else { "-Inf".to_owned() };
    }
    let scientific = format!("{:e}", value.abs());
    let (mantissa, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let digits = mantissa.replace('.', "");
    let exponent: i32 = exponent.parse().unwrap_or_default();
    let mut text = String::from(if value < 0.0 { "-" } else { "" });
    let is_small = exponent < -4;
    // Python's repr uses exponents below 1e-4 and from 1e16. `floatToGoString` uses them from 1e6, for positive
    // numbers.
    if is_small || exponent >= if value > 0.0 { 6 } else { 16 } {
        let sign = if is_small { '-' } else { '+' };
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
    fn bounds_are_formatted_as_in_prometheus_client() {
        // Expected values: prometheus_client.utils.floatToGoString.
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
            assert_eq!(format_le(value), text);
        }
    }
}
