//! Numbers without sign and exponent, which are nearly all that Celery writes, built while their digits are read.

/// The number of digits that a `u64` holds.
const MAX_DIGITS: usize = 19;
const POWERS_OF_TEN: [u64; 19] = {
    let mut powers = [1; 19];
    let mut index = 1;
    while index < powers.len() {
        powers[index] = powers[index - 1] * 10;
        index += 1;
    }
    powers
};

/// The number at the start of a text, and its length in bytes. The number is the nearest `f64`, as `parse` returns it.
/// `None` if the text is not a plain decimal number, or if the number has a sign, an exponent or too many digits.
pub(super) fn decimal(text: &[u8]) -> Option<(f64, usize)> {
    let (mut mantissa, mut rest) = append_digits(0, text);
    let (integer_digits, mut decimals) = (text.len() - rest.len(), 0);
    if let [b'.', fraction @ ..] = rest {
        (mantissa, rest) = append_digits(mantissa, fraction);
        decimals = fraction.len() - rest.len();
        if decimals == 0 {
            return None;
        }
    }
    if !is_integer(text, integer_digits)
        || integer_digits + decimals > MAX_DIGITS
        || matches!(rest.first(), Some(b'e' | b'E'))
    {
        return None;
    }
    Some((quotient(mantissa, *POWERS_OF_TEN.get(decimals)?), text.len() - rest.len()))
}

/// Appends the digits at the start of a text to a number. Returns the number, if its digits fit, and the rest of the text.
#[inline]
fn append_digits(mut number: u64, text: &[u8]) -> (u64, &[u8]) {
    let mut rest = text;
    if let Some(eight) = text.first_chunk() {
        let (value, count) = leading_digits(*eight);
        (number, rest) = (number.wrapping_mul(POWERS_OF_TEN[count]).wrapping_add(value), &text[count..]);
        if count < 8 {
            return (number, rest);
        }
    }
    while let [digit @ b'0'..=b'9', more @ ..] = rest {
        (number, rest) = (number.wrapping_mul(10).wrapping_add(u64::from(digit - b'0')), more);
    }
    (number, rest)
}

/// The digits at the start of eight bytes: their value, and their number.
#[inline]
fn leading_digits(text: [u8; 8]) -> (u64, usize) {
    const fn repeat(byte: u8) -> u64 {
        u64::from_ne_bytes([byte; 8])
    }
    // The first byte is the lowest one. A digit becomes its value, and adding six leaves the high half of that byte empty.
    let values = u64::from_le_bytes(text) ^ repeat(b'0');
    let other = (values | values.wrapping_add(repeat(6))) & repeat(0xf0);
    let bits = other.trailing_zeros() & !7;
    // As if zeros preceded the digits.
    let eight = values.checked_shl(u64::BITS - bits).unwrap_or_default();
    // Pairs of digits are combined into the even bytes, and then into one number in the high half.
    let pairs = eight.wrapping_mul(10).wrapping_add(eight >> 8);
    let [first_and_third, second_and_fourth] = [pairs, pairs >> 16].map(|pairs| pairs & 0x0000_00ff_0000_00ff);
    let high = first_and_third.wrapping_mul(100 + (1_000_000 << 32));
    let low = second_and_fourth.wrapping_mul(1 + (10_000 << 32));
    (high.wrapping_add(low) >> 32, bits as usize / 8)
}

/// The length of the number at the start of a text. `None` if it has a sign or an exponent, or is none.
#[inline(always)]
#[allow(clippy::inline_always, reason = "a call would take longer than most numbers")]
pub(super) fn decimal_length(text: &[u8]) -> Option<usize> {
    let integer = digit_count(text);
    let end = match text.get(integer) {
        Some(b'.') => integer + 1 + digit_count(&text[integer + 1..]),
        _ => integer,
    };
    let is_valid = is_integer(text, integer) && end != integer + 1 && !matches!(text.get(end), Some(b'e' | b'E'));
    is_valid.then_some(end)
}

/// Whether this many digits at the start of a text are an integer in JSON: at least one, and no needless zero.
#[inline]
fn is_integer(text: &[u8], digits: usize) -> bool {
    digits == 1 || (digits > 1 && text[0] != b'0')
}

/// The number of digits at the start of a text.
#[inline]
pub(super) fn digit_count(text: &[u8]) -> usize {
    text.iter().take_while(|byte| byte.is_ascii_digit()).count()
}

/// The quotient of a mantissa and a power of ten up to 10^18, rounded to the nearest `f64`.
#[inline]
fn quotient(mantissa: u64, power: u64) -> f64 {
    if mantissa <= 1 << f64::MANTISSA_DIGITS {
        // An `f64` represents both exactly, so the result is rounded once.
        return mantissa as f64 / power as f64;
    }
    let (dividend, divisor) = (u128::from(mantissa) << 64, u128::from(power));
    let quotient = dividend / divisor;
    let has_remainder = quotient * divisor != dividend;
    // The quotient has at least 57 bits. If the lowest one is set wherever there is a remainder, none looks like a tie.
    (quotient | u128::from(has_remainder)) as f64 / (1_u128 << 64) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    proptest::proptest! {
        /// Quotients close to a tie round like `parse`.
        #[test]
        fn quotients_round_to_even(mantissa: u64, exponent in 0..19_usize, odd in 1_u64..1 << 52) {
            for mantissa in [mantissa, (1 << 53) + 2 * odd + 1, (1 << 54) + 4 * odd + 2] {
                let text = format!("{mantissa}e-{exponent}");
                let quotient = quotient(mantissa, POWERS_OF_TEN[exponent]);
                proptest::prop_assert_eq!(quotient.to_bits(), text.parse::<f64>().unwrap().to_bits());
            }
        }
    }
}
